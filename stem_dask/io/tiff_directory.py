"""Directories of TIFF and BigTIFF files: what a page is, and where its strips or tiles lie; no pixel is read."""

import json
import os
import struct
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import SourceError
from stem_dask.io.candidate import by, whole

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _FILL, _DESCRIPTION, _OFFSETS, _SAMPLES, _ROWS, _COUNTS = (
    256, 257, 258, 259, 266, 270, 273, 277, 278, 279,
)  # fmt: skip
_PLANAR, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _FORMAT = (
    284, 317, 322, 323, 324, 325, 339,
)  # fmt: skip
_DEPTH = 32997  # of SGI, and of tifffile's volumetric pages
_NUMBERS = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}  # types of entries that are whole numbers
_KINDS = {1: "u", 2: "i", 3: "f"}
_MOST_ENTRIES, _MOST_PARTS = 4096, 1 << 16
#: more bytes than this never come out of one: LZW without a clear code makes 3,838 of 12 bits, deflate 1,032 of one
_MOST_EXPANDED = 2600
_MOST_EXPANDED_BY = {34925: 10_000, 50000: 40_000}
#: compressions that are read, by their code
READ = {
    1: "none",
    5: "LZW",
    8: "deflate",
    32946: "deflate",
    32773: "PackBits",
    34925: "LZMA",
    50000: "Zstandard",
}
#: elsewhere the tag means nothing to libtiff, which writes it all the same, and differences to tifffile
_PREDICTED = (5, 8, 32946, 34925, 50000)
_OTHERS = {
    2: "CCITT", 3: "CCITT", 4: "CCITT", 6: "JPEG", 7: "JPEG", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000",
    34887: "LERC", 34933: "PNG", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_REMEDY = "save it again as plain gray pages (uncompressed, deflate, LZW, Zstandard), or convert it to .npy or .zarr"


@dataclass(frozen=True)
class Page:
    """One pattern (ky, kx): what its pixels are, and the place and length of each part (a strip or a tile).

    ``part`` are rows and columns of a part; the last strip has as many rows as are left, a tile has all of them.
    Of bool the pixels are packed, eight a byte, each row from a new one on. A directory may describe several
    ``planes``, which lie one behind the other; each is a pattern.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    compression: int
    predictor: int
    tiled: bool
    part: tuple[int, int]
    offsets: NDArray
    counts: NDArray
    description: str
    planes: int = 1

    def plane(self, number: int) -> "Page":
        """One of the planes."""
        if self.planes == 1:
            return self
        n = self.grid[0] * self.grid[1]
        some = slice(number * n, (number + 1) * n)
        return replace(self, offsets=self.offsets[some], counts=self.counts[some], planes=1)

    @property
    def grid(self) -> tuple[int, int]:
        """Parts from top to bottom and from left to right."""
        return -(-self.shape[0] // self.part[0]), -(-self.shape[1] // self.part[1])

    def stored(self, number: int) -> tuple[int, int]:
        """Rows and columns that a part has in the file."""
        top = number // self.grid[1] * self.part[0]
        rows = self.part[0] if self.tiled else min(self.part[0], self.shape[0] - top)
        return rows, self.part[1]

    def n_bytes(self, number: int) -> int:
        """What a part decodes to."""
        rows, columns = self.stored(number)
        return rows * (
            -(-columns // 8) if self.dtype.kind == "b" else columns * self.dtype.itemsize
        )

    @property
    def is_plain(self) -> bool:
        """Whether the pixels lie one after another as they are."""
        step = self.part[0] * self.part[1] * self.dtype.itemsize
        in_order = self.compression == 1 and bool(np.all(np.diff(self.offsets) == step))
        return in_order and not self.tiled and self.dtype.kind != "b"


class Directories:
    """Reads the directories of a file, never behind its end.

    Raises
    ------
    SourceError
        When it is no TIFF file; by each function, when the file is cut, damaged, or of a kind that is not read.
    """

    def __init__(self, path: str, stream: BinaryIO, planes: int = 1) -> None:
        self.path, self.stream, self.planes = path, stream, planes
        self.size = os.fstat(stream.fileno()).st_size
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
        """Refuse the file."""
        raise SourceError(f"{self.path}: {what}; the file was cut or is damaged")

    def take(self, at: int, n: int) -> bytes:
        """Bytes of the file."""
        if at + n > self.size:
            self.fail(f"a directory or a value lies behind the end of the file, at byte {at:,}")
        self.stream.seek(at)
        return self.stream.read(n)

    def read(self, at: int) -> tuple[dict[int, tuple[int, int, bytes]], int]:
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

    def _number(self, entries: dict[int, Any], tag: int, default: int | None = None) -> int:
        """The first whole number of an entry."""
        if tag not in entries and default is not None:
            return default
        return int(self._numbers(entries, tag)[0])

    def _numbers(self, entries: dict[int, Any], tag: int) -> NDArray:
        """The whole numbers of an entry, uint64."""
        if tag not in entries:
            self.fail(f"a page lacks the entry {tag}")
        kind, n, field = entries[tag]
        if kind not in _NUMBERS or not 1 <= n <= _MOST_PARTS:
            self.fail(f"the entry {tag} of a page has the type {kind} and {n:,} values")
        dtype = np.dtype(self.order + _NUMBERS[kind])
        return np.frombuffer(self._field(field, n * dtype.itemsize), dtype).astype(np.uint64)

    def _field(self, field: bytes, n_bytes: int) -> bytes:
        """The bytes of an entry: in its field, or where that points to."""
        if n_bytes <= len(field):
            return field[:n_bytes]
        (at,) = struct.unpack(self.order + ("Q" if self.big else "I"), field)
        return self.take(at, n_bytes)

    def page(self, entries: dict[int, Any]) -> Page:
        """What a directory describes."""
        compression, predictor = self._coding(entries)
        bits = self._number(entries, _BITS, 1)
        kind = _KINDS.get(self._number(entries, _FORMAT, 1))
        known = {"f": (16, 32, 64), "i": (8, 16, 32, 64), "u": (1, 8, 16, 32, 64)}
        if kind is None or bits not in known[kind] or (bits == 1 and predictor != 1):
            what = "complex numbers" if kind is None else f"pixels of {bits} bits"
            raise SourceError(
                f"{self.path}: {what} are not read; save real ones of 8, 16 or 32 bits"
            )
        kind, bits = ("b", 8) if bits == 1 else (kind, bits)
        if predictor == 3 and kind != "f":
            self.fail(
                f"predictor 3 is for real numbers, and the pixels are integers of {bits} bits"
            )
        shape = (self._number(entries, _HEIGHT), self._number(entries, _WIDTH))
        tiled = _TILE_OFFSETS in entries
        if tiled:
            height, width = (self._number(entries, tag) for tag in (_TILE_HEIGHT, _TILE_WIDTH))
        else:
            height, width = min(self._number(entries, _ROWS, shape[0]), shape[0]), shape[1]
        if min(*shape, height, width) < 1:
            self.fail(f"a page is {by(shape)} pixels, in parts of {by((height, width))}")
        offsets = self._numbers(entries, _TILE_OFFSETS if tiled else _OFFSETS)
        tag = _TILE_COUNTS if tiled else _COUNTS
        counts = self._numbers(entries, tag) if tag in entries else np.empty(0, np.uint64)
        _, n, field = entries.get(_DESCRIPTION, (2, 0, b""))
        text = self._field(field, min(n, 10_000)).decode("utf-8", "replace").rstrip("\0")
        dtype = np.dtype(f"{self.order}{kind}{bits // 8}")
        planes = self._planes(entries, text)
        page = Page(shape, dtype, compression, predictor, tiled, (height, width), offsets, counts, text, planes)  # fmt: skip
        for i in range(planes):
            self._check(page.plane(i))
        return page

    def _planes(self, entries: dict[int, Any], text: str) -> int:
        """Values a pixel: 1, or as many planes as the patterns of a scan line that tifffile took for colours.

        It does so when there are 3 or 4 of them, and its description has the shape that was meant.
        """
        if (depth := self._number(entries, _DEPTH, 1)) != 1:
            raise SourceError(
                f"{self.path}: a page is a volume of {depth:,} slices, which is not read; {_REMEDY}"
            )
        n = self._number(entries, _SAMPLES, 1)
        if n != 1 and self.planes == 1 and len(shape := stated_shape(text)) > 2 and shape[-3] == n:
            self.planes = n
        apart = n == 1 or self._number(entries, _PLANAR, 1) == 2
        if n != self.planes or not apart:
            raise SourceError(
                f"{self.path}: {n} values a pixel (expected 1) are not read; {_REMEDY}"
            )
        return n

    def _coding(self, entries: dict[int, Any]) -> tuple[int, int]:
        """Compression and predictor; refused when they are none that is read, or the page has colours."""
        compression = self._number(entries, _COMPRESSION, 1)
        if compression not in READ:
            name = _OTHERS.get(compression, "unknown")
            raise SourceError(
                f"{self.path}: a page is compressed by {name} (compression {compression}), which is not read; {_REMEDY}"
            )
        predictor = self._number(entries, _PREDICTOR, 1)
        if predictor not in ((1, 2, 3) if compression in _PREDICTED else (1,)):
            raise SourceError(
                f"{self.path}: a page has the predictor {predictor} with the compression {READ[compression]}, which programs "
                f"understand in different ways; {_REMEDY}"
            )
        if (has := self._number(entries, _FILL, 1)) != 1:
            raise SourceError(
                f"{self.path}: order of the bits in a byte {has} (expected 1) is not read; {_REMEDY}"
            )
        return compression, predictor

    def _check(self, page: Page) -> None:
        """What the parts claim, compared with the file."""
        n, shape = page.grid[0] * page.grid[1], by(page.shape)
        parts = "tiles" if page.tiled else "strips"
        if len(page.offsets) < n:
            self.fail(f"a page of {shape} has {len(page.offsets):,} {parts} only")
        if page.compression != 1 and len(page.counts) < n:
            self.fail(f"a page of {shape} has the lengths of {len(page.counts):,} {parts} only")
        if page.is_plain:
            n_bytes = page.shape[0] * page.shape[1] * page.dtype.itemsize
            if page.offsets[0] + n_bytes > self.size:
                self.fail(f"the pixels of a page at byte {page.offsets[0]:,} end behind the file's end")  # fmt: skip
            return
        # all but the last are of one size
        for some in (slice(0, n - 1), slice(n - 1, n)):
            self._check_parts(page, some, page.n_bytes(some.stop - 1))

    def _check_parts(self, page: Page, some: slice, n_bytes: int) -> None:
        """Of parts that decode to so many bytes: whether they lie in the file, and can be as few bytes as they are."""
        offsets = page.offsets[some]
        if not offsets.size:
            return
        counts = np.full_like(offsets, min(n_bytes, self.size + 1))
        if page.compression != 1:
            counts = page.counts[some]
            most = _MOST_EXPANDED_BY.get(page.compression, _MOST_EXPANDED)
            if n_bytes > (shortest := int(counts.min())) * most:
                self.fail(f"a part of a page claims {n_bytes:,} bytes of {shortest:,} compressed ones")  # fmt: skip
        size = np.uint64(self.size)
        if (offsets > size).any() or (counts > size - offsets).any():
            self.fail("a part of a page ends behind the file's end")


def stated_shape(description: str) -> list[int]:
    """The shape that tifffile notes in the first page; empty when there is none.

    Examples
    --------
    >>> stated_shape('{"shape": [3, 4, 64, 64]}')
    [3, 4, 64, 64]
    """
    if not description.startswith('{"shape":'):
        return []
    try:
        shape = json.loads(description).get("shape")
    except (ValueError, RecursionError):
        return []
    sizes = [whole(n) for n in shape] if isinstance(shape, list) else []
    return [] if None in sizes else [n for n in sizes if n is not None]
