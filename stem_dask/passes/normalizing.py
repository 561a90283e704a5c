"""The first pass of a normalization: smaller patterns into a store in the run's folder, and the constants of all."""

import math

import xarray as xr

from stem_dask.errors import SourceError
from stem_dask.exports import open_store
from stem_dask.io.spool import Beside, SpoolSink
from stem_dask.passes.job import Job
from stem_dask.passes.writing import note_remainder, smaller
from stem_dask.stages.normalize import log_constants, log_statistics, normalize
from stem_dask.stages.patterns import flowing, lead_shape
from stem_dask.target import Target


def normalized(job: Job, patterns: xr.DataArray) -> xr.DataArray:
    """Lazy z-scores of the logarithms of the patterns, which wait in a store of the run."""
    with job.state.nothing_to_go_on_with():
        out = smaller(job, patterns)
    spare, instead = job.spare(patterns), None
    if spare is not None:
        other = smaller(job, spare)
        instead = {"patterns": other.data, "moments": log_statistics(flowing(other))}
    note_remainder(job, None, None)
    target = Target(f"{job.folder}/counts.zarr", out)
    spool = SpoolSink(f"{job.folder}/moments")
    sink = Beside(target.sink(), ("patterns",), spool)
    outputs = {**target.outputs(), "moments": log_statistics(flowing(out))}
    job.compute("downsample", outputs, instead, out, sink)
    unread = job.tally.quarantined
    with job.state.nothing_to_go_on_with():
        if not job.tally.valid(lead_shape(out)).any():
            raise SourceError(f"{job.prepared.found.info.path}: none of the patterns could be read")
        blocks = spool.blocks(math.prod(out.data.numblocks), ("moments",))
        job.constants = log_constants(
            block["moments"] for i, (_, block) in enumerate(blocks) if i not in unread
        )
    target.finish()
    counts, _ = open_store(target.built)
    return normalize(counts, **job.constants)
