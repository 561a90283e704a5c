"""The order of the axes of a file: which are the scan, and what is folded, left out or flipped; nothing is read."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Literal

from stem_dask.core.errors import SourceError
from stem_dask.core.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS, Axis
from stem_dask.core.text import by
from stem_dask.readers.axis_names import order_by
from stem_dask.readers.containers import of_many
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.sizes import frame_way, scan_ways
from stem_dask.readers.source import Candidate, Source
from stem_dask.readers.views import DETECTOR_FIRST, ScanOfList, View, select

ScanOrder = Literal["auto", "scan_first", "detector_first"]

#: which axes are reciprocal, see `_is_reciprocal`
_SCAN_FIRST = [False, False, True, True]

#: units of a specimen
_LENGTHS = ("nm", "um", "\u03bcm", "å", "a", "pm", "mm", "m", "angstrom", "nanometer", "micron")

#: units of spectra
_ENERGIES = ("ev", "kev", "mev")


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


@dataclass(frozen=True)
class Arranged:
    """A source with its axes and notes."""

    source: Source
    axes: tuple[Axis, ...]
    notes: tuple[str, ...] = ()

    def on(self, source: Source, axes: Sequence[Axis], *notes: str) -> "Arranged":
        """Another source with its axes, and further notes."""
        return Arranged(source, tuple(axes), (*self.notes, *notes))


def arranged(name: str, chosen: Candidate, view: Arranged, geometry: Geometry) -> Arranged:
    """Bring the axes into the order (scan_y, scan_x, ky, kx), or (pattern, ky, kx).

    Raises
    ------
    SourceError
        When the array has another number of axes, the order is ambiguous, or the options do not fit.
    """
    if geometry.scan_order == "auto" and chosen.swapped is None:
        view = _by_names(view)
        chosen = replace(chosen, axes=view.axes)
    source, axes = view.source, view.axes
    if (
        isinstance(source, FlatFile)
        and len(source.shape) == 4
        and source.shape[1] == 1
        and axes[1].name != SCAN_DIMS[1]
        and _kind(name) == ".pt"
    ):
        # (N, 1, H, W): a list of patterns with one channel
        source = replace(source, shape=(source.shape[0], *source.shape[2:]))
        view = replace(view, source=source, axes=(axes[0], *axes[2:]))
    if len(source.shape) == 3:
        return _stack(name, chosen, view, geometry)
    if len(source.shape) != 4:
        raise SourceError(
            f"{name}: {chosen.name} has {len(source.shape)} axes; expected 4 or a stack of patterns"
        )
    if any(_ends(geometry)):
        raise SourceError(
            f"{name}: input.skip_frames is {geometry.skip_frames}, but the data are a scan of {by(source.shape[:2])} "
            "already; leave it out, or take a part with input.scan_roi"
        )
    names = (*SCAN_DIMS, *DETECTOR_DIMS)
    if _detector_first(name, chosen, geometry.scan_order):
        note = "the detector's axes come first in the file; reading takes longer"
        if chosen.swapped is None and geometry.scan_order == "auto":
            note += f" (by {', '.join(axis.units or axis.name for axis in axes)})"
        view = view.on(
            View.of(source).transpose(DETECTOR_FIRST), _named((*axes[2:], *axes[:2]), names), note
        )
    else:
        view = replace(view, axes=_named(axes, names))
        if geometry.scan_order == "auto" and [_is_reciprocal(axis.units) for axis in axes] == _SCAN_FIRST[::-1]:  # fmt: skip
            units = ", ".join(axis.units for axis in axes)
            note = f"by the units ({units}) the detector might come first; set input.scan_order: detector_first if so"
            view = view.on(source, view.axes, note)
    if geometry.scan_shape is not None and tuple(geometry.scan_shape) != view.source.shape[:2]:
        raise SourceError(
            f"{name}: input.scan_shape is {by(geometry.scan_shape)}, but the data are a scan of "
            f"{by(view.source.shape[:2])}; leave scan_shape out"
        )
    return view


def _by_names(view: Arranged) -> Arranged:
    """The axes in the order of their names, renamed to those of stem_dask."""
    if len(view.axes) not in (3, 4):
        return view
    order, note = order_by([axis.name for axis in view.axes])
    notes = (note,) if note else ()
    if order is None:
        return view.on(view.source, view.axes, *notes)
    axes = [view.axes[i] for i in order]
    names = (*SCAN_DIMS, *DETECTOR_DIMS) if len(order) == 4 else (axes[0].name, *DETECTOR_DIMS)
    source = view.source
    if order != tuple(range(len(order))):
        source = View.of(source).transpose(order)
    return view.on(source, _named(axes, names), *notes)


def _stack(name: str, chosen: Candidate, view: Arranged, geometry: Geometry) -> Arranged:
    """Fold a stack of patterns into the scan that the user or the file gives."""
    source, axes, (first, last) = view.source, view.axes, _ends(geometry)
    if first + last >= source.shape[0]:
        raise SourceError(
            f"{name}: input.skip_frames is {geometry.skip_frames}, but there are {source.shape[0]:,} patterns"
        )
    if first or last:
        whole = slice(None)
        source = View.of(source).select(slice(first, source.shape[0] - last), whole, whole)
        axes = (axes[0].part(first, source.shape[0]), *axes[1:])
        end = f" and the last {last:,}" if last else ""
        view = view.on(source, axes, f"left out the first {first:,}{end} patterns")
    scan = chosen.scan
    if geometry.scan_shape is None and scan is None:
        named = _kind(name) in (".h5", ".hspy", ".zspy") and axes[0].name == LIST_DIMS[0]
        if named or _kind(name) in (".pt", ".npy", ".zarr"):
            return view.on(source, _named(axes, (*LIST_DIMS, *DETECTOR_DIMS)), "a list of patterns")
        if chosen.part:
            raise SourceError(
                f"{name}: {chosen.name} is a stack of {axes[0].size:,} patterns: {chosen.part}"
            )
        raise SourceError(f"{name}: {chosen.name} {_without_scan(name, chosen.hint, axes)}")
    if geometry.scan_shape is not None:
        n_y, n_x = geometry.scan_shape
        y, x = scan or (Axis(SCAN_DIMS[0], n_y), Axis(SCAN_DIMS[1], n_x))
        scan = (replace(y, size=n_y), replace(x, size=n_x))
    assert scan is not None
    n_y, n_x = (axis.size for axis in scan)
    if n_y < 1 or n_x < 1:
        raise SourceError(f"{name}: scan_shape is {n_y} x {n_x}; both sizes must be 1 or more")
    framed = frame_way(name, chosen.source, n_y * n_x)
    if n_y * n_x != source.shape[0]:
        whose = (
            "input.scan_shape"
            if geometry.scan_shape is not None
            else "the scan that the file states,"
        )
        ways = [
            f"{keys} ({words})"
            for keys, words in scan_ways(source.shape[0], (n_y, n_x), (first, last))
        ]
        if framed:
            ways.insert(0, framed)
        raise SourceError(
            f"{name}: {source.shape[0]:,} patterns; {whose} {n_y} x {n_x} needs {n_y * n_x:,}; set {'; or '.join(ways)}"
            + "".join(f" ({note})" for note in chosen.notes if "less than a pattern" in note)
        )
    notes = [chosen.part.partition("; join them")[0]] if chosen.part else []
    if geometry.scan_shape is None:
        notes.append(f"the file states a scan of {n_y:,} x {n_x:,}")
    if framed and (first or last):
        notes.append(f"the size of the file also fits {framed}; check that patterns do not shift")
    folded = (*_named(scan, SCAN_DIMS), *_named(axes[1:], DETECTOR_DIMS))
    return view.on(ScanOfList(source, (n_y, n_x)), folded, *notes)


def _without_scan(name: str, hint: str, axes: Sequence[Axis]) -> str:
    """What a stack without a scan is, and what its scan might be: as a header hints, or a square."""
    n, side = axes[0].size, isqrt(axes[0].size)
    pixels = by([axis.size for axis in axes[1:]])
    spectra = next((axis for axis in axes if axis.units.lower() in _ENERGIES), None)
    if n == 1:
        single = f"is a single image of {pixels} pixels, no scan of patterns"
        return f"{of_many(name) or single}; input.scan_shape: [1, 1] reads it as a scan of one"
    if spectra is not None:
        hint = f"one of its axes is in {spectra.units}, as of spectra, which are no patterns"
    if not hint and side * side == n:
        hint = f"{side} x {side} would fit"
    guess = f" ({hint})" if hint else ""
    return f"is a stack of {n:,} patterns of {pixels} pixels; give its scan as input.scan_shape: [scan_y, scan_x]{guess}"


def _ends(geometry: Geometry) -> tuple[int, int]:
    """Patterns to leave out at the beginning and at the end."""
    skip = geometry.skip_frames
    return (skip, 0) if isinstance(skip, int) else (skip[0], skip[1])


def parted(name: str, view: Arranged, geometry: Geometry) -> Arranged:
    """Leave out the flyback, flip the patterns, select region and step of the scan.

    Raises
    ------
    SourceError
        When what is left out does not fit the scan.
    """
    drop = geometry.drop_columns
    if drop:
        sizes = view.source.shape
        if len(sizes) != 4 or drop >= sizes[1]:
            what = f"rows of {sizes[1]:,} positions" if len(sizes) == 4 else "a list of patterns"
            raise SourceError(
                f"{name}: input.drop_columns is {drop}, but the input has {what}; it leaves out columns at the end of "
                "every row of a scan"
            )
        axes = (view.axes[0], view.axes[1].part(0, sizes[1] - drop), *view.axes[2:])
        note = f"left out the last {drop:,} columns of the scan"
        whole = slice(None)
        view = view.on(View.of(view.source).select(whole, slice(-drop), whole, whole), axes, note)
    if geometry.flip:
        # the axis runs backwards, so that the center keeps its value
        axes = (*view.axes[:-2], _backwards(view.axes[-2]), view.axes[-1])
        view = view.on(
            View.of(view.source).flip(-2), axes, "every pattern is flipped top to bottom"
        )
    picked = select(view.source, geometry.scan_roi, geometry.scan_step)
    if picked is view.source:
        return view
    y0, _, x0, _ = geometry.scan_roi if geometry.scan_roi is not None else (0, 0, 0, 0)
    axes = (
        view.axes[0].part(y0, picked.shape[0], geometry.scan_step),
        view.axes[1].part(x0, picked.shape[1], geometry.scan_step),
        *view.axes[2:],
    )
    return replace(view, source=picked, axes=axes)


def _backwards(axis: Axis) -> Axis:
    """The axis of rows in reverse, with ascending values: an origin in the detector stays at its pixel."""
    return replace(axis, offset=-axis.value(axis.size - 1)) if axis.calibrated else axis


def _detector_first(name: str, chosen: Candidate, scan_order: str) -> bool:
    """By the option, else by the file, else by the units of the axes; ambiguous DM files are refused."""
    if scan_order != "auto":
        return scan_order == "detector_first"
    if chosen.swapped is not None:
        return not chosen.swapped
    names = tuple(axis.name for axis in chosen.axes)
    if names in ((*DETECTOR_DIMS, *SCAN_DIMS), (*SCAN_DIMS, *DETECTOR_DIMS)):
        return names[0] == DETECTOR_DIMS[0]
    reciprocal = [_is_reciprocal(axis.units) for axis in chosen.axes]
    if reciprocal in (_SCAN_FIRST, _SCAN_FIRST[::-1]):
        return reciprocal != _SCAN_FIRST
    if _kind(name) not in (".dm3", ".dm4"):
        return False
    units = ", ".join(axis.units or "none" for axis in chosen.axes)
    raise SourceError(
        f"{name}: cannot tell scan from detector: no Data Order Swapped tag, and the units are ({units}); "
        f"the axes are {by(chosen.source.shape)}: set input.scan_order to scan_first or detector_first"
    )


def _is_reciprocal(units: str) -> bool | None:
    """Whether a unit is reciprocal, in any spelling; None when it is ambiguous.

    Examples
    --------
    >>> [_is_reciprocal(u) for u in ("1 / Å", "nm⁻¹", "$A^{-1}$", "[n_m^-1]", "mrad", "µm", "Angstrom", "counts")]
    [True, True, True, True, True, False, False, None]
    """
    # NFKC unifies signs that look alike (micro and mu, angstrom and ring) and superscripts
    plain_units = unicodedata.normalize("NFKC", units).replace("\u2212", "-").lower()
    plain_units = re.sub(r"[\s_${}\[\]]", "", plain_units)
    if (
        plain_units.startswith("1/")
        or plain_units.endswith("-1")
        or plain_units in ("mrad", "rad", "urad", "\u03bcrad")
    ):
        return True
    return False if plain_units in _LENGTHS else None


def _named(axes: Sequence[Axis], names: Sequence[str]) -> tuple[Axis, ...]:
    return tuple(replace(axis, name=name) for axis, name in zip(axes, names, strict=True))


def _kind(name: str) -> str:
    return Path(name).suffix.lower()
