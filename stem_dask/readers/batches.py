"""Blocks of a file, read a few patterns at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, is_input_left_out, piece_patterns, pieces, steps
from stem_dask.core.errors import SourceError
from stem_dask.readers.flat import FlatFile, FramedFile, buffer_for
from stem_dask.readers.mib import LongCounts, QuadCounts, RawCounts
from stem_dask.readers.source import Slices, Source
from stem_dask.readers.views import ScanOfList, View
from stem_dask.storage.errors import path_of, translate

#: wrappers that read each pattern by itself
_BY_PATTERN = (View, ScanOfList, RawCounts, QuadCounts, LongCounts)


def is_read_in_pieces(source: Source) -> bool:
    """Whether each pattern is stored contiguously, so that a few are read as efficiently as many."""
    while isinstance(source, _BY_PATTERN):
        if isinstance(source, View) and source.transposed:
            return False
        source = source.source
    return isinstance(source, (FlatFile, FramedFile))


def _flat(source: Source) -> FlatFile | None:
    """The file of a source that can be read into an existing array."""
    inner = source.source if isinstance(source, View) and source.in_place else source
    return inner if isinstance(inner, FlatFile) else None


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
        sizes = zip(part, source.shape, strict=True)
        super().__init__(tuple(len(range(*s.indices(n))) for s, n in sizes), source.dtype)
        self.source, self.part = source, part

    def __getitem__(self, key: Any) -> Any:
        """A window of all patterns is a `Part` again; anything else is an array."""
        whole, (y, x) = (slice(None),) * (self.ndim - 2), key[-2:]
        if key[:-2] != whole or not isinstance(y, slice) or not isinstance(x, slice):
            return super().__getitem__(key)
        sizes = zip(self.source.shape[-2:], self.part[-2:], (y, x), strict=True)
        ranges = (range(n)[part][inner] for n, part, inner in sizes)
        detector = (slice(r.start, r.stop, r.step) for r in ranges)
        return Part(self.source, (*self.part[:-2], *detector))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        if self.deferred:
            return super().__array__(dtype, copy)
        with translate(SourceError, path_of(self.source)):
            return np.asarray(self.source[self.part], dtype)

    def _pieces(self) -> Iterator[NDArray]:
        """Batches of patterns; an `OSError` becomes a `SourceError`, to differ from one of the output."""
        with translate(SourceError, path_of(self.source)):
            flat = _flat(self.source)
            if flat is not None:
                yield from self._read_into_one(flat.offset)
            elif is_read_in_pieces(self.source):
                yield from self._read()
            else:  # reading a part would take as long as all
                yield from pieces(self.source[self.part])

    def _read(self) -> Iterator[NDArray]:
        for there, _ in self._places():
            yield self.source[there].reshape(-1, *self.shape[-2:])

    def _read_into_one(self, offset: int) -> Iterator[NDArray]:
        """Into one buffer, from a file that is opened once, so that the system reads ahead."""
        source: Any = self.source
        buffer = np.empty((0, *self.shape[-2:]), self.dtype)
        with source.opened() as file:
            for there, sizes in self._places():
                n = prod(sizes)
                if len(buffer) < n:
                    buffer = buffer_for(offset, (n, *self.shape[-2:]), self.dtype)
                source.read_into(there, buffer[:n].reshape(*sizes, *self.shape[-2:]), file)
                yield buffer[:n]

    def _places(self) -> Iterator[tuple[Slices, list[int]]]:
        """The part of the source of each batch, and its sizes along the leading axes."""
        ranges = [
            range(*s.indices(n)) for s, n in zip(self.part[:-2], self.source.shape, strict=False)
        ]
        for step in steps(self.shape[:-2], piece_patterns(self)):
            some = [indices[s] for indices, s in zip(ranges, step, strict=True)]
            where = (slice(r.start, r.stop, r.step) for r in some)
            yield (*where, *self.part[-2:]), [len(r) for r in some]


def read_block(source: Source, region: Slices) -> Any:
    """A block of a source, which is read when it is iterated; zeros while quarantined blocks are left out."""
    if is_input_left_out():
        sizes = zip(region, source.shape, strict=True)
        return np.zeros(tuple(len(range(*part.indices(n))) for part, n in sizes), source.dtype)
    return Part(source, region)
