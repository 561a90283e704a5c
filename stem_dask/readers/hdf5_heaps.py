"""HDF5 files opened for reading, without a lock where the file system has none or another program writes the file."""

import contextlib
import errno
import re
from collections.abc import Iterator
from typing import Any

from stem_dask.core.errors import SourceError
from stem_dask.storage.errors import one_line, told

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
