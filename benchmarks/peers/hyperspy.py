"""HyperSpy: lazy signals, on dask's threads; what it has no function for is mapped over the signal."""

from typing import Any

import hyperspy.api as hs
import numpy as np

from benchmarks.peers import (
    CannotError,
    Task,
    centers_and_radii,
    empty_zarr,
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

    if task.row == "zspy":
        _refuse_zarr_3()
    hs.preferences.General.show_progressbar = False
    return timed(row_of(ROWS, task))


def _refuse_zarr_3() -> None:
    import zarr

    if not hasattr(zarr.storage, "NestedDirectoryStore"):
        raise CannotError("RosettaSciIO 0.15 writes .zspy with zarr 2 only")


def _signal(task: Task) -> Any:
    # by axis, because the file also holds a survey image of two dimensions
    chunks = dict(enumerate((ROWS_OF_BLOCK, *task.shape[1:])))
    found = hs.load(task.input, lazy=True, chunks=chunks)
    signals = found if isinstance(found, list) else [found]
    return next(signal for signal in signals if signal.data.ndim == 4)


def _analyzed(task: Task, signal: Any) -> tuple[np.ndarray, np.ndarray]:
    def analyze(pattern: np.ndarray) -> np.ndarray:
        center, radius = centers_and_radii(pattern[None], task.target)
        return np.append(center[0], radius)

    mapped = signal.map(
        analyze, inplace=False, ragged=False, output_signal_size=(3,), output_dtype=float
    )
    found = mapped.data.compute().reshape(-1, 3)
    return found[:, :2], found[:, 2]


def _analysis(task: Task) -> None:
    note(task, *_analyzed(task, _signal(task)))


def _crop(task: Task) -> None:
    import dask

    signal = _signal(task)
    y0, y1, x0, x1 = window_of(task, *_analyzed(task, signal))
    cut = signal.isig[x0:x1, y0:y1]
    inside = cut.sum(cut.axes_manager.signal_axes)
    dask.compute(_stored(task, cut.data), inside.data)


def _bin(task: Task) -> None:
    binned = _signal(task).rebin(scale=(1, 1, 2, 2), dtype=np.float32) / np.float32(4)
    _stored(task, binned.data).compute()


def _convert(task: Task) -> None:
    _stored(task, _signal(task).data).compute()


def _stored(task: Task, lazy: Any) -> Any:
    """What HyperSpy cannot write with zarr 3 goes to zarr by dask."""
    import dask.array as da

    lazy = lazy.rechunk({2: -1, 3: -1})
    positions = max(1, 2**20 // (lazy.shape[2] * lazy.shape[3] * lazy.dtype.itemsize))
    out = empty_zarr(task, lazy.shape, lazy.dtype, (1, min(positions, lazy.shape[1])))
    return da.store(lazy, out, lock=False, compute=False)


def _hspy_gzip(task: Task) -> None:
    _signal(task).save(task.output, compression="gzip", compression_opts=4, shuffle=True)


def _hspy_lz4(task: Task) -> None:
    import hdf5plugin

    packed = hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.BITSHUFFLE)
    _signal(task).save(task.output, **packed)


def _zspy(task: Task) -> None:
    from numcodecs import Blosc

    _signal(task).save(task.output, compressor=Blosc("lz4", clevel=5, shuffle=Blosc.BITSHUFFLE))


ROWS = {
    "analysis": _analysis,
    "crop": _crop,
    "cold": _crop,
    "bin": _bin,
    "convert": _convert,
    "hspy-gzip": _hspy_gzip,
    "hspy-lz4": _hspy_lz4,
    "zspy": _zspy,
}
