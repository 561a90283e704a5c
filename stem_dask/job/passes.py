"""All passes of a job in their order: open, analyze, choose the window, write, export, report."""

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.cluster.connect import Connection
from stem_dask.cluster.gpu import check_gpus, held_bytes, refuse_missing
from stem_dask.config.load import to_dict
from stem_dask.config.options import Config
from stem_dask.core.errors import ConfigError, SourceError, StoreError
from stem_dask.core.formats import FORMATS
from stem_dask.core.machine import exempt_from_collection, load_meanwhile
from stem_dask.core.model import Progress, Record, Step, Window
from stem_dask.core.patterns import (
    PROFILE_RADIUS,
    attrs_of,
    axes_of,
    lead_dims,
    lead_shape,
)
from stem_dask.engine import run as engine
from stem_dask.engine.clients import see
from stem_dask.engine.state import RunState
from stem_dask.job import budget, report, summary
from stem_dask.job.analysis import (
    analyze,
    center_of,
    choose,
    clean_sample,
    fit,
    fold,
    hot_pixels,
    lazy_analysis,
    note_analysis,
    pattern_at,
    settle_common,
    survey,
    with_calibration,
)
from stem_dask.job.figure import draw, figure_data
from stem_dask.job.job import Job, export_stage
from stem_dask.job.outcome import Outcome
from stem_dask.job.plan import Plan
from stem_dask.job.results import (
    advice,
    commands,
    discs_of,
    dose_of,
    exit_code,
    stored_bytes,
    verdict,
)
from stem_dask.job.warm_up import play, rehearse
from stem_dask.kernels.gpu.code import compile_kernels
from stem_dask.readers.detector_first import TransposedFile, TransposedSink, detector_first
from stem_dask.readers.open import Found
from stem_dask.readers.views import View
from stem_dask.stages.analyze import block_statistics
from stem_dask.stages.correct import corrected
from stem_dask.stages.crop import Kept, crop_blocks, radii_inside
from stem_dask.stages.downsample import cast_blocks, downsample_blocks
from stem_dask.stages.export import Target, export_from_store, export_job, open_store
from stem_dask.stages.normalize import log_constants, log_statistics, normalize, pattern_logs
from stem_dask.stages.open import (
    block_array,
    lazy_blocks,
)
from stem_dask.stages.validate import (
    FLOAT_SLACK,
    complete_analysis,
    inside_of_blocks,
    intensity_of,
    retention_statistics,
    scattered_statistics,
)
from stem_dask.storage.location import is_url
from stem_dask.storage.publish import remove, temporary
from stem_dask.writers import zarr
from stem_dask.writers.spool import SplitSink, SpoolSink


def complete(
    plan: Plan,
    state: RunState,
    connection: Connection,
    progress: Progress | None = None,
    *,
    say: Callable[[str], None],
    started: float,
    common: Sequence[int] | None = None,
    alone: bool = False,
    command: str = "",
) -> Outcome:
    """All passes in their order, then the report; see `stem_dask.job.run.run`."""
    job = Job(plan, state, connection, progress, say)
    warm_up(job)
    if alone:
        exempt_from_collection()
    if job.outputs.figure:
        load_meanwhile("matplotlib.figure", "matplotlib.backends.backend_agg")
    first, analyzed_after = time.perf_counter(), None
    open_input(job)
    survey(job)
    job.warnings += summary.calibration_warnings(axes_of(job.patterns))
    if job.config.crop.enabled:
        settle_common(job, common)
        analyze(job)
        analyzed_after = time.perf_counter() - first
        with state.nothing_to_go_on_with():
            job.window = choose(job, common)
    with job.room(job.n_blocks, warn=True):
        if job.config.output.patterns:
            write(job)
        else:
            _write_analysis(job)
        for path in job.outputs.exports:
            _export(job, path)
        speed = {
            "seconds": time.perf_counter() - first,
            "seconds_until_analyzed": analyzed_after,
            "seconds_since_process_start": summary.process_seconds(),
        }
        results = _results(job, speed, command)
        results["processing_time"] = time.perf_counter() - started
        if job.outputs.figure:
            _draw(job, results, job.outputs.figure)
        if job.outputs.report:
            report.write_report(temporary(job.outputs.report), results, job.profile_store)
            state.publish(job.outputs.report)
        state.check_ownership()
        summary.write_json(job.outputs.results, results)
        kept = (
            "processing_time", "speed", "memory", "peak_memory", "retries", "quarantined", "cluster", "warnings",
        )  # fmt: skip
        state.complete({name: results[name] for name in kept})
    files = {path: stored_bytes(path) for path in job.outputs.all()}
    lines = summary.closing_lines({**results, "files": files})
    return Outcome(exit_code(job.config, results), results, lines)


def window_of(
    plan: Plan, state: RunState, connection: Connection, progress: Progress | None = None
) -> Window:
    """The window of one dataset alone; its analysis stays in the run's folder and is reused by the run that follows."""
    job = Job(plan, state, connection, progress)
    warm_up(job)
    open_input(job)
    survey(job)
    analyze(job)
    with state.nothing_to_go_on_with():
        return choose(job)


# --- before the first block -------------------------------------------------------------------------------------


def warm_up(job: Job) -> None:
    """Import and compile on the workers what their tasks need; raises MemoryBudgetError if one pattern does not fit."""
    config, found, client = job.config, job.plan.found, job.connection.client
    budget.fitting_block(config, found, job.worker)
    analyzes = config.crop.enabled or config.analyze.ahead
    metric = config.analyze.radius_metric if analyzes else None
    what, down, on_gpu = budget.shapes(config, found), config.downsample, None
    stored = what.dtype if budget.stores_logs(config) else None
    if job.device == "gpu":
        refuse_missing(client)
        reduces = config.crop.enabled or down.factor > 1
        options = down.model_dump(exclude={"sigma"}) if reduces else None
        sizes = what.patterns, what.detector[1]
        threshold = 1.0 if config.analyze.threshold == "auto" else config.analyze.threshold
        on_gpu = partial(compile_kernels, *sizes, threshold, metric, options)
    bins = down.factor > 1 and down.method == "bin"
    owned = job.connection.owned
    places: dict[str, type[SourceError] | type[StoreError]]
    places = {found.info.path: SourceError, job.outputs.store: StoreError}
    urls = {place: error for place, error in places.items() if is_url(place)}
    if not rehearse(
        client, partial(play, what.patterns, metric, bins, on_gpu, owned, stored), urls
    ):
        job.warnings.append(
            "kernels are compiled again in every process, for 10 to 20 s: neither the folder of stem_dask nor the user's "
            "cache can be written; set NUMBA_CACHE_DIR to a folder that only you can write"
        )
    if not job.connection.kind.startswith(("threads", "local", "gpu")):  # workers may be elsewhere
        places = {found.info.path: SourceError, job.folder: StoreError}
        see(client, {place: error for place, error in places.items() if not is_url(place)})


def open_input(job: Job) -> None:
    """Settle the blocks, fixed for the whole run, and open the patterns; raises MemoryBudgetError if a worker cannot hold one."""
    config, found, worker = job.config, job.plan.found, job.worker
    block = tuple(job.state.settled("block", budget.fitting_block(config, found, worker)))
    budget.check_memory(config, found, block, worker)
    if job.device == "gpu":
        check_gpus(job.connection.client, job.gpu_bytes(math.prod(block)))
    if budget.transposed_bytes(found):
        slab = budget.fitting_slab(found, block, job.connection.worker)
        turn = plan_transpose(found, block, slab, job.folder)
        found, job.slab = turn.found, turn.sink.file.slab
        with job.room(math.prod(lazy_blocks(found, block).data.numblocks)):
            records = turn.run(
                client=job.connection.client,
                progress=job.reporter("turn", turn.sink.file.n_bytes),
                journal=job.state.journal,
            )
            job.tally.note(records)
        job.refuse_changed_input()
    patterns = corrected(lazy_blocks(found, block), config.input.dark, config.input.gain)
    job.found, job.positions = found, math.prod(block)
    if "valid" in patterns.coords:  # patterns that an earlier run could not read stay missing
        job.tally.lost = ~patterns.coords["valid"].values
    mask = config.input.mask
    if mask not in (None, "auto", "stop"):  # these are found by the survey
        listed = mask if isinstance(mask, str) else mask.model_dump()
        patterns = job.masked(patterns, listed)
    job.patterns = patterns


@dataclass(frozen=True)
class Transpose:
    """A planned pass; ``found`` is the transposed input, which can be read after ``run``."""

    found: Found
    slabs: da.Array
    sink: TransposedSink

    def run(self, **options: Any) -> list[Record]:
        """Read the file once, slab by slab, and write blocks of patterns; ``options`` are those of `stem_dask.engine.run.run`."""
        try:
            return engine.run({"slab": self.slabs}, 2, self.sink, job="turn", **options)
        except SourceError as error:
            raise SourceError(
                f"{error}; this file is detector-first, and every pattern needs the block: on_error=quarantine cannot "
                "skip it. Run the same command again when it can be read"
            ) from error


def plan_transpose(
    found: Found, block: Sequence[int], slab: Sequence[int], folder: str | Path
) -> Transpose:
    """Plan the pass; nothing is read.

    Parameters
    ----------
    found : a detector-first input
    block : (scan_y, scan_x) shape of the blocks of all later passes
    slab : (ky, kx) pixels of one task, see `stem_dask.job.budget.fitting_slab`
    folder : of the run; the intermediate file is written to its subfolder ``turned``

    Raises
    ------
    ConfigError
        If the file is not detector-first.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from stem_dask.readers.open import find
    >>> folder = tempfile.mkdtemp()
    >>> np.save(f"{folder}/old.npy", np.arange(24, dtype="u2").reshape(2, 3, 2, 2))
    >>> found = find(f"{folder}/old.npy", scan_order="detector_first")
    >>> turn = plan_transpose(found, (1, 2), (1, 3), folder)
    >>> len(turn.run()), turn.found.source[(slice(0, 1), slice(1, 2), slice(None), slice(None))].tolist()
    (2, [[[[1, 5, 9], [13, 17, 21]]]])
    """
    stored = detector_first(found.source)
    if stored is None:
        raise ConfigError(f"{found.info.path}: this file is not detector-first")
    forwards = [slice(None, None, 1 if indices.step > 0 else -1) for _, indices in stored.axes]
    stored = stored.select(*forwards)  # flipped axes are flipped when the transposed file is read
    transposed = TransposedFile(
        str(Path(folder) / "turned" / "patterns.raw"),
        stored.dtype,
        (*stored.shape[2:], *stored.shape[:2]),
        (block[0], block[1]),
        (slab[0], slab[1]),
    )
    token = hashlib.sha256(repr((found.identity, stored)).encode()).hexdigest()[:16]
    slabs = block_array(stored, transposed.slab, f"slab-{token}")
    source = View.of(transposed).select(*forwards[2:], *forwards[:2])
    return Transpose(replace(found, source=source), slabs, TransposedSink(transposed))


# --- the pass that writes ---------------------------------------------------------------------------------------


def write(job: Job) -> None:
    """Crop or convert, with ``analyze.ahead`` also analyze, downsample, perhaps normalize, and publish the output."""
    config, window, analysis = job.config, job.window, job.analysis
    patterns, extra = job.patterns, dict[str, da.Array]()
    with job.state.nothing_to_go_on_with():
        if window is not None and analysis is not None:
            direct = detector_first(job.plan.found.source) is not None and job.slab is None
            if job.kept is not None:
                _read_again(job, job.kept)
            patterns = crop_blocks(
                patterns, analysis, window, device=job.device, detector_first=direct, kept=job.kept
            )
            # the intensity in each window, summed again from the cropped patterns
            extra = {"inside": inside_of_blocks(patterns, **intensity_of(analysis))}
        out = downsample_blocks(patterns, **config.downsample.model_dump(), device=job.device)
        if config.analyze.ahead:
            extra = lazy_analysis(job)
    shape = job.plan.found.source.shape[-2:] if window is None else window.shape
    known = None if analysis is None else analysis["mean_pattern"].values
    job.warnings += summary.remainder_warnings(shape, config.downsample.factor, known)
    stage = job.last_stage
    if stage == "normalize":
        out = _normalized(job, out, extra)
        extra = {}
    with job.state.nothing_to_go_on_with():
        job.out = cast_blocks(out, config.output.dtype)
        target = _target(job)
    spool = SpoolSink(f"{job.folder}/{stage}")
    # the analysis of unsigned counts that are stored as they are also computes sums and maxima
    same = config.analyze.ahead and job.patterns.dtype.kind == "u"
    if not same or job.patterns.dtype != job.out.dtype or config.analyze.threshold:
        extra = {"statistics": block_statistics(job.out), **extra}
    if budget.stores_logs(config):
        extra = {"logs": pattern_logs(job.out), **extra}
    published = job.is_published()
    names = tuple(target.outputs())
    # the spool may be damaged even if the output is published
    sink = SplitSink(None if published else target.sink(), names, spool)
    job.state.check_ownership()  # an output of another run must not be replaced
    job.compute(stage, {**target.outputs(), **extra}, sink)
    _join(job, spool)
    if window is not None:
        try:
            job.analysis = _with_retention(job, _inside(job, stage))
        except SourceError as error:
            with job.state.nothing_to_go_on_with():
                raise SourceError(
                    f"{job.with_path(error)}. Run the same command again when nothing writes to the file any more"
                ) from error
    elif config.analyze.ahead:
        fold(job, spool)
        fit(job)
        job.analysis = with_calibration(job)
    if not published:
        _finish(job, target, spool)
    if job.kept is not None:
        job.state.drop(os.path.basename(job.kept.folder))
    if job.outputs.analysis is not None:
        _analysis_alone(job, job.outputs.analysis, {**_provenance(job), "of": _stamp(job)})
        job.state.publish(job.outputs.analysis)
    if config.analyze.ahead:
        note_analysis(job)


def _read_again(job: Job, kept: Kept) -> None:
    """Count and say how many blocks are read from the input once more, because their windows were not kept."""
    assert job.window is not None
    assert job.analysis is not None
    holds = kept.holds(job.analysis, job.window, job.patterns.data.chunks[:-2])
    if n := int((~holds).sum()):
        job.again += job.plan.found.n_bytes * n // holds.size
        which = "all" if n == holds.size else f"{n:,} of {holds.size:,}"
        job.say(
            f"passes      {which} blocks are read again: their windows lie outside the part of the detector that the sample needs"
        )


def _normalized(job: Job, out: xr.DataArray, extra: Mapping[str, da.Array]) -> xr.DataArray:
    """Write the counts to a store in the run's folder; returns the lazy z-scores of the logarithms of what it holds."""
    target, spool = Target(f"{job.folder}/counts.zarr", out), SpoolSink(f"{job.folder}/moments")
    outputs = {**target.outputs(), "moments": log_statistics(out), **extra}
    job.compute("downsample", outputs, SplitSink(target.sink(), ("patterns",), spool))
    unread = job.tally.quarantined
    with job.state.nothing_to_go_on_with():
        if not job.tally.valid(lead_shape(out)).any():
            raise SourceError(f"{job.plan.found.info.path}: none of the patterns could be read")
        blocks = spool.blocks(job.n_blocks, ("moments",))
        moments = (block["moments"] for i, (_, block) in enumerate(blocks) if i not in unread)
        job.constants = log_constants(moments)
    target.finish()
    counts, _ = open_store(target.built, block_array)
    return normalize(counts, **job.constants)


def _inside(job: Job, stage: str) -> NDArray[np.float64]:
    """The intensity in each window, from the blocks of the pass that cropped; NaN where a pattern is missing."""
    lead = lead_shape(job.patterns)
    inside = np.full(lead, np.nan)
    spool = SpoolSink(f"{job.folder}/{'moments' if stage == 'normalize' else stage}")
    for region, block in spool.blocks(job.n_blocks, ("inside",)):
        inside[region] = block["inside"]
    inside[~job.tally.valid(lead)] = np.nan
    return inside


def _target(job: Job) -> Target:
    """The output file; a .pt fixes the names, types and offsets of its arrays when it is created."""
    output, out, analysis = job.config.output, job.out, None
    attrs = {k: v for k, v in out.attrs.items() if k not in ("source", "notes")}
    out = out.drop_attrs(deep=False).assign_attrs(attrs)
    if job.config.on_error == "quarantine" or job.tally.lost is not None:
        out = out.assign_coords(valid=(lead_dims(out), job.tally.valid(lead_shape(out))))
    if job.window is not None and not job.outputs.path.endswith(".zarr"):
        analysis = _with_retention(job, np.zeros(lead_shape(out)))
    return Target(
        job.outputs.path,
        out,
        analysis,
        layout=output.layout,
        title=job.plan.found.info.title,
        codec=output.codec,
        rechunk=output.rechunk,
        folder=f"{job.folder}/chunks",
        url=job.outputs.url or "",
    )


def _with_retention(job: Job, inside: NDArray[np.float64]) -> xr.Dataset:
    """The analysis of a crop, from the intensity in each window."""
    assert job.analysis is not None
    assert job.window is not None
    axes = axes_of(job.patterns)[-2:]
    return complete_analysis(job.analysis, job.window, inside, axes, job.config.downsample)


def _join(job: Job, spool: SpoolSink) -> None:
    """Reduce the blocks of the pass that wrote to their mean and maximum."""
    lead = lead_shape(job.out)
    job.valid, total = job.tally.valid(lead), np.zeros(job.out.shape[-2:])
    for _, block in spool.blocks(job.n_blocks, ("highest", "sum", "max_pattern", "sum_pattern")):
        most, added = ("highest", "sum") if "sum" in block else ("max_pattern", "sum_pattern")
        job.highest = max(job.highest, float(block[most].max()))
        total += block[added][(0,) * len(lead)]
    job.mean = total / max(1, job.valid.sum())


def _logs(job: Job, spool: SpoolSink) -> dict[str, xr.Variable]:
    """Mean and standard deviation of log(1 + x) by position, and its mean by pixel, from the blocks in their order."""
    lead, total = lead_shape(job.out), np.zeros(job.out.shape[-2:])
    found = {name: np.full(lead, np.nan) for name in ("log_mean", "log_std")}
    for region, block in spool.blocks(job.n_blocks, (*found, "log_sum")):
        total += block["log_sum"][(0,) * len(lead)]
        for name, values in found.items():
            values[region] = np.where(job.valid[region], block[name], np.nan)
    n_added = np.isfinite(found["log_mean"]).sum()
    arrays = [(name, lead_dims(job.out), values) for name, values in found.items()]
    arrays.append(("log_mean_pattern", ("ky", "kx"), total / max(1, n_added)))
    return {name: xr.Variable(dims, values, attrs_of(name)) for name, dims, values in arrays}


def _finish(job: Job, target: Target, spool: SpoolSink) -> None:
    """Write analysis, mask and metadata into the file, and publish it under its final name."""
    analysis = None
    valid: NDArray[np.bool_] | None = job.valid
    if Path(target.path).suffix == ".zarr":
        if job.analysis is not None:
            _write_profiles(job, target.built)
        if job.analysis is not None or job.mask is not None:
            analysis = _with_mask(job)
        output = xr.Dataset({"mean_pattern": (("ky", "kx"), job.mean)})
        if budget.stores_logs(job.config):
            output = output.assign(_logs(job, spool))
        zarr.write_dataset(target.built, "output", output)
    elif job.window is not None:
        analysis = job.analysis
        valid = None if job.valid.all() else job.valid  # as in an export from a store
    maximum = {"maximum": job.highest}
    job.warnings += target.finish(analysis, valid, maximum, _provenance(job))
    if not job.highest > 0 and job.valid.any():
        job.warnings.append("no value is above 0: all are zero, negative or NaN; check the input")
    job.refuse_changed_input()
    path, url = job.outputs.path, job.outputs.url
    if url is None:
        job.state.publish(path, drop=job.outputs.results)
    else:
        job.state.check_ownership()
        remove(job.outputs.results)
        zarr.publish_objects(temporary(path), url)


def _with_mask(job: Job) -> xr.Dataset:
    """The analysis, with flags of bad pixels also where nothing was surveyed."""
    analysis = xr.Dataset() if job.analysis is None else job.analysis
    if job.mask is None or "mask" in analysis:
        return analysis
    flags = job.mask.astype(np.uint8)
    return analysis.assign(mask=(("source_ky", "source_kx"), flags, attrs_of("mask")))


def _write_profiles(job: Job, built: str) -> None:
    """Write the retention profiles, and the thumbnails."""
    lead, dims = lead_shape(job.patterns), (*lead_dims(job.patterns), PROFILE_RADIUS)
    chunk = tuple(chunks[0] for chunks in job.patterns.data.chunks[:-2])
    zarr.write_profiles(built, job.profiles(), dims, lead, chunk)
    if job.thumbnails is not None:
        zarr.write_dataset(built, "thumbnails", job.thumbnails)


def _analysis_alone(job: Job, path: str, about: Mapping[str, Any]) -> str:
    """Write the analysis to a store of its own, for a file whose format cannot hold it; returns its temporary name."""
    built = temporary(path)
    zarr.empty_store(built)
    _write_profiles(job, built)
    zarr.write_dataset(built, "analysis", _with_mask(job))
    zarr.finish_store(built, about, None)
    return built


def _provenance(job: Job) -> dict[str, Any]:
    """Attributes of the store's root group."""
    info, packages = job.plan.found.info, ("stem_dask", "numpy", "dask", "zarr", "numba")
    name, n_bytes, changed = job.plan.found.identity
    source = {"path": name, "bytes": n_bytes, "modified_ns": changed, "notes": list(info.notes)}
    return {
        "title": info.title,
        "token": job.plan.token,
        "config": to_dict(job.config),
        "contents": job.plan.contents,
        "input": source,
        "versions": {name: version(name) for name in packages},
        "quarantined": int((~job.valid).sum()),
    }


def _write_analysis(job: Job) -> None:
    """Write and publish the analysis alone, with the retention that the profiles promise for the window."""
    assert job.analysis is not None
    assert job.window is not None
    lead = lead_shape(job.patterns)
    job.out, job.valid = job.patterns, job.tally.valid(lead)
    job.mean = job.analysis["mean_pattern"].values
    kept = np.full(lead, np.nan)
    radii = radii_inside(job.analysis, job.window)
    for region, block in job.profiles():
        profile = block["profile"]
        reach = np.minimum(radii[region], profile.shape[-1] - 1)[..., None]
        kept[region] = np.take_along_axis(profile, reach, axis=-1)[..., 0]
    job.analysis = _with_retention(job, kept * job.analysis["total"].values)
    path = job.outputs.path
    if not job.state.published(path, "analyze", job.n_blocks):
        _analysis_alone(job, path, _provenance(job))
        job.refuse_changed_input()
        job.state.publish(path)


def _stamp(job: Job) -> list[int]:
    """Size and time of an output without attributes, which tell its analysis and results that they belong to it."""
    status = os.stat(job.outputs.path)
    return [status.st_size, status.st_mtime_ns]


def _export(job: Job, path: str) -> None:
    """Write one more format from the finished store."""
    options = _export_options(job.config, path)
    name = export_job(path, **options)
    if not job.state.published(path, name, math.prod(job.out.data.numblocks)):
        job.warnings += export_from_store(
            job.outputs.store,
            path,
            **options,
            overwrite=job.config.output.overwrite or job.state.replaces(path),
            client=job.connection.client,
            progress=job.reporter(export_stage(path), int(job.out.nbytes)),
            journal=job.state.journal,
            folder=f"{job.folder}/export{Path(path).suffix}",
        )
    job.tally.note(job.state.journal.records(name).values())


def export_missing(
    plan: Plan, connection: Connection, paths: Sequence[str], progress: Progress | None = None
) -> None:
    """Write further formats of a store that an earlier run finished; an interrupted export begins again."""
    for i, path in enumerate(paths, 1):
        stage, place = export_stage(path), (i, len(paths), len(paths) - i)

        def report_block(
            done: int, n: int, record: Record, stage: str = stage, place: Any = place
        ) -> None:
            if progress is not None:
                progress(Step(stage, done, n, 0, record, *place))

        remove(temporary(path))
        export_from_store(
            plan.outputs.store,
            path,
            **_export_options(plan.config, path),
            client=connection.client,
            progress=report_block,
        )


def _export_options(config: Config, path: str) -> dict[str, Any]:
    output = config.output
    codec = output.codec if FORMATS[Path(path).suffix].is_packed else "auto"
    return {"layout": output.layout, "codec": codec, "rechunk": output.rechunk}


# --- the report -------------------------------------------------------------------------------------------------


def _results(job: Job, speed: dict[str, Any], command: str) -> dict[str, Any]:
    """Assemble results.json."""
    config, found, patterns, out = job.config, job.plan.found, job.patterns, job.out
    window, limit = job.window, job.connection.worker.limit
    analysis = None if window is None else _with_mask(job)
    target, minimum = config.analyze.target_retention, config.validation.min_retention
    statistics = None
    if analysis is not None:
        slack = FLOAT_SLACK if patterns.dtype.kind == "f" else 0.0
        retention, total = analysis["retention"].values, analysis["total"].values
        statistics = retention_statistics(retention, total, target, minimum, slack)
        statistics["n_empty"] = int(analysis["n_empty"])
    shape = out.shape[-2:] if window is None else window.shape
    n_patterns = math.prod(lead_shape(out))
    n_bytes = int(out.nbytes)
    if not config.output.patterns:  # of a crop to this window
        n_bytes = n_patterns * math.prod(shape) * out.dtype.itemsize
    store, hot = job.outputs.store, hot_pixels(job)
    positions = math.prod(chunks[0] for chunks in patterns.data.chunks[:-2])
    sizes = budget.memory_of(config, found, None if window is None else shape, job.slab)
    gpu, provenance = {}, {}
    if not store.endswith(".zarr"):  # which a store has in its attributes
        kept = {"token": job.plan.token, "contents": job.plan.contents}
        provenance = {**kept, "of": _stamp(job)}
    if job.device == "gpu":
        held = job.connection.client.run(held_bytes).values()
        gpu = {"gpu": {"projected": job.gpu_bytes(positions), "measured": max(held)}}
    results = {
        **summary.results_of(analysis, statistics, patterns.shape[-2:], shape, n_patterns, window),
        **provenance,
        "config": to_dict(config),
        "limits": {"target_retention": target, "min_retention": minimum},
        "scan_shape": lead_shape(out),
        "output": {"shape": out.shape, "dtype": str(out.dtype)},
        "intensity": out.attrs.get("intensity", "counts"),
        "input": {
            "path": found.info.path,
            "shape": patterns.shape,
            "dtype": str(found.source.dtype),
            "notes": found.info.notes,
        },
        "sizes": {
            "input_bytes": found.n_bytes,
            "output_bytes": n_bytes,
            "stored_bytes": stored_bytes(store),
            "reduction": found.n_bytes / n_bytes,
        },
        "hot_pixels": {
            "number": len(hot),
            "positions": hot[: summary.MAX_HOT],
            "masked": config.input.mask in ("auto", "stop"),
        },
        "center": center_of(job),
        "calibration": job.calibration,
        "dose": {} if job.analysis is None else dose_of(job.analysis, patterns.attrs),
        "discs": {}
        if analysis is None or window is None
        else discs_of(analysis, window, clean_sample(job)),
        "speed": {**speed, "bytes_per_second": found.n_bytes / speed["seconds"]},
        "memory": {
            "projected": budget.projected_bytes(sizes, positions, job.worker),
            "measured": job.tally.peak_rss,
            "limit": limit,
            **gpu,
        },
        "peak_memory": max(job.tally.peak_rss, engine.peak_rss()),
        **job.tally.words(lead_shape(patterns)),
        "cluster": str(job.connection),
        "warnings": job.warnings,
    }
    if analysis is not None:
        results["validation"] |= scattered_statistics(analysis)
    results["verdict"] = verdict(config, results, analysis, window)
    job.profile_store = store if analysis is not None else None
    if window is not None and not job.outputs.path.endswith(".zarr"):
        job.profile_store = _analysis_alone(job, f"{job.folder}/profiles.zarr", {})
    results["advice"] = advice(
        config, job.profile_store or store, results, job.analysis, window, hot
    )
    results["command"] = command
    results["commands"] = commands(config, job.outputs, command, results["advice"])
    if job.constants is not None:
        results["normalization"] = {"method": config.output.normalize, **job.constants}
    return results


def _draw(job: Job, results: Mapping[str, Any], path: str) -> None:
    """Draw the figure."""
    analysis = None if job.window is None else _with_mask(job)
    title = Path(job.plan.found.info.path).stem
    read = partial(pattern_at, job)
    shown = figure_data(
        job.patterns, job.out, job.mean, analysis, job.window, results, read, title=title
    )
    draw(shown, temporary(path))
    job.state.publish(path)
