"""The kernels on a GPU: the same results and types as `stem_dask.kernels.analysis`, ``crop`` and ``downsample``.

Sums of floats have another order than on the CPU. cupy is loaded when something is done, not before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.analysis import PatternAnalysis, largest_radius, refuse_overflow
from stem_dask.kernels.cuda_code import (
    ANALYSIS_THREADS,
    BATCH,
    CROP_THREADS,
    WARP,
    Code,
    analysis_code,
    analysis_shared_bytes,
    compared,
    crop_code,
    load_pixels,
    stored,
    wide,
)
from stem_dask.kernels.downsample import result_dtype
from stem_dask.kernels.intensity import ODD_PIXELS, lowest_counted, native
from stem_dask.kernels.ring import SLOT_BYTES, Ring, download, shared_buffer

#: threads of a block, and blocks, for what is not worth more thought
_FOLD_THREADS, _FOLD_BLOCKS = 256, 1024
#: shared memory that every kernel may have without asking
_SHARED_BYTES = 48 * 1024
#: a factor by which nothing is left of a window, so that it is only added up
_ALL = 2**30

_lock = threading.Lock()
_modules: dict[Code, Any] = {}


def _kernel(code: Code, name: str, shared: int = 0) -> Any:
    """A kernel, compiled the first time in this process."""
    import cupy

    with _lock:
        module = _modules.get(code)
        if module is None:
            module = _modules[code] = cupy.RawModule(code=code.text, options=code.options())
        kernel = module.get_function(name)
        if shared > _SHARED_BYTES:
            kernel.max_dynamic_shared_size_bytes = shared
    return kernel


class Analysis:
    """`stem_dask.kernels.analysis.Analysis` on the GPU: patterns come in pieces, from host memory.

    Parameters
    ----------
    n, detector, dtype, target_retention, threshold, center, metric : see there
    slot_bytes : see `stem_dask.kernels.ring.Ring`; the sums of floats depend on it in their last digits
    """

    def __init__(
        self,
        n: int,
        detector: tuple[int, int],
        dtype: np.dtype,
        *,
        target_retention: float,
        threshold: float,
        center: tuple[float, float] | None,
        metric: str,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        self.works: list[_Analyzing] = []
        radii = largest_radius(*detector, metric) + 1
        self.found: tuple[NDArray, ...] = (
            np.empty(n),  # total
            np.empty((n, 2)),  # center of mass
            np.empty((n, 2)),  # center
            np.empty(n, np.float32),  # radius
            np.empty((n, radii), np.float32),  # profile
            np.empty((n, len(ODD_PIXELS)), np.uint32),
            np.empty(n),  # what negative values amounted to
        )

        def work(size: int) -> _Analyzing:
            made = _Analyzing(
                size, detector, stored(dtype), radii, target_retention, threshold, center, metric
            )
            self.works.append(made)
            return made

        self.ring = Ring(n, detector, dtype, work, slot_bytes)

    def add(self, piece: NDArray) -> None:
        """Analyze the next patterns, (n, ky, kx).

        Raises
        ------
        OverflowError
            When a pattern's sums leave 64 bits.
        """
        self._keep(self.ring.add(piece))

    def result(self) -> PatternAnalysis:
        """What was found in all of them."""
        self._keep(self.ring.rest())
        total, com, center, radius, profile, odd, negative = self.found
        totals, highest = zip(*(work.patterns() for work in self.works), strict=True)
        return PatternAnalysis(
            total,
            com,
            center,
            radius,
            profile,
            np.add.reduce(totals),
            np.maximum.reduce(highest),
            odd.sum(axis=0, dtype=np.int64),
            float(negative.sum()),
        )

    def _keep(self, done: Iterator[tuple[slice, list[NDArray]]]) -> None:
        for here, arrays in done:
            for all_of_them, values in zip(self.found, arrays, strict=True):
                all_of_them[here] = values[: here.stop - here.start]


class _Analyzing:
    """The analysis of the patterns of a slot, one time after another."""

    def __init__(
        self,
        size: int,
        detector: tuple[int, int],
        dtype: np.dtype,
        radii: int,
        target: float,
        threshold: float,
        center: tuple[float, float] | None,
        metric: str,
    ) -> None:
        import cupy

        self.detector, self.pixels = detector, prod(detector)
        shapes = (
            (size,),
            (size, 2),
            (size, 2),
            (size,),
            (size, radii),
            (size, len(ODD_PIXELS)),
            (size,),
        )
        kinds = ("f8", "f8", "f8", "f4", "f4", "u4", "f8")
        self.on_gpu, self.in_host = shared_buffer(list(zip(shapes, kinds, strict=True)))
        self.batch = min(size, BATCH)
        groups = -(-size // self.batch)
        kept, summed = compared(dtype), wide(dtype)
        self.sums = cupy.empty((groups, *detector), summed), cupy.empty((groups, *detector), kept)
        self.total, self.highest = cupy.zeros(detector, summed), cupy.zeros(detector, kept)
        y, x = (np.nan, np.nan) if center is None else center
        low = lowest_counted(kept, threshold)
        self.options = (low, np.float64(y), np.float64(x), np.float64(target), np.int32(radii))
        vectors = self.pixels // load_pixels(dtype, detector[1])
        self.adders = -(-vectors // ANALYSIS_THREADS)
        self.shared = analysis_shared_bytes(dtype, detector, radii, ANALYSIS_THREADS)
        code = analysis_code(dtype, detector[1], threshold=threshold, metric=metric)
        self.analyze = _kernel(code, "analyze", self.shared)
        self.fold = _kernel(code, "fold")

    def start(self, patterns: Any, here: slice) -> None:
        n, (height, width) = here.stop - here.start, self.detector
        groups = -(-n // self.batch)
        sizes = (np.int64(n), np.int32(height), np.int32(width))
        shares = (np.int32(self.batch), np.int32(self.adders))
        arguments = (patterns, *sizes, *shares, *self.options, *self.on_gpu[1:], *self.sums)
        grid = (groups * (self.batch + self.adders),)
        self.analyze(grid, (ANALYSIS_THREADS,), arguments, shared_mem=self.shared)
        arguments = (*self.sums, np.int32(groups), np.int64(self.pixels), self.total, self.highest)
        grid = (min(_FOLD_BLOCKS, -(-self.pixels // _FOLD_THREADS)),)
        self.fold(grid, (_FOLD_THREADS,), arguments)
        download(self.on_gpu, self.in_host)

    def finish(self, patterns: NDArray, here: slice) -> tuple[slice, list[NDArray]]:
        arrays: list[NDArray] = self.in_host[1:]
        n = len(patterns)
        refuse_overflow(native(patterns), arrays[0][:n], arrays[3][:n], here.start)
        return here, arrays

    def patterns(self) -> tuple[NDArray, NDArray]:
        """Sum and maximum of all patterns that passed here."""
        return self.total.get(), self.highest.get()


class Cutting:
    """Cuts windows out of patterns that come in pieces, makes them smaller, and adds up what each window holds.

    Parameters
    ----------
    n, detector, dtype : of the patterns
    origin_y, origin_x : (n,) integers, each window's first row and column; may be negative
    shape : (height, width) of the window
    threshold : values below it do not count for the intensity inside
    factor, method, reduce, sigma : see `stem_dask.kernels.downsample.downsample_patterns`
    slot_bytes : see `stem_dask.kernels.ring.Ring`
    """

    def __init__(
        self,
        n: int,
        detector: tuple[int, int],
        dtype: np.dtype,
        origin_y: NDArray,
        origin_x: NDArray,
        shape: tuple[int, int],
        *,
        threshold: float,
        factor: int = 1,
        method: str = "bin",
        reduce: str = "mean",
        sigma: float | None = None,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        origins = np.stack([np.ravel(origin_y), np.ravel(origin_x)]).astype(np.int32)

        def work(size: int) -> _Cutting:
            how = {"method": method, "reduce": reduce}
            return _Cutting(
                size, np.dtype(dtype), origins, shape, threshold, sigma, factor=factor, **how
            )

        self.ring = Ring(n, detector, dtype, work, slot_bytes)

    def add(self, piece: NDArray) -> Iterator[tuple[NDArray, NDArray]]:
        """Take the next patterns; gives smaller ones (n, …) and the intensity inside (n,), until the next are asked for."""
        return self.ring.add(piece)

    def rest(self) -> Iterator[tuple[NDArray, NDArray]]:
        """The last ones."""
        return self.ring.rest()


class _Cutting:
    """Windows of the patterns of a slot, one time after another."""

    def __init__(
        self,
        size: int,
        dtype: np.dtype,
        origins: NDArray[np.int32],
        shape: tuple[int, int],
        threshold: float,
        sigma: float | None,
        *,
        factor: int,
        method: str,
        reduce: str,
    ) -> None:
        import cupy
        import cupyx

        kept = stored(dtype)
        self.shape, self.origins = shape, origins
        self.result = result_dtype(dtype, factor, method, reduce)
        out = (size, shape[0] // factor, shape[1] // factor)
        self.on_gpu, self.in_host = shared_buffer([(out, stored(self.result)), ((size,), "f8")])
        self.places = cupyx.empty_pinned((2, size), np.int32), cupy.empty((2, size), np.int32)
        self.low = lowest_counted(compared(kept), threshold)
        self.cut, self.then = None, None
        if factor > 1 and method in ("gauss", "fft"):
            self.cut = cupy.empty((size, *shape), kept)
            width = 0.5 * factor if sigma is None else sigma
            self.then = _gauss(factor, width) if method == "gauss" else _fft(factor)
            factor = 1
        code = crop_code(dtype, threshold=threshold, factor=factor, method=method, reduce=reduce)
        self.crop = _kernel(code, "crop")

    def start(self, patterns: Any, here: slice) -> None:
        import cupy

        n, (height, width) = len(patterns), patterns.shape[1:]
        host, places = self.places
        host[:, :n] = self.origins[:, here]
        places.set(host, stream=cupy.cuda.get_current_stream())
        out, inside = self.on_gpu[1:]
        cut = out if self.cut is None else self.cut
        sizes = (np.int32(self.shape[0]), np.int32(self.shape[1]))
        arguments = (
            patterns, np.int32(height), np.int32(width), places[0], places[1], *sizes, self.low, cut, inside,
        )  # fmt: skip
        shared = 8 * CROP_THREADS // WARP
        self.crop((n,), (CROP_THREADS,), arguments, shared_mem=shared)
        if self.then is not None:
            self.then(cut[:n], out[:n])
        download(self.on_gpu, self.in_host)

    def finish(self, patterns: NDArray, here: slice) -> tuple[NDArray, NDArray]:
        out, inside = self.in_host[1:]
        return out[: len(patterns)].view(self.result), inside[: len(patterns)]


def _gauss(factor: int, sigma: float) -> Callable[[Any, Any], None]:
    def smaller(cut: Any, out: Any) -> None:
        from cupyx.scipy.ndimage import gaussian_filter

        height, width = (factor * size for size in out.shape[1:])
        patterns = cut[:, :height, :width].astype(out.dtype)
        smooth = gaussian_filter(patterns, (0, sigma, sigma), mode="reflect", truncate=4.0)
        out[...] = smooth[:, ::factor, ::factor]

    return smaller


def _fft(factor: int) -> Callable[[Any, Any], None]:
    def smaller(cut: Any, out: Any) -> None:
        from cupy import fft

        height, width = out.shape[1:]
        full_height, full_width = factor * height, factor * width
        patterns = cut[:, :full_height, :full_width].astype(out.dtype)
        spectrum = fft.fftshift(fft.fft2(patterns), axes=(1, 2))
        top, left = full_height // 2 - height // 2, full_width // 2 - width // 2
        kept = spectrum[:, top : top + height, left : left + width]
        out[...] = fft.ifft2(fft.ifftshift(kept, axes=(1, 2))).real / factor**2

    return smaller


def cut_patterns(
    block: NDArray,
    origin_y: NDArray,
    origin_x: NDArray,
    shape: tuple[int, int],
    *,
    threshold: float = 0.0,
    factor: int = 1,
    method: str = "bin",
    reduce: str = "mean",
    sigma: float | None = None,
    slot_bytes: int = SLOT_BYTES,
) -> tuple[NDArray, NDArray[np.float64]]:
    """`crop_patterns`, `downsample_patterns` and `window_intensity` of a block (n, ky, kx) at once.

    Returns
    -------
    (n, height // factor, width // factor) smaller windows, and (n,) the intensity in each whole window
    """
    made = Cutting(
        len(block), block.shape[1:], block.dtype, origin_y, origin_x, shape, threshold=threshold, factor=factor,
        method=method, reduce=reduce, sigma=sigma, slot_bytes=slot_bytes,
    )  # fmt: skip
    dtype = result_dtype(block.dtype, factor, method, reduce)
    out, inside = np.empty((len(block), *(k // factor for k in shape)), dtype), np.empty(len(block))
    done = 0
    for step in (made.add(block), made.rest()):
        for windows, intensity in step:
            here = slice(done, done + len(windows))
            out[here], inside[here], done = windows, intensity, here.stop
    return out, inside


def window_intensity(block: NDArray, *, threshold: float) -> NDArray[np.float64]:
    """`stem_dask.kernels.crop.window_intensity` of a block (n, ky, kx)."""
    origin = np.zeros(len(block), np.int32)
    options: dict[str, Any] = {"threshold": threshold, "factor": _ALL, "method": "stride"}
    return cut_patterns(block, origin, origin, block.shape[1:], **options)[1]
