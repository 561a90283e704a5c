"""Every benchmark also runs as a test, on next to no data."""

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data, kernels, memory, resume, turned


def test_data_stream_into_a_scan(tmp_path: Path) -> None:
    from stem_dask import open as open_patterns

    path = data.write_scan(tmp_path / "scan.dm4", 6, scan_x=3, detector=32, electrons=500)
    patterns = open_patterns(path)
    assert patterns.shape == (6, 3, 32, 32)
    assert np.array_equal(patterns[0].values, patterns[4].values)
    assert data.scan_rows(2_147_483_648) == 128


def test_kernels_are_measured() -> None:
    found = kernels.main(["--patterns", "8", "--detector", "32", "--repeat", "1"])
    assert min(found.values()) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_measured() -> None:
    (row,) = memory.main(["--sizes", "0.02", "--kind", "threads"])
    assert row["bytes"] == 16_777_216
    assert row["peak_bytes"] > 50_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="bytes are read from /proc")
def test_turning_is_measured() -> None:
    """Every pass reads its file once; the rest is what Python itself reads."""
    options = ["--size", "0.02", "--detector", "64", "--slab", "1", "--block", "1", "--direct", "2"]
    found = turned.main(options)
    assert list(found) == ["turn", "turned", "scan first", "direct"]
    for name in ("turn", "turned", "scan first"):
        assert 1 <= found[name]["calls"] <= 1.2
        assert found[name]["rate"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process group")
def test_the_way_back_is_measured() -> None:
    found = resume.main(["--finished", "20"])
    assert found["finished"] >= 20
    assert 0 < found["after_cluster"] < found["seconds"]
