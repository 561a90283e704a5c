"""Kind, number, threads and memory of the workers that a run will start."""

from dask.utils import parse_bytes

from stem_dask.cluster.gpu import n_gpus
from stem_dask.cluster.local import loaded_bytes
from stem_dask.config.options import Cluster
from stem_dask.core.errors import ConfigError
from stem_dask.core.machine import machine_bytes, usable_cores
from stem_dask.core.model import Worker

#: inputs below this run on threads: starting processes would take longer than the work
SMALL_INPUT_BYTES = 2**30

#: share of the machine's memory that our own workers may use together
MEMORY_SHARE = 0.8

#: bytes of a memory limit below which its unit must have been forgotten
LEAST_MEMORY = 10**6


def planned(options: Cluster, input_bytes: int, device: str = "cpu") -> Worker:
    """The worker that will be started; unknown for an existing scheduler."""
    if options.address is not None or options.scheduler_file is not None:
        return Worker(None, 1)
    kind = kind_of(options.kind, input_bytes, device)
    workers, threads = layout(kind, options.n_workers, options.threads_per_worker)
    return Worker(limit_of(options.memory_limit, workers), threads, loaded_bytes(kind))


def kind_of(kind: str, input_bytes: int, device: str) -> str:
    """What ``auto`` stands for."""
    if kind == "auto":  # processes would each take room on the GPU for themselves
        return "threads" if input_bytes < SMALL_INPUT_BYTES or device == "gpu" else "local"
    return kind


def layout(kind: str, n_workers: int | None, threads: int | None) -> tuple[int, int]:
    """Workers, and threads of each."""
    cores = usable_cores()
    for name, value in (("n_workers", n_workers), ("threads_per_worker", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"cluster.{name} is {value}; expected at least 1")
    if kind == "threads":
        if n_workers not in (None, 1):
            raise ConfigError(
                f"cluster.kind threads is one worker, n_workers is {n_workers}; "
                "set threads_per_worker, or kind: local"
            )
        return 1, threads or cores
    if kind == "gpu":
        if threads not in (None, 1):
            raise ConfigError(
                f"cluster.kind gpu has one thread a worker, threads_per_worker is {threads}; leave it out"
            )
        return n_gpus(n_workers), 1
    if kind == "slurm":  # of each job; how many cores a node has is not known here
        return n_workers or 1, threads or 1
    if n_workers is None:
        return max(1, cores // (threads or 1)), threads or 1
    return n_workers, threads or max(1, cores // n_workers)


def limit_of(memory_limit: int | str | None, workers: int) -> int:
    """Bytes of memory that each worker may use."""
    if memory_limit is None:
        return int(machine_bytes() * MEMORY_SHARE / workers)
    try:
        limit = int(parse_bytes(memory_limit))
    except (ValueError, IndexError):
        limit = 0
    if limit < LEAST_MEMORY:
        raise ConfigError(
            f"memory_limit is {memory_limit!r}; expected at least 1 MB, as a number with its unit such as '4GB'"
        )
    return limit
