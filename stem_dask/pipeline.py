"""The order of the stages: read, analyze, crop, validate, downsample, store, export."""

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from stem_dask import report
from stem_dask.cluster import Connection, connect, connection_of
from stem_dask.figure import draw
from stem_dask.figure_data import N_WORST, figure_data
from stem_dask.io.publish import publish, temporary
from stem_dask.model import Window
from stem_dask.options import Config
from stem_dask.passes.analysis import (
    analyze,
    choose,
    note_analysis,
    read_windows_only,
    settle_common,
)
from stem_dask.passes.job import Job, Progress, Step
from stem_dask.passes.normalizing import normalized
from stem_dask.passes.writing import (
    Written,
    write_converted,
    write_cropped,
    write_export,
    write_normalized,
)
from stem_dask.preflight import Prepared, begun, prepare
from stem_dask.projection import input_bytes
from stem_dask.results import Outcome, already_complete, exit_code, results_of_run, stored_bytes
from stem_dask.state import RunState

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Step", "run", "window_of"]

#: what report.json says of a complete run
REPORTED = (
    "processing_time", "speed", "memory", "peak_memory", "retries", "quarantined", "cluster", "warnings",
)  # fmt: skip

Say = Callable[[str], None]


def run(
    config: Config | Prepared,
    *,
    say: Say | None = None,
    progress: Progress | None = None,
    state: RunState | None = None,
    connection: "Connection | Client | None" = None,
    common: Sequence[int] | None = None,
) -> Outcome:
    """Run the whole job of a config.

    Parameters
    ----------
    config : validated options, paths absolute; or what `stem_dask.preflight.prepare` made of them
    say : gets one line at a time for the user
    progress : gets a `Step` after each block
    state : lock and journal of the run, when the caller holds them already (see `stem_dask.preflight.begun`)
    connection : a cluster that several runs share (see `stem_dask.connect`), or a `distributed.Client` of any other;
        default one for this run, as the config says
    common : size of the window that several datasets share, for ``crop.size: common``

    Returns
    -------
    Outcome; its exit code is 0, 4 when too many patterns are below ``validate.min_retention``, or 7 when a part of the
    input could not be read (``on_error: quarantine``)

    Raises
    ------
    StemDaskError
        When the job cannot be done; nothing appears under a final name, and older outputs stay.
    """
    say = say or (lambda text: None)
    prepared = config if isinstance(config, Prepared) else prepare(config)
    options: dict[str, Any] = {"say": say, "progress": progress, "common": common}
    if not prepared.complete and state is None:
        with begun(prepared) as state:
            return run(prepared, state=state, connection=connection, **options)
    if state is None or state.is_complete:
        return already_complete(prepared.outputs)
    started = time.perf_counter()
    _say_input(prepared, state, say)
    if connection is not None:
        if not isinstance(connection, Connection):
            connection = connection_of(connection)
        return _complete(Job(prepared, connection, state, progress), started, common)
    cluster = prepared.config.cluster.model_dump()
    device = prepared.config.device
    cluster |= {"input_bytes": input_bytes(prepared.found), "device": device}
    with connect(**cluster, say=say) as connection:
        for line in connection.lines(f"{device}{prepared.device_note}"):
            say(line)
        return _complete(Job(prepared, connection, state, progress), started, common)


def window_of(
    prepared: Prepared,
    state: RunState,
    connection: Connection,
    *,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Window:
    """The window that a dataset would get by itself; the analysis stays in the run's folder for the run that follows."""
    _say_input(prepared, state, say or (lambda text: None))
    job = Job(prepared, connection, state, progress)
    found = analyze(job, job.patterns(job.block()))
    with state.nothing_to_go_on_with():
        return choose(job, found.analysis)


def _say_input(prepared: Prepared, state: RunState, say: Say) -> None:
    found = prepared.found
    shape, dtype = found.source.shape, found.source.dtype
    what = f"{' x '.join(map(str, shape))} {dtype}, {report.size(input_bytes(found))}"
    say(f"input       {found.info.path} ({what})")
    for note in (*found.info.notes, *([prepared.known.note] if prepared.known else [])):
        say(f"            {note}")
    n_done = sum(len(records) for records in state.journal.known.values())
    if n_done:
        say(f"resuming    {n_done:,} finished blocks; they are checked again")


def _complete(job: Job, started: float, common: Sequence[int] | None) -> Outcome:
    """All stages in their order, then the report."""
    job.rehearse()
    first = time.perf_counter()
    block, window = job.block(), None
    read_windows_only(job, block)
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
            if written.known is not None:
                note_analysis(job, written.known.analysis)
        for path in job.outputs.exports:
            write_export(job, path, math.prod(written.out.data.numblocks))
        results = _results(job, patterns, written, window, time.perf_counter() - first)
        results["processing_time"] = time.perf_counter() - started
        report.write_json(job.outputs.results, results)
        job.state.complete({name: results[name] for name in REPORTED})
    files = {path: stored_bytes(path) for path in job.outputs.all()}
    lines = report.summary({**results, "files": files})
    return Outcome(exit_code(job.config, results), results, lines)


def _results(
    job: Job, patterns: xr.DataArray, written: Written, window: Window | None, seconds: float
) -> dict[str, Any]:
    """What was found and made, measured, and drawn."""
    analysis = None if written.known is None or window is None else written.known.analysis
    results = results_of_run(job.prepared, patterns, written.out, analysis, window, job.hot)
    results |= job.measured(patterns, window, seconds)
    if job.constants is not None:
        results["normalization"] = {"method": job.config.output.normalize, **job.constants}
    if job.outputs.figure:
        draw(
            figure_data(
                job.outputs.store, patterns, window, results, N_WORST if job.box is None else 0
            ),
            temporary(job.outputs.figure),
        )
        publish(job.outputs.figure)
    return results
