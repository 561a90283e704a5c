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
    lead_shape,
)
from stem_dask.core.window import check_center, check_target, radii_for_target
from stem_dask.kernels.analysis import Analysis
from stem_dask.kernels.gpu import analysis as analysis_on_gpu
from stem_dask.kernels.intensity import ODD_PIXELS, add_patterns, lowest_counted, native_dtype
from stem_dask.kernels.pixels import add_lit
from stem_dask.stages.blocks import check_device, patterns_of, reduced, sampled

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
    options: dict[str, Any] = {
        "center_method": center_method, "manual_center": manual_center, "radius_metric": radius_metric,
        "target_retention": target_retention, "threshold": threshold,
    }  # fmt: skip
    outputs = analysis_blocks(patterns, **options, device=device)
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
    return analysis_dataset(patterns, outputs, totals, analysis_attrs(**options), n_missing)


def analysis_of_blocks(
    patterns: xr.DataArray,
    *,
    center_method: str,
    manual_center: tuple[float, float] | None,
    radius_metric: str,
    target_retention: float,
    threshold: float,
    device: Device = "cpu",
) -> da.Array:
    """The analysis as one lazy array of `Deferred` results: `PER_PATTERN` and ``profile`` by position, `REDUCED` by block."""
    data = blocks_of(patterns)
    height, width = data.shape[-2:]
    check_target(target_retention)
    if not threshold >= 0 or not np.isfinite(threshold):
        raise ConfigError(f"threshold is {threshold}; expected a finite number >= 0")
    try:
        lowest_counted(native_dtype(data.dtype), threshold)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_device(device)
    if radius_metric not in ("square", "circle"):
        raise ConfigError(f"radius_metric is {radius_metric!r}; expected square or circle")
    center: tuple[float, float] | None = None
    if center_method == "center":
        center = (float(height // 2), float(width // 2))
    elif center_method == "manual":
        if manual_center is None:
            raise ConfigError(
                "center_method is manual and manual_center is missing; set manual_center to (y, x) in pixels"
            )
        center = (float(manual_center[0]), float(manual_center[1]))
        check_center(center, (height, width))
    elif center_method != "centroid":
        raise ConfigError(
            f"center_method is {center_method!r}; expected centroid, center or manual"
        )
    kernel = {"target_retention": target_retention, "threshold": threshold, "metric": radius_metric}
    in_sample = sampled(data.shape[:-2])
    return reduced(AnalysisReducer, data, in_sample, **kernel, center=center, device=device)


class AnalysisReducer:
    """Reducer: analysis of the patterns of one block, some of which are in the sample for ``lit``."""

    def __init__(
        self, block: NDArray | Block, in_sample: NDArray[np.bool_], device: Device, **options: Any
    ) -> None:
        self.lead, detector = block.shape[:-2], (block.shape[-2], block.shape[-1])
        self.in_sample, self.threshold = in_sample.ravel(), options["threshold"]
        self.lit = np.zeros(detector, np.uint16)
        kind = Analysis if device == "cpu" else analysis_on_gpu.Analysis
        try:
            self.analysis = kind(prod(self.lead), detector, block.dtype, **options)
        except ValueError as error:  # the detector is too large for the GPU
            raise ConfigError(str(error)) from error

    def add(self, piece: NDArray, here: slice) -> None:
        try:
            self.analysis.add(piece)
        except OverflowError as error:
            raise SourceError(str(error)) from None  # damaged data, not retried
        for pattern in piece[self.in_sample[here]]:
            add_lit(pattern, self.threshold, self.lit)

    def result(self) -> dict[str, NDArray]:
        """Arrays by name; in `REDUCED` the scan axes have length 1."""
        found = self.analysis.result()
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
            "lit": self.lit,
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
    like = AnalysisReducer(nothing, np.empty(0, bool), "cpu", **kernel, center=None).result()
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


def analysis_attrs(*, manual_center: tuple[float, float] | None, **options: Any) -> dict[str, Any]:
    """Options of the analysis as attributes, for later stages and readers of the store."""
    attrs: dict[str, Any] = {name: options[name] for name in ("center_method", "radius_metric")}
    attrs |= {name: float(options[name]) for name in ("target_retention", "threshold")}
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

    lead, dims = lead_dims(patterns), ("source_ky", "source_kx")
    n, filled = prod(lead_shape(patterns)) - n_missing, reduced["n_filled"][0]
    data: dict[str, Any] = {name: (lead, found[name]) for name in PER_PATTERN}
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
