"""The GPUs of this machine and of the workers: whether there are any, and their memory."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from stem_dask.config.options import Cluster
from stem_dask.core.errors import ConfigError, MemoryBudgetError
from stem_dask.core.model import Device
from stem_dask.core.text import size
from stem_dask.kernels.gpu.device import gpu_name, missing_gpu, translate_full_gpu

if TYPE_CHECKING:
    from distributed import Client


def n_gpus(wanted: int = 0) -> int:
    """Number of workers with a GPU each: as many as are wanted, or all GPUs that this process may use."""
    why = missing_gpu()
    if why is not None:
        raise ConfigError(f"cluster.kind is gpu, but no GPU can be used: {why}")
    import cupy

    has = int(cupy.cuda.runtime.getDeviceCount())
    if wanted > has:
        raise ConfigError(
            f"cluster.n_workers is {wanted}, and there are {has} GPUs for a worker each; leave it out"
        )
    return wanted or has


def chosen_device(device: str, cluster: Cluster) -> tuple[Device, str]:
    """The device that is used, and why, if ``auto`` chose it; a requested GPU is never replaced by the CPU.

    Nothing is known here of workers on other machines: `refuse_missing` looks at them.
    """
    if device == "cpu":
        if cluster.kind == "gpu":
            raise ConfigError(
                "cluster.kind gpu starts a worker for each GPU, and device is cpu, which leaves them idle; "
                "set device: gpu, or cluster.kind: local"
            )
        return "cpu", ""
    if cluster.address or cluster.scheduler_file or cluster.kind == "slurm":
        if device == "gpu":
            return "gpu", ""
        return "cpu", "; auto does not look for GPUs of others"
    why = missing_gpu()
    if why is None:
        return "gpu", "" if device == "gpu" else "; chosen by auto"
    if device == "gpu" or cluster.kind == "gpu":
        key = "device is gpu" if device == "gpu" else "cluster.kind is gpu"
        raise ConfigError(f"{key}, but no GPU can be used: {why}. Or set device: cpu")
    return "cpu", f"; chosen by auto, because no GPU can be used: {why}"


def refuse_missing(client: Client) -> None:
    """Refuse a cluster with a worker that has no GPU."""
    for worker, why in client.run(missing_gpu).items():
        if why is not None:
            raise ConfigError(
                f"device is gpu, but the worker {worker} can use none: {why}. Or set device: cpu"
            )


@translate_full_gpu
def own_gpu() -> tuple[str, int, int, int]:
    """Name of this process's GPU, and bytes: all, what is free, and what the process keeps and does not use now.

    Raises MemoryError when the GPU has not even the memory to ask.
    """
    import cupy

    free, has = cupy.cuda.runtime.memGetInfo()
    return gpu_name(), int(has), int(free), int(cupy.get_default_memory_pool().free_bytes())


def held_bytes() -> int:
    """The most that this process has taken of its GPU for arrays; cupy keeps it."""
    import cupy

    return int(cupy.get_default_memory_pool().total_bytes())


def check_gpus(client: Client, need: int) -> None:
    """Refuse tasks that need more on each worker's GPU than is free there for all of its workers."""
    try:
        gpus = sorted(client.run(own_gpu).values())
    except MemoryError as error:
        raise MemoryBudgetError(str(error)) from error
    for (name, has), group in groupby(gpus, key=itemgetter(0, 1)):
        sizes = [(free, kept) for _, _, free, kept in group]
        n, free = len(sizes), min(free for free, _ in sizes) + sum(kept for _, kept in sizes)
        if n * need > free:
            raise MemoryBudgetError(
                f"the tasks of {n} worker{'s' * (n != 1)} need {size(n * need)} on the GPU {name}, which has {size(has)}, "
                f"{size(free)} of it free; use fewer workers or threads_per_worker, or set device: cpu"
            )
