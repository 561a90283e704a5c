"""Runs that replace older outputs, killed at the moments when old and new files lie side by side."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from forks import Moment
from harness import truncate
from small import JOBS, N_BLOCKS, RESULTS, STORE, Small, content

pytestmark = pytest.mark.faults

NAMES = (STORE, ".pt", RESULTS)
OVERWRITE, RESTART = "--overwrite", "--restart"
#: names that a run gives, in their order: run.json four times, the older store steps aside, the new one comes, the .pt
ASIDE, NEW_STORE, NEW_PT = (Moment("name", nth, False) for nth in (5, 6, 7))


@pytest.fixture
def folder(small: Small, tmp_path: Path) -> Path:
    """The outputs of A."""
    assert small.run(tmp_path, "A").code == 0
    return tmp_path


def _killed(small: Small, folder: Path, config: str, at: Moment, *flags: str) -> None:
    ended = small.run(folder, config, OVERWRITE, *flags, at=at)
    assert ended.code == -9, ended.text


def _all_of(small: Small, folder: Path, config: str) -> None:
    for name in NAMES:
        assert content(folder / f"scan{name}") == small.references[config][name], name


def test_leave_to_replace_is_given_once(small: Small, folder: Path) -> None:
    """The run that goes on replaces all outputs or none, whether it is asked to overwrite again or not."""
    _killed(small, folder, "B", Moment("line", 15, True))
    _all_of(small, folder, "A")
    ended = small.run(folder, "B")
    assert ended.code == 0, ended.text
    _all_of(small, folder, "B")


def test_an_export_that_was_not_there_at_the_start_is_kept(small: Small, tmp_path: Path) -> None:
    """Somebody else's file: no leave was given to replace it."""
    assert small.run(tmp_path, "A", at=Moment("line", 15, True)).code == -9
    (tmp_path / "scan.pt").write_bytes(b"mine")
    ended = small.run(tmp_path, "A")
    assert ended.code == 2, ended.text
    assert "scan.pt exists" in ended.text
    assert (tmp_path / "scan.pt").read_bytes() == b"mine"


def test_old_and_new_files_are_not_a_complete_run(small: Small, folder: Path) -> None:
    """The new store lies beside the older .pt, and the run that was at it is dropped for another."""
    _killed(small, folder, "B", NEW_PT)
    assert content(folder / "scan.zarr") == small.references["B"][STORE]
    assert content(folder / "scan.pt") == small.references["A"][".pt"]
    _killed(small, folder, "A", Moment("line", 8, True), RESTART)
    ended = small.run(folder, "B")
    assert ended.code == 2, ended.text
    assert "scan_results.json is missing" in ended.text
    ended = small.run(folder, "B", OVERWRITE, RESTART)
    assert ended.code == 0, ended.text
    _all_of(small, folder, "B")


@pytest.mark.parametrize(("at", "name"), [(ASIDE, STORE), (NEW_PT, ".pt")])
def test_an_older_output_is_not_taken_for_the_new_one(at, name, small, folder):
    """All blocks are noted, and the file that holds them is gone; the older one is still there."""
    _killed(small, folder, "B", at)
    assert content(folder / f"scan{name}") == small.references["A"][name]
    built = folder / f"scan{name}.incomplete"
    shutil.rmtree(built) if built.is_dir() else built.unlink()
    ended = small.run(folder, "B", OVERWRITE)
    assert ended.code == 0, ended.text
    assert str(built) in ended.text
    _all_of(small, folder, "B")


def test_a_kill_while_a_run_is_dropped(small: Small, folder: Path) -> None:
    """The unfinished store is gone, and its journal is not."""
    _killed(small, folder, "B", ASIDE)
    built = folder / "scan.zarr.incomplete"
    n_entries = 1 + len(list(built.rglob("*")))
    _killed(small, folder, "B", Moment("removal", n_entries, True), RESTART)
    assert not built.exists()
    assert (folder / "scan.run" / "journal").exists()
    ended = small.run(folder, "B", OVERWRITE)
    assert ended.code == 0, ended.text
    _all_of(small, folder, "B")


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_damaged_spool_of_a_store_that_has_its_name(damage, small, tmp_path):
    """What is known of each pattern waits to be joined, and the shards are done: only the first is made again."""
    assert small.run(tmp_path, "A", at=Moment("name", 5, True)).code == -9
    assert (tmp_path / "scan.zarr").exists()
    spool = tmp_path / "scan.run" / "crop" / "000002.block"
    assert callable(damage)
    damage(spool)
    ended = small.run(tmp_path, "A")
    assert ended.code == 0, ended.text
    assert str(spool) in ended.text
    _all_of(small, tmp_path, "A")
    lines = Counter((tmp_path / "scan.run" / "journal").read_text().split('"job": "')[1:])
    assert sum(n for text, n in lines.items() if text.startswith(JOBS[STORE])) == N_BLOCKS + 1
