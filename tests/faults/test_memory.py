"""The projection of a worker's memory holds: data many times larger pass through small workers, and no smaller one starts."""

import json
import os
import re
from pathlib import Path

import numpy as np
import psutil
import pytest
from distributed import Worker
from forks import Forks
from harness import Command, cleaned

import stem_dask as sd

pytestmark = pytest.mark.faults

#: of a worker, in bytes: what most machines can spare
LIMIT = 512 * 10**6
CONFIG = """
input: {path: BEAM}
output: {path: scan.zarr, export: [pt], figure: false}
"""


def write_beam(path: Path, n_bytes: int, rows: int = 4, columns: int = 16) -> Path:
    """A scan of 256 x 256 uint16 patterns, each a small disc; pages without counts are holes, so that it is soon there."""
    n, row = n_bytes // (128 * 256 * 256 * 2), 256 * 2
    offset = np.lib.format.open_memmap(path, "w+", np.uint16, (n, 128, 256, 256)).offset
    disc = np.zeros((rows, 256), np.uint16)
    disc[:, 128 - columns // 2 : 128 + columns // 2] = 100
    with open(
        path, "r+b", buffering=0
    ) as file:  # not through the mapping, which fills the holes in memory
        for i in range(n * 128):
            os.pwrite(file.fileno(), disc, offset + i * 256 * row + (128 - rows // 2) * row)
    (path.parent / "crop.yaml").write_text(CONFIG.replace("BEAM", str(path)))
    return path.parent / "crop.yaml"


@pytest.fixture(scope="module")
def quarter_gb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With counts everywhere, so that the window is what stands for it before it is known: the whole detector."""
    return write_beam(tmp_path_factory.mktemp("quarter") / "beam.npy", 2**28, 256, 256)


def limited(n_bytes: int) -> str:
    return f"cluster.memory_limit={n_bytes}B"


def test_8_gb_through_two_workers_of_512_mb(tmp_path: Path) -> None:
    command = Command(write_beam(tmp_path / "beam.npy", 2**33), tmp_path, None)
    with cleaned(command):
        done = command.start(limited(LIMIT))
        done.wait(240)
    (tmp_path / "beam.npy").unlink()
    assert done.code == 0, done.text
    assert "restart" not in done.text.lower()  # of a worker, by its nanny
    memory = json.loads((command.run_folder / "report.json").read_text())["memory"]
    assert memory["limit"] == LIMIT
    assert 0.6 * memory["projected"] <= memory["measured"] <= 1.1 * memory["projected"]
    assert memory["measured"] < 0.95 * LIMIT  # well below where Dask ends it


def test_a_budget_below_the_projection(quarter_gb: Path, forks: Forks, tmp_path: Path) -> None:
    """It is refused before any task; the block that is named fits, and so does a budget 10 % above."""
    command = Command(quarter_gb, tmp_path, forks, overrides=("output.chunk_mb=32",))
    with cleaned(command):
        refused = command.finish(limited(275 * 10**6))
        assert refused.code == 2, refused.text
        assert not command.run_folder.exists()
        need = re.search(r"a worker would need ([\d.]+) MB", refused.text)
        fits = re.search(r"(output\.chunk_mb=[\d.]+) fits", refused.text)
        assert need is not None, refused.text
        assert fits is not None, refused.text
        projected = int(float(need[1]) * 1e6)
        done = command.finish(limited(275 * 10**6), fits[1])
        assert done.code == 0, done.text
        roomy = Command(quarter_gb, tmp_path, forks, "roomy", overrides=command.overrides)
        done = roomy.finish(limited(int(1.1 * projected)))
        roomy.clean()
        assert done.code == 0, done.text
    memory = json.loads((roomy.run_folder / "report.json").read_text())["memory"]
    assert 0.6 * projected <= memory["measured"] <= 1.1 * memory["projected"]


def test_a_worker_that_needs_more_all_the_same(quarter_gb, forks, tmp_path, monkeypatch):
    """Told as memory: the limit is what the projection allows, and every worker is made to take more."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "1")  # sooner at the end
    command = Command(quarter_gb, tmp_path, forks, overrides=("output.chunk_mb=16",))
    with cleaned(command):
        done = command.finish(limited(LIMIT), fault="memory imagecodecs")
    assert done.code == 5, done.text
    assert "memory" in done.text
    assert "KilledWorker" not in done.text
    assert not command.store.exists()


def test_a_worker_that_is_nearly_full_goes_on() -> None:
    """Dask would have it wait until its memory is less, which may never be: nothing that it holds can be dropped."""
    limit = 400 * 10**6
    with sd.connect("local", n_workers=1, memory_limit=limit) as connection:
        (full,) = connection.client.run(_fill_up, limit).values()
        assert 0.95 * limit < full < 0.98 * limit  # above it Dask ends the process
        (after,) = connection.client.run(_after_a_look, wait=True).values()
        assert after == "running"
        assert connection.client.submit(int, "7").result(timeout=20) == 7


def _fill_up(limit: int, dask_worker: Worker) -> int:
    """Hold so much that 96.5 % of the limit are reached; returns what the process has."""
    dask_worker.ballast = np.ones(int(0.965 * limit) - _resident(), np.uint8)
    return _resident()


async def _after_a_look(dask_worker: Worker) -> str:
    """The worker's state when Dask has looked at its memory."""
    await dask_worker.memory_manager.memory_monitor(dask_worker)
    return str(dask_worker.status.name)


def _resident() -> int:
    return psutil.Process().memory_info().rss
