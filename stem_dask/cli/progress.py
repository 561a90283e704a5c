"""Progress of a run on a terminal or in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from stem_dask.core.model import Step
    from stem_dask.job.outcome import Outcome

#: seconds between lines in a log
LOG_EVERY = 30.0


def show(outcome: "Outcome") -> None:
    """Print the closing lines of a run."""
    print("\n".join(outcome.lines))
    if outcome.exit_code:
        print(shortcoming(outcome), file=sys.stderr)


def shortcoming(outcome: "Outcome") -> str:
    """The reason for exit code 4 or 7, and what to do."""
    if outcome.exit_code == 4:
        return "too many patterns keep less than validate.min_retention; the lines called advice say what would keep enough"
    return "a part of the input could not be read (results.json names it); when it can, add --overwrite to do it again"


@contextlib.contextmanager
def progress_shown(quiet: bool) -> Iterator[tuple[Callable[[str], None], "Callable[[Step], None]"]]:
    """Two callbacks of a run: print a line of text, and report a finished block."""
    line = ProgressLine(sys.stdout, live=sys.stdout.isatty(), quiet=quiet)
    try:
        yield line.say, line.step
    finally:
        line.close()


class ProgressLine:
    """A live bar on a terminal; in a log a line with the time every 30 s and one at the end of each stage."""

    def __init__(
        self,
        stream: TextIO,
        *,
        live: bool,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream, self.live, self.quiet, self.clock = stream, live, quiet, clock
        self.stage, self.began, self.shown, self.peak = "", 0.0, 0.0, 0
        self.bar: Any = None

    def say(self, text: str) -> None:
        """Print one line, above the bar."""
        if not self.quiet:
            self.close()
            print(text, file=self.stream, flush=True)

    def heading(self, text: str) -> None:
        """Print the first line of another dataset."""
        self.stage = ""
        self.say(text)

    def complain(self, text: str) -> None:
        """Print an error, even with ``quiet``."""
        self.close()
        self.stream.flush()
        print(text, file=sys.stderr, flush=True)

    def step(self, step: "Step") -> None:
        """Show a finished block."""
        if self.quiet:
            return
        now, last = self.clock(), step.done == step.total
        if step.stage != self.stage:
            self.stage, self.began = step.stage, now - step.record.seconds
            self.shown = 0.0 if self.live else now
        self.peak = max(self.peak, step.record.peak_rss)
        if not last and now - self.shown < (0.1 if self.live else LOG_EVERY):
            return
        self.shown, seconds = now, max(now - self.began, 1e-6)
        share = step.done / step.total
        rate = f"{step.input_bytes * share / seconds / 1e9:.2f} GB/s  " if step.input_bytes else ""
        spent = _clock(seconds) if last else f"{_clock(seconds / share - seconds)} left"
        text = f"{rate}{spent}  worker memory {self.peak / 1e9:.2f} GB"
        if self.live:
            text = f"{step.done}/{step.total}  {text}"
        else:
            text = f"{step.done}/{step.total}  {share:.0%}  {text}  {time.strftime('%H:%M:%S')}"
        if last or not self.live:
            self.say(f"{step.stage:11} {text}")
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            columns = (  # on a narrow terminal the end of the text is left out, not the name of the stage
                TextColumn("{task.description}", table_column=Column(min_width=11, no_wrap=True)),
                BarColumn(20),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(
                *columns, console=Console(file=self.stream), transient=True, auto_refresh=False,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self.bar.add_task("", text="")
            self.bar.start()
            self.bar.console.show_cursor()  # which a kill would leave hidden
        done = {"description": step.stage, "completed": step.done, "total": step.total}
        self.bar.update(self.bar.task_ids[0], **done, text=text, refresh=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
