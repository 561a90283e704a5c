"""Workers on this machine: threads, processes, or a process per GPU; the settings of Dask's clusters, and their start."""

import contextlib
import logging
import multiprocessing
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from stem_dask.cluster.security import own_security
from stem_dask.config.options import Cluster
from stem_dask.core.errors import ConfigError
from stem_dask.core.machine import ONE_THREAD, node_folder
from stem_dask.kernels.gpu.device import INSTALL

#: Dask settings of our clusters
SETTINGS = {
    # tasks keep nothing between blocks, so there is nothing to spill, and a worker that paused might wait for ever: what its
    # process keeps for the next block does not become less
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.98,
    # a worker that is silent for this time is killed, and its tasks go elsewhere; looked at as often, so twice at most
    "distributed.scheduler.worker-ttl": "60s",
    # Dask looks at the stacks that its dashboard shows a hundred times a second, for a few per cent of a worker's time
    "distributed.worker.profile.interval": "100ms",
    "distributed.admin.large-graph-warning-threshold": "1GB",
    # of the last messages between its parts Dask keeps a thousand, which are our blocks to be: 70 kB for each of them
    "distributed.admin.low-level-log-length": 20,
    # and all of these look fifty times a second whether they are stuck
    "distributed.admin.tick.interval": "200ms",
}

LOOPBACK = "127.0.0.1"

#: seconds that a start that was interrupted may take to come to its end
START_SECONDS = 20.0


def usual_port() -> int:
    """The usual port of a dashboard if it is free, so that an ssh tunnel can be set up in advance; else 0 for any."""
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, 8787))
        except OSError:
            return 0
    return 8787


@contextlib.contextmanager
def start_here(
    options: Cluster, workers: int, threads: int, limit: int, say: Callable[[str], None]
) -> Iterator[Any]:
    """Start workers on this machine; gives a client."""
    from distributed import Client, LocalCluster, Nanny, Worker
    from distributed.utils import silence_logging_cmgr

    kind, host = options.kind, options.host or LOOPBACK
    place = f"[{host}]" if ":" in host else host  # as Dask wants IPv6
    how: dict[str, Any] = {
        "n_workers": workers,
        "threads_per_worker": threads,
        "memory_limit": limit,
        "worker_class": _plain(Worker if kind == "threads" else Nanny),
        "host": None if kind == "threads" else place,  # threads talk within the process
        "security": None if kind == "threads" else own_security(host, insecure=options.insecure),
        # worker files belong on a disk of this machine, and never in the working directory
        "local_directory": node_folder(),
        "silence_logs": dask_level(),  # errors of tasks are raised in the client, once
    }
    make: Any = LocalCluster
    if kind == "gpu":
        try:
            import dask_cuda
        except ImportError as error:
            raise ConfigError(
                f"cluster.kind is gpu, which needs dask-cuda ({error}): {INSTALL}"
            ) from error
        make = dask_cuda.LocalCUDACluster
        how["device_memory_limit"] = 0  # tasks keep nothing on the GPU that could be spilled
    else:
        how |= {"processes": kind == "local", "worker_dashboard_address": f"{LOOPBACK}:0"}
        how["scheduler_kwargs"] = {"dashboard": False}  # until a browser asks for it

    def start() -> Any:
        cluster = make(**how, dashboard_address=f"{LOOPBACK}:{usual_port()}")
        if kind != "gpu":
            offer_dashboard(cluster.scheduler)
        return cluster

    # what Dask logs about comms that close while it stops is of no use
    with (
        silence_logging_cmgr(dask_level()),
        started(start, deaf=kind != "threads") as cluster,
        Client(cluster) as client,
    ):
        yield client


def offer_dashboard(scheduler: Any) -> None:
    """Load Dask's dashboard when a browser first asks for a page of it: bokeh takes half a second at every start."""
    from tornado import web

    application = scheduler.http_application

    class FirstVisit(web.RequestHandler):
        def get(self) -> None:
            from distributed.dashboard.scheduler import connect

            if waiting in application.applications:
                application.applications.remove(waiting)
                connect(application, scheduler.http_server, scheduler)
            self.redirect(self.request.uri or "/status")

    waiting = web.Application([(r".*", FirstVisit)])
    application.add_application(waiting)


def dask_level() -> int:
    """The level from which Dask's log records are shown: almost none, unless those of this package are shown from INFO on."""
    is_verbose = logging.getLogger("stem_dask").isEnabledFor(logging.INFO)
    return logging.INFO if is_verbose else logging.CRITICAL


def started(start: Callable[[], Any], *, deaf: bool = True) -> Any:
    """Start a cluster of Dask; an interrupt waits for the end of the start, because half a cluster cannot be closed.

    If ``deaf``, its processes ignore Ctrl-C, which a terminal sends to all: the run stops them in order.
    """
    made: Future[Any] = Future()

    def work() -> None:
        try:
            if deaf and hasattr(signal, "pthread_sigmask"):
                from multiprocessing import resource_tracker

                resource_tracker.ensure_running()  # the process that starts it unblocks signals
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            with warnings.catch_warnings():
                # the port may be taken between `usual_port` and the start; the printed address is right
                warnings.filterwarnings("ignore", message=r"\s*Port \d+ is already in use")
                made.set_result(start())
        except BaseException as error:
            if isinstance(error, RuntimeError) and str(error).endswith("failed to start."):
                error = ConfigError(
                    "a worker process ended while it started; each reads the script that starts it, so put what the "
                    'script does under if __name__ == "__main__": (or else see what it printed above)'
                )
            made.set_exception(error)

    # signals come to the main thread, and what is raised there would end the start in the middle
    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        return made.result()
    except BaseException:
        if thread.ident is not None:  # else it never began
            with contextlib.suppress(Exception):  # the first error is raised
                made.result(START_SECONDS).close()
        raise


def end_if_read_again() -> None:
    """End a worker process that runs the user's script again while it starts, which would start workers of workers."""
    if multiprocessing.current_process().name.startswith("Dask Worker process"):
        from distributed import get_worker

        try:
            get_worker()
        except ValueError:  # the process has no worker yet
            raise SystemExit(1) from None


def _plain(worker: Any) -> Any:
    """Workers without dashboards of their own, and with one thread per numeric library.

    Bokeh is slow to load, in every one of them. A batch job often has OMP_NUM_THREADS at all of its cores, which Dask takes.
    """

    class Plain(worker):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "dashboard": False})
            if hasattr(self, "pre_spawn_env"):  # of a process of its own
                self.pre_spawn_env.update(ONE_THREAD)
                self.env.update(ONE_THREAD)

    return Plain
