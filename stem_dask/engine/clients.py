"""A client's scheduler and workers: whether they can be reached, have the same versions, and see the files of a job."""

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

#: packages that client, scheduler and workers must share, and how many parts of their versions; None: all
VERSIONS = {"python": 2, "dask": None, "distributed": None, "numpy": 2, "stem_dask": None}

#: how long a new folder may take to be seen on other machines: looked at again after so many seconds each
SEEN_SECONDS = (0.2, 1.0, 3.0)


def is_lost(client: Any, error: BaseException) -> bool:
    """Whether an error came of a scheduler that has ended; Dask then cancels everything, or raises what comes first."""
    foreign = isinstance(error, Exception) and not isinstance(error, StemDaskError)
    return isinstance(error, CancelledError) or (foreign and client.status != "running")


def refuse_no_client(client: Any) -> None:
    """Raise ConfigError for what is no client, such as a cluster, or an asynchronous one."""
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
    """Raise WorkerLostError when the scheduler of a client (None for threads of this process) ends within this context."""
    # a client that gave up before, in a batch, has none
    scheduler = None if client is None else client.scheduler
    where = "" if scheduler is None else f" at {scheduler.address}"
    try:
        yield
    except Exception as error:
        if client is None or not is_lost(client, error):
            raise
        raise WorkerLostError(
            f"the scheduler{where} has ended or cannot be reached; start one with workers, and run the same command again "
            "to resume"
        ) from error


def refuse_other_versions(client: Any) -> None:
    """Raise ConfigError when scheduler or workers differ from this process in a version that matters."""
    found = client.get_versions(packages=["stem_dask"])

    def versions(answer: Any) -> dict[str, str]:
        packages = answer.get("packages", {}) if isinstance(answer, Mapping) else {}
        parts = {name: (packages.get(name) or "missing").split(".") for name in VERSIONS}
        return {name: ".".join(parts[name][:n]) for name, n in VERSIONS.items()}

    here = versions(found["client"])
    workers = {f"worker {address}": answer for address, answer in found["workers"].items()}
    for place, answer in {"the scheduler": found["scheduler"], **workers}.items():
        there = versions(answer)
        other = [f"{n} {there[n]}, not {here[n]}" for n in here if there[n] != here[n]]
        if other:
            raise ConfigError(
                f"{place} has {'; '.join(other)}; install the same versions there (pip install -c constraints.txt)"
            )


def see(client: Any, paths: Mapping[str, type[SourceError] | type[StoreError]]) -> None:
    """Raise an error when workers do not see the files of a job, because their machines do not share the folder.

    Parameters
    ----------
    client : a `distributed.Client`, or None for threads of this process
    paths : of the input and the run's folder, which exist, each with the error to raise

    Raises
    ------
    SourceError, StoreError
        With the path, and the first machines that do not see it.
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
    some = ", ".join(hosts[:3]) + f" and {len(hosts) - 3} more" * (len(hosts) > 3)
    who = f"a worker on {some} does" if len(hosts) == 1 else f"workers on {some} do"
    raise paths[path](f"{who} not see {path}; {SHARED}")


def unseen(paths: Sequence[str]) -> tuple[str, str] | None:
    """Name of this machine and the first path that does not exist; None when all do.

    Examples
    --------
    >>> unseen(["/"])
    """
    missing = [path for path in paths if not os.path.exists(path)]
    return (socket.gethostname(), missing[0]) if missing else None
