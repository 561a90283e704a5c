"""The disk refuses one call after another: the error is told, nothing is called complete, and the next run goes on."""

import contextlib
import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import Forks

pytestmark = pytest.mark.faults

CONFIG = """
input: {path: BEAM}
output: {path: scan.zarr, export: [pt, hspy], figure: false, chunk_mb: 0.004}
"""
#: kind of call: its error, and whether one file stays refused or all of the disk
CHAINS = {
    "any": (errno.EIO, "dead"),
    "open": (errno.EIO, "file"),
    "write": (errno.ENOSPC, "file"),
    "fsync": (errno.EIO, "file"),
    "close": (errno.EIO, "file"),
    "rename": (errno.EIO, "file"),
}
OUTPUTS = ("scan.zarr", "scan.pt", "scan.hspy", "scan_results.json")
N_BLOCKS = 2
#: rows of the sample, which is all of the scan
N_SAMPLED = 4


@dataclass(frozen=True)
class Run:
    """How a run on a broken disk ended."""

    code: int
    text: str
    refused: list[dict[str, str]]
    calls: list[list[str]]


@dataclass(frozen=True)
class Broken:
    """Runs the command on a disk that refuses calls; see failing.py."""

    folder: Path
    forks: Forks

    def run(self, root: Path, kind: str, error: int = errno.EIO, **disk: Any) -> Run:
        answer = self.folder / f"answer-{root.name}.json"
        request = {
            "answer": str(answer),
            "disk": {"root": str(root), "kind": kind, "error": error, **disk},
        }
        argv = [str(self.folder / "crop.yaml"), f"output.path={root}/scan.zarr", "--quiet"]
        ended = self.forks.finish("failing", json.dumps(request), *argv)
        assert answer.exists(), ended.text
        words = json.loads(answer.read_text())
        answer.unlink()
        return Run(**words, text=ended.text)


@pytest.fixture(scope="module")
def disk(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Broken:
    """A scan of 4 x 3 patterns of 16 x 16, two rows a block, and an undisturbed run."""
    disk = Broken(tmp_path_factory.mktemp("io"), forks)
    data = np.random.default_rng(0).poisson(3, (4, 3, 16, 16)).astype(np.uint16)
    data[:, :, 5:9, 5:9] += 60
    np.save(disk.folder / "beam.npy", data)
    config = CONFIG.replace("BEAM", str(disk.folder / "beam.npy"))
    (disk.folder / "crop.yaml").write_text(config)
    run = disk.run(disk.folder / "reference", "none")
    assert run.code == 0, run.text
    return disk


def chain(disk: Broken, kind: str) -> int:
    """The same command again and again; each time the next call that had not its turn is refused."""
    error, how = CHAINS[kind]
    root, reference = disk.folder / kind, contents(disk.folder / "reference")
    spared: list[str] = []
    while (run := disk.run(root, kind, error, spared=spared, how=how)).refused:
        spared.append(run.refused[0]["turn"])
        if spared[-1].startswith("close") and run.refused[0]["file"] == "scan.run/lock":
            break  # which is gone by then
        assert_told(run, root, error)
        assert_sound(root, reference)
    assert run.code == 0, run.text
    assert_complete(root, reference)
    return len(spared)


@pytest.mark.parametrize("kind", CHAINS)
def test_one_call_after_another(kind: str, disk: Broken) -> None:
    assert chain(disk, kind) >= 20


@pytest.mark.parametrize("kind", ["open", "write", "close", "rename"])
def test_errors_that_pass(kind: str, disk: Broken) -> None:
    """Within a task a call is tried again: every file of every block is refused once."""
    root = disk.folder / f"passing-{kind}"
    run = disk.run(root, kind, how="passing")
    assert run.code == 0, run.text
    # .pt has no file a block
    assert len(run.refused) == 4 * N_BLOCKS + N_SAMPLED + (kind != "rename")
    assert_complete(root, contents(disk.folder / "reference"))


def test_on_disk_before_it_bears_its_name(disk: Broken) -> None:
    """What is renamed has been brought to the disk, all of it, and after its last write."""
    root = disk.folder / "order"
    run = disk.run(root, "none")
    assert run.code == 0, run.text
    assert_complete(root, contents(disk.folder / "reference"))
    for name in OUTPUTS:
        published = run.calls.index(["rename", name])
        files = [name] if (root / name).is_file() else sorted(contents(root / name))
        for file in files:
            built = f"{name}.incomplete" + ("" if file == name else f"/{file}")
            ours = [i for i, call in enumerate(run.calls[:published]) if call[1] == built]
            assert run.calls[max(ours)][0] == "fsync", built
        assert ["fsync", "."] in run.calls[published:], "the folder, which holds the name"


def assert_told(run: Run, root: Path, error: int) -> None:
    """Exit code 5, one line that says what failed and why."""
    refused = run.refused[0]
    assert run.code == 5, (refused, run.text)
    assert run.text.startswith("error: "), (refused, run.text)
    assert run.text.count("\n") == 1, (refused, run.text)
    assert os.strerror(error) in run.text, (refused, run.text)
    # in a task the last try is told, on a dead disk it may fail at another file
    files = [r["file"] for r in run.refused] if ", task," in refused["turn"] else [refused["file"]]
    tops = {file.split("/")[0] for file in files}
    names = [str(root) if top == "." else f"{root}/{top}" for top in tops]
    names += [f"export {suffix}" for top in tops for suffix in Path(top).suffixes[:1]]
    assert any(name in run.text for name in names), (refused, run.text)


def assert_sound(root: Path, reference: dict[str, bytes]) -> None:
    """What bears a final name is whole, and only a whole run is called complete."""
    found = contents(root)
    names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    for name in names & set(OUTPUTS):
        assert part(found, name) == part(reference, name), name
    with contextlib.suppress(FileNotFoundError):
        words = json.loads((root / "scan.run" / "run.json").read_text())
        if words.get("complete") or "scan.run/report.json" in found:
            assert names >= set(OUTPUTS)


def assert_complete(root: Path, reference: dict[str, bytes]) -> None:
    found = contents(root)
    for name in OUTPUTS:
        assert part(found, name) == part(reference, name), name
    assert {path.name for path in root.iterdir()} == {*OUTPUTS, "scan.run"}
    left = {path.name for path in (root / "scan.run").iterdir()}
    assert left == {"journal", "report.json", "run.json"}
    assert json.loads((root / "scan.run" / "run.json").read_text())["complete"] is True
    lines = [json.loads(line) for line in found["scan.run/journal"].split(b"\n") if line]
    noted = [(line["job"], line["index"]) for line in lines]
    assert len(set(noted)) == 4 * N_BLOCKS + N_SAMPLED
    assert len(noted) == len(set(noted))


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder; the folder's own name and times are taken out."""
    return {
        str(path.relative_to(root)): path.read_bytes().replace(str(root).encode(), b"ROOT")
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def part(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """One output of all; of the results only their names, because they hold times."""
    chosen = {file: words for file, words in files.items() if file.split("/")[0] == name}
    if name.endswith(".json"):
        return {file: str(sorted(json.loads(words))).encode() for file, words in chosen.items()}
    return chosen
