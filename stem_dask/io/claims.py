"""What a file of named arrays says it holds, compared with what is there: for sizes beyond all reason, and for links."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stem_dask.errors import SourceError
from stem_dask.io.candidate import by, number
from stem_dask.io.objects import ObjectPath, below
from stem_dask.io.sources import Source
from stem_dask.urls import is_url

#: no file is this large; chunks that were never written may make one say so
_MOST_BYTES = 10**14
#: nothing but one and the same number is stored in fewer bytes
_MOST_COMPRESSED = 10**5


def refuse_impossible(path: str, name: str, source: Source) -> None:
    """An array of more than 100 TB that has next to no bytes behind it would only end in a graph without end.

    Raises
    ------
    SourceError
        When more than 100,000 bytes are claimed for each one that is stored.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from stem_dask.io.sources import Hdf5Dataset
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     refuse_impossible("a.h5", "data", Hdf5Dataset(file.name, "data", np.dtype("u2"), (2, 3, 4, 5)))
    """
    said = math.prod(source.shape) * source.dtype.itemsize
    if said <= _MOST_BYTES:
        return
    stored = 0
    for n_bytes in _sizes(path):
        stored += n_bytes
        if stored * _MOST_COMPRESSED >= said:
            return
    raise SourceError(
        f"{path}: {name} claims {by(source.shape)} {source.dtype}, {said / 1e12:,.0f} TB, but {stored:,} bytes are "
        "stored; its sizes are damaged"
    )


def packed(path: str, name: str, attrs: Mapping[str, Any]) -> str:
    """Why numbers that stand for others (netCDF's ``scale_factor`` and ``add_offset``) are not read; empty where they do not.

    Examples
    --------
    >>> packed("a.h5", "data", {"scale_factor": 1.0, "add_offset": 0})
    ''
    """
    scale, offset = (
        value if (value := number(attrs.get(key))) is not None else without
        for key, without in (("scale_factor", 1.0), ("add_offset", 0.0))
    )
    if (scale, offset) == (1.0, 0.0):
        return ""
    return (
        f"{path}: the numbers of {name} are packed, value = {scale:g} * number + {offset:g} (attributes scale_factor and add_offset); "
        "save the values (with xarray: dataset.drop_encoding().to_zarr(PATH)), or take the attributes away where the numbers themselves are meant"
    )


def _sizes(path: str) -> Iterator[int]:
    """Bytes of a file, or of each file of a store."""
    if is_url(path):
        yield from (status.st_size for _, status in below(path))
        return
    if not os.path.isdir(path):
        yield os.stat(path).st_size
    for folder, _, names in os.walk(path):
        for name in names:
            yield os.lstat(os.path.join(folder, name)).st_size


def refuse_outside(store: str, path: Path | ObjectPath) -> None:
    """A link inside of a store must not lead out of it: what it points to was not written with the store.

    Raises
    ------
    SourceError
        When the path is, or lies behind, a link to another place.
    """
    if isinstance(path, ObjectPath):  # they know no links
        return
    real, home = os.path.realpath(path), os.path.realpath(store)
    if os.path.commonpath([real, home]) != home:
        raise SourceError(
            f"{store}: {path} leads out of the store, to {real}; put a copy in the link's place"
        )
