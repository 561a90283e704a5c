"""Objects in a store that speaks S3: the only module that knows the protocol's library (obstore), and what its errors mean.

Nothing that the library says reaches a message as it is: its texts hold addresses, keys' names and answers of the server.
"""

from typing import Any

from stem_dask.storage.urls import is_url


def zarr_store(path: str, *, whole: bool = False) -> Any:
    """What zarr and xarray open: a reader of a folder or of the objects below a URL, which refuses arrays that could run code.

    Parameters
    ----------
    whole : chunks that are not there are an error of ours, and not zeros (in object stores only)
    """
    from stem_dask.storage.zarr_blosc import use
    from stem_dask.storage.zarr_guard import GuardedFolder

    use()
    if not is_url(path):
        return GuardedFolder(path, read_only=True)
    from stem_dask.storage.zarr_objects import ObjectsBelow

    return ObjectsBelow(path, whole=whole)
