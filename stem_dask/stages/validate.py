"""Retention of every pattern, from the intensity in its window as it was cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Deferred
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.metadata import attribute
from stem_dask.core.model import Axis, Window
from stem_dask.core.patterns import axis_of, blocks_of, labelled, lead_dims, lead_shape
from stem_dask.stages.blocks import patterns_of, reduced, require_computed
from stem_dask.stages.crop import (
    differing,
    placement,
    refuse_other_patterns,
    refuse_other_windows,
    regular,
    window_attrs,
)
from stem_dask.stages.gpu import Inside
from stem_dask.stages.survey import Survey

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

    from stem_dask.config.options import Downsample

#: relative rounding difference between sums of floats in two orders; integers are exact
FLOAT_SLACK = 1e-12


def validate(
    patterns: Any, cropped: xr.DataArray, analysis: xr.Dataset, *, min_retention: float = 0.95
) -> xr.Dataset:
    """Retention of every pattern and of the dataset; lazy.

    Parameters
    ----------
    patterns : the patterns that were cropped
    cropped : result of `crop`
    analysis : computed result of `analyze`
    min_retention : lowest acceptable retention, 0 <= min <= 1

    Returns
    -------
    Dataset with ``retention`` by position (float64, NaN when empty) and the scalars of `retention_statistics`; with a direct disc
    also ``retention_scattered``, see `scattered_retention`

    Raises
    ------
    ConfigError
        When coordinates and attributes of the three do not match.
    SourceError
        When a retention is computed and exceeds 1.

    Examples
    --------
    >>> import numpy as np
    >>> from stem_dask import analyze, choose_window, crop
    >>> import xarray as xr
    >>> patterns = xr.DataArray(np.ones((2, 2, 16, 16), "u1"), dims=("scan_y", "scan_x", "ky", "kx"))
    >>> analysis = analyze(patterns).compute()
    >>> cropped = crop(patterns, analysis, choose_window(analysis, size=8))
    >>> validate(patterns, cropped, analysis).compute().retention.values.tolist()
    [[0.25, 0.25], [0.25, 0.25]]
    """
    import dask.array as da
    import xarray as xr

    patterns, cropped = patterns_of(patterns), patterns_of(cropped)
    if lead_shape(patterns) != lead_shape(cropped):
        raise ConfigError(
            f"the patterns have {lead_shape(patterns)} positions, the cropped ones {lead_shape(cropped)}"
        )
    require_computed(analysis)
    if not 0 <= min_retention <= 1:
        raise ConfigError(f"min_retention is {min_retention}; expected 0 <= min_retention <= 1")
    refuse_other_windows(cropped, analysis, "validate before downsampling")
    refuse_other_patterns(patterns, analysis)
    found = None
    for dim in lead_dims(patterns):
        axes = (axis_of(one, dim) for one in (cropped, patterns))
        found = found or differing(dim, *map(regular, axes))
    if found is None and cropped.dtype.newbyteorder("=") != patterns.dtype.newbyteorder("="):
        found = f"the type is {cropped.dtype}, not {patterns.dtype}"
    if found:
        raise ConfigError(
            f"the windows are not those of the patterns: {found}; pass what sd.crop returned"
        )
    raw = inside_of_blocks(cropped, **intensity_of(analysis))
    like = {"dtype": np.float64, "meta": np.empty((0,) * raw.ndim)}
    total = np.asarray(analysis["total"].values)
    inside = raw.map_blocks(Deferred.array, "inside", **like)
    retention = da.map_blocks(retention_of, inside, da.from_array(total, raw.chunks), **like)
    slack = FLOAT_SLACK if patterns.dtype.kind == "f" else 0.0
    target = float(cropped.attrs.get("target_retention", analysis.attrs["target_retention"]))
    # not dask.delayed, which would optimize its own graph and read every block twice
    statistics = retention.rechunk(-1).map_blocks(
        _statistics_block,
        total,
        target,
        min_retention,
        slack,
        drop_axis=list(range(retention.ndim)),
        new_axis=0,
        chunks=((len(STATISTICS),),),
        dtype=np.float64,
        meta=np.empty(0),
    )
    data = {"retention": (lead_dims(patterns), retention)}
    if "direct" in analysis:
        known = (da.from_array(values, raw.chunks) for values in (total, analysis["direct"].values))
        scattered = da.map_blocks(scattered_retention, inside, *known, **like)
        data["retention_scattered"] = (lead_dims(patterns), scattered)
    data |= {
        name: ((), statistics[i].astype(np.int64 if name.startswith("n_") else np.float64))
        for i, name in enumerate(STATISTICS)
    }
    coords = {dim: patterns.coords[dim] for dim in lead_dims(patterns) if dim in patterns.coords}
    return labelled(xr.Dataset(data, coords=coords))


def retention_of(inside: NDArray[np.float64], total: NDArray) -> NDArray[np.float64]:
    """Share of each pattern's intensity that its window holds, NaN where the pattern is empty.

    Raises SourceError when a share exceeds 1, because the sums are of different data.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        retention = np.where(total > 0, inside / total, np.nan)
    above = retention[retention > 1 + 1e-9]
    if above.size:
        raise SourceError(
            f"the retention of {above.size:,} patterns exceeds 1 (up to {above.max():.6g}): their windows hold more than "
            "the whole patterns did when they were analyzed: the data changed in between, or the windows are of other patterns"
        )
    return retention


def scattered_retention(
    inside: NDArray[np.float64], total: NDArray, direct: NDArray
) -> NDArray[np.float64]:
    """Share of each pattern's intensity outside the direct disc that its window holds, ``(inside - direct) / (total - direct)``.

    NaN where less than one count lies outside the disc, or no disc was found. Below 0 where the window cuts the disc.

    Examples
    --------
    >>> scattered_retention(np.array([90.0, 40.0, 50.0]), np.array([100, 100, 50]), np.array([50, 50, 49.5])).tolist()
    [0.8, -0.2, nan]
    """
    scattered = total - direct
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scattered >= 1, (inside - direct) / scattered, np.nan)


def scattered_statistics(analysis: xr.Dataset) -> dict[str, float]:
    """Retention of the scattered intensity over the patterns that have any, and the direct disc's share of all intensity.

    ``total_scattered_retention`` is the sum inside the windows / the sum outside the discs; empty without a disc.
    """
    if "retention_scattered" not in analysis:
        return {}
    kept, total, direct = (
        analysis[name].values for name in ("retention_scattered", "total", "direct")
    )
    found, known = np.isfinite(kept), np.isfinite(direct)
    scattered, values = (total - direct)[found], kept[found]
    mean = lowest = ratio = share = math.nan
    if values.size:
        mean, lowest = float(values.mean()), float(values.min())
        ratio = float((values * scattered).sum() / scattered.sum())
    if total[known].sum() > 0:
        share = float(direct[known].sum() / total[known].sum())
    return {
        "mean_scattered_retention": mean,
        "min_scattered_retention": lowest,
        "total_scattered_retention": ratio,
        "direct_share": share,
    }


def complete_analysis(
    analysis: xr.Dataset,
    window: Window,
    inside: NDArray[np.float64],
    source_axes: Sequence[Axis],
    down: Downsample,
) -> xr.Dataset:
    """Add retention, `scattered_retention` where the direct disc is known, `placement`, and the options and calibration of the crop to an analysis; see `retention_of`.

    ``inside`` is the intensity in each window as it was cut, by position; ``source_axes`` are ky and kx of the detector as read.
    """
    retention = retention_of(inside, analysis["total"].values)
    mean = down.factor > 1 and down.method != "stride" and down.reduce == "mean"
    kinds, counts = analysis["kind"].values.tolist(), analysis["odd_pixels"].values.tolist()
    attrs = {
        **analysis.attrs,
        **window_attrs(window),
        "source_calibration": {a.name: [a.scale, a.offset, a.units] for a in source_axes},
        "odd_pixels": dict(zip(kinds, counts, strict=True)),
        "intensity": "mean counts per source pixel" if mean else "counts",
    }
    added = placement(analysis, window, down.factor, down.method)
    added["retention"] = analysis["total"].copy(data=retention)
    if "direct" in analysis:
        known = (analysis[name].values for name in ("total", "direct"))
        added["retention_scattered"] = analysis["total"].copy(
            data=scattered_retention(inside, *known)
        )
    return labelled(analysis.drop_vars(["odd_pixels", "kind"]).assign(added).assign_attrs(attrs))


STATISTICS = ("mean", "median", "min", "max", "std", "total_ratio", "n_target", "n_min", "n_empty")


def _statistics_block(retention: NDArray, *options: float | NDArray) -> NDArray[np.float64]:
    found = retention_statistics(retention, *options)  # type: ignore[arg-type]
    return np.array([found[name] for name in STATISTICS], np.float64)


def inside_of_blocks(
    cropped: xr.DataArray,
    *,
    bad: NDArray[np.int64] | None = None,
    name: str = "inside",
    **intensity: Any,
) -> da.Array:
    """Intensity of every cropped pattern; lazy blocks are `Deferred` results with one float64 array of this name.

    ``bad`` and the options of the intensity are those of the analysis, see `intensity_of`.
    """
    along = []
    if bad is not None:
        along = [cropped.coords[f"window_{axis}"].values for axis in "yx"]
    return reduced(Inside, blocks_of(cropped), *along, bad=bad, name=name, **intensity)


def intensity_of(analysis: xr.Dataset) -> dict[str, Any]:
    """What counted as intensity in an analysis: ``threshold``, ``pedestal``, and ``bad`` pixels [y, x]."""
    out: dict[str, Any] = {"threshold": float(analysis.attrs["threshold"])}
    if "survey" in analysis.attrs:
        survey = Survey.from_dict(attribute(analysis.attrs, "survey"))
        out |= {"pedestal": survey.pedestal, "bad": survey.suspected}
    return out


def retention_statistics(
    retention: NDArray, total: NDArray, target: float, minimum: float, slack: float = 0.0
) -> dict[str, float | int]:
    """`STATISTICS` over the non-empty patterns, whose retention is not NaN; NaN when every pattern is empty.

    The standard deviation has ddof 0; ``total_ratio`` is the sum inside / the sum of the totals; ``n_target`` and ``n_min`` are
    the patterns that reach target and minimum. With a slack of 0 ``inside >= level * total`` is decided on integers.
    """
    filled = np.isfinite(retention)
    if filled.all():  # without copies of millions of values
        values, weights = retention.ravel(), total.ravel()
    else:
        values, weights = retention[filled], total[filled]
    if not values.size:
        nothing: dict[str, float | int] = dict.fromkeys(STATISTICS[:6], math.nan)
        return {**nothing, "n_target": 0, "n_min": 0, "n_empty": int(retention.size)}
    inside = values * weights
    ratio = float(inside.sum() / weights.sum())
    if slack == 0:  # the quotient is rounded
        np.rint(inside, out=inside)

    def n_reached(level: float) -> int:
        reached = values >= level - slack if slack else inside >= level * weights
        return int(reached.sum())

    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
        "std": float(values.std()),
        "total_ratio": ratio,
        "n_target": n_reached(target),
        "n_min": n_reached(minimum),
        "n_empty": int(retention.size - values.size),
    }
