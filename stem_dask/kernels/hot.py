"""Pixels that stand out of a mean pattern as no diffraction does."""

import numpy as np
from numpy.typing import NDArray

#: a pixel is suspected above so many times the largest of its neighbours
TIMES = 5.0


def hot_pixels(mean: NDArray) -> NDArray[np.bool_]:
    """Pixels above 5 times the largest of their 8 neighbours, and above the average of all that are not.

    At an edge the neighbours that exist count. The average keeps shot noise out: where hardly an electron arrives, a
    pixel with one count in the whole scan stands among zeros.

    Parameters
    ----------
    mean : (ky, kx) mean pattern, finite and not negative

    Examples
    --------
    >>> mean = np.ones((3, 4)); mean[0, 1] = 6
    >>> np.argwhere(hot_pixels(mean)).tolist()
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
    bright = mean > TIMES * largest
    return bright & (mean > mean[~bright].mean())
