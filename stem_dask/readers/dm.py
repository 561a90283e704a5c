"""Gatan DM3 and DM4 files: the tag tree, and where the images are, with their shape and calibration.

Tag headers are big-endian, with 32-bit counts in DM3 and 64-bit counts in DM4; values are in the byte order that the
header states. Pixels are not read. Every size is compared with that of the file before anything is allocated.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any, BinaryIO, NoReturn

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import ArrayTag, stated
from stem_dask.core.model import Axis
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.source import Candidate, scan_axes
from stem_dask.storage.s3 import at, opened_file

MAX_LOADED = 4096  # longer arrays and strings are described by an ArrayTag, not loaded

_MAX_DEPTH, _MAX_DIMENSIONS = 64, 8

_GROUP, _DATA, _UINT16, _CHAR, _STRUCT, _STRING, _ARRAY = 20, 21, 4, 9, 15, 18, 20

_FORMATS = dict(zip(range(2, 13), "hiHIfd?bBqQ", strict=True))

_PIXEL_DTYPES = {
    1: "i2", 2: "f4", 6: "u1", 7: "i4", 9: "i1", 10: "u2", 11: "u4", 12: "f8", 14: "u1", 39: "i8", 40: "u8",
    3: "c8", 5: "c8", 13: "c16", 27: "c8", 28: "c16",
}  # fmt: skip

_RGBA_TYPES = (8, 23)

_REMEDY = "copy it again from the microscope's computer, or save it again in DigitalMicrograph"


@dataclass(frozen=True)
class DmImage:
    """An image of a DM file; its pixels are not read.

    ``index`` is the position in the file's ``ImageList``; ``shape`` and ``axes`` are slowest first; ``dtype`` has the
    file's byte order (uint8 for binary images); the pixels begin at byte ``offset``. ``swapped`` is the tag
    ``ImageTags/Meta Data/Data Order Swapped`` (true: the detector axes are the fastest); ``tags`` are all ImageTags.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    n_bytes: int
    axes: tuple[Axis, ...]
    swapped: bool | None
    tags: dict[str, Any] = field(repr=False)
    intensity_units: str = ""


class _Parser:
    """Walks the tag tree of a buffered file."""

    def __init__(self, stream: BinaryIO, size: int, path: str) -> None:
        self.stream, self.size, self.path = stream, size, path
        self.position, self.wide, self.order = 0, False, "<"

    def fail(self, what: str) -> NoReturn:
        where = f"at byte {self.position:,} of {self.size:,}"
        raise SourceError(f"{self.path}: {what} ({where}); the file is cut or damaged: {_REMEDY}")

    def take(self, n_bytes: int, what: str) -> bytes:
        """The next bytes."""
        if n_bytes > self.size - self.position:
            self.fail(f"the file ends inside {what}")
        data = self.stream.read(n_bytes)
        if len(data) < n_bytes:
            self.fail(f"the file became shorter while {what} was read")
        self.position += n_bytes
        return data

    def counts(self, n: int, what: str) -> tuple[int, ...]:
        """The next ``n`` counts of a tag header."""
        code, width = ("q", 8) if self.wide else ("i", 4)
        return struct.unpack(f">{n}{code}", self.take(n * width, what))

    def header(self) -> None:
        """The fixed bytes at the start: version, size, byte order."""
        (version,) = struct.unpack(">I", self.take(4, "the header"))
        if version not in (3, 4):
            what = f"it starts with the version number {version:,} where 3 or 4 was expected"
            remedy = "check that the end of its name is that of its format"
            raise SourceError(f"{self.path}: not a Gatan DM3 or DM4 file: {what}; {remedy}")
        self.wide = version == 4
        self.counts(1, "the header")  # the size: some writers leave it wrong
        (order,) = struct.unpack(">I", self.take(4, "the header"))
        if order not in (0, 1):
            self.fail(f"the header states the byte order {order}, where 0 or 1 was expected")
        self.order = "<" if order else ">"

    def group(self, parent: str, depth: int) -> dict[str, Any]:
        """A tag group; the position is at its two flag bytes. Unnamed entries are named by their position."""
        if depth > _MAX_DEPTH:
            self.fail(f"the tags are nested more than {_MAX_DEPTH} deep")
        self.take(2, "a tag group")
        (n_entries,) = self.counts(1, "a tag group")
        smallest_entry = 21 if self.wide else 9
        if not 0 <= n_entries <= (self.size - self.position) // smallest_entry:
            self.fail(f"a tag group claims {n_entries:,} entries, more than the file can hold")
        tags: dict[str, Any] = {}
        for position in range(n_entries):
            kind, length = struct.unpack(">BH", self.take(3, "a tag"))
            name = _text(self.take(length, "a tag's name")) if length else str(position)
            if self.wide:
                self.take(8, "a tag")  # its size, which no reader needs
            if kind == _GROUP:
                tags[name] = self.group(name, depth + 1)
            elif kind == _DATA:
                tags[name] = self.value(name, pixels=(parent, name) == ("ImageData", "Data"))
            else:
                self.fail(f"the tag {name[:40]!r} has the kind {kind}, where 20 or 21 was expected")
        return tags

    def value(self, name: str, pixels: bool) -> Any:
        """What a data tag holds; the position is at its delimiter."""
        if self.take(4, "a tag") != b"%%%%":
            self.fail(f"the tag {name[:40]!r} does not begin with %%%%")
        (n_info,) = self.counts(1, "a tag's description")
        if not 1 <= n_info <= MAX_LOADED:
            self.fail(f"the tag {name[:40]!r} claims a description of {n_info:,} numbers")
        info = self.counts(n_info, "a tag's description")
        is_array, is_string = info[0] == _ARRAY and n_info > 2, info[0] == _STRING and n_info == 2
        element = info[1:-1] if is_array else (_CHAR,) if is_string else info
        codes = self.codes(name, element)
        layout = struct.Struct(self.order + "".join(_FORMATS[code] for code in codes))
        length = info[-1] if is_array or is_string else 1
        tag = ArrayTag(self.position, length, codes, length * layout.size)
        data = self.block(name, tag, pixels)
        if isinstance(data, ArrayTag):
            return data
        if is_string:
            return _text(data)
        if is_array and element == (_UINT16,):
            return data.decode("utf-16-le" if self.order == "<" else "utf-16-be", "replace")
        items = [layout.unpack_from(data, i * layout.size) for i in range(length)]
        values = items if element[0] == _STRUCT else [item[0] for item in items]
        return values if is_array else values[0]

    def codes(self, name: str, element: tuple[int, ...]) -> tuple[int, ...]:
        """Type codes of one element: of a number, or of the fields of a struct."""
        is_struct = element[0] == _STRUCT and len(element) > 2
        if len(element) != (3 + 2 * element[2] if is_struct else 1):
            self.fail(f"the tag {name[:40]!r} has a description of the wrong length")
        codes = element[4::2] if is_struct else element
        unknown = [code for code in codes if code not in _FORMATS]
        if unknown:
            self.fail(f"the tag {name[:40]!r} has the unknown type code {unknown[0]}")
        return codes

    def block(self, name: str, tag: ArrayTag, pixels: bool) -> bytes | ArrayTag:
        """The bytes of an array that begins here, or the tag itself when they stay in the file."""
        left = self.size - self.position
        if tag.length < 0 or tag.n_bytes > left:
            what = "the pixels of an image need" if pixels else f"the tag {name[:40]!r} claims"
            self.fail(f"{what} {tag.n_bytes:,} bytes, but the file has only {left:,} more")
        if not pixels and tag.length * max(1, len(tag.codes)) <= MAX_LOADED:
            return self.take(tag.n_bytes, f"the tag {name[:40]!r}")
        self.position += tag.n_bytes
        self.stream.seek(self.position)
        return tag


def _text(data: bytes) -> str:
    """Names are UTF-8 in new files and Latin-1 in old ones; any bytes are one of the two."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _parse(path: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """Tag tree and byte order ("<" or ">") of a file."""
    name = os.fspath(path)
    with opened_file(name) as stream:
        parser = _Parser(stream, at(name).stat().st_size, name)
        parser.header()
        return parser.group("", 0), parser.order


def read_tags(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tag tree of a DM3 or DM4 file as nested dictionaries.

    Unnamed entries are called ``"0"``, ``"1"``, … by their position in their group. Arrays of uint16 are text, other
    arrays are lists, structs are tuples. Pixels (any ``ImageData/Data``) and arrays or strings of more than 4096
    elements stay in the file and are described by an `ArrayTag`.

    Raises
    ------
    SourceError
        When the file is not a DM3 or DM4 file, is cut, or contradicts itself.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from stem_dask.writers.dm import encode_tags
    >>> with tempfile.NamedTemporaryFile(suffix=".dm4") as file:
    ...     _ = file.write(encode_tags({"Session": {"Specimen": "Au"}, "Sizes": [np.uint32(7)]}))
    ...     file.flush()
    ...     read_tags(file.name)
    {'Session': {'Specimen': 'Au'}, 'Sizes': {'0': 7}}
    """
    return _parse(path)[0]


def list_dm(path: str) -> list[Candidate]:
    """All images of a file as arrays to choose from; see `list_images`."""
    return [
        Candidate(
            f"image {image.index}" + (f" ({image.name})" if image.name else ""),
            FlatFile(path, image.offset, image.dtype, image.shape),
            image.axes,
            number=image.index,
            swapped=image.swapped,
            metadata=image.tags,
            about={
                "title": image.name,
                **stated("Gatan", {**image.tags, "Brightness units": image.intensity_units}),
            },
            # the scan of a flattened stack, as the TitanX writes it
            scan=scan_axes(*(_dig(image.tags, "4D STEM Tags", f"Scan shape {x}") for x in "YX")),
        )
        for image in list_images(path)
    ]


def list_images(path: str | os.PathLike[str]) -> list[DmImage]:
    """All images of a DM3 or DM4 file except thumbnails and colour pictures.

    A 1D or 2D image whose ``Dimensions`` disagree with its data, or of an unknown data type, is left out. Packed
    complex images hold fewer bytes than their shape implies. An axis without a usable ``Scale`` is uncalibrated.

    Raises
    ------
    SourceError
        As `read_tags`; also without an image list, or when an image of more than two ``Dimensions`` has other sizes
        than its data, or an unknown data type.

    Examples
    --------
    >>> import tempfile
    >>> from stem_dask.writers.synthetic import Synthetic, write_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_dataset(f"{folder}/a.dm4", Synthetic(scan_shape=(3, 2)))
    ...     [image.shape for image in list_images(path)]
    [(3, 2), (3, 2, 128, 120)]
    """
    tags, order = _parse(path)
    entries = tags.get("ImageList")
    if not isinstance(entries, dict):
        remedy = "in DigitalMicrograph, save the image itself and not a script or a layout"
        raise SourceError(f"{os.fspath(path)}: the file has no list of images; {remedy}")
    thumbnails = [_dig(entry, "ImageIndex") for entry in _children(tags.get("Thumbnails"))]
    shown = [item for item in enumerate(entries.values()) if item[0] not in thumbnails]
    images = [_image(os.fspath(path), order, *item) for item in shown]
    return [image for image in images if image is not None]


def _children(group: Any) -> Iterator[Any]:
    """The entries of a group, none if it is not one."""
    yield from group.values() if isinstance(group, dict) else ()


def _dig(tags: Any, *names: str) -> Any:
    """The tag at the end of a path of names, or None."""
    for name in names:
        tags = tags.get(name) if isinstance(tags, dict) else None
    return tags


def _image(path: str, order: str, index: int, entry: Any) -> DmImage | None:
    """The image of one entry of the list, or None if there is none to work on."""
    data, code = _dig(entry, "ImageData", "Data"), _dig(entry, "ImageData", "DataType")
    if not isinstance(data, ArrayTag) or code in _RGBA_TYPES:
        return None
    name = str(_dig(entry, "Name") or "")
    shape = tuple(_children(_dig(entry, "ImageData", "Dimensions")))[::-1]  # DM: fastest first
    fault = _fault(shape, code, data.n_bytes)
    if fault:
        if 1 <= len(shape) <= 2:
            return None
        fault += f"; the file is cut or its header is wrong: {_REMEDY}"
        raise SourceError(f"{path}: image {index} ({name[:60]!r}): {fault}")
    tags = _dig(entry, "ImageTags")
    swapped = _dig(tags, "Meta Data", "Data Order Swapped")
    found = list(_children(_dig(entry, "ImageData", "Calibrations", "Dimension")))
    found = (found + [None] * len(shape))[: len(shape)][::-1]  # scripts write fewer or more
    axes = [_axis(f"axis{i}", *pair) for i, pair in enumerate(zip(shape, found, strict=True))]
    return DmImage(
        *(index, name, shape, np.dtype(order + _PIXEL_DTYPES[code]), data.offset, data.n_bytes),
        axes=tuple(axes),
        swapped=bool(swapped) if isinstance(swapped, int) else None,
        tags=tags if isinstance(tags, dict) else {},
        intensity_units=str(_dig(entry, "ImageData", "Calibrations", "Brightness", "Units") or ""),
    )


def _fault(shape: tuple[Any, ...], code: Any, n_bytes: int) -> str:
    """What is wrong with an image's sizes, or an empty string."""
    if not 1 <= len(shape) <= _MAX_DIMENSIONS:
        return f"it has {len(shape):,} Dimensions, where 1 to {_MAX_DIMENSIONS} were expected"
    says = f"Dimensions say {' x '.join(map(str, shape))[:200]}"
    if not all(type(size) is int and size > 0 for size in shape):
        return f"{says}, which holds no pixels"
    if not isinstance(code, int) or code not in _PIXEL_DTYPES:
        return f"its data type {str(code)[:40]} is not one that can be read"
    dtype = np.dtype(_PIXEL_DTYPES[code])
    expected = prod(shape) * dtype.itemsize
    if expected == n_bytes or dtype.kind == "c":
        return ""
    return f"{says} of {dtype}, {expected:,} bytes, but the data array has {n_bytes:,}"


def _axis(name: str, size: int, calibration: Any) -> Axis:
    """One axis; DM's ``Origin`` is in pixels: ``value = (index - Origin) * Scale``."""
    scale, origin, units = (_dig(calibration, key) for key in ("Scale", "Origin", "Units"))
    if not isinstance(scale, int | float) or not isfinite(scale) or scale == 0:
        return Axis(name, size)
    offset = 0.0 - origin * scale if isinstance(origin, int | float) else 0.0
    units = units if isinstance(units, str) else ""
    return Axis(name, size, float(scale), offset if isfinite(offset) else 0.0, units)
