"""The first pass of a normalization: downsampled counts into a store in the run's folder, and their mean and deviation."""

import math

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Window
from stem_dask.core.patterns import lead_shape
from stem_dask.job.analysis import Analyzed
from stem_dask.job.context import Job
from stem_dask.job.writing import cropped, inside_of, note_remainder, smaller
from stem_dask.stages.export import open_store
from stem_dask.stages.formats import Target
from stem_dask.stages.normalize import log_constants, log_statistics, normalize
from stem_dask.stages.open import block_array
from stem_dask.writers.spool import SplitSink, SpoolSink


def normalized(
    job: Job, patterns: xr.DataArray, found: Analyzed | None = None, window: Window | None = None
) -> tuple[xr.DataArray, NDArray[np.float64] | None]:
    """Lazy z-scores of the logarithms of the patterns, from a store in the run's folder.

    With ``found`` and ``window`` the patterns are cropped first; the second value is the intensity in each window.
    """
    with job.state.nothing_to_go_on_with():
        out, extra = _counts(job, patterns, found, window)
    note_remainder(job, window, None if found is None else found.analysis["mean_pattern"].values)
    target = Target(f"{job.folder}/counts.zarr", out)
    spool = SpoolSink(f"{job.folder}/moments")
    sink = SplitSink(target.sink(), ("patterns",), spool)
    outputs = {**target.outputs(), "moments": log_statistics(out), **extra}
    job.compute("downsample", outputs, out, sink)
    unread = job.tally.quarantined
    with job.state.nothing_to_go_on_with():
        if not job.tally.valid(lead_shape(out)).any():
            raise SourceError(f"{job.prepared.found.info.path}: none of the patterns could be read")
        blocks = spool.blocks(math.prod(out.data.numblocks), ("moments",))
        job.constants = log_constants(
            block["moments"] for i, (_, block) in enumerate(blocks) if i not in unread
        )
    target.finish()
    counts, _ = open_store(target.built, block_array)
    inside = None if found is None else inside_of(job, out, spool)
    return normalize(counts, **job.constants), inside


def _counts(
    job: Job, patterns: xr.DataArray, found: Analyzed | None, window: Window | None
) -> tuple[xr.DataArray, dict[str, da.Array]]:
    """The lazy counts to normalize, and further outputs of the pass."""
    if found is None or window is None:
        return smaller(job, patterns), {}
    return cropped(job, patterns, found, window)
