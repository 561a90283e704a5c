"""Downsampling of the detector, and conversion to another type."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block
from stem_dask.core.errors import ConfigError
from stem_dask.core.model import Device
from stem_dask.core.patterns import as_patterns, axes_of, blocks_of, lead_dims
from stem_dask.core.window import check_factor
from stem_dask.kernels.downsample import METHODS, downsample_patterns, result_dtype
from stem_dask.stages.blocks import as_arrays, changed, check_device, on_blocks, patterns_of
from stem_dask.stages.gpu import CutOnGpu

if TYPE_CHECKING:
    import xarray as xr

Method = Literal["bin", "stride", "gauss", "fft"]

Reduce = Literal["mean", "sum"]


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
    how: dict[str, Any] = {"method": method, "reduce": reduce, "sigma": sigma, "device": device}
    small = downsample_blocks(patterns_of(patterns), factor, **how)
    return small if factor == 1 else as_arrays(small)


def downsample_blocks(
    patterns: xr.DataArray, factor: int, *, device: Device, **how: Any
) -> xr.DataArray:
    """`downsample` for the tasks of a job, whose blocks need not be arrays."""
    method, reduce, sigma = how["method"], how["reduce"], how["sigma"]
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
    check_device(device)
    factor = int(factor)
    if factor == 1:
        return patterns
    data = blocks_of(patterns)
    detector = (int(data.shape[-2]) // factor, int(data.shape[-1]) // factor)
    like: dict[str, Any] = {
        "detector": detector,
        "dtype": result_dtype(data.dtype, factor, method, reduce),
    }
    if device == "gpu":
        out = on_blocks(_downsample_on_gpu, data, **like, factor=factor, **how)
    else:
        out = changed(downsample_patterns, data, **like, factor=factor, **how)
    shift = output_shift(factor, method)
    *axes, ky, kx = axes_of(patterns)
    for axis, size in zip((ky, kx), detector, strict=True):
        scale, offset = axis.scale * factor, axis.offset + axis.scale * shift
        axes.append(replace(axis, size=size, scale=scale, offset=offset))
    attrs = {**patterns.attrs, "downsample_factor": factor, "downsample_method": method}
    unit, mean = attrs.get("intensity", "counts"), "mean counts per source pixel"
    if method != "stride" and reduce == "mean":
        attrs["intensity"] = mean if unit in ("counts", mean) else f"means of {unit}"
    elif reduce == "sum" and unit != "counts":
        attrs["intensity"] = f"sums of {unit}"  # of patterns that were already downsampled
    kept = [name for name in ("window_y", "window_x", "valid") if name in patterns.coords]
    coords = {name: (lead_dims(patterns), patterns.coords[name].values) for name in kept}
    return as_patterns(out, axes, attrs).assign_coords(coords)


def _downsample_on_gpu(block: NDArray | Block, **how: Any) -> Block:
    return (block if isinstance(block, CutOnGpu) else CutOnGpu.whole(block)).smaller(**how)


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
    return patterns.copy(data=changed(_convert, blocks_of(patterns), dtype=dtype))


def _convert(piece: NDArray, out: NDArray) -> None:
    if out.dtype == np.float16:
        floats = piece.dtype.kind == "f"
        finite = np.where(np.isfinite(piece), np.abs(piece), 0) if floats else piece
        check_float16(max(float(finite.max()), -float(finite.min())))
    np.copyto(out, piece, casting="unsafe")


def check_float16(largest: float) -> None:
    """Refuse float16 for values that would become infinite."""
    most = float(np.finfo(np.float16).max)
    if largest > most:
        raise ConfigError(
            f"dtype float16 holds values up to {most:g}, the data reach {largest:g}; "
            "use float32, or auto to keep the type"
        )
