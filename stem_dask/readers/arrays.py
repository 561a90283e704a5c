"""Datasets of HDF5 files and arrays of zarr stores as sources: small, picklable, opened by name on the worker.

Every source has ``shape``, ``dtype`` and ``source[slices]`` (slices with positive steps), which returns a C-contiguous array.
"""

import contextlib
import errno
import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.readers.source import Slices
from stem_dask.storage.errors import COPY, one_line, translate

#: what to do about missing chunk files of a zarr store
Missing = Literal["refuse", "zero"]


#: magic, size of the header, and object header of a global heap
_MAGIC, _HEADER, _OBJECT = b"GCOL\x01\0\0\0", 16, struct.Struct("<HHIQ")

#: HDF5 makes heaps of some kB; only those of one object are larger
_MOST_BYTES = 1 << 24

_NO_LOCKS = "the file system has no locks; the file is read without a lock"

_ELSEWHERE = (
    "the file is open for writing in another program, or was not closed properly; it is read without a lock and may still "
    "change: close it there first"
)


@contextlib.contextmanager
def hdf5_file(path: str, notes: list[str] | None = None) -> Iterator[Any]:
    """An HDF5 file, open for reading; a file that cannot be locked is read without a lock, and noted in ``notes``.

    Without a lock it is opened through a Python file: HDF5 refuses to open a file twice with different kinds of locks.

    Raises
    ------
    SourceError
        When another program has it open for writing, in a state that cannot be read.
    """
    import h5py

    try:
        locked = h5py.File(path, "r")
    except OSError as error:
        text = str(error)
        found = re.search(r"unable to lock file, errno = (\d+)", text)
        if not found and "file is already open for write" not in text:
            raise
        elsewhere = not found or int(found[1]) in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
    else:
        with locked as file:
            yield file
        return
    if notes is not None:
        notes.append(_ELSEWHERE if elsewhere else _NO_LOCKS)
    with open(path, "rb") as raw:
        try:
            unlocked = h5py.File(raw, "r")
        except Exception as error:  # h5py raises many kinds
            if not elsewhere:
                raise
            raise SourceError(
                f"{path}: open for writing in another program, in a state that cannot be read ({one_line(error)}); close "
                "it there"
            ) from error
        with unlocked as file:
            yield file


@contextlib.contextmanager
def opened_hdf5(path: str, notes: list[str] | None = None) -> Iterator[Any]:
    """As `hdf5_file`, for headers: any error within the context becomes a `SourceError`.

    Texts of variable length are in global heaps. Where a block of zeros has damaged one, HDF5 loops forever and ignores
    Ctrl-C; such a file is refused.
    """
    import h5py

    # the first keeps the lock, which a program that writes the file refuses
    with (
        translate(SourceError, path, "not a readable HDF5 file"),
        hdf5_file(path, notes),
        _Watched(path) as raw,
    ):
        try:
            with h5py.File(raw, "r") as file:
                yield file
        finally:
            if raw.damaged is not None:
                raise SourceError(
                    f"{path}: not a readable HDF5 file (its texts at byte {raw.damaged:,} have no end); {COPY}"
                )


class _Watched(io.FileIO):
    """A file that raises instead of returning an endless global heap; ``damaged`` is the offset of that heap."""

    damaged: int | None = None

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer for HDF5."""
        start = self.tell()
        n = super().readinto(buffer) or 0
        found = bytes(memoryview(buffer)[:n])
        place = found.find(_MAGIC)
        while place >= 0:
            if (start + place) % 8 == 0 and not self._ends(start + place):
                self.damaged = start + place
                raise OSError(f"the global heap at byte {start + place:,} has no end")
            place = found.find(_MAGIC, place + 1)
        self.seek(start + n)
        return n

    def _ends(self, place: int) -> bool:
        """Whether walking through a global heap as HDF5 does ends."""
        self.seek(place + 8)
        n_bytes = int.from_bytes(self.read(8), "little")
        if not _HEADER < n_bytes <= _MOST_BYTES:
            return True  # HDF5 refuses it, or it has a single object
        self.seek(place)
        heap = self.read(n_bytes)
        at = _HEADER
        while at + _OBJECT.size <= len(heap):
            index, _, _, size = _OBJECT.unpack_from(heap, at)
            step = size if index == 0 else _OBJECT.size + -(-size // 8) * 8
            if step == 0:
                return False
            at += step
        return True


@dataclass(frozen=True)
class Hdf5Dataset:
    """A dataset of an HDF5 file; ``chunk_bytes`` is the decoded size of a chunk, 0 without chunks.

    Bytes of ``name`` that are not UTF-8 are escaped by ``surrogateescape``.
    """

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk_bytes: int = 0

    def __getitem__(self, part: Slices) -> NDArray:
        import hdf5plugin  # noqa: F401  registers blosc and others with HDF5

        what = f"dataset {self.name} cannot be read"
        with translate(SourceError, self.path, what), hdf5_file(self.path) as file:
            name = self.name.encode("utf-8", "surrogateescape")
            return np.asarray(file[name][part])


@dataclass(frozen=True)
class ZarrArray:
    """An array of a zarr store, format 2 or 3; a missing chunk file raises an error or reads as zeros."""

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    missing: Missing = "refuse"
    chunk_bytes: int = 0  # decoded size of a chunk file (a shard, where there are shards)

    def __getitem__(self, part: Slices) -> NDArray:
        from stem_dask.readers.zarr_chunks import read_part

        return read_part(self.path, self.name, part, zero=self.missing == "zero")
