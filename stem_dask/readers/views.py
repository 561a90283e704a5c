"""Views of sources: transposed, cut, strided, flipped or squeezed, a stack folded into a scan, and blocks of them."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, is_input_left_out, piece_patterns, pieces, steps
from stem_dask.core.errors import SourceError
from stem_dask.kernels.pixels import gathering, patterns_first
from stem_dask.readers.flat import FlatFile, buffer_for
from stem_dask.readers.source import Reading, Slices, Source, Wrapped, reading_of
from stem_dask.storage.errors import path_of, translate

#: order of axes that makes (scan_y, scan_x, ky, kx) of (ky, kx, scan_y, scan_x)
DETECTOR_FIRST = (2, 3, 0, 1)


@dataclass(frozen=True)
class View(Wrapped):
    """A source transposed, cut, strided, flipped or squeezed, by integers and slices of either direction.

    Parameters
    ----------
    axes : (axis of the source, indices along it), one for each axis of the view
    fixed : (axis of the source, index), for axes that the view does not have

    Examples
    --------
    >>> view = View.of(np.arange(6).reshape(2, 3)).transpose((1, 0)).flip(0)
    >>> view.shape, view[:, 1:].tolist(), view[::-1, 0].tolist()
    ((3, 2), [[5], [4], [3]], [0, 1, 2])
    """

    axes: tuple[tuple[int, range], ...]
    fixed: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, source: Source) -> View:
        """All of a source; of a view the view itself."""
        if isinstance(source, View):
            return source
        return cls(source, tuple(enumerate(map(range, source.shape))))

    def select(self, *parts: slice | int) -> View:
        """A slice of each axis, or an index, which removes the axis."""
        axes, fixed = [], list(self.fixed)
        for (axis, indices), part in zip(self.axes, parts, strict=True):
            if isinstance(part, slice):
                axes.append((axis, indices[part]))
            else:
                fixed.append((axis, indices[part]))
        return View(self.source, tuple(axes), tuple(fixed))

    def transpose(self, order: Sequence[int]) -> View:
        """Axis i of the result is axis ``order[i]``."""
        return View(self.source, tuple(self.axes[i] for i in order), self.fixed)

    def flip(self, axis: int) -> View:
        """One axis backwards."""
        parts = [slice(None)] * self.ndim
        parts[axis] = slice(None, None, -1)
        return self.select(*parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(len(indices) for _, indices in self.axes)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.axes)

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
    def reading(self) -> Reading:
        """As of the source; putting axes in order takes copies, and spreads patterns over the file."""
        inner = reading_of(self.source)
        return replace(
            inner,
            copies=inner.copies + self.transposed + self.flipped,
            in_pieces=inner.in_pieces and not self.transposed,
        )

    @property
    def part(self) -> Slices:
        """The part of the source, forwards on each axis."""
        slices = {axis: slice(index, index + 1) for axis, index in self.fixed}
        for axis, indices in self.axes:
            slices[axis] = _slice(indices if indices.step > 0 else indices[::-1])
        return tuple(slices[axis] for axis in range(len(slices)))

    def read(self) -> NDArray:
        """All of the view, C-contiguous."""
        with translate(SourceError, path_of(self.source)):
            if (
                isinstance(self.source, FlatFile)
                and self.order == DETECTOR_FIRST
                and not self.fixed
            ):
                block = _transposed_file(self.source, self.part)
            else:
                found = self.source[self.part]
                kept = sorted(self.order)
                found = found.reshape([found.shape[axis] for axis in kept])
                order = tuple(kept.index(axis) for axis in self.order)
                if order == DETECTOR_FIRST:
                    ky, kx, *scan = found.shape
                    block = patterns_first(found.reshape(ky * kx, *scan)).reshape(*scan, ky, kx)
                else:
                    block = found.transpose(order)
        if self.flipped:
            block = block[tuple(slice(None, None, 1 if r.step > 0 else -1) for _, r in self.axes)]
        return np.asarray(block, order="C")

    def __getitem__(self, part: tuple[slice | int, ...]) -> NDArray:
        return self.select(*part).read()


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
        height, width = self.scan_shape
        rows, columns = range(height)[part[0]], range(width)[part[1]]
        if not rows or (rows.step == 1 and columns == range(width)):
            block = self.source[(slice(rows.start * width, rows.stop * width), *part[2:])]
            return block.reshape(len(rows), len(columns), *block.shape[1:])
        start, stop, step = columns.start, columns.stop, columns.step
        lines = (slice(y * width + start, y * width + stop, step) for y in rows)
        return np.stack([self.source[(line, *part[2:])] for line in lines])


@dataclass(frozen=True)
class Joined:
    """Sources of one type, joined along their first axis; single images (ky, kx) become a stack.

    Examples
    --------
    >>> stacks = np.arange(6).reshape(3, 1, 2), np.arange(6, 10).reshape(2, 1, 2)
    >>> joined = Joined(stacks)
    >>> joined.shape, joined[1:5:2, :, 1:].tolist(), Joined((np.eye(2), np.ones((2, 2)))).shape
    ((5, 1, 2), [[[3]], [[7]]], (2, 2, 2))
    """

    parts: tuple[Source, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of indices of each source along the first axis."""
        return tuple(1 if len(one.shape) == 2 else one.shape[0] for one in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, with all sources along the first axis."""
        inner = self.parts[0].shape
        return (sum(self.lengths), *(inner if len(inner) == 2 else inner[1:]))

    @property
    def dtype(self) -> np.dtype:
        """Type of the sources."""
        return self.parts[0].dtype

    @property
    def reading(self) -> Reading:
        """As of the first source, and a copy more."""
        inner = reading_of(self.parts[0])
        return replace(inner, copies=inner.copies + 1)

    def __getitem__(self, part: Slices) -> NDArray:
        wanted, done = range(*part[0].indices(self.shape[0])), 0
        sizes = (len(range(*s.indices(n))) for s, n in zip(part[1:], self.shape[1:], strict=True))
        out = np.empty((len(wanted), *sizes), self.dtype)
        for one, length in zip(self.parts, self.lengths, strict=True):
            first, last = bisect_left(wanted, done), bisect_left(wanted, done + length)
            if first < last and len(one.shape) == 2:
                out[first] = one[part[1:]]
            elif first < last:
                here = slice(wanted[first] - done, wanted[last - 1] - done + 1, wanted.step)
                out[first:last] = one[(here, *part[1:])]
            done += length
        return out


@dataclass(frozen=True)
class Picked(Wrapped):
    """Chosen positions of a scan or list of patterns.

    Parameters
    ----------
    positions : the chosen indices along each scan axis, in ascending order
    chunks : positions of a chunk along each; those in one chunk are read together

    Examples
    --------
    >>> patterns = np.arange(24).reshape(6, 2, 2)
    >>> picked = Picked(patterns, ((0, 3, 4),), (3,))
    >>> picked.shape, picked[1:, :1, :].tolist()
    ((3, 2, 2), [[[12, 13]], [[16, 17]]])
    """

    positions: tuple[tuple[int, ...], ...]
    chunks: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of positions along each axis, and the detector."""
        return (*map(len, self.positions), *self.source.shape[-2:])

    def __getitem__(self, part: Slices) -> NDArray:
        n = len(self.positions)
        wanted = [where[piece] for where, piece in zip(self.positions, part, strict=False)]
        places = [range(size)[piece] for size, piece in zip(self.shape[n:], part[n:], strict=True)]
        out = np.empty((*map(len, wanted), *map(len, places)), self.dtype)
        runs = ([*_runs(*one)] for one in zip(wanted, self.chunks, strict=True))
        for run in itertools.product(*runs):
            lead = tuple(slice(where[0], where[-1] + 1) for _, where in run)
            block = self.source[(*lead, *part[n:])]
            inside = (np.array(where) - where[0] for _, where in run)
            out[tuple(here for here, _ in run)] = block[np.ix_(*inside)]
        return out


def _runs(wanted: Sequence[int], chunk: int) -> Iterator[tuple[slice, list[int]]]:
    """The indices of each chunk, and their slice in the list of all."""
    done = 0
    for _, group in itertools.groupby(wanted, lambda index: index // chunk):
        where = list(group)
        yield slice(done, done + len(where)), where
        done += len(where)


class Part(Block):
    """A block of patterns that has not been read.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkstemp()[1]
    >>> np.arange(12, dtype="u1").tofile(path)
    >>> part = Part(FlatFile(path, 0, np.dtype("u1"), (1, 3, 2, 2)), (slice(1), slice(1, 3), slice(2), slice(2)))
    >>> part.shape, [piece.tolist() for piece in part.pieces()]
    ((1, 2, 2, 2), [[[[4, 5], [6, 7]], [[8, 9], [10, 11]]]])
    """

    def __init__(self, source: Source, part: Slices) -> None:
        self.view = View.of(source).select(*part)
        super().__init__(self.view.shape, self.view.dtype)

    def __getitem__(self, key: Any) -> Any:
        """A window of all patterns is a `Part` again; anything else is an array."""
        if all(k == slice(None) for k in key[:-2]) and all(isinstance(k, slice) for k in key[-2:]):
            return Part(self.view, key)
        return super().__getitem__(key)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        if self.deferred:
            return super().__array__(dtype, copy)
        return np.asarray(self.view.read(), dtype)

    def _pieces(self) -> Iterator[NDArray]:
        """Batches of patterns; an `OSError` becomes a `SourceError`, to differ from one of the output.

        Arrays of a file are read into one buffer from a file that is opened once, so that the system reads ahead.
        """
        view, detector = self.view, self.shape[-2:]
        with translate(SourceError, path_of(view)):
            if not view.reading.in_pieces:  # reading a part would take as long as all
                yield from pieces(view.read())
                return
            in_place = not (view.fixed or view.flipped)
            flat = view.source if in_place and isinstance(view.source, FlatFile) else None
            buffer = np.empty((0, *detector), self.dtype)
            with nullcontext() if flat is None else flat.opened() as file:
                for step in steps(self.shape[:-2], piece_patterns(self)):
                    batch = view.select(*step, slice(None), slice(None))
                    if flat is None:
                        yield batch.read().reshape(-1, *detector)
                        continue
                    n = prod(batch.shape[:-2])
                    if len(buffer) < n:
                        buffer = buffer_for(flat.offset, (n, *detector), self.dtype)
                    flat.read_into(batch.part, buffer[:n].reshape(batch.shape), file)
                    yield buffer[:n]


def read_block(source: Source, region: Slices) -> Any:
    """A block of a source, which is read when it is iterated; zeros while quarantined blocks are left out."""
    part = Part(source, region)
    return np.zeros(part.shape, part.dtype) if is_input_left_out() else part
