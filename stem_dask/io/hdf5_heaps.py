"""HDF5 files opened for what their headers say, with an eye on the one kind of damage that HDF5 never comes back from.

Texts of variable length lie in collections (global heaps). The library walks through one by the sizes of its objects, and
where a size has become zero, as a block of zeros makes it, it walks on the spot: without end, and deaf to Ctrl-C.
"""

import contextlib
import io
import struct
from collections.abc import Iterator
from typing import Any

from stem_dask.errors import SourceError
from stem_dask.io.damage import COPY, told

_MAGIC, _HEADER, _OBJECT = b"GCOL\x01\0\0\0", 16, struct.Struct("<HHIQ")
#: the library gives collections some kB; only those of one object are larger
_MOST_BYTES = 1 << 24


@contextlib.contextmanager
def opened_hdf5(path: str) -> Iterator[Any]:
    """An HDF5 file, open for reading.

    Parameters
    ----------
    path : name of the file

    Raises
    ------
    SourceError
        When it is no readable HDF5 file, when anything within cannot be read, or when a collection of texts that was
        asked for is damaged, even where the reader made do without.
    """
    import h5py

    # the first, by the system, has the lock that a program which still writes the file refuses
    with told(f"{path}: not a readable HDF5 file"), h5py.File(path, "r"), _Watched(path) as raw:
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
