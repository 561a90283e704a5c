"""Metadata of stem_dask's own outputs (.zarr, .zspy, .hspy, .h5, .pt), so that a second job keeps them.

The files may come from anywhere: only values that stem_dask would have written are accepted. All functions return arguments
of `Candidate`.
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
from stem_dask.readers.containers import Hdf5Dataset, ZarrArray
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


def about(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The valid attributes of patterns among those that a file states.

    Examples
    --------
    >>> about({"beam_energy_kv": 200, "k_origin": "elsewhere", "title": "scan", "token": "1f"})
    {'beam_energy_kv': 200.0, 'title': 'scan'}
    """
    found, given = checked(stated), stated.get("given")
    if isinstance(given, Mapping):
        calibration, energy = given.get("calibration"), number(given.get("beam_energy_kv"))
        kept: dict[str, Any] = {} if energy is None else {"beam_energy_kv": energy}
        if isinstance(calibration, Mapping) and calibration:
            kept = {"calibration": dict(calibration), **kept}
        found |= {"given": kept} if kept else {}
    for name in ("title", "intensity"):
        if isinstance(stated.get(name), str) and 0 < len(stated[name]) <= 1000:
            found[name] = text_of(stated[name])
    if stated.get("k_origin") in ("detector", "window_center", "beam"):
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


def lost(valid: Source) -> dict[str, Any]:
    """Positions that could not be read when the file was written; {} if there are none."""
    shape = valid.shape
    if valid.dtype.kind != "b" or not math.prod(shape):
        return {}
    rows, n = max(1, 2**20 // math.prod(shape[1:])), 0
    rest = (slice(None),) * (len(shape) - 1)
    try:
        for start in range(0, shape[0], rows):
            block = valid[(slice(start, start + rows), *rest)]
            n += block.size - int(np.count_nonzero(block))
    except SourceError as error:
        return {"notes": (f"unknown which patterns could not be read before: {error}",)}
    if not n:
        return {}
    note = (
        f"{n:,} of {math.prod(shape):,} patterns could not be read when this was written: they are zeros, and "
        "stay invalid"
    )
    return {"notes": (note,), "valid": Positions(valid)}


def _lost_in(path: str, name: str, valid: Any, patterns: Any) -> dict[str, Any]:
    """As `lost`, of an HDF5 dataset or a zarr array; {} if it is missing or of another shape."""
    if valid is None or patterns is None or valid.shape != patterns.shape[:-2]:
        return {}
    kind = ZarrArray if hasattr(valid, "metadata") else Hdf5Dataset
    return lost(kind(path, name, np.dtype(valid.dtype), valid.shape))


def of_zarr(
    path: str, attrs: Mapping[str, Any], arrays: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Metadata of an own store; None if it is not an own store."""
    patterns = arrays.get("patterns")
    if tuple(getattr(getattr(patterns, "metadata", None), "dimension_names", None) or ()) not in OUR_DIMS:  # fmt: skip
        return None
    kept = attrs.get("original_metadata")
    return {
        "about": about({**attrs, **getattr(patterns, "attrs", {})}),
        "metadata": kept if isinstance(kept, dict) else None,
        **_lost_in(path, "valid", arrays.get("valid"), patterns),
    }


def of_hspy(path: str, signal: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a HyperSpy signal in an HDF5 file.

    ``others`` are attributes of the file and of the data, which are kept unless stem_dask wrote the signal.
    """
    import h5py

    def tree(name: str, *without: str) -> dict[str, Any] | None:
        group = member(signal, name, h5py.Group)
        return None if group is None else tree_of(group, without=without)

    data, valid = (member(signal, name, h5py.Dataset) for name in ("data", f"{_OWN}/valid"))
    place = "" if valid is None else valid.name
    return {**_of_signal(tree, others), **_lost_in(path, place, valid, data)}


def of_zspy(path: str, signal: str, data: Any) -> dict[str, Any]:
    """Metadata of the HyperSpy signal in group ``signal`` of a zarr store, with the array ``data``."""
    import zarr

    def tree(name: str, *without: str) -> dict[str, Any] | None:
        return _zarr_tree(path, f"{signal}/{name}", without)

    name, valid = f"{signal}/{_OWN}/valid", None
    if _zarr_attributes(path, name) is not None:
        with translate(SourceError, path, f"{name} cannot be read"):
            valid = zarr.open_array(zarr_store(path), path=name, mode="r")
    return {**_of_signal(tree, {}), **_lost_in(path, name, valid, data)}


def _zarr_attributes(store: str, name: str) -> dict[str, Any] | None:
    """Attributes of a group or an array; None when it is missing, or behind a symbolic link."""
    folder = Path(store)
    for part in Path(name).parts:
        folder = folder / part
        if folder.is_symlink() or not folder.is_dir():
            return None
    for file in (folder / ".zattrs", folder / "zarr.json"):
        if file.is_file() and not file.is_symlink():
            with translate(SourceError, store, f"the attributes in {file} cannot be read"):
                found = json.loads(side_text(str(file)))
                found = found.get("attributes", {}) if file.name == "zarr.json" else found
                return found if isinstance(found, dict) else {}
    return {}


def _zarr_tree(
    store: str, name: str, without: tuple[str, ...] = (), level: int = 0
) -> dict[str, Any] | None:
    """A group of metadata as nested dictionaries, the inverse of `stem_dask.core.metadata.hdf5_tree`."""
    import zarr

    from stem_dask.storage.zarr_guard import HostileStoreError

    attributes = _zarr_attributes(store, name)
    if attributes is None:
        return None
    tree = {plain_name(key): plain_value(value) for key, value in attributes.items()}
    for folder in sorted(Path(store, name).iterdir()):
        inner, key = f"{name}/{folder.name}", plain_name(folder.name)
        if folder.is_symlink() or folder.name in without:
            continue
        if (folder / ".zgroup").is_file() and level < 12:
            tree[key] = _zarr_tree(store, inner, level=level + 1)
        elif (folder / ".zarray").is_file():
            with translate(SourceError, store, f"{inner} cannot be read"):
                try:
                    array = zarr.open_array(zarr_store(store), path=inner, mode="r")
                    n = math.prod(array.shape)
                    left = f"{n:,} values, left in the input file"
                    tree[key] = left if n > 4096 else np.asarray(array[...]).tolist()
                except HostileStoreError:
                    raise
                except SourceError as error:  # ragged arrays and lists of texts of HyperSpy
                    tree[key] = f"left in the input file: {error}"
    return tree


def _of_signal(
    tree: Callable[..., dict[str, Any] | None], others: Mapping[str, Any]
) -> dict[str, Any]:
    """Metadata of a signal, given a function of a group's name and of the names of members to leave out."""
    known = tree("metadata", "_HyperSpy", "Maps", "stem_dask") or {}
    known = {name: value for name, value in known.items() if not name.startswith("_")}
    original, own, stated = tree("original_metadata") or {}, tree(_OWN, "valid"), of_signal(known)
    if own is None:
        kept = {"original_metadata": original, "metadata": known}
        kept = {name: part for name, part in kept.items() if part}
        return {"about": about(stated), "metadata": {**kept, **others}}
    stated |= {name: own.get(name) for name in ("intensity", "k_origin", "given")}
    return {"about": about(stated), "metadata": original}


def is_h5(file: Any) -> bool:
    """Whether an HDF5 file is an own .h5: it has a dataset ``patterns`` with own axis names."""
    import h5py

    patterns = member(file, "patterns", h5py.Dataset)
    return patterns is not None and names_of(patterns) in OUR_DIMS


def of_h5(path: str, file: Any) -> dict[str, Any]:
    """Metadata of an own .h5; see `stem_dask.writers.hdf5.write_about`."""
    import h5py

    groups = {n: member(file, n, h5py.Group) for n in ("given", "metadata", "original_metadata")}
    trees = {name: None if group is None else tree_of(group) for name, group in groups.items()}
    patterns, original = file["patterns"], trees.pop("original_metadata")
    return {
        "about": about({**attributes_of(file), **attributes_of(patterns), **trees}),
        "metadata": original,
        **_lost_in(path, "valid", member(file, "valid", h5py.Dataset), patterns),
    }


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
            written = tuple(results["output"]["shape"])
            same = math.prod(written) == math.prod(shape) and written[-2:] == shape[-2:]
            # earlier versions do not state the intensity of normalized tensors
            scores = "z-score of log(1 + counts)" if "normalization" in results else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if same:
            return about({"intensity": results.get("intensity", scores)})
    return None


def of_tensors(content: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Metadata of an own .pt; None if stem_dask did not write the dictionary."""
    axes, window, kept = (content.get(name) for name in ("axes", "window", "original_metadata"))
    if not isinstance(axes, list) or not isinstance(window, Mapping) or "patterns" not in content:
        return None
    names = tuple(axis.get("name") if isinstance(axis, Mapping) else None for axis in axes)
    if names not in OUR_DIMS:
        return None
    metadata = dict(kept) if isinstance(kept, Mapping) else None
    return {"about": about({**window, **content}), "metadata": metadata}
