"""CUDA kernels compiled by g++ with a header that plays the GPU; see cuda_shim.h."""

import atexit
import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest

SHIM = Path(__file__).with_name("cuda_shim.h")
OPTIONS = ("-O0", "-std=c++17", "-fPIC", "-w", "-ffp-contract=off")
#: the header plays one GPU, and one launch at a time
_one = threading.Lock()


def needs_compiler():
    """Skip where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels' source for the CPU")


@cache
def _folder():
    folder = Path(tempfile.mkdtemp(prefix="stem_dask-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # read once, and not for each kernel
    header = ["-x", "c++-header", str(SHIM), "-o", str(folder / "cuda_shim.h.gch")]
    subprocess.run(["g++", *OPTIONS, *header], check=True)
    return folder


@cache
def compiled(text, defines):
    """The kernels of a program as functions ``launch_NAME``."""
    needs_compiler()
    name = hashlib.sha256(repr((text, defines)).encode()).hexdigest()[:16]
    source, library = _folder() / f"{name}.cpp", _folder() / f"{name}.so"
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\(.*?\)\s+)?(\w+)\(", text)
    macros = "".join(f"#define {define.replace('=', ' ', 1)}\n" for define in defines)
    exports = "".join(f"KERNEL({kernel})\n" for kernel in kernels)
    source.write_text(f'#include "cuda_shim.h"\n{macros}{text}\n{exports}')
    include = ["-I", str(_folder()), "-I", str(SHIM.parent)]
    subprocess.run(
        ["g++", *OPTIONS, *include, "-shared", "-o", str(library), str(source)], check=True
    )
    return ctypes.CDLL(str(library))


#: whether threads and blocks run in the opposite order, in which a missing barrier shows
backwards = False


def launch(library, name, grid, block, values):
    """Run a kernel; arrays are passed as pointers, numpy scalars as they are."""
    kept = [
        np.array([v.ctypes.data], np.uint64) if isinstance(v, np.ndarray) else np.array([v])
        for v in values
    ]
    pointers = (ctypes.c_void_p * len(kept))(*(k.ctypes.data for k in kept))
    with _one:
        getattr(library, f"launch_{name}")(pointers, ctypes.c_uint(grid), block, int(backwards))
