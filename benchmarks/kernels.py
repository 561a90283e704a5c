"""Speed of the kernels per core, in GB of input a second, beside yardsticks.

    python -m benchmarks.kernels [--patterns 256] [--detector 256]

Yardsticks are of one core of an AMD Zen 5 on 256 x 256 uint16; the point is the ratio, not the figure.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from stem_dask.kernels.analysis import analyze_patterns
from stem_dask.kernels.crop import crop_patterns, window_intensity
from stem_dask.kernels.downsample import downsample_patterns


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure every kernel; prints GB/s and returns them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", type=int, default=256)
    parser.add_argument("--detector", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args(argv)
    n, size = options.patterns, options.detector
    rng = np.random.default_rng(0)
    half = np.full(n, size // 4)
    found = {}
    for dtype in ("uint16", "uint8", "uint32", "int16", "float32"):
        block = rng.poisson(3, (n, size, size)).astype(dtype)
        jobs: dict[str, tuple[Callable[[], object], float]] = {
            "analyze square": (lambda b=block: _analyze(b, "square"), 1.0),
            "analyze circle": (lambda b=block: _analyze(b, "circle"), 1.0),
            "crop + retention": (lambda b=block: _crop(b, half, size // 2), 0.25),
            "bin 2": (lambda b=block: downsample_patterns(b, 2, method="bin"), 1.0),
            "stride 2": (lambda b=block: downsample_patterns(b, 2, method="stride"), 1.0),
        }
        if dtype in ("uint16", "float32"):
            jobs["gauss 2"] = (
                lambda b=block: downsample_patterns(b[:32], 2, method="gauss"),
                32 / n,
            )
            jobs["fft 2"] = (lambda b=block: downsample_patterns(b[:32], 2, method="fft"), 32 / n)
        for name, (job, share) in jobs.items():
            found[f"{name} {dtype}"] = block.nbytes * share / _fastest(job, options.repeat) / 1e9
            print(f"{name:18} {dtype:8} {found[f'{name} {dtype}']:7.2f} GB/s", flush=True)
    return found


def _analyze(block: np.ndarray, metric: str) -> object:
    return analyze_patterns(block, target_retention=0.98, threshold=0, center=None, metric=metric)


def _crop(block: np.ndarray, origin: np.ndarray, size: int) -> object:
    return window_intensity(crop_patterns(block, origin, origin, (size, size)), threshold=0)


def _fastest(job: Callable[[], object], repeat: int) -> float:
    job()  # compiles
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
