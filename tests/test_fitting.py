"""Workers that would not have the memory for a job are not started, and no job of SLURM is submitted for them."""

import re

import numpy as np
import pytest

from stem_dask.cli import jobs as batch
from stem_dask.cli import main as cli
from stem_dask.config.load import load_configs
from stem_dask.core.errors import MemoryBudgetError
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
