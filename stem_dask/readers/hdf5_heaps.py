"""HDF5 files opened for what their headers say, with an eye on the one kind of damage that HDF5 never comes back from.

Texts of variable length lie in collections (global heaps). The library walks through one by the sizes of its objects, and
where a size has become zero, as a block of zeros makes it, it walks on the spot: without end, and deaf to Ctrl-C.
"""

import contextlib
import errno
import io
import re
import struct
from collections.abc import Iterator
from typing import Any

from stem_dask.core.errors import SourceError
from stem_dask.storage.errors import COPY, one_line, told

_MAGIC, _HEADER, _OBJECT = b"GCOL\x01\0\0\0", 16, struct.Struct("<HHIQ")

#: the library gives collections some kB; only those of one object are larger
_MOST_BYTES = 1 << 24

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
        When it is no readable HDF5 file, when anything within cannot be read, or when a collection of texts that was
        asked for is damaged, even where the reader made do without.
    """
    import h5py

    # the first has the lock that a program which still writes the file refuses
    with (
        told(f"{path}: not a readable HDF5 file"),
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
    """A file that refuses to give a collection of texts that has no end; ``damaged`` is the byte where one begins."""

    damaged: int | None = None

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as asked for by HDF5."""
        start = self.tell()
        n = super().readinto(buffer) or 0
        found = bytes(memoryview(buffer)[:n])
        place = found.find(_MAGIC)
        while place >= 0:
            if (start + place) % 8 == 0 and not self._ends(start + place):
                self.damaged = start + place
                raise OSError(f"the collection of texts at byte {start + place:,} has no end")
            place = found.find(_MAGIC, place + 1)
        self.seek(start + n)
        return n

    def _ends(self, place: int) -> bool:
        """Whether a walk through a collection, as the library does it, comes to an end."""
        self.seek(place + 8)
        n_bytes = int.from_bytes(self.read(8), "little")
        if not _HEADER < n_bytes <= _MOST_BYTES:
            return True  # the library refuses it, or there is no more than one object
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
