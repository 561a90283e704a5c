"""Several inputs in one command: one after another on one cluster; a failure stops no other, and a table says which."""

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
from stem_dask.job.prepare import Prepared, begun, input_lines, prepare, token
from stem_dask.storage.urls import is_url

if TYPE_CHECKING:
    from stem_dask.cluster.connect import Connection
    from stem_dask.core.model import Step, Window
    from stem_dask.job.results import Outcome

T = TypeVar("T")


@dataclass
class Row:
    """One dataset in the table; without an exit code it was not brought to an end."""

    input: str
    output: str
    exit_code: int | None = None
    words: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> "Row":
        """Of a job that has not begun."""
        return cls(str(config.input.path), config.output.path)


@dataclass
class Dataset:
    """One of several inputs: its job, what is known of it, and how it ended (its row of the table)."""

    config: Config
    place: str
    row: Row
    #: the window that it would get by itself, for ``crop.size: common``, and the size of its detector
    window: "Window | None" = None
    detector: tuple[int, int] = (0, 0)
    #: whether this command has begun it, and the job that would replace an output which this command made already
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
    configs : of one job or of several, as `stem_dask.config.load.load_configs` gives them; the first says which cluster
    quiet : print errors only
    restart : drop unfinished runs
    time_limit : seconds until the command stops, so that the same command goes on later

    Returns
    -------
    int
        The highest exit code.

    Raises
    ------
    InterruptedRunError
        When it was asked to stop.
    StemDaskError
        What stops a single job, or keeps the cluster from starting.
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
        finally:  # after what workers may say when they are stopped
            line.close()
            rows = [dataset.row for dataset in datasets]
            if any(row.exit_code is not None for row in rows):  # else nothing has begun
                for text in table(rows):
                    line.say(text)
    return max(dataset.row.exit_code or 0 for dataset in datasets)


@dataclass
class Batch:
    """Several jobs on their way, and what they share."""

    datasets: list[Dataset]
    line: ProgressLine
    #: not empty when the command was asked to stop
    asked: Sequence[int]
    restart: bool
    stack: contextlib.ExitStack
    largest: int = 0
    connection: "Connection | None" = None
    common: tuple[int, int] | None = None

    def run(self) -> None:
        """All jobs; an error is noted in its dataset."""
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
        """While there are no workers whose memory could be looked at."""
        if self.connection is None:
            from stem_dask.job.fitting import refuse_too_small

            refuse_too_small(prepared)

    def _open(self) -> list[Dataset]:
        return [dataset for dataset in self.datasets if dataset.row.exit_code is None]

    def _connect(self) -> "Connection":
        """The one cluster of all, made when it is first needed."""
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
        """The result of some work for a dataset; an error is told and noted, and the others go on."""
        try:
            return work()
        except InterruptedRunError:
            raise
        except Exception as error:
            if self.asked:  # an import that is stopped ends in errors of many kinds
                raise
            row = dataset.row
            row.exit_code = 5 if isinstance(error, OSError) else 1  # of the client itself
            if isinstance(error, StemDaskError):
                row.exit_code = error.exit_code
            row.words = str(error) or type(error).__name__
            where = "" if row.input in row.words else f"{row.input}: "
            self.line.complain(f"error: {where}{row.words}")
            if row.exit_code == 1:  # a fault of ours: whoever mends it wants to know where
                traceback.print_exception(error)
            return None

    def _look(self) -> bool:
        """Whether there is anything to do; what is wrong is told when its turn comes."""
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
        """Whether this very command replaced the output already, before it was interrupted.

        To tell that later, leave to replace is noted for every older output before the first job begins.
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
        """Whether to drop an unfinished run: one of an earlier command, not of this one."""
        first, dataset.begun = not dataset.begun, True
        return self.restart and first

    def _common_size(self) -> tuple[int, int] | None:
        """The size for the datasets that fit together; the others are refused when their turn comes."""
        from stem_dask.stages.window import common_size

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
        """The window that a dataset would get by itself; the analysis waits for the crop."""
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
        analyzed = self.common is not None and dataset.begun  # which was shown
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
        """Of what a single run says, what the table does not."""
        if text.startswith("resuming"):
            self.line.say(text)

    def _note(self, dataset: Dataset, outcome: "Outcome") -> None:
        """Tell how a job ended, and keep it for the table."""
        dataset.row.exit_code = outcome.exit_code
        dataset.row.results = outcome.results or stored_results(dataset.config)
        for text in lines_of(outcome):
            self.line.say(text)
        if outcome.exit_code:
            dataset.row.words = shortfall(dataset.row)
            if not self.line.quiet:
                self.line.complain(f"{shown(dataset.row.input)}: {shortcoming(outcome)}")


def _is_unfinished(prepared: Prepared) -> bool:
    """Whether an earlier command has begun this job and not come to its end."""
    mark = token(prepared.config, prepared.found)
    return unfinished_token(prepared.outputs.path) == mark


def _multiple(config: Config) -> int:
    return config.crop.size_multiple * config.downsample.factor


def _fits(dataset: Dataset, common: tuple[int, int]) -> bool:
    """Whether a dataset can be cut to the common size, and loses nothing of its own window."""
    import numpy as np

    from stem_dask.stages.window import fits

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
    """Height and width of the window that a finished dataset was cut to."""
    return stored_results(prepared.config).get("window", {}).get("size")


def _another(dataset: Dataset, prepared: Prepared, common: tuple[int, int]) -> Config:
    """The job that replaces a finished dataset of another size, if there is leave to."""
    if dataset.again is None:
        raise ConfigError(
            f"{prepared.outputs.store} was cropped to {by(_stored_size(prepared))} px with other inputs, and the common "
            f"size is {by(common)} px now; add --overwrite to crop these inputs again, or give the former ones"
        )
    return dataset.again


#: characters of an error in the table; the whole of it stands above
SHOWN_CHARACTERS = 72

#: how an input ends that a command did not come to
NOT_DONE = 75


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each dataset, under the names of the columns, and one that counts them.

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
    """What is said of one of several datasets at its end: one line, the warnings, the verdict unless it is ok, the advice."""
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
    """Why a finished dataset is not as it was wanted, in a few words."""
    if row.exit_code == 7:
        n = row.results.get("quarantined", {}).get("n_patterns")
        return f"{n} patterns could not be read"
    kept = row.results["validation"]
    n = kept["n_patterns"] - kept["n_empty"] - kept["passes_min_threshold"]
    return f"{n:,} patterns below min_retention {row.results['limits']['min_retention']:g}"


def stored_results(config: Config) -> Mapping[str, Any]:
    """What results.json says of a finished job; nothing when it cannot be read."""
    from stem_dask.job.outputs import Outputs

    try:
        results = json.loads(Path(Outputs.of(config).results).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def shown(path: str) -> str:
    """A path for people: relative when it lies below the working directory."""
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
        from stem_dask.job.run import run  # after the lock: who comes too late is told at once

        with progress_shown(quiet) as (say, progress):
            outcome = run(prepared, say=say, progress=progress, state=state, alone=True)
    if not quiet:
        show(outcome)
    return outcome.exit_code
