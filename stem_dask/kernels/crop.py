"""Crop a window from each pattern, and sum the intensity in windows."""

import numba
import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.intensity import CACHE, Intensity, accumulator, native


def crop_patterns(
    block: NDArray,
    origin_y: NDArray | int,
    origin_x: NDArray | int,
    shape: tuple[int, int],
    out: NDArray | None = None,
) -> NDArray:
    """Cut ``shape`` out of each pattern, starting at its own origin; 0 where the window leaves the detector.

    Parameters
    ----------
    block : (n, ky, kx) array, any type
    origin_y, origin_x : (n,) integers, or one for all, the window's first row and column; may be negative
    shape : (height, width) of the window
    out : (n, height, width) array of the block's type that is filled; default a new one

    Examples
    --------
    >>> block = np.arange(9, dtype="u1").reshape(1, 3, 3)
    >>> crop_patterns(block, np.array([-1]), np.array([1]), (2, 2))[0].tolist()
    [[0, 0], [1, 2]]
    """
    dtype = block.dtype.newbyteorder("=")
    # only bits are moved, so that one compiled version does for all types of a size
    kept = native(block.astype(dtype, copy=False).view(f"u{dtype.itemsize}"))
    out = np.empty((len(kept), *shape), dtype) if out is None else out
    origins = np.empty((2, len(kept)), np.int64)
    origins[0], origins[1] = np.ravel(origin_y), np.ravel(origin_x)
    _crop(kept, origins[0], origins[1], out.view(kept.dtype))
    return out


@numba.njit(nogil=True, cache=CACHE)
def _crop(block, origin_y, origin_x, out):  # type: ignore[no-untyped-def]
    n, height, width = block.shape
    rows, cols = out.shape[1:]
    for i in range(n):
        y0, x0 = origin_y[i], origin_x[i]
        first = min(max(-x0, 0), cols)
        last = max(min(width - x0, cols), first)
        for y in range(rows):
            if y0 + y < 0 or y0 + y >= height or first == last:
                out[i, y, :] = 0
                continue
            out[i, y, :first] = 0
            source = block[i, y0 + y, x0 + first : x0 + last]
            to = out[i, y, first:last]
            for x in range(to.size):
                to[x] = source[x]
            out[i, y, last:] = 0


def window_intensity(
    block: NDArray, *, threshold: float, pedestal: float = 0.0
) -> NDArray[np.float64]:
    """Intensity of each pattern of a block (…, ky, kx): the sum of all values that count, exact below 2**53 counts.

    See `stem_dask.kernels.intensity.Intensity`.

    Examples
    --------
    >>> window_intensity(np.array([[[1.0, -2.0], [np.nan, 4.0]]]), threshold=0)
    array([5.])
    """
    block = native(block)
    out, done = np.empty(len(block)), 0
    zero = np.zeros(1, accumulator(block.dtype, block.shape[1] * block.shape[2]))
    intensity = Intensity((block.shape[1], block.shape[2]), block.dtype, threshold, pedestal)
    for some in intensity.parts(block, max(1, len(block))):
        _intensity(some, zero, out[done : done + len(some)])
        done += len(some)
    return out


@numba.njit(nogil=True, cache=CACHE, fastmath={"reassoc", "nsz"})
def _intensity_of(pattern, zero):  # type: ignore[no-untyped-def]
    kind = zero.dtype.type
    total = kind(0)
    # one long row: the ends of short ones would take most of the time
    values = pattern.reshape(pattern.size)
    for i in range(values.size):
        total = kind(total + kind(values[i]))
    return total


@numba.njit(nogil=True, cache=CACHE)
def _intensity(block, zero, out):  # type: ignore[no-untyped-def]
    for i in range(len(block)):
        out[i] = _intensity_of(block[i], zero)
