"""The zarr store: zarr 3, whole patterns in inner chunks, one shard per block, checksums, named dimensions.

Layout of a shard (codec ``sharding_indexed``): the encoded chunks, then offset and length of each chunk of the grid as uint64 (all bits
set if there is none), then the CRC-32C of that index. zarr's own writer gives the same bytes, but holds the shard in memory
three times, and its tasks share one thread of the process.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, of_type
from stem_dask.core.chunks import INNER_CHUNK_BYTES, MIB, inner_chunk, shard_shape
from stem_dask.core.errors import StoreError
from stem_dask.core.metadata import NAMES, to_json
from stem_dask.core.model import Record, Region
from stem_dask.core.patterns import PROFILE_RADIUS, attrs_of, blocks_of, lead_shape
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import (
    DOCUMENT,
    begin_sync,
    damage,
    read_document,
    remove,
    write_document,
)
from stem_dask.storage.staging import (
    append,
    begin_staging,
    mark,
    refuse_other_files,
    remove_unfinished,
    staged,
)
from stem_dask.storage.zarr_store import zarr_store
from stem_dask.writers.codecs import CODEC, LEVELS, checked, encoded, shuffle_of, whole_chunks

if TYPE_CHECKING:
    import xarray as xr

#: positions per chunk of the small arrays
_POSITIONS = 2**20

#: largest shard of the profiles: uncompressed bytes, and chunks; several whole ones are uploaded to an object store at once
PROFILE_FILE_BYTES, PROFILE_FILE_CHUNKS = 16 * MIB, 256


def store_chunks(
    patterns: xr.DataArray, rechunk: bool = True, most_bytes: int = INNER_CHUNK_BYTES
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(inner chunk, shard) of the output, for lazy patterns whose blocks become one shard each.

    With ``rechunk`` an inner chunk is whole patterns of up to ``most_bytes``, otherwise the whole block.

    Raises
    ------
    StoreError
        When the blocks are not regular.
    """
    data = blocks_of(patterns)
    n_lead = data.ndim - 2
    for dim, chunks in zip(patterns.dims[:n_lead], data.chunks[:n_lead], strict=True):
        if len(set(chunks[:-1])) > 1 or chunks[-1] > chunks[0]:
            raise StoreError(
                f"the blocks along {dim} are {chunks}; a store needs equal blocks (the last may be smaller): "
                f"rechunk, for example patterns.chunk({dim}={chunks[0]})"
            )
    lead = tuple(chunks[0] for chunks in data.chunks[:n_lead])
    detector = data.shape[-2:]
    pattern_bytes = int(np.prod(detector)) * data.dtype.itemsize
    inner = lead
    if rechunk:
        inner = inner_chunk(lead, lead_shape(patterns), pattern_bytes, most_bytes)
    return (*inner, *detector), (*shard_shape(lead, inner), *detector)


@dataclass(frozen=True)
class StoreSink:
    """Writes the block ``patterns`` to its shard of an array."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    inner: tuple[int, ...]
    shards: tuple[int, ...]
    codec: str = "auto"
    #: staging folder of this start
    stage: list[str] = field(default_factory=list, compare=False, kw_only=True)

    def create(self, *, resume: bool) -> None:
        """Create the group and the empty array, unless an interrupted run left the same."""
        if not (resume and self._is_begun()):
            remove(self.path)
            write_document(self.path, group_document())
            write_document(self._folder, self._document)
        self.stage[:] = [begin_staging(self.path)]

    @property
    def _folder(self) -> Path:
        return Path(self.path, "patterns")

    @property
    def _document(self) -> dict[str, Any]:
        dtype = np.dtype(self.dtype).newbyteorder("=")
        return array_document(
            self.shape, dtype, self.dims, self.inner, self.shards, codec=self.codec
        )

    def _is_begun(self) -> bool:
        """Whether the array exists with the same shape, chunks and codec."""
        return {**(read_document(self._folder) or {}), "attributes": {}} == self._document

    def write(
        self, index: int, region: Region, blocks: Mapping[str, NDArray | Block]
    ) -> dict[str, Any]:
        """Write one shard."""
        name = self._shard(region)
        block = of_type(blocks["patterns"], np.dtype(self.dtype))
        shard = Path(self.path, name)
        options = (self.inner, self.shards, self.codec, self.stage[0])
        crc, n_bytes = write_shard(shard, block, region, *options)
        return {"shard": name, "crc": crc, "bytes": n_bytes}

    def verify(self, record: Record) -> str | None:
        """Compare the shard with the checksum in the record."""
        extra = record.extra
        shard = os.path.join(self.path, str(extra.get("shard")))
        return damage(shard, (extra.get("crc"), extra.get("bytes")))

    def _shard(self, region: Region) -> str:
        """Name of the shard of a region, relative to the store."""
        place = [part.start // size for part, size in zip(region, self.shards, strict=False)]
        inside = [0] * (len(self.shape) - len(region))
        return os.path.join("patterns", chunk_name([*place, *inside]))

    def finish(self, records: Sequence[Record]) -> None:
        """Compare every shard with its record; `finish_store` completes the store."""
        remove_unfinished(self.path)
        found = (record.extra for record in records)
        refuse_other_files(
            (os.path.join(self.path, extra["shard"]), extra["crc"], extra["bytes"])
            for extra in found
        )


#: offset and length of a chunk that is not in the shard
_MISSING = 2**64 - 1


def write_shard(
    path: Path,
    block: NDArray | Block,
    region: Region,
    chunks: Sequence[int],
    shard: Sequence[int],
    codec: str,
    stage: str | None = None,
) -> tuple[int, int]:
    """Write one block as one shard, under a temporary name that is then renamed.

    Parameters
    ----------
    path : of the shard
    block : (…, ky, kx)
    region : of the block along the leading axes; it begins on the shard
    chunks, shard : shape of an inner chunk and of the shard
    codec : one of `stem_dask.writers.codecs.CODECS`
    stage : staging folder, see `stem_dask.storage.staging`; default the folder of the shard

    Returns
    -------
    CRC-32 and length of the file
    """
    if stage is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    crc = n_bytes = 0
    with staged(path, stage or path.parent) as file:
        for content in shard_pieces(block, region, chunks, shard, codec):
            crc, n_bytes = append(file, content, crc), n_bytes + len(content)
        begin_sync(file)
        mark(file, crc)
    return crc, n_bytes


def shard_pieces(
    block: NDArray | Block,
    region: Region,
    chunks: Sequence[int],
    shard: Sequence[int],
    codec: str,
) -> Iterator[bytes]:
    """Yield the bytes of a shard: its encoded chunks, then the index; see `write_shard`."""
    counts = [whole // part for whole, part in zip(shard, chunks, strict=True)][: len(region)]
    strides = [prod(counts[i + 1 :]) for i in range(len(counts))]
    first, step = [part.start for part in region], chunks[: len(region)]

    def placed() -> Iterator[tuple[int, NDArray]]:
        for origin, chunk in whole_chunks(block, region, chunks):
            inside = zip(origin, first, step, strides, strict=False)
            yield sum((at - start) // size * n for at, start, size, n in inside), chunk

    return indexed(placed(), prod(counts), codec)


def indexed(
    chunks: Iterable[tuple[int, NDArray]], n_chunks: int, codec: str = "auto"
) -> Iterator[bytes]:
    """Yield the bytes of a shard from (number in the grid of the shard, chunk), then the index."""
    places = np.full((n_chunks, 2), _MISSING, "<u8")
    n_bytes = 0
    for place, chunk in chunks:
        content = encoded(chunk, codec)
        places[place] = n_bytes, len(content)
        n_bytes += len(content)
        yield content
    yield checked(places.tobytes())


def write_coordinates(path: str, patterns: xr.DataArray) -> None:
    """Write the axes of the patterns as arrays of the root group."""
    for dim in patterns.dims:
        values = patterns.coords[dim]
        write_array(Path(path, str(dim)), values.values, (str(dim),), attrs=values.attrs)


def open_group(store: str, name: str = "") -> xr.Dataset:
    """Open a group of a store lazily, without decoding times and scales from attributes (CF)."""
    import pandas as pd
    import xarray as xr

    plainly: dict[str, Any] = {"chunks": None, "decode_cf": False, "create_default_indexes": False}
    found = xr.open_zarr(zarr_store(store), group=name or None, **plainly)
    if "radius" in found.sizes:  # the dimension of the profiles in earlier versions
        found = found.rename_dims(radius=PROFILE_RADIUS)
        found = found.assign_coords({PROFILE_RADIUS: pd.RangeIndex(found.sizes[PROFILE_RADIUS])})
    # as indexes, because for arrays xarray imports pint and cupy to check their type
    axes = {
        dim: (dim, pd.Index(found[dim].values), found[dim].attrs)
        for dim in found.sizes
        if dim in found.variables and found[dim].dims == (dim,)
    }
    return found.assign_coords(axes)


def write_dataset(path: str, name: str, dataset: xr.Dataset) -> None:
    """Write a dataset of small arrays as a group; arrays of text become attributes."""
    attrs = dict(dataset.attrs)
    for key, variable in dataset.variables.items():
        values = np.asarray(variable.values)
        if values.dtype.kind in "UO":
            attrs[str(key)] = values.astype(str).tolist()
            continue
        dims = [str(dim) for dim in variable.dims]
        write_array(Path(path, name, str(key)), values, dims, attrs=variable.attrs)
    write_document(Path(path, name), group_document(attrs))


def write_profiles(
    path: str,
    blocks: Iterable[tuple[Region, Mapping[str, NDArray]]],
    dims: Sequence[str],
    lead: Sequence[int],
    chunk: Sequence[int],
) -> None:
    """Write the retention profiles into the group ``analysis`` block by block, because they may exceed memory.

    A block is a chunk, and rows of chunks share a shard, so that a terabyte does not make thousands of files.

    Parameters
    ----------
    blocks : region along the leading axes, and ``profile`` (…, profile_radius), of each chunk, in C order of the grid
    dims, lead : names of the axes, and sizes of the leading ones
    chunk : positions of a block
    """
    folder = Path(path, "analysis", "profile")
    remove(folder)
    grid = [-(-n // size) for n, size in zip(lead, chunk, strict=True)]

    def numbered() -> Iterator[tuple[int, NDArray]]:
        for region, block in blocks:
            place = [part.start // size for part, size in zip(region, chunk, strict=True)]
            yield int(np.ravel_multi_index(place, grid)), block["profile"]

    chunks = numbered()
    first = next(chunks, None)
    if first is None:
        return
    n, dtype = first[1].shape[-1], first[1].dtype
    whole = (*chunk, n)
    in_row = prod(grid[1:])
    row_bytes = in_row * prod(whole) * dtype.itemsize
    rows = min(grid[0], max(1, min(PROFILE_FILE_BYTES // row_bytes, PROFILE_FILE_CHUNKS // in_row)))
    shard = [k * size for k, size in zip((rows, *grid[1:]), chunk, strict=True)]
    document = array_document(
        (*lead, n), dtype, dims, whole, (*shard, n), attrs=attrs_of("profile")
    )
    write_document(folder, document)
    together = rows * in_row
    for i, part in itertools.groupby(itertools.chain([first], chunks), lambda c: c[0] // together):
        file = Path(folder, chunk_name([i, *[0] * len(lead)]))
        placed = ((index % together, filled(values, whole)) for index, values in part)
        with translate(StoreError, file), open(file, "wb") as out:
            out.writelines(indexed(placed, together))


#: attributes about the microscope and the measurement; a store has them at its root
ABOUT_SOURCE = (*NAMES, "given", "metadata", "original_metadata")


def empty_store(path: str) -> None:
    """Create an empty group in place of anything that exists."""
    remove(path)
    write_document(path, group_document())


def finish_store(
    path: str, attrs: Mapping[str, Any], patterns_attrs: Mapping[str, Any] | None
) -> None:
    """Write the attributes of the root and of the patterns, if there are any, and consolidate the metadata."""
    about = {}
    if patterns_attrs is not None:
        about = {key: patterns_attrs[key] for key in ABOUT_SOURCE if key in patterns_attrs}
        rest = {key: value for key, value in patterns_attrs.items() if key not in about}
        folder = Path(path, "patterns")
        document = json.loads((folder / DOCUMENT).read_bytes())
        document["attributes"] |= to_json(rest)
        write_document(folder, document)
    write_document(path, group_document({**attrs, **about}))
    consolidate(path)


def group_document(attrs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The zarr.json of a group."""
    return {"attributes": to_json(attrs or {}), "zarr_format": 3, "node_type": "group"}


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
    """The zarr.json of an array.

    Parameters
    ----------
    shape, dtype, dims : of the array
    chunks : shape of a chunk
    shards : shape of a shard; None makes each chunk a file
    codec : one of `stem_dask.writers.codecs.CODECS`
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
        "attributes": to_json(attrs or {}),
        **({"dimension_names": list(dims)} if dims else {}),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _codecs(codec: str, dtype: np.dtype) -> list[dict[str, Any]]:
    """The codecs of `stem_dask.writers.codecs.encoded`."""
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


def write_array(
    folder: str | Path,
    values: NDArray,
    dims: Sequence[str],
    chunks: Sequence[int] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Write a small array in place of anything that exists.

    Parameters
    ----------
    folder : of the array
    values : bool, integers or floats
    dims, chunks, attrs : see `array_document`; by default chunks of up to 2**20 positions along each axis
    """
    if chunks is None:
        chunks = [max(1, min(n, _POSITIONS)) for n in values.shape]
    remove(folder)
    write_document(folder, array_document(values.shape, values.dtype, dims, chunks, attrs=attrs))
    grid = [-(-n // size) for n, size in zip(values.shape, chunks, strict=True)]
    for place in np.ndindex(*grid):
        here = [slice(i * size, (i + 1) * size) for i, size in zip(place, chunks, strict=True)]
        path = Path(folder, chunk_name(place))
        with translate(StoreError, path):
            path.write_bytes(encoded(filled(values[tuple(here)], chunks)))


def chunk_name(place: Sequence[int]) -> str:
    """File name of a chunk; the separator is a dot, because creating folders is slower than writing small files.

    Examples
    --------
    >>> chunk_name((3, 0)), chunk_name(())
    ('c.3.0', 'c')
    """
    return ".".join(["c", *map(str, place)])


def filled(values: NDArray, chunks: Sequence[int]) -> NDArray:
    """Pad a chunk at the end of an axis with zeros."""
    if values.shape == tuple(chunks):
        return values
    full = np.zeros(tuple(chunks), values.dtype)
    full[tuple(slice(0, n) for n in values.shape)] = values
    return full


def consolidate(path: str | Path) -> None:
    """Copy the metadata of all nodes into the zarr.json of the root, so that readers open one file."""
    root = json.loads(Path(path, DOCUMENT).read_bytes())
    root.pop("consolidated_metadata", None)
    nodes = {}
    for name in _nodes(str(path)):
        document = read_document(os.path.join(path, name)) or {}
        if document.get("node_type") == "group":
            document["consolidated_metadata"] = _consolidated({})
        nodes[name] = document
    # on one line, because it is long and repeats the documents of the nodes
    write_document(path, {**root, "consolidated_metadata": _consolidated(nodes)}, indent=None)


def _consolidated(nodes: Mapping[str, Any]) -> dict[str, Any]:
    by_depth = sorted(nodes, key=lambda name: (name.count("/"), name))
    return {
        "kind": "inline",
        "must_understand": False,
        "metadata": {name: nodes[name] for name in by_depth},
    }


def _nodes(path: str) -> list[str]:
    """Names of all nodes below a group."""
    found = []
    for folder, folders, files in os.walk(path):
        document = read_document(folder) if DOCUMENT in files else None
        if document is not None and document.get("node_type") == "array":
            folders.clear()
        if document is not None and folder != path:
            found.append(os.path.relpath(folder, path).replace(os.sep, "/"))
    return found
