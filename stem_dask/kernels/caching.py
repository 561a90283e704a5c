"""Whether compiled kernels can be kept on the disk for the next process."""

import numba


def _can_cache() -> bool:
    """numba refuses a function that it shall keep where neither the package's folder nor the user's cache can be written.

    Then every process compiles for itself, in memory, unless NUMBA_CACHE_DIR names a folder.
    """
    try:
        numba.njit(cache=True)(_nothing)
    except RuntimeError:
        return False
    return True


def _nothing() -> None: ...


#: for ``numba.njit(cache=…)``
CACHE = _can_cache()
