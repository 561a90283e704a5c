"""Metadata of stem_dask's own outputs (.zarr, .zspy, .hspy, .h5, .pt), so that a second job keeps them.

The files may come from anywhere: only values that stem_dask would have written are accepted.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import checked, number, of_signal, text_of
from stem_dask.core.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS
from stem_dask.readers.arrays import Hdf5Dataset, ZarrArray
from stem_dask.readers.hdf5_metadata import (
    attributes_of,
    member,
    names_of,
    plain_name,
    plain_value,
    tree_of,
)
from stem_dask.readers.source import Slices, Source, Wrapped, side_text
from stem_dask.storage.errors import translate
from stem_dask.storage.zarr_store import zarr_store

#: dimensions of patterns in own outputs
OUR_DIMS = ((*SCAN_DIMS, *DETECTOR_DIMS), (*LIST_DIMS, *DETECTOR_DIMS))

#: node of stem_dask in the metadata of a HyperSpy signal
_OWN = "metadata/stem_dask"

#: nodes of a signal's metadata that belong to its array, or are read separately
_LEFT_OUT = {"metadata": ("_HyperSpy", "stem_dask")}

#: intensity of normalized tensors of earlier versions, whose results do not state it
_SCORES = "z-score of log(1 + counts)"

#: positions read at a time
_POSITIONS = 2**20

#: levels of groups, and elements of an array, that are kept of the metadata of a signal
_MOST_LEVELS, _MOST_ELEMENTS = 12, 4096


def about(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The valid attributes of patterns among those that a file states.

    Examples
    --------
    >>> about({"beam_energy_kv": 200, "k_origin": "elsewhere", "title": "scan", "token": "1f"})
    {'beam_energy_kv': 200.0, 'title': 'scan'}
    """
    found = checked(stated)
    given = stated.get("given")
    if isinstance(given, Mapping):
        calibration, energy = given.get("calibration"), number(given.get("beam_energy_kv"))
        kept: dict[str, Any] = {}
        if isinstance(calibration, Mapping) and calibration:
            kept["calibration"] = dict(calibration)
        if energy is not None:
            kept["beam_energy_kv"] = energy
        found |= {"given": kept} if kept else {}
    for name in ("title", "intensity"):
        if isinstance(stated.get(name), str) and 0 < len(stated[name]) <= 1000:
            found[name] = text_of(stated[name])
    if stated.get("k_origin") in ("detector", "window_center"):
        found["k_origin"] = stated["k_origin"]
    return found


@dataclass(frozen=True)
class Positions(Wrapped):
    """One value per pattern, as patterns of one pixel (…, 1, 1), to be reshaped and sliced like the patterns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, followed by two axes of length 1."""
        return (*self.source.shape, 1, 1)

    def __getitem__(self, part: Slices) -> NDArray:
        return self.source[part[:-2]][..., None, None][..., part[-2], part[-1]]


def lost(valid: Source | None) -> dict[str, Any]:
    """Positions that could not be read when the file was written, as arguments of `Candidate`; {} if there are none."""
    if valid is None or valid.dtype.kind != "b" or not math.prod(valid.shape):
        return {}
    rows = max(1, _POSITIONS // max(1, math.prod(valid.shape[1:])))
    rest = (slice(None),) * (len(valid.shape) - 1)
    n = 0
    try:
        for start in range(0, valid.shape[0], rows):
            block = valid[(slice(start, start + rows), *rest)]
            n += block.size - int(np.count_nonzero(block))
    except SourceError as error:
        return {"notes": (f"unknown which patterns could not be read before: {error}",)}
    if not n:
        return {}
    note = (
        f"{n:,} of {math.prod(valid.shape):,} patterns could not be read when this was written: they are zeros, and "
        "stay invalid"
    )
    return {"notes": (note,), "valid": Positions(valid)}


def of_zarr(
    path: str, attrs: Mapping[str, Any], arrays: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Metadata of an own store, as arguments of `Candidate`; None if it is not an own store."""
    patterns, valid = arrays.get("patterns"), arrays.get("valid")
    if tuple(getattr(getattr(patterns, "metadata", None), "dimension_names", None) or ()) not in OUR_DIMS:  # fmt: skip
        return None
    assert patterns is not None
    positions = None
    if valid is not None and valid.shape == patterns.shape[:-2]:
        positions = ZarrArray(path, "valid", np.dtype(valid.dtype), valid.shape)
    kept = attrs.get("original_metadata")
    return {
        "about": about({**attrs, **patterns.attrs}),
        "metadata": kept if isinstance(kept, dict) else None,
        **lost(positions),
    }


def of_hspy(path: str, signal: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a HyperSpy signal in an HDF5 file, as arguments of `Candidate`.

    ``others`` are attributes of the file and of the data, which are kept unless stem_dask wrote the signal.
    """
    import h5py

    def attributes(name: str) -> dict[str, Any] | None:
        group = member(signal, name, h5py.Group)
        return None if group is None else attributes_of(group)

    def tree(name: str) -> dict[str, Any]:
        group = member(signal, name, h5py.Group)
        return {} if group is None else tree_of(group, without=_LEFT_OUT.get(name, ()))

    data, valid = (member(signal, name, h5py.Dataset) for name in ("data", f"{_OWN}/valid"))
    return {**_of_signal(attributes, tree, others), **_lost_in_hdf5(path, valid, data)}


def of_zspy(path: str, signal: str, data: Any) -> dict[str, Any]:
    """Metadata of the HyperSpy signal in group ``signal`` of a zarr store, with the array ``data``."""
    import zarr

    def attributes(name: str) -> dict[str, Any] | None:
        return _zarr_attributes(path, f"{signal}/{name}")

    def tree(name: str) -> dict[str, Any]:
        return _zarr_tree(path, f"{signal}/{name}", _LEFT_OUT.get(name, ()))

    positions = None
    if attributes(f"{_OWN}/valid") is not None:
        name = f"{signal}/{_OWN}/valid"
        with translate(SourceError, path, f"{name} cannot be read"):
            valid: Any = zarr.open_array(zarr_store(path), path=name, mode="r")
        if valid.shape == data.shape[:-2]:
            positions = ZarrArray(path, name, np.dtype(valid.dtype), valid.shape)
    return {**_of_signal(attributes, tree, {}), **lost(positions)}


def _zarr_attributes(store: str, name: str) -> dict[str, Any] | None:
    """Attributes of a group or an array; None when it is missing, or behind a symbolic link."""
    folder = Path(store)
    for part in Path(name).parts:
        folder = folder / part
        if folder.is_symlink() or not folder.is_dir():
            return None
    for file in (folder / ".zattrs", folder / "zarr.json"):
        if file.is_symlink() or not file.is_file():
            continue
        with translate(SourceError, store, f"the attributes in {file} cannot be read"):
            found = json.loads(side_text(str(file)))
            found = found.get("attributes", {}) if file.name == "zarr.json" else found
            return found if isinstance(found, dict) else {}
    return {}


def _zarr_tree(
    store: str, name: str, without: tuple[str, ...] = (), level: int = 0
) -> dict[str, Any]:
    """A group of metadata as nested dictionaries, the inverse of `stem_dask.core.metadata.hdf5_tree`."""
    attributes = _zarr_attributes(store, name)
    if attributes is None:
        return {}
    tree = {plain_name(key): plain_value(value) for key, value in attributes.items()}
    for folder in sorted(Path(store, name).iterdir()):
        if folder.is_symlink() or folder.name in without:
            continue
        inner = f"{name}/{folder.name}"
        if (folder / ".zarray").is_file():
            tree[plain_name(folder.name)] = _small_array(store, inner)
        elif (folder / ".zgroup").is_file() and level < _MOST_LEVELS:
            tree[plain_name(folder.name)] = _zarr_tree(store, inner, level=level + 1)
    return tree


def _small_array(store: str, name: str) -> Any:
    """The numbers or texts of a small array; others are left in the file."""
    import zarr

    from stem_dask.storage.zarr_guard import HostileStoreError

    with translate(SourceError, store, f"{name} cannot be read"):
        try:
            array = zarr.open_array(zarr_store(store), path=name, mode="r")
        except HostileStoreError:
            raise
        except SourceError as error:  # ragged arrays and lists of texts of HyperSpy
            return f"left in the input file: {error}"
        n = math.prod(array.shape)
        if n > _MOST_ELEMENTS:
            return f"{n:,} values, left in the input file"
        return np.asarray(array[...]).tolist()


def _of_signal(
    attributes: Callable[[str], dict[str, Any] | None],
    tree: Callable[[str], dict[str, Any]],
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """Metadata of a signal, given functions that read the attributes of a group and its tree."""
    known = {k: v for k, v in tree("metadata").items() if not k.startswith("_")}
    stated = of_signal(known)
    original, own = tree("original_metadata"), attributes(_OWN)
    if own is None:
        kept = {"original_metadata": original, "metadata": known}
        kept = {name: part for name, part in kept.items() if part}
        return {"about": about(stated), "metadata": {**kept, **others}}
    stated |= {name: own.get(name) for name in ("intensity", "k_origin")}
    stated["given"] = tree(f"{_OWN}/given")
    return {"about": about(stated), "metadata": original}


def is_h5(file: Any) -> bool:
    """Whether an HDF5 file is an own .h5: it has a dataset ``patterns`` with own axis names."""
    import h5py

    patterns = member(file, "patterns", h5py.Dataset)
    return patterns is not None and names_of(patterns) in OUR_DIMS


def of_h5(path: str, file: Any) -> dict[str, Any]:
    """Metadata of an own .h5, as arguments of `Candidate`; see `stem_dask.writers.hdf5.write_about`."""
    import h5py

    patterns, valid = file["patterns"], member(file, "valid", h5py.Dataset)
    given = member(file, "given", h5py.Group)
    original = member(file, "original_metadata", h5py.Group)
    metadata = member(file, "metadata", h5py.Group)
    stated = {**attributes_of(file), **attributes_of(patterns)}
    stated["given"] = None if given is None else tree_of(given)
    stated["metadata"] = None if metadata is None else tree_of(metadata)
    return {
        "about": about(stated),
        "metadata": None if original is None else tree_of(original),
        **_lost_in_hdf5(path, valid, patterns),
    }


def _lost_in_hdf5(path: str, valid: Any, patterns: Any) -> dict[str, Any]:
    if valid is None or patterns is None or valid.shape != patterns.shape[:-2]:
        return {}
    return lost(Hdf5Dataset(path, valid.name, valid.dtype, valid.shape))


def of_results(path: str, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """Attributes of a bare tensor or array ``path`` from the results of its run, or None.

    The results are in PATH_results.json, or in NAME_results.json if the file is an export of NAME.zarr.
    """
    for name in (path, str(Path(path).with_suffix(""))):
        if not os.path.isfile(f"{name}_results.json"):
            continue
        try:
            with open(f"{name}_results.json", "rb") as file:
                results = json.load(file)
            same = math.prod(results["output"]["shape"]) == math.prod(shape)
            same = same and tuple(results["output"]["shape"][-2:]) == shape[-2:]
            normalized = "normalization" in results
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if same:
            return about({"intensity": results.get("intensity", _SCORES if normalized else None)})
    return None


def of_tensors(content: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Metadata of an own .pt, as arguments of `Candidate`; None if stem_dask did not write the dictionary."""
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
