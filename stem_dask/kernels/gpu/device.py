"""The GPU of this process: errors for missing GPUs, drivers and memory."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")

T = TypeVar("T")


def gpu_name() -> str:
    """PCI bus id and machine of the GPU that this process uses."""
    import cupy

    runtime = cupy.cuda.runtime
    return f"{runtime.deviceGetPCIBusId(runtime.getDevice())} of {socket.gethostname()}"


def translate_full_gpu(work: Callable[P, T]) -> Callable[P, T]:
    """Decorator that raises errors for a full GPU as MemoryError, which can be unpickled without cupy."""

    @functools.wraps(work)
    def translated(*args: P.args, **options: P.kwargs) -> T:
        try:
            return work(*args, **options)
        except Exception as error:
            import cupy

            # out of memory, as ``status`` of CUDA's driver and runtime, and ``result`` of cuFFT
            number = getattr(error, "status", getattr(error, "result", None))
            if number != 2 and not isinstance(error, cupy.cuda.memory.OutOfMemoryError):
                raise
            try:
                free, has = cupy.cuda.runtime.memGetInfo()
                left = f"; {free:,} of its {has:,} bytes are free"
            except cupy.cuda.runtime.CUDARuntimeError:  # too full even for this request
                left = ""
            words = (
                f"the memory of the GPU {gpu_name()} is full: {str(error).rstrip('.')}{left}. Another program may use it "
                "(nvidia-smi); device: cpu does without it"
            )
        # outside the except block, because the context would keep the buffers alive
        raise MemoryError(words)

    return translated


INSTALL = "pip install -c constraints.txt '.[gpu]' (or '.[gpu12]' for CUDA 12)"


def missing_gpu() -> str | None:
    """Why this process cannot use a GPU; None if it can."""
    try:
        import cupy
    except ImportError as error:
        return f"cupy cannot be loaded ({error}): {INSTALL}"
    runtime = cupy.cuda.runtime
    try:
        n = runtime.getDeviceCount()
    except Exception as error:  # of the driver, with a type of cupy's own
        why = f"the driver finds none ({error})"
    else:
        return None if n else "the machine has none"
    with contextlib.suppress(Exception):  # CUDA reports a missing and an old driver alike
        has, needs = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        if has == 0:
            return "NVIDIA's driver is not installed (nvidia-smi prints its version)"
        if has // 1000 < needs // 1000:
            old, new = (f"{n // 1000}.{n % 1000 // 10}" for n in (has, needs))
            return (
                f"NVIDIA's driver is for CUDA {old}, and cupy for {new}; install a newer driver, or a cupy "
                f"for CUDA {has // 1000}: {INSTALL}"
            )
    return why


def refuse_missing_gpu() -> None:
    """Raise ValueError in a process that cannot use a GPU."""
    why = missing_gpu()
    if why is not None:
        raise ValueError(f"device is gpu, but no GPU can be used: {why}. Or set device: cpu")
