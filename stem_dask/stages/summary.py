"""Sums and extremes of every block of the output, and radii from stored profiles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stem_dask.stages.patterns import blocks_of, map_patterns
from stem_dask.stages.window import radii_for_target

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr


def block_statistics(patterns: xr.DataArray) -> dict[str, da.Array]:
    """``highest`` finite value and ``sum`` (ky, kx) of every block, float64; one entry a block. Lazy."""
    data = blocks_of(patterns)
    lead = data.ndim - 2
    ones = tuple((1,) * n for n in data.numblocks[:lead])
    highest = map_patterns(_highest_block, data, np.float64, by_block=True)
    total = data.map_blocks(
        _sum_block,
        chunks=(*ones, *data.chunks[lead:]),
        dtype=np.float64,
        meta=np.empty((0,) * data.ndim),
    )
    return {"highest": highest, "sum": total}


def stored_radii(stored: xr.Dataset, target: float, metric: str, exact: bool) -> da.Array:
    """Retention radii for another target, from the profiles of a stored analysis; lazy, float32 by position."""
    import dask.array as da

    profile = stored["profile"].data
    total = da.from_array(np.asarray(stored["total"].values), chunks=profile.chunks[:-1])
    return da.map_blocks(
        _radii_block,
        profile,
        total[..., None],
        target,
        metric,
        exact,
        drop_axis=profile.ndim - 1,
        dtype=np.float32,
        meta=np.empty((0,) * (profile.ndim - 1), np.float32),
    )


def _highest_block(block: NDArray) -> NDArray[np.float64]:
    finite = block[np.isfinite(block)] if block.dtype.kind == "f" else block
    highest = float(finite.max()) if finite.size else -math.inf
    return np.full((1,) * (block.ndim - 2), highest)


def _sum_block(block: NDArray) -> NDArray[np.float64]:
    return np.asarray(block.sum(axis=tuple(range(block.ndim - 2)), dtype=np.float64, keepdims=True))


def _radii_block(
    profile: NDArray, total: NDArray, target: float, metric: str, exact: bool
) -> NDArray[np.float32]:
    flat = profile.reshape(-1, profile.shape[-1])
    return radii_for_target(flat, total.ravel(), target, metric, exact).reshape(profile.shape[:-1])
