"""Speed of the GPU: kernels on resident data and a device copy for comparison; transfers; and a whole job.

    python -m benchmarks.gpu [--gb 4] [--detector 256] [--dtypes uint16 float32] [--job-gb 2]

Kernels: GB/s of input (copy and crop: input plus output) without transfers, best of several rounds. Transfers: patterns in
host memory through the pinned buffers, compared with plain copies of pinned memory. Job: a cached scan on disk, analyzed,
cropped and binned, with ``device: gpu`` and ``cpu``.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import scan_rows, simulated_rows, write_scan
from stem_dask.config.load import parse_config
from stem_dask.job.run import run
from stem_dask.kernels.analysis import largest_radius
from stem_dask.kernels.gpu.analysis import Analysis, AnalysisOfSlot
from stem_dask.kernels.gpu.code import BATCH
from stem_dask.kernels.gpu.crop import WindowsOfSlot, cutting

TARGET = 0.98
#: launches timed together, so that the time to queue one does not count
LAUNCHES = 10
#: ratio of the detector's side to the window's
WINDOW = 4


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure and print all; returns GB/s by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=4.0, help="GB of patterns on the GPU")
    parser.add_argument("--detector", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["uint16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--job-gb", type=float, default=2.0, help="GB of the scan on disk")
    options = parser.parse_args(argv)
    found: dict[str, float] = {}
    for dtype in options.dtypes:
        n = max(1, int(options.gb * 1e9 / (options.detector**2 * np.dtype(dtype).itemsize)))
        rows = simulated_rows(4, min(n, BATCH), options.detector, 100_000, "uint16")
        tile = rows[0].astype(dtype)
        for name, speed in {
            **on_the_gpu(tile, n, options.rounds),
            **over_the_bus(tile, n, options.rounds),
        }.items():
            found[f"{name} {dtype}"] = speed
            print(f"{name:24} {dtype:8} {speed:10.2f} GB/s", flush=True)
    for device, speed in jobs(options.job_gb, options.detector).items():
        found[f"job {device}"] = speed
        print(f"{'job':24} {device:8} {speed:10.2f} GB/s", flush=True)
    return found


def on_the_gpu(tile: NDArray, n: int, rounds: int) -> dict[str, float]:
    """Kernels on n patterns in GPU memory."""
    import cupy

    detector: tuple[int, int] = (tile.shape[1], tile.shape[2])
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        patterns = cupy.empty((n, *detector), tile.dtype)
        for start in range(0, n, len(tile)):
            some = tile[: n - start]
            patterns[start : start + len(some)].set(some, stream=stream)
        stream.synchronize()

        def speed(n_bytes: int, work: Callable[[], Any]) -> float:
            def some() -> None:
                for _ in range(LAUNCHES):
                    work()

            return LAUNCHES * n_bytes / 1e9 / best(rounds, some, stream.synchronize)

        size = int(patterns.nbytes)
        here = slice(0, n)
        other = cupy.empty(patterns.shape, tile.dtype)
        copy = lambda: other.__setitem__(..., patterns)  # noqa: E731
        found = {"copy on the device": speed(2 * size, copy)}
        for metric in ("square", "circle"):
            radii = largest_radius(*detector, metric) + 1
            how = {"target_retention": TARGET, "threshold": 0.0, "center": None, "metric": metric}
            analysis = AnalysisOfSlot(n, detector, tile.dtype, radii, **how)
            work = lambda work=analysis: work.launch(patterns, here)  # noqa: E731
            found[f"analysis, {metric}s"] = speed(size, work)
        shape = (detector[0] // WINDOW, detector[1] // WINDOW)
        origins = np.full((2, n), detector[0] // 3, np.int32)
        for factor in (1, 2):
            how = {"factor": factor, "method": "bin", "reduce": "mean"}
            windows = WindowsOfSlot(n, tile.dtype, origins, shape, 0.0, None, **how)
            moved = n * shape[0] * shape[1] * tile.itemsize + int(windows.in_host[1].nbytes)
            work = lambda work=windows: work.launch(patterns, here)  # noqa: E731
            found[f"crop, bin by {factor}"] = speed(moved, work)
    return found


def over_the_bus(tile: NDArray, n: int, rounds: int) -> dict[str, float]:
    """Kernels on patterns in host memory."""
    import cupy
    import cupyx

    stream = cupy.cuda.Stream(non_blocking=True)
    n_tiles = max(1, n // len(tile))
    pinned = cupyx.empty_pinned(tile.shape, tile.dtype)
    pinned[...] = tile
    with stream:
        device = cupy.empty(tile.shape, tile.dtype)

    def upload() -> None:
        for _ in range(n_tiles):
            device.set(pinned, stream=stream)
        stream.synchronize()

    options: dict[str, Any] = {"target_retention": TARGET, "threshold": 0.0, "center": None}
    detector = (tile.shape[1], tile.shape[2])

    def analyze() -> None:
        work = Analysis(n_tiles * len(tile), detector, tile.dtype, **options, metric="square")
        for _ in range(n_tiles):
            work.add(tile)
        work.result()

    def cut() -> None:
        origin = np.full(n_tiles * len(tile), detector[0] // 3)
        shape = (detector[0] // WINDOW, detector[1] // WINDOW)
        made = cutting(
            len(origin), detector, tile.dtype, origin, origin, shape, threshold=0.0, factor=2
        )
        for _ in range(n_tiles):
            for _ in made.add(tile):
                pass
        for _ in made.rest():
            pass

    size = n_tiles * tile.nbytes
    named = {"bus, pinned memory": upload, "bus, analysis": analyze, "bus, crop and bin": cut}
    return {name: size / 1e9 / best(rounds, work, lambda: None) for name, work in named.items()}


def best(rounds: int, work: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Seconds of the fastest round, after a warm-up."""
    took = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        wait()
        took.append(time.perf_counter() - started)
    return min(took[1:])


def jobs(gb: float, detector: int) -> dict[str, float]:
    """GB/s of a whole job by device; the job reads its input twice."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="stem_dask-") as folder:
        path = write_scan(
            Path(folder, "scan.dm4"), scan_rows(int(gb * 1e9), 128, detector), detector=detector
        )
        for device in ("cpu", "gpu"):
            options = {
                "input": {"path": str(path)},
                "downsample": {"factor": 2},
                "output": {"path": f"{folder}/{device}.zarr", "export": [], "figure": False},
                "device": device,
            }
            results = run(parse_config(options)).results
            found[device] = float(results["speed"]["bytes_per_second"]) / 1e9
    return found


if __name__ == "__main__":
    main()
