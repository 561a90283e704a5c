"""The CUDA source of the kernels for a type of pixels, and its compilation, once in a process.

The source is text with ``-D`` options, which any compiler for CUDA takes; the files in ``cuda/`` document the order of sums.
"""

import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stem_dask.kernels.downsample import result_dtype
from stem_dask.kernels.intensity import needs_cleaning

_FOLDER = Path(__file__).parent / "cuda"

_TYPES = {
    "u1": "unsigned char", "u2": "unsigned short", "u4": "unsigned int", "u8": "unsigned long long",
    "i1": "signed char", "i2": "short", "i4": "int", "i8": "long long", "f4": "float", "f8": "double",
}  # fmt: skip

#: threads of a warp, and of a block: for the analysis of a pattern, and for cutting a window
WARP = 32

ANALYSIS_THREADS, CROP_THREADS = 512, 256

#: patterns that are in cache together: each is looked at three times
BATCH = 128


class Code(NamedTuple):
    """A CUDA program."""

    text: str
    defines: tuple[str, ...]

    def options(self, *more: str) -> tuple[str, ...]:
        """For NVRTC; products and sums of floats stay apart, as on the CPU."""
        return (*(f"-D{define}" for define in self.defines), "--fmad=false", "--std=c++17", *more)


@cache
def _text(name: str) -> str:
    return "\n".join((_FOLDER / file).read_text() for file in ("pixels.cuh", name))


def stored(dtype: np.dtype) -> np.dtype:
    """The type of the pixels on the GPU: native byte order, bool as uint8."""
    dtype = np.dtype(dtype)
    return np.dtype(np.uint8) if dtype == np.bool_ else dtype.newbyteorder("=")


def compared(dtype: np.dtype) -> np.dtype:
    """The type in which pixels are compared: float32 for float16, else their own; that of the maximum pattern."""
    dtype = stored(dtype)
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def wide(dtype: np.dtype) -> np.dtype:
    """The type of sums over patterns."""
    return np.dtype(np.float64 if dtype.kind == "f" else np.uint64)


def load_pixels(dtype: np.dtype, width: int) -> int:
    """Pixels that come in one load: so that rows consist of whole loads, and a warp finds some for all its lanes."""
    for n in (8, 4, 2):
        if n * dtype.itemsize <= 16 and width % n == 0 and width >= WARP * n:
            return n
    return 1


def _line(dtype: np.dtype) -> str:
    """Sums over a row or column, and over a batch: 32 bits suffice for pixels of up to 16."""
    if dtype.kind == "f":
        return "double"
    return _TYPES["u4" if dtype.itemsize <= 2 else "u8"]


def _defines(dtype: np.dtype, load: int, threshold: float, **more: object) -> tuple[str, ...]:
    half = dtype == np.float16
    defines: dict[str, object] = {
        "PIXEL": _TYPES["u2" if half else dtype.str[1:]],
        "VALUE": _TYPES[compared(dtype).str[1:]],
        "HALF": int(half),
        "IS_FLOAT": int(dtype.kind == "f"),
        "SUM": _TYPES[wide(dtype).str[1:]],
        "LINE": _line(dtype),
        "DIRTY": int(needs_cleaning(dtype, threshold)),
        "VEC": load,
    }
    return tuple(f"{name}={value}" for name, value in (defines | more).items())


def analysis_code(dtype: np.dtype, width: int, *, threshold: float, metric: str) -> Code:
    """Kernels ``analyze`` and ``fold`` for patterns of a `stored` type, with so many pixels along kx."""
    load, circle = load_pixels(dtype, width), int(metric == "circle")
    defines = _defines(dtype, load, threshold, CIRCLE=circle, THREADS=ANALYSIS_THREADS)
    return Code(_text("analysis.cu"), defines)


def analysis_shared_bytes(
    dtype: np.dtype, detector: tuple[int, int], radii: int, threads: int
) -> int:
    """Shared memory of a block of the kernel ``analyze``."""
    height, width = detector
    warps = threads // WARP
    line = 4 if _line(dtype) == _TYPES["u4"] else 8
    scratch = warps * WARP * load_pixels(dtype, width) * line
    return 8 * (16 + 4 * warps + height + width) + max(2 * 8 * radii, scratch)


def crop_code(dtype: np.dtype, *, threshold: float, factor: int, method: str, reduce: str) -> Code:
    """Kernel ``crop`` that also bins, or takes every k-th pixel; a factor of 1 leaves the pixels as they are.

    Values below the threshold do not count for the intensity inside; the method is bin or stride.
    """
    copies = factor == 1 or method == "stride"
    way = 0 if copies else 1 if reduce == "mean" else 2
    out, dtype = result_dtype(dtype, factor, method, reduce), stored(dtype)
    if dtype.kind == "f" or (way == 1 and dtype.itemsize == 8):
        work = "double"  # sums of 64-bit integers could wrap
    else:
        work = _TYPES["i8" if dtype.kind == "i" else "u8"]
    name = "PIXEL" if copies else _TYPES[stored(out).str[1:]]
    sizes = {"FACTOR": factor, "WAY": way, "WORK": work, "THREADS": CROP_THREADS}
    return Code(_text("crop.cu"), _defines(dtype, 1, threshold, OUT=name, **sizes))


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


def compile_kernels(
    dtype: np.dtype, width: int, threshold: float, metric: str | None, cut: Mapping[str, Any] | None
) -> None:
    """Compile the kernels of a job in this process, before they are needed.

    ``metric`` is that of the analysis, None without one; ``cut`` are ``factor``, ``method`` and ``reduce``, None without a crop.
    """
    if metric is not None:
        code = analysis_code(stored(dtype), width, threshold=threshold, metric=metric)
        for name in ("analyze", "fold"):
            kernel(code, name)
    if cut is not None:
        how = {**cut, "factor": 1} if cut["method"] in ("gauss", "fft") else cut
        kernel(crop_code(dtype, threshold=threshold, **how), "crop")
