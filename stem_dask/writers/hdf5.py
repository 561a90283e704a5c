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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import of_type
from stem_dask.core.errors import StoreError
from stem_dask.core.metadata import hdf5_tree, to_json
from stem_dask.core.model import Record, Region
from stem_dask.storage.errors import translate
from stem_dask.writers.codecs import (
    LEVELS,
    blosc_bytes,
    bytes_apart,
    deflated,
    lies_on_chunks,
    whole_chunks,
)
from stem_dask.writers.spool import SpoolSink
from stem_dask.writers.zarr import ABOUT_SOURCE

if TYPE_CHECKING:
    import xarray as xr

#: codec of ``auto``, which all readers of HDF5 know
CODEC = "gzip"


@dataclass(frozen=True)
class Hdf5Sink:
    """Writes ``patterns`` into a dataset of a new HDF5 file; other blocks are spooled.

    Parameters
    ----------
    path : the file under its temporary name
    spool : folder for compressed chunks and other blocks
    shape, dtype : of the patterns
    chunks : whole patterns; the leading sizes divide the blocks or cover the axis
    dataset : path of the dataset in the file
    codec : one of `stem_dask.writers.codecs.CODECS`; readers of lz4 and zstd (blosc) need a plugin
    """

    path: str
    spool: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    dataset: str
    codec: str = "auto"
    stage: list[str] = field(default_factory=list, compare=False)

    @property
    def _spool(self) -> SpoolSink:
        return SpoolSink(self.spool, self.stage)

    def create(self, *, resume: bool) -> None:
        """Make the spool; the file itself is written at the end."""
        with translate(StoreError, self.path), open(self.path, "wb"):
            pass  # the temporary name marks the output as incomplete
        self._spool.create(resume=resume)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Compress the chunks of one block and spool them."""
        if not lies_on_chunks(region, self.chunks, self.shape):
            raise StoreError(f"block {index} does not lie on the chunks of {self.path}")
        spooled = dict(blocks)
        block = of_type(spooled.pop("patterns"), np.dtype(self.dtype))  # and byte order
        origins, packed = [], []
        for origin, chunk in whole_chunks(block, region, self.chunks):
            origins.append(origin)
            packed.append(pack_chunk(chunk, self.codec))
        spooled["bytes"] = np.frombuffer(b"".join(packed), np.uint8)
        spooled["sizes"] = np.array([len(content) for content in packed], np.int64)
        spooled["origins"] = np.array(origins, np.int64)
        return self._spool.write(index, region, spooled)

    def verify(self, record: Record) -> str | None:
        """Compare the file of a block with its checksum."""
        return self._spool.verify(record)

    def finish(self, records: Sequence[Record]) -> None:
        """Append all chunks in the order of their block."""
        import h5py

        spool = self._spool
        spool.finish(records)
        sizes = (blocks["sizes"].sum() for _, blocks in spool.blocks(len(records), ("sizes",)))
        refuse_full_disk(self.path, int(sum(sizes)))
        with h5py.File(self.path, "w", locking=False) as file:
            data = file.create_dataset(
                self.dataset,
                self.shape,
                np.dtype(self.dtype),
                chunks=self.chunks,
                **_filters(self.codec),
            )
            for _, spooled in spool.blocks(len(records), ("bytes", "sizes", "origins")):
                start, packed = 0, spooled["bytes"]
                for origin, size in zip(
                    spooled["origins"].tolist(), spooled["sizes"].tolist(), strict=True
                ):
                    data.id.write_direct_chunk(tuple(origin), packed[start : start + size])
                    start += size


def refuse_full_disk(path: str, n_bytes: int) -> None:
    """Raise OSError if so many bytes do not fit: a failing HDF5 write may crash the process when it exits."""
    n_bytes += n_bytes // 50 + 2**17  # indexes of HDF5, and small arrays
    if n_bytes > (free := shutil.disk_usage(os.path.dirname(path)).free):
        raise OSError(errno.ENOSPC, f"{n_bytes:,} bytes are needed and {free:,} are free", path)
    if n_bytes + os.path.getsize(path) > (most := _largest_file()):
        raise OSError(
            errno.EFBIG, f"{n_bytes:,} bytes are needed; the file size limit is {most:,}", path
        )


def _largest_file() -> float:
    """Limit of the file size (``ulimit -f``)."""
    try:
        import resource
    except ImportError:
        return math.inf
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return math.inf if most == resource.RLIM_INFINITY else most


def pack_chunk(chunk: NDArray, codec: str) -> bytes:
    """Compress one chunk like the filters of HDF5: shuffle and deflate, or blosc.

    Examples
    --------
    >>> import zlib
    >>> zlib.decompress(pack_chunk(np.array([[1, 258]], "<u2"), "gzip"))
    b'\\x01\\x02\\x00\\x01'
    """
    codec = CODEC if codec == "auto" else codec
    if codec == "none":
        return chunk.tobytes()
    if codec != "gzip":
        return blosc_bytes(chunk, codec, "bitshuffle")
    return deflated(bytes_apart(chunk), LEVELS[codec])


def _filters(codec: str) -> dict[str, Any]:
    """Options of `create_dataset` for the same filters."""
    codec = CODEC if codec == "auto" else codec
    if codec == "none":
        return {}
    if codec == "gzip":
        return {"compression": "gzip", "compression_opts": LEVELS[codec], "shuffle": True}
    import hdf5plugin

    shuffle = hdf5plugin.Blosc.BITSHUFFLE
    return dict(hdf5plugin.Blosc(cname=codec, clevel=LEVELS[codec], shuffle=shuffle))


#: longer attributes become datasets, because HDF5 limits attributes to 64 kB
_LONGEST_ATTRIBUTE = 2**15


def write_about(
    path: str,
    patterns: xr.DataArray,
    analysis: xr.Dataset | None,
    about: Mapping[str, Any],
) -> None:
    """Write axes as dimension scales, ``valid``, the analysis and the attributes.

    Parameters
    ----------
    path : the file, which has the dataset ``patterns``
    patterns : lazy; their axes, attributes and coordinate ``valid`` are written
    analysis : small arrays for the group ``analysis``, or None
    about : attributes of the root, in addition to those of the patterns about the source
    """
    import h5py

    known = {} if analysis is None else analysis.variables
    refuse_full_disk(path, sum(variable.nbytes for variable in known.values()))
    source = {key: patterns.attrs[key] for key in ABOUT_SOURCE if key in patterns.attrs}
    own = {key: value for key, value in patterns.attrs.items() if key not in source}
    with translate(StoreError, path), h5py.File(path, "r+", locking=False) as file:
        _write_tree(file, hdf5_tree(to_json({**about, **source})))
        data = file["patterns"]
        _write_tree(data, hdf5_tree(to_json(own)))
        for dim in map(str, patterns.dims):
            scale = _write_array(file, dim, patterns.coords[dim].variable)
            scale.make_scale(dim)
        _name_axes(file, data, patterns.dims)
        if "valid" in patterns.coords:
            variable = patterns.coords["valid"].variable
            _name_axes(file, _write_array(file, "valid", variable), variable.dims)
        group = None if analysis is None else file.create_group("analysis")
        for name, variable in known.items():
            if variable.dtype.kind in "biuf":
                dims = variable.dims
                _name_axes(file, _write_array(group, str(name), variable), dims)
            else:
                _write_tree(group, hdf5_tree(to_json({str(name): variable.values})))
        if analysis is not None:
            _write_tree(group, hdf5_tree(to_json(analysis.attrs)))


def _write_array(group: Any, name: str, variable: xr.Variable) -> Any:
    """Write a small array with its attributes."""
    packed: dict[str, Any] = {"compression": "gzip", "shuffle": True} if variable.ndim else {}
    dataset = group.create_dataset(name, data=np.asarray(variable.values), **packed)
    _write_tree(dataset, hdf5_tree(to_json(variable.attrs)))
    return dataset


def _name_axes(file: Any, dataset: Any, dims: Any) -> None:
    """Label the axes of a dataset and attach dimension scales."""
    for i, dim in enumerate(map(str, dims)):
        dataset.dims[i].label = dim
        if dim in file and dataset.shape[i] == file[dim].shape[0]:
            dataset.dims[i].attach_scale(file[dim])


def _write_tree(item: Any, tree: Mapping[str, Any]) -> None:
    """Write plain values as attributes; in groups, dictionaries become groups and long values datasets."""
    import h5py

    group = item if isinstance(item, h5py.Group) else None
    for key, value in tree.items():
        if isinstance(value, Mapping) and group is not None:
            _write_tree(group.require_group(key), value)
            continue
        value = json.dumps(value) if isinstance(value, Mapping) else value
        value = "_None_" if value is None else value  # as in HyperSpy
        if group is not None and (
            np.size(value) > 1 or len(str(value).encode()) > _LONGEST_ATTRIBUTE
        ):
            group.create_dataset(key, data=value)
        else:
            item.attrs[key] = value
