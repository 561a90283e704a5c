"""Every kernel compiles for every architecture, without a GPU. CUDA 13 begins with sm_75: it refuses sm_70 (V100)."""

import ctypes
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from stem_dask.kernels.gpu.code import analysis_code, crop_code

#: what cupy adds to the options of every program
CUPYS = ("-ftz=true", "--device-as-default-execution-space")


@cache
def _library():
    for folder in sys.path:
        found = sorted(Path(folder or ".").glob("nvidia/*/lib/libnvrtc.so.1*"))
        if found:
            for part in found[-1].parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(part))  # which older ones look for in the system's folders only
            return ctypes.CDLL(str(found[-1]))
    return None


def compiled(code, arch):
    """Machine code for an architecture (empty when it fails), and messages of NVRTC, which needs no driver, GPU or cupy."""
    library = _library()
    if library is None:
        pytest.skip(
            "no NVRTC to compile the kernels with: pip install -c constraints.txt '.[gpu-compile]'"
        )
    options = [o.encode() for o in code.options(*CUPYS, f"--gpu-architecture={arch}")]
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program), code.text.encode(), b"kernels.cu", 0, None, None
    )
    failed = library.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*options)
    )
    said = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
    found = b"" if failed else _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return found, said.rstrip(b"\0").decode()


def _text(size_of, content_of, program):
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(1, size.value))
    content_of(program, buffer)
    return buffer.raw[: size.value]


#: each with another type of the analysis and of the crop, so that all of them meet a compiler
ARCHITECTURES = [
    ("sm_75", "u1", "square", "f2", {"factor": 1, "method": "bin", "reduce": "mean"}),
    ("sm_80", "u2", "square", "u2", {"factor": 2, "method": "bin", "reduce": "mean"}),
    ("sm_86", "i4", "circle", "i2", {"factor": 16, "method": "bin", "reduce": "sum"}),
    ("sm_89", "f2", "square", "u8", {"factor": 3, "method": "bin", "reduce": "mean"}),
    ("sm_90", "f4", "circle", "f8", {"factor": 2, "method": "stride", "reduce": "mean"}),
    ("sm_100", "f8", "square", "?", {"factor": 4, "method": "bin", "reduce": "sum"}),
]


@pytest.mark.parametrize(
    ("arch", "analyzed", "metric", "cut", "how"), ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES]
)
def test_every_kernel_compiles(arch, analyzed, metric, cut, how):
    for code in (
        analysis_code(np.dtype(analyzed), 256, threshold=0, metric=metric),
        crop_code(np.dtype(cut), threshold=1, **how),
    ):
        machine_code, said = compiled(code, arch)
        assert said == ""
        assert machine_code.startswith(b"\x7fELF")


def test_an_error_in_the_source_is_seen():
    code = crop_code(np.dtype("u2"), threshold=0, factor=1, method="bin", reduce="mean")
    machine_code, said = compiled(code._replace(text=code.text + "nonsense"), "sm_90")
    assert machine_code == b""
    assert "nonsense" in said
