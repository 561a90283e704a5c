"""Whether this process has a GPU to work on, and what to do when it has none."""

from __future__ import annotations

from typing import Any

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
