"""Stacks of patterns in TIFF and BigTIFF files, stored plainly: without compression, one gray value a pixel.

Pages are looked up through the directories of the file; only where they begin is kept, as runs of equal distance, so
that a stack of any length opens in little memory.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from stem_dask.errors import SourceError
from stem_dask.io.candidate import Candidate, stack_axes
from stem_dask.io.frames import FramedFile, Run
from stem_dask.model import Axis

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _DESCRIPTION, _OFFSETS, _SAMPLES, _ROWS, _COUNTS = (
    256, 257, 258, 259, 270, 273, 277, 278, 279,
)  # fmt: skip
_TILES, _FORMAT = 324, 339
_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # types of entries that are whole numbers
_KINDS = {1: "u", 2: "i", 3: "f"}
_MOST_PAGES, _MOST_RUNS, _MOST_ENTRIES, _MOST_STRIPS = 50_000_000, 1024, 4096, 1 << 20


@dataclass(frozen=True)
class _Page:
    """One pattern: where its pixels begin, and what they are."""

    offset: int
    shape: tuple[int, int]
    dtype: np.dtype
    description: str


class _Reader:
    """Reads directories of a TIFF file, never behind its end."""

    def __init__(self, path: str, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.size = Path(path).stat().st_size
        start = self.take(0, 16 if self.size >= 16 else 8)
        self.order = {b"II": "<", b"MM": ">"}.get(start[:2], "")
        version = struct.unpack_from(self.order + "H", start, 2)[0] if self.order else 0
        if version not in (42, 43):
            raise SourceError(f"{path}: not a TIFF file: it begins with {start[:4]!r}")
        self.big = version == 43
        code, at = ("Q", 8) if self.big else ("I", 4)
        if len(start) < at + struct.calcsize(f"<{code}"):
            self.fail(f"{self.size:,} bytes are fewer than its header has")
        (self.first,) = struct.unpack_from(self.order + code, start, at)

    def fail(self, what: str) -> NoReturn:
        raise SourceError(f"{self.path}: {what}; the file was cut or is damaged")

    def take(self, at: int, n: int) -> bytes:
        if at + n > self.size:
            self.fail(f"a directory or a value lies behind the end of the file, at byte {at:,}")
        self.stream.seek(at)
        return self.stream.read(n)

    def directory(self, at: int) -> tuple[dict[int, tuple[int, int, bytes]], int]:
        """The entries of a page by their tag (type, number of values, bytes of the field), and where the next is."""
        count, entry, end = ("Q", "HHQ8s", "Q") if self.big else ("H", "HHI4s", "I")
        layout = struct.Struct(self.order + entry)
        n_count, n_end = struct.calcsize("<" + count), struct.calcsize("<" + end)
        (n,) = struct.unpack(self.order + count, self.take(at, n_count))
        if not 1 <= n <= _MOST_ENTRIES:
            self.fail(f"the directory at byte {at:,} states {n:,} entries")
        block = self.take(at + n_count, n * layout.size + n_end)
        entries = {}
        for i in range(n):
            tag, *entry_values = layout.unpack_from(block, i * layout.size)
            entries[tag] = tuple(entry_values)
        (following,) = struct.unpack_from(self.order + end, block, n * layout.size)
        return entries, following

    def numbers(self, entries: dict[int, Any], tag: int, default: int | None = None) -> list[int]:
        """The whole numbers of an entry."""
        if tag not in entries:
            if default is None:
                self.fail(f"a page lacks the entry {tag}")
            return [default]
        kind, n, field = entries[tag]
        if kind not in _NUMBERS or not 1 <= n <= _MOST_STRIPS:
            self.fail(f"the entry {tag} of a page has the type {kind} and {n:,} values")
        layout = struct.Struct(f"{self.order}{n}{_NUMBERS[kind]}")
        return list(layout.unpack(self.field(field, layout.size)))

    def field(self, field: bytes, n_bytes: int) -> bytes:
        """The bytes of an entry: in its field, or where that points to."""
        if n_bytes <= len(field):
            return field[:n_bytes]
        (at,) = struct.unpack(self.order + ("Q" if self.big else "I"), field)
        return self.take(at, n_bytes)

    def page(self, entries: dict[int, Any]) -> _Page:
        """What is stored, and where; refused when it is not plain."""
        how = {
            "compression": (self.numbers(entries, _COMPRESSION, 1)[0], 1),
            "values a pixel": (self.numbers(entries, _SAMPLES, 1)[0], 1),
            "tiles": (int(_TILES in entries), 0),
        }
        for what, (has, expected) in how.items():
            if has != expected:
                raise SourceError(
                    f"{self.path}: {what} {has} (expected {expected}): only plain gray stacks are read where they lie; "
                    "save it again without compression, tiles and colours, or convert it to .npy or .zarr"
                )
        bits = self.numbers(entries, _BITS, 1)[0]
        kind = _KINDS.get(self.numbers(entries, _FORMAT, 1)[0])
        if kind is None or bits not in ((16, 32, 64) if kind == "f" else (8, 16, 32, 64)):
            raise SourceError(f"{self.path}: pixels of {bits} bits are not read; save 8, 16 or 32")
        dtype = np.dtype(f"{self.order}{kind}{bits // 8}")
        shape = (self.numbers(entries, _HEIGHT)[0], self.numbers(entries, _WIDTH)[0])
        row_bytes = shape[1] * dtype.itemsize
        offsets = self.numbers(entries, _OFFSETS)
        strip_bytes = min(self.numbers(entries, _ROWS, shape[0])[0], shape[0]) * row_bytes
        if min(shape) < 1 or any(
            at != offsets[0] + i * strip_bytes for i, at in enumerate(offsets)
        ):
            raise SourceError(
                f"{self.path}: the parts of a page do not lie one after another; save it again without strips"
            )
        if len(offsets) * strip_bytes < shape[0] * row_bytes:
            self.fail(f"a page of {shape[0]:,} x {shape[1]:,} has {len(offsets):,} strips only")
        if offsets[0] + shape[0] * row_bytes > self.size:
            self.fail(f"the pixels of a page at byte {offsets[0]:,} end behind the file's end")
        _, n, field = entries.get(_DESCRIPTION, (2, 0, b""))
        text = self.field(field, min(n, 10_000)) if n > len(field) else field[:n]
        return _Page(offsets[0], shape, dtype, text.decode("utf-8", "replace").rstrip("\0"))


def list_tiff(path: str) -> list[Candidate]:
    """The pages of a TIFF file as a stack of patterns.

    Raises
    ------
    SourceError
        When the file is cut or damaged, compressed or tiled, or its pages differ.
    """
    with open(path, "rb") as stream:
        reader = _Reader(path, stream)
        entries, following = reader.directory(reader.first)
        first = reader.page(entries)
        runs, n = [Run(path, first.offset, 0, 1)], 1
        last = reader.first
        while following:
            # directories may lie in any order, but a chain as long as this is a ring
            n += 1
            if n > _MOST_PAGES or following == last:
                reader.fail("the pages form a ring")
            last = following
            entries, following = reader.directory(following)
            page = reader.page(entries)
            if (page.shape, page.dtype) != (first.shape, first.dtype):
                raise SourceError(
                    f"{path}: page {n:,} is {page.shape} {page.dtype}, the first {first.shape} {first.dtype}; patterns "
                    "of one size were expected"
                )
            _append(runs, page.offset)
            if len(runs) > _MOST_RUNS:
                raise SourceError(
                    f"{path}: its pages lie at irregular places; save it again as one series of pages"
                )
    n_bytes = first.shape[0] * first.shape[1] * first.dtype.itemsize
    if n == 1 and (count := _imagej_pages(first.description)) > 1:
        need = first.offset + count * n_bytes
        if need > reader.size:
            reader.fail(f"{count:,} pages need {need:,} bytes, the file has {reader.size:,}")
        runs = [Run(path, first.offset, n_bytes, count)]
    runs = [run if run.stride else Run(path, run.offset, n_bytes, 1) for run in runs]
    source = FramedFile(tuple(runs), first.dtype, first.shape)
    axes = stack_axes(source.shape[0], Axis("ky", first.shape[0]), Axis("kx", first.shape[1]))
    said = {"description": first.description, "pages": source.shape[0]}
    return [Candidate("pages", source, axes, metadata=said)]


def _append(runs: list[Run], offset: int) -> None:
    """One page more: it continues the last run, or begins another."""
    run = runs[-1]
    step = offset - run.offset if run.count == 1 else run.stride
    if step > 0 and offset == run.offset + run.count * step:
        runs[-1] = Run(run.path, run.offset, step, run.count + 1)
    else:
        runs.append(Run(run.path, offset, 0, 1))


def _imagej_pages(description: str) -> int:
    """ImageJ writes one directory for stacks above 4 GB, the pages follow it."""
    found = re.search(r"^images=(\d{1,12})$", description, re.MULTILINE)
    return int(found[1]) if found and description.startswith("ImageJ=") else 1
