"""Choice of the window from the computed analysis, the crop of every pattern to it, and the way back to the detector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import PIECE_BYTES, Block
from stem_dask.core.chunks import whole_number
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.metadata import as_text, attribute
from stem_dask.core.model import DETECTOR_DIMS, Align, Axis, Device, Window
from stem_dask.core.patterns import (
    WINDOW_ATTRS,
    as_patterns,
    axes_of,
    axis_of,
    blocks_of,
    lead_dims,
    lead_shape,
)
from stem_dask.core.text import by
from stem_dask.core.window import (
    FEWEST_SCATTERED,
    check_size,
    check_target,
    check_window,
    covering_radius,
    fft_size,
    needed_size,
    next_multiple,
    radii_for_target,
    scattered_radii,
    uncropped,
    window_start,
)
from stem_dask.kernels.crop import crop_patterns
from stem_dask.kernels.pixels import DEAD, HOT
from stem_dask.stages.blocks import (
    as_arrays,
    changed,
    check_device,
    on_blocks,
    patterns_of,
    require_computed,
)
from stem_dask.stages.downsample import output_shift
from stem_dask.stages.gpu import CutOnGpu
from stem_dask.stages.survey import Survey
from stem_dask.writers.spool import PatternSpool

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

Criterion = Literal["intensity", "scattered", "k_max"]

#: what the zero of an aligned axis is
_K_ORIGIN = {"pattern": "window_center", "descan": "beam"}

Positions: TypeAlias = tuple[NDArray[np.float64], str]


def choose_window(
    analysis: xr.Dataset,
    *,
    coverage: float = 0.999,
    margin_pixels: int = 3,
    align: Align = "fixed",
    criterion: Criterion = "intensity",
    k_max: float | None = None,
    n_alpha: float | None = None,
    size: Literal["auto", "fft"] | int | Sequence[int] = "auto",
    square: bool = False,
    window: Sequence[int] | None = None,
    size_multiple: int = 2,
    factor: int = 1,
    target_retention: float | None = None,
) -> Window:
    """Choose the window that all patterns are cut to.

    Parameters
    ----------
    analysis : computed result of `analyze`
    coverage : share of the non-empty patterns, 0 < coverage <= 1, whose own radius the window must hold
    margin_pixels : added to the radius, in source pixels
    align : ``fixed``, one window for the dataset, within the detector; ``descan``, around the fitted wander of the beam, see
        `fit_descan`; ``pattern``, each pattern around its own center
    criterion : what the window must hold: the target's share of the ``intensity``, or of the ``scattered`` intensity outside the
        direct disc, or all up to ``k_max``
    k_max : from the center of the pattern to the edge of the window, in the units of the detector's axes; with criterion ``k_max``
    n_alpha : the same in radii of the direct disc, instead of ``k_max``
    size : ``auto``, what the covered patterns need; ``fft``, the same, but the output's size is even with no prime factor above 7;
        n, or [ny, nx] in source pixels: multiples of ``size_multiple * factor``, or the whole axis; with ``align="fixed"`` at
        most the detector
    square : both axes get the larger size
    window : [y0, y1, x0, x1] in source pixels, end exclusive; a fixed window of such a size
    size_multiple : the output's size is a multiple of this; ignored for ``size="fft"``
    factor : the detector downsampling that follows
    target_retention : another target than the analysis was made with; decided from the stored profiles

    Returns
    -------
    Window

    Raises
    ------
    ConfigError
        When the analysis is still lazy, an option is outside its range, the analysis lacks what the criterion or ``align`` needs,
        or the detector has no room for a square window.
    SourceError
        When every pattern is empty.

    Examples
    --------
    >>> import numpy as np
    >>> from stem_dask.stages.analyze import analyze
    >>> data = np.zeros((1, 3, 32, 40), "u2"); data[:, :, 14:18, 19:23] = 9
    >>> import xarray as xr
    >>> patterns = xr.DataArray(data, dims=("scan_y", "scan_x", "ky", "kx"))
    >>> window = choose_window(analyze(patterns).compute(), margin_pixels=1)
    >>> window.shape, window.origin, window.global_radius
    ((8, 8), (12, 16), 4)
    """
    require_computed(analysis)
    if not 0 < coverage <= 1:
        raise ConfigError(f"coverage is {coverage}; expected 0 < coverage <= 1")
    least = {"margin_pixels": (margin_pixels, 0), "size_multiple": (size_multiple, 1), "factor": (factor, 1)}  # fmt: skip
    for name, (value, lowest) in least.items():
        if whole_number(name, value, f"an integer >= {lowest}") < lowest:
            raise ConfigError(f"{name} is {value}; expected an integer >= {lowest}")
    if align not in get_args(Align):
        raise ConfigError(f"align is {align!r}; expected fixed, descan or pattern")
    _check_criterion(analysis, criterion, k_max, n_alpha)
    known = float(analysis.attrs["target_retention"])
    target = known if target_retention is None else float(target_retention)
    check_target(target)
    metric, radii = analysis.attrs["radius_metric"], np.asarray(analysis["radius"], np.float32)
    if target != known:
        profile, total = np.asarray(analysis["profile"]), np.asarray(analysis["total"])
        exact = analysis["max_pattern"].dtype.kind in "ui"
        radii = radii_for_target(profile, total, target, metric, exact)
    filled = np.isfinite(radii)
    if not filled.any():
        threshold = analysis.attrs["threshold"]
        remedy = "lower analyze.threshold or check the data" if threshold else "check the data"
        if "mask" in analysis and (analysis["mask"].values & (HOT | DEAD)).any():
            remedy += (
                "; suspected bad pixels do not count (analyze.ignore_bad_pixels=false counts them)"
            )
        raise SourceError(
            "every pattern is empty: no intensity is left after NaN, infinite, negative values and values below "
            f"the threshold ({threshold:g}) count as 0; {remedy}"
        )
    notes, margin = [], margin_pixels
    if criterion != "intensity":
        radii = _radii_of(analysis, criterion, filled, target, k_max, n_alpha)
    if criterion == "k_max":
        margin = 0
    own: Sequence[Any] = beam_places(analysis)
    middle = [
        _median(analysis[f"center_{a}"].values, one, filled)
        for a, one in zip("yx", own, strict=True)
    ]
    method = analysis.attrs["center_method"]
    around: Sequence[Any] = middle if align == "fixed" else _window_centers(analysis, align)
    if align == "descan" and criterion == "k_max" and method == "centroid":
        own = around  # where discs overlap, a single centroid is not the beam; the surface fitted to all is
    # the radii are around the patterns' own centers: the distance to the center of the window counts, too
    away_y, away_x = (np.abs(a - b) for a, b in zip(own, around, strict=True))
    needed = radii + np.maximum(away_y, away_x)
    covered = needed[np.isfinite(needed)]
    if metric == "circle" and margin == 0 and criterion != "k_max":
        margin = 1
        notes.append("margin_pixels raised from 0 to 1, so that the window contains the disc")
    smallest = covering_radius(covered, coverage)
    detector = (int(analysis.sizes["source_ky"]), int(analysis.sizes["source_kx"]))
    radius, multiple = smallest + margin, size_multiple * factor
    given = _given_size(size, window)
    if window is not None:
        if align != "fixed":
            raise ConfigError(
                f"window {list(window)} is fixed on the detector and align is {align}; give size instead"
            )
        check_window(window, detector)
    if given is None:
        larger = partial(next_multiple, multiple=multiple)
        if size == "fft":
            larger = partial(fft_size, factor=factor)
        shape = needed_size(middle, radius, detector, larger, align=align, square=square)
    else:
        words = f"size is {size}" if window is None else f"window is {list(window)}"
        check_size(given, detector, multiple, align=align, square=square, given=words)
        shape = (min(given[0], detector[0]), min(given[1], detector[1]))
    axes = list(zip(DETECTOR_DIMS, middle, shape, detector, strict=True))
    origin_y, origin_x = (window_start(at, n, full, align) for _, at, n, full in axes)
    if window is not None:
        origin_y, _, origin_x, _ = window
    notes += [uncropped(name, full) for name, _, n, full in axes if n == full]
    return Window(
        shape=shape,
        align=align,
        origin=(int(origin_y), int(origin_x)),
        cropped_axes=tuple(name for name, _, n, full in axes if n < full),
        global_radius=radius,
        coverage=coverage,
        target_retention=target,
        radius_at={f"{c:g}": covering_radius(covered, c) + margin for c in (1.0, 0.999, 0.99)},
        setters=tuple(tuple(index) for index in np.argwhere(needed == smallest)[:5].tolist()),
        notes=tuple(notes),
    )


def _check_criterion(
    analysis: xr.Dataset, criterion: str, k_max: float | None, n_alpha: float | None
) -> None:
    """Raise ConfigError unless the options of the criterion go together, and the analysis has what it needs."""
    if criterion not in get_args(Criterion):
        raise ConfigError(f"criterion is {criterion!r}; expected intensity, scattered or k_max")
    for name, value in (("k_max", k_max), ("n_alpha", n_alpha)):
        if value is not None and (criterion != "k_max" or not value > 0):
            raise ConfigError(
                f"{name} is {value} and criterion is {criterion}; expected a number above 0, with criterion k_max"
            )
    if criterion == "k_max" and (k_max is None) == (n_alpha is None):
        raise ConfigError("criterion is k_max; give either k_max or n_alpha")
    if (criterion == "scattered" or n_alpha is not None) and disc_radius_of(analysis) is None:
        why = (attribute(analysis.attrs, "survey") or {}).get("why") or "it was not surveyed"
        what = "scattered" if n_alpha is None else "k_max with n_alpha"
        raise ConfigError(
            f"criterion {what} needs the direct disc, and none is known ({why}); give analyze.disc_radius in px, or use "
            "crop.criterion=intensity"
        )


def disc_radius_of(analysis: xr.Dataset) -> float | None:
    """Radius of the direct disc in source pixels; None where none is known."""
    found = (attribute(analysis.attrs, "survey") or {}).get("radius")
    return None if found is None or "direct" not in analysis else float(found)


def _radii_of(
    analysis: xr.Dataset,
    criterion: str,
    filled: NDArray[np.bool_],
    target: float,
    k_max: float | None,
    n_alpha: float | None,
) -> NDArray[np.float32]:
    """Radius that each pattern needs by its criterion, NaN where it has none."""
    if criterion == "scattered":
        if "radius_scattered" in analysis and target == float(analysis.attrs["target_retention"]):
            radii = np.asarray(analysis["radius_scattered"].values)
        else:
            radii = scattered_radii_of(analysis, np.asarray(analysis["profile"]), target)
        n_voting, n = int(np.isfinite(radii).sum()), int(filled.sum())
        if n_voting < max(1, 0.01 * n):
            raise ConfigError(
                f"criterion is scattered, and {n_voting:,} of {n:,} patterns have {FEWEST_SCATTERED:g} counts or more outside the "
                "direct disc, expected at least 1 %; use crop.criterion=intensity or k_max"
            )
        return radii
    if n_alpha is not None:
        half = n_alpha * (disc_radius_of(analysis) or 0.0)
    else:
        axes = detector_of(analysis)
        if not all(axis.calibrated for axis in axes):
            raise ConfigError(
                f"k_max is {k_max}, and the detector has no calibration; give input.calibration for ky and kx, or crop.n_alpha "
                "(in radii of the direct disc), or crop.size in px"
            )
        half = (k_max or 0.0) / min(abs(axis.scale) for axis in axes)
    radius = max(1, math.ceil(half - 1e-9))  # 3.0 / 0.1 is 30.000000000000004
    return np.where(filled, np.float32(radius), np.float32(np.nan))


def scattered_radii_of(
    analysis: xr.Dataset, profile: NDArray, target: float, where: Any = ...
) -> NDArray[np.float32]:
    """Radii that keep a share of the scattered intensity, from the profiles of the patterns at ``where``; see `scattered_radii`."""
    total, direct = (np.asarray(analysis[name].values)[where] for name in ("total", "direct"))
    exact = analysis["max_pattern"].dtype.kind in "ui"
    metric, radius = str(analysis.attrs["radius_metric"]), disc_radius_of(analysis) or 0.0
    return scattered_radii(profile, total, direct, radius, target, metric, exact)


def beam_places(analysis: xr.Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The pixel (y, x) about which each pattern's profile is: its center, or where the beam was expected if none was found.

    NaN for an empty pattern.
    """
    found = [np.rint(analysis[f"center_{axis}"].values) for axis in "yx"]
    lost = np.isnan(found[0]) & np.isfinite(analysis["radius"].values)
    if lost.any():
        expected = Survey.from_dict(attribute(analysis.attrs, "survey")).expected(np.argwhere(lost))
        for one, place, name in zip(found, expected.T, DETECTOR_DIMS, strict=True):
            one[lost] = np.rint(np.clip(place, 0, analysis.sizes[f"source_{name}"] - 1))
    return found[0], found[1]


def _given_size(
    size: Literal["auto", "fft"] | int | Sequence[int], window: Sequence[int] | None
) -> tuple[int, int] | None:
    """Height and width that the user gave; None where the analysis finds them."""
    if window is not None:
        if size != "auto":
            raise ConfigError(
                f"both window {list(window)} and size {size} are given; give one of them"
            )
        if len(window) != 4:
            raise ConfigError(f"window is {list(window)}; expected [y0, y1, x0, x1]")
        for n in window:
            whole_number(f"window is {list(window)}, and a bound", n, "integers")
        return (window[1] - window[0], window[3] - window[2])
    if isinstance(size, str) and size in ("auto", "fft"):
        return None
    if isinstance(size, (int, np.integer)):
        return (int(size), int(size))
    if isinstance(size, (str, float)) or len(size) != 2:
        raise ConfigError(f"size is {size!r}; expected auto, fft, n, or [ny, nx] in source pixels")
    height, width = (whole_number(f"size is {list(size)}, and a side", n, "integers") for n in size)
    return height, width


def _median(centers: NDArray, places: NDArray, filled: NDArray[np.bool_]) -> int:
    """The median center of the patterns that are not empty, rounded; of where they were expected if none was found."""
    found = centers[filled]
    return int(np.rint(np.nanmedian(found if np.isfinite(found).any() else places[filled])))


def _window_centers(analysis: xr.Dataset, align: Align) -> Sequence[NDArray[np.float64]]:
    """Rounded center (y, x) of the window on every pattern, NaN where it has none; see `window_origins`."""
    if align == "pattern":
        return beam_places(analysis)
    if "descan_y" not in analysis:
        raise ConfigError(
            "align is descan, and the analysis has no fit of it; call sd.fit_descan(analysis) first"
        )
    return [np.rint(analysis[f"descan_{axis}"].values) for axis in "yx"]


def radii_inside(analysis: xr.Dataset, window: Window) -> NDArray[np.int64]:
    """Largest radius of a square about `beam_places` that each window holds, as far as the detector goes; 0 for an empty pattern."""
    detector = analysis["mean_pattern"].shape
    found = np.full(analysis["total"].shape, max(detector))
    known = np.isfinite(beam_places(analysis)[0])
    places = zip(
        beam_places(analysis), window_origins(analysis, window), window.shape, detector, strict=True
    )
    for beam, first, size, full in places:
        own = np.where(known, beam, 0).astype(np.int64)
        found = np.where(first > 0, np.minimum(found, own - first), found)
        found = np.where(first + size < full, np.minimum(found, first + size - own), found)
    return np.where(known, np.maximum(found, 0), 0)


def window_origins(analysis: xr.Dataset, window: Window) -> tuple[NDArray, NDArray]:
    """First row and column of the window on every pattern: int32, may be negative, 0 on an uncropped axis.

    If it is the same for all patterns, it is a read-only broadcast scalar.
    """
    shape = analysis["center_y"].shape
    origins: list[NDArray] = [np.broadcast_to(np.int32(first), shape) for first in window.origin]
    for i, name in enumerate(DETECTOR_DIMS):
        if name in window.aligned_axes:
            first = _window_centers(analysis, window.align)[i] - window.shape[i] // 2
            origins[i] = np.where(np.isfinite(first), first, window.origin[i]).astype(np.int32)
    return origins[0], origins[1]


def filled_fractions(analysis: xr.Dataset, window: Window) -> NDArray[np.float64]:
    """Share of each window outside the detector; for a fixed window a broadcast scalar."""
    origins = window_origins(analysis, window)
    if not window.aligned_axes:
        return np.broadcast_to(0.0, origins[0].shape)
    inside = np.ones(1, np.int64)
    for first, size, name in zip(origins, window.shape, DETECTOR_DIMS, strict=True):
        full = int(analysis.sizes[f"source_{name}"])
        inside = inside * np.clip(np.minimum(first + size, full) - np.maximum(first, 0), 0, None)
    return 1.0 - inside / (window.shape[0] * window.shape[1])


def crop(
    patterns: Any, analysis: xr.Dataset, window: Window, *, device: Device = "cpu"
) -> xr.DataArray:
    """Cut all patterns to one window; lazy.

    Parameters
    ----------
    patterns : (scan_y, scan_x, ky, kx) or (pattern, ky, kx), as analyzed; see `analyze`
    analysis : computed result of `analyze`
    window : result of `choose_window`
    device : ``cpu``, or ``gpu`` of the worker, where `downsample` and `validate` continue; the result is the same

    Returns
    -------
    DataArray (…, height, width) of the same type, 0 where a window leaves the detector; coordinates ``window_y``
    and ``window_x`` (int32) hold every window's first row and column in source pixels. Attributes that are dictionaries or lists of
    texts, such as ``original_metadata``, become JSON text, so that ``cropped.to_netcdf()`` works

    Raises
    ------
    ConfigError
        When the analysis is still lazy, or of other patterns.

    Examples
    --------
    >>> import numpy as np
    >>> from stem_dask.stages.analyze import analyze
    >>> data = np.zeros((1, 2, 32, 40), "u2"); data[:, :, 14:18, 19:23] = 9
    >>> import xarray as xr
    >>> patterns = xr.DataArray(data, dims=("scan_y", "scan_x", "ky", "kx"))
    >>> analysis = analyze(patterns).compute()
    >>> cropped = crop(patterns, analysis, choose_window(analysis, margin_pixels=0))
    >>> cropped.shape, int(cropped.sum()), int(cropped.window_y[0, 0])
    ((1, 2, 6, 6), 288, 13)
    """
    blocks = crop_blocks(patterns_of(patterns), analysis, window, device=device)
    return as_arrays(blocks)


@dataclass(frozen=True)
class Kept:
    """The part [y0, y1, x0, x1] of each pattern that the pass before keeps, block by block, in a `PatternSpool`.

    ``itemsize`` is that of the source, whose batches the crop has, so that sums of floats are the same.
    """

    folder: str
    box: tuple[int, int, int, int]
    itemsize: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the part."""
        y0, y1, x0, x1 = self.box
        return y1 - y0, x1 - x0

    def cut(self, patterns: xr.DataArray) -> da.Array:
        """The lazy part of the patterns that the pass keeps."""
        one = {"origin_y": self.box[0], "origin_x": self.box[2], "shape": self.shape}
        return changed(crop_patterns, blocks_of(patterns), detector=self.shape, **one)

    def holds(
        self, analysis: xr.Dataset, window: Window, chunks: Sequence[Sequence[int]]
    ) -> NDArray[np.bool_]:
        """By block, whether the part holds all of its windows, as far as they lie on the detector.

        ``chunks`` are the positions of the blocks along each scan axis.
        """
        inside = np.ones((), np.bool_)
        ends = zip(self.box[::2], self.box[1::2], strict=True)
        places = zip(window_origins(analysis, window), window.shape, DETECTOR_DIMS, strict=True)
        for (first, last), (origin, size, name) in zip(ends, places, strict=True):
            full = int(analysis.sizes[f"source_{name}"])
            inside = inside & (np.maximum(origin, 0) >= first)
            inside = inside & (np.minimum(origin + size, full) <= last)
        for axis, sizes in enumerate(chunks):
            starts = np.cumsum([0, *sizes[:-1]])
            inside = np.logical_and.reduceat(inside, starts, axis=axis)
        return inside

    def read(self, data: da.Array, most: int) -> da.Array:
        """The lazy part of lazy patterns, from the spool, in batches of ``most``."""
        import dask.array as da
        from dask.highlevelgraph import HighLevelGraph

        name, lead = f"kept-{data.name}", data.chunks[:-2]
        dtype, spool = data.dtype.newbyteorder("="), PatternSpool(self.folder)
        tasks = {}
        for i, index in enumerate(np.ndindex(*map(len, lead))):
            sizes = tuple(chunks[k] for chunks, k in zip(lead, index, strict=True))
            shape = (*sizes, *self.shape)
            tasks[(name, *index, 0, 0)] = (spool.patterns, i, shape, dtype, most)
        graph = HighLevelGraph.from_collections(name, tasks)
        chunks = (*lead, *((n,) for n in self.shape))
        return da.Array(graph, name, chunks, meta=np.empty((0,) * data.ndim, dtype))


def crop_blocks(
    patterns: xr.DataArray,
    analysis: xr.Dataset,
    window: Window,
    *,
    device: Device = "cpu",
    detector_first: bool | None = None,
    kept: Kept | None = None,
) -> xr.DataArray:
    """`crop` for the tasks of a job, whose blocks need not be arrays.

    ``detector_first`` states whether the source is stored detector-first: then only the columns of the windows are read, otherwise
    whole rows. None is for arrays, whose blocks Dask slices. Blocks whose windows were ``kept`` are not read from the source.
    """
    require_computed(analysis)
    check_device(device)
    refuse_other_patterns(patterns, analysis)
    origin_y, origin_x = window_origins(analysis, window)
    data, y0, x0 = blocks_of(patterns), 0, 0
    y, x = (
        slice(max(int(origin.min()), 0), min(int(origin.max()) + size, full))
        for origin, size, full in zip((origin_y, origin_x), window.shape, data.shape[-2:], strict=True)
    )  # fmt: skip
    # of patterns directly from a file only the part of the detector that any window needs; of computed ones it would be a copy
    if len(data.dask.layers) == 1 and y.stop > y.start and x.stop > x.start:
        if not detector_first:
            x = slice(0, data.shape[-1])
        y0, x0 = y.start, x.start
        if detector_first is None:
            data = data[..., y, x]
        else:
            part = (y.stop - y.start, x.stop - x.start)
            data = on_blocks(_part, data, detector=part, dtype=data.dtype, y=y, x=x)
    threshold = float(analysis.attrs["threshold"]) if device == "gpu" else None
    out = _cut(data, origin_y - y0, origin_x - x0, window.shape, threshold)
    if kept is not None:
        holds = kept.holds(analysis, window, data.chunks[:-2])
        most = max(1, PIECE_BYTES // (prod(data.shape[-2:]) * kept.itemsize))
        first_y, _, first_x, _ = kept.box
        part = kept.read(data, most)
        out = _chosen(holds, _cut(part, origin_y - first_y, origin_x - first_x, window.shape), out)
    axes = list(axes_of(patterns))
    for i, (first, size) in enumerate(zip(window.origin, window.shape, strict=True), -2):
        axis = axes[i].part(first, size)  # detector coordinates
        if axis.name in window.aligned_axes:  # zero at the center of the window
            axis = replace(axis, offset=-axis.scale * (size // 2))
        axes[i] = axis
    attrs = as_text({**patterns.attrs, **window_attrs(window), **_detector_attrs(analysis)})
    if patterns.attrs.get("k_origin") in ("window_center", "beam") and not window.aligned_axes:
        attrs["k_origin"] = patterns.attrs["k_origin"]  # aligned before: no detector coordinates
    cropped, lead = as_patterns(out, axes, attrs), lead_dims(patterns)
    if "valid" in patterns.coords:
        cropped = cropped.assign_coords(valid=patterns.coords["valid"].variable)
    return cropped.assign_coords(window_y=(lead, origin_y), window_x=(lead, origin_x))


def _chosen(which: NDArray[np.bool_], one: da.Array, other: da.Array) -> da.Array:
    """The blocks of one array where ``which`` is True, of the other elsewhere."""
    import dask.array as da
    from dask.highlevelgraph import HighLevelGraph

    if which.all() or not which.any():
        return one if which.all() else other
    name = f"chosen-{one.name}"
    tasks = {
        (name, *index, 0, 0): ((one if which[index] else other).name, *index, 0, 0)
        for index in np.ndindex(*which.shape)
    }
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=[one, other])
    return da.Array(graph, name, one.chunks, meta=one._meta)


def _part(block: NDArray | Block, y: slice, x: slice) -> Any:
    return block[(*(slice(None),) * (block.ndim - 2), y, x)]


def _cut(
    data: da.Array,
    origin_y: NDArray,
    origin_x: NDArray,
    shape: tuple[int, int],
    threshold: float | None = None,
) -> da.Array:
    """Lazy windows of all patterns; on the GPU, with a threshold for the intensity in each.

    Origins that are the same for all patterns are passed once, instead of as one array per block.
    """
    origins: tuple[NDArray, ...] = (origin_y, origin_x)
    one: dict[str, Any] = {}
    if all(origin.min() == origin.max() for origin in origins):
        one = {"origin_y": int(origin_y.flat[0]), "origin_x": int(origin_x.flat[0])}
        origins = ()
    if threshold is None:
        return changed(crop_patterns, data, *origins, detector=shape, shape=shape, **one)
    return on_blocks(_cut_on_gpu, data, *origins, detector=shape, shape=shape, threshold=threshold, **one)  # fmt: skip


def _cut_on_gpu(
    block: NDArray | Block,
    origin_y: NDArray | int,
    origin_x: NDArray | int,
    shape: tuple[int, int],
    threshold: float,
) -> CutOnGpu:
    n = prod(block.shape[:-2])
    first_y, first_x = (np.broadcast_to(np.ravel(origin), n) for origin in (origin_y, origin_x))
    return CutOnGpu(block, first_y, first_x, shape, threshold)


def window_attrs(window: Window) -> dict[str, Any]:
    """Attributes that describe the window."""
    return {
        "window_size": list(window.shape),
        "align": window.align,
        "cropped_axes": list(window.cropped_axes),
        "aligned_axes": list(window.aligned_axes),
        "k_origin": _K_ORIGIN[window.align] if window.aligned_axes else "detector",
        "global_radius": window.global_radius,
        "coverage": window.coverage,
        "target_retention": window.target_retention,
    }


def placement(
    analysis: xr.Dataset, window: Window, factor: int = 1, method: str = "bin"
) -> dict[str, xr.DataArray]:
    """Arrays by position: ``window_y, window_x`` (int32, source pixels), ``filled_fraction`` (share of the window outside the
    detector), and the center ``center_out_y, center_out_x`` (float64) in output pixels after downsampling by ``factor``:
    ``(center - window - a) / factor``, a the source position of output pixel 0 in its window.
    """
    like = analysis["center_y"]
    origins = dict(zip("yx", window_origins(analysis, window), strict=True))
    found = {f"window_{axis}": like.copy(data=origin) for axis, origin in origins.items()}
    found["filled_fraction"] = like.copy(data=filled_fractions(analysis, window))
    for axis, origin in origins.items():
        center = analysis[f"center_{axis}"] - origin
        center -= output_shift(factor, method)
        center /= factor
        found[f"center_out_{axis}"] = center
    return found


def to_detector(cropped: xr.DataArray, analysis: xr.Dataset) -> xr.DataArray:
    """Restore every cropped pattern to its place on the detector, 0 outside of the window; lazy.

    For methods that need the beam's own position (DPC, ptychography). The patterns must not have been downsampled.

    Parameters
    ----------
    cropped : result of `crop`, with its coordinates ``window_y`` and ``window_x``
    analysis : the analysis it was cropped with

    Returns
    -------
    DataArray (…, ky, kx) with the size and calibration of the detector; attributes and coordinates are those of the patterns,
    without those of the window

    Raises
    ------
    ConfigError
        When the patterns are not the result of `crop`, or the analysis is of another detector.
    """
    cropped = patterns_of(cropped)
    refuse_other_windows(cropped, analysis, "restore the detector's frame before downsampling")
    source = detector_of(analysis)
    origin_y, origin_x = cropped.coords["window_y"].values, cropped.coords["window_x"].values
    out = _cut(blocks_of(cropped), -origin_y, -origin_x, (source[0].size, source[1].size))
    of_window = {*WINDOW_ATTRS, *_detector_attrs(analysis)}
    if cropped.attrs.get("align") == "fixed":
        of_window.remove("k_origin")  # a fixed window keeps the coordinates of its source
    attrs = {name: value for name, value in cropped.attrs.items() if name not in of_window}
    lead = {*lead_dims(cropped)}
    kept = {
        name: coordinate.variable
        for name, coordinate in cropped.coords.items()
        if {*coordinate.dims} <= lead and name not in ("window_y", "window_x")
    }
    whole = as_patterns(out, (*axes_of(cropped)[:-2], *source), attrs)
    return as_arrays(whole.assign_coords(kept))


def detector_of(analysis: xr.Dataset) -> tuple[Axis, Axis]:
    """Axes ky and kx of the analyzed detector."""
    y, x = (replace(axis_of(analysis, f"source_{name}"), name=name) for name in DETECTOR_DIMS)
    return y, x


def _detector_attrs(analysis: xr.Dataset) -> dict[str, Any]:
    """Size, scale and offset of the detector's axes, which `refuse_other_windows` compares."""
    axes = detector_of(analysis)
    return {f"detector_{a.name}": [float(a.size), a.scale, a.offset] for a in axes}


def refuse_other_windows(cropped: xr.DataArray, analysis: xr.Dataset, when: str) -> None:
    """Raise ConfigError unless patterns are windows of the analyzed detector; ``when`` is advice for downsampled patterns."""
    if "window_y" not in cropped.coords or "window_x" not in cropped.coords:
        raise ConfigError("the patterns carry no window_y and window_x; pass what sd.crop returned")
    attrs, shape = cropped.attrs, list(cropped.shape[-2:])
    if int(attrs.get("downsample_factor", 1)) != 1:
        raise ConfigError(f"the patterns were downsampled by {attrs['downsample_factor']}; {when}")
    if list(attrs.get("window_size", shape)) != shape:
        raise ConfigError(
            f"the windows were cropped to {by(attrs['window_size'])} px and have {by(shape)} px now; pass what sd.crop returned"
        )
    if "align" not in attrs:  # attributes were dropped
        return
    for axis in detector_of(analysis):
        name, n = axis.name, int(cropped.sizes[axis.name])
        size, scale, offset = attrs.get(f"detector_{name}", (axis.size, axis.scale, axis.offset))
        own = replace(axis, size=int(size), scale=scale, offset=offset)
        if found := differing(name, regular(own), regular(axis)):
            raise ConfigError(
                f"the windows are of another detector: {found}; pass the analysis that they were cropped with"
            )
        first = axis.value(float(cropped.coords[f"window_{name[1]}"].values.flat[0]))
        if name in attrs["aligned_axes"]:
            first = -axis.scale * (n // 2)
        expected = regular(replace(axis, size=n, offset=first))
        if found := differing(name, positions(cropped, name), expected):
            raise ConfigError(
                f"the windows have other coordinates than their crop: {found}; pass what sd.crop returned"
            )


def refuse_other_patterns(patterns: xr.DataArray, analysis: xr.Dataset) -> None:
    """Raise ConfigError if the coordinates of an analysis and of patterns differ."""
    lead, known = lead_dims(patterns), tuple(int(n) for n in analysis["center_y"].shape)
    if lead_shape(patterns) != known or lead != analysis["center_y"].dims:
        raise ConfigError(
            f"the analysis is of {known} positions, the patterns have {lead_shape(patterns)}; "
            "analyze the patterns that are cropped"
        )
    names = {dim: dim for dim in lead} | {dim: f"source_{dim}" for dim in DETECTOR_DIMS}
    for dim, name in names.items():
        if found := differing(dim, positions(patterns, dim), positions(analysis, name)):
            raise ConfigError(
                f"the analysis is of other patterns: {found}; analyze the patterns that are cropped"
            )


def positions(patterns: xr.DataArray | xr.Dataset, dim: str) -> Positions:
    """Coordinates along a dimension, and their units; indices where there are none."""
    if dim not in patterns.coords or patterns.coords[dim].dtype.kind not in "iuf":
        return regular(Axis(dim, int(patterns.sizes[dim])))
    values = patterns.coords[dim]
    return np.asarray(values.values, np.float64), str(values.attrs.get("units", ""))


def regular(axis: Axis) -> Positions:
    """Coordinates of an axis, and their units."""
    return axis.offset + axis.scale * np.arange(axis.size, dtype=np.float64), axis.units


def differing(dim: str, found: Positions, known: Positions) -> str | None:
    """Describe how coordinates differ from the expected ones, such as ``scan_y[0] is 2 nm, not 0 nm``; None if they agree."""
    (here, unit), (there, other) = found, known
    if len(here) != len(there):
        return f"{dim} has {len(here)} values, not {len(there)}"
    if unit != other:
        return f"{dim} is in {unit or 'px'}, not in {other or 'px'}"
    step = float(np.abs(np.diff(there)).min()) if len(there) > 1 else 0.0
    wrong = np.flatnonzero(np.abs(here - there) > 1e-6 * step + 1e-12 * np.abs(there))
    unit = f" {unit}" if unit else ""
    for i in wrong[:1]:
        return f"{dim}[{i}] is {here[i]:g}{unit}, not {there[i]:g}{unit}"
    return None
