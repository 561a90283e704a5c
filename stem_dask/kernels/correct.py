"""Take the camera's background off every pattern, and even out its pixels."""

import numpy as np
from numpy.typing import NDArray


def correct_patterns(
    block: NDArray,
    dark: NDArray[np.float32] | None,
    gain: NDArray[np.float32] | None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """``(pattern - dark) * gain`` as float32; large counts lose no digit before the background is off.

    Parameters
    ----------
    block : (..., ky, kx), any real type and byte order
    dark : (ky, kx), counts without a beam, or None
    gain : (ky, kx), factor of each pixel, or None
    out : array of the block's shape that is filled; default a new one

    Examples
    --------
    >>> block = np.array([[[3, 5]]], ">u2")
    >>> correct_patterns(block, np.array([[1, 6]], "f4"), np.array([[2, 2]], "f4")).tolist()
    [[[4.0, -2.0]]]
    """
    out = np.empty(block.shape, np.float32) if out is None else out
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # infinite values are counted by the analysis
        if dark is None:
            out[...] = block
        else:
            np.subtract(block, dark, out=out, dtype=np.float64, casting="unsafe")
        if gain is not None:
            np.multiply(out, gain, out=out)
    return out
