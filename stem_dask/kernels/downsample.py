"""Make patterns smaller by an integer factor k: bin, stride, gauss, fft (DESIGN: table of methods).

Every method uses the first ``k * (n // k)`` pixels of an axis and gives ``n // k`` outputs.
"""

from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.intensity import CACHE, accumulator, native

METHODS = ("bin", "stride", "gauss", "fft")


def result_dtype(dtype: np.dtype, factor: int, method: str, reduce: str) -> np.dtype:
    """Type of the result: nothing wraps and no mean is truncated.

    stride keeps the type; sums take the smallest type of the same signedness that cannot overflow; means, gauss
    and fft give float32, or float64 from float64. Sums of uint64 and int64 stay what they are.
    """
    dtype = dtype.newbyteorder("=")
    if factor == 1 or method == "stride":
        return dtype
    if method == "bin" and reduce == "sum" and dtype.kind != "f":
        kind, value = ("u", 1) if dtype == np.bool_ else (dtype.kind, int(np.iinfo(dtype).max))
        for size in (1, 2, 4, 8):
            wide = np.dtype(f"{kind}{size}")
            # the most negative value times k² fits too: -max - 1 scales like max + 1, and types differ by 2**8
            fits = size == 8 or int(np.iinfo(wide).max) >= value * factor**2
            if size >= dtype.itemsize and fits:
                return wide
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def downsample_patterns(
    block: NDArray,
    factor: int,
    *,
    method: str,
    reduce: str = "mean",
    sigma: float | None = None,
    out: NDArray | None = None,
) -> NDArray:
    """Downsample each pattern of a block by an integer factor.

    Parameters
    ----------
    block : (..., ky, kx) array
    factor : int >= 1
    method : {"bin", "stride", "gauss", "fft"}
    reduce : {"mean", "sum"}, for ``bin``
    sigma : float, for ``gauss``, in pixels of the input; default ``0.5 * factor``
    out : (..., ky // factor, kx // factor) array of `result_dtype` that is filled; default a new one

    Examples
    --------
    >>> downsample_patterns(np.arange(16.0).reshape(1, 4, 4), 2, method="bin")[0].tolist()
    [[2.5, 4.5], [10.5, 12.5]]
    """
    height, width = block.shape[-2] // factor, block.shape[-1] // factor
    if out is None:
        dtype = result_dtype(block.dtype, factor, method, reduce)
        out = np.empty((*block.shape[:-2], height, width), dtype)
    block = block[..., : height * factor, : width * factor]
    if factor == 1 or method == "stride":
        out[...] = block[..., ::factor, ::factor]
    elif method == "bin":
        block, mean = native(block), reduce == "mean"
        kind = accumulator(block.dtype, factor * factor)
        if mean and block.dtype.itemsize == 8:
            kind = np.dtype(np.float64)  # sums of 64-bit integers could wrap
        elif block.dtype.kind == "i":
            kind = np.dtype(np.int64)
        scale = 1.0 / (factor * factor) if mean else 1.0
        line = np.zeros(block.shape[2], kind)
        _bin(block, factor, scale, mean, line, out.reshape(-1, height, width))
    elif method == "gauss":
        from scipy.ndimage import gaussian_filter

        sigma = 0.5 * factor if sigma is None else sigma
        for place in np.ndindex(
            block.shape[:-2]
        ):  # one by one: in cache, and without a second block
            pattern = block[place].astype(out.dtype)
            smooth = gaussian_filter(pattern, sigma, mode="reflect", truncate=4.0)
            out[place] = smooth[::factor, ::factor]
    elif method == "fft":
        from scipy import fft

        # the centered part of the spectrum
        top, left = (n // 2 - n // factor // 2 for n in block.shape[-2:])
        for place in np.ndindex(block.shape[:-2]):
            spectrum = fft.fftshift(fft.fft2(block[place].astype(out.dtype, copy=False)))
            kept = spectrum[top : top + height, left : left + width]
            out[place] = fft.ifft2(fft.ifftshift(kept)).real / factor**2
    else:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    return out


@numba.njit(nogil=True, cache=CACHE)
def _bin(block, factor, scale, mean, line, out):  # type: ignore[no-untyped-def]
    n, rows, cols = out.shape
    kind, result = line.dtype.type, out.dtype.type
    for i in range(n):
        for y in range(rows):
            line[:] = 0
            for k in range(factor):
                row = block[i, y * factor + k]
                for x in range(line.size):
                    line[x] = kind(line[x] + kind(row[x]))
            to = out[i, y]
            for x in range(cols):
                total = kind(0)
                for k in range(factor):
                    total = kind(total + line[x * factor + k])
                to[x] = result(total * scale) if mean else result(total)


def thumbnail_cell(detector: Sequence[int], side: int = 48) -> int:
    """Pixels of a cell of `thumbnails` along each axis: images have at most ``side`` of them, unless patterns are a thin strip."""
    return min(-(-max(detector) // side), *detector)


def thumbnails(patterns: NDArray, cell: int) -> NDArray[np.uint8]:
    """Small images of patterns (n, ky, kx) for display: means of cells of ``cell`` by ``cell`` pixels, logarithmic.

    Returns
    -------
    (n, ky // cell, kx // cell) uint8: ``255 * log(1 + mean) / log(1 + largest mean)`` of each pattern; negative means, and values
    that are not finite, are 0

    Examples
    --------
    >>> thumbnails(np.array([[[0, 0, 1, 1, 9], [0, 0, 1, 1, 9], [3, 3, 7, 7, 9], [3, 3, 7, 7, 9]]]), 2).tolist()
    [[[0, 85], [170, 255]]]
    """
    if patterns.dtype.kind == "f":
        patterns = np.where(np.isfinite(patterns), patterns, 0)
    mean = downsample_patterns(patterns, cell, method="bin").astype(np.float32, copy=False)
    level = np.log1p(np.maximum(mean, 0))
    most = level.max(axis=(1, 2), keepdims=True, initial=0)
    return np.rint(255 * level / np.where(most > 0, most, 1)).astype(np.uint8)
