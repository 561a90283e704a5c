"""Names and scales of the axes of an HDF5 dataset, read as the attributes that they are.

HDF5's own functions for them (h5py's ``dims``) believe whatever size and type these attributes have, and end the process where
they are damaged, or were written by hand.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stem_dask.core.metadata import text_of
from stem_dask.readers.hdf5_metadata import is_safe


def labels(data: Any) -> tuple[str, ...]:
    """The name of each axis of a dataset; "" for one without.

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


def names_of(data: Any, *said: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of axes that need no scales: HDF5's labels, or the attribute ``axes`` of NeXus.

    ``said`` are the attributes of the dataset, then those of its group.
    """
    if any(found := labels(data)):
        return found
    for attributes in said:
        axes = attributes.get("axes")
        if isinstance(axes, np.ndarray) and axes.shape == (data.ndim,):
            return tuple(text_of(name) for name in axes)
    return ("",) * data.ndim


def first_scale(data: Any, i: int) -> Any:
    """The first scale of axis ``i``, a dataset; None when there is none, or a reference that leads nowhere."""
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
    """An attribute that has one value for each axis; None when it is not there, of another shape, or cannot be read."""
    try:
        if name not in data.attrs:
            return None
        stored = data.attrs.get_id(name)
        if stored.shape != (data.ndim,) or not is_safe(stored.dtype):
            return None
        return data.attrs[name]
    except (OSError, RuntimeError, TypeError, ValueError, KeyError):
        return None
