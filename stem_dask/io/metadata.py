"""The file's own metadata, bounded and as plain JSON; and in the form that an HDF5 file can hold."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from stem_dask.io.dm import ArrayTag
from stem_dask.io.zarr3 import plain

#: bytes of JSON that are kept at most
LIMIT = 2**20
#: elements of a list, or characters of a text, that are kept at most: fewer when the whole is too large
_LONGEST = (4096, 256, 16)
#: names that mean something to the reader of a .hspy, or to zarr
_RESERVED = ("_sig_", "_list_", "_tuple_", "_bs_", "_datetime_", "_hspy_", "_ragged_shapes_", ".z")


def original(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as plain JSON of at most 1 MiB: what is long is described, and shorter things when that does not do.

    Examples
    --------
    >>> original({"Voltage": np.float32(2e5), "Curve": list(range(5000))})
    {'Voltage': 200000.0, 'Curve': '5,000 values, left in the input file'}
    """
    for longest in _LONGEST:
        tree: dict[str, Any] = plain(_described(metadata, longest))
        size = len(json.dumps(tree))
        if size <= LIMIT:
            return tree
    return {"left out": f"{size:,} bytes of metadata, more than {LIMIT:,}, left in the input file"}


def _described(value: Any, longest: int) -> Any:
    if isinstance(value, Mapping):
        return {_text(str(key)): _described(item, longest) for key, item in value.items()}
    if isinstance(value, ArrayTag):
        return f"{value.length:,} values, left in the input file"
    if isinstance(value, np.ndarray):
        if value.size > longest:
            return f"{value.size:,} values, left in the input file"
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        if len(value) > longest:
            return f"{len(value):,} values, left in the input file"
        return [_described(item, longest) for item in value]
    if isinstance(value, str):
        if len(value) > longest:
            return f"{len(value):,} characters, left in the input file"
        return _text(value)
    return value


def _text(text: str) -> str:
    """Without lone surrogates, which no UTF-8 file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def hdf5_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `original` for an HDF5 file: names without slashes, lists of numbers as arrays, others as JSON.

    Examples
    --------
    >>> hdf5_tree({"a/b": [1, "x"], "c": None})
    {'a∕b': '[1, "x"]', 'c': None}
    """
    return {hdf5_name(key): _value(value) for key, value in tree.items()}


def hdf5_name(key: str) -> str:
    """A name that a group, a dataset or an attribute can have, and RosettaSciIO takes for no mark of its own."""
    name = key.replace("/", "∕").replace("\0", "")
    return f"({name})" if name in ("", ".", "..") or name.startswith(_RESERVED) else name


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return hdf5_tree(value)
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if not isinstance(value, list):
        return value
    try:
        array = np.array(value)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    return array if array.dtype.kind in "biuf" and value else json.dumps(value, ensure_ascii=False)


def as_text(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that a netCDF file can hold: dictionaries and lists of texts as JSON, and none that are None.

    Examples
    --------
    >>> as_text({"given": {"beam_energy_kv": 200.0}, "global_radius": None, "window_size": [8, 8], "cropped_axes": ["ky"]})
    {'given': '{"beam_energy_kv": 200.0}', 'window_size': [8, 8], 'cropped_axes': '["ky"]'}
    """
    return {
        name: json.dumps(value, ensure_ascii=False) if _is_tree(value) else value
        for name, value in plain(attrs).items()
        if value is not None
    }


def from_text(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes before `as_text`.

    Examples
    --------
    >>> from_text({"given": '{"beam_energy_kv": 200.0}', "cropped_axes": '["ky"]', "title": "[gold]"})
    {'given': {'beam_energy_kv': 200.0}, 'cropped_axes': ['ky'], 'title': '[gold]'}
    """
    found = dict(attrs)
    for name, value in attrs.items():
        if isinstance(value, str) and value[:1] in ("{", "["):
            with contextlib.suppress(ValueError):
                found[name] = json.loads(value)
    return found


def _is_tree(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return not value or not all(isinstance(item, (int, float, np.number)) for item in value)
    return isinstance(value, Mapping)
