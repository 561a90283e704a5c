"""The GPUs of this machine: whether there are any, and a worker for each."""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from stem_dask.config.options import Cluster
from stem_dask.core.errors import ConfigError, MemoryBudgetError
from stem_dask.core.model import Device
from stem_dask.core.text import size
from stem_dask.kernels.gpu.device import INSTALL, gpu_name, missing_gpu, translate_full_gpu

if TYPE_CHECKING:
    from distributed import Client


def n_gpus(wanted: int | None = None) -> int:
    """For how many workers there is a GPU: so many as are wanted, or all that this process may use.

    Raises
    ------
    ConfigError
        When there are fewer, or none.
    """
    why = missing_gpu()
    if why is not None:
        raise ConfigError(f"cluster.kind is gpu, but no GPU can be used: {why}")
    import cupy

    has = int(cupy.cuda.runtime.getDeviceCount())
    if wanted is not None and wanted > has:
        raise ConfigError(
            f"cluster.n_workers is {wanted}, and there are {has} GPUs for a worker each; leave it out"
        )
    return wanted or has


class Gpu(NamedTuple):
    """Memory of a GPU in bytes: all, what is free, and what this process keeps of it and does not use now."""

    name: str
    has: int
    free: int
    kept: int


@translate_full_gpu
def own_gpu() -> Gpu:
    """The GPU that this process works on.

    Raises
    ------
    MemoryError
        When it has not even the memory that a process needs to ask.
    """
    import cupy

    free, has = cupy.cuda.runtime.memGetInfo()
    return Gpu(gpu_name(), int(has), int(free), int(cupy.get_default_memory_pool().free_bytes()))


def held_bytes() -> int:
    """What this process has taken of it at most, for arrays; cupy keeps it."""
    import cupy

    return int(cupy.get_default_memory_pool().total_bytes())


def chosen_device(device: str, cluster: Cluster) -> tuple[Device, str]:
    """The device that is used, and why, if that was left open.

    A GPU that was asked for is never replaced by the CPU. Of workers on other machines nothing is known here: `refuse_missing`
    looks at them.

    Raises
    ------
    ConfigError
        When a GPU was asked for and there is none, or workers for GPUs without work for them.

    Examples
    --------
    >>> chosen_device("cpu", Cluster())
    ('cpu', '')
    """
    if device == "cpu":
        if cluster.kind == "gpu":
            raise ConfigError(
                "cluster.kind gpu starts a worker for each GPU, and device is cpu, which leaves them idle; "
                "set device: gpu, or cluster.kind: local"
            )
        return "cpu", ""
    elsewhere = cluster.address or cluster.scheduler_file or cluster.kind == "slurm"
    if elsewhere:
        return (
            ("gpu", "") if device == "gpu" else ("cpu", "; auto does not look for GPUs of others")
        )
    why = missing_gpu()
    if why is None:
        return "gpu", "" if device == "gpu" else "; chosen by auto"
    if device == "gpu" or cluster.kind == "gpu":
        key = "device is gpu" if device == "gpu" else "cluster.kind is gpu"
        raise ConfigError(f"{key}, but no GPU can be used: {why}. Or set device: cpu")
    return "cpu", f"; chosen by auto, because no GPU can be used: {why}"


def refuse_missing(client: Client) -> None:
    """Refuse a cluster with a worker that has no GPU.

    Raises
    ------
    ConfigError
        Names the worker and what it lacks.
    """
    for worker, why in client.run(missing_gpu).items():
        if why is not None:
            raise ConfigError(
                f"device is gpu, but the worker {worker} can use none: {why}. Or set device: cpu"
            )


def cuda_cluster(**options: Any) -> Any:
    """dask-cuda's cluster: one process with one thread for each GPU, which it sees as its first.

    Raises
    ------
    ConfigError
        When dask-cuda is not installed.
    """
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise ConfigError(
            f"cluster.kind is gpu, which needs dask-cuda ({error}): {INSTALL}"
        ) from error
    # tasks keep nothing on the GPU, so that there is nothing to spill from it
    return LocalCUDACluster(threads_per_worker=1, device_memory_limit=0, **options)


def check_gpus(client: Client, need: int) -> None:
    """Compare what the tasks of each worker need on its GPU with what is free there for all of its workers.

    Raises
    ------
    MemoryBudgetError
        When it is less.
    """
    try:
        gpus = sorted(client.run(own_gpu).values())
    except MemoryError as error:
        raise MemoryBudgetError(str(error)) from error
    for name, group in groupby(gpus, key=attrgetter("name")):
        workers = list(group)
        n, has = len(workers), workers[0].has
        free = min(worker.free for worker in workers) + sum(worker.kept for worker in workers)
        if n * need > free:
            raise MemoryBudgetError(
                f"the tasks of {n} worker{'s' * (n != 1)} need {size(n * need)} on the GPU {name}, which has {size(has)}, "
                f"{size(free)} of it free; use fewer workers or threads_per_worker, or set device: cpu"
            )
