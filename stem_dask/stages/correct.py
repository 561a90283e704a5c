"""Dark and gain correction when patterns are read, before the mask; the result is float32."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, ChangedBlock, is_input_left_out
from stem_dask.core.patterns import blocks_of
from stem_dask.kernels.pixels import correct_patterns
from stem_dask.stages.patterns import valid_blocks
from stem_dask.stages.references import PlaneFile

if TYPE_CHECKING:
    import xarray as xr

Plane = NDArray[np.float32] | PlaneFile


def apply_correction(
    patterns: xr.DataArray, dark: Plane | None = None, gain: Plane | None = None
) -> xr.DataArray:
    """``(pattern - dark) * gain`` of every pattern; lazy.

    Parameters
    ----------
    patterns : (…, ky, kx)
    dark, gain : (ky, kx), see `stem_dask.stages.references.reference`; or the file that a worker reads it from

    Returns
    -------
    DataArray of float32, with the attribute ``corrected``; the patterns as they are when there is neither. Where the
    coordinate ``valid`` is False they stay zeros.

    Examples
    --------
    >>> import xarray as xr
    >>> patterns = xr.DataArray(np.full((2, 1, 1), 7, "u1"), dims=("pattern", "ky", "kx"))
    >>> apply_correction(patterns, dark=np.array([[2]], "f4")).values.ravel().tolist()
    [5.0, 5.0]
    """
    used = [name for name, plane in (("dark", dark), ("gain", gain)) if plane is not None]
    if not used:
        return patterns
    import dask.array as da

    data, valid = blocks_of(patterns), valid_blocks(patterns)
    dtype = np.dtype(np.float32)
    out = da.map_blocks(
        _correct_block,
        data,
        dark,
        gain,
        valid,
        chunks=data.chunks,
        dtype=dtype,
        meta=np.empty((0,) * data.ndim, dtype),
    )
    return patterns.copy(data=out).assign_attrs(corrected=used)


def _correct_block(
    block: NDArray | Block,
    dark: Plane | None,
    gain: Plane | None,
    valid: NDArray[np.bool_] | None,
) -> ChangedBlock:
    background, factors = (
        plane.values() if isinstance(plane, PlaneFile) else plane for plane in (dark, gain)
    )
    lost = None if valid is None else ~valid.ravel()
    if is_input_left_out():
        lost = np.ones(prod(block.shape[:-2]), bool)

    def correct(piece: NDArray, here: slice, out: NDArray) -> None:
        correct_patterns(piece, background, factors, out)
        if lost is not None:
            out[lost[here]] = 0

    return ChangedBlock(block, correct, (block.shape[-2], block.shape[-1]), np.dtype(np.float32))
