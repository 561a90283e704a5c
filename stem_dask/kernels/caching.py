"""Whether compiled kernels can be cached on disk for later processes."""

import numba


def _can_cache() -> bool:
    """Whether numba can write to the folder of the package, the cache of the user, or NUMBA_CACHE_DIR; else it raises."""
    try:
        numba.njit(cache=True)(_nothing)
    except RuntimeError:
        return False
    return True


def _nothing() -> None: ...


#: for ``numba.njit(cache=…)``
CACHE = _can_cache()
