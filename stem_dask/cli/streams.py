"""Standard output and error that cannot make a command fail."""

import errno
import io
import os
import sys

from stem_dask.core.errors import StoreError


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
    """Raise if printed results were lost, unless their reader closed the pipe.

    Raises
    ------
    StoreError
    """
    sys.stdout.flush()
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
