"""How workers on this machine are started, and what they hold before there is work."""

import gc
import signal
import subprocess
import sys
import threading

import pytest

from stem_dask.cluster import local as processes
from stem_dask.cluster.local import started


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


def told_by(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


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
