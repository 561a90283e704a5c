"""A batch that is killed outright: between its two sweeps, and in the second; the same command goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stem_dask import run

pytestmark = pytest.mark.faults

CONFIG = """
input: {path: raw/*.npy}
crop: {size: common, margin_pixels: 1}
output: {path: "out/{stem}.zarr", export: [pt], figure: false, chunk_mb: 0.01}
cluster: {kind: threads, threads_per_worker: 2}
"""
#: ends the process at the n-th call of a function
KILL = """
import os, signal, sys
import {module} as module
plain, calls = module.{name}, []
def function(*args, **options):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **options)
module.{name} = function
from stem_dask import run
run.main(["batch.yaml", "--quiet"])
"""


def content(folder: Path) -> dict[str, bytes]:
    """All bytes of the outputs that hold patterns."""
    files = [*folder.glob("*.pt"), *folder.glob("*.zarr/patterns/**/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        ("stem_dask.pipeline", "choose", 2),
        ("stem_dask.plan", "common_size", 1),
        ("stem_dask.passes.writing", "complete_analysis", 1),
        ("stem_dask.passes.writing", "complete_analysis", 2),
    ],
)
def test_killed(
    module: str, name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("raw").mkdir()
    Path("batch.yaml").write_text(CONFIG)
    for i, half in enumerate((3, 6, 4)):
        data = np.zeros((4, 3, 40, 36), np.uint16)
        data[:, :, 19 - half : 19 + half, 17 - half : 17 + half] = 5 + i
        np.save(f"raw/{i}.npy", data)
    code = KILL.format(module=module, name=name, call=call)
    done = subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    journals = {path.parent.name: path.read_bytes() for path in Path("out").glob("*.run/journal")}
    assert journals
    assert run.main(["batch.yaml", "--quiet"]) == 0
    for folder, known in journals.items():
        assert Path("out", folder, "journal").read_bytes().startswith(known)
    resumed = content(Path("out"))
    assert len([path for path in resumed if path.endswith(".pt")]) == 3
    assert run.main(["batch.yaml", "--quiet", "output.path=again/{stem}.zarr"]) == 0
    assert content(Path("again")) == resumed
