"""Axes and microscope settings that Nion Swift, py4DSTEM, abTEM and NeXus store with an array in HDF5 and zarr."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from stem_dask.core.metadata import dig, number, stated, text_of
from stem_dask.core.model import SCAN_DIMS, Axis
from stem_dask.readers.hdf5_metadata import as_bytes, attributes_of, member
from stem_dask.readers.source import calibrated
from stem_dask.storage.errors import one_line

#: the calibration of a data cube of py4DSTEM, by version, in one of the groups above it; before 0.13 in the root
_CALIBRATIONS = ("calibration", "metadatabundle/calibration", "_metadata/calibration")

_IN_FILE = "4DSTEM_experiment/metadata/calibration"

_PIXELS = ("", "pixel", "pixels", "px")


def with_stated(path: str, file: Any, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Complete the arrays of an HDF5 file (arguments of `Candidate`) by what other programs store; keeps calibrated axes."""
    about = stated("HDF5", lambda place: _value(file, place))
    return [_with_stated(path, file, one, about) if len(one["axes"]) > 2 else one for one in found]


def _with_stated(
    path: str, file: Any, one: dict[str, Any], about: Mapping[str, Any]
) -> dict[str, Any]:
    data = file.get(as_bytes(one["name"]))
    properties = _properties(data)
    calibration = _calibration(file, data, one["name"].count("/") + 1)
    axes, more = one["axes"], {}
    if properties is not None:
        axes = _nion_axes(axes, properties)
        about = _joined(about, stated("Nion", properties))
        more = _nion_dimensions(path, one["name"], axes, properties)
    if calibration is not None:
        axes = _py4dstem_axes(axes, calibration)
        about = _joined(about, stated("py4DSTEM", lambda place: _value(calibration, place)))
    notes = (*one.get("notes", ()), *more.pop("notes", ()))
    known = _joined(about, one.get("about") or {})
    return {**one, "axes": axes, **more, "notes": notes, "about": known}


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {**first, **second, "metadata": {**first.get("metadata", {}), **second.get("metadata", {})}}  # fmt: skip


def _value(group: Any, place: str) -> tuple[Any, str | None]:
    """A small dataset or attribute below a group, and its ``units``; links are not followed."""
    import h5py

    parent, _, name = place.rpartition("/")
    above = member(group, parent, h5py.Group) if parent else group
    if above is None:
        return None, None
    data = member(above, name, h5py.Dataset)
    if data is None:
        return attributes_of(above).get(name), None
    if data.size != 1 or data.dtype.itemsize > 4096:
        return None, None
    try:
        value = np.asarray(data[()]).reshape(-1)[0]
    except (OSError, RuntimeError, TypeError, ValueError):  # damaged
        return None, None
    units = attributes_of(data).get("units")
    return value, None if units is None else text_of(units)


# --- Nion Swift ---


def _properties(data: Any) -> dict[str, Any] | None:
    """The properties of a data item, which Nion Swift writes as JSON."""
    text = attributes_of(data).get("properties")
    if not isinstance(text, (str, bytes)):
        return None
    try:
        properties = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_item = isinstance(properties, dict) and "datum_dimension_count" in properties
    return properties if is_item else None


def _nion_axes(axes: tuple[Axis, ...], properties: Mapping[str, Any]) -> tuple[Axis, ...]:
    stated_axes = properties.get("dimensional_calibrations")
    if not isinstance(stated_axes, list) or len(stated_axes) != len(axes):
        return axes
    return tuple(
        _calibrated(axis, dig(its, "scale"), dig(its, "offset"), dig(its, "units"))
        for axis, its in zip(axes, stated_axes, strict=True)
    )


def _nion_dimensions(
    path: str, name: str, axes: tuple[Axis, ...], properties: Mapping[str, Any]
) -> dict[str, Any]:
    """The scan, by the counts of dimensions of each kind, as arguments of `Candidate`."""
    datum, collection = (properties.get(f"{k}_dimension_count") for k in ("datum", "collection"))
    if datum != 2:
        return {"fault": f"{path}: {one_line(name)} is no array of patterns: Nion Swift states data of {one_line(datum)} "
                "dimensions at each position, and patterns have 2; choose another array with input.dataset"}  # fmt: skip
    if collection == 1 and len(axes) == 3:
        row, column = (replace(axis, name=n) for axis, n in zip((Axis("", 1), axes[0]), SCAN_DIMS, strict=True))  # fmt: skip
        return {"scan": (row, column)}
    if collection == 1 and properties.get("is_sequence") is True and len(axes) == 4:
        return {"notes": (f"Nion Swift states a sequence of {axes[0].size:,} line scans of {axes[1].size:,} positions: "
                          "scan_y is their order in time, not a direction of the scan",)}  # fmt: skip
    return {}


# --- py4DSTEM ---


def _calibration(file: Any, data: Any, levels: int) -> Any:
    """The group with the calibration of a data cube ``levels`` below the root, or None."""
    import h5py

    above = data.parent
    for _ in range(levels):
        for place in _CALIBRATIONS:
            group = member(above, place, h5py.Group)
            if group is not None:
                return group
        above = above.parent
    return member(file, _IN_FILE, h5py.Group)


def _py4dstem_axes(axes: tuple[Axis, ...], calibration: Any) -> tuple[Axis, ...]:
    def value(name: str) -> Any:
        return _value(calibration, name)[0]

    spaces = ("R", "R", "Q", "Q") if len(axes) == 4 else ()
    origin = (0.0, 0.0, number(value("qx0_mean")) or 0.0, number(value("qy0_mean")) or 0.0)
    found = list(axes)
    for i, space in enumerate(spaces):
        size = number(value(f"{space}_pixel_size"))
        units = value(f"{space}_pixel_units") or value(f"{space}_pixel_size_units")
        if size is not None:
            found[i] = _calibrated(axes[i], size, -origin[i] * size, units)
    return tuple(found)


# --- abTEM ---


def of_abtem(attrs: Mapping[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """Complete an array of a zarr store (arguments of `Candidate`) by the metadata of abTEM's ``to_zarr``.

    abTEM 1.0.9 and older store keyword arguments, newer versions the metadata of all axes.
    """
    name = one["name"]
    number_of = name.removeprefix("array")
    new, old = attrs.get(f"metadata{number_of}"), attrs.get(f"kwargs{number_of}")
    if not name.startswith("array") or not (isinstance(new, dict) or isinstance(old, dict)):
        return one
    axes = one["axes"]
    if isinstance(new, dict):
        along = [dig(new, f"axes.axis_{i}") for i in range(len(axes))]
        instrument: Any = new
        shifted = dig(along[-1], "fftshift")
    else:
        assert isinstance(old, dict)
        ensemble, steps = _list(old.get("ensemble_axes_metadata")), _list(old.get("sampling"))
        along = [*ensemble, *map(_reciprocal, axes[-2:], steps)]
        instrument, shifted = old.get("metadata"), old.get("fftshift")
    if len(along) == len(axes):
        axes = tuple(
            _calibrated(axis, dig(its, "sampling"), dig(its, "offset"), dig(its, "units"))
            for axis, its in zip(axes, along, strict=True)
        )
    notes = one.get("notes", ())
    if shifted is False:
        notes += ("abTEM states fftshift=False: the beam is at the corners of the patterns, not in their middle",)  # fmt: skip
    about = stated("abTEM", instrument) if isinstance(instrument, dict) else {}
    return {**one, "axes": axes, "notes": notes, "about": about}


def _reciprocal(axis: Axis, step: Any) -> dict[str, Any]:
    """The metadata of a detector axis in newer versions, from its sampling."""
    return {"sampling": step, "units": "1/Å", "offset": -(axis.size // 2) * (number(step) or 0.0)}


def _list(value: Any) -> list[Any]:
    """A list, or a tuple as abTEM encodes it."""
    value = value.get("_value") if isinstance(value, dict) else value
    return list(value) if isinstance(value, list) else []


def _calibrated(axis: Axis, scale: Any, offset: Any, units: Any) -> Axis:
    """An axis with a stated calibration, unless it is calibrated already."""
    text = "" if units is None else text_of(units).strip()
    if axis.calibrated or text in _PIXELS:
        return axis
    return calibrated(axis.name, axis.size, scale, offset, text)
