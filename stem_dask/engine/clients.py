"""Calls that run on workers, or on threads of this process: a few in flight, results as they come."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

from stem_dask.core.errors import (
    ConfigError,
    SourceError,
    StemDaskError,
    StoreError,
    WorkerLostError,
)
from stem_dask.storage.errors import SHARED

#: what a `KilledWorker` means
KILLED = (
    "a task killed its worker several times, most likely because memory ran out: lower output.chunk_mb, or raise "
    "cluster.memory_limit"
)


def is_lost(client: Any, error: BaseException) -> bool:
    """Whether an error came of a scheduler that is not there any more; Dask then cancels everything, or says what it was about
    to do.
    """
    return isinstance(error, CancelledError) or (
        isinstance(error, Exception)
        and not isinstance(error, StemDaskError)
        and client.status != "running"
    )


def refuse_no_client(client: Any) -> None:
    """Refuse what a user gives in place of a client that can be waited for.

    Raises
    ------
    ConfigError
        When it is something else, such as a cluster, or asynchronous.
    """
    from distributed import Client

    if not isinstance(client, Client):
        raise ConfigError(
            f"the client is a {type(client).__name__}; expected a distributed.Client, such as Client(cluster) or Client(address)"
        )
    if client.asynchronous:
        raise ConfigError(
            f"the client of {client.scheduler.address} is asynchronous, and what is called here waits for its workers; use a "
            "Client without asynchronous=True, in a coroutine by asyncio.to_thread"
        )


@contextlib.contextmanager
def connected(client: Any) -> Iterator[None]:
    """Have what is done with a client's workers say that their scheduler has gone, or hangs, when it does.

    Parameters
    ----------
    client : a `distributed.Client`, or None for threads of this process

    Raises
    ------
    WorkerLostError
    """
    if client is None:
        yield
        return
    # a client that gave up before, in a batch, has none
    where = "" if client.scheduler is None else f" at {client.scheduler.address}"
    try:
        yield
    except Exception as error:
        if not is_lost(client, error):
            raise
        raise WorkerLostError(
            f"the scheduler{where} has ended or cannot be reached; start one with workers, and run the same command again "
            "to resume"
        ) from error


#: packages that client, scheduler and workers must share, and how many parts of their versions; None: all
VERSIONS = {"python": 2, "dask": None, "distributed": None, "numpy": 2, "stem_dask": None}


def refuse_other_versions(client: Any) -> None:
    """Compare the versions of a client's scheduler and workers with those of this process.

    Raises
    ------
    ConfigError
        When one of them differs in a version that matters.
    """
    found = client.get_versions(packages=["stem_dask"])
    here = _versions(found["client"])
    places = {"the scheduler": found["scheduler"]}
    places |= {f"worker {address}": answer for address, answer in found["workers"].items()}
    for place, answer in places.items():
        there = _versions(answer)
        other = [
            f"{name} {there[name]}, not {here[name]}" for name in here if there[name] != here[name]
        ]
        if other:
            raise ConfigError(
                f"{place} has {'; '.join(other)}; install the same versions there (pip install -c constraints.txt)"
            )


def _versions(answer: Any) -> dict[str, str]:
    """Versions that matter, of one answer to `distributed.Client.get_versions`."""
    packages = answer.get("packages", {}) if isinstance(answer, Mapping) else {}
    return {
        name: ".".join((packages.get(name) or "missing").split(".")[:parts])
        for name, parts in VERSIONS.items()
    }


#: how long a new folder may take to be seen on other machines: looked at again after so many seconds each
SEEN_SECONDS = (0.2, 1.0, 3.0)


def see(client: Any, paths: Mapping[str, type[SourceError] | type[StoreError]]) -> None:
    """Have workers on other machines look for the files of a job: a folder that each machine has for itself is no place for them.

    Parameters
    ----------
    client : a `distributed.Client`, or None for threads of this process
    paths : of the input and the run's folder, which are there, each with the error to raise

    Raises
    ------
    SourceError, StoreError
        When a worker does not see one of them; names its machine, or the first ones.
    """
    if client is None:
        return
    missing: list[tuple[str, str]] = []
    for wait_seconds in (*SEEN_SECONDS, 0.0):
        found = client.run(unseen, tuple(paths), on_error="ignore")
        missing = [here for here in found.values() if isinstance(here, tuple)]
        if not missing:
            return
        time.sleep(wait_seconds)
    path = min((path for _, path in missing), key=[*paths].index)
    hosts = sorted({host for host, at in missing if at == path})
    who = f"a worker on {hosts[0]} does" if len(hosts) == 1 else f"workers on {_some(hosts)} do"
    raise paths[path](f"{who} not see {path}; {SHARED}")


def _some(names: Sequence[str]) -> str:
    """The first three, and how many more there are.

    Examples
    --------
    >>> _some(["a", "b"]), _some(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    more = f" and {len(names) - 3} more" * (len(names) > 3)
    return ", ".join(names[:3]) + more


def unseen(paths: Sequence[str]) -> tuple[str, str] | None:
    """Name of this machine and the first path that is not there; None when all are.

    Examples
    --------
    >>> unseen(["/"])
    """
    missing = [path for path in paths if not os.path.exists(path)]
    return (socket.gethostname(), missing[0]) if missing else None
