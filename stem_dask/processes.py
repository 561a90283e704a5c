"""Workers on this machine: what Dask's clusters are told of them."""

import multiprocessing
import os
import sys
from typing import Any

from stem_dask.limits import ONE_THREAD
from stem_dask.plan import COPY_BYTES, PROCESS_BYTES, WORKER_BYTES

LOOPBACK = "127.0.0.1"
#: what workers are copies of has loaded these
LOADED = ["distributed.nanny", "stem_dask.rehearsal"]


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
    if kind == "threads":
        return PROCESS_BYTES
    return COPY_BYTES if kind.startswith("local") and sys.platform == "linux" else WORKER_BYTES


def copied_from_one() -> dict[str, Any]:
    """Dask's settings by which worker processes begin as copies of one that has loaded their code, instead of each loading
    it: on a node with many cores they would ask a network's disk for the same thousands of files all at once.
    """
    import distributed.utils

    # elsewhere a copy of a process may lack what the system keeps for it
    if sys.platform != "linux" or not hasattr(distributed.utils, "_forkserver_preload_set"):
        return {}
    multiprocessing.get_context("forkserver").set_forkserver_preload(LOADED)
    distributed.utils._forkserver_preload_set = True  # Dask would load pandas, in all of them
    return {"distributed.worker.multiprocessing-method": "forkserver"}


def _plain(worker: Any) -> Any:
    """Workers without a dashboard of their own, which nobody looks at, and with one thread for each library.

    Bokeh is slow to load, in every one of them. A batch job often has OMP_NUM_THREADS at all of its cores, which Dask takes.
    """

    class Plain(worker):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "dashboard": False})
            if hasattr(self, "pre_spawn_env"):  # of a process of its own
                self.pre_spawn_env.update(ONE_THREAD)
                # what it is a copy of has the variables of an earlier time
                self.env.update({**os.environ, **self.env, **ONE_THREAD})

    return Plain
