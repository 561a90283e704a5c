"""Blocks of patterns that are gone through a few at a time: what fits the core's own cache costs a fraction of what does not.

A block may come as a numpy array, or `InPieces`: from a file (`stem_dask.readers.batches.Part`), or `Changed`, made of another
one. Whoever takes a block takes both. What is found on the way, such as sums, is `Later`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

#: bytes that are worked on at once
PIECE_BYTES = 2**21

_left_out: ContextVar[bool] = ContextVar("left_out", default=False)


@contextlib.contextmanager
def input_left_out() -> Iterator[None]:
    """Blocks that are computed inside are zeros; nothing is read."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


def is_input_left_out() -> bool:
    """Whether blocks are computed without their input."""
    return _left_out.get()


class Watcher(Protocol):
    """Looks at the patterns of a block as they pass."""

    def add(self, piece: NDArray) -> None:
        """Take the next patterns, (n, ky, kx); they last until the next ones come."""

    def result(self) -> dict[str, NDArray]:
        """What was found, when all have passed, by name."""


class InPieces:
    """A block (…, ky, kx) of patterns that is not in memory, and gives a few patterns at a time.

    Parameters
    ----------
    shape : of the block
    dtype : of the patterns
    """

    #: dask passes on as it is what has this; and nobody shall calculate with a block by mistake
    __array_ufunc__ = None

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        #: what is found when the block is gone through the next time, whoever does
        self.later: list[Later] = []

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole block."""
        return prod(self.shape) * self.dtype.itemsize

    def _pieces(self) -> Iterator[NDArray]:
        raise NotImplementedError

    def pieces(self) -> Iterator[NDArray]:
        """A few patterns at a time, (n, ky, kx), in the order of the scan; they last until the next are asked for."""
        asked = [(later, later.watcher()) for later in self.later]
        for piece in self._pieces():
            for _, watcher in asked:
                watcher.add(piece)
            yield piece
        for later, watcher in asked:
            later.note(watcher)
            self.later.remove(later)  # no cycle shall keep the block

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        out, done = np.empty((prod(self.shape[:-2]), *self.shape[-2:]), self.dtype), 0
        for piece in self.pieces():
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out.reshape(self.shape).astype(self.dtype if dtype is None else dtype, copy=False)

    def __getitem__(self, key: Any) -> NDArray:
        return np.asarray(self)[key]


class Changed(InPieces):
    """A block that is made of another one, pattern by pattern.

    Parameters
    ----------
    block : (…, ky, kx), an array or in pieces
    change : called with patterns (n, ky, kx), their place in the list of all patterns of the block, and the array
        (n, height, width) that it fills
    detector, dtype : of what it makes

    Examples
    --------
    >>> block = np.arange(6.0).reshape(3, 1, 2)
    >>> doubled = Changed(block, lambda piece, here, out: np.multiply(piece, 2, out=out), (1, 2), block.dtype)
    >>> np.asarray(doubled).ravel().tolist()
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """

    def __init__(
        self,
        block: NDArray | InPieces,
        change: Callable[[NDArray, slice, NDArray], Any],
        detector: tuple[int, int],
        dtype: np.dtype,
    ) -> None:
        super().__init__((*block.shape[:-2], *detector), np.dtype(dtype))
        self.block, self.change = block, change

    def _pieces(self) -> Iterator[NDArray]:
        buffer, done = np.empty((0, *self.shape[-2:]), self.dtype), 0
        for piece in pieces(self.block):
            n = len(piece)
            if len(buffer) < n:
                buffer = np.empty((n, *self.shape[-2:]), self.dtype)
            self.change(piece, slice(done, done + n), buffer[:n])
            done += n
            yield buffer[:n]


class Later:
    """What a watcher finds of a block: at once of an array, of a block in pieces when somebody goes through it.

    Who asks before goes through it for that alone. Sinks take it for all arrays in the result.

    Examples
    --------
    >>> class Count:
    ...     n = 0
    ...     def add(self, piece): self.n += len(piece)
    ...     def result(self): return {"n": np.array(self.n)}
    >>> copy = Changed(np.ones((2, 3, 1, 1)), copied, (1, 1), np.dtype("f8"))
    >>> count = Later(copy, Count)
    >>> count.found, float(np.asarray(copy).sum()), int(count.found["n"])
    (None, 6.0, 6)
    """

    def __init__(self, block: NDArray | InPieces, watcher: Callable[[], Watcher]) -> None:
        self.watcher = watcher
        self.block: InPieces | None = None
        self.found: Any = None
        if isinstance(block, InPieces):
            self.block = block
            block.later.append(self)
            return
        watching = watcher()
        for piece in pieces(block):
            watching.add(piece)
        self.found = watching.result()

    def note(self, watcher: Watcher) -> None:
        """All patterns have passed the watcher."""
        self.found, self.block = watcher.result(), None

    def get(self) -> dict[str, NDArray]:
        """The result."""
        if self.block is not None:
            for _ in self.block.pieces():
                pass
        found: dict[str, NDArray] = self.found
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays in the result."""
        return sum(array.nbytes for array in self.get().values())


def picked(later: Later, name: str) -> NDArray:
    """One of the arrays in the result."""
    array: NDArray = later.get()[name]
    return array


def pieces(block: NDArray | InPieces) -> Iterator[NDArray]:
    """The patterns of a block in their order, as arrays (n, ky, kx); they last until the next are asked for.

    An array has pieces of the sizes that it would have as part of a file, so that sums of floats are the same however
    a block was read.
    """
    if isinstance(block, InPieces):
        yield from block.pieces()
        return
    patterns, done = block.reshape(-1, *block.shape[-2:]), 0
    for step in steps(block.shape[:-2], piece_patterns(block)):
        size = prod(part.stop - part.start for part in step)
        yield patterns[done : done + size]
        done += size


def split(block: NDArray | InPieces, lengths: Iterable[int]) -> Iterator[tuple[int, NDArray, bool]]:
    """The patterns of a block in runs of the given lengths: number of the run, patterns of it, whether they are its first.

    Examples
    --------
    >>> [(i, piece.ravel().tolist(), first) for i, piece, first in split(np.arange(5).reshape(5, 1, 1), [2, 3])]
    [(0, [0, 1], True), (1, [2, 3, 4], True)]
    """
    stream, piece = pieces(block), np.empty((0, 1, 1))
    for run, length in enumerate(lengths):
        left = length
        while left:
            if not len(piece):
                piece = next(stream)
            yield run, piece[:left], left == length
            left, piece = left - min(left, len(piece)), piece[left:]
    for _ in stream:  # to the end, so that what watches the block is told that it has seen all
        raise ValueError("the block has more patterns than the runs")


def joined(block: NDArray | InPieces, lengths: Sequence[int]) -> Iterator[NDArray]:
    """The patterns of a block in arrays of the given lengths; each lasts until the next is asked for."""
    buffer = np.empty((0, *block.shape[-2:]), block.dtype)
    filled = 0
    for run, piece, _ in split(block, lengths):
        if len(piece) == lengths[run]:
            yield piece
            continue
        if len(buffer) < lengths[run]:
            kept, buffer = buffer, np.empty((lengths[run], *block.shape[-2:]), block.dtype)
            buffer[:filled] = kept[:filled]
        buffer[filled : filled + len(piece)] = piece
        filled += len(piece)
        if filled == lengths[run]:
            filled = 0
            yield buffer[: lengths[run]]


def of_type(block: NDArray | InPieces, dtype: np.dtype) -> NDArray | InPieces:
    """The block as another type or byte order, which holds all its values."""
    if block.dtype == dtype:
        return block
    if isinstance(block, InPieces):
        return Changed(block, copied, (block.shape[-2], block.shape[-1]), dtype)
    return block.astype(dtype)


def copied(piece: NDArray, here: slice, out: NDArray) -> None:
    """The patterns as they are, in the type of ``out``."""
    np.copyto(out, piece, casting="unsafe")


def piece_patterns(block: NDArray | InPieces) -> int:
    """How many patterns make a piece."""
    return max(1, PIECE_BYTES // max(1, prod(block.shape[-2:]) * block.dtype.itemsize))


def steps(lead: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Parts of up to ``most`` positions that follow each other in the order of the scan: whole rows, or parts of one.

    Examples
    --------
    >>> [tuple((s.start, s.stop) for s in step) for step in steps([2, 3], 2)]
    [((0, 1), (0, 2)), ((0, 1), (2, 3)), ((1, 2), (0, 2)), ((1, 2), (2, 3))]
    >>> [tuple((s.start, s.stop) for s in step) for step in steps([3, 2], 4)]
    [((0, 2), (0, 2)), ((2, 3), (0, 2))]
    """
    if len(lead) == 1:
        for first in range(0, lead[0], most):
            yield (slice(first, min(first + most, lead[0])),)
        return
    rows = max(1, most // max(1, lead[1]))
    for y in range(0, lead[0], rows):
        for (x,) in steps(lead[1:], most):
            yield slice(y, min(y + rows, lead[0])), x
