"""Mean and standard deviation of log(1 + x) of each pattern, and its sum by pixel, in one pass over the patterns."""

import functools

import numba
import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.intensity import CACHE, GROUP, native

#: logarithms of blocks of smaller whole numbers are looked up
LOOKED_UP = 2**16

#: pixels that are skipped at once where all are zero; enough for the compiler to compare many at a time
_RUN = 16


@functools.cache
def _table() -> NDArray[np.float64]:
    return np.log1p(np.arange(LOOKED_UP, dtype=np.float64))


def add_logs(block: NDArray, total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add log(1 + x) of patterns (n, ky, kx) to a sum (ky, kx), and return its moments by pattern.

    Nothing depends on how patterns are divided into blocks, except the order in which they are added to the sum. The standard
    deviation of a pattern of almost equal values is exact to 1e-7 of its mean only.

    Returns
    -------
    (2, n) mean and standard deviation (ddof 0) over the pixels of each pattern; NaN for a pattern with a value that is negative,
    infinite or NaN, which is not added to the sum

    Examples
    --------
    >>> total = np.zeros((1, 2))
    >>> add_logs(np.array([[[0, 0]], [[0, 3]], [[-1, 3]]]), total).round(3).tolist()
    [[0.0, 0.693, nan], [0.0, 0.693, nan]]
    >>> total.round(3).tolist()
    [[0.0, 1.386]]
    """
    block = native(block)
    n, height, width = block.shape
    sums, found = np.zeros((n, 2)), np.full((2, n), np.nan)
    good, itemsize = np.ones(n, bool), block.dtype.itemsize
    if block.dtype.kind != "u":
        flat = block.reshape(n, height * width)
        good = (flat.min(axis=1) >= 0) & (flat.max(axis=1) < np.inf)
    if block.dtype.kind == "f" or (itemsize > 2 and block.max(initial=0) >= LOOKED_UP):
        # numpy takes several logarithms at once; 256 KiB of them, at least one group, stay in the cache
        step = GROUP * max(1, 2**18 // (GROUP * 8 * height * width))
        logs = np.empty((min(n, step), height, width))
        for start in range(0, n, step):
            part = slice(start, start + step)
            some = logs[: len(block[part])]
            with np.errstate(invalid="ignore", divide="ignore"):  # of patterns that are left out
                np.log1p(block[part], out=some, dtype=np.float64)
            _add_logs(some, np.flatnonzero(good[part]), None, total, sums[part])
    else:  # no value that counts is negative: fewer types mean fewer kernels
        small = block.astype(np.uint16) if itemsize > 2 else block.view(f"u{itemsize}")
        _add_logs(small, np.flatnonzero(good), _table(), total, sums)
    mean, square = sums[good].T / (height * width)
    found[:, good] = mean, np.sqrt(np.maximum(square - mean**2, 0.0))
    return found


@numba.njit(nogil=True, cache=CACHE)
def _log(value, table):  # type: ignore[no-untyped-def]
    """log(1 + value); without a table the value is the logarithm already."""
    if table is None:
        return value
    return table[np.uintp(value)]


@numba.njit(nogil=True, cache=CACHE)
def _add_logs(block, chosen, table, total, sums):  # type: ignore[no-untyped-def]
    """Add the logarithms of the chosen patterns to ``total``, and their sums and those of their squares to ``sums`` (n, 2).

    Four patterns at once: their sums do not wait for each other, and a line of ``total`` is loaded and stored a quarter as
    often. The order of all additions is that of one pattern after the other.
    """
    height, width = block.shape[1:]
    fours = chosen.size - chosen.size % 4
    for y in range(height):
        line = total[y]
        for j in range(0, fours, 4):
            i, k, m, n = chosen[j], chosen[j + 1], chosen[j + 2], chosen[j + 3]
            a, b, c, d = block[i, y], block[k, y], block[m, y], block[n, y]
            sum_a = sum_b = sum_c = sum_d = 0.0
            square_a = square_b = square_c = square_d = 0.0
            for start in range(0, width, _RUN):
                first, stop = np.uintp(start), np.uintp(min(start + _RUN, width))
                lit = False
                for x in range(first, stop):
                    lit |= (a[x] != 0) | (b[x] != 0) | (c[x] != 0) | (d[x] != 0)
                if not lit:
                    continue
                for x in range(first, stop):
                    log_a, log_b = _log(a[x], table), _log(b[x], table)
                    log_c, log_d = _log(c[x], table), _log(d[x], table)
                    sum_a, square_a = sum_a + log_a, square_a + log_a * log_a
                    sum_b, square_b = sum_b + log_b, square_b + log_b * log_b
                    sum_c, square_c = sum_c + log_c, square_c + log_c * log_c
                    sum_d, square_d = sum_d + log_d, square_d + log_d * log_d
                    line[x] = line[x] + log_a + log_b + log_c + log_d
            sums[i, 0], sums[i, 1] = sums[i, 0] + sum_a, sums[i, 1] + square_a
            sums[k, 0], sums[k, 1] = sums[k, 0] + sum_b, sums[k, 1] + square_b
            sums[m, 0], sums[m, 1] = sums[m, 0] + sum_c, sums[m, 1] + square_c
            sums[n, 0], sums[n, 1] = sums[n, 0] + sum_d, sums[n, 1] + square_d
        for j in range(fours, chosen.size):
            row, added, square = block[chosen[j], y], 0.0, 0.0
            for x in range(np.uintp(width)):
                log = _log(row[x], table)
                added, square = added + log, square + log * log
                line[x] += log
            sums[chosen[j], 0] += added
            sums[chosen[j], 1] += square
