"""Where the job runs: threads, processes, or a scheduler that is there already."""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import dask
import dask.array as da
import distributed
import psutil
import pytest
from distributed import Client, LocalCluster, default_client
from distributed.comm import connect as reach
from distributed.security import Security

from stem_dask.cluster import connect as cluster
from stem_dask.cluster import local
from stem_dask.cluster.connect import (
    KINDS,
    SMALL_INPUT_BYTES,
    Connection,
    connect,
    connection_of,
    layout,
    planned,
)
from stem_dask.cluster.local import started as start_cluster
from stem_dask.config.options import Cluster
from stem_dask.core.errors import ConfigError
from stem_dask.core.machine import ONE_THREAD
from stem_dask.core.model import Worker
from stem_dask.engine.clients import refuse_other_versions
from stem_dask.engine.submit import in_flight

usual_port = local.usual_port  # which the tests do without


@pytest.fixture
def outer():
    """An address under which others reach this machine."""
    for places in psutil.net_if_addrs().values():
        for place in places:
            if place.family == socket.AF_INET and not place.address.startswith("127."):
                return place.address
    return pytest.skip("this machine has only loopback")


@pytest.fixture
def started(monkeypatch):
    """Which kind would be started with which options; nothing is."""
    calls = []

    def start(options, *size):
        calls.append((options.kind, size[0], options.host, options.insecure))
        raise InterruptedError

    for name, kind in KINDS.items():
        monkeypatch.setitem(KINDS, name, kind._replace(start=start))
    return calls


# --- choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "input_bytes", "expected"),
    [
        ({}, 0, ("threads", 1, 8)), ({}, SMALL_INPUT_BYTES - 1, ("threads", 1, 8)), ({}, SMALL_INPUT_BYTES, ("local", 8, 1)),
        ({"kind": "threads", "threads_per_worker": 3}, 2**50, ("threads", 1, 3)), ({"kind": "local"}, 0, ("local", 8, 1)),
        ({"kind": "local", "threads_per_worker": 2}, 0, ("local", 4, 2)),
        ({"kind": "local", "threads_per_worker": 16}, 0, ("local", 1, 16)),
        ({"kind": "local", "n_workers": 2}, 0, ("local", 2, 4)), ({"kind": "local", "n_workers": 20}, 0, ("local", 20, 1)),
        ({"kind": "slurm"}, 0, ("slurm", 1, 1)),
        ({"kind": "slurm", "n_workers": 16, "threads_per_worker": 2}, 0, ("slurm", 16, 2)),
    ],
)  # fmt: skip
def test_kind_workers_and_threads(monkeypatch, options, input_bytes, expected):
    monkeypatch.setattr(cluster, "usable_cores", lambda: 8)
    assert layout(Cluster(**options), input_bytes, "cpu")[:3] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), (2**20, 2**20), ("500e6", 5 * 10**8)],
)
def test_memory_limit(text, expected):
    options = Cluster.model_construct(kind="slurm", memory_limit=text)
    assert planned(options, 0).limit == expected


def test_memory_limit_is_a_part_of_what_there_is():
    one, four = (layout(Cluster(kind="local", n_workers=n), 0, "cpu")[3] for n in (1, 4))
    assert 0 < four == pytest.approx(one / 4, abs=1)


NO_HOST = r"cluster\.host is '::1', .* needs kind: local or slurm, without"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "pbs"}, r"cluster\.kind is 'pbs'; expected auto, threads, local, slurm or gpu"),
        ({"kind": "threads", "n_workers": 2}, "threads is one worker, n_workers is 2; set threads_per"),
        ({"host": "::1"}, NO_HOST), ({"host": "::1", "kind": "threads"}, NO_HOST),
        ({"host": "::1", "kind": "local", "address": "tls://node1:8786"}, NO_HOST),
        ({"host": "::1", "kind": "local", "scheduler_file": "scheduler.json"}, NO_HOST),
        *(({"memory_limit": text}, f"memory_limit is {text!r}; expected at least 1 MB, as a number with its unit")
          for text in ("much", "4 bananas", "4", 4, "999kB")),
    ],
)  # fmt: skip
def test_what_cannot_be_started(started, options, told):
    with pytest.raises(ConfigError, match=told), connect(**options):
        pass
    assert started == []


def test_the_usual_port_or_any():
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # someone else has it: as good
            taken.bind(("127.0.0.1", 8787))
        assert usual_port() == 0


def test_what_a_run_says_of_its_place(monkeypatch):
    for name in ("SLURM_JOB_ID", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    connection = Connection(None, "local", 1, 1, "http://127.0.0.1:8787/status", Worker(None, 1))
    sized = Connection(None, "local", 2, 4, "", Worker(3 * 10**9, 2))
    assert str(sized) == "local: 2 workers with 3.00 GB, 4 threads"
    lines = [
        "cluster     local: 1 worker, 1 thread, device cpu",
        "dashboard   http://127.0.0.1:8787/status",
    ]
    assert connection.lines() == lines
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.7 50000 192.0.2.1 22")
    way = "            from your computer: ssh -N -L 8787:127.0.0.1:8787 ada@192.0.2.1"
    assert connection.lines() == [*lines, way]


# --- started ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["ours", "others"])
def test_few_of_the_last_messages_are_kept(whose):
    """Our blocks to be are in them: a thousand, Dask's own choice, made the client grow with their number."""
    with contextlib.ExitStack() as stack:
        options = {"kind": "threads", "threads_per_worker": 1}
        if whose == "others":
            there = stack.enter_context(
                LocalCluster(n_workers=1, processes=False, protocol="tcp", dashboard_address=":0")
            )
            options = {"address": there.scheduler_address}
        connection = stack.enter_context(connect(**options))
        for n in range(100):
            connection.client.submit(int, str(n), pure=False).result()
        kept = connection.client.scheduler_comm.recent_message_log
        assert 0 < len(kept) <= 20


def test_the_dashboard_is_loaded_when_a_browser_asks_for_it():
    script = """
import sys, urllib.request
from stem_dask import connect

with connect("threads", threads_per_worker=1) as connection:
    assert "bokeh" not in sys.modules
    for page in ("status", "", "individual-workers"):
        url = connection.dashboard.replace("status", page)
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert "bokeh" in answer.read().decode().lower(), url
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_run_in_this_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with connect("threads", threads_per_worker=3, memory_limit="2GB") as connection:
        assert (connection.kind, connection.n_workers, connection.n_threads) == ("threads", 1, 3)
        assert (connection.worker.limit, connection.worker.threads) == (2 * 10**9, 3)
        assert connection.client.submit(os.getpid).result() == os.getpid()
        assert connection.client.scheduler.address.startswith("inproc://")
        assert connection.dashboard.startswith("http://127.0.0.1:")
        assert dask.config.get("distributed.worker.memory.spill") is False
        client = connection.client
    assert client.status == "closed"
    assert list(tmp_path.iterdir()) == []


def test_processes(tmp_path, monkeypatch):
    """Two of them, on this machine only; others join by address or by file; nothing is left."""
    monkeypatch.chdir(tmp_path)
    for name in ONE_THREAD:  # the nanny leaves its settings in this process, too
        monkeypatch.setenv(name, "16")
    before = dask.config.get("distributed.worker.memory.terminate", None)
    with connect("local", n_workers=2, threads_per_worker=1, memory_limit="1GB") as connection:
        client = connection.client
        assert (connection.kind, connection.n_workers, connection.n_threads) == ("local", 2, 2)
        assert (connection.worker.limit, connection.worker.threads) == (10**9, 1)
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        assert all(worker.startswith("tls://127.0.0.1:") for worker in client.nthreads())
        assert "protection  TLS: only processes with the keys" in "\n".join(connection.lines())
        assert connection.dashboard.startswith("http://127.0.0.1:")
        _pages_are_on_loopback(client)
        pids = set(client.run(os.getpid).values())
        assert len(pids) == 2
        threads = client.run(lambda: [os.environ[name] for name in ONE_THREAD])
        assert list(threads.values()) == [["1"] * len(ONE_THREAD)] * 2
        assert os.getpid() not in pids
        folders = set(client.run(lambda dask_worker: dask_worker.local_directory).values())
        assert all(Path(folder).is_dir() for folder in folders)
        _nobody_else_gets_in(client)
        with dask.config.set(_settings_for(client.security)):
            _join_by_address_and_file(address, tmp_path, pids)
    assert not any(Path(folder).exists() for folder in folders)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert dask.config.get("distributed.worker.memory.terminate", None) == before
    assert list(tmp_path.iterdir()) == []


def _pages_are_on_loopback(client):
    def of_scheduler(dask_scheduler):
        return {s.getsockname()[0] for s in dask_scheduler.http_server._sockets.values()}

    def of_worker(dask_worker):
        return {s.getsockname()[0] for s in dask_worker.http_server._sockets.values()}

    assert client.run_on_scheduler(of_scheduler) == {"127.0.0.1"}
    assert list(client.run(of_worker).values()) == [{"127.0.0.1"}] * len(client.nthreads())


def _nobody_else_gets_in(client):
    """Scheduler, workers and nannies refuse clients without keys or with other keys."""
    said = client.scheduler_info(n_workers=-1)
    places = [said["address"], *said["workers"], *(w["nanny"] for w in said["workers"].values())]
    for keys in (Security(), Security.temporary()):
        for place in places:
            for tried in (place, place.replace("tls://", "tcp://")):
                with pytest.raises((OSError, TypeError, RuntimeError)):
                    client.sync(reach, tried, timeout=2, **keys.get_connection_args("client"))


def _settings_for(keys):
    return {
        "distributed.comm.tls.ca-file": keys.tls_ca_file,
        "distributed.comm.tls.client.cert": keys.tls_client_cert,
        "distributed.comm.tls.client.key": keys.tls_client_key,
    }


def _join_by_address_and_file(address, folder, pids):
    with connect("local", address=address) as joined:
        assert joined.kind == f"scheduler at {address}"
        assert (joined.n_workers, joined.n_threads) == (2, 2)
        assert joined.worker.limit == 10**9
        assert joined.client.submit(os.getpid).result() in pids
    file = folder / "scheduler.json"
    file.write_text(json.dumps({"type": "Scheduler", "address": address}))
    with connect(scheduler_file=str(file)) as joined:
        assert joined.kind == f"scheduler at {address}"
        assert joined.n_workers == 2
    file.unlink()


def test_leaving_does_not_stop_a_cluster_of_others(others):
    with connect(address=others.scheduler_address) as joined:
        assert joined.n_workers == 1
    assert others.status.name == "running"
    with connect(address=others.scheduler_address) as joined:
        assert joined.client.submit(int, "7").result() == 7


def test_missing_scheduler_file(tmp_path):
    path = str(tmp_path / "gone.json")
    with (
        pytest.raises(ConfigError, match=r"scheduler_file .*gone\.json does not exist; is the"),
        connect(scheduler_file=path),
    ):
        pass


@pytest.mark.parametrize("address", ["not an address at all", "xyz://127.0.0.1:1"])
def test_an_address_that_is_none(address):
    """A client that failed must not stay as the default: whatever is computed next would wait for it."""
    with pytest.raises(ConfigError, match=rf"{address} does not answer: .*check") as failed:  # noqa: SIM117
        with connect(address=address):
            pass
    assert failed.traceback  # keeps the failed client alive, as a debugger or a test runner does
    assert dask.config.get("scheduler", None) is None
    with pytest.raises(ValueError, match="No clients found"):
        default_client()
    assert int(da.ones(3, chunks=1).sum().compute()) == 3


# --- beyond loopback --------------------------------------------------------------------------------------------


def test_an_open_scheduler_is_not_even_asked(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(cluster, "knock", refuse)
    monkeypatch.setattr(distributed, "Client", refuse)
    address, file = "tcp://192.0.2.1:8786", tmp_path / "scheduler.json"
    file.write_text(json.dumps({"type": "Scheduler", "address": address}))
    for place in ({"address": address}, {"scheduler_file": str(file)}):
        with pytest.raises(ConfigError, match=f"{address}.* not on loopback"), connect(**place):
            pass
        with pytest.raises(AssertionError), connect(**place, insecure=True):
            pass


def test_processes_beyond_loopback_talk_by_tls(outer):
    """Nobody without the keys of this run gets in; who has them joins with Dask's own settings."""
    with connect("local", host=outer, n_workers=1, threads_per_worker=1) as connection:
        client = connection.client
        address = client.scheduler.address
        assert address.startswith(f"tls://{outer}:")
        assert all(worker.startswith(f"tls://{outer}:") for worker in client.nthreads())
        assert connection.kind == f"local at {address}"
        assert connection.dashboard.startswith("http://127.0.0.1:")
        _pages_are_on_loopback(client)
        assert int(da.ones(6, chunks=2).sum().compute()) == 6
        _nobody_else_gets_in(client)
        script = f"from distributed import Client; Client({address!r}, timeout=2)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 1
        assert "TLS expects a `ssl_context`" in done.stderr
        with pytest.raises(ConfigError, match=r"does not answer: .*comm\.tls"):  # noqa: SIM117
            with connect(address=address):
                pass
        with dask.config.set(_settings_for(client.security)), connect(address=address) as joined:
            assert joined.kind == f"scheduler at {address}"
            assert joined.client.submit(int, "7").result() == 7


def test_plain_text_beyond_loopback_is_asked_for_and_said(outer):
    with connect("local", host=outer, insecure=True, n_workers=1, threads_per_worker=1) as ours:
        address = ours.client.scheduler.address
        assert address.startswith(f"tcp://{outer}:")
        assert str(ours).startswith(f"local at {address} (not encrypted: any user who can reach")
        assert ours.dashboard.startswith("http://127.0.0.1:")
        with pytest.raises(ConfigError, match=f"{address}.* not on loopback"):  # noqa: SIM117
            with connect(address=address):
                pass
        with connect(address=address, insecure=True) as joined:
            assert str(joined).startswith(f"scheduler at {address} (not encrypted: any user who")


# --- of others -----------------------------------------------------------------------------------------------------


@pytest.fixture
def others():
    """A cluster that another process has started."""
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("python", "3.11.99.final.0", None),
        ("python", "3.10.2.final.0", r"python 3\.10, not 3\.\d+"),
        ("dask", "2020.1.0", r"dask 2020\.1\.0, not 20"), ("numpy", "1.2.3", r"numpy 1\.2, not \d"),
        ("stem_dask", "0.0.9", r"stem_dask 0\.0\.9, not 0\.1\.0"),
        ("stem_dask", None, r"stem_dask missing, not"), ("tornado", "1.0", None),
    ],
)  # fmt: skip
def test_versions_that_matter(others, monkeypatch, package, version, message):
    with Client(others) as client:
        found = client.get_versions(packages=["stem_dask"])
        found["client"]["packages"]["python"] = "3.11.2.final.0"
        for place in (found["scheduler"], *found["workers"].values()):
            place["packages"] = {**found["client"]["packages"], package: version}
        monkeypatch.setattr(Client, "get_versions", lambda self, packages: found)
        if message is None:
            refuse_other_versions(client)
            return
        with pytest.raises(ConfigError, match=f"the scheduler has {message}.*install the same"):
            connect(address=others.scheduler_address)
        found["scheduler"] = found["client"]
        with pytest.raises(ConfigError, match=f"worker inproc://.* has {message}"):
            connection_of(client)
        with pytest.raises(
            ConfigError, match=f"has {message}"
        ):  # and not the error that came of it
            list(in_flight(client, [(int, ("x",))]))


def test_a_client_of_others_is_taken_and_stays_open(others):
    with Client(others) as client:
        connection = connection_of(client)
        assert connection.client is client
        assert (connection.n_workers, connection.n_threads) == (1, 1)
        assert connection.kind == f"client at {client.scheduler.address}"
        assert client.submit(int, "7").result() == 7


# --- the start of processes, and what they hold before there is work ---------------------------------------------


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
            start_cluster(start, deaf=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert cluster.closed


@pytest.mark.usefixtures("without_collections")
def test_a_start_that_fails_or_takes_too_long(monkeypatch):
    monkeypatch.setattr(local, "START_SECONDS", 0.01)
    with pytest.raises(OSError, match="no port"):
        start_cluster(lambda: (_ for _ in ()).throw(OSError("no port")), deaf=False)
    end = threading.Event()

    def start():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        end.wait(10)

    with pytest.raises(KeyboardInterrupt):
        start_cluster(start, deaf=False)
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
    there = start_cluster(lambda: subprocess.run(line, capture_output=True, text=True, check=True))
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
