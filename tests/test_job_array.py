"""stem-dask batch: several configs here, and as a job array for SLURM (which tests/test_slurm.py runs)."""

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from stem_dask.cli import job_array
from stem_dask.cli import main as cli
from stem_dask.cluster import slurm
from stem_dask.cluster.connect import connect
from stem_dask.cluster.local import SETTINGS
from stem_dask.cluster.slurm import keys
from stem_dask.core.machine import ONE_THREAD
from stem_dask.engine.lock import SILENT_SECONDS

TEMPLATES = Path(__file__).resolve().parents[1] / "configs" / "slurm"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with two configs: one of two scans, and one of one."""
    monkeypatch.chdir(tmp_path)
    data = np.zeros((4, 3, 40, 36), np.uint16)
    data[:, :, 14:22, 12:20] = 5
    for name in ("a 1", "b", "c"):
        np.save(f"{name}.npy", data)
    rest = (
        "export: [], figure: false}\ncluster: {kind: threads, walltime: '1:00:00', queue: long}\n"
    )
    Path("two.yaml").write_text(
        "input: {path: [a 1.npy, b.npy]}\noutput: {path: 'out/{stem}.zarr', " + rest
    )
    Path("one.yaml").write_text("input: {path: c.npy}\noutput: {path: out/c.zarr, " + rest)
    return tmp_path


def batch(*words):
    return cli.main(["batch", *words])


def tasks(text):
    """The words of every task."""
    lines = [line for line in text.splitlines() if ") job=(" in line]
    return [shlex.split(line.partition("job=(")[2].removesuffix(") ;;")) for line in lines]


def test_several_configs_run_here(folder, connects, capsys):
    assert batch("two.yaml", "one.yaml", "crop.size=12") == 0
    sizes = {path.name: xr.open_zarr(path).patterns.shape for path in Path("out").glob("*.zarr")}
    assert sizes == dict.fromkeys(["a 1.zarr", "b.zarr", "c.zarr"], (4, 3, 12, 12))
    assert "[1/2] two.yaml" in capsys.readouterr().out


def test_a_config_that_fails_stops_no_other(folder, connects, capsys):
    assert batch("gone.yaml", "one.yaml") == 2
    assert Path("out/c.zarr").exists()
    assert "gone.yaml" in capsys.readouterr().err


def test_folders_that_slurm_would_misread(folder, capsys):
    """A space ends what SLURM takes for a name, and what begins with % stands for something."""
    inside = folder / "10% of a scan"
    inside.mkdir()
    assert batch("one.yaml", "--slurm", "--script", str(inside / "job.sh")) == 0
    line = next(x for x in (inside / "job.sh").read_text().splitlines() if "--output=" in x)
    assert shlex.split(line) == ["#SBATCH", f"--output={folder}/10%% of a scan/job-%A_%a.log"]


def test_the_script(folder, capsys):
    more = ("cluster.account=lab", "cluster.job_extra=[--constraint=a b]", "crop.size=12")
    options = ("--slurm", "--overwrite", "--at-once", "2", "--cpus-per-task", "8", "--mem", "32G")
    assert batch("two.yaml", "one.yaml", *more, *options) == 0
    path = folder / "stem-dask-batch.sh"
    text = path.read_text()
    told = capsys.readouterr().out.splitlines()
    assert told == [f"wrote {path}: 3 datasets, one a task", f"submit it with: sbatch {path}"]
    asked = [
        line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")
    ]
    assert asked == [
        "--job-name=stem-dask", "--array=1-3%2", "--nodes=1", "--ntasks=1", "--cpus-per-task=8", "--mem=32G",
        "--time=1:00:00", "--signal=B:TERM@120", "--requeue", "--open-mode=append",
        f"--output={folder}/stem-dask-batch-%A_%a.log", "--partition=long", "--account=lab", "--constraint=a b",
    ]  # fmt: skip
    assert tasks(text) == [
        [f"{folder}/{config}.yaml", *more, f"input.path={folder}/{name}.npy", f"output.path={folder}/out/{name}.zarr", "--overwrite"]
        for config, name in [("two", "a 1"), ("two", "b"), ("one", "c")]
    ]  # fmt: skip
    assert subprocess.run(["bash", "-n", path], check=True).returncode == 0
    assert not Path("out").exists()


def test_a_task_is_a_run_of_its_dataset(folder, connects, monkeypatch):
    """What the script calls gives the job of that input alone, with the output's name filled in."""
    from stem_dask.cli import run

    seen = []
    monkeypatch.setattr(
        "stem_dask.cli.jobs.run_all", lambda configs, **_: seen.extend(configs) or 0
    )
    assert batch("two.yaml", "--slurm") == 0
    for words in tasks(Path("stem-dask-batch.sh").read_text()):
        assert run.main(words) == 0
    assert [(c.input.path, c.output.path) for c in seen] == [
        (f"{folder}/{name}.npy", f"{folder}/out/{name}.zarr") for name in ("a 1", "b")
    ]


def test_the_same_script_again_and_another_one(folder, capsys):
    assert batch("one.yaml", "--slurm") == 0
    assert batch("one.yaml", "--slurm") == 0
    assert batch("two.yaml", "--slurm") == 2
    assert (
        "stem-dask-batch.sh exists with other contents; remove it, or choose"
        in capsys.readouterr().err
    )
    assert batch("two.yaml", "--slurm", "--script", "jobs.sh") == 0
    assert f"--output={folder}/jobs-%A_%a.log" in Path("jobs.sh").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["two.yaml", "crop.size=common"], "crop.size is common, which needs all datasets in one run; use stem-dask run"),
        (["one.yaml", "cluster.kind=slurm", "cluster.memory_limit=1GB"], "every task of the array is a job of SLURM already"),
        (["one.yaml", "cluster.walltime=null"], "cluster.walltime is missing, the time that SLURM gives a task"),
        (["one.yaml", "cluster.walltime=0:04:59"], "cluster.walltime is 0:04:59; a task needs at least 5 minutes"),
        (["one.yaml", "one.yaml"], "out/c.zarr, and so would"),
        (["one.yaml", "--cpus-per-task", "0"], "--cpus-per-task is 0; expected a whole number above 0"),
        (["one.yaml", "--mem", "64"], "--mem is 64, which SLURM takes for MB; give its unit, such as 64G"),
        (["one.yaml", "--at-once", "0"], "--at-once is 0; expected a whole number above 0"),
        (["crop.size=12"], "no config among crop.size=12; give a YAML file before key=value"),
    ],
)  # fmt: skip
def test_what_cannot_be_an_array(folder, capsys, words, told):
    assert batch(*words, "--slurm") == 2
    assert told in capsys.readouterr().err
    assert not Path("stem-dask-batch.sh").exists()


def test_submit_needs_slurm(folder, capsys, monkeypatch):
    assert batch("one.yaml", "--submit") == 2
    assert "--submit needs --slurm" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(folder))
    assert batch("one.yaml", "--slurm", "--submit") == 2
    assert "was not submitted: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["one_node", "many_nodes", "gpu_node"])
def test_templates_end_as_the_array_does(name):
    text = (TEMPLATES / f"{name}.sh").read_text()
    assert text.endswith(job_array.END.replace("{command}", "stem-dask run"))
    assert f"--signal=B:TERM@{job_array.SIGNAL_SECONDS}" in text
    subprocess.run(["bash", "-n", TEMPLATES / f"{name}.sh"], check=True)


#: what a worker that starts with an environment takes from it
TAKEN = """
import json, os, sys, dask, distributed
settings, names = json.loads(sys.argv[1])
print(json.dumps([{key: dask.config.get(key) for key in settings}, {name: os.getenv(name) for name in names}]))
"""


def _lines_of_jobs(monkeypatch, tmp_path):
    """Of the script of a job that a run asks for."""
    given = {}

    def jobs(**options):
        given.update(options)
        raise InterruptedError

    monkeypatch.setattr(slurm, "_slurm_cluster", lambda: jobs)
    asked = {"walltime": "1:00:00", "memory_limit": "1GB", "log_directory": str(tmp_path)}
    with pytest.raises(InterruptedError):
        connect("slurm", host="127.0.0.1", **asked)
    return given["job_script_prologue"]


def _lines_of_the_template(monkeypatch, tmp_path):
    text = (TEMPLATES / "many_nodes.sh").read_text()
    return [line for line in text.splitlines() if line.startswith("export ")]


@pytest.mark.parametrize("lines_of", [_lines_of_jobs, _lines_of_the_template])
def test_workers_on_other_machines_are_set_as_those_here(monkeypatch, tmp_path, lines_of):
    """Above all, not to wait until their memory is less, which may be never."""
    kept = {k: v for k, v in os.environ.items() if k not in ONE_THREAD and k[:5] != "DASK_"}
    words = ["-c", TAKEN, json.dumps([[*SETTINGS], [*ONE_THREAD]])]
    script = "\n".join([*lines_of(monkeypatch, tmp_path), shlex.join([sys.executable, *words])])
    done = subprocess.run(
        ["bash", "-c", script], env=kept, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [SETTINGS, ONE_THREAD]


def scripted(folder, script, programs, **environment):
    """What becomes of a script where programs are others, each a line of bash."""
    for name, content in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{content}\n")
        (folder / name).chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", script], env={**path, **environment}, cwd=folder, capture_output=True, text=True, check=False
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, "4096"),
        ({"SLURM_MEM_PER_CPU": "1000"}, "8000"),
        ({"SLURM_MEM_PER_NODE": "0"}, "777"),
        ({}, "777"),
    ],
)
def test_many_nodes_have_a_memory_limit_however_it_was_asked_for(tmp_path, given, expected):
    """With --mem=0 SLURM says nothing, and Dask takes 0 for no limit."""
    text = (TEMPLATES / "many_nodes.sh").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("mem=", '[ "$mem"'))]
    script, free = "\n".join([*lines, 'echo "$mem"']), {"free": "echo 'Mem: 777 1 2'"}
    done = scripted(tmp_path, script, free, SLURM_CPUS_ON_NODE="8", **given)
    assert done.stdout.strip() == expected


def test_keys_of_killed_jobs_are_removed_by_the_next(tmp_path):
    """Of jobs that SLURM does not know, or has ended, and of this one before it was requeued; not where SLURM is silent."""
    answers = {
        1: "RUNNING", 2: "", 3: "squeue: error: Invalid job id specified", 4: "squeue: error: timed out", 7: "RUNNING",
    }  # fmt: skip
    told = "".join(f"--jobs={number}) echo '{answer}';;\n" for number, answer in answers.items())
    home = tmp_path / "home"
    for number in answers:
        (home / f".stem_dask-big-iron-{number}-abcdef").mkdir(parents=True)
    (home / ".stem_dask-other-2-abcdef").mkdir()
    text = (TEMPLATES / "many_nodes.sh").read_text()
    script = text[text.index("own=$HOME") : text.index("trap ")] + 'echo "$folder"'
    job = {"HOME": str(home), "SLURM_CLUSTER_NAME": "big-iron", "SLURM_JOB_ID": "7"}
    for _ in range(2):  # with none to remove, too
        done = scripted(tmp_path, script, {"squeue": f'case "$3" in\n{told}esac'}, **job)
        made = Path(done.stdout.strip())
        assert made.name.startswith(".stem_dask-big-iron-7-")
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
        left = {path.name for path in home.iterdir()} - {made.name}
        assert left == {
            ".stem_dask-big-iron-1-abcdef", ".stem_dask-big-iron-4-abcdef", ".stem_dask-other-2-abcdef",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("run", "code", "called"),
    [
        (
            "exit 75",
            75,
            "requeue 7\n",
        ),  # SLURM is asked again when it is busy; the task would else be lost
        ("kill -KILL $$", 137, ""),  # as the system kills a process that is out of memory
    ],
)
def test_a_task_that_ends_early(tmp_path, run, code, called):
    once = "[ -e {0} ] || {{ touch {0}; exit 1; }}"
    programs = {
        "run": run,
        "squeue": once.format("asked") + "; echo RUNNING",
        "scontrol": once.format("tried") + '; echo "$@" >> called',
        "sleep": "",
    }
    script = "job=(crop.yaml)\n" + job_array.END.replace("{command}", "run")
    (tmp_path / "called").touch()
    done = scripted(tmp_path, script, programs, SLURM_JOB_ID="7")
    assert done.returncode == code
    assert (tmp_path / "called").read_text() == called
    told = "because it ran out of memory; it is not requeued. With"
    assert (told in done.stderr) == (code == 137)


@pytest.mark.parametrize(
    ("code", "out", "err", "expected"),
    [
        (0, "7\n", "", True), (0, "", "", False),
        (1, "", "slurm_load_jobs error: Invalid job id specified", False),
        (1, "", "slurm_load_jobs error: Unable to contact slurm controller", True),
    ],
)  # fmt: skip
def test_jobs_of_a_slurm_that_does_not_answer_are_waited_for(monkeypatch, code, out, err, expected):
    done = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert slurm._queued(["7"]) is expected


def test_keys(tmp_path, capsys):
    assert cli.main(["keys", str(tmp_path / "keys")]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.removeprefix("export ").split("=", 1) for line in lines)
    assert found["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "True"
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        key = Path(found[f"DASK_DISTRIBUTED__COMM__TLS__{role}__KEY"])
        assert "PRIVATE KEY" in key.read_text()
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


# --- the folder with the keys of a run: what a dead run left is removed, that of a live one stays --------------------

HOLDS = """
import sys, time
from stem_dask.cluster.slurm import keys
with keys(sys.argv[1]) as folder:
    open(folder + "/file", "w").close()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """A process that holds a folder, and that folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_keys_of_a_dead_run_are_removed_and_those_of_a_live_one_stay(tmp_path, owner):
    process, folder = owner
    with keys(tmp_path) as own:
        assert (folder / "file").exists()
        assert Path(own).stat().st_mode & 0o777 == 0o700
    assert sorted(tmp_path.iterdir()) == [folder, folder.with_name(f"{folder.name}.lock")]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "file").exists()
    with keys(tmp_path):
        assert not folder.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("silent", "left"), [(SILENT_SECONDS - 30, True), (SILENT_SECONDS + 1, False)]
)
def test_keys_of_a_run_on_another_machine(tmp_path, silent, left):
    """Its lock may be seen there only: it is dead when it was silent for a minute."""
    folder, lock = tmp_path / "keys-others", tmp_path / "keys-others.lock"
    folder.mkdir()
    lock.write_text(json.dumps({"host": "node7", "pid": 1, "since": "2026-01-01 00:00:00"}))
    os.utime(lock, (time.time() - silent,) * 2)
    with keys(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == ([folder, lock] if left else [])


def test_keys_where_there_are_no_locks(tmp_path, monkeypatch):
    import fcntl

    def none(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    abandoned = tmp_path / "keys-abandoned"
    abandoned.mkdir()
    (tmp_path / "keys-abandoned.lock").touch()
    with keys(tmp_path) as folder:
        assert Path(folder).is_dir()
        assert len(list(tmp_path.iterdir())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "keys-abandoned",
        "keys-abandoned.lock",
    ]
