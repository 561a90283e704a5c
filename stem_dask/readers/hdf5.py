"""Datasets of HDF5 files: HyperSpy, EMD, NeXus, py4DSTEM, MATLAB and stem_dask's own.

They are listed as keyword arguments of `stem_dask.readers.source.Candidate`.
"""

import math
from typing import Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import text_of
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers import own
from stem_dask.readers.calibration import with_stated
from stem_dask.readers.containers import Hdf5Dataset, opened_hdf5
from stem_dask.readers.hdf5_links import (
    as_bytes,
    datasets_below,
    escaped,
    fault_of,
    in_other_files,
    links_below,
    part_of,
    unwritten,
)
from stem_dask.readers.hdf5_metadata import (
    attributes_of,
    first_scale,
    is_safe,
    labels,
    names_of,
)
from stem_dask.readers.layout import axis_along, axis_from, order_by_flags
from stem_dask.readers.source import MOST_HEADER_BYTES, Source, packed
from stem_dask.readers.views import View

_MOST_OTHERS = 6  # other objects that an error message lists


def list_hdf5(path: str) -> list[dict[str, Any]]:
    """Datasets of an HDF5 file with two or more axes, with the calibration that HyperSpy, EMD and others write."""
    unlocked: list[str] = []
    with opened_hdf5(path, unlocked) as file:
        found = _listed(path, file)
    return [{**one, "notes": (*one.get("notes", ()), *unlocked)} for one in found]


def _listed(path: str, file: Any) -> list[dict[str, Any]]:
    import h5py

    _refuse_velox(path, file)
    experiments = file.get("Experiments")
    if isinstance(experiments, h5py.Group):
        names = [f"Experiments/{escaped(name)}/data" for name in experiments]
        signals = [(name, file.get(as_bytes(name))) for name in names]
        return [
            _hdf5_dataset(path, file, name, data)
            for name, data in signals
            if isinstance(data, h5py.Dataset)
        ]
    if own.is_h5(file):
        return [_hdf5_dataset(path, file, "patterns", file["patterns"])]
    others: list[str] = []
    found = datasets_below(file, others, lambda name, data: _hdf5_dataset(path, file, name, data))
    if any(len(one["source"].shape) > 2 for one in found):
        return with_stated(path, file, found)
    links = links_below(file, others)
    if others or links:
        has = "; the file has " + "; ".join(others[:_MOST_OTHERS]) if others else ""
        what = (
            in_other_files(path, links)
            if links
            else "no 4D array of numbers and no stack of patterns"
        )
        raise SourceError(f"{path}: {what}{has}")
    return found


def _refuse_velox(path: str, file: Any) -> None:
    """Velox stores series with the patterns as the last of three axes, and no scan."""
    import h5py

    version = file.get("Version")
    if not isinstance(version, h5py.Dataset) or version.size != 1 or version.dtype.kind not in "OS":
        return
    if version.dtype.itemsize > MOST_HEADER_BYTES or not is_safe(version.dtype):
        return
    if "Velox" in str(np.asarray(version[...]).reshape(-1)[0]):
        raise SourceError(
            f"{path}: an EMD file of Velox holds images and spectra, no scan of patterns; export the patterns from the "
            "camera's program"
        )


def _scale_of(data: Any, i: int) -> tuple[str, Any] | None:
    """Name and dimension scale of an axis; netCDF names only the scale."""
    scale = first_scale(data, i)
    if scale is None:
        return None
    label = labels(data)[i] or text_of(scale.name or "").rpartition("/")[2]
    return (label, scale) if label else None


def _title(name: str) -> str:
    return name.split("/")[1] if name.startswith("Experiments/") else name


def _hdf5_dataset(path: str, file: Any, name: str, data: Any) -> dict[str, Any]:
    if data.ndim < 3:  # listed only; a file may have one for each pattern
        shape = tuple(int(n) for n in data.shape)
        plain = tuple(Axis(f"axis{i}", n) for i, n in enumerate(shape))
        return {
            "name": _title(name),
            "source": Hdf5Dataset(path, name, data.dtype, shape),
            "axes": plain,
            "fault": fault_of(path, name, data),
        }
    parent = data.parent
    attrs_of = {
        "file": attributes_of(file),
        "group": attributes_of(parent),
        "dataset": attributes_of(data),
    }
    axes, described = [], []
    names = names_of(data, attrs_of["dataset"], attrs_of["group"])
    for i, size in enumerate(data.shape):
        found = parent.get(f"axis-{i}")
        along = parent.get(f"dim{i if 'dim0' in parent else i + 1}")  # EMD counts from 0, or from 1
        scale = _scale_of(data, i)
        if found is None and scale is not None:
            axes.append(axis_along(scale[0], int(size), scale[1], attributes_of(scale[1])))
        elif found is None and isinstance(along, type(data)):
            attrs = attributes_of(along)
            axes.append(axis_along(attrs.get("name", f"axis{i}"), int(size), along, attrs))
        else:
            attrs = attributes_of(found) if found is not None else {}
            described.append(attrs)
            axes.append(axis_from(attrs.get("name", names[i] or f"axis{i}"), int(size), attrs))
    shape, chunks = tuple(int(n) for n in data.shape), data.chunks
    chunk_bytes = math.prod(chunks or (0,)) * data.dtype.itemsize
    source: Source = Hdf5Dataset(path, name, data.dtype, shape, chunk_bytes)
    flags = order_by_flags(described)
    notes = (*flags["notes"], *unwritten(data))
    if "MATLAB_class" in attrs_of["dataset"]:
        notes += (f"MATLAB stores axes in reverse: there it is {by(shape[::-1])}",)
    if name.startswith("signals/") and "emd_group_type" in file["signals"].attrs:
        source, axes = View.of(source).transpose(range(len(shape))[::-1]), axes[::-1]
        chunks = chunks and chunks[::-1]
        notes += ("HyperSpy writes the axes of .emd in reverse; they are put in order",)
    fault = fault_of(path, name, data) or packed(path, name, attrs_of["dataset"])
    part, doubt = part_of(path, name, attrs_of["dataset"]) if len(shape) == 3 else ("", "")
    metadata = {where: attributes for where, attributes in attrs_of.items() if attributes}
    known: dict[str, Any] = {"metadata": metadata}
    if name.startswith("Experiments/"):
        known = own.of_hspy(path, parent, metadata)
    elif own.is_h5(file):
        known = own.of_h5(path, file)
    return {
        "name": _title(name),
        "source": source,
        "axes": tuple(axes),
        "chunks": chunks,
        "hint": doubt,
        **flags,
        "part": part,
        "fault": fault,
        **known,
        "notes": (*notes, *known.get("notes", ())),
    }
