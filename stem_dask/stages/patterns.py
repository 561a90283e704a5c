"""Values by pattern, and samples of patterns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError
from stem_dask.core.patterns import blocks_of, lead_dims

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

#: largest sample of patterns
SAMPLE = 256


def as_arrays(patterns: xr.DataArray) -> xr.DataArray:
    """Lazy patterns whose blocks are numpy arrays, as public functions return them."""
    data = patterns.data
    return patterns.copy(data=data.map_blocks(np.asarray, dtype=data.dtype, meta=data._meta))


def check_device(device: str) -> None:
    """Raise ConfigError unless the device is cpu or gpu."""
    if device not in ("cpu", "gpu"):
        raise ConfigError(f"device is {device!r}; expected cpu or gpu")


def per_pattern(patterns: xr.DataArray, data: Any, name: str) -> xr.DataArray:
    """One value per pattern, with the coordinates of the scan."""
    import xarray as xr

    dims = lead_dims(patterns)
    coords = {dim: patterns.coords[dim] for dim in dims if dim in patterns.coords}
    return xr.DataArray(data, dims=dims, coords=coords, name=name)


def sampled(lead: Sequence[int]) -> NDArray[np.bool_]:
    """Positions of a sample of at most 256 patterns, evenly spread over the scan.

    Examples
    --------
    >>> sampled((1000,)).sum(), sampled((3, 4)).all(), np.argwhere(sampled((64, 64)))[:2].tolist()
    (np.int64(256), np.True_, [[2, 2], [2, 6]])
    """
    counts = [min(n, math.isqrt(SAMPLE)) if len(lead) > 1 else min(n, SAMPLE) for n in lead]
    for i in reversed(range(len(lead))):
        others = math.prod(counts) // counts[i]
        counts[i] = min(lead[i], SAMPLE // others)
    out = np.zeros(tuple(lead), np.bool_)
    chosen = [
        ((np.arange(count) + 0.5) * n // count).astype(int)
        for n, count in zip(lead, counts, strict=True)
    ]
    out[np.ix_(*chosen)] = True
    return out


def valid_blocks(patterns: xr.DataArray) -> da.Array | None:
    """The coordinate ``valid`` as (…, 1, 1), chunked like the patterns; None without it."""
    import dask.array as da

    if "valid" not in patterns.coords:
        return None
    chunks = (*blocks_of(patterns).chunks[:-2], (1,), (1,))
    return da.from_array(patterns.coords["valid"].values[..., None, None], chunks=chunks)


def map_patterns(
    function: Callable[..., Any],
    data: da.Array,
    dtype: Any,
    *along: da.Array,
    by_block: bool = False,
    **options: Any,
) -> da.Array:
    """Lazy ``function(block, *along, **options)`` without the detector axes: one value per position, or per block.

    ``along`` have one value per position and the same chunks. `map_blocks` with ``drop_axis`` would copy every block.

    Examples
    --------
    >>> import dask.array as da
    >>> map_patterns(lambda block: block.sum((1, 2)), da.ones((3, 4, 4), chunks=(2, 4, 4)), float).compute().tolist()
    [16.0, 16.0, 16.0]
    """
    import dask.array as da

    lead = tuple(range(data.ndim - 2))
    return da.blockwise(
        _on_single_piece,
        lead,
        data,
        tuple(range(data.ndim)),
        *(part for values in along for part in (values, lead)),
        function=function,
        concatenate=False,
        adjust_chunks=dict.fromkeys(lead, lambda size: 1) if by_block else None,
        dtype=dtype,
        meta=np.empty((0,) * len(lead), dtype),
        **options,
    )


def _on_single_piece(
    pieces: list[list[Any]], *along: Any, function: Callable[..., Any], **options: Any
) -> Any:
    return function(pieces[0][0], *along, **options)
