"""Dark and gain correction, then replacement of bad pixels, when patterns are read, so that later stages need neither."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from os.path import expanduser
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, ChangedBlock, is_input_left_out
from stem_dask.core.errors import ConfigError
from stem_dask.core.patterns import blocks_of, lead_shape
from stem_dask.kernels.pixels import HOT, correct_patterns, fill_bad, hot_pixels, neighbours
from stem_dask.stages.blocks import changed, on_blocks, require_computed, sampled, valid_of

if TYPE_CHECKING:
    import xarray as xr

MaskFill = Literal["zero", "median"]

#: options of the input that name a .npy file with one value per detector pixel
KEYS = ("dark", "gain", "mask")


@functools.lru_cache(maxsize=4)
def plane_of_file(
    path: str, digest: str, key: str, detector: tuple[int, int]
) -> NDArray[np.float32]:
    """A reference that each worker reads once, instead of an array in every task; a file that was changed is refused."""
    if digest_of(path, key) != digest:
        raise ConfigError(
            f"input.{key} {path} was changed while it was in use; start again, and leave it as it is"
        )
    return read_plane(path, key, detector)


def corrected(
    patterns: xr.DataArray, dark: str | PathLike[str] | NDArray | None, gain: str | PathLike[str] | NDArray | None
) -> xr.DataArray:  # fmt: skip
    """``(pattern - dark) * gain`` of every pattern as lazy float32, with the attribute ``corrected``.

    ``dark`` and ``gain`` are arrays (ky, kx) or .npy files. Where the coordinate ``valid`` is False patterns stay zeros.
    """
    detector = (int(patterns.shape[-2]), int(patterns.shape[-1]))
    planes: dict[str, Any] = {}  # arrays, or arguments of `plane_of_file`
    for key, given in (("dark", dark), ("gain", gain)):
        if given is not None:
            planes[key] = read_plane(given, key, detector)
        if isinstance(given, (str, PathLike)):
            path = os.path.abspath(given)
            planes[key] = (path, digest_of(path, key), key, detector)
    if not planes:
        return patterns
    data = blocks_of(patterns)
    out = on_blocks(_correct_block, data, *valid_of(patterns), dtype=np.float32, planes=planes)
    return patterns.copy(data=out).assign_attrs(corrected=[*planes])


def _correct_block(
    block: NDArray | Block, *valid: NDArray[np.bool_], planes: Mapping[str, Any]
) -> NDArray | Block:
    if is_input_left_out():
        return np.zeros(block.shape, np.float32)
    dark, gain = (
        plane_of_file(*plane) if isinstance(plane, tuple) else plane
        for plane in (planes.get("dark"), planes.get("gain"))
    )

    def correct(piece: NDArray, here: slice, out: NDArray) -> None:
        correct_patterns(piece, dark, gain, out)
        for known in valid:
            out[~known.ravel()[here]] = 0

    return ChangedBlock(block, correct, dtype=np.dtype(np.float32))


def digest_of(path: str | PathLike[str], key: str) -> str:
    """A hash of the content of a file; raises ConfigError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise _unreadable(path, key, error) from error


def _unreadable(path: str | PathLike[str], key: str, why: object) -> ConfigError:
    return ConfigError(
        f"input.{key} {fspath(path)} cannot be read: {why}; expected a .npy file of the detector's shape, as "
        "numpy.save writes it"
    )


def read_plane(given: str | PathLike[str] | NDArray, key: str, detector: Sequence[int]) -> NDArray:
    """Values of a mask, or of a dark or gain reference as float32: an array, or a .npy file, checked before it is loaded.

    Raises ConfigError for another shape, no numbers, and references that are not finite, or of a gain of 0 or less.
    """
    name, values = "", given
    if isinstance(given, (str, PathLike)):
        name = f" {fspath(given)}"
        try:
            values = np.load(expanduser(given), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _unreadable(given, key, error) from error
        if not isinstance(values, np.ndarray):
            raise _unreadable(given, key, "it is an archive of several arrays")
    values = np.asarray(values)
    if values.shape != tuple(detector):
        raise ConfigError(
            f"input.{key}{name} has shape {values.shape}, the detector {tuple(detector)}; give one value for each "
            "pixel of the detector as it is read, [ky, kx]"
        )
    if values.dtype.kind not in "buif":
        raise ConfigError(
            f"input.{key}{name} holds {values.dtype}; expected bool, integer or real numbers"
        )
    if key == "mask":
        return np.array(values)
    with np.errstate(over="ignore"):
        out = values.astype(np.float32)
    bad = ~np.isfinite(out) | (out <= 0 if key == "gain" else False)
    for y, x in np.argwhere(bad)[:1]:
        expected, neutral = ("numbers above 0", 1) if key == "gain" else ("finite numbers", 0)
        raise ConfigError(
            f"input.{key}{name} is {values[y, x]} at pixel [{y}, {x}] and not usable at {int(bad.sum()):,} of "
            f"{bad.size:,} pixels; expected {expected}: put {neutral} there and name the pixels in input.mask"
        )
    return out


def apply_mask(
    patterns: xr.DataArray, mask: NDArray[np.bool_], mask_fill: MaskFill = "zero"
) -> xr.DataArray:
    """Replace the pixels that are True in a mask (ky, kx) by zero, or by the ``median`` of the good neighbours; lazy.

    Raises ConfigError when the mask does not have the detector's shape, or no pixel is good.
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
    out = changed(fill_bad, data, mask=mask, near=near)
    return patterns.copy(data=out).assign_attrs(masked_pixels=int(mask.sum()))


def suspected_hot_pixels(analysis: xr.Dataset) -> NDArray[np.bool_]:
    """Pixels far above their neighbours in the mean pattern that are lit in at least half of a sample of the patterns.

    Hot are pixels above 6 times all but five of their 24 neighbours, which may be hot as well: singles, pairs, squares of
    four, whole rows and columns are found, larger clusters are not. Those that the survey found are among them, although they
    count as 0 in the analysis.

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
    found = hot_in_mean(analysis)
    return found | ((analysis["mask"].values & HOT) > 0) if "mask" in analysis else found


def hot_in_mean(analysis: xr.Dataset) -> NDArray[np.bool_]:
    """`suspected_hot_pixels` of the mean pattern alone."""
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
    if isinstance(mask, str) and mask in ("auto", "stop"):
        raise ConfigError(
            f"mask {mask} needs a sample of the patterns: open without a mask, and open again with "
            "mask=sd.survey(patterns).flags > 0"
        )
    if isinstance(mask, (str, PathLike)):
        return read_plane(mask, "mask", detector) != 0
    if not isinstance(mask, Mapping):
        return np.asarray(mask) != 0
    out = np.zeros(tuple(detector), bool)
    pixels, rows, columns = (list(mask.get(name, ())) for name in ("pixels", "rows", "columns"))
    indices = [*(i for pixel in pixels for i in pixel), *rows, *columns]
    if any(i < 0 for i in indices):
        raise ConfigError(f"input.mask holds the index {min(indices)}; indices count from 0")
    try:
        for y, x in pixels:
            out[y, x] = True
        out[rows, :] = True
        out[:, columns] = True
    except IndexError as error:
        raise ConfigError(
            f"input.mask names a pixel outside the detector {tuple(detector)}: {error}"
        ) from error
    return out
