"""Groups and arrays of a zarr store of format 2, written as the files that they are; for the reason see `stem_dask.io.zarr3`.

The documents are those that zarr 3.1 writes, which a test compares.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.io.codec import LEVELS, blosc_bytes, gzipped, shuffle_of
from stem_dask.io.publish import named, remove
from stem_dask.io.zarr3 import plain, write_document

#: what ``auto`` is here
CODEC = "lz4"
GROUP, ARRAY, ATTRIBUTES = ".zgroup", ".zarray", ".zattrs"


def write_group(folder: str | Path, attrs: Mapping[str, Any] | None = None) -> None:
    """Make a folder a group of the store; its attributes become these, where any are given."""
    if attrs:
        write_document(folder, plain(attrs), name=ATTRIBUTES)
    write_document(folder, {"zarr_format": 2}, name=GROUP)


def array_document(
    shape: Sequence[int], dtype: np.dtype, chunks: Sequence[int], codec: str = "auto"
) -> dict[str, Any]:
    """What a store says of an array, whose chunks are files in a folder for each axis but the last.

    Parameters
    ----------
    shape, dtype : sizes and type: bool, integers, floats or complex
    chunks : extents of a chunk
    codec : one of `stem_dask.io.codec.CODECS`

    Examples
    --------
    >>> document = array_document((4, 6), np.dtype("u2"), (2, 6))
    >>> document["dtype"], document["compressor"]["cname"], document["fill_value"]
    ('<u2', 'lz4', 0)
    """
    dtype = dtype.newbyteorder("<")
    fill = plain({"fill": np.zeros((), dtype)[()]})["fill"]
    return {
        "shape": list(shape),
        "chunks": [max(1, n) for n in chunks],
        "dtype": dtype.str,
        "fill_value": [0.0, 0.0] if dtype.kind == "c" else fill,
        "order": "C",
        "filters": None,
        "dimension_separator": "/",
        "compressor": _compressor(codec, dtype),
        "zarr_format": 2,
    }


def _compressor(codec: str, dtype: np.dtype) -> dict[str, Any] | None:
    codec = CODEC if codec == "auto" else codec
    if codec == "none":
        return None
    if codec == "gzip":
        return {"id": "gzip", "level": LEVELS[codec]}
    shuffle = {"bitshuffle": 2, "shuffle": 1}[shuffle_of(dtype)]
    how = {"clevel": LEVELS[codec], "shuffle": shuffle, "blocksize": 0}
    return {"id": "blosc", "cname": codec, **how}


def packed(chunk: NDArray, codec: str = "auto") -> bytes:
    """The bytes of a chunk file: always the same for the same numbers, while numcodecs' gzip writes the time."""
    codec = CODEC if codec == "auto" else codec
    chunk = np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("<"))
    if codec == "none":
        return chunk.tobytes()
    if codec == "gzip":
        return gzipped(chunk.reshape(-1).view(np.uint8).data, LEVELS[codec])
    return blosc_bytes(chunk, codec, shuffle_of(chunk.dtype))


def write_array(folder: str | Path, values: NDArray) -> None:
    """Write a small array, as one chunk; what was there goes."""
    remove(folder)
    write_document(folder, array_document(values.shape, values.dtype, values.shape), name=ARRAY)
    if values.size == 0:
        return
    path = Path(folder, *("0" for _ in values.shape[1:]), "0")
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(values))
