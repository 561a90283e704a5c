"""A real SLURM of one node: jobs with workers, templates, and an array whose task is stopped, requeued and goes on."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import slurm_node
from batches import content

from stem_dask import cli, run
from stem_dask.cluster import connect
from stem_dask.errors import ConfigError

TEMPLATES = Path(__file__).resolve().parents[1] / "configs" / "slurm"
PATIENCE = 200.0
N_BLOCKS = 24
pytestmark = pytest.mark.timeout(400)

#: Python imports this at its start. In the first run of the task TASK, after the shard of that number was written, the
#: command HOW is called for the job; the process then waits for what comes of it.
SITE = """
import os
if os.environ.get("SLURM_ARRAY_TASK_ID") == os.environ["TASK"] and "SLURM_RESTART_COUNT" not in os.environ:
    import subprocess, time
    plain, left = os.replace, [10]
    def rename(source, target, *args, **options):
        plain(source, target, *args, **options)
        left[0] -= "/patterns/c/" in str(target)
        if left[0] == 0:
            left[0] = -1
            subprocess.run([*os.environ["HOW"].split(), os.environ["SLURM_JOB_ID"]])
            time.sleep(60)
    os.replace = os.rename = rename
"""


@pytest.fixture(scope="module")
def daemons(tmp_path_factory):
    """The environment in which SLURM's commands find the daemons."""
    why = slurm_node.missing()
    if why:
        pytest.skip(why)
    folder = Path(tmp_path_factory.mktemp("slurm"))
    with slurm_node.slurm(folder) as environment:
        yield environment


@pytest.fixture
def folder(daemons, tmp_path, monkeypatch):
    """A working directory with two scans and a config for them, where SLURM's commands work; plain.zarr from threads."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, daemons[name])
    package = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    monkeypatch.chdir(tmp_path)
    data = np.random.default_rng(3).integers(0, 3, (N_BLOCKS, 3, 40, 36)).astype(np.uint16)
    data[:, :, 14:22, 12:20] += 50
    for name in ("a", "b"):
        np.save(f"{name}.npy", data)
    Path("job.yaml").write_text(
        "input: {path: '*.npy'}\n"
        "output: {path: 'out/{stem}.zarr', export: [pt], figure: false, chunk_mb: 0.008}\n"
        "cluster: {kind: threads, threads_per_worker: 1, walltime: '0:10:00'}\n"
    )
    assert run.main(["job.yaml", "input.path=a.npy", "output.path=plain.zarr", "--quiet"]) == 0
    return tmp_path


def same_as_plain(name):
    assert len(content("plain.zarr")) > N_BLOCKS
    assert content(f"{name}.zarr") == content("plain.zarr")
    assert Path(f"{name}.pt").read_bytes() == Path("plain.pt").read_bytes()


def said(*line):
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def until_done(*logs):
    """Wait until no job is left."""
    end = time.monotonic() + PATIENCE
    while said("squeue", "--noheader"):
        told = "\n".join(Path(log).read_text() for log in logs if Path(log).exists())
        assert time.monotonic() < end, said("squeue") + told
        time.sleep(0.5)


def about(job, what):
    return re.search(rf"\b{what}=(\S+)", said("scontrol", "show", "job", job)).group(1)


def array(monkeypatch, folder, how):
    """Submit the array of two tasks, in the first of which something happens after some blocks; gives its number."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", f"{folder}/site{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("TASK", "1")
    monkeypatch.setenv("HOW", how)
    words = ("--slurm", "--submit", "--cpus-per-task", "1", "--mem", "1500M")
    return cli.main(["batch", "job.yaml", *words])


def test_a_task_at_its_wall_time_is_requeued_and_goes_on(folder, monkeypatch, capsys):
    """SLURM sends its signal as it does before the wall time; what comes out is what an undisturbed run writes."""
    assert array(monkeypatch, folder, "scancel --batch --signal=TERM") == 0
    number = re.search(r"Submitted batch job (\d+)", capsys.readouterr().out).group(1)
    logs = [f"stem-dask-batch-{number}_{task}.log" for task in (1, 2)]
    until_done(*logs)
    first, second = (Path(log).read_text() for log in logs)
    assert "asked to stop; the same command goes on where this one ended" in first
    assert "resuming " in first
    assert "asked to stop" not in second
    assert "memory 1." not in first  # a part of what SLURM gave, not of the machine
    assert [about(f"{number}_{task}", "Restarts") for task in (1, 2)] == ["1", "0"]
    assert [about(f"{number}_{task}", "JobState") for task in (1, 2)] == ["COMPLETED"] * 2
    for name in ("a", "b"):
        same_as_plain(f"out/{name}")


def test_a_task_that_is_cancelled_stays_away(folder, monkeypatch, capsys):
    assert array(monkeypatch, folder, "scancel") == 0
    number = re.search(r"Submitted batch job (\d+)", capsys.readouterr().out).group(1)
    until_done()
    assert about(f"{number}_1", "JobState") == "CANCELLED"
    assert about(f"{number}_1", "Restarts") == "0"
    assert not Path("out/a.zarr").exists()
    same_as_plain("out/b")
    words = ["job.yaml", "input.path=a.npy", "output.path=out/a.zarr"]
    assert run.main([*words, "--quiet"]) == 0  # by hand it goes on
    same_as_plain("out/a")


@pytest.mark.parametrize("name", ["one_node", "many_nodes"])
def test_the_templates(folder, monkeypatch, name):
    if name == "many_nodes":
        pytest.importorskip("cryptography", reason="keys for TLS need the package cryptography")
    Path(".venv").symlink_to(sys.prefix)
    (folder / "home").mkdir()
    monkeypatch.setenv("HOME", str(folder / "home"))
    asked = ("--nodes=1", "--cpus-per-task=2", "--mem=2500M", "--time=10", "--output=log")
    words = (
        "job.yaml",
        "input.path=a.npy",
        "output.path=one.zarr",
        "cluster.threads_per_worker=null",
    )
    said("sbatch", *asked, str(TEMPLATES / f"{name}.sh"), *words)
    until_done("log")
    log = Path("log").read_text()
    assert "verdict     ok" in log, log
    kind = "local: 2 workers" if name == "one_node" else "scheduler at tls://"
    assert f"cluster     {kind}" in log
    same_as_plain("one")
    assert list((folder / "home").glob(".stem_dask*")) == []


def workers(folder, **options):
    """Jobs with workers that a run asks for."""
    return connect(
        "slurm", host="127.0.0.1", walltime="0:10:00", memory_limit="800MB", log_directory=str(folder / "jobs"), **options
    )  # fmt: skip


def test_a_run_asks_for_its_jobs(folder, capsys):
    pytest.importorskip("dask_jobqueue", reason="kind: slurm needs the extra hpc")
    options = [
        "memory_limit=800MB",
        "n_workers=2",
        "threads_per_worker=1",
        "host=127.0.0.1",
        f"log_directory={folder}/jobs",
    ]
    overrides = [f"cluster.{option}" for option in options]
    words = ["job.yaml", "input.path=a.npy", "output.path=one.zarr", "--cluster", "slurm"]
    assert run.main([*words, *overrides]) == 0
    out = capsys.readouterr().out
    assert re.search(r"waiting for one of SLURM's jobs \d+ \(squeue --me\)", out)
    assert re.search(
        r"cluster     slurm at tcp://127\.0\.0\.1:\d+: 2 workers with 0\.80 GB, 2 threads", out
    )
    same_as_plain("one")
    until_done()


def test_a_job_that_hands_over_is_replaced(folder, monkeypatch):
    """Two workers in a job, which leave after some seconds; another job brings two others, and the work goes on."""
    pytest.importorskip("dask_jobqueue", reason="kind: slurm needs the extra hpc")
    monkeypatch.setattr("stem_dask.slurm.lifetime", lambda walltime: (6, 0))
    monkeypatch.setattr("stem_dask.slurm.GONE_SECONDS", 0.5)
    with workers(folder, n_workers=2) as connection:
        client = connection.client
        assert client.run(lambda dask_worker: dask_worker.memory_manager.memory_spill_fraction)
        jobs = set()
        end = time.monotonic() + PATIENCE
        while len(jobs) < 2:
            assert time.monotonic() < end
            jobs.add(client.submit(os.environ.get, "SLURM_JOB_ID", pure=False).result())
            time.sleep(0.2)
        assert int(client.submit(int, "7", pure=False).result()) == 7
    until_done()
    assert list((folder / "jobs").glob("keys-*")) == []


def test_jobs_that_slurm_does_not_take(folder):
    pytest.importorskip("dask_jobqueue", reason="kind: slurm needs the extra hpc")
    with (
        pytest.raises(ConfigError, match=r"SLURM did not take the jobs: .*invalid partition"),
        workers(folder, queue="nowhere"),
    ):
        pass


def test_jobs_that_end_at_once(folder, monkeypatch):
    pytest.importorskip("dask_jobqueue", reason="kind: slurm needs the extra hpc")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with (
        pytest.raises(ConfigError, match=r"ended before a worker came: .*/no/such/python.*log_dir"),
        workers(folder),
    ):
        pass
