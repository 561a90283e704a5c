"""Crop every pattern to the window, and restore windows to detector coordinates."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block
from stem_dask.core.errors import ConfigError
from stem_dask.core.metadata import as_text
from stem_dask.core.model import DETECTOR_DIMS, Axis, Device, Window
from stem_dask.core.patterns import (
    as_patterns,
    axes_of,
    axis_of,
    blocks_of,
    lead_dims,
    lead_shape,
)
from stem_dask.core.text import by
from stem_dask.kernels.crop import crop_patterns
from stem_dask.stages.arrays import patterns_of
from stem_dask.stages.blocks import as_arrays, changed, check_device, on_blocks
from stem_dask.stages.downsample import output_shift
from stem_dask.stages.gpu import CutOnGpu
from stem_dask.stages.window import filled_fractions, require_computed, window_origins

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

#: attributes that a crop adds
OF_WINDOW = (
    "window_size", "align", "cropped_axes", "aligned_axes", "k_origin", "global_radius", "coverage", "target_retention",
)  # fmt: skip

Positions: TypeAlias = tuple[NDArray[np.float64], str]


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
    >>> from stem_dask.stages.window import choose_window
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


def crop_blocks(
    patterns: xr.DataArray,
    analysis: xr.Dataset,
    window: Window,
    *,
    device: Device = "cpu",
    detector_first: bool | None = None,
) -> xr.DataArray:
    """`crop` for the tasks of a job, whose blocks need not be arrays.

    ``detector_first`` states whether the source is stored detector-first: then only the columns of the windows are read, otherwise
    whole rows. None is for arrays, whose blocks Dask slices.
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
    axes = list(axes_of(patterns))
    for i, size in ((-2, window.shape[0]), (-1, window.shape[1])):
        axis = axes[i]
        if axis.name not in window.cropped_axes:
            continue
        if window.align == "fixed":  # detector coordinates, else zero at the center of the window
            axes[i] = axis.part(window.center[i] - size // 2, size)
        else:
            axes[i] = replace(axis, size=size, offset=-axis.scale * (size // 2))
    attrs = as_text({**patterns.attrs, **window_attrs(window), **_detector_attrs(analysis)})
    if patterns.attrs.get("k_origin") == "window_center":
        attrs["k_origin"] = "window_center"  # aligned before, so without detector coordinates
    cropped, lead = as_patterns(out, axes, attrs), lead_dims(patterns)
    if "valid" in patterns.coords:
        cropped = cropped.assign_coords(valid=patterns.coords["valid"].variable)
    return cropped.assign_coords(window_y=(lead, origin_y), window_x=(lead, origin_x))


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
        "k_origin": "window_center" if window.aligned_axes else "detector",
        "global_radius": window.global_radius,
        "coverage": window.coverage,
        "target_retention": window.target_retention,
    }


def placement(
    analysis: xr.Dataset, window: Window, factor: int = 1, method: str = "bin"
) -> dict[str, xr.DataArray]:
    """Origin of every window, and center of every pattern in the output.

    Returns
    -------
    dict of arrays by position: ``window_y, window_x`` (int32, source pixels), ``filled_fraction`` (share of the
    window outside the detector), ``center_out_y, center_out_x`` (float64, output pixels after downsampling by
    ``factor``): ``(center - window - a) / factor``, a the source position of output pixel 0 in its window
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
    of_window = {*OF_WINDOW, *_detector_attrs(analysis)}
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
    if int(cropped.attrs.get("downsample_factor", 1)) != 1:
        raise ConfigError(
            f"the patterns were downsampled by {cropped.attrs['downsample_factor']}; {when}"
        )
    size = list(cropped.attrs.get("window_size", cropped.shape[-2:]))
    if size != list(cropped.shape[-2:]):
        raise ConfigError(
            f"the windows were cropped to {by(size)} px and have {by(cropped.shape[-2:])} px now; pass what sd.crop returned"
        )
    if "align" not in cropped.attrs:  # attributes were dropped
        return
    for axis in detector_of(analysis):
        name, n = axis.name, int(cropped.sizes[axis.name])
        default = (axis.size, axis.scale, axis.offset)
        size, scale, offset = cropped.attrs.get(f"detector_{name}", default)
        own = replace(axis, size=int(size), scale=scale, offset=offset)
        if found := differing(name, regular(own), regular(axis)):
            raise ConfigError(
                f"the windows are of another detector: {found}; pass the analysis that they were cropped with"
            )
        first = axis.value(float(cropped.coords[f"window_{name[1]}"].values.flat[0]))
        if name in cropped.attrs["aligned_axes"]:
            first = -axis.scale * (n // 2)
        expected = regular(replace(axis, size=n, offset=first))
        if found := differing(name, positions(cropped, name), expected):
            raise ConfigError(
                f"the windows have other coordinates than their crop: {found}; pass what sd.crop returned"
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
    """Describe how coordinates differ from the expected ones; None if they agree.

    Examples
    --------
    >>> differing("scan_y", (np.arange(3.0)[::-1], "nm"), (np.arange(3.0), "nm"))
    'scan_y[0] is 2 nm, not 0 nm'
    """
    (here, unit), (there, other) = found, known
    if len(here) != len(there):
        return f"{dim} has {len(here)} values, not {len(there)}"
    if unit != other:
        return f"{dim} is in {unit or 'px'}, not in {other or 'px'}"
    step = float(np.abs(np.diff(there)).min()) if len(there) > 1 else 0.0
    wrong = np.abs(here - there) > 1e-6 * step + 1e-12 * np.abs(there)
    if not wrong.any():
        return None
    i = int(np.argmax(wrong))
    unit = f" {unit}" if unit else ""
    return f"{dim}[{i}] is {here[i]:g}{unit}, not {there[i]:g}{unit}"


def refuse_other_patterns(patterns: xr.DataArray, analysis: xr.Dataset) -> None:
    """Raise ConfigError if the coordinates of an analysis and of patterns differ."""
    lead = lead_dims(patterns)
    known = tuple(int(n) for n in analysis["center_y"].shape)
    if lead_shape(patterns) != known or lead != analysis["center_y"].dims:
        raise ConfigError(
            f"the analysis is of {known} positions, the patterns have {lead_shape(patterns)}; "
            "analyze the patterns that are cropped"
        )
    names = (*lead, *(f"source_{name}" for name in DETECTOR_DIMS))
    for dim, name in zip((*lead, *DETECTOR_DIMS), names, strict=True):
        if found := differing(dim, positions(patterns, dim), positions(analysis, name)):
            raise ConfigError(
                f"the analysis is of other patterns: {found}; analyze the patterns that are cropped"
            )
