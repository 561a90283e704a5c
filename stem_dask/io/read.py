"""Open a 4D-STEM file: find the patterns, their axes and their place; nothing of the data is read.

`find` looks at headers only and needs neither dask nor numba, so that a bad file is refused before a cluster exists.
The families of files it knows are in `stem_dask.io.families`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from stem_dask.errors import SourceError
from stem_dask.io.candidate import Candidate, by, plain
from stem_dask.io.claims import refuse_impossible
from stem_dask.io.damage import one_line
from stem_dask.io.families import open_file
from stem_dask.io.frames import Flipped, Squeezed
from stem_dask.io.raw import RawLayout
from stem_dask.io.sources import (
    DETECTOR_FIRST,
    FlatFile,
    Missing,
    ScanOfList,
    Selection,
    Source,
    Transposed,
    ZarrArray,
    identity,
    select,
)
from stem_dask.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS, Axis, SourceInfo

ScanOrder = Literal["auto", "scan_first", "detector_first"]
_MOST_LISTED = 12  # arrays that a message names


@dataclass(frozen=True)
class Found:
    """The patterns of a file, and what was found out about them.

    ``valid`` is (scan_y, scan_x, 1, 1) or (pattern, 1, 1), False where the file itself says that a pattern is missing;
    None when none is.
    """

    source: Source
    info: SourceInfo
    identity: tuple[str, int, int]
    valid: Source | None = None


@dataclass(frozen=True)
class _Geometry:
    """What the user says of how the patterns lie; see `find`."""

    scan_shape: Sequence[int] | None
    scan_order: ScanOrder
    scan_roi: Sequence[int] | None
    scan_step: int
    skip_frames: int
    drop_columns: int
    flip: bool


@dataclass(frozen=True)
class _View:
    """A source on its way from the file to the patterns."""

    source: Source
    axes: tuple[Axis, ...]
    notes: tuple[str, ...] = ()

    def on(self, source: Source, axes: Sequence[Axis], *notes: str) -> "_View":
        return _View(source, tuple(axes), (*self.notes, *notes))


def find(
    path: str | Path,
    *,
    dataset: str | int | None = None,
    scan_shape: Sequence[int] | None = None,
    scan_order: ScanOrder = "auto",
    scan_roi: Sequence[int] | None = None,
    scan_step: int = 1,
    skip_frames: int = 0,
    drop_columns: int = 0,
    flip: bool = False,
    missing_chunks: Missing = "refuse",
    shape: Sequence[int] | None = None,
    dtype: str | None = None,
    offset: int = 0,
) -> Found:
    """Look into a file and settle where the patterns are and how they lie.

    Parameters
    ----------
    path : a file of a kind in `stem_dask.io.families.READERS`
    dataset : name or number of the array, when the file holds several
    scan_shape : (scan_y, scan_x) as in the file, for a stack of patterns that does not say its own
    scan_order : which axes are the scan: ``scan_first``, ``detector_first``, or ``auto`` (as the file says)
    scan_roi : [y0, y1, x0, x1] of the scan, end exclusive
    scan_step : take every n-th position of it
    skip_frames : leading patterns of a stack that are left out before the scan is folded
    drop_columns : columns at the end of each scan row that are left out (flyback); ``scan_shape`` counts them
    flip : turn every pattern top to bottom
    missing_chunks : of a zarr store: ``refuse`` to read what chunk files that are not there held, or ``zero``
    shape : [scan_y, scan_x, ky, kx] or [n, ky, kx], of a .raw file
    dtype : numpy's name of the type, of a .raw file
    offset : byte at which a .raw file's numbers begin

    Raises
    ------
    SourceError
        When the file is missing, damaged, of an unknown kind, or does not hold patterns.
    """
    name = str(path)
    geometry = _Geometry(
        scan_shape, scan_order, scan_roi, scan_step, skip_frames, drop_columns, flip
    )
    kind, candidates = open_file(name, RawLayout(shape, dtype, offset))
    chosen, notes = _choose(name, [_four_axes(c) for c in candidates], dataset)
    chosen = _with_missing(name, chosen, missing_chunks)
    if chosen.source.dtype.kind not in "buif" or chosen.source.dtype.itemsize > 8:
        raise SourceError(
            f"{name}: {chosen.name} is of type {chosen.source.dtype}; patterns are bool, integer or real numbers. "
            "Save the intensity (for example the squared modulus) and open that"
        )
    if 0 in chosen.source.shape:
        raise SourceError(
            f"{name}: {chosen.name} has shape {by(chosen.source.shape)}: it holds nothing"
        )
    refuse_impossible(name, chosen.name, chosen.source)
    start = _View(chosen.source, chosen.axes, (*notes, *chosen.notes))
    view = _parts(name, _arrange(name, chosen, start, geometry), geometry)
    info = SourceInfo(
        path=name,
        kind=kind,
        axes=view.axes,
        dtype=str(view.source.dtype),
        stored_shape=chosen.source.shape,
        chunks=chosen.chunks if view.source is chosen.source else None,
        notes=view.notes,
        metadata=plain(chosen.metadata),
        about=plain(chosen.about),
    )
    valid = _valid(name, chosen, geometry, view.source.shape[:-2])
    return Found(view.source, info, identity(name, *chosen.files), valid)


def _valid(
    name: str, chosen: Candidate, geometry: _Geometry, lead: tuple[int, ...]
) -> Source | None:
    """Which patterns are missing by the file's own word, brought into the order and to the part that are read."""
    if chosen.valid is None:
        return None
    axes = (*chosen.axes[: len(chosen.valid.shape) - 2], Axis("ky", 1), Axis("kx", 1))
    view = _parts(name, _arrange(name, chosen, _View(chosen.valid, axes), geometry), geometry)
    return view.source if view.source.shape[:-2] == lead else None


def _four_axes(candidate: Candidate) -> Candidate:
    """Without leading axes of length 1, where there are more than four; with a name that can be shown."""
    candidate = replace(candidate, name=one_line(candidate.name))
    shape = candidate.source.shape
    surplus = [i for i, n in enumerate(shape) if n == 1][: max(0, len(shape) - 4)]
    if len(shape) - len(surplus) > 4 or not surplus:
        return candidate
    kept = tuple(i for i in range(len(shape)) if i not in surplus)
    chunks = candidate.chunks
    return replace(
        candidate,
        source=Squeezed(candidate.source, kept),
        axes=tuple(candidate.axes[i] for i in kept),
        chunks=None if chunks is None else tuple(chunks[i] for i in kept),
        notes=(*candidate.notes, f"left out the axes of length 1 of {by(shape)}"),
    )


def _choose(
    name: str, candidates: list[Candidate], dataset: str | int | None
) -> tuple[Candidate, list[str]]:
    listing = _listed([f"{c.name}: {by(c.source.shape)} {c.source.dtype}" for c in candidates])
    if not candidates:
        raise SourceError(f"{name}: the file holds no array of numbers")
    if dataset is not None:
        for number, candidate in enumerate(candidates):
            if dataset in (candidate.name, number):
                return candidate, []
        raise SourceError(f"{name}: there is no dataset {dataset!r}; the file holds {listing}")
    for n_axes in (4, 3):
        fitting = [c for c in candidates if len(c.source.shape) == n_axes]
        if len(fitting) > 1:
            raise SourceError(
                f"{name}: the file holds {len(fitting)} arrays of {n_axes} axes; choose one with input.dataset: "
                + _listed([f"{c.name}: {by(c.source.shape)}" for c in fitting])
            )
        if fitting:
            others = len(candidates) - 1
            notes = (
                [f"took {fitting[0].name} ({by(fitting[0].source.shape)}) of: {listing}"]
                if others
                else []
            )
            return fitting[0], notes
    raise SourceError(
        f"{name}: no 4D array (scan_y, scan_x, ky, kx) and no stack of patterns; the file holds {listing}"
    )


def _listed(texts: list[str]) -> str:
    """The first of them on one line; a file may hold thousands of arrays."""
    more = len(texts) - _MOST_LISTED
    shown = [one_line(text) for text in texts[:_MOST_LISTED]]
    return "; ".join(shown) + (f"; and {more:,} more" if more > 0 else "")


def _with_missing(name: str, chosen: Candidate, missing: Missing) -> Candidate:
    """Settle what becomes of chunk files that are not there, and note how many there are of them."""
    stored = chosen.source.source if isinstance(chosen.source, Squeezed) else chosen.source
    if not isinstance(stored, ZarrArray):
        if missing == "zero":
            raise SourceError(
                f"{name}: input.missing_chunks is for zarr stores, whose chunks are files; leave it out"
            )
        return chosen
    from stem_dask.io.chunks import missing_note

    stored = replace(stored, missing=missing)
    note = missing_note(stored.path, stored.name, zero=missing == "zero")
    source: Source = stored
    if isinstance(chosen.source, Squeezed):
        source = replace(chosen.source, source=stored)
    return replace(chosen, source=source, notes=(*chosen.notes, *([note] if note else ())))


def _arrange(name: str, chosen: Candidate, view: _View, geometry: _Geometry) -> _View:
    """Bring the axes into the order (scan_y, scan_x, ky, kx), or (pattern, ky, kx)."""
    source, axes = view.source, view.axes
    if (
        isinstance(source, FlatFile)
        and len(source.shape) == 4
        and source.shape[1] == 1
        and axes[1].name != SCAN_DIMS[1]
        and _kind(name) == ".pt"
    ):
        # (N, 1, H, W): a list of patterns with one channel, as the tensor scripts write it
        source = replace(source, shape=(source.shape[0], *source.shape[2:]))
        view = replace(view, source=source, axes=(axes[0], *axes[2:]))
    if len(source.shape) == 3:
        return _stack(name, chosen, view, geometry)
    if len(source.shape) != 4:
        raise SourceError(
            f"{name}: {chosen.name} has {len(source.shape)} axes; expected 4 or a stack of patterns"
        )
    if geometry.skip_frames:
        raise SourceError(
            f"{name}: input.skip_frames is {geometry.skip_frames}, but the data are a scan of {by(source.shape[:2])} "
            "already; leave it out, or take a part with input.scan_roi"
        )
    names = (*SCAN_DIMS, *DETECTOR_DIMS)
    if _detector_first(name, chosen, geometry.scan_order):
        note = "the detector's axes come first in the file; reading takes longer"
        view = view.on(
            Transposed(source, DETECTOR_FIRST), _named((*axes[2:], *axes[:2]), names), note
        )
    else:
        view = replace(view, axes=_named(axes, names))
    if geometry.scan_shape is not None and tuple(geometry.scan_shape) != view.source.shape[:2]:
        raise SourceError(
            f"{name}: input.scan_shape is {by(geometry.scan_shape)}, but the data are a scan of "
            f"{by(view.source.shape[:2])}; leave scan_shape out"
        )
    return view


def _stack(name: str, chosen: Candidate, view: _View, geometry: _Geometry) -> _View:
    """Fold a stack of patterns into the scan that the user or the file gives."""
    source, axes, skip = view.source, view.axes, geometry.skip_frames
    if skip >= source.shape[0]:
        raise SourceError(
            f"{name}: input.skip_frames is {skip:,}, but there are {source.shape[0]:,} patterns"
        )
    if skip:
        rest = (source.shape[0] - skip, *source.shape[1:])
        source = Selection(source, (skip, 0, 0), (1, 1, 1), rest)
        axes = (axes[0].part(skip, rest[0]), *axes[1:])
        view = view.on(source, axes, f"left out the first {skip:,} patterns")
    scan = chosen.scan
    if geometry.scan_shape is None and scan is None:
        ours = _kind(name) in (".h5", ".hspy", ".zspy") and axes[0].name == LIST_DIMS[0]
        if ours or _kind(name) in (".pt", ".npy", ".zarr"):
            return view.on(source, _named(axes, (*LIST_DIMS, *DETECTOR_DIMS)), "a list of patterns")
        raise SourceError(
            f"{name}: {chosen.name} is a stack of {source.shape[0]:,} patterns of {by(source.shape[1:])} pixels; "
            "give its scan as input.scan_shape: [scan_y, scan_x]"
        )
    told = "input" if geometry.scan_shape is not None else "file"
    if geometry.scan_shape is not None:
        n_y, n_x = geometry.scan_shape
        y, x = scan or (Axis(SCAN_DIMS[0], n_y), Axis(SCAN_DIMS[1], n_x))
        scan = (replace(y, size=n_y), replace(x, size=n_x))
    assert scan is not None
    n_y, n_x = (axis.size for axis in scan)
    if n_y < 1 or n_x < 1:
        raise SourceError(f"{name}: scan_shape is {n_y} x {n_x}; both sizes must be 1 or more")
    if n_y * n_x != source.shape[0]:
        whose = "scan_shape" if told == "input" else "the scan that the file states,"
        raise SourceError(
            f"{name}: {source.shape[0]:,} patterns; {whose} {n_y} x {n_x} needs {n_y * n_x:,}"
            + _fitting(source.shape[0], n_y, n_x, skip)
            + "".join(f" ({note})" for note in chosen.notes if "less than a pattern" in note)
        )
    note = () if told == "input" else (f"the file states a scan of {n_y:,} x {n_x:,}",)
    folded = (*_named(scan, SCAN_DIMS), *_named(axes[1:], DETECTOR_DIMS))
    return view.on(ScanOfList(source, (n_y, n_x)), folded, *note)


def _fitting(n: int, height: int, width: int, skip: int) -> str:
    """What would fit ``n`` patterns, when ``height x width`` does not."""
    hints = []
    if n >= width and n % width == 0:
        hints.append(f"{n // width} x {width} would fit")
    if (more := n - height * width) > 0:
        hints.append(f"input.skip_frames: {skip + more} would leave out {more:,} at the beginning")
    return "".join(f"; {hint}" for hint in hints)


def _parts(name: str, view: _View, geometry: _Geometry) -> _View:
    """Leave out the flyback, turn the patterns, take region and step of the scan."""
    drop = geometry.drop_columns
    if drop:
        sizes = view.source.shape
        if len(sizes) != 4 or drop >= sizes[1]:
            what = f"rows of {sizes[1]:,} positions" if len(sizes) == 4 else "a list of patterns"
            raise SourceError(
                f"{name}: input.drop_columns is {drop}, but the input has {what}; it leaves out columns at the end of "
                "every row of a scan"
            )
        sizes = (sizes[0], sizes[1] - drop, *sizes[2:])
        axes = (view.axes[0], view.axes[1].part(0, sizes[1]), *view.axes[2:])
        note = f"left out the last {drop:,} columns of the scan"
        view = view.on(Selection(view.source, (0,) * 4, (1,) * 4, sizes), axes, note)
    if geometry.flip:
        # the place of a pixel goes with it: the axis runs backwards, so that the center keeps its value
        axes = (*view.axes[:-2], _backwards(view.axes[-2]), view.axes[-1])
        view = view.on(Flipped(view.source), axes, "every pattern is turned top to bottom")
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
    """The axis of rows counted from the other end, with values that rise again: an origin in the detector stays there."""
    return replace(axis, offset=-axis.value(axis.size - 1)) if axis.calibrated else axis


def _detector_first(name: str, chosen: Candidate, scan_order: str) -> bool:
    """By the user's word, else by the file's tag, else by the units of the axes, else refuse (DM files only)."""
    if scan_order != "auto":
        return scan_order == "detector_first"
    if _kind(name) not in (".dm3", ".dm4"):
        return False
    if chosen.swapped is not None:
        return not chosen.swapped
    reciprocal = [_is_reciprocal(axis.units) for axis in chosen.axes]
    if reciprocal[:2] == [False, False] and reciprocal[2:] == [True, True]:
        return False
    if reciprocal[:2] == [True, True] and reciprocal[2:] == [False, False]:
        return True
    units = ", ".join(axis.units or "none" for axis in chosen.axes)
    raise SourceError(
        f"{name}: cannot tell scan from detector: no Data Order Swapped tag, and the units are ({units}); "
        f"the axes are {by(chosen.source.shape)}: set input.scan_order to scan_first or detector_first"
    )


def _is_reciprocal(units: str) -> bool | None:
    """Whether a unit is one of diffraction space; None when it does not tell."""
    plain_units = units.replace(" ", "").lower()
    if (
        plain_units.startswith("1/")
        or plain_units.endswith("^-1")
        or plain_units in ("mrad", "rad")
    ):
        return True
    return False if plain_units in ("nm", "um", "µm", "å", "a", "pm", "mm", "m") else None


def _kind(name: str) -> str:
    return Path(name).suffix.lower()


def _named(axes: Sequence[Axis], names: Sequence[str]) -> tuple[Axis, ...]:
    return tuple(replace(axis, name=name) for axis, name in zip(axes, names, strict=True))
