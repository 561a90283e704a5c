"""A batch or a watch that is killed outright: between its two sweeps, and in the second; the same command goes on."""

import signal
from pathlib import Path

import numpy as np
import pytest
from forks import Ended, Forks

pytestmark = pytest.mark.faults

CONFIG = """
input: {path: FOLDER/raw/*.npy}
crop: {size: common, margin_pixels: 1}
output: {path: "FOLDER/out/{stem}.zarr", export: [pt], figure: false, chunk_mb: 0.01}
cluster: {kind: threads, threads_per_worker: 2}
"""
#: ends the process at the n-th call of a function
KILL = """
import os, signal
import {module} as module
plain, calls = module.{name}, []
def function(*args, **options):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **options)
module.{name} = function
"""


def write_scans(folder: Path) -> Path:
    """Three scans whose discs differ in size, and the config."""
    (folder / "raw").mkdir()
    for i, half in enumerate((3, 6, 4)):
        data = np.zeros((4, 3, 40, 36), np.uint16)
        data[:, :, 19 - half : 19 + half, 17 - half : 17 + half] = 5 + i
        np.save(folder / f"raw/{i}.npy", data)
    (folder / "batch.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    return folder / "batch.yaml"


def batch(forks: Forks, config: Path, before: str = "") -> Ended:
    return forks.finish("stem_dask.run", str(config), "--quiet", pool=False, before=before)


def content(folder: Path) -> dict[str, bytes]:
    """All bytes of the outputs that hold patterns."""
    files = [*folder.glob("*.pt"), *folder.glob("*.zarr/patterns/**/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = batch(forks, write_scans(folder))
    assert ended.code == 0, ended.text
    return content(folder / "out")


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        ("stem_dask.job.passes", "choose", 2),
        ("stem_dask.core.window", "common_size", 1),
        ("stem_dask.job.passes", "complete_analysis", 1),
        ("stem_dask.job.passes", "complete_analysis", 2),
    ],
)
def test_killed(module, name, call, forks, undisturbed, tmp_path):
    config = write_scans(tmp_path)
    ended = batch(forks, config, KILL.format(module=module, name=name, call=call))
    assert ended.code == -signal.SIGKILL, ended.text
    journals = {path: path.read_bytes() for path in tmp_path.glob("out/*.run/journal")}
    assert journals
    ended = batch(forks, config)
    assert ended.code == 0, ended.text
    for path, known in journals.items():
        assert path.read_bytes().startswith(known)
    resumed = content(tmp_path / "out")
    assert len([path for path in resumed if path.endswith(".pt")]) == 3
    assert resumed == undisturbed


@pytest.mark.parametrize("name", ["choose", "complete_analysis"])
def test_a_watch_is_killed(name, forks, undisturbed, tmp_path):
    """While it analyzes what came, and while it crops; its outputs are those of a batch."""
    config = write_scans(tmp_path)
    words = ["watch", str(tmp_path / "raw"), str(tmp_path / "out" / "{stem}.zarr"), "--config", str(config)]  # fmt: skip
    words += ["--settle", "0.05", "--idle", "0.1", "--quiet"]

    def watch(before: str = "") -> Ended:
        return forks.finish("stem_dask.cli.main", *words, pool=False, before=before)

    ended = watch(KILL.format(module="stem_dask.job.passes", name=name, call=2))
    assert ended.code == -signal.SIGKILL, ended.text
    ended = watch()
    assert ended.code == 0, ended.text
    assert content(tmp_path / "out") == undisturbed
