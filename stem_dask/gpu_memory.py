"""Memory that a job takes on the GPU, and in the host for it, before it begins."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from stem_dask.errors import MemoryBudgetError
from stem_dask.gpus import own_gpu
from stem_dask.kernels import analysis_on_gpu, crop_on_gpu
from stem_dask.kernels.ring import Taken
from stem_dask.options import Config
from stem_dask.plan import Worker
from stem_dask.units import size

if TYPE_CHECKING:
    from distributed import Client

    from stem_dask.projection import Shapes

#: what cupy and CUDA take of a process; estimated, and not measured yet
CUDA_BYTES = 400 * 10**6
#: more patterns than a block has: the buffers do not grow with it
MANY = 2**31


def task_memory(config: Config, what: Shapes, positions: int = MANY) -> Taken:
    """What one task of each pass takes of the GPU together, because cupy keeps what a pass took; nothing without one.

    Parameters
    ----------
    what : of the job's patterns
    positions : patterns of a block
    """
    analyze, crop, down = config.analyze, config.crop, config.downsample
    detector, dtype, taken = what.detector, what.patterns, []
    if config.device == "gpu" and (crop.enabled or analyze.ahead):
        metric = analyze.radius_metric
        taken.append(analysis_on_gpu.ring_bytes(positions, detector, dtype, metric))
    if config.device == "gpu" and (crop.enabled or down.factor > 1):
        how = down.model_dump(exclude={"sigma"})
        taken.append(crop_on_gpu.ring_bytes(positions, detector, dtype, what.window, **how))
    return Taken(sum(task.on_gpu for task in taken), sum(task.in_host for task in taken))


def with_cuda(config: Config, worker: Worker) -> Worker:
    """A worker that has loaded what the device needs."""
    if config.device != "gpu":
        return worker
    return replace(worker, loaded=worker.loaded + CUDA_BYTES)


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
