"""Bad, hot and dead pixels, beam stops, dark and gain, logarithm and z-score of counts, and the transposition of detector-first blocks."""

import math

import numpy as np
from numpy.typing import NDArray

#: kinds of bad pixels, as bits of a flag
GIVEN, HOT, DEAD, STOP, NOT_FINITE = 1, 2, 4, 8, 16


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


def dead_pixels(sums: NDArray, lit: NDArray, n_sampled: int) -> NDArray[np.bool_]:
    """Pixels that are never lit where their surroundings expect many counts.

    A pixel is dead when it is lit in no pattern of a sample, at least half of the other pixels within 8 px are, and nine in ten
    of those expect more than 12 counts. What a pixel expects is its sum, or -n log(1 - lit / n), the number of electrons for
    which a pixel is lit that often, if that is less: so units in which an electron counts 100 do no harm. Rims of discs have too
    many faint pixels nearby; a dead pixel in the dark is not found, and does not matter.

    ``sums`` (ky, kx) are the sums over the sample of ``n_sampled`` patterns in counts, finite and not negative; ``lit`` (ky, kx) in
    how many of them each pixel is above zero.

    Examples
    --------
    >>> sums = np.full((9, 9), 50); sums[4, 4] = 0
    >>> np.argwhere(dead_pixels(sums, 7 * (sums > 0), 7)).tolist()
    [[4, 4]]
    """
    reach, expected = 8, np.full(lit.shape, np.inf)
    is_lit, sometimes = lit > 0, lit < n_sampled
    np.log1p(-lit / max(n_sampled, 1), out=expected, where=sometimes)
    expected[sometimes] *= -n_sampled
    faint = is_lit & (np.minimum(sums, expected) <= 12)
    n_lit, n_faint, n_all = (
        number_within(mask, reach) for mask in (is_lit, faint, np.ones(lit.shape, np.bool_))
    )
    return ~is_lit & (2 * n_lit >= n_all - 1) & (10 * n_faint < n_lit)


def number_within(mask: NDArray[np.bool_], reach: int) -> NDArray[np.int32]:
    """How many pixels of a mask (ky, kx) lie within ``reach`` px of each pixel.

    Examples
    --------
    >>> number_within(np.eye(3, dtype=bool), 1).tolist()
    [[1, 2, 0], [2, 1, 2], [0, 2, 1]]
    """
    height, width = mask.shape
    padded = np.pad(mask.astype(np.int32), ((reach, reach), (reach + 1, reach)))
    sums, number = np.cumsum(padded, axis=1, dtype=np.int32), np.zeros(mask.shape, np.int32)
    for dy in range(-reach, reach + 1):
        half = math.isqrt(reach**2 - dy**2)
        row = sums[reach + dy : reach + dy + height]
        number += row[:, reach + 1 + half :][:, :width]
        number -= row[:, reach - half :][:, :width]
    return number


def stop_region(
    mean: NDArray, good: NDArray[np.bool_] | None, center: tuple[float, float]
) -> NDArray[np.bool_] | None:
    """The dark region that covers the center, as that of a beam stop does, widened by 2 px; None if there is none.

    Dark is a good pixel below 0.2 times the 60th percentile of its neighbourhood, a square of half the shorter side of the
    detector. What is narrower than 3 px does not count, nor a region of less than 0.2 % of the detector. The dark between the
    discs of a crystal is as dark, but does not cover the center. A stop is not found where the beam shines through it, or where
    there is nothing around it to see.

    Parameters
    ----------
    mean
        (ky, kx), the mean of a sample of patterns, finite where good.
    good
        (ky, kx), pixels that count; None for all.
    center
        (y, x) of symmetry in px.

    Examples
    --------
    >>> mean = np.ones((40, 40)); mean[16:23, :23] = 0
    >>> np.flatnonzero(stop_region(mean, None, (19, 20))[:, 10]).tolist()  # rows
    [14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]
    """
    from scipy import ndimage

    height, width = mean.shape
    shorter = min(height, width)
    good = np.ones(mean.shape, np.bool_) if good is None else good
    mean = np.where(good, mean, 0.0)
    # percentiles are slow: the shorter side is divided into at most 64 squares
    side = -(-shorter // 64)
    edges = [np.arange(0, n, side) for n in mean.shape]
    sums, number = (
        np.add.reduceat(np.add.reduceat(values, edges[0], 0), edges[1], 1)
        for values in (mean, good.astype(np.float64))
    )
    around = max(1, shorter // 2 // side)
    usual = ndimage.percentile_filter(sums / np.maximum(number, 1), 60, size=around)
    usual = usual.repeat(side, 0)[:height].repeat(side, 1)[:, :width]
    dark = ndimage.binary_opening(good & (mean < 0.2 * usual))
    regions, _ = ndimage.label(dark)
    seed = np.zeros(mean.shape, np.bool_)
    seed[tuple(np.clip(np.rint(center).astype(int), 0, (height - 1, width - 1)))] = True
    covering = np.unique(regions[ndimage.binary_dilation(seed, iterations=2)])
    sizes = np.bincount(regions.ravel())
    large = [one for one in covering if one and sizes[one] > 0.002 * mean.size]
    if not large:
        return None
    return np.asarray(ndimage.binary_dilation(np.isin(regions, large), iterations=2))


def spikes(mean: NDArray, highest: NDArray) -> NDArray[np.bool_]:
    """Pixels with an isolated high value in few patterns, as cosmic rays leave.

    Their maximum is above 50 times their mean + 100, and 6 times above the median of the maximum over 3 x 3 pixels: a disc that
    few patterns have is wider.

    Examples
    --------
    >>> mean, highest = np.ones((5, 5)), np.full((5, 5), 4)
    >>> highest[1, 2] = 900
    >>> np.argwhere(spikes(mean, highest)).tolist()
    [[1, 2]]
    """
    from scipy import ndimage

    around = ndimage.median_filter(highest.astype(np.float64), 3)
    return np.asarray((highest > 50.0 * mean + 100) & (highest > 6 * around))


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
