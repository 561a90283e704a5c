"""What belongs to the dataset ``patterns`` of a plain HDF5 file (.h5), so that any tool understands it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stem_dask.io.hdf5 import refuse_full_disk
from stem_dask.io.metadata import hdf5_tree
from stem_dask.io.publish import naming
from stem_dask.io.store import ABOUT_SOURCE
from stem_dask.io.zarr3 import plain

if TYPE_CHECKING:
    import xarray as xr

#: HDF5 refuses attributes of 64 kB; longer ones become datasets
_LONGEST_ATTRIBUTE = 2**15


@naming
def write_about(
    path: str,
    patterns: xr.DataArray,
    analysis: xr.Dataset | None,
    about: Mapping[str, Any],
) -> None:
    """Write axes as dimension scales, ``valid``, the analysis and the attributes beside the patterns.

    Parameters
    ----------
    path : the file, which holds the dataset ``patterns``
    patterns : their axes, attributes, and the coordinate ``valid`` where there is one
    analysis : small arrays for the group ``analysis``, or None
    about : attributes of the root beside those that tell of the source, which are among those of the patterns
    """
    import h5py

    known = {} if analysis is None else analysis.variables
    refuse_full_disk(path, sum(variable.nbytes for variable in known.values()))
    source = {key: patterns.attrs[key] for key in ABOUT_SOURCE if key in patterns.attrs}
    own = {key: value for key, value in patterns.attrs.items() if key not in source}
    with h5py.File(path, "r+", locking=False) as file:
        _write_tree(file, hdf5_tree(plain({**about, **source})))
        data = file["patterns"]
        _write_tree(data, hdf5_tree(plain(own)))
        for dim in map(str, patterns.dims):
            scale = _write_array(file, dim, patterns.coords[dim].variable)
            scale.make_scale(dim)
        _name_axes(file, data, patterns.dims)
        if "valid" in patterns.coords:
            variable = patterns.coords["valid"].variable
            _name_axes(file, _write_array(file, "valid", variable), variable.dims)
        group = None if analysis is None else file.create_group("analysis")
        for name, variable in known.items():
            if variable.dtype.kind in "biuf":
                dims = variable.dims
                _name_axes(file, _write_array(group, str(name), variable), dims)
            else:
                _write_tree(group, hdf5_tree(plain({str(name): variable.values})))
        if analysis is not None:
            _write_tree(group, hdf5_tree(plain(analysis.attrs)))


def _write_array(group: Any, name: str, variable: xr.Variable) -> Any:
    """A small array with its attributes."""
    packed: dict[str, Any] = {"compression": "gzip", "shuffle": True} if variable.ndim else {}
    dataset = group.create_dataset(name, data=np.asarray(variable.values), **packed)
    _write_tree(dataset, hdf5_tree(plain(variable.attrs)))
    return dataset


def _name_axes(file: Any, dataset: Any, dims: Any) -> None:
    """Name the axes of a dataset, and attach the scales that the file has for them."""
    for i, dim in enumerate(map(str, dims)):
        dataset.dims[i].label = dim
        if dim in file and dataset.shape[i] == file[dim].shape[0]:
            dataset.dims[i].attach_scale(file[dim])


def _write_tree(item: Any, tree: Mapping[str, Any]) -> None:
    """Plain values as attributes; of a group also nested dictionaries as groups, and what is long as datasets."""
    import h5py

    group = item if isinstance(item, h5py.Group) else None
    for key, value in tree.items():
        if isinstance(value, Mapping) and group is not None:
            _write_tree(group.require_group(key), value)
            continue
        value = json.dumps(value) if isinstance(value, Mapping) else value
        value = "_None_" if value is None else value  # as HyperSpy writes it
        if group is not None and (np.size(value) > 1 or _is_long(value)):
            group.create_dataset(key, data=value)
        else:
            item.attrs[key] = value


def _is_long(value: Any) -> bool:
    return isinstance(value, str) and len(value.encode()) > _LONGEST_ATTRIBUTE
