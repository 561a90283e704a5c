"""Blocks as streams of small batches of patterns, which stay in the cache of a core on their way through all steps.

A block is a numpy array or `Block`: read from a file (`stem_dask.readers.views.Part`), or `ChangedBlock`, computed from
another block. Results that are reduced from the stream, such as sums, are `Deferred`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

#: bytes of a batch
PIECE_BYTES = 2**21

_left_out: ContextVar[bool] = ContextVar("left_out", default=False)


#: whether blocks are zeros, and nothing is read
is_input_left_out = _left_out.get


@contextlib.contextmanager
def input_left_out() -> Iterator[None]:
    """Within this context blocks are zeros, and nothing is read."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


class Reducer(Protocol):
    """Reduces the patterns of a block as they pass."""

    def add(self, piece: NDArray, here: slice) -> None:
        """Take the next patterns (n, ky, kx), and their slice in the list of all; the buffer is reused afterwards."""

    def result(self) -> dict[str, NDArray]:
        """Arrays by name, after all patterns have passed."""


class Block:
    """A block (…, ky, kx) that is not in memory; it yields small batches of patterns."""

    #: makes dask pass the block on unchanged, and numpy refuse to compute with it
    __array_ufunc__ = None

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        #: results that the next pass over the block provides
        self.deferred: list[Deferred] = []

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

    def defer(self, deferred: Deferred) -> None:
        """Have the next pass over the block provide a result."""
        self.deferred.append(deferred)

    def pieces(self) -> Iterator[NDArray]:
        """Yield batches (n, ky, kx) in scan order; each is valid until the next is requested."""
        running = [(deferred, deferred.reducer()) for deferred in self.deferred]
        yield from _seen(self._pieces(), [reducer for _, reducer in running])
        for deferred, reducer in running:
            deferred.note(reducer)
            self.deferred.remove(deferred)  # breaks the reference cycle, so that the block is freed

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        out, done = np.empty((prod(self.shape[:-2]), *self.shape[-2:]), self.dtype), 0
        for piece in self.pieces():
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out.reshape(self.shape).astype(self.dtype if dtype is None else dtype, copy=False)

    def __getitem__(self, key: Any) -> NDArray:
        return np.asarray(self)[key]


class ChangedBlock(Block):
    """A block computed from another block, batch by batch.

    ``change`` is a function of a batch (n, ky, kx), its slice in the list of all patterns of the block, and the array
    (n, height, width) to fill; shape and type of the patterns are by default those of the block, in native byte order.

    Examples
    --------
    >>> block = np.arange(6.0).reshape(3, 1, 2)
    >>> doubled = ChangedBlock(block, lambda piece, here, out: np.multiply(piece, 2, out=out), (1, 2), block.dtype)
    >>> np.asarray(doubled).ravel().tolist()
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """

    def __init__(
        self,
        block: NDArray | Block,
        change: Callable[[NDArray, slice, NDArray], Any],
        detector: tuple[int, ...] | None = None,
        dtype: np.dtype | None = None,
    ) -> None:
        kept = block.dtype.newbyteorder("=") if dtype is None else np.dtype(dtype)
        super().__init__((*block.shape[:-2], *(detector or block.shape[-2:])), kept)
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


class Regrouped(Block):
    """The patterns of a block in the batches in which ``most`` at once would be read: whole rows, or parts of one, see `steps`."""

    def __init__(self, block: Block, most: int) -> None:
        super().__init__(block.shape, block.dtype)
        self.block, self.most = block, most

    def _pieces(self) -> Iterator[NDArray]:
        parts = steps(self.shape[:-2], self.most)
        yield from joined(self.block, [prod(s.stop - s.start for s in part) for part in parts])


class Deferred:
    """A deferred reduction of a block: computed at once for an array, else during the next pass over the block.

    `get` before that pass makes one of its own. A sink writes all arrays of the result.
    """

    def __init__(self, block: NDArray | Block, reducer: Callable[[], Reducer]) -> None:
        self.reducer = reducer
        self.block: Block | None = None
        self.found: Any = None
        if isinstance(block, Block):
            self.block = block
            block.defer(self)
            return
        running = reducer()
        for _ in _seen(pieces(block), [running]):
            pass
        self.note(running)

    def note(self, reducer: Reducer) -> None:
        """Take the result of a reducer that has seen all patterns."""
        self.found, self.block = reducer.result(), None

    def get(self) -> dict[str, NDArray]:
        """The result; computes it if it is still deferred."""
        if self.block is not None:
            for _ in self.block.pieces():
                pass
        found: dict[str, NDArray] = self.found
        return found

    def array(self, name: str) -> NDArray:
        """One array of the result."""
        return self.get()[name]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays in the result."""
        return sum(array.nbytes for array in self.get().values())


def _seen(stream: Iterable[NDArray], reducers: Sequence[Reducer]) -> Iterator[NDArray]:
    done = 0
    for piece in stream:
        for reducer in reducers:
            reducer.add(piece, slice(done, done + len(piece)))
        done += len(piece)
        yield piece


def pieces(block: NDArray | Block) -> Iterator[NDArray]:
    """Yield batches (n, ky, kx) of a block in scan order; each is valid until the next is requested.

    An array is split like a block of a file, so that sums of floats do not depend on how a block was read.
    """
    if isinstance(block, Block):
        yield from block.pieces()
        return
    patterns, done = block.reshape(-1, *block.shape[-2:]), 0
    for step in steps(block.shape[:-2], piece_patterns(block)):
        size = prod(part.stop - part.start for part in step)
        yield patterns[done : done + size]
        done += size


def split(block: NDArray | Block, lengths: Iterable[int]) -> Iterator[tuple[int, NDArray, bool]]:
    """Split the patterns of a block into runs of given lengths; yields (run, batch, whether it is the first of the run)."""
    stream, piece = pieces(block), np.empty((0, 1, 1))
    for run, length in enumerate(lengths):
        left = length
        while left:
            if not len(piece):
                piece = next(stream)
            yield run, piece[:left], left == length
            left, piece = left - min(left, len(piece)), piece[left:]
    for _ in stream:  # exhausts the stream, so that deferred results are complete
        raise ValueError("the block has more patterns than the runs")


def joined(block: NDArray | Block, lengths: Sequence[int]) -> Iterator[NDArray]:
    """Yield the patterns of a block in arrays of given lengths; each is valid until the next is requested."""
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


def of_type(block: NDArray | Block, dtype: np.dtype) -> NDArray | Block:
    """Convert the block to a type or byte order that holds all its values."""
    if block.dtype == dtype:
        return block
    if isinstance(block, Block):
        return ChangedBlock(block, copied, dtype=dtype)
    return block.astype(dtype)


def copied(piece: NDArray, here: slice, out: NDArray) -> None:
    """Copy a batch to the type of ``out``."""
    np.copyto(out, piece, casting="unsafe")


def piece_patterns(block: NDArray | Block) -> int:
    """Number of patterns in a batch."""
    return max(1, PIECE_BYTES // max(1, prod(block.shape[-2:]) * block.dtype.itemsize))


def steps(lead: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Split a scan into consecutive regions of up to ``most`` positions: whole rows, or parts of one row."""
    if len(lead) == 1:
        for first in range(0, lead[0], most):
            yield (slice(first, min(first + most, lead[0])),)
        return
    rows = max(1, most // max(1, lead[1]))
    for y in range(0, lead[0], rows):
        for (x,) in steps(lead[1:], most):
            yield slice(y, min(y + rows, lead[0])), x
