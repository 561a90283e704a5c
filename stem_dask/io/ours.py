"""What our own outputs (.zarr, .hspy, .pt) say of themselves, so that a second job keeps it.

Everything here is read from files that may come from anywhere, and is taken only when it is what we would have written.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from stem_dask.errors import SourceError
from stem_dask.io.candidate import number
from stem_dask.io.sources import Hdf5Dataset, Source, ZarrArray
from stem_dask.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS

#: dimensions of patterns as we write them
OUR_DIMS = ((*SCAN_DIMS, *DETECTOR_DIMS), (*LIST_DIMS, *DETECTOR_DIMS))
#: metadata of HDF5 files: levels, and elements of an array that are kept
_MOST_LEVELS, _MOST_ELEMENTS = 12, 4096
#: positions that are looked at at once
_POSITIONS = 2**20


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
    rows = max(1, _POSITIONS // max(1, math.prod(valid.shape[1:])))
    rest = (slice(None),) * (len(valid.shape) - 1)
    n = 0
    try:
        for start in range(0, valid.shape[0], rows):
            block = valid[(slice(start, start + rows), *rest)]
            n += block.size - int(np.count_nonzero(block))
    except SourceError as error:
        return (f"which patterns could not be read before is not known: {error}",)
    return (
        (
            f"{n:,} of {math.prod(valid.shape):,} patterns could not be read when this was written: they are zeros",
        )
        if n
        else ()
    )


def of_zarr(path: str, root: Any) -> dict[str, Any] | None:
    """What a store of ours says beside its patterns, as arguments of `Candidate`; None when it is not ours."""
    import zarr

    patterns, attrs = root.get("patterns"), dict(root.attrs)
    if not isinstance(patterns, zarr.Array):
        return None
    if tuple(getattr(patterns.metadata, "dimension_names", None) or ()) not in OUR_DIMS:
        return None
    notes: tuple[str, ...] = ()
    valid = root.get("valid")
    if isinstance(valid, zarr.Array) and valid.shape == patterns.shape[:-2]:
        notes = lost_note(ZarrArray(path, "valid", np.dtype(valid.dtype), valid.shape))
    kept = attrs.get("original_metadata")
    return {
        "about": about({**attrs, **patterns.attrs}),
        "metadata": kept if isinstance(kept, dict) else None,
        "notes": notes,
    }


def of_hspy(path: str, signal: Any) -> dict[str, Any]:
    """What a HyperSpy signal in an HDF5 file says beside its data: of ours everything, of others the microscope."""
    import h5py

    metadata, ours = signal.get("metadata"), signal.get("metadata/stem_dask")
    said: dict[str, Any] = {}
    if isinstance(metadata, h5py.Group):
        microscope = metadata.get("Acquisition_instrument/TEM")
        said["beam_energy_kv"] = None if microscope is None else microscope.attrs.get("beam_energy")
        general = metadata.get("General")
        said["title"] = None if general is None else general.attrs.get("title")
    original = signal.get("original_metadata")
    tree = hdf5_tree_of(original) if isinstance(original, h5py.Group) else {}
    if not isinstance(ours, h5py.Group):
        return {"about": about(said), "metadata": {"original_metadata": tree} if tree else {}}
    said |= {name: ours.attrs.get(name) for name in ("intensity", "k_origin")}
    said["given"] = hdf5_tree_of(ours["given"]) if "given" in ours else None
    valid, notes = ours.get("valid"), tuple[str, ...]()
    if isinstance(valid, h5py.Dataset):
        notes = lost_note(Hdf5Dataset(path, valid.name, valid.dtype, valid.shape))
    return {"about": about(said), "metadata": tree, "notes": notes, "ours": True}


def hdf5_tree_of(group: Any, level: int = 0) -> dict[str, Any]:
    """A group of metadata as nested dictionaries: what `stem_dask.io.metadata.hdf5_tree` and RosettaSciIO made of it.

    Links are not followed, and large arrays not read.
    """
    import h5py

    tree = {_name(name): _value(value) for name, value in group.attrs.items()}
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        item = group[name]
        if isinstance(item, h5py.Group) and level < _MOST_LEVELS:
            tree[_name(name)] = hdf5_tree_of(item, level + 1)
        elif isinstance(item, h5py.Dataset):
            short = item.size is not None and item.size <= _MOST_ELEMENTS
            left = f"{item.size or 0:,} values, left in the input file"
            tree[_name(name)] = np.asarray(item[...]).tolist() if short else left
    return tree


def _name(name: str) -> str:
    """Without the marks that RosettaSciIO puts before lists, and with the slashes that HDF5 cannot have."""
    for mark in ("_list_empty_", "_tuple_empty_", "_list_", "_tuple_"):
        name = name.removeprefix(mark)
    if name.startswith("(") and name.endswith(")") and name[1:2] in ("_", ")", "."):
        name = name[1:-1]
    return name.replace("∕", "/")


def _value(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and value == "_None_":
        return None
    if isinstance(value, str) and value.startswith("["):  # a list of no numbers is kept as JSON
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


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
