"""Test a finished store: every chunk is there, and its checksum is right."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stem_dask.errors import SourceError, StemDaskError
from stem_dask.io.objects import at, zarr_store
from stem_dask.urls import check_path


def damaged_chunks(store: str) -> Iterator[str]:
    """What is wrong with a zarr store, one text a damaged chunk file; reads everything once, chunk by chunk.

    Raises
    ------
    SourceError
        When it is not a store at all.
    """
    import zarr

    check_path("the store", store)
    try:
        root = zarr.open_group(zarr_store(store), mode="r")
        members = sorted(root.members(max_depth=None))
    except StemDaskError:
        raise
    except Exception as error:  # zarr raises many kinds for a damaged store
        raise SourceError(f"{store}: not a readable zarr store: {error}") from error
    for name, array in members:
        if isinstance(array, zarr.Array):
            for place, region in chunk_files(array):
                path = chunk_path(store, name, array, place)
                if _lost(path):
                    yield f"{path} is missing or empty"
                    continue
                try:
                    array[region]
                except StemDaskError:
                    raise
                except Exception as error:  # each codec has its own
                    yield f"{path} cannot be decoded ({error})"


def needed_chunks(store: str, name: str, array: Any, part: Sequence[slice]) -> Iterator[Path]:
    """The chunk files that a part of an array lies in."""
    sizes = array.shards or array.chunks
    ranges = []
    for piece, size, n in zip(part, sizes, array.shape, strict=True):
        ranges.append(sorted({i // size for i in range(*piece.indices(n))}))
    for place in itertools.product(*ranges):
        yield chunk_path(store, name, array, place)


def missing_chunk(store: str, name: str, array: Any, part: Sequence[slice]) -> Path | None:
    """The first chunk file that a part of an array needs and that is lost; only for arrays in format 3."""
    if getattr(array.metadata, "zarr_format", 2) != 3:
        return None
    return next((path for path in needed_chunks(store, name, array, part) if _lost(path)), None)


@contextlib.contextmanager
def decoded(store: str, group: Any) -> Iterator[None]:
    """Read the small arrays of a group within: a damaged or missing chunk is an error of ours, not zeros.

    Raises
    ------
    SourceError
        When a chunk is missing, or something within cannot be decoded.
    """
    for name, array in group.arrays():
        if name not in ("patterns", "profile"):  # large, and read elsewhere
            place = f"{group.path}/{name}".lstrip("/")
            lost = missing_chunk(store, place, array, [slice(None)] * array.ndim)
            if lost is not None:
                raise SourceError(f"{lost} is missing or empty; without it {name} reads as zeros")
    try:
        yield
    except (ValueError, RuntimeError) as error:  # each codec has its own
        raise SourceError(
            f"{store}: an array beside the patterns cannot be decoded ({error}); "
            "stem-dask verify names the damaged files of a store"
        ) from error


def _lost(path: Any) -> bool:
    """Not there, or of no length, as after a power cut: zarr reads zeros for both."""
    try:
        return path.stat().st_size == 0
    except FileNotFoundError:
        return True


def chunk_files(array: Any) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Place and region of every chunk file (a shard, where there are shards)."""
    sizes = array.shards or array.chunks
    counts = [math.ceil(n / size) for n, size in zip(array.shape, sizes, strict=True)]
    for place in itertools.product(*map(range, counts)):
        yield place, tuple(slice(i * s, (i + 1) * s) for i, s in zip(place, sizes, strict=True))


def chunk_path(store: str, name: str, array: Any, place: Sequence[int]) -> Any:
    """File, or object, of a chunk."""
    return at(store, name, array.metadata.encode_chunk_key(tuple(place)))
