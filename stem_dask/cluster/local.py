"""Workers on this machine: the settings of Dask's clusters, and their start."""

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from stem_dask.core.errors import ConfigError
from stem_dask.core.machine import ONE_THREAD
from stem_dask.core.model import PROCESS_BYTES, WORKER_BYTES

#: what our clusters ask of Dask
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

#: how long a start that was interrupted may take to come to its end, in seconds
START_SECONDS = 20.0


def started(start: Callable[[], Any], *, deaf: bool = True) -> Any:
    """A cluster of Dask, started; an interrupt waits for the end of the start, because half a cluster cannot be closed.

    Parameters
    ----------
    start : makes the cluster
    deaf : whether processes that it starts do not hear Ctrl-C, which a terminal sends to all: the run stops them in order

    Examples
    --------
    >>> started(lambda: "a cluster", deaf=False)
    'a cluster'
    """
    made: Future[Any] = Future()

    def work() -> None:
        try:
            if deaf:
                _block_interrupts()
            made.set_result(start())
        except BaseException as error:
            made.set_exception(_explained(error))

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


def _explained(error: BaseException) -> BaseException:
    """A clear error for a worker process that ended while it started; any other error unchanged."""
    if not (isinstance(error, RuntimeError) and str(error).endswith("failed to start.")):
        return error
    return ConfigError(
        "a worker process ended while it started; each reads the script that starts it, so put what the script does under "
        'if __name__ == "__main__": (or else see what it printed above)'
    )


def _block_interrupts() -> None:
    """SIGINT in this thread, and in all threads and processes that come of it."""
    if hasattr(signal, "pthread_sigmask"):
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # the process that starts it unblocks signals
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def processes(kind: str, workers: int, threads: int, place: str) -> dict[str, Any]:
    """What tells the kinds of clusters on this machine apart."""
    from distributed import Nanny, Worker

    if kind == "gpu":  # with threads and processes of its own
        return {"n_workers": workers, "host": place, "worker_class": _plain(Nanny)}
    return {
        "n_workers": workers,
        "threads_per_worker": threads,
        "processes": kind == "local",
        "worker_class": _plain(Nanny if kind == "local" else Worker),
        "worker_dashboard_address": f"{LOOPBACK}:0",
        "host": place if kind == "local" else None,  # threads talk within the process
    }


def loaded_bytes(kind: str) -> int:
    """Resident memory of a worker of a kind of cluster, before it holds a block."""
    return PROCESS_BYTES if kind == "threads" else WORKER_BYTES


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
