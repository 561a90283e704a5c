"""From what each pixel of the detector saw to patterns: the transposition of a block."""

import numpy as np
from numpy.typing import NDArray

#: planes that are turned at once, at least; or so many bytes of them, which fit the core's own cache
GATHERED, GATHERED_BYTES = 128, 2**20
#: of a result; a larger one is not read into the cache before it is written
CACHED_BYTES = 2**23


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
    at_once = planes_at_once(height * width * planes.dtype.itemsize)
    for start in range(0, n, at_once):
        turn_into(planes[start : start + at_once], out, start)
    return out.reshape(height, width, n)


def planes_at_once(plane_bytes: int) -> int:
    """How many planes of so many bytes are best turned at once.

    Examples
    --------
    >>> planes_at_once(1024), planes_at_once(2**20), planes_at_once(0)
    (1024, 128, 1048576)
    """
    return max(GATHERED, GATHERED_BYTES // max(1, plane_bytes))


def turn_into(planes: NDArray, out: NDArray, first: int) -> None:
    """Put planes where they belong in patterns: ``out[:, first : first + n] = planes.reshape(n, -1).T``.

    Parameters
    ----------
    planes : (n, scan_y, scan_x), as many as `planes_at_once` says; they are gathered first where they do not lie together
    out : (positions, pixels), C-contiguous, of the same dtype
    first : pixel of the first plane

    Examples
    --------
    >>> out = np.zeros((2, 4), "u2")
    >>> turn_into(np.array([[[1, 2]], [[3, 4]]], "u2"), out, 1)
    >>> out.tolist()
    [[0, 1, 3, 0], [0, 2, 4, 0]]
    """
    rows = np.require(planes, requirements=["C", "A"]).reshape(len(planes), -1)
    if rows.dtype.itemsize > 8:
        out[:, first : first + len(rows)] = rows.T
        return
    from stem_dask.kernels.tiles import turn_tiles  # numba, which the start of a run does without

    # only bits are moved, so that one compiled version does for all types of a size
    bits = np.dtype(f"u{rows.dtype.itemsize}")
    turn_tiles(rows.view(bits), out.view(bits), first, past_cache=out.nbytes > CACHED_BYTES)
