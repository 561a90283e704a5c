"""Replacement of bad pixels when patterns are read, so that later stages need no mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, ChangedBlock
from stem_dask.core.errors import ConfigError
from stem_dask.core.patterns import blocks_of, lead_shape
from stem_dask.kernels.pixels import fill_bad, hot_pixels, neighbours
from stem_dask.stages.patterns import sampled
from stem_dask.stages.references import read_plane
from stem_dask.stages.window import require_computed

if TYPE_CHECKING:
    import xarray as xr

MaskFill = Literal["zero", "median"]


def apply_mask(
    patterns: xr.DataArray, mask: NDArray[np.bool_], mask_fill: MaskFill = "zero"
) -> xr.DataArray:
    """Replace bad pixels of every pattern; lazy.

    Parameters
    ----------
    patterns : (…, ky, kx)
    mask : (ky, kx), True (nonzero) = bad
    mask_fill : ``zero``, or ``median`` of the good neighbours

    Raises
    ------
    ConfigError
        When the mask does not have the detector's shape, or no pixel is good.
    """
    data = blocks_of(patterns)
    if mask.shape != data.shape[-2:]:
        raise ConfigError(
            f"the mask has shape {mask.shape}, the detector {data.shape[-2:]}; give a mask in source pixels"
        )
    if mask.all():
        raise ConfigError("the mask marks every pixel as bad; nonzero means bad: invert it")
    if mask_fill not in ("zero", "median"):
        raise ConfigError(f"mask_fill is {mask_fill!r}; expected zero or median")
    near = neighbours(mask) if mask_fill == "median" else None
    dtype = data.dtype.newbyteorder("=")
    meta = np.empty((0,) * data.ndim, dtype)
    out = data.map_blocks(_fill_block, mask, near, dtype=dtype, meta=meta)
    return patterns.copy(data=out).assign_attrs(masked_pixels=int(mask.sum()))


def _fill_block(
    block: NDArray | Block, mask: NDArray[np.bool_], near: list[Any] | None
) -> ChangedBlock:
    def fill(piece: NDArray, here: slice, out: NDArray) -> None:
        fill_bad(piece, mask, near, out)

    return ChangedBlock(
        block, fill, (block.shape[-2], block.shape[-1]), block.dtype.newbyteorder("=")
    )


def suspected_hot_pixels(analysis: xr.Dataset) -> NDArray[np.bool_]:
    """Pixels far above their neighbours in the mean pattern that are lit in at least half of a sample of the patterns.

    Hot are pixels above 6 times all but five of their 24 neighbours, which may be hot as well: singles, pairs, squares of
    four, whole rows and columns are found, larger clusters are not.

    Parameters
    ----------
    analysis : computed result of `analyze`

    Returns
    -------
    (ky, kx), True = suspected; what ``sd.open(..., mask=...)`` takes

    Raises
    ------
    ConfigError
        When the analysis is lazy, or was made by a version that did not count where patterns are lit.

    Examples
    --------
    >>> import numpy as np
    >>> from stem_dask.stages.analyze import analyze
    >>> data = np.ones((2, 6, 7), "u2"); data[:, 4, 0] = 9
    >>> import xarray as xr
    >>> analysis = analyze(xr.DataArray(data, dims=("pattern", "ky", "kx"))).compute()
    >>> np.argwhere(suspected_hot_pixels(analysis)).tolist()
    [[4, 0]]
    """
    require_computed(analysis)
    if "lit" not in analysis:
        raise ConfigError(
            "the analysis has no variable 'lit', because another version of stem_dask made it; analyze the patterns again"
        )
    n_sampled = int(sampled(lead_shape(analysis)).sum())
    mean, lit = analysis["mean_pattern"].values, analysis["lit"].values
    return hot_pixels(mean, lit, int(analysis["total"].size), n_sampled)


def read_mask(
    mask: str | PathLike[str] | Mapping[str, Sequence[Any]] | NDArray, detector: Sequence[int]
) -> NDArray[np.bool_]:
    """A mask from a .npy file, an array, or lists of ``pixels`` [y, x], ``rows`` and ``columns``."""
    if isinstance(mask, str) and mask == "auto":
        raise ConfigError(
            "mask auto needs the mean pattern of the analysis: open without a mask, analyze, "
            "and open again with mask=sd.suspected_hot_pixels(analysis)"
        )
    if isinstance(mask, (str, PathLike)):
        return read_plane(mask, "mask", detector) != 0
    if not isinstance(mask, Mapping):
        return np.asarray(mask) != 0
    out = np.zeros(tuple(detector), bool)
    indices = [*(i for pixel in mask.get("pixels", ()) for i in pixel)]
    indices += [*mask.get("rows", ()), *mask.get("columns", ())]
    if any(i < 0 for i in indices):
        raise ConfigError(f"input.mask holds the index {min(indices)}; indices count from 0")
    try:
        for y, x in mask.get("pixels", ()):
            out[y, x] = True
        out[list(mask.get("rows", ())), :] = True
        out[:, list(mask.get("columns", ()))] = True
    except IndexError as error:
        raise ConfigError(
            f"input.mask names a pixel outside the detector {tuple(detector)}: {error}"
        ) from error
    return out
