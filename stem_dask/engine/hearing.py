"""Whether somebody else's scheduler still answers: one that hangs keeps its connection, and Dask would wait for ever."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

_logger = logging.getLogger("stem_dask")

#: how often the scheduler is asked whether it is there, and how long it may take to answer, in seconds
ASK_SECONDS = 15.0

#: after so many seconds without an answer the user is told, and after so many the run ends: it goes on later, and what a
#: cluster pauses comes back within minutes or not at all
TOLD_SECONDS, LOST_SECONDS = 60.0, 300.0

#: clients that are listened for, and those that were given up
_listening: set[str] = set()

_given_up: set[str] = set()


async def knock(address: str, seconds: float) -> None:
    """Connect to a scheduler and leave again.

    Raises
    ------
    OSError
        When it does not answer in time.
    """
    from distributed.comm import connect as reach
    from distributed.security import Security

    comm = await reach(address, timeout=seconds, **Security().get_connection_args("client"))
    await comm.close()


@contextlib.contextmanager
def listening(client: Any) -> Iterator[None]:
    """Ask the scheduler of a client again and again; when it is silent for too long, the client is closed.

    Whoever waits for it then gets an error that `stem_dask.engine.clients.connected` translates. Nothing is asked of a scheduler
    in this process, and of none twice.

    Parameters
    ----------
    client : a `distributed.Client`
    """
    if client.id in _listening or client.scheduler is None or _is_here(client):
        yield
        return
    _listening.add(client.id)
    over = threading.Event()
    threading.Thread(target=_listen, args=(client, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _listening.discard(client.id)


def silence(client: Any) -> str:
    """Why a client was given up; empty when it was not."""
    return f"has not answered for {LOST_SECONDS:g} s" if client.id in _given_up else ""


def _is_here(client: Any) -> bool:
    """Whether the scheduler is an object of this process."""
    from distributed import Scheduler

    return isinstance(getattr(client.cluster, "scheduler", None), Scheduler)


def _listen(client: Any, over: threading.Event) -> None:
    where, heard, told = client.scheduler.address, time.monotonic(), False
    while not over.wait(ASK_SECONDS):
        if client.status == "closed":
            return
        try:
            client.sync(client.scheduler.ncores, workers=[], callback_timeout=ASK_SECONDS)
        except Exception:  # of time; or of a lost connection, which Dask itself looks after
            silent = time.monotonic() - heard
        else:
            heard = time.monotonic()
            if told:
                _logger.warning("the scheduler at %s answers again; the run goes on", where)
            told = False
            continue
        if silent >= LOST_SECONDS and not over.is_set():
            _given_up.add(client.id)
            with contextlib.suppress(Exception):
                client.close(timeout=ASK_SECONDS)
            return
        if silent >= TOLD_SECONDS and not told:
            told = True
            _logger.warning(
                "the scheduler at %s has not answered for %.0f s; the run waits for it, %.0f s at most, and can be stopped",
                where, silent, LOST_SECONDS,
            )  # fmt: skip
