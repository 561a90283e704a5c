"""The folder of an output: made where it is missing, by a run and from Python alike; what cannot be is told by its name."""

import os
import re

import numpy as np
import pytest
import xarray as xr

import stem_dask as sd
from stem_dask.cli import run
from stem_dask.cluster.connect import connect
from stem_dask.core.errors import DiskFullError, StoreError
from stem_dask.core.formats import FORMATS
from stem_dask.stages import export as exports

SUFFIXES = tuple(FORMATS)


@pytest.fixture
def patterns():
    return xr.DataArray(np.ones((2, 3, 8, 8), "u2"), dims=("scan_y", "scan_x", "ky", "kx"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_folder_is_made(tmp_path, patterns, suffix):
    path = tmp_path / "new" / "deep" / f"a{suffix}"
    sd.export(patterns, path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert int(sd.open(path).sum()) == 2 * 3 * 8 * 8


def test_a_run_makes_it_too(tmp_path, beam_file):
    (tmp_path / "a.yaml").write_text(
        f"input: {{path: {beam_file}}}\noutput: {{path: new/deep/a.zarr, export: [], figure: false}}\n"
    )
    words = [str(tmp_path / "a.yaml"), f"output.path={tmp_path}/new/deep/a.zarr", "--quiet"]
    assert run.main([*words, "--cluster", "threads"]) == 0
    assert (tmp_path / "new" / "deep" / "a.zarr").is_dir()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("taken", "the folder {} cannot be made: there is a file of that name; choose another output"),
        ("taken/deep", "the folder {} cannot be made: Not a directory; choose another output"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_made(tmp_path, patterns, suffix, folder, told):
    (tmp_path / "taken").write_text("mine")
    told = re.escape(told.format(tmp_path / folder))
    with pytest.raises(StoreError, match=f"^{told}$"):
        sd.export(patterns, tmp_path / folder / f"a{suffix}")
    with (
        connect("threads", threads_per_worker=1) as connection,
        pytest.raises(StoreError, match=f"^{told}$"),
    ):
        sd.export(patterns, tmp_path / folder / f"a{suffix}", client=connection.client)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_run_into_a_folder_that_cannot_be_made(tmp_path, beam_file, capsys):
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "a.yaml").write_text(
        f"input: {{path: {beam_file}}}\noutput: {{path: taken/a.zarr, export: [], figure: false}}\n"
    )
    words = [str(tmp_path / "a.yaml"), f"output.path={tmp_path}/taken/a.zarr", "--quiet"]
    assert run.main([*words, "--cluster", "threads"]) == 5
    assert capsys.readouterr().err == (
        f"error: the folder {tmp_path}/taken cannot be made: there is a file of that name; choose another output\n"
    )


def test_a_folder_that_takes_nothing(tmp_path, patterns, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(StoreError, match=rf"nothing can be written into the folder {tmp_path}: "):
        sd.export(patterns, tmp_path / "a.zarr")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("number", "kind"), [(13, StoreError), (28, DiskFullError)])
def test_no_internal_file_is_named(tmp_path, patterns, suffix, number, kind, monkeypatch):
    path = tmp_path / f"a{suffix}"

    def refused(*args, **options):
        raise OSError(number, os.strerror(number), f"{path}.incomplete.hole")

    monkeypatch.setattr(exports.engine, "run", refused)
    with pytest.raises(kind, match=f"^{path} cannot be written: {os.strerror(number)}$"):
        sd.export(patterns, path)
    assert list(tmp_path.iterdir()) == []
