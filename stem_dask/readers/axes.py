"""Axes from the attributes that HyperSpy, EMD, NeXus and netCDF write."""

import re
from typing import Any

import numpy as np

from stem_dask.core.metadata import number, text_of
from stem_dask.core.model import Axis
from stem_dask.core.text import by


def axis_from(name: Any, size: int, attrs: dict[str, Any]) -> Axis:
    """An axis from its attributes; in pixels when the scale is missing, zero or not a number."""
    scale, units = number(attrs.get("scale")), text_of(attrs.get("units", ""))
    if not scale:
        return Axis(text_of(name), size)
    if in_brackets := re.findall(r"\[(.+?)\]", units):  # as NCEM writes them: [n_m], [n_m^-1]
        units = " ".join(in_brackets).replace("_", "")
    known = units not in ("", "_None_", "None", "<undefined>")
    offset = number(attrs.get("offset")) or 0.0
    return Axis(text_of(name), size, scale, offset, units if known else "")


def detector_last(axes: list[dict[str, Any]]) -> bool | None:
    """Whether the detector comes last (`Candidate.swapped`) by HyperSpy's attributes of four axes; None if unknown."""
    flags = [bool(attrs.get("navigate")) for attrs in axes]
    if flags not in ([True, True, False, False], [False, False, True, True]):
        return None
    return flags[0]


def spectra_hint(axes: list[dict[str, Any]]) -> str:
    """A hint if HyperSpy's attributes of three axes describe a map of spectra."""
    if [attrs.get("navigate") for attrs in axes] != [True, True, False]:
        return ""
    return (
        "HyperSpy calls 2 of the 3 axes navigation, as of a map of spectra, which are no patterns"
    )


def odd_flags_note(axes: list[dict[str, Any]]) -> tuple[str, ...]:
    """A note if HyperSpy's attributes of four axes do not describe patterns."""
    n = sum(bool(attrs.get("navigate")) for attrs in axes)
    if len(axes) != 4 or n not in (1, 3):
        return ()
    return (
        f"HyperSpy calls {n} of the 4 axes navigation; they are taken as scan_y, scan_x, ky, kx",
    )


def axis_along(name: Any, size: int, values: Any, attrs: dict[str, Any]) -> Axis:
    """An axis from the positions of all of its pixels, or of the first two; in pixels when they are uneven."""
    if {"scale", "offset"} & set(attrs):
        return axis_from(name, size, attrs)
    if values.ndim != 1 or values.dtype.kind not in "iuf" or values.shape[0] not in (2, size):
        return Axis(str(name), size)
    positions = np.asarray(values[...], np.float64)
    scale = float(positions[-1] - positions[0]) / max(1, len(positions) - 1) if size > 1 else 1.0
    steps = np.diff(positions)
    if not scale or not np.allclose(steps, scale, rtol=1e-3, atol=0):
        return Axis(str(name), size)
    return axis_from(name, size, {**attrs, "scale": scale, "offset": positions[0]})


def matlab_note(attrs: dict[str, Any], shape: tuple[int, ...]) -> tuple[str, ...]:
    """A note on MATLAB's order of axes, the reverse of the file's."""
    if "MATLAB_class" not in attrs:
        return ()
    return (f"MATLAB stores axes in reverse: there it is {by(shape[::-1])}",)
