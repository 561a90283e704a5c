"""Normalization of all patterns together: log(1 + x), then mean 0 and standard deviation 1 over the whole dataset."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, ChangedBlock, Deferred
from stem_dask.core.errors import ConfigError
from stem_dask.core.patterns import as_patterns, axes_of, blocks_of
from stem_dask.kernels.normalize import NO_MOMENTS, joined, log_moments, log_zscore
from stem_dask.stages.patterns import map_patterns, valid_blocks

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

METHOD = "log-zscore"


def log_statistics(patterns: xr.DataArray) -> da.Array:
    """Lazy moments of log(1 + x) of all valid patterns: blocks are `Deferred` with ``moments`` (…, 1, 4), see `log_moments`."""
    data, valid = blocks_of(patterns), valid_blocks(patterns)
    if valid is None:
        return map_patterns(_moments_block, data, object)
    import dask.array as da

    lead = tuple(range(data.ndim - 2))
    return da.blockwise(
        _valid_moments_block, lead, data, (*lead, -2, -1), valid[..., 0, 0], lead, concatenate=False,
        dtype=object, meta=np.empty((0,) * len(lead), object),
    )  # fmt: skip


def log_constants(moments: Iterable[NDArray]) -> dict[str, float]:
    """Mean and standard deviation (ddof 0) of log(1 + x) from the moments of all blocks, in their order.

    Raises
    ------
    ConfigError
        When a value is negative or NaN, or all are the same.
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
    """(log(1 + x) - mean) / std of lazy patterns, float32; the constants go into the attributes.

    Examples
    --------
    >>> import xarray as xr
    >>> patterns = xr.DataArray(np.zeros((2, 4, 4)), dims=("pattern", "ky", "kx"))
    >>> float(normalize(patterns, mean=0.5, std=0.25).values.max())
    -2.0
    """
    blocks = blocks_of(patterns)
    meta = np.empty((0,) * blocks.ndim, np.float32)
    data = blocks.map_blocks(_zscore_block, mean=mean, std=std, dtype=np.float32, meta=meta)
    attrs = {
        **patterns.attrs,
        "intensity": f"z-score of log(1 + {patterns.attrs.get('intensity', 'counts')})",
        "normalization": {"method": METHOD, "mean": mean, "std": std},
    }
    attrs.pop("maximum", None)
    return as_patterns(data, axes_of(patterns), attrs)


def _moments_block(block: NDArray | Block, valid: NDArray[np.bool_] | None = None) -> Deferred:
    counted = None if valid is None else valid.ravel()
    return Deferred(block, lambda: _Moments((1,) * (block.ndim - 2), counted))


def _valid_moments_block(pieces: list[list[Any]], valid: NDArray[np.bool_]) -> Deferred:
    return _moments_block(pieces[0][0], valid)


class _Moments:
    """Reducer: moments of the valid patterns of a block."""

    def __init__(self, lead: tuple[int, ...], valid: NDArray[np.bool_] | None) -> None:
        self.lead, self.valid, self.found, self.done = lead, valid, NO_MOMENTS, 0

    def add(self, piece: NDArray) -> None:
        here = slice(self.done, self.done + len(piece))
        self.done = here.stop
        counted = piece if self.valid is None else piece[self.valid[here]]
        self.found = log_moments(counted, self.found)

    def result(self) -> dict[str, NDArray]:
        return {"moments": self.found.reshape(*self.lead, 1, 4)}


def _zscore_block(block: NDArray | Block, mean: float, std: float) -> ChangedBlock:
    def change(piece: NDArray, here: slice, out: NDArray) -> None:
        log_zscore(piece, mean, std, out)

    return ChangedBlock(block, change, (block.shape[-2], block.shape[-1]), np.dtype(np.float32))
