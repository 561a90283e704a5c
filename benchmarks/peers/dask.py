"""Plain dask and numpy: lazy arrays over the memory map, on dask's threads.

Processes (a LocalCluster with a thread each) were tried and took longer.
"""

from typing import Any

import dask
import dask.array as da
import numpy as np

from benchmarks.peers import (
    Task,
    centers_and_radii,
    empty_zarr,
    means_of_four,
    note,
    row_of,
    timed,
    window_of,
)

#: scan rows of a block
ROWS_OF_BLOCK = 4


def run(task: Task) -> float:
    """Seconds of a row."""
    import zarr  # noqa: F401

    with dask.config.set(scheduler="threads", num_workers=task.cores):
        return timed(row_of(ROWS, task))


def _patterns(task: Task) -> da.Array:
    chunks = (ROWS_OF_BLOCK, *task.shape[1:])

    def read(block_info: Any = None) -> np.ndarray:
        (y0, y1), *_ = block_info[None]["array-location"]
        mapped = np.memmap(task.input, task.dtype, "r", task.offset, task.shape)
        return np.array(mapped[y0:y1])

    grid = da.core.normalize_chunks(chunks, task.shape)
    return da.map_blocks(read, chunks=grid, dtype=task.dtype, meta=np.empty((0,) * 4, task.dtype))


def _analyzed(task: Task) -> tuple[np.ndarray, np.ndarray]:
    def analyze(block: np.ndarray) -> np.ndarray:
        flat = block.reshape(-1, *block.shape[2:])
        center, radius = centers_and_radii(flat, task.target)
        return np.column_stack([center, radius]).reshape(*block.shape[:2], 3)

    lazy = _patterns(task)
    found = lazy.map_blocks(
        analyze, drop_axis=(2, 3), new_axis=2, chunks=(*lazy.chunks[:2], (3,)), dtype=float
    )
    found = found.compute().reshape(-1, 3)
    return found[:, :2], found[:, 2]


def _analysis(task: Task) -> None:
    note(task, *_analyzed(task))


def _crop(task: Task) -> None:
    y0, y1, x0, x1 = window_of(task, *_analyzed(task))
    cut = _patterns(task)[:, :, y0:y1, x0:x1]
    dask.compute(_stored(task, cut), cut.sum((2, 3)))


def _bin(task: Task) -> None:
    lazy = _patterns(task)
    chunks = (*lazy.chunks[:2], *((n // 2,) for n in task.shape[2:]))
    dask.compute(_stored(task, lazy.map_blocks(means_of_four, chunks=chunks, dtype=np.float32)))


def _convert(task: Task) -> None:
    dask.compute(_stored(task, _patterns(task)))


def _stored(task: Task, lazy: da.Array) -> Any:
    positions = max(1, 2**20 // (lazy.shape[2] * lazy.shape[3] * lazy.dtype.itemsize))
    lead = (1, min(positions, lazy.shape[1]))
    out = empty_zarr(task, lazy.shape, lazy.dtype, lead)
    return da.store(lazy, out, lock=False, compute=False)


ROWS = {"analysis": _analysis, "crop": _crop, "cold": _crop, "bin": _bin, "convert": _convert}
