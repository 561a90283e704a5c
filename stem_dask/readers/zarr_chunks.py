"""Chunk files of a zarr array: which a part needs, which of them are missing, and which cannot be decoded.

zarr reads a missing chunk file as its fill value, whether it was never written because nothing was in it, or lost.
"""

import contextlib
import itertools
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
from stem_dask.storage.errors import one_line, told
from stem_dask.storage.s3 import ObjectPath, at, below
from stem_dask.storage.urls import check_path, is_url
from stem_dask.storage.zarr_store import zarr_store

#: chunk files of so many bytes, decoded, are read one after another
_LARGE = 2**20


def files_of(
    store: str, name: str, array: Any, part: Sequence[slice]
) -> Iterator[tuple[Path, tuple[slice, ...]]]:
    """Every chunk file (a shard, where there are shards) that a part of an array needs, and what it holds."""
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
    """All combinations, the last axis fastest; `itertools.product` would first make lists of all, which may be claimed only."""
    if not wanted:
        yield ()
        return
    for first in wanted[0]:
        for rest in _places(wanted[1:]):
            yield (first, *rest)


def check_there(store: str, name: str, array: Any, part: Sequence[slice], *, zero: bool) -> None:
    """See that the chunk files of a part are there.

    Parameters
    ----------
    zero : missing ones are fine, because the user wants them as zeros; one of no length is not

    Raises
    ------
    SourceError
        With the first file that is missing or empty (as a power cut leaves it), and how many are; and when a link leads
        out of the store.
    """
    lost, n = [], 0
    if is_url(store):  # told when it is read: a question for each would double the requests
        return
    for path, _ in files_of(store, name, array, part):
        n += 1
        refuse_outside(store, path)
        try:
            if path.stat().st_size:
                continue
            if zero:
                raise SourceError(
                    f"{path} is empty (0 bytes): writing it was cut short; bring it over again, or remove it, and "
                    "input.missing_chunks=zero reads it as zeros too"
                )
        except FileNotFoundError:
            if zero:
                continue
        lost.append(path)
    if lost:
        raise SourceError(
            f"{lost[0]} is missing or empty ({len(lost):,} of the {n:,} chunk files of these patterns); "
            f"without it they would read as {filling(array)}: bring it over again, or say that this is meant with "
            "input.missing_chunks=zero"
        )


def undecodable(
    store: str, name: str, array: Any, part: Sequence[slice]
) -> tuple[Path, Exception] | None:
    """The first chunk file of a part that cannot be decoded, and why; each is read by itself."""
    for path, region in files_of(store, name, array, part):
        try:
            array[region]
        except StemDaskError:
            raise
        except Exception as error:  # each codec has its own
            return path, error
    return None


def missing_files(store: str, name: str, array: Any) -> tuple[int, int, Path | None]:
    """(missing chunk files, chunk files of the whole array, the first that is missing).

    Folders are listed and no file is looked at, so that a store of many files opens quickly.
    """
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
    """What to say of an array's missing chunk files, when there are any."""
    array = _opened(store, name)
    lost, n, first = missing_files(store, name, array)
    if not lost:
        return None
    words = f"{lost:,} of {n:,} chunk files are missing, the first is {first}"
    if zero:
        return f"{words}; they read as {filling(array)}"
    return f"{words}; reading what they held is refused, unless input.missing_chunks=zero"


def _places_there(store: str, name: str, n_axes: int) -> Iterator[tuple[int, ...]]:
    """Places of the chunk files of an array."""
    folder = at(store, name)
    if not is_url(store):
        yield from _keys(folder, (), n_axes) if folder.is_dir() else ()
        return
    for key, _ in below(str(folder)):
        words = re.split("[./]", key.removeprefix("c/").removeprefix("c."))
        if all(word.isdecimal() for word in words):
            yield tuple(map(int, words))


def _keys(folder: Path, above: tuple[int, ...], n_axes: int) -> Iterator[tuple[int, ...]]:
    """Places of the chunk files below a folder: c/0/1 or c.0.1, in format 2 0.1 or 0/1; links may go round in it."""
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
    """Zarr warns of them whenever it opens an array in format 3: other programs may not read them; it does."""
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")


def _opened(store: str, name: str, *, whole: bool = False) -> Any:
    import zarr

    expect_codecs_of_numcodecs()
    with told(f"{store}: array {name or '/'} cannot be opened", retried=True):
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
        more = "; stem-dask verify names all damaged files of the store" if name else ""
        raise SourceError(
            f"{path} cannot be decoded ({one_line(why) or type(why).__name__}): it was damaged, bring it over again{more}"
        ) from error


def _one_by_one(store: str, name: str, array: Any, part: Sequence[slice]) -> NDArray:
    """A part read chunk file by chunk file: zarr would decode ten at once, whatever memory they take."""
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
        # straight into its place: zarr's loop may still hold the chunk before, and a copy would come on top of both
        place = buffers.from_numpy_array(out[tuple(here)])
        array.get_basic_selection(tuple(there), out=place)
    return out


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
