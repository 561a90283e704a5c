"""Kernels where no compiled code can be cached: a read-only installation without a home."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stem_dask

PACKAGE = Path(stem_dask.__file__).parents[1]


@pytest.mark.parametrize("cache", ["", "cache"])
def test_kernels_work_without_a_cache(cache, tmp_path):
    code = (
        "import numpy as np; from stem_dask.kernels.intensity import CACHE, add_patterns\n"
        "total = np.zeros((2, 3)); add_patterns(np.ones((4, 2, 3), 'u2'), total, np.zeros(3, 'u2'))\n"
        "print(CACHE, total.sum())"
    )
    # numba looks in the folder of NUMBA_CACHE_DIR only, as where nothing else can be written
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    environment["NUMBA_CACHE_DIR"] = str(tmp_path / cache) if cache else ""
    line = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=PACKAGE)
    assert done.stdout.split() == [str(bool(cache)), "24.0"], done.stderr
    assert bool(list(tmp_path.rglob("*.nbi"))) == bool(cache)


def test_the_case_of_an_image_that_cannot_be_written(shared_data, tmp_path):
    case = shared_data / "cases" / "h1_read_only_image"
    if not case.is_dir() or os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root, unshare, and the shared case h1_read_only_image")
    if subprocess.run(
        ["unshare", "-m", "mount", "--bind", "/tmp", "/tmp"], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine does not let root mount in a namespace")
    shutil.copy(case / "a.npy", tmp_path / "a.npy")
    command = (
        f"mount --bind {PACKAGE} {PACKAGE} && mount -o remount,ro,bind {PACKAGE} && "
        f"{sys.executable} -m stem_dask.cli.main convert --input a.npy --output out.zarr"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
    }
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**environment, "HOME": "/proc/nohome", "PYTHONPATH": str(PACKAGE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "set NUMBA_CACHE_DIR to a folder that only you can write" in done.stdout
    import xarray as xr

    np.testing.assert_array_equal(
        xr.open_zarr(tmp_path / "out.zarr").patterns, np.load(case / "a.npy")
    )
