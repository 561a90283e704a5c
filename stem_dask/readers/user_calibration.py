"""What the user says of a file that the file does not say, or says wrongly: calibration and beam energy."""

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
    """Put what was given in the place of what was found, and note it.

    Parameters
    ----------
    calibration : by axis ``scale`` (not 0), ``units`` and perhaps ``offset`` (the value at the first pixel of the
        file); without an offset the pixel whose value was 0 stays the one
    beam_energy_kv : energy of the electrons, in keV
    scan_roi, scan_step : what was read of the scan, to which the scale of the whole scan is converted

    Raises
    ------
    ConfigError
        When an axis is none of the file's, or a number is not usable.
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
                f"input.calibration names {name}, which is no axis of {found.info.path}; expected {known}"
            )
        said = {key: value for key, value in values.items() if value is not None}
        step = scan_step if name in start else 1
        axes[name] = _calibrated(axes[name], said, start.get(name, 0), step)
        given.setdefault("calibration", {})[name] = said
        notes.append(f"{name} as given: {said['scale']:g} {said['units']} a pixel")
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
    if offset is None:  # in pixels, the zero stays where it was
        kept = axis.offset / axis.scale if axis.scale else 0.0
        return replace(axis, scale=scale * step, offset=scale * step * kept, units=given["units"])
    whole = replace(axis, scale=scale, offset=float(offset), units=given["units"])
    return whole.part(start, axis.size, step)
