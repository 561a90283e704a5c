"""How workers on this machine are started, and what they hold before there is work."""

import gc
import signal
import subprocess
import sys
import threading

import dask
import pytest

from stem_dask.cluster import local as processes
from stem_dask.cluster.layout import SMALL_INPUT_BYTES, begin, planned
from stem_dask.cluster.local import METHOD, copied_from_one, loaded_bytes, started
from stem_dask.config.options import Cluster
from stem_dask.core.model import COPY_BYTES, PROCESS_BYTES, WORKER_BYTES


@pytest.fixture
def without_collections():
    """An interrupt that comes within a callback of the garbage collector, as Hypothesis has one, is dropped by Python."""
    gc.disable()
    yield
    gc.enable()


class Half:
    """A cluster that says when it is closed."""

    closed = False

    def close(self):
        self.closed = True


@pytest.mark.usefixtures("without_collections")
def test_an_interrupt_waits_until_what_was_begun_can_be_closed():
    cluster, goes_on = Half(), threading.Event()

    def start():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert goes_on.wait(10)
        return cluster

    def heard(number, frame):
        goes_on.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, heard)
    try:
        with pytest.raises(KeyboardInterrupt):
            started(start, deaf=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert cluster.closed


@pytest.mark.usefixtures("without_collections")
def test_a_start_that_fails_or_takes_too_long(monkeypatch):
    monkeypatch.setattr(processes, "START_SECONDS", 0.01)
    with pytest.raises(OSError, match="no port"):
        started(lambda: (_ for _ in ()).throw(OSError("no port")), deaf=False)
    end = threading.Event()

    def start():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        end.wait(10)

    with pytest.raises(KeyboardInterrupt):
        started(start, deaf=False)
    end.set()


@pytest.mark.parametrize(
    "work",
    [
        "stem_dask.connect('local', n_workers=1).__enter__()",
        "stem_dask.run_config(stem_dask.load_config('crop.yaml'))",
    ],
)
def test_a_script_that_its_workers_would_run_again(tmp_path, beam_file, work):
    """It would start workers of workers, without end; users of notebooks have never seen that line of Python's."""
    (tmp_path / "crop.yaml").write_text(
        f"{{input: {{path: {beam_file}}}, output: {{path: out.zarr}}, cluster: {{kind: local, n_workers: 1}}}}"
    )
    script = tmp_path / "script.py"
    script.write_text(f"import stem_dask\n\n{work}\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    told = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    assert done.returncode == 1
    assert told[-1].startswith(
        "stem_dask.core.errors.ConfigError: a worker process ended while it started"
    )
    assert 'if __name__ == "__main__":' in told[-1]
    assert "semaphore" not in done.stderr


def test_what_is_started_does_not_hear_an_interrupt():
    code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    line = [sys.executable, "-c", code]
    there = started(lambda: subprocess.run(line, capture_output=True, text=True, check=True))
    assert "SIGINT" in there.stdout
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        ("threads", None, PROCESS_BYTES),
        ("local", None, COPY_BYTES),
        ("local at tls://a:1", "forkserver", COPY_BYTES),
        ("local", "spawn", WORKER_BYTES),
        ("local", "fork", WORKER_BYTES),
        ("slurm", None, WORKER_BYTES),
        ("scheduler", None, WORKER_BYTES),
    ],
)
def test_what_a_worker_holds_goes_by_how_it_was_started(monkeypatch, kind, asked, expected):
    """Also where a user asks for what is Dask's default."""
    monkeypatch.setattr(sys, "platform", "linux")
    name = "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD"
    if asked is not None:
        monkeypatch.setenv(name, asked)
    assert loaded_bytes(kind) == expected
    if kind == "local":
        assert planned(Cluster(kind=kind), 0).loaded == expected
        assert bool(copied_from_one()) == (expected == COPY_BYTES)
    if asked is None and kind == "local":
        with dask.config.set({METHOD: "fork"}):
            assert loaded_bytes(kind) == WORKER_BYTES
        monkeypatch.setattr(sys, "platform", "darwin")
        assert loaded_bytes(kind) == WORKER_BYTES


def told_by(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_what_copies_are_made_of_has_the_environment_of_a_worker():
    """A user's own values, in the environment or in Dask's settings, stay, but for threads of libraries; the run's process
    has its own environment again.
    """
    code = """
import os, signal, dask
from stem_dask.cluster.local import begin_copies
os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)
os.environ.update(MKL_NUM_THREADS="7", THEIRS="a")
mine = {"MALLOC_TRIM_THRESHOLD_": 1234, "THEIRS": "b", "MINE": "c", "NONE": None}
with dask.config.set({"distributed.nanny.pre-spawn-environ": mine}):
    before = dict(os.environ)
    begin_copies()
    assert dict(os.environ) == before
assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
from multiprocessing import forkserver
pid = forkserver._forkserver._forkserver_pid
with open(f"/proc/{pid}/environ") as file:
    there = dict(text.split("=", 1) for text in file.read().split(chr(0)) if text)
with open(f"/proc/{pid}/status") as file:
    blocked = next(int(line.split()[1], 16) for line in file if line.startswith("SigBlk"))
names = "MALLOC_TRIM_THRESHOLD_", "THEIRS", "MINE", "NONE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"
print(*(there.get(name) for name in names), bool(blocked >> (signal.SIGINT - 1) & 1))
"""
    assert told_by(code) == ["1234", "a", "c", "None", "1", "1", "True"]


def test_copies_are_begun_for_processes_of_ours_only(monkeypatch):
    begun = []
    monkeypatch.setattr("stem_dask.cluster.layout.begin_copies", lambda: begun.append(1))
    for options in (
        {"kind": "threads"},
        {"address": "tls://a:1"},
        {"scheduler_file": "a.json"},
        {},
    ):
        begin(Cluster(**options), 0)
    begin(Cluster(), SMALL_INPUT_BYTES, "gpu")
    assert begun == []
    begin(Cluster(), SMALL_INPUT_BYTES)
    begin(Cluster(kind="local"), 0)
    assert begun == [1, 1]


def test_garbage_is_collected_again_when_all_is_loaded():
    """And what was loaded in between is passed over."""
    code = """
import gc
from stem_dask.core.machine import exempt_from_collection, postpone_collection
before = gc.get_threshold()
postpone_collection()
assert gc.get_threshold()[0] > 100 * before[0]
exempt_from_collection()
print(gc.get_threshold() == before, gc.get_freeze_count() > 1000)
"""
    assert told_by(code) == ["True", "True"]


def test_dask_is_loaded_without_scipy_which_is_there_all_the_same():
    code = """
import sys
from stem_dask.core.machine import load_dask_array
load_dask_array()
print("dask.array" in sys.modules, "scipy" in sys.modules)
import numpy as np
from scipy import fft, ndimage
import dask.array as da
print(round(float(ndimage.gaussian_filter(np.ones((4, 4)), 1).sum())), int(da.ones((4, 4)).sum().compute()))
"""
    assert told_by(code) == ["True", "False", "16", "16"]
