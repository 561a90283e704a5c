"""What lies on the disk is not what was written: it is found, named, computed again."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import N_BLOCKS, Command, assert_identical, flip, truncate, zero

pytestmark = pytest.mark.faults

Put = Callable[..., None]


DAMAGES = {2: truncate, 5: zero, 11: flip, 17: Path.unlink}


@pytest.mark.parametrize(
    ("fault", "pattern", "job", "kind"),
    [
        ("after crop/000022.block", "scan.run/kept/{:06d}.block", "analyze", "local"),
        ("after crop/000022.block", "scan.run/analysis/{:06d}.block", "analyze", "threads"),
        ("before scan.zarr", "scan.zarr.incomplete/patterns/c.{}.0.0.0", "crop", "local"),
    ],
)
def test_damaged_blocks(fault, pattern, job, kind, command, reference, killed_at):
    killed_at(command, fault, *["analyze.passes=one"] * ("kept" in pattern))
    for index, damage in DAMAGES.items():
        damage(command.folder / pattern.format(index))
    run = command.finish(kind=kind)
    assert run.code == 0, run.text
    for index in DAMAGES:
        assert str(command.folder / pattern.format(index)) in run.text
    assert_identical(command, reference, redone=[(job, index) for index in DAMAGES])


def one_byte(path: Path) -> None:
    """Of one block of patterns."""
    words = bytearray(path.read_bytes())
    block = 16 * 32 * 32
    words[len(words) - len(words) % block - 12 * block] ^= 1
    path.write_bytes(words)


@pytest.mark.parametrize("damage", [one_byte, truncate, Path.unlink])
def test_a_damaged_pt(damage, command, reference, killed_at):
    """A byte is wrong, the file has lost its end, or is gone."""
    killed_at(command, "before scan.pt")
    damage(command.folder / "scan.pt.incomplete")
    run = command.finish(kind="threads")
    assert run.code == 0, run.text
    assert str(command.folder / "scan.pt.incomplete") in run.text
    redone = [line for line in set(command.lines()) if command.lines().count(line) > 1]
    assert {job for job, _ in redone} == {"export .pt scan"}
    assert damage is not one_byte or len(redone) == 1
    assert_identical(command, reference, redone=redone)


def test_a_torn_journal(command: Command, reference: Command, killed_at: Put) -> None:
    """The last line is cut in the middle, and the one before is gone: two blocks have no line, nothing else is done."""
    killed_at(command, "after crop/000022.block")
    whole = command.journal.read_bytes().split(b"\n")[:-1]
    kept = [line for line in whole if line]
    command.journal.write_bytes(b"\n".join(kept[:-2]) + b"\n" + kept[-1][: len(kept[-1]) // 2])
    before = command.lines()
    assert len(before) == len(kept) - 2 > N_BLOCKS
    run = command.finish(kind="threads")
    assert run.code == 0, run.text
    assert f"resuming    {len(before)} finished" in run.text
    assert_identical(command, reference)


def test_a_journal_without_its_last_line_end(command, reference, killed_at):
    """The line is whole but for its end: it counts, and the next does not run into it."""
    killed_at(command, "before scan.zarr")
    os.truncate(command.journal, command.journal.stat().st_size - 1)
    run = command.finish(kind="threads")
    assert run.code == 0, run.text
    assert_identical(command, reference)


@pytest.mark.parametrize(
    ("n_bytes", "export", "job", "kind"),
    [(12_000, "[pt, hspy]", 0, "local"), (300_000, "[hspy]", 3, "threads")],
)
def test_a_full_disk(n_bytes, export, job, kind, command, reference):
    """No file may grow beyond a limit: exit code 5, no torn file under a final name, and later the run goes on."""
    import resource

    limits = {resource.RLIMIT_FSIZE: n_bytes}
    run = command.finish(f"output.export={export}", kind=kind, limits=limits)
    assert run.code == 5, run.text
    # dask's own log of a failed task has a traceback of another form
    assert "Traceback (most" not in run.text
    assert "error: " in run.text
    for kind, needs in ((".zarr", 2), (".pt", 4), (".hspy", 4)):
        assert command.store.with_suffix(kind).exists() == (job >= needs)
    before = command.lines()
    assert {name for name, _ in before} >= {"analyze", "crop"} or job == 0
    run = command.finish(kind="threads")
    assert run.code == 0, run.text
    assert ("resuming" in run.text) == bool(before)
    assert command.lines()[: len(before)] == before
    assert_identical(command, reference)
