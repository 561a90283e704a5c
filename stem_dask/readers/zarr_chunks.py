"""Chunk files of a zarr array: those that a region needs, that are missing, or that cannot be decoded.

zarr reads a missing chunk file as the fill value, whether the chunk was never written or was lost.
"""

import contextlib
import math
import os
import re
import warnings
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
) -> Iterator[tuple[Path, tuple[slice, ...]]]:
    """Path and region of every chunk file (a shard, where there are shards) that a part of an array needs."""
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
        yield chunk_path(store, name, array, place), region


def _places(wanted: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """All combinations, the last axis fastest; `itertools.product` would first copy the ranges into lists."""
    if not wanted:
        yield ()
        return
    for first in wanted[0]:
        for rest in _places(wanted[1:]):
            yield (first, *rest)


def check_there(store: str, name: str, array: Any, part: Sequence[slice], *, zero: bool) -> None:
    """Check that the chunk files of a part exist; with ``zero``, only that none of them is empty.

    Raises
    ------
    SourceError
        With the first file that is missing, empty (as after a power cut) or behind a link out of the store.
    """
    lost, n = [], 0
    if is_url(store):  # found when it is read: checking each would double the requests
        return
    for path, _ in files_of(store, name, array, part):
        n += 1
        refuse_outside(store, path)
        try:
            if path.stat().st_size:
                continue
            if zero:
                raise SourceError(
                    f"{path} is empty (0 bytes): writing it was cut short; copy it again, or remove it to read it as zeros"
                )
        except FileNotFoundError:
            if zero:
                continue
        lost.append(path)
    if lost:
        raise SourceError(
            f"{lost[0]} is missing or empty ({len(lost):,} of the {n:,} chunk files of these patterns); copy it "
            f"again, or set input.missing_chunks=zero to read it as {filling(array)}"
        )


def undecodable(
    store: str, name: str, array: Any, part: Sequence[slice]
) -> tuple[Path, Exception] | None:
    """The first chunk file of a part that cannot be decoded, and why."""
    for path, region in files_of(store, name, array, part):
        try:
            array[region]
        except StemDaskError:
            raise
        except Exception as error:  # each codec has its own
            return path, error
    return None


def missing_files(store: str, name: str, array: Any) -> tuple[int, int, Path | None]:
    """Number of missing chunk files, number of all chunk files, and the first missing one; lists folders only."""
    sizes = array.shards or array.chunks
    counts = [math.ceil(n / size) for n, size in zip(array.shape, sizes, strict=True)]
    n, there = math.prod(counts), 0
    for key in _places_there(store, name, len(counts)):
        there += len(key) == len(counts) and all(map(int.__lt__, key, counts))
    first = None
    if there < n:
        whole = [slice(None)] * len(counts)
        paths = (path for path, _ in files_of(store, name, array, whole))
        first = next((path for path in paths if not path.exists()), None)
    return n - there, n, first


def missing_note(store: str, name: str, *, zero: bool) -> str | None:
    """A note on the missing chunk files of an array; None if all exist."""
    array = _opened(store, name)
    lost, n, first = missing_files(store, name, array)
    if not lost:
        return None
    words = f"{lost:,} of {n:,} chunk files are missing, the first is {first}"
    if zero:
        return f"{words}; they read as {filling(array)}"
    return f"{words}; reading what they held is refused, unless input.missing_chunks=zero"


def _places_there(store: str, name: str, n_axes: int) -> Iterator[tuple[int, ...]]:
    """Grid indices of the existing chunk files of an array."""
    folder = at(store, name)
    if not is_url(store):
        yield from _keys(folder, (), n_axes) if folder.is_dir() else ()
        return
    for key, _ in folder.below():
        words = re.split("[./]", key.removeprefix("c/").removeprefix("c."))
        if all(word.isdecimal() for word in words):
            yield tuple(map(int, words))


def _keys(folder: Path, above: tuple[int, ...], n_axes: int) -> Iterator[tuple[int, ...]]:
    """Grid indices of the chunk files below a folder: c/0/1 or c.0.1, in format 2 0.1 or 0/1."""
    with os.scandir(folder) as entries:
        for entry in entries:
            words = entry.name.split(".")
            if not above and words[0] == "c":
                words = words[1:]
            if not all(word.isdecimal() for word in words):
                continue
            key = (*above, *map(int, words))
            if len(key) < n_axes and entry.is_dir():
                yield from _keys(Path(entry.path), key, n_axes)
            else:
                yield key


def filling(array: Any) -> str:
    """What a missing chunk reads as, in words."""
    value: Any = array.fill_value
    return "zeros" if value is None or value == 0 else f"the fill value {value}"


def expect_codecs_of_numcodecs() -> None:
    """Silence the warning of zarr that other programs may not know numcodecs' codecs in format 3."""
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")


def _opened(store: str, name: str, *, whole: bool = False) -> Any:
    import zarr

    expect_codecs_of_numcodecs()
    with translate(SourceError, store, f"array {name or '/'} cannot be opened"):
        return zarr.open_array(zarr_store(store, whole=whole), path=name, mode="r")


def read_part(store: str, name: str, part: Sequence[slice], *, zero: bool) -> NDArray:
    """Part of an array of a zarr store.

    Parameters
    ----------
    store, name : folder of the store, and of the array in it ("" when the store is the array)
    part : one slice an axis, with positive steps
    zero : missing chunk files read as zeros (the array's fill value)

    Raises
    ------
    SourceError
        When the array cannot be opened, or a chunk file is missing, outside of the store, or cannot be decoded; names it.
    """
    array = _opened(store, name, whole=not zero)
    check_there(store, name, array, part, zero=zero)
    try:
        if math.prod(array.shards or array.chunks) * array.dtype.itemsize >= _LARGE:
            return _one_by_one(store, name, array, part)
        return np.ascontiguousarray(array[tuple(part)])  # format 2 knows Fortran order
    except (MemoryError, StemDaskError):
        raise
    except Exception as error:  # each codec has its own
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        found = undecodable(store, name, array, part)
        path, why = found or (f"{store}: array {name or '/'}", error)
        more = "; stem-dask verify lists all damaged files of the store" if name else ""
        raise SourceError(
            f"{path} cannot be decoded ({one_line(why) or type(why).__name__}): it was damaged, copy it again{more}"
        ) from error


def _one_by_one(store: str, name: str, array: Any, part: Sequence[slice]) -> NDArray:
    """Read a part chunk file by chunk file: zarr would decode ten at once, whatever their size."""
    from zarr.core.buffer import default_buffer_prototype

    buffers = default_buffer_prototype().nd_buffer
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
        place = buffers.from_numpy_array(out[tuple(here)])
        array.get_basic_selection(tuple(there), out=place)
    return out


def damaged_chunks(store: str) -> Iterator[str]:
    """Read a zarr store once, chunk by chunk, and yield one message per damaged chunk file.

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
            for path, region in files_of(store, name, array, [slice(None)] * array.ndim):
                if _lost(path):
                    yield f"{path} is missing or empty"
                    continue
                try:
                    array[region]
                except StemDaskError:
                    raise
                except Exception as error:  # each codec has its own
                    yield f"{path} cannot be decoded ({error})"


@contextlib.contextmanager
def decoded(store: str, group: Any) -> Iterator[None]:
    """Context in which the small arrays of a group are read: a damaged or missing chunk raises an error.

    Raises
    ------
    SourceError
        When a chunk is missing, or something within cannot be decoded.
    """
    for name, array in group.arrays():
        if name not in ("patterns", "profile"):  # large, and read elsewhere
            place = f"{group.path}/{name}".lstrip("/")
            for path, _ in files_of(store, place, array, [slice(None)] * array.ndim):
                if _lost(path):
                    raise SourceError(f"{path} is missing or empty; copy the store again")
    try:
        yield
    except (ValueError, RuntimeError) as error:  # each codec has its own
        raise SourceError(
            f"{store}: an array cannot be decoded ({error}); stem-dask verify lists the damaged files of a store"
        ) from error


def _lost(path: Any) -> bool:
    """Whether a file is missing or empty, as after a power cut: zarr reads both as zeros."""
    try:
        return path.stat().st_size == 0
    except FileNotFoundError:
        return True


def chunk_path(store: str, name: str, array: Any, place: Sequence[int]) -> Any:
    """File, or object, of a chunk."""
    return at(store, name, array.metadata.encode_chunk_key(tuple(place)))


def refuse_outside(store: str, path: Path | Location) -> None:
    """Refuse symbolic links out of a store: their target was not written with the store.

    Raises
    ------
    SourceError
        When the path is, or lies behind, a link to another place.
    """
    if isinstance(path, Location):  # object stores have no links
        return
    real, home = os.path.realpath(path), os.path.realpath(store)
    if os.path.commonpath([real, home]) != home:
        raise SourceError(
            f"{store}: {path} leads out of the store, to {real}; put a copy in the link's place"
        )
