"""Plain numpy: one thread, a batch of patterns of the memory map at a time."""

import numpy as np

from benchmarks.peers import (
    CHUNK,
    Task,
    centers_and_radii,
    empty_zarr,
    means_of_four,
    note,
    row_of,
    timed,
    window_of,
)


def run(task: Task) -> float:
    """Seconds of a row."""
    import numcodecs  # noqa: F401  so that its import is not counted
    import zarr  # noqa: F401

    return timed(row_of(ROWS, task))


def _analyzed(task: Task) -> tuple[np.ndarray, np.ndarray]:
    found = [centers_and_radii(np.array(block), task.target) for _, block in task.batches()]
    centers, radii = zip(*found, strict=True)
    return np.concatenate(centers), np.concatenate(radii)


def _analysis(task: Task) -> None:
    note(task, *_analyzed(task))


def _crop(task: Task) -> None:
    y0, y1, x0, x1 = window_of(task, *_analyzed(task))
    n = task.shape[0] * task.shape[1]
    out = empty_zarr(task, (n, y1 - y0, x1 - x0), task.dtype, (CHUNK["crop"],))
    inside = np.empty(n)
    for part, block in task.batches():
        cut = np.ascontiguousarray(block[:, y0:y1, x0:x1])
        inside[part] = cut.sum((1, 2))
        out[part] = cut


def _bin(task: Task) -> None:
    n, height, width = task.shape[0] * task.shape[1], task.shape[2] // 2, task.shape[3] // 2
    out = empty_zarr(task, (n, height, width), np.float32, (CHUNK["bin"],))
    for part, block in task.batches():
        out[part] = means_of_four(block)


def _convert(task: Task) -> None:
    patterns = task.patterns()
    out = empty_zarr(task, patterns.shape, task.dtype, (CHUNK["convert"],))
    for part, block in task.batches():
        out[part] = block


ROWS = {"analysis": _analysis, "crop": _crop, "cold": _crop, "bin": _bin, "convert": _convert}
