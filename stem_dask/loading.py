"""Modules that take their time, loaded beside other work."""

import contextlib
import importlib
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


def load_meanwhile(*names: str) -> None:
    """Begin to load modules, in a thread; what cannot be loaded is told by whoever needs it next."""
    # first and by itself, for the same reason
    import distributed  # noqa: F401

    def loaded() -> None:
        with contextlib.suppress(Exception):
            for name in names:
                load(name)

    # no daemon: Python waits for it at the end, instead of ending in the middle of an import
    threading.Thread(target=loaded).start()
