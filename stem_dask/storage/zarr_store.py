"""Stores that zarr and xarray open, in a folder or below a URL; zarr itself is imported when one is asked for."""

import warnings
from typing import Any

from stem_dask.storage.location import is_url


def zarr_store(path: str, *, whole: bool = False) -> Any:
    """A read-only store of a folder or of the objects below a URL, which refuses arrays that could run code.

    Parameters
    ----------
    whole : a missing chunk raises an error instead of reading as zeros (in object stores only)
    """
    from stem_dask.storage.zarr_guard import GuardedFolder, GuardedObjects, use_checked_blosc

    use_checked_blosc()
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
    if not is_url(path):
        return GuardedFolder(path, read_only=True)
    return GuardedObjects(path, whole=whole)
