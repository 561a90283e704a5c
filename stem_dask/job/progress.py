"""What a terminal, a log and a notebook show of a running job."""

import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

from stem_dask.core.model import Step


class Meter:
    """Rate, time and memory of a job, in words, from its finished blocks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.step: Step | None = None
        self.began = self.now = 0.0
        self.peak = 0

    def add(self, step: Step) -> None:
        """Note a finished block."""
        self.now = self.clock()
        if self.step is None or step.stage != self.step.stage:
            self.began = self.now - step.record.seconds
        self.step, self.peak = step, max(self.peak, step.record.peak_rss)

    def words(self, width: float = float("inf"), end: str = "") -> str:
        """Blocks, percentage, stage, rate, time and memory; the least important are left out to fit into ``width`` columns."""
        step, seconds = self.step, max(self.now - self.began, 1e-6)
        assert step is not None
        share, rate = step.done / step.total, ""
        if step.input_bytes:
            rate = f"{step.input_bytes * share / seconds / 1e9:.2f} GB/s"
        left = ""
        if share == 1:
            left = f"took {_clock(seconds)}"
        elif step.later is not None:  # all of the job, if later stages are as fast
            left = f"about {_clock(seconds / share * (1 - share + step.later))} left"
        parts = {
            "blocks": f"{step.done}/{step.total}",
            "percent": f"{share:.0%}",
            "stage": f"stage {step.number} of {step.n_stages}",
            "rate": rate,
            "time": left,
            "memory": f"worker memory {self.peak / 1e9:.2f} GB",
            "end": end,
        }
        for name in ("memory", "rate", "percent", "stage", "time"):
            if len("  ".join(filter(None, parts.values()))) > width:
                del parts[name]
        return "  ".join(filter(None, parts.values()))

    def line(self, width: float = float("inf"), end: str = "") -> str:
        """The name of the stage, then `words`."""
        assert self.step is not None
        name = f"{self.step.stage:11} "
        return name + self.words(width - len(name), end)


class NotebookProgress:
    """One place in a notebook that shows a line for each stage of a run."""

    def __init__(self) -> None:
        self.meter, self.lines = Meter(), dict[str, str]()
        self.handle: Any = None
        self.shown = 0.0

    def __call__(self, step: Step) -> None:
        """Show a finished block."""
        self.meter.add(step)
        self.lines[step.stage] = self.meter.line()
        if step.done < step.total and self.meter.now - self.shown < 0.2:
            return
        self.shown = self.meter.now
        text = {"text/plain": "\n".join([*self.lines.values()][-30:])}
        if self.handle is None:
            display = importlib.import_module("IPython.display").display
            self.handle = display(text, raw=True, display_id=True)
        else:
            self.handle.update(text, raw=True)


def notebook_progress() -> NotebookProgress | None:
    """Progress for the notebook that this process is the kernel of; None without one."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return NotebookProgress() if getattr(shell, "kernel", None) is not None else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
