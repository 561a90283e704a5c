"""The zarr store: format 3, whole patterns in every inner chunk, one shard a block, checksums, named dimensions."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import StoreError
from stem_dask.io.codec import LEVELS, one_thread_blosc, shuffle_of
from stem_dask.io.publish import damage, file_crc, named, naming, remove
from stem_dask.model import Record, Region
from stem_dask.plan import inner_chunk, shard_shape
from stem_dask.stages.analyze import PROFILE_ATTRS
from stem_dask.stages.patterns import blocks_of, lead_shape

if TYPE_CHECKING:
    import xarray as xr

#: what ``auto`` is here
CODEC = "lz4"
#: per-position arrays of the analysis are small: chunks of up to this many positions
_POSITIONS = 2**20


def store_chunks(
    patterns: xr.DataArray, rechunk: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(inner chunk, shard) of the output for lazy patterns whose blocks are one shard each.

    With ``rechunk`` an inner chunk is whole patterns of about 1 MiB, without it the whole block.

    Raises
    ------
    StoreError
        When the blocks are not regular: a shard grid could not hold one block each.
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
    inner = inner_chunk(lead, lead_shape(patterns), pattern_bytes) if rechunk else lead
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

    def create(self, *, resume: bool) -> None:
        """Make the group and the empty array; what another run left there is removed."""
        import zarr

        if resume and self._is_begun():
            for torn in Path(self.path).rglob("*.partial"):  # zarr was killed before the rename
                remove(torn)
        else:
            remove(self.path)
            with named(self.path):
                self._create_array(zarr.create_group(self.path, zarr_format=3))

    def _create_array(self, group: Any) -> Any:
        return create_array(
            group,
            "patterns",
            self.shape,
            self.dtype,
            self.dims,
            self.inner,
            self.shards,
            codec=self.codec,
        )

    def _is_begun(self) -> bool:
        """Whether an array like this one is there: a run with other chunks or another codec may have left its own."""
        import zarr

        try:
            there = zarr.open_array(self.path, path="patterns", mode="r").metadata.to_dict()
        except (OSError, ValueError, KeyError, TypeError):  # none, or not one that zarr can read
            return False
        wanted = self._create_array(zarr.create_group({}, zarr_format=3)).metadata.to_dict()
        return {**there, "attributes": {}} == {**wanted, "attributes": {}}

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write one shard; zarr writes it to a temporary name and renames it."""
        import zarr

        if self.codec == "gzip":
            _steady_gzip()
        with single_threaded_codecs():
            array = zarr.open_array(self.path, path="patterns", mode="r+")
            array = array.with_config({"write_empty_chunks": True})  # is not kept in the store
            shard = self._shard(region)
            remove(shard)  # zarr would read an older one first
            for torn in shard.parent.glob(f"{shard.name}.*.partial"):
                torn.unlink(
                    missing_ok=True
                )  # of a worker that was killed while it wrote this shard
            with named(shard):
                array[region] = blocks["patterns"]
        crc, n_bytes = file_crc(shard)
        return {"shard": os.path.relpath(shard, self.path), "crc": crc, "bytes": n_bytes}

    def verify(self, record: Record) -> str | None:
        """Compare the shard with the checksum in the record."""
        said = record.extra
        shard = os.path.join(self.path, str(said.get("shard")))
        return damage(shard, (said.get("crc"), said.get("bytes")))

    def _shard(self, region: Region) -> Path:
        """The file of the shard that holds a region; a region is one block, and a block is one shard."""
        place = [str(part.start // size) for part, size in zip(region, self.shards, strict=False)]
        inside = ["0"] * (len(self.shape) - len(region))
        return Path(self.path, "patterns", "c", *place, *inside)

    def finish(self, records: Sequence[Record]) -> None:
        """See that every shard is there; `finish_store` closes the store when its other groups are written."""
        for record in records:
            shard = os.path.join(self.path, str(record.extra["shard"]))
            # a worker that hung, was given up and woke up again removes a shard before it writes it
            if not os.path.exists(shard) or os.path.getsize(shard) != record.extra["bytes"]:
                raise StoreError(
                    f"{shard} is not as it was written; the same command makes it again"
                )


def create_array(
    group: Any,
    name: str,
    shape: Sequence[int],
    dtype: Any,
    dims: Sequence[str],
    chunks: Sequence[int],
    shards: Sequence[int] | None = None,
    codec: str = "auto",
) -> Any:
    """A compressed, checksummed array in a zarr group; empty chunks are written, so that a lost one is noticed."""
    return group.create_array(
        name,
        shape=tuple(shape),
        dtype=np.dtype(dtype).newbyteorder("="),
        chunks=tuple(chunks),
        shards=None if shards is None else tuple(shards),
        compressors=_compressors(codec, np.dtype(dtype)),
        dimension_names=list(dims),
        fill_value=0,
        config={"write_empty_chunks": True},
        overwrite=True,  # what an interrupted finish left
    )


def _compressors(codec: str, dtype: np.dtype) -> list[Any]:
    """What chunks go through; the checksum is last, so that it is of the bytes on the disk."""
    from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec

    codec = CODEC if codec == "auto" else codec
    if codec == "none":
        return [Crc32cCodec()]
    if codec == "gzip":
        return [GzipCodec(level=LEVELS[codec]), Crc32cCodec()]
    blosc: Any = BloscCodec  # its names are of a narrower type
    return [blosc(cname=codec, clevel=LEVELS[codec], shuffle=shuffle_of(dtype)), Crc32cCodec()]


def _steady_gzip() -> None:
    """Only where it is needed: it changes which codec zarr takes in this process."""
    from stem_dask.io.steady_gzip import use

    use()


@naming
def write_coordinates(path: str, patterns: xr.DataArray) -> None:
    """Write the axes of the patterns as arrays of the root group."""
    import zarr

    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    for dim in patterns.dims:
        values = patterns.coords[dim]
        array = create_array(group, str(dim), values.shape, values.dtype, (str(dim),), values.shape)
        array[...] = values.values
        array.attrs.update(plain(values.attrs))


@naming
def write_valid(path: str, valid: NDArray[np.bool_], dims: Sequence[str]) -> None:
    """Write which positions could be read; where it is False the patterns are zeros."""
    import zarr

    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    chunks = [max(1, min(n, _POSITIONS)) for n in valid.shape]
    create_array(group, "valid", valid.shape, valid.dtype, dims, chunks)[...] = valid


@naming
def write_dataset(path: str, name: str, dataset: xr.Dataset) -> None:
    """Write the small arrays of a dataset as a group; lazy ones are left to the caller."""
    import zarr

    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    group = root.require_group(name)
    for key, variable in dataset.variables.items():
        values = np.asarray(variable.values)
        if values.dtype.kind == "U":
            values = values.astype(object).astype(str)
        chunks = [max(1, min(n, _POSITIONS)) for n in values.shape]
        dims = [str(dim) for dim in variable.dims]
        if values.dtype.kind == "U":
            group.attrs[str(key)] = values.tolist()
            continue
        array = create_array(group, str(key), values.shape, values.dtype, dims, chunks)
        array[...] = values
        array.attrs.update(plain(variable.attrs))
    group.attrs.update(plain(dataset.attrs))


@naming
def write_profiles(
    path: str,
    blocks: Iterable[tuple[Region, Mapping[str, NDArray]]],
    dims: Sequence[str],
    lead: Sequence[int],
    chunk: Sequence[int],
) -> None:
    """Write the retention profiles into the group ``analysis``, block by block: they may exceed memory."""
    import zarr

    group = zarr.open_group(path, mode="r+", use_consolidated=False).require_group("analysis")
    array = None
    for region, block in blocks:
        profile = block["profile"]
        if array is None:
            n = profile.shape[-1]
            array = create_array(group, "profile", (*lead, n), profile.dtype, dims, (*chunk, n))
            array.attrs.update(PROFILE_ATTRS)
        array[region] = profile


#: attributes of the patterns that tell of the microscope; in a store they are those of the root
ABOUT_SOURCE = ("beam_energy_kv", "given", "original_metadata")


@naming
def empty_store(path: str) -> None:
    """A group with nothing in it; what another run left there is removed."""
    import zarr

    remove(path)
    zarr.create_group(path, zarr_format=3)


@naming
def finish_store(
    path: str, attrs: Mapping[str, Any], patterns_attrs: Mapping[str, Any] | None
) -> None:
    """Write the attributes of the root, and of the patterns if it has any, and put all metadata into one document."""
    import zarr

    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    if patterns_attrs is None:
        root.attrs.update(plain(attrs))
        _consolidate(path)
        return
    about = {key: patterns_attrs[key] for key in ABOUT_SOURCE if key in patterns_attrs}
    rest = {key: value for key, value in patterns_attrs.items() if key not in about}
    root.attrs.update(plain({**attrs, **about}))
    root["patterns"].attrs.update(plain(rest))
    _consolidate(path)


def _consolidate(path: str) -> None:
    import zarr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(path)


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
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


@contextlib.contextmanager
def single_threaded_codecs() -> Iterator[None]:
    """One thread a task for compression: see `stem_dask.io.codec.one_thread_blosc`, and the same for zarr's own."""
    import zarr

    with one_thread_blosc(), zarr.config.set({"threading.max_workers": 1}):
        yield
