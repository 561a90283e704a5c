"""The rows of the table as a competent user of another library would write them, with equal results.

One module per library. They do not import stem_dask, so that any environment can run them. They receive the layout of
the file, do not fsync or check their output, and keep no journal.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: patterns per batch
BATCH = 128
#: patterns per chunk of the output: about 1 MiB
CHUNK = {"crop": 64, "bin": 16, "convert": 8}
#: why a library has no such row
WHY_NOT = {
    "convert": "has no writer of zarr, and the patterns need none of its arithmetic",
    "convert-analyze": "would be its analysis, then its conversion",
    "hspy-gzip": "has no writer of .hspy",
    "hspy-lz4": "has no writer of .hspy",
    "zspy": "has no writer of .zspy",
    "pt": "has no writer of .pt",
}


@dataclass(frozen=True)
class Task:
    """One row: the layout of the patterns in the file, what to keep of them, and where to write."""

    library: str
    row: str
    input: str
    offset: int
    shape: tuple[int, int, int, int]
    dtype: str
    output: str
    found: str
    cores: int
    target: float = 0.98
    coverage: float = 0.999
    margin: int = 3

    def patterns(self) -> NDArray:
        """(n, ky, kx), memory-mapped from the file."""
        n, (height, width) = self.shape[0] * self.shape[1], self.shape[2:]
        return np.memmap(self.input, self.dtype, "r", self.offset, (n, height, width))

    def batches(self, n: int = BATCH) -> Iterator[tuple[slice, NDArray]]:
        """Batches of patterns with their slices."""
        patterns = self.patterns()
        for start in range(0, len(patterns), n):
            part = slice(start, min(start + n, len(patterns)))
            yield part, patterns[part]


class CannotError(Exception):
    """A library has no such row; the message says why."""


def timed(work: Callable[[], Any]) -> float:
    """Seconds of the work."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def row_of(rows: dict[str, Callable[[Task], Any]], task: Task) -> Callable[[], Any]:
    """The function of a row.

    Raises
    ------
    CannotError
        If the library has none.
    """
    if task.row not in rows:
        raise CannotError(WHY_NOT.get(task.row, "has no function for it"))
    return lambda: rows[task.row](task)


def centers_and_radii(block: NDArray, target: float) -> tuple[NDArray, NDArray]:
    """Centroid and smallest even window that holds the target, for every pattern, by bisection over window sums.

    Parameters
    ----------
    block : (n, ky, kx) integers

    Returns
    -------
    center : (n, 2) float64
    radius : (n,) float64
    """
    n, height, width = block.shape
    rows, cols = block.sum(2, dtype=np.uint64), block.sum(1, dtype=np.uint64)
    total = rows.sum(1)
    center = np.stack([rows @ np.arange(height), cols @ np.arange(width)], 1) / total[:, None]
    radius = np.empty(n)
    for i, (pattern, (y, x)) in enumerate(zip(block, np.rint(center).astype(int), strict=True)):
        low, high = 1, max(height, width)
        while low < high:
            r = (low + high) // 2
            inside = pattern[max(y - r, 0) : y + r, max(x - r, 0) : x + r].sum()
            low, high = (low, r) if inside >= target * total[i] else (r + 1, high)
        radius[i] = low
    return center, radius


def means_of_four(block: NDArray) -> NDArray[np.float32]:
    """(…, ky, kx) binned by 2 x 2; faster than the mean over a reshaped view."""
    rows = block[..., ::2, :].astype(np.float32) + block[..., 1::2, :]
    found: NDArray[np.float32] = (rows[..., ::2] + rows[..., 1::2]) * np.float32(0.25)
    return found


def window_of(task: Task, center: NDArray, radius: NDArray) -> tuple[int, int, int, int]:
    """One window (y0, y1, x0, x1) that contains the windows of all covered patterns; saves the analysis."""
    middle = np.rint(np.median(center, axis=0))
    needed = radius + np.abs(np.rint(center) - middle).max(1)
    half = int(np.sort(needed)[math.ceil(task.coverage * len(needed)) - 1]) + task.margin
    y, x = (int(n) for n in middle)
    window = (y - half, y + half, x - half, x + half)
    if min(window) < 0 or window[1] > task.shape[2] or window[3] > task.shape[3]:
        raise SystemExit(f"the window {window} leaves the detector; take other data to compare")
    note(task, center, radius)
    return window


def note(task: Task, center: NDArray, radius: NDArray) -> None:
    """Save centers and radii for the comparison."""
    np.savez(task.found, center=center, radius=radius)


def empty_zarr(task: Task, shape: tuple[int, ...], dtype: Any, lead: tuple[int, ...]) -> Any:
    """A zarr array with blosc lz4 and chunks of whole patterns."""
    import zarr
    from zarr.codecs import BloscCodec

    dtype = np.dtype(dtype)
    shuffle: Any = "shuffle" if dtype.kind == "f" else "bitshuffle"
    packed = BloscCodec(typesize=dtype.itemsize, cname="lz4", clevel=5, shuffle=shuffle)
    return zarr.create_array(
        f"{task.output}/patterns",
        shape=shape,
        dtype=dtype,
        chunks=(*lead, *shape[len(lead) :]),
        compressors=packed,
    )
