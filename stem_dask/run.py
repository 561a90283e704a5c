"""python -m stem_dask.run CONFIG [key=value ...]: the whole job of a config file."""

import argparse
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO, TypeVar

from stem_dask.urls import without_secrets

if TYPE_CHECKING:
    from stem_dask.model import Step
    from stem_dask.options import Config
    from stem_dask.results import Outcome

T = TypeVar("T")

#: without a terminal a line is written this often, in seconds
LOG_EVERY = 30.0

#: overrides that say where a job runs
PLACES = ("cluster.kind=", "cluster.address=", "cluster.scheduler_file=")
#: SLURM kills at its end time; the way out takes a few seconds
BEFORE_WALL_TIME = 60.0
#: a signal that came where nobody would hear of it comes again after so many seconds
AGAIN_SECONDS = 0.05
#: where Python calls back for weak references
_CALLBACKS = (f"{os.sep}weakref.py", f"{os.sep}_weakrefset.py")

EXIT_CODES = """exit codes:
  0 complete   2 configuration or existing output   3 input unreadable   4 too many patterns below min_retention
  5 disk, memory, or a worker lost   6 output in use by a live run   7 finished without what could not be read
  75 interrupted, the same command goes on   1 internal error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a config; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m stem_dask.run",
        description="Read a 4D-STEM dataset, find its window, crop, check, downsample, store and export it.",
        epilog="example: python -m stem_dask.run configs/crop.yaml input.path=scan.dm4 output.path=out/scan.zarr\n\n"
        + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    words = sys.argv[1:] if argv is None else [*argv]
    # within: the parser shows words that it does not know
    return guarded(lambda: run_file(parser.parse_intermixed_args(without_secrets(words))))


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of a run, which ``stem-dask run`` takes too."""
    parser.add_argument("config", help="YAML file, see configs/crop.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override any key of the config"
    )
    parser.add_argument(
        "--cluster",
        metavar="WHERE",
        help="auto, threads, local, slurm, gpu, the address of a scheduler, or the file that describes it; replaces the "
        "config's cluster.kind, host, address and scheduler_file",
    )
    parser.add_argument(
        "--insecure-cluster",
        action="store_true",
        help="as cluster.insecure=true: do without TLS",
    )
    add_stop_options(parser)


def add_stop_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that can be stopped and goes on."""
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--overwrite", action="store_true", help="as output.overwrite=true")
    parser.add_argument("--restart", action="store_true", help="drop an unfinished run")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="stop in time, so that the same command goes on later",
    )


def run_file(options: argparse.Namespace) -> int:
    """Load a config, run the job of every input, print what happened; returns the exit code."""
    from stem_dask.config import load_configs

    flags = {
        "output.overwrite=true": options.overwrite,
        "cluster.insecure=true": options.insecure_cluster,
    }
    given = [override for override, is_set in flags.items() if is_set]
    given += [] if options.cluster is None else where(options.cluster, options.overrides)
    configs = load_configs(options.config, [*options.overrides, *given])
    from stem_dask.batch import run_all

    return run_all(
        configs, quiet=options.quiet, restart=options.restart, time_limit=options.time_limit
    )


def where(text: str, overrides: Sequence[str] = ()) -> list[str]:
    """What ``--cluster`` stands for; the place that a config names makes way, the rest of its section stays.

    Raises
    ------
    ConfigError
        When it is an address without a protocol, or an override of the same command names another place.

    Examples
    --------
    >>> where("tls://node1:8786")[0], where("slurm")[-1]
    ('cluster.address=tls://node1:8786', 'cluster.kind=slurm')
    """
    if "://" not in text and text.rpartition(":")[2].isdigit():
        from stem_dask.errors import ConfigError

        raise ConfigError(f"--cluster is {text}; expected tls://{text}, or tcp://{text}")
    chosen = {"address": "null", "scheduler_file": "null", "kind": "auto"}
    is_file = os.sep in text or text.endswith(".json")
    key = "address" if "://" in text else "scheduler_file" if is_file else "kind"
    if text not in ("local", "slurm"):
        chosen["host"] = "null"  # nothing of ours would listen there
    given = [f"cluster.{name}={value}" for name, value in {**chosen, key: text}.items()]
    for override in overrides:
        if override.startswith(PLACES) and override not in given:
            from stem_dask.errors import ConfigError

            raise ConfigError(f"--cluster {text} and {override} are two places; leave one out")
    return given


def run_one(config: "Config", *, quiet: bool, restart: bool, time_limit: float | None) -> int:
    """Run one job, print what happened; returns the exit code."""
    from stem_dask.preflight import begun, prepare

    prepared = prepare(config)
    if prepared.complete:
        from stem_dask.results import already_complete

        outcome = already_complete(prepared.config, prepared.outputs)
        if not quiet:
            show(outcome)
        return outcome.exit_code
    with stoppable(time_limit), begun(prepared, restart=restart) as state:
        from stem_dask.pipeline import run  # after the lock: who comes too late is told at once

        with progress_shown(quiet) as (say, progress):
            outcome = run(prepared, say=say, progress=progress, state=state, alone=True)
    if not quiet:
        show(outcome)
    return outcome.exit_code


@contextlib.contextmanager
def stoppable(time_limit: float | None) -> Iterator[Sequence[int]]:
    """SIGTERM and a coming wall time stop a run like Ctrl-C: what is finished stays, and the same command goes on.

    Yields what is empty until the run was asked to stop: an error may then be one that came of it.
    """
    from stem_dask.errors import InterruptedRunError

    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if is_unheard(frame):
            again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        signal.signal(number, signal.SIG_IGN)  # once is enough, and the way out takes a few seconds
        asked.append(number)
        raise KeyboardInterrupt  # which nobody on the way takes for an error of his own

    left = seconds_left(time_limit, os.environ.get("SLURM_JOB_END_TIME"), time.time())
    timer = threading.Timer(left or 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.daemon = True
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if left is not None:
            timer.start()
        yield asked
    except BaseException as error:
        if asked:  # or what became of it: an import that is stopped ends in errors of many kinds
            # a signal within the text of an exec (dataclasses, in imports) has Python end itself with SIGINT's code at
            # the last, whatever ours is, unless another exec went well
            exec("")
            raise InterruptedRunError(
                "asked to stop; the same command goes on where this one ended"
            ) from error
        raise
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def is_unheard(frame: FrameType | None) -> bool:
    """Whether an error would be dropped here: Python does so in finalizers and in callbacks of weak references and the
    garbage collector.
    """
    collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code in collecting or code.co_filename.endswith(_CALLBACKS):
            return True
        frame = frame.f_back
    return False


def seconds_left(time_limit: float | None, slurm_end: str | None, now: float) -> float | None:
    """When to stop, in seconds from now: at the limit, and a minute before SLURM ends the job.

    Examples
    --------
    >>> seconds_left(100.0, "1060", 900.0), seconds_left(None, None, 0.0)
    (100.0, None)
    """
    limits = [] if time_limit is None else [max(0.0, time_limit)]
    if slurm_end is not None and slurm_end.isdigit():
        limits.append(max(0.0, float(slurm_end) - now - BEFORE_WALL_TIME))
    return min(limits) if limits else None


def show(outcome: "Outcome") -> None:
    """Print the closing lines of a run."""
    print("\n".join(outcome.lines))
    if outcome.exit_code:
        print(shortcoming(outcome), file=sys.stderr)


def shortcoming(outcome: "Outcome") -> str:
    """Why a finished run has an exit code other than 0, and where to read what helps."""
    if outcome.exit_code == 4:
        return "too many patterns keep less than validate.min_retention; add one of the lines called advice to the command"
    return "a part of the input could not be read (results.json names it); when it can, add --overwrite to do it again"


def guarded(work: Callable[[], int]) -> int:
    """Do the work; an error of ours ends in its message and exit code, not in a traceback."""
    from stem_dask.errors import StemDaskError

    before = None
    with contextlib.suppress(
        ValueError
    ):  # of a thread that is not the main one, which hears no signals
        # raises KeyboardInterrupt, also before there is anything to stop
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except StemDaskError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # of the client itself: workers' errors come as ours
        print(f"error: {error}", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        exec("")  # see `stoppable`
        print("interrupted; the same command goes on where this one ended", file=sys.stderr)
        return 75
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def each(items: Sequence[T], name: Callable[[T], str], work: Callable[[T], int]) -> int:
    """Do the work for all, each under its name when there are several; returns the highest exit code."""
    highest = 0
    for i, item in enumerate(items, 1):
        if len(items) > 1:
            print(f"[{i}/{len(items)}] {name(item)}", flush=True)
        code = guarded(partial(work, item))
        highest = max(highest, code)
        if code == 75:
            break
    return highest


@contextlib.contextmanager
def progress_shown(
    quiet: bool, stream: TextIO | None = None
) -> Iterator[tuple[Callable[[str], None], "Callable[[Step], None]"]]:
    """Two functions for a run to talk to the user: one line of text, one block done."""
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
        """Print the line that another dataset begins with."""
        self.stage = ""
        self.say(text)

    def complain(self, text: str) -> None:
        """Print an error, also when nothing else is printed."""
        self._erase()
        self.stream.flush()
        print(text, file=sys.stderr, flush=True)

    def step(self, step: "Step") -> None:
        """Show that a block is done."""
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


def program(command: Callable[[], int]) -> NoReturn:
    """Do a command in a process that is there for it, and end the process.

    Without Python's way out: that waits for packages which are still being loaded, for ever if a signal had come while
    this thread held the lock of one.
    """
    from stem_dask.allocation import postpone_collection
    from stem_dask.streams import open_streams

    open_streams()
    postpone_collection()
    code = command()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    program(main)
