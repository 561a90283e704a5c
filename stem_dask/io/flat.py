"""Blocks of a scan written at their place among numbers that lie one after another: .pt and .npy."""

import zlib
from collections.abc import Iterable, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import StoreError
from stem_dask.io.publish import named
from stem_dask.model import Record, Region

#: first byte behind the offset, length in bytes, CRC-32
Run = tuple[int, int, int]


def write_runs(
    path: str, offset: int, lead_shape: Sequence[int], region: Region, block: NDArray
) -> list[Run]:
    """Write one block: one run of bytes when it takes whole rows of the scan, else one run a row.

    Parameters
    ----------
    path : a file that is there
    offset : byte at which the numbers begin
    lead_shape : (scan_y, scan_x) or (n,)
    region : where the block lies along these axes
    block : (…, ky, kx), of the file's type
    """
    block = np.ascontiguousarray(block)
    pattern_bytes = prod(block.shape[len(region) :]) * block.dtype.itemsize
    row = lead_shape[-1]
    if len(region) == 1:
        starts = [region[0].start]
    elif (region[1].start, region[1].stop) == (0, row):
        starts = [region[0].start * row]
    else:
        starts = [y * row + region[1].start for y in range(region[0].start, region[0].stop)]
    runs = []
    with named(path), open(path, "r+b", buffering=0) as file:
        for start, piece in zip(starts, block.reshape(len(starts), -1).view(np.uint8), strict=True):
            file.seek(offset + start * pattern_bytes)
            view = piece.data
            while view:
                view = view[file.write(view) :]
            runs.append((start * pattern_bytes, piece.size, zlib.crc32(piece.data)))
    return runs


def damaged_run(path: str, offset: int, runs: Iterable[Run]) -> str | None:
    """Read the runs of a block again and compare them with their checksums."""
    try:
        with open(path, "rb") as file:
            for start, length, crc in runs:
                file.seek(offset + start)
                if zlib.crc32(file.read(length)) != crc:
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
