"""Open a 4D-STEM file: the patterns, their axes and metadata; no data are read.

`find` reads headers only and needs neither dask nor numba, so that a bad file is refused before a cluster starts. The
formats are in `stem_dask.readers.formats`.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import original, to_json
from stem_dask.core.model import Axis, SourceInfo
from stem_dask.core.text import by
from stem_dask.readers.arrays import Hdf5Dataset, Missing, ZarrArray
from stem_dask.readers.containers import can_be_quoted
from stem_dask.readers.formats import open_file
from stem_dask.readers.layout import Arranged, Geometry, arranged, parted
from stem_dask.readers.raw import RawLayout
from stem_dask.readers.source import Candidate, Source, Wrapped, identity
from stem_dask.readers.views import View
from stem_dask.storage.errors import one_line, translate

_MOST_LISTED = 12  # arrays that a message names

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
        """How the file, or one that belongs to it, has changed since it was opened; None when it has not.

        Raises
        ------
        SourceError
            When it is gone, or cannot be reached.
        """
        path, size, modified = self.identity
        try:
            with translate(SourceError):
                _, size_now, modified_now = identity(path, *self.files)
        except SourceError as error:
            raise SourceError(
                f"{path} was removed, or cannot be reached any more: {error}"
            ) from error
        if (size, modified) == (size_now, modified_now):
            return None
        found = [f"size {size:,} -> {size_now:,}"] if size != size_now else []
        if modified != modified_now:
            found.append(
                "modified" if self.files else f"modified {_time(modified)} -> {_time(modified_now)}"
            )
        return ", ".join(found)


def find(
    path: str | Path,
    *,
    dataset: str | int | None = None,
    missing_chunks: Missing = "refuse",
    **options: Any,
) -> Found:
    """Open a file without reading its patterns.

    Parameters
    ----------
    path, dataset, missing_chunks : as of `stem_dask.open`
    options : fields of `Geometry` and `RawLayout`

    Raises
    ------
    SourceError
        When the file is missing, damaged, of an unknown format, or does not hold patterns.
    """
    name = str(path)
    layout = RawLayout(
        **{f.name: options.pop(f.name) for f in fields(RawLayout) if f.name in options}
    )
    geometry = Geometry(**options)
    kind, candidates = open_file(name, layout)
    chosen, notes = _choose(name, [_four_axes(c) for c in candidates], dataset)
    if chosen.fault:
        raise SourceError(chosen.fault)
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
    n_bytes = math.prod(chosen.source.shape) * chosen.source.dtype.itemsize
    if n_bytes > _MOST_BYTES:  # of chunks that were never written: the graph would never end
        raise SourceError(
            f"{name}: {chosen.name} claims {by(chosen.source.shape)} {chosen.source.dtype}, {n_bytes / 1e12:,.0f} TB, but "
            f"no scan is larger than {_MOST_BYTES / 1e12:,.0f} TB; its sizes are damaged"
        )
    start = Arranged(chosen.source, chosen.axes, (*notes, *chosen.notes))
    view = parted(name, arranged(name, chosen, start, geometry), geometry)
    info = SourceInfo(
        path=name,
        kind=kind,
        axes=view.axes,
        dtype=str(view.source.dtype),
        stored_shape=chosen.source.shape,
        chunks=chosen.chunks if view.source is chosen.source else None,
        notes=view.notes,
        metadata=original(chosen.metadata or {}),
        about=_about(chosen.about or {}),
    )
    valid = _valid(name, chosen, geometry, view.source.shape[:-2])
    return Found(view.source, info, identity(name, *chosen.files), valid, chosen.files)


def _time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) + f".{rest // 10**6:03}"


_NOTHING: tuple[Any, ...] = (None, "", {})


def _about(about: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON; the metadata of a signal are JSON already, and keep their long texts."""
    kept = {"metadata": about["metadata"]} if about.get("metadata") else {}
    return {
        **to_json({k: v for k, v in about.items() if k != "metadata" and v not in _NOTHING}),
        **kept,
    }


def _valid(
    name: str, chosen: Candidate, geometry: Geometry, lead: tuple[int, ...]
) -> Source | None:
    """Which patterns the file states as missing, in the order and region that are read."""
    if chosen.valid is None:
        return None
    axes = (*chosen.axes[: len(chosen.valid.shape) - 2], Axis("ky", 1), Axis("kx", 1))
    view = parted(name, arranged(name, chosen, Arranged(chosen.valid, axes), geometry), geometry)
    return view.source if view.source.shape[:-2] == lead else None


def _four_axes(candidate: Candidate) -> Candidate:
    """Without leading axes of length 1 when there are more than four, and with a printable name."""
    candidate = replace(candidate, name=one_line(candidate.name))
    shape = candidate.source.shape
    surplus = [i for i, n in enumerate(shape) if n == 1][: max(0, len(shape) - 4)]
    if len(shape) - len(surplus) > 4 or not surplus:
        return candidate
    kept = tuple(i for i in range(len(shape)) if i not in surplus)
    chunks = candidate.chunks
    return replace(
        candidate,
        source=View.of(candidate.source).squeeze(kept),
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
        for position, candidate in enumerate(candidates):
            number = position if candidate.number is None else candidate.number
            if dataset in (candidate.name, f"/{candidate.name}", number):
                return candidate, []
        linked = _behind_link(name, candidates, dataset)
        if linked is not None:
            return linked, [f"{dataset} is a link to {linked.name}"]
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
    series = next((c for c in candidates if len(c.source.shape) > 4), None)
    raise SourceError(
        f"{name}: no 4D array (scan_y, scan_x, ky, kx) and no stack of patterns; the file holds {listing}"
        + ("" if series is None else f"; {_one_of_series(name, series)}")
    )


def _one_of_series(name: str, series: Candidate) -> str:
    """The command that writes the first scan of an array with more than four axes into a file."""
    source, n_axes = series.source, len(series.source.shape)
    inside = source.name if isinstance(source, (Hdf5Dataset, ZarrArray)) else ""
    first = ", ".join("0" * (n_axes - 4))
    if isinstance(source, Hdf5Dataset):
        array, needs = f"h5py.File('{name}')['{inside}']", "h5py, hdf5plugin, numpy"
    elif isinstance(source, ZarrArray):
        array, needs = f"zarr.open('{name}')" + (f"['{inside}']" if inside else ""), "numpy, zarr"
    else:
        array, needs = f"numpy.load('{name}', mmap_mode='r')", "numpy"
    if not can_be_quoted(name, inside) or not (inside or name.endswith((".npy", ".zarr"))):
        return f"write one scan of the {n_axes} axes into a file of its own"
    out = f"{Path(name).stem}_0.npy"
    return (
        f"of {n_axes} axes write one scan into a file of its own: "
        f"python -c \"import {needs}; numpy.save('{out}', {array}[{first}])\", then open {out}"
    )


def _behind_link(name: str, candidates: list[Candidate], dataset: str | int) -> Candidate | None:
    """The array of an HDF5 file behind a link, as in NeXus files."""
    if isinstance(dataset, int) or not any(_is_hdf5(c.source) for c in candidates):
        return None
    from stem_dask.readers.hdf5 import name_behind

    found = name_behind(name, dataset, [c.name for c in candidates])
    return next((c for c in candidates if c.name == found), None)


def _is_hdf5(source: Source) -> bool:
    while isinstance(source, Wrapped):
        source = source.source
    return isinstance(source, Hdf5Dataset)


def _listed(texts: list[str]) -> str:
    """The first of them on one line."""
    more = len(texts) - _MOST_LISTED
    shown = [one_line(text) for text in texts[:_MOST_LISTED]]
    return "; ".join(shown) + (f"; and {more:,} more" if more > 0 else "")


def _with_missing(name: str, chosen: Candidate, missing: Missing) -> Candidate:
    """Apply ``missing_chunks``, and note how many chunk files are missing."""
    stored = chosen.source.source if isinstance(chosen.source, View) else chosen.source
    if not isinstance(stored, ZarrArray):
        if missing == "zero":
            raise SourceError(
                f"{name}: input.missing_chunks is for zarr stores, whose chunks are files; leave it out"
            )
        return chosen
    from stem_dask.readers.zarr_chunks import missing_note

    stored = replace(stored, missing=missing)
    note = missing_note(stored.path, stored.name, zero=missing == "zero")
    source: Source = stored
    if isinstance(chosen.source, View):
        source = replace(chosen.source, source=stored)
    return replace(chosen, source=source, notes=(*chosen.notes, *([note] if note else ())))
