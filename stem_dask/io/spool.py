"""Blocks kept one file each in the run's folder, to be joined in order at the end."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.io.publish import damage, file_crc, named, remove
from stem_dask.model import Record, Region


@dataclass(frozen=True)
class SpoolSink:
    """Writes the blocks of all outputs of one task to one file; `blocks` gives them back in order."""

    folder: str

    def create(self, *, resume: bool) -> None:
        """Make the folder; what another run left there is removed."""
        if not resume:
            remove(self.folder)
        Path(self.folder).mkdir(parents=True, exist_ok=True)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write one file under a temporary name and rename it."""
        path = self._path(index)
        partial = path.with_suffix(".partial")
        with named(partial), open(partial, "wb") as file:
            # bounds travel with the blocks, so that a file tells by itself where it belongs
            bounds = np.array([[s.start, s.stop] for s in region], np.int64)
            np.savez(file, allow_pickle=False, _region=bounds, **blocks)
        crc, n_bytes = file_crc(partial)
        os.replace(partial, path)
        return {"spool_crc": crc, "spool_bytes": n_bytes}

    def verify(self, record: Record) -> str | None:
        """Compare the file with the checksum in its record."""
        wanted = (record.extra.get("spool_crc"), record.extra.get("spool_bytes"))
        return damage(self._path(record.index), wanted)

    def finish(self, records: Sequence[Record]) -> None:
        """Nothing to do: whoever made the sink reads `blocks`."""

    def blocks(
        self, n: int, names: Sequence[str] | None = None
    ) -> Iterator[tuple[Region, dict[str, NDArray]]]:
        """Region and blocks (all, or those named) of tasks 0 … n - 1; zip tests each array's checksum."""
        for index in range(n):
            with np.load(self._path(index), allow_pickle=False) as file:
                bounds = file["_region"]
                region = tuple(slice(int(a), int(b)) for a, b in bounds)
                yield (
                    region,
                    {name: file[name] for name in names or file.files if name != "_region"},
                )

    def _path(self, index: int) -> Path:
        return Path(self.folder) / f"{index:06d}.npz"
