"""The folder of workers' files: what a dead run left goes, what a live one or anybody else has stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stem_dask import scratch as module
from stem_dask.scratch import PREFIX, scratch

HOLDS = """
import sys, time
from stem_dask.scratch import scratch
with scratch(sys.argv[1]) as folder:
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


def test_a_dead_owner_s_folder_is_removed_and_a_live_one_s_stays(tmp_path, owner):
    process, folder = owner
    assert (folder / "file").exists()
    with scratch(tmp_path) as own:
        assert (folder / "file").exists()
        assert Path(own).parent == tmp_path
    assert not Path(own).exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert folder.exists()
    with scratch(tmp_path):
        assert not folder.exists()


def test_what_is_not_ours_stays(tmp_path, monkeypatch):
    """Another user's folder, a link, a file, and a folder that others named so."""
    others, target = tmp_path / f"{PREFIX}others", tmp_path / "target"
    for folder in (others, target, tmp_path / "stem_dask-bench"):
        folder.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").touch()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with scratch(tmp_path):
        assert others.exists()
    monkeypatch.undo()
    with scratch(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == [path for path in before if path != others]


def test_without_locks_of_folders_nothing_is_removed(tmp_path, monkeypatch):
    abandoned = tmp_path / f"{PREFIX}abandoned"
    abandoned.mkdir()
    monkeypatch.setattr(module, "_held", lambda folder: None)  # as on NFS
    with scratch(tmp_path) as folder:
        assert Path(folder).is_dir()
    assert sorted(tmp_path.iterdir()) == [abandoned]
