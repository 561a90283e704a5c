"""Stores of HyperSpy (.zspy): zarr 2 in the layout of RosettaSciIO.

``Experiments/TITLE`` holds ``data``, ``axis-0`` … and the metadata as groups; their plain values are attributes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import of_type
from stem_dask.core.errors import StoreError
from stem_dask.core.metadata import to_json
from stem_dask.core.model import Record, Region
from stem_dask.storage.checksums import crc32
from stem_dask.storage.publish import damage, remove
from stem_dask.storage.staging import append, remove_unfinished, staged
from stem_dask.writers.codecs import (
    CODEC,
    LEVELS,
    compressed,
    lies_on_chunks,
    shuffle_of,
    whole_chunks,
)
from stem_dask.writers.hspy import experiment
from stem_dask.writers.spool import SpoolSink

_LONGEST_NAME = 200  # bytes; most file systems allow 255

_FORMAT = {"file_format": "ZSpy", "file_format_version": "3.3"}


@dataclass(frozen=True)
class ZspySink:
    """Writes ``patterns`` into a .zspy store, one file per chunk; other blocks are spooled.

    Parameters
    ----------
    path : the store under its temporary name
    spool : folder for the other blocks
    shape, dtype : of the patterns
    chunks : whole patterns; the leading sizes divide the blocks or cover the axis
    title : of the signal
    codec : one of `stem_dask.writers.codecs.CODECS`; zarr 2 has no checksums, so only the records have them
    """

    path: str
    spool: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    title: str
    codec: str = "auto"
    stage: list[str] = field(default_factory=list, compare=False)

    @property
    def _spool(self) -> SpoolSink:
        return SpoolSink(self.spool, self.stage)

    @property
    def _data(self) -> str:
        return f"{_folder(self.title)}/data"

    def create(self, *, resume: bool) -> None:
        """Create the groups and the empty array, unless an interrupted run left the same."""
        if resume and self._is_begun():
            remove_unfinished(self.path)
        else:
            remove(self.path)
            write_group(self.path, _FORMAT)
            for part in Path(self._data).parents[:-1]:
                write_group(Path(self.path, part))
            # last, because a resumed run keeps the chunks below an existing array
            self._make_array(Path(self.path, self._data))
        self._spool.create(resume=resume)

    def _make_array(self, folder: Path | None) -> Any:
        """Create the empty array in a folder, or in memory."""
        return make_array(folder, self.shape, np.dtype(self.dtype), self.chunks, self.codec)

    def _is_begun(self) -> bool:
        """Whether the array exists with the same shape, chunks and codec."""
        import zarr

        try:
            found: Any = zarr.open_array(Path(self.path, self._data), mode="r", zarr_format=2)
        except (OSError, ValueError):
            return False
        return bool(found.metadata == self._make_array(None).metadata)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write the chunks of one block."""
        if not lies_on_chunks(region, self.chunks, self.shape):
            raise StoreError(f"block {index} does not lie on the chunks of {self.path}")
        rest = dict(blocks)
        block = of_type(rest.pop("patterns"), np.dtype(self.dtype))  # and byte order
        written = []
        for origin, chunk in whole_chunks(block, region, self.chunks):
            place = [start // size for start, size in zip(origin, self.chunks, strict=True)]
            name = "/".join(map(str, place))
            content = compressed(chunk, self.codec)
            with staged(self._file(name), self.stage[0]) as file:
                append(file, content)
                self._make_folders(place)
            written.append([name, crc32(content), len(content)])
        return {"chunks": written, **self._spool.write(index, region, rest)}

    def verify(self, record: Record) -> str | None:
        """Compare the files of a block with their checksums."""
        for name, crc, n_bytes in record.extra.get("chunks", ()):
            what = damage(self._file(name), (crc, n_bytes))
            if what is not None:
                return what
        return self._spool.verify(record)

    def finish(self, records: Sequence[Record]) -> None:
        """Check the size of every chunk; `write_signal` completes the store."""
        for record in records:
            for name, _, n_bytes in record.extra["chunks"]:
                file = self._file(name)
                if not file.exists() or file.stat().st_size != n_bytes:
                    raise StoreError(
                        f"{file} is missing or changed after it was written; the same command writes it again"
                    )

        self._spool.finish(records)

    def _make_folders(self, place: Sequence[int]) -> None:
        """Make the folders of a chunk, but not that of the array, which a late worker must not recreate."""
        folder = Path(self.path, self._data)
        for number in place[:-1]:
            folder /= str(number)
            folder.mkdir(exist_ok=True)

    def _file(self, name: str) -> Path:
        return Path(self.path, self._data, name)


def _folder(title: str) -> str:
    """Name of the group of a signal, shortened to a valid folder name."""
    return experiment(title.encode()[:_LONGEST_NAME].decode("utf-8", "ignore"))


def write_signal(path: str, signal: Mapping[str, Any]) -> None:
    """Add everything but the data of a signal (see `stem_dask.writers.hspy.signal_of`) to its store."""
    tree = {f"axis-{i}": axis for i, axis in enumerate(signal["axes"])}
    names = ("metadata", "original_metadata", "learning_results", "attributes")
    tree |= {name: signal[name] for name in names} | signal["package_info"]
    _write_tree(Path(path, _folder(signal["metadata"]["General"]["title"])), tree)


def _write_tree(folder: Path, tree: Mapping[str, Any]) -> None:
    """Write dictionaries as groups, arrays as arrays and plain values as attributes."""
    attrs = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            _write_tree(folder / key, value)
        elif isinstance(value, np.ndarray):
            make_array(folder / key, value.shape, value.dtype, value.shape, "auto")[...] = value
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            numbered = {str(i): item for i, item in enumerate(value)}
            _write_tree(folder / f"_list_{len(value)}_{key}", numbered)
        else:
            attrs[key] = "_None_" if value is None else value
    write_group(folder, attrs)


def write_group(folder: str | Path, attrs: Mapping[str, Any] | None = None) -> None:
    """Make a folder a group of the store, with these attributes."""
    import zarr

    group = zarr.open_group(Path(folder), mode="a", zarr_format=2)
    if attrs:
        group.attrs.put(to_json(attrs))


def make_array(
    folder: Path | None, shape: Sequence[int], dtype: np.dtype, chunks: Sequence[int], codec: str
) -> Any:
    """Create an empty array in a folder, or in memory, whose chunk files lie in a folder per axis."""
    import zarr

    return zarr.create_array(
        {} if folder is None else folder,
        shape=tuple(shape),
        dtype=dtype.newbyteorder("="),
        chunks=tuple(max(1, n) for n in chunks),
        compressors=_compressor(codec, dtype),
        fill_value=0,
        zarr_format=2,
        chunk_key_encoding={"name": "v2", "separator": "/"},
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def _compressor(codec: str, dtype: np.dtype) -> Any:
    import numcodecs

    codec = CODEC if codec == "auto" else codec
    if codec == "none":
        return None
    if codec == "gzip":
        return numcodecs.GZip(LEVELS[codec])
    shuffle = {"bitshuffle": 2, "shuffle": 1}[shuffle_of(dtype)]
    return numcodecs.Blosc(codec, LEVELS[codec], shuffle)
