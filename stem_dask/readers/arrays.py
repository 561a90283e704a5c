"""Datasets of HDF5 files and arrays of zarr stores as sources: small, picklable, opened by name on the worker.

Every source has ``shape``, ``dtype`` and ``source[slices]`` (slices with positive steps), which returns a C-contiguous array.
"""

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.readers.source import Slices
from stem_dask.storage.errors import one_line, told

#: what to do about missing chunk files of a zarr store
Missing = Literal["refuse", "zero"]


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
    """As `hdf5_file`, but any error within the context becomes a `SourceError`."""
    with told(f"{path}: not a readable HDF5 file"), hdf5_file(path, notes) as file:
        yield file


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

        what = f"{self.path}: dataset {self.name} cannot be read"
        with told(what, retried=True), hdf5_file(self.path) as file:
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
