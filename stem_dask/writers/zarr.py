"""The zarr store: zarr 3, whole patterns in inner chunks, one shard per block, checksums, named dimensions.

Layout of a shard (codec ``sharding_indexed``): the encoded chunks, then offset and length of each chunk of the grid as uint64 (all bits
set if there is none), then the CRC-32C of that index. zarr's own writer gives the same bytes, but holds the shard in memory
three times, and its tasks share one thread of the process. Everything small is written by zarr.

Object stores cannot rename. There, tasks upload the shards under their final names; the small rest is built in a local folder and
uploaded at the end, the zarr.json of the root last: without it readers of zarr find no store. Removing it also invalidates an older
output.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, of_type
from stem_dask.core.chunks import MIB
from stem_dask.core.errors import StoreError
from stem_dask.core.formats import Output
from stem_dask.core.metadata import to_json
from stem_dask.core.model import Record, Region
from stem_dask.core.patterns import ABOUT_SOURCE, PROFILE_RADIUS, attrs_of, lead_dims
from stem_dask.storage.errors import translate
from stem_dask.storage.location import Status, at, of_output
from stem_dask.storage.publish import DOCUMENT, remove
from stem_dask.storage.staging import begin_staging, damage, refuse_other_files, remove_unfinished
from stem_dask.storage.zarr_store import zarr_store
from stem_dask.writers.codecs import LEVELS, checked, compressed, shuffle_of, whole_chunks
from stem_dask.writers.spool import write_file

if TYPE_CHECKING:
    import xarray as xr

#: largest shard of the profiles: uncompressed bytes, and chunks; several whole ones are uploaded to an object store at once
PROFILE_FILE_BYTES, PROFILE_FILE_CHUNKS = 16 * MIB, 256


@dataclass(frozen=True)
class StoreSink:
    """Writes the block ``patterns`` to its shard of an array."""

    output: Output
    #: staging folder of this start
    stage: list[str] = field(default_factory=list, compare=False)

    def create(self, *, resume: bool) -> None:
        """Create the group and the empty array, unless an interrupted run left the same."""
        if not (resume and self.is_begun()):
            empty_store(self.output.path)
            self._array(self.output.path)
        self.stage[:] = [begin_staging(self.output.path)]

    def _array(self, store: Any) -> Any:
        """The empty array."""
        one = self.output
        parts = (one.dims, one.chunks, one.shards, one.codec)
        return create_array(store, "patterns", one.shape, one.dtype, *parts)

    def is_begun(self) -> bool:
        """Whether the array exists with the same shape, chunks and codec."""
        import zarr

        try:
            found: Any = zarr.open_array(self.output.path, path="patterns", mode="r", zarr_format=3)
        except (OSError, ValueError):
            return False
        wanted = self._array({}).metadata.to_dict()
        return bool({**found.metadata.to_dict(), "attributes": {}} == wanted)

    def shard(self, region: Region) -> str:
        """Name of the shard of a region, relative to the store; separated by dots, because creating folders is slow."""
        places = [part.start // n for part, n in zip(region, self.output.shards, strict=False)]
        inside = [0] * (len(self.output.shape) - len(region))
        return ".".join(["patterns/c", *map(str, [*places, *inside])])

    def write(
        self, index: int, region: Region, blocks: Mapping[str, NDArray | Block]
    ) -> dict[str, Any]:
        """Write one shard."""
        name, contents = self.shard(region), shard_contents(self.output, region, blocks["patterns"])
        crc, n_bytes = write_file(Path(self.output.path, name), self.stage[0], contents)
        return {"shard": name, "crc": crc, "bytes": n_bytes}

    def verify(self, record: Record) -> str | None:
        """Compare the shard with the checksum in the record."""
        path, extra = self.output.path, record.extra
        return damage(f"{path}/{extra.get('shard')}", (extra.get("crc"), extra.get("bytes")))

    def finish(self, records: Sequence[Record]) -> None:
        """Compare every shard with its record."""
        remove_unfinished(self.output.path)
        refuse_other_files(
            (f"{self.output.path}/{extra['shard']}", extra["crc"], extra["bytes"])
            for extra in (record.extra for record in records)
        )

    def complete(
        self, patterns: xr.DataArray, analysis: xr.Dataset | None, about: Mapping[str, Any]
    ) -> list[str]:
        """Write axes, ``valid`` (False where patterns could not be read and are zeros), analysis and attributes."""
        path = self.output.path
        for name in patterns.dims:
            values = patterns.coords[name]
            write_array(path, str(name), values.values, (str(name),), values.attrs)
        if "valid" in patterns.coords:
            write_array(path, "valid", patterns.coords["valid"].values, lead_dims(patterns))
        if analysis is not None:
            write_dataset(path, "analysis", analysis)
        finish_store(path, about, patterns.attrs)
        return []


@dataclass(frozen=True)
class ObjectStoreSink(StoreSink):
    """Uploads the block ``patterns`` as a shard, which is in memory as a whole; the path is the local folder of the rest."""

    def create(self, *, resume: bool) -> None:
        """Invalidate the older output; remove its shards, or keep those of the run that is resumed."""
        at(self.output.url, DOCUMENT).unlink()
        if resume and self.is_begun():
            return
        super().create(resume=False)
        at(self.output.url).remove_below()

    def write(
        self, index: int, region: Region, blocks: Mapping[str, NDArray | Block]
    ) -> dict[str, Any]:
        """Upload one shard; its ETag is recorded."""
        name = self.shard(region)
        content = b"".join(shard_contents(self.output, region, blocks["patterns"]))
        etag = at(self.output.url, name).write_bytes(content)
        return {"shard": name, "etag": etag, "bytes": len(content)}

    def verify(self, record: Record) -> str | None:
        """Compare size and ETag of the shard without reading it: that finds missing, truncated and replaced shards."""
        with of_output():
            try:
                found = at(self.output.url, str(record.extra.get("shard"))).stat()
            except FileNotFoundError:
                found = None
        return self._difference(record, found)

    def finish(self, records: Sequence[Record]) -> None:
        """Compare all shards with their records in one listing."""
        with of_output():
            there = dict(at(self.output.url, "patterns").below())
        for record in records:
            found = there.get(str(record.extra["shard"]).removeprefix("patterns/"))
            if (what := self._difference(record, found)) is not None:
                raise StoreError(f"{what}; the same command writes it again")

    def _difference(self, record: Record, found: Status | None) -> str | None:
        """How a shard differs from its record."""
        extra = record.extra
        url = f"{self.output.url}/{extra.get('shard')}"
        if found is None:
            return f"{url} is missing"
        if found.st_size != extra.get("bytes"):
            return f"{url} has {found.st_size:,} bytes, not the {extra.get('bytes', 0):,} that were written"
        if found.etag != extra.get("etag"):
            return f"{url} was replaced by another object (ETag)"
        return None


def store_sink(output: Output) -> StoreSink:
    """The sink of a store in a folder, or in an object store."""
    return ObjectStoreSink(output) if output.url else StoreSink(output)


def publish_objects(built: str, url: str) -> None:
    """Upload a local folder after the shards, the zarr.json of the root last, and remove the folder."""

    def send(name: str) -> None:
        at(url, name).write_bytes(Path(built, name).read_bytes())

    files = (str(path.relative_to(built)) for path in Path(built).rglob("*") if path.is_file())
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(send, sorted(name for name in files if name != DOCUMENT)):
            pass  # the first error is raised
    send(DOCUMENT)
    remove(built)


def shard_contents(output: Output, region: Region, block: NDArray | Block) -> Iterator[bytes]:
    """Yield the bytes of a shard: its encoded chunks, one in memory at a time, then the index."""
    n_lead, chunks = len(region), output.chunks
    block = of_type(block, output.dtype)
    counts = [whole // part for whole, part in zip(output.shards, chunks, strict=True)][:n_lead]
    index = np.full((*counts, 2), 2**64 - 1, "<u8")  # of a chunk that is not in the shard
    n_bytes = 0
    for origin, chunk in whole_chunks(block, region, chunks, output.shape):
        content = checked(compressed(chunk, output.codec))
        inside = zip(origin, region, chunks, strict=False)
        index[tuple((at - part.start) // n for at, part, n in inside)] = n_bytes, len(content)
        n_bytes += len(content)
        yield content
    yield checked(index.tobytes())


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


def thumbnails_of(store: str) -> xr.Dataset | None:
    """The small images of patterns in a store, in memory; None for a store without."""
    try:
        return open_group(store, "thumbnails").load()
    except FileNotFoundError:
        return None


def empty_store(path: str) -> None:
    """Create an empty group in place of anything that exists."""
    import zarr

    remove(path)
    with translate(StoreError, path):
        zarr.create_group(path, zarr_format=3)


def create_array(
    store: Any,
    name: str | None,
    shape: Sequence[int],
    dtype: np.dtype,
    dims: Sequence[str],
    chunks: Sequence[int],
    shards: Sequence[int] | None = None,
    codec: str = "auto",
    attrs: Mapping[str, Any] | None = None,
    zarr_format: Literal[2, 3] = 3,
) -> Any:
    """Create an empty array with the codecs of `compressed`, in zarr 3 with checksums."""
    import numcodecs
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec

    codec = "lz4" if codec == "auto" else codec
    level, shuffle = LEVELS.get(codec, 0), shuffle_of(dtype)
    packing: list[Any] = []
    if codec == "gzip":
        packing = [GzipCodec(level=level) if zarr_format == 3 else numcodecs.GZip(level)]
    elif codec != "none" and zarr_format == 3:
        blosc: Any = BloscCodec
        packing = [blosc(cname=codec, clevel=level, shuffle=shuffle)]
    elif codec != "none":
        number = {"bitshuffle": numcodecs.Blosc.BITSHUFFLE, "shuffle": numcodecs.Blosc.SHUFFLE}
        packing = [numcodecs.Blosc(codec, level, number[shuffle])]
    options: dict[str, Any] = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    if zarr_format == 3:
        packing.append(Crc32cCodec())
        # chunks lie in one folder, because creating folders is slow
        options["chunk_key_encoding"] = {"name": "default", "separator": "."}
        options["dimension_names"] = list(dims) or None
    with translate(StoreError, "memory" if isinstance(store, dict) else store):
        return zarr.create_array(
            store,
            name=name,
            shape=tuple(shape),
            dtype=dtype.newbyteorder("="),
            chunks=tuple(max(1, n) for n in chunks),
            shards=None if shards is None else tuple(shards),
            compressors=packing or None,
            fill_value=0,
            attributes=to_json(attrs or {}),
            zarr_format=zarr_format,
            config={"write_empty_chunks": True},
            overwrite=True,
            **options,
        )


def write_array(
    path: str,
    name: str,
    values: NDArray,
    dims: Sequence[str],
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Write a small array of a store in place of anything that exists."""
    chunks = [min(n, 2**20) for n in values.shape]
    array = create_array(path, name, values.shape, values.dtype, dims, chunks, attrs=attrs)
    with translate(StoreError, path):
        array[...] = values


def write_dataset(path: str, name: str, dataset: xr.Dataset) -> None:
    """Write a dataset of small arrays as a group; arrays of text become attributes."""
    import zarr

    attrs = dict(dataset.attrs)
    for key, variable in dataset.variables.items():
        values = np.asarray(variable.values)
        if values.dtype.kind in "UO":
            attrs[str(key)] = values.astype(str).tolist()
            continue
        dims = [str(dim) for dim in variable.dims]
        write_array(path, f"{name}/{key}", values, dims, variable.attrs)
    with translate(StoreError, path):
        zarr.open_group(path, path=name, mode="a", zarr_format=3).attrs.put(to_json(attrs))


def write_profiles(
    path: str,
    blocks: Iterable[tuple[Region, Mapping[str, NDArray]]],
    dims: Sequence[str],
    lead: Sequence[int],
    chunk: Sequence[int],
) -> None:
    """Write the retention profiles into the group ``analysis`` a few blocks at a time, because they may exceed memory.

    A block (region along the leading axes, and ``profile``) is a chunk of these positions; blocks come in C order. Rows of
    chunks share a shard, so that a terabyte does not make thousands of files.
    """
    blocks = iter(blocks)
    first = next(blocks, None)
    if first is None:
        return
    n, dtype = first[1]["profile"].shape[-1], first[1]["profile"].dtype
    grid = [-(-size // part) for size, part in zip(lead, chunk, strict=True)]
    in_row = prod(grid[1:])
    row_bytes = in_row * prod(chunk) * n * dtype.itemsize
    rows = min(grid[0], max(1, min(PROFILE_FILE_BYTES // row_bytes, PROFILE_FILE_CHUNKS // in_row)))
    shards = [*(k * size for k, size in zip((rows, *grid[1:]), chunk, strict=True)), n]
    parts, about = (dims, (*chunk, n), shards), attrs_of("profile")
    array = create_array(path, "analysis/profile", (*lead, n), dtype, *parts, attrs=about)
    height = shards[0]
    together = itertools.groupby(
        itertools.chain([first], blocks), lambda one: one[0][0].start // height * height
    )
    for top, those in together:
        values = np.zeros((min(height, lead[0] - top), *lead[1:], n), dtype)
        for (along, *rest), block in those:
            values[(slice(along.start - top, along.stop - top), *rest)] = block["profile"]
        with translate(StoreError, path):
            array[top : top + height] = values


def finish_store(
    path: str, attrs: Mapping[str, Any], patterns_attrs: Mapping[str, Any] | None
) -> None:
    """Write the attributes of the root and of the patterns, if there are any, and consolidate the metadata."""
    import zarr

    about, patterns_attrs = dict(attrs), patterns_attrs or {}
    with translate(StoreError, path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # consolidated metadata are not in the specification yet
        root = zarr.open_group(path, mode="a", zarr_format=3, use_consolidated=False)
        about |= {key: patterns_attrs[key] for key in ABOUT_SOURCE if key in patterns_attrs}
        rest = {key: value for key, value in patterns_attrs.items() if key not in ABOUT_SOURCE}
        if rest:
            root["patterns"].attrs.update(to_json(rest))
        root.attrs.put(to_json(about))
        zarr.consolidate_metadata(path, zarr_format=3)
