"""`stem_dask.kernels.crop` and ``downsample`` on a GPU, in one launch: the same results and types, of gauss and fft to 1e-5.

cupy is loaded when something is done, not before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.downsample import result_dtype
from stem_dask.kernels.gpu.buffers import (
    SLOT_BYTES,
    Ring,
    Taken,
    buffer_bytes,
    shared_buffer,
    slots_of,
    taken,
)
from stem_dask.kernels.gpu.code import (
    CROP_THREADS,
    TOOLKIT,
    WARP,
    compared,
    crop_code,
    kernel,
    stored,
)
from stem_dask.kernels.intensity import lowest_counted

#: copies of the windows that smoothing and transforming hold, in the type of the result: cupy's and cuFFT's own included
_COPIES = {"gauss": 5, "fft": 14}

#: when the last transform of each thread is through: cupy's plans, and the memory they work in, are a thread's, and those of
#: its streams would meet there
_transforms = threading.local()


def cutting(
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
) -> Ring:
    """A ring that cuts windows out of n patterns, makes them smaller, and adds up what each window holds.

    For origins and shape see `stem_dask.kernels.crop.crop_patterns`; values below the threshold do not count for the intensity
    inside; for the rest see `stem_dask.kernels.downsample.downsample_patterns`. Its results are smaller windows (n, …) and the
    intensity inside (n,).
    """
    origins = np.stack([np.ravel(origin_y), np.ravel(origin_x)]).astype(np.int32)
    how: dict[str, Any] = {"factor": factor, "method": method, "reduce": reduce}

    def work(size: int) -> WindowsOfSlot:
        return WindowsOfSlot(size, np.dtype(dtype), origins, shape, threshold, sigma, **how)

    return Ring(n, detector, dtype, work, slot_bytes)


class WindowsOfSlot:
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
        self.crop = kernel(code, "crop")

    def launch(self, patterns: Any, here: slice) -> None:
        """Queue the kernels; what they make stays on the GPU."""
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
            # of a slot that is not full, too: what is done with the rest is not looked at
            self.then(cut, out)

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
    try:
        from cupy.cuda import cufft  # noqa: F401  it would be looked for at the first transform
    except ImportError as error:
        line = str(error).partition("\n")[0]
        raise ValueError(f"downsample.method fft needs cuFFT ({line}): {TOOLKIT}") from error

    def smaller(cut: Any, out: Any) -> None:
        import cupy
        from cupy import fft

        height, width = out.shape[1:]
        full_height, full_width = factor * height, factor * width
        stream = cupy.cuda.get_current_stream()
        before = getattr(_transforms, "last", None)
        if before is not None:
            stream.wait_event(before)
        patterns = cut[:, :full_height, :full_width].astype(out.dtype)
        spectrum = fft.fftshift(fft.fft2(patterns), axes=(1, 2))
        top, left = full_height // 2 - height // 2, full_width // 2 - width // 2
        kept = spectrum[:, top : top + height, left : left + width]
        out[...] = fft.ifft2(fft.ifftshift(kept, axes=(1, 2))).real / factor**2
        _transforms.last = stream.record()

    return smaller


def cut_patterns(
    block: NDArray,
    origin_y: NDArray,
    origin_x: NDArray,
    shape: tuple[int, int],
    *,
    threshold: float = 0.0,
    **how: Any,
) -> tuple[NDArray, NDArray[np.float64]]:
    """`crop_patterns`, `downsample_patterns` and `window_intensity` of a block (n, ky, kx) at once: the smaller windows, and
    (n,) the intensity in each whole window; for the options see `cutting`."""
    n, detector = len(block), (block.shape[1], block.shape[2])
    ring = cutting(n, detector, block.dtype, origin_y, origin_x, shape, threshold=threshold, **how)
    work: Any = ring.slots[0].work
    out, inside, done = np.empty((n, *work.on_gpu[1].shape[1:]), work.result), np.empty(n), 0
    for windows, intensity in ring.through([block]):
        here = slice(done, done + len(windows))
        out[here], inside[here], done = windows, intensity, here.stop
    return out, inside


def window_intensity(block: NDArray, *, threshold: float) -> NDArray[np.float64]:
    """`stem_dask.kernels.crop.window_intensity` of a block (n, ky, kx)."""
    origin, shape = np.zeros(len(block), np.int32), (block.shape[1], block.shape[2])
    # a factor by which nothing is left of a window, so that it is only added up
    how = {"factor": 2**30, "method": "stride"}
    return cut_patterns(block, origin, origin, shape, threshold=threshold, **how)[1]


def ring_bytes(
    n: int,
    detector: tuple[int, int],
    dtype: np.dtype,
    shape: tuple[int, int],
    *,
    factor: int,
    method: str,
    reduce: str,
) -> Taken:
    """Memory that a ring of `cutting` for n patterns takes."""
    kept, result = stored(dtype), result_dtype(dtype, factor, method, reduce)
    size, slots = slots_of(n, detector, kept)
    out = (size, shape[0] // factor, shape[1] // factor)
    found = buffer_bytes([(out, stored(result)), ((size,), "f8")])
    more = places = 2 * 4 * size
    if factor > 1 and method in _COPIES:
        more += size * prod(shape) * (kept.itemsize + _COPIES[method] * result.itemsize)
    return taken(slots, size * prod(detector) * kept.itemsize, found, more, places)
