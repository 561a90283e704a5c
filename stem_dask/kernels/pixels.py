"""Bad and hot pixels, dark and gain, logarithm and z-score of counts, and the transposition of detector-first blocks."""

import numpy as np
from numpy.typing import NDArray


def neighbours(mask: NDArray[np.bool_]) -> list[tuple[tuple[int, int], NDArray[np.int64]]]:
    """For every bad pixel (y, x) of a mask the indices (n, 2) of the good pixels in the nearest square ring that has any."""
    height, width = mask.shape
    found = []
    for y, x in np.argwhere(mask):
        good = np.empty((0, 2), np.int64)
        for reach in range(1, max(height, width)):
            top, left = max(y - reach, 0), max(x - reach, 0)
            around = mask[top : y + reach + 1, left : x + reach + 1]
            good = np.argwhere(~around) + np.array([top, left])
            if len(good):
                break
        found.append(((int(y), int(x)), good))
    return found


def fill_bad(
    block: NDArray,
    mask: NDArray[np.bool_],
    near: list[tuple[tuple[int, int], NDArray]] | None,
    out: NDArray | None = None,
) -> NDArray:
    """Replace bad pixels by 0, or by the median of their good neighbours (rounded for integers).

    ``near`` is the result of `neighbours`, or None to fill with 0; ``out`` is filled, default a new array.
    """
    out = np.empty(block.shape, block.dtype.newbyteorder("=")) if out is None else out
    out[...] = block
    out[..., mask] = 0
    for (y, x), good in near or []:
        if len(good):
            median = np.median(block[..., good[:, 0], good[:, 1]], axis=-1)
            out[..., y, x] = median if out.dtype.kind == "f" else np.rint(median)
    return out


def hot_pixels(mean: NDArray, lit: NDArray, n_patterns: int, n_sampled: int) -> NDArray[np.bool_]:
    """Pixels far above their neighbours that are lit in at least half of the patterns.

    A pixel is hot when its mean exceeds 6 times the sixth largest of its 24 neighbours (5 x 5), and their median m by
    8 sqrt(max(m, 1/n) / n), and it is lit in at least half of a sample. So up to five neighbours may be hot as well: a pair,
    three in a row, a square of four, a whole row or column. At an edge the neighbours that exist count, and in a corner only
    three or four of them may be hot. A pixel that owes its mean to few patterns is no defect: where hardly an electron
    arrives, one with two counts in the whole scan stands among zeros.

    ``mean`` (ky, kx) is the mean of ``n_patterns`` in counts, finite and not negative; ``lit`` (ky, kx) in how many patterns of a
    sample each pixel is above zero.

    Examples
    --------
    >>> mean = np.ones((3, 4)); mean[0, 1:3] = 7
    >>> np.argwhere(hot_pixels(mean, np.full((3, 4), 9), 100, 9)).tolist()
    [[0, 1], [0, 2]]
    """
    mean, reach, deviations = np.asarray(mean, np.float64), 2, 8.0
    padded = np.pad(mean, reach, constant_values=np.nan)
    height, width = mean.shape
    side = range(2 * reach + 1)
    around = [(dy, dx) for dy in side for dx in side if (dy, dx) != (reach, reach)]
    # 6 times the sixth largest is below the mean where 6 times at most five are not
    near = np.zeros(mean.shape, np.int8)
    for dy, dx in around:
        near += 6.0 * padded[dy : dy + height, dx : dx + width] >= mean
    # how many of the five rows and columns around each there are
    rows, columns = (
        np.minimum(np.arange(n), reach) + np.minimum(np.arange(n)[::-1], reach) + 1
        for n in mean.shape
    )
    also_hot = np.maximum(rows[:, None], columns)
    suspected = (near <= also_hot) & (rows[:, None] * columns - 1 > also_hot)
    suspected &= (2 * lit >= n_sampled) & (n_patterns * mean > deviations)
    y, x = np.nonzero(suspected)
    if y.size:
        median = np.nanmedian([padded[y + dy, x + dx] for dy, dx in around], axis=0)
        noise = np.sqrt(np.maximum(median, 1 / n_patterns) / n_patterns)
        suspected[y, x] = mean[y, x] > median + deviations * noise
    return suspected


def add_lit(pattern: NDArray, threshold: float, lit: NDArray) -> None:
    """Count in ``lit`` where a pattern (ky, kx) is lit: above zero, at or above the threshold, and finite."""
    counts = pattern > 0
    if threshold > 0:
        counts &= pattern >= threshold
    if pattern.dtype.kind == "f":
        counts &= np.isfinite(pattern)
    lit += counts


def correct_patterns(
    block: NDArray,
    dark: NDArray[np.float32] | None,
    gain: NDArray[np.float32] | None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """``(pattern - dark) * gain`` as float32; large counts lose no digit before the background is off.

    The block (..., ky, kx) is of any real type and byte order, ``dark`` and ``gain`` are (ky, kx) or None.

    Examples
    --------
    >>> block = np.array([[[3, 5]]], ">u2")
    >>> correct_patterns(block, np.array([[1, 6]], "f4"), np.array([[2, 2]], "f4")).tolist()
    [[[4.0, -2.0]]]
    """
    out = np.empty(block.shape, np.float32) if out is None else out
    with np.errstate(over="ignore", invalid="ignore"):  # the analysis counts infinite values
        if dark is None:
            out[...] = block
        else:
            np.subtract(block, dark, out=out, dtype=np.float64, casting="unsafe")
        if gain is not None:
            np.multiply(out, gain, out=out)
    return out


#: moments of no values
NO_MOMENTS = np.array([0.0, 0.0, 0.0, np.inf])


def log_moments(patterns: NDArray, before: NDArray[np.float64] = NO_MOMENTS) -> NDArray[np.float64]:
    """Number, mean, sum of squared deviations of log(1 + x) over all pixels, and the lowest x (NaN when any is NaN).

    One pattern (ky, kx) after the other is joined to the moments ``before`` (T. F. Chan, G. H. Golub, R. J. LeVeque,
    Updating formulae and a pairwise algorithm for computing sample variances, 1979), which loses no digits.
    """
    total = before
    for pattern in patterns if before[3] >= 0 else ():
        lowest = float(pattern.min())
        if not lowest >= 0:
            return np.array([0.0, 0.0, 0.0, lowest])
        logs = np.log1p(pattern, dtype=np.float64)
        mean = logs.mean()
        logs -= mean
        total = joined(total, np.array([logs.size, mean, np.vdot(logs, logs), lowest]))
    return total


def joined(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The moments of two sets of values together; see `log_moments`."""
    n = a[0] + b[0]
    if not n:
        return np.array([0.0, 0.0, 0.0, np.minimum(a[3], b[3])])
    step = b[1] - a[1]
    mean = a[1] + step * b[0] / n
    squares = a[2] + b[2] + step**2 * a[0] * b[0] / n
    return np.array([n, mean, squares, np.minimum(a[3], b[3])])


def log_zscore(
    patterns: NDArray, mean: float, std: float, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """(log(1 + x) - mean) / std of every pixel, computed in float64; into ``out`` of the same shape if it is given."""
    out = np.empty(patterns.shape, np.float32) if out is None else out
    for pattern, into in zip(patterns, out, strict=True):
        logs = np.log1p(pattern, dtype=np.float64)
        logs -= mean
        logs /= std
        into[...] = logs
    return out


#: planes that are gathered before they are transposed: they and a row of a batch fit the cache of a core
GATHERED = 128

#: for large patterns, which do not fit the cache, up to this share of their pixels and these bytes, so that runs written to
#: memory are long
SHARE, GATHERED_BYTES = 64, 2**19


def patterns_first(planes: NDArray) -> NDArray:
    """C-contiguous copy of ``planes.transpose(1, 2, 0)``, several times as fast as with numpy alone.

    Planes are (pixels, scan_y, scan_x) of any dtype and strides.

    Examples
    --------
    >>> patterns_first(np.arange(6).reshape(3, 1, 2)).tolist()
    [[[0, 2, 4], [1, 3, 5]]]
    """
    n, height, width = planes.shape
    out = np.empty((height * width, n), planes.dtype)
    rows = gathering(n, height * width, planes.dtype)
    for start in range(0, n, len(rows) or 1):
        some = planes[start : start + len(rows)]
        rows[: len(some)].reshape(some.shape)[...] = some  # a view
        out[:, start : start + len(some)] = rows[: len(some)].T
    return out.reshape(height, width, n)


def gathering(n: int, positions: int, dtype: np.dtype) -> NDArray:
    """Uninitialized buffer (planes, positions) for some of n planes, with contiguous rows; ``rows.T`` is the transposed part."""
    most = GATHERED_BYTES // max(1, positions * dtype.itemsize)
    rows = min(n, max(GATHERED, min(most, n // SHARE)))
    # 64 bytes between rows, because rows of a power of two would share few cache lines
    return np.empty((rows, positions + 64 // dtype.itemsize), dtype)[:, :positions]
