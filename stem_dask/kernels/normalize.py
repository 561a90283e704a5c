"""Logarithm and z-score of counts, as networks are trained on them."""

import numpy as np
from numpy.typing import NDArray

#: moments of no values
NO_MOMENTS = np.array([0.0, 0.0, 0.0, np.inf])


def log_moments(patterns: NDArray, before: NDArray[np.float64] = NO_MOMENTS) -> NDArray[np.float64]:
    """Number, mean, sum of squared deviations of log(1 + x) over all pixels, and the lowest x (NaN when any is NaN).

    One pattern (ky, kx) after the other is joined to the moments ``before`` (T. F. Chan, G. H. Golub, R. J. LeVeque,
    Updating formulae and a pairwise algorithm for computing sample variances, 1979), which loses no digits.

    Examples
    --------
    >>> log_moments(np.array([[[0.0, np.e - 1]]])).round(12).tolist()
    [2.0, 0.5, 0.5, 0.0]
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
    """(log(1 + x) - mean) / std of every pixel, computed in float64; into ``out`` of the same shape if it is given.

    Examples
    --------
    >>> log_zscore(np.array([[[0.0, np.e - 1]]]), 0.5, 0.5).round(6).tolist()
    [[[-1.0, 1.0]]]
    """
    out = np.empty(patterns.shape, np.float32) if out is None else out
    for pattern, into in zip(patterns, out, strict=True):
        logs = np.log1p(pattern, dtype=np.float64)
        logs -= mean
        logs /= std
        into[...] = logs
    return out
