"""Several inputs in one command: one after another on one cluster; failed inputs are listed in a table at the end."""

import contextlib
import json
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stem_dask.cli.progress import ProgressLine, progress_shown, shortcoming, show
from stem_dask.cli.signals import stoppable
from stem_dask.cluster.gpu import chosen_device
from stem_dask.config.options import Config
from stem_dask.core.errors import ConfigError, InterruptedRunError, StemDaskError
from stem_dask.core.text import by
from stem_dask.engine.state import unfinished_token
from stem_dask.job.outputs import is_there
from stem_dask.job.prepare import Prepared, begun, input_lines, prepare, refuse_too_small
from stem_dask.storage.location import is_url

if TYPE_CHECKING:
    from stem_dask.cluster.connect import Connection
    from stem_dask.core.model import Step, Window
    from stem_dask.job.results import Outcome

T = TypeVar("T")


@dataclass
class Row:
    """One dataset in the table; without an exit code it is not finished."""

    input: str
    output: str
    exit_code: int | None = None
    words: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> "Row":
        """The row of a job that has not started."""
        return cls(str(config.input.path), config.output.path)


@dataclass
class Dataset:
    """One of several inputs: its job and state, and its row of the table."""

    config: Config
    place: str
    row: Row
    #: for ``crop.size: common``, the window of this dataset alone, and the size of its detector
    window: "Window | None" = None
    detector: tuple[int, int] = (0, 0)
    #: whether this command has started it, and the job that replaces an output which this command made already
    begun: bool = False
    again: Config | None = None


def run_all(
    configs: Sequence[Config],
    *,
    quiet: bool = False,
    restart: bool = False,
    time_limit: float | None = None,
) -> int:
    """Run the jobs of one command and print what happened.

    Parameters
    ----------
    configs : of one or several jobs, see `stem_dask.config.load.load_configs`; the first one defines the cluster
    quiet : print errors only
    restart : drop unfinished runs
    time_limit : seconds until the command stops; the same command resumes

    Returns
    -------
    int
        The highest exit code.

    Raises
    ------
    InterruptedRunError
        If it was interrupted.
    StemDaskError
        If a single job fails, or the cluster does not start.
    """
    if len(configs) == 1:
        return run_one(configs[0], quiet=quiet, restart=restart, time_limit=time_limit)
    datasets = [
        Dataset(config, f"[{i}/{len(configs)}]", Row.of(config))
        for i, config in enumerate(configs, 1)
    ]
    line = ProgressLine(sys.stdout, live=sys.stdout.isatty(), quiet=quiet)
    with stoppable(time_limit) as asked:
        try:
            with contextlib.ExitStack() as stack:
                Batch(datasets, line, asked, restart, stack).run()
        finally:  # after the last messages of the workers
            line.close()
            rows = [dataset.row for dataset in datasets]
            if any(row.exit_code is not None for row in rows):  # else nothing has started
                for text in table(rows):
                    line.say(text)
    return max(dataset.row.exit_code or 0 for dataset in datasets)


@dataclass
class Batch:
    """Several running jobs, and their shared state."""

    datasets: list[Dataset]
    line: ProgressLine
    #: not empty if the command was interrupted
    asked: Sequence[int]
    restart: bool
    stack: contextlib.ExitStack
    largest: int = 0
    connection: "Connection | None" = None
    common: tuple[int, int] | None = None

    def run(self) -> None:
        """Run all jobs; an error is recorded in the row of its dataset."""
        if self._look():
            self._connect()
        crop = self.datasets[0].config.crop
        if crop.enabled and crop.size == "common":
            self.common = self._common_size()
        for dataset in self._open():
            self.line.heading(f"{dataset.place} {shown(dataset.row.input)}")
            outcome = self._tried(dataset, partial(self._one, dataset))
            if outcome is not None:
                self._note(dataset, outcome)

    def _refuse_too_small(self, prepared: Prepared) -> None:
        """Check the memory of planned workers, unless they have been started."""
        if self.connection is None:
            refuse_too_small(prepared)

    def _open(self) -> list[Dataset]:
        return [dataset for dataset in self.datasets if dataset.row.exit_code is None]

    def _connect(self) -> "Connection":
        """The shared cluster, started when it is first needed."""
        if self.connection is None:
            from stem_dask.cluster.connect import connect
            from stem_dask.core.machine import load_meanwhile
            from stem_dask.job.run import PASSES

            config = self.datasets[0].config
            device, why = chosen_device(config.device, config.cluster)
            load_meanwhile(PASSES)
            options = config.cluster.model_dump()
            options |= {"input_bytes": self.largest, "device": device}
            asked = connect(**options, say=self.line.say)
            self.connection = self.stack.enter_context(asked)
            for text in self.connection.lines(f"{device}{why}"):
                self.line.say(text)
        return self.connection

    def _tried(self, dataset: Dataset, work: Callable[[], T]) -> T | None:
        """Call ``work``; an error is printed and recorded, and the other datasets continue."""
        try:
            return work()
        except InterruptedRunError:
            raise
        except Exception as error:
            if self.asked:  # an interrupted import may raise any error
                raise
            row = dataset.row
            row.exit_code = 5 if isinstance(error, OSError) else 1  # of the client itself
            if isinstance(error, StemDaskError):
                row.exit_code = error.exit_code
            row.words = str(error) or type(error).__name__
            where = "" if row.input in row.words else f"{row.input}: "
            self.line.complain(f"error: {where}{row.words}")
            if row.exit_code == 1:  # an internal error
                traceback.print_exception(error)
            return None

    def _look(self) -> bool:
        """Whether any job is to run; errors are raised again, and reported, when the job runs."""
        looked: list[tuple[Dataset, Prepared]] = []
        for dataset in self.datasets:
            with contextlib.suppress(StemDaskError, OSError):
                looked.append((dataset, prepare(dataset.config)))
        going_on = any(_is_unfinished(prepared) for _, prepared in looked)
        waiting = []
        for dataset, prepared in looked:
            with contextlib.suppress(StemDaskError, OSError):
                if not (prepared.complete or self._replaced(dataset, prepared, going_on)):
                    self._refuse_too_small(prepared)
                    waiting.append(prepared.found)
        if waiting:
            self.largest = max(found.n_bytes for found in waiting)
        return bool(waiting)

    def _replaced(self, dataset: Dataset, prepared: Prepared, going_on: bool) -> bool:
        """Whether this command, before it was interrupted, has already replaced the output.

        To recognize that, the journals record permission to replace every older output before the first job starts.
        """
        if not dataset.config.output.overwrite:
            return False
        if going_on:
            output = dataset.config.output.model_copy(update={"overwrite": False})
            kept = dataset.config.model_copy(update={"output": output})
            if prepare(kept).complete:
                dataset.config, dataset.again = kept, dataset.config
                return True
        elif any(is_there(path) for path in prepared.outputs.all()):
            with begun(prepared, restart=self._drops(dataset)):
                pass
        return False

    def _drops(self, dataset: Dataset) -> bool:
        """Whether to drop an unfinished run of an earlier command."""
        first, dataset.begun = not dataset.begun, True
        return self.restart and first

    def _common_size(self) -> tuple[int, int] | None:
        """The common size of the datasets that fit together; the others are refused when they run."""
        from stem_dask.core.window import common_size

        for dataset in self._open():
            self.line.heading(f"{dataset.place} {shown(dataset.row.input)}: its own window")
            dataset.window = self._tried(dataset, partial(self._own_window, dataset))
        found = [(d.window.shape, d.detector) for d in self._open() if d.window is not None]
        if not found:
            return None
        windows, detectors = zip(*found, strict=True)
        common = common_size(windows, detectors, _multiple(self.datasets[0].config))
        fitting = sum(_fits(dataset, common) for dataset in self._open())
        of = f" of {len(found)}" if fitting < len(found) else ""
        self.line.say(f"common      {by(common)} px, which holds the windows of {fitting}{of}")
        return common

    def _own_window(self, dataset: Dataset) -> "Window":
        """The window of one dataset alone; its analysis is kept for the crop."""
        prepared = prepare(dataset.config)
        height, width = prepared.found.source.shape[-2:]
        dataset.detector = (int(height), int(width))
        from stem_dask.job.analysis import stored_window
        from stem_dask.job.passes import window_of

        with contextlib.ExitStack() as stack:
            complete = prepared.complete
            if not complete:
                self._refuse_too_small(prepared)
                state = stack.enter_context(begun(prepared, restart=self._drops(dataset)))
                complete = state.is_complete
            if complete:
                window = stored_window(dataset.config, prepared.outputs.store)
            else:
                connection, step = self._connect(), self.line.step
                for text in input_lines(prepared, state):
                    self._brief(text)
                window = window_of(prepared, state, connection, step)
        self.line.say(f"window      {by(window.shape)} px of {by(dataset.detector)}")
        return window

    def _one(self, dataset: Dataset) -> "Outcome":
        """Run one job."""
        prepared = prepare(dataset.config)
        if self.common is not None:
            _check_common(dataset, self.common)
            if prepared.complete and _stored_size(prepared) != list(self.common):
                prepared = prepare(_another(dataset, prepared, self.common))
        if prepared.complete:
            from stem_dask.job.results import already_complete

            return already_complete(prepared.config, prepared.outputs)
        self._refuse_too_small(prepared)
        analyzed = self.common is not None and dataset.begun  # already shown
        with begun(prepared, restart=self._drops(dataset)) as state:
            from stem_dask.job.run import run

            return run(
                prepared,
                say=None if analyzed else self._brief,
                progress=self._step_after_analysis if analyzed else self.line.step,
                state=state,
                connection=self._connect(),
                common=self.common,
                alone=True,
            )

    def _step_after_analysis(self, step: "Step") -> None:
        if not step.stage.startswith("analyze"):
            self.line.step(step)

    def _brief(self, text: str) -> None:
        """Print the lines of a single run that the table lacks."""
        if text.startswith("resuming"):
            self.line.say(text)

    def _note(self, dataset: Dataset, outcome: "Outcome") -> None:
        """Print the outcome of a job, and record it for the table."""
        dataset.row.exit_code = outcome.exit_code
        dataset.row.results = outcome.results or stored_results(dataset.config)
        for text in lines_of(outcome):
            self.line.say(text)
        if outcome.exit_code:
            dataset.row.words = shortfall(dataset.row)
            if not self.line.quiet:
                self.line.complain(f"{shown(dataset.row.input)}: {shortcoming(outcome)}")


def _is_unfinished(prepared: Prepared) -> bool:
    """Whether an earlier command left this job unfinished."""
    return unfinished_token(prepared.outputs.path) == prepared.token


def _multiple(config: Config) -> int:
    return config.crop.size_multiple * config.downsample.factor


def _fits(dataset: Dataset, common: tuple[int, int]) -> bool:
    """Whether the common size fits the detector and contains the dataset's own window."""
    import numpy as np

    from stem_dask.core.window import fits

    if dataset.window is None:
        return False
    own, full = np.array([dataset.window.shape]), np.array([dataset.detector])
    return bool(fits(own, full, common, _multiple(dataset.config))[0])


def _check_common(dataset: Dataset, common: tuple[int, int]) -> None:
    """Refuse a dataset that does not fit the common size."""
    if dataset.window is None or _fits(dataset, common):
        return
    path, own = dataset.row.input, dataset.window.shape
    larger = any(n > most for n, most in zip(own, common, strict=True))
    why = (
        f"its own window of {by(own)} px does not fit into the common size of {by(common)} px"
        if larger
        else f"its detector of {by(dataset.detector)} px cannot have the common size of {by(common)} px"
    )
    raise ConfigError(f"{path}: {why}; crop it alone: {shlex.quote(f'input.path={path}')}")


def _stored_size(prepared: Prepared) -> Any:
    """Height and width of the window of a finished dataset."""
    return stored_results(prepared.config).get("window", {}).get("size")


def _another(dataset: Dataset, prepared: Prepared, common: tuple[int, int]) -> Config:
    """The job that replaces a finished dataset of another size, if overwriting is allowed."""
    if dataset.again is None:
        raise ConfigError(
            f"{prepared.outputs.store} was cropped to {by(_stored_size(prepared))} px with other inputs, and the common "
            f"size is {by(common)} px now; add --overwrite to crop these inputs again, or give the former ones"
        )
    return dataset.again


#: characters of an error in the table; the full text is printed above
SHOWN_CHARACTERS = 72

#: exit code of an input that was not reached
NOT_DONE = 75


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
    words = words.replace(row.input, "").lstrip(": ")
    return (
        shown(row.input),
        shown(row.output),
        "" if window is None else f"{by(window['size'])} px",
        *("" if share is None else f"{share:.4f}" for share in shares),
        str(NOT_DONE if row.exit_code is None else row.exit_code),
        textwrap.shorten(words, SHOWN_CHARACTERS, placeholder=" …"),
    )


def lines_of(outcome: "Outcome") -> list[str]:
    """The closing lines of one of several datasets: a summary, warnings, verdict and advice."""
    results = outcome.results
    if not results:
        return list(outcome.lines)
    from stem_dask.report.text import judgement_lines  # which loads xarray

    kept, window = results["validation"], results.get("window")
    parts = ["not cropped"] if window is None else [f"{by(window['size'])} px"]
    if "mean_retention" in kept:
        parts.append(
            f"retention mean {kept['mean_retention']:.4f}, min {kept['min_retention']:.4f}"
        )
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


def stored_results(config: Config) -> Mapping[str, Any]:
    """results.json of a finished job; empty if it cannot be read."""
    from stem_dask.job.outputs import Outputs

    try:
        results = json.loads(Path(Outputs.of(config).results).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def shown(path: str) -> str:
    """A path for display: relative below the working directory."""
    if is_url(path):
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def run_one(config: "Config", *, quiet: bool, restart: bool, time_limit: float | None) -> int:
    """Run one job, print what happened; returns the exit code."""
    from stem_dask.job.prepare import begun, prepare

    prepared = prepare(config)
    if prepared.complete:
        from stem_dask.job.results import already_complete

        outcome = already_complete(prepared.config, prepared.outputs)
        if not quiet:
            show(outcome)
        return outcome.exit_code
    with stoppable(time_limit), begun(prepared, restart=restart) as state:
        from stem_dask.job.run import (
            run,
        )  # after the lock, so that a locked output is reported at once

        with progress_shown(quiet) as (say, progress):
            outcome = run(prepared, say=say, progress=progress, state=state, alone=True)
    if not quiet:
        show(outcome)
    return outcome.exit_code
