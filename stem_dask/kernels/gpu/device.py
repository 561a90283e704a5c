"""What is said when the memory of a GPU is full."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

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


INSTALL = "pip install -c constraints.txt '.[gpu]' (or '.[gpu12]' for CUDA 12)"


def missing_gpu() -> str | None:
    """Why this process has no GPU to work on; None when it has one."""
    try:
        import cupy
    except ImportError as error:
        return f"cupy cannot be loaded ({error}): {INSTALL}"
    runtime = cupy.cuda.runtime
    try:
        n = runtime.getDeviceCount()
    except Exception as error:  # of the driver, with a type of cupy's own
        return _without_driver(runtime) or f"the driver finds none ({error})"
    return None if n else "the machine has none"


def _without_driver(runtime: Any) -> str | None:
    """What is wrong with the driver; CUDA calls it too old for its runtime when there is none, too."""
    try:
        has, needs = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    except Exception:
        return None
    if has == 0:
        return "NVIDIA's driver is not there (nvidia-smi would tell its version)"
    if has // 1000 < needs // 1000:
        return (
            f"NVIDIA's driver is for CUDA {_version(has)}, and cupy for {_version(needs)}; install a newer driver, or a cupy "
            f"for CUDA {has // 1000}: {INSTALL}"
        )
    return None


def _version(number: int) -> str:
    """As people write it.

    Examples
    --------
    >>> _version(12040)
    '12.4'
    """
    return f"{number // 1000}.{number % 1000 // 10}"


def refuse_missing_gpu() -> None:
    """Refuse work for a GPU in a process without one.

    Raises
    ------
    ValueError
    """
    why = missing_gpu()
    if why is not None:
        raise ValueError(f"device is gpu, but no GPU can be used: {why}. Or set device: cpu")
