"""Patterns from arrays, DataArrays and signals of HyperSpy, and how stages work on their lazy blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, ChangedBlock, Deferred, Reducer
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.metadata import of_signal
from stem_dask.core.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS, Axis
from stem_dask.core.patterns import as_patterns

if TYPE_CHECKING:
    import dask.array as da
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


def changed(
    kernel: Callable[..., Any],
    data: da.Array,
    *along: NDArray,
    detector: tuple[int, int] | None = None,
    dtype: Any = None,
    **options: Any,
) -> da.Array:
    """Lazy ``kernel(batch, *along, out=out, **options)`` of all patterns; its blocks are `ChangedBlock`.

    Parameters
    ----------
    kernel : function of a batch (n, ky, kx) that fills ``out`` (n, height, width)
    data : (…, ky, kx), with the whole detector in every block
    along : values by position, of which the kernel gets those of its batch
    detector, dtype : of the result; default those of the data, in native byte order
    """
    how = {"kernel": kernel, "options": options, "result": (detector, dtype)}
    return on_blocks(_change_block, data, *along, detector=detector, dtype=dtype, **how)


def _change_block(
    block: NDArray | Block,
    *along: NDArray,
    kernel: Callable[..., Any],
    options: dict[str, Any],
    result: tuple[tuple[int, int] | None, Any],
) -> ChangedBlock:
    flat = [values.ravel() for values in along]

    def change(piece: NDArray, here: slice, out: NDArray) -> None:
        kernel(piece, *(values[here] for values in flat), out=out, **options)

    return ChangedBlock(block, change, *result)


def on_blocks(
    function: Callable[..., Any],
    data: da.Array,
    *along: NDArray,
    detector: tuple[int, int] | None = None,
    dtype: Any = None,
    **options: Any,
) -> da.Array:
    """Lazy ``function(block, *along, **options)`` of every block; see `changed`."""
    import dask.array as da

    dtype = data.dtype.newbyteorder("=") if dtype is None else np.dtype(dtype)
    lead = data.chunks[:-2]
    values = [
        da.from_array(np.ascontiguousarray(one)[..., None, None], chunks=(*lead, (1,), (1,)))
        for one in along
    ]
    return da.map_blocks(
        function,
        data,
        *values,
        chunks=(*lead, *((n,) for n in detector or data.shape[-2:])),
        dtype=dtype,
        meta=np.empty((0,) * data.ndim, dtype),
        **options,
    )


def reduced(
    reducer: Callable[..., Reducer], data: da.Array, *along: NDArray, **options: Any
) -> da.Array:
    """Lazy reductions ``reducer(block, *along, **options)`` of every block, without the detector axes; blocks are `Deferred`.

    ``along`` are values by position, of which the reducer gets those of its block. `map_blocks` with ``drop_axis`` would copy
    every block.
    """
    import dask.array as da

    lead = tuple(range(data.ndim - 2))
    values = (da.from_array(one, chunks=data.chunks[:-2]) for one in along)
    return da.blockwise(
        _reduce_block,
        lead,
        data,
        tuple(range(data.ndim)),
        *(part for one in values for part in (one, lead)),
        reducer=reducer,
        options=options,
        concatenate=False,
        dtype=object,
        meta=np.empty((0,) * len(lead), object),
    )


def _reduce_block(
    blocks: list[list[Any]],
    *along: NDArray,
    reducer: Callable[..., Reducer],
    options: dict[str, Any],
) -> Deferred:
    return Deferred(blocks[0][0], lambda: reducer(blocks[0][0], *along, **options))


def as_arrays(patterns: xr.DataArray) -> xr.DataArray:
    """Lazy patterns whose blocks are numpy arrays, as public functions return them."""
    data = patterns.data
    return patterns.copy(data=data.map_blocks(np.asarray, dtype=data.dtype, meta=data._meta))


def valid_of(patterns: xr.DataArray) -> list[NDArray[np.bool_]]:
    """The values of the coordinate ``valid`` for `changed` and `reduced`; none without it."""
    return [patterns.coords["valid"].values] if "valid" in patterns.coords else []


def check_device(device: str) -> None:
    """Raise ConfigError unless the device is cpu or gpu."""
    if device not in ("cpu", "gpu"):
        raise ConfigError(f"device is {device!r}; expected cpu or gpu")


def require_computed(analysis: xr.Dataset) -> None:
    """Raise ConfigError for a lazy analysis, which every later stage would compute again."""
    needed = ("center_y", "center_x", "radius", "total")
    missing = {*needed} - set(analysis.variables)
    if missing:
        raise ConfigError(
            f"the analysis lacks {', '.join(sorted(missing))}; pass what sd.analyze returned"
        )
    if any(analysis[name].chunks is not None for name in needed):
        raise ConfigError(
            "the analysis is still lazy; compute it once: analysis = sd.analyze(patterns).compute()"
        )


def sampled(lead: Sequence[int], most: int = 256) -> NDArray[np.bool_]:
    """Positions of a sample of at most ``most`` patterns, evenly spread over the scan."""
    out = np.zeros(tuple(lead), np.bool_)
    out[np.ix_(*sample_positions(lead, most))] = True
    return out


def sample_positions(lead: Sequence[int], most: int = 256) -> list[list[int]]:
    """Indices along each scan axis of a sample of at most ``most`` patterns, evenly spread over the scan."""
    counts = [min(n, math.isqrt(most)) if len(lead) > 1 else min(n, most) for n in lead]
    for i in reversed(range(len(lead))):
        others = math.prod(counts) // counts[i]
        counts[i] = min(lead[i], most // others)
    return [
        ((np.arange(count) + 0.5) * n // count).astype(int).tolist()
        for n, count in zip(lead, counts, strict=True)
    ]
