"""Pixels that stand out of a mean pattern as no diffraction does."""

import numpy as np
from numpy.typing import NDArray

#: a pixel is suspected above so many times the largest of its neighbours
TIMES = 5.0
#: and when its sum is at least so many times its largest value, or half the number of patterns
LIT = 10


def hot_pixels(mean: NDArray, highest: NDArray, n_patterns: int) -> NDArray[np.bool_]:
    """Pixels above 5 times the largest of their 8 neighbours that are lit in more than a few patterns.

    At an edge the neighbours that exist count. A pixel that owes its mean to few patterns is no defect: where hardly an
    electron arrives, one with two counts in the whole scan stands among zeros.

    Parameters
    ----------
    mean, highest : (ky, kx) mean and maximum pattern, finite and not negative
    n_patterns : how many patterns they are of

    Examples
    --------
    >>> mean = np.ones((3, 4)); mean[0, 1] = 6
    >>> np.argwhere(hot_pixels(mean, mean, 100)).tolist()
    [[0, 1]]
    """
    height, width = mean.shape
    if mean.size == 1:
        return np.zeros(mean.shape, np.bool_)  # nothing to compare with
    padded = np.pad(np.asarray(mean, np.float64), 1, constant_values=-np.inf)
    largest = np.full(mean.shape, -np.inf)
    for dy in range(3):
        for dx in range(3):
            if (dy, dx) != (1, 1):
                np.maximum(largest, padded[dy : dy + height, dx : dx + width], out=largest)
    lit = n_patterns * mean >= min(LIT, n_patterns / 2) * np.asarray(highest, np.float64)
    return (mean > TIMES * largest) & lit
