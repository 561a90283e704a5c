"""The Python face: what objects show, what `run_config`, `open`, `export`, `plot` and `report` take and return."""

from pathlib import Path

import numpy as np
import pytest

import stem_dask as sd
from stem_dask.writers.synthetic import Synthetic, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scan.dm4 and its crop, crop.zarr."""
    place = tmp_path_factory.mktemp("face")
    write_dataset(str(place / "scan.dm4"), Synthetic(scan_shape=(8, 6)))
    return place


def options(folder: Path, name: str = "crop.zarr", **output: object) -> dict:
    return {
        "input": {"path": str(folder / "scan.dm4")},
        "output": {"path": str(folder / name), "export": [], **output},
    }


@pytest.fixture(scope="module")
def outcome(folder: Path) -> sd.Outcome:
    return sd.run_config(options(folder))


def test_objects_are_short(outcome: sd.Outcome, folder: Path) -> None:
    height, width = outcome.results["window"]["size"]
    text = repr(outcome)
    assert len(text) <= 400
    kept = outcome.results["validation"]["min_retention"]
    for words in (f"window {height} x {width} px", f"min {kept:.4f}", "crop.zarr"):
        assert words in text
    table = outcome._repr_html_()
    assert table.startswith("<table>")
    assert f"{height} x {width} px" in table
    assert f"{kept:.4f}" in table
    window = sd.choose_window(sd.analyze(sd.open(folder / "scan.dm4")).compute())
    assert isinstance(window, sd.Window)
    assert len(repr(window)) <= 160
    assert f"{window.shape[0]} x {window.shape[1]} px" in repr(window)


def test_an_outcome_opens(outcome: sd.Outcome) -> None:
    patterns = outcome.open()
    assert patterns.shape[-2:] == tuple(outcome.results["window"]["size"])
    assert patterns.dims == ("scan_y", "scan_x", "ky", "kx")


def test_a_config_shows_what_is_not_at_its_default(tmp_path: Path) -> None:
    path = tmp_path / "crop.yaml"
    path.write_text("{input: {path: a.dm4}, output: {path: a.zarr}, analyze: {from: b.zarr}}")
    config = sd.load_config(path, ["crop.size=40", "device=auto"])
    assert isinstance(config, sd.Config)
    text = repr(config)
    assert len(text) <= 600
    for words in ("crop.size=40", "analyze.from=", "device=auto", "a.dm4"):
        assert words in text
    assert "coverage" not in text
    long = [
        f"input.path={'x' * 900}.dm4",
        f"analyze.from={'y' * 900}",
        f"input.dark={'z' * 99}.npy",
    ]
    assert len(repr(sd.load_config(path, long))) <= 600


@pytest.mark.parametrize("key", ["target_retention", "target_retenton"])
def test_a_key_without_its_section(tmp_path: Path, key: str) -> None:
    path = tmp_path / "crop.yaml"
    path.write_text("{input: {path: a.dm4}, output: {path: a.zarr}}")
    with pytest.raises(sd.ConfigError, match=r"did you mean analyze\.target_retention\?"):
        sd.load_config(path, [f"{key}=0.9"])


def test_a_connection_is_short() -> None:
    with sd.connect("threads", threads_per_worker=1) as cluster:
        assert isinstance(cluster, sd.Connection)
        assert len(repr(cluster)) <= 160
        assert "1 worker" in repr(cluster)


def test_dir_has_public_names_only() -> None:
    assert dir(sd) == sorted(sd.__all__)


def test_run_config_takes_a_path_and_overrides(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"input: {{path: {folder / 'scan.dm4'}}}\noutput: {{path: a.zarr, export: []}}"
    Path("crop.yaml").write_text(text)
    found = sd.run_config("crop.yaml", ["crop.size=40"])
    assert found.results["window"]["size"] == [40, 40]
    assert (tmp_path / "a.zarr").is_dir()
    assert found.open().shape[-2:] == (40, 40)
    given = {"input": {"path": folder / "scan.dm4"}, "output": {"path": "b.npy"}}
    assert sd.run_config(given).exit_code == 0
    assert (tmp_path / "b.npy").is_file()
    again = sd.run_config(given)
    assert again.lines[0].startswith("already complete")
    assert len(repr(again)) <= 400
    with pytest.raises(sd.ConfigError, match="overrides are for a path or a dictionary"):
        sd.run_config(sd.load_config("crop.yaml"), ["crop.size=40"])
    with pytest.raises(sd.ConfigError, match="the config is a int; expected the path"):
        sd.run_config(3)
    with pytest.raises(sd.ConfigError, match="names 2 inputs"):
        sd.run_config({"input": {"path": ["a", "b"]}, "output": {"path": "{stem}.zarr"}})


def test_export_returns_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = np.arange(2 * 3 * 4 * 4, dtype="u2").reshape(2, 3, 4, 4)
    assert sd.export(data, "a.npy") == str(tmp_path / "a.npy")
    with pytest.warns(UserWarning, match="requires hdf5plugin") as told:
        assert sd.export(data, "a.h5", codec="lz4") == str(tmp_path / "a.h5")
    assert told[0].filename == __file__
