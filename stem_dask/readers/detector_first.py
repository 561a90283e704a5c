"""Detector-first files (ky, kx, scan_y, scan_x), the older order of DM4: transposed out of core in two passes.

The pixels of a pattern are spread over all of such a file: reading patterns block by block would read a file larger than
memory many times. The first pass reads slabs (some detector pixels at all scan positions) and cuts each into pieces, one
for each block of the scan. The second pass reads blocks of patterns. In the intermediate file the pieces of a block are
contiguous and ordered by slab, each (scan_y, scan_x, ky, kx), so that both passes read and write long runs of bytes:

    [block 0: [slab 0][slab 1]…][block 1: [slab 0][slab 1]…]…
"""

import itertools
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import StoreError
from stem_dask.core.model import Record, Region
from stem_dask.kernels.pixels import patterns_first
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.source import Slices, Source
from stem_dask.readers.views import DETECTOR_FIRST, View
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import remove
from stem_dask.storage.staging import (
    append,
    begin_in_place,
    crc32,
    mark,
    refuse_late,
    refuse_other_bytes,
)

_WHOLE = (slice(None),) * 4


def detector_first(source: Source) -> View | None:
    """The stored order (ky, kx, scan_y, scan_x) of patterns from a detector-first flat file; None for any other source."""
    if not isinstance(source, View) or source.order != DETECTOR_FIRST:
        return None
    return source.transpose(DETECTOR_FIRST) if isinstance(source.source, FlatFile) else None


def bytes_read(stored: View) -> int:
    """Bytes of the file from the first to the last selected row of the scan, for all selected pixels."""
    ky, kx, rows, _ = (indices for _, indices in stored.axes)
    n_rows = 1 + abs(rows[-1] - rows[0])
    return len(ky) * len(kx) * n_rows * stored.source.shape[3] * stored.dtype.itemsize


@dataclass(frozen=True)
class TransposedFile:
    """The intermediate file as patterns: ``shape`` (scan_y, scan_x, ky, kx), in blocks of the scan and slabs of the detector."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    block: tuple[int, int]
    slab: tuple[int, int]

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, part: Slices) -> NDArray:
        wanted = [range(n)[s] for s, n in zip(part, self.shape, strict=True)]
        out = np.empty([len(indices) for indices in wanted], self.dtype)
        along = zip(wanted, (*self.block, *self.slab), self.shape, strict=True)
        for touched in itertools.product(*(list(_touched(*axis)) for axis in along)):
            piece, there, here = zip(*touched, strict=True)
            out[there] = self.piece(piece)[_WHOLE][here]
        return out

    def piece(self, ranges: Sequence[range]) -> FlatFile:
        """The pixels of a slab at the positions of a block; ``ranges`` are those of a whole slab and block."""
        y, x, ky, kx = ranges
        width, (height_k, width_k) = self.shape[1], self.shape[2:]
        # all previous blocks, and the previous slabs of this one
        positions = y.start * width + len(y) * x.start
        pixels = ky.start * width_k + len(ky) * kx.start
        start = positions * height_k * width_k + len(y) * len(x) * pixels
        shape = (len(y), len(x), len(ky), len(kx))
        return FlatFile(self.path, start * self.dtype.itemsize, self.dtype, shape)

    def pieces_of(self, slab: Region) -> Iterator[FlatFile]:
        """The pieces of one slab, block by block."""
        pixels = [range(part.start, part.stop) for part in slab]
        for y, x in self.blocks():
            yield self.piece((y, x, *pixels))

    def blocks(self) -> Iterator[tuple[range, range]]:
        """Every block of the scan."""
        (height, width), (n_y, n_x) = self.block, self.shape[:2]
        for y in range(0, n_y, height):
            for x in range(0, n_x, width):
                yield range(y, min(y + height, n_y)), range(x, min(x + width, n_x))


@dataclass(frozen=True)
class TransposedSink:
    """Writes slabs (ky, kx, scan_y, scan_x), the output ``slab``, piece by piece into the intermediate file."""

    file: TransposedFile
    #: of this start, see `stem_dask.storage.staging`
    nonce: list[bytes] = field(default_factory=list, compare=False)

    def create(self, *, resume: bool) -> None:
        """Create the file at its full size; when resuming an existing one is kept."""
        path = Path(self.file.path)
        if not resume:
            remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with translate(StoreError, path), open(path, "ab") as file:
            file.truncate(self.file.n_bytes)
        self.nonce[:] = [begin_in_place(path)]

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write the pieces of one slab; the record has the CRC-32 of all of them in order."""
        slab = np.asarray(blocks["slab"])
        planes = slab.reshape(-1, *slab.shape[2:])
        path, crc = self.file.path, 0
        with translate(StoreError, path), open(path, "r+b", buffering=0) as file:
            places = zip(self.file.blocks(), self.file.pieces_of(region), strict=True)
            for (y, x), place in places:
                piece = patterns_first(planes[:, y.start : y.stop, x.start : x.stop])
                view = piece.reshape(-1).view(np.uint8).data
                file.seek(place.offset)
                refuse_late(file, path, self.nonce[0])
                crc = append(file, view, crc)
            mark(file, crc32(self.nonce[0]))
        return {"transposed_crc": crc}

    def verify(self, record: Record) -> str | None:
        """Read the pieces of a slab and compare them with the checksum of its record."""
        crc = 0
        region = tuple(slice(*bounds) for bounds in record.extra["region"])
        try:
            for place in self.file.pieces_of(region):
                crc = crc32(place[_WHOLE].data, crc)
        except OSError as error:
            return f"{self.file.path} cannot be read: {error}"
        if crc == record.extra.get("transposed_crc"):
            return None
        return f"{self.file.path} does not hold what was written (checksum)"

    def finish(self, records: Sequence[Record]) -> None:
        """Raise when the file does not hold what was written."""
        refuse_other_bytes(self.file.path, self.nonce[0], records, self.verify)
        with translate(StoreError, self.file.path):
            os.truncate(self.file.path, self.file.n_bytes)


def _touched(wanted: range, extent: int, size: int) -> Iterator[tuple[range, slice, slice]]:
    """The parts of an axis with wanted indices: the part, which of the wanted they are, and their places in the part."""
    done = 0
    for start in range(0, size, extent):
        part = range(start, min(start + extent, size))
        if n := bisect_left(wanted, part.stop) - done:
            inside = slice(wanted[done] - start, wanted[done + n - 1] - start + 1, wanted.step)
            yield part, slice(done, done + n), inside
            done += n
