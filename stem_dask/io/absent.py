"""An input that is not there for whoever reads it: on a cluster most often because another machine does not share its folder."""

import contextlib
import os
import socket
from collections.abc import Iterator

from stem_dask.errors import SourceError
from stem_dask.urls import is_url

#: the way out
SHARED = "input and output must be in folders that all machines of the cluster share"


def path_of(source: object) -> str | None:
    """The file or folder that a source (see `stem_dask.io.sources`) reads, however it is seen; None when it is none here.

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
