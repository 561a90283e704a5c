"""Numba without BLAS, which no kernel here calls."""

import sys


def load_without_blas() -> None:
    """Load what numba needs for its first kernel, but for scipy's BLAS, at which it looks in passing.

    Loading that takes half of the time that all kernels take, in every worker. Whoever compiles ``np.dot`` later gets it
    then.

    Examples
    --------
    >>> load_without_blas()
    """
    if "numba.np.arraymath" in sys.modules:
        return
    import numba.np.linalg as linalg

    look = linalg.ensure_blas
    linalg.ensure_blas = lambda: None
    try:
        import numba.np.arraymath as arraymath
    finally:
        linalg.ensure_blas = look
    arraymath.ensure_blas = look


def load_numba() -> None:
    """Have numba know all its functions and types, as it does for the first kernel of a process.

    Examples
    --------
    >>> load_numba()
    """
    load_without_blas()
    from numba.core.registry import cpu_target

    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()
