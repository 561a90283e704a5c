"""Images of the scan, one value for each pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError
from stem_dask.core.patterns import blocks_of, lead_dims, lead_shape
from stem_dask.stages.blocks import patterns_of, require_computed
from stem_dask.stages.crop import beam_places, refuse_other_patterns, refuse_other_windows

if TYPE_CHECKING:
    import xarray as xr


def virtual_image(
    patterns: Any,
    inner: float,
    outer: float,
    center: Sequence[float] | xr.Dataset | None = None,
) -> xr.DataArray:
    """Sum of every pattern over the pixels of a ring; lazy.

    Parameters
    ----------
    patterns : (scan_y, scan_x, ky, kx) or (pattern, ky, kx), also cropped ones; see `analyze`
    inner, outer : distances from the center in pixels; pixels at ``inner <= distance < outer`` count
    center : (y, x) in pixels, or an analysis of the patterns, for each pattern's own center as `crop` rounds it; default
        the middle of the detector, (H // 2, W // 2)

    Returns
    -------
    DataArray (scan_y, scan_x) or (pattern), float64; NaN for patterns that are missing, or have no center in the analysis

    Raises
    ------
    ConfigError
        When the distances are not 0 <= inner < outer, or the analysis is of other patterns.

    Examples
    --------
    >>> import numpy as np
    >>> bright = virtual_image(np.ones((2, 3, 8, 8), "u2"), 0, 1.5)
    >>> bright.dims, float(bright[0, 0])
    (('scan_y', 'scan_x'), 9.0)
    """
    import dask.array as da
    import xarray as xr

    if not 0 <= inner < outer:
        raise ConfigError(f"inner is {inner} and outer is {outer}; expected 0 <= inner < outer")
    patterns = patterns_of(patterns)
    blocks, dims, shape = blocks_of(patterns), lead_dims(patterns), patterns.shape[-2:]
    lead = tuple(range(blocks.ndim - 2))
    places: tuple[NDArray, ...]
    if isinstance(center, xr.Dataset):
        places = _own_centers(patterns, center)
    else:
        middle = (shape[0] // 2, shape[1] // 2) if center is None else tuple(center)
        if len(middle) != 2 or not np.isfinite(middle).all():
            raise ConfigError(f"the center is {center}; expected (y, x) in pixels, or an analysis")
        places = tuple(np.broadcast_to(np.float64(at), lead_shape(patterns)) for at in middle)
    if "valid" in patterns.coords:
        places = tuple(np.where(patterns.coords["valid"].values, one, np.nan) for one in places)
    along = [da.from_array(one, chunks=blocks.chunks[:-2]) for one in places]
    image = da.blockwise(
        _sum_block,
        lead,
        blocks,
        tuple(range(blocks.ndim)),
        *(part for one in along for part in (one, lead)),
        inner=float(inner),
        outer=float(outer),
        concatenate=False,
        dtype=np.float64,
        meta=np.empty((0,) * len(lead)),
    )
    coords = {dim: patterns.coords[dim] for dim in dims if dim in patterns.coords}
    attrs = {
        "long_name": f"intensity from {inner:g} to {outer:g} px",
        "inner": inner,
        "outer": outer,
    }
    return xr.DataArray(image, coords, dims, "virtual_image", attrs)


def _own_centers(
    patterns: xr.DataArray, analysis: xr.Dataset
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The rounded center of each pattern, in its own pixels."""
    require_computed(analysis)
    if "window_y" not in patterns.coords:
        refuse_other_patterns(patterns, analysis)
        return beam_places(analysis)
    refuse_other_windows(patterns, analysis, "give the center as (y, x)")
    if lead_shape(patterns) != analysis["center_y"].shape:
        raise ConfigError(
            f"the analysis is of {analysis['center_y'].shape} positions, the patterns have {lead_shape(patterns)}"
        )
    y, x = beam_places(analysis)
    return y - patterns.coords["window_y"].values, x - patterns.coords["window_x"].values


def _sum_block(
    blocks: list[list[Any]], ys: NDArray, xs: NDArray, *, inner: float, outer: float
) -> NDArray[np.float64]:
    """The sums of one block, each over the box around its ring."""
    patterns = np.asarray(blocks[0][0])
    out = np.full(ys.shape, np.nan)
    kind = np.float64 if patterns.dtype.kind == "f" else None  # integers add up exactly
    known: tuple[Any, Any] = (None, None)
    for index in np.ndindex(ys.shape):
        center = float(ys[index]), float(xs[index])
        if not all(map(math.isfinite, center)):
            continue
        if known[0] != center:
            known = center, _ring(center, patterns.shape[-2:], inner, outer)
        box, ring = known[1]
        out[index] = patterns[index][box][ring].sum(dtype=kind)
    return out


def _ring(
    center: tuple[float, float], shape: tuple[int, ...], inner: float, outer: float
) -> tuple[tuple[slice, ...], NDArray[np.bool_]]:
    """The part of the detector that a ring can reach, and which of its pixels the ring holds."""
    reach = min(outer, sum(shape) + max(map(abs, center)))  # of an infinite ring
    spans = [
        (max(0, math.floor(at - reach)), min(n, math.ceil(at + reach) + 1))
        for at, n in zip(center, shape, strict=True)
    ]
    spans = [(first, max(first, end)) for first, end in spans]
    y, x = (np.arange(*span) - at for span, at in zip(spans, center, strict=True))
    distance = np.hypot(y[:, None], x)
    return tuple(slice(*span) for span in spans), (distance >= inner) & (distance < outer)
