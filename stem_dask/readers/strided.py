"""Elements of a file at regular distances, such as a view of a tensor that was saved with the whole of it."""

import math
import mmap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.readers.source import Slices
from stem_dask.storage.publish import named


@dataclass(frozen=True)
class StridedFile:
    """An array whose axis i goes ``strides[i]`` elements on, from a byte offset on.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     np.arange(24, dtype="u1").tofile(file.name)
    ...     view = StridedFile(file.name, 1, np.dtype("u1"), (2, 3), (12, 2))
    ...     view[:, 1:].tolist()
    [[3, 5], [15, 17]]
    """

    path: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """From the first element to the end of the last one."""
        return span(self.shape, self.strides) * self.dtype.itemsize

    def __getitem__(self, part: Slices) -> NDArray:
        first, *rest = (range(*s.indices(n)) for s, n in zip(part, self.shape, strict=True))
        out = np.empty([len(first), *map(len, rest)], self.dtype)
        if out.size == 0:
            return out
        size = self.dtype.itemsize
        steps = [r.step * stride * size for r, stride in zip(rest, self.strides[1:], strict=True)]
        begin = sum(r[0] * stride for r, stride in zip(rest, self.strides[1:], strict=True))
        with named(self.path), open(self.path, "rb") as file:
            # mapped pages count as memory until they are unmapped, so one index of the first axis at a time
            for target, i in zip(out, first, strict=True):
                at = self.offset + (i * self.strides[0] + begin) * size
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                    if self.offset + self.n_bytes > len(whole):
                        raise SourceError(
                            f"{self.path}: the file ends at byte {len(whole):,}, in the middle of the data; it was cut or is "
                            "still being written"
                        )
                    target[...] = np.ndarray(target.shape, self.dtype, whole, at, steps)
        return out


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one of an array, both included.

    Examples
    --------
    >>> span((2, 3), (12, 2))
    17
    """
    if not math.prod(shape):
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
