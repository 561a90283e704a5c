"""A training that SIGKILL ends again and again: the same command goes on, and ends with the same bytes."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from forks import PATIENCE, Forks, Moment

pytest.importorskip("torch", reason="torch is not installed (extra torch)")
pytestmark = pytest.mark.faults

EPOCHS = 12
#: renames by name of a whole training: the checkpoint at the start and after each epoch, then the other five outputs
N_RENAMES = 1 + EPOCHS + 5


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:16, :16]
    disc = (y - 7) ** 2 + (x - 8) ** 2 < 9
    rates = 20.0 * disc * np.linspace(0.5, 2, 100).reshape(10, 10, 1, 1) + 0.1
    path = tmp_path_factory.mktemp("data") / "scan.npy"
    np.save(path, rng.poisson(rates).astype(np.uint16))
    return path


def words(scan: Path, folder: Path) -> list[str]:
    sizes = ["--epochs", str(EPOCHS), "--batch", "8", "--latent", "4", "--threads", "1"]
    return ["--data", str(scan), "--output_dir", str(folder), *sizes]


@pytest.fixture(scope="module")
def undisturbed(scan: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = forks.finish("stem_dask.train", *words(scan, folder), pool=False)
    assert ended.code == 0, ended.text
    return folder


def assert_same(folder: Path, undisturbed: Path) -> None:
    for name in ("model.pt", "embeddings.npz", "training.png"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    found, expected = (json.loads((one / "results.json").read_text()) for one in (folder, undisturbed))  # fmt: skip
    assert found["history"] == expected["history"]
    assert {path.name for path in folder.iterdir()} == {path.name for path in undisturbed.iterdir()}


def test_kills_at_renames(scan: Path, undisturbed: Path, forks: Forks, tmp_path: Path) -> None:
    """Before or after the checkpoint of an epoch, or an output, gets its name."""
    draw, argv = random.Random(5), words(scan, tmp_path)
    for nth, after in ((1, False), (1, True), (draw.randint(2, 6), False), (draw.randint(2, 4), True)):  # fmt: skip
        ended = forks.finish("stem_dask.train", *argv, pool=False, at=Moment("name", nth, after))
        assert ended.code == -signal.SIGKILL, ended.text
        assert not (tmp_path / "results.json").exists()
    ended = forks.finish("stem_dask.train", *argv, pool=False)
    assert ended.code == 0, ended.text
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize("nth", range(EPOCHS + 2, N_RENAMES + 1))
def test_kills_between_the_outputs(
    nth: int, scan: Path, undisturbed: Path, forks: Forks, tmp_path: Path
) -> None:
    argv = words(scan, tmp_path)
    ended = forks.finish("stem_dask.train", *argv, pool=False, at=Moment("name", nth, False))
    assert ended.code == -signal.SIGKILL, ended.text
    ended = forks.finish("stem_dask.train", *argv, pool=False)
    assert ended.code == 0, ended.text
    assert "epoch" not in ended.text.split("losses")[0], "no epoch was trained again"
    assert_same(tmp_path, undisturbed)


def test_kills_at_random_times(scan: Path, undisturbed: Path, forks: Forks, tmp_path: Path) -> None:
    """The process is killed somewhere in the work that follows a drawn number of epochs."""
    draw, folder = random.Random(time.time_ns()), tmp_path / "out"
    n_killed = 0
    while True:
        log = tmp_path / f"log{n_killed}"
        fork = forks.start("stem_dask.train", words(scan, folder), log)
        wanted, end = draw.randint(1, 4), time.monotonic() + PATIENCE
        while fork.poll() is None and log_epochs(log) < wanted:
            assert time.monotonic() < end, log.read_text()
        if fork.poll() is not None:
            break
        os.kill(fork.pid, signal.SIGKILL)
        fork.wait(PATIENCE)
        n_killed += 1
        assert n_killed <= EPOCHS, "a start does not get on"
    assert fork.returncode == 0, log.read_text()
    assert n_killed >= 2
    assert_same(folder, undisturbed)


def log_epochs(log: Path) -> int:
    return log.read_text().count("\nepoch ") if log.exists() else 0
