"""What one run could not read is missing for the next one, too: it is no empty pattern, and no measured zero."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import stem_dask as sd
from stem_dask.config.load import parse_config
from stem_dask.core.errors import SourceError
from stem_dask.job.run import run
from stem_dask.stages.export import export

FORMATS = [("zarr", "scan"), ("hspy", "scan"), ("h5", "scan"), ("pt", "nchw")]
BLOCK = {"chunk_mb": 10 * 40 * 36 * 2 / 2**20}


@pytest.fixture(scope="module")
def made(beam: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that could not read rows 2 and 3 of the scan."""
    folder = tmp_path_factory.mktemp("made")
    store = folder / "input.zarr"
    zarr.create_array(str(store), data=beam, chunks=(2, 5, 40, 36))
    (store / "c/1/0/0/0").write_bytes(b"not what was written")
    config = parse_config(
        {
            "input": {"path": str(store)},
            "crop": {"enabled": False},
            "output": {**BLOCK, "path": str(folder / "one.zarr"), "export": ["hspy", "h5", "pt"], "figure": False},
            "cluster": {"kind": "threads", "threads_per_worker": 2},
            "on_error": "quarantine",
        }
    )  # fmt: skip
    assert run(config).exit_code == 7
    return folder


@pytest.fixture
def partly_read(made: Path, tmp_path: Path) -> Path:
    """The whole patterns of such a run; beside it the other formats."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "one.zarr"


@pytest.fixture
def missing() -> np.ndarray:
    missing = np.zeros((6, 5), bool)
    missing[2:4] = True
    return missing


def converted(path: Path, suffix: str, layout: str) -> Path:
    if layout == "scan":
        return path.with_suffix(f".{suffix}")
    target = path.with_name(f"other.{suffix}")
    export(sd.open(path), target, layout=layout)
    return target


@pytest.mark.parametrize(("suffix", "layout"), FORMATS)
def test_a_crop_of_it(
    partly_read: Path, suffix: str, layout: str, beam: np.ndarray, missing: np.ndarray, make_config: Any,
    beam_file: Path,
) -> None:  # fmt: skip
    """As of a run that reads the damaged file itself; blocks of other sizes than those that were lost."""
    path = converted(partly_read, suffix, layout)
    window = {"align": "fixed", "size": 16}
    config = make_config(path, "two.zarr", crop=window, output={"export": ["pt", "hspy"]})
    outcome = run(config)
    assert outcome.exit_code == 7
    assert outcome.results["quarantined"]["n_patterns"] == 10
    assert outcome.results["quarantined"]["before"] == 10
    assert outcome.results["validation"]["n_empty"] == 0
    assert any("10 patterns that could not be read" in line for line in outcome.lines)
    ours = xr.open_datatree(config.output.path, engine="zarr")
    assert np.array_equal(ours.valid.values, ~missing)
    assert np.isnan(ours.analysis.retention.values[missing]).all()
    assert not ours.patterns.values[missing].any()
    assert np.allclose(ours.analysis.mean_pattern.values, beam[~missing].mean(0), rtol=1e-12)
    assert np.allclose(ours.output.mean_pattern.values, ours.patterns.values[~missing].mean(0))
    logs = np.log1p(ours.patterns.values, dtype=np.float64)
    assert np.allclose(ours.output.log_mean_pattern.values, logs[~missing].mean(0))
    for name in ("log_mean", "log_std"):
        assert np.array_equal(np.isnan(ours.output[name].values), missing)
    assert ours.attrs["quarantined"] == 10
    content = torch.load(Path(config.output.path).with_suffix(".pt"), weights_only=True)
    assert content["analysis"]["valid"].tolist() == (~missing).tolist()
    again = run(config)
    assert again.exit_code == 7
    assert "already complete" in again.lines[0]
    third = sd.open(config.output.path)
    assert np.array_equal(third.valid.values, ~missing)


def test_parts_of_the_scan(partly_read: Path, missing: np.ndarray, make_config: Any) -> None:
    part = sd.open(partly_read, scan_roi=[1, 6, 0, 4], scan_step=2, flip=True)
    assert np.array_equal(part.valid.values, ~missing[1:6:2, 0:4:2])
    listed = sd.open(converted(partly_read, "pt", "nchw"), scan_shape=(6, 5), drop_columns=2)
    assert np.array_equal(listed.valid.values, ~missing[:, :3])
    outside = {"path": str(partly_read), "scan_roi": [0, 2, 0, 5]}
    config = make_config(partly_read, "two.zarr", input=outside, crop={"size": 16})
    assert run(config).exit_code == 0
    assert xr.open_zarr(config.output.path).valid.values.all()


def test_dark_and_gain_do_not_make_them_patterns(
    partly_read: Path, beam: np.ndarray, missing: np.ndarray, make_config: Any, tmp_path: Path
) -> None:
    np.save(tmp_path / "dark.npy", np.full((40, 36), -3.0))
    given = {"path": str(partly_read), "dark": str(tmp_path / "dark.npy")}
    config = make_config(partly_read, "two.zarr", input=given, crop={"enabled": False})
    assert run(config).exit_code == 7
    patterns = xr.open_zarr(config.output.path).patterns.values
    assert not patterns[missing].any()
    np.testing.assert_array_equal(patterns[~missing], beam[~missing].astype("f4") + 3)


def test_they_are_no_part_of_a_normalization(
    partly_read: Path, beam: np.ndarray, missing: np.ndarray, make_config: Any
) -> None:
    options = {"crop": {"enabled": False}, "output": {"normalize": "log-zscore", **BLOCK}}
    config = make_config(partly_read, "two.zarr", **options)
    outcome = run(config)
    logs = np.log1p(beam[~missing].astype("f8"))
    constants = outcome.results["normalization"]
    assert constants["mean"] == pytest.approx(logs.mean(), rel=1e-12)
    assert constants["std"] == pytest.approx(logs.std(), rel=1e-12)
    assert outcome.exit_code == 7


def test_in_python(
    partly_read: Path, beam: np.ndarray, missing: np.ndarray, tmp_path: Path
) -> None:
    patterns = sd.open(partly_read)
    assert np.array_equal(patterns.valid.values, ~missing)
    analysis = sd.analyze(patterns).compute()
    assert int(analysis.n_empty) == 0
    np.testing.assert_allclose(analysis.mean_pattern, beam[~missing].mean(0), rtol=1e-12)
    cropped = sd.crop(patterns, analysis, sd.choose_window(analysis, size=16))
    export(sd.downsample(cropped, 2), tmp_path / "small.h5")
    assert np.array_equal(sd.open(tmp_path / "small.h5").valid.values, ~missing)


@pytest.mark.parametrize("normalize", ["none", "log-zscore"])
def test_nothing_is_left(
    partly_read: Path, make_config: Any, tmp_path: Path, normalize: str
) -> None:
    rows = {"path": str(partly_read), "scan_roi": [2, 4, 0, 5]}
    crop = {"enabled": normalize == "none"}
    config = make_config(partly_read, "two.zarr", input=rows, crop=crop, output={"normalize": normalize})  # fmt: skip
    with pytest.raises(
        SourceError, match=r"one\.zarr: .*(empty|none of the patterns could be read)"
    ):
        run(config)
    assert not (tmp_path / "two.zarr").exists()
