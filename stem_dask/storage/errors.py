"""Errors of the system and of libraries become one line for the user."""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator

from stem_dask.core.errors import (
    NO_ROOM,
    DiskFullError,
    SourceError,
    StemDaskError,
    StoreError,
)
from stem_dask.storage.location import is_url

#: what to do about a damaged file
COPY = "it is cut or damaged: copy it again from where it was written"

#: what to do about files that a machine does not see
SHARED = "input and output must be in folders that all machines of the cluster share"


def one_line(text: object) -> str:
    """Text of a library or a file as one printable line of at most 200 characters.

    Examples
    --------
    >>> one_line(ValueError("no\\n  chunk \\x00 here"))
    'no chunk here'
    """
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "something else", str(text))
    words = "".join(c if c.isprintable() else " " for c in text).split()
    line = " ".join(words)
    return line if len(line) <= 200 else f"{line[:200]} …"


@contextlib.contextmanager
def translate(
    kind: type[SourceError] | type[StoreError],
    path: object = "",
    what: str = "",
    remedy: str = COPY,
) -> Iterator[None]:
    """Raise an error of the system or a library within this context as ``kind``, in one line that names the file.

    An OSError with an errno keeps it, since the engine decides by it whether to retry; a full disk is a `DiskFullError`. Errors
    of stem_dask and MemoryError pass.

    Parameters
    ----------
    path : file that is read or written; without one, the text of an OSError stays
    what : what is wrong with a damaged file, for which libraries raise many types of errors (h5py KeyError, OSError,
        RuntimeError, TypeError and ValueError, zarr's codecs SystemError too); without it, other errors than OSError pass
    remedy : what to do about a damaged file

    Examples
    --------
    >>> with translate(SourceError, "/", "not a readable HDF5 file"):
    ...     raise KeyError("bad object header")
    Traceback (most recent call last):
    stem_dask.core.errors.SourceError: /: not a readable HDF5 file (bad object header); it is cut or damaged: copy it again from where it was written
    >>> with translate(StoreError, "scan.pt"):
    ...     open("/no/such/folder/scan.pt.incomplete")
    Traceback (most recent call last):
    stem_dask.core.errors.StoreError: scan.pt cannot be written: No such file or directory
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        # HDF5 hides a failed write behind a RuntimeError of closing the file
        cause = error.__context__ if isinstance(error, RuntimeError) and not what else error
        is_input = kind is SourceError
        if is_input and isinstance(error, OSError) and is_gone(path):
            raise SourceError(
                f"{path} does not exist on {socket.gethostname()}: it was moved or removed, or that machine does not share "
                f"its folder; {SHARED}"
            ) from error
        if isinstance(error, StemDaskError):
            raise
        number = cause.errno if isinstance(cause, OSError) else None
        if what and number in (None, 0, errno.EINVAL):  # a damaged file may name any offset
            # the text of a KeyError is in quotes
            words = error.args[0] if isinstance(error, KeyError) and error.args else error
            text = f"{path}: {what} ({one_line(words) or type(error).__name__}); {remedy}"
            raise kind(text) from error
        if not isinstance(cause, OSError):
            raise
        text = str(cause)
        if path:
            why = one_line(cause) if number is None else os.strerror(number)
            text = f"{path} cannot be {'read' if is_input else 'written'}: {why}"
        full = not is_input and number in NO_ROOM
        translated = DiskFullError(text) if full else kind(text)
        translated.errno = number
        raise translated from error


def is_gone(path: object) -> bool:
    """Whether a local file of this name does not exist."""
    return bool(path) and not is_url(str(path)) and not os.path.exists(str(path))


def path_of(source: object) -> str:
    """Path of the file that a source, or the source below a view, reads; "" if there is none."""
    while not hasattr(source, "path") and hasattr(source, "source"):
        source = source.source
    path = getattr(source, "path", "")
    return path if isinstance(path, str) else ""
