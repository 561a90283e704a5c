"""Where the job runs: threads, processes, jobs of SLURM, or a scheduler that is there already. One Client."""

import atexit
import contextlib
import getpass
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import dask

from stem_dask.cluster.gpu import cuda_cluster
from stem_dask.cluster.layout import kind_of, layout, limit_of
from stem_dask.cluster.local import (
    LOOPBACK,
    SETTINGS,
    end_if_read_again,
    loaded_bytes,
    processes,
    started,
)
from stem_dask.cluster.security import (
    OPEN,
    is_loopback,
    is_open,
    own_security,
    protection,
    scheduler_address,
)
from stem_dask.cluster.slurm import LOG_DIRECTORY, Jobs, slurm_cluster
from stem_dask.core.errors import ConfigError
from stem_dask.core.machine import node_folder
from stem_dask.core.model import Worker
from stem_dask.engine.clients import connected, refuse_other_versions

EVERYWHERE = "0.0.0.0"

USUAL_PORT = 8787

#: how long an existing scheduler may take to answer, also after the connection was lost
ANSWER_SECONDS = 20

#: how long an existing scheduler may wait for its first worker
WORKERS_SECONDS = 60

Say = Callable[[str], None]

KINDS = ("auto", "threads", "local", "slurm", "gpu")


@dataclass(frozen=True)
class Connection:
    """A client and what a run says of it; what `connect` started ends with `close`, or with the block of a ``with``."""

    client: Any
    kind: str
    n_workers: int
    n_threads: int
    dashboard: str
    #: the worker that has least memory for a thread
    worker: Worker
    #: whether the workers are processes of their own, which end with the connection
    owned: bool = False
    #: what keeps others from giving the scheduler orders
    protection: str = ""
    _started: contextlib.ExitStack = field(
        default_factory=contextlib.ExitStack, repr=False, compare=False
    )

    def close(self) -> None:
        """End what `connect` started; a second call does nothing."""
        atexit.unregister(self.close)
        self._started.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        atexit.unregister(self.close)
        return self._started.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}, dashboard {self.dashboard}>"

    def __str__(self) -> str:
        per = "" if self.worker.limit is None else f" with {self.worker.limit / 1e9:.2f} GB"
        workers = f"{self.n_workers} worker{'s' * (self.n_workers != 1)}"
        return f"{self.kind}: {workers}{per}, {self.n_threads} thread{'s' * (self.n_threads != 1)}"

    def lines(self, device: str = "cpu") -> list[str]:
        """What a run says of it: where it runs, on what, the dashboard, and how to reach that from another machine."""
        from_afar = tunnel(self.dashboard, os.environ, socket.gethostname())
        more = [] if from_afar is None else [f"            from your computer: {from_afar}"]
        guard = [f"protection  {self.protection}"] if self.protection else []
        return [
            f"cluster     {self}, device {device}",
            *guard,
            f"dashboard   {self.dashboard}",
            *more,
        ]


def connect(
    kind: str = "auto",
    *,
    host: str | None = None,
    address: str | None = None,
    scheduler_file: str | None = None,
    insecure: bool = False,
    n_workers: int | None = None,
    threads_per_worker: int | None = None,
    memory_limit: int | str | None = None,
    jobs: int | Sequence[int] = 1,
    walltime: str | None = None,
    queue: str | None = None,
    account: str | None = None,
    job_extra: Sequence[str] = (),
    log_directory: str | None = None,
    input_bytes: int = 0,
    device: str = "cpu",
    say: Say | None = None,
) -> Connection:
    """Start or join the cluster that work runs on; its client becomes the active one.

    As a `distributed.Client` it can be used at once, until ``close()`` or the end of the program, or in a ``with`` statement.

    Parameters
    ----------
    kind : ``threads``, ``local`` (processes), ``slurm`` (jobs), ``gpu`` (a process for each GPU), or ``auto``: threads
        below 1 GiB of input, or to share one GPU, else local
    host : name or address of this machine where workers find the scheduler; default loopback, of ``slurm`` all. Processes
        and jobs talk by TLS with keys of this run. The dashboard stays on loopback, where every user of the machine can
        read it
    address : of a scheduler that is running, such as ``tls://node1:8786``
    scheduler_file : written by such a scheduler
    insecure : without TLS: any user who can reach the scheduler can run code as you
    n_workers, threads_per_worker : of the cluster we start; default one worker a core with one thread. Of ``slurm``: of
        each job, default one
    memory_limit : of each worker, bytes (at least 1 MB) or text such as ``4GB``; default its part of 80 % of what this process may use
    jobs : of ``slurm``, how many, or (least, most), between which they follow the work
    walltime : of each of these jobs, as hours:minutes:seconds; a worker hands over in time, and another job follows
    queue, account, job_extra : SLURM's partition and account, and other options of sbatch, such as ``--constraint=a``
    log_directory : where the jobs' output goes, seen by all nodes; default ``~/.stem_dask/jobs``
    input_bytes, device : size of the input and ``cpu`` or ``gpu``, for ``auto``
    say : gets a line for the user when there is something to wait for

    Raises
    ------
    ConfigError
        When the scheduler does not answer, has other versions or accepts any user, SLURM does not take the jobs, or
        options contradict each other.

    Examples
    --------
    >>> cluster = connect("threads", threads_per_worker=2)
    >>> cluster.client.submit(sum, [1, 2]).result()
    3
    >>> cluster.close()
    """
    end_if_read_again()
    others = address is not None or scheduler_file is not None
    if host is not None and (others or kind not in ("local", "slurm")):
        raise ConfigError(
            f"cluster.host is {host!r}, the address on which a started cluster listens; "
            "it needs kind: local or slurm, without address or scheduler_file"
        )
    import distributed  # noqa: F401  brings its defaults; they would be lost again with our settings

    if not others:
        kind = kind_of(kind, input_bytes, device)
        if kind not in KINDS:
            raise ConfigError(
                f"cluster.kind is {kind!r}; expected {', '.join(KINDS[:-1])} or {KINDS[-1]}"
            )
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(_settings()))
        if others:
            cluster = _join(address, scheduler_file, insecure, say)
        elif kind == "slurm":
            asked = _jobs(n_workers, threads_per_worker, memory_limit, jobs, walltime)
            asked = replace(
                asked,
                queue=queue,
                account=account,
                extra=tuple(job_extra),
                folder=log_directory or LOG_DIRECTORY,
            )
            cluster = _start_jobs(asked, host, insecure, say or (lambda text: None))
        else:
            cluster = _start(
                kind, n_workers, threads_per_worker, memory_limit, host or LOOPBACK, insecure
            )
        connection = stack.enter_context(cluster)
        connection = replace(connection, _started=stack.pop_all())
    atexit.register(connection.close)  # which also keeps a connection that has no name
    return connection


def _jobs(
    n_workers: int | None,
    threads: int | None,
    memory_limit: int | str | None,
    jobs: int | Sequence[int],
    walltime: str | None,
) -> Jobs:
    """What every job is asked to be; there is no default of what a site may not give."""
    if walltime is None or memory_limit is None:
        key = "walltime" if walltime is None else "memory_limit"
        raise ConfigError(f"cluster.{key} is missing; cluster.kind: slurm asks SLURM for it")
    least, most = (jobs, jobs) if isinstance(jobs, int) else jobs
    if not 1 <= least <= most:
        raise ConfigError(f"cluster.jobs is {jobs}; expected a number above 0, or [least, most]")
    workers, threads = layout("slurm", n_workers, threads)
    return Jobs(least, most, workers, threads, limit_of(memory_limit, workers), walltime)


@contextlib.contextmanager
def _start_jobs(jobs: Jobs, host: str | None, insecure: bool, say: Say) -> Iterator[Connection]:
    security = own_security(host or EVERYWHERE, insecure=insecure)
    port = usual_port()
    place = {} if host is None else {"host": host}
    scheduler = {**place, "port": 0, "dashboard_address": f"{LOOPBACK}:{port}"}
    # workers start on other machines and do not inherit these settings
    settings = {key: dask.config.get(key) for key in SETTINGS}
    with slurm_cluster(
        jobs, scheduler=scheduler, security=security, settings=settings, say=say
    ) as client:
        there = _describe(client, _at("slurm", client.scheduler.address))
        yield replace(_on_loopback(there), owned=True)


def usual_port() -> int:
    """The usual port of a dashboard when it is free, so that an ssh tunnel can be set up in advance; else 0 for any."""
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, USUAL_PORT))
        except OSError:
            return 0
    return USUAL_PORT


def _on_loopback(connection: Connection) -> Connection:
    """The dashboard of a started scheduler listens on this machine only, whatever address Dask prints."""
    port = connection.client.scheduler_info()["services"].get("dashboard", 0)
    return replace(connection, dashboard=f"http://{LOOPBACK}:{port}/status")


def _settings() -> dict[str, Any]:
    """Dask settings of this package; settings that the user has made in Dask's files or the environment stay."""
    shipped = dask.config.merge(*dask.config.defaults)
    return {
        name: value
        for name, value in SETTINGS.items()
        if dask.config.get(name) == dask.config.get(name, config=shipped)
    }


@contextlib.contextmanager
def _start(
    kind: str,
    n_workers: int | None,
    threads: int | None,
    memory_limit: int | str | None,
    host: str,
    insecure: bool,
) -> Iterator[Connection]:
    from distributed import Client, LocalCluster
    from distributed.utils import silence_logging_cmgr

    workers, threads = layout(kind, n_workers, threads)
    limit = limit_of(memory_limit, workers)
    security = None if kind == "threads" else own_security(host, insecure=insecure)
    place = f"[{host}]" if ":" in host else host  # as Dask wants IPv6
    # worker files belong on a disk of this machine, and never in the working directory
    # and what Dask says of comms that close while it stops is of no use
    with silence_logging_cmgr(logging.CRITICAL):

        def start() -> Any:
            with warnings.catch_warnings():
                # the port may be taken between this check and the start; the printed address is right
                warnings.filterwarnings("ignore", message=r"\s*Port \d+ is already in use")
                return (cuda_cluster if kind == "gpu" else LocalCluster)(
                    **processes(kind, workers, threads, place),
                    memory_limit=limit,
                    security=security,
                    dashboard_address=f"{LOOPBACK}:{usual_port()}",
                    local_directory=node_folder(),
                    silence_logs=logging.CRITICAL,  # errors of tasks are raised in the client, once
                )

        with started(start, deaf=kind != "threads") as cluster, Client(cluster) as client:
            text = kind if is_loopback(host) else _at(kind, client.scheduler.address)
            yield replace(_on_loopback(_describe(client, text)), owned=kind != "threads")


@contextlib.contextmanager
def _join(
    address: str | None, scheduler_file: str | None, insecure: bool, say: Say | None
) -> Iterator[Connection]:
    from distributed import Client
    from distributed.utils import LoopRunner, silence_logging_cmgr

    where = address or f"the scheduler of {scheduler_file}"
    scheduler_file = scheduler_file and os.path.expanduser(scheduler_file)
    if scheduler_file is not None and not os.path.exists(scheduler_file):
        raise ConfigError(
            f"cluster.scheduler_file {scheduler_file} does not exist; is the scheduler running?"
        )
    # Dask would read the file again and connect to an address that was not checked
    address = scheduler_address(address, scheduler_file, insecure=insecure)
    try:
        # a Client that fails to connect would stay the default one
        LoopRunner().run_sync(knock, address, ANSWER_SECONDS)
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last two are about TLS
        what = "cluster.address" if scheduler_file is None else "whether it has ended since"
        raise ConfigError(
            f"{where} does not answer: {error}; check {what}, and for tls:// distributed.comm.tls"
        ) from error
    # a lost connection is reported once, by `connected`
    with silence_logging_cmgr(logging.CRITICAL), Client(address, timeout=ANSWER_SECONDS) as client:
        with connected(client):
            connection = connection_of(client, "scheduler", say)
        yield connection


async def knock(address: str, seconds: float) -> None:
    """Connect to a scheduler and leave again; raises OSError when it does not answer in time."""
    from distributed.comm import connect as reach
    from distributed.security import Security

    comm = await reach(address, timeout=seconds, **Security().get_connection_args("client"))
    await comm.close()


def connection_of(client: Any, kind: str = "client", say: Say | None = None) -> Connection:
    """The connection of an existing `distributed.Client`; it stays open.

    Parameters
    ----------
    kind : what the run calls it
    say : gets a line for the user when there is no worker yet

    Raises
    ------
    ConfigError
        When no worker comes within a minute, or one has other versions.
    """
    where = client.scheduler.address
    if say is not None and not client.nthreads():
        say(f"cluster     waiting for a worker of {where}, {WORKERS_SECONDS} s at most")
    try:
        client.wait_for_workers(1, timeout=WORKERS_SECONDS)
    except TimeoutError as error:
        limits = [
            w["memory_limit"] for w in client.scheduler_info(n_workers=-1)["workers"].values()
        ]
        if limits:  # Dask gives no task to a worker whose memory is nearly full
            raise ConfigError(
                f"no worker of the scheduler at {where} takes tasks after {WORKERS_SECONDS} s: their memory is full, of "
                f"{min(limits) / 1e6:.0f} MB at least; start some with more (dask worker --memory-limit)"
            ) from error
        raise ConfigError(
            f"the scheduler at {where} has no worker after {WORKERS_SECONDS} s; start some (dask worker)"
        ) from error
    refuse_other_versions(client)
    return _describe(client, _at(kind, client.scheduler.address))


def _at(kind: str, address: str) -> str:
    return f"{kind} at {address}" + (f" ({OPEN})" if is_open(address) else "")


def _describe(client: Any, kind: str) -> Connection:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    n_threads = sum(worker["nthreads"] for worker in workers)
    least = min(
        (w for w in workers if w["memory_limit"]),
        key=lambda w: w["memory_limit"] / max(1, w["nthreads"]),
        default=None,
    )
    return Connection(
        client,
        kind,
        len(workers),
        n_threads,
        str(client.dashboard_link),
        Worker(
            None if least is None else int(least["memory_limit"]),
            max((w["nthreads"] for w in workers), default=1)
            if least is None
            else least["nthreads"],
            loaded_bytes(kind),
        ),
        protection=protection(client.scheduler.address),
    )


def tunnel(link: str, environment: Mapping[str, str], host: str) -> str | None:
    """The command that brings a dashboard here to the user's computer; None where nothing says that he sits elsewhere.

    Two signs are sure: a session by ssh, and a job of SLURM. A job keeps the variables of the session that submitted it,
    so that a job's node is reached over that machine.

    Parameters
    ----------
    link : of the dashboard
    environment : of this process
    host : name of this machine

    Examples
    --------
    >>> tunnel("http://127.0.0.1:8787/status", {"USER": "ada", "SSH_CONNECTION": "192.0.2.7 50000 192.0.2.1 22"}, "lab")
    'ssh -N -L 8787:127.0.0.1:8787 ada@192.0.2.1'
    >>> job = {"USER": "ada", "SLURM_JOB_ID": "17", "SLURM_SUBMIT_HOST": "login1"}
    >>> tunnel("http://127.0.0.1:8787/status", job, "node5")
    'ssh -N -L 8787:127.0.0.1:8787 -J ada@login1 ada@node5'
    """
    place = urlsplit(link)
    if place.hostname != "127.0.0.1" or not place.port:
        return None  # of an existing scheduler, whose user knows how to reach it
    session = environment.get("SSH_CONNECTION", "").split()
    reached = session[2] if len(session) == 4 else ""
    user = environment.get("USER") or getpass.getuser()
    forward = f"ssh -N -L {place.port}:127.0.0.1:{place.port}"
    if "SLURM_JOB_ID" in environment:
        submitted = environment.get("SLURM_SUBMIT_HOST", "")
        login = reached or submitted
        over = f" -J {user}@{login}" if login and submitted != host else ""
        return f"{forward}{over} {user}@{host}"
    return f"{forward} {user}@{reached}" if reached else None
