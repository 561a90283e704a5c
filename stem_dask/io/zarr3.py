"""Groups and arrays of a zarr store of format 3, written as the files that they are: JSON documents and encoded chunks.

zarr itself reads them; writing some thirty small arrays through it takes half a second, for each goes through a thread of
its own several times. The documents are those that zarr 3.1 writes, which a test compares.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import StemDaskError
from stem_dask.io.codec import LEVELS, blosc_bytes, gzipped, shuffle_of
from stem_dask.io.objects import at
from stem_dask.io.publish import named, remove

#: what ``auto`` is here
CODEC = "lz4"
DOCUMENT = "zarr.json"


def group_document(attrs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a store says of a group."""
    return {"attributes": plain(attrs or {}), "zarr_format": 3, "node_type": "group"}


def array_document(
    shape: Sequence[int],
    dtype: np.dtype,
    dims: Sequence[str],
    chunks: Sequence[int],
    shards: Sequence[int] | None = None,
    *,
    codec: str = "auto",
    attrs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a store says of an array.

    Parameters
    ----------
    shape, dtype, dims : sizes, type and names of the axes
    chunks : extents of a chunk
    shards : extents of a file of chunks; None makes each chunk a file
    codec : one of `stem_dask.io.codec.CODECS`
    attrs : attributes of the array

    Examples
    --------
    >>> document = array_document((4, 6), np.dtype("u2"), ("y", "x"), (2, 6))
    >>> [codec["name"] for codec in document["codecs"]]
    ['bytes', 'blosc', 'crc32c']
    """
    codecs = _codecs(codec, dtype)
    if shards is not None:
        inner = {
            "chunk_shape": list(chunks),
            "codecs": codecs,
            "index_codecs": [_bytes_codec(np.dtype("u8")), {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": inner}]
    files = list(chunks if shards is None else shards)
    zero = {"f": 0.0, "b": False}.get(dtype.kind, 0)
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": files}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": zero,
        "codecs": codecs,
        "attributes": plain(attrs or {}),
        **({"dimension_names": list(dims)} if dims else {}),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _codecs(codec: str, dtype: np.dtype) -> list[dict[str, Any]]:
    """What `encoded` does; the checksum is last, so that it is of the bytes on the disk."""
    codec = CODEC if codec == "auto" else codec
    packing: list[dict[str, Any]] = []
    if codec == "gzip":
        packing = [{"name": "gzip", "configuration": {"level": LEVELS[codec]}}]
    elif codec != "none":
        blosc = {
            "typesize": dtype.itemsize,
            "cname": codec,
            "clevel": LEVELS[codec],
            "shuffle": shuffle_of(dtype),
            "blocksize": 0,
        }
        packing = [{"name": "blosc", "configuration": blosc}]
    return [_bytes_codec(dtype), *packing, {"name": "crc32c"}]


def _bytes_codec(dtype: np.dtype) -> dict[str, Any]:
    if dtype.itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def encoded(chunk: NDArray, codec: str = "auto") -> bytes:
    """One chunk through the codecs that its array tells readers of; equal chunks give equal bytes."""
    codec = CODEC if codec == "auto" else codec
    chunk = np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("<"))
    if codec == "none":
        return checked(chunk.tobytes())
    if codec == "gzip":
        return checked(gzipped(chunk.reshape(-1).view(np.uint8).data, LEVELS[codec]))
    return checked(blosc_bytes(chunk, codec, shuffle_of(chunk.dtype)))


def checked(content: bytes) -> bytes:
    """The bytes, and their CRC-32C.

    Examples
    --------
    >>> checked(b"123456789")[-4:].hex()  # 0xe3069283, the check value in the catalogue of CRCs
    '839206e3'
    """
    return content + int(google_crc32c.value(content)).to_bytes(4, "little")


def read_document(folder: str | Path) -> dict[str, Any] | None:
    """What a folder says of itself; None when it is no node of a store, or a torn one."""
    try:
        found = json.loads(at(folder, DOCUMENT).read_bytes())
    except StemDaskError:  # of an object store
        raise
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_document(
    folder: str | Path,
    document: Mapping[str, Any],
    indent: int | None = 2,
    name: str = DOCUMENT,
) -> None:
    """Make a folder a node of the store; an older document stays until the new one is whole."""
    path = Path(folder, name)
    partial = path.with_name(f"{name}.partial")
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(document, indent=indent, allow_nan=False))
        os.replace(partial, path)  # a run that goes on keeps its shards only below a whole one


def write_array(
    folder: str | Path,
    values: NDArray,
    dims: Sequence[str],
    chunks: Sequence[int] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Write a small array; what was there goes.

    Parameters
    ----------
    folder : of the array
    values : bool, integers or floats
    dims, chunks, attrs : see `array_document`; default one chunk
    """
    chunks = [max(1, n) for n in values.shape] if chunks is None else chunks
    remove(folder)
    write_document(folder, array_document(values.shape, values.dtype, dims, chunks, attrs=attrs))
    grid = [-(-n // size) for n, size in zip(values.shape, chunks, strict=True)]
    for place in np.ndindex(*grid):
        here = [slice(i * size, (i + 1) * size) for i, size in zip(place, chunks, strict=True)]
        write_chunk(folder, place, values[tuple(here)], chunks)


def write_chunk(
    folder: str | Path, place: Sequence[int], values: NDArray, chunks: Sequence[int]
) -> None:
    """Write one chunk of an array; at the end of an axis it is filled up with zeros."""
    path = Path(folder, chunk_name(place))
    with named(path):
        path.write_bytes(encoded(filled(values, chunks)))


def chunk_name(place: Sequence[int]) -> str:
    """Name of a chunk's file, within the folder of its array: a new folder takes longer to make than a file to write.

    Examples
    --------
    >>> chunk_name((3, 0)), chunk_name(())
    ('c.3.0', 'c')
    """
    return ".".join(["c", *map(str, place)])


def filled(values: NDArray, chunks: Sequence[int]) -> NDArray:
    """A whole chunk, of what there is of it at the end of an axis."""
    if values.shape == tuple(chunks):
        return values
    full = np.zeros(tuple(chunks), values.dtype)
    full[tuple(slice(0, n) for n in values.shape)] = values
    return full


def consolidate(path: str | Path) -> None:
    """Put the documents of all nodes into that of the root, so that a reader opens one file.

    Raises
    ------
    FileNotFoundError
        When the root is not there.
    """
    root = json.loads(Path(path, DOCUMENT).read_bytes())
    root.pop("consolidated_metadata", None)
    nodes = {}
    for name in _nodes(str(path)):
        document = read_document(os.path.join(path, name)) or {}
        if document.get("node_type") == "group":
            document["consolidated_metadata"] = _consolidated({})
        nodes[name] = document
    # on one line: it is long, and everything in it stands in its own place, too
    write_document(path, {**root, "consolidated_metadata": _consolidated(nodes)}, indent=None)


def _consolidated(nodes: Mapping[str, Any]) -> dict[str, Any]:
    by_depth = sorted(nodes, key=lambda name: (name.count("/"), name))
    return {
        "kind": "inline",
        "must_understand": False,
        "metadata": {name: nodes[name] for name in by_depth},
    }


def _nodes(path: str) -> list[str]:
    """Names of all nodes below a group; chunks are not looked at."""
    found = []
    for folder, folders, files in os.walk(path):
        document = read_document(folder) if DOCUMENT in files else None
        if document is not None and document.get("node_type") == "array":
            folders.clear()
        if document is not None and folder != path:
            found.append(os.path.relpath(folder, path).replace(os.sep, "/"))
    return found


def plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON can hold them: no numpy scalars, tuples as lists, NaN as text."""
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
