"""How stages work on lazy blocks: kernels on their batches, reductions of them, and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, ChangedBlock, Deferred, Reducer
from stem_dask.core.errors import ConfigError

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

#: largest sample of patterns
SAMPLE = 256


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


def sampled(lead: Sequence[int]) -> NDArray[np.bool_]:
    """Positions of a sample of at most 256 patterns, evenly spread over the scan."""
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
