"""The pass that writes: the blocks of the output, then the analysis and the metadata."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Window
from stem_dask.core.patterns import PROFILE_RADIUS, attrs_of, axes_of, lead_dims, lead_shape
from stem_dask.job.analysis import Analyzed, analysis_options, folded, hot_pixels
from stem_dask.job.context import Job
from stem_dask.job.results import provenance
from stem_dask.report import text as report
from stem_dask.stages.analyze import analysis_of_blocks, block_statistics
from stem_dask.stages.crop import crop_blocks
from stem_dask.stages.downsample import cast_blocks, downsample_blocks
from stem_dask.stages.export import export_from_store, export_job
from stem_dask.stages.formats import FORMATS, Target
from stem_dask.stages.validate import complete_analysis, inside_of_blocks
from stem_dask.storage.location import at
from stem_dask.storage.publish import DOCUMENT, remove, temporary
from stem_dask.writers.spool import SplitSink, SpoolSink
from stem_dask.writers.zarr import empty_store, finish_store, write_dataset, write_profiles
from stem_dask.writers.zarr_s3 import publish_objects


@dataclass(frozen=True)
class Written:
    """The lazy output and its analysis; ``mean`` is the mean output pattern, ``highest`` the largest value."""

    out: xr.DataArray
    analyzed: Analyzed | None
    valid: NDArray[np.bool_]
    mean: NDArray[np.float64]
    highest: float


def smaller(job: Job, patterns: xr.DataArray) -> xr.DataArray:
    """Downsample as the config says."""
    how = job.config.downsample.model_dump()
    return downsample_blocks(patterns, **how, device=job.device)


def cropped(
    job: Job, patterns: xr.DataArray, found: Analyzed, window: Window
) -> tuple[xr.DataArray, dict[str, da.Array]]:
    """The lazy output of a crop, and the intensity in each window, summed again from the cropped patterns."""
    cut = crop_blocks(
        patterns, found.analysis, window, device=job.device, detector_first=job.detector_first
    )
    threshold = float(found.analysis.attrs["threshold"])
    return smaller(job, cut), {"inside": inside_of_blocks(cut, threshold)}


def note_remainder(job: Job, window: Window | None, mean: NDArray | None) -> None:
    """Warn about pixels that downsampling drops at the end of an axis."""
    shape = job.prepared.found.source.shape[-2:] if window is None else window.shape
    job.warnings += report.remainder_warnings(shape, job.config.downsample.factor, mean)


def write_cropped(job: Job, found: Analyzed, window: Window) -> Written:
    """The crop pass: every block to its shard, then the analysis with the retention."""
    patterns, analysis = found.patterns, found.analysis
    with job.state.nothing_to_go_on_with():
        out, extra = cropped(job, patterns, found, window)
    note_remainder(job, window, analysis["mean_pattern"].values)
    return _written(job, "crop", out, extra, found=found, window=window)


def write_converted(job: Job, patterns: xr.DataArray) -> Written:
    """One pass from the source to a file of any format; with ``analyze.ahead`` it also analyzes."""
    ahead = job.config.analyze.ahead
    with job.state.nothing_to_go_on_with():
        out = smaller(job, patterns)
        options = analysis_options(job.config)
        device = job.device
        blocks = analysis_of_blocks(patterns, **options, device=device) if ahead else None
        extra = {} if blocks is None else {"analysis": blocks}
    note_remainder(job, None, None)
    return _written(job, "convert", out, extra, source=patterns)


def write_normalized(
    job: Job,
    patterns: xr.DataArray,
    found: Analyzed | None = None,
    window: Window | None = None,
    inside: NDArray[np.float64] | None = None,
) -> Written:
    """The second pass of a normalization: from the store in the run's folder to the output.

    ``found``, ``window`` and ``inside`` (the intensity in each window) belong to a crop.
    """
    return _written(job, "normalize", patterns, {}, found=found, window=window, inside=inside)


def _written(
    job: Job,
    stage: str,
    small: xr.DataArray,
    extra: Mapping[str, da.Array],
    *,
    found: Analyzed | None = None,
    window: Window | None = None,
    source: xr.DataArray | None = None,
    inside: NDArray[np.float64] | None = None,
) -> Written:
    """Run a pass into the output's own format, and publish it.

    ``found`` and ``window`` belong to a crop, ``inside`` to a crop in an earlier pass; ``source`` are patterns that this
    pass analyzes.
    """
    output = job.config.output

    def completed(inside: NDArray[np.float64]) -> xr.Dataset | None:
        """The analysis of a crop, with the retention."""
        if found is None or window is None:
            return None
        axes, down = axes_of(found.patterns)[-2:], job.config.downsample
        return complete_analysis(found.analysis, window, inside, axes, down)

    with job.state.nothing_to_go_on_with():
        out = cast_blocks(small, output.dtype)
        # a .pt fixes the names and types of its arrays when it is created
        target = _target(job, out, completed(np.zeros(lead_shape(out))))
    outputs = {**target.outputs(), **_statistics(job, out, source), **extra}
    spool, n_blocks = SpoolSink(f"{job.folder}/{stage}"), math.prod(out.data.numblocks)
    published = _is_published(job, stage, n_blocks)
    # the spool may be damaged even if the output is published
    sink = SplitSink(None if published else target.sink(), tuple(target.outputs()), spool)
    job.state.check_ownership()  # an output of another run must not be replaced
    job.compute(stage, outputs, out, sink)
    written, summed = _joined(job, out, spool, n_blocks)
    inside = summed if inside is None else inside
    if found is not None and window is not None:
        try:
            analysis = completed(inside)
        except SourceError as error:
            with job.state.nothing_to_go_on_with():
                raise SourceError(
                    f"{job.with_path(error)}. Run the same command again when nothing writes to the file any more"
                ) from error
        assert analysis is not None
        written = replace(written, analyzed=Analyzed(found.patterns, analysis, found.profiles))
    elif source is not None and job.config.analyze.ahead:
        analysis = folded(job, source, spool)
        job.hot = hot_pixels(analysis)
        written = replace(written, analyzed=Analyzed(source, analysis, spool))
    if not published:
        _finish(job, target, written)
        _publish(job)
    if job.outputs.analysis is not None:
        _write_analysis_alone(job, job.outputs.analysis, written)
    return written


def _statistics(job: Job, out: xr.DataArray, source: xr.DataArray | None) -> dict[str, da.Array]:
    """Sum and maximum of each output block; omitted if the analysis of ``source`` computes them anyway."""
    analyze = job.config.analyze
    counts = source is not None and source.dtype.kind == "u" and source.dtype == out.dtype
    if counts and analyze.ahead and not analyze.threshold:
        return {}
    return {"statistics": block_statistics(out)}


def _is_published(job: Job, stage: str, n_blocks: int) -> bool:
    """Whether an interrupted run had already published its output."""
    path, url = job.outputs.path, job.outputs.url
    if url is None:
        return job.state.published(path, stage, n_blocks)
    noted = len(job.state.journal.records(stage)) == n_blocks
    # the older output's root document is removed before the first block is written
    return noted and not os.path.lexists(temporary(path)) and bool(at(url, DOCUMENT).is_file())


def _publish(job: Job) -> None:
    """Publish the output under its final name."""
    job.refuse_changed_input()
    path, url = job.outputs.path, job.outputs.url
    if url is None:
        job.state.publish(path, drop=job.outputs.results)
        return
    job.state.check_ownership()
    remove(job.outputs.results)
    publish_objects(temporary(path), url)


def _target(job: Job, out: xr.DataArray, analysis: xr.Dataset | None) -> Target:
    output = job.config.output
    attrs = {k: v for k, v in out.attrs.items() if k not in ("source", "notes")}
    out = out.drop_attrs(deep=False).assign_attrs(attrs)
    if job.config.on_error == "quarantine" or job.tally.lost is not None:
        # a .pt fixes the offsets of its arrays when it is created
        out = out.assign_coords(valid=(lead_dims(out), job.tally.valid(lead_shape(out))))
    return Target(
        job.outputs.path,
        out,
        analysis,
        layout=output.layout,
        title=job.title,
        codec=output.codec,
        rechunk=output.rechunk,
        folder=f"{job.folder}/chunks",
        url=job.outputs.url or "",
    )


def _joined(
    job: Job, out: xr.DataArray, spool: SpoolSink, n_blocks: int
) -> tuple[Written, NDArray[np.float64]]:
    """Reduce the blocks of a pass; also returns the intensity in each window by position (NaN without a crop)."""
    lead = lead_shape(out)
    valid = job.tally.valid(lead)
    inside, highest, total = np.full(lead, np.nan), -math.inf, np.zeros(out.shape[-2:])
    wanted = ("inside", "highest", "sum", "max_pattern", "sum_pattern")
    for region, block in spool.blocks(n_blocks, wanted):
        inside[region] = block.get("inside", np.nan)
        most, added = ("highest", "sum") if "sum" in block else ("max_pattern", "sum_pattern")
        highest = max(highest, float(block[most].max()))
        total += block[added][(0,) * len(lead)]
    inside[~valid] = np.nan
    return Written(out, None, valid, total / max(1, valid.sum()), highest), inside


def inside_of(job: Job, out: xr.DataArray, spool: SpoolSink) -> NDArray[np.float64]:
    """The intensity in each window, from the blocks of a pass that cropped; NaN where a pattern is missing."""
    lead = lead_shape(out)
    inside = np.full(lead, np.nan)
    for region, block in spool.blocks(math.prod(out.data.numblocks), ("inside",)):
        inside[region] = block["inside"]
    inside[~job.tally.valid(lead)] = np.nan
    return inside


def _finish(job: Job, target: Target, written: Written) -> None:
    """Write analysis, mask and metadata into the file before it is published."""
    known = None
    valid: NDArray[np.bool_] | None = written.valid
    if target.suffix == ".zarr":
        if written.analyzed is not None:
            _write_profiles(target.built, written.analyzed)
        if written.analyzed is not None or job.mask is not None:
            known = _with_mask(job, written.analyzed)
        mean = xr.Dataset({"mean_pattern": (("ky", "kx"), written.mean)})
        write_dataset(target.built, "output", mean)
    elif written.analyzed is not None and job.config.crop.enabled:
        known = written.analyzed.analysis
        valid = None if written.valid.all() else written.valid  # as in an export from a store
    about = provenance(job.prepared, int((~written.valid).sum()), job.hot)
    job.warnings += target.finish(known, valid, {"maximum": written.highest}, about)
    if not written.highest > 0 and written.valid.any():
        job.warnings.append("no value is above 0: all are zero, negative or NaN; check the input")


def _with_mask(job: Job, known: Analyzed | None) -> xr.Dataset:
    """The analysis, with the mask."""
    analysis = xr.Dataset() if known is None else known.analysis
    if job.mask is None:
        return analysis
    mask = (("source_ky", "source_kx"), job.mask, attrs_of("mask"))
    return analysis.assign(mask=mask)


def _write_profiles(built: str, known: Analyzed) -> None:
    lead, dims = lead_shape(known.patterns), lead_dims(known.patterns)
    profiles = known.profiles.blocks(math.prod(known.patterns.data.numblocks), ("profile",))
    chunk = tuple(chunks[0] for chunks in known.patterns.data.chunks[: len(lead)])
    write_profiles(built, profiles, (*dims, PROFILE_RADIUS), lead, chunk)


def _write_analysis_alone(job: Job, path: str, written: Written) -> None:
    """Write the analysis to a store of its own, next to a file whose format cannot hold it."""
    if written.analyzed is None:
        return
    built = temporary(path)
    empty_store(built)
    _write_profiles(built, written.analyzed)
    write_dataset(built, "analysis", _with_mask(job, written.analyzed))
    status = Path(job.outputs.path).stat()
    about = provenance(job.prepared, int((~written.valid).sum()), job.hot)
    finish_store(built, {**about, "of": [status.st_size, status.st_mtime_ns]}, None)
    job.state.publish(path)


def profile_store(job: Job, written: Written) -> str:
    """The store with the profiles: the output, or one in the run's folder if the format of a crop cannot hold them."""
    if written.analyzed is None or job.outputs.path.endswith(".zarr"):
        return job.outputs.store
    built = temporary(f"{job.folder}/profiles.zarr")
    empty_store(built)
    _write_profiles(built, written.analyzed)
    write_dataset(built, "analysis", written.analyzed.analysis)
    finish_store(built, {}, None)
    return built


def write_export(job: Job, path: str, n_blocks: int) -> None:
    """Write one more format from the finished store."""
    output, kind = job.config.output, Path(path).suffix
    codec = output.codec if FORMATS[kind].packed else "auto"
    name = export_job(path, output.layout, codec, output.rechunk)
    if not job.state.published(path, name, n_blocks):
        job.warnings += export_from_store(
            job.outputs.store,
            path,
            layout=output.layout,
            codec=codec,
            rechunk=output.rechunk,
            overwrite=output.overwrite or job.state.replaces(path),
            client=job.connection.client,
            progress=job.reporter(f"export {kind[1:]}", 0),
            journal=job.state.journal,
            folder=f"{job.folder}/export{kind}",
        )
    job.tally.note(job.state.journal.records(name).values())
