"""Errors of libraries that read damaged files become one line for the user."""

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
    """Text of a library or a file as one printable line of at most 200 characters.

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
def translate(what: str, remedy: str = COPY, *, retried: bool = False) -> Iterator[None]:
    """Raise any error of a library within this context as `SourceError`: ``what (its text); remedy``.

    Errors of stem_dask and MemoryError pass unchanged; with ``retried`` also OSError with an errno, which the engine
    retries. Libraries raise many types for a damaged file: h5py KeyError, OSError, RuntimeError, TypeError and ValueError,
    zarr's codecs SystemError too.

    Examples
    --------
    >>> with translate("a.h5: damaged", "copy it again"):
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


#: remedy for files that a machine does not see
SHARED = "input and output must be in folders that all machines of the cluster share"


def path_of(source: object) -> str | None:
    """Path of the local file that a source, or the source below a view, reads; None if there is none."""
    while not hasattr(source, "path") and hasattr(source, "source"):
        source = source.source
    path = getattr(source, "path", None)
    return path if isinstance(path, str) and not is_url(path) else None


@contextlib.contextmanager
def present(source: object) -> Iterator[None]:
    """Raise a read error of a source whose file does not exist as such, with the name of the machine."""
    try:
        yield
    except OSError as error:
        path = path_of(source)
        if path is None or os.path.exists(path):
            raise
        raise SourceError(
            f"{path} does not exist on {socket.gethostname()}: it was moved or removed, or that machine does not share its folder; "
            f"{SHARED}"
        ) from error
