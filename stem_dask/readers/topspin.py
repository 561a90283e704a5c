"""NanoMEGAS Topspin (.app5): HDF5 with one group a pattern, named by its number."""

import math
import re
import xml.etree.ElementTree as ET
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import stated
from stem_dask.core.model import Axis
from stem_dask.readers.arrays import hdf5_file, opened_hdf5
from stem_dask.readers.hdf5_metadata import is_safe
from stem_dask.readers.source import (
    MOST_HEADER_BYTES,
    Candidate,
    Slices,
    calibrated,
    scan_axes,
    stack_axes,
)
from stem_dask.storage.errors import translate

_GUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True)
class PatternGroups:
    """A stack (n, ky, kx) whose pattern i is the dataset ``group/i/Data`` of an HDF5 file."""

    path: str
    group: str
    dtype: np.dtype
    shape: tuple[int, ...]

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
                with translate(
                    SourceError, self.path, f"pattern {i} of {self.group} cannot be read"
                ):
                    data = file[f"{self.group}/{i}/Data"]
                    if data.shape != self.shape[1:] or data.dtype != self.dtype:
                        raise SourceError(
                            f"{self.path}: pattern {i} of {self.group} is {data.shape} {data.dtype}, "
                            f"the first is {self.shape[1:]} {self.dtype}; patterns of one size were expected"
                        )
                    pattern[...] = data[part[1], part[2]]
        return out


def list_app5(path: str) -> list[Candidate]:
    """The scans of a Topspin file, one per session; images are left out.

    The shape of the scan follows from the positions of the patterns, if they are row by row.

    Raises
    ------
    SourceError
        When it is no readable HDF5 file, or has no patterns.
    """
    unlocked: list[str] = []
    with opened_hdf5(path, unlocked) as file:
        tops = [file] if "Metadata" in file else [g for g in _groups(file).values()]
        found = [
            replace(_scan_of_patterns(path, group), about=stated("Topspin", _settings(top)))
            for top in tops
            for group in _groups(top).values()
            if "0" in group
        ]
    if not found:
        raise SourceError(
            f"{path}: no scan of patterns: expected a group of patterns named by numbers, as Topspin writes them"
        )
    return [replace(one, notes=(*one.notes, *unlocked)) for one in found]


def _groups(parent: Any) -> dict[str, Any]:
    """The groups whose names are GUIDs; links are not followed."""
    import h5py

    return {
        name: parent[name]
        for name in parent
        if _GUID.fullmatch(name)
        and isinstance(parent.get(name, getlink=True), h5py.HardLink)
        and isinstance(parent[name], h5py.Group)
    }


def _scan_of_patterns(path: str, group: Any) -> Candidate:
    name, n = group.name.strip("/"), len(group)
    first = group.get("0/Data")
    if first is None or first.ndim != 2:
        raise SourceError(f"{path}: {name}/0/Data is missing or no pattern; the file is damaged")
    if str(n - 1) not in group or str(n) in group:
        raise SourceError(
            f"{path}: {name} has {n:,} patterns, but they are not numbered 0 to {n - 1:,}; some are missing"
        )
    source = PatternGroups(path, name, first.dtype, (n, *(int(size) for size in first.shape)))
    first_text = _text(group, "0/")
    root = _parsed(first_text)
    ky, kx = (
        _axis(f"k{x}", size, root, x.upper())
        for x, size in zip("yx", source.shape[1:], strict=True)
    )
    scan, note = _scan(group, n)
    stated = {"pattern 0": first_text[:1000], "session": name}
    return Candidate(
        name,
        source,
        stack_axes(n, ky, kx),
        metadata=stated,
        scan=scan,
        notes=(note,) if note else (),
    )


def _text(group: Any, prefix: str) -> str:
    """The metadata (XML) of a pattern (prefix ``"0/"``) or of a group; "" if missing."""
    data = group.get(f"{prefix}Metadata")
    if data is None or data.shape != () or data.dtype.itemsize > MOST_HEADER_BYTES:
        return ""
    if not is_safe(data.dtype):
        return ""
    value = data[()]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _settings(top: Any) -> dict[str, str]:
    """Settings of the microscope and the session, by name."""
    root = _parsed(_text(top, ""))
    if root is None:
        return {}
    items = {item.findtext("Name"): item.findtext("Value") for item in root.iter("Item")}
    items |= {
        name: root.findtext(name) for name in ("Specimen", "SystemName", "Title", "CreatedDateTime")
    }
    return {name: value for name, value in items.items() if name and value}


def _parsed(text: str) -> ET.Element | None:
    # the header wrongly states UTF-16; entities could expand without end
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    if "<!" in text:
        return None
    try:
        return ET.fromstring(text)
    except ET.ParseError:
        return None


def _axis(name: str, size: int, root: ET.Element | None, letter: str) -> Axis:
    along = None if root is None else root.find(f"Calibration/{letter}")
    if along is None:
        return Axis(name, size)
    # Topspin states the quantity, Angle, in radians
    units = {"Angle": "rad"}.get(along.findtext("Type/Text") or "", "")
    return calibrated(name, size, along.findtext("Scale"), along.findtext("Offset"), units)


def _position(group: Any, i: int) -> tuple[float, float] | None:
    """(y, x) of a pattern in m."""
    root = _parsed(_text(group, f"{i}/"))
    for item in root.iter("Item") if root is not None else ():
        if item.findtext("Name") == "RequestedBeamPosition":
            y, x = item.findtext("Value/Y"), item.findtext("Value/X")
            try:
                place = (float(y or "nan"), float(x or "nan"))
            except ValueError:
                return None
            return place if all(map(math.isfinite, place)) else None
    return None


def _scan(group: Any, n: int) -> tuple[tuple[Axis, Axis] | None, str]:
    """The scan by the positions of the first row, the pattern after it, and the last pattern; or a note."""
    start, end = _position(group, 0), _position(group, n - 1)
    if start is None or end is None:
        return None, ""
    if start == end and n > 1:
        return None, "the first and the last pattern have the same position"
    # the end of the first row, by bisection
    width = (
        bisect_left(
            range(1, n), True, key=lambda i: (_position(group, i) or (None,))[0] != start[0]
        )
        + 1
    )
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
    moved = [
        Axis(axis.name, axis.size, axis.scale, at * 1e9, axis.units) if axis.units else axis
        for axis, at in zip(scan, start, strict=True)
    ]
    return (moved[0], moved[1]), ""
