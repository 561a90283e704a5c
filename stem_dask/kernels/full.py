"""What is said when the memory of a GPU is full."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

#: how CUDA's driver (``status``), its runtime, and cuFFT (``result``) alike say that they got no memory
_FULL = 2


def gpu_name() -> str:
    """The GPU that this process works on, by its place and machine."""
    import cupy

    runtime = cupy.cuda.runtime
    return f"{runtime.deviceGetPCIBusId(runtime.getDevice())} of {socket.gethostname()}"


def told_when_full(work: Callable[P, T]) -> Callable[P, T]:
    """Have work on a GPU say which one is full, by how much, and what to do; cupy's errors need cupy to be understood.

    Raises
    ------
    MemoryError
        Where cupy raises one of its own.
    """

    @functools.wraps(work)
    def told(*args: P.args, **options: P.kwargs) -> T:
        try:
            return work(*args, **options)
        except Exception as error:
            words = _words(error)
            if words is None:
                raise
        # not within the except: its error would go along, and keep the buffers of whoever met it
        raise MemoryError(words)

    return told


def _words(error: Exception) -> str | None:
    """What to say of an error; None when it is another one."""
    import cupy

    number = getattr(error, "status", getattr(error, "result", None))
    if number != _FULL and not isinstance(error, cupy.cuda.memory.OutOfMemoryError):
        return None
    try:
        free, has = cupy.cuda.runtime.memGetInfo()
        left = f"; {free:,} of its {has:,} bytes are free"
    except cupy.cuda.runtime.CUDARuntimeError:  # not even for what a process needs to ask
        left = ""
    return (
        f"the memory of the GPU {gpu_name()} is full: {str(error).rstrip('.')}{left}. Another program may use it "
        "(nvidia-smi); device: cpu does without it"
    )
