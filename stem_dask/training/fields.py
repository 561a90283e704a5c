"""What is known of each pattern: from the analysis of a store, the dictionary of a .pt, the metadata of a .hspy, or a store beside the file."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError
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


def field_of(scan: Scan, field: str) -> NDArray:
    """A field of each position of a scan (scan_y, scan_x), or (scan_y, scan_x, 2) for pairs (y, x).

    Raises
    ------
    ConfigError
        When the file does not have it.
    """
    known = scan.analysis
    found = [known.get(name) for name in FIELDS[field]]
    if any(values is None for values in found):
        has = [name for name, parts in FIELDS.items() if all(part in known for part in parts)]
        raise ConfigError(
            f"{scan.path} has no field {field!r}; it has {', '.join(has)}. A store of stem-dask run has all of them"
        )
    arrays = [scan.by_position(values) for values in found]
    return arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=-1)


def analysis_of(path: str) -> dict[str, NDArray]:
    """Arrays by position of an own file, as far as it has any."""
    suffix = Path(path).suffix
    with contextlib.suppress(OSError, ValueError, KeyError):
        if suffix == ".pt":
            return _of_tensors(path)
        if suffix in (".hspy", ".h5", ".hdf5"):
            return _of_hdf5(path)
    return {}
