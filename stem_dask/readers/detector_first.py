"""Files with the detector slowest (ky, kx, scan_y, scan_x), the older order of DM4: turned out of core in two passes.

A pattern of such a file is one element here and one there, so that reading blocks of patterns from a file larger than
memory would read it many times over. The first pass reads slabs, what some pixels of the detector saw at all positions,
and cuts each into pieces, one for every block of the scan; the second pass reads blocks of patterns. In the
intermediate file the pieces of a block lie together, ordered by slab, each (scan_y, scan_x, ky, kx):

    [block 0: [slab 0][slab 1]…][block 1: [slab 0][slab 1]…]…

so both passes, and the writes between them, move long runs of bytes.
"""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.model import Record, Region
from stem_dask.kernels.transpose import patterns_first
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.source import Slices, Source
from stem_dask.readers.views import DETECTOR_FIRST, Flipped, Selection, Transposed
from stem_dask.storage.checksums import crc32
from stem_dask.storage.publish import named, remove
from stem_dask.storage.staging import append, begin_in_place, mark, refuse_late, refuse_other_bytes

#: bytes that are read at once where only a part of each scan is wanted
READ_BYTES = 2**23

_WHOLE = (slice(None),) * 4

Ranges = tuple[range, range, range, range]


@dataclass(frozen=True)
class DetectorFirst:
    """A part of a flat file (ky, kx, scan_y, scan_x): on every axis the indices in ``ranges``.

    Whole rows of the scan are read, from the first that is wanted to the last, so that every read is one long run.
    """

    file: FlatFile
    ranges: Ranges

    @property
    def shape(self) -> tuple[int, ...]:
        """(ky, kx, scan_y, scan_x)."""
        return tuple(map(len, self.ranges))

    @property
    def dtype(self) -> np.dtype:
        """Type of the elements, byte order of the file."""
        return self.file.dtype

    @property
    def bytes_read(self) -> int:
        """Bytes of the file that reading all of it takes."""
        ky, kx, rows, _ = self.ranges
        row_bytes = self.file.shape[3] * self.dtype.itemsize
        return len(ky) * len(kx) * len(range(_span(rows).start, _span(rows).stop)) * row_bytes

    def __getitem__(self, part: Slices) -> NDArray:
        ky, kx, rows, columns = (r[s] for r, s in zip(self.ranges, part, strict=True))
        shape = (len(ky), len(kx), len(rows), len(columns))
        if 0 in shape:
            return np.empty(shape, self.dtype)
        lines = _span(rows)
        if (ky.step, kx.step, rows.step, columns) == (1, 1, 1, range(self.file.shape[3])):
            return self.file[_span(ky), _span(kx), lines, slice(None)]
        out = np.empty(shape, self.dtype)
        plane_bytes = (lines.stop - lines.start) * self.file.shape[3] * self.dtype.itemsize
        at_once = max(1, READ_BYTES // plane_bytes)
        picked = slice(columns.start, columns.stop, columns.step)
        for i, y in enumerate(ky):
            for x in range(0, len(kx), at_once):
                some = kx[x : x + at_once]
                read = self.file[slice(y, y + 1), _span(some), lines, slice(None)]
                out[i, x : x + len(some)] = read[0, :: kx.step, :: rows.step, picked]
        return out


def detector_first(source: Source) -> DetectorFirst | None:
    """What lies beneath patterns of a flat file with the detector slowest; None for patterns that do not come from one.

    Parameters
    ----------
    source : (scan_y, scan_x, ky, kx), perhaps flipped, or a part of the scan

    Examples
    --------
    >>> flat = FlatFile("scan.dm4", 512, np.dtype("u2"), (64, 48, 8, 6))
    >>> detector_first(Transposed(flat, (2, 3, 0, 1))).shape
    (64, 48, 8, 6)
    >>> detector_first(flat) is None
    True
    """
    ranges = _ranges(source)
    if ranges is None:
        return None
    return DetectorFirst(*ranges)


def _ranges(source: Source) -> tuple[FlatFile, Ranges] | None:
    """The flat file below, and the indices on its axes that the views above it leave."""
    if isinstance(source, Transposed):
        file = source.source
        if source.order != DETECTOR_FIRST or not isinstance(file, FlatFile):
            return None
        ky, kx, y, x = map(range, file.shape)
        return file, (ky, kx, y, x)
    if not isinstance(source, (Flipped, Selection)):
        return None
    beneath = _ranges(source.source)
    if beneath is None:
        return None
    file, (ky, kx, y, x) = beneath
    if isinstance(source, Flipped):
        return file, (ky[::-1], kx, y, x)
    y, x, ky, kx = (
        r[start::step][:size]
        for r, start, step, size in zip(
            (y, x, ky, kx), source.starts, source.steps, source.shape, strict=True
        )
    )
    return file, (ky, kx, y, x)


@dataclass(frozen=True)
class Turned:
    """The intermediate file as patterns: ``shape`` (scan_y, scan_x, ky, kx), cut into ``block`` of the scan and ``slab``
    of the detector.
    """

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    block: tuple[int, int]
    slab: tuple[int, int]

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, part: Slices) -> NDArray:
        wanted = [range(*s.indices(n)) for s, n in zip(part, self.shape, strict=True)]
        out = np.empty([len(indices) for indices in wanted], self.dtype)
        parts = (
            list(_touched(indices, extent, size))
            for indices, extent, size in zip(
                wanted, (*self.block, *self.slab), self.shape, strict=True
            )
        )
        for touched in itertools.product(*parts):
            piece, there, here = zip(*touched, strict=True)
            out[there] = self.piece(piece)[_WHOLE][here]
        return out

    def piece(self, ranges: Sequence[range]) -> FlatFile:
        """Where a slab's pixels at a block's positions lie; ``ranges`` are of a whole slab and block."""
        y, x, ky, kx = ranges
        width, (height_k, width_k) = self.shape[1], self.shape[2:]
        # all blocks before this one, whole; and of this one all slabs before this slab
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
        parts = (
            [piece for piece, _, _ in _touched(range(size), extent, size)]
            for extent, size in zip(self.block, self.shape[:2], strict=True)
        )
        yield from itertools.product(*parts)


@dataclass(frozen=True)
class TurnedSink:
    """Takes slabs (ky, kx, scan_y, scan_x) as the output ``slab``, and writes their pieces into the intermediate file."""

    turned: Turned
    #: of this start, see `stem_dask.storage.staging`
    nonce: list[bytes] = field(default_factory=list, compare=False)

    def create(self, *, resume: bool) -> None:
        """Make the file, empty and of its full size; one that is there is kept when resuming."""
        path = Path(self.turned.path)
        if not resume:
            remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with named(path), open(path, "ab") as file:
            file.truncate(self.turned.n_bytes)
        self.nonce[:] = [begin_in_place(path)]

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write the pieces of one slab; the record has the CRC-32 of all of them, in their order."""
        slab = np.asarray(blocks["slab"])
        planes = slab.reshape(-1, *slab.shape[2:])
        path, crc = self.turned.path, 0
        with named(path), open(path, "r+b", buffering=0) as file:
            places = zip(self.turned.blocks(), self.turned.pieces_of(region), strict=True)
            for (y, x), place in places:
                piece = patterns_first(planes[:, y.start : y.stop, x.start : x.stop])
                view = piece.reshape(-1).view(np.uint8).data
                file.seek(place.offset)
                refuse_late(file, path, self.nonce[0])
                crc = append(file, view, crc)
            mark(file, crc32(self.nonce[0]))
        return {"turned_crc": crc}

    def verify(self, record: Record) -> str | None:
        """Read the pieces of a slab again and compare them with the checksum in its record."""
        crc = 0
        region = tuple(slice(*bounds) for bounds in record.extra["region"])
        try:
            for place in self.turned.pieces_of(region):
                crc = crc32(place[_WHOLE].data, crc)
        except OSError as error:
            return f"{self.turned.path} cannot be read: {error}"
        if crc == record.extra.get("turned_crc"):
            return None
        return f"{self.turned.path} does not hold what was written (checksum)"

    def finish(self, records: Sequence[Record]) -> None:
        """Refuse when the file does not hold what was written; `Turned` reads it as it is."""
        refuse_other_bytes(self.turned.path, self.nonce[0], records, self.verify)
        with named(self.turned.path):
            os.truncate(self.turned.path, self.turned.n_bytes)


def _span(indices: range) -> slice:
    """From the lowest to the highest index."""
    low, high = sorted((indices[0], indices[-1]))
    return slice(low, high + 1)


def _touched(wanted: range, extent: int, size: int) -> Iterator[tuple[range, slice, slice]]:
    """The parts of an axis that hold wanted indices: the part, which of the wanted these are, where they lie in it.

    Examples
    --------
    >>> list(_touched(range(1, 7, 3), 4, 10))
    [(range(0, 4), slice(0, 1, None), slice(1, 2, 3)), (range(4, 8), slice(1, 2, None), slice(0, 1, 3))]
    """
    if not wanted:
        return
    for start in range(wanted[0] // extent * extent, wanted[-1] + 1, extent):
        stop = min(start + extent, size)
        first, last = (
            min(len(wanted), max(0, -(-(edge - wanted.start) // wanted.step)))
            for edge in (start, stop)
        )
        if first < last:
            inside = slice(wanted[first] - start, wanted[last - 1] - start + 1, wanted.step)
            yield range(start, stop), slice(first, last), inside
