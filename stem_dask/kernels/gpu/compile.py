"""Kernels for the GPU, compiled once in a process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stem_dask.kernels.gpu.code import Code, analysis_code, crop_code, stored

#: what to do where a part of CUDA's toolkit cannot be loaded
TOOLKIT = "install the CUDA toolkit, or pip install -c constraints.txt 'cupy-cuda13x[ctk]'; or set device: cpu"

_lock = threading.Lock()

_modules: dict[Code, Any] = {}


def kernel(code: Code, name: str, shared: int = 0) -> Any:
    """A kernel, compiled the first time in this process; raises ValueError when there is no compiler."""
    import cupy

    with _lock:
        module = _modules.get(code)
        if module is None:
            module = _modules[code] = cupy.RawModule(code=code.text, options=code.options())
        try:
            found = module.get_function(name)
        except (ImportError, RuntimeError) as error:
            if hasattr(error, "status"):  # of CUDA itself
                raise
            line = str(error).partition("\n")[0]
            raise ValueError(f"the GPU's kernels cannot be compiled ({line}): {TOOLKIT}") from error
        # every kernel may have 48 KiB without asking; never less than another thread asked for
        if shared > 48 * 1024:
            found.max_dynamic_shared_size_bytes = max(shared, found.max_dynamic_shared_size_bytes)
    return found


@dataclass(frozen=True)
class Kernels:
    """The kernels of a job, to be compiled before they are needed.

    Parameters
    ----------
    dtype, detector : of the patterns
    threshold : values below it do not count
    metric : of the analysis; None without one
    cut : ``factor``, ``method`` and ``reduce`` of what becomes of the patterns on the GPU; None for nothing
    """

    dtype: np.dtype
    detector: tuple[int, int]
    threshold: float
    metric: str | None
    cut: Mapping[str, Any] | None

    def __call__(self) -> None:
        """Compile them in this process."""
        if self.metric is not None:
            width, threshold, metric = self.detector[1], self.threshold, self.metric
            code = analysis_code(stored(self.dtype), width, threshold=threshold, metric=metric)
            for name in ("analyze", "fold"):
                kernel(code, name)
        if self.cut is not None:
            copies = self.cut["method"] in ("gauss", "fft")
            how = {**self.cut, "factor": 1} if copies else self.cut
            kernel(crop_code(self.dtype, threshold=self.threshold, **how), "crop")
