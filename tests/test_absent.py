"""An input that is gone, or on another machine's disk: what reads it says so, and for which machine."""

import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import stem_dask as sd
from stem_dask.core.errors import SourceError
from stem_dask.storage.errors import is_gone, path_of


@pytest.mark.parametrize("suffix", [".zarr", ".zspy", ".hspy", ".h5", ".npy", ".pt"])
def test_a_file_that_went_after_it_was_opened(tmp_path, suffix):
    """With the words of a library a .zarr was called damaged, and a .hspy told the flags it was opened with."""
    path = tmp_path / f"a{suffix}"
    data = np.ones((2, 3, 8, 8), "u2")
    sd.export(xr.DataArray(data, dims=("scan_y", "scan_x", "ky", "kx")), path)
    patterns = sd.open(path)
    options = {"center_method": "centroid", "ignore_bad_pixels": False}  # reads no sample
    analysis = sd.analyze(patterns, **options).compute()
    cropped = sd.crop(patterns, analysis, sd.choose_window(analysis))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    host = socket.gethostname()
    told = f"{re.escape(str(path))} does not exist on {host}: it was .* that machine does not share"
    for lazy in (sd.analyze(patterns, **options), cropped):
        with pytest.raises(SourceError, match=rf"^{told}.*; input and output must be in folders"):
            lazy.compute()
    with pytest.raises(SourceError, match=rf"^block \[0:2, 0:3\]: {told}"):
        sd.export(patterns, tmp_path / "b.zarr")
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_file_here():
    class Url:
        path = "s3://bucket/a.zarr"

    class Seen:
        source = Url()

    assert is_gone("b.npy")
    assert not is_gone(path_of(Seen()))
    Url.path = "a.npy"
    assert path_of(Seen()) == "a.npy"


def test_another_error_stays(tmp_path):
    """The file is there, and too short by now."""
    path = Path(tmp_path / "a.npy")
    np.save(path, np.ones((2, 3, 8, 8), "u2"))
    patterns = sd.open(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(OSError, match=r"a\.npy") as error:
        patterns.compute()
    assert "not there" not in str(error.value)
