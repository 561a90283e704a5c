"""Cameras' files: patterns at regular places, each behind a header of its own, in one file or in a series of them.

And the small sources that change how another one is seen: top to bottom, or without its axes of length 1.
"""

import itertools
from bisect import bisect_left
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import SourceError
from stem_dask.io.buffers import buffer_for
from stem_dask.io.candidate import as_raw
from stem_dask.io.object_file import ObjectFile, opened_file
from stem_dask.io.objects import at
from stem_dask.io.publish import named
from stem_dask.io.sources import REQUEST_BYTES, Slices, Wrapped
from stem_dask.urls import is_url

#: bytes of a pattern that are looked at to see whether it was ever written
_MOST_LOOKED_AT = 2**24


@dataclass(frozen=True)
class Run:
    """``count`` patterns of a file: pattern i begins at byte ``offset + i * stride``, behind a header of ``lead`` bytes."""

    path: str
    offset: int
    stride: int
    count: int
    lead: int = 0


@dataclass(frozen=True)
class FramedFile:
    """A stack (n, ky, kx) of patterns that lie in runs, one after another; ``frame_shape`` is (ky, kx).

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(b"".join(b"head" + bytes([i] * 6) for i in range(5)))
    ...     file.flush()
    ...     frames = FramedFile((Run(file.name, 4, 10, 5),), np.dtype("u1"), (2, 3))
    ...     frames[1:4:2, :1, :].tolist()
    [[[1, 1, 1]], [[3, 3, 3]]]
    """

    runs: tuple[Run, ...]
    dtype: np.dtype
    frame_shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ky, kx)."""
        return (sum(run.count for run in self.runs), *self.frame_shape)

    def __getitem__(self, part: Slices) -> NDArray:
        frames, rows, columns = (
            range(*s.indices(n)) for s, n in zip(part, self.shape, strict=True)
        )
        shape = (len(frames), len(rows), len(columns))
        out = buffer_for(self.runs[0].offset, shape, self.dtype)
        if out.size == 0:
            return out
        width = self.frame_shape[1]
        as_stored = columns == range(width) and rows.step == 1
        lines = np.empty((rows[-1] - rows[0] + 1, width), self.dtype)  # those rows, read as one run
        skipped = rows[0] * width * self.dtype.itemsize
        starts = itertools.accumulate((run.count for run in self.runs), initial=0)
        for run, start in zip(self.runs, starts, strict=False):
            first, last = bisect_left(frames, start), bisect_left(frames, start + run.count)
            if first == last:
                continue
            if is_url(run.path):
                some = frames[first:last]
                there = range(some.start - start, some.stop - start, some.step)
                self._from_store(run, there, part, out[first:last])
                continue
            with named(run.path), open(run.path, "rb", buffering=0) as file:
                for i in range(first, last):
                    target = out[i] if as_stored else lines
                    file.seek(run.offset + (frames[i] - start) * run.stride + skipped)
                    view = target.reshape(-1).view(np.uint8).data
                    while view:
                        n = file.readinto(view)
                        if not n:
                            raise _cut(run.path, file.seek(0, 2), frames[i])
                        view = view[n:]
                    if not as_stored:
                        where = slice(columns.start, columns.stop, columns.step)
                        out[i] = lines[:: rows.step, where]
        return out

    def _from_store(self, run: Run, frames: range, part: Slices, out: NDArray) -> None:
        """Patterns of a run in an object store: whole, and some with each request, which takes as long as many bytes do."""
        n_bytes = prod(self.frame_shape) * self.dtype.itemsize
        file, n = ObjectFile(run.path), max(1, REQUEST_BYTES // (run.stride * frames.step))
        for begin in range(0, len(frames), n):
            some = frames[begin : begin + n]
            content = np.empty((some[-1] - some[0]) * run.stride + n_bytes, np.uint8)
            file.fill(run.offset + some[0] * run.stride, content.data)
            for i, frame in enumerate(some, begin):
                pixels = content[(frame - some[0]) * run.stride :][:n_bytes].view(self.dtype)
                out[i] = pixels.reshape(self.frame_shape)[part[1:]]


def _cut(path: str, size: int, frame: int) -> SourceError:
    return SourceError(
        f"{path}: the file ends at byte {size:,}, in pattern {frame:,}; it was cut or is still being written"
    )


def framed(
    path: str,
    offset: int,
    stride: int,
    dtype: np.dtype,
    frame_shape: tuple[int, int],
    lead: int = 0,
    *,
    marked: bool = True,
) -> tuple[FramedFile, tuple[str, ...]]:
    """The patterns that a file has from ``offset`` on, as many as it holds whole, and a note on what is left over.

    Parameters
    ----------
    path : name of the file
    offset : byte at which the first pattern, or the header before it, begins
    stride : bytes from one pattern to the next, its header included
    dtype : type of a pixel, in the byte order of the file
    frame_shape : (ky, kx)
    lead : bytes of the header before each pattern
    marked : whether the file marks where each pattern begins, so that `refuse_sheared` can check the sizes

    Raises
    ------
    SourceError
        When a size is impossible, not one pattern is complete, or the patterns are not marked and the bytes left over
        are the same number for each.
    """
    n_bytes = prod(frame_shape) * dtype.itemsize
    if min(frame_shape) < 1 or stride < lead + n_bytes:
        raise SourceError(
            f"{path}: the header says patterns of {frame_shape[0]:,} x {frame_shape[1]:,} {dtype} every {stride:,} "
            "bytes, which cannot be; it is damaged, or of another format"
        )
    after = at(path).stat().st_size - offset
    # what follows the pixels may be missing from the last pattern
    count = (after - lead - n_bytes) // stride + 1 if after >= lead + n_bytes else 0
    if count == 0:
        raise SourceError(
            f"{path}: the header says patterns of {n_bytes:,} bytes, but {max(0, after - lead):,} bytes follow; the file "
            "was cut, or the header is damaged"
        )
    rest = max(0, after - count * stride)
    if rest and count > 1 and rest % count == 0 and not marked:
        raise SourceError(
            f"{path}: {rest // count:,} bytes more at each of {count:,} patterns than the header says: a longer header or a "
            f"footer; {as_raw(path, (count, *frame_shape), dtype, offset, lead, rest // count)}"
        )
    notes = (
        (f"{rest:,} bytes after pattern {count:,} are less than a pattern; not read",)
        if rest
        else ()
    )
    return FramedFile((Run(path, offset + lead, stride, count, lead),), dtype, frame_shape), notes


def refuse_sheared(source: FramedFile, lead: int, mark: bytes) -> None:
    """The second and the last pattern must begin with the mark of the first: else a size in the header is wrong.

    Parameters
    ----------
    source : patterns of one file
    lead : bytes of the header before each pattern
    mark : bytes that each of these headers begins with

    Raises
    ------
    SourceError
        When one of them does not; read all the same, patterns would be shifted one against the other.
    """
    run = source.runs[0]
    with named(run.path), opened_file(run.path) as file:
        for i in {min(1, run.count - 1), run.count - 1}:
            place = run.offset - lead + i * run.stride
            file.seek(place)
            whole = file.read(min(run.stride, _MOST_LOOKED_AT))
            found = whole[: len(mark)]
            if found != mark and any(whole):  # zeros: reserved on the disk, and never written
                raise SourceError(
                    f"{run.path}: by the sizes in the header pattern {i:,} begins at byte {place:,}, but {found!r} is there "
                    f"instead of {mark!r}; a size is wrong, or the file is damaged"
                )


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
