"""NanoMEGAS: Topspin (.app5), HDF5 with one group a pattern, named by its number; and block files (.blo)."""

import math
import re
import xml.etree.ElementTree as ET
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import number, stated
from stem_dask.core.model import Axis
from stem_dask.readers.containers import HDF5_BYTES, hdf5_file, opened_hdf5
from stem_dask.readers.flat import framed, refuse_sheared
from stem_dask.readers.hdf5_metadata import is_safe, member
from stem_dask.readers.source import (
    MOST_HEADER_BYTES,
    Candidate,
    Reading,
    Slices,
    calibrated,
    record_of,
    scan_axes,
    stack,
)
from stem_dask.storage.errors import translate
from stem_dask.storage.location import opened_file

_GUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True)
class PatternGroups:
    """A stack (n, ky, kx) whose pattern i is the dataset ``group/i/Data`` of an HDF5 file."""

    path: str
    group: str
    dtype: np.dtype
    shape: tuple[int, ...]
    reading: ClassVar = Reading(library_bytes=HDF5_BYTES)

    def __getitem__(self, part: Slices) -> NDArray:
        import hdf5plugin  # noqa: F401  registers blosc and others with HDF5

        numbers, rows, columns = (
            range(*s.indices(n)) for s, n in zip(part, self.shape, strict=True)
        )
        out = np.empty((len(numbers), len(rows), len(columns)), self.dtype)
        if out.size == 0:
            return out
        what = f"patterns of {self.group} cannot be read"
        with translate(SourceError, self.path, what), hdf5_file(self.path) as file:
            for pattern, i in zip(out, numbers, strict=True):
                what = f"pattern {i} of {self.group}"
                with translate(SourceError, self.path, f"{what} cannot be read"):
                    data = file[f"{self.group}/{i}/Data"]
                    if data.shape != self.shape[1:] or data.dtype != self.dtype:
                        raise SourceError(
                            f"{self.path}: {what} is {data.shape} {data.dtype}, the first is {self.shape[1:]} {self.dtype}; patterns of one "
                            "size were expected"
                        )
                    pattern[...] = data[part[1], part[2]]
        return out


def list_app5(path: str) -> list[Candidate]:
    """The scans of a Topspin file, one per session; images are left out.

    The shape of the scan follows from the positions of the patterns, if they are row by row.
    """
    unlocked: list[str] = []
    found = []
    with opened_hdf5(path, unlocked) as file:
        for top in [file] if "Metadata" in file else _groups(file):
            root, names = _metadata(top, ""), ("Specimen", "SystemName", "Title", "CreatedDateTime")
            items = [] if root is None else [*root.iter("Item")]
            settings = [(item.findtext("Name"), item.findtext("Value")) for item in items]
            settings += [(name, root.findtext(name)) for name in names if root is not None]
            about = stated("Topspin", {name: value for name, value in settings if name and value})
            groups = [group for group in _groups(top) if "0" in group]
            found += [_candidate(path, group, about, tuple(unlocked)) for group in groups]
    if not found:
        raise SourceError(
            f"{path}: no scan of patterns: expected a group of patterns named by numbers, as Topspin writes them"
        )
    return found


def _groups(parent: Any) -> list[Any]:
    """The groups whose names are GUIDs; links are not followed."""
    import h5py

    groups = (member(parent, name, h5py.Group) for name in parent if _GUID.fullmatch(name))
    return [group for group in groups if group is not None]


def _candidate(path: str, group: Any, about: dict[str, Any], notes: tuple[str, ...]) -> Candidate:
    name, n = group.name.strip("/"), len(group)
    first = group.get("0/Data")
    if first is None or first.ndim != 2:
        raise SourceError(f"{path}: {name}/0/Data is missing or no pattern; the file is damaged")
    if str(n - 1) not in group or str(n) in group:
        raise SourceError(
            f"{path}: {name} has {n:,} patterns, but they are not numbered 0 to {n - 1:,}; some are missing"
        )
    source = PatternGroups(path, name, first.dtype, (n, *(int(size) for size in first.shape)))
    root, axes = _metadata(group, "0/"), list[Axis]()
    for axis, size in zip(("ky", "kx"), first.shape, strict=True):
        keys = (f"Calibration/{axis[1].upper()}/{key}" for key in ("Scale", "Offset", "Type/Text"))
        scale, offset, kind = (None if root is None else root.findtext(key) for key in keys)
        # Topspin states the quantity, Angle, in radians
        axes.append(calibrated(axis, int(size), scale, offset, "rad" if kind == "Angle" else ""))
    scan, note = _scan(group, n)
    metadata = {"pattern 0": _text(group, "0/")[:1000], "session": name}
    notes = (*((note,) if note else ()), *notes)
    ky, kx = axes
    return stack(source, ky, kx, name, metadata=metadata, scan=scan, notes=notes, about=about)


def _text(group: Any, prefix: str) -> str:
    """The metadata (XML) of a pattern (prefix ``"0/"``) or of a group; "" if missing."""
    data = group.get(f"{prefix}Metadata")
    if data is None or data.shape != () or data.dtype.itemsize > MOST_HEADER_BYTES:
        return ""
    if not is_safe(data.dtype):
        return ""
    value = data[()]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _metadata(group: Any, prefix: str) -> ET.Element | None:
    # the header wrongly states UTF-16; entities could expand without end
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", _text(group, prefix))
    try:
        return None if "<!" in text else ET.fromstring(text)
    except ET.ParseError:
        return None


def _position(group: Any, i: int) -> tuple[float, float] | None:
    """(y, x) of a pattern in m."""
    root = _metadata(group, f"{i}/")
    for item in root.iter("Item") if root is not None else ():
        if item.findtext("Name") == "RequestedBeamPosition":
            y, x = (number(item.findtext(f"Value/{letter}")) for letter in "YX")
            return None if y is None or x is None else (y, x)
    return None


def _scan(group: Any, n: int) -> tuple[tuple[Axis, Axis] | None, str]:
    """The scan by the positions of the first row, the pattern after it, and the last pattern; or a note."""
    start, end = _position(group, 0), _position(group, n - 1)
    if start is None or end is None:
        return None, ""
    if start == end and n > 1:
        return None, "the first and the last pattern have the same position"

    def is_below(i: int) -> bool:
        return (_position(group, i) or (None,))[0] != start[0]

    width = bisect_left(range(1, n), True, key=is_below) + 1  # the end of the first row
    if n % width:
        return (
            None,
            f"{n:,} patterns are not a multiple of the {width:,} positions of the first row",
        )
    height = n // width
    row_end, next_row = _position(group, width - 1), _position(group, width % n)
    if row_end is None or next_row is None or not math.isclose(row_end[1], end[1], rel_tol=1e-6):
        return None, "the positions are not those of a scan row by row"
    step_x = (row_end[1] - start[1]) / (width - 1) * 1e9 if width > 1 else None
    step_y = (end[0] - start[0]) / (height - 1) * 1e9 if height > 1 else None
    scan = scan_axes(height, width, step_y, step_x, units="nm")
    if scan is None:
        return None, ""
    y, x = (
        replace(axis, offset=first * 1e9) if axis.units else axis
        for axis, first in zip(scan, start, strict=True)
    )
    return (y, x), ""


# --- block files: square patterns of bytes, each after the mark AA 55 and its number ---

_BLO = np.dtype([
    ("id", "S6"), ("magic", "<u2"), ("offset of the image", "<u4"), ("offset of the patterns", "<u4"), ("flags", "<u4"),
    ("size of a pattern", "<u2"), ("rotation of a pattern", "<u2"), ("scan x", "<u2"), ("scan y", "<u2"),
    ("scan rotation", "<u2"), ("step x (nm)", "<f8"), ("step y (nm)", "<f8"), ("beam energy (V)", "<u4"),
    ("pixels per cm x 100", "<u2"), ("camera length", "<u2"), ("time", "<f8"),
])  # fmt: skip

_LEAD, _MARK = 6, b"\xaa\x55"  # bytes before each pattern, and the first two of them


def list_blo(path: str) -> list[Candidate]:
    """The patterns of a .blo file, uint8, folded into the scan that its header states."""
    header = record_of(path, _BLO, "a block file")
    if header["magic"] != 0x0102 or header["id"][:3] != b"IMG":
        raise SourceError(
            f"{path}: not a NanoMEGAS block file: it begins with {header['id']!r} and the mark {header['magic']:#06x}, where "
            "IMGBLO and 0x0102 were expected"
        )
    size, start = header["size of a pattern"], header["offset of the patterns"]
    source, notes = framed(path, start, size**2 + _LEAD, np.dtype("u1"), (size, size), lead=_LEAD)
    scan = scan_axes(
        header["scan y"], header["scan x"], header["step y (nm)"], header["step x (nm)"], units="nm"
    )
    n = scan[0].size * scan[1].size if scan is not None else source.shape[0]
    with opened_file(path) as file:
        file.seek(start)
        mark = file.read(2)
        file.seek(start + n * (size**2 + _LEAD))
        after = file.read(2)
    if mark != _MARK:
        raise SourceError(
            f"{path}: no pattern begins at byte {start:,}, where the header says the first one does (bytes "
            f"{mark.hex(' ')}, expected aa 55); the file is damaged"
        )
    if n < source.shape[0] and after != _MARK:  # folding refuses more patterns than the scan has
        source = replace(source, runs=(replace(source.runs[0], count=n),))
        notes = (f"bytes after the {n:,} patterns of the scan are not read",)
    refuse_sheared(source, _LEAD, _MARK)
    density = header["pixels per cm x 100"]
    step = 100 / density if density else None
    ky, kx = (calibrated(name, size, step, 0.0, "cm") for name in ("ky", "kx"))
    about = stated("NanoMEGAS block file", header)
    return [stack(source, ky, kx, metadata=header, scan=scan, notes=notes, about=about)]
