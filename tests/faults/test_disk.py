"""A disk that is too small: told before the start when it is certain, with the bytes needed when it happens; then it goes on."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks
from harness import JOBS, N_BLOCKS, Command, assert_identical, cleaned

pytestmark = pytest.mark.faults


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, whose size the test sets by `resize`."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(
            "a file system of our own needs the right to mount: " + made.stderr.decode().strip()
        )
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def resize(place: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)], check=True)


def test_what_cannot_fit_does_not_start(config: Path, forks: Forks, small_disk: Path) -> None:
    command = Command(config, small_disk, forks)
    resize(small_disk, 100)
    with cleaned(command):
        done = command.finish(kind="threads")
    assert done.code == 5, done.text
    assert "at least" in done.text
    assert "bytes" in done.text
    assert command.lines() == []


def test_a_disk_that_becomes_full(config, forks, reference, small_disk):
    """Room is made little by little: each time it ends with exit code 5 and the need, and goes on where it was."""
    command = Command(config, small_disk, forks)
    before: list[tuple[str, int]] = []
    ended = set()
    with cleaned(command):
        for kilobytes in (300, 700, 1400, 2800, 5600, 11200):
            resize(small_disk, kilobytes)
            done = command.finish(kind="threads")
            assert command.lines()[: len(before)] == before
            before = command.lines()
            if done.code == 0:
                break
            assert done.code == 5, done.text
            assert "Traceback" not in done.text
            assert "bytes) in " in done.text
            ended.add(before[-1][0] if before else "")
            for kind in (".zarr", ".pt", ".hspy"):
                name = f"export {kind}"
                whole = any(job.startswith(name) for job, _ in before) or kind == ".zarr"
                with contextlib.suppress(FileNotFoundError):
                    assert os.stat(command.store.with_suffix(kind)).st_size > 0
                    assert whole
        assert done.code == 0, done.text
    assert len(ended) > 1, ended
    assert sum(job == JOBS[0] for job, _ in before) == N_BLOCKS
    assert_identical(command, reference)
