"""Blocks of a scan written at their place among numbers that lie one after another: .pt and .npy."""

from collections.abc import Iterable, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import StoreError
from stem_dask.io.checksums import crc32
from stem_dask.io.pieces import InPieces, split
from stem_dask.io.publish import begin_sync, named
from stem_dask.io.staging import append, mark, refuse_late
from stem_dask.model import Record, Region

#: first byte behind the offset, length in bytes, CRC-32
Run = tuple[int, int, int]


def write_runs(
    path: str,
    offset: int,
    lead_shape: Sequence[int],
    region: Region,
    block: NDArray | InPieces,
    nonce: bytes,
) -> list[Run]:
    """Write one block: one run of bytes when it takes whole rows of the scan, else one run a row.

    Parameters
    ----------
    path : a file that is there
    offset : byte at which the numbers begin
    lead_shape : (scan_y, scan_x) or (n,)
    region : where the block lies along these axes
    block : (…, ky, kx), an array or in pieces, of the file's type
    nonce : with which the file must end, see `stem_dask.io.staging`

    Raises
    ------
    StoreError
        When it ends with that of a later start.
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
    with named(path), open(path, "r+b", buffering=0) as file:
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
    """Read the runs of a block again and compare them with their checksums."""
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
    """The runs of all blocks in the order of the file.

    Raises
    ------
    StoreError
        When they do not tile its numbers.
    """
    runs = sorted(tuple(run) for record in records for run in record.extra["runs"])
    end = 0
    for start, size, _ in runs:
        if start != end:
            raise StoreError(f"{path}: bytes {end:,} to {start:,} of the data were not written")
        end = start + size
    if end != n_bytes:
        raise StoreError(f"{path}: the data end after {end:,} bytes; blocks are missing")
    return runs
