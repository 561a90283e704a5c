"""Sources seen in another way: an affine view of the axes, and a stack folded into a scan.

Every source has ``shape``, ``dtype`` and ``source[slices]``, slices with positive steps, and returns a C-contiguous
array. Sources are small and can be pickled: workers open the file by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.kernels.transpose import gathering, patterns_first
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.source import Slices, Source, Wrapped
from stem_dask.storage.errors import path_of, translate

#: order of axes that makes (scan_y, scan_x, ky, kx) of (ky, kx, scan_y, scan_x)
DETECTOR_FIRST = (2, 3, 0, 1)

#: why such a file is not read by ranges of bytes
DETECTOR_SLOWEST = "the detector's axes come first in it, so that every pattern is spread over all of it; copy it here first"


@dataclass(frozen=True)
class View(Wrapped):
    """A source transposed, cut, strided, flipped or squeezed.

    Parameters
    ----------
    axes : (axis of the source, indices along it), one for each axis of the view
    fixed : (axis of the source, index), for axes that the view does not have

    Examples
    --------
    >>> view = View.of(np.arange(6).reshape(2, 3)).transpose((1, 0)).flip(0)
    >>> view.shape, view[:, 1:].tolist()
    ((3, 2), [[5], [4], [3]])
    """

    axes: tuple[tuple[int, range], ...]
    fixed: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, source: Source) -> "View":
        """All of a source; of a view the view itself."""
        if isinstance(source, View):
            return source
        return cls(source, tuple(enumerate(map(range, source.shape))))

    def select(self, *parts: slice) -> "View":
        """A slice of each axis."""
        pairs = zip(self.axes, parts, strict=True)
        return View(self.source, tuple((axis, r[s]) for (axis, r), s in pairs), self.fixed)

    def transpose(self, order: Sequence[int]) -> "View":
        """Axis i of the result is axis ``order[i]``."""
        return View(self.source, tuple(self.axes[i] for i in order), self.fixed)

    def squeeze(self, kept: Sequence[int]) -> "View":
        """Only the axes ``kept``; the others have length 1."""
        left = [(axis, r[0]) for i, (axis, r) in enumerate(self.axes) if i not in kept]
        return View(self.source, tuple(self.axes[i] for i in kept), (*self.fixed, *left))

    def flip(self, axis: int) -> "View":
        """One axis backwards."""
        parts = [slice(None)] * len(self.axes)
        parts[axis] = slice(None, None, -1)
        return self.select(*parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(len(indices) for _, indices in self.axes)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the source, in the order of the view."""
        return tuple(axis for axis, _ in self.axes)

    @property
    def transposed(self) -> bool:
        """Whether the axes are in another order than in the source."""
        return list(self.order) != sorted(self.order)

    @property
    def flipped(self) -> bool:
        """Whether an axis runs backwards."""
        return any(indices.step < 0 for _, indices in self.axes)

    @property
    def in_place(self) -> bool:
        """Whether parts of the view are parts of the source, so that `read_into` works."""
        return not (self.fixed or self.transposed or self.flipped)

    def __getitem__(self, part: Slices) -> NDArray:
        there = self._there(part)
        if self.order == DETECTOR_FIRST and isinstance(self.source, FlatFile):
            block = _transposed_file(self.source, there)
        elif self.order == DETECTOR_FIRST:
            found = self.source[there]
            ky, kx, *scan = found.shape
            block = patterns_first(found.reshape(ky * kx, *scan)).reshape(*scan, ky, kx)
        else:
            found = self.source[there]
            block = found.transpose(*self.order, *(axis for axis, _ in self.fixed))
            block = block.reshape(block.shape[: len(self.axes)])
        if self.flipped:
            block = block[tuple(slice(None, None, 1 if r.step > 0 else -1) for _, r in self.axes)]
        return np.asarray(block, order="C")

    def opened(self) -> Any:
        """The file, of a source that is one."""
        return self.source.opened()  # type: ignore[attr-defined]

    def read_into(self, part: Slices, out: NDArray, file: Any = None) -> None:
        """Read a part into an array; see `in_place`."""
        self.source.read_into(self._there(part), out, file)  # type: ignore[attr-defined]

    def _there(self, part: Slices) -> Slices:
        """The part of the source, forwards on each axis."""
        slices = {axis: slice(index, index + 1) for axis, index in self.fixed}
        for (axis, indices), s in zip(self.axes, part, strict=True):
            wanted = indices[s]
            slices[axis] = _slice(wanted if wanted.step > 0 else wanted[::-1])
        return tuple(slices[axis] for axis in range(len(slices)))


def _transposed_file(file: FlatFile, part: Slices) -> NDArray:
    """A part of a detector-first file, transposed a few planes at a time while they are in the cache."""
    ky, kx, y, x = (range(*s.indices(n)) for s, n in zip(part, file.shape, strict=True))
    out = np.empty((len(y) * len(x), len(ky) * len(kx)), file.dtype)
    gathered = gathering(out.shape[1], len(out), file.dtype)
    height, width = max(1, len(gathered) // (len(kx) or 1)), min(len(gathered), len(kx)) or 1
    for i in range(0, len(ky), height):
        for j in range(0, len(kx), width):
            some = ky[i : i + height], kx[j : j + width]
            rows = gathered[: len(some[0]) * len(some[1])]
            planes = rows.reshape(*map(len, (*some, y, x)))  # a view
            file.read_into((*map(_slice, some), *part[2:]), planes)
            first = i * len(kx) + j
            out[:, first : first + len(rows)] = rows.T
    return out.reshape(*map(len, (y, x, ky, kx)))


def _slice(indices: range) -> slice:
    """The slice of indices that run forwards."""
    return slice(indices.start, indices.stop, indices.step) if indices else slice(0, 0)


@dataclass(frozen=True)
class ScanOfList(Wrapped):
    """A stack (n, ky, kx), the scan row by row, folded into (scan_y, scan_x, ky, kx)."""

    scan_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes with the scan unfolded."""
        return (*self.scan_shape, *self.source.shape[1:])

    def __getitem__(self, part: Slices) -> NDArray:
        rows = range(*part[0].indices(self.scan_shape[0]))
        start, stop, step = part[1].indices(self.scan_shape[1])
        width = self.scan_shape[1]
        if not rows or (rows.step == 1 and (start, stop, step) == (0, width, 1)):
            block = self.source[(slice(rows.start * width, rows.stop * width), *part[2:])]
            columns = len(range(start, stop, step))
            return block.reshape(len(rows), columns, *block.shape[1:])
        return np.stack(
            [
                self.source[(slice(y * width + start, y * width + stop, step), *part[2:])]
                for y in rows
            ]
        )


@dataclass(frozen=True)
class Indexed(Wrapped):
    """A source as dask indexes it: with integers, too, and slices that run backwards."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the source."""
        return self.source.shape

    @property
    def ndim(self) -> int:
        """Number of axes, which dask asks for."""
        return len(self.source.shape)

    def __getitem__(self, key: tuple[slice | int, ...]) -> NDArray:
        axes, fixed = [], []
        for axis, (k, size) in enumerate(zip(key, self.shape, strict=True)):
            if isinstance(k, slice):
                axes.append((axis, range(size)[k]))
            else:
                fixed.append((axis, int(k)))
        with translate(SourceError, path_of(self.source)):
            return View(self.source, tuple(axes), tuple(fixed))[(slice(None),) * len(axes)]


def select(source: Source, roi: Sequence[int] | None, step: int) -> Source:
    """``roi`` [y0, y1, x0, x1] of the scan, then every ``step``-th position of it.

    Raises
    ------
    SourceError
        When the source is a list of patterns, or the region does not fit the scan.
    """
    if roi is None and step == 1:
        return source
    if len(source.shape) != 4:
        raise SourceError(
            f"scan_roi and scan_step need a scan; the input is a list of {source.shape[0]:,} patterns: "
            "give input.scan_shape, or leave them out"
        )
    if step < 1:
        raise SourceError(f"scan_step is {step}; take every n-th position with n >= 1")
    height, width = source.shape[:2]
    roi = tuple(roi) if roi is not None else (0, height, 0, width)
    if len(roi) != 4:
        raise SourceError(f"scan_roi {list(roi)} has {len(roi)} numbers; give [y0, y1, x0, x1]")
    y0, y1, x0, x1 = roi
    if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
        raise SourceError(
            f"scan_roi {[y0, y1, x0, x1]} does not fit the scan of {height} x {width} positions; "
            "give [y0, y1, x0, x1] with 0 <= y0 < y1 <= scan_y and 0 <= x0 < x1 <= scan_x"
        )
    whole = slice(None)
    return View.of(source).select(slice(y0, y1, step), slice(x0, x1, step), whole, whole)
