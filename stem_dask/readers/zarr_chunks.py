"""Chunk files of a zarr array: those that a region needs, that are missing, or that cannot be decoded.

zarr reads a missing chunk file as the fill value, whether the chunk was never written or was lost.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError, StemDaskError
from stem_dask.storage.errors import one_line, translate
from stem_dask.storage.location import Location, at, check_path, is_url
from stem_dask.storage.zarr_store import zarr_store

#: chunk files with at least this many decoded bytes are read one after another
_LARGE = 2**20


def files_of(
    store: str, name: str, array: Any, part: Sequence[slice]
) -> Iterator[tuple[Any, tuple[slice, ...]]]:
    """File (or object) and region of every chunk (a shard, where there are shards) that a part of an array needs."""
    sizes = array.shards or array.chunks
    wanted: list[Sequence[int]] = []
    for piece, size, n in zip(part, sizes, array.shape, strict=True):
        start, stop, step = piece.indices(n)
        if step <= size and start < stop:  # every chunk between
            wanted.append(range(start // size, range(start, stop, step)[-1] // size + 1))
        else:
            wanted.append([i // size for i in range(start, stop, step)])
    for place in _places(wanted):
        region = tuple(slice(i * s, (i + 1) * s) for i, s in zip(place, sizes, strict=True))
        yield at(store, name, array.metadata.encode_chunk_key(place)), region


def _places(wanted: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """All combinations, the last axis fastest; `itertools.product` would first copy the ranges into lists."""
    if not wanted:
        yield ()
        return
    for first in wanted[0]:
        for rest in _places(wanted[1:]):
            yield (first, *rest)


def _bad_files(
    store: str, name: str, array: Any, part: Sequence[slice]
) -> Iterator[tuple[Any, str]]:
    """Chunk files of a part that cannot be decoded, and why; "" for those that are missing or empty."""
    for path, region in files_of(store, name, array, part):
        if _lost(path):
            yield path, ""
            continue
        try:
            array[region]
        except StemDaskError:
            raise
        except Exception as error:  # each codec has its own
            yield path, one_line(error) or type(error).__name__


def _lost(path: Any) -> bool:
    """Whether a file is missing or empty, as after a power cut: zarr reads both as zeros."""
    try:
        return bool(path.stat().st_size == 0)
    except FileNotFoundError:
        return True


def missing_files(store: str, name: str, array: Any) -> tuple[int, int, Path | None]:
    """Number of missing chunk files, number of all chunk files, and the first missing one; lists folders only."""
    sizes = array.shards or array.chunks
    counts = [math.ceil(n / size) for n, size in zip(array.shape, sizes, strict=True)]
    n, there, folder = math.prod(counts), 0, at(store, name)
    if isinstance(folder, Location):
        files = (key for key, _ in folder.below())
    else:
        above = len(str(folder)) + 1
        walk = ((place[above:], files) for place, _, files in os.walk(folder))
        files = (f"{place}/{file}".lstrip("/") for place, files in walk for file in files)
    for file in files:  # c/0/1 or c.0.1, in format 2 0.1 or 0/1
        words = re.split("[./]", file.removeprefix("c/").removeprefix("c."))
        if len(words) == len(counts) and all(word.isdecimal() for word in words):
            there += all(int(word) < count for word, count in zip(words, counts, strict=True))
    paths = files_of(store, name, array, [slice(None)] * len(counts)) if there < n else ()
    return n - there, n, next((path for path, _ in paths if not path.exists()), None)


def missing_note(store: str, name: str, *, zero: bool) -> str | None:
    """A note on the missing chunk files of an array; None if all exist."""
    array = _opened(store, name)
    lost, n, first = missing_files(store, name, array)
    if not lost:
        return None
    then = "reading what they held is refused, unless input.missing_chunks=zero"
    then = f"they read as {_filling(array)}" if zero else then
    return f"{lost:,} of {n:,} chunk files are missing, the first is {first}; {then}"


def _filling(array: Any) -> str:
    """What a missing chunk reads as, in words."""
    return f"the fill value {array.fill_value}" if array.fill_value else "zeros"


def _opened(store: str, name: str, *, whole: bool = False) -> Any:
    import zarr

    with translate(SourceError, store, f"array {name or '/'} cannot be opened"):
        return zarr.open_array(zarr_store(store, whole=whole), path=name, mode="r")


def read_part(store: str, name: str, part: Sequence[slice], *, zero: bool) -> NDArray:
    """Part of the array ``name`` of a zarr store ("" when the store is the array); with ``zero`` missing chunks are filled."""
    array = _opened(store, name, whole=not zero)
    if not is_url(store):  # there found when it is read: checking each would double the requests
        _check_there(store, name, array, part, zero=zero)
    try:
        if math.prod(array.shards or array.chunks) * array.dtype.itemsize >= _LARGE:
            return _one_by_one(store, name, array, part)
        return np.ascontiguousarray(array[tuple(part)])  # format 2 knows Fortran order
    except (MemoryError, StemDaskError):
        raise
    except Exception as error:  # each codec has its own
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        bad = (one for one in _bad_files(store, name, array, part) if one[1])
        path, why = next(bad, (f"{store}: array {name or '/'}", one_line(error)))
        more = "; stem-dask verify lists all damaged files of the store" if name else ""
        raise SourceError(
            f"{path} cannot be decoded ({why or type(error).__name__}): it was damaged, copy it again{more}"
        ) from error


def _check_there(store: str, name: str, array: Any, part: Sequence[slice], *, zero: bool) -> None:
    """Check that the chunk files of a part exist and are not behind links; with ``zero``, only that none of them is empty."""
    lost, n = [], 0
    for path, _ in files_of(store, name, array, part):
        n += 1
        refuse_outside(store, path)
        if not _lost(path):
            continue
        if not zero:
            lost.append(path)
        elif path.exists():
            raise SourceError(
                f"{path} is empty (0 bytes): writing it was cut short; copy it again, or remove it to read it as zeros"
            )
    if lost:
        raise SourceError(
            f"{lost[0]} is missing or empty ({len(lost):,} of the {n:,} chunk files of these patterns); copy it "
            f"again, or set input.missing_chunks=zero to read it as {_filling(array)}"
        )


def _one_by_one(store: str, name: str, array: Any, part: Sequence[slice]) -> NDArray:
    """Read a part chunk file by chunk file: zarr would decode ten at once, whatever their size."""
    from zarr.buffer.cpu import NDBuffer

    ranges = [range(*piece.indices(n)) for piece, n in zip(part, array.shape, strict=True)]
    out = np.empty([len(wanted) for wanted in ranges], array.dtype)
    for _, region in files_of(store, name, array, part):
        there, here = [], []
        for held, wanted in zip(region, ranges, strict=True):
            first = max(0, -(-(held.start - wanted.start) // wanted.step))
            last = min(len(wanted), -(-(held.stop - wanted.start) // wanted.step))
            here.append(slice(first, last))
            of_these = wanted[first:last]
            there.append(slice(of_these.start, of_these.stop, of_these.step))
        # decode into place: zarr may still hold the previous chunk, and a copy would add a third
        place = NDBuffer.from_numpy_array(out[tuple(here)])
        array.get_basic_selection(tuple(there), out=place)
    return out


def damaged_chunks(store: str) -> Iterator[str]:
    """Read a zarr store once, chunk by chunk, and yield one message per damaged chunk file."""
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
            yield from _faults(store, name, array)


def check_small_arrays(store: str, group: Any) -> None:
    """Refuse a group with a small array of which a chunk file is missing or damaged."""
    for name, array in group.arrays():
        if name not in ("patterns", "profile"):  # large, and read elsewhere
            for fault in _faults(store, f"{group.path}/{name}".lstrip("/"), array):
                raise SourceError(f"{fault}; copy the store again")


def _faults(store: str, name: str, array: Any) -> Iterator[str]:
    for path, why in _bad_files(store, name, array, [slice(None)] * array.ndim):
        yield f"{path} cannot be decoded ({why})" if why else f"{path} is missing or empty"


def refuse_outside(store: str, path: Path | Location) -> None:
    """Refuse symbolic links out of a store: their target was not written with the store."""
    if isinstance(path, Location):  # object stores have no links
        return
    real, home = os.path.realpath(path), os.path.realpath(store)
    if os.path.commonpath([real, home]) != home:
        raise SourceError(
            f"{store}: {path} leads out of the store, to {real}; put a copy in the link's place"
        )
