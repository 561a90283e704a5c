"""A scheduler of others that hangs with its connection open, and workers that join with other versions."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from distributed import Client, LocalCluster
from test_cluster_places import _processes

from stem_dask.core.errors import ConfigError, WorkerLostError
from stem_dask.engine import hearing, versions
from stem_dask.engine.clients import connected
from stem_dask.engine.hearing import listening, silence
from stem_dask.engine.submit import in_flight
from stem_dask.engine.versions import own_versions, refuse_task_of_others
from stem_dask.job.run import run as run_job


class Scheduler:
    """One that answers as it is told to, and the client that asks it."""

    def __init__(self, answers):
        self.answers, self.id, self.status, self.cluster = list(answers), "a", "running", None
        self.scheduler = SimpleNamespace(address="tcp://a:1", ncores=None)
        self.asked, self.closed = threading.Event(), threading.Event()

    def sync(self, function, workers, callback_timeout):
        answer = self.answers.pop(0) if self.answers else True
        if not self.answers:
            self.asked.set()
        if not answer:
            raise TimeoutError

    def close(self, timeout):
        self.status = "closed"
        self.closed.set()


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(hearing, "ASK_SECONDS", 0.02)
    monkeypatch.setattr(hearing, "TOLD_SECONDS", 0.0)


def test_silence_and_its_end_are_told(soon, caplog):
    client = Scheduler([True, False, False, True, True])
    with connected(client), connected(client):  # once
        assert client.asked.wait(10)
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("the scheduler at tcp://a:1 has not answered for 0 s; the run waits")
    assert told[1] == "the scheduler at tcp://a:1 answers again; the run goes on"
    assert len(told) == 2
    assert not client.closed.is_set()
    assert silence(client) == ""


def test_a_client_is_given_up_after_long_silence(soon, monkeypatch):
    monkeypatch.setattr(hearing, "LOST_SECONDS", 0.05)
    client = Scheduler([False] * 50)
    client.id = "given up"
    told = r"the scheduler at tcp://a:1 has not answered for 0\.05 s; start one with workers, and the same"

    def wait():
        assert client.closed.wait(10)
        raise OSError("the pool is closed")

    with pytest.raises(WorkerLostError, match=told), connected(client):
        wait()


def test_a_scheduler_in_this_process_is_not_asked(soon):
    options = {"processes": False, "n_workers": 0, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client, listening(client):
        assert client.id not in hearing._listening


def test_a_scheduler_that_hangs_in_the_middle(
    tmp_path, beam_file, make_config, monkeypatch, caplog
):
    """The run says so, waits, and ends; what is finished stays."""
    monkeypatch.setattr(hearing, "ASK_SECONDS", 0.2)
    monkeypatch.setattr(hearing, "TOLD_SECONDS", 0.3)
    monkeypatch.setattr(hearing, "LOST_SECONDS", 0.6)

    def stop_it(step):
        if step.stage == "crop" and step.done == 1:
            os.kill(scheduler.pid, signal.SIGSTOP)

    with _processes(tmp_path) as (file, scheduler):
        config = make_config(
            beam_file, output={"chunk_mb": 0.01}, cluster={"kind": "auto", "scheduler_file": file}
        )
        began = time.monotonic()
        try:
            with pytest.raises(WorkerLostError, match=r"has not answered for 0\.6 s") as lost:
                run_job(config, progress=stop_it)
        finally:
            os.kill(scheduler.pid, signal.SIGCONT)
    assert time.monotonic() - began < 30
    assert lost.value.exit_code == 5
    assert any("the run waits for it" in record.getMessage() for record in caplog.records)
    assert run_job(make_config(beam_file, output={"chunk_mb": 0.01})).exit_code == 0


# --- workers that join ------------------------------------------------------------------------------------------


def test_a_task_is_refused_by_a_worker_with_other_versions():
    other = ("3.11", "2026.7.1", "2026.7.1", "2.3", "0.0.9")
    refuse_task_of_others(own_versions())
    told = (
        r"that joined has .*stem_dask 0\.1\.0, the run has 0\.0\.9; stop it, and the same command"
    )
    with pytest.raises(ConfigError, match=told):
        refuse_task_of_others(other)
    with pytest.raises(ConfigError, match="has other versions"):
        refuse_task_of_others((*own_versions(), "one more"))


def test_what_is_compared_is_what_dask_tells_of_a_worker():
    options = {"processes": False, "n_workers": 1, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        told = client.get_versions(packages=["stem_dask"])["client"]["packages"]
    parts = versions.COMPARED
    assert own_versions() == tuple(versions._part(told[name], parts[name]) for name in parts)


def test_a_worker_that_joins_in_the_middle_does_not_compute(monkeypatch):
    """Neither where it can read its tasks, nor where it cannot."""
    options = {"processes": False, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(n_workers=1, **options) as cluster, Client(cluster) as client:
        monkeypatch.setattr("stem_dask.engine.submit.own_versions", lambda: ("3.10",))
        with pytest.raises(ConfigError, match=r"a worker on .* that joined has python"):
            list(in_flight(client, [(int, ("7",))]))
        monkeypatch.undo()

        def refused(client):
            raise ConfigError("worker tcp://a:1 has stem_dask missing")

        monkeypatch.setattr("stem_dask.engine.submit.refuse_other_versions", refused)
        with pytest.raises(ConfigError, match="stem_dask missing"):
            list(in_flight(client, [(int, ("x",))]))
        with pytest.raises(ConfigError, match="said by the task"):
            list(in_flight(client, [(_refuse, ())]))
        assert list(in_flight(client, [(int, ("7",))])) == [7]


def _refuse():
    raise ConfigError("said by the task")
