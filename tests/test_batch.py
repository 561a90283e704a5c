"""Several inputs in one command: what goes on, what is told and going on after a stop."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from batches import BEAMS, batch, rows, size_of, stopped, write_beam

from stem_dask.cli import main as cli
from stem_dask.cli import run
from stem_dask.cli.jobs import Row, run_all, shortfall, table
from stem_dask.config.load import load_configs
from stem_dask.core.errors import InterruptedRunError
from stem_dask.engine.lock import locked
from stem_dask.storage.publish import run_folder

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture
def here(batch_folder: Path) -> Path:
    return batch_folder


# ---- one after another


def test_a_broken_file_stops_no_other(here: Path, connects: list[int], capsys: Any) -> None:
    Path("raw/b.npy").write_bytes(Path("raw/b.npy").read_bytes()[:500])
    assert batch() == 3
    said = capsys.readouterr()
    assert connects == [4 * 3 * 40 * 36 * 2]  # once, with the largest input
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "a.run", "a.zarr", "a_results.json", "c.run", "c.zarr", "c_results.json",
    ]  # fmt: skip
    heads = [line for line in said.out.splitlines() if line.startswith("[")]
    assert heads == [f"[{i}/3] raw/{name}.npy" for i, name in enumerate("abc", 1)]
    assert said.err.count("error: ") == 1
    assert f"error: {here}/raw/b.npy: " in said.err
    table = rows(said.out)
    cells = "raw/a.npy out/a.zarr 10 x 10 px 1.0000 1.0000 0"
    assert table["raw/a.npy"] == cells.split()
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
    assert rows(said.out)["raw/b.npy"][-6:] == [
        "4",
        "12",
        "patterns",
        "below",
        "min_retention",
        "0.95",
    ]
    assert rows(said.out)["raw/a.npy"][-1] == "0"
    assert "raw/b.npy: too many patterns keep less than validate.min_retention" in said.err
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


def test_a_fault_of_ours_is_traced_and_stops_no_other(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stem_dask.job import passes as whole

    plain = whole.choose

    def choose(job: Any, *args: Any) -> Any:
        return 1 / 0 if "/b." in job.outputs.path else plain(job, *args)

    monkeypatch.setattr("stem_dask.job.passes.choose", choose)
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
    Path("raw/b.npy").write_bytes(b"no numbers")
    assert batch("--quiet") == 3  # prints errors only
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    with pytest.raises(InterruptedRunError):  # the limit is of the whole batch
        run_all(load_configs("batch.yaml", ["output.overwrite=true"]), quiet=True, time_limit=0.0)


def test_convert_needs_no_window_columns(here: Path, capsys: Any) -> None:
    assert batch("crop.enabled=false") == 0
    out = capsys.readouterr().out
    assert out[out.index("input ") :].splitlines()[:2] == [
        "input      output      exit",
        "raw/a.npy  out/a.zarr  0",
    ]
    assert "done        out/a.zarr: not cropped, " in out


def test_rows_of_what_is_not_whole() -> None:
    quarantined = Row("/r/a.npy", "/o/a.zarr", 7, "", {"quarantined": {"n_patterns": 30}})
    assert shortfall(quarantined) == "30 patterns could not be read"
    quarantined.words = shortfall(quarantined)
    long = Row("/r/c.npy", "/o/c.zarr", 3, "/r/c.npy: one\n" + "word " * 40)
    lines = table([quarantined, Row("/r/b.npy", "/o/b.zarr"), long])
    assert lines[:3] == [
        "input     output     exit",
        "/r/a.npy  /o/a.zarr  7     30 patterns could not be read",
        "/r/b.npy  /o/b.zarr  75    not finished; the same command goes on",
    ]
    assert lines[3].startswith("/r/c.npy  /o/c.zarr  3     one word word ")
    assert lines[3].endswith("word …")
    assert len(lines[3]) <= 27 + 72
    assert lines[4] == "0 of 3 complete"


# ---- stopped


def test_a_stop_ends_the_batch_and_the_same_command_goes_on(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = stopped(monkeypatch, "stem_dask.job.passes.complete_analysis", 2)
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
    from stem_dask.job import passes as whole

    def choose(*args: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal came late")
        except KeyboardInterrupt:
            raise ImportError("half an import") from None

    monkeypatch.setattr(whole, "choose", choose)
    assert batch() == 75
    assert not list(Path("out").glob("*.zarr"))


def test_overwriting_goes_on_too(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that starts the same command again must come to an end: what was replaced is not replaced again."""
    assert batch("--quiet") == 0
    before = {name: os.stat(f"out/{name}.zarr/zarr.json").st_mtime_ns for name in BEAMS}
    back = stopped(monkeypatch, "stem_dask.job.passes.complete_analysis", 2)
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


# ---- the shipped config, check and info


def test_the_shipped_config_runs(here: Path) -> None:
    from stem_dask.writers.synthetic import Synthetic, write_dataset

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
