"""The kernels' CUDA source gives what the CPU's kernels give: run on the CPU, by a header that plays the GPU.

Marked gpu: the same on a real one, by NVIDIA's compiler.
"""

import sys
from typing import Any

import emulated
import fake_cupy
import numpy as np
import pytest

from stem_dask.kernels.analysis import PatternAnalysis, analyze_patterns
from stem_dask.kernels.crop import crop_patterns, window_intensity
from stem_dask.kernels.downsample import downsample_patterns
from stem_dask.kernels.gpu import analysis as analysis_on_gpu
from stem_dask.kernels.gpu import crop as crop_on_gpu
from stem_dask.kernels.gpu.buffers import Slot
from stem_dask.kernels.gpu.code import analysis_code
from stem_dask.kernels.gpu.device import missing_gpu

REAL = missing_gpu()
SQUARE: dict[str, Any] = {"target_retention": 0.9, "threshold": 0, "center": None, "metric": "square"}  # fmt: skip


@pytest.fixture(params=["emulated", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request, monkeypatch):
    """A GPU, or what plays it; few threads, so that warps take several turns."""
    if request.param == "real":
        if REAL is not None:
            pytest.skip(f"no GPU: {REAL}")
    else:
        fake_cupy.install(monkeypatch)
        monkeypatch.setattr("stem_dask.kernels.gpu.analysis.ANALYSIS_THREADS", 64)
        monkeypatch.setattr("stem_dask.kernels.gpu.crop.CROP_THREADS", 64)
    return request.param


def made(dtype, shape):
    """Counts, with an empty pattern, the whole range of the type in a corner, and what else must not count."""
    block = np.random.default_rng(len(dtype) + shape[1]).poisson(2, shape).astype(dtype)
    block[1] = 0
    if block.dtype.kind == "u" and block.dtype.itemsize < 4:
        block[2, -1, -1] = np.iinfo(block.dtype).max
    if block.dtype.kind in "if":
        block[0, :3, :3] = -2
    if block.dtype.kind == "f":
        block[0, 4, 1:4] = np.nan, np.inf, -np.inf
        block[2] *= 0.3
    if dtype == "<f2":
        block[3] *= 3e-6  # smaller than normal halves, all of them
    return block


def analyzed(block, piece, slot, **options):
    """On the GPU, in pieces and slots of so many patterns."""
    size = int(block[0].nbytes) * slot
    analysis = analysis_on_gpu.Analysis(
        len(block), block.shape[1:], block.dtype, slot_bytes=size, **options
    )
    for start in range(0, len(block), piece):
        analysis.add(block[start : start + piece])
    return analysis.result()


def agree(found, expected, exact, what):
    """The same bytes of whole numbers; the last digits of sums of floats may differ."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, what
    if exact:
        assert found.tobytes() == expected.tobytes(), what
    else:
        tolerance = 1e-12 if found.dtype == np.float64 else 1.2e-7
        least = 1e-15 * np.max(np.abs(expected), initial=0, where=np.isfinite(expected))
        np.testing.assert_allclose(found, expected, tolerance, least, err_msg=what)


ANALYSES = [
    ("u1", (5, 16, 64), "square", 0, None),
    ("<u2", (6, 9, 256), "square", 0, None),
    (">u2", (4, 20, 256), "square", 2.5, (3.5, 250.0)),
    ("<i8", (3, 21, 12), "square", 0, None),
    ("<f2", (4, 8, 130), "square", 0, None),
    ("<f8", (3, 17, 64), "square", 0.7, None),
    ("<u4", (3, 24, 7), "circle", 0, (23.0, 0.0)),
    (">i2", (4, 13, 64), "circle", 0, None),
    ("<f4", (4, 13, 128), "circle", 0, None),
    ("?", (3, 1, 9), "circle", 0, None),
]


@pytest.mark.parametrize(("dtype", "shape", "metric", "threshold", "center"), ANALYSES)
def test_the_analysis_equals_the_cpus(dtype, shape, metric, threshold, center, gpu, monkeypatch):
    block = made(dtype, shape) if dtype != "?" else np.eye(3, 9, dtype=bool)[:, None]
    options = {"threshold": threshold, "center": center, "metric": metric}
    monkeypatch.setattr("stem_dask.kernels.gpu.analysis.BATCH", 2)
    for target in (0.5, 1.0):
        expected = analyze_patterns(block, target_retention=target, **options)
        found = analyzed(block, piece=2, slot=3, target_retention=target, **options)
        for name in PatternAnalysis._fields:
            exact = block.dtype.kind != "f" or name in ("max_pattern", "odd")
            agree(getattr(found, name), getattr(expected, name), exact, name)
    if gpu == "emulated":
        monkeypatch.setattr(emulated, "backwards", True)
        again = analyzed(block, piece=2, slot=3, target_retention=target, **options)
        for name in PatternAnalysis._fields:
            agree(getattr(again, name), getattr(found, name), True, f"{name} backwards")


def test_a_missing_barrier_shows(gpu, monkeypatch):
    """What the emulation is worth: without its barriers, or with another sum, the kernel gives something else."""
    if gpu == "real":
        pytest.skip("of the emulation")
    block = made("u1", (3, 16, 64))
    expected = analyze_patterns(block, **SQUARE)
    code = analysis_code(np.dtype("u1"), 64, threshold=0, metric="square")
    scratch = "        __syncthreads();\n        for (int k = threadIdx.x"
    for old, new in ((scratch, scratch.split("\n")[1]), ("ry + r - 1 < height", "ry + r < height")):
        assert old in code.text
        broken = code._replace(text=code.text.replace(old, new))
        monkeypatch.setattr(
            "stem_dask.kernels.gpu.analysis.analysis_code", lambda *a, code=broken, **k: code
        )
        found = analyzed(block, piece=3, slot=3, **SQUARE)
        assert found.profile.tobytes() != expected.profile.tobytes()


def test_a_missing_wait_shows(gpu, monkeypatch):
    """Likewise without waiting for what was found, and when new patterns are laid over those that are still to be sent."""
    if gpu == "real":
        pytest.skip("of the emulation")
    block = made("u1", (6, 16, 64))
    expected = analyze_patterns(block, **SQUARE)
    finish, start = Slot.finish, Slot.start

    def too_early(slot):
        with monkeypatch.context() as patched:
            patched.setattr(slot.stream, "synchronize", lambda: None)
            return finish(slot)

    def laid_over(slot):
        start(slot)
        slot.host[:] = 1

    for name, broken in (("finish", too_early), ("start", laid_over)):
        with monkeypatch.context() as patched:
            patched.setattr(Slot, name, broken)
            found = analyzed(block, piece=2, slot=2, **SQUARE)
        assert found.total.tobytes() != expected.total.tobytes()
    assert analyzed(block, piece=2, slot=2, **SQUARE).total.tobytes() == expected.total.tobytes()


CUTS = [
    ("<u2", {"factor": 1, "method": "bin"}),
    (">u2", {"factor": 2, "method": "bin"}),
    ("<i2", {"factor": 3, "method": "bin", "reduce": "sum"}),
    ("<u8", {"factor": 2, "method": "bin"}),
    ("<f4", {"factor": 3, "method": "bin"}),
    ("<f2", {"factor": 2, "method": "stride"}),
    ("?", {"factor": 2, "method": "bin", "reduce": "sum"}),
    ("u1", {"factor": 2, "method": "gauss"}),
    ("<f8", {"factor": 2, "method": "fft"}),
]


@pytest.mark.parametrize(("dtype", "how"), CUTS, ids=[f"{d} {h['method']}" for d, h in CUTS])
def test_windows_equal_the_cpus(dtype, how, gpu):
    block = (
        made(dtype, (5, 14, 17)) if dtype != "?" else np.eye(14, 17, dtype=bool)[None].repeat(5, 0)
    )
    if how["method"] in ("gauss", "fft"):
        block = np.nan_to_num(block, posinf=3, neginf=-3)
    y, x = np.array([0, -3, 9, 2, -20]), np.array([3, 12, -4, 0, 2])  # the last one sees nothing
    cut = crop_patterns(block, y, x, (10, 11))
    expected = downsample_patterns(cut, **how)
    size = int(block[0].nbytes) * 2
    found, inside = crop_on_gpu.cut_patterns(
        block, y, x, (10, 11), threshold=1, slot_bytes=size, **how
    )
    assert found.dtype == expected.dtype
    if how["method"] in ("gauss", "fft"):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert found.tobytes() == expected.tobytes()
    exact = block.dtype.kind != "f"
    agree(inside, window_intensity(cut, threshold=1), exact, "inside")
    whole = crop_on_gpu.window_intensity(block, threshold=0)
    agree(whole, window_intensity(block, threshold=0), exact, "whole")


def test_memory_is_what_was_projected(gpu):
    """Of blocks that become smaller, as at the end of a scan."""
    if gpu == "real":
        pytest.skip("jobs on a real one are compared with what was projected")
    detector, how = (12, 10), {"factor": 2, "method": "fft", "reduce": "mean"}
    need = crop_on_gpu.ring_bytes(9, detector, np.dtype("u2"), (8, 6), **how)
    for n in (9, 8, 5, 2, 1, 9):
        block, origin = np.ones((n, *detector), "u2"), np.zeros(n, int)
        crop_on_gpu.cut_patterns(block, origin, origin, (8, 6), threshold=0, **how)
    pinned, pool = sys.modules["cupyx"].pinned, sys.modules["cupy"].get_default_memory_pool()
    assert 4096 + 512 * 2 <= pinned.held <= need.in_host
    assert 9 * 240 + 9 * 4 * 12 <= pool.most <= need.on_gpu


def test_what_leaves_64_bits_is_refused(gpu):
    block = np.zeros((3, 4, 4), "u8")
    block[2] = 2**62
    with pytest.raises(OverflowError, match="pattern 2 of the block has values up to"):
        analyzed(block, piece=3, slot=2, **SQUARE)
