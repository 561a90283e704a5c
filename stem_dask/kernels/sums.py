"""Sum and maximum of patterns."""

import numba
import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.caching import CACHE
from stem_dask.kernels.intensity import accumulator, native


def add_patterns(block: NDArray, total: NDArray[np.float64], highest: NDArray) -> None:
    """Add patterns to a sum, one after another, and raise the highest finite value of each column of the detector.

    Parameters
    ----------
    block : (n, ky, kx)
    total : (ky, kx) float64, added to
    highest : (kx,) of the type that `native` gives the block, raised

    Examples
    --------
    >>> total, highest = np.zeros((1, 2)), np.zeros(2)
    >>> add_patterns(np.array([[[1.0, np.inf]], [[3.0, 2.0]]]), total, highest)
    >>> total.tolist(), highest.tolist()
    ([[4.0, inf]], [3.0, 2.0])
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
