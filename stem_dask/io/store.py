"""The zarr store: format 3, whole patterns in every inner chunk, one shard a block, checksums, named dimensions."""

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

from stem_dask.errors import StoreError
from stem_dask.io.instrument import NAMES
from stem_dask.io.objects import zarr_store
from stem_dask.io.pieces import InPieces, of_type
from stem_dask.io.publish import damage, named, remove
from stem_dask.io.shards import indexed, write_shard
from stem_dask.io.staging import begin_staging, refuse_other_files, remove_unfinished
from stem_dask.io.zarr3 import (
    DOCUMENT,
    array_document,
    chunk_name,
    consolidate,
    filled,
    group_document,
    plain,
    read_document,
    write_array,
    write_document,
)
from stem_dask.model import Record, Region
from stem_dask.plan import INNER_CHUNK_BYTES, MIB, inner_chunk, shard_shape
from stem_dask.stages.analyze import PROFILE_RADIUS
from stem_dask.stages.patterns import attrs_of, blocks_of, lead_shape

if TYPE_CHECKING:
    import xarray as xr

#: per-position arrays of the analysis are small: chunks of up to this many positions
_POSITIONS = 2**20
#: a file of profiles has so many bytes before they are packed, and so many chunks, at most; several are sent to an object store
#: at once, each of them whole
PROFILE_FILE_BYTES, PROFILE_FILE_CHUNKS = 16 * MIB, 256


def store_chunks(
    patterns: xr.DataArray, rechunk: bool = True, most_bytes: int = INNER_CHUNK_BYTES
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(inner chunk, shard) of the output for lazy patterns whose blocks are one shard each.

    With ``rechunk`` an inner chunk is whole patterns of up to ``most_bytes``, without it the whole block.

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
    #: the staging folder of this start
    stage: list[str] = field(default_factory=list, compare=False, kw_only=True)

    def create(self, *, resume: bool) -> None:
        """Make the group and the empty array; what another run left there is removed."""
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
        """Whether an array like this one is there: a run with other chunks or another codec may have left its own."""
        return {**(read_document(self._folder) or {}), "attributes": {}} == self._document

    def write(
        self, index: int, region: Region, blocks: Mapping[str, NDArray | InPieces]
    ) -> dict[str, Any]:
        """Write one shard, under a temporary name that is then renamed."""
        name = self._shard(region)
        block = of_type(blocks["patterns"], np.dtype(self.dtype))
        shard = Path(self.path, name)
        options = (self.inner, self.shards, self.codec, self.stage[0])
        crc, n_bytes = write_shard(shard, block, region, *options)
        return {"shard": name, "crc": crc, "bytes": n_bytes}

    def verify(self, record: Record) -> str | None:
        """Compare the shard with the checksum in the record."""
        said = record.extra
        shard = os.path.join(self.path, str(said.get("shard")))
        return damage(shard, (said.get("crc"), said.get("bytes")))

    def _shard(self, region: Region) -> str:
        """Name within the store of the shard that holds a region; a region is one block, and a block is one shard."""
        place = [part.start // size for part, size in zip(region, self.shards, strict=False)]
        inside = [0] * (len(self.shape) - len(region))
        return os.path.join("patterns", chunk_name([*place, *inside]))

    def finish(self, records: Sequence[Record]) -> None:
        """Compare every shard with its record; `finish_store` closes the store when its other groups are written."""
        remove_unfinished(self.path)
        found = (record.extra for record in records)
        refuse_other_files(
            (os.path.join(self.path, extra["shard"]), extra["crc"], extra["bytes"])
            for extra in found
        )


def write_coordinates(path: str, patterns: xr.DataArray) -> None:
    """Write the axes of the patterns as arrays of the root group."""
    for dim in patterns.dims:
        values = patterns.coords[dim]
        write_array(Path(path, str(dim)), values.values, (str(dim),), attrs=values.attrs)


def open_group(store: str, name: str = "") -> xr.Dataset:
    """The arrays of a group of a store of ours, lazy; nothing of a file's attributes is taken for times or scales."""
    import pandas as pd
    import xarray as xr

    plainly: dict[str, Any] = {"chunks": None, "decode_cf": False, "create_default_indexes": False}
    found = xr.open_zarr(zarr_store(store), group=name or None, **plainly)
    if "radius" in found.sizes:  # the dimension of the profiles in earlier versions
        found = found.rename_dims(radius=PROFILE_RADIUS)
        found = found.assign_coords({PROFILE_RADIUS: pd.RangeIndex(found.sizes[PROFILE_RADIUS])})
    # as indexes already: of an array xarray asks whether it is one of pint or cupy, and loads these to find out
    axes = {
        dim: (dim, pd.Index(found[dim].values), found[dim].attrs)
        for dim in found.sizes
        if dim in found.variables and found[dim].dims == (dim,)
    }
    return found.assign_coords(axes)


def write_valid(path: str, valid: NDArray[np.bool_], dims: Sequence[str]) -> None:
    """Write which positions could be read; where it is False the patterns are zeros."""
    write_array(Path(path, "valid"), valid, dims, _chunks(valid))


def write_dataset(path: str, name: str, dataset: xr.Dataset) -> None:
    """Write the small arrays of a dataset as a group, texts as its attributes; lazy arrays are left to the caller."""
    attrs = dict(dataset.attrs)
    for key, variable in dataset.variables.items():
        values = np.asarray(variable.values)
        if values.dtype.kind in "UO":
            attrs[str(key)] = values.astype(str).tolist()
            continue
        dims = [str(dim) for dim in variable.dims]
        write_array(Path(path, name, str(key)), values, dims, _chunks(values), variable.attrs)
    write_document(Path(path, name), group_document(attrs))


def _chunks(values: NDArray) -> list[int]:
    return [max(1, min(n, _POSITIONS)) for n in values.shape]


def write_profiles(
    path: str,
    blocks: Iterable[tuple[Region, Mapping[str, NDArray]]],
    dims: Sequence[str],
    lead: Sequence[int],
    chunk: Sequence[int],
) -> None:
    """Write the retention profiles into the group ``analysis``, block by block: they may exceed memory.

    A block is a chunk, and many rows of them share a file: a terabyte has thousands.

    Parameters
    ----------
    blocks : region along the leading axes, and ``profile`` (…, profile_radius), of each chunk, in the order of the grid
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
        with named(file), open(file, "wb") as out:
            out.writelines(indexed(placed, together))


#: attributes of the patterns about the microscope and the measurement; in a store they are those of the root
ABOUT_SOURCE = (*NAMES, "given", "metadata", "original_metadata")


def empty_store(path: str) -> None:
    """A group with nothing in it; what another run left there is removed."""
    remove(path)
    write_document(path, group_document())


def finish_store(
    path: str, attrs: Mapping[str, Any], patterns_attrs: Mapping[str, Any] | None
) -> None:
    """Write the attributes of the root, and of the patterns if it has any, and put all metadata into one document."""
    about = {}
    if patterns_attrs is not None:
        about = {key: patterns_attrs[key] for key in ABOUT_SOURCE if key in patterns_attrs}
        rest = {key: value for key, value in patterns_attrs.items() if key not in about}
        folder = Path(path, "patterns")
        document = json.loads((folder / DOCUMENT).read_bytes())
        document["attributes"] |= plain(rest)
        write_document(folder, document)
    write_document(path, group_document({**attrs, **about}))
    consolidate(path)
