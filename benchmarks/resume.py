"""Seconds until a killed run does new work again.

    python -m benchmarks.resume [--finished 4000] [--kind threads]

The scan has one tiny pattern per block, so that only the number of blocks matters. The process group is killed when the
journal contains ``--finished`` shards. The same command then runs again until the journal grows; the time is measured
from the start of the process and from the moment when the cluster is ready.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.rows import ROOT

DETECTOR = 16
#: at least this many shards remain after the kill
LEFT = 96


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure once and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finished", type=int, default=4000, help="finished shards")
    parser.add_argument("--kind", choices=("threads", "local"), default="threads")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        command = prepare(Path(folder), options.finished + LEFT, options.kind)
        found = measure(command, Path(folder), options.finished)
    print(
        f"{found['finished']:,.0f} shards finished, {found['journal_bytes'] / 1e6:.1f} MB of journal: "
        f"new work {found['seconds']:.2f} s after the start, {found['after_cluster']:.2f} s after the cluster",
        flush=True,
    )
    return found


def prepare(folder: Path, n_blocks: int, kind: str) -> list[str]:
    """Write a scan with a bright square in each pattern; returns the command line."""
    side = math.ceil(math.sqrt(n_blocks))
    data = np.random.default_rng(0).poisson(3, (side, side, DETECTOR, DETECTOR)).astype(np.uint16)
    data[:, :, 5:9, 5:9] += 60
    np.save(folder / "scan.npy", data)
    return [
        sys.executable, "-m", "stem_dask.run", str(ROOT / "configs" / "crop.yaml"), f"input.path={folder}/scan.npy",
        f"output.path={folder}/out.zarr", "output.export=[]", "output.figure=false", f"cluster.kind={kind}",
        f"output.chunk_mb={data[0, 0].nbytes / 2**20 * 1.01}",
    ]  # fmt: skip


def measure(command: list[str], folder: Path, finished: int) -> dict[str, float]:
    """Run, kill, run again; kill again at the first new journal line."""
    journal, log = folder / "out.run" / "journal", folder / "log"

    def n_bytes() -> int:
        return journal.stat().st_size if journal.exists() else 0

    def n_crop() -> int:
        return journal.read_bytes().count(b'"job": "crop"') if journal.exists() else 0

    killed_when(command, log, lambda: n_crop() >= finished, every=0.05)
    before, known = n_bytes(), n_crop()
    begun = time.perf_counter()
    moments: list[float] = []

    def grown() -> bool:
        if not moments and b"dashboard" in log.read_bytes():
            moments.append(time.perf_counter())
        return n_bytes() > before + 1  # the first byte ends a torn line

    killed_when(command, log, grown, every=0.005)
    end = time.perf_counter()
    return {
        "finished": known,
        "journal_bytes": before,
        "seconds": end - begun,
        "after_cluster": end - (moments or [begun])[0],
    }


def killed_when(command: list[str], log: Path, holds: Callable[[], bool], every: float) -> None:
    """Run a command in a new process group and kill it when a condition holds."""
    with open(log, "wb") as file:
        run = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        while not holds():
            if run.poll() is not None:
                raise SystemExit(f"ended with exit code {run.returncode}:\n{log.read_text()}")
            time.sleep(every)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


if __name__ == "__main__":
    main()
