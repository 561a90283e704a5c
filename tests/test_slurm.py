"""A real SLURM of one node: jobs with workers, templates, and an array whose task is stopped, requeued and goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import numpy as np
import pytest
import slurm_node
from batches import content

from stem_dask.cli import main as cli
from stem_dask.cli import run
from stem_dask.cluster.connect import connect
from stem_dask.cluster.local import SETTINGS
from stem_dask.config.load import load_config
from stem_dask.core.errors import ConfigError
from stem_dask.job.run import run as run_job
from stem_dask.kernels.gpu.device import missing_gpu

TEMPLATES = Path(__file__).resolve().parents[1] / "configs" / "slurm"
PATIENCE = 90.0
N_BLOCKS = 24
#: what a run asks of the one node
SMALL = ("memory_limit=800MB", "n_workers=2", "threads_per_worker=1", "host=127.0.0.1")
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

#: Python imports this at its start. In the first run of a task, after the tenth shard was written, the command that is
#: named for the task is called for its job, and the process waits for what comes of it.
SITE = """
import os
how = os.environ.get("HOW" + os.environ.get("SLURM_ARRAY_TASK_ID", ""))
if how and "SLURM_RESTART_COUNT" not in os.environ:
    import subprocess, time
    plain, left = os.replace, [10]
    def rename(source, target, *args, **options):
        plain(source, target, *args, **options)
        left[0] -= "/patterns/c." in str(target)
        if left[0] == 0:
            left[0] = -1
            task = "_".join(os.environ["SLURM_ARRAY_" + name] for name in ("JOB_ID", "TASK_ID"))
            subprocess.run([*how.split(), task])
            time.sleep(60)
    os.replace = os.rename = rename
"""


#: the same, for workers that write no shard before there are enough of them
SLOW = """
import os, time
plain, end = os.replace, time.monotonic() + 60
def rename(source, target, *args, **options):
    while "/patterns/c." in str(target) and not os.path.exists("enough") and time.monotonic() < end:
        time.sleep(0.05)
    plain(source, target, *args, **options)
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with two scans, a config for them, and what a run on threads makes of one."""
    folder = Path(tmp_path_factory.mktemp("plain"))
    data = np.random.default_rng(3).integers(0, 3, (N_BLOCKS, 3, 40, 36)).astype(np.uint16)
    data[:, :, 14:22, 12:20] += 5000
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", data)
    (folder / "job.yaml").write_text(
        f"input: {{path: '{folder}/*.npy'}}\n"
        "output: {path: 'out/{stem}.zarr', export: [], figure: false, chunk_mb: 0.009}\n"
        "cluster: {kind: threads, threads_per_worker: 1, walltime: '0:10:00'}\n"
    )
    words = [f"input.path={folder}/a.npy", f"output.path={folder}/out/a.zarr", "--quiet"]
    assert run.main([str(folder / "job.yaml"), *words]) == 0
    return folder


@pytest.fixture
def folder(daemons, plain, tmp_path, monkeypatch):
    """A working directory where SLURM's commands work."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, daemons[name])
    package = str(Path(__file__).resolve().parents[1])
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{package}{os.pathsep}{before}" if before else package)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same(store, plain):
    """Whether the patterns of a store are, byte for byte, those of the run on threads."""
    expected = content(str(plain / "out" / "a.zarr"))
    assert len(expected) == N_BLOCKS + 1
    assert content(store) == expected


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


def test_an_array_is_requeued_at_its_wall_time_and_goes_on(folder, plain, monkeypatch, capsys):
    """SLURM signals a task as it does before the wall time; another is cancelled, and stays away.

    The last task of an array has the number of the whole array: what is done to it must not be done to all.
    """
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", f"{folder}/site{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("HOW1", "scancel")
    monkeypatch.setenv("HOW2", "scancel --batch --signal=TERM")
    size = ("--cpus-per-task", "1", "--mem", "1500M")
    assert cli.main(["batch", str(plain / "job.yaml"), "--slurm", "--submit", *size]) == 0
    number = re.search(r"Submitted batch job (\d+)", capsys.readouterr().out).group(1)
    logs = [f"stem-dask-batch-{number}_{task}.log" for task in (1, 2)]
    until_done(*logs)
    texts = [Path(log).read_text() for log in logs]
    assert [about(f"{number}_{task}", "Restarts") for task in (1, 2)] == ["0", "1"], texts
    assert [about(f"{number}_{task}", "JobState") for task in (1, 2)] == ["CANCELLED", "COMPLETED"]
    assert "asked to stop; the same command goes on where this one ended" in texts[1]
    assert "resuming " in texts[1]
    assert (
        "threads: 1 worker with 1.26 GB" in texts[1]
    )  # 80 % of what SLURM gave, not of the machine
    same("out/b.zarr", plain)
    assert Path("out/a.run/journal").exists()
    assert not Path("out/a.zarr").exists()


def test_an_array_in_a_folder_with_a_space_of_which_a_task_fails(
    folder, plain, monkeypatch, capsys
):
    """The log is where it was said, the other task is not touched, and no failure goes back into the queue."""
    place = folder / "my scans"
    (place / "raw").mkdir(parents=True)
    monkeypatch.chdir(place)
    (place / "raw" / "scan 1.npy").write_bytes((plain / "a.npy").read_bytes())
    (place / "raw" / "scan 2.npy").write_bytes(b"")
    words = [str(plain / "job.yaml"), "input.path=raw/*.npy", "--slurm", "--submit"]
    assert cli.main(["batch", *words, "--cpus-per-task", "1", "--mem", "1500M"]) == 0
    number = re.search(r"Submitted batch job (\d+)", capsys.readouterr().out).group(1)
    logs = [f"stem-dask-batch-{number}_{task}.log" for task in (1, 2)]
    until_done(*logs)
    assert "the file is empty" in Path(logs[1]).read_text()
    states = [about(f"{number}_{task}", "JobState") for task in (1, 2)]
    assert states == ["COMPLETED", "FAILED"]
    assert about(f"{number}_2", "ExitCode") == "3:0"
    assert about(f"{number}_2", "Restarts") == "0"
    same("out/scan 1.zarr", plain)


@pytest.mark.parametrize("name", ["one_node", "many_nodes"])
def test_the_templates(folder, plain, monkeypatch, name):
    Path(".venv").symlink_to(sys.prefix)
    (folder / "home").mkdir()
    monkeypatch.setenv("HOME", str(folder / "home"))
    asked = ("--nodes=1", "--cpus-per-task=2", "--mem=2500M", "--time=10", "--output=log")
    words = one(plain, "cluster.threads_per_worker=null")
    said("sbatch", *asked, str(TEMPLATES / f"{name}.sh"), *words)
    until_done("log")
    log = Path("log").read_text()
    assert Path("one.zarr").exists(), log
    kind = "local: 2 workers" if name == "one_node" else "scheduler at tls://"
    assert f"cluster     {kind}" in log
    same("one.zarr", plain)
    assert list((folder / "home").glob(".stem_dask*")) == []


def test_the_template_for_gpus_where_there_is_none(folder, plain):
    """SLURM gives one that is none: the run is refused, and does not go back into the queue."""
    if missing_gpu() is None:
        pytest.skip("there is a GPU")
    Path(".venv").symlink_to(sys.prefix)
    asked = ("--cpus-per-task=1", "--mem=1500M", "--time=10", "--output=log")
    text = said("sbatch", *asked, str(TEMPLATES / "gpu_node.sh"), *one(plain))
    number = re.search(r"Submitted batch job (\d+)", text).group(1)
    until_done("log")
    log = Path("log").read_text()
    assert re.fullmatch(r"error: device is gpu, .*no GPU can be used: .*\n", log), log
    assert [about(number, what) for what in ("JobState", "ExitCode", "Restarts")] == [
        "FAILED",
        "2:0",
        "0",
    ]
    assert list(folder.glob("one*")) == []


def one(plain, *more):
    """The words of a run of one dataset."""
    return [str(plain / "job.yaml"), f"input.path={plain}/a.npy", "output.path=one.zarr", *more]


def test_the_line_of_check(folder, plain, capsys):
    """It runs as it stands, with the memory that check projects, in blocks of the same size."""
    assert cli.main(["check", *one(plain, "cluster.walltime=null")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("sbatch "))
    number = re.search(r"\d+", said("bash", "-c", line.removeprefix("sbatch").strip())).group()
    log = f"slurm-{number}.out"
    until_done(log)
    assert about(number, "TimeLimit") == "00:10:00"
    assert about(number, "JobState") == "COMPLETED", Path(log).read_text()
    assert "threads: 1 worker with 1.72 GB, 1 thread" in Path(log).read_text()
    same("one.zarr", plain)


def workers(folder, **options):
    """Jobs with workers that a run asks for."""
    return connect(
        "slurm", host="127.0.0.1", walltime="0:10:00", memory_limit="800MB", log_directory=str(folder / "jobs"), **options
    )  # fmt: skip


def test_a_run_asks_for_its_jobs(folder, plain, capsys):
    slurm_node.need_jobqueue()
    overrides = [f"cluster.{option}" for option in (*SMALL, f"log_directory={folder}/jobs")]
    assert run.main(one(plain, "--cluster", "slurm", *overrides)) == 0
    out = capsys.readouterr().out
    assert re.search(r"waiting for one of SLURM's jobs \d+ \(squeue --me\)", out)
    assert re.search(
        r"cluster     slurm at tls://127\.0\.0\.1:\d+: 2 workers with 0\.80 GB, 2 threads", out
    )
    same("one.zarr", plain)
    until_done()


@pytest.mark.parametrize("when", ["its jobs wait", "its workers work"])
def test_ctrl_c_gives_the_jobs_back(folder, plain, monkeypatch, when):
    """Of whatever the jobs are doing, and the same command goes on."""
    slurm_node.need_jobqueue()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", f"{folder}/site{os.pathsep}{os.environ['PYTHONPATH']}")
    overrides = [f"cluster.{option}" for option in (*SMALL, f"log_directory={folder}/jobs")]
    words = one(plain, "--cluster", "slurm", *overrides)
    waits = ["cluster.job_extra=[--begin=now+1hour]"] if when == "its jobs wait" else []
    command = [sys.executable, "-m", "stem_dask.run", *words, *waits]
    with open("said", "w") as file:
        run_of_ours = subprocess.Popen(command, stdout=file, stderr=file)
    end = time.monotonic() + PATIENCE
    try:
        while not (
            "waiting for one of SLURM's jobs" in Path("said").read_text()
            if waits
            else any(Path("one.zarr.incomplete/patterns").glob("c.*"))
        ):
            assert time.monotonic() < end, Path("said").read_text()
            assert run_of_ours.poll() is None, Path("said").read_text()
            time.sleep(0.1)
        run_of_ours.send_signal(signal.SIGINT)
        assert run_of_ours.wait(PATIENCE) == 75, Path("said").read_text()
    finally:
        run_of_ours.kill()
    assert "the same command goes on" in Path("said").read_text()
    until_done()
    assert list((folder / "jobs").glob("keys-*")) == []
    (folder / "enough").touch()
    assert run.main(words) == 0
    same("one.zarr", plain)
    until_done()


def test_a_job_that_hands_over_is_replaced(folder, monkeypatch):
    """Two workers in a job, which leave after some seconds; another job brings two others, and the work goes on."""
    slurm_node.need_jobqueue()
    monkeypatch.setattr("stem_dask.cluster.slurm.lifetime", lambda walltime: (6, 0))
    monkeypatch.setattr("stem_dask.cluster.slurm.GONE_SECONDS", 0.5)
    with workers(folder, n_workers=2) as connection:
        client = connection.client
        settings = client.run(lambda keys: {key: dask.config.get(key) for key in keys}, [*SETTINGS])
        assert settings
        assert all(found == SETTINGS for found in settings.values())
        pause = client.run(lambda dask_worker: dask_worker.memory_manager.memory_pause_fraction)
        assert set(pause.values()) == {False}
        jobs = set()
        end = time.monotonic() + PATIENCE
        while len(jobs) < 2:
            assert time.monotonic() < end
            jobs.add(client.submit(os.getenv, "SLURM_JOB_ID", pure=False).result())
            time.sleep(0.2)
        assert int(client.submit(int, "7", pure=False).result()) == 7
    until_done()
    assert list((folder / "jobs").glob("keys-*")) == []


def test_jobs_follow_the_work(folder, plain, monkeypatch):
    """One job, a second while there is more to do than it has under way, and one again when there is nothing."""
    slurm_node.need_jobqueue()
    monkeypatch.setattr("stem_dask.cluster.slurm.IDLE_SECONDS", 2)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", f"{folder}/site{os.pathsep}{os.environ['PYTHONPATH']}")
    overrides = [f"input.path={plain}/a.npy", "output.path=grown.zarr"]
    with workers(folder, jobs=[1, 2]) as connection:

        def n_workers():
            return len(connection.client.nthreads())

        def until(n):
            end = time.monotonic() + PATIENCE
            while n_workers() != n:
                assert time.monotonic() < end
                time.sleep(0.1)

        def grown():
            until(2)
            (folder / "enough").touch()

        assert n_workers() == 1
        config = load_config(plain / "job.yaml", overrides)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(grown)
            run_job(config, connection=connection)
            waiting.result()
        until(1)
    same("grown.zarr", plain)
    until_done()


@pytest.mark.parametrize(
    ("options", "python", "told"),
    [
        (
            {"queue": "nowhere"},
            sys.executable,
            r"SLURM does not take the jobs: .*Invalid partition",
        ),
        ({}, "/no/such/python", r"ended before a worker started: .*/no/such/python.*log_dir"),
    ],
)
def test_jobs_that_slurm_does_not_take_or_that_end_at_once(
    folder, monkeypatch, options, python, told
):
    slurm_node.need_jobqueue()
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(ConfigError, match=told), workers(folder, **options):
        pass
