"""Definition of intensity, and the array types of kernels."""

import functools
import math
from collections.abc import Iterator

import numba
import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.caching import CACHE

#: columns of the counts that come with every analysis
ODD_PIXELS = ("nan", "infinite", "negative", "below_threshold")

#: patterns that kernels add at once; float sums depend on it
GROUP = 4

#: bytes of patterns that are cleaned at once, at least one group
_CLEANED_BYTES = 2**18


def native(block: NDArray) -> NDArray:
    """Convert a block to the array type of kernels, because numba compiles one version per type.

    Parameters
    ----------
    block : (..., ky, kx) array, bool, integer or float

    Returns
    -------
    (n, ky, kx) read-only, aligned, C-contiguous array in native byte order; bool becomes uint8 and float16
    becomes float32. No copy is made when the block is like that already.

    Examples
    --------
    >>> native(np.ones((2, 3, 4, 5), ">u2")).shape
    (6, 4, 5)
    """
    if block.dtype == np.bool_:
        block = block.view(np.uint8)
    elif block.dtype.kind == "f" and block.dtype.itemsize == 2:
        block = block.astype(np.float32)
    if not (block.flags.c_contiguous and block.flags.aligned and block.dtype.isnative):
        block = np.require(block, block.dtype.newbyteorder("="), ["C", "A"])
    block = block.reshape(-1, *block.shape[-2:])
    block.setflags(write=False)
    return block


@functools.cache
def accumulator(dtype: np.dtype, n_max: int) -> np.dtype:
    """Type in which `n_max` values of `dtype` that are not negative are summed: exact for integers, float64 for floats.

    Examples
    --------
    >>> accumulator(np.dtype("u2"), 256), accumulator(np.dtype("f4"), 256)
    (dtype('uint32'), dtype('float64'))
    """
    if dtype.kind == "f":
        return np.dtype(np.float64)
    return np.dtype(np.uint32 if n_max <= most_summed(dtype) else np.uint64)


@functools.cache
def most_summed(dtype: np.dtype) -> int:
    """Number of non-negative values of an integer type whose sum always fits 32 bits.

    Examples
    --------
    >>> most_summed(np.dtype("u2")), most_summed(np.dtype("u4"))
    (65537, 1)
    """
    return (2**32 - 1) // int(np.iinfo(dtype).max)


def needs_cleaning(dtype: np.dtype, threshold: float) -> bool:
    """Whether a block of this type can hold values that do not count unchanged."""
    return dtype.kind != "u" or threshold > 0


@functools.cache
def lowest_counted(dtype: np.dtype, threshold: float) -> np.generic:
    """The smallest value at or above `threshold` that `dtype` can hold.

    Raises
    ------
    ValueError
        When it can hold none.
    """
    largest = np.finfo(dtype).max if dtype.kind == "f" else np.iinfo(dtype).max
    if threshold > largest:
        raise ValueError(
            f"threshold {threshold:g} is above {largest:g}, the largest {dtype}: no pixel would count; "
            "lower the threshold"
        )
    if dtype.kind == "f":
        low = dtype.type(threshold)
        return low if float(low) >= threshold else np.nextafter(low, dtype.type(np.inf))
    return dtype.type(math.ceil(threshold))


def intensity_dtype(dtype: np.dtype) -> np.dtype:
    """Unsigned counterpart of a native type, because intensities are not negative.

    Fewer types mean fewer kernels, each of which takes seconds to compile.

    Examples
    --------
    >>> intensity_dtype(np.dtype("i2")), intensity_dtype(np.dtype("f4"))
    (dtype('uint16'), dtype('float32'))
    """
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "i" else dtype


class Intensity:
    """Cleans patterns: NaN, infinite, negative values and values below a threshold become 0 and are counted.

    Parameters
    ----------
    detector, dtype : of the patterns, a type from `native`
    threshold : values below it do not count

    Examples
    --------
    >>> block = np.array([[[5.0, np.nan, -3.0, 0.5]]])
    >>> intensity = Intensity((1, 4), block.dtype, 1.0)
    >>> [some.tolist() for some in intensity.parts(block, 9)], intensity.odd.tolist(), float(intensity.negative_sum[0])
    ([[[[5.0, 0.0, 0.0, 0.0]]]], [1, 0, 1, 1], 3.0)
    """

    def __init__(self, detector: tuple[int, int], dtype: np.dtype, threshold: float) -> None:
        self.low = lowest_counted(dtype, threshold)
        self.odd, self.negative_sum = np.zeros(len(ODD_PIXELS), np.int64), np.zeros(1)
        self.whole = not needs_cleaning(dtype, threshold)
        groups = _CLEANED_BYTES // (GROUP * math.prod(detector) * dtype.itemsize)
        n = 0 if self.whole else GROUP * max(1, groups)
        self.cleaned = np.empty((n, *detector), intensity_dtype(dtype))

    def parts(self, block: NDArray, most: int) -> Iterator[NDArray]:
        """Patterns from `native`, up to ``most`` at a time, as `intensity_dtype`; valid until the next are requested."""
        step = most if self.whole else min(most, len(self.cleaned))
        for start in range(0, len(block), step):
            some = block[start : start + step]
            if not self.whole:
                out = self.cleaned[: len(some)]
                _clean(some, self.low, out, self.odd, self.negative_sum)
                some = native(out)  # read-only like what is whole: compiled once for both
            yield some


@numba.njit(nogil=True, cache=CACHE)
def _clean(block, low, out, odd, negative_sum):  # type: ignore[no-untyped-def]
    n, height, width = block.shape
    for i in range(n):
        for y in range(height):
            row, to = block[i, y], out[i, y]
            odd_row = 0
            for x in range(width):
                value = row[x]
                good = (value >= low) & (value - value == 0)
                odd_row += (not good) & (value != 0)
                to[x] = value if good else 0
            if odd_row:
                _tell_odd(row, low, odd, negative_sum)


@numba.njit(nogil=True, cache=CACHE)
def _tell_odd(row, low, odd, negative_sum):  # type: ignore[no-untyped-def]
    for x in range(row.size):
        value = row[x]
        if value != value:
            odd[0] += 1
        elif value - value != 0:
            odd[1] += 1
        elif value < 0:
            odd[2] += 1
            negative_sum[0] -= value
        elif 0 < value < low:
            odd[3] += 1
