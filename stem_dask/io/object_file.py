"""A file in an object store, read by ranges of bytes: for formats whose numbers lie one after another."""

import functools
import io
from typing import Any

from stem_dask.errors import SourceError
from stem_dask.io.objects import asked, located, look
from stem_dask.urls import is_url

#: bytes that are asked for when a header is read
HEADER_BYTES = 2**16


class ObjectFile(io.RawIOBase):
    """An object as a file that is open for reading; its size is that of when it was first asked for."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.place = url, 0

    @functools.cached_property
    def size(self) -> int:
        """Bytes."""
        return look(self.url).st_size

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next byte is."""
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go elsewhere."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = start + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        """The next bytes, as many as there are and the buffer takes."""
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self.size - self.place))
        if n:
            self.fill(self.place, view[:n])
            self.place += n
        return n

    def fill(self, position: int, run: memoryview) -> None:
        """The bytes from a position on into all of a buffer, in one request.

        Raises
        ------
        SourceError
            When the object has not got them, or cannot be read.
        """
        store, key = located(self.url)
        import obstore

        end = position + len(run)
        found: Any = asked(
            SourceError, self.url, lambda: obstore.get_range(store, key, start=position, end=end)
        )
        if len(found) != len(run):
            raise SourceError(
                f"{self.url}: bytes {position:,} to {end:,} were asked for, and {len(found):,} came; it was replaced "
                "while it was read"
            )
        run[:] = memoryview(found)


def opened_file(path: str, *, buffered: bool = True) -> Any:
    """A file, or an object, open for reading.

    Parameters
    ----------
    buffered : for headers, which are read in a few bytes at a time
    """
    if not is_url(path):
        return open(path, "rb", buffering=-1 if buffered else 0)
    file = ObjectFile(path)
    return io.BufferedReader(file, HEADER_BYTES) if buffered else file
