"""Every kernel compiles for every architecture, without a GPU. CUDA 13 begins with sm_75: it refuses sm_70 (V100)."""

import numpy as np
import pytest
from nvrtc import compiled

from stem_dask.kernels.gpu.code import analysis_code, crop_code

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
def test_every_kernel_compiles(arch: str, analyzed: str, metric: str, cut: str, how: dict) -> None:
    for code in (
        analysis_code(np.dtype(analyzed), 256, threshold=0, metric=metric),
        crop_code(np.dtype(cut), threshold=1, **how),
    ):
        machine_code, said = compiled(code, arch)
        assert said == ""
        assert machine_code.startswith(b"\x7fELF")


def test_an_error_in_the_source_is_seen() -> None:
    code = crop_code(np.dtype("u2"), threshold=0, factor=1, method="bin", reduce="mean")
    machine_code, said = compiled(code._replace(text=code.text + "nonsense"), "sm_90")
    assert machine_code == b""
    assert "nonsense" in said
