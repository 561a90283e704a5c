"""Normalization of all patterns together: log(1 + x), then mean 0 and standard deviation 1 over the whole dataset."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block
from stem_dask.core.errors import ConfigError
from stem_dask.core.patterns import as_patterns, axes_of, blocks_of
from stem_dask.kernels.pixels import NO_MOMENTS, joined, log_moments, log_zscore
from stem_dask.stages.blocks import changed, reduced, valid_of

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

METHOD = "log-zscore"


def log_statistics(patterns: xr.DataArray) -> da.Array:
    """Lazy moments of log(1 + x) of all valid patterns: blocks are `Deferred` with ``moments`` (…, 1, 4), see `log_moments`."""
    return reduced(_Moments, blocks_of(patterns), *valid_of(patterns))


class _Moments:
    """Reducer: moments of the valid patterns of a block."""

    def __init__(self, block: NDArray | Block, *valid: NDArray[np.bool_]) -> None:
        self.lead, self.valid, self.found = (1,) * (block.ndim - 2), valid, NO_MOMENTS

    def add(self, piece: NDArray, here: slice) -> None:
        for valid in self.valid:
            piece = piece[valid.ravel()[here]]
        self.found = log_moments(piece, self.found)

    def result(self) -> dict[str, NDArray]:
        return {"moments": self.found.reshape(*self.lead, 1, 4)}


def log_constants(moments: Iterable[NDArray]) -> dict[str, float]:
    """Mean and standard deviation (ddof 0) of log(1 + x) from the moments of all blocks, in their order.

    Raises ConfigError when a value is negative or NaN, or all are the same.
    """
    n, mean, squares, lowest = reduce(joined, (part.ravel() for part in moments)).tolist()
    if not lowest >= 0:
        raise ConfigError(
            f"output.normalize: {METHOD} takes the logarithm of 1 + counts, and the patterns hold {lowest:g}; "
            "normalize counts of 0 or more, or set output.normalize=none"
        )
    std = (squares / n) ** 0.5
    if not std > 1e-12 * (1 + abs(mean)):  # rounding errors of equal values
        raise ConfigError(
            f"output.normalize: {METHOD} divides by the standard deviation, and all values are the same; "
            "set output.normalize=none"
        )
    return {"mean": mean, "std": std}


def normalize(patterns: xr.DataArray, mean: float, std: float) -> xr.DataArray:
    """(log(1 + x) - mean) / std of lazy patterns, float32; the constants go into the attributes."""
    data = changed(log_zscore, blocks_of(patterns), dtype=np.float32, mean=mean, std=std)
    attrs = {
        **patterns.attrs,
        "intensity": f"z-score of log(1 + {patterns.attrs.get('intensity', 'counts')})",
        "normalization": {"method": METHOD, "mean": mean, "std": std},
    }
    attrs.pop("maximum", None)
    return as_patterns(data, axes_of(patterns), attrs)
