"""Attributes, small datasets and axis scales of HDF5 files; links are not followed."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from stem_dask.core.metadata import text_of

#: replaces values that h5py would turn into Python objects from bytes of the file
NOT_READ = "Python objects, which are never read"


def as_bytes(name: str) -> bytes:
    """A name as stored in the file; those that are not UTF-8 are escaped by ``surrogateescape``."""
    return name.encode("utf-8", "surrogateescape")


def attributes_of(item: Any) -> dict[str, Any]:
    """Attributes of a group or dataset; unreadable ones are replaced by a text."""
    of_scales = ("CLASS", "NAME", "DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST")
    found = {}
    for name in (one for one in item.attrs if one not in of_scales):
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
    if (lists := h5py.check_vlen_dtype(dtype)) is not None:
        return is_safe(np.dtype(lists))
    is_text, is_reference = h5py.check_string_dtype(dtype), h5py.check_ref_dtype(dtype)
    return dtype.kind != "O" or is_text is not None or is_reference is not None


def member(group: Any, path: str, kind: type) -> Any:
    """The group or dataset at a path below a group; None if it is missing, behind a link, or of another kind."""
    import h5py

    for name in path.split("/"):
        is_group = isinstance(group, h5py.Group)
        if not is_group or not isinstance(group.get(name, getlink=True), h5py.HardLink):
            return None
        group = group[name]
    return group if isinstance(group, kind) else None


def tree_of(group: Any, level: int = 0, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A group of metadata as nested dictionaries, the inverse of `stem_dask.core.metadata.hdf5_tree`.

    Large arrays and members named in ``without`` are not read.
    """
    import h5py

    tree = {plain_name(name): plain_value(value) for name, value in attributes_of(group).items()}
    # h5py cannot look up links whose names are not UTF-8 (bytes)
    for name in (one for one in group if isinstance(one, str) and one not in without):
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        item, key = group[name], plain_name(name)
        if isinstance(item, h5py.Group) and level < 12:
            tree[key] = tree_of(item, level + 1)
        elif isinstance(item, h5py.Dataset):
            n = item.size or 0
            if not is_safe(item.dtype):
                tree[key] = NOT_READ
            elif item.size is None or n > 4096 or n * item.dtype.itemsize > 1 << 20:
                tree[key] = f"{n:,} values, left in the input file"
            else:
                tree[key] = _decoded(np.asarray(item[...]).tolist())
    return tree


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
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str) and value.startswith("["):  # lists of texts are JSON
        try:
            return json.loads(value)
        except ValueError:
            return value
    return None if isinstance(value, str) and value == "_None_" else value


# --- names and scales of axes (h5py's ``dims`` crashes the process if these attributes are damaged) ---


def names_of(data: Any, *attrs: Mapping[str, Any]) -> tuple[str, ...]:
    """The name of each axis of a dataset, or "".

    From HDF5's labels, or from the attribute ``axes`` of NeXus in ``attrs`` of the dataset and its group.
    """
    labels = _one_an_axis(data, "DIMENSION_LABELS")
    if (
        labels is not None
        and all(isinstance(text, (str, bytes)) for text in labels)
        and any(labels)
    ):
        return tuple(text_of(text) for text in labels)
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
        stored = data.attrs.get_id(name) if name in data.attrs else None
        if stored is None or stored.shape != (data.ndim,) or not is_safe(stored.dtype):
            return None
        return data.attrs[name]
    except (OSError, RuntimeError, TypeError, ValueError, KeyError):
        return None
