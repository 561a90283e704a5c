"""Sum and maximum of every block of the output, and radii from stored profiles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, Deferred
from stem_dask.core.patterns import blocks_of
from stem_dask.core.window import radii_for_target
from stem_dask.kernels.intensity import add_patterns, native
from stem_dask.stages.patterns import map_patterns

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr


def block_statistics(patterns: xr.DataArray) -> da.Array:
    """``highest`` finite value and ``sum`` (ky, kx) of every block, float64; lazy, blocks are `Deferred`."""
    return map_patterns(_statistics_block, blocks_of(patterns), object)


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


class _Statistics:
    """Reducer: sum and maximum of the patterns."""

    def __init__(self, block: NDArray | Block) -> None:
        self.lead = (1,) * (block.ndim - 2)
        self.total = np.zeros(block.shape[-2:])
        dtype = native(np.empty((0, 1, 1), block.dtype)).dtype
        lowest = -math.inf if dtype.kind == "f" else np.iinfo(dtype).min
        self.highest = np.full(block.shape[-1], lowest, dtype)

    def add(self, piece: NDArray) -> None:
        add_patterns(piece, self.total, self.highest)

    def result(self) -> dict[str, NDArray]:
        highest = np.full(self.lead, float(self.highest.max()))
        return {"highest": highest, "sum": self.total.reshape(*self.lead, *self.total.shape)}


def _statistics_block(block: NDArray | Block) -> Deferred:
    return Deferred(block, lambda: _Statistics(block))


def _radii_block(
    profile: NDArray, total: NDArray, target: float, metric: str, exact: bool
) -> NDArray[np.float32]:
    flat = profile.reshape(-1, profile.shape[-1])
    return radii_for_target(flat, total.ravel(), target, metric, exact).reshape(profile.shape[:-1])
