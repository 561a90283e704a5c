"""Analysis of all patterns in one pass: values per pattern, and reductions over all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, Deferred
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.model import Device, Region
from stem_dask.core.patterns import (
    PROFILE_RADIUS,
    axis_of,
    blocks_of,
    coordinate,
    labelled,
    lead_dims,
)
from stem_dask.core.window import check_center
from stem_dask.kernels.analysis import Analysis, PatternAnalysis, largest_radius
from stem_dask.kernels.gpu import analysis as analysis_on_gpu
from stem_dask.kernels.intensity import ODD_PIXELS, lowest_counted, native
from stem_dask.kernels.pixels import add_lit
from stem_dask.stages.arrays import patterns_of
from stem_dask.stages.patterns import check_device, map_patterns, per_pattern, sampled

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

CenterMethod = Literal["centroid", "center", "manual"]

RadiusMetric = Literal["square", "circle"]

#: one value per pattern, in the order of the store
PER_PATTERN = ("center_y", "center_x", "radius", "total", "com_y", "com_x")

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


def analyze(
    patterns: Any,
    *,
    center_method: CenterMethod = "centroid",
    manual_center: tuple[float, float] | None = None,
    radius_metric: RadiusMetric = "square",
    target_retention: float = 0.98,
    threshold: float = 0.0,
    device: Device = "cpu",
) -> xr.Dataset:
    """Find every pattern's center, total and retention radius; a reduction over all patterns.

    Parameters
    ----------
    patterns : (scan_y, scan_x, ky, kx) or (pattern, ky, kx): a DataArray, an array of numpy or Dask, or a HyperSpy signal
    center_method : ``centroid`` of each pattern, ``center`` of the detector, or ``manual``
    manual_center : (y, x) in source pixels, inside the detector; with ``manual``
    radius_metric : ``square`` (the window that will be cut) or ``circle``
    target_retention : share of the intensity, 0 < target <= 1, that the radius keeps
    threshold : values below it do not count, in counts
    device : ``cpu``, or ``gpu`` of the worker; the result is the same for integers

    Returns
    -------
    Dataset, lazy: ``center_y, center_x, total, com_y, com_x`` (float64) and ``radius`` (float32) by position in
    source pixels, ``profile`` (…, profile_radius) the share of a pattern's intensity inside each radius,
    ``mean_pattern``, ``max_pattern`` and ``lit`` (source_ky, source_kx; ``lit`` is in how many patterns of a sample of 256
    a pixel is above zero), ``curve_mean`` and ``curve_min`` (profile_radius), ``odd_pixels``.
    ``.compute()`` it before `choose_window`; that is the one barrier of the job.

    Raises
    ------
    ConfigError
        When an option is outside its range.

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
    outputs = analysis_blocks(
        patterns,
        center_method=center_method,
        manual_center=manual_center,
        radius_metric=radius_metric,
        target_retention=target_retention,
        threshold=threshold,
        device=device,
    )
    n_lead = len(lead_dims(patterns))
    reduced = {
        name: da.reduction(
            outputs[name],
            chunk=lambda x, axis, keepdims: x,
            aggregate=lambda x, axis, keepdims, join=join: join.reduce(
                x, axis=axis, keepdims=keepdims, dtype=x.dtype
            ),
            axis=tuple(range(n_lead)),
            dtype=outputs[name].dtype,
            meta=np.empty((0,) * (outputs[name].ndim - n_lead), outputs[name].dtype),
        )
        for name, join in REDUCED.items()
    }
    options = analysis_attrs(
        center_method, manual_center, radius_metric, target_retention, threshold
    )
    found = {name: outputs[name] for name in (*PER_PATTERN, "profile")}
    valid = patterns.coords.get("valid")
    n_missing = 0 if valid is None else int((~valid.values).sum())
    return analysis_dataset(patterns, found, reduced, options, n_missing)


def analysis_of_blocks(
    patterns: xr.DataArray,
    *,
    center_method: CenterMethod,
    manual_center: tuple[float, float] | None,
    radius_metric: RadiusMetric,
    target_retention: float,
    threshold: float,
    device: Device = "cpu",
) -> da.Array:
    """`analysis_blocks` as one lazy array of `Deferred` results, each with all arrays of a block."""
    import dask.array as da

    data = blocks_of(patterns)
    detector = (int(data.shape[-2]), int(data.shape[-1]))
    _check(target_retention, threshold, data.dtype)
    check_device(device)
    if radius_metric not in ("square", "circle"):
        raise ConfigError(f"radius_metric is {radius_metric!r}; expected square or circle")
    lead = data.shape[:-2]
    return map_patterns(
        _analyze_block,
        data,
        object,
        da.from_array(sampled(lead), chunks=data.chunks[:-2]),
        target_retention=target_retention,
        threshold=threshold,
        center=given_center(center_method, manual_center, detector),
        metric=radius_metric,
        device=device,
    )


def analysis_blocks(
    patterns: xr.DataArray, *, radius_metric: RadiusMetric, **options: Any
) -> dict[str, da.Array]:
    """Lazy analysis of each block: `PER_PATTERN` and ``profile`` by position, `REDUCED` by block; the kernel runs once."""
    data = blocks_of(patterns)
    detector = (int(data.shape[-2]), int(data.shape[-1]))
    n_radii = largest_radius(*detector, radius_metric) + 1
    raw = analysis_of_blocks(patterns, radius_metric=radius_metric, **options)
    kept = (
        np.dtype(np.uint8)
        if data.dtype == np.bool_
        else native(np.empty((0, 1, 1), data.dtype)).dtype
    )
    wide = np.dtype(np.float64 if kept.kind == "f" else np.uint64)
    outputs = {
        name: _pick(raw, name, (), np.float32 if name == "radius" else np.float64)
        for name in PER_PATTERN
    }
    outputs["profile"] = _pick(raw, "profile", (n_radii,), np.float32)
    by_block: dict[str, tuple[tuple[int, ...], Any]] = {
        "sum_pattern": (detector, wide),
        "max_pattern": (detector, kept),
        "odd": ((len(ODD_PIXELS),), np.int64),
        "negative_sum": ((1,), np.float64),
        "profile_sum": ((n_radii,), np.float64),
        "profile_min": ((n_radii,), np.float64),
        "n_filled": ((1,), np.int64),
        "lit": (detector, np.uint16),
    }
    for name, (shape, dtype) in by_block.items():
        outputs[name] = _pick(raw, name, shape, dtype, by_block=True)
    return outputs


def analysis_attrs(
    center_method: str,
    manual_center: tuple[float, float] | None,
    radius_metric: str,
    target_retention: float,
    threshold: float,
) -> dict[str, Any]:
    """Options of the analysis as attributes, for later stages and readers of the store."""
    attrs: dict[str, Any] = {
        "center_method": center_method,
        "radius_metric": radius_metric,
        "target_retention": float(target_retention),
        "threshold": float(threshold),
    }
    if manual_center is not None:
        attrs["manual_center"] = [float(value) for value in manual_center]
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

    lead = lead_dims(patterns)
    n = int(np.prod([patterns.sizes[dim] for dim in lead])) - n_missing
    data = {name: per_pattern(patterns, found[name], name) for name in PER_PATTERN}
    if "profile" in found:
        data["profile"] = xr.DataArray(found["profile"], dims=(*lead, PROFILE_RADIUS))
    dims = ("source_ky", "source_kx")
    data["mean_pattern"] = xr.DataArray(reduced["sum_pattern"] / float(max(n, 1)), dims=dims)
    data["max_pattern"] = xr.DataArray(reduced["max_pattern"], dims=dims)
    data["lit"] = xr.DataArray(reduced["lit"], dims=dims)
    filled = reduced["n_filled"][0]
    # without any filled pattern the mean is 0
    data["curve_mean"] = xr.DataArray(reduced["profile_sum"] / filled.clip(1), dims=PROFILE_RADIUS)
    data["curve_min"] = xr.DataArray(reduced["profile_min"], dims=PROFILE_RADIUS)
    data["odd_pixels"] = xr.DataArray(reduced["odd"], dims="kind")
    data["negative_sum"] = xr.DataArray(reduced["negative_sum"][0])
    data["n_empty"] = xr.DataArray(n - filled)
    axes = [axis_of(patterns, dim) for dim in ("ky", "kx")]
    coords = {
        "kind": pd.Index(list(ODD_PIXELS)),  # see `coordinate`
        PROFILE_RADIUS: pd.RangeIndex(reduced["profile_min"].shape[0]),
        **{dim: coordinate(axis, dim) for dim, axis in zip(dims, axes, strict=True)},
    }
    return labelled(xr.Dataset(data, coords=coords, attrs=dict(options)))


def fold_analysis(
    patterns: xr.DataArray,
    blocks: Iterable[tuple[Region, Mapping[str, NDArray]]],
    options: Mapping[str, Any],
    n_missing: int = 0,
) -> xr.Dataset:
    """Reduce the analysis of blocks, without the profiles, in the order of the blocks.

    ``n_missing`` patterns could not be read; they are not counted as empty.
    """
    shape = tuple(int(patterns.sizes[dim]) for dim in lead_dims(patterns))
    same = COM_IS if options["center_method"] == "centroid" else {}
    found = {
        name: np.empty(shape, np.float32 if name == "radius" else np.float64)
        for name in PER_PATTERN
        if name not in same
    }
    reduced: dict[str, NDArray] = {}
    for region, block in blocks:
        for name, values in found.items():
            values[region] = block[name]
        for name, join in REDUCED.items():
            part = block[name][(0,) * len(region)]
            reduced[name] = join(reduced[name], part) if name in reduced else part
    found |= {name: found[other] for name, other in same.items()}
    return analysis_dataset(patterns, found, reduced, options, n_missing)


def given_center(
    method: str, manual: tuple[float, float] | None, detector: tuple[int, int]
) -> tuple[float, float] | None:
    """The shared center of all patterns, or None for the centroid of each."""
    if method == "centroid":
        return None
    if method == "center":
        return (float(detector[0] // 2), float(detector[1] // 2))
    if method != "manual":
        raise ConfigError(f"center_method is {method!r}; expected centroid, center or manual")
    if manual is None:
        raise ConfigError(
            "center_method is manual and manual_center is missing; set manual_center to (y, x) in pixels"
        )
    y, x = (float(value) for value in manual)
    check_center((y, x), detector)
    return (y, x)


def _check(target_retention: float, threshold: float, dtype: np.dtype) -> None:
    if not 0 < target_retention <= 1:
        raise ConfigError(
            f"target_retention is {target_retention}; expected 0 < target_retention <= 1"
        )
    if not threshold >= 0 or not np.isfinite(threshold):
        raise ConfigError(f"threshold is {threshold}; expected a finite number >= 0")
    try:
        lowest_counted(native(np.empty((0, 1, 1), dtype)).dtype, threshold)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _block_arrays(
    lead: tuple[int, ...], found: PatternAnalysis, lit: NDArray
) -> dict[str, NDArray]:
    """Arrays of one block by name; in `REDUCED` the scan axes have length 1."""
    filled = found.profile[found.total > 0]
    least = filled.min(axis=0) if len(filled) else np.full(found.profile.shape[1], np.nan)
    by_position: dict[str, NDArray] = {
        "center_y": found.center[:, 0],
        "center_x": found.center[:, 1],
        "radius": found.radius,
        "total": found.total,
        "com_y": found.com[:, 0],
        "com_x": found.com[:, 1],
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
        "lit": lit,
    }
    ones = (1,) * len(lead)
    return {
        **{name: value.reshape(lead + value.shape[1:]) for name, value in by_position.items()},
        **{name: value.reshape(ones + value.shape) for name, value in by_block.items()},
    }


class _AnalysisReducer:
    """Reducer: analysis of the patterns of one block."""

    def __init__(
        self, block: NDArray | Block, in_sample: NDArray, device: Device, **options: Any
    ) -> None:
        self.lead, detector = block.shape[:-2], (block.shape[-2], block.shape[-1])
        self.in_sample, self.done = in_sample.ravel(), 0
        self.threshold, self.lit = options["threshold"], np.zeros(detector, np.uint16)
        kind = Analysis if device == "cpu" else analysis_on_gpu.Analysis
        try:
            self.analysis = kind(prod(self.lead), detector, block.dtype, **options)
        except ValueError as error:  # the detector is too large for the GPU
            raise ConfigError(str(error)) from error

    def add(self, piece: NDArray) -> None:
        try:
            self.analysis.add(piece)
        except OverflowError as error:
            raise SourceError(str(error)) from None  # damaged data, not retried
        here = self.in_sample[self.done : self.done + len(piece)]
        for pattern in piece[here]:
            add_lit(pattern, self.threshold, self.lit)
        self.done += len(piece)

    def result(self) -> dict[str, NDArray]:
        return _block_arrays(self.lead, self.analysis.result(), self.lit)


def _analyze_block(block: NDArray | Block, in_sample: NDArray, **options: Any) -> Deferred:
    return Deferred(block, lambda: _AnalysisReducer(block, in_sample, **options))


def _pick(
    raw: da.Array, name: str, shape: tuple[int, ...], dtype: Any, *, by_block: bool = False
) -> da.Array:
    lead_chunks = tuple((1,) * n for n in raw.numblocks) if by_block else raw.chunks
    return raw.map_blocks(
        Deferred.array,
        name,
        chunks=(*lead_chunks, *((size,) for size in shape)),
        new_axis=list(range(raw.ndim, raw.ndim + len(shape))) or None,
        dtype=dtype,
        meta=np.empty((0,) * (raw.ndim + len(shape)), dtype),
    )
