"""All passes of a job in their order: read, analyze, crop, validate, downsample, store, export."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from stem_dask.cluster.connect import Connection
from stem_dask.core.machine import exempt_from_collection, load_meanwhile
from stem_dask.core.model import Progress, Window
from stem_dask.engine.state import RunState
from stem_dask.job.advice import advice, verdict
from stem_dask.job.analysis import analyze, choose, note_analysis, settle_common
from stem_dask.job.context import Job
from stem_dask.job.normalizing import normalized
from stem_dask.job.prepare import Prepared
from stem_dask.job.results import Outcome, exit_code, results_of_run, stored_bytes
from stem_dask.job.writing import (
    Written,
    profile_store,
    write_converted,
    write_cropped,
    write_export,
    write_normalized,
)
from stem_dask.report import text as report
from stem_dask.report.figure import draw, figure_data
from stem_dask.storage.publish import temporary

#: results that the run's own record keeps, too
REPORTED = (
    "processing_time", "speed", "memory", "peak_memory", "retries", "quarantined", "cluster", "warnings",
)  # fmt: skip


def window_of(
    prepared: Prepared,
    state: RunState,
    connection: Connection,
    progress: Progress | None = None,
) -> Window:
    """The window of one dataset alone; its analysis stays in the run's folder and is reused by the run that follows."""
    job = Job(prepared, connection, state, progress)
    job.rehearse()
    found = analyze(job, job.patterns(job.block()))
    with state.nothing_to_go_on_with():
        return choose(job, found.analysis)


def complete(
    prepared: Prepared,
    state: RunState,
    connection: Connection,
    progress: Progress | None = None,
    *,
    started: float,
    common: Sequence[int] | None = None,
    alone: bool = False,
) -> Outcome:
    """All stages in their order, then the report; see `stem_dask.job.run.run`."""
    job = Job(prepared, connection, state, progress)
    job.rehearse()
    if alone:
        exempt_from_collection()
    if job.outputs.figure:
        load_meanwhile("matplotlib.figure", "matplotlib.backends.backend_agg")
    first = time.perf_counter()
    block, window = job.block(), None
    patterns, found = job.patterns(block), None
    job.warnings += report.calibration_warnings(job.prepared.found.info.axes)
    if job.config.crop.enabled:
        settle_common(job, common)
        found = analyze(job, patterns)
        patterns = found.patterns
        job.analyzed_after = time.perf_counter() - first
        with job.state.nothing_to_go_on_with():
            window = choose(job, found.analysis, common)
    with job.room(patterns, window, warn=True):
        if job.config.output.normalize != "none":
            scores, inside = normalized(job, patterns, found, window)
            written = write_normalized(job, scores, found, window, inside)
        elif found is not None and window is not None:
            written = write_cropped(job, found, window)
        else:
            written = write_converted(job, patterns)
            if written.analyzed is not None:
                note_analysis(job, written.analyzed.analysis)
        for path in job.outputs.exports:
            write_export(job, path, math.prod(written.out.data.numblocks))
        results = _results(job, patterns, written, window, time.perf_counter() - first)
        results["processing_time"] = time.perf_counter() - started
        job.state.check_ownership()
        report.write_json(job.outputs.results, results)
        job.state.complete({name: results[name] for name in REPORTED})
    files = {path: stored_bytes(path) for path in job.outputs.all()}
    lines = report.summary({**results, "files": files})
    return Outcome(exit_code(job.config, results), results, lines)


def _results(
    job: Job, patterns: xr.DataArray, written: Written, window: Window | None, seconds: float
) -> dict[str, Any]:
    """Assemble results.json, and draw the figure."""
    analysis = None if written.analyzed is None or window is None else written.analyzed.analysis
    results = results_of_run(job.prepared, patterns, written.out, analysis, window, job.hot)
    results |= job.measured(patterns, window, seconds)
    known = None if written.analyzed is None else written.analyzed.analysis
    results["verdict"] = verdict(job.config, results, analysis, window)
    store = job.outputs.store if window is None else profile_store(job, written)
    results["advice"] = advice(job.config, store, results, known, window, job.hot)
    if job.constants is not None:
        results["normalization"] = {"method": job.config.output.normalize, **job.constants}
    if job.outputs.figure:
        shown = figure_data(
            patterns,
            written.out,
            written.mean,
            analysis,
            window,
            results,
            title=Path(job.prepared.found.info.path).stem,
        )
        draw(shown, temporary(job.outputs.figure))
        job.state.publish(job.outputs.figure)
    return results
