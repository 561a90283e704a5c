"""What HyperSpy's zarr stores say in attributes and small arrays, as nested dictionaries; links are not followed."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.readers.hdf5_metadata import plain_name, plain_value
from stem_dask.readers.source import side_text
from stem_dask.storage.errors import told
from stem_dask.storage.zarr_store import zarr_store

#: levels of groups, groups and arrays in all, and elements of an array that are kept
_MOST_LEVELS, _MOST_NODES, _MOST_ELEMENTS = 12, 2000, 4096


def attributes_of(store: str, name: str) -> dict[str, Any] | None:
    """Attributes of a group or an array; None when it is not there, or behind a link.

    Raises
    ------
    SourceError
        When they are damaged.
    """
    folder = Path(store)
    for part in Path(name).parts:
        folder = folder / part
        if folder.is_symlink() or not folder.is_dir():
            return None
    for file in (folder / ".zattrs", folder / "zarr.json"):
        if file.is_symlink() or not file.is_file():
            continue
        with told(f"{store}: the attributes in {file} cannot be read"):
            said = json.loads(side_text(str(file)))
            said = said.get("attributes", {}) if file.name == "zarr.json" else said
            return said if isinstance(said, dict) else {}
    return {}


def tree_of(store: str, name: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A group of metadata as nested dictionaries, in the form that it had before `stem_dask.core.metadata.hdf5_tree`.

    Large arrays are not read, nor what is called as in ``without``.
    """
    return _tree(store, name, 0, [_MOST_NODES], without)


def _tree(
    store: str, name: str, level: int, left: list[int], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    said = attributes_of(store, name)
    if said is None:
        return {}
    tree = {plain_name(key): plain_value(value) for key, value in said.items()}
    for folder in sorted(Path(store, name).iterdir()):
        left[0] -= 1
        if folder.is_symlink() or not folder.is_dir() or left[0] < 0 or folder.name in without:
            continue
        inner = f"{name}/{folder.name}"
        if (folder / ".zarray").is_file():
            tree[plain_name(folder.name)] = _stored(store, inner)
        elif (folder / ".zgroup").is_file() and level < _MOST_LEVELS:
            tree[plain_name(folder.name)] = _tree(store, inner, level + 1, left)
    return tree


def _stored(store: str, name: str) -> Any:
    """The numbers or texts of a small array; others are left in the file."""
    import zarr

    from stem_dask.storage.zarr_guard import HostileStoreError

    with told(f"{store}: {name} cannot be read"):
        try:
            array = zarr.open_array(zarr_store(store), path=name, mode="r")
        except HostileStoreError:
            raise
        except (
            SourceError
        ) as error:  # as HyperSpy writes lists of texts, and arrays of different lengths
            return f"left in the input file: {error}"
        n = math.prod(array.shape)
        if n > _MOST_ELEMENTS:
            return f"{n:,} values, left in the input file"
        return np.asarray(array[...]).tolist()
