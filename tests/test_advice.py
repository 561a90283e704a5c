"""The verdict on a run, and its advice: every line is pasted after the same command, runs, and gives what it says."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from batches import batch

from stem_dask.cli import run
from stem_dask.cli.main import main

CONFIG = """
input: {path: scan.npy}
output: {path: out.zarr, export: [], figure: false}
cluster: {kind: threads, threads_per_worker: 2}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connects: list[int]) -> Path:
    """A working directory with a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(CONFIG)
    return tmp_path


def disc(radius: int = 6, size: int = 48, dtype: str = "u2") -> np.ndarray:
    """A disc of 100 counts on a weak ring, in a scan of 4 x 4, which moves by a pixel."""
    data = np.zeros((4, 4, size, size), dtype)
    y, x = np.ogrid[:size, :size]
    for i in range(4):
        far = np.hypot(y - size // 2 - i % 2, x - size // 2)
        data[i, :, far < size // 2 - 4] = 1
        data[i, :, far < radius] = 100
    return data


def poisson(background: float) -> np.ndarray:
    """The same with noise everywhere."""
    rng = np.random.default_rng(0)
    return disc() + rng.poisson(background, (4, 4, 48, 48)).astype("u2")


def dark_subtracted() -> np.ndarray:
    """A detector whose zero was taken off: its noise is above and below."""
    rng = np.random.default_rng(0)
    return (disc(dtype="f4") + rng.normal(0, 2, (4, 4, 48, 48))).astype("f4")


def hot() -> np.ndarray:
    """Two pixels that count too much."""
    data = disc()
    data[..., 3, 4] = 200
    data[..., 40, 7] = 150
    return data


def outlier(n: int = 1) -> np.ndarray:
    """One pattern in 16, or in 128, with intensity far out."""
    data = np.tile(disc(), (n, 1, 1, 1))
    data[2, 2] = 0
    data[2, 2, ::47, ::47] = 50
    return data


def at_edge() -> np.ndarray:
    """A disc at the first rows."""
    return disc(10)[..., 20:, :]


def results(name: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"{name}_results.json").read_text())
    return found


#: data, overrides, exit code, how the verdict begins, how the pieces of advice begin
SITUATIONS = {
    "a size that keeps too little": (
        disc, ["crop.size=8"], 4, "16 of 16 patterns keep less",
        ["crop.size=auto ", "crop.size=28 ", "validate.min_retention=0."],
    ),
    "a box that keeps too little": (
        disc, ["crop.window=[4,24,4,24]"], 4, "16 of 16 patterns keep less",
        ["crop.window=null ", "crop.window=null crop.size=28 ", "validate.min_retention=0."],
    ),
    "too little, with room for outliers": (
        outlier, ["crop.size=12", "crop.coverage=0.9", "downsample.factor=2", "crop.align=pattern"], 4, "",
        ["crop.size=auto ", "crop.size=", "validate.min_retention=0."],
    ),
    "nothing gained": (
        disc, ["analyze.target_retention=0.999"], 0, "NOT CROPPED: the window is the whole detector, 48 x 48 px",
        ["analyze.target_retention=0.95 ", "analyze.target_retention=0.9 validate.min_retention=0.9 "],
    ),
    "nothing gained for an outlier": (
        lambda: outlier(8), ["crop.coverage=1"], 0, "NOT CROPPED: the window is the whole detector, 48 x 48 px", ["crop.coverage=0.99 "],
    ),
    "nothing gained, and nothing helps": (outlier, ["crop.coverage=1"], 0, "NOT CROPPED: the window is the whole detector, 48 x 48 px", []),
    "too little at an edge": (
        at_edge, ["crop.size=12"], 4, "16 of 16 patterns keep less",
        ["crop.size=auto ", "'crop.size=[16,22]' ", "validate.min_retention=0."],
    ),
    "a square that has no room": (
        lambda: at_edge()[..., 10:27], ["crop.size=10", "crop.square=true"], 4, "16 of 16 patterns keep less",
        ["validate.min_retention=0."],
    ),
    "little gained by a size": (disc, ["crop.size=46"], 0, "little was gained", ["crop.size=auto ", "crop.size=28 "]),
    "a pedestal of counts": (
        lambda: poisson(3), [], 0, "NOT CROPPED: the window is the whole detector, 48 x 48 px", ["analyze.threshold="],
    ),
    "negative values": (
        dark_subtracted, [], 0, "NOT CROPPED: the window is the whole detector, 48 x 48 px", ["analyze.target_retention=0.9 ", "analyze.threshold="],
    ),
    "hot pixels": (hot, ["crop.size=40"], 0, "", ["input.mask=auto "]),
    "hot pixels beside a mask": (
        hot, ["crop.size=40", "input.mask={pixels: [[1, 1]], rows: [9]}"], 0, "", ["'input.mask={"],
    ),
    "hot pixels of a conversion": (
        hot, ["crop.enabled=false", "analyze.ahead=true"], 0, "", ["'input.mask={"],
    ),
    "nothing": (disc, ["analyze.target_retention=0.9", "validate.min_retention=0.9"], 0, "", []),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_every_piece_of_advice_is_true(here: Path, capsys: Any, name: str) -> None:
    make, overrides, code, verdict, wanted = SITUATIONS[name]
    np.save("scan.npy", make())
    command = ["job.yaml", *overrides]
    assert run.main(command) == code
    first, printed = results(), capsys.readouterr().out
    assert "".join(first["verdict"]).startswith(verdict)
    assert ("verdict     ok\n" in printed) == (not first["verdict"])
    shown = re.findall(r"^advice      (.*): (stem-dask run job.yaml .*)$", printed, re.MULTILINE)
    assert shown == [(gives, line) for line, gives in first["commands"].items()]
    lines = list(first["advice"])
    assert [gives for gives, _ in shown] == list(first["advice"].values())
    for gives, line in shown:  # as it stands, into an output of its own
        words = shlex.split(line)
        path = next(word for word in words if word.startswith("output.path="))
        name = path.removeprefix("output.path=").removesuffix(".zarr")
        assert not Path(f"{name}.zarr").exists()
        assert main(words[1:]) == 0, line
        if size := re.match(r"gives (\d+) x (\d+) px", gives):
            assert results(name)["window"]["size"] == [int(n) for n in size.groups()]
    for line, gives in first["advice"].items():
        assert run.main([*command, *shlex.split(line)]) == 0, line
        second = results()
        if size := re.match(r"gives (\d+) x (\d+) px", gives):
            assert second["window"]["size"] == [int(n) for n in size.groups()]
        if "threshold" in line:
            assert "background" not in " ".join(second["warnings"])
            assert second["window"]["size"] < first["window"]["size"]
        if "mask" in line:
            assert "2 suspected hot pixels" in gives
            assert second["hot_pixels"]["masked"] or not second["hot_pixels"]["number"]
            stored = xr.open_zarr("out.zarr", group="analysis")["mask"].values
            assert stored[3, 4]
            assert stored[40, 7]
        assert line not in second["advice"]
    assert len(lines) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(lines, wanted, strict=True)), lines


def test_no_line_says_ok_when_too_little_is_kept(here: Path, capsys: Any) -> None:
    """Nor when the same command looks at the finished output again: its exit code and its advice stay."""
    np.save("scan.npy", disc())
    command = ["job.yaml", "crop.size=8", "output.figure=true"]
    assert run.main(command) == 4
    first = capsys.readouterr()
    assert "ok" not in first.out.split()
    assert "too many patterns keep less than validate.min_retention" in first.err
    assert run.main(command) == 4
    second = capsys.readouterr()
    judged = ("verdict", "advice", "   ")
    assert [line for line in second.out.splitlines() if line.startswith(judged)] == [
        line for line in first.out.splitlines() if line.startswith(judged)
    ]
    assert second.err == first.err
    Path("out_results.json").write_text("{}")  # edited by a user
    assert run.main(command) == 0


def test_an_analysis_that_was_named_is_left_out_where_it_would_not_fit(here: Path) -> None:
    np.save("scan.npy", hot())
    assert run.main(["job.yaml", "output.path=first.zarr"]) == 0
    command = ["job.yaml", "crop.size=40", "analyze.from=first.zarr"]
    assert run.main(command) == 0
    (line,) = results()["advice"]
    assert line == "input.mask=auto analyze.from=null output.overwrite=true"
    assert run.main([*command, *shlex.split(line)]) == 0
    assert results()["advice"] == {}


def test_advice_of_one_input_among_several(batch_folder: Path, capsys: Any) -> None:
    assert batch("crop.size=14") == 0
    assert batch("crop.size=10", "--overwrite") == 4
    said = capsys.readouterr()
    assert " ok" not in said.out
    assert said.out.count("verdict     12 of 12 patterns keep less than") == 1
    lines = re.findall(r"^advice      .*: (stem-dask run batch.yaml .*)$", said.out, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:  # of that input alone, into an output of its own
        words = shlex.split(line)
        assert main(words[1:]) == 0
        [place] = [word for word in words if word.startswith("input.path=")]
        [made] = [word for word in words if word.startswith("output.path=")]
        name = Path(place.partition("=")[2]).stem
        assert Path(made.partition("=")[2]).name.startswith(f"{name}_")
    assert xr.open_zarr("out/a.zarr").patterns.shape[-2:] == (10, 10)
