"""Uncompressed arrays in files: one after another (`FlatFile`), or each behind a header (`FramedFile`)."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.readers.source import Reading, Slices, as_raw
from stem_dask.storage.errors import translate
from stem_dask.storage.location import ObjectFile, at, is_url, opened_file

#: bytes per request to an object store
REQUEST_BYTES = 2**23

#: shorter runs are read through a memory map: a system call for each would take longer
MAPPED_RUN_BYTES = 4096


@dataclass(frozen=True)
class FlatFile:
    """An array in a file, from a byte offset on; C-contiguous, unless indices of the first axis are ``stride`` bytes apart."""

    path: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    stride: int = 0
    reading: ClassVar = Reading(in_pieces=True)

    def __getitem__(self, part: Slices) -> NDArray:
        sizes = [len(range(*s.indices(n))) for s, n in zip(part, self.shape, strict=True)]
        out = buffer_for(self.offset, sizes, self.dtype)
        self.read_into(part, out)
        return out

    def opened(self) -> Any:
        """The open file, for several calls of `read_into`."""
        return opened_file(self.path, buffered=False)

    def read_into(self, part: Slices, out: NDArray, file: Any = None) -> None:
        """Read a part into an array of its shape and type, from an `opened` file if given."""
        sizes, n_axes, apart = out.shape, len(self.shape), self.stride > 0
        if out.size == 0:
            return
        n_whole = 0  # trailing axes that are read whole: one run for each index of the others
        while n_whole < n_axes - apart and sizes[-1 - n_whole] == self.shape[-1 - n_whole]:
            n_whole += 1
        n_partial = n_axes - n_whole
        joined = n_partial > apart and (part[n_partial - 1].step or 1) == 1
        n_outer = n_partial - joined  # neighbors on the last partial axis are one run, too
        run_bytes = prod(sizes[n_outer:]) * self.dtype.itemsize
        if is_url(self.path) and (apart or n_whole < 2 < n_axes):
            self._from_store(part, out)
            return
        if n_partial > 2 and n_whole < 2 and run_bytes < MAPPED_RUN_BYTES:
            self._mapped(part, out)
            return
        if not out.flags.c_contiguous:
            whole = np.empty_like(out, order="C")
            self.read_into(part, whole, file)
            out[...] = whole
            return
        first = [self.offset]  # byte at which each run begins
        for axis in range(n_outer + joined):
            wanted = range(*part[axis].indices(self.shape[axis]))
            stride = prod(self.shape[axis + 1 :]) * self.dtype.itemsize
            stride = self.stride if apart and axis == 0 else stride
            indices = wanted[:1] if axis == n_outer else wanted
            first = [begin + index * stride for begin in first for index in indices]
        content = out.reshape(-1).view(np.uint8).data
        with self.opened() if file is None else nullcontext(file) as there:
            for i, position in enumerate(first):
                self._fill(there, position, content[i * run_bytes : (i + 1) * run_bytes])

    def _from_store(self, part: Slices, out: NDArray) -> None:
        """Parts of patterns in an object store: several whole ones per request, whose latency dominates."""
        *lead, height, width = self.shape
        n_bytes = height * width * self.dtype.itemsize
        stride = self.stride or n_bytes
        *outer, last = (range(n)[s] for n, s in zip(lead, part, strict=False))
        at_once = max(1, REQUEST_BYTES // (stride * last.step))
        with self.opened() as file:
            for place in np.ndindex(*map(len, outer)):
                row = 0
                for n, indices, i in zip(lead, outer, place, strict=False):
                    row = row * n + indices[i]
                for start in range(0, len(last), at_once):
                    some = last[start : start + at_once]
                    content = np.empty((some[-1] - some[0]) * stride + n_bytes, np.uint8)
                    first = row * lead[-1] + some[0]
                    file.fill(self.offset + first * stride, content.data)
                    for i, frame in enumerate(some, start):
                        pixels = content[(frame - some[0]) * stride :][:n_bytes].view(self.dtype)
                        out[(*place, i)] = pixels.reshape(height, width)[part[-2:]]

    def _mapped(self, part: Slices, out: NDArray) -> None:
        """Scattered elements (detector first), one index of the first axis at a time to bound the mapped memory."""
        n_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        stride = self.stride or n_bytes
        wanted = range(*part[0].indices(self.shape[0]))
        need = self.offset + (wanted[-1] if self.stride else self.shape[0] - 1) * stride + n_bytes
        with self.opened() as file:
            if (size := os.fstat(file.fileno()).st_size) < need:
                raise self._cut(size, need)
            for plane, i in zip(out, wanted, strict=True):
                at = self.offset + i * stride
                inside = at % mmap.ALLOCATIONGRANULARITY
                where = {"offset": at - inside, "access": mmap.ACCESS_READ}
                try:
                    mapped = mmap.mmap(file.fileno(), inside + n_bytes, **where)
                except ValueError:  # the file was cut since its size was looked at
                    raise self._cut(os.fstat(file.fileno()).st_size, need) from None
                with mapped as there:
                    plane[...] = np.ndarray(self.shape[1:], self.dtype, there, inside)[part[1:]]

    def _fill(self, file: Any, position: int, run: memoryview) -> None:
        if isinstance(file, ObjectFile):
            if (need := position + len(run)) > file.size:
                raise self._cut(file.size, need)
            file.fill(position, run)
            return
        while n := os.preadv(file.fileno(), (run,), position):
            if n == len(run):
                return
            run, position = run[n:], position + n
        raise self._cut(os.fstat(file.fileno()).st_size, position + len(run))

    def _cut(self, size: int, need: int) -> SourceError:
        where = f"the middle of the data, which need {need:,} bytes"
        if self.stride:
            where = f"pattern {max(0, size - self.offset) // self.stride:,}"
        return SourceError(
            f"{self.path}: the file ends at byte {size:,}, in {where}; it was cut or is still being written"
        )


@dataclass(frozen=True)
class Run:
    """``count`` patterns of a file: pattern i begins at byte ``offset + i * stride``, after a header of ``lead`` bytes."""

    path: str
    offset: int
    stride: int
    count: int
    lead: int = 0


@dataclass(frozen=True)
class FramedFile:
    """A stack (n, ky, kx) of patterns in one or more runs; ``frame_shape`` is (ky, kx).

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
    reading: ClassVar = Reading(in_pieces=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ky, kx)."""
        return (sum(run.count for run in self.runs), *self.frame_shape)

    def __getitem__(self, part: Slices) -> NDArray:
        ranges = [range(*s.indices(n)) for s, n in zip(part, self.shape, strict=True)]
        out = buffer_for(self.runs[0].offset, [len(one) for one in ranges], self.dtype)
        (frames, rows, columns), start = ranges, 0
        by_rows = columns != range(self.frame_shape[1])  # one run of whole rows is read faster
        lines = np.empty((1, len(rows), self.frame_shape[1]), self.dtype)
        for run in self.runs:
            first, last = bisect_left(frames, start), bisect_left(frames, start + run.count)
            file = FlatFile(
                run.path, run.offset, self.dtype, (run.count, *self.frame_shape), run.stride
            )
            if out.size and first < last:
                with translate(SourceError, run.path), file.opened() as opened:
                    there = slice(frames[first] - start, frames[last - 1] - start + 1, frames.step)
                    if not by_rows or is_url(run.path):
                        file.read_into((there, *part[1:]), out[first:last], opened)
                        first = last
                    for i in range(first, last):
                        frame = slice(frames[i] - start, frames[i] - start + 1)
                        file.read_into((frame, part[1], slice(None)), lines, opened)
                        out[i] = lines[0, :, part[2]]
            start += run.count
        return out


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
    """The complete patterns (ky, kx) of a file from byte ``offset`` on, and a note on bytes that are left over.

    Patterns are ``stride`` bytes apart, each after a header of ``lead`` bytes. If they are ``marked``, `refuse_sheared` can
    check the sizes.
    """
    n_bytes = prod(frame_shape) * dtype.itemsize
    if min(frame_shape) < 1 or stride < lead + n_bytes:
        raise SourceError(
            f"{path}: the header says patterns of {frame_shape[0]:,} x {frame_shape[1]:,} {dtype} every {stride:,} "
            "bytes, which cannot be; it is damaged, or of another format"
        )
    after = at(path).stat().st_size - offset
    # the last pattern may lack its footer
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
    note = f"{rest:,} bytes after pattern {count:,} are less than a pattern; not read"
    source = FramedFile((Run(path, offset + lead, stride, count, lead),), dtype, frame_shape)
    return source, (note,) if rest else ()


def refuse_sheared(source: FramedFile, lead: int, mark: bytes) -> None:
    """Check that the second and the last pattern of a file begin with the ``mark`` of the first, ``lead`` bytes before the pixels."""
    run = source.runs[0]
    with translate(SourceError, run.path), opened_file(run.path) as file:
        for i in {min(1, run.count - 1), run.count - 1}:
            place = run.offset - lead + i * run.stride
            file.seek(place)
            whole = file.read(min(run.stride, 2**24))
            found = whole[: len(mark)]
            if found != mark and any(whole):  # zeros: reserved on the disk, and never written
                raise SourceError(
                    f"{run.path}: by the sizes in the header pattern {i:,} begins at byte {place:,}, but {found!r} is there "
                    f"instead of {mark!r}; a size is wrong, or the file is damaged"
                )


def buffer_for(offset: int, shape: Sequence[int], dtype: np.dtype) -> NDArray:
    """A new C-contiguous array, placed so that bytes from this file offset are read into it fast.

    Linux copies by ``rep movsb``, which on AMD Zen 3 takes three to four times as long (measured) when the target is 1 to
    31 bytes farther into its page than the source; arrays of numpy often begin 16 bytes into a page.
    """
    n_bytes = prod(shape) * dtype.itemsize
    spare = np.empty(n_bytes + 64, np.uint8)
    # 33 to 48 bytes farther than the source, modulo a cache line of 64
    first = (offset // 16 * 16 + 48 - spare.ctypes.data) % 64
    return spare[first : first + n_bytes].view(dtype).reshape(shape)
