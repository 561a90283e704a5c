"""Progress of a run on a terminal or in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from stem_dask.core.model import Step
    from stem_dask.job.results import Outcome

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
        return "too many patterns keep less than validate.min_retention; add one of the lines called advice to the command"
    return "a part of the input could not be read (results.json names it); when it can, add --overwrite to do it again"


@contextlib.contextmanager
def progress_shown(
    quiet: bool, stream: TextIO | None = None
) -> Iterator[tuple[Callable[[str], None], "Callable[[Step], None]"]]:
    """Two callbacks of a run: print a line of text, and report a finished block."""
    stream = stream or sys.stdout
    line = ProgressLine(stream, live=stream.isatty(), quiet=quiet)
    try:
        yield line.say, line.step
    finally:
        line.close()


class ProgressLine:
    """One live line on a terminal; in a log a plain line every 30 s and one at the end of each stage."""

    def __init__(
        self,
        stream: TextIO,
        *,
        live: bool,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream, self.live, self.quiet, self.clock = stream, live, quiet, clock
        self.stage, self.began, self.shown, self.peak, self.width = "", 0.0, 0.0, 0, 0

    def say(self, text: str) -> None:
        """Print one line, above the live one."""
        if not self.quiet:
            self._erase()
            print(text, file=self.stream, flush=True)

    def heading(self, text: str) -> None:
        """Print the first line of another dataset."""
        self.stage = ""
        self.say(text)

    def complain(self, text: str) -> None:
        """Print an error, even with ``quiet``."""
        self._erase()
        self.stream.flush()
        print(text, file=sys.stderr, flush=True)

    def step(self, step: "Step") -> None:
        """Show a finished block."""
        if self.quiet:
            return
        now = self.clock()
        if step.stage != self.stage:
            self.stage, self.began, self.shown = step.stage, now - step.record.seconds, now
            if self.live:
                self.shown = 0.0
        self.peak = max(self.peak, step.record.peak_rss)
        last = step.done == step.total
        if last or now - self.shown >= (0.1 if self.live else LOG_EVERY):
            self.shown = now
            text = self._text(step, now)
            if self.live and not last:
                self._erase()
                print(text, end="", file=self.stream, flush=True)
                self.width = len(text)
            else:
                self.say(text)

    def close(self) -> None:
        """Leave the cursor at the start of a line."""
        self._erase()

    def _text(self, step: "Step", now: float) -> str:
        seconds = max(now - self.began, 1e-6)
        left = seconds / step.done * (step.total - step.done)
        rate = ""
        if step.input_bytes:
            rate = f"  {step.input_bytes * step.done / step.total / seconds / 1e9:.2f} GB/s"
        tail = f"  {_clock(left)} left" if step.done < step.total else f"  {_clock(seconds)}"
        return f"{step.stage:11} {step.done}/{step.total}{rate}{tail}  worker memory {self.peak / 1e9:.2f} GB"

    def _erase(self) -> None:
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=self.stream, flush=True)
            self.width = 0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
