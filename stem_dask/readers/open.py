"""Open a 4D-STEM file: the patterns, their axes and metadata; no data are read.

`find` reads headers only and needs neither dask nor numba, so that a bad file is refused before a cluster starts. The
formats are in `stem_dask.readers.formats`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.metadata import original, to_json
from stem_dask.core.model import DETECTOR_DIMS, SCAN_DIMS, Axis, SourceInfo
from stem_dask.core.text import by
from stem_dask.readers.containers import Hdf5Dataset, Missing, ZarrArray
from stem_dask.readers.formats import is_one_input, open_file
from stem_dask.readers.hdf5 import name_behind
from stem_dask.readers.layout import Geometry, arranged, parted
from stem_dask.readers.raw import RawLayout
from stem_dask.readers.series import of_axes, open_series
from stem_dask.readers.source import Candidate, Source, identity, stored
from stem_dask.readers.views import View
from stem_dask.readers.zarr_chunks import missing_note
from stem_dask.storage.errors import one_line, translate

_MOST_BYTES = 10**14


@dataclass(frozen=True)
class Found:
    """The patterns of a file.

    ``valid`` is (scan_y, scan_x, 1, 1) or (pattern, 1, 1), False where the file states that a pattern is missing;
    None when none is.
    """

    source: Source
    info: SourceInfo
    identity: tuple[str, int, int]
    valid: Source | None = None
    #: further files that ``identity`` includes
    files: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes of the patterns."""
        return math.prod(self.source.shape) * self.source.dtype.itemsize

    def change(self) -> str | None:
        """How the file, or one that belongs to it, has changed since it was opened; None when it has not."""
        path, size, modified = self.identity
        try:
            with translate(SourceError):
                _, size_now, modified_now = identity(path, *self.files)
        except SourceError as error:
            raise SourceError(
                f"{path} was removed, or cannot be reached any more: {error}"
            ) from error
        found = [f"size {size:,} -> {size_now:,}"] if size != size_now else []
        if modified != modified_now:
            first, last = (
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ns // 10**9))
                + f".{ns % 10**9 // 10**6:03}"
                for ns in (modified, modified_now)
            )
            found.append("modified" if self.files else f"modified {first} -> {last}")
        return ", ".join(found) or None


def find(
    path: str | Path,
    *,
    dataset: str | int | None = None,
    missing_chunks: Missing = "refuse",
    series: bool = False,
    index: Mapping[str, int] | None = None,
    **options: Any,
) -> Found:
    """Open a file without reading its patterns.

    Parameters
    ----------
    path, dataset, missing_chunks, series, index : as of `stem_dask.open`
    options : fields of `Geometry` and `RawLayout`
    """
    name = str(path)
    layout = RawLayout(
        **{f.name: options.pop(f.name) for f in fields(RawLayout) if f.name in options}
    )
    geometry = Geometry(**options)
    notes: list[str] = []
    first = name
    if series and not is_one_input(name):
        kind, chosen, first = open_series(name, partial(open_file, layout=layout), dataset)
    else:
        kind, candidates = open_file(name, layout)
        candidates = [_four_axes(one) for one in candidates]
        if index is not None and all(len(one.source.shape) < 5 for one in candidates):
            raise ConfigError(
                f"input.index is {dict(index)}, and {name} has no array of more than four axes; leave it out"
            )
        cut = [of_axes(name, one, index, series=series) for one in candidates]
        chosen, notes = _choose(name, cut, dataset)
    if chosen.fault:
        raise SourceError(chosen.fault)
    inner = View.of(chosen.source)
    if isinstance(inner.source, ZarrArray):
        array = replace(inner.source, missing=missing_chunks)
        source: Source = replace(inner, source=array) if inner is chosen.source else array
        note = missing_note(array.path, array.name, zero=missing_chunks == "zero")
        chosen = replace(chosen, source=source, notes=(*chosen.notes, *filter(None, [note])))
    elif missing_chunks == "zero":
        raise SourceError(
            f"{name}: input.missing_chunks is for zarr stores, whose chunks are files; leave it out"
        )
    shape, dtype = chosen.source.shape, chosen.source.dtype
    n_bytes, fault = math.prod(shape) * dtype.itemsize, ""
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        fault = (
            f"is of type {dtype}; patterns are bool, integer or real numbers. Save the intensity (for example the squared "
            "modulus) and open that"
        )
    elif 0 in shape:
        fault = f"has shape {by(shape)}: it holds nothing"
    elif n_bytes > _MOST_BYTES:  # of chunks that were never written: the graph would never end
        fault = (
            f"claims {by(shape)} {dtype}, {n_bytes / 1e12:,.0f} TB, but no scan is larger than {_MOST_BYTES / 1e12:,.0f} TB; "
            "its sizes are damaged"
        )
    if fault:
        raise SourceError(f"{name}: {chosen.name} {fault}")
    chosen = replace(chosen, notes=(*notes, *chosen.notes))
    view = parted(name, arranged(name, chosen, geometry), geometry)
    about = {k: v for k, v in (chosen.about or {}).items() if v not in (None, "", {})}
    info = SourceInfo(
        path=name,
        kind=kind,
        axes=view.axes,
        dtype=str(view.source.dtype),
        stored_shape=shape,
        chunks=chosen.chunks if view.source is chosen.source else None,
        notes=view.notes,
        metadata=original(chosen.metadata or {}),
        about=to_json(about),
        scan_part=view.scan_part,
    )
    valid = None
    if chosen.valid is not None:  # in the order and region that are read
        axes = (*chosen.axes[: len(chosen.valid.shape) - 2], Axis("ky", 1), Axis("kx", 1))
        stated = replace(chosen, source=chosen.valid, axes=axes)
        valid = parted(name, arranged(name, stated, geometry), geometry).source
        valid = valid if valid.shape[:-2] == view.source.shape[:-2] else None
    return Found(view.source, info, identity(first, *chosen.files), valid, chosen.files)


def _four_axes(candidate: Candidate) -> Candidate:
    """Without leading axes of length 1 when there are more than four, and with a printable name."""
    candidate = replace(candidate, name=one_line(candidate.name))
    shape = candidate.source.shape
    surplus = [i for i, n in enumerate(shape) if n == 1][: max(0, len(shape) - 4)]
    if len(shape) - len(surplus) > 4 or not surplus:
        return candidate
    kept = [i for i in range(len(shape)) if i not in surplus]
    chunks = candidate.chunks
    parts = (0 if i in surplus else slice(None) for i in range(len(shape)))
    return replace(
        candidate,
        source=View.of(candidate.source).select(*parts),
        axes=tuple(candidate.axes[i] for i in kept),
        chunks=None if chunks is None else tuple(chunks[i] for i in kept),
        notes=(*candidate.notes, f"left out the axes of length 1 of {by(shape)}"),
    )


def _choose(
    name: str, candidates: list[Candidate], dataset: str | int | None
) -> tuple[Candidate, list[str]]:
    """The array to read, and notes."""
    if not candidates:
        raise SourceError(f"{name}: the file holds no array of numbers")
    listing = _listed([f"{c.name}: {by(c.source.shape)} {c.source.dtype}" for c in candidates])
    if dataset is not None:
        for position, candidate in enumerate(candidates):
            number = position if candidate.number is None else candidate.number
            if dataset in (candidate.name, f"/{candidate.name}", number):
                return candidate, []
        sources = {candidate.name: stored(candidate.source) for candidate in candidates}
        names = {s.name: known for known, s in sources.items() if isinstance(s, Hdf5Dataset)}
        if names and not isinstance(dataset, int):  # behind a link, as in NeXus files
            behind = names.get(name_behind(name, dataset, names) or "")
            for candidate in candidates:
                if candidate.name == behind:
                    return candidate, [f"{dataset} is a link to {behind}"]
        raise SourceError(f"{name}: there is no dataset {dataset!r}; the file holds {listing}")
    for n_axes in (4, 3):
        fitting = [c for c in candidates if len(c.source.shape) == n_axes]
        if len(fitting) > 1:
            shapes = _listed([f"{c.name}: {by(c.source.shape)}" for c in fitting])
            raise SourceError(
                f"{name}: the file holds {len(fitting)} arrays of {n_axes} axes; choose one with input.dataset: {shapes}"
            )
        if fitting:
            note = f"took {fitting[0].name} ({by(fitting[0].source.shape)}) of: {listing}"
            return fitting[0], [note] if len(candidates) > 1 else []
    fault = (
        f"no 4D array (scan_y, scan_x, ky, kx) and no stack of patterns; the file holds {listing}"
    )
    series = next((c.axes for c in candidates if len(c.axes) > 4), ())
    if len(series) == 5:
        fault += (
            "; choose one of its scans with input.index={t: 0}, or read all of them one after another along scan_y with "
            "input.series=true"
        )
    elif series:
        chosen = ", ".join(f"{axis.name}: 0" for axis in series[:-4])
        fault += f"; choose one of its scans with input.index={{{chosen}}}"
    raise SourceError(f"{name}: {fault}")


def _listed(texts: list[str]) -> str:
    """The first twelve on one line."""
    more = f"; and {len(texts) - 12:,} more" if len(texts) > 12 else ""
    return "; ".join(one_line(text) for text in texts[:12]) + more


_FORM = "{ky: {scale: 0.01, units: 1/nm, offset: -0.6}, …} for scan_y, scan_x, ky and kx"


def with_given(
    found: Found,
    calibration: Mapping[str, Mapping[str, Any] | None] | None,
    beam_energy_kv: float | None,
    scan_roi: Sequence[int] | None = None,
    scan_step: int = 1,
) -> Found:
    """Apply the user's calibration and beam energy in keV, and note them.

    ``calibration`` has by axis a ``scale`` (not 0), ``units`` and perhaps ``offset`` (the value at the first pixel of the
    file); without an offset the pixel of value 0 stays the same. It is that of the whole scan, of which ``scan_roi`` and
    ``scan_step`` take a part.
    """
    axes = {axis.name: axis for axis in found.info.axes}
    given: dict[str, Any] = {}
    notes = list(found.info.notes)
    y0, _, x0, _ = (0, 0, 0, 0) if scan_roi is None else scan_roi
    parts = {"scan_y": (y0, scan_step), "scan_x": (x0, scan_step)}
    for name, values in (calibration or {}).items():
        if values is None:
            continue
        if name not in axes:
            known = " and ".join(axes) if name in (*SCAN_DIMS, *DETECTOR_DIMS) else _FORM
            raise ConfigError(
                f"input.calibration names {name}, which is not an axis of {found.info.path}; expected {known}"
            )
        chosen = {key: value for key, value in values.items() if value is not None}
        fault, scale, offset = "", float(chosen.get("scale", 0)), chosen.get("offset")
        if not {"scale", "units"} <= {*chosen} <= {"scale", "units", "offset"}:
            fault = f"scale, units and perhaps offset: {_FORM}"
        elif not scale or not isfinite(scale) or not isfinite(offset or 0):
            fault = "finite numbers and a scale other than 0"
        if fault:
            raise ConfigError(f"input.calibration.{name} is {chosen}; expected {fault}")
        axis, (start, step) = axes[name], parts.get(name, (0, 1))
        if offset is None:  # the zero stays at the same pixel
            zero = scale * step * (axis.offset / axis.scale if axis.scale else 0.0)
            axis = replace(axis, scale=scale * step, offset=zero, units=chosen["units"])
        else:
            axis = replace(axis, scale=scale, offset=float(offset), units=chosen["units"])
            axis = axis.part(start, axis.size, step)
        axes[name] = axis
        given.setdefault("calibration", {})[name] = chosen
        notes.append(f"{name} as given: {chosen['scale']:g} {chosen['units']} a pixel")
    if beam_energy_kv is not None:
        if not (isfinite(beam_energy_kv) and beam_energy_kv > 0):
            raise ConfigError(
                f"beam_energy_kv is {beam_energy_kv}; expected a number above 0, such as 200"
            )
        given["beam_energy_kv"] = float(beam_energy_kv)
        notes.append(f"beam energy as given: {beam_energy_kv:g} kV")
    info = replace(found.info, axes=tuple(axes.values()), notes=tuple(notes), given=given)
    return replace(found, info=info)
