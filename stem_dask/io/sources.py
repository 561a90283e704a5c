"""Arrays in files, read a block at a time: what a worker needs to read is small, picklable, and opens by name.

Every source has ``shape``, ``dtype`` and ``source[slices]``, slices with positive steps, and gives a
C-contiguous array. They nest: a selection of a scan made of a list of patterns in a flat file.
"""

import math
import mmap
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import SourceError
from stem_dask.io.absent import present
from stem_dask.io.buffers import buffer_for
from stem_dask.io.damage import told
from stem_dask.io.hdf5_heaps import hdf5_file
from stem_dask.io.object_file import ObjectFile, opened_file
from stem_dask.io.objects import at
from stem_dask.io.publish import named
from stem_dask.kernels.turn import gathering, patterns_first
from stem_dask.urls import is_url

Slices = tuple[slice, ...]
#: what becomes of chunk files of a zarr store that are not there
Missing = Literal["refuse", "zero"]

#: order of axes that makes (scan_y, scan_x, ky, kx) of (ky, kx, scan_y, scan_x)
DETECTOR_FIRST = (2, 3, 0, 1)
#: of whole patterns that are asked for at once in an object store, where parts of them are wanted
REQUEST_BYTES = 2**23
#: why such a file is not read by ranges of bytes
DETECTOR_SLOWEST = "the detector's axes come first in it, so that every pattern is spread over all of it; copy it here first"
#: shorter runs all over a file are not read one by one: a call for each takes longer than to look at its page
MAPPED_RUN_BYTES = 4096


class Source(Protocol):
    """An array in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, slowest first."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the elements, byte order of the file."""

    def __getitem__(self, part: Slices) -> NDArray:
        """Read a part."""


@dataclass(frozen=True)
class FlatFile:
    """Elements one after another in a file, from a byte offset on, the last axis fastest."""

    path: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def __getitem__(self, part: Slices) -> NDArray:
        sizes = [len(range(*s.indices(n))) for s, n in zip(part, self.shape, strict=True)]
        out = buffer_for(self.offset, sizes, self.dtype)
        self.read_into(part, out)
        return out

    def opened(self) -> Any:
        """The file, for several calls of `read_into`; errors name it."""
        with named(self.path):
            return opened_file(self.path, buffered=False)

    def read_into(self, part: Slices, out: NDArray, file: Any = None) -> None:
        """Read a part into an array of its shape and type; from the file as it is `opened`, if it is."""
        sizes = out.shape
        if out.size == 0:
            return
        n_whole = (
            0  # trailing axes that are read whole: one run on disk for each index of the others
        )
        while n_whole < len(self.shape) and sizes[-1 - n_whole] == self.shape[-1 - n_whole]:
            n_whole += 1
        if is_url(self.path) and n_whole < 2 < len(self.shape):
            self._from_whole_patterns(part, out, file)
            return
        n_partial = len(self.shape) - n_whole
        joined = n_partial > 0 and (part[n_partial - 1].step or 1) == 1
        n_outer = n_partial - joined  # neighbours on the last partial axis are one run too
        run_bytes = math.prod(sizes[n_outer:]) * self.dtype.itemsize
        if n_partial > 2 and n_whole < 2 and run_bytes < MAPPED_RUN_BYTES:
            self._mapped(part, out)
            return
        if not out.flags.c_contiguous:  # of several runs in memory
            whole = np.empty_like(out, order="C")
            self.read_into(part, whole, file)
            out[...] = whole
            return
        first = [self.offset]  # byte at which each run begins
        for axis in range(n_outer + joined):
            wanted = range(*part[axis].indices(self.shape[axis]))
            stride = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
            indices = wanted[:1] if axis == n_outer else wanted
            first = [begin + index * stride for begin in first for index in indices]
        content = out.reshape(-1).view(np.uint8).data
        with named(self.path), self.opened() if file is None else nullcontext(file) as there:
            fill = self._fetch if isinstance(there, ObjectFile) else self._fill
            for i, position in enumerate(first):
                fill(there, position, content[i * run_bytes : (i + 1) * run_bytes])

    def _from_whole_patterns(self, part: Slices, out: NDArray, file: Any) -> None:
        """Parts of patterns in an object store: a request takes as long as many bytes do, so whole patterns are asked for."""
        height, width = self.shape[-2:]
        some = max(1, REQUEST_BYTES // (height * width * self.dtype.itemsize))
        *outer, last = (range(*s.indices(n)) for s, n in zip(part[:-2], self.shape, strict=False))
        for place in np.ndindex(*map(len, outer)):
            row = [slice(r[i], r[i] + 1) for r, i in zip(outer, place, strict=True)]
            for start in range(0, len(last), some):
                these = last[start : start + some]
                whole = np.empty((*(1,) * len(row), len(these), height, width), self.dtype)
                there = slice(these.start, these.stop, these.step)
                self.read_into((*row, there, slice(height), slice(width)), whole, file)
                here = (*place, slice(start, start + len(these)))
                out[here] = whole.reshape(-1, height, width)[:, part[-2], part[-1]]

    def _fetch(self, file: ObjectFile, position: int, run: memoryview) -> None:
        if (need := position + len(run)) > file.size:
            raise self._cut(file.size, need)
        file.fill(position, run)

    def _fill(self, file: Any, position: int, run: memoryview) -> None:
        while n := os.preadv(file.fileno(), (run,), position):
            if n == len(run):  # as a rule
                return
            run, position = run[n:], position + n
        raise self._cut(os.fstat(file.fileno()).st_size, position + len(run))

    def _cut(self, size: int, need: int) -> SourceError:
        return SourceError(
            f"{self.path}: the file ends at byte {size:,}, in the middle of the data, "
            f"which need {need:,} bytes; it was cut or is still being written"
        )

    def _mapped(self, part: Slices, out: NDArray) -> None:
        """Scattered elements (detector slowest): let the page cache do it, one index of the first axis at a time.

        Mapped pages count as memory of the process until they are unmapped, and the system maps 64 kB around each.
        """
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        need = self.offset + self.shape[0] * row
        with named(self.path), self.opened() as file:
            if (size := os.fstat(file.fileno()).st_size) < need:
                raise self._cut(size, need)
            for plane, i in zip(out, range(*part[0].indices(self.shape[0])), strict=True):
                at = self.offset + i * row
                inside = at % mmap.ALLOCATIONGRANULARITY
                with mmap.mmap(
                    file.fileno(), inside + row, access=mmap.ACCESS_READ, offset=at - inside
                ) as there:
                    plane[...] = np.ndarray(self.shape[1:], self.dtype, there, inside)[part[1:]]


@dataclass(frozen=True)
class Hdf5Dataset:
    """A dataset of an HDF5 file; ``chunk_bytes`` are those of a chunk when it is decoded, 0 when there are none.

    In ``name`` bytes that are no UTF-8 are escaped as Python escapes those of file names.
    """

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk_bytes: int = 0

    def __getitem__(self, part: Slices) -> NDArray:
        import hdf5plugin  # noqa: F401  registers blosc and others with HDF5

        what = f"{self.path}: dataset {self.name} cannot be read"
        with told(what, retried=True), hdf5_file(self.path) as file:
            name = self.name.encode("utf-8", "surrogateescape")
            return np.asarray(file[name][part])


@dataclass(frozen=True)
class ZarrArray:
    """An array of a zarr store, format 2 or 3; chunk files that are missing are refused, or zeros."""

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    missing: Missing = "refuse"
    chunk_bytes: int = 0  # of a chunk file (a shard, where there are shards) when it is decoded

    def __getitem__(self, part: Slices) -> NDArray:
        from stem_dask.io.chunks import read_part

        return read_part(self.path, self.name, part, zero=self.missing == "zero")


@dataclass(frozen=True)
class Wrapped:
    """A source seen in another way: the numbers stay, and with them their type."""

    source: Source

    @property
    def dtype(self) -> np.dtype:
        """Type of the source."""
        return self.source.dtype


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


def identity(path: str, *more: str) -> tuple[str, int, int]:
    """What tells one state of a file (or of a store's root) from another: name, size, time of change in ns.

    With ``more`` files that belong to it, size and time are sums: when one of them changes, they do.
    """
    file = at(path)
    if file.is_dir():
        roots = [file / name for name in ("zarr.json", ".zgroup", ".zarray", ".zmetadata")]
        file = next((root for root in roots if root.exists()), file)
    stats = [file.stat(), *(at(one).stat() for one in more)]
    return (str(path), sum(s.st_size for s in stats), sum(s.st_mtime_ns for s in stats))


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
