"""Whether workers that are still to be started will have the memory that a job needs."""

from stem_dask.cluster.layout import planned
from stem_dask.job.prepare import Prepared


def refuse_too_small(prepared: Prepared) -> None:
    """Project the memory of a worker before there is one, as far as the config says what it has.

    Workers that cannot even load their code come and go, and jobs of SLURM wait in a queue before they fail. Of other
    workers of ours the projection, which takes its time to load, follows when they have been started.

    Raises
    ------
    MemoryBudgetError
        When a worker will not have the memory.
    """
    config, found = prepared.config, prepared.found
    worker = planned(config.cluster, found.n_bytes, config.device)
    if worker.room is None or (worker.room > 0 and config.cluster.kind != "slurm"):
        return
    refuse_unfit(prepared)


def refuse_unfit(prepared: Prepared) -> None:
    """The same for all workers of ours, however long it takes: what a run would refuse.

    Raises
    ------
    MemoryBudgetError
        When a worker will not have the memory.
    """
    config, found = prepared.config, prepared.found
    worker = planned(config.cluster, found.n_bytes, config.device)
    from stem_dask.job.memory_and_disk import check_memory, fitting_block, with_cuda

    worker = with_cuda(config, worker)
    check_memory(config, found, fitting_block(config, found, worker), worker)
