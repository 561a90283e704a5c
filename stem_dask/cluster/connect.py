"""Where the job runs: threads, processes, jobs of SLURM, or a scheduler that is running already. One Client."""

import atexit
import contextlib
import getpass
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import dask
from dask.utils import parse_bytes

from stem_dask.cluster.gpu import n_gpus
from stem_dask.cluster.local import LOOPBACK, SETTINGS, dask_level, end_if_read_again, start_here
from stem_dask.cluster.security import OPEN, is_loopback, is_open, protection, scheduler_address
from stem_dask.cluster.slurm import start_jobs
from stem_dask.config.options import Cluster
from stem_dask.core.errors import ConfigError
from stem_dask.core.machine import machine_bytes, usable_cores
from stem_dask.core.model import PROCESS_BYTES, WORKER_BYTES, Worker
from stem_dask.engine.clients import connected, refuse_other_versions

#: seconds that an existing scheduler may take to answer, also after the connection was lost
ANSWER_SECONDS = 20

#: seconds that an existing scheduler may wait for its first worker
WORKERS_SECONDS = 60

#: inputs below this run on threads: starting processes would take longer than the work
SMALL_INPUT_BYTES = 2**30

#: of the memory that this process may use, for all workers together; the rest is for the client and the page cache
WORKERS_SHARE = 0.8

Say = Callable[[str], None]


class Kind(NamedTuple):
    """A kind of cluster that `connect` starts.

    start : context manager that gives a client of options, workers, threads, bytes of a worker, and a function for text
    layout : workers, and threads of each, by the cores of this machine and what the user gives (0 for nothing)
    here : whether the workers are on this machine
    """

    start: Callable[..., contextlib.AbstractContextManager[Any]]
    layout: Callable[[int, int, int], tuple[int, int]]
    here: bool = True


def _processes(cores: int, workers: int, threads: int) -> tuple[int, int]:
    if not workers:
        return max(1, cores // (threads or 1)), threads or 1
    return workers, threads or max(1, cores // workers)


KINDS = {
    "threads": Kind(start_here, lambda cores, workers, threads: (1, threads or cores)),
    "local": Kind(start_here, _processes),
    "gpu": Kind(start_here, lambda cores, workers, threads: (n_gpus(workers), 1)),
    # of each job; how many cores a node has is not known here
    "slurm": Kind(start_jobs, lambda cores, workers, threads: (workers or 1, threads or 1), False),
}


def layout(
    options: Cluster, input_bytes: int, device: str, cores: int | None = None
) -> tuple[str, int, int, int]:
    """Kind, number of workers, threads and bytes of each, of a cluster that is to be started; ``cores`` are those of this
    machine by default.
    """
    kind = options.kind
    if kind == "auto":  # processes would each take room on the GPU for themselves
        kind = "threads" if input_bytes < SMALL_INPUT_BYTES or device == "gpu" else "local"
    if kind not in KINDS:
        raise ConfigError(f"cluster.kind is {kind!r}; expected auto, threads, local, slurm or gpu")
    for name in ("n_workers", "threads_per_worker"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"cluster.{name} is {value}; expected at least 1")
    given = options.n_workers or 0, options.threads_per_worker or 0
    if kind == "threads" and given[0] > 1:
        raise ConfigError(
            f"cluster.kind threads is one worker, n_workers is {given[0]}; set threads_per_worker, or kind: local"
        )
    if kind == "gpu" and given[1] > 1:
        raise ConfigError(
            f"cluster.kind gpu has one thread a worker, threads_per_worker is {given[1]}; leave it out"
        )
    workers, threads = KINDS[kind].layout(cores or usable_cores(), *given)
    if options.memory_limit is None:
        return kind, workers, threads, int(machine_bytes() * WORKERS_SHARE / workers)
    try:
        limit = int(parse_bytes(options.memory_limit))
    except (ValueError, IndexError):
        limit = 0
    if limit < 10**6:
        raise ConfigError(
            f"memory_limit is {options.memory_limit!r}; expected at least 1 MB, as a number with its unit such as '4GB'"
        )
    return kind, workers, threads, limit


def planned(options: Cluster, input_bytes: int, device: str = "cpu") -> Worker:
    """The worker that will be started; unknown for an existing scheduler."""
    if options.address is not None or options.scheduler_file is not None:
        return Worker(None, 1)
    kind, _, threads, limit = layout(options, input_bytes, device)
    return Worker(limit, threads, loaded_bytes(kind))


def loaded_bytes(kind: str) -> int:
    """Resident memory of a worker before it holds a block."""
    return PROCESS_BYTES if kind == "threads" else WORKER_BYTES


@dataclass(frozen=True)
class Connection:
    """A client and what a run reports about it; `close`, or the end of a ``with`` block, ends what `connect` started."""

    client: Any
    kind: str
    n_workers: int
    n_threads: int
    dashboard: str
    #: the worker with the least memory per thread
    worker: Worker
    #: whether the workers are processes of their own, which end with the connection
    owned: bool = False
    #: who can control the scheduler
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

    def __exit__(self, *error: Any) -> bool | None:
        atexit.unregister(self.close)
        return self._started.__exit__(*error)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}, dashboard {self.dashboard}>"

    def __str__(self) -> str:
        per = "" if self.worker.limit is None else f" with {self.worker.limit / 1e9:.2f} GB"
        workers = f"{self.n_workers} worker{'s' * (self.n_workers != 1)}"
        return f"{self.kind}: {workers}{per}, {self.n_threads} thread{'s' * (self.n_threads != 1)}"

    def lines(self, device: str = "cpu") -> list[str]:
        """Lines for the user: the cluster, its protection, the dashboard, and how to reach that from another machine."""
        lines = [f"cluster     {self}, device {device}"]
        lines += [f"protection  {self.protection}"] if self.protection else []
        lines.append(f"dashboard   {self.dashboard}")
        if from_afar := tunnel(self.dashboard, os.environ, socket.gethostname()):
            lines.append(f"            from your computer: {from_afar}")
        return lines


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
    given = dict(locals())
    end_if_read_again()
    # not validated, so that messages are about arguments
    options = Cluster.model_construct(**{name: given[name] for name in Cluster.model_fields})
    others = address is not None or scheduler_file is not None
    if host is not None and (others or kind not in ("local", "slurm")):
        raise ConfigError(
            f"cluster.host is {host!r}, the address on which a started cluster listens; "
            "it needs kind: local or slurm, without address or scheduler_file"
        )
    import distributed  # noqa: F401  brings its defaults; they would be lost again with our settings

    with contextlib.ExitStack() as stack:
        if others:
            stack.enter_context(dask.config.set(_settings()))
            connection = stack.enter_context(_join(options, say))
        else:
            kind, *size = layout(options, input_bytes, device)
            options = options.model_copy(update={"kind": kind})
            stack.enter_context(dask.config.set(_settings()))
            start = KINDS[kind].start(options, *size, say or (lambda text: None))
            client = stack.enter_context(start)
            plain = KINDS[kind].here and is_loopback(host or LOOPBACK)
            connection = _describe(client, kind if plain else _at(kind, client.scheduler.address))
            # the dashboard listens on this machine only, whatever address Dask prints
            port = client.scheduler_info()["services"].get("dashboard", 0)
            dashboard = f"http://{LOOPBACK}:{port}/status"
            connection = replace(connection, dashboard=dashboard, owned=kind != "threads")
        connection = replace(connection, _started=stack.pop_all())
    atexit.register(connection.close)  # which also keeps a connection that has no name
    return connection


def _settings() -> dict[str, Any]:
    """Dask settings of this package; settings that the user has made in Dask's files or the environment stay."""
    shipped = dask.config.merge(*dask.config.defaults)
    return {
        name: value
        for name, value in SETTINGS.items()
        if dask.config.get(name) == dask.config.get(name, config=shipped)
    }


@contextlib.contextmanager
def _join(options: Cluster, say: Say | None) -> Iterator[Connection]:
    """Connect to a running scheduler."""
    from distributed import Client
    from distributed.utils import LoopRunner, silence_logging_cmgr

    file = options.scheduler_file and os.path.expanduser(options.scheduler_file)
    if file is not None and not os.path.exists(file):
        raise ConfigError(
            f"cluster.scheduler_file {file} does not exist; is the scheduler running?"
        )
    # Dask would read the file again and connect to an address that was not checked
    address = scheduler_address(options.address, file, insecure=options.insecure)
    try:
        # a Client that fails to connect would stay the default one
        LoopRunner().run_sync(knock, address, ANSWER_SECONDS)
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last two are about TLS
        where = options.address or f"the scheduler of {options.scheduler_file}"
        what = "cluster.address" if file is None else "whether it has ended since"
        raise ConfigError(
            f"{where} does not answer: {error}; check {what}, and for tls:// distributed.comm.tls"
        ) from error
    # a lost connection is reported once, by `connected`
    with silence_logging_cmgr(dask_level()), Client(address, timeout=ANSWER_SECONDS) as client:
        with connected(client):
            connection = connection_of(client, "scheduler", say)
        yield connection


async def knock(address: str, seconds: float) -> None:
    """Connect to a scheduler and disconnect; raises OSError when it does not answer in time."""
    from distributed.comm import connect as reach
    from distributed.security import Security

    comm = await reach(address, timeout=seconds, **Security().get_connection_args("client"))
    await comm.close()


def connection_of(client: Any, kind: str = "client", say: Say | None = None) -> Connection:
    """The connection of an existing `distributed.Client`, which stays open; waits a minute for a first worker."""
    where = client.scheduler.address
    if say is not None and not client.nthreads():
        say(f"cluster     waiting for a worker of {where}, {WORKERS_SECONDS} s at most")
    try:
        client.wait_for_workers(1, timeout=WORKERS_SECONDS)
    except TimeoutError as error:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if limits := [worker["memory_limit"] for worker in workers]:
            # Dask gives no task to a worker whose memory is nearly full
            raise ConfigError(
                f"no worker of the scheduler at {where} takes tasks after {WORKERS_SECONDS} s: their memory is full, of "
                f"{min(limits) / 1e6:.0f} MB at least; start some with more (dask worker --memory-limit)"
            ) from error
        raise ConfigError(
            f"the scheduler at {where} has no worker after {WORKERS_SECONDS} s; start some (dask worker)"
        ) from error
    refuse_other_versions(client)
    return _describe(client, _at(kind, where))


def _at(kind: str, address: str) -> str:
    return f"{kind} at {address}" + (f" ({OPEN})" if is_open(address) else "")


def _describe(client: Any, kind: str) -> Connection:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    sizes = [(worker["memory_limit"], worker["nthreads"]) for worker in workers]
    limited = [(int(limit), threads) for limit, threads in sizes if limit]
    if limited:
        limit, threads = min(limited, key=lambda size: size[0] / max(1, size[1]))
        worker = Worker(limit, threads, loaded_bytes(kind))
    else:
        worker = Worker(None, max((threads for _, threads in sizes), default=1), loaded_bytes(kind))
    n_threads, link = sum(threads for _, threads in sizes), str(client.dashboard_link)
    guard = protection(client.scheduler.address)
    return Connection(client, kind, len(sizes), n_threads, link, worker, protection=guard)


def tunnel(link: str, environment: Mapping[str, str], host: str) -> str | None:
    """The command that brings a dashboard of this machine to the user's computer; None unless the user is on another one.

    Two signs are sure: a session by ssh, and a job of SLURM. A job keeps the variables of the session that submitted it,
    so that its node is reached over that machine.
    """
    place, in_job = urlsplit(link), "SLURM_JOB_ID" in environment
    session = environment.get("SSH_CONNECTION", "").split()
    reached = session[2] if len(session) == 4 else ""
    if place.hostname != "127.0.0.1" or not place.port or not (reached or in_job):
        return None  # a remote scheduler, or a user at this machine
    user = environment.get("USER") or getpass.getuser()
    submitted = environment.get("SLURM_SUBMIT_HOST", "")
    login = reached or submitted
    over = f" -J {user}@{login}" if in_job and login and submitted != host else ""
    return (
        f"ssh -N -L {place.port}:127.0.0.1:{place.port}{over} {user}@{host if in_job else reached}"
    )
