"""The errors of stem_dask, each with the exit code the command line ends with.

Every error takes one string, because others cannot be pickled back from a worker process. The message states what is wrong,
with its value, what was expected, and what to do. Each error is also the builtin error that a caller would expect.
"""

import errno

#: errno values for a full disk, quota or file size limit
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StemDaskError(Exception):
    """Base class; the message is meant for the user."""

    exit_code = 1


class ConfigError(StemDaskError, ValueError):
    """An option is invalid, or options contradict each other or the data."""

    exit_code = 2


class SourceError(StemDaskError, OSError):
    """The input cannot be read, or is empty."""

    exit_code = 3


class StoreError(StemDaskError, OSError):
    """The output cannot be written."""

    exit_code = 5


class DiskFullError(StoreError):
    """The disk is full."""

    exit_code = 5


class OutputExistsError(StoreError, FileExistsError):
    """The output exists, and overwriting was not requested."""

    exit_code = 2


# MemoryError must be the first base: in the other order the error cannot be unpickled
class MemoryBudgetError(MemoryError, StemDaskError):
    """The projected memory exceeds the limit."""

    exit_code = 2


class NoMemoryError(MemoryError, StemDaskError):
    """A task ran out of memory of its process or GPU."""

    exit_code = 5


class LockedError(StemDaskError, BlockingIOError):
    """Another running process holds the lock of the output."""

    exit_code = 6


class WorkerLostError(StemDaskError, RuntimeError):
    """A worker process died, most likely because it ran out of memory."""

    exit_code = 5


class InterruptedRunError(StemDaskError, InterruptedError):
    """The run was interrupted; the same command resumes it."""

    exit_code = 75
