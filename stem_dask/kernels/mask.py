"""Replace the bad pixels of every pattern."""

import numpy as np
from numpy.typing import NDArray


def neighbours(mask: NDArray[np.bool_]) -> list[tuple[tuple[int, int], NDArray[np.int64]]]:
    """For every bad pixel the good pixels around it: of the nearest square ring that has any.

    Parameters
    ----------
    mask : (ky, kx), True = bad

    Returns
    -------
    list of ((y, x), (n, 2) indices); n is 0 when every pixel is bad

    Examples
    --------
    >>> mask = np.zeros((3, 3), bool); mask[0, 0] = True
    >>> neighbours(mask)[0][1].tolist()
    [[0, 1], [1, 0], [1, 1]]
    """
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

    Parameters
    ----------
    block : (..., ky, kx)
    mask : (ky, kx), True = bad
    near : result of `neighbours`, or None to fill with 0
    out : array of the block's shape and type that is filled; default a new one

    Examples
    --------
    >>> block = np.arange(9.0).reshape(1, 3, 3)
    >>> mask = np.zeros((3, 3), bool); mask[1, 1] = True
    >>> float(fill_bad(block, mask, neighbours(mask))[0, 1, 1]), float(fill_bad(block, mask, None)[0, 1, 1])
    (4.0, 0.0)
    """
    out = np.empty(block.shape, block.dtype.newbyteorder("=")) if out is None else out
    out[...] = block
    out[..., mask] = 0
    for (y, x), good in near or []:
        if len(good):
            median = np.median(block[..., good[:, 0], good[:, 1]], axis=-1)
            out[..., y, x] = median if out.dtype.kind == "f" else np.rint(median)
    return out
