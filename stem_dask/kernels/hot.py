"""Pixels that stand out of a mean pattern as no diffraction does."""

import numpy as np
from numpy.typing import NDArray

#: a pixel is suspected above so many times all of its neighbours
TIMES = 6.0
#: and when it exceeds the median of its neighbours by so many standard deviations of counted electrons
DEVIATIONS = 8.0
_REACH = 2
_AROUND = tuple(
    (dy, dx)
    for dy in range(2 * _REACH + 1)
    for dx in range(2 * _REACH + 1)
    if (dy, dx) != (_REACH, _REACH)
)


def hot_pixels(mean: NDArray, lit: NDArray, n_patterns: int, n_sampled: int) -> NDArray[np.bool_]:
    """Pixels far above their neighbours that are lit in at least half of the patterns.

    A pixel is hot when its mean exceeds 6 times the sixth largest of its 24 neighbours (5 x 5), and their median m by
    8 sqrt(max(m, 1/n) / n), and it is lit in at least half of a sample. So up to five neighbours may be hot as well: a pair,
    three in a row, a square of four, a whole row or column. At an edge the neighbours that exist count, and in a corner only
    three or four of them may be hot. A pixel that owes its mean to few patterns is no defect: where hardly an electron
    arrives, one with two counts in the whole scan stands among zeros.

    Parameters
    ----------
    mean : (ky, kx) mean pattern in counts, finite and not negative
    lit : (ky, kx) in how many patterns of the sample each pixel is above zero
    n_patterns, n_sampled : how many patterns the mean, and the sample, are of

    Examples
    --------
    >>> mean = np.ones((3, 4)); mean[0, 1:3] = 7
    >>> np.argwhere(hot_pixels(mean, np.full((3, 4), 9), 100, 9)).tolist()
    [[0, 1], [0, 2]]
    """
    mean = np.asarray(mean, np.float64)
    padded = np.pad(mean, _REACH, constant_values=np.nan)
    height, width = mean.shape
    # 6 times the sixth largest is below the mean where 6 times at most five are not
    near = np.zeros(mean.shape, np.int8)
    for dy, dx in _AROUND:
        near += TIMES * padded[dy : dy + height, dx : dx + width] >= mean
    rows, columns = (_sides(n) for n in mean.shape)
    also_hot = np.maximum(rows[:, None], columns)
    suspected = (near <= also_hot) & (rows[:, None] * columns - 1 > also_hot)
    suspected &= (2 * lit >= n_sampled) & (n_patterns * mean > DEVIATIONS)
    y, x = np.nonzero(suspected)
    if y.size:
        median = np.nanmedian([padded[y + dy, x + dx] for dy, dx in _AROUND], axis=0)
        noise = np.sqrt(np.maximum(median, 1 / n_patterns) / n_patterns)
        suspected[y, x] = mean[y, x] > median + DEVIATIONS * noise
    return suspected


def _sides(n: int) -> NDArray:
    """How many of the five rows around each of n rows there are."""
    i = np.arange(n)
    return np.minimum(i, _REACH) + np.minimum(n - 1 - i, _REACH) + 1


def add_lit(pattern: NDArray, threshold: float, lit: NDArray) -> None:
    """Count where a pattern is lit: above zero, at or above the threshold, and finite.

    Parameters
    ----------
    pattern : (ky, kx)
    threshold : in counts
    lit : (ky, kx) integers, which are added to

    Examples
    --------
    >>> lit = np.zeros((1, 4), "u2")
    >>> add_lit(np.array([[0, 3, np.inf, -1]]), 0, lit); lit.tolist()
    [[0, 1, 0, 0]]
    """
    counts = pattern > 0
    if threshold > 0:
        counts &= pattern >= threshold
    if pattern.dtype.kind == "f":
        counts &= np.isfinite(pattern)
    lit += counts
