"""Checks that patterns, windows and an analysis match, by their coordinates and attributes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError
from stem_dask.core.model import DETECTOR_DIMS, Axis
from stem_dask.stages.patterns import axis_of, lead_dims, lead_shape

if TYPE_CHECKING:
    import xarray as xr

Positions: TypeAlias = tuple[NDArray[np.float64], str]


def positions(patterns: xr.DataArray | xr.Dataset, dim: str) -> Positions:
    """Coordinates along a dimension, and their units; indices where there are none."""
    if dim not in patterns.coords or patterns.coords[dim].dtype.kind not in "iuf":
        return regular(Axis(dim, int(patterns.sizes[dim])))
    values = patterns.coords[dim]
    return np.asarray(values.values, np.float64), str(values.attrs.get("units", ""))


def regular(axis: Axis) -> Positions:
    """Coordinates of an axis, and their units."""
    return axis.offset + axis.scale * np.arange(axis.size, dtype=np.float64), axis.units


def differing(dim: str, found: Positions, known: Positions) -> str | None:
    """Describe how coordinates differ from the expected ones; None if they agree.

    Examples
    --------
    >>> differing("ky", (np.arange(60.0), ""), (np.arange(64.0), ""))
    'ky has 60 values, not 64'
    >>> differing("scan_y", (np.arange(3.0)[::-1], "nm"), (np.arange(3.0), "nm"))
    'scan_y[0] is 2 nm, not 0 nm'
    """
    (here, unit), (there, other) = found, known
    if len(here) != len(there):
        return f"{dim} has {len(here)} values, not {len(there)}"
    if unit != other:
        return f"{dim} is in {unit or 'px'}, not in {other or 'px'}"
    step = float(np.abs(np.diff(there)).min()) if len(there) > 1 else 0.0
    wrong = np.abs(here - there) > 1e-6 * step + 1e-12 * np.abs(there)
    if not wrong.any():
        return None
    i = int(np.argmax(wrong))
    unit = f" {unit}" if unit else ""
    return f"{dim}[{i}] is {here[i]:g}{unit}, not {there[i]:g}{unit}"


def refuse_other_patterns(patterns: xr.DataArray, analysis: xr.Dataset) -> None:
    """Raise ConfigError if the coordinates of an analysis and of patterns differ."""
    lead = lead_dims(patterns)
    known = tuple(int(n) for n in analysis["center_y"].shape)
    if lead_shape(patterns) != known or lead != analysis["center_y"].dims:
        raise ConfigError(
            f"the analysis is of {known} positions, the patterns have {lead_shape(patterns)}; "
            "analyze the patterns that are cropped"
        )
    names = (*lead, *(f"source_{name}" for name in DETECTOR_DIMS))
    for dim, name in zip((*lead, *DETECTOR_DIMS), names, strict=True):
        found = differing(dim, positions(patterns, dim), positions(analysis, name))
        if found is not None:
            raise ConfigError(
                f"the analysis is of other patterns: {found}; analyze the patterns that are cropped"
            )


def detector_of(analysis: xr.Dataset) -> tuple[Axis, Axis]:
    """Axes ky and kx of the analyzed detector."""
    y, x = (replace(axis_of(analysis, f"source_{name}"), name=name) for name in DETECTOR_DIMS)
    return y, x
