"""Axes and microscope settings that Nion Swift, py4DSTEM, abTEM and NeXus store with an array in HDF5 and zarr."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from stem_dask.core.metadata import dig, number, stated, text_of
from stem_dask.core.model import SCAN_DIMS, Axis
from stem_dask.readers.hdf5_metadata import as_bytes, attributes_of, member
from stem_dask.readers.source import Candidate, calibrated
from stem_dask.storage.errors import one_line


def with_stated(path: str, file: Any, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Complete the arrays of an HDF5 file (arguments of `Candidate`) by what other programs store; keeps calibrated axes."""
    about = stated("HDF5", lambda place: value_at(file, place))
    completed = []
    for one in found:
        if len(one["axes"]) > 2:
            data = file.get(as_bytes(one["name"]))
            known = [about, one.get("about") or {}]
            one = _by_nion(path, attributes_of(data).get("properties"), one, known)
            one = _by_py4dstem(file, data, one, known)
            metadata = {name: value for k in known for name, value in k.get("metadata", {}).items()}
            one["about"] = {name: value for k in known for name, value in k.items()}
            one["about"]["metadata"] = metadata
        completed.append(one)
    return completed


def value_at(group: Any, place: str) -> tuple[Any, str | None]:
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


def with_nion(path: str, text: Any, one: Candidate) -> Candidate:
    """Complete an array by the properties of Nion Swift's data item, JSON in a file beside it."""
    fields = {name: getattr(one, name) for name in ("name", "axes", "notes", "scan", "fault")}
    known: list[Any] = [{}]
    found = _by_nion(path, text, fields, known)
    about = {name: value for part in known for name, value in part.items()}
    return replace(one, **found, about={**(one.about or {}), **about})


def _by_nion(path: str, text: Any, one: dict[str, Any], known: list[Any]) -> dict[str, Any]:
    """Axes and scan by the properties of a data item, which Nion Swift writes as JSON."""
    try:
        properties = json.loads(text) if isinstance(text, (str, bytes)) else None
    except (ValueError, RecursionError):
        properties = None
    if not isinstance(properties, dict) or "datum_dimension_count" not in properties:
        return one
    known.insert(1, stated("Nion", properties))
    axes = _with(one["axes"], properties.get("dimensional_calibrations"), "scale")
    one = {**one, "axes": axes}
    datum, collection = (properties.get(f"{k}_dimension_count") for k in ("datum", "collection"))
    if datum != 2:
        one["fault"] = (
            f"{path}: {one_line(one['name'])} is no array of patterns: Nion Swift states data of {one_line(datum)} dimensions at "
            "each position, and patterns have 2; choose another array with input.dataset"
        )
    elif collection == 1 and len(axes) == 3:
        y, x = SCAN_DIMS
        one["scan"] = (Axis(y, 1), replace(axes[0], name=x))
    elif collection == 1 and properties.get("is_sequence") is True and len(axes) == 4:
        note = (
            f"Nion Swift states a sequence of {axes[0].size:,} line scans of {axes[1].size:,} positions: scan_y is their order in "
            "time, not a direction of the scan"
        )
        one["notes"] = (*one.get("notes", ()), note)
    return one


def _by_py4dstem(file: Any, data: Any, one: dict[str, Any], known: list[Any]) -> dict[str, Any]:
    """Axes by the calibration of a data cube, which is in a group above it; before version 0.13 at one place."""
    import h5py

    above, groups = data.parent, []
    for _ in range(one["name"].count("/") + 1):
        for place in ("calibration", "metadatabundle/calibration", "_metadata/calibration"):
            groups.append(member(above, place, h5py.Group))
        above = above.parent
    groups.append(member(file, "4DSTEM_experiment/metadata/calibration", h5py.Group))
    group = next((group for group in groups if group is not None), None)
    if group is None:
        return one

    def value(name: str) -> Any:
        return value_at(group, name)[0]

    known.insert(-1, stated("py4DSTEM", lambda place: value_at(group, place)))
    axes = list(one["axes"])
    origins = (0.0, 0.0, number(value("qx0_mean")) or 0.0, number(value("qy0_mean")) or 0.0)
    for i, (space, origin) in enumerate(zip("RRQQ", origins, strict=True)):
        size = number(value(f"{space}_pixel_size"))
        units = value(f"{space}_pixel_units") or value(f"{space}_pixel_size_units")
        if len(axes) == 4 and size is not None:
            axes[i] = _calibrated(axes[i], size, -origin * size, units)
            # py4DSTEM 0.14 subtracts the origin in pixels from positions in the units of the axis
            if origin and math.isclose(axes[i].offset, -origin, rel_tol=1e-6):
                axes[i] = replace(axes[i], offset=-origin * axes[i].scale)
    return {**one, "axes": tuple(axes)}


def of_abtem(attrs: Mapping[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """Complete an array of a zarr store (arguments of `Candidate`) by the metadata of abTEM's ``to_zarr``.

    abTEM 1.0.9 and older store keyword arguments, newer versions the metadata of all axes.
    """
    name, axes = one["name"], one["axes"]
    number_of = name.removeprefix("array")
    new, old = attrs.get(f"metadata{number_of}"), attrs.get(f"kwargs{number_of}")
    if not name.startswith("array") or not (isinstance(new, dict) or isinstance(old, dict)):
        return one
    if isinstance(new, dict):
        along = [dig(new, f"axes.axis_{i}") for i in range(len(axes))]
        instrument, shifted = new, dig(along[-1], "fftshift")
    else:
        assert isinstance(old, dict)
        steps = zip(axes[-2:], _list(old.get("sampling")), strict=False)
        along = _list(old.get("ensemble_axes_metadata")) + [
            {"sampling": step, "units": "1/Å", "offset": -(axis.size // 2) * (number(step) or 0.0)}
            for axis, step in steps
        ]
        instrument, shifted = old.get("metadata") or {}, old.get("fftshift")
    notes = one.get("notes", ())
    if shifted is False:
        notes += (
            "abTEM states fftshift=False: the beam is at the corners of the patterns, not in their middle",
        )
    about = stated("abTEM", instrument) if isinstance(instrument, dict) else {}
    return {**one, "axes": _with(axes, along, "sampling"), "notes": notes, "about": about}


def _list(value: Any) -> list[Any]:
    """A list, or a tuple as abTEM encodes it."""
    value = value.get("_value") if isinstance(value, dict) else value
    return list(value) if isinstance(value, list) else []


def _with(axes: tuple[Axis, ...], along: Any, scale: str) -> tuple[Axis, ...]:
    """Axes with their stated calibrations, one for each axis."""
    if not isinstance(along, list) or len(along) != len(axes):
        return axes
    return tuple(
        _calibrated(axis, dig(its, scale), dig(its, "offset"), dig(its, "units"))
        for axis, its in zip(axes, along, strict=True)
    )


def _calibrated(axis: Axis, scale: Any, offset: Any, units: Any) -> Axis:
    """An axis with a stated calibration, unless it is calibrated already."""
    text = "" if units is None else text_of(units).strip()
    if axis.calibrated or text in ("pixel", "pixels", "px"):
        return axis
    return calibrated(axis.name, axis.size, scale, offset, text)
