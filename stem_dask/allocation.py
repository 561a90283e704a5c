"""How a process that is ours manages its memory: what it just gave back costs as much to get as the work on it."""

import ctypes
import functools
import gc
import os

#: in bytes: larger pieces come from the system and go back to it, and so much of the others may be kept for the next; in
#: one place, not in one for each thread
FROM_SYSTEM, KEPT = 4 * 2**20, 16 * 2**20
#: after how many new objects the garbage collector makes a round: as Python has it, and while packages are loaded
USUAL, MANY = gc.get_threshold(), 200_000
#: names of these in the C library (malloc.h of glibc)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


@functools.cache
def keep_freed_memory() -> None:
    """Take back what Dask sets for its workers, once in a process: every buffer above 128 kB would be new memory.

    Encoding a chunk takes several buffers of up to 1 MiB; with Dask's setting, which frees what a worker keeps for tasks
    to come, it takes twice as long. Our tasks keep nothing. Without that setting, or with another C library, nothing is
    changed.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, FROM_SYSTEM)
        mallopt(_TRIM_THRESHOLD, KEPT)
        mallopt(_ARENA_MAX, 1)


def postpone_collection() -> None:
    """Have Python's garbage collector wait until `exempt_from_collection`: packages that are loaded make hundreds of
    thousands of objects, none of them garbage, and its rounds over them take a third of that time. For processes of ours only.
    """
    gc.set_threshold(MANY)


@functools.cache
def exempt_from_collection() -> None:
    """Let Python's garbage collector pass over all objects that there are: a round over those of loaded libraries takes
    0.1 s, in the middle of a task.

    For processes of ours only: of somebody else's, what is garbage now or later would stay. And once in a process: what a
    job of many leaves must not pile up.
    """
    gc.freeze()
    gc.set_threshold(*USUAL)
