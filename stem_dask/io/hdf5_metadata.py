"""What HDF5 files say in attributes and small datasets, as nested dictionaries; links are not followed."""

import json
from typing import Any

import numpy as np

#: levels of groups, elements of an array, and bytes of one element that are kept
_MOST_LEVELS, _MOST_ELEMENTS, _MOST_BYTES = 12, 4096, 1 << 20
#: attributes with which HDF5 itself ties datasets to the scales of their axes
_OF_HDF5 = ("CLASS", "NAME", "DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST")


def attributes_of(item: Any) -> dict[str, Any]:
    """Attributes of a group or dataset, as far as they can be read."""
    found = {}
    for name in item.attrs:
        if name in _OF_HDF5:
            continue
        try:
            found[name] = item.attrs[name]
        except (OSError, TypeError, ValueError):
            found[name] = "not readable"
    return found


def member(group: Any, path: str, kind: type) -> Any:
    """The group or dataset of a path below a group; None when it is not there, behind a link, or of another kind."""
    import h5py

    for name in path.split("/"):
        if not isinstance(group, h5py.Group):
            return None
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            return None
        group = group[name]
    return group if isinstance(group, kind) else None


def tree_of(group: Any, level: int = 0, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A group of metadata as nested dictionaries: what `stem_dask.io.metadata.hdf5_tree` and RosettaSciIO made of it.

    Large arrays are not read, nor what is called as in ``without``.
    """
    import h5py

    tree = {plain_name(name): plain_value(value) for name, value in attributes_of(group).items()}
    for name in group:
        # names that are no UTF-8 come as bytes, and h5py does not find their links
        if isinstance(name, bytes) or not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        if name in without:
            continue
        item = group[name]
        if isinstance(item, h5py.Group) and level < _MOST_LEVELS:
            tree[plain_name(name)] = tree_of(item, level + 1)
        elif isinstance(item, h5py.Dataset):
            n = 0 if item.size is None else item.size
            short = item.size is not None and n <= _MOST_ELEMENTS and n * item.dtype.itemsize <= _MOST_BYTES  # fmt: skip
            tree[plain_name(name)] = (
                _stored(item) if short else f"{n:,} values, left in the input file"
            )
    return tree


def _stored(dataset: Any) -> Any:
    """The numbers of a small dataset, or its text, which is there when it is too long for an attribute."""
    return _decoded(np.asarray(dataset[...]).tolist())


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def plain_name(name: str) -> str:
    """A name without the marks that RosettaSciIO puts before lists, and with the slashes that HDF5 cannot have."""
    for mark in ("_list_empty_", "_tuple_empty_", "_list_", "_tuple_"):
        name = name.removeprefix(mark)
    if name.startswith("(") and name.endswith(")") and name[1:2] in ("_", ")", "."):
        name = name[1:-1]
    return name.replace("∕", "/")


def plain_value(value: Any) -> Any:
    """An attribute as it was before `stem_dask.io.metadata.hdf5_tree`."""
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
