"""The process of a command: signals, wall times, exit codes, and streams that cannot make it fail."""

import contextlib
import errno
import gc
import io
import json
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


@contextlib.contextmanager
def stoppable(time_limit: float | None) -> Iterator[Sequence[int]]:
    """Stop a run on SIGTERM and before a wall time, like Ctrl-C; finished blocks stay, and the same command resumes.

    Yields a list that is empty until the run is interrupted; later errors may be consequences.
    """
    from stem_dask.core.errors import InterruptedRunError

    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if is_unheard(frame):  # repeat it a little later
            again = threading.Timer(0.05, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        signal.signal(number, signal.SIG_IGN)  # stopping takes a few seconds
        asked.append(number)
        raise KeyboardInterrupt  # not an Exception, so that no handler catches it

    limits = [] if time_limit is None else [time_limit]
    slurm_end = os.environ.get("SLURM_JOB_END_TIME", "")
    if slurm_end.isdigit():
        limits.append(float(slurm_end) - time.time() - 60.0)  # SLURM kills the job then
    left = max(0.0, min(limits, default=0.0))
    timer = threading.Timer(left, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.daemon = True
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if limits:
            timer.start()
        yield asked
    except BaseException as error:
        if asked:  # an interrupted import may raise any error
            # after a signal inside an exec (dataclasses, during imports) Python exits with the code of SIGINT, unless
            # another exec succeeds
            exec("")
            raise InterruptedRunError(
                "asked to stop; the same command goes on where this one ended"
            ) from error
        raise
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


_WEAK = (f"{os.sep}weakref.py", f"{os.sep}_weakrefset.py")


#: functions of Python's import system that hold its lock for a moment; not those that wait for another thread's import
_IMPORTING = {("<frozen importlib._bootstrap>", name) for name in ("_get_module_lock", "cb")}


def is_unheard(frame: FrameType | None) -> bool:
    """Whether Python drops exceptions here: in finalizers, and in callbacks of weak references and the garbage collector.

    An exception in a few functions of the import system would leave its lock acquired, for which other threads wait forever.
    """
    if frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) in _IMPORTING:
        return True
    collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code in collecting or code.co_filename.endswith(_WEAK):
            return True
        frame = frame.f_back
    return False


def guarded(work: Callable[[], int], *, as_json: bool = False) -> int:
    """Call ``work``; an error of this package is printed without a traceback, perhaps also as JSON, and returns its exit code."""
    from stem_dask.core.errors import StemDaskError

    before = None
    with contextlib.suppress(ValueError):  # only the main thread receives signals
        # raises KeyboardInterrupt, even before `stoppable`
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except (StemDaskError, OSError) as error:  # OSError: of the client; workers raise StemDaskError
        code = error.exit_code if isinstance(error, StemDaskError) else 5
        print(f"error: {error}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": str(error), "exit_code": code}))
        return code
    except KeyboardInterrupt:
        exec("")  # see `stoppable`
        print("interrupted; the same command goes on where this one ended", file=sys.stderr)
        return 75
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def each(items: Sequence[T], name: Callable[[T], str], work: Callable[[T], int]) -> int:
    """Call ``work`` for all items, with a heading if there are several; returns the highest exit code."""
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
    from stem_dask.core.machine import postpone_collection

    open_streams()
    postpone_collection()
    code = command()
    # a library whose import was interrupted has not registered its own end, and may crash the end of Python (h5py does)
    if code == 75:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class Unfailing(io.TextIOWrapper):
    """Standard output or error that drops text instead of raising when a pipe is closed or a disk is full.

    ``lost`` is the error that lost text, if any.
    """

    lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write text, or lose it."""
        try:
            return super().write(text)
        except OSError as error:
            self.lost = error
            return len(text)

    def flush(self) -> None:
        """Write what is buffered, or lose it."""
        try:
            super().flush()
        except OSError as error:
            self.lost = error


def refuse_lost_output() -> None:
    """Raise StoreError if printed results were lost, unless their reader closed the pipe."""
    sys.stdout.flush()
    from stem_dask.core.errors import StoreError

    error = getattr(sys.stdout, "lost", None)
    if error is not None and error.errno != errno.EPIPE:
        raise StoreError(f"cannot write to standard output: {error.strerror}; print it elsewhere")


def open_streams() -> None:
    """Replace the standard streams; a closed one becomes /dev/null, so that no file of a run gets its descriptor."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        if stream is None:
            unfailing = Unfailing(io.FileIO(number, "w"), encoding="utf-8")
        else:
            unfailing = Unfailing(
                stream.buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering
            )
        setattr(sys, name, unfailing)
