"""Arrays in files, read a block at a time: what a worker needs to read is small, picklable, and opens by name.

Every source has ``shape``, ``dtype`` and ``source[slices]``, slices with positive steps, and gives a
C-contiguous array. They nest: a selection of a scan made of a list of patterns in a flat file.
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

#: what becomes of chunk files of a zarr store that are not there
Missing = Literal["refuse", "zero"]


_NO_LOCKS = "the file system has no locks; the file is read without"

_ELSEWHERE = (
    "the file is open for writing in another program, or was not closed properly; it is read without a lock and may still "
    "change: close it there first"
)


@contextlib.contextmanager
def hdf5_file(path: str, notes: list[str] | None = None) -> Iterator[Any]:
    """An HDF5 file, open for reading; without a lock where it cannot be locked, which ``notes`` then say.

    Without a lock it is opened through Python: HDF5 refuses a second way of locking of a file that is open in the process.

    Raises
    ------
    SourceError
        When it is open for writing elsewhere, in a state that cannot be read.
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
        except Exception as error:  # of many kinds, see `told`
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
    """An HDF5 file, open for reading its headers.

    Parameters
    ----------
    path : name of the file
    notes : takes a note where the file cannot be locked

    Raises
    ------
    SourceError
        When it is no readable HDF5 file, or when anything within cannot be read.
    """
    with told(f"{path}: not a readable HDF5 file"), hdf5_file(path, notes) as file:
        yield file


@dataclass(frozen=True)
class Hdf5Dataset:
    """A dataset of an HDF5 file; ``chunk_bytes`` are those of a chunk when it is decoded, 0 when there are none.

    In ``name`` bytes that are no UTF-8 are escaped as Python escapes those of file names.
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
    """An array of a zarr store, format 2 or 3; chunk files that are missing are refused, or zeros."""

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    missing: Missing = "refuse"
    chunk_bytes: int = 0  # of a chunk file (a shard, where there are shards) when it is decoded

    def __getitem__(self, part: Slices) -> NDArray:
        from stem_dask.readers.zarr_chunks import read_part

        return read_part(self.path, self.name, part, zero=self.missing == "zero")
