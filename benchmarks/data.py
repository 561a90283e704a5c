"""Datasets of any size for measuring: simulated patterns, repeated, streamed into a .dm4."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stem_dask.synthetic import Synthetic, pattern_row, write_dm4

#: rows that are simulated; the rest repeats them, so that writing runs at the disk's speed
SIMULATED_ROWS = 4


def scan_rows(n_bytes: int, scan_x: int = 128, detector: int = 256) -> int:
    """Rows of a uint16 scan that make about ``n_bytes``."""
    return max(1, round(n_bytes / (scan_x * detector * detector * 2)))


def write_scan(
    path: Path, rows: int, scan_x: int = 128, detector: int = 256, electrons: int = 100_000
) -> Path:
    """Write a (rows, scan_x, detector, detector) uint16 CBED scan as .dm4, one row in memory at a time."""
    spec = Synthetic(
        scan_shape=(max(rows, SIMULATED_ROWS), scan_x),
        detector_shape=(detector, detector),
        electrons=electrons,
        disc_radius=detector / 14,
    )
    tiles = [pattern_row(spec, y).astype(np.uint16) for y in range(min(rows, SIMULATED_ROWS))]

    def stream() -> Iterator[np.ndarray]:
        for y in range(rows):
            yield tiles[y % len(tiles)]

    return write_dm4(path, stream(), (rows, scan_x), (detector, detector), "uint16")
