"""Attributes, small datasets and axis scales of HDF5 files; links are not followed."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from stem_dask.core.metadata import text_of

#: levels of groups, elements of an array, and bytes of one element that are kept
_MOST_LEVELS, _MOST_ELEMENTS, _MOST_BYTES = 12, 4096, 1 << 20

#: replaces values that h5py would turn into Python objects from bytes of the file
NOT_READ = "Python objects, which are never read"

#: attributes of dimension scales
_OF_HDF5 = ("CLASS", "NAME", "DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST")


def attributes_of(item: Any) -> dict[str, Any]:
    """Attributes of a group or dataset; unreadable ones are replaced by a text."""
    found = {}
    for name in item.attrs:
        if name in _OF_HDF5:
            continue
        try:
            safe = is_safe(item.attrs.get_id(name).dtype)
            found[name] = item.attrs[name] if safe else NOT_READ
        except (OSError, TypeError, ValueError):
            found[name] = "not readable"
    return found


def is_safe(dtype: np.dtype) -> bool:
    """Whether h5py reads values of this type without taking bytes of the file for addresses of Python objects.

    It does not for opaque values with the tag ``NUMPY:|O``; texts, references and variable-length lists are safe.

    Examples
    --------
    >>> import h5py
    >>> [is_safe(np.dtype(kind)) for kind in ("f4", "f4, S3", "O", "i2, O", h5py.string_dtype())]
    [True, True, False, False, True]
    """
    import h5py

    if dtype.subdtype is not None:
        return is_safe(dtype.base)
    if dtype.fields is not None:
        return all(is_safe(field[0]) for field in dtype.fields.values())
    if dtype.kind != "O":
        return True
    lists = h5py.check_vlen_dtype(dtype)
    if lists is not None:
        return is_safe(np.dtype(lists))
    return h5py.check_string_dtype(dtype) is not None or h5py.check_ref_dtype(dtype) is not None


def member(group: Any, path: str, kind: type) -> Any:
    """The group or dataset at a path below a group; None if it is missing, behind a link, or of another kind."""
    import h5py

    for name in path.split("/"):
        if not isinstance(group, h5py.Group):
            return None
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            return None
        group = group[name]
    return group if isinstance(group, kind) else None


def tree_of(group: Any, level: int = 0, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A group of metadata as nested dictionaries, the inverse of `stem_dask.core.metadata.hdf5_tree`.

    Large arrays and members named in ``without`` are not read.
    """
    import h5py

    tree = {plain_name(name): plain_value(value) for name, value in attributes_of(group).items()}
    for name in group:
        # h5py cannot look up links whose names are not UTF-8 (bytes)
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
            left = f"{n:,} values, left in the input file" if is_safe(item.dtype) else NOT_READ
            tree[plain_name(name)] = _stored(item) if short and left != NOT_READ else left
    return tree


def _stored(dataset: Any) -> Any:
    """The numbers or the text of a small dataset."""
    return _decoded(np.asarray(dataset[...]).tolist())


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def plain_name(name: str) -> str:
    """A name without RosettaSciIO's marks of lists, and with slashes, which HDF5 names cannot contain."""
    for mark in ("_list_empty_", "_tuple_empty_", "_list_", "_tuple_"):
        name = name.removeprefix(mark)
    if name.startswith("(") and name.endswith(")") and name[1:2] in ("_", ")", "."):
        name = name[1:-1]
    return name.replace("∕", "/")


def plain_value(value: Any) -> Any:
    """An attribute before `stem_dask.core.metadata.hdf5_tree`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and value == "_None_":
        return None
    if isinstance(value, str) and value.startswith("["):  # lists of texts are JSON
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


# --- names and scales of axes (h5py's ``dims`` crashes the process if these attributes are damaged) ---


def labels(data: Any) -> tuple[str, ...]:
    """The name of each axis of a dataset, or "".

    Examples
    --------
    >>> import h5py
    >>> with h5py.File("of.h5", "w", driver="core", backing_store=False) as file:
    ...     data = file.create_dataset("scan", (2, 3), "u2")
    ...     data.dims[1].label = "kx"
    ...     labels(data)
    ('', 'kx')
    """
    stored = _one_an_axis(data, "DIMENSION_LABELS")
    if stored is None or not all(isinstance(text, (str, bytes)) for text in stored):
        return ("",) * data.ndim
    return tuple(text_of(text) for text in stored)


def names_of(data: Any, *attrs: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of axes by HDF5's labels, or by the attribute ``axes`` of NeXus in ``attrs`` of the dataset and its group."""
    if any(found := labels(data)):
        return found
    for attributes in attrs:
        axes = attributes.get("axes")
        if isinstance(axes, np.ndarray) and axes.shape == (data.ndim,):
            return tuple(text_of(name) for name in axes)
    return ("",) * data.ndim


def first_scale(data: Any, i: int) -> Any:
    """The first dimension scale of axis ``i``; None if it is missing or not a dataset."""
    import h5py

    stored = _one_an_axis(data, "DIMENSION_LIST")
    if stored is None or h5py.check_vlen_dtype(stored.dtype) != h5py.ref_dtype:
        return None
    try:
        scale = data.file[stored[i][0]] if len(stored[i]) else None
    except (OSError, RuntimeError, TypeError, ValueError, KeyError):
        return None
    return scale if isinstance(scale, h5py.Dataset) else None


def _one_an_axis(data: Any, name: str) -> Any:
    """An attribute with one value per axis; None if it is missing, of another shape, or unreadable."""
    try:
        if name not in data.attrs:
            return None
        stored = data.attrs.get_id(name)
        if stored.shape != (data.ndim,) or not is_safe(stored.dtype):
            return None
        return data.attrs[name]
    except (OSError, RuntimeError, TypeError, ValueError, KeyError):
        return None
