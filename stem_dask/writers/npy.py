"""Files of numpy (.npy): the header of numpy, then every block at its own offset."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, of_type, split
from stem_dask.core.errors import StoreError
from stem_dask.core.model import Record, Region
from stem_dask.storage.checksums import crc32
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import begin_sync, remove
from stem_dask.storage.staging import append, begin_in_place, mark, refuse_late, refuse_other_bytes


@dataclass(frozen=True)
class NpySink:
    """Writes ``patterns`` into a .npy file, C order and little-endian; `numpy.load` maps it.

    Parameters
    ----------
    path : the file under its temporary name
    shape, dtype : of the patterns, (scan_y, scan_x, ky, kx) or (pattern, ky, kx)
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    #: nonce of this start, see `stem_dask.storage.staging`
    nonce: list[bytes] = field(default_factory=list, compare=False)

    @property
    def _little(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def _header(self) -> bytes:
        words = {
            "descr": np.lib.format.dtype_to_descr(self._little),
            "fortran_order": False,
            "shape": self.shape,
        }
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, words)
        return header.getvalue()

    def create(self, *, resume: bool) -> None:
        """Write the header and set the final size of the file; existing blocks stay when resuming."""
        if not resume:
            remove(self.path)
        mode = "r+b" if os.path.exists(self.path) else "wb"
        with translate(StoreError, self.path), open(self.path, mode) as file:
            file.write(self._header)
            file.truncate(len(self._header) + self._n_bytes)
        self.nonce[:] = [begin_in_place(self.path)]

    @property
    def _n_bytes(self) -> int:
        return prod(self.shape) * self._little.itemsize

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write one block at its offset."""
        block = of_type(blocks["patterns"], self._little)
        lead, offset = self.shape[: len(region)], len(self._header)
        return {"runs": write_runs(self.path, offset, lead, region, block, self.nonce[0])}

    def verify(self, record: Record) -> str | None:
        """Read a block again and compare it with its checksums."""
        return damaged_run(self.path, len(self._header), record.extra["runs"])

    def finish(self, records: Sequence[Record]) -> None:
        """Refuse blocks that do not tile the array, or changed after they were written."""
        joined_runs(self.path, records, self._n_bytes)
        refuse_other_bytes(self.path, self.nonce[0], records, self.verify)
        with translate(StoreError, self.path):
            os.truncate(self.path, len(self._header) + self._n_bytes)


#: first byte behind the offset, length in bytes, CRC-32
Run = tuple[int, int, int]


def write_runs(
    path: str,
    offset: int,
    lead_shape: Sequence[int],
    region: Region,
    block: NDArray | Block,
    nonce: bytes,
) -> list[Run]:
    """Write one block in place: one run of bytes if it has whole scan rows, else one run per row.

    Parameters
    ----------
    path : an existing file
    offset : byte at which the array begins
    lead_shape : (scan_y, scan_x) or (n,)
    region : of the block along these axes
    block : (…, ky, kx), of the type in the file
    nonce : expected at the end of the file, see `stem_dask.storage.staging`

    Raises
    ------
    StoreError
        When a later start has begun.
    """
    pattern_bytes = prod(block.shape[-2:]) * block.dtype.itemsize
    row = lead_shape[-1]
    if len(region) == 1:
        starts = [region[0].start]
    elif (region[1].start, region[1].stop) == (0, row):
        starts = [region[0].start * row]
    else:
        starts = [y * row + region[1].start for y in range(region[0].start, region[0].stop)]
    n = prod(block.shape[:-2]) // len(starts)
    checksums = [0] * len(starts)
    with translate(StoreError, path), open(path, "r+b", buffering=0) as file:
        for run, piece, first in split(block, [n] * len(starts)):
            if first:
                file.seek(offset + starts[run] * pattern_bytes)
            content = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            refuse_late(file, path, nonce)
            checksums[run] = append(file, content, checksums[run])
        for start in starts:
            begin_sync(file, offset + start * pattern_bytes, n * pattern_bytes)
        mark(file, crc32(nonce))
    return [
        (start * pattern_bytes, n * pattern_bytes, crc)
        for start, crc in zip(starts, checksums, strict=True)
    ]


def damaged_run(path: str, offset: int, runs: Iterable[Run]) -> str | None:
    """Read the runs of a block and compare them with their checksums; None if they agree."""
    try:
        with open(path, "rb") as file:
            for start, length, crc in runs:
                file.seek(offset + start)
                if crc32(file.read(length)) != crc:
                    return f"{path} does not hold what was written at byte {start:,}"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def joined_runs(path: str, records: Iterable[Record], n_bytes: int) -> list[Run]:
    """Runs of all blocks in the order of the file; raises StoreError unless they tile its array."""
    runs = sorted(tuple(run) for record in records for run in record.extra["runs"])
    end = 0
    for start, size, _ in runs:
        if start != end:
            raise StoreError(f"{path}: bytes {end:,} to {start:,} of the data were not written")
        end = start + size
    if end != n_bytes:
        raise StoreError(f"{path}: the data end after {end:,} bytes; blocks are missing")
    return runs
