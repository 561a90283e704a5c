"""Blocks that are read a piece at a time: what fits the core's own cache costs a fraction of what goes through memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from stem_dask.io.sources import FlatFile, Indexed, Selection, Slices, Source

if TYPE_CHECKING:
    import dask.array as da

#: bytes that are read at once, into a buffer that is used again
PIECE_BYTES = 2**21

#: sources of the lazy arrays that are nothing but a file, by the name of the array
_straight: WeakValueDictionary[str, Indexed] = WeakValueDictionary()


def note_straight(name: str, source: Indexed) -> None:
    """Remember that the lazy array of this name is what the source holds."""
    _straight[name] = source


def is_read_in_pieces(source: Source) -> bool:
    """Whether a few patterns of it are read as fast as many: they lie one after another, and nothing is decoded."""
    inner = source.source if isinstance(source, Selection) else source
    return isinstance(inner, FlatFile)


def in_parts(data: da.Array) -> da.Array:
    """The same blocks as `Part`, for a function that goes through their pieces; other arrays as they are."""
    import dask.array as da

    source = _straight.get(data.name)
    if source is None or not is_read_in_pieces(source.source):
        return data
    return da.from_array(
        _InParts(source.source),
        chunks=data.chunks,
        name=f"parts-{data.name}",
        asarray=False,
        inline_array=True,
        meta=np.empty((0,) * data.ndim, data.dtype),
    )


def pieces(block: NDArray | Part) -> Iterator[NDArray]:
    """The patterns of a block in their order, as arrays (n, ky, kx); those of a `Part` last until the next is asked for.

    Both have pieces of the same sizes, so that sums of floats are the same however a block was read.
    """
    if isinstance(block, Part):
        yield from block.pieces()
        return
    patterns, done = block.reshape(-1, *block.shape[-2:]), 0
    for step in _steps(block.shape[:-2], _most(block)):
        size = prod(part.stop - part.start for part in step)
        yield patterns[done : done + size]
        done += size


@dataclass(frozen=True)
class Part:
    """A block of patterns that is still in its file.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkstemp()[1]
    >>> np.arange(12, dtype="u1").tofile(path)
    >>> part = Part(FlatFile(path, 0, np.dtype("u1"), (1, 3, 2, 2)), (slice(1), slice(1, 3), slice(2), slice(2)))
    >>> part.shape, [piece.tolist() for piece in part.pieces()]
    ((1, 2, 2, 2), [[[[4, 5], [6, 7]], [[8, 9], [10, 11]]]])
    """

    source: FlatFile | Selection
    part: Slices

    #: dask passes on as it is what has this; and nobody shall calculate with a part by mistake
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the block."""
        sizes = zip(self.part, self.source.shape, strict=True)
        return tuple(len(range(*s.indices(n))) for s, n in sizes)

    @property
    def dtype(self) -> np.dtype:
        """Type of the patterns, byte order of the file."""
        return self.source.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.part)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return np.asarray(self.source[self.part], dtype)

    def __getitem__(self, key: Any) -> NDArray:
        return np.asarray(self)[key]

    def pieces(self) -> Iterator[NDArray]:
        """Read a few patterns at a time, (n, ky, kx), into the same buffer."""
        *lead, height, width = self.shape
        most = _most(self)
        buffer = np.empty((min(most, max(1, prod(lead))), height, width), self.dtype)
        ranges = [
            range(*s.indices(n)) for s, n in zip(self.part[:-2], self.source.shape, strict=False)
        ]
        with self.source.opened() as file:  # once, so that the system sees that it is read on
            for step in _steps(lead, most):
                some = [indices[s] for indices, s in zip(ranges, step, strict=True)]
                sizes = [len(indices) for indices in some]
                piece = buffer[: prod(sizes)]
                there = (*(slice(r.start, r.stop, r.step) for r in some), *self.part[-2:])
                self.source.read_into(there, piece.reshape(*sizes, height, width), file)
                yield piece


@dataclass(frozen=True)
class _InParts(Indexed):
    """A source that gives parts in place of arrays, where it is asked for blocks."""

    def __getitem__(self, key: tuple[slice | int, ...]) -> Any:
        if all(isinstance(k, slice) and (k.step or 1) > 0 for k in key):
            return Part(self.source, key)  # type: ignore[arg-type]
        return super().__getitem__(key)


def _most(block: NDArray | Part) -> int:
    """How many patterns make a piece."""
    return max(1, PIECE_BYTES // max(1, prod(block.shape[-2:]) * block.dtype.itemsize))


def _steps(lead: Sequence[int], most: int) -> Iterator[Slices]:
    """Parts of up to ``most`` positions that follow each other in the order of the scan: whole rows, or parts of one.

    Examples
    --------
    >>> [tuple((s.start, s.stop) for s in step) for step in _steps([2, 3], 2)]
    [((0, 1), (0, 2)), ((0, 1), (2, 3)), ((1, 2), (0, 2)), ((1, 2), (2, 3))]
    >>> [tuple((s.start, s.stop) for s in step) for step in _steps([3, 2], 4)]
    [((0, 2), (0, 2)), ((2, 3), (0, 2))]
    """
    if len(lead) == 1:
        for first in range(0, lead[0], most):
            yield (slice(first, min(first + most, lead[0])),)
        return
    rows = max(1, most // max(1, lead[1]))
    for y in range(0, lead[0], rows):
        for (x,) in _steps(lead[1:], most):
            yield slice(y, min(y + rows, lead[0])), x
