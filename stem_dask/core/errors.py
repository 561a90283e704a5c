"""The errors of stem_dask, each with the exit code the command line ends with.

Every error takes one string (others do not survive the way back from a worker process) that says what is wrong with
its value, what was expected and what to do. Each is also the builtin error a caller would expect.
"""

import contextlib
import errno
from collections.abc import Iterator

#: numbers of the system's errors that say there is no room
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StemDaskError(Exception):
    """Anything stem_dask refuses or fails at, with a message meant for the user."""

    exit_code = 1


class ConfigError(StemDaskError, ValueError):
    """An option is wrong, or options contradict each other or the data."""

    exit_code = 2


class SourceError(StemDaskError, OSError):
    """The input cannot be read, or holds nothing to work on."""

    exit_code = 3


class StoreError(StemDaskError, OSError):
    """The output cannot be written."""

    exit_code = 5


class DiskFullError(StoreError):
    """There is no room for the output."""

    exit_code = 5


class OutputExistsError(StoreError, FileExistsError):
    """There is an output of that name, and overwriting was not asked for."""

    exit_code = 2


# MemoryError comes first where it is a base: in the other order such an error does not survive the way from a worker
class MemoryBudgetError(MemoryError, StemDaskError):
    """The work does not fit into the memory that was allowed."""

    exit_code = 2


class NoMemoryError(MemoryError, StemDaskError):
    """A task found no room in the memory of its process, or of its GPU."""

    exit_code = 5


class LockedError(StemDaskError, BlockingIOError):
    """Another live run holds the output."""

    exit_code = 6


class WorkerLostError(StemDaskError, RuntimeError):
    """A worker process ended, most likely for want of memory."""

    exit_code = 5


class InterruptedRunError(StemDaskError, InterruptedError):
    """The run was asked to stop; the same command goes on."""

    exit_code = 75


@contextlib.contextmanager
def told_as(kind: type[SourceError] | type[StoreError]) -> Iterator[None]:
    """Errors of the system become ours, of the input or the output; with their number, which tells whether to try again.

    Examples
    --------
    >>> with told_as(SourceError):
    ...     raise FileNotFoundError(2, "No such file", "scan.dm4")
    Traceback (most recent call last):
    stem_dask.core.errors.SourceError: [Errno 2] No such file: 'scan.dm4'
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StemDaskError):
            raise
        full = kind is StoreError and error.errno in NO_ROOM
        ours = DiskFullError(str(error)) if full else kind(str(error))
        ours.errno = error.errno
        raise ours from error
