"""What our own outputs (.zarr, .hspy, .h5, .pt) say of themselves, so that a second job keeps it.

Everything here is read from files that may come from anywhere, and is taken only when it is what we would have written.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from stem_dask.errors import SourceError
from stem_dask.io.candidate import number
from stem_dask.io.hdf5_metadata import attributes_of, member, tree_of
from stem_dask.io.sources import Hdf5Dataset, Source, ZarrArray
from stem_dask.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS

#: dimensions of patterns as we write them
OUR_DIMS = ((*SCAN_DIMS, *DETECTOR_DIMS), (*LIST_DIMS, *DETECTOR_DIMS))
#: positions that are looked at at once, and at all: a damaged file may claim any number
_POSITIONS, _MOST_POSITIONS = 2**20, 2**28


def about(said: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a file says, the attributes of patterns that are as we write them.

    Examples
    --------
    >>> about({"beam_energy_kv": 200, "k_origin": "elsewhere", "title": "scan", "token": "1f"})
    {'beam_energy_kv': 200.0, 'title': 'scan'}
    """
    found: dict[str, Any] = {}
    energy = number(said.get("beam_energy_kv"))
    if energy is not None and energy > 0:
        found["beam_energy_kv"] = energy
    given = said.get("given")
    if isinstance(given, Mapping):
        calibration, energy = given.get("calibration"), number(given.get("beam_energy_kv"))
        kept: dict[str, Any] = {}
        if isinstance(calibration, Mapping) and calibration:
            kept["calibration"] = dict(calibration)
        if energy is not None:
            kept["beam_energy_kv"] = energy
        found |= {"given": kept} if kept else {}
    for name in ("title", "intensity"):
        if isinstance(said.get(name), str) and 0 < len(said[name]) <= 1000:
            found[name] = said[name]
    if said.get("k_origin") in ("detector", "window_center"):
        found["k_origin"] = said["k_origin"]
    return found


def lost_note(valid: Source) -> tuple[str, ...]:
    """What to say of positions that could not be read when the file was written, from its array ``valid``."""
    if valid.dtype.kind != "b" or not math.prod(valid.shape):
        return ()
    if math.prod(valid.shape) > _MOST_POSITIONS:
        return (
            f"which patterns could not be read before is not known: {math.prod(valid.shape):,} are more than can be looked at",
        )
    rows = max(1, _POSITIONS // max(1, math.prod(valid.shape[1:])))
    rest = (slice(None),) * (len(valid.shape) - 1)
    n = 0
    try:
        for start in range(0, valid.shape[0], rows):
            block = valid[(slice(start, start + rows), *rest)]
            n += block.size - int(np.count_nonzero(block))
    except SourceError as error:
        return (f"which patterns could not be read before is not known: {error}",)
    if not n:
        return ()
    return (
        f"{n:,} of {math.prod(valid.shape):,} patterns could not be read when this was written: they are zeros",
    )


def of_zarr(
    path: str, attrs: Mapping[str, Any], arrays: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What a store of ours says beside its patterns, as arguments of `Candidate`; None when it is not ours."""
    patterns, valid = arrays.get("patterns"), arrays.get("valid")
    if tuple(getattr(getattr(patterns, "metadata", None), "dimension_names", None) or ()) not in OUR_DIMS:  # fmt: skip
        return None
    assert patterns is not None
    notes: tuple[str, ...] = ()
    if valid is not None and valid.shape == patterns.shape[:-2]:
        notes = lost_note(ZarrArray(path, "valid", np.dtype(valid.dtype), valid.shape))
    kept = attrs.get("original_metadata")
    return {
        "about": about({**attrs, **patterns.attrs}),
        "metadata": kept if isinstance(kept, dict) else None,
        "notes": notes,
    }


def of_hspy(path: str, signal: Any, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What a HyperSpy signal in an HDF5 file says beside its data: of ours everything, of others the microscope.

    ``attributes`` are those of the file and of the data, which are kept when the signal is not of ours.
    """
    import h5py

    said: dict[str, Any] = {}
    microscope = member(signal, "metadata/Acquisition_instrument/TEM", h5py.Group)
    if microscope is not None:
        said["beam_energy_kv"] = attributes_of(microscope).get("beam_energy")
    general = member(signal, "metadata/General", h5py.Group)
    if general is not None:
        said["title"] = attributes_of(general).get("title")
    original = member(signal, "original_metadata", h5py.Group)
    tree = {} if original is None else tree_of(original)
    ours = member(signal, "metadata/stem_dask", h5py.Group)
    if ours is None:
        kept = {"original_metadata": tree} if tree else {}
        return {"about": about(said), "metadata": {**kept, **attributes}}
    own = attributes_of(ours)
    said |= {name: own.get(name) for name in ("intensity", "k_origin")}
    given = member(ours, "given", h5py.Group)
    said["given"] = None if given is None else tree_of(given)
    data, valid = member(signal, "data", h5py.Dataset), member(ours, "valid", h5py.Dataset)
    return {"about": about(said), "metadata": tree, "notes": _lost_in_hdf5(path, valid, data)}


def is_h5(file: Any) -> bool:
    """Whether a plain HDF5 file is as we write .h5: a dataset ``patterns`` whose axes have our names."""
    import h5py

    patterns = member(file, "patterns", h5py.Dataset)
    return patterns is not None and tuple(dim.label for dim in patterns.dims) in OUR_DIMS


def of_h5(path: str, file: Any) -> dict[str, Any]:
    """What a .h5 of ours says beside its patterns, as arguments of `Candidate`; see `stem_dask.io.h5.write_about`."""
    import h5py

    patterns, valid = file["patterns"], member(file, "valid", h5py.Dataset)
    given = member(file, "given", h5py.Group)
    original = member(file, "original_metadata", h5py.Group)
    said = {**attributes_of(file), **attributes_of(patterns)}
    said["given"] = None if given is None else tree_of(given)
    return {
        "about": about(said),
        "metadata": None if original is None else tree_of(original),
        "notes": _lost_in_hdf5(path, valid, patterns),
    }


def _lost_in_hdf5(path: str, valid: Any, patterns: Any) -> tuple[str, ...]:
    if valid is None or patterns is None or valid.shape != patterns.shape[:-2]:
        return ()
    return lost_note(Hdf5Dataset(path, valid.name, valid.dtype, valid.shape))


def of_tensors(content: Mapping[Any, Any]) -> dict[str, Any] | None:
    """What a .pt of ours says beside its patterns; None when the dictionary is not ours."""
    axes, window = content.get("axes"), content.get("window")
    if not isinstance(axes, list) or not isinstance(window, Mapping) or "patterns" not in content:
        return None
    if not all(isinstance(axis, Mapping) for axis in axes):
        return None
    if tuple(axis.get("name") for axis in axes) not in OUR_DIMS:
        return None
    kept = content.get("original_metadata")
    return {
        "about": about({**window, **content}),
        "metadata": dict(kept) if isinstance(kept, Mapping) else None,
    }
