"""A source as lazy patterns: one task per block, which opens the file by name."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.chunks import lead_chunks
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS, Axis, SourceInfo
from stem_dask.core.patterns import as_patterns, lead_dims
from stem_dask.readers.containers import Missing
from stem_dask.readers.detector_first import detector_first
from stem_dask.readers.layout import ScanOrder
from stem_dask.readers.open import Found, find, with_given
from stem_dask.readers.source import Source
from stem_dask.readers.views import Picked, View, read_block
from stem_dask.stages.blocks import as_arrays, sample_positions
from stem_dask.stages.correct import MaskFill, apply_mask, corrected, read_mask
from stem_dask.storage.location import is_url

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr


def _after_fork() -> None:
    """Give a forked process its own thread pool: it inherits the objects of its parent, but not the threads."""
    threaded = sys.modules.get("dask.threaded")
    if threaded is not None:
        import dask

        threaded.default_pool = None  # type: ignore[attr-defined]
        threaded.pools.clear()
        if dask.config.get("scheduler", None) == "dask.distributed":
            dask.config.set(scheduler="threads")


# without this the child of a fork (a PyTorch DataLoader) would wait forever for its parent's threads
os.register_at_fork(after_in_child=_after_fork)


def lazy_array(source: Source, lead: Sequence[int], name: str) -> da.Array:
    """A dask array over a source; blocks have ``lead`` positions and the whole detector."""
    import dask.array as da

    chunks = (*lead, *source.shape[len(lead) :])
    return da.from_array(
        View.of(source),
        chunks=chunks,
        name=name,
        asarray=False,
        inline_array=True,
        meta=np.empty((0,) * len(source.shape), source.dtype),
    )


def block_positions(
    found: Found, chunk_mb: float | str = "auto", most: int | None = None
) -> tuple[int, ...]:
    """Positions of a block along the scan; see `stem_dask.core.chunks.lead_chunks`."""
    shape, chunks = found.source.shape, found.info.chunks
    pattern_bytes = math.prod(shape[-2:]) * found.source.dtype.itemsize
    # blocks of detector-first files are larger, because longer runs per detector pixel are faster to read
    auto = 64 if detector_first(found.source) is None else 128
    part = None if chunks is None else chunks[:-2]
    return lead_chunks(shape[:-2], pattern_bytes, chunk_mb, most, part, auto)


def block_array(source: Source, lead: Sequence[int], name: str) -> da.Array:
    """The same for the tasks of a job, whose blocks need not be arrays; workers need not import dask.array."""
    import dask.array as da
    from dask.highlevelgraph import HighLevelGraph

    shape = source.shape
    chunks = da.core.normalize_chunks((*lead, *shape[len(lead) :]), shape, dtype=source.dtype)
    keys = itertools.product([name], *(range(len(sizes)) for sizes in chunks))
    regions = da.core.slices_from_chunks(chunks)
    tasks = {key: (read_block, source, region) for key, region in zip(keys, regions, strict=True)}
    graph = HighLevelGraph.from_collections(name, tasks)
    return da.Array(graph, name, chunks, meta=np.empty((0,) * len(shape), source.dtype))


def lazy_blocks(
    found: Found, lead: Sequence[int], as_dask: Callable[..., da.Array] = block_array
) -> xr.DataArray:
    """The calibrated patterns of a file in blocks of ``lead`` positions, with ``valid`` when some are missing."""
    source, info = found.source, found.info
    token = hashlib.sha256(repr((found.identity, source, lead)).encode()).hexdigest()[:16]
    attrs: dict[str, Any] = {"source": info.path, "intensity": "counts", "notes": list(info.notes)}
    attrs |= about_source(info)
    if info.scan_part:
        attrs["scan_part"] = [list(part) for part in info.scan_part]
    data = as_dask(source, lead, f"{as_dask.__name__}-{token}")
    patterns = as_patterns(data, info.axes, attrs)
    if found.valid is None:
        return patterns
    valid = found.valid[tuple(slice(0, n) for n in found.valid.shape)][..., 0, 0]
    return patterns.assign_coords(valid=(lead_dims(patterns), valid))


#: bytes of a sample at most, unless one pattern for each of 16 positions needs more
SAMPLE_BYTES = 2**28


def positions_of_sample(found: Found) -> list[list[int]]:
    """Positions along the scan axes of a sample of at most 256 patterns of a file."""
    lead, detector = found.source.shape[:-2], found.source.shape[-2:]
    most = SAMPLE_BYTES // (math.prod(detector) * found.source.dtype.itemsize)
    return sample_positions(lead, min(256, max(16, most)))


def lazy_sample(found: Found, positions: int) -> xr.DataArray:
    """The patterns at `positions_of_sample`; a block has ``positions`` at most."""
    where = positions_of_sample(found)
    block = (*(1,) * (len(where) - 1), min(16, len(where[-1]), positions))
    return lazy_picked(found, where, block)


def lazy_picked(found: Found, where: Sequence[Sequence[int]], block: Sequence[int]) -> xr.DataArray:
    """The patterns of a file at chosen indices along the scan axes, without calibration, in blocks of so many of them."""
    source = found.source
    lead, detector = source.shape[:-2], source.shape[-2:]
    # patterns in one chunk are decoded together; of a detector-first file a row is read at once
    chunks = (1,) * len(lead) if found.info.chunks is None else found.info.chunks[:-2]
    if detector_first(source) is not None:
        chunks = (1, lead[-1])
    picked = Picked(source, tuple(map(tuple, where)), tuple(chunks))
    sizes = (*map(len, where), *detector)
    names: tuple[str, ...] = (*(SCAN_DIMS if len(lead) == 2 else LIST_DIMS), *DETECTOR_DIMS)
    axes = list(map(Axis, names, sizes))
    token = hashlib.sha256(repr((found.identity, picked)).encode()).hexdigest()[:16]
    return as_patterns(block_array(picked, block, f"picked-{token}"), axes)


def about_source(info: SourceInfo) -> dict[str, Any]:
    """Attributes on the microscope, as the file or the user states them."""
    earlier, own = info.about.get("given", {}), info.given.get("calibration", {})
    given = {**earlier, **info.given}
    if axes := {**earlier.get("calibration", {}), **own}:
        given["calibration"] = axes
    about = {
        **info.about,
        "beam_energy_kv": info.given.get("beam_energy_kv", info.about.get("beam_energy_kv")),
        "given": given,
        "original_metadata": info.metadata,
    }
    if any("offset" in own.get(name, {}) for name in ("ky", "kx")):  # the user states the origin
        about.pop("k_origin", None)
    # an angle of 0 counts; an empty text does not
    return {name: value for name, value in about.items() if value or value == 0.0}


def open_patterns(
    path: str | Path | Sequence[str | Path],
    *,
    dataset: str | int | None = None,
    series: bool = False,
    index: Mapping[str, int] | None = None,
    scan_shape: Sequence[int] | None = None,
    scan_order: ScanOrder = "auto",
    scan_roi: Sequence[int] | None = None,
    scan_step: int = 1,
    skip_frames: int | Sequence[int] = 0,
    drop_columns: int = 0,
    flip: bool = False,
    missing_chunks: Missing = "refuse",
    shape: Sequence[int] | None = None,
    dtype: str | None = None,
    offset: int = 0,
    frame_header: int = 0,
    frame_footer: int = 0,
    dark: str | Path | NDArray | None = None,
    gain: str | Path | NDArray | None = None,
    mask: str | Mapping[str, Sequence[Any]] | NDArray | None = None,
    mask_fill: MaskFill = "zero",
    calibration: Mapping[str, Mapping[str, Any]] | None = None,
    beam_energy_kv: float | None = None,
    chunk_mb: float | str = "auto",
    chunks: Sequence[int] | None = None,
) -> xr.DataArray:
    """Open a 4D-STEM file lazily, or several of equal shape.

    Parameters
    ----------
    path : a file of a format in `stem_dask.readers.formats.READERS`, such as .dm4, .mib, .blo, .hspy, .zarr or .npy, or a .zarr
        in an object store, s3://bucket/NAME.zarr; a glob, or a list of these, for a series
    dataset : name or number of the array, when the file holds several
    series : the files of the folder or glob ``path`` are one scan: an image of each position in the order of y and x in their
        names, or of their numbers; or stacks and scans one after another. The scans of an array with five axes are, too
    index : the scan of an array with more than four axes, by the name of an axis; ``{"t": 3}`` for the first of five
    scan_shape : (scan_y, scan_x) as in the file, for a stack of patterns that does not state it
    scan_order : ``scan_first``, ``detector_first``, or ``auto``, as the file states
    scan_roi : [y0, y1, x0, x1] of the scan, end exclusive
    scan_step : take every n-th position of the region
    skip_frames : leading patterns of a stack to leave out before folding the scan, or [leading, trailing]
    drop_columns : columns to leave out at the end of each scan row (flyback); ``scan_shape`` includes them
    flip : flip every pattern top to bottom
    missing_chunks : for chunk files missing from a zarr store: ``refuse``, or read them as ``zero``
    shape, dtype, offset : sizes, numpy type and first byte of a .raw file
    frame_header, frame_footer : bytes before and after each pattern of a .raw file
    dark, gain : array (ky, kx) or .npy file: ``(pattern - dark) * gain`` as float32
    mask : bad pixels (nonzero = bad): an array (ky, kx), a .npy file, or {pixels, rows, columns}
    mask_fill : ``zero``, or ``median`` of the good neighbours
    calibration : in place of that of the file, by axis: ``{"ky": {"scale": 0.01, "units": "1/nm"}}``, perhaps with ``offset``
    beam_energy_kv : energy of the electrons in keV
    chunk_mb : MiB of input in a block; ``auto`` is 64, or 128 for a detector-first file
    chunks : (rows, columns) of scan positions in a block, instead of ``chunk_mb``; -1 is the whole axis

    Returns
    -------
    DataArray (scan_y, scan_x, ky, kx), or (pattern, ky, kx) for a list; each axis with its calibration. What the
    reader chose is in ``attrs["notes"]``. A series has one more dimension, ``t``, in the order given (a glob: by name), and the
    coordinates and attributes of its first file.

    Raises
    ------
    SourceError
        When the file is missing, damaged, of an unknown format, or does not hold patterns.
    ConfigError
        When dark, gain or mask have another shape than the detector or values that are not finite, or when the
        calibration names an unknown axis or a scale of 0; when the files of a series have different shapes.

    Examples
    --------
    >>> import numpy as np, stem_dask as sd, tempfile; folder = tempfile.mkdtemp()
    >>> np.save(f"{folder}/scan.npy", np.ones((3, 4, 8, 8), "u2"))
    >>> sd.open(f"{folder}/scan.npy").dims
    ('scan_y', 'scan_x', 'ky', 'kx')
    """
    given = {name: value for name, value in locals().items() if name != "path"}
    several = None if series else _several(path)
    if several is not None:
        return _together([(one, open_patterns(one, **given)) for one in several])
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(
            f"path is a {type(path).__name__}; expected the path of a file: sd.analyze, sd.crop and the others take arrays and "
            "signals as they are"
        )
    found = find(
        path if is_url(path) else Path(path).expanduser().absolute(),
        dataset=dataset,
        series=series,
        index=index,
        scan_shape=scan_shape,
        scan_order=scan_order,
        scan_roi=scan_roi,
        scan_step=scan_step,
        skip_frames=skip_frames,
        drop_columns=drop_columns,
        flip=flip,
        missing_chunks=missing_chunks,
        shape=shape,
        dtype=dtype,
        offset=offset,
        frame_header=frame_header,
        frame_footer=frame_footer,
    )
    found = with_given(found, calibration, beam_energy_kv, scan_roi, scan_step)
    lead = block_positions(found, chunk_mb) if chunks is None else _given_block(found, chunks)
    patterns = lazy_blocks(found, lead, lazy_array)
    if dark is None and gain is None and mask is None:
        return patterns  # indexing it reads only what is indexed
    patterns = corrected(patterns, dark, gain)
    if mask is not None:
        patterns = apply_mask(patterns, read_mask(mask, patterns.shape[-2:]), mask_fill)
    return as_arrays(patterns)


def _given_block(found: Found, chunks: Sequence[int]) -> tuple[int, ...]:
    """Positions of a block along the scan, as the caller gives them."""
    lead = found.source.shape[:-2]
    whole = [isinstance(n, (int, np.integer)) and (n > 0 or n == -1) for n in chunks]
    if len(whole) != len(lead) or not all(whole):
        expected = "(rows, columns)" if len(lead) == 2 else "(n,), as this is a list of patterns,"
        raise ConfigError(
            f"chunks is {chunks!r}; expected {expected} of whole numbers above 0, or -1 for the whole axis"
        )
    return tuple(
        size if n == -1 else min(int(n), size) for n, size in zip(chunks, lead, strict=True)
    )


def _several(path: Any) -> list[str | Path] | None:
    """The files of a list or a glob; None for a single path. An existing name is a path even if it looks like a glob."""
    items = list(path) if isinstance(path, (list, tuple)) else [path]
    out: list[str | Path] = []
    several = isinstance(path, (list, tuple))
    for item in items:
        name = os.path.expanduser(item) if isinstance(item, (str, os.PathLike)) else ""
        if is_url(name) or not glob.has_magic(name) or os.path.lexists(name):
            out.append(item)
            continue
        several = True
        matches = sorted(glob.glob(name, recursive=True))
        out += matches
        if not matches:
            raise SourceError(f"nothing matches {item} (from {os.getcwd()})")
    if several and not out:
        raise ConfigError("path is an empty list; expected paths of files")
    return out if several else None


def _together(files: Sequence[tuple[str | Path, xr.DataArray]]) -> xr.DataArray:
    """One array of several files, with the dimension ``t`` first."""
    import xarray as xr

    (first, one), *others = files
    for name, other in others:
        if other.dims != one.dims or other.shape != one.shape:
            raise ConfigError(
                f"{name} has the shape {other.shape} and {first} {one.shape}; files of a series have equal shapes"
            )
    parts = [part for _, part in files]
    if any("valid" in part.coords for part in parts):
        full = xr.ones_like(one[..., 0, 0], dtype=bool).drop_vars(
            ("ky", "kx", "valid"), errors="ignore"
        )
        parts = [
            part if "valid" in part.coords else part.assign_coords(valid=full.compute())
            for part in parts
        ]
    out = xr.concat(
        parts, "t", coords="minimal", compat="override", join="override", combine_attrs="override"
    )
    return out.assign_attrs(source=[str(part.attrs["source"]) for part in parts])
