"""stem-dask watch: files run once they have stopped changing, whenever they come, and as often as they change."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import batch, content, rows, size_of, stopped, write_beam
from hypothesis import given
from hypothesis import strategies as st

from stem_dask.cli import main as cli
from stem_dask.cli.watch import Incoming, Settling
from stem_dask.config.load import configs_from

SHORT = ("--settle", "0.1", "--idle", "0.2")


@pytest.fixture
def here(batch_folder: Path) -> Path:
    return batch_folder


def watch(*words: str) -> int:
    return cli.main(["watch", "raw", "out/{stem}.zarr", "--config", "batch.yaml", *words])


# ---- when a file is run


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(0, 60),
)
def test_settled_is_what_did_not_change_for_the_time(
    looks: list[tuple[int, int]], wait: int
) -> None:
    """Against a search through all earlier looks."""
    files, now, seen = Settling(float(wait)), 0, list[tuple[int, int]]()
    for pause, state in looks:
        now += pause
        seen.append((now, state))
        files.update({"a": (state, 0)}, float(now))
        same = [at for i, (at, _) in enumerate(seen) if {s for _, s in seen[i:]} == {state}]
        assert files.settled(["a"], float(now)) == (now - min(same) >= wait)
        assert not files.settled(["a", "b"], float(now))
    files.update({}, float(now))
    assert not files.settled(["a"], float(now) + wait)


def job(path: str, *overrides: str) -> Any:
    paths = {"input": {"path": path}, "output": {"path": "out/{stem}.zarr"}}
    return configs_from(paths, overrides)[0]


def of_shape(shape: str) -> Callable[[str], Any]:
    return lambda path: job(path, f"input.scan_shape={shape}")


def looks(incoming: Incoming, now: float) -> tuple[list[str], list[str], bool]:
    """Names of the inputs that can be run, the errors of others, and whether files are waiting."""
    found, waiting = incoming.look(now)
    names = [Path(row.input).name for row, error in found if error is None]
    return names, [str(error) for _, error in found if error is not None], waiting


def test_a_file_that_grows_is_run_after_it_has_stopped_and_after_each_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = np.zeros((2, 3, 8, 8), np.uint16)
    np.save("whole.npy", data)
    whole, place = Path("whole.npy").read_bytes(), tmp_path / "incoming"
    place.mkdir()
    incoming = Incoming(str(place / "*"), 30.0, job)
    assert looks(incoming, 0) == ([], [], False)
    for now, n_bytes in ((1, 10), (20, 200), (40, 500)):
        (place / "a.npy").write_bytes(whole[:n_bytes])
        (place / "notes.txt").write_text("of the operator")
        assert looks(incoming, now) == ([], [], True)
    names, errors, _ = looks(incoming, 70)
    assert names == []
    assert len(errors) == 1
    assert "a.npy" in errors[0]
    for now in (71, 200):  # reported once, also when something else comes
        (place / f"{now}.txt").touch()
        assert looks(incoming, now)[:2] == ([], [])
    (place / "a.npy").write_bytes(whole)
    assert looks(incoming, 300) == ([], [], True)
    assert looks(incoming, 329) == ([], [], True)
    assert looks(incoming, 330) == (["a.npy"], [], False)
    assert looks(incoming, 331) == ([], [], False)
    (place / "a.npy").write_bytes(whole + whole[:4])
    assert looks(incoming, 400) == ([], [], True)
    (place / "a.npy").unlink()
    assert looks(incoming, 500) == ([], [], False)


def test_a_file_waits_for_those_that_belong_to_it(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    incoming = Incoming(str(tmp_path / "*.mib"), 30.0, of_shape("[2,4]"))
    shutil.copy(shared_data / "real" / "merlin_4x2_6bit.mib", "a.mib")
    assert looks(incoming, 0) == ([], [], True)
    settings = (shared_data / "real" / "merlin_4x2_6bit.hdr").read_bytes()
    Path("a.hdr").write_bytes(settings[:100])
    assert looks(incoming, 29) == ([], [], True)
    Path("a.hdr").write_bytes(settings)
    assert looks(incoming, 40) == ([], [], True)
    assert looks(incoming, 69) == ([], [], True)
    assert looks(incoming, 70) == (["a.mib"], [], False)


def test_an_acquisition_in_several_files_is_one_input(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its parts came first; and the parts of another name are waited for."""
    monkeypatch.chdir(tmp_path)
    case = shared_data / "cases" / "d1_dectris_master"
    incoming = Incoming(str(tmp_path / "*"), 30.0, of_shape("[12,10]"))
    shutil.copy(case / "lamella_data_000001.h5", ".")
    looks(incoming, 0)
    assert len(looks(incoming, 30)[1]) == 1
    shutil.copy(case / "lamella_master.h5", ".")
    assert looks(incoming, 40)[0] == []
    assert looks(incoming, 80)[0] == []  # it lists a file that is not there
    shutil.copy(case / "lamella_data_000002.h5", ".")
    names = [looks(incoming, now)[0] for now in (100, 129, 130, 131)]
    assert names == [[], [], ["lamella_master.h5"], []]
    assert {Path(path).name for path in incoming.parts} == {
        "lamella_data_000001.h5",
        "lamella_data_000002.h5",
    }


def test_a_store_has_settled_when_no_file_in_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zarr

    monkeypatch.chdir(tmp_path)
    incoming = Incoming(str(tmp_path / "*"), 30.0, job)
    array = zarr.create_array("a.zarr", shape=(2, 3, 8, 8), chunks=(1, 3, 8, 8), dtype="u2")
    array[0] = 1
    looks(incoming, 0)
    array[1] = 1
    assert looks(incoming, 40) == ([], [], True)
    assert looks(incoming, 70) == (["a.zarr"], [], False)


# ---- the command


def growing(name: str, data: np.ndarray, start: Callable[[], bool]) -> threading.Thread:
    """Writes a file in three pieces, once something has happened."""
    np.save("whole", data)
    whole = Path("whole.npy").read_bytes()

    def write() -> None:
        pause = threading.Event()
        while not start():
            pause.wait(0.01)
        with open(name, "wb") as file:
            for i in range(3):
                file.write(whole[i * len(whole) // 3 : (i + 1) * len(whole) // 3])
                file.flush()
                pause.wait(0.05)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_present_and_later_files_are_run_and_a_broken_one_ends_nothing(
    here: Path, connects: list[int], capsys: Any
) -> None:
    data = np.load("raw/c.npy")
    Path("raw/c.npy").unlink()
    Path("raw/b.npy").write_bytes(Path("raw/b.npy").read_bytes()[:500])
    Path("raw/notes.txt").write_text("of the operator")
    thread = growing("raw/c.npy", data, lambda: Path("out/a.zarr").exists())
    assert watch("--settle", "0.2", "--idle", "0.6") == 3
    thread.join()
    said = capsys.readouterr()
    assert len(connects) == 1
    assert said.err.count("error: ") == 1
    assert f"error: {here}/raw/b.npy: " in said.err
    heads = [line.split() for line in said.out.splitlines() if line.endswith(".npy")]
    assert sorted(name for _, name in heads) == ["raw/a.npy", "raw/b.npy", "raw/c.npy"]
    assert all(time.count(":") == 2 for time, _ in heads)
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
    write_beam("b", 6)
    assert watch(*SHORT, "-q") == 0
    assert capsys.readouterr() == ("", "")
    shutil.move("out", "watched")
    assert batch("--quiet") == 0
    for name in "abc":
        assert content(f"out/{name}.zarr") == content(f"watched/{name}.zarr") != {}


def test_advice_is_a_command_for_the_file_alone(here: Path, capsys: Any) -> None:
    assert watch(*SHORT, "crop.size=8", "input.scan_step=1") == 4
    found = [line for line in capsys.readouterr().out.splitlines() if "stem-dask run" in line]
    line = found[0][found[0].index("stem-dask run") :]
    assert line.startswith("stem-dask run batch.yaml input.path=raw/b.npy input.scan_step=1 crop.")
    assert cli.main([*line.split()[1:], "--quiet"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 75)])
def test_a_stop_while_nothing_runs(
    here: Path, number: int, code: int, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is the end of a watch; a wall time interrupts it."""
    plain = Incoming.look

    def look(self: Incoming, now: float) -> Any:
        found, waiting = plain(self, now)
        if not found and not waiting:
            os.kill(os.getpid(), number)
        return found, waiting

    monkeypatch.setattr(Incoming, "look", look)
    assert watch("--settle", "0.05") == code
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "3 of 3 complete"
    assert ("the same command goes on" in said.err) == (code == 75)


def test_an_interrupted_file_goes_on(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = stopped(monkeypatch, "stem_dask.job.passes.choose", 2)
    assert watch(*SHORT) == 75
    table = rows(capsys.readouterr().out)
    assert [table[f"raw/{name}.npy"][-1] for name in "abc"] == ["0", "on", "on"]
    back()
    assert watch(*SHORT) == 0
    said = capsys.readouterr().out
    assert said.count("already complete: ") == 1
    assert said.count("resuming ") == 1
    assert said.splitlines()[-1] == "3 of 3 complete"


def test_a_file_that_grows_while_it_is_read_is_read_again(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "bc":
        Path(f"raw/{name}.npy").unlink()
    from stem_dask.job import passes

    plain, calls = passes.choose, []

    def choose(*args: Any) -> Any:
        if not calls:
            write_beam("a", 5, detector=(44, 36))
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr("stem_dask.job.passes.choose", choose)
    assert watch(*SHORT) == 0
    said = capsys.readouterr()
    assert "raw/a.npy changed" in said.err
    assert size_of("a") == (14, 14)
    assert said.out.splitlines()[-1] == "1 of 1 complete"


def test_overwrite_replaces_only_what_differs(here: Path, capsys: Any) -> None:
    assert watch(*SHORT, "-q") == 0
    before = {name: Path(f"out/{name}_results.json").stat().st_mtime_ns for name in "abc"}
    write_beam("a", 7)
    capsys.readouterr()
    assert watch(*SHORT) == 2
    assert "out/a.zarr exists, made from another state of the input" in capsys.readouterr().err
    assert watch(*SHORT, "--overwrite") == 0
    assert size_of("a") == (18, 18)
    after = {name: Path(f"out/{name}_results.json").stat().st_mtime_ns for name in "abc"}
    assert [name for name in "abc" if after[name] != before[name]] == ["a"]


def test_a_common_size_is_chosen_at_the_end(here: Path, capsys: Any) -> None:
    data = np.load("raw/b.npy")
    Path("raw/b.npy").unlink()
    thread = growing("raw/b.npy", data, lambda: Path("out/c.run/journal").exists())
    assert watch("--settle", "0.2", "--idle", "0.6", "crop.size=common") == 0
    thread.join()
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("analyze ") == 3
    assert "common      16 x 16 px, which holds the windows of 3" in said.out
    shutil.move("out", "watched")
    assert batch("--quiet", "crop.size=common") == 0
    for name in "abc":
        assert content(f"out/{name}.zarr") == content(f"watched/{name}.zarr") != {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["raw", "out.zarr"], "the output is out.zarr, one name for all files"),
        (["raw/a.npy", "raw/b.npy", "out/{stem}.zarr"], "and an output; 3 names are given"),
        (["nowhere", "out/{stem}.zarr"], "nowhere is no folder here"),
        (["s3://raw/*.npy", "out/{stem}.zarr"], "s3://raw/*.npy is no folder here"),
        (["raw", "raw/{stem}_c.zarr"], "it would be an input when the same command goes on"),
        (["raw", "out/{stem}.zarr", "crop.sise=4"], "crop.sise"),
        (["raw", "out/{stem}.zarr", "crop.size=common"], "add --idle 600"),
    ],
)
def test_refused(here: Path, words: list[str], told: str, capsys: Any) -> None:
    assert cli.main(["watch", *words]) == 2
    assert told in capsys.readouterr().err


def test_two_inputs_with_one_output(here: Path, capsys: Any) -> None:
    """Nor does the second replace that of the first with --overwrite."""
    Path("raw/c.npy").unlink()
    Path("raw/more").mkdir()
    shutil.move("raw/b.npy", "raw/more/a.npy")
    words = ["watch", "raw/**/*.npy", "out/{stem}.zarr", "--config", "batch.yaml", *SHORT]
    assert cli.main([*words, "--overwrite"]) == 2
    said = capsys.readouterr()
    assert f"{here}/raw/a.npy and {here}/raw/more/a.npy would both become " in said.err
    assert size_of("a") == (10, 10)
