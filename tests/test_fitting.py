"""Workers that would not have the memory for a job are not started, and no job of SLURM is submitted for them."""

import json
import re
import shlex

import numpy as np
import pytest

from stem_dask.cli import jobs as batch
from stem_dask.cli import main as cli
from stem_dask.cluster.connect import planned
from stem_dask.config.load import config_of, load_configs
from stem_dask.core.errors import MemoryBudgetError
from stem_dask.job import budget
from stem_dask.job import run as pipeline
from stem_dask.job.plan import prepare, refuse_too_small
from stem_dask.job.run import run as run_job

SLURM = {"kind": "slurm", "walltime": "1:00:00"}


@pytest.fixture
def nothing_starts(monkeypatch):
    def connect(**options):
        raise AssertionError("a cluster is started")

    monkeypatch.setattr(pipeline, "connect", connect)
    monkeypatch.setattr("stem_dask.cluster.connect.connect", connect)


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        (
            {**SLURM, "memory_limit": "200MB", "threads_per_worker": 1},
            r"with 200 MB for 1 thread cannot hold a single",
        ),
        ({**SLURM, "memory_limit": "1GB", "threads_per_worker": 90}, "1000 MB for 90 threads"),
        ({"kind": "local", "memory_limit": "1MB", "threads_per_worker": 1}, "1 MB for 1 thread"),
        ({"kind": "threads", "memory_limit": "150MB", "threads_per_worker": 1}, "150 MB for 1"),
    ],
)
def test_too_little_memory_is_refused_before_anything_starts(
    tmp_path, make_config, nothing_starts, cluster, told
):
    source = tmp_path / "scan.npy"
    np.save(source, np.ones((40, 40, 128, 128), np.uint16))
    config = make_config(source, cluster=cluster)
    with pytest.raises(MemoryBudgetError, match=told) as caught:
        run_job(config)
    assert caught.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.npy"]


def test_enough_or_nothing_known_is_taken(beam_file, make_config):
    enough = {**SLURM, "memory_limit": "1GB"}
    for cluster in (enough, {"kind": "auto", "address": "tls://a:1", "memory_limit": "1MB"}):
        refuse_too_small(prepare(make_config(beam_file, cluster=cluster)))


def test_a_batch_of_which_none_fits_starts_nothing(tmp_path, beam_file, nothing_starts, capsys):
    config = tmp_path / "a.yaml"
    config.write_text(
        f"input: {{path: ['{beam_file}', '{beam_file}']}}\noutput: {{path: '{tmp_path}/{{stem}}.zarr', figure: false}}\n"
        "cluster: {kind: slurm, walltime: '1:00:00', memory_limit: 150MB}\n"
    )
    other = tmp_path / "other.npy"
    other.write_bytes(beam_file.read_bytes())
    configs = load_configs(config, [f"input.path=[{beam_file}, {other}]"])
    assert batch.run_all(configs) == 2
    assert capsys.readouterr().err.count("cannot hold a single pattern") == 2


@pytest.mark.parametrize("chunk_mb", ["auto", 16])
def test_the_memory_that_is_named_suffices(tmp_path, make_config, capsys, chunk_mb):
    """And `check` refuses what a run refuses, when it has said all: it told the two numbers and ended with 0."""
    source = tmp_path / "scan.npy"
    np.save(source, np.zeros((8, 128, 128, 128), np.uint16))
    words = ["check", str(tmp_path / "a.yaml"), f"output.chunk_mb={chunk_mb}"]
    (tmp_path / "a.yaml").write_text(
        f"input: {{path: {source}}}\noutput: {{path: {tmp_path}/a.zarr, export: [hspy], figure: false}}\n"
        "cluster: {kind: local, n_workers: 1, threads_per_worker: 1}\n"
    )
    given = 234 if chunk_mb == "auto" else 249
    assert cli.main([*words, f"cluster.memory_limit={given}MB"]) == 2
    told = capsys.readouterr()
    pattern = {
        "auto": rf"a worker with {given} MB for 1 thread cannot hold a single pattern: it needs (\d+) MB; raise",
        16: rf"would need .* and has {given} MB; output\.chunk_mb=.* fits, or raise cluster.memory_limit to (\d+)MB$",
    }[chunk_mb]
    need = int(re.search(pattern, told.err).group(1))
    assert cli.main([*words, f"cluster.memory_limit={need - 1}MB"]) == 2
    capsys.readouterr()
    assert cli.main([*words, f"cluster.memory_limit={need}MB"]) == 0
    assert f"which has {need} MB\n" in capsys.readouterr().out


def sparse(path, shape):
    """A .npy of uint16 as large as wanted, of which nothing but the header takes room."""
    with open(path, "wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * int(np.prod(shape)))
    return str(path)


def asked(capsys, *words):
    """The options and the command of the line for sbatch, and what else check says for programs."""
    assert cli.main(["check", *words, "output.export=[]", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    program, *options, wrap, command = shlex.split(told["sbatch"])
    assert (program, wrap) == ("sbatch", "--wrap")
    return dict(option.lstrip("-").split("=") for option in options), command, told


@pytest.mark.parametrize(
    ("words", "cores"),
    [
        (["cluster.kind=threads"], 3),
        (["cluster.kind=local"], 3),
        (["cluster.kind=local", "cluster.n_workers=2", "cluster.threads_per_worker=2"], None),
        (["cluster.kind=local", "cluster.memory_limit=700MB", "output.chunk_mb=200"], 2),
    ],
)
def test_the_memory_that_sbatch_asks_for_suffices(tmp_path, monkeypatch, capsys, words, cores):
    """In the job, whose cores and memory SLURM gives, the blocks are as large as without a limit, and the run starts."""
    monkeypatch.chdir(tmp_path)
    words = [sparse("scan.npy", (64, 256, 128, 128)), *words]
    given, _, _ = asked(capsys, *words, *([] if cores is None else ["--cpus", str(cores)]))
    assert given["cpus-per-task"] == str(cores or 4)
    plan = prepare(config_of(words[0], [*words[1:], "output.export=[]"]))
    free = budget.fitting_block(plan.config, plan.found, budget.Worker(None, 1))
    monkeypatch.setattr("dask.system.CPU_COUNT", 64)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", given["cpus-per-task"])
    monkeypatch.setenv("SLURM_MEM_PER_NODE", str(1024 * int(given["mem"].removesuffix("G"))))
    refuse_too_small(plan, queued_only=False)
    cluster = plan.config.cluster
    worker = planned(cluster, plan.found.n_bytes)
    if cluster.memory_limit is None:
        assert budget.fitting_block(plan.config, plan.found, worker) == free


def test_the_time_that_sbatch_asks_for(tmp_path, monkeypatch, capsys):
    """Both passes over 137 GB at 50 MB/s a core, or at 200 MB/s of the node."""
    monkeypatch.chdir(tmp_path)
    words = [sparse("large.npy", (1024, 1024, 256, 256)), "crop.size=2"]
    n_bytes = 2**37
    for cores, speed in ((1, 50e6), (4, 200e6), (64, 200e6)):
        given, command, told = asked(capsys, *words, "--cpus", str(cores))
        hours, minutes, seconds = map(int, given["time"].split(":"))
        wall = 3600 * hours + 60 * minutes + seconds
        least = 2 * n_bytes / speed
        assert least < wall < least + 2 * told["disk_most"] / speed + 1200
        assert wall % 600 == 0
        assert shlex.split(command)[-3:] == [*words, "output.export=[]"]
    place = ["cluster.walltime=2-00:00:00", "cluster.queue=long", "cluster.account=lab"]
    given, command, _ = asked(capsys, *words, *place, "cluster.job_extra=[--constraint=a]")
    assert (given["time"], given["partition"]) == ("2-00:00:00", "long")
    assert (given["account"], given["constraint"]) == ("lab", "a")


def test_each_of_several_inputs_is_a_job_of_its_own(beam_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "o ther.npy"
    other.write_bytes(beam_file.read_bytes())
    (tmp_path / "a.yaml").write_text("{input: {path: x.npy}, output: {path: 'out/{stem}.zarr'}}")
    paths = f"input.path=[{beam_file}, '{other}']"
    for words, own in (
        (["a.yaml", paths, "crop.size=8"], ["a.yaml", "crop.size=8", f"input.path={other}", f"output.path={tmp_path}/out/o ther.zarr"]),
        ([str(beam_file), str(other), "crop.size=8"], [str(other), "crop.size=8"]),
    ):  # fmt: skip
        assert cli.main(["check", *words]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sbatch")]
        assert len(lines) == 2
        command = shlex.split(shlex.split(lines[1 if other.name > beam_file.name else 0])[-1])
        assert command[command.index("run") + 1 :] == own


def test_no_line_for_workers_elsewhere_or_no_cores(beam_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    slurm = ["cluster.kind=slurm", "cluster.walltime=1:00:00", "cluster.memory_limit=1GB"]
    for words in (slurm, ["cluster.address=tls://a:1"]):
        assert cli.main(["check", str(beam_file), *words]) == 0
        assert "sbatch" not in capsys.readouterr().out
    assert cli.main(["check", str(beam_file), "--cpus", "0"]) == 2
    assert "--cpus is 0" in capsys.readouterr().err
