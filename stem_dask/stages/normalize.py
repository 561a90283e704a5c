"""Normalization of all patterns together: log(1 + x), then mean 0 and standard deviation 1 over the whole dataset.

A store of counts has mean and standard deviation of log(1 + x) by position: the constants of any subset follow from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block
from stem_dask.core.errors import ConfigError
from stem_dask.core.patterns import as_patterns, axes_of, blocks_of
from stem_dask.kernels.logarithm import add_logs
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


def pattern_logs(patterns: xr.DataArray) -> da.Array:
    """Lazy ``log_mean`` and ``log_std`` of each pattern, and ``log_sum`` (ky, kx) of every block; blocks are `Deferred`.

    Missing patterns are NaN and not in the sum, and so are patterns with a value that is negative, infinite or NaN.
    """
    return reduced(_PatternLogs, blocks_of(patterns), *valid_of(patterns))


class _PatternLogs:
    """Reducer: `add_logs` of the valid patterns of a block."""

    def __init__(self, block: NDArray | Block, *valid: NDArray[np.bool_]) -> None:
        self.lead, self.total = block.shape[:-2], np.zeros(block.shape[-2:])
        self.valid = valid[0].ravel() if valid else np.ones(prod(self.lead), bool)
        self.found = np.full((2, prod(self.lead)), np.nan)

    def add(self, piece: NDArray, here: slice) -> None:
        valid = self.valid[here]
        some = piece if valid.all() else piece[valid]
        self.found[:, here][:, valid] = add_logs(some, self.total)

    def result(self) -> dict[str, NDArray]:
        mean, std = self.found.reshape(2, *self.lead)
        total = self.total.reshape((1,) * len(self.lead) + self.total.shape)
        return {"log_mean": mean, "log_std": std, "log_sum": total}


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
