"""Speed of the kernels on one core in GB of input per CPU second, relative to a memory copy and to numpy or scipy.

    python -m benchmarks.kernels [--patterns 256] [--detectors 256 64 1024] [--dtypes uint16 float32]

The reference ``copy`` copies the block into allocated memory; ``twin`` computes the same result with array functions.
Compare the ratios, not the absolute numbers.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import centers_and_radii, means_of_four
from stem_dask.kernels.analysis import analyze_patterns
from stem_dask.kernels.crop import crop_patterns, window_intensity
from stem_dask.kernels.downsample import downsample_patterns
from stem_dask.kernels.logarithm import add_logs

DTYPES = ("uint16", "uint8", "uint32", "int16", "float32")
TARGET = 0.98
#: slow kernels take this fraction of the block
SLOW_SHARE = 8


@dataclass(frozen=True)
class Speed:
    """Bytes per CPU second of one core: of the kernel, of a copy, and of the twin."""

    kernel: str
    dtype: str
    detector: int
    speed: float
    copy: float
    twin: float

    @property
    def text(self) -> str:
        """One line."""
        return (
            f"{self.kernel:18} {self.dtype:8} {self.detector:5} {self.speed / 1e9:7.2f} {self.speed / self.copy:8.3f} "
            f"{self.speed / self.twin:7.1f}"
        )


HEADING = f"{'kernel':18} {'type':8} {'px':>5} {'GB/s':>7} {'x copy':>8} {'x twin':>7}"

Work = Callable[[], object]


def main(argv: list[str] | None = None) -> list[Speed]:
    """Measure and print every kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", type=int, default=256)
    parser.add_argument("--detectors", type=int, nargs="+", default=[256], help="pixels")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args(argv)
    print(HEADING)
    found = []
    for dtype, size in product(options.dtypes, options.detectors):
        n = max(1, options.patterns * 256**2 // size**2)  # as many pixels of every size
        for speed in measure(beams(n, size, dtype), options.repeat):
            found.append(speed)
            print(speed.text, flush=True)
    return found


def beams(
    n: int, detector: int, dtype: str, radius: float | None = None, distinct: int = 16
) -> NDArray:
    """(n, detector, detector): a disc with most of the counts over a weak background, near the middle."""
    rng = np.random.default_rng(0)
    y, x = np.ogrid[:detector, :detector]
    distance = np.hypot(y - detector / 2 + 1, x - detector / 2 - 2)
    mean = np.where(distance < (radius or detector / 14), 40.0, 0.1)
    some = rng.poisson(mean, (min(n, distinct), detector, detector))
    return np.resize(some, (n, detector, detector)).astype(dtype)


def measure(block: NDArray, repeat: int) -> list[Speed]:
    """Speed of every kernel on a block (n, ky, kx), with its references; the fastest of ``repeat`` runs counts."""
    target, dtype, size = np.empty_like(block), str(block.dtype), block.shape[-1]
    copy = block.nbytes / fastest(lambda: np.copyto(target, block), repeat)
    speeds = []
    for name, (kernel, twin, part) in works(block).items():
        speed = part.nbytes / fastest(kernel, repeat)
        other = part.nbytes / fastest(twin, min(repeat, 2))
        speeds.append(Speed(name, dtype, size, speed, copy, other))
    return speeds


def works(block: NDArray) -> dict[str, tuple[Work, Work, NDArray]]:
    """Kernel, twin, and the input of both, by name."""
    n, size = len(block), block.shape[-1]
    slow = block[: max(1, n // SLOW_SHARE)]
    start, half = size // 4, size // 2
    origin = np.full(n, start)
    window = block[:, start : start + half, start : start + half]
    return {
        "analyze square": (lambda: _analyze(block, "square"), lambda: centers_and_radii(block, TARGET), block),
        "analyze circle": (lambda: _analyze(block, "circle"), lambda: _circles(block), block),
        "crop + retention": (lambda: _crop(block, origin, half), lambda: window.copy().sum((1, 2)), window),
        "bin 2": (lambda: downsample_patterns(block, 2, method="bin"), lambda: means_of_four(block), block),
        "stride 2": (lambda: downsample_patterns(block, 2, method="stride"), lambda: block[:, ::2, ::2].copy(), block),
        "logarithms": (lambda: _logs(block), lambda: np.log1p(block, dtype=np.float64).mean((1, 2)), block),
        "gauss 2": (lambda: downsample_patterns(slow, 2, method="gauss"), lambda: _gauss(slow), slow),
        "fft 2": (lambda: downsample_patterns(slow, 2, method="fft"), lambda: _fft(slow), slow),
    }  # fmt: skip


def _analyze(block: NDArray, metric: str) -> object:
    return analyze_patterns(block, target_retention=TARGET, threshold=0, center=None, metric=metric)


def _crop(block: NDArray, origin: NDArray, size: int) -> object:
    return window_intensity(crop_patterns(block, origin, origin, (size, size)), threshold=0)


def _logs(block: NDArray) -> NDArray:
    return add_logs(block, np.zeros(block.shape[1:]))[0]


def _circles(block: NDArray) -> object:
    """Radii of discs from sums over rounded-up distances."""
    n, height, width = block.shape
    centers = np.rint(centers_and_radii(block, TARGET)[0]).astype(int)
    far = np.hypot(np.arange(-height, height)[:, None], np.arange(-width, width)[None])
    table = np.ceil(far).astype(np.intp)
    radii = np.empty(n)
    for i, (pattern, (y, x)) in enumerate(zip(block, centers, strict=True)):
        distance = table[height - y : 2 * height - y, width - x : 2 * width - x]
        inside = np.bincount(distance.ravel(), pattern.ravel()).cumsum()
        radii[i] = np.searchsorted(inside, TARGET * inside[-1])
    return radii


def _gauss(block: NDArray) -> object:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(block.astype(np.float32), (0, 1, 1), truncate=4.0)[:, ::2, ::2]


def _fft(block: NDArray) -> object:
    from scipy import fft

    spectrum = fft.fftshift(fft.fft2(block.astype(np.float32)), axes=(1, 2))
    start, size = block.shape[-1] // 4, block.shape[-1] // 2
    kept = spectrum[:, start : start + size, start : start + size]
    return fft.ifft2(fft.ifftshift(kept, axes=(1, 2))).real / 4


def fastest(job: Work, repeat: int) -> float:
    """CPU seconds of the fastest run, after one run that compiles."""
    job()
    times = []
    for _ in range(repeat):
        start = time.process_time()
        job()
        times.append(time.process_time() - start)
    return max(min(times), 1e-9)


if __name__ == "__main__":
    main()
