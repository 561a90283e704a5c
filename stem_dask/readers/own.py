"""What our own outputs (.zarr, .zspy, .hspy, .h5, .pt) say of themselves, so that a second job keeps it.

Everything here is read from files that may come from anywhere, and is taken only when it is what we would have written.
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
from stem_dask.core.instrument import checked, of_signal
from stem_dask.core.metadata import number, text_of
from stem_dask.core.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS
from stem_dask.readers import zarr_metadata
from stem_dask.readers.arrays import Hdf5Dataset, ZarrArray
from stem_dask.readers.hdf5_metadata import attributes_of, labels, member, tree_of
from stem_dask.readers.source import Slices, Source, Wrapped
from stem_dask.storage.errors import told
from stem_dask.storage.zarr_store import zarr_store

#: dimensions of patterns as we write them
OUR_DIMS = ((*SCAN_DIMS, *DETECTOR_DIMS), (*LIST_DIMS, *DETECTOR_DIMS))

#: where a signal of HyperSpy has what is ours
_OWN = "metadata/stem_dask"

#: nodes of a signal's metadata that belong to its array; the one of ours is read by itself
_LEFT_OUT = {"metadata": ("_HyperSpy", "stem_dask")}

#: what the values of earlier versions' normalized tensors are, whose results do not say it
_SCORES = "z-score of log(1 + counts)"

#: bytes of results that are read; a center for each of 100,000 patterns takes some
_MOST_RESULTS = 64 << 20

#: positions that are looked at at once, and at all: a damaged file may claim any number
_POSITIONS, _MOST_POSITIONS = 2**20, 2**28


def about(said: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a file says, the attributes of patterns that are as we write them.

    Examples
    --------
    >>> about({"beam_energy_kv": 200, "k_origin": "elsewhere", "title": "scan", "token": "1f"})
    {'beam_energy_kv': 200.0, 'title': 'scan'}
    """
    found = checked(said)
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
            found[name] = text_of(said[name])
    if said.get("k_origin") in ("detector", "window_center"):
        found["k_origin"] = said["k_origin"]
    return found


@dataclass(frozen=True)
class Positions(Wrapped):
    """One value a pattern, seen as patterns of one pixel: (…) as (…, 1, 1), so that it is folded and cut as they are."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes with two axes of length 1 behind."""
        return (*self.source.shape, 1, 1)

    def __getitem__(self, part: Slices) -> NDArray:
        return self.source[part[:-2]][..., None, None][..., part[-2], part[-1]]


def lost(valid: Source | None) -> dict[str, Any]:
    """Which positions could not be read when the file was written, from its array ``valid``: as arguments of `Candidate`.

    ``valid`` is left out when nothing is missing, or when the array cannot be read, which is noted.
    """
    if valid is None or valid.dtype.kind != "b" or not math.prod(valid.shape):
        return {}
    if math.prod(valid.shape) > _MOST_POSITIONS:
        return {"notes": (f"which patterns could not be read before is not known: {math.prod(valid.shape):,} are more "
                          "than can be looked at",)}  # fmt: skip
    rows = max(1, _POSITIONS // max(1, math.prod(valid.shape[1:])))
    rest = (slice(None),) * (len(valid.shape) - 1)
    n = 0
    try:
        for start in range(0, valid.shape[0], rows):
            block = valid[(slice(start, start + rows), *rest)]
            n += block.size - int(np.count_nonzero(block))
    except SourceError as error:
        return {"notes": (f"which patterns could not be read before is not known: {error}",)}
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
    """What a store of ours says beside its patterns, as arguments of `Candidate`; None when it is not ours."""
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
    """What a HyperSpy signal in an HDF5 file says beside its data: its metadata, and of ours everything.

    ``others`` are attributes of the file and of the data, which are kept when the signal is not of ours.
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
    """The same of a HyperSpy signal in a zarr store; ``signal`` is the name of its group, ``data`` its array."""
    import zarr

    def attributes(name: str) -> dict[str, Any] | None:
        return zarr_metadata.attributes_of(path, f"{signal}/{name}")

    def tree(name: str) -> dict[str, Any]:
        return zarr_metadata.tree_of(path, f"{signal}/{name}", _LEFT_OUT.get(name, ()))

    positions = None
    if attributes(f"{_OWN}/valid") is not None:
        name = f"{signal}/{_OWN}/valid"
        with told(f"{path}: {name} cannot be read"):
            valid: Any = zarr.open_array(zarr_store(path), path=name, mode="r")
        if valid.shape == data.shape[:-2]:
            positions = ZarrArray(path, name, np.dtype(valid.dtype), valid.shape)
    return {**_of_signal(attributes, tree, {}), **lost(positions)}


def _of_signal(
    attributes: Callable[[str], dict[str, Any] | None],
    tree: Callable[[str], dict[str, Any]],
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """What the groups of a signal say, by whatever reads their attributes, and what is below them."""
    known = {k: v for k, v in tree("metadata").items() if not k.startswith("_")}
    said = of_signal(known)
    original, own = tree("original_metadata"), attributes(_OWN)
    if own is None:
        kept = {"original_metadata": original, "metadata": known}
        kept = {name: part for name, part in kept.items() if part}
        return {"about": about(said), "metadata": {**kept, **others}}
    said |= {name: own.get(name) for name in ("intensity", "k_origin")}
    said["given"] = tree(f"{_OWN}/given")
    return {"about": about(said), "metadata": original}


def is_h5(file: Any) -> bool:
    """Whether a plain HDF5 file is as we write .h5: a dataset ``patterns`` whose axes have our names."""
    import h5py

    patterns = member(file, "patterns", h5py.Dataset)
    return patterns is not None and labels(patterns) in OUR_DIMS


def of_h5(path: str, file: Any) -> dict[str, Any]:
    """What a .h5 of ours says beside its patterns, as arguments of `Candidate`; see `stem_dask.writers.hdf5.write_about`."""
    import h5py

    patterns, valid = file["patterns"], member(file, "valid", h5py.Dataset)
    given = member(file, "given", h5py.Group)
    original = member(file, "original_metadata", h5py.Group)
    said = {**attributes_of(file), **attributes_of(patterns)}
    said["given"] = None if given is None else tree_of(given)
    metadata = member(file, "metadata", h5py.Group)
    said["metadata"] = None if metadata is None else tree_of(metadata)
    return {
        "about": about(said),
        "metadata": None if original is None else tree_of(original),
        **_lost_in_hdf5(path, valid, patterns),
    }


def _lost_in_hdf5(path: str, valid: Any, patterns: Any) -> dict[str, Any]:
    if valid is None or patterns is None or valid.shape != patterns.shape[:-2]:
        return {}
    return lost(Hdf5Dataset(path, valid.name, valid.dtype, valid.shape))


def of_results(path: str, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """What the results of a run say of its bare tensor or array ``path``, as `about`; None without such results.

    They lie beside it as PATH_results.json, or as NAME_results.json where it is an export of NAME.zarr.
    """
    for name in (path, str(Path(path).with_suffix(""))):
        if not os.path.isfile(f"{name}_results.json"):
            continue
        try:
            with open(f"{name}_results.json", "rb") as file:
                said = json.loads(file.read(_MOST_RESULTS))
            same = math.prod(said["output"]["shape"]) == math.prod(shape)
            same = same and tuple(said["output"]["shape"][-2:]) == shape[-2:]
            normalized = "normalization" in said
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if same:
            return about({"intensity": said.get("intensity", _SCORES if normalized else None)})
    return None


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
