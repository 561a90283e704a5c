"""HDF5 files (.h5, .hspy): tasks compress chunks, and the client appends them in order.

Only one process can write an HDF5 file, but it accepts compressed chunks. Tasks spool the chunks of their block to the folder of
the run, and `finish` copies them into the file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import of_type
from stem_dask.core.errors import StoreError
from stem_dask.core.formats import Output
from stem_dask.core.metadata import hdf5_tree, to_json
from stem_dask.core.model import Record, Region
from stem_dask.core.patterns import ABOUT_SOURCE
from stem_dask.storage.errors import translate
from stem_dask.writers.codecs import LEVELS, blosc_bytes, bytes_apart, deflated, whole_chunks
from stem_dask.writers.spool import SpoolSink

if TYPE_CHECKING:
    import xarray as xr

#: longer attributes become datasets, because HDF5 limits attributes to 64 kB
_LONGEST_ATTRIBUTE = 2**15


@dataclass(frozen=True)
class Hdf5Sink:
    """Writes ``patterns`` into a dataset of a new HDF5 file; other blocks are spooled."""

    output: Output
    stage: list[str] = field(default_factory=list, compare=False)

    @property
    def dataset(self) -> str:
        """Path of the dataset in the file."""
        return "patterns"

    @property
    def spool(self) -> SpoolSink:
        """For compressed chunks and other blocks."""
        return SpoolSink(self.output.spool, self.stage)

    @property
    def _codec(self) -> str:
        # gzip is known to all readers of HDF5
        return "gzip" if self.output.codec == "auto" else self.output.codec

    def create(self, *, resume: bool) -> None:
        """Make the spool; the file itself is written at the end."""
        with translate(StoreError, self.output.path), open(self.output.path, "wb"):
            pass  # the temporary name marks the output as incomplete
        self.spool.create(resume=resume)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Compress the chunks of one block and spool them."""
        output, spooled = self.output, dict(blocks)
        block = of_type(spooled.pop("patterns"), output.dtype)  # and byte order
        origins, packed = [], []
        for origin, chunk in whole_chunks(block, region, output.chunks, output.shape):
            origins.append(origin)
            packed.append(pack_chunk(chunk, self._codec))
        spooled["bytes"] = np.frombuffer(b"".join(packed), np.uint8)
        spooled["sizes"] = np.array([len(content) for content in packed], np.int64)
        spooled["origins"] = np.array(origins, np.int64)
        return self.spool.write(index, region, spooled)

    def verify(self, record: Record) -> str | None:
        """Compare the file of a block with its checksum."""
        return self.spool.verify(record)

    def finish(self, records: Sequence[Record]) -> None:
        """Append all chunks in the order of their block."""
        import h5py

        options: dict[str, Any] = {}
        if self._codec == "gzip":
            options = {"compression": "gzip", "compression_opts": LEVELS["gzip"], "shuffle": True}
        elif self._codec != "none":
            import hdf5plugin

            shuffle = hdf5plugin.Blosc.BITSHUFFLE
            level = LEVELS[self._codec]
            options = dict(hdf5plugin.Blosc(cname=self._codec, clevel=level, shuffle=shuffle))
        output, spool, n = self.output, self.spool, len(records)
        spool.finish(records)
        sizes = (blocks["sizes"].sum() for _, blocks in spool.blocks(n, ("sizes",)))
        refuse_full_disk(output.path, int(sum(sizes)))
        with h5py.File(output.path, "w", locking=False) as file:
            data = file.create_dataset(
                self.dataset, output.shape, output.dtype, chunks=output.chunks, **options
            )
            for _, spooled in spool.blocks(n, ("bytes", "sizes", "origins")):
                start = 0
                origins, sizes = spooled["origins"].tolist(), spooled["sizes"].tolist()
                for origin, size in zip(origins, sizes, strict=True):
                    content = spooled["bytes"][start : start + size]
                    data.id.write_direct_chunk(tuple(origin), content)
                    start += size

    def complete(
        self, patterns: xr.DataArray, analysis: xr.Dataset | None, about: Mapping[str, Any]
    ) -> list[str]:
        """Write axes as dimension scales, ``valid``, the analysis and the attributes."""
        import h5py

        path = self.output.path
        known = {} if analysis is None else analysis.variables
        refuse_full_disk(path, sum(variable.nbytes for variable in known.values()))
        source = {key: patterns.attrs[key] for key in ABOUT_SOURCE if key in patterns.attrs}
        own = {key: value for key, value in patterns.attrs.items() if key not in source}
        with translate(StoreError, path), h5py.File(path, "r+", locking=False) as file:
            _write_attrs(file, {**about, **source})
            data = file["patterns"]
            _write_attrs(data, own)
            for dim in map(str, patterns.dims):
                _write_array(file, dim, patterns.coords[dim].variable).make_scale(dim)
            _name_axes(file, data, patterns.dims)
            if "valid" in patterns.coords:
                variable = patterns.coords["valid"].variable
                _name_axes(file, _write_array(file, "valid", variable), variable.dims)
            if analysis is not None:
                group = file.create_group("analysis")
                for name, variable in known.items():
                    if variable.dtype.kind in "biuf":
                        array = _write_array(group, str(name), variable)
                        _name_axes(file, array, variable.dims)
                    else:
                        _write_attrs(group, {str(name): variable.values})
                _write_attrs(group, analysis.attrs)
        return self.plugin_note()

    def plugin_note(self) -> list[str]:
        """What readers need."""
        if self._codec not in ("lz4", "zstd"):
            return []
        name = Path(self.output.path).name.removesuffix(".incomplete")
        return [f"{name} is compressed with blosc {self._codec}: reading it requires hdf5plugin"]


def refuse_full_disk(path: str, n_bytes: int) -> None:
    """Raise OSError if so many bytes do not fit: a failing HDF5 write may crash the process when it exits."""
    n_bytes += n_bytes // 50 + 2**17  # indexes of HDF5, and small arrays
    if n_bytes > (free := shutil.disk_usage(os.path.dirname(path)).free):
        raise OSError(errno.ENOSPC, f"{n_bytes:,} bytes are needed and {free:,} are free", path)
    most = math.inf  # of ``ulimit -f``
    if os.name == "posix":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        most = math.inf if limit == resource.RLIM_INFINITY else limit
    if n_bytes + os.path.getsize(path) > most:
        raise OSError(
            errno.EFBIG, f"{n_bytes:,} bytes are needed; the file size limit is {most:,}", path
        )


def pack_chunk(chunk: NDArray, codec: str) -> bytes:
    """Compress one chunk like the filters of HDF5: shuffle and deflate, or blosc.

    Examples
    --------
    >>> import zlib
    >>> zlib.decompress(pack_chunk(np.array([[1, 258]], "<u2"), "gzip"))
    b'\\x01\\x02\\x00\\x01'
    """
    if codec == "none":
        return chunk.tobytes()
    if codec != "gzip":
        return blosc_bytes(chunk, codec, "bitshuffle")
    return deflated(bytes_apart(chunk), LEVELS[codec])


def _write_array(group: Any, name: str, variable: xr.Variable) -> Any:
    """Write a small array with its attributes."""
    packed: dict[str, Any] = {"compression": "gzip", "shuffle": True} if variable.ndim else {}
    dataset = group.create_dataset(name, data=np.asarray(variable.values), **packed)
    _write_attrs(dataset, variable.attrs)
    return dataset


def _name_axes(file: Any, dataset: Any, dims: Any) -> None:
    """Label the axes of a dataset and attach dimension scales."""
    for i, dim in enumerate(map(str, dims)):
        dataset.dims[i].label = dim
        if dim in file and dataset.shape[i] == file[dim].shape[0]:
            dataset.dims[i].attach_scale(file[dim])


def _write_attrs(item: Any, attrs: Mapping[str, Any]) -> None:
    """Write attributes; in a group dictionaries become groups, and long values datasets."""
    import h5py

    def write(item: Any, tree: Mapping[str, Any]) -> None:
        is_group = isinstance(item, h5py.Group)
        for key, value in tree.items():
            if isinstance(value, Mapping) and is_group:
                write(item.require_group(key), value)
                continue
            value = json.dumps(value) if isinstance(value, Mapping) else value
            value = "_None_" if value is None else value  # as in HyperSpy
            is_long = np.size(value) > 1 or len(str(value).encode()) > _LONGEST_ATTRIBUTE
            if is_group and is_long:
                item.create_dataset(key, data=value)
            else:
                item.attrs[key] = value

    write(item, hdf5_tree(to_json(attrs)))
