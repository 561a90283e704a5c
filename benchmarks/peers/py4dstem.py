"""py4DSTEM: a datacube in memory, cut and binned by its own methods. Written for 0.14.18.

Needs a separate environment: ``python -m benchmarks.table --peer-python py4dstem=/path/to/python``
"""

from typing import Any

import numpy as np
import py4DSTEM

from benchmarks.peers import (
    CHUNK,
    Task,
    centers_and_radii,
    empty_zarr,
    note,
    row_of,
    timed,
    window_of,
)

#: patterns that are looked at, and written, together
BATCH = 128


def run(task: Task) -> float:
    """Seconds of a row."""
    import zarr  # noqa: F401

    return timed(row_of(ROWS, task))


def _cube(task: Task) -> Any:
    found = py4DSTEM.import_file(task.input)
    return found if isinstance(found, py4DSTEM.DataCube) else found[0]


def _analyzed(task: Task, cube: Any) -> tuple[np.ndarray, np.ndarray]:
    flat = cube.data.reshape(-1, *cube.data.shape[2:])
    parts = (flat[start : start + BATCH] for start in range(0, len(flat), BATCH))
    centers, radii = zip(*(centers_and_radii(part, task.target) for part in parts), strict=True)
    return np.concatenate(centers), np.concatenate(radii)


def _analysis(task: Task) -> None:
    note(task, *_analyzed(task, _cube(task)))


def _crop(task: Task) -> None:
    cube = _cube(task)
    window = window_of(task, *_analyzed(task, cube))
    cube.crop_Q(window)
    cube.data.sum((2, 3))
    _write(task, cube.data, "crop")


def _bin(task: Task) -> None:
    cube = _cube(task)
    cube.bin_Q(2, dtype=np.float32)
    _write(task, cube.data / np.float32(4), "bin")


def _write(task: Task, patterns: np.ndarray, kind: str) -> None:
    """It has no writer for zarr."""
    flat = patterns.reshape(-1, *patterns.shape[2:])
    out = empty_zarr(task, flat.shape, flat.dtype, (CHUNK[kind],))
    for start in range(0, len(flat), BATCH):
        out[start : start + BATCH] = flat[start : start + BATCH]


ROWS = {"analysis": _analysis, "crop": _crop, "cold": _crop, "bin": _bin}
