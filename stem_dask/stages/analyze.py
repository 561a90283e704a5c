"""Analysis of all patterns in one pass: values per pattern, and reductions over all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, Deferred
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.metadata import as_text
from stem_dask.core.model import DETECTOR_DIMS, Device, Region
from stem_dask.core.patterns import (
    PROFILE_RADIUS,
    axis_of,
    blocks_of,
    coordinate,
    labelled,
    lead_dims,
    lead_shape,
)
from stem_dask.core.window import check_center, check_target, radii_for_target
from stem_dask.kernels.analysis import Analysis
from stem_dask.kernels.disc import find_discs
from stem_dask.kernels.downsample import thumbnail_cell, thumbnails
from stem_dask.kernels.gpu import analysis as analysis_on_gpu
from stem_dask.kernels.intensity import (
    ODD_PIXELS,
    add_patterns,
    lowest_counted,
    native,
    native_dtype,
)
from stem_dask.kernels.pixels import add_lit
from stem_dask.stages.blocks import check_device, patterns_of, reduced, sample_positions, sampled
from stem_dask.stages.descan import fit_places
from stem_dask.stages.friedel import check_scan, surroundings, symmetric_centers
from stem_dask.stages.survey import (
    Survey,
    needs_survey,
    refuse_no_disc,
    resolved_method,
    survey_patterns,
)

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

CenterMethod = Literal["auto", "disc", "centroid", "friedel", "center", "manual"]

RadiusMetric = Literal["square", "circle"]

#: one value per pattern, in the order of the store
PER_PATTERN = (
    "center_y",
    "center_x",
    "radius",
    "total",
    "com_y",
    "com_x",
    "direct",
    "center_spread",
)

#: with center method centroid the center of mass is the center: one array for both
COM_IS = {"com_y": "center_y", "com_x": "center_x"}

#: one array per block, and how blocks are reduced
REDUCED = {
    "sum_pattern": np.add,
    "max_pattern": np.maximum,
    "odd": np.add,
    "negative_sum": np.add,
    "profile_sum": np.add,
    "profile_min": np.fmin,
    "n_filled": np.add,
    "lit": np.add,
}

#: patterns, evenly spread over the scan, that a report shows as small images
N_THUMBNAILS = 1024


def analyze(
    patterns: Any,
    *,
    center_method: CenterMethod = "auto",
    manual_center: tuple[float, float] | None = None,
    radius_metric: RadiusMetric = "square",
    target_retention: float = 0.98,
    threshold: float | Literal["auto"] = 0.0,
    background: Literal["none", "pedestal"] = "none",
    disc_radius: float | None = None,
    ignore_bad_pixels: bool = True,
    survey: Survey | None = None,
    device: Device = "cpu",
) -> xr.Dataset:
    """Find every pattern's center, total and retention radius; a reduction over all patterns.

    Parameters
    ----------
    patterns : (scan_y, scan_x, ky, kx) or (pattern, ky, kx): a DataArray, an array of numpy or Dask, or a HyperSpy signal
    center_method : ``disc``, the geometric center of the direct disc of each pattern; ``centroid``, its center of mass;
        ``center`` of the detector; ``manual``; ``auto`` is ``disc`` where the survey finds a direct disc, else ``centroid``
    manual_center : (y, x) in source pixels, inside the detector; with ``manual``
    radius_metric : ``square`` (the window that will be cut) or ``circle``
    target_retention : share of the intensity, 0 < target <= 1, that the radius keeps
    threshold : values below it do not count, in counts; ``auto`` is above the noise of the background
    background : ``pedestal`` subtracts the constant level of the background from what counts
    disc_radius : of the direct disc in source pixels; None measures it
    ignore_bad_pixels : whether suspected hot and dead pixels count as 0
    survey : result of `stem_dask.survey`; None reads a sample of at most 256 patterns now, unless no option needs it
    device : ``cpu``, or ``gpu`` of the worker, which has no ``disc``; the result is the same for integers

    Returns
    -------
    Dataset, lazy: ``center_y, center_x, total, com_y, com_x`` (float64) and ``radius`` (float32) by position in
    source pixels, ``profile`` (…, profile_radius) the share of a pattern's intensity inside each radius,
    ``mean_pattern``, ``max_pattern`` and ``lit`` (source_ky, source_kx; ``lit`` is in how many patterns of a sample of 256
    a pixel is above zero), ``curve_mean`` and ``curve_min`` (profile_radius), ``odd_pixels``. With a direct disc also its
    intensity ``direct`` and ``center_spread`` (px), the distance between two estimates of its center.
    ``.compute()`` it before `choose_window`; that is the one barrier of the job. Attributes that are dictionaries, such as
    ``survey``, are JSON text, so that ``.to_netcdf()`` works

    Raises
    ------
    ConfigError
        When an option is outside its range, or ``disc`` is asked for and no direct disc is found.

    Examples
    --------
    >>> import numpy as np
    >>> import xarray as xr
    >>> patterns = xr.DataArray(np.ones((2, 3, 8, 8), "u1"), dims=("scan_y", "scan_x", "ky", "kx"))
    >>> analyze(patterns, target_retention=0.5).compute().radius.values.tolist()
    [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]
    """
    import dask.array as da

    patterns = patterns_of(patterns)
    blocks_of(patterns)  # refuses other types
    check_options(
        center_method=center_method, manual_center=manual_center, radius_metric=radius_metric,
        target_retention=target_retention, threshold=threshold, background=background,
        device=device, patterns=patterns,
    )  # fmt: skip
    asked: dict[str, Any] = {
        "center_method": center_method, "threshold": threshold, "background": background,
        "disc_radius": disc_radius, "ignore_bad_pixels": ignore_bad_pixels,
    }  # fmt: skip
    if survey is None and needs_survey(**asked):
        survey = survey_patterns(patterns, **asked, device=device)
    if survey is not None:
        refuse_no_disc(survey, center_method)
    options: dict[str, Any] = {
        "center_method": resolved_method(center_method, survey, device), "manual_center": manual_center,
        "radius_metric": radius_metric, "target_retention": target_retention,
        "threshold": threshold if survey is None else survey.threshold,
    }  # fmt: skip
    centers = None
    if center_method == "friedel" and survey is not None:
        lead = lead_shape(patterns)
        check_scan(lead)
        where, part = surroundings(lead), patterns.attrs.get("scan_part")
        found = symmetric_centers(patterns, survey)
        fit = fit_places(found, where, lead, part, order="auto", region=None, reference=None)
        centers = fit.surface
    outputs = analysis_blocks(patterns, **options, survey=survey, centers=centers, device=device)
    axes = tuple(range(patterns.ndim - 2))
    totals = {
        name: da.reduction(
            outputs[name],
            chunk=lambda x, axis, keepdims: x,
            aggregate=lambda x, axis, keepdims, join=join: join.reduce(
                x, axis=axis, keepdims=keepdims, dtype=x.dtype
            ),
            axis=axes,
            dtype=outputs[name].dtype,
            meta=np.empty((0,) * (outputs[name].ndim - len(axes)), outputs[name].dtype),
        )
        for name, join in REDUCED.items()
    }
    valid = patterns.coords.get("valid")
    n_missing = 0 if valid is None else int((~valid.values).sum())
    attrs = analysis_attrs(**options, survey=survey)
    analysis = analysis_dataset(patterns, outputs, totals, attrs, n_missing)
    return analysis.drop_attrs(deep=False).assign_attrs(as_text(analysis.attrs))


def check_options(
    *,
    patterns: xr.DataArray,
    center_method: str,
    manual_center: tuple[float, float] | None,
    radius_metric: str,
    target_retention: float,
    threshold: float | str,
    background: str,
    device: str,
) -> None:
    """Raise ConfigError for an option of the analysis that is outside its range."""
    check_target(target_retention)
    if threshold != "auto" and (
        isinstance(threshold, str) or not threshold >= 0 or not np.isfinite(threshold)
    ):
        raise ConfigError(f"threshold is {threshold!r}; expected a finite number >= 0, or auto")
    if not isinstance(threshold, str):
        try:
            lowest_counted(native_dtype(patterns.dtype), threshold)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    check_device(device)
    if radius_metric not in ("square", "circle"):
        raise ConfigError(f"radius_metric is {radius_metric!r}; expected square or circle")
    if background not in ("none", "pedestal"):
        raise ConfigError(f"background is {background!r}; expected none or pedestal")
    methods = get_args(CenterMethod)
    if center_method not in methods:
        raise ConfigError(
            f"center_method is {center_method!r}; expected {', '.join(methods[:-1])} or {methods[-1]}"
        )
    if center_method == "manual":
        if manual_center is None:
            raise ConfigError(
                "center_method is manual and manual_center is missing; set manual_center to (y, x) in pixels"
            )
        check_center(manual_center, patterns.shape[-2:])
    if device == "gpu" and (center_method in ("disc", "friedel") or background != "none"):
        what = (
            f"center_method {center_method}" if background == "none" else f"background {background}"
        )
        raise ConfigError(
            f"{what} is not available on the GPU yet; use device cpu, or center_method centroid and background none"
        )


def analysis_of_blocks(
    patterns: xr.DataArray,
    *,
    center_method: str,
    manual_center: tuple[float, float] | None,
    radius_metric: str,
    target_retention: float,
    threshold: float,
    survey: Survey | None = None,
    centers: NDArray[np.float64] | None = None,
    device: Device = "cpu",
) -> da.Array:
    """The analysis as one lazy array of `Deferred` results: `PER_PATTERN` and ``profile`` by position, `REDUCED` by block.

    The options are resolved: ``center_method`` is not ``auto``, and the threshold is a number. ``centers`` (…, 2) are those of the
    method ``friedel``.
    """
    data = blocks_of(patterns)
    height, width = data.shape[-2:]
    center: tuple[float, float] | None = None
    if center_method == "center":
        center = (float(height // 2), float(width // 2))
    elif center_method == "manual" and manual_center is not None:
        center = (float(manual_center[0]), float(manual_center[1]))
    kernel: dict[str, Any] = {
        "target_retention": target_retention, "threshold": threshold, "metric": radius_metric,
        "center": center,
    }  # fmt: skip
    lead = data.shape[:-2]
    along: list[NDArray] = [sampled(lead), sampled(lead, N_THUMBNAILS)]
    how: dict[str, Any] = {"bad": None, "disc": None}
    if survey is not None:
        how["bad"] = survey.suspected
        if device == "cpu":
            kernel |= {"pedestal": survey.pedestal, "disc_radius": survey.radius}
        if center_method == "disc":
            how["disc"] = {
                "radius": survey.radius, "reach": survey.reach, "good": survey.good, "level": survey.level,
            }  # fmt: skip
            expected = survey.expected(np.argwhere(np.ones(data.shape[:-2], np.bool_)))
            along += [one.reshape(data.shape[:-2]) for one in expected.T]
    if centers is not None:
        along += [centers[..., 0], centers[..., 1]]
    return reduced(AnalysisReducer, data, *along, **kernel, **how, device=device)


class AnalysisReducer:
    """Reducer: analysis of the patterns of one block, some of which are in the samples for ``lit`` and for thumbnails.

    ``expected`` are y and x of each pattern's beam, near which ``disc`` (options of `find_discs`) searches, or its center. The pixels ``bad`` [y, x] count as 0.
    """

    def __init__(
        self,
        block: NDArray | Block,
        in_sample: NDArray[np.bool_],
        is_shown: NDArray[np.bool_],
        *expected: NDArray[np.float64],
        device: Device,
        bad: NDArray[np.int64] | None = None,
        disc: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.lead, detector = block.shape[:-2], (block.shape[-2], block.shape[-1])
        self.in_sample, self.threshold = in_sample.ravel(), options["threshold"]
        self.is_shown, self.cell = is_shown.ravel(), thumbnail_cell(detector)
        self.thumbnails = [np.empty((0, *(n // self.cell for n in detector)), np.uint8)]
        self.bad, self.disc = bad, disc
        self.expected = np.stack([one.ravel() for one in expected], axis=-1) if expected else None
        self.beam = np.full((prod(self.lead), 2), np.nan)
        self.spread = np.full(prod(self.lead), np.nan)
        self.lit = np.zeros(detector, np.uint16)
        kind = Analysis if device == "cpu" else analysis_on_gpu.Analysis
        try:
            self.analysis = kind(prod(self.lead), detector, block.dtype, **options)
        except ValueError as error:  # the detector is too large for the GPU
            raise ConfigError(str(error)) from error

    def add(self, piece: NDArray, here: slice) -> None:
        centers: tuple[NDArray, ...] = ()
        if self.disc is not None and self.expected is not None:
            expected = self.expected[here]
            found = find_discs(native(piece), expected, **self.disc)
            place = np.rint(found.center)
            off = (place != self._near(place)).any(axis=1)  # also where it is NaN
            self.beam[here] = np.where(off[:, None], np.nan, found.center)
            self.spread[here] = np.where(off, np.nan, found.spread)
            # where no disc is found on the detector, the profile is taken about the place where it was expected
            centers = (np.where(off[:, None], self._near(expected), found.center),)
        elif self.expected is not None:
            centers = (self._near(self.expected[here]),)
        if self.bad is not None:
            piece = piece.copy()
            piece[:, self.bad[:, 0], self.bad[:, 1]] = 0
        try:
            self.analysis.add(piece, *centers)
        except OverflowError as error:
            raise SourceError(str(error)) from None  # damaged data, not retried
        for pattern in piece[self.in_sample[here]]:
            add_lit(pattern, self.threshold, self.lit)
        if self.is_shown[here].any():
            self.thumbnails.append(thumbnails(piece[self.is_shown[here]], self.cell))

    def _near(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Places, or the nearest ones on the detector."""
        return np.clip(places, 0.0, np.subtract(self.lit.shape, 1.0))

    def result(self) -> dict[str, NDArray]:
        """Arrays by name; in `REDUCED` the scan axes have length 1."""
        found = self.analysis.result()
        filled = found.profile[found.total > 0]
        center, direct = found.center, found.direct
        if self.disc is not None:
            center, direct = self.beam, np.where(np.isnan(self.spread), np.nan, direct)
        least = filled.min(axis=0) if len(filled) else np.full(found.profile.shape[1], np.nan)
        by_position: dict[str, NDArray] = {
            "center_y": center[:, 0],
            "center_x": center[:, 1],
            "radius": found.radius,
            "total": found.total,
            "com_y": found.com[:, 0],
            "com_x": found.com[:, 1],
            "direct": direct,
            "center_spread": self.spread,
            "profile": found.profile,
        }
        by_block: dict[str, NDArray] = {
            "sum_pattern": found.sum_pattern,
            "max_pattern": found.max_pattern,
            "odd": found.odd,
            "negative_sum": np.array([found.negative_sum]),
            "profile_sum": filled.sum(axis=0, dtype=np.float64),
            "profile_min": least.astype(np.float64),
            "n_filled": np.array([len(filled)]),
            "lit": self.lit,
            "thumbnails": np.concatenate(self.thumbnails),
        }
        ones = (1,) * len(self.lead)
        return {
            **{name: one.reshape(self.lead + one.shape[1:]) for name, one in by_position.items()},
            **{name: one.reshape(ones + one.shape) for name, one in by_block.items()},
        }


def analysis_blocks(patterns: xr.DataArray, **options: Any) -> dict[str, da.Array]:
    """`analysis_of_blocks` as one lazy array for each name; the kernel runs once."""
    raw, data = analysis_of_blocks(patterns, **options), blocks_of(patterns)
    nothing = np.empty((0,) * raw.ndim + data.shape[-2:], data.dtype)
    kernel = {"target_retention": 1.0, "threshold": 0.0, "metric": options["radius_metric"]}
    none = np.empty(0, bool)
    like = AnalysisReducer(nothing, none, none, device="cpu", **kernel, center=None).result()
    del like["thumbnails"]  # not of one shape
    lead = {True: tuple((1,) * n for n in raw.numblocks), False: raw.chunks}
    return {
        name: raw.map_blocks(
            Deferred.array,
            name,
            chunks=(*lead[name in REDUCED], *((size,) for size in one.shape[raw.ndim :])),
            new_axis=list(range(raw.ndim, one.ndim)) or None,
            dtype=one.dtype,
            meta=np.empty((0,) * one.ndim, one.dtype),
        )
        for name, one in like.items()
    }


def analysis_attrs(
    *, manual_center: tuple[float, float] | None, survey: Survey | None = None, **options: Any
) -> dict[str, Any]:
    """Options of the analysis as attributes, for later stages and readers of the store."""
    attrs: dict[str, Any] = {name: options[name] for name in ("center_method", "radius_metric")}
    attrs |= {name: float(options[name]) for name in ("target_retention", "threshold")}
    if manual_center is not None:
        attrs["manual_center"] = [float(value) for value in manual_center]
    if survey is not None:
        attrs["survey"] = survey.to_dict()
    return attrs


def analysis_dataset(
    patterns: xr.DataArray,
    found: Mapping[str, Any],
    reduced: Mapping[str, Any],
    options: Mapping[str, Any],
    n_missing: int = 0,
) -> xr.Dataset:
    """Dataset of an analysis, from dask or numpy arrays."""
    import pandas as pd
    import xarray as xr

    lead, dims = lead_dims(patterns), ("source_ky", "source_kx")
    n, filled = prod(lead_shape(patterns)) - n_missing, reduced["n_filled"][0]
    survey = options.get("survey", {})
    names = list(PER_PATTERN)
    if options["center_method"] != "disc":
        names.remove("center_spread")
    if survey.get("radius") is None:
        names.remove("direct")
    data: dict[str, Any] = {name: (lead, found[name]) for name in names}
    if "direct" in data:
        total, direct = found["total"], found["direct"]
        data["bright_field"], data["dark_field"] = (lead, direct), (lead, total - direct)
        data["direct_share"] = (lead, direct / np.where(total > 0, total, np.nan))
    if survey:
        data["mask"] = (dims, Survey.from_dict(survey).flags)
    if "profile" in found:
        data["profile"] = ((*lead, PROFILE_RADIUS), found["profile"])
    data["mean_pattern"] = (dims, reduced["sum_pattern"] / float(max(n, 1)))
    data["max_pattern"] = (dims, reduced["max_pattern"])
    data["lit"] = (dims, reduced["lit"])
    # without any filled pattern the mean is 0
    data["curve_mean"] = (PROFILE_RADIUS, reduced["profile_sum"] / filled.clip(1))
    data["curve_min"] = (PROFILE_RADIUS, reduced["profile_min"])
    data["odd_pixels"] = ("kind", reduced["odd"])
    data["negative_sum"] = ((), reduced["negative_sum"][0])
    data["n_empty"] = ((), n - filled)
    coords = {dim: patterns.coords[dim] for dim in lead if dim in patterns.coords} | {
        "kind": pd.Index(list(ODD_PIXELS)),  # see `coordinate`
        PROFILE_RADIUS: pd.RangeIndex(reduced["profile_min"].shape[0]),
        **{f"source_{name}": coordinate(axis_of(patterns, name), f"source_{name}") for name in ("ky", "kx")},
    }  # fmt: skip
    attrs = dict(options)
    if "scan_part" in patterns.attrs:
        attrs["scan_part"] = patterns.attrs["scan_part"]
    return labelled(xr.Dataset(data, coords=coords, attrs=attrs))


def fold_analysis(
    patterns: xr.DataArray,
    blocks: Iterable[tuple[Region, Mapping[str, NDArray]]],
    options: Mapping[str, Any],
    n_missing: int = 0,
) -> xr.Dataset:
    """Reduce the analysis of blocks, without the profiles, in the order of the blocks.

    ``n_missing`` patterns could not be read; they are not counted as empty.
    """
    shape = lead_shape(patterns)
    same = COM_IS if options["center_method"] == "centroid" else {}
    own = [name for name in PER_PATTERN if name not in same]
    found = {name: np.empty(shape, "f4" if name == "radius" else "f8") for name in own}
    reduced: dict[str, NDArray] = {}
    for region, block in blocks:
        for name, values in found.items():
            values[region] = block[name]
        for name, join in REDUCED.items():
            part = block[name][(0,) * len(region)]
            reduced[name] = join(reduced[name], part) if name in reduced else part
    found |= {name: found[other] for name, other in same.items()}
    return analysis_dataset(patterns, found, reduced, options, n_missing)


def fold_thumbnails(
    patterns: xr.DataArray, blocks: Iterable[tuple[Region, Mapping[str, NDArray]]]
) -> xr.Dataset:
    """Join the thumbnails of blocks.

    Returns
    -------
    Dataset: ``thumbnails``, uint8, see `stem_dask.kernels.downsample.thumbnails`, and the scan indices of the patterns, ``row`` and
    ``column`` or ``row`` alone. Its dimensions are those of the patterns, with the prefix ``thumbnail_``, because they have other sizes.
    The attribute ``cell`` is the number of pixels that one of a thumbnail stands for, along each axis
    """
    import xarray as xr

    lead, cell = lead_shape(patterns), thumbnail_cell(patterns.shape[-2:])
    dims = [f"thumbnail_{dim}" for dim in (*lead_dims(patterns), *DETECTOR_DIMS)]
    indices = sample_positions(lead, N_THUMBNAILS)
    counts = [len(one) for one in indices]
    numbers = np.full(lead, -1)
    numbers[np.ix_(*indices)] = np.arange(prod(counts)).reshape(counts)
    out = np.zeros((prod(counts), *(n // cell for n in patterns.shape[-2:])), np.uint8)
    for region, block in blocks:
        here = numbers[region]
        out[here[here >= 0]] = block["thumbnails"][(0,) * len(region)]
    names = zip(("row", "column"), dims, indices, strict=False)
    data: dict[str, Any] = {name: (dim, np.array(one, np.int64)) for name, dim, one in names}
    data["thumbnails"] = (dims, out.reshape(*counts, *out.shape[1:]))
    return xr.Dataset(data, attrs={"cell": cell})


def stored_radii(stored: xr.Dataset, target: float, metric: str, exact: bool) -> da.Array:
    """Retention radii for another target, from the profiles of a stored analysis; lazy, float32 by position."""
    import xarray as xr

    radii: da.Array = xr.apply_ufunc(
        radii_for_target,
        stored["profile"],
        stored["total"],
        input_core_dims=[[PROFILE_RADIUS], []],
        kwargs={"target": target, "metric": metric, "exact": exact},
        dask="parallelized",
        output_dtypes=[np.float32],
    ).data
    return radii


def block_statistics(patterns: xr.DataArray) -> da.Array:
    """``highest`` finite value and ``sum`` (ky, kx) of every block, float64; lazy, blocks are `Deferred`."""
    return reduced(_Statistics, blocks_of(patterns))


class _Statistics:
    """Reducer: sum and maximum of the patterns."""

    def __init__(self, block: NDArray | Block) -> None:
        self.lead, self.total = (1,) * (block.ndim - 2), np.zeros(block.shape[-2:])
        dtype = native_dtype(block.dtype)
        lowest = -np.inf if dtype.kind == "f" else np.iinfo(dtype).min
        self.highest = np.full(block.shape[-1], lowest, dtype)

    def add(self, piece: NDArray, here: slice) -> None:
        add_patterns(piece, self.total, self.highest)

    def result(self) -> dict[str, NDArray]:
        highest = np.full(self.lead, float(self.highest.max()))
        return {"highest": highest, "sum": self.total.reshape(*self.lead, *self.total.shape)}
