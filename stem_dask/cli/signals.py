"""python -m stem_dask.run CONFIG [key=value ...]: the whole job of a config file."""

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
from typing import NoReturn, TypeVar

T = TypeVar("T")

#: SLURM kills at its end time; the way out takes a few seconds
BEFORE_WALL_TIME = 60.0

#: a signal that came where nobody would hear of it comes again after so many seconds
AGAIN_SECONDS = 0.05

#: where Python calls back for weak references
_CALLBACKS = (f"{os.sep}weakref.py", f"{os.sep}_weakrefset.py")


@contextlib.contextmanager
def stoppable(time_limit: float | None) -> Iterator[Sequence[int]]:
    """SIGTERM and a coming wall time stop a run like Ctrl-C: what is finished stays, and the same command goes on.

    Yields what is empty until the run was asked to stop: an error may then be one that came of it.
    """
    from stem_dask.core.errors import InterruptedRunError

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


def guarded(work: Callable[[], int]) -> int:
    """Do the work; an error of ours ends in its message and exit code, not in a traceback."""
    from stem_dask.core.errors import StemDaskError

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


def program(command: Callable[[], int]) -> NoReturn:
    """Do a command in this process, and end the process with its exit code."""
    from stem_dask.cli.streams import open_streams
    from stem_dask.core.machine import postpone_collection

    open_streams()
    postpone_collection()
    sys.exit(command())
