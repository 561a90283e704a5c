"""Arrays that lie where the bytes of a file are copied to at full speed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

#: a line of the processor's cache, and what numpy and numba ask of an array's address, in bytes
_LINE, _ALIGNED = 64, 16


def buffer_for(offset: int, shape: Sequence[int], dtype: np.dtype) -> NDArray:
    """A new array for bytes that begin at this offset of a file.

    Linux copies what is read by ``rep movsb``, and there are processors (AMD EPYC of the Zen 3 generation, measured) on which
    that takes three to four times as long when the target lies 1 to 31 bytes farther into its page than the source does. A
    large array of numpy's own often begins 16 bytes into a page, and the data of many a file at the beginning of one.

    Parameters
    ----------
    offset : of the first byte in the file
    shape, dtype : of the array

    Returns
    -------
    C-contiguous array, aligned to 16 bytes; its content is not set

    Examples
    --------
    >>> array = buffer_for(4096, (2, 3), np.dtype("u2"))
    >>> array.shape, array.ctypes.data % 64
    ((2, 3), 48)
    """
    n_bytes = prod(shape) * dtype.itemsize
    spare = np.empty(n_bytes + _LINE, np.uint8)
    # 33 to 48 bytes farther than the source, by lines
    wanted = offset // _ALIGNED * _ALIGNED + 3 * _ALIGNED
    first = (wanted - spare.ctypes.data) % _LINE
    return spare[first : first + n_bytes].view(dtype).reshape(shape)
