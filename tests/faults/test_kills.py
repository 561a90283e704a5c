"""SIGKILL at every stage: the same command goes on, computes only what is missing, and ends with the same bytes."""

from collections import Counter

import pytest
from harness import JOBS, N_BLOCKS, Command, assert_identical, n_lines, read, workers

pytestmark = pytest.mark.faults

#: (fault or "lines JOB n", cluster) in the order of the run: the process group is killed at each, one start after another
CHAINS = {
    "passes": [
        ("lines analyze 3", "local"),
        ("after analysis/000018.npz", "local"),  # a worker, between rename and journal line
        ("lines crop 3", "local"),
        ("before patterns/c/16/0/0/0", "local"),  # a worker, a shard is written and has no name yet
        ("after crop/000022.npz", "local"),
        ("before scan.zarr", "threads"),
    ],
    "exports": [
        ("after scan.zarr", "local"),
        ("lines export .pt scan 3", "local"),
        ("before scan.pt", "threads"),
        ("after scan.pt", "threads"),
        ("lines export .hspy 3", "local"),
        ("before scan.hspy", "threads"),
        ("after scan.hspy", "threads"),
        ("before scan_results.json", "threads"),
        ("after report.json", "threads"),
    ],
}
#: the stage of a moment, and whether it is over by then
STAGE = {"analysis": "analyze", "patterns": "crop", "crop": "crop"}


def test_a_killed_worker(command: Command, reference: Command) -> None:
    run = command.start()
    run.until(lambda: n_lines(command, "crop") >= 4, "four cropped rows")
    victim = workers(run.process.pid)[0]
    victim.kill()
    assert n_lines(command, "crop") < N_BLOCKS, "too late to be a test"
    assert run.wait() == 0, run.text
    assert_identical(command, reference)


def test_a_worker_killed_while_it_writes(command: Command, reference: Command) -> None:
    """Its shard has been written and has no name yet; another worker takes over within the same run."""
    run = command.finish(fault="torn patterns/c/10/0/0/0")
    assert (command.folder / "fault_mark").exists()
    assert run.code == 0, run.text
    assert_identical(command, reference)


@pytest.mark.parametrize("name", CHAINS)
def test_kills_of_everything(name: str, command: Command, reference: Command) -> None:
    known = b""
    for moment, kind in CHAINS[name]:
        lines = moment.startswith("lines")
        run = command.start(kind=kind, fault="" if lines else moment)
        if lines:
            job, n = moment.removeprefix("lines ").rsplit(" ", 1)
            run.until(lambda job=job, n=n: n_lines(command, job) >= int(n), moment)
            run.kill()
        else:
            run.wait()
        assert run.code == -9, f"{moment}: {run.code}\n{run.text}"
        if known:
            assert "resuming" in run.text
        # evidence of the stage: its lines, and none of the next
        counts, journal = command.counts(), read(command.journal)
        if lines:
            done = JOBS.index(job)
            assert int(n) <= counts[job] < N_BLOCKS, f"{moment}: {counts}"
        elif "/" in moment:
            done = JOBS.index(STAGE[moment.split()[1].split("/")[0]])
            assert counts[JOBS[done]] < N_BLOCKS
        else:
            done = {"scan.zarr": 2, "scan.pt": 3}.get(moment.split()[1], 4)
        assert all(counts[job] == N_BLOCKS for job in JOBS[:done]), f"{moment}: {counts}"
        assert not any(counts[job] for job in JOBS[done + 1 :]), f"{moment}: {counts}"
        for suffix in (".zarr", ".pt", ".hspy"):  # no final name before all of its blocks are there
            job = {".zarr": "crop", ".pt": JOBS[2], ".hspy": JOBS[3]}[suffix]
            assert counts[job] == N_BLOCKS or not command.store.with_suffix(suffix).exists()
        # only what was missing was computed: the journal grew, and says nothing twice
        assert journal.startswith(known)
        assert max(Counter(command.lines()).values()) == 1
        known = journal
    run = command.finish()
    assert run.code == 0, run.text
    assert f"resuming    {sum(counts.values())} finished" in run.text
    assert_identical(command, reference)


def test_a_kill_before_the_folders_are_removed(command: Command, reference: Command) -> None:
    """The last words are written, and the blocks that were joined still lie there."""
    assert command.finish(kind="threads", fault="remove scan.run/analysis").code == -9
    run = command.finish(kind="threads")
    assert run.code == 0
    assert "already complete" in run.text
    left = {
        path.name for path in command.run_folder.iterdir()
    }  # folders, and a lock that nobody holds
    assert_identical(command, reference, folders=sorted(left))


def test_replacing_an_older_output(command: Command, reference: Command) -> None:
    """Killed between the two renames, and before the older one is removed: no manual step."""
    import shutil

    shutil.copytree(reference.store, command.store)
    metadata = command.store / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"token": "', '"token": "0'))
    (command.store / "patterns" / "c" / "3" / "0" / "0" / "0").write_bytes(b"older")
    for suffix in (".pt", ".hspy"):
        command.store.with_suffix(suffix).write_bytes(b"older")
    refused = command.finish(kind="threads")
    assert refused.code == 2
    assert "output.overwrite" in refused.text
    again = "output.overwrite=true"
    aside, built = (command.folder / f"scan.zarr.{word}" for word in ("replaced", "incomplete"))

    assert command.finish(again, kind="threads", fault="after scan.zarr.replaced").code == -9
    assert (command.store.exists(), aside.exists(), built.exists()) == (False, True, True)

    assert command.finish(again, kind="threads", fault="after scan.zarr").code == -9
    assert (command.store.exists(), aside.exists(), built.exists()) == (True, True, False)
    assert command.store.with_suffix(".pt").read_bytes() == b"older"

    run = command.finish(again, kind="threads")
    assert run.code == 0, run.text
    assert_identical(command, reference)
