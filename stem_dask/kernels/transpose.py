"""From what each pixel of the detector saw to patterns: the transposition of a block."""

import numpy as np
from numpy.typing import NDArray

#: planes that are gathered before they are turned: they and a row of a piece fit the core's own cache
GATHERED = 128

#: of large patterns, which do not fit it, up to this share of their pixels, and as many bytes: a run that is written to
#: memory shall not be short
SHARE, GATHERED_BYTES = 64, 2**19

#: bytes between gathered rows: without them rows of a power of two lie in the same few lines of the cache
_GAP = 64


def patterns_first(planes: NDArray) -> NDArray:
    """``planes.transpose(1, 2, 0)`` as an array of its own, several times as fast as numpy alone makes it.

    Parameters
    ----------
    planes : (pixels, scan_y, scan_x), any dtype; rows may lie far apart in memory

    Returns
    -------
    ndarray (scan_y, scan_x, pixels), C-contiguous

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
    """An array for some of n planes, a row each; ``rows.T`` is what they are in patterns.

    Returns
    -------
    ndarray (planes, positions), each row in one piece; its content is not set

    Examples
    --------
    >>> [gathering(n, 512, np.dtype("u2")).shape for n in (65536, 2048, 3)]
    [(512, 512), (128, 512), (3, 512)]
    """
    most = GATHERED_BYTES // max(1, positions * dtype.itemsize)
    rows = min(n, max(GATHERED, min(most, n // SHARE)))
    return np.empty((rows, positions + _GAP // dtype.itemsize), dtype)[:, :positions]
