"""The first pass of a normalization: smaller patterns into a store in the run's folder, and the constants of all."""

import math
from collections.abc import Iterator

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.errors import SourceError
from stem_dask.exports import open_store
from stem_dask.io.spool import Beside, SpoolSink
from stem_dask.passes.job import Job
from stem_dask.passes.writing import note_remainder, smaller
from stem_dask.stages.normalize import log_constants, log_statistics, normalize
from stem_dask.stages.patterns import lead_shape
from stem_dask.target import Target


def normalized(job: Job, patterns: xr.DataArray) -> xr.DataArray:
    """Lazy z-scores of the logarithms of the patterns, which wait in a store of the run."""
    with job.state.nothing_to_go_on_with():
        out = smaller(job, patterns)
    spare, instead = job.spare(patterns), None
    if spare is not None:
        other = smaller(job, spare)
        instead = {"patterns": other.data, "moments": log_statistics(other)}
    note_remainder(job, None, None)
    target = Target(f"{job.folder}/counts.zarr", out)
    spool = SpoolSink(f"{job.folder}/moments")
    sink = Beside(target.sink(), ("patterns",), spool)
    outputs = {"patterns": out.data, "moments": log_statistics(out)}
    job.compute("downsample", outputs, instead, out, sink)
    with job.state.nothing_to_go_on_with():
        job.constants = log_constants(_moments(job, spool, out))
    target.finish()
    counts, _ = open_store(target.built)
    return normalize(counts, **job.constants)


def _moments(job: Job, spool: SpoolSink, out: xr.DataArray) -> Iterator[NDArray]:
    """Moments of the blocks that could be read, less the zeros that stand in them for patterns lost before.

    Raises
    ------
    SourceError
        When no pattern is left.
    """
    valid = job.tally.valid(lead_shape(out))
    if not valid.any():
        raise SourceError(f"{job.prepared.found.info.path}: none of the patterns could be read")
    n_lost = 0
    for i, (region, block) in enumerate(spool.blocks(math.prod(out.data.numblocks), ("moments",))):
        if i not in job.tally.quarantined:
            n_lost += int((~valid[region]).sum())
            yield block["moments"]
    if n_lost:
        # what joining so many zeros did is undone by joining as many less
        yield np.array([-n_lost * math.prod(out.shape[-2:]), 0.0, 0.0, np.inf])
