"""A small dataset, the undisturbed run to compare with, and folders of runs that were killed at a known moment."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from forks import Forks
from harness import Command, cleaned
from small import Small

CONFIG = """
input: {path: BEAM}
output: {path: scan.zarr, export: [pt, hspy], figure: false, chunk_mb: 0.13}
"""


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of 24 x 16 patterns of 64 x 64, a wandering disc in Poisson noise, and its config: one row is a block."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:64, :64]
    data = np.zeros((24, 16, 64, 64), np.uint16)
    for i, j in np.ndindex(24, 16):
        disc = (y - 31 - i / 8) ** 2 + (x - 33 + j / 8) ** 2 < 100
        data[i, j] = rng.poisson(60.0 * disc + 0.05)
    np.save(folder / "beam.npy", data)
    (folder / "crop.yaml").write_text(CONFIG.replace("BEAM", str(folder / "beam.npy")))
    return folder / "crop.yaml"


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def reference(config: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The undisturbed run, under another name."""
    command = Command(config, tmp_path_factory.mktemp("reference"), forks, "reference")
    with cleaned(command):
        done = command.finish(kind="threads")
        assert done.code == 0, done.text
    return command


@pytest.fixture(scope="session")
def small(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("small"), forks)


@pytest.fixture
def command(config: Path, forks: Forks, tmp_path: Path) -> Iterator[Command]:
    command = Command(config, tmp_path, forks)
    with cleaned(command):
        yield command


@pytest.fixture(scope="session")
def killed_at(config, forks, tmp_path_factory):
    """Puts into a command's folder what a run leaves that was killed at a fault; each fault is run once."""
    folders: dict[str, Path] = {}

    def put(command: Command, fault: str, *overrides: str) -> None:
        key = " ".join([fault, *overrides])
        if key not in folders:
            folder = tmp_path_factory.mktemp("killed")
            template = Command(config, folder, forks, overrides=overrides)
            with cleaned(template):
                done = template.finish(kind="threads", fault=fault)
                assert done.code == -9, done.text
            folders[key] = folder
        for entry in folders[key].glob("scan*"):
            target = command.folder / entry.name
            if entry.is_dir():
                shutil.copytree(entry, target)
            else:
                shutil.copy2(entry, target)

    return put
