"""The command line as it is typed: positional files, misspelt words, versions."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from stem_dask.cli.main import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    scan = np.zeros((3, 4, 24, 20), "u2")
    scan[..., 9:15, 8:13] = 50
    np.save("scan.npy", scan)
    return tmp_path


def failing(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", [["-m", "stem_dask"], ["-m", "stem_dask.cli.main"]])
def test_version(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "stem-dask 0.1.0\n"


def test_misspelt_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean analyze?" in failing(capsys, "anlyze", "scan.npy")
    assert "stem-dask info scan.npy" in failing(capsys, "scan.npy")


def test_unknown_flag_shows_the_usage_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", "a.npy", "b.hspy", "--chunks", "4"])
    assert ended.value.code == 2
    assert "usage: stem-dask convert" in capsys.readouterr().err


def test_run_takes_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "scan.npy", "output.export=[]", "output.figure=false"]) == 0
    with xr.open_zarr("scan.zarr") as store:
        assert store.patterns.dims == ("scan_y", "scan_x", "ky", "kx")


def test_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "scan.npy", "--dry-run"]) == 0
    assert "nothing was computed" in capsys.readouterr().out
    assert [path.name for path in here.iterdir()] == ["scan.npy"]


def test_positional_output(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crop", "scan.npy", "out.zarr", "--size", "12", "--no-visualization", "-q"]) == 0
    with xr.open_zarr("out.zarr") as store:
        assert store.patterns.shape == (3, 4, 12, 12)
    np.save("other.npy", np.load("scan.npy"))
    assert main(["convert", "scan.npy", "other.npy", "{stem}.h5", "-q"]) == 0
    assert Path("scan.h5").exists()
    assert Path("other.h5").exists()


def test_the_form_with_input_keeps_its_defaults(here: Path) -> None:
    """The earlier script aligned every pattern on its centroid."""
    words = ["--no-visualization", "-q"]
    assert main(["crop", "--input", "scan.npy", "--output", "old.zarr", *words]) == 0
    assert main(["crop", "scan.npy", "new.zarr", *words]) == 0
    aligned = [
        xr.open_zarr(f"{name}.zarr", group="analysis").attrs["align"] for name in ("old", "new")
    ]
    assert aligned == ["pattern", "fixed"]


@pytest.mark.parametrize("words", [["scan.npy"], ["--input", "scan.npy"], []])
def test_missing_files(here: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert "missing; as in: stem-dask convert scan.dm4 out.zarr" in failing(
        capsys, "convert", *words
    )


def test_info_shows_the_mean_pattern_and_what_comes_next(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "scan.npy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "values      0 to 50, 1,500 a pattern (median of 12)" in lines
    picture = lines[lines.index("mean        of 12 patterns, 24 x 20 px, logarithmic") + 1 :][:16]
    lit = [i for i, line in enumerate(picture) if "@" in line]
    assert lit == [6, 7, 8, 9]  # rows 9 to 14 of 24, of 1.5 rows a line
    assert lines[-1] == "next        stem-dask analyze scan.npy"


def test_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "scan.npy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shape"] == [3, 4, 24, 20]
    assert found["dtype"] == "uint16"
    assert [axis["name"] for axis in found["axes"]] == ["scan_y", "scan_x", "ky", "kx"]
    assert main(["check", "scan.npy", "--json", "crop.size=12", "output.export=[]"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["window"] == [12, 12]
    assert planned["shape"] == [3, 4, 12, 12]
    assert str(here / "scan.zarr") in planned["outputs"]
    assert not planned["complete"]
    assert planned["sbatch"].startswith("sbatch --cpus-per-task=1 --mem=2G --time=00:10:00 --wrap ")
    words = ["run", "scan.npy", "output.export=[]", "output.figure=false", "--json"]
    for _ in range(2):  # also when it is complete
        assert main(words) == 0
        out = json.loads(capsys.readouterr().out)
        with xr.open_zarr("scan.zarr") as store:
            assert out["window"] == list(store.patterns.shape[-2:])
        assert out["retention"] == {"mean": 1.0, "min": 1.0}
        assert out["exit_code"] == 0
        assert str(here / "scan.zarr") in out["files"]
    assert main(["run", "missing.npy", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["exit_code"] == 3


def test_view_writes_a_missing_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "scan.npy", "output.export=[]", "-q"]) == 0
    page = here / "scan_report.html"
    text = page.read_text()
    page.unlink()
    assert main(["view", "scan.zarr", "--no-browser"]) == 0
    assert capsys.readouterr().out == f"file        {page}\n"
    assert "shown-window" in text
    assert "shown-window" in page.read_text()


def test_again_repeats_the_result(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "scan.npy", "output.export=[]", "output.figure=false"]
    assert main(words) == 0
    first = capsys.readouterr().out.splitlines()
    assert main(words) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[0].startswith("already complete")
    for name in ("window", "retention", "file"):
        assert [x for x in first if x.startswith(name)] == [x for x in again if x.startswith(name)]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_the_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "demo info analyze" in capsys.readouterr().out


def test_bash_completes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", "bash"]) == 0
    folder = Path(sys.executable).parent
    script = (
        f"{capsys.readouterr().out}\n"
        'COMP_WORDS=(stem-dask an); COMP_CWORD=1; _stem_dask; echo "${COMPREPLY[@]}"\n'
        'COMP_WORDS=(stem-dask crop --siz); COMP_CWORD=2; _stem_dask; echo "${COMPREPLY[@]}"\n'
    )
    env = {"PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == ["analyze", "--size"]


def test_help_is_grouped_by_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for task, name in (("look at a file:", "analyze"), ("make:", "crop"), ("train:", "train")):
        group = text[text.index(task) :].partition("\n\n")[0]
        assert f"\n  {name} " in group
        assert "\n      stem-dask " in group
