"""What a library raises over content that it cannot make sense of becomes one line for the user."""

import contextlib
import re
from collections.abc import Iterator

from stem_dask.errors import SourceError, StemDaskError

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
    stem_dask.errors.SourceError: a.h5: damaged (bad object header); copy it again
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
