"""Gatan DM3 and DM4 files: the tag tree, and the images in it; pixels are not read.

Tag headers are big-endian, with 32-bit counts in DM3 and 64-bit counts in DM4; values are in the byte order that the
header states. Every size is compared with that of the file before anything is allocated.
"""

import os
import struct
from collections.abc import Iterator
from math import isfinite, prod
from typing import Any, BinaryIO, NoReturn

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import ArrayTag, dig, stated
from stem_dask.core.model import Axis
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.source import Candidate, scan_axes
from stem_dask.storage.location import at, opened_file

#: longer arrays and strings are described by an `ArrayTag`, not loaded
MAX_LOADED = 4096

_GROUP, _DATA, _UINT16, _CHAR, _STRUCT, _STRING, _ARRAY = 20, 21, 4, 9, 15, 18, 20

#: types of numbers by the codes of tags, and of pixels by those of images (8 and 23 are colors)
_NUMBERS = dict(enumerate(("i2", "i4", "u2", "u4", "f4", "f8", "?", "i1", "u1", "i8", "u8"), 2))
_PIXELS = {
    1: "i2", 2: "f4", 6: "u1", 7: "i4", 9: "i1", 10: "u2", 11: "u4", 12: "f8", 14: "u1", 39: "i8", 40: "u8",
    3: "c8", 5: "c8", 13: "c16", 27: "c8", 28: "c16",
}  # fmt: skip

_REMEDY = "copy it again from the microscope's computer, or save it again in DigitalMicrograph"


class _Parser:
    """Walks the tag tree of a buffered file."""

    def __init__(self, stream: BinaryIO, path: str) -> None:
        self.stream, self.size, self.path, self.position = stream, at(path).stat().st_size, path, 0
        (version,) = self.unpack(">I")
        if version not in (3, 4):
            raise SourceError(
                f"{path}: not a Gatan DM3 or DM4 file: it starts with the version number {version:,} where 3 or 4 was "
                "expected; check that the end of its name is that of its format"
            )
        self.count = "q" if version == 4 else "i"
        self.unpack(f">{self.count}")  # the size: some writers leave it wrong
        (order,) = self.unpack(">I")
        if order not in (0, 1):
            self.fail(f"the header states the byte order {order}, where 0 or 1 was expected")
        self.order = "<" if order else ">"

    def fail(self, what: str) -> NoReturn:
        where = f"at byte {self.position:,} of {self.size:,}"
        raise SourceError(f"{self.path}: {what} ({where}); the file is cut or damaged: {_REMEDY}")

    def take(self, n_bytes: int) -> bytes:
        data = self.stream.read(min(n_bytes, self.size - self.position))
        if len(data) < n_bytes:
            self.fail("the file ends inside its tags")
        self.position += n_bytes
        return data

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def group(self, parent: str = "", depth: int = 0) -> dict[str, Any]:
        """A tag group; the position is at its two flag bytes. Unnamed entries are named by their position."""
        (n_entries,) = self.unpack(f">2x{self.count}")
        smallest_entry = 21 if self.count == "q" else 9
        if depth > 64 or not 0 <= n_entries <= (self.size - self.position) // smallest_entry:
            self.fail(f"a tag group claims {n_entries:,} entries {depth} levels deep")
        tags: dict[str, Any] = {}
        for position in range(n_entries):
            kind, length = self.unpack(">BH")
            name = _text(self.take(length)) if length else str(position)
            self.take(8 if self.count == "q" else 0)  # its size, which no reader needs
            if kind == _GROUP:
                tags[name] = self.group(name, depth + 1)
            elif kind == _DATA:
                tags[name] = self.value(name, pixels=(parent, name) == ("ImageData", "Data"))
            else:
                self.fail(f"the tag {name[:40]!r} has the kind {kind}, where 20 or 21 was expected")
        return tags

    def value(self, name: str, pixels: bool) -> Any:
        """What a data tag holds; the position is at its delimiter."""
        delimiter, n_info = self.unpack(f">4s{self.count}")
        if delimiter != b"%%%%" or not 1 <= n_info <= MAX_LOADED:
            self.fail(f"the tag {name[:40]!r} does not begin with %%%% and a short description")
        info = self.unpack(f">{n_info}{self.count}")
        is_array, is_string = info[0] == _ARRAY and n_info > 2, info[0] == _STRING and n_info == 2
        element = info[1:-1] if is_array else (_CHAR,) if is_string else info
        is_struct = element[0] == _STRUCT and len(element) > 2
        codes = element[4::2] if is_struct else element
        expected = 3 + 2 * element[2] if is_struct else 1
        if len(element) != expected or not all(code in _NUMBERS for code in codes):
            self.fail(f"the tag {name[:40]!r} is of an unknown type {info[:8]}")
        types = [np.dtype(self.order + _NUMBERS[code]) for code in codes]
        dtype = np.dtype([(f"{i}", one) for i, one in enumerate(types)]) if is_struct else types[0]
        length = info[-1] if is_array or is_string else 1
        n_bytes, left = length * dtype.itemsize, self.size - self.position
        if length < 0 or n_bytes > left:
            what = "the pixels of an image need" if pixels else f"the tag {name[:40]!r} claims"
            self.fail(f"{what} {n_bytes:,} bytes, but the file has only {left:,} more")
        if pixels or length * max(1, len(codes)) > MAX_LOADED:
            tag = ArrayTag(self.position, length, codes, n_bytes)
            self.position += n_bytes
            self.stream.seek(self.position)
            return tag
        data = self.take(n_bytes)
        if is_string:
            return _text(data)
        if is_array and element == (_UINT16,):
            return data.decode("utf-16-le" if self.order == "<" else "utf-16-be", "replace")
        values = np.frombuffer(data, dtype).tolist() if dtype.itemsize else [()] * length
        return values if is_array else values[0]


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # in old files; any bytes are


def read_tags(path: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """The tag tree of a DM3 or DM4 file as nested dictionaries, and the byte order ("<" or ">") of its numbers.

    Unnamed entries are called ``"0"``, ``"1"``, … by their position in their group. Arrays of uint16 are text, other
    arrays are lists, structs are tuples. Pixels (any ``ImageData/Data``) and arrays or strings of more than 4096
    elements stay in the file and are described by an `ArrayTag`.
    """
    with opened_file(os.fspath(path)) as stream:
        parser = _Parser(stream, os.fspath(path))
        return parser.group(), parser.order


def list_dm(path: str | os.PathLike[str]) -> list[Candidate]:
    """All images of a DM3 or DM4 file except thumbnails and color pictures.

    A 1D or 2D image whose ``Dimensions`` disagree with its data, or of an unknown data type, is left out. Packed
    complex images hold fewer bytes than their shape implies. An axis without a usable ``Scale`` is uncalibrated.

    Examples
    --------
    >>> import tempfile
    >>> from stem_dask.writers.synthetic import Synthetic, write_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_dataset(f"{folder}/a.dm4", Synthetic(scan_shape=(3, 2)))
    ...     [(image.name, image.source.shape) for image in list_dm(path)]
    [('image 1 (Survey)', (3, 2)), ('image 2 (Diffraction SI)', (3, 2, 128, 120))]
    """
    (tags, order), path = read_tags(path), os.fspath(path)
    entries = tags.get("ImageList")
    if not isinstance(entries, dict):
        raise SourceError(
            f"{path}: the file has no list of images; in DigitalMicrograph, save the image itself and not a script or a layout"
        )
    thumbnails = [dig(entry, "ImageIndex") for entry in _children(tags.get("Thumbnails"))]
    found = []
    for index, entry in enumerate(entries.values()):
        data, code = dig(entry, "ImageData.Data"), dig(entry, "ImageData.DataType")
        if index in thumbnails or not isinstance(data, ArrayTag) or code in (8, 23):
            continue
        title = str(dig(entry, "Name") or "")
        shape = tuple(_children(dig(entry, "ImageData.Dimensions")))[::-1]  # DM: fastest first
        known = _PIXELS.get(code) if isinstance(code, int) else None
        dtype = np.dtype(order + (known or "V0"))
        fits = 1 <= len(shape) <= 8 and all(type(n) is int and n > 0 for n in shape)
        fits = fits and (dtype.kind == "c" or prod(shape) * dtype.itemsize == data.n_bytes)
        if not fits or known is None:
            if 1 <= len(shape) <= 2:
                continue
            of = f"of {dtype}" if known else f"of the unknown data type {str(code)[:40]}"
            sizes = " x ".join(map(str, shape))[:200] or "nothing"
            raise SourceError(
                f"{path}: image {index} ({title[:60]!r}): Dimensions say {sizes} {of}, but the data array has "
                f"{data.n_bytes:,} bytes; the file is cut or its header is wrong: {_REMEDY}"
            )
        tags = dig(entry, "ImageTags")
        tags = tags if isinstance(tags, dict) else {}
        along = list(_children(dig(entry, "ImageData.Calibrations.Dimension")))
        along = (along + [None] * len(shape))[: len(shape)][::-1]  # scripts write fewer or more
        swapped = dig(tags, "Meta Data.Data Order Swapped")
        units = dig(entry, "ImageData.Calibrations.Brightness.Units")
        name, source = f"image {index}", FlatFile(path, data.offset, dtype, shape)
        about = {"title": title, **stated("Gatan", {**tags, "Brightness units": str(units or "")})}
        axes = (_axis(f"axis{i}", *one) for i, one in enumerate(zip(shape, along, strict=True)))
        # the scan of a flattened stack, as the TitanX writes it
        scan = scan_axes(*(dig(tags, f"4D STEM Tags.Scan shape {x}") for x in "YX"))
        found.append(
            Candidate(f"{name} ({title})" if title else name, source, tuple(axes), number=index, metadata=tags, about=about,
                      scan=scan, swapped=bool(swapped) if isinstance(swapped, int) else None)
        )  # fmt: skip
    return found


def _children(group: Any) -> Iterator[Any]:
    """The entries of a group, none if it is not one."""
    yield from group.values() if isinstance(group, dict) else ()


def _axis(name: str, size: int, calibration: Any) -> Axis:
    """One axis; DM's ``Origin`` is in pixels: ``value = (index - Origin) * Scale``."""
    scale, origin, units = (dig(calibration, key) for key in ("Scale", "Origin", "Units"))
    if not isinstance(scale, int | float) or not isfinite(scale) or scale == 0:
        return Axis(name, size)
    offset = 0.0 - origin * scale if isinstance(origin, int | float) else 0.0
    units = units if isinstance(units, str) else ""
    return Axis(name, size, float(scale), offset if isfinite(offset) else 0.0, units)
