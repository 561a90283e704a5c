"""Definition of intensity, the array types of kernels, and sums of intensities."""

import functools
import math
from collections.abc import Iterator

import numba
import numpy as np
from numpy.typing import NDArray

#: columns of the counts that come with every analysis
ODD_PIXELS = ("nan", "infinite", "negative", "below_threshold")

#: patterns that kernels add at once; float sums depend on it
GROUP = 4


def _can_cache() -> bool:
    """Whether numba can write to the folder of the package, the cache of the user, or NUMBA_CACHE_DIR; else it raises."""
    try:
        numba.njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


#: for ``numba.njit(cache=…)``: whether compiled kernels can be kept for later processes
CACHE = _can_cache()


def native(block: NDArray) -> NDArray:
    """Convert a block to the array type of kernels, because numba compiles one version per type.

    Returns (n, ky, kx), read-only, aligned, C-contiguous, in native byte order; bool becomes uint8 and float16 float32.
    No copy is made if the block is like that already.

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


def native_dtype(dtype: np.dtype) -> np.dtype:
    """Type that `native` gives a block of this type."""
    return native(np.empty((0, 1, 1), dtype)).dtype


@functools.cache
def accumulator(dtype: np.dtype, n_max: int) -> np.dtype:
    """Type in which `n_max` values of `dtype` that are not negative are summed: exact for integers, float64 for floats."""
    if dtype.kind == "f":
        return np.dtype(np.float64)
    return np.dtype(np.uint32 if n_max <= most_summed(dtype) else np.uint64)


@functools.cache
def most_summed(dtype: np.dtype) -> int:
    """Number of non-negative values of an integer type whose sum always fits 32 bits."""
    return (2**32 - 1) // int(np.iinfo(dtype).max)


def needs_cleaning(dtype: np.dtype, threshold: float) -> bool:
    """Whether a block of this type can hold values that do not count unchanged."""
    return dtype.kind != "u" or threshold > 0


@functools.cache
def lowest_counted(dtype: np.dtype, threshold: float) -> np.generic:
    """The smallest value at or above `threshold` that `dtype` can hold; ValueError when it can hold none."""
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


class Intensity:
    """Cleans patterns of a type from `native`: NaN, infinite, negative values and values below a threshold become 0, and are counted.

    A ``pedestal`` is subtracted from the values that remain, down to 0; from integers its integer part.

    Examples
    --------
    >>> block = np.array([[[5.0, np.nan, -3.0, 0.5]]])
    >>> intensity = Intensity((1, 4), block.dtype, 1.0)
    >>> [some.tolist() for some in intensity.parts(block, 9)], intensity.odd.tolist(), float(intensity.negative_sum[0])
    ([[[[5.0, 0.0, 0.0, 0.0]]]], [1, 0, 1, 1], 3.0)
    """

    def __init__(
        self, detector: tuple[int, int], dtype: np.dtype, threshold: float, pedestal: float = 0.0
    ) -> None:
        self.low = lowest_counted(dtype, threshold)
        self.odd, self.negative_sum = np.zeros(len(ODD_PIXELS), np.int64), np.zeros(1)
        self.whole = not needs_cleaning(dtype, threshold) and not pedestal
        # 256 KiB are cleaned at once, at least one group
        groups = 2**18 // (GROUP * math.prod(detector) * dtype.itemsize)
        n = 0 if self.whole else GROUP * max(1, groups)
        # intensities are not negative: fewer types mean fewer kernels, each of which takes seconds to compile
        kept = np.dtype(f"u{dtype.itemsize}") if dtype.kind == "i" else dtype
        self.cleaned = np.empty((n, *detector), kept)
        self.pedestal = kept.type(pedestal)

    def parts(self, block: NDArray, most: int) -> Iterator[NDArray]:
        """Patterns from `native`, up to ``most`` at a time, integers as unsigned; valid until the next are requested."""
        step = most if self.whole else min(most, len(self.cleaned))
        for start in range(0, len(block), step):
            some = block[start : start + step]
            if not self.whole:
                out = self.cleaned[: len(some)]
                _clean(some, self.low, out, self.odd, self.negative_sum)
                if self.pedestal:
                    np.maximum(out, self.pedestal, out=out)
                    out -= self.pedestal
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
                _count_odd(row, low, odd, negative_sum)


@numba.njit(nogil=True, cache=CACHE)
def _count_odd(row, low, odd, negative_sum):  # type: ignore[no-untyped-def]
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


def add_patterns(block: NDArray, total: NDArray[np.float64], highest: NDArray) -> None:
    """Add patterns (n, ky, kx) to a sum (ky, kx), and raise the highest finite value (kx,) of each detector column.

    ``highest`` is of the type that `native` gives the block.
    """
    block = native(block)
    if block.dtype.kind == "f":
        _add_floats(block, total, highest, block.dtype.type(np.finfo(block.dtype).max))
        return
    wide = accumulator(block.dtype, len(block)) if block.dtype.kind == "u" else np.dtype(np.int64)
    _add_whole(block, np.zeros(block.shape[2], wide), total, highest)


@numba.njit(nogil=True, cache=CACHE)
def _add_whole(block, line, total, highest):  # type: ignore[no-untyped-def]
    n, height, width = block.shape
    kind, width = line.dtype.type, np.uintp(width)
    fours = n - n % 4  # at once: a line of sums is then loaded and stored a quarter as often
    for y in range(height):
        line[:] = 0
        for i in range(0, fours, 4):
            a, b, c, d = block[i, y], block[i + 1, y], block[i + 2, y], block[i + 3, y]
            for x in range(width):
                highest[x] = max(max(highest[x], max(a[x], b[x])), max(c[x], d[x]))
                two = kind(kind(a[x]) + kind(b[x]))
                line[x] = kind(line[x] + kind(two + kind(kind(c[x]) + kind(d[x]))))
        for i in range(fours, n):
            row = block[i, y]
            for x in range(width):
                line[x] = kind(line[x] + kind(row[x]))
                highest[x] = max(highest[x], row[x])
        for x in range(width):
            total[y, x] += line[x]


@numba.njit(nogil=True, cache=CACHE)
def _add_floats(block, total, highest, largest):  # type: ignore[no-untyped-def]
    n, height, width = block.shape
    for y in range(height):  # outermost, so that a row of the sum stays in the core's first cache
        sums = total[y]
        for i in range(n):
            row = block[i, y]
            for x in range(width):
                value = row[x]
                sums[x] += value
                # not max(), which would let NaN pass
                highest[x] = value if highest[x] < value <= largest else highest[x]
