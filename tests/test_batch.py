"""Several inputs in one command: what goes on, what is told, one common window, and going on after a stop."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from stem_dask import cli, run
from stem_dask.batch import run_all
from stem_dask.config import load_configs
from stem_dask.errors import InterruptedRunError
from stem_dask.io.publish import run_folder
from stem_dask.lock import locked
from stem_dask.plan import axis_window, common_size

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
#: half the width of the beam in each of three files, which sets the window
BEAMS = {"a": 3, "b": 6, "c": 4}


@pytest.fixture(scope="module")
def connection() -> Iterator[Any]:
    from stem_dask.cluster import connect

    with connect("threads", threads_per_worker=2) as connection:
        yield connection


@pytest.fixture
def connects(connection: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One cluster for all tests; the bytes that each call to connect was told."""
    told: list[int] = []

    @contextlib.contextmanager
    def connect(**options: Any) -> Iterator[Any]:
        told.append(options["input_bytes"])
        yield connection

    monkeypatch.setattr("stem_dask.cluster.connect", connect)
    return told


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connects: list[int]) -> Path:
    """A working directory with three small scans and a config for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    for name, half in BEAMS.items():
        write_beam(name, half)
    (tmp_path / "batch.yaml").write_text(
        "input:\n  path: raw/*.npy\ncrop:\n  margin_pixels: 1\noutput:\n  path: out/{stem}.zarr\n  export: []\n"
        "  figure: false\n  chunk_mb: 0.01\n"
    )
    return tmp_path


def write_beam(name: str, half: int, detector: tuple[int, int] = (40, 36)) -> None:
    data = np.zeros((4, 3, *detector), np.uint16)
    for y in range(4):
        data[y, :, 19 - half : 19 + half, 17 - half : 17 + half] = 5 + y
    np.save(f"raw/{name}.npy", data)


def batch(*overrides: str) -> int:
    return run.main(["batch.yaml", *overrides])


def size_of(name: str) -> tuple[int, ...]:
    return xr.open_zarr(f"out/{name}.zarr").patterns.shape[-2:]


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the table, by input."""
    lines = text[text.index("input ") :].splitlines()[1:-1]
    return {line.split()[0]: line.split() for line in lines}


def content(folder: str) -> dict[str, bytes]:
    """What every file of the patterns holds."""
    files = Path(folder, "patterns").rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


def stopped(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> Callable[[], None]:
    """SIGTERM at the n-th call of a function; returns what takes it back."""
    module, _, attribute = name.rpartition(".")
    plain, calls = getattr(__import__(module, fromlist=["_"]), attribute), []

    def function(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **options)

    monkeypatch.setattr(name, function)
    return lambda: monkeypatch.setattr(name, plain)


# ---- one after another


def test_a_broken_file_stops_no_other(here: Path, connects: list[int], capsys: Any) -> None:
    Path("raw/b.npy").write_bytes(Path("raw/b.npy").read_bytes()[:500])
    assert batch() == 3
    said = capsys.readouterr()
    assert connects == [4 * 3 * 40 * 36 * 2]  # once, with the largest input
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "a.run", "a.zarr", "a_results.json", "c.run", "c.zarr", "c_results.json",
    ]  # fmt: skip
    assert [line for line in said.out.splitlines() if line.startswith("[")] == [
        "[1/3] raw/a.npy",
        "[2/3] raw/b.npy",
        "[3/3] raw/c.npy",
    ]
    assert said.err.count("error: ") == 1
    assert f"error: {here}/raw/b.npy: " in said.err
    table = rows(said.out)
    assert table["raw/a.npy"] == [
        "raw/a.npy",
        "out/a.zarr",
        "10",
        "x",
        "10",
        "px",
        "1.0000",
        "1.0000",
        "0",
    ]
    assert table["raw/b.npy"][:3] == ["raw/b.npy", "out/b.zarr", "3"]
    assert said.out.splitlines()[-1] == "2 of 3 complete"
    assert {size_of("a"), size_of("c")} == {(10, 10), (12, 12)}


def test_the_table_is_aligned_and_says_why(here: Path, capsys: Any) -> None:
    write_beam("long_name", 3)
    assert batch("crop.size=8") == 4
    said = capsys.readouterr()
    lines = said.out[said.out.index("input ") :].splitlines()
    columns = {line.index("8 x 8 px") for line in lines[1:-1]}
    assert columns == {lines[0].index("window")}
    assert (
        rows(said.out)["raw/b.npy"][-6:]
        == ["4", "12", "patterns", "below", "min_retention", "0.95"][-6:]
    )
    assert rows(said.out)["raw/a.npy"][-1] == "0"
    assert "raw/b.npy: too many patterns keep less than min_retention" in said.err
    results = json.loads(Path("out/b_results.json").read_text())
    assert f"{results['validation']['mean_retention']:.4f}" in rows(said.out)["raw/b.npy"]


def test_the_same_command_again_has_nothing_to_do(
    here: Path, connects: list[int], capsys: Any
) -> None:
    assert batch() == 0
    first = rows(capsys.readouterr().out)
    assert batch() == 0
    said = capsys.readouterr().out
    assert connects == [34560]
    assert said.count("already complete: ") == 3
    assert rows(said) == first
    assert all(row[-1] == "0" for row in first.values())


def test_quiet_prints_errors_only(here: Path, capsys: Any) -> None:
    Path("raw/b.npy").write_bytes(b"no numbers")
    assert batch("--quiet") == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


def test_a_fault_of_ours_is_traced_and_stops_no_other(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stem_dask import pipeline

    plain = pipeline.choose

    def choose(job: Any, *args: Any) -> Any:
        return 1 / 0 if "/b." in job.outputs.path else plain(job, *args)

    monkeypatch.setattr("stem_dask.pipeline.choose", choose)
    assert batch() == 1
    said = capsys.readouterr()
    assert "ZeroDivisionError" in said.err
    assert rows(said.out)["raw/b.npy"][2:] == ["1", "division", "by", "zero"]
    assert sorted(path.stem for path in Path("out").glob("*.zarr")) == ["a", "c"]


def test_an_output_in_use_is_an_error_of_its_own(here: Path, capsys: Any) -> None:
    with locked(Path(run_folder("out/b.zarr")) / "lock"):
        assert batch() == 6
    said = capsys.readouterr()
    assert "b.run is in use by a run on" in said.err
    assert [row[-1] for row in rows(said.out).values() if "0" in row] == ["0", "0"]
    assert batch("--quiet") == 0


def test_convert_needs_no_window_columns(here: Path, capsys: Any) -> None:
    assert batch("crop.enabled=false") == 0
    out = capsys.readouterr().out
    assert out[out.index("input ") :].splitlines()[:2] == [
        "input      output      exit",
        "raw/a.npy  out/a.zarr  0",
    ]
    assert "done        out/a.zarr: not cropped, " in out


# ---- stopped


def test_a_stop_ends_the_batch_and_the_same_command_goes_on(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = stopped(monkeypatch, "stem_dask.passes.writing.complete_analysis", 2)
    assert batch() == 75
    said = capsys.readouterr()
    assert "the same command goes on" in said.err
    assert [row[-1] for row in rows(said.out).values()] == ["0", "on", "on"]
    assert rows(said.out)["raw/c.npy"][2] == "75"
    back()
    assert batch() == 0
    said = capsys.readouterr()
    assert "already complete: " in said.out
    assert said.out.count("resuming    ") == 1
    assert said.out.splitlines()[-1] == "3 of 3 complete"


def test_an_error_that_came_of_the_stop_ends_the_batch(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import that is stopped ends in errors of many kinds; the next dataset must not begin."""
    from stem_dask import pipeline

    def choose(*args: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal came late")
        except KeyboardInterrupt:
            raise ImportError("half an import") from None

    monkeypatch.setattr(pipeline, "choose", choose)
    assert batch() == 75
    assert not list(Path("out").glob("*.zarr"))


def test_the_time_limit_is_of_the_whole_batch(here: Path) -> None:
    configs = load_configs("batch.yaml")
    with pytest.raises(InterruptedRunError):
        run_all(configs, quiet=True, time_limit=0.0)


def test_overwriting_goes_on_too(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that starts the same command again must come to an end: what was replaced is not replaced again."""
    assert batch("--quiet") == 0
    before = {name: os.stat(f"out/{name}.zarr/zarr.json").st_mtime_ns for name in BEAMS}
    back = stopped(monkeypatch, "stem_dask.passes.writing.complete_analysis", 2)
    assert batch("--quiet", "--overwrite") == 75
    back()
    middle = {name: os.stat(f"out/{name}.zarr/zarr.json").st_mtime_ns for name in BEAMS}
    assert [middle[name] != before[name] for name in BEAMS] == [True, False, False]
    capsys.readouterr()
    assert batch("--overwrite") == 0
    assert capsys.readouterr().out.count("already complete: ") == 1
    after = {name: os.stat(f"out/{name}.zarr/zarr.json").st_mtime_ns for name in BEAMS}
    assert [after[name] != middle[name] for name in BEAMS] == [False, True, True]
    assert batch("--quiet", "--overwrite") == 0  # and a finished batch is made again
    assert os.stat("out/a.zarr/zarr.json").st_mtime_ns != after["a"]


# ---- one common window


def test_the_common_window_is_the_largest(here: Path, connects: list[int], capsys: Any) -> None:
    assert batch("crop.size=common") == 0
    said = capsys.readouterr()
    assert connects == [34560]
    assert said.err == ""
    assert {size_of(name) for name in BEAMS} == {(16, 16)}
    assert "common      16 x 16 px, which holds the windows of 3" in said.out
    assert [line for line in said.out.splitlines() if line.startswith("window ")] == [
        "window      10 x 10 px of 40 x 36",
        "window      16 x 16 px of 40 x 36",
        "window      12 x 12 px of 40 x 36",
    ]
    assert said.out.count("analyze ") == 3
    shutil.move("out", "common")
    assert batch("--quiet", "crop.size=[16, 16]") == 0
    for name in BEAMS:
        assert content(f"out/{name}.zarr") == content(f"common/{name}.zarr") != {}
    assert (
        batch("--quiet", "crop.size=common", "output.path=auto/{stem}.zarr", "input.path=raw/a.npy")
        == 0
    )
    assert xr.open_zarr("auto/a.zarr").patterns.shape[-2:] == (10, 10)  # one alone: its own


@pytest.mark.parametrize(
    "where", ["stem_dask.plan.common_size", "stem_dask.passes.writing.complete_analysis"]
)
def test_a_stop_between_and_in_the_sweeps(
    here: Path, where: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = stopped(monkeypatch, where, 1)
    assert batch("crop.size=common") == 75
    back()
    capsys.readouterr()
    assert batch("crop.size=common") == 0
    said = capsys.readouterr().out
    assert said.count("resuming    ") == 3  # no analysis is done again
    assert {size_of(name) for name in BEAMS} == {(16, 16)}


def test_an_unfinished_crop_is_not_mixed_with_another_size(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = stopped(monkeypatch, "stem_dask.passes.writing.complete_analysis", 1)
    assert batch("crop.size=common") == 75
    back()
    write_beam("d", 8)
    assert batch("crop.size=common") == 2
    said = capsys.readouterr()
    assert "unfinished run that crops to 16 x 16 px" in said.err
    assert "makes it 20 x 20 px now" in said.err
    assert {size_of(name) for name in "bcd"} == {(20, 20)}
    assert run.main(["batch.yaml", "crop.size=common", "input.path=raw/a.npy"]) == 2  # nor alone
    assert "makes it its own now" in capsys.readouterr().err
    assert batch("crop.size=common", "--restart", "--quiet") == 0
    assert size_of("a") == (20, 20)


def test_a_dataset_that_comes_later(here: Path, connects: list[int], capsys: Any) -> None:
    """One that fits in changes nothing; a larger one is told, and --overwrite makes all alike."""
    assert batch("crop.size=common", "--quiet") == 0
    write_beam("d", 5)
    assert batch("crop.size=common", "--quiet") == 0
    assert size_of("d") == (16, 16)
    write_beam("e", 8)
    capsys.readouterr()
    assert batch("crop.size=common") == 2
    said = capsys.readouterr()
    assert said.err.count("was cropped to 16 x 16 px with other inputs") == 4
    assert "the common size is 20 x 20 px now; add --overwrite" in said.err
    assert [row[-1] for row in rows(said.out).values()][-1] == "0"
    assert size_of("e") == (20, 20)
    assert batch("crop.size=common", "--overwrite", "--quiet") == 0
    assert {size_of(name) for name in "abcde"} == {(20, 20)}


def test_overwriting_is_not_kept_from_it_by_an_unfinished_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of the former size are replaced also when the command goes on."""
    assert batch("crop.size=common", "--quiet", "input.path=[raw/a.npy, raw/c.npy]") == 0
    assert (size_of("a"), size_of("c")) == ((12, 12), (12, 12))
    back = stopped(monkeypatch, "stem_dask.passes.writing.complete_analysis", 1)
    assert batch("crop.size=common", "--quiet") == 75
    back()
    assert batch("crop.size=common", "--quiet", "--overwrite") == 0
    assert {size_of(name) for name in BEAMS} == {(16, 16)}


def test_what_cannot_have_the_common_size_says_so(here: Path, capsys: Any) -> None:
    """A detector that is too small; the others go on."""
    data = np.zeros((2, 2, 14, 36), np.uint16)
    data[:, :, 5:9, 16:20] = 3
    np.save("raw/small.npy", data)
    assert batch("crop.size=common") == 2
    said = capsys.readouterr()
    assert "the common size is 16 x 16 px, and this dataset can only have 14 x 16 px" in said.err
    assert "its detector has 14 x 36 px" in said.err
    assert {size_of(name) for name in BEAMS} == {(16, 16)}
    assert not Path("out/small.zarr").exists()


def test_a_broken_file_is_left_out_of_the_common_size(here: Path, capsys: Any) -> None:
    Path("raw/b.npy").write_bytes(b"no numbers")
    assert batch("crop.size=common") == 3
    assert {size_of("a"), size_of("c")} == {(12, 12)}
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1
    assert "which holds the windows of 2" in said.out


@pytest.mark.parametrize(
    ("wanted", "detectors", "multiple", "size", "who"),
    [
        ([40, 44], [128, 128], 2, 44, [True, True]),
        ([9, 9], [9, 9], 2, 9, [True, True]),  # whole on both
        ([127, 90], [127, 256], 2, 128, [False, True]),  # the odd one is left out, not the others
        ([14, 16], [14, 40], 2, 16, [False, True]),
        ([14, 13], [40, 13], 2, 14, [True, False]),
        ([12, 28], [30, 40], 4, 28, [True, True]),
        ([40, 38], [40, 40], 2, 40, [True, True]),  # reached by one, and whole on both
    ],
)  # fmt: skip
def test_common_size_of_an_axis(
    wanted: list[int], detectors: list[int], multiple: int, size: int, who: list[bool]
) -> None:
    assert common_size(wanted, detectors, multiple) == size
    assert [axis_window(size, n, multiple)[0] == size for n in detectors] == who


# ---- the shipped config, check and info


def test_the_shipped_config_runs(here: Path) -> None:
    from stem_dask.synthetic import Synthetic, write_dataset

    for seed, name in enumerate(("one", "two")):
        write_dataset(f"raw/{name}.dm4", Synthetic(scan_shape=(4, 3), seed=seed))
    assert run.main([str(CONFIGS / "batch.yaml"), "--quiet", "output.figure=false"]) == 0
    assert sorted(path.name for path in Path("out").glob("*.*t")) == ["one.pt", "two.pt"]
    assert size_of("one") == size_of("two")


def test_check_and_info_take_several(here: Path, connects: list[int], capsys: Any) -> None:
    Path("raw/b.npy").write_bytes(b"no numbers")
    assert cli.main(["check", "batch.yaml"]) == 3
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"[1/3] {here}/raw/a.npy"
    assert said.out.count("nothing was computed") == 2
    assert said.out.splitlines()[-1] == "3 datasets"
    assert "b.npy" in said.err
    assert not Path("out").exists()
    assert cli.main(["info", "raw/a.npy", "raw/[bc].npy", "input.beam_energy_kv=200"]) == 3
    said = capsys.readouterr()
    assert said.out.count("patterns    4 x 3 x 40 x 36 uint16") == 2
    assert "[3/3] " in said.out
    assert connects == []
    assert cli.main(["init", "raw/a.npy", "raw/b.npy"]) == 2
    assert "init takes one file" in capsys.readouterr().err
