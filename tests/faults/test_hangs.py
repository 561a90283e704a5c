"""A worker that hangs: the work goes on elsewhere, and what it does when it wakes up counts no more."""

import os
import signal

import pytest
from harness import N_BLOCKS, Command, assert_identical, external_cluster, n_lines, workers

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten heartbeats of half a second are the least that dask takes for silence; it looks as often as this."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL", "5s")


def test_a_hung_worker(command: Command, reference: Command) -> None:
    """Stopped in the middle of the crop: killed by its nanny, replaced, no block is noted twice."""
    run = command.start()
    run.until(lambda: n_lines(command, "analyze") >= 4, "four analyzed rows")
    victim = workers(run.process.pid)[0]
    run.until(lambda: n_lines(command, "crop") >= 4, "four cropped rows")
    victim.send_signal(signal.SIGSTOP)
    assert n_lines(command, "crop") < N_BLOCKS, "too late to be a test"
    run.until(lambda: not victim.is_running(), "the end of the hung worker")
    assert run.wait() == 0, run.text
    assert run.gone() == []
    assert_identical(command, reference)


def test_a_hung_worker_that_wakes_up(command: Command, reference: Command) -> None:
    """On a cluster without nannies nobody kills it: it finishes its task when another worker has done it."""
    with external_cluster(command.folder) as pids:
        run = command.start(f"cluster.scheduler_file={command.folder}/scheduler.json", kind="auto")
        run.until(lambda: n_lines(command, "crop") >= 4, "four cropped rows")
        os.kill(pids[0], signal.SIGSTOP)
        known = n_lines(command, "crop")
        assert known < N_BLOCKS, "too late to be a test"
        run.until(lambda: n_lines(command, "crop") == N_BLOCKS, "all rows without it")
        os.kill(pids[0], signal.SIGCONT)
        assert run.wait() == 0, run.text
    assert run.gone() == []
    assert_identical(command, reference)


@pytest.mark.parametrize("moment", ["before", "in the middle"])
def test_a_stop_while_the_scheduler_hangs(moment, command, reference):
    """Its connection stays open, and nobody answers: the way out takes no longer than ever."""
    with external_cluster(command.folder) as pids:
        where = f"cluster.scheduler_file={command.folder}/scheduler.json"
        if moment == "before":
            os.kill(pids[-1], signal.SIGSTOP)
        run = command.start(where, kind="auto")
        if moment == "before":
            run.until(lambda: "input " in run.text, "the first words")
        else:
            run.until(lambda: n_lines(command, "crop") >= 4, "four cropped rows")
            os.kill(pids[-1], signal.SIGSTOP)
            assert n_lines(command, "crop") < N_BLOCKS, "too late to be a test"
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(10) == 75, run.text
        assert "Traceback" not in run.text
    assert run.gone() == []
    run = command.finish(kind="threads")
    assert run.code == 0, run.text
    assert ("resuming" in run.text) == (moment == "in the middle")
    assert_identical(command, reference)
