"""Which axis of a file is which, by names, units and flags, and what is folded, left out or flipped; nothing is read."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.formats import HDF5_SUFFIXES
from stem_dask.core.metadata import number, text_of
from stem_dask.core.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS, Axis
from stem_dask.core.text import by
from stem_dask.readers.containers import of_many
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.raw import frame_way, scan_ways
from stem_dask.readers.source import Candidate, Source
from stem_dask.readers.views import DETECTOR_FIRST, ScanOfList, View

ScanOrder = Literal["auto", "scan_first", "detector_first"]

_DIMS = (*SCAN_DIMS, *DETECTOR_DIMS)

#: which axes are reciprocal, see `_is_reciprocal`
_SCAN_FIRST = [False, False, True, True]

# --- axes by the attributes that HyperSpy, EMD, NeXus and netCDF write ---


def axis_from(name: Any, size: int, attrs: dict[str, Any]) -> Axis:
    """An axis from its attributes; in pixels when the scale is missing, zero or not a number."""
    scale, units = number(attrs.get("scale")), text_of(attrs.get("units", ""))
    if not scale:
        return Axis(text_of(name), size)
    if in_brackets := re.findall(r"\[(.+?)\]", units):  # as NCEM writes them: [n_m], [n_m^-1]
        units = " ".join(in_brackets).replace("_", "")
    if units in ("_None_", "None", "<undefined>"):
        units = ""
    return Axis(text_of(name), size, scale, number(attrs.get("offset")) or 0.0, units)


def axis_along(name: Any, size: int, values: Any, attrs: dict[str, Any]) -> Axis:
    """An axis from the positions of all of its pixels, or of the first two; in pixels when they are uneven."""
    if {"scale", "offset"} & set(attrs):
        return axis_from(name, size, attrs)
    if values.ndim != 1 or values.dtype.kind not in "iuf" or values.shape[0] not in (2, size):
        return Axis(str(name), size)
    positions = np.asarray(values[...], np.float64)
    scale = float(positions[-1] - positions[0]) / max(1, len(positions) - 1) if size > 1 else 1.0
    if not scale or not np.allclose(np.diff(positions), scale, rtol=1e-3, atol=0):
        return Axis(str(name), size)
    return axis_from(name, size, {**attrs, "scale": scale, "offset": positions[0]})


def order_by_flags(axes: list[dict[str, Any]]) -> dict[str, Any]:
    """What HyperSpy's attributes ``navigate`` of all axes say of their order, as arguments of `Candidate`."""
    flags = [bool(attrs.get("navigate")) for attrs in axes]
    found: dict[str, Any] = {"notes": ()}
    if flags in ([True, True, False, False], [False, False, True, True]):
        found["swapped"] = flags[0]
    elif len(flags) == 4 and sum(flags) in (1, 3):
        found["notes"] = (
            f"HyperSpy calls {sum(flags)} of the 4 axes navigation; they are taken as scan_y, scan_x, ky, kx",
        )
    elif flags == [True, True, False]:
        found["hint"] = (
            "HyperSpy calls 2 of the 3 axes navigation, as of a map of spectra, which are no patterns"
        )
    return found


# --- axes by their names ---

#: prefixes (or suffixes) of y and x in the names of other programs; case, spaces and punctuation are ignored
_SPACES = {
    "scan": "scan s r rn real realspace nav navigation pos position probe stage sample specimen beam raster step",
    "detector": "k kn q qn d g det detector dif diff diffraction dp cbed pattern camera cam sig signal recip reciprocal "
    "kspace freq theta alpha pix pixel",
}

_LETTERS = {"y": "y row rows slow", "x": "x col cols column columns fast"}

#: every known name -> (scan or detector, y or x)
_ROLES = {
    name: (space, letter)
    for space, words in _SPACES.items()
    for word in words.split()
    for letter, signs in _LETTERS.items()
    for sign in signs.split()
    for name in (word + sign, sign + word)
} | {"y": ("scan", "y"), "x": ("scan", "x"), "v": ("detector", "y"), "u": ("detector", "x")}


def order_by(names: Sequence[str]) -> tuple[tuple[int, ...] | None, str]:
    """The positions of scan_y, scan_x, ky and kx (or pattern, ky and kx) in the file by the names of its axes, and a note.

    None if the names do not tell. If x comes before y in both pairs, the order of the file is kept: py4DSTEM and Prismatic call the slower axis x.

    Examples
    --------
    >>> order_by(["qy", "qx", "ry", "rx"])
    ((2, 3, 0, 1), "the detector's axes come first in the file (qy, qx, ry, rx); reading takes longer")
    >>> order_by(["Q_Ny", "det_col", "energy"]), order_by(["axis0", "axis1", "axis2", "axis3"])
    (((2, 0, 1), 'the axes of the file are Q_Ny, det_col, energy; they are put in order'), (None, ''))
    """
    listed = ", ".join(names)
    plain = [re.sub(r"[\W_]+", "", name).lower() for name in names]
    roles = [_ROLES.get(name) for name in plain]
    pairs = {space: [i for i, r in enumerate(roles) if r and r[0] == space] for space in _SPACES}
    letters = {space: "".join(r[1] for r in roles if r and r[0] == space) for space in _SPACES}
    known = [space for space in _SPACES if letters[space] in ("xy", "yx")]
    scan, detector = pairs["scan"], pairs["detector"]
    if len(names) == 3:
        if "detector" not in known:
            return None, ""
        if {*names} == {*LIST_DIMS, *DETECTOR_DIMS}:
            detector = [names.index(name) for name in DETECTOR_DIMS]
        scan = [i for i in range(3) if i not in detector]
        known = []
    elif len(known) == 1 and len(scan) + len(detector) == 2:
        rest = [i for i in range(4) if i not in (*scan, *detector)]
        scan, detector = scan or rest, detector or rest
        if scan == [0, 1]:
            return None, ""
    elif len(known) < 2:
        given_by_programs = r"((axis|dim|dimension|phonydim)\d+|none|undefined|unnamed|)"
        if all(re.fullmatch(given_by_programs, name) for name in plain):
            return None, ""
        return None, f"the axis names {listed} are not recognised and were ignored"
    x_first = [space for space in known if letters[space] == "xy"]
    if len(x_first) < len(known) or {*names} == {*_DIMS}:
        scan = scan[::-1] if "scan" in x_first else scan
        detector = detector[::-1] if "detector" in x_first else detector
        x_first = []
    order, notes = (*scan, *detector), []
    if order == DETECTOR_FIRST:
        notes.append(f"the detector's axes come first in the file ({listed}); reading takes longer")
    elif order != tuple(range(len(names))):
        notes.append(f"the axes of the file are {listed}; they are put in order")
    if x_first:
        slow = " and ".join(names[pairs[space][0]] for space in x_first)
        notes.append(
            f"x comes before y in the axis names {listed}: the slower axis ({slow}) is read as y, as in files of py4DSTEM "
            "and Prismatic, which call it x"
        )
    return order, "; ".join(notes)


# --- the order of the patterns ---


@dataclass(frozen=True)
class Geometry:
    """The user's options for the order of the patterns; see `stem_dask.open`."""

    scan_shape: Sequence[int] | None = None
    scan_order: ScanOrder = "auto"
    scan_roi: Sequence[int] | None = None
    scan_step: int = 1
    skip_frames: int | Sequence[int] = 0
    drop_columns: int = 0
    flip: bool = False

    @property
    def ends(self) -> tuple[int, int]:
        """Patterns to leave out at the beginning and at the end."""
        skip = self.skip_frames
        return (skip, 0) if isinstance(skip, int) else (skip[0], skip[1])


def arranged(name: str, view: Candidate, geometry: Geometry) -> Candidate:
    """Bring the axes into the order (scan_y, scan_x, ky, kx), or (pattern, ky, kx)."""
    is_auto = geometry.scan_order == "auto" and view.swapped is None
    if is_auto and len(view.axes) in (3, 4):
        order, note = order_by([axis.name for axis in view.axes])
        source, axes = view.source, view.axes
        if order is not None:
            axes = tuple(axes[i] for i in order)
            axes = _named(axes, _DIMS if len(order) == 4 else (axes[0].name, *DETECTOR_DIMS))
            if order != tuple(range(len(order))):
                source = View.of(source).transpose(order)
        view = _changed(view, source, axes, *filter(None, [note]))
    shape = view.source.shape
    is_list = len(shape) == 4 and shape[1] == 1 and view.axes[1].name != SCAN_DIMS[1]
    if is_list and isinstance(view.source, FlatFile) and _suffix(name) == ".pt":  # (N, 1, H, W)
        source = replace(view.source, shape=(shape[0], *shape[2:]))
        view = _changed(view, source, (view.axes[0], *view.axes[2:]))
    source, axes = view.source, view.axes
    if len(source.shape) == 3:
        return _stack(name, view, geometry)
    fault = ""
    if len(shape) != 4:
        fault = f"{view.name} has {len(shape)} axes; expected 4 or a stack of patterns"
    elif any(geometry.ends):
        fault = (
            f"input.skip_frames is {geometry.skip_frames}, but the data are a scan of {by(shape[:2])} already; leave it out, "
            "or take a part with input.scan_roi"
        )
    if fault:
        raise SourceError(f"{name}: {fault}")
    reciprocal, note = [_is_reciprocal(axis.units) for axis in axes], ""
    if geometry.scan_order != "auto":  # else by the file, by names, by units
        detector_first = geometry.scan_order == "detector_first"
    elif view.swapped is not None:
        detector_first = not view.swapped
    elif tuple(axis.name for axis in axes) == _DIMS:
        detector_first = False
    elif _suffix(name) in (".dm3", ".dm4") and reciprocal not in (_SCAN_FIRST, _SCAN_FIRST[::-1]):
        units = ", ".join(axis.units or "none" for axis in axes)
        raise SourceError(
            f"{name}: cannot tell scan from detector: no Data Order Swapped tag, and the units are ({units}); "
            f"the axes are {by(shape)}: set input.scan_order to scan_first or detector_first"
        )
    else:
        detector_first = reciprocal == _SCAN_FIRST[::-1]
    if detector_first:
        note = "the detector's axes come first in the file; reading takes longer"
        if is_auto:
            note += f" (by {', '.join(axis.units or axis.name for axis in axes)})"
        source, axes = View.of(source).transpose(DETECTOR_FIRST), (*axes[2:], *axes[:2])
    elif geometry.scan_order == "auto" and reciprocal == _SCAN_FIRST[::-1]:
        units = ", ".join(axis.units for axis in axes)
        note = f"by the units ({units}) the detector might come first; set input.scan_order: detector_first if so"
    view = _changed(view, source, _named(axes, _DIMS), *filter(None, [note]))
    scan = view.source.shape[:2]
    if geometry.scan_shape is not None and tuple(geometry.scan_shape) != scan:
        raise SourceError(
            f"{name}: input.scan_shape is {by(geometry.scan_shape)}, but the data are a scan of {by(scan)}; leave scan_shape "
            "out"
        )
    return view


def _changed(view: Candidate, source: Source, axes: Sequence[Axis], *notes: str) -> Candidate:
    """Another source with its axes, and further notes."""
    return replace(view, source=source, axes=tuple(axes), notes=(*view.notes, *notes))


def _is_reciprocal(units: str) -> bool | None:
    """Whether a unit is reciprocal, in any spelling; None when it is ambiguous.

    Examples
    --------
    >>> [_is_reciprocal(u) for u in ("1 / Å", "nm⁻¹", "$A^{-1}$", "[n_m^-1]", "mrad", "µm", "Angstrom", "counts")]
    [True, True, True, True, True, False, False, None]
    """
    # NFKC unifies signs that look alike (micro and mu, angstrom and ring) and superscripts
    plain = unicodedata.normalize("NFKC", units).replace("\u2212", "-").lower()
    plain = re.sub(r"[\s_${}\[\]]", "", plain)
    if re.fullmatch(r"1/.*|.*-1|[muμ]?rad", plain):
        return True
    return False if re.fullmatch(r"[npuμm]?m|å|a|angstrom|nanometer|micron", plain) else None


def _stack(name: str, view: Candidate, geometry: Geometry) -> Candidate:
    """Fold a stack of patterns into the scan that the user or the file gives."""
    source, axes, (first, last) = view.source, view.axes, geometry.ends
    n = source.shape[0]
    if first + last >= n:
        raise SourceError(
            f"{name}: input.skip_frames is {geometry.skip_frames}, but there are {n:,} patterns"
        )
    if first or last:
        source = View.of(source).select(slice(first, n - last), slice(None), slice(None))
        n = source.shape[0]
        axes = (axes[0].part(first, n), *axes[1:])
        end = f" and the last {last:,}" if last else ""
        view = _changed(view, source, axes, f"left out the first {first:,}{end} patterns")
    scan, part = view.scan, view.part
    if geometry.scan_shape is None and scan is None:
        suffix = _suffix(name)
        named = suffix in (*HDF5_SUFFIXES, ".zspy") and axes[0].name == LIST_DIMS[0]
        if named or suffix in (".pt", ".npy", ".zarr"):
            axes = _named(axes, (*LIST_DIMS, *DETECTOR_DIMS))
            return _changed(view, source, axes, "a list of patterns")
        pixels, hint = by(source.shape[1:]), view.hint
        if part:
            fault = f"is a stack of {n:,} patterns: {part}"
        elif n == 1:
            fault = of_many(name) or f"is a single image of {pixels} pixels, no scan of patterns"
            fault += "; input.scan_shape: [1, 1] reads it as a scan of one"
        else:  # what its scan might be: as a header hints, or a square
            for units in (
                axis.units for axis in axes if axis.units.lower() in ("ev", "kev", "mev")
            ):
                hint = f"one of its axes is in {units}, as of spectra, which are no patterns"
            if not hint and isqrt(n) ** 2 == n:
                hint = f"{isqrt(n)} x {isqrt(n)} would fit"
            guess = f" ({hint})" if hint else ""
            fault = f"is a stack of {n:,} patterns of {pixels} pixels; give its scan as input.scan_shape: [scan_y, scan_x]{guess}"
        raise SourceError(f"{name}: {view.name} {fault}")
    if geometry.scan_shape is not None:
        y, x = scan or (Axis(SCAN_DIMS[0], 1), Axis(SCAN_DIMS[1], 1))
        scan = (replace(y, size=geometry.scan_shape[0]), replace(x, size=geometry.scan_shape[1]))
    assert scan is not None
    n_y, n_x = (axis.size for axis in scan)
    if n_y < 1 or n_x < 1:
        raise SourceError(f"{name}: scan_shape is {n_y} x {n_x}; both sizes must be 1 or more")
    framed = frame_way(name, view.source, n_y * n_x)
    if n_y * n_x != n:
        whose = "input.scan_shape" if geometry.scan_shape else "the scan that the file states,"
        ways = [f"{keys} ({words})" for keys, words in scan_ways(n, (n_y, n_x), (first, last))]
        more = "".join(f" ({note})" for note in view.notes if "less than a pattern" in note)
        raise SourceError(
            f"{name}: {n:,} patterns; {whose} {n_y} x {n_x} needs {n_y * n_x:,}; set "
            f"{'; or '.join(filter(None, [framed, *ways]))}{more}"
        )
    notes = [part.partition("; open all")[0]] if part else []
    if geometry.scan_shape is None:
        notes.append(f"the file states a scan of {n_y:,} x {n_x:,}")
    if framed and (first or last):
        notes.append(f"the size of the file also fits {framed}; check that patterns do not shift")
    return _changed(view, ScanOfList(source, (n_y, n_x)), _named((*scan, *axes[1:]), _DIMS), *notes)


def parted(name: str, view: Candidate, geometry: Geometry) -> Candidate:
    """Leave out the flyback, flip the patterns, select region and step of the scan."""
    drop, roi, step = geometry.drop_columns, geometry.scan_roi, geometry.scan_step
    sizes, whole = view.source.shape, slice(None)
    if drop:
        if len(sizes) != 4 or drop >= sizes[1]:
            what = f"rows of {sizes[1]:,} positions" if len(sizes) == 4 else "a list of patterns"
            raise SourceError(
                f"{name}: input.drop_columns is {drop}, but the input has {what}; it leaves out columns at the end of "
                "every row of a scan"
            )
        axes = (view.axes[0], view.axes[1].part(0, sizes[1] - drop), *view.axes[2:])
        source = View.of(view.source).select(whole, slice(-drop), whole, whole)
        view = _changed(view, source, axes, f"left out the last {drop:,} columns of the scan")
    if geometry.flip:
        ky = view.axes[-2]
        if (
            ky.calibrated
        ):  # the axis runs backwards with ascending values: an origin stays at its pixel
            ky = replace(ky, offset=-ky.value(ky.size - 1))
        source = View.of(view.source).flip(-2)
        note = "every pattern is flipped top to bottom"
        view = _changed(view, source, (*view.axes[:-2], ky, view.axes[-1]), note)
    if roi is None and step == 1:
        return view
    if len(sizes) != 4:
        raise SourceError(
            f"scan_roi and scan_step need a scan; the input is a list of {sizes[0]:,} patterns: give input.scan_shape, or leave "
            "them out"
        )
    if step < 1:
        raise SourceError(f"scan_step is {step}; take every n-th position with n >= 1")
    height, width = view.source.shape[:2]
    roi = tuple(roi) if roi is not None else (0, height, 0, width)
    if len(roi) != 4:
        raise SourceError(f"scan_roi {list(roi)} has {len(roi)} numbers; give [y0, y1, x0, x1]")
    y0, y1, x0, x1 = roi
    if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
        raise SourceError(
            f"scan_roi {list(roi)} does not fit the scan of {height} x {width} positions; "
            "give [y0, y1, x0, x1] with 0 <= y0 < y1 <= scan_y and 0 <= x0 < x1 <= scan_x"
        )
    source = View.of(view.source).select(slice(y0, y1, step), slice(x0, x1, step), whole, whole)
    y, x = (axis.part(at, n, step) for axis, at, n in zip(view.axes, (y0, x0), source.shape, strict=False))  # fmt: skip
    part = ((height, y0, step), (width, x0, step))
    return replace(view, source=source, axes=(y, x, *view.axes[2:]), scan_part=part)


def _named(axes: Sequence[Axis], names: Sequence[str]) -> tuple[Axis, ...]:
    return tuple(replace(axis, name=name) for axis, name in zip(axes, names, strict=True))


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()
