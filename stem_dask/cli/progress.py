"""Progress of a run on a terminal or in a log."""

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from stem_dask.job.progress import Meter

if TYPE_CHECKING:
    from stem_dask.core.model import Step
    from stem_dask.job.outcome import Outcome

#: seconds between lines in a log
LOG_EVERY = 30.0

#: columns of the bar at most, and of the words that it leaves room for
BAR, WORDS = 20, 42


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
def progress_shown(quiet: bool, verbose: bool) -> Iterator["ProgressLine"]:
    """Progress on standard output; with ``verbose`` log records on standard error, and no live bar that they would break."""
    logger = logging.getLogger("stem_dask")
    level, handler = logger.level, logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
    line = ProgressLine(sys.stdout, live=sys.stdout.isatty() and not verbose, quiet=quiet)
    if verbose:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield line
    finally:
        line.close()
        logger.removeHandler(handler)
        logger.setLevel(level)


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
        self.stream, self.live, self.quiet = stream, live, quiet
        self.meter, self.shown = Meter(clock), 0.0
        self.bar: Any = None

    def say(self, text: str) -> None:
        """Print one line, above the bar."""
        if not self.quiet:
            self.close()
            print(text, file=self.stream, flush=True)

    def heading(self, text: str) -> None:
        """Print the first line of another dataset."""
        self.meter.step = None
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
        before, last = self.meter.step, step.done == step.total
        self.meter.add(step)
        if before is None or before.stage != step.stage:
            self.shown = 0.0 if self.live else self.meter.now
        if not last and self.meter.now - self.shown < (0.1 if self.live else LOG_EVERY):
            return
        self.shown = self.meter.now
        if not self.live:
            self.say(self.meter.line(end=time.strftime("%H:%M:%S")))
        elif last:
            self.say(self.meter.line(shutil.get_terminal_size().columns))
        else:
            self._draw(step)

    def _draw(self, step: "Step") -> None:
        """Draw the bar, as long as the words leave room for it."""
        from rich.console import Console
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        if self.bar is None:
            console = Console(file=self.stream)
            self.bar = Live(
                console=console, transient=True, auto_refresh=False,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self.bar.start()
            console.show_cursor()  # which a kill would leave hidden
        room = self.bar.console.width - len(step.stage) - 1
        words = self.meter.words(max(room - BAR - 1, min(room, WORDS)))
        cells: list[Any] = [step.stage, words]
        if (width := min(BAR, room - len(words) - 1)) >= BAR // 4:
            cells.insert(1, ProgressBar(step.total, step.done, width))
        row = Table.grid(padding=(0, 1, 0, 0))
        for _ in cells:
            row.add_column(no_wrap=True, overflow="crop")
        row.add_row(*cells)
        self.bar.update(row, refresh=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
