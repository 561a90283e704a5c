"""HyperSpy's zarr stores (.zspy): zarr format 2, written without the package that pins zarr below 3.

The layout is that of RosettaSciIO's ZSPY: ``Experiments/TITLE`` with ``data``, ``axis-0`` … and the metadata as groups,
whose plain values are attributes and whose arrays are arrays.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import StoreError
from stem_dask.io.checksums import crc32
from stem_dask.io.codec import (
    LEVELS,
    blosc_bytes,
    gzipped,
    lies_on_chunks,
    one_thread_blosc,
    shuffle_of,
    whole_chunks,
)
from stem_dask.io.hspy import experiment
from stem_dask.io.pieces import of_type
from stem_dask.io.publish import damage, named, naming, remove
from stem_dask.io.spool import SpoolSink
from stem_dask.io.zarr3 import plain
from stem_dask.model import Record, Region

CODEC = "lz4"
_FORMAT = {"file_format": "ZSpy", "file_format_version": "3.3"}


@dataclass(frozen=True)
class ZspySink:
    """Writes ``patterns`` into a .zspy store, a file a chunk; the other blocks are kept for who completes it.

    Parameters
    ----------
    path : the store under its temporary name
    spool : folder for the other blocks
    shape, dtype : of the patterns
    chunks : whole patterns; the leading extents divide the blocks or cover the axis
    title : title of the signal
    codec : one of `stem_dask.io.codec.CODECS`; format 2 has no checksums, so those of the records are all there are
    """

    path: str
    spool: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    title: str
    codec: str = "auto"

    @property
    def _data(self) -> str:
        return f"{experiment(self.title)}/data"

    def create(self, *, resume: bool) -> None:
        """Make the groups and the empty array; what another run left there is removed."""
        if resume and self._is_begun():
            for torn in Path(self.path).rglob("*.partial"):
                remove(torn)
        else:
            remove(self.path)
            with named(self.path):
                self._create_array(self.path)
        SpoolSink(self.spool).create(resume=resume)

    def _create_array(self, place: Any) -> Any:
        import zarr

        root = zarr.create_group(place, zarr_format=2, attributes=_FORMAT)
        return _array(root, self._data, self.shape, np.dtype(self.dtype), self.chunks, self.codec)

    def _is_begun(self) -> bool:
        """Whether an array like this one is there: another run may have left one of other chunks or codec."""
        import zarr

        try:
            there = zarr.open_array(self.path, path=self._data, mode="r").metadata
        except (OSError, ValueError, KeyError, TypeError):  # none, or not one that zarr can read
            return False
        return bool(there == self._create_array({}).metadata)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write the chunks of one block, each under a temporary name that is then renamed."""
        if not lies_on_chunks(region, self.chunks, self.shape):
            raise StoreError(f"block {index} does not lie on the chunks of {self.path}")
        rest = dict(blocks)
        block = of_type(rest.pop("patterns"), np.dtype(self.dtype))  # and byte order
        said = []
        for origin, chunk in whole_chunks(block, region, self.chunks):
            place = [start // size for start, size in zip(origin, self.chunks, strict=True)]
            name = "/".join(map(str, place))
            file = self._file(name)
            partial = file.with_name(f"{file.name}.{index}.partial")
            content = _packed(chunk, self.codec)
            with named(partial):
                file.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(content)
                os.replace(partial, file)
            said.append([name, crc32(content), len(content)])
        return {"chunks": said, **SpoolSink(self.spool).write(index, region, rest)}

    def verify(self, record: Record) -> str | None:
        """Compare the files of a block with their checksums."""
        for name, crc, n_bytes in record.extra.get("chunks", ()):
            what = damage(self._file(name), (crc, n_bytes))
            if what is not None:
                return what
        return SpoolSink(self.spool).verify(record)

    def finish(self, records: Sequence[Record]) -> None:
        """See that every chunk is there; `write_signal` adds what else belongs to a signal."""
        for record in records:
            for name, _, n_bytes in record.extra["chunks"]:
                file = self._file(name)
                if not file.exists() or file.stat().st_size != n_bytes:
                    raise StoreError(
                        f"{file} is not as it was written; the same command makes it again"
                    )

    def _file(self, name: str) -> Path:
        return Path(self.path, self._data, name)


@naming
def write_signal(path: str, signal: Mapping[str, Any]) -> None:
    """Write all but the data of a signal (see `stem_dask.io.hspy.signal_of`) into the store that holds them."""
    import zarr

    root = zarr.open_group(path, mode="r+")
    group = root[experiment(signal["metadata"]["General"]["title"])]
    tree = {f"axis-{i}": axis for i, axis in enumerate(signal["axes"])}
    names = ("metadata", "original_metadata", "learning_results", "attributes")
    with one_thread_blosc():
        _write_tree(group, {**tree, **{name: signal[name] for name in names}})
    group.attrs.update(signal["package_info"])


def _write_tree(group: Any, tree: Mapping[str, Any]) -> None:
    """Nested dictionaries as groups, arrays as arrays, plain values as attributes, as HyperSpy reads them."""
    attrs = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            _write_tree(group.require_group(key), value)
        elif isinstance(value, np.ndarray):
            array = _array(group, key, value.shape, value.dtype, value.shape, "auto")
            array[...] = value
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            numbered = {str(i): item for i, item in enumerate(value)}
            _write_tree(group.require_group(f"_list_{len(value)}_{key}"), numbered)
        else:
            attrs[key] = "_None_" if value is None else value
    group.attrs.update(plain(attrs))


def _array(
    group: Any, name: str, shape: Sequence[int], dtype: np.dtype, chunks: Sequence[int], codec: str
) -> Any:
    return group.create_array(
        name,
        shape=tuple(shape),
        dtype=dtype.newbyteorder("="),
        chunks=tuple(max(1, n) for n in chunks),
        compressors=_compressor(codec, dtype),
        fill_value=0,
        chunk_key_encoding={"name": "v2", "separator": "/"},
        config={"write_empty_chunks": True},
        overwrite=True,  # what an interrupted finish left
    )


def _compressor(codec: str, dtype: np.dtype) -> Any:
    """What the array says of its chunks; see `_packed`."""
    import numcodecs

    codec = CODEC if codec == "auto" else codec
    if codec == "none":
        return None
    if codec == "gzip":
        return numcodecs.GZip(LEVELS[codec])
    shuffle = {"bitshuffle": 2, "shuffle": 1}[shuffle_of(dtype)]
    return numcodecs.Blosc(codec, LEVELS[codec], shuffle)


def _packed(chunk: NDArray, codec: str) -> bytes:
    """The bytes of a chunk file: always the same for the same numbers, while numcodecs' gzip writes the time."""
    codec = CODEC if codec == "auto" else codec
    if codec == "none":
        return chunk.tobytes()
    if codec == "gzip":
        return gzipped(chunk.reshape(-1).view(np.uint8).data, LEVELS[codec])
    return blosc_bytes(chunk, codec, shuffle_of(chunk.dtype))
