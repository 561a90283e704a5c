"""Downsampling of the detector, and conversion to another type."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, ChangedBlock, copied
from stem_dask.core.errors import ConfigError
from stem_dask.core.model import Device
from stem_dask.core.patterns import as_patterns, axes_of, blocks_of, lead_dims
from stem_dask.core.window import check_factor
from stem_dask.kernels.downsample import METHODS, downsample_patterns, result_dtype
from stem_dask.stages.arrays import patterns_of
from stem_dask.stages.gpu import CutOnGpu
from stem_dask.stages.patterns import as_arrays, check_device

if TYPE_CHECKING:
    import xarray as xr

Method = Literal["bin", "stride", "gauss", "fft"]

Reduce = Literal["mean", "sum"]

FLOAT16_MAX = float(np.finfo(np.float16).max)


def downsample(
    patterns: Any,
    factor: int = 1,
    *,
    method: Method = "bin",
    reduce: Reduce = "mean",
    sigma: float | None = None,
    device: Device = "cpu",
) -> xr.DataArray:
    """Make patterns smaller by an integer factor; lazy.

    Parameters
    ----------
    patterns : (…, ky, kx)
    factor : k >= 1; an axis of n pixels gives ``n // k``
    method : ``bin`` (mean or sum of k × k pixels), ``stride`` (every k-th pixel), ``gauss`` (smoothed, then every
        k-th pixel), ``fft`` (the centered part of the spectrum)
    reduce : ``mean`` or ``sum``, for ``bin``
    sigma : of the Gaussian in source pixels, for ``gauss``; default ``0.5 * factor``
    device : ``cpu``, or ``gpu`` of the worker; the result is the same, for gauss and fft to 1e-5

    Returns
    -------
    DataArray (…, ky // k, kx // k); means, gauss and fft are float32 (float64 from float64), sums the smallest type
    that cannot overflow, stride the type of the input

    Raises
    ------
    ConfigError
        When an option is unknown or the factor exceeds the detector.

    Examples
    --------
    >>> import numpy as np
    >>> import xarray as xr
    >>> patterns = xr.DataArray(np.ones((1, 2, 8, 8), "u2"), dims=("scan_y", "scan_x", "ky", "kx"))
    >>> small = downsample(patterns, 4)
    >>> small.shape, str(small.dtype), small.ky.values.tolist()
    ((1, 2, 2, 2), 'float32', [1.5, 5.5])
    """
    patterns = patterns_of(patterns)
    small = downsample_blocks(
        patterns, factor, method=method, reduce=reduce, sigma=sigma, device=device
    )
    return small if factor == 1 else as_arrays(small)


def downsample_blocks(
    patterns: xr.DataArray,
    factor: int,
    *,
    method: Method,
    reduce: Reduce,
    sigma: float | None,
    device: Device,
) -> xr.DataArray:
    """`downsample` for the tasks of a job, whose blocks need not be arrays."""
    _check(patterns, factor, method, reduce, sigma)
    check_device(device)
    factor = int(factor)
    if factor == 1:
        return patterns
    data = blocks_of(patterns)
    height, width = (size // factor for size in data.shape[-2:])
    dtype = result_dtype(data.dtype, factor, method, reduce)
    out = data.map_blocks(
        _downsample_block,
        (height, width),
        dtype,
        device,
        factor=factor,
        method=method,
        reduce=reduce,
        sigma=sigma,
        chunks=(*data.chunks[:-2], (height,), (width,)),
        dtype=dtype,
        meta=np.empty((0,) * data.ndim, dtype),
    )
    shift = output_shift(factor, method)
    axes = list(axes_of(patterns))
    for i, size in ((-2, height), (-1, width)):
        axis = axes[i]
        axes[i] = replace(
            axis, size=size, scale=axis.scale * factor, offset=axis.offset + axis.scale * shift
        )
    attrs = {**patterns.attrs, "downsample_factor": factor, "downsample_method": method}
    unit, mean = attrs.get("intensity", "counts"), "mean counts per source pixel"
    if method != "stride" and reduce == "mean":
        attrs["intensity"] = mean if unit in ("counts", mean) else f"means of {unit}"
    elif reduce == "sum" and unit != "counts":
        attrs["intensity"] = f"sums of {unit}"  # of patterns that were already downsampled
    small = as_patterns(out, axes, attrs)
    lead = lead_dims(patterns)
    return small.assign_coords(
        {
            name: (lead, patterns.coords[name].values)
            for name in ("window_y", "window_x", "valid")
            if name in patterns.coords
        }
    )


def _downsample_block(
    block: NDArray | Block, shape: tuple[int, int], kind: np.dtype, device: Device, **how: Any
) -> Block:
    if device == "gpu":
        return (block if isinstance(block, CutOnGpu) else CutOnGpu.whole(block)).smaller(**how)

    def smaller(piece: NDArray, here: slice, out: NDArray) -> None:
        downsample_patterns(piece, **how, out=out)

    return ChangedBlock(block, smaller, shape, kind)


def output_shift(factor: int, method: str) -> float:
    """Source position of output pixel 0: the middle of its block for ``bin``, else its own pixel."""
    return (factor - 1) / 2 if method == "bin" else 0.0


def cast(patterns: Any, dtype: str) -> xr.DataArray:
    """Convert patterns to another type; ``auto`` keeps it, float16 refuses values it cannot hold. Lazy.

    Raises
    ------
    ConfigError
        For an unknown type at once; for a value above 65504 when the block that holds it is computed.
    """
    patterns = patterns_of(patterns)
    small = cast_blocks(patterns, dtype)
    return small if small is patterns else as_arrays(small)


def cast_blocks(patterns: xr.DataArray, dtype: str) -> xr.DataArray:
    """`cast` for the tasks of a job, whose blocks need not be arrays."""
    if dtype not in ("auto", "float32", "float16"):
        raise ConfigError(f"dtype is {dtype!r}; expected auto, float32 or float16")
    if dtype == "auto" or patterns.dtype == np.dtype(dtype):
        return patterns
    data = blocks_of(patterns).map_blocks(_cast_block, dtype, dtype=np.dtype(dtype))
    return patterns.copy(data=data)


def check_float16(largest: float) -> None:
    """Refuse float16 for values that would become infinite."""
    if largest > FLOAT16_MAX:
        raise ConfigError(
            f"dtype float16 holds values up to {FLOAT16_MAX:g}, the data reach {largest:g}; "
            "use float32, or auto to keep the type"
        )


def _cast_block(block: NDArray | Block, dtype: str) -> ChangedBlock:
    change = _as_float16 if dtype == "float16" else copied
    return ChangedBlock(block, change, (block.shape[-2], block.shape[-1]), np.dtype(dtype))


def _as_float16(piece: NDArray, here: slice, out: NDArray) -> None:
    finite = np.where(np.isfinite(piece), np.abs(piece), 0) if piece.dtype.kind == "f" else piece
    check_float16(max(float(finite.max()), -float(finite.min())))
    copied(piece, here, out)


def _check(
    patterns: xr.DataArray, factor: int, method: str, reduce: str, sigma: float | None
) -> None:
    if method not in METHODS:
        raise ConfigError(f"downsample method is {method!r}; expected one of {', '.join(METHODS)}")
    if reduce not in ("mean", "sum"):
        raise ConfigError(f"downsample reduce is {reduce!r}; expected mean or sum")
    if sigma is not None and not (method == "gauss" and sigma > 0):
        raise ConfigError(
            f"downsample sigma is {sigma} with method {method}; expected sigma > 0 with method gauss"
        )
    if reduce == "sum" and method != "bin":
        raise ConfigError(f"downsample reduce is sum with method {method}; expected method bin")
    check_factor(factor, (patterns.sizes["ky"], patterns.sizes["kx"]))
