"""LiberTEM: user-defined functions over tiles and frames, on its dask executor. Written for 0.16.

Needs a separate environment: ``python -m benchmarks.table --peer-python libertem=/path/to/python``
"""

from typing import Any

import numpy as np
from libertem.api import Context
from libertem.udf import UDF

from benchmarks.peers import (
    CHUNK,
    Task,
    centers_and_radii,
    empty_zarr,
    means_of_four,
    note,
    timed,
    window_of,
)
from benchmarks.peers import row_of as function_of

#: the 4D image of a file of benchmarks.data, after the thumbnail and the survey image
IMAGE = 2
#: how many patterns of what was found are written at once
WRITTEN = 128


def run(task: Task) -> float:
    """Seconds of a row, on workers that are there already."""
    import zarr  # noqa: F401

    context = Context.make_with("dask", cpus=task.cores)
    try:
        _warm(context, task)
        return timed(function_of({name: row(context) for name, row in ROWS.items()}, task))
    finally:
        context.close()


class Analysis(UDF):
    """Center and radius of every pattern."""

    def get_result_buffers(self) -> dict[str, Any]:
        """A center and a radius by position."""
        return {"found": self.buffer(kind="nav", extra_shape=(3,), dtype="float64")}

    def process_frame(self, frame: np.ndarray) -> None:
        """One pattern."""
        center, radius = centers_and_radii(frame[None], self.params.target)
        self.results.found[:] = np.append(center[0], radius)

    def get_preferred_input_dtype(self) -> Any:
        """Counts as they are: the default would be float32."""
        return self.USE_NATIVE_DTYPE


class Crop(UDF):
    """A window of every pattern, and what is in it."""

    def get_result_buffers(self) -> dict[str, Any]:
        """The window and its sum by position."""
        y0, y1, x0, x1 = self.params.window
        shape, dtype = (y1 - y0, x1 - x0), self.meta.dataset_dtype
        return {
            "cut": self.buffer(kind="nav", extra_shape=shape, dtype=dtype),
            "inside": self.buffer(kind="nav", dtype="float64"),
        }

    def process_frame(self, frame: np.ndarray) -> None:
        """One pattern."""
        y0, y1, x0, x1 = self.params.window
        cut = frame[y0:y1, x0:x1]
        self.results.cut[:] = cut
        self.results.inside[:] = cut.sum()

    def get_preferred_input_dtype(self) -> Any:
        """Counts as they are."""
        return self.USE_NATIVE_DTYPE


class Bin(UDF):
    """Means of 2 x 2 pixels."""

    def get_result_buffers(self) -> dict[str, Any]:
        """A smaller pattern by position."""
        height, width = self.meta.dataset_shape.sig
        return {
            "small": self.buffer(kind="nav", extra_shape=(height // 2, width // 2), dtype="float32")
        }

    def process_frame(self, frame: np.ndarray) -> None:
        """One pattern."""
        self.results.small[:] = means_of_four(frame)

    def get_preferred_input_dtype(self) -> Any:
        """Counts as they are."""
        return self.USE_NATIVE_DTYPE


def _warm(context: Context, task: Task) -> None:
    """Compiles its kernels on the workers: one pattern of each partition."""
    roi = np.zeros(task.shape[:2], bool)
    roi.flat[:: max(1, roi.size // (2 * task.cores))] = True
    context.run_udf(_loaded(context, task), Analysis(target=task.target), roi=roi)


def _loaded(context: Context, task: Task) -> Any:
    parts = 2 * task.cores  # of its own choice a file of this size may be one part, for one worker
    return context.load("dm", path=task.input, dataset_index=IMAGE, num_partitions=parts)


def _analyzed(context: Context, task: Task) -> tuple[Any, np.ndarray, np.ndarray]:
    data = _loaded(context, task)
    found = context.run_udf(data, Analysis(target=task.target))["found"].data.reshape(-1, 3)
    return data, found[:, :2], found[:, 2]


def _analysis(context: Context) -> Any:
    def row(task: Task) -> None:
        _, center, radius = _analyzed(context, task)
        note(task, center, radius)

    return row


def _crop(context: Context) -> Any:
    def row(task: Task) -> None:
        data, center, radius = _analyzed(context, task)
        window = window_of(task, center, radius)
        _write(task, context.run_udf(data, Crop(window=window))["cut"].data, "crop")

    return row


def _bin(context: Context) -> Any:
    def row(task: Task) -> None:
        data = _loaded(context, task)
        _write(task, context.run_udf(data, Bin())["small"].data, "bin")

    return row


def _write(task: Task, patterns: np.ndarray, kind: str) -> None:
    """It has no writer for zarr; what it found is in memory."""
    flat = patterns.reshape(-1, *patterns.shape[2:])
    out = empty_zarr(task, flat.shape, flat.dtype, (CHUNK[kind],))
    for start in range(0, len(flat), WRITTEN):
        out[start : start + WRITTEN] = flat[start : start + WRITTEN]


ROWS = {"analysis": _analysis, "crop": _crop, "cold": _crop, "bin": _bin}
