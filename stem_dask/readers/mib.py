"""Quantum Detectors Merlin (.mib, with its .hdr): patterns of big-endian counts, each after a text header.

Rows keep the order of the file; RosettaSciIO and HyperSpy flip them.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import stated, whole
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers.flat import framed, refuse_sheared
from stem_dask.readers.source import (
    Candidate,
    Reading,
    Slices,
    Source,
    Wrapped,
    header_of,
    reading_of,
    scan_axes,
    side_text,
    stack,
)
from stem_dask.readers.views import View
from stem_dask.storage.errors import one_line
from stem_dask.storage.location import at, opened_file

_FIRST = 384  # bytes of the shortest header; longer ones state their length

#: types of the counts, and in the raw mode (R64) by bits of the counters
_DTYPES, _RAW = {"U08": "u1", "U16": ">u2", "U32": ">u4"}, {1: "u1", 6: "u1", 12: ">u2", 24: ">u2"}

#: the first words of a pattern's header
_NAMES = ("identifier", "number", "header bytes", "chips", "width", "height", "type", "layout", "chip select",
          "time", "exposure (s)", "counter", "colour", "gain")  # fmt: skip

_ROWS = "rows are in the order of the file; RosettaSciIO and HyperSpy flip them, as input.flip: true does"

_QUAD = "raw counts of 2x2 chips are arranged as Merlin does with Raw Mode off; pyxem shows them rotated by 180°"


@dataclass(frozen=True)
class RawCounts(Wrapped):
    """Patterns (n, ky, kx) in raw mode, whose source has the rows as stored.

    In each word of 64 bits the last pixel comes first; 1-bit counters are packed, eight pixels per byte. Counts of 24 bits are
    two halves of 12 bits, one below the other, the higher one first (LiberTEM, ``decode_r24_swap`` in libertem/io/dataset/mib.py).
    Of 2x2 chips (``quad``) a row holds the lower right, lower left, upper right and upper left one; the lower ones are mounted
    upside down. LiberTEM found this by comparing raw with other patterns of the same beam
    (https://github.com/LiberTEM/LiberTEM/issues/1135).
    """

    bits: int
    quad: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ky, kx)."""
        n, height, width = self.source.shape
        width *= 8 if self.bits == 1 else 1
        if self.quad:
            return (n, 2 * height, width // 4 * 2)
        return (n, height // 2 if self.bits == 24 else height, width)

    @property
    def dtype(self) -> np.dtype:
        """Of the source; of 24 bits uint32."""
        return np.dtype(np.uint32) if self.bits == 24 else self.source.dtype

    @property
    def reading(self) -> Reading:
        """As of the source, and the copies below."""
        inner = reading_of(self.source)
        return replace(inner, copies=inner.copies + 2)

    def __getitem__(self, part: Slices) -> NDArray:
        stored = self.source[(part[0], slice(None), slice(None))]
        n_words = stored.shape[2] * stored.itemsize // 8
        words = stored.reshape(*stored.shape[:2], n_words, 8 // stored.itemsize)
        pixels = words[..., ::-1].reshape(stored.shape)
        if self.bits == 1:
            pixels = np.unpackbits(pixels, axis=-1, bitorder="little")
        if self.bits == 24:
            high, low = np.split(pixels.astype(self.dtype), 2, axis=1)
            pixels = (high << 12) + low
        if self.quad:
            lower_right, lower_left, upper_right, upper_left = np.split(pixels, 4, axis=2)
            n, height, width = upper_left.shape
            pixels = np.empty((n, 2 * height, 2 * width), self.dtype)
            pixels[:, :height, :width], pixels[:, :height, width:] = upper_left, upper_right
            pixels[:, height:, :width] = lower_left[:, ::-1, ::-1]
            pixels[:, height:, width:] = lower_right[:, ::-1, ::-1]
        return np.ascontiguousarray(pixels[:, part[1], part[2]])


def list_mib(path: str) -> list[Candidate]:
    """The stack of patterns of a .mib file, one for each counter (threshold), and its scan when the .hdr states one.

    The scan is ``ScanX`` and ``ScanY``, or the frames divided into lines of ``Frames per Trigger``.
    """
    words = header_of(path, _FIRST, "a Merlin pattern").decode("latin-1").split(",")
    if words[0] != "MQ1" or len(words) < 8:
        raise SourceError(
            f"{path}: not a Merlin .mib file: it begins with {words[0][:12]!r}, where MQ1 was expected"
        )
    length, width, height = (whole(words[i]) or 0 for i in (2, 4, 5))
    if length < _FIRST or not width or not height or max(length, width, height) > 1 << 16:
        raise SourceError(
            f"{path}: the Merlin header states {words[2][:12]!r} bytes, a width of {words[4][:12]!r} and a height of "
            f"{words[5][:12]!r}; it is damaged"
        )
    kind = words[6].strip()
    bits, dtype, rows, columns, quad = 0, np.dtype(_DTYPES.get(kind, "u1")), height, width, False
    if kind == "R64":
        bits, quad = _raw_mode(path, words, length, height, width)
        dtype = np.dtype(_RAW[bits])
        # of 24 bits the header states both halves side by side; they are stored one after the other
        rows, columns = (2 * height, width // 2) if bits == 24 else (height, width)
        columns //= 8 if bits == 1 else 1
    elif kind not in _DTYPES:
        raise SourceError(
            f"{path}: the counts are stored as {kind[:12]!r}; of Merlin's modes {', '.join(_DTYPES)} and R64 can be read"
        )
    stride = length + rows * columns * dtype.itemsize
    stored, notes = framed(path, 0, stride, dtype, (rows, columns), lead=length)
    refuse_sheared(stored, length, b"MQ1,")
    source: Source = RawCounts(stored, bits, quad) if bits else stored
    fields = dict(zip(_NAMES, (word.strip() for word in words), strict=False))
    header: dict[str, Any] = {"pattern": fields}
    # the time in the longer headers is in UTC
    stamp = re.search(r"\d{4}-\d{2}-\d{2}T[\d:.]+Z", ",".join(words))
    about = stated("Merlin", {**header, "timestamp": stamp[0] if stamp else "".join(words[9:10])})
    with opened_file(path) as file:
        file.seek(stride)
        second = file.read(_FIRST).decode("latin-1").split(",")
    counters = ["".join(one[11:12]).strip() for one in (words, second) if one[0] == "MQ1"]
    found = [("patterns", source)]
    if sorted(counters) == ["0", "1"]:  # patterns of two counters alternate
        every = (slice(None), slice(None))
        parts = [View.of(source).select(slice(i, None, 2), *every) for i in (0, 1)]
        found = [(f"counter {n}", part) for n, part in zip(counters, parts, strict=True)]
    scan, stem = None, path[: -len(Path(path).suffix)]  # of a URL, too
    files = tuple(stem + end for end in (".hdr", ".HDR") if at(stem + end).is_file())[:1]
    if files:
        header["hdr"] = settings = dict[str, str]()
        for line in side_text(files[0]).splitlines():
            name, tab, value = line.partition("\t")
            if tab and not name.startswith(("HDR", "End")):  # the first of two equal names counts
                settings.setdefault(name.strip().rstrip(":"), value.strip())
        scan = scan_axes(settings.get("ScanY"), settings.get("ScanX"))
        frames = whole(settings.get("Frames in Acquisition (Number)"))
        n = whole(settings.get("Frames per Trigger (Number)"))
        # one frame per trigger does not tell the length of a line
        if not {"ScanX", "ScanY"} <= settings.keys() and frames and n and n > 1:
            scan = scan_axes(frames // n, n) if frames % n == 0 else None
    ky, kx = (Axis("k", n) for n in source.shape[1:])
    more = {
        "metadata": header,
        "scan": scan,
        "notes": (*notes, *((_QUAD,) if quad else ()), _ROWS),
        "files": files,
        "about": about,
    }
    return [stack(one, ky, kx, name, **more) for name, one in found]


def _raw_mode(
    path: str, words: list[str], length: int, height: int, width: int
) -> tuple[int, bool]:
    """Bits of a counter, the last word of the header, and whether there are 2x2 chips."""
    header = header_of(path, length, "a Merlin pattern").decode("latin-1")
    stripped = [word.strip("\0 \r\n") for word in header.split(",")]
    bits = whole([word for word in stripped if word][-1]) or 0
    layout, chips = words[7].strip(), whole(words[3])
    quad = (chips, layout.rstrip("G")) == (4, "2x2") and width == 4 * height and bits != 24
    single = (chips, layout.rstrip("G")) == (1, "1x1") and not (bits == 24 and width % 2)
    # a row of a chip is a whole number of words of 64 bits
    row = width // (4 if quad else 2 if bits == 24 else 1)
    in_word = 64 if bits == 1 else 8 // np.dtype(_RAW.get(bits, "u1")).itemsize
    if bits not in _RAW or not (single or quad) or row % in_word:
        raise SourceError(
            f"{path}: raw counts (R64) of {bits or 'unknown'} bits from {one_line(words[3])[:4]} chips ({one_line(layout)[:8]}), "
            f"{by((height, width))}: of the raw mode, 1, 6, 12 and 24 bits of a single chip and 1, 6 and 12 bits of 2x2 chips "
            f"can be read, in rows of a multiple of {in_word} pixels; record again with Raw Mode off"
        )
    return bits, quad
