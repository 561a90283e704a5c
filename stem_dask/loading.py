"""Modules that take their time, loaded beside other work."""

import contextlib
import importlib
import sys
import threading

#: of two threads that load packages which need each other, one may see half of one
_ONE_AT_A_TIME = threading.Lock()


def load(name: str) -> None:
    """Load a module, while no other thread does so by this function.

    Examples
    --------
    >>> load("stem_dask.model")
    """
    with _ONE_AT_A_TIME:
        importlib.import_module(name)


def load_dask_array() -> None:
    """Load it without scipy, whose Fourier transforms and sparse matrices it offers and no task here asks it for; they take
    as long to load as Dask does. For processes of ours only; scipy itself can be loaded later.

    Examples
    --------
    >>> load_dask_array()
    """
    if "scipy" in sys.modules:
        return
    sys.modules["scipy"] = None  # type: ignore[assignment]  # as Python spells that there is none
    try:
        load("dask.array")
    finally:
        del sys.modules["scipy"]


def load_meanwhile(*names: str, alone: bool = False) -> None:
    """Begin to load modules, in a thread; what cannot be loaded is told by whoever needs it next.

    Parameters
    ----------
    alone : whether this process is there for a run only
    """
    # first and by itself, for the same reason
    import distributed  # noqa: F401

    def loaded() -> None:
        with contextlib.suppress(Exception):
            if alone:
                load_dask_array()
            for name in names:
                load(name)

    # no daemon: Python waits for it at the end, instead of ending in the middle of an import
    threading.Thread(target=loaded).start()
