"""Metadata of input files as JSON of bounded size, and in the forms that HDF5 and netCDF can store."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: maximum bytes of JSON
LIMIT = 2**20

#: maximum elements of a list or characters of a text, tried in turn until the whole fits
_LONGEST = (4096, 256, 16)

#: prefixes with a meaning to readers of .hspy, or to zarr
_RESERVED = ("_sig_", "_list_", "_tuple_", "_bs_", "_datetime_", "_hspy_", "_ragged_shapes_", ".z")


def original(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as plain JSON of at most 1 MiB; long lists and texts are replaced by a description.

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
    """Without lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def hdf5_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `original` for HDF5: names without slashes, lists of numbers as arrays, other lists as JSON.

    Examples
    --------
    >>> hdf5_tree({"a/b": [1, "x"], "c": None})
    {'a∕b': '[1, "x"]', 'c': None}
    """
    return {hdf5_name(key): _value(value) for key, value in tree.items()}


def hdf5_name(key: str) -> str:
    """A valid HDF5 name without the marks of RosettaSciIO."""
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
    """Attributes for netCDF: dictionaries and lists of texts as JSON, without None.

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


def number(value: Any) -> float | None:
    """A finite number, or None; also from text, as in headers, and from arrays of one element, as in MATLAB."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def text_of(value: Any) -> str:
    """A text without lone surrogates and null characters.

    Examples
    --------
    >>> text_of("nm" + chr(0xDCFF)), text_of(b"1/nm"), text_of(3)
    ('nm?', '1/nm', '3')
    """
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return str(value).encode("utf-8", "replace").decode().replace("\0", "")


def whole(value: Any) -> int | None:
    """A positive integer, or None; also from text."""
    found = number(value)
    return int(found) if found is not None and found >= 1 and found == int(found) else None


def plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as plain JSON: no numpy scalars, tuples as lists, NaN as text."""
    return {str(key): _plain(value) for key, value in attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


@dataclass(frozen=True)
class ArrayTag:
    """An array that was not read.

    ``offset`` and ``n_bytes`` are in bytes, ``length`` in elements. ``codes`` are tag type codes: one for an array of
    numbers, one a field for an array of structs.
    """

    offset: int
    length: int
    codes: tuple[int, ...]
    n_bytes: int
