"""Where a job runs by the command line: --cluster, jobs of SLURM that cannot be, and processes that others started."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import dask
import numpy as np
import pytest
import slurm_node
from batches import content
from distributed import Client, LocalCluster
from distributed.core import Status

from stem_dask.cli import run
from stem_dask.cluster import connect as cluster
from stem_dask.cluster.connect import connect
from stem_dask.config.load import load_config
from stem_dask.core.errors import ConfigError, SourceError, StoreError, WorkerLostError
from stem_dask.engine.clients import connected, see, unseen
from stem_dask.job.run import run as run_job


@pytest.mark.parametrize(
    ("where", "kind", "address", "file", "host"),
    [
        ("threads", "threads", None, None, None), ("local", "local", None, None, "10.0.0.5"),
        ("slurm", "slurm", None, None, "10.0.0.5"),
        ("tls://node1:8786", "auto", "tls://node1:8786", None, None), ("s.json", "auto", None, "s.json", None),
        ("jobs/scheduler", "auto", None, "jobs/scheduler", None),
    ],
)  # fmt: skip
def test_cluster_on_the_command_line(tmp_path, where, kind, address, file, host):
    """It takes the place of what the config says; sizes and what SLURM is asked for stay."""
    config = tmp_path / "a.yaml"
    config.write_text(
        "input: {path: a.npy}\noutput: {path: a.zarr}\ncluster: {kind: local, host: 10.0.0.5, n_workers: 3, "
        "walltime: '1:00:00', memory_limit: 2GB, queue: long}\n"
    )
    options = load_config(config, run.where(where)).cluster
    assert (options.kind, options.address, options.host) == (kind, address, host)
    assert options.scheduler_file == (file and os.path.abspath(file))
    assert (options.n_workers, options.walltime, options.queue) == (3, "1:00:00", "long")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pbs"], "override cluster.kind=pbs: cluster.kind is pbs; expected auto, threads, local, slurm or gpu"),
        (["node1:8786"], "--cluster is node1:8786; expected tls://node1:8786, or tcp://node1:8786"),
        (["local", "cluster.kind=threads"], "--cluster local and cluster.kind=threads are two places; leave one out"),
        (["local", "cluster.address=tcp://127.0.0.1:1"],
         "--cluster local and cluster.address=tcp://127.0.0.1:1 are two places; leave one out"),
    ],
)  # fmt: skip
def test_a_place_that_is_none(tmp_path, capsys, words, told):
    config = tmp_path / "a.yaml"
    config.write_text("input: {path: a.npy}\noutput: {path: a.zarr}\n")
    assert run.main([str(config), "--cluster", *words]) == 2
    assert capsys.readouterr().err == f"error: {told}\n"
    assert run.where("local", ["cluster.kind=local", "output.path=b"]) == run.where("local")


ASKED = {"walltime": "1:00:00", "memory_limit": "1GB"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"walltime": None}, r"cluster\.walltime is missing; cluster\.kind: slurm asks"),
        ({"memory_limit": None}, r"cluster\.memory_limit is missing"),
        ({"walltime": "soon"}, r"walltime is 'soon'; expected hours:min"),
        ({"jobs": 0}, "cluster.jobs is 0; expected"),
        ({"jobs": (3, 2)}, "number above 0, or"),
        ({"log_directory": "/tmp/my logs"}, r"log_directory is '/tmp/my logs'; expected .*without a space"),
        ({"log_directory": "/dev/null/jobs"}, r"is '/dev/null/jobs', which cannot be made: Not a directory; expected"),
        ({}, r"needs the package dask-jobqueue; .*stem_dask\[hpc\]"),
    ],
)  # fmt: skip
def test_jobs_that_cannot_be_asked_for(tmp_path, monkeypatch, options, told):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    options = {"log_directory": str(tmp_path / "jobs"), **ASKED, **options}
    with pytest.raises(ConfigError, match=told), connect("slurm", host="127.0.0.1", **options):
        pass


def test_a_machine_without_slurm_is_told_in_one_line(tmp_path, beam_file):
    """In a process of its own: what is left behind would be told at its end."""
    slurm_node.need_jobqueue()
    config = tmp_path / "a.yaml"
    config.write_text(
        f"input: {{path: {beam_file}}}\noutput: {{path: {tmp_path}/a.zarr}}\ncluster: {{walltime: '1:00:00', "
        f"memory_limit: 1GB, log_directory: {tmp_path}/jobs, jobs: [1, 16]}}\n"
    )
    line = [sys.executable, "-m", "stem_dask.run", str(config), "--cluster", "slurm", "--quiet"]
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(Path(cluster.__file__).parents[2])}  # fmt: skip
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no job can be submitted: ")
    assert len(done.stderr.splitlines()) == 1
    assert list((tmp_path / "jobs").iterdir()) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (  # it has Ctrl-C end the process as if all were well
            "import signal; before = signal.getsignal(signal.SIGINT); _slurm_cluster(); "
            "print(signal.getsignal(signal.SIGINT) is before)",
            "True\n",
        ),
        (
            "from concurrent.futures import ThreadPoolExecutor as Pool; print(Pool(1).submit(_slurm_cluster).exception())",
            "cluster.kind is slurm, and dask-jobqueue cannot be loaded in this thread: signal only works in main thread of "
            "the main interpreter; import dask_jobqueue in the main thread first\n",
        ),
    ],
)
def test_what_dask_jobqueue_does_to_signals(code, expected):
    slurm_node.need_jobqueue()
    line = [sys.executable, "-c", f"from stem_dask.cluster.slurm import _slurm_cluster; {code}"]
    assert subprocess.run(line, capture_output=True, text=True, check=False).stdout == expected


@contextlib.contextmanager
def _processes(folder, n_workers=2):
    """A scheduler and workers as anybody starts them; gives the file that the scheduler writes, and the process of that."""
    file = str(folder / "scheduler.json")
    dask_command = [sys.executable, "-m", "dask"]
    quiet = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    lines = [["scheduler", *quiet], *[["worker", "--nthreads", "1", "--no-dashboard"]] * n_workers]
    environment = {**os.environ, "PYTHONPATH": str(Path(cluster.__file__).parents[2])}
    started = []
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "cluster.log", "wb"))
        for line in lines:
            process = subprocess.Popen(
                [*dask_command, *line, "--scheduler-file", file], stdout=log, stderr=log, env=environment, cwd=folder
            )  # fmt: skip
            started.append(process)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        end = time.monotonic() + 60
        while (folder / "cluster.log").read_bytes().count(b"Registered to") < n_workers:
            assert time.monotonic() < end, (folder / "cluster.log").read_text()
            time.sleep(0.1)
        while not os.path.exists(file):
            assert time.monotonic() < end, (folder / "cluster.log").read_text()
            time.sleep(0.1)
        yield file, started[0]


def test_processes_joined_by_a_file_write_what_threads_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = np.random.default_rng(4).integers(0, 9, (12, 5, 40, 36)).astype(np.uint16)
    data[:, :, 12:24, 10:22] += 5000
    np.save("a.npy", data)
    Path("a.yaml").write_text(
        "input: {path: a.npy}\noutput: {path: a.zarr, export: [pt, hspy], figure: false, chunk_mb: 0.02}\n"
    )
    stores = []
    with _processes(tmp_path) as (file, _):
        for where in ("threads", file):
            words = ["a.yaml", f"output.path={len(stores)}/a.zarr", "--cluster", where, "--quiet"]
            assert run.main(words) == 0
            stores.append(Path(str(len(stores))))
    threads, joined = (content(f"{store}/a.zarr") for store in stores)
    assert len(threads) > 12
    assert joined == threads
    for name in ("a.pt", "a.hspy"):
        assert (stores[1] / name).read_bytes() == (stores[0] / name).read_bytes()


def test_a_scheduler_that_ends_says_so_and_the_run_goes_on(tmp_path, beam_file, make_config):
    """On another one, and to the same bytes."""

    def end_it(step):
        if step.stage == "crop" and step.done == 1:
            scheduler.kill()
            scheduler.wait()

    output = {"chunk_mb": 0.01}
    plain = make_config(beam_file, name="plain.zarr", output=output)
    assert run_job(plain).exit_code == 0
    with _processes(tmp_path) as (file, scheduler):
        config = make_config(
            beam_file, output=output, cluster={"kind": "auto", "scheduler_file": file}
        )
        # distributed tries for so long to connect again
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
            pytest.raises(
                WorkerLostError, match=r"at tcp://127\.0\.0\.1:\d+ has ended or cannot"
            ) as lost,
        ):
            run_job(config, progress=end_it)
    assert lost.value.exit_code == 5
    assert not Path(config.output.path).exists()
    assert run_job(make_config(beam_file, output=output)).exit_code == 0
    assert content(config.output.path) == content(plain.output.path)


@pytest.mark.parametrize("code", ["connection lost", "connection closed"])
def test_what_a_lost_scheduler_leads_to(code):
    """Dask cancels what was submitted; what comes later finds the client closed."""

    class Client:
        id, cluster = "lost", None
        status = "running" if code == "connection lost" else "closed"
        scheduler = SimpleNamespace(address="tcp://a:1")

    errors = {"connection lost": CancelledError(), "connection closed": OSError("pool closing")}
    with pytest.raises(WorkerLostError, match="at tcp://a:1 has ended"), connected(Client()):
        raise errors[code]
    with pytest.raises(ConfigError, match="ours"), connected(Client()):
        raise ConfigError("ours")
    with pytest.raises(ValueError, match="of a thread"), connected(None):
        raise ValueError("of a thread")
    Client.scheduler = None
    with pytest.raises(WorkerLostError, match="the scheduler has ended"), connected(Client()):
        raise errors[code]


def test_a_scheduler_without_workers_is_waited_for_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "WORKERS_SECONDS", 0.2)
    said = []
    with (
        _processes(tmp_path, n_workers=0) as (file, _),
        pytest.raises(ConfigError, match=r"has no worker after 0\.2 s; start some \(dask worker"),
        connect(scheduler_file=file, say=said.append),
    ):
        pass
    assert len(said) == 1
    assert said[0].startswith("cluster     waiting for a worker of tcp://127.0.0.1:")


def test_workers_whose_memory_is_full_are_called_so(monkeypatch):
    monkeypatch.setattr(cluster, "WORKERS_SECONDS", 0.2)
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False}
    with (
        LocalCluster(**options, memory_limit=50_000_000, dashboard_address=":0") as small,
        Client(small) as client,
    ):
        client.run(lambda dask_worker: setattr(dask_worker, "status", Status.paused))
        told = r"takes tasks after 0\.2 s: their memory is full, of 50 MB at least; start some with more"
        with pytest.raises(ConfigError, match=told):
            cluster.connection_of(client)


def test_the_file_of_a_scheduler_that_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.2)
    file = tmp_path / "scheduler.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # nobody listens there
        file.write_text(json.dumps({"address": f"tcp://127.0.0.1:{probe.getsockname()[1]}"}))
        with (
            pytest.raises(ConfigError, match=r"scheduler\.json does not answer: .*has ended since"),
            connect(scheduler_file=str(file)),
        ):
            pass


def test_folders_that_other_machines_do_not_see(monkeypatch):
    """Each has a /tmp of its own; a shared one may show what is new a little later."""
    monkeypatch.setattr("stem_dask.engine.clients.SEEN_SECONDS", (0.0, 0.0))
    answers = [("node7", "/tmp/a.run"), None, OSError("a worker that is starting again"), None]

    class Client:
        def run(self, function, paths, on_error):
            assert (function, paths, on_error) == (unseen, ("/data/a.dm4", "/tmp/a.run"), "ignore")
            return {"tcp://a:1": None, "tcp://b:1": answers.pop(0)}

    places = {"/data/a.dm4": SourceError, "/tmp/a.run": StoreError}
    see(None, places)
    see(Client(), places)
    assert len(answers) == 2  # looked twice
    see(Client(), places)
    answers[:] = [("node7", "/tmp/a.run")] * 3
    with pytest.raises(StoreError, match=r"on node7 does not see /tmp/a\.run; .* all machines"):
        see(Client(), places)
    many = {n: (f"node{n}", "/data/a.dm4") for n in (9, 7, 3, 5, 7)} | {0: ("a", "/tmp/a.run")}
    monkeypatch.setattr(Client, "run", lambda *args, **options: many)
    told = r"workers on node3, node5, node7 and 1 more do not see /data/a\.dm4; "
    with pytest.raises(SourceError, match=told):
        see(Client(), places)


def _unseen(paths):
    """What a worker with a disk of its own answers."""
    assert os.path.exists(paths[0])
    return "node7", paths[0]


def test_an_export_that_workers_do_not_see(tmp_path, monkeypatch):
    """Of the input that the patterns name, or into a folder: told before anything is written."""
    import stem_dask as sd

    monkeypatch.setattr("stem_dask.engine.clients.SEEN_SECONDS", (0.0,))
    monkeypatch.setattr("stem_dask.engine.clients.unseen", _unseen)
    np.save(tmp_path / "a.npy", np.ones((2, 3, 8, 8), "u2"))
    patterns = sd.downsample(sd.open(tmp_path / "a.npy"), 2)
    out = tmp_path / "new" / "a.zarr"
    with connect("threads", threads_per_worker=1) as connection:
        told = rf"a worker on node7 does not see {tmp_path}/a\.npy; .*folders that all machines"
        with pytest.raises(SourceError, match=told):
            sd.export(patterns, out, client=connection.client)
        in_memory = np.ones((2, 3, 8, 8), "u2")
        with pytest.raises(StoreError, match=rf"on node7 does not see {tmp_path}; "):
            sd.export(in_memory, out, client=connection.client)
        assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
        monkeypatch.undo()
        sd.export(in_memory, out, client=connection.client)
    assert [path.name for path in out.parent.iterdir()] == ["a.zarr"]


def test_who_may_be_on_another_machine_is_asked(beam_file, make_config, monkeypatch):
    asked = []
    monkeypatch.setattr("stem_dask.job.passes.see", lambda client, places: asked.append([*places]))
    config = make_config(beam_file)
    with connect("threads", threads_per_worker=1) as connection:
        run_job(config, connection=connection)
        assert asked == []
        run_job(make_config(beam_file, name="b.zarr"), connection=connection.client)
    assert asked == [[str(beam_file), config.output.path.replace("out.zarr", "b.run")]]


def test_what_is_no_client_that_waits(tmp_path, beam_file, make_config):
    """A cluster, an address, and a client of a program with a loop of its own: it was an AttributeError, or a TypeError."""
    import stem_dask as sd

    config, out = make_config(beam_file), tmp_path / "out.h5"

    def refused(client, told):
        with pytest.raises(ConfigError, match=told):
            run_job(config, connection=client)
        with pytest.raises(ConfigError, match=told):
            sd.export(sd.open(beam_file), out, client=client)

    refused(
        "tls://node1:8786",
        r"^the client is a str; expected a distributed\.Client, such as Client\(cl",
    )

    async def program():
        options = {"n_workers": 1, "processes": False, "dashboard_address": ":0"}
        async with (
            LocalCluster(asynchronous=True, **options) as there,
            Client(there, asynchronous=True) as client,
        ):
            refused(there, "^the client is a LocalCluster; expected")
            refused(client, r"^the client of inproc://\S+ is asynchronous, .*asyncio\.to_thread$")
            with pytest.raises(ConfigError, match="is asynchronous"):
                sd.export(sd.open(beam_file), out)  # the active one

    asyncio.run(program())
    assert [path.name for path in tmp_path.iterdir()] == [beam_file.name]


def test_a_client_that_was_closed(beam_file, make_config):
    with connect("threads", threads_per_worker=1) as connection:
        client = connection.client
    with pytest.raises(WorkerLostError, match="the scheduler has ended"):
        run_job(make_config(beam_file), connection=client)


def test_a_job_on_anybodys_client_or_on_a_shared_connection(beam_file, make_config):
    import stem_dask as sd

    configs = [make_config(beam_file, name=f"{name}.zarr") for name in "abc"]
    assert sd.run_config(configs[0]).exit_code == 0
    with sd.connect("threads", threads_per_worker=2) as connection:
        assert sd.run_config(configs[1], connection=connection).exit_code == 0
        assert sd.run_config(configs[2], connection=connection.client).exit_code == 0
        assert connection.client.submit(int, "7").result() == 7
    first, *others = (content(config.output.path) for config in configs)
    assert others == [first, first]
