"""Stores of HyperSpy (.zspy): zarr 2 in the layout of RosettaSciIO.

``Experiments/TITLE`` holds ``data``, ``axis-0`` … and the metadata as groups; their plain values are attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import of_type
from stem_dask.core.formats import Output
from stem_dask.core.metadata import to_json
from stem_dask.core.model import Record, Region
from stem_dask.storage.publish import damage, remove
from stem_dask.storage.staging import refuse_other_files, remove_unfinished
from stem_dask.writers.codecs import compressed, whole_chunks
from stem_dask.writers.hspy import experiment, signal_of
from stem_dask.writers.spool import SpoolSink, write_file
from stem_dask.writers.zarr import create_array

if TYPE_CHECKING:
    import xarray as xr

_LONGEST_NAME = 200  # bytes; most file systems allow 255


@dataclass(frozen=True)
class ZspySink:
    """Writes ``patterns`` into a .zspy store, one file per chunk; other blocks are spooled.

    Zarr 2 has no checksums, so only the records have them.
    """

    output: Output
    stage: list[str] = field(default_factory=list, compare=False)

    @property
    def _spool(self) -> SpoolSink:
        return SpoolSink(self.output.spool, self.stage)

    @property
    def _group(self) -> Path:
        """Group of the signal, whose name is shortened to a valid folder name."""
        title = self.output.title.encode()[:_LONGEST_NAME].decode("utf-8", "ignore")
        return Path(self.output.path, experiment(title))

    def create(self, *, resume: bool) -> None:
        """Create the groups and the empty array, unless an interrupted run left the same."""
        import zarr

        path = Path(self.output.path)
        try:
            found: Any = zarr.open_array(self._group / "data", mode="r", zarr_format=2)
            begun = resume and found.metadata == self._array({}).metadata
        except (OSError, ValueError):
            begun = False
        if begun:
            remove_unfinished(path)
        else:
            remove(path)
            write_tree(path, {"file_format": "ZSpy", "file_format_version": "3.3"})
            write_tree(self._group.parent, {})
            write_tree(self._group, {})
            # last, because a resumed run keeps the chunks below an existing array
            self._array(self._group / "data")
        self._spool.create(resume=resume)

    def _array(self, store: Any) -> Any:
        """The empty array."""
        one = self.output
        parts = (one.shape, one.dtype, (), one.chunks, None, one.codec)
        return create_array(store, None, *parts, zarr_format=2)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write the chunks of one block."""
        output, rest, written = self.output, dict(blocks), []
        block = of_type(rest.pop("patterns"), output.dtype)  # and byte order
        for origin, chunk in whole_chunks(block, region, output.chunks, output.shape):
            place = [start // size for start, size in zip(origin, output.chunks, strict=True)]
            file = self._group.joinpath("data", *map(str, place))
            # but not the folder of the array, which a late worker must not recreate
            for folder in list(file.parents)[len(place) - 2 :: -1]:
                folder.mkdir(exist_ok=True)
            crc, n_bytes = write_file(file, self.stage[0], [compressed(chunk, output.codec)])
            written.append(["/".join(map(str, place)), crc, n_bytes])
        return {"chunks": written, **self._spool.write(index, region, rest)}

    def verify(self, record: Record) -> str | None:
        """Compare the files of a block with their checksums."""
        for name, crc, n_bytes in record.extra.get("chunks", ()):
            what = damage(self._group / "data" / name, (crc, n_bytes))
            if what is not None:
                return what
        return self._spool.verify(record)

    def finish(self, records: Sequence[Record]) -> None:
        """Compare every chunk with its record."""
        refuse_other_files(
            (self._group / "data" / name, crc, n_bytes)
            for record in records
            for name, crc, n_bytes in record.extra["chunks"]
        )
        self._spool.finish(records)

    def complete(
        self, patterns: xr.DataArray, analysis: xr.Dataset | None, about: Mapping[str, Any]
    ) -> list[str]:
        """Add everything but the data of the signal."""
        signal = signal_of(self.output, patterns, analysis)
        tree = {f"axis-{i}": axis for i, axis in enumerate(signal["axes"])}
        names = ("metadata", "original_metadata", "learning_results", "attributes")
        tree |= {name: signal[name] for name in names} | signal["package_info"]
        write_tree(self._group, tree)
        return []


def write_tree(folder: Path, tree: Mapping[str, Any]) -> None:
    """Make a folder a group: dictionaries become groups, arrays arrays, and plain values attributes."""
    import zarr

    attrs = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            write_tree(folder / key, value)
        elif isinstance(value, np.ndarray):
            parts = (value.shape, value.dtype, (), value.shape)
            create_array(folder / key, None, *parts, zarr_format=2)[...] = value
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            numbered = {str(i): item for i, item in enumerate(value)}
            write_tree(folder / f"_list_{len(value)}_{key}", numbered)
        else:
            attrs[key] = "_None_" if value is None else value
    group = zarr.open_group(folder, mode="a", zarr_format=2)
    if attrs:
        group.attrs.put(to_json(attrs))
