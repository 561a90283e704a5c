"""Calibration and beam energy that the user gives, in place of those of the file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from stem_dask.core.errors import ConfigError
from stem_dask.core.model import DETECTOR_DIMS, SCAN_DIMS, Axis
from stem_dask.readers.open import Found

_FORM = "{ky: {scale: 0.01, units: 1/nm, offset: -0.6}, …} for scan_y, scan_x, ky and kx"


def with_given(
    found: Found,
    calibration: Mapping[str, Mapping[str, Any] | None] | None,
    beam_energy_kv: float | None,
    scan_roi: Sequence[int] | None = None,
    scan_step: int = 1,
) -> Found:
    """Apply the user's calibration and beam energy, and note them.

    Parameters
    ----------
    calibration : by axis ``scale`` (not 0), ``units`` and perhaps ``offset`` (the value at the first pixel of the
        file); without an offset the pixel of value 0 stays the same
    beam_energy_kv : energy of the electrons, in keV
    scan_roi, scan_step : region and step of the scan; the calibration is that of the whole scan

    Raises
    ------
    ConfigError
        When the file has no such axis, or a number is not usable.
    """
    axes = {axis.name: axis for axis in found.info.axes}
    given: dict[str, Any] = {}
    notes = list(found.info.notes)
    start = {"scan_y": 0, "scan_x": 0}
    if scan_roi is not None:
        start = {"scan_y": scan_roi[0], "scan_x": scan_roi[2]}
    for name, values in (calibration or {}).items():
        if values is None:
            continue
        if name not in axes:
            known = " and ".join(axes) if name in (*SCAN_DIMS, *DETECTOR_DIMS) else _FORM
            raise ConfigError(
                f"input.calibration names {name}, which is not an axis of {found.info.path}; expected {known}"
            )
        chosen = {key: value for key, value in values.items() if value is not None}
        step = scan_step if name in start else 1
        axes[name] = _calibrated(axes[name], chosen, start.get(name, 0), step)
        given.setdefault("calibration", {})[name] = chosen
        notes.append(f"{name} as given: {chosen['scale']:g} {chosen['units']} a pixel")
    if beam_energy_kv is not None:
        if not (isfinite(beam_energy_kv) and beam_energy_kv > 0):
            raise ConfigError(
                f"beam_energy_kv is {beam_energy_kv}; expected a number above 0, such as 200"
            )
        given["beam_energy_kv"] = float(beam_energy_kv)
        notes.append(f"beam energy as given: {beam_energy_kv:g} kV")
    info = replace(found.info, axes=tuple(axes.values()), notes=tuple(notes), given=given)
    return replace(found, info=info)


def _calibrated(axis: Axis, given: Mapping[str, Any], start: int, step: int) -> Axis:
    unknown = ", ".join({*given} - {"scale", "units", "offset"})
    if unknown or not {"scale", "units"} <= {*given}:
        raise ConfigError(
            f"input.calibration.{axis.name} is {dict(given)}; expected scale, units and perhaps offset: {_FORM}"
        )
    scale, offset = float(given["scale"]), given.get("offset")
    if scale == 0 or not isfinite(scale) or not isfinite(offset or 0):
        raise ConfigError(
            f"input.calibration.{axis.name} is {dict(given)}; expected finite numbers and a scale other than 0"
        )
    if offset is None:  # the zero stays at the same pixel
        kept = axis.offset / axis.scale if axis.scale else 0.0
        return replace(axis, scale=scale * step, offset=scale * step * kept, units=given["units"])
    whole = replace(axis, scale=scale, offset=float(offset), units=given["units"])
    return whole.part(start, axis.size, step)
