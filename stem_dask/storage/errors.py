"""What a library raises over content that it cannot make sense of becomes one line for the user."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator

from stem_dask.core.errors import SourceError, StemDaskError
from stem_dask.storage.urls import is_url

#: what to do about a damaged file
COPY = "it is cut or damaged: copy it again from where it was written"

_MOST_CHARACTERS = 200


def one_line(text: object) -> str:
    """The words of a library, or of a file, as at most 200 characters that can be printed on one line.

    Examples
    --------
    >>> one_line(ValueError("no\\n  chunk \\x00 here"))
    'no chunk here'
    """
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "something else", str(text))
    words = "".join(c if c.isprintable() else " " for c in text).split()
    line = " ".join(words)
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]} …"


@contextlib.contextmanager
def told(what: str, remedy: str = COPY, *, retried: bool = False) -> Iterator[None]:
    """Any error within that is not of ours is told as ``what (its own words); remedy``.

    With ``retried`` errors of the system, which have a number, stay what they are: the engine tries again.

    Libraries raise errors of every kind for a damaged file: those of HDF5 are KeyError, OSError, RuntimeError, TypeError
    or ValueError, those of zarr's codecs SystemError too.

    Raises
    ------
    SourceError
        In their place; an error for want of memory stays.

    Examples
    --------
    >>> with told("a.h5: damaged", "copy it again"):
    ...     raise KeyError("bad object header")
    Traceback (most recent call last):
    stem_dask.core.errors.SourceError: a.h5: damaged (bad object header); copy it again
    """
    try:
        yield
    except (StemDaskError, MemoryError):
        raise
    except Exception as error:
        if retried and isinstance(error, OSError) and error.errno is not None:
            raise
        # the text of a KeyError is in quotes
        words = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise SourceError(
            f"{what} ({one_line(words) or type(error).__name__}); {remedy}"
        ) from error


#: the way out
SHARED = "input and output must be in folders that all machines of the cluster share"


def path_of(source: object) -> str | None:
    """The file or folder that a source (see `stem_dask.readers.flat`) reads, however it is seen; None when it is none here.

    Examples
    --------
    >>> path_of(object()) is None
    True
    """
    while not hasattr(source, "path") and hasattr(source, "source"):
        source = source.source
    path = getattr(source, "path", None)
    return path if isinstance(path, str) and not is_url(path) else None


@contextlib.contextmanager
def present(source: object) -> Iterator[None]:
    """Errors of reading a source whose file is not there say so, and for which machine; a library may call it damaged.

    Raises
    ------
    SourceError
    """
    try:
        yield
    except OSError as error:
        path = path_of(source)
        if path is None or os.path.exists(path):
            raise
        raise SourceError(
            f"{path} is not there for {socket.gethostname()}: it was moved or removed, or that machine does not share its folder; "
            f"{SHARED}"
        ) from error
