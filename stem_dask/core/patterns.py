"""Lazy patterns: an `xarray.DataArray` over dask with calibrated axes and the whole detector in every block."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import NAMES, from_text, to_json
from stem_dask.core.model import LIST_DIMS, SCAN_DIMS, Axis

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

#: dimension of the profiles; ``radius`` is the retention radius of each pattern
PROFILE_RADIUS = "profile_radius"

#: long name and units of each variable of an analysis, a validation or the group ``output`` of a store
LABELS = {
    "center_y": ("row of the center", "px"),
    "center_x": ("column of the center", "px"),
    "com_y": ("row of the center of mass", "px"),
    "com_x": ("column of the center of mass", "px"),
    "radius": ("retention radius", "px"),
    "radius_scattered": ("radius that keeps the target's share of the scattered intensity", "px"),
    "total": ("intensity", "counts"),
    "profile": ("share of the intensity inside a radius", "1"),
    "profile_radius": ("radius of the profile", "px"),
    "mean_pattern": ("mean pattern", "counts"),
    "max_pattern": ("maximum pattern", "counts"),
    "lit": ("number of sampled patterns in which the pixel is above zero", "1"),
    "curve_mean": ("mean share of the intensity inside a radius", "1"),
    "curve_min": ("smallest share of the intensity inside a radius", "1"),
    "odd_pixels": ("number of values that count as 0", "1"),
    "kind": ("why a value counts as 0", "1"),
    "negative_sum": ("sum of the negative values", "counts"),
    "n_empty": ("number of empty patterns", "1"),
    "window_y": ("first row of the window", "px"),
    "window_x": ("first column of the window", "px"),
    "filled_fraction": ("share of the window outside the detector", "1"),
    "center_out_y": ("row of the center in the output", "px"),
    "center_out_x": ("column of the center in the output", "px"),
    "mask": ("bad pixels: 1 given, 2 hot, 4 dead, 8 beam stop, 16 not finite", "1"),
    "direct": ("intensity of the direct disc", "counts"),
    "direct_share": ("share of the intensity in the direct disc", "1"),
    "bright_field": ("intensity of the direct disc", "counts"),
    "dark_field": ("intensity outside the direct disc", "counts"),
    "center_spread": ("distance of the disc's center from its center of mass", "px"),
    "descan_y": ("row of the fitted descan", "px"),
    "descan_x": ("column of the fitted descan", "px"),
    "deflection_y": ("row of the center - descan", "px"),
    "deflection_x": ("column of the center - descan", "px"),
    "retention_scattered": (
        "share of the intensity outside the direct disc inside the window",
        "1",
    ),
    "retention": ("share of the intensity inside the window", "1"),
    "mean": ("mean retention", "1"),
    "median": ("median retention", "1"),
    "min": ("smallest retention", "1"),
    "max": ("largest retention", "1"),
    "std": ("standard deviation of the retention", "1"),
    "total_ratio": ("intensity inside all windows / intensity of all patterns", "1"),
    "n_target": ("number of patterns that reach the target", "1"),
    "n_min": ("number of patterns that reach the minimum", "1"),
    "log_mean": ("mean of log(1 + x) over the pixels of the output pattern", "1"),
    "log_std": ("standard deviation of log(1 + x) over the pixels of the output pattern", "1"),
    "log_mean_pattern": ("mean of log(1 + x) over the output patterns", "1"),
}

_AXIS_NAMES = {
    "scan_y": "slow scan axis", "scan_x": "fast scan axis", "pattern": "number of the pattern",
    "source_ky": "detector row", "source_kx": "detector column",
}  # fmt: skip


def attrs_of(name: str) -> dict[str, str]:
    """Long name and units of a variable; see `LABELS`."""
    text, units = LABELS[name]
    return {"long_name": text, "units": units}


def labelled(dataset: xr.Dataset) -> xr.Dataset:
    """Set long name and units of all variables."""
    for name in LABELS:
        if name in dataset.variables:
            dataset[name].attrs = attrs_of(name)
    for name, text in _AXIS_NAMES.items():
        if name in dataset.coords:
            dataset[name].attrs = {"long_name": text, **dataset[name].attrs}
    return dataset


def as_patterns(
    data: da.Array, axes: Sequence[Axis], attrs: Mapping[str, Any] | None = None
) -> xr.DataArray:
    """Name and calibrate an array of patterns.

    Parameters
    ----------
    data : (scan_y, scan_x, ky, kx) or (pattern, ky, kx) dask array
    axes : one `Axis` a dimension; their names become the dimensions

    Returns
    -------
    DataArray named ``patterns``, every dimension with a coordinate whose attributes hold scale, offset and units

    Examples
    --------
    >>> axes = [Axis("pattern", 5), Axis("ky", 4, 0.5, -1.0, "1/nm"), Axis("kx", 4)]
    >>> import dask.array as da
    >>> as_patterns(da.zeros((5, 4, 4), chunks=(2, 4, 4)), axes).ky.values.tolist()
    [-1.0, -0.5, 0.0, 0.5]
    """
    import xarray as xr

    coords = {axis.name: coordinate(axis) for axis in axes}
    return xr.DataArray(
        data,
        dims=[axis.name for axis in axes],
        coords=coords,
        attrs=dict(attrs or {}),
        name="patterns",
    )


def coordinate(axis: Axis, dim: str | None = None) -> xr.Variable:
    """The coordinate variable of an axis."""
    import pandas as pd
    import xarray as xr

    # as an index, because for arrays xarray imports pint and cupy to check their type
    values: Any = pd.Index(axis.offset + axis.scale * np.arange(axis.size))
    attrs = {"scale": axis.scale, "offset": axis.offset, "units": axis.units}
    return xr.Variable((dim or axis.name,), values, attrs)


def axis_of(patterns: xr.DataArray | xr.Dataset, dim: str) -> Axis:
    """Calibrated axis of a dimension, from its attributes if they agree with the values, else from first value and step."""
    size = int(patterns.sizes[dim])
    if dim not in patterns.coords:
        return Axis(dim, size)
    values = patterns.coords[dim]
    if values.dtype.kind not in "iuf":  # for example of stacked dimensions
        return Axis(dim, size)
    scale, units = float(values.attrs.get("scale", 1.0)), str(values.attrs.get("units", ""))
    first = float(values[0])
    if size == 1 or float(values[1]) == first + scale:
        return Axis(dim, size, scale, first, units)
    step = float(values[1] - values[0])
    return Axis(dim, size, step or 1.0, first, units)


def axes_of(patterns: xr.DataArray) -> tuple[Axis, ...]:
    """All axes of the patterns, slowest first."""
    return tuple(axis_of(patterns, str(dim)) for dim in patterns.dims)


def lead_dims(patterns: xr.DataArray | xr.Dataset) -> tuple[str, ...]:
    """``("scan_y", "scan_x")`` or, for a list of patterns, ``("pattern",)``."""
    return SCAN_DIMS if SCAN_DIMS[0] in patterns.sizes else LIST_DIMS


def lead_shape(patterns: xr.DataArray | xr.Dataset) -> tuple[int, ...]:
    """Number of positions along each of `lead_dims`."""
    return tuple(int(patterns.sizes[dim]) for dim in lead_dims(patterns))


def blocks_of(patterns: xr.DataArray) -> da.Array:
    """The dask array of the patterns, with the whole detector in every block.

    Raises
    ------
    SourceError
        When the patterns are empty, or their type is not bool, integer or real.
    """
    import dask.array as da

    if patterns.dtype.kind not in "buif" or patterns.dtype.itemsize > 8:
        raise SourceError(
            f"the patterns are of type {patterns.dtype}; expected bool, integer or float up to 64 bits"
        )
    if 0 in patterns.shape:
        raise SourceError(f"the patterns have shape {patterns.shape}: there is nothing in them")
    data = patterns.data
    if not isinstance(data, da.Array):
        # named by content, so that graphs built twice are equal
        data = da.from_array(np.asarray(data), chunks=(*(("auto",) * (data.ndim - 2)), -1, -1))
    whole = {data.ndim - 2: -1, data.ndim - 1: -1}
    return data if data.numblocks[-2:] == (1, 1) else data.rechunk(whole)


#: attributes about the microscope and the measurement; a store has them at its root
ABOUT_SOURCE = (*NAMES, "given", "metadata", "original_metadata")

#: coordinates that are written with the patterns
POSITION_COORDS = ("window_y", "window_x", "valid")

_BY_POSITION = (
    "center_y", "center_x", "radius", "total", "retention", *POSITION_COORDS[:2], "filled_fraction",
    "center_out_y", "center_out_x", "valid",
)  # fmt: skip

#: attributes that a crop adds
WINDOW_ATTRS = (
    "window_size", "align", "k_origin", "global_radius", "cropped_axes", "aligned_axes", "target_retention", "coverage",
)  # fmt: skip


def content_of(patterns: xr.DataArray, analysis: xr.Dataset | None) -> dict[str, Any]:
    """What .pt, .zspy and HDF5 files hold besides the patterns: plain values, and arrays with one value per pattern."""
    attrs = to_json(from_text(patterns.attrs))
    found = {} if analysis is None else analysis.variables
    known: dict[str, Any] = {name: found[name] for name in _BY_POSITION if name in found}
    for name in POSITION_COORDS:
        if name in patterns.coords:
            known.setdefault(name, patterns.coords[name])
    return {
        "axes": [
            {"name": a.name, "size": a.size, "scale": a.scale, "offset": a.offset, "units": a.units}
            for a in axes_of(patterns)
        ],
        "window": {name: attrs[name] for name in WINDOW_ATTRS if name in attrs},
        "intensity": attrs.get("intensity", "counts"),
        "downsample_factor": attrs.get("downsample_factor", 1),
        # through JSON, because a pickle records which texts are the same object
        **json.loads(json.dumps({name: attrs[name] for name in ABOUT_SOURCE if name in attrs})),
        "analysis": {
            name: np.ascontiguousarray(known[name].values) for name in _BY_POSITION if name in known
        },
    }
