"""The errors of stem_dask, each with the exit code the command line ends with.

Every error takes one string (others do not survive the way back from a worker process) that says what is wrong with
its value, what was expected and what to do. Each is also the builtin error a caller would expect.
"""

import errno

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


class MemoryBudgetError(StemDaskError, MemoryError):
    """The work does not fit into the memory that was allowed."""

    exit_code = 2


class RetentionError(StemDaskError, ValueError):
    """The output was finished, but too many patterns lost too much intensity."""

    exit_code = 4


class LockedError(StemDaskError, BlockingIOError):
    """Another live run holds the output."""

    exit_code = 6


class WorkerLostError(StemDaskError, RuntimeError):
    """A worker process ended, most likely for want of memory."""

    exit_code = 5


class InterruptedRunError(StemDaskError, InterruptedError):
    """The run was asked to stop; the same command goes on."""

    exit_code = 75
