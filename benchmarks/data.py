"""Datasets of any size: simulated patterns, repeated and streamed into a .dm4; and unbounded sources."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stem_dask.readers.source import Slices, Wrapped
from stem_dask.writers.synthetic import Synthetic, pattern_row, write_dm4

#: simulated rows; the rest repeats them, so that writing runs at the speed of the disk
SIMULATED_ROWS = 4


def scan_rows(n_bytes: int, scan_x: int = 128, detector: int = 256, itemsize: int = 2) -> int:
    """Rows of a scan of about ``n_bytes``."""
    return max(1, round(n_bytes / (scan_x * detector * detector * itemsize)))


def write_scan(
    path: Path,
    rows: int,
    scan_x: int = 128,
    detector: int = 256,
    electrons: int = 100_000,
    dtype: str = "uint16",
) -> Path:
    """Write a (rows, scan_x, detector, detector) CBED scan as .dm4, one row in memory at a time.

    The simulated rows are spread over the scan, so that it contains vacuum and particle.
    """
    tiles = simulated_rows(rows, scan_x, detector, electrons, dtype)

    def stream() -> Iterator[np.ndarray]:
        for y in range(rows):
            yield tiles[y % len(tiles)]

    return write_dm4(path, stream(), (rows, scan_x), (detector, detector), dtype)


def simulated_rows(
    rows: int, scan_x: int, detector: int, electrons: int, dtype: str
) -> list[NDArray]:
    """The simulated rows, arrays (scan_x, detector, detector)."""
    n = min(rows, SIMULATED_ROWS)
    height = max(rows, SIMULATED_ROWS)
    spec = Synthetic(
        scan_shape=(height, scan_x),
        detector_shape=(detector, detector),
        electrons=electrons,
        disc_radius=detector / 14,
    )
    return [pattern_row(spec, (2 * i + 1) * height // (2 * n)).astype(dtype) for i in range(n)]


@dataclass(frozen=True)
class Tiled(Wrapped):
    """A source (scan_y, …) repeated along its first axis: real bytes of a file, a scan of any height."""

    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, with ``rows`` rows."""
        return (self.rows, *self.source.shape[1:])

    def __getitem__(self, part: Slices) -> NDArray:
        height = self.source.shape[0]
        first, last, step = part[0].indices(self.rows)
        if step == 1 and first % height + last - first <= height:  # contiguous in the file
            start = first % height
            return self.source[(slice(start, start + last - first), *part[1:])]
        rows = [
            self.source[(slice(y % height, y % height + 1), *part[1:])]
            for y in range(first, last, step)
        ]
        return np.concatenate(rows)


@dataclass(frozen=True)
class Made:
    """A source without a file: every position has the same pattern, copied on access."""

    pattern: NDArray
    scan_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of scan and pattern."""
        return (*self.scan_shape, *self.pattern.shape)

    @property
    def dtype(self) -> np.dtype:
        """Type of the pattern."""
        return self.pattern.dtype

    def __getitem__(self, part: Slices) -> NDArray:
        lead = [len(range(*s.indices(n))) for s, n in zip(part[:2], self.scan_shape, strict=True)]
        pattern = self.pattern[part[2:]]
        return np.ascontiguousarray(np.broadcast_to(pattern, (*lead, *pattern.shape)))
