"""What is known of each pattern: in the analysis of a store, in a .pt or an HDF5 file of stem_dask, or in a store beside the file."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError
from stem_dask.core.formats import HDF5_SUFFIXES
from stem_dask.readers.containers import hdf5_file
from stem_dask.readers.zarr_chunks import read_part
from stem_dask.storage.location import is_url
from stem_dask.storage.zarr_store import zarr_store
from stem_dask.training.reading import Scan

#: field -> arrays by position that it consists of
FIELDS: dict[str, tuple[str, ...]] = {
    "position": (),
    "dataset": (),
    "center": ("center_y", "center_x"),
    "center_out": ("center_out_y", "center_out_x"),
    "radius": ("radius",),
    "retention": ("retention",),
    "total": ("total",),
    "window": ("window_y", "window_x"),
}


def fields_of(scan: Scan, number: int, wanted: tuple[str, ...]) -> dict[str, NDArray]:
    """Fields of all positions of a scan, row by row: (n,), or (n, 2) for pairs (y, x); ``number`` is that of the file.

    Raises
    ------
    ConfigError
        When the file lacks one.
    """
    found: dict[str, NDArray] = {}
    known = analysis_of(scan.path) if any(FIELDS[field] for field in wanted) else {}
    y, x = (np.asarray(indices) for indices in (scan.y, scan.x))
    for field in wanted:
        missing = [name for name in FIELDS[field] if name not in known]
        if missing:
            has = [name for name, parts in FIELDS.items() if all(part in known for part in parts)]
            raise ConfigError(
                f"{scan.path} has no field {field!r}; it has {', '.join(has)}. A store of stem-dask run has all of them"
            )
        parts = [scan.by_position(known[name]).ravel() for name in FIELDS[field]]
        if field == "dataset":
            parts = [np.full(len(y) * len(x), number)]
        elif field == "position":
            parts = [np.repeat(y, len(x)), np.tile(x, len(y))]
        values = parts[0] if len(parts) == 1 else np.stack(parts, axis=-1)
        found[field] = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
    return found


def analysis_of(path: str) -> dict[str, NDArray]:
    """The arrays by position in or beside a file that stem_dask wrote; none for other files."""
    beside, names = f"{path}_analysis.zarr", {name for parts in FIELDS.values() for name in parts}
    if is_url(path) or Path(path).suffix == ".zarr":
        return stored_arrays(path, "analysis", names)
    if Path(beside).is_dir():
        return stored_arrays(beside, "analysis", names)
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        if Path(path).suffix == ".pt":
            import torch

            content = torch.load(path, weights_only=True, mmap=True)["analysis"]
            return {name: values.numpy() for name, values in content.items()}
        if Path(path).suffix in HDF5_SUFFIXES:
            with hdf5_file(path) as file:
                (signal,) = file["Experiments"].values()
                own = signal["metadata/stem_dask"]
                return {name: own[name][...] for name in own}
    return {}


def stored_arrays(store: str, group: str, names: set[str]) -> dict[str, NDArray]:
    """Those of some small arrays that a group of a zarr store has; SourceError when one is damaged or lacks its file."""
    import zarr

    try:
        found: Any = zarr.open_group(zarr_store(store), path=group, mode="r")
    except (OSError, ValueError, KeyError):  # there is no such group
        return {}
    arrays = {name: array for name, array in found.arrays() if name in names}
    return {
        name: read_part(store, f"{group}/{name}", [slice(None)] * array.ndim, zero=False)
        for name, array in arrays.items()
    }
