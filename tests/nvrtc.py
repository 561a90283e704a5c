"""NVIDIA's run-time compiler through ctypes: it needs no driver, no GPU and no cupy."""

import ctypes
import sys
from functools import cache
from pathlib import Path

import pytest

from stem_dask.kernels.gpu.code import Code

#: what cupy adds to the options of every program
CUPYS = ("-ftz=true", "--device-as-default-execution-space")


@cache
def _library() -> ctypes.CDLL | None:
    for folder in sys.path:
        found = sorted(Path(folder or ".").glob("nvidia/*/lib/libnvrtc.so.1*"))
        if found:
            for part in found[-1].parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(part))  # which older ones look for in the system's folders only
            return ctypes.CDLL(str(found[-1]))
    return None


def compiled(code: Code, arch: str) -> tuple[bytes, str]:
    """The machine code for an architecture such as ``sm_90`` (empty when it fails), and what the compiler said."""
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


def _text(size_of, content_of, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(1, size.value))
    content_of(program, buffer)
    return buffer.raw[: size.value]
