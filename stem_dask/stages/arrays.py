"""Patterns from arrays, DataArrays and signals of HyperSpy."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import of_signal
from stem_dask.core.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS, Axis
from stem_dask.core.patterns import as_patterns

if TYPE_CHECKING:
    import xarray as xr

#: dimensions of patterns
_DIMS = ((*SCAN_DIMS, *DETECTOR_DIMS), (*LIST_DIMS, *DETECTOR_DIMS))


def patterns_of(data: Any) -> xr.DataArray:
    """Convert an argument of a public function to patterns.

    Parameters
    ----------
    data : DataArray with dimensions (scan_y, scan_x, ky, kx) or (pattern, ky, kx) in any order, or one line of a scan such as
        ``patterns[0]``, which becomes a scan of one line; array of numpy, Dask, h5py or zarr with these axes in this order;
        or HyperSpy signal of 2D patterns, with its calibration

    Raises
    ------
    SourceError
        When it is something else.

    Examples
    --------
    >>> patterns_of(np.ones((5, 4, 4))).dims
    ('pattern', 'ky', 'kx')
    """
    import dask.array as da
    import xarray as xr

    if isinstance(data, xr.DataArray):
        return _in_order(data)
    if isinstance(data, xr.Dataset):
        names = ", ".join(f"dataset[{name!r}]" for name in data.data_vars)
        raise SourceError(f"the patterns are an xarray.Dataset; pass one of its variables: {names}")
    if isinstance(data, (str, PathLike)):
        raise SourceError(f"the patterns are the path {str(data)!r}; open it with sd.open")
    axes, attrs = None, None
    if hasattr(data, "axes_manager"):
        data, axes, attrs = _signal(data)
    if isinstance(data, np.ma.MaskedArray):
        raise SourceError("the patterns are a masked array; pass array.filled(0)")
    try:
        shape, _ = tuple(data.shape), np.dtype(data.dtype)
    except (AttributeError, TypeError):
        raise SourceError(
            f"the patterns are a {type(data).__module__}.{type(data).__qualname__}; expected an array of numpy or Dask, an "
            "xarray.DataArray or a HyperSpy signal"
        ) from None
    if len(shape) not in (3, 4):
        raise SourceError(
            f"the patterns have {len(shape)} axes; expected (scan_y, scan_x, ky, kx) or (pattern, ky, kx): reshape the array, "
            "for example array.reshape(scan_y, scan_x, ky, kx)"
        )
    array = data if isinstance(data, (np.ndarray, da.Array)) else da.from_array(data)
    plain = [Axis(name, size) for name, size in zip(_DIMS[4 - len(shape)], shape, strict=True)]
    return as_patterns(array, axes or plain, attrs)


def _in_order(patterns: xr.DataArray) -> xr.DataArray:
    """Transpose dimensions into order; a line of a scan becomes a scan of one line."""
    dims = tuple(map(str, patterns.dims))
    if dims in _DIMS:
        return patterns
    for line, other in (SCAN_DIMS, SCAN_DIMS[::-1]):
        if {*dims} == {line, *DETECTOR_DIMS}:
            lead = {dim: patterns.sizes.get(dim, 1) for dim in SCAN_DIMS}
            kept = {
                name: value.variable.set_dims(lead)
                for name, value in patterns.coords.items()
                if value.dims == (line,) != (name,)
            }
            patterns = patterns.expand_dims(other).assign_coords(kept)
            dims = tuple(map(str, patterns.dims))
    for wanted in _DIMS:
        if {*dims} == {*wanted}:
            return patterns.transpose(*wanted)
    expected = _DIMS[0] if len(dims) == 4 else _DIMS[1]
    names = {a: b for a, b in zip(dims, expected, strict=False) if a != b}
    way = f"rename or transpose them, for example patterns.rename({names})"
    if {*dims} == {*DETECTOR_DIMS}:
        way = (
            "keep the scan axes of a single pattern, as patterns.isel(scan_y=[0], scan_x=[0]) does"
        )
    raise SourceError(
        f"the patterns have dimensions {dims}; expected (scan_y, scan_x, ky, kx) or (pattern, ky, kx): {way}"
    )


def _signal(signal: Any) -> tuple[Any, list[Axis], dict[str, Any]]:
    """Data of a HyperSpy signal (slowest axis first), its axes, and attributes; HyperSpy itself is not imported."""
    manager = signal.axes_manager
    # HyperSpy lists the fastest axis first
    lead, detector = manager.navigation_axes[::-1], manager.signal_axes[::-1]
    if len(detector) != 2 or len(lead) not in (1, 2):
        raise SourceError(
            f"the signal has {len(lead)} navigation and {len(detector)} signal axes; expected 1 or 2 and 2: "
            "signal.transpose(signal_axes=2) makes signal axes of the last two"
        )
    axes = []
    for name, axis in zip(_DIMS[2 - len(lead)], (*lead, *detector), strict=True):
        if not getattr(axis, "is_uniform", True):
            raise SourceError(
                f"the axis {axis.name} of the signal is not uniform; convert it with "
                "axis.convert_to_uniform_axis()"
            )
        units = axis.units if isinstance(axis.units, str) else ""
        axes.append(Axis(name, axis.size, float(axis.scale), float(axis.offset), units))
    order = [axis.index_in_array for axis in (*lead, *detector)]
    data = signal.data if order == sorted(order) else signal.data.transpose(order)
    return data, axes, of_signal(signal.metadata.as_dictionary())
