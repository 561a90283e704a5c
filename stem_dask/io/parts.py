"""Blocks of flat files, read a few patterns at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import SourceError, told_as
from stem_dask.io.pieces import InPieces, behind, piece_patterns, steps
from stem_dask.io.sources import FlatFile, Indexed, Selection, Slices, Source

if TYPE_CHECKING:
    import dask.array as da

#: sources of the lazy arrays that are nothing but a file, by the name of the array
_straight: WeakValueDictionary[str, Indexed] = WeakValueDictionary()


def note_straight(name: str, source: Indexed) -> None:
    """Remember that the lazy array of this name is what the source holds."""
    _straight[name] = source


def is_read_in_pieces(source: Source) -> bool:
    """Whether a few patterns of it are read as fast as many: they lie one after another, and nothing is decoded."""
    inner = source.source if isinstance(source, Selection) else source
    return isinstance(inner, FlatFile)


def in_pieces(data: da.Array) -> da.Array:
    """The same blocks in pieces, for a function that takes them so; other arrays as they are."""
    import dask.array as da

    made = behind(data)
    if made is not None:
        return made
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


class Part(InPieces):
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

    def __init__(self, source: FlatFile | Selection, part: Slices) -> None:
        sizes = zip(part, source.shape, strict=True)
        super().__init__(tuple(len(range(*s.indices(n))) for s, n in sizes), source.dtype)
        self.source, self.part = source, part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        if self.later:
            return super().__array__(dtype, copy)
        return np.asarray(self.source[self.part], dtype)

    def _pieces(self) -> Iterator[NDArray]:
        """Read into the same buffer; errors of the file are told as such, for whoever asks may be writing another one."""
        *lead, height, width = self.shape
        most = piece_patterns(self)
        buffer = np.empty((min(most, max(1, prod(lead))), height, width), self.dtype)
        ranges = [
            range(*s.indices(n)) for s, n in zip(self.part[:-2], self.source.shape, strict=False)
        ]
        with (
            told_as(SourceError),
            self.source.opened() as file,
        ):  # once: the system sees that it is read on
            for step in steps(lead, most):
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
