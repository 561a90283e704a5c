"""stem-dask analyze: the analysis alone, which later crops of the same file reuse."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import stem_dask as sd
from stem_dask.cli.main import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    y, x = np.indices((40, 36))
    scan = np.empty((6, 5, 40, 36), "u2")
    for i in np.ndindex(6, 5):
        beam = 400 * np.exp(-((y - 18 - i[0] / 3) ** 2 + (x - 17 + i[1] / 4) ** 2) / 18)
        scan[i] = rng.poisson(beam)
    np.save("scan.npy", scan)
    return tmp_path


def digest(folder: Path) -> str:
    parts = [
        path.relative_to(folder).as_posix().encode() + path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "c" in path.parts
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


CROP = ("run", "crop.yaml")


def write_config(here: Path, output: str, more: str = "") -> None:
    text = (
        f"input: {{path: scan.npy}}\noutput: {{path: {output}, export: [], figure: false}}\n{more}"
    )
    (here / "crop.yaml").write_text(text)


def test_a_crop_reuses_the_analysis(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(here, "without.zarr")
    assert "analyze     " in run(capsys, *CROP)
    found = run(capsys, "analyze", "scan.npy")
    assert {"scan_analysis.zarr", "scan_report.html"} <= {path.name for path in here.iterdir()}
    assert "window      " in found
    assert "retention   mean" in found
    assert f"file        {here / 'scan_analysis.zarr'}" in found
    assert f"file        {here / 'scan_report.html'}" in found
    assert found.splitlines()[-1].startswith("next        stem-dask crop scan.npy ")
    write_config(here, "with.zarr")
    out = run(capsys, *CROP)
    assert "analysis    reused from scan_analysis.zarr" in out
    assert "analyze  " not in out
    assert digest(here / "with.zarr") == digest(here / "without.zarr")
    with xr.open_zarr(here / "with.zarr") as one, xr.open_zarr(here / "without.zarr") as other:
        np.testing.assert_array_equal(one.patterns, other.patterns)


def test_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "analyze", "scan.npy")
    assert "already complete" in run(capsys, "analyze", "scan.npy")


def test_a_changed_file_is_analyzed_anew(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "analyze", "scan.npy")
    np.save("scan.npy", np.load("scan.npy")[:, ::-1] + np.uint16(1))
    write_config(here, "out.zarr")
    out = run(capsys, *CROP)
    assert "analysis    not reused from scan_analysis.zarr: it was made from another file" in out
    assert "analyze     " in out


def test_another_threshold_is_analyzed_anew(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "analyze", "scan.npy")
    write_config(here, "out.zarr", "analyze: {threshold: 2}\n")
    out = run(capsys, *CROP)
    assert "not reused from scan_analysis.zarr: analyze.threshold was 0.0, and is 2.0" in out


@pytest.mark.parametrize("align", ["fixed", "pattern", "descan"])
def test_the_crop_keeps_what_the_analysis_promises(
    here: Path, capsys: pytest.CaptureFixture[str], align: str
) -> None:
    """The profile about each pattern's own center is a lower bound for any window, and exact where the window has that center."""
    size = "16"
    options = [f"crop.align={align}", f"crop.size={size}", "validate.min_retention=0.5"]
    run(capsys, "analyze", "scan.npy", *options)
    write_config(here, "out.zarr")
    run(capsys, *CROP, *options)
    with (
        xr.open_zarr(here / "scan_analysis.zarr", group="analysis") as promised,
        xr.open_zarr(here / "out.zarr", group="analysis") as kept,
    ):
        least, actual = promised.retention.values, kept.retention.values
        assert (least <= actual + 1e-6).all()
        assert least.min() > 0.5
        if align == "pattern":
            np.testing.assert_allclose(least, actual, atol=1e-6)


def test_demo(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It shows a gain: about a tenth of the pixels, no warning."""
    (here / "scan.npy").unlink()
    out = run(capsys, "demo")
    assert [path.name for path in here.iterdir()] == ["stem-dask-demo"]
    with xr.open_zarr("stem-dask-demo/cropped.zarr") as store:
        share = store.sizes["ky"] * store.sizes["kx"] / 192**2
    assert 0.08 < share < 0.13
    assert "verdict     ok" in out
    assert "warning" not in out
    assert out.splitlines()[-1].startswith("next        stem-dask ")
    assert "already complete" in run(capsys, "demo")


def test_a_pattern_without_a_disc(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its profile is about the place where the disc was expected; the whole detector keeps all of it."""
    rng = np.random.default_rng(0)
    y, x = np.indices((64, 64))
    disc = 200.0 * ((y - 32) ** 2 + (x - 31) ** 2 <= 64) / 200
    scan = rng.poisson(disc, (12, 12, 64, 64)).astype("u2")
    scan[3, 4] = rng.poisson(0.05, (64, 64))
    np.save("scan.npy", scan)
    run(capsys, "analyze", "scan.npy", "crop.size=64")
    with xr.open_zarr("scan_analysis.zarr", group="analysis") as known:
        assert np.isnan(known.center_y.values[3, 4])
        assert known.retention.values.min() == 1.0
    assert "nan px" not in Path("scan_report.html").read_text()


def test_more_exports_of_a_finished_store(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the missing file is written, from the store, which stays as it is."""
    write_config(here, "out.zarr")
    run(capsys, *CROP)
    before = {path: path.stat().st_mtime_ns for path in (here / "out.zarr").rglob("*")}
    (here / "out.npy.incomplete").write_bytes(b"of an export that was killed")
    out = run(capsys, *CROP, "output.export=[h5,npy]")
    assert "export h5" in out
    assert re.search(r"^export npy +\d.* stage 2 of 2 ", out, re.MULTILINE)
    assert not [line for line in out.splitlines() if line.startswith(("analyze ", "crop "))]
    assert f"file        {here / 'out.h5'}" in out
    assert {path: path.stat().st_mtime_ns for path in (here / "out.zarr").rglob("*")} == before
    with xr.open_zarr("out.zarr") as store:
        np.testing.assert_array_equal(np.load("out.npy"), store.patterns)
    assert "export h5" not in run(capsys, *CROP, "output.export=[h5,npy]")


def test_tasks_are_named_after_their_stage(here: Path) -> None:
    """On the dashboard they are analyze, crop, export-npy."""
    write_config(here, "out.zarr")
    config = sd.load_config("crop.yaml", ["output.export=[npy]"])
    with sd.connect("threads") as cluster:
        sd.run_config(config, connection=cluster)
        names = cluster.client.run_on_scheduler(
            lambda dask_scheduler: set(dask_scheduler.task_prefixes)
        )
    assert {"analyze", "crop", "export-npy"} <= names
