"""Files that hold several arrays by name: HDF5 and HyperSpy, zarr stores.

Each function lists the arrays as keyword arguments of `stem_dask.readers.source.Candidate`.
"""

import re
from typing import Any

import numpy as np

from stem_dask.core.metadata import number, text_of
from stem_dask.core.model import Axis
from stem_dask.core.text import by

#: where HyperSpy puts its signals; below each are groups and arrays of metadata
_SIGNALS = "Experiments/"

#: positions of pixels are read when there are no more than these: their number is only claimed
_MOST_POSITIONS = 1 << 20


def axis_from(name: Any, size: int, attrs: dict[str, Any]) -> Axis:
    """An axis from attributes that may be missing, zero or odd: then it is in pixels."""
    scale, units = number(attrs.get("scale")), text_of(attrs.get("units", ""))
    if not scale:
        return Axis(text_of(name), size)
    if in_brackets := re.findall(r"\[(.+?)\]", units):  # as NCEM writes them: [n_m], [n_m^-1]
        units = " ".join(in_brackets).replace("_", "")
    known = units not in ("", "_None_", "None", "<undefined>")
    offset = number(attrs.get("offset")) or 0.0
    return Axis(text_of(name), size, scale, offset, units if known else "")


def _detector_last(axes: list[dict[str, Any]]) -> bool | None:
    """Whether the detector comes last, as `Candidate.swapped` has it, by HyperSpy's attributes of four axes; or None."""
    flags = [bool(attrs.get("navigate")) for attrs in axes]
    if flags not in ([True, True, False, False], [False, False, True, True]):
        return None
    return flags[0]


def _spectra(axes: list[dict[str, Any]]) -> str:
    """A hint where HyperSpy's attributes make a map of spectra of three axes."""
    if [attrs.get("navigate") for attrs in axes] != [True, True, False]:
        return ""
    return (
        "HyperSpy calls 2 of the 3 axes navigation, as of a map of spectra, which are no patterns"
    )


def _odd_flags(axes: list[dict[str, Any]]) -> tuple[str, ...]:
    """A note where HyperSpy's attributes make other signals of four axes than patterns."""
    n = sum(bool(attrs.get("navigate")) for attrs in axes)
    if len(axes) != 4 or n not in (1, 3):
        return ()
    return (
        f"HyperSpy calls {n} of the 4 axes navigation; they are taken as scan_y, scan_x, ky, kx",
    )


def axis_along(name: Any, size: int, values: Any, attrs: dict[str, Any]) -> Axis:
    """An axis from the positions of its pixels, or of the first two of them; in pixels when they are not even."""
    if {"scale", "offset"} & set(attrs):
        return axis_from(name, size, attrs)
    if values.ndim != 1 or values.dtype.kind not in "iuf" or values.shape[0] not in (2, size):
        return Axis(str(name), size)
    if values.shape[0] > _MOST_POSITIONS:
        return Axis(str(name), size)
    positions = np.asarray(values[...], np.float64)
    scale = float(positions[-1] - positions[0]) / max(1, len(positions) - 1) if size > 1 else 1.0
    steps = np.diff(positions)
    if not scale or not np.allclose(steps, scale, rtol=1e-3, atol=0):
        return Axis(str(name), size)
    return axis_from(name, size, {**attrs, "scale": scale, "offset": positions[0]})


def _reversed(attrs: dict[str, Any], shape: tuple[int, ...]) -> tuple[str, ...]:
    """A note on MATLAB's order of axes, which is that of the file turned round."""
    if "MATLAB_class" not in attrs:
        return ()
    return (f"MATLAB stores axes in reverse: there it is {by(shape[::-1])}",)
