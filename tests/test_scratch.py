"""The folder with the keys of a run: what a dead run left is removed, that of a live one stays."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stem_dask.cluster.slurm import keys
from stem_dask.engine.lock import SILENT_SECONDS

HOLDS = """
import sys, time
from stem_dask.cluster.slurm import keys
with keys(sys.argv[1]) as folder:
    open(folder + "/file", "w").close()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """A process that holds a folder, and that folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_keys_of_a_dead_run_are_removed_and_those_of_a_live_one_stay(tmp_path, owner):
    process, folder = owner
    with keys(tmp_path) as own:
        assert (folder / "file").exists()
        assert Path(own).stat().st_mode & 0o777 == 0o700
    assert sorted(tmp_path.iterdir()) == [folder, folder.with_name(f"{folder.name}.lock")]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "file").exists()
    with keys(tmp_path):
        assert not folder.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("silent", "left"), [(SILENT_SECONDS - 30, True), (SILENT_SECONDS + 1, False)]
)
def test_keys_of_a_run_on_another_machine(tmp_path, silent, left):
    """Its lock may be seen there only: it is dead when it was silent for a minute."""
    folder, lock = tmp_path / "keys-others", tmp_path / "keys-others.lock"
    folder.mkdir()
    lock.write_text(json.dumps({"host": "node7", "pid": 1, "since": "2026-01-01 00:00:00"}))
    os.utime(lock, (time.time() - silent,) * 2)
    with keys(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == ([folder, lock] if left else [])


def test_keys_where_there_are_no_locks(tmp_path, monkeypatch):
    import fcntl

    def none(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    abandoned = tmp_path / "keys-abandoned"
    abandoned.mkdir()
    (tmp_path / "keys-abandoned.lock").touch()
    with keys(tmp_path) as folder:
        assert Path(folder).is_dir()
        assert len(list(tmp_path.iterdir())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "keys-abandoned",
        "keys-abandoned.lock",
    ]
