"""A worker of a killed run that wakes up while another run is at the output: it writes nothing into it."""

import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest
from harness import (
    N_BLOCKS,
    PATIENCE,
    POLL,
    Command,
    cleaned,
    external_cluster,
    n_lines,
    read,
    tree,
)

from stem_dask.readers.zarr_chunks import damaged_chunks

pytestmark = pytest.mark.faults

#: of the second run, so that a row of the first is a foreign one
OTHER = ("crop.margin_pixels=1", "output.export=[]")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten heartbeats of half a second are the least that dask takes for silence; it looks as often as this."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL", "5s")


def _is(status: str) -> Callable[[int], bool]:
    return lambda pid: psutil.Process(pid).status() == status


@pytest.mark.parametrize("moment", ["while it crops", "before it is published"])
def test_a_worker_of_the_run_before(moment, command, reference, config, tmp_path):
    """It was stopped within `write`; its client was killed, its scheduler lives, and the next run has other options."""
    fault = {"FAULT": "asleep c.10.0.0.0", "FAULT_MARK": str(tmp_path / "asleep")}
    stopped = _is(psutil.STATUS_STOPPED)
    where, log = f"cluster.scheduler_file={command.folder}/scheduler.json", tmp_path / "cluster.log"
    with external_cluster(command.folder, **fault) as pids:
        run = command.start(where, kind="auto")
        run.until(lambda: any(map(stopped, pids)), "a worker that stopped")
        (late,) = filter(stopped, pids)
        run.kill()
        assert n_lines(command, "crop") < N_BLOCKS, "too late to be a test"
        # the scheduler gives no work to it any more
        _until(lambda: b"Worker failed to heartbeat" in read(log))
        held = "held scan.zarr" if moment == "before it is published" else ""
        run = command.start("--restart", where, *OTHER, kind="auto", fault=held)
        if held:
            run.until(lambda: stopped(run.process.pid), "the end of its passes")
        else:
            run.until(lambda: n_lines(command, "crop") >= N_BLOCKS // 2, "half of the rows")
        os.kill(late, signal.SIGCONT)
        _until(lambda: not psutil.pid_exists(late) or psutil.Process(late).status() == "zombie")
        if held:
            os.kill(run.process.pid, signal.SIGCONT)
        assert run.wait() == 0, run.text
    right = Command(config, tmp_path / "right", command.forks, overrides=OTHER)
    right.folder.mkdir()
    with cleaned(right):
        assert right.finish(kind="threads").code == 0
    assert tree(command.store) == tree(right.store)
    shard = "patterns/c.10.0.0.0"
    assert tree(right.store)[shard] != tree(reference.store)[shard], "no test"
    assert list(damaged_chunks(str(command.store))) == []
    assert sorted(path.name for path in tmp_path.glob("scan*")) == [
        "scan.run",
        "scan.zarr",
        "scan_results.json",
    ]


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(POLL)
