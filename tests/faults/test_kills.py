"""SIGKILL at every stage: the same command goes on, computes only what is missing, and ends with the same bytes."""

from collections import Counter
from pathlib import Path

import pytest
from forks import Moment
from harness import JOBS, N_BLOCKS, Command, assert_identical, n_lines, read, workers
from small import Small, content

pytestmark = pytest.mark.faults

#: (phase, fault or "lines JOB n", cluster) in the order of the run: the process group, which is client, scheduler and
#: workers, is killed at each, one start after another; `lines` is n more lines, {} the middle one of the missing blocks
CHAINS = {
    "passes": [
        ("analysis", "lines analyze 3", "local"),
        ("analysis", "after analysis/{:06}.block", "local"),  # a worker, before the journal line
        ("analysis", "before analysis/{:06}.block", "threads"),
        ("analysis", "after analysis/{:06}.block", "threads"),
        ("crop", "lines crop 3", "local"),
        ("crop", "before patterns/c.{}.0.0.0", "local"),  # a worker, its shard has no name yet
        ("crop", "after patterns/c.{}.0.0.0", "threads"),
        ("crop", "after crop/{:06}.block", "local"),
        ("rename", "before scan.zarr", "threads"),
    ],
    "once": [  # what the first pass keeps is cut by the second
        ("analysis", "after kept/{:06}.block", "local"),  # the analysis of this block has no file
        ("analysis", "before kept/{:06}.block", "threads"),
        ("analysis", "before analysis/{:06}.block", "local"),
        ("crop", "lines crop 3", "local"),
        ("crop", "before patterns/c.{}.0.0.0", "threads"),
        ("rename", "after scan.zarr", "threads"),  # what was kept is still there
    ],
    "exports": [
        ("rename", "after scan.zarr", "threads"),
        ("export", "lines export .pt scan 3", "local"),
        ("export", "lines export .pt scan 3", "threads"),
        ("rename", "before scan.pt", "threads"),
        ("rename", "after scan.pt", "threads"),
        ("export", "lines export .hspy 3", "local"),
        ("export", "after export.hspy/{:06}.block", "threads"),
        ("rename", "before scan.hspy", "threads"),
        ("rename", "after scan.hspy", "threads"),
        ("rename", "before scan_results.json", "threads"),
        ("rename", "after report.json", "threads"),
    ],
}
#: the job that writes a block's file
WRITES = {
    "kept": JOBS[0],
    "analysis": JOBS[0],
    "patterns": JOBS[1],
    "crop": JOBS[1],
    "export.hspy": JOBS[3],
}
#: how many jobs are over when an output gets its name
OVER = {"scan.zarr": 2, "scan.pt": 3}
#: four blocks for each of two threads, see `stem_dask.engine.submit.IN_FLIGHT`
N_IN_FLIGHT = 4 * 2
#: small files that a run of the small scan writes until its store is complete
N_FILES = 95


def test_a_killed_worker(command: Command, reference: Command) -> None:
    run = command.start()
    run.until(lambda: n_lines(command, "analyze") >= 4, "four analyzed rows")
    victim = workers(run.process.pid)[0]
    run.until(lambda: n_lines(command, "crop") >= 1, "the first cropped rows")
    victim.kill()
    assert n_lines(command, "crop") < N_BLOCKS, "too late to be a test"
    assert run.wait() == 0, run.text
    assert_identical(command, reference)


def test_a_worker_killed_while_it_writes(command: Command, reference: Command) -> None:
    """Its shard has been written and has no name yet; another worker takes over within the same run."""
    run = command.finish(fault="torn patterns/c.10.0.0.0")
    assert (command.folder / "fault_mark").exists()
    assert run.code == 0, run.text
    assert_identical(command, reference)


@pytest.mark.parametrize("name", CHAINS)
def test_kills_of_everything(name: str, command: Command, reference: Command) -> None:
    known, files = b"", {}
    command.overrides = ("analyze.passes=one",) if name == "once" else ()
    for phase, moment, kind in CHAINS[name]:
        _killed(command, moment, kind, resuming=bool(known))
        counts, journal = command.counts(), read(command.journal)
        assert _phase(counts) == phase, f"{moment}: {counts}"
        for suffix in (".zarr", ".pt", ".hspy"):  # no final name before all of its blocks are there
            job = {".zarr": "crop", ".pt": JOBS[2], ".hspy": JOBS[3]}[suffix]
            assert counts[job] == N_BLOCKS or not command.store.with_suffix(suffix).exists()
        # only what was missing was computed: the journal grew, and says nothing twice
        assert journal.startswith(known)
        assert max(Counter(command.lines()).values()) == 1
        # and no file of a noted block was written again; those without a line were in flight
        known, now = journal, _shards(command)
        noted = {index for job, index in command.lines() if job == "crop"}
        assert files.items() <= now.items()
        assert len(now.keys() - noted) <= N_IN_FLIGHT
        files = {index: file for index, file in now.items() if index in noted}
    run = command.finish()
    assert run.code == 0, run.text
    assert ("passes      one" in run.text) == (name == "once")
    assert f"resuming    {sum(counts.values())} finished" in run.text
    assert files.items() <= _shards(command).items()
    assert_identical(command, reference)


def _killed(command: Command, moment: str, kind: str, *, resuming: bool) -> None:
    """Start the command and kill it at a moment; the journal tells that it was there."""
    before, lines = command.counts(), moment.startswith("lines")
    if lines:
        job, n = moment.removeprefix("lines ").rsplit(" ", 1)
        run, wanted = command.start(kind=kind), before[job] + int(n)
        run.until(lambda: n_lines(command, job) >= wanted, moment)
        run.kill()
        done = JOBS.index(job)
        assert wanted <= command.counts()[job] < N_BLOCKS, "too late to be a test"
    else:
        done = OVER.get(moment.split()[1], 4)
        if "{" in moment:
            done = JOBS.index(WRITES[moment.split()[1].split("/")[0]])
            noted = {index for job, index in command.lines() if job == JOBS[done]}
            missing = sorted(set(range(N_BLOCKS)) - noted)
            moment = moment.format(missing[len(missing) // 2])
        run = command.finish(kind=kind, fault=moment)
    assert run.code == -9, f"{moment}: {run.code}\n{run.text}"
    assert ("resuming" in run.text) == resuming
    counts = command.counts()
    assert all(counts[job] == N_BLOCKS for job in JOBS[:done]), f"{moment}: {counts}"
    assert not any(counts[job] for job in JOBS[done + 1 :]), f"{moment}: {counts}"


def _phase(counts: Counter[str]) -> str:
    """What a journal with so many lines of each job was in the middle of."""
    unfinished = [job for job in JOBS if 0 < counts[job] < N_BLOCKS]
    if not unfinished:
        return "rename"
    (job,) = unfinished
    return {"analyze": "analysis", "crop": "crop"}.get(job, "export")


def _shards(command: Command) -> dict[int, tuple[int, int]]:
    """Block: identity and time of its shard's file, wherever the store is by now."""
    found = {}
    for store in (command.store, command.folder / f"{command.store.name}.incomplete"):
        for path in store.glob("patterns/c.*.0.0.0"):
            status = path.stat()
            found[int(path.name.split(".")[1])] = (status.st_ino, status.st_mtime_ns)
    return found


def test_kills_while_a_store_is_finished(small: Small, tmp_path: Path) -> None:
    """Its last documents are torn one after another, that of the patterns among them: all shards stay."""
    torn = set()
    for nth in range(N_FILES - 9, N_FILES + 1):
        folder = tmp_path / str(nth)
        folder.mkdir()
        ended = small.run(folder, "A", kinds=(), at=Moment("file", nth, False))
        assert ended.code == -9, ended.text
        # zarr writes NAME.HEX.partial
        left = (path.relative_to(folder) for path in folder.rglob("*.partial"))
        torn |= {f"{path.parent}/{path.name.split('.')[0]}" for path in left}
        journal = (folder / "scan.run" / "journal").read_bytes()
        ended = small.run(folder, "A", kinds=())
        assert ended.code == 0, ended.text
        assert (folder / "scan.run" / "journal").read_bytes() == journal
        assert content(folder / "scan.zarr") == small.references["A"][".zarr"]
    store = "scan.zarr.incomplete"
    assert torn >= {f"{store}/zarr", f"{store}/patterns/zarr"}


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
    (command.store / "patterns" / "c.3.0.0.0").write_bytes(b"older")
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


@pytest.mark.parametrize(
    ("suffix", "at"),
    [
        (".pt", Moment("line", 4, True)),  # the sample is read in part
        (".pt", Moment("line", 10, True)),  # analyzed in part
        (".pt", Moment("line", 15, False)),  # cropped in part, and the line is torn
        (".hspy", Moment("line", 17, True)),
        (".pt", Moment("name", 5, True)),
        (".zarr", Moment("line", 15, True)),
    ],
)
def test_a_killed_crop_command(small: Small, tmp_path: Path, suffix: str, at: Moment) -> None:
    """The command of the earlier script goes on like every other, and leaves what an undisturbed one does."""

    def crop(name: str, at: Moment | None = None) -> tuple[int, str]:
        paths = ["--input", f"{small.folder}/beam.npy", "--output", f"{tmp_path}/{name}{suffix}"]
        flags = ["--no-visualization", "--min-retention", "0.1", "--chunk-size", "4"]
        ended = small.forks.finish("stem_dask.cli.main", "crop", *paths, *flags, at=at)
        return ended.code, ended.text

    assert crop("a")[0] == 0
    assert crop("b", at)[0] == -9
    code, text = crop("b")
    assert code == 0, text
    assert "resuming    " in text
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{name}{end}" for name in "ab" for end in (suffix, "_results.json")}
    whole, resumed = (content(tmp_path / f"{name}{suffix}") for name in "ab")
    assert resumed == whole
