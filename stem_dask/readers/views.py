"""Arrays in files, read a block at a time: what a worker needs to read is small, picklable, and opens by name.

Every source has ``shape``, ``dtype`` and ``source[slices]``, slices with positive steps, and gives a
C-contiguous array. They nest: a selection of a scan made of a list of patterns in a flat file.
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
from stem_dask.storage.errors import present

#: order of axes that makes (scan_y, scan_x, ky, kx) of (ky, kx, scan_y, scan_x)
DETECTOR_FIRST = (2, 3, 0, 1)

#: why such a file is not read by ranges of bytes
DETECTOR_SLOWEST = "the detector's axes come first in it, so that every pattern is spread over all of it; copy it here first"


@dataclass(frozen=True)
class Transposed(Wrapped):
    """A source with its axes in another order: axis i of this is axis ``order[i]`` of the source."""

    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the new order."""
        return tuple(self.source.shape[i] for i in self.order)

    def __getitem__(self, part: Slices) -> NDArray:
        there = tuple(part[self.order.index(i)] for i in range(len(self.shape)))
        if self.order == DETECTOR_FIRST and isinstance(self.source, FlatFile):
            return self._turned(self.source, there)
        found = self.source[there]
        if self.order != DETECTOR_FIRST:
            return np.ascontiguousarray(found.transpose(self.order))
        ky, kx, *scan = found.shape
        return patterns_first(found.reshape(ky * kx, *scan)).reshape(*scan, ky, kx)

    def _turned(self, file: FlatFile, part: Slices) -> NDArray:
        """A part of a file with the detector slowest: some planes at a time, which are turned while they are in the cache."""
        ky, kx, y, x = (range(*s.indices(n)) for s, n in zip(part, file.shape, strict=True))
        out = np.empty((len(y) * len(x), len(ky) * len(kx)), self.dtype)
        gathered = gathering(out.shape[1], len(out), self.dtype)
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


@dataclass(frozen=True)
class ScanOfList(Wrapped):
    """A source (n, ky, kx), the scan flattened row by row, seen as (scan_y, scan_x, ky, kx)."""

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
class Selection(Wrapped):
    """Part of a source: on every axis ``start + step * i`` for i below ``size``."""

    starts: tuple[int, ...]
    steps: tuple[int, ...]
    shape: tuple[int, ...]

    def __getitem__(self, part: Slices) -> NDArray:
        return self.source[self._wanted(part)]

    def opened(self) -> Any:
        """The file, of a source that is one."""
        return self.source.opened()  # type: ignore[attr-defined]

    def read_into(self, part: Slices, out: NDArray, file: Any = None) -> None:
        """Read a part into an array, of a source that can."""
        self.source.read_into(self._wanted(part), out, file)  # type: ignore[attr-defined]

    def _wanted(self, part: Slices) -> Slices:
        wanted = []
        for s, start, step, size in zip(part, self.starts, self.steps, self.shape, strict=True):
            first, last, by = s.indices(size)
            n = len(range(first, last, by))
            begin = start + step * first
            wanted.append(slice(begin, begin + max(0, n - 1) * step * by + (n > 0), step * by))
        return tuple(wanted)


@dataclass(frozen=True)
class Indexed(Wrapped):
    """A source as dask sees it: it may also be indexed by integers and by slices that run backwards."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the source."""
        return self.source.shape

    @property
    def ndim(self) -> int:
        """Number of axes, which dask asks for."""
        return len(self.source.shape)

    def __getitem__(self, key: tuple[slice | int, ...]) -> NDArray:
        part: list[slice] = []
        after: list[slice | int] = []
        for k, size in zip(key, self.shape, strict=True):
            if not isinstance(k, slice):
                part.append(slice(int(k), int(k) + 1))
                after.append(0)
            elif (k.step or 1) > 0:
                part.append(k)
                after.append(slice(None))
            else:
                forward = range(*k.indices(size))[::-1]
                part.append(slice(forward.start, forward.stop, forward.step))
                after.append(slice(None, None, -1))
        with present(self.source):
            return self.source[tuple(part)][tuple(after)]


def _slice(indices: range) -> slice:
    """What picks indices that do not run backwards."""
    return slice(indices.start, indices.stop, indices.step)


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
    shape = (-(-(y1 - y0) // step), -(-(x1 - x0) // step), *source.shape[2:])
    return Selection(source, (y0, x0, 0, 0), (step, step, 1, 1), shape)


@dataclass(frozen=True)
class Flipped(Wrapped):
    """A source with the rows of every pattern from bottom to top (its axis ky backwards)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the source."""
        return self.source.shape

    def __getitem__(self, part: Slices) -> NDArray:
        height = self.shape[-2]
        rows = range(*part[-2].indices(height))
        there = slice(0, 0)
        if rows:
            there = slice(height - 1 - rows[-1], height - rows[0], rows.step)
        block = self.source[(*part[:-2], there, part[-1])]
        return np.ascontiguousarray(block[..., ::-1, :])


@dataclass(frozen=True)
class Squeezed(Wrapped):
    """A source without some axes of length 1; ``kept`` are the positions of those that stay."""

    kept: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes that stay."""
        return tuple(self.source.shape[i] for i in self.kept)

    def __getitem__(self, part: Slices) -> NDArray:
        there = [slice(0, 1)] * len(self.source.shape)
        for i, s in zip(self.kept, part, strict=True):
            there[i] = s
        block = self.source[tuple(there)]
        return block.reshape([block.shape[i] for i in self.kept])
