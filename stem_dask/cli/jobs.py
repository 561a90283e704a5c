"""Several inputs in one command: one after another on one cluster; failed inputs are listed in a table at the end."""

import contextlib
import json
import os
import shlex
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from stem_dask.cli.progress import ProgressLine, progress_shown, shortcoming, show
from stem_dask.cli.signals import stoppable
from stem_dask.cluster.gpu import chosen_device
from stem_dask.config.options import Config
from stem_dask.core.errors import ConfigError, InterruptedRunError, StemDaskError
from stem_dask.core.text import by
from stem_dask.job.plan import Plan, begun, input_lines, is_there, prepare, refuse_too_small
from stem_dask.storage.location import is_url
from stem_dask.storage.publish import publish, temporary

if TYPE_CHECKING:
    from stem_dask.cluster.connect import Connection
    from stem_dask.core.model import Step, Window
    from stem_dask.job.outcome import Outcome

T = TypeVar("T")


@dataclass
class Row:
    """One dataset: its line of the table, and what the command knows of it; without an exit code it is not finished."""

    input: str
    output: str
    exit_code: int | None = None
    words: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)
    config: Config | None = None
    #: that makes this dataset alone, which advice changes
    command: str = ""
    #: made once, and again only if the input has changed since
    plan: Plan | None = None
    #: for ``crop.size: common``, the window of this dataset alone, and whether the common size holds it
    window: "Window | None" = None
    fits: bool = False
    #: whether this command has started it, and the job that replaces an output which this command made already
    begun: bool = False
    again: Config | None = None

    def planned(self) -> Plan:
        """The plan of the job."""
        if self.plan is None or not self.plan.is_current():
            assert self.config is not None
            self.plan = prepare(self.config)
        return self.plan


def run_all(
    configs: Sequence[Config],
    *,
    quiet: bool = False,
    verbose: bool = False,
    restart: bool = False,
    time_limit: float | None = None,
    as_json: bool = False,
    command: str = "",
) -> int:
    """Run the jobs of one command, print what happened, and return the highest exit code.

    The first config defines the cluster. ``quiet`` prints errors only, ``verbose`` also log records, ``restart`` drops unfinished runs,
    ``time_limit`` is in seconds.
    ``command`` is what the user typed, which advice changes.
    With ``as_json`` standard output is one JSON document, a list for several inputs, and everything else goes to standard error.
    Raises InterruptedRunError, and StemDaskError if a single job fails or the cluster does not start.
    """
    if as_json:
        documents: list[dict[str, Any]] = []
        with contextlib.redirect_stdout(sys.stderr), progress_shown(quiet, verbose) as line:
            code = _run_all(configs, line, restart, time_limit, documents, command)
        print(json.dumps(documents[0] if len(configs) == 1 else documents))
        return code
    with progress_shown(quiet, verbose) as line:
        return _run_all(configs, line, restart, time_limit, [], command)


def _run_all(
    configs: Sequence[Config],
    line: ProgressLine,
    restart: bool,
    time_limit: float | None,
    documents: list[dict[str, Any]],
    command: str,
) -> int:
    """As `run_all`; the results of every input are added to ``documents``."""
    if len(configs) == 1:
        plan = prepare(configs[0])
        with stoppable(time_limit), contextlib.closing(line):
            from stem_dask.job.run import run

            outcome = run(
                plan, say=line.say, progress=line.step, restart=restart, alone=True, command=command
            )
        if not line.quiet:
            show(outcome)
        documents.append(_document(plan.outputs.all(), outcome.results, outcome.exit_code))
        return outcome.exit_code
    datasets = [
        Row(path := str(c.input.path), c.output.path, command=_alone(command, path), config=c)
        for c in configs
    ]
    with stoppable(time_limit) as asked:
        try:
            with contextlib.ExitStack() as stack:
                Batch(configs[0], datasets, line, asked, restart, stack).run()
        finally:  # after the last messages of the workers
            line.close()
            for text in closing_lines(datasets, figure=configs[0].output.figure):
                line.say(text)
    for row in datasets:
        files = () if row.plan is None else row.plan.outputs.all()
        error = {"error": row.words} if row.words else {}
        code = 75 if row.exit_code is None else row.exit_code
        documents.append({"input": row.input, **_document(files, row.results, code), **error})
    return max(dataset.exit_code or 0 for dataset in datasets)


def _alone(command: str, path: str) -> str:
    """The command for one of its inputs; empty unless it takes them from a config."""
    words = shlex.split(command)
    if len(words) < 3 or not words[2].lower().endswith((".yaml", ".yml")):
        return ""
    kept = [word for word in words if not word.startswith("input.path=")]
    return shlex.join([*kept, f"input.path={shown(path)}"])


def closing_lines(datasets: Sequence[Row], *, figure: bool) -> list[str]:
    """The table of several inputs, and with ``figure`` their report, which is written; nothing if none has started."""
    if all(row.exit_code is None for row in datasets):
        return []
    lines = table(datasets)
    return [*lines, f"file        {shown(_report(datasets))}"] if figure else lines


def _report(datasets: Sequence[Row]) -> str:
    """Write the report of several inputs into the folder of all their outputs; returns its path."""
    from stem_dask.job.report import write_batch_report

    rows, folders = [], []
    for row in datasets:
        report = None if row.plan is None else row.plan.outputs.report
        if row.plan is not None:
            folders.append(os.path.dirname(os.path.abspath(row.plan.outputs.path)))
        rows.append(
            {
                "input": row.input,
                "output": row.output if row.plan is None else row.plan.outputs.store,
                "exit_code": 75 if row.exit_code is None else row.exit_code,
                "words": row.words,
                "results": row.results,
                "report": report if report is not None and os.path.isfile(report) else None,
            }
        )
    path = os.path.join(
        os.path.commonpath(folders) if folders else os.getcwd(), "batch_report.html"
    )
    write_batch_report(temporary(path), rows)
    publish(path)
    return path


def _document(files: Sequence[str], results: Mapping[str, Any], exit_code: int) -> dict[str, Any]:
    """What a program that started the command wants to know of one job."""
    from stem_dask.job.results import stored_bytes
    from stem_dask.job.summary import to_json

    kept = results.get("validation", {})
    retention = None
    if "mean_retention" in kept:
        retention = {"mean": kept["mean_retention"], "min": kept["min_retention"]}
    document: dict[str, Any] = to_json(
        {
            "window": results.get("window", {}).get("size"),
            "retention": retention,
            "files": {path: stored_bytes(path) for path in files if is_there(path)},
            "warnings": results.get("warnings", []),
            "verdict": results.get("verdict", []),
            "advice": results.get("commands") or results.get("advice", {}),
            "exit_code": exit_code,
        }
    )
    return document


@dataclass
class Batch:
    """Several running jobs, and their shared state."""

    config: Config  # of the first job
    datasets: list[Row]
    line: ProgressLine
    #: not empty if the command was interrupted
    asked: Sequence[int]
    restart: bool
    stack: contextlib.ExitStack
    #: whether the heading of a dataset has the time of day in place of its number
    timed: bool = False
    largest: int = 0
    connection: "Connection | None" = None
    common: tuple[int, int] | None = None

    def run(self, *, windows_only: bool = False) -> None:
        """Run all jobs; an error is recorded in the row of its dataset.

        With ``windows_only``, for ``crop.size: common``, they are analyzed, and a later call crops them with others.
        """
        if self._plan_all():
            self._connect()
        if self.config.crop.enabled and self.config.crop.size == "common":
            for dataset in self._open(": its own window"):
                dataset.window = self._tried(dataset, partial(self._own_window, dataset))
            if windows_only:
                return
            self._choose_common()
        from stem_dask.job.results import stored_results

        for dataset in self._open():
            outcome = self._tried(dataset, partial(self._one, dataset))
            if outcome is None:
                continue
            dataset.exit_code = outcome.exit_code
            assert dataset.plan is not None
            dataset.results = outcome.results or stored_results(dataset.plan.outputs)
            for text in _lines_of(outcome):
                self.line.say(text)
            if outcome.exit_code:
                dataset.words = shortfall(dataset)
                if not self.line.quiet:
                    self.line.complain(f"{shown(dataset.input)}: {shortcoming(outcome)}")

    def _open(self, what: str = "") -> Iterator[Row]:
        """The datasets without an exit code, each after its heading."""
        for i, dataset in enumerate(self.datasets, 1):
            if dataset.exit_code is None and not (what and dataset.window):
                place = time.strftime("%H:%M:%S") if self.timed else f"[{i}/{len(self.datasets)}]"
                self.line.heading(f"{place} {shown(dataset.input)}{what}")
                yield dataset

    def _plan_all(self) -> bool:
        """Prepare every job, and return whether any is to run; an error is raised again, and reported, when its job runs."""
        for dataset in self.datasets:
            with contextlib.suppress(StemDaskError, OSError):
                dataset.planned()
        plans = [(dataset, dataset.plan) for dataset in self.datasets if dataset.plan is not None]
        going_on = any(plan.is_unfinished for _, plan in plans)
        waiting = []
        for dataset, plan in plans:
            with contextlib.suppress(StemDaskError, OSError):
                if not (plan.complete or self._replaced(dataset, plan, going_on)):
                    self._refuse_too_small(plan)
                    waiting.append(plan.found.n_bytes)
        self.largest = max(waiting, default=0)
        return bool(waiting)

    def _replaced(self, dataset: Row, plan: Plan, going_on: bool) -> bool:
        """Whether this command, before it was interrupted, has already replaced the output.

        To recognize that, the journals record permission to replace every older output before the first job starts.
        """
        given = dataset.config
        if given is None or not given.output.overwrite:
            return False
        if going_on:
            output = given.output.model_copy(update={"overwrite": False})
            config = given.model_copy(update={"output": output})
            kept = prepare(config)
            if kept.complete:
                dataset.config, dataset.again, dataset.plan = config, given, kept
                return True
        elif any(is_there(path) for path in plan.outputs.all()):
            with begun(plan, restart=self._drops(dataset)):
                pass
        return False

    def _drops(self, dataset: Row) -> bool:
        """Whether to drop an unfinished run of an earlier command."""
        first, dataset.begun = not dataset.begun, True
        return self.restart and first

    def _refuse_too_small(self, plan: Plan) -> None:
        """Check the memory of planned workers, unless they have been started."""
        if self.connection is None:
            refuse_too_small(plan)

    def _connect(self) -> "Connection":
        """The shared cluster, started when it is first needed."""
        if self.connection is None:
            from stem_dask.cluster.connect import connect
            from stem_dask.core.machine import load_meanwhile
            from stem_dask.job.run import PASSES

            config = self.config
            device, why = chosen_device(config.device, config.cluster)
            load_meanwhile(PASSES)
            options = config.cluster.model_dump()
            options |= {"input_bytes": self.largest, "device": device}
            self.connection = self.stack.enter_context(connect(**options, say=self.line.say))
            for text in self.connection.lines(f"{device}{why}"):
                self.line.say(text)
        return self.connection

    def _tried(self, dataset: Row, work: Callable[[], T]) -> T | None:
        """Call ``work``; an error is printed and recorded, and the other datasets continue."""
        try:
            return work()
        except InterruptedRunError:
            raise
        except Exception as error:
            if self.asked:  # an interrupted import may raise any error
                raise
            self.refuse(dataset, error)
            return None

    def refuse(self, dataset: Row, error: Exception) -> None:
        """Print an error, and record it in the row of its dataset."""
        dataset.exit_code = 5 if isinstance(error, OSError) else 1  # of the client itself
        if isinstance(error, StemDaskError):
            dataset.exit_code = error.exit_code
        dataset.words = str(error) or type(error).__name__
        where = "" if dataset.input in dataset.words else f"{dataset.input}: "
        self.line.complain(f"error: {where}{dataset.words}")
        if dataset.exit_code == 1:  # an internal error
            traceback.print_exception(error)

    def _choose_common(self) -> None:
        """The common size of the datasets that fit together; the others are refused when they run."""
        known = [dataset for dataset in self.datasets if dataset.window is not None]
        if not known:
            return
        import numpy as np

        from stem_dask.core.window import common_size, fits

        multiple = self.config.crop.size_multiple * self.config.downsample.factor
        own = [dataset.window.shape for dataset in known if dataset.window is not None]
        full = [_detector(dataset.planned()) for dataset in known]
        self.common = common_size(own, full, multiple)
        which = fits(np.array(own), np.array(full), self.common, multiple)
        for dataset, fit in zip(known, which, strict=True):
            dataset.fits = bool(fit)
        fitting = sum(dataset.fits for dataset in known)
        of = f" of {len(known)}" if fitting < len(known) else ""
        words = f"which holds the windows of {fitting}{of}"
        self.line.say(f"common      {by(self.common)} px, {words}")

    def _own_window(self, dataset: Row) -> "Window":
        """The window of one dataset alone; its analysis is kept for the crop."""
        plan = dataset.planned()
        from stem_dask.job.analysis import stored_window
        from stem_dask.job.passes import window_of

        with contextlib.ExitStack() as stack:
            state = None
            if not plan.complete:
                self._refuse_too_small(plan)
                state = stack.enter_context(begun(plan, restart=self._drops(dataset)))
            if state is None or state.is_complete:
                window = stored_window(plan.config, plan.outputs.store)
            else:
                connection = self._connect()
                for text in input_lines(plan, state):
                    self._say_resuming(text)
                window = window_of(plan, state, connection, self.line.step)
        self.line.say(f"window      {by(window.shape)} px of {by(_detector(plan))}")
        return window

    def _one(self, dataset: Row) -> "Outcome":
        """Run one job."""
        plan, common = dataset.planned(), self.common
        if common is not None and dataset.window is not None and not dataset.fits:
            own, path = dataset.window.shape, dataset.input
            why = f"its detector of {by(_detector(plan))} px cannot have the common size of {by(common)} px"
            if any(n > most for n, most in zip(own, common, strict=True)):
                why = f"its own window of {by(own)} px does not fit into the common size of {by(common)} px"
            alone = shlex.quote(f"input.path={path}")
            raise ConfigError(f"{path}: {why}; crop it alone: {alone}")
        from stem_dask.job.results import already_complete, stored_results

        if common is not None and plan.complete:
            size = stored_results(plan.outputs).get("window", {}).get("size")
            if size != list(common) and dataset.again is None:
                raise ConfigError(
                    f"{plan.outputs.store} was cropped to {by(size)} px with other inputs, and the common size is "
                    f"{by(common)} px now; add --overwrite to crop these inputs again, or give the former ones"
                )
            if size != list(common) and dataset.again is not None:
                plan = prepare(dataset.again)
        if plan.complete and not plan.outputs.missing_exports():
            return already_complete(plan.config, plan.outputs)
        self._refuse_too_small(plan)
        from stem_dask.job.run import run

        analyzed = common is not None and dataset.begun  # already shown
        return run(
            plan,
            say=None if analyzed else self._say_resuming,
            progress=self._step_after_analysis if analyzed else self.line.step,
            restart=self._drops(dataset),
            connection=self._connect(),
            common=common,
            alone=True,
            command=dataset.command,
        )

    def _step_after_analysis(self, step: "Step") -> None:
        if not step.stage.startswith("analyze"):
            self.line.step(step)

    def _say_resuming(self, text: str) -> None:
        """Print the line of a single run that the table lacks."""
        if text.startswith("resuming"):
            self.line.say(text)


def _detector(plan: Plan) -> tuple[int, int]:
    """Pixels (ky, kx) of the input."""
    height, width = plan.found.source.shape[-2:]
    return int(height), int(width)


def table(rows: Sequence[Row]) -> list[str]:
    """A header, one line per dataset, and the number of complete ones.

    Examples
    --------
    >>> done = Row("/raw/a.npy", "/out/a.zarr", 0, "", {"window": {"size": [40, 44]}})
    >>> print(*table([done, Row("/raw/b.npy", "/out/b.zarr", 3, "/raw/b.npy is empty")]), sep="\\n")
    input       output       window      exit
    /raw/a.npy  /out/a.zarr  40 x 44 px  0
    /raw/b.npy  /out/b.zarr              3     is empty
    1 of 2 complete
    """
    cells = [("input", "output", "window", "mean", "min", "exit", ""), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    used = [i for i in range(7) if any(row[i] for row in cells[1:])]
    lines = ["  ".join(row[i].ljust(widths[i]) for i in used).rstrip() for row in cells]
    n_complete = sum(row.exit_code == 0 for row in rows)
    return [*lines, f"{n_complete:,} of {len(rows):,} complete"]


def _cells(row: Row) -> tuple[str, ...]:
    window, kept = row.results.get("window"), row.results.get("validation", {})
    shares = [kept.get(name) for name in ("mean_retention", "min_retention")]
    words = row.words if row.exit_code is not None else "not finished; the same command goes on"
    return (
        shown(row.input),
        shown(row.output),
        "" if window is None else f"{by(window['size'])} px",
        *("" if share is None else f"{share:.4f}" for share in shares),
        str(75 if row.exit_code is None else row.exit_code),  # 75: was not reached
        # the full text of an error is printed above
        textwrap.shorten(words.replace(row.input, "").lstrip(": "), 72, placeholder=" …"),
    )


def _lines_of(outcome: "Outcome") -> list[str]:
    """The closing lines of one of several datasets: a summary, warnings, verdict and advice."""
    results = outcome.results
    if not results:  # it was complete
        judged = ("verdict", "advice", " ") if outcome.exit_code else ()
        return [outcome.lines[0], *(text for text in outcome.lines[1:] if text.startswith(judged))]
    from stem_dask.job.summary import judgement_lines  # which loads xarray

    kept, window = results["validation"], results.get("window")
    parts = ["not cropped"] if window is None else [f"{by(window['size'])} px"]
    if "mean_retention" in kept:
        shares = f"mean {kept['mean_retention']:.4f}, min {kept['min_retention']:.4f}"
        parts.append(f"retention {shares}")
    parts.append(f"{results['processing_time']:.1f} s")
    done = f"done        {shown(results['config']['output']['path'])}: {', '.join(parts)}"
    warnings = [text for text in outcome.lines if text.startswith(("warning", "quarantined"))]
    only = shlex.quote(f"input.path={results['config']['input']['path']}")
    return [done, *warnings, *judgement_lines(results, only)]


def shortfall(row: Row) -> str:
    """Short reason for exit code 4 or 7."""
    if row.exit_code == 7:
        n = row.results.get("quarantined", {}).get("n_patterns")
        return f"{n} patterns could not be read"
    kept = row.results["validation"]
    n = kept["n_patterns"] - kept["n_empty"] - kept["passes_min_threshold"]
    return f"{n:,} patterns below min_retention {row.results['limits']['min_retention']:g}"


def shown(path: str) -> str:
    """A path for display: relative below the working directory."""
    if is_url(path):
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
