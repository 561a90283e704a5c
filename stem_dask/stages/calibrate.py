"""Calibration of the detector from the direct disc, whose radius is the convergence angle."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stem_dask.core.errors import ConfigError
from stem_dask.core.model import DETECTOR_DIMS, PER_NM
from stem_dask.core.patterns import axis_of, coordinate
from stem_dask.stages.survey import Survey

if TYPE_CHECKING:
    import xarray as xr

#: how well a scale from the disc is known: 0 to 3 % was measured on simulated patterns
UNCERTAINTY = 0.03

#: units of angles, whose value in 1/nm depends on the wavelength
_RAD = {"rad": 1.0, "mrad": 1e-3}


def electron_wavelength_nm(beam_energy_kv: float) -> float:
    """Relativistic wavelength of electrons, h c / sqrt(E (E + 2 m c^2)), in nm.

    Examples
    --------
    >>> [round(1000 * electron_wavelength_nm(kv), 4) for kv in (60, 200, 300)]
    [4.8661, 2.5079, 1.9687]
    """
    energy = 1e3 * beam_energy_kv
    return 1239.841984 / math.sqrt(energy * (energy + 2 * 510_998.95))


def disc_calibration(
    patterns: xr.DataArray, survey: Survey | None, convergence_mrad: float | None = None
) -> dict[str, Any]:
    """The scale of the detector's axes that the direct disc implies: alpha / (wavelength radius).

    Parameters
    ----------
    patterns : whose attributes state ``beam_energy_kv``, and ``convergence_angle_mrad`` unless it is given
    survey : with the radius of the disc in px
    convergence_mrad : semi-angle of the probe

    Returns
    -------
    dict with ``scale_per_nm`` and ``scale_mrad`` (per px), ``ratio`` to the scale of the axes (None where they have none), and
    what they follow from; empty unless radius, angle and energy are known

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> from stem_dask.core.model import Axis
    >>> from stem_dask.core.patterns import as_patterns
    >>> axes = [Axis("pattern", 2), Axis("ky", 8, 0.1, 0, "1/nm"), Axis("kx", 8, 0.1, 0, "1/nm")]
    >>> patterns = as_patterns(da.zeros((2, 8, 8)), axes, {"beam_energy_kv": 200.0})
    >>> plane, flags = ((4, 0, 0), (4, 0, 0)), np.zeros((8, 8), np.uint8)
    >>> disc = Survey(2.5, "", (4, 4), plane, 3, 0, 0, 0, 0, flags, None, (2,))
    >>> found = disc_calibration(patterns, disc, convergence_mrad=0.63)
    >>> round(found["scale_per_nm"], 4), round(found["ratio"], 3), round(found["scale_mrad"], 3)
    (0.1005, 1.005, 0.252)
    """
    energy = patterns.attrs.get("beam_energy_kv")
    angle = convergence_mrad or patterns.attrs.get("convergence_angle_mrad")
    radius = None if survey is None else survey.radius
    if not (energy and angle and radius):
        return {}
    scale = 1e-3 * angle / electron_wavelength_nm(energy) / radius
    own = _stated_scale(patterns, energy)
    ratio = None if own is None else scale / own
    return {
        "scale_per_nm": scale,
        "scale_mrad": angle / radius,
        "ratio": ratio,
        "uncertainty": UNCERTAINTY,
        "disc_radius": radius,
        "convergence_mrad": float(angle),
        "beam_energy_kv": float(energy),
    }


def _stated_scale(patterns: xr.DataArray, beam_energy_kv: float) -> float | None:
    """Scale of the detector's axes as stated, per px in 1/nm; None where they have none."""
    wavelength = electron_wavelength_nm(beam_energy_kv)
    units = PER_NM | {name: rad / wavelength for name, rad in _RAD.items()}
    axes = [axis_of(patterns, name) for name in DETECTOR_DIMS]
    if not all(axis.units in units and axis.scale for axis in axes):
        return None
    # the disc is an ellipse of this mean radius where the scales differ
    return math.sqrt(math.prod(abs(axis.scale) * units[axis.units] for axis in axes))


def stated_radius(patterns: xr.DataArray, convergence_mrad: float | None) -> float | None:
    """Radius of the direct disc in px that the convergence angle and the scale of the axes imply; None without them."""
    energy = patterns.attrs.get("beam_energy_kv")
    angle = convergence_mrad or patterns.attrs.get("convergence_angle_mrad")
    if not (energy and angle):
        return None
    own = _stated_scale(patterns, energy)
    return None if own is None else 1e-3 * float(angle) / electron_wavelength_nm(energy) / own


def calibrated_by_disc(patterns: xr.DataArray, found: dict[str, Any]) -> xr.DataArray:
    """Patterns with ky and kx in 1/nm by a `disc_calibration`; the zero stays at the same pixel."""
    axes = {}
    for name in DETECTOR_DIMS:
        axis = axis_of(patterns, name)
        scale = math.copysign(found["scale_per_nm"], axis.scale)
        zero = axis.offset / axis.scale if axis.scale else 0.0
        axes[name] = coordinate(replace(axis, scale=scale, offset=scale * zero, units="1/nm"))
    return patterns.assign_coords(axes)


def refuse_uncalibrated(patterns: xr.DataArray, convergence_mrad: float | None) -> None:
    """Raise ConfigError if a calibration from the disc lacks the beam energy or the convergence angle."""
    missing = {
        "input.beam_energy_kv, in keV": patterns.attrs.get("beam_energy_kv"),
        "analyze.convergence_mrad, the semi-angle in mrad": convergence_mrad
        or patterns.attrs.get("convergence_angle_mrad"),
    }
    lacking = [key for key, value in missing.items() if not value]
    if lacking:
        raise ConfigError(
            f"analyze.calibrate is disc, and the file does not state what it needs; give {' and '.join(lacking)}"
        )
