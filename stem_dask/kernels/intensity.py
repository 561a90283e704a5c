"""What counts as intensity, and the form in which kernels get their blocks."""

import math

import numba
import numpy as np
from numpy.typing import NDArray

#: columns of the counts that come with every analysis
ODD_PIXELS = ("nan", "infinite", "negative", "below_threshold")


def native(block: NDArray) -> NDArray:
    """A block as the kernels want it: numba compiles one version for each array type it meets.

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
    block = np.require(block, block.dtype.newbyteorder("="), ["C", "A"])
    block = block.reshape(-1, *block.shape[-2:])
    block.setflags(write=False)
    return block


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


def most_summed(dtype: np.dtype) -> int:
    """How many values of an integer type, none negative, have a sum of 32 bits for certain.

    Examples
    --------
    >>> most_summed(np.dtype("u2")), most_summed(np.dtype("u4"))
    (65537, 1)
    """
    return (2**32 - 1) // int(np.iinfo(dtype).max)


def needs_cleaning(dtype: np.dtype, threshold: float) -> bool:
    """Whether a block of this type can hold values that do not count as they are."""
    return dtype.kind != "u" or threshold > 0


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


@numba.njit(nogil=True, cache=True)
def clean_pattern(pattern, low, out, odd, negative_sum):  # type: ignore[no-untyped-def]
    """Write the intensity of `pattern` to `out`: NaN, infinite, negative and values below `low` become 0.

    Adds to ``odd`` how many of each there were and to ``negative_sum[0]`` what the negative ones amounted to.
    """
    height, width = pattern.shape
    for y in range(height):
        row = pattern[y]
        to = out[y]
        odd_row = 0
        for x in range(width):
            value = row[x]
            good = (value >= low) & (value - value == 0)
            odd_row += (not good) & (value != 0)
            to[x] = value if good else 0
        if odd_row:
            for x in range(width):
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
