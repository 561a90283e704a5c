"""Batches of patterns for training: gathered from a buffer and normalized in the same pass, integers by a table."""

import numba
import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.intensity import CACHE

#: pointwise normalizations; ``log`` is log(1 + x), ``log-zscore`` has mean 0 and standard deviation 1 after it
METHODS = ("none", "log", "sqrt", "log-zscore")

#: entries of a table: all values of 16 bits; rarer, larger ones are computed
TABLE = 2**16


def normalized(
    values: NDArray, method: str, mean: float = 0.0, std: float = 1.0, scale: float = 1.0
) -> NDArray[np.float32]:
    """(f(scale * x) - mean) / std of any array as float32, computed in float64; f is log(1 + x), a square root, or nothing.

    Examples
    --------
    >>> normalized(np.array([0, 4]), "sqrt").tolist()
    [0.0, 2.0]
    """
    values = np.asarray(values, np.float64)
    if scale != 1.0:  # as the means of `downsample_patterns`
        values = (values * scale).astype(np.float32).astype(np.float64)
    if method.startswith("log"):
        values = np.log1p(values)
    elif method == "sqrt":
        values = np.sqrt(values)
    return np.asarray((values - mean) / std, np.float32)


def table_of(
    dtype: np.dtype, method: str, mean: float = 0.0, std: float = 1.0, scale: float = 1.0
) -> NDArray[np.float32]:
    """`normalized` of the integers 0, 1, … that a type can hold, at most `TABLE`; empty for floats."""
    if dtype.kind not in "bui":
        return np.empty(0, np.float32)
    most = 255 if dtype.kind == "b" else int(np.iinfo(dtype).max)
    return normalized(np.arange(min(most + 1, TABLE)), method, mean, std, scale)


def gather(
    patterns: NDArray,
    rows: NDArray[np.int64],
    out: NDArray[np.float32],
    table: NDArray[np.float32],
    method: str,
    mean: float = 0.0,
    std: float = 1.0,
    scale: float = 1.0,
) -> int:
    """Copy some patterns into a batch and normalize them.

    Parameters
    ----------
    patterns : (n, ky, kx) of a real type in native byte order, C-contiguous
    rows : which of them, (b,)
    out : (b, ky, kx), is filled
    table : `table_of` the type of the patterns and the following arguments

    Returns
    -------
    Number of the first row that holds a value of which there is no logarithm or square root (negative or NaN), else -1

    Examples
    --------
    >>> out = np.empty((2, 1, 2), "f4")
    >>> counts = np.array([[[0, 1]], [[2, 3]], [[4, 5]]], "u2")
    >>> gather(counts, np.array([2, 0]), out, table_of(counts.dtype, "none"), "none"), out.tolist()
    (-1, [[[4.0, 5.0]], [[0.0, 1.0]]])
    """
    patterns = patterns.view(np.uint8) if patterns.dtype == np.bool_ else patterns
    if patterns.dtype == np.float16:
        patterns, rows = patterns[rows].astype(np.float32), np.arange(len(rows))
    flat, to = patterns.reshape(len(patterns), -1), out.reshape(len(out), -1)
    is_near = abs(mean) <= 8 * std  # else the difference to the mean has too few digits left
    if patterns.dtype == np.float32 and method.startswith("log") and scale == 1.0 and is_near:
        return int(_log_floats(flat, rows, to, np.float32(mean), np.float32(1.0 / std)))
    code = 0 if method == "none" else 2 if method == "sqrt" else 1
    return int(_gather(flat, rows, to, table, code, mean, std, scale))


@numba.njit(nogil=True, cache=CACHE)
def _gather(patterns, rows, out, table, code, mean, std, scale):  # type: ignore[no-untyped-def]
    bad = -1
    for i in range(rows.size):
        pattern, to = patterns[rows[i]], out[i]
        low = high = pattern[0]
        if table.size > 0:
            for j in range(pattern.size):
                low, high = min(low, pattern[j]), max(high, pattern[j])
        if table.size > 0 and low >= 0 and high < table.size:
            for j in range(pattern.size):
                to[j] = table[np.int64(pattern[j])]
            continue
        for j in range(pattern.size):
            x = np.float64(pattern[j])
            if scale != 1.0:
                x = np.float64(np.float32(x * scale))
            if code > 0 and not 0 <= x < np.inf and bad < 0:
                bad = i
            if code == 1:
                x = np.log1p(x)
            elif code == 2:
                x = np.sqrt(x)
            to[j] = np.float32((x - mean) / std)
    return bad


#: of (log(1 + z) - z) / z**2 for z from -1/3 to 1/3 (Chebyshev interpolation, highest power first); log to 4e-9
_LOG = tuple(
    np.float32(c)
    for c in (
        -0.124222005, 0.137483091, -0.122887216, 0.140558127, -0.166733163, 0.20007234, -0.249999442, 0.333332726, -0.5,
    )
)  # fmt: skip


@numba.njit(nogil=True, cache=CACHE, error_model="numpy", fastmath={"contract"})
def _log_floats(patterns, rows, out, mean, factor):  # type: ignore[no-untyped-def]
    """(log(1 + x) - mean) * factor in float32: 3 times as fast as a library's log1p, because it is vectorized.

    1 + x is 2**exponent * (1 + z) with z from -1/3 to 1/3; z includes what was rounded off from 1 + x, so that small x keep their digits.
    """
    bad, one, least = -1, np.float32(1), np.int32(0x3F2AAAAB)  # the bits of 2/3
    for i in range(rows.size):
        pattern, to, wrong = patterns[rows[i]], out[i], 0
        for j in range(pattern.size):
            x = pattern[j]
            wrong += not (x >= np.float32(0) and x < np.float32(np.inf))
            whole = np.float32(one + x)
            bits = whole.view(np.int32)
            exponent = (bits - least) >> np.int32(23)
            z = np.int32(bits - (exponent << np.int32(23))).view(np.float32) - one
            shift = np.int32(127) - min(exponent, np.int32(127))
            z += (x - (whole - one)) * np.int32(shift << np.int32(23)).view(np.float32)
            p = _LOG[0] * z + _LOG[1]
            p = p * z + _LOG[2]
            p = p * z + _LOG[3]
            p = p * z + _LOG[4]
            p = p * z + _LOG[5]
            p = p * z + _LOG[6]
            p = p * z + _LOG[7]
            p = p * z + _LOG[8]
            log = z + z * z * p + np.float32(exponent) * np.float32(0.69314718)
            to[j] = (log - mean) * factor
        if wrong and bad < 0:
            bad = i
    return bad
