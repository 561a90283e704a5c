"""The lock: one live run for each output, on this host and on others, and a dead one stands in nobody's way."""

import contextlib
import errno
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from stem_dask.core.errors import LockedError, StemDaskError
from stem_dask.engine import lock as module
from stem_dask.engine.lock import SILENT_SECONDS, locked

HERE = socket.gethostname()
N_PROCESSES, N_ROUNDS = 4, 100


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scan.run" / "lock"


# --- races ------------------------------------------------------------------------------------------------------


def _race(path, barrier, won):
    """Rounds in which all try at once, and whoever has it holds it until all have tried."""
    for number in range(N_ROUNDS):
        barrier.wait(30)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path))
                won[number * N_PROCESSES + barrier_index()] = 1
            except LockedError:
                pass
            barrier.wait(30)
        barrier.wait(30)


def barrier_index():
    return int(multiprocessing.current_process().name)


def _come_and_go(path, barrier, inside, failed):
    """Take it and leave, folder and all, as fast as possible."""
    barrier.wait(30)
    for _ in range(150):
        with contextlib.suppress(LockedError), locked(path):
            with inside.get_lock():
                inside.value += 1
                failed.value |= inside.value != 1
            with inside.get_lock():
                inside.value -= 1
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def run_processes(target, *args):
    """Runs a function in several processes; each must end well."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(N_PROCESSES)
    shared = [make(context) for make in args[1:]]
    workers = [
        context.Process(target=target, args=(args[0], barrier, *shared), name=str(i))
        for i in range(N_PROCESSES)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return shared


def test_of_all_that_come_at_once_exactly_one_gets_it(path):
    (won,) = run_processes(_race, path, lambda c: c.Array("b", N_ROUNDS * N_PROCESSES))
    winners = [sum(won[i : i + N_PROCESSES]) for i in range(0, len(won), N_PROCESSES)]
    assert winners == [1] * N_ROUNDS
    assert not path.exists()


def test_who_leaves_takes_nobody_along(path):
    """The folder may go while another run is about to make its lock in it."""
    inside, failed = run_processes(
        _come_and_go, path, lambda c: c.Value("i", 0), lambda c: c.Value("b", 0)
    )
    assert (inside.value, failed.value) == (0, 0)
    assert not path.exists()


def test_the_file_is_replaced_between_open_and_lock(path, monkeypatch):
    """The former owner removes it and another run makes its own: a lock on the removed one would protect nothing."""
    import fcntl

    flock, inodes = fcntl.flock, []

    def replaced(handle, how):
        inodes.append(os.fstat(handle).st_ino)
        if len(inodes) == 1:
            path.rename(path.with_name("removed"))  # the file stays, so that no inode is used twice
            path.touch()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", replaced)
    with locked(path):
        assert inodes == [path.with_name("removed").stat().st_ino, path.stat().st_ino]
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(LockedError), locked(path):
            raise AssertionError("two have it")


# --- links and other files in its place -------------------------------------------------------------------------


def test_a_link_is_not_followed(path):
    path.parent.mkdir()
    victim = path.parent.parent / "victim.txt"
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), locked(path):
        raise AssertionError("it is a link")
    assert victim.read_text() == "precious"
    assert path.is_symlink()


def test_a_pipe_is_no_lock(path):
    path.parent.mkdir()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"), locked(path):
        raise AssertionError("it is a pipe")
    assert path.is_fifo()


# --- one host ---------------------------------------------------------------------------------------------------


def test_it_is_free_again_after_success_and_after_an_error(path):
    for _ in range(2):
        with locked(str(path)):
            assert path.exists()
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), locked(path):
        raise ZeroDivisionError
    assert not path.exists()
    with locked(path):
        pass
    assert list(path.parent.iterdir()) == []


def test_the_file_names_its_owner(path):
    with locked(path):
        words = json.loads(path.read_text())
    assert words["host"] == HERE
    assert words["pid"] == os.getpid()
    assert abs(time.time() - time.mktime(time.strptime(words["since"], "%Y-%m-%d %H:%M:%S"))) < 30


def test_a_refusal_names_the_owner_and_changes_nothing(path):
    with locked(path):
        before = path.read_bytes()
        with pytest.raises(LockedError) as caught, locked(path):
            raise AssertionError("two have it")
        assert path.read_bytes() == before
    assert isinstance(caught.value, StemDaskError)
    assert caught.value.exit_code == 6
    since = json.loads(before)["since"]
    assert str(caught.value) == (
        f"{path.parent} is in use by a run on {HERE}, process {os.getpid()}, since {since}; "
        "wait for it, or choose another output.path"
    )


HOLD = """
import sys
from stem_dask.engine.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another_process(path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_another_process(path):
    with held_by_another_process(path) as process:
        message = (
            rf"a run on {re.escape(HERE)}, process {process.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d"
        )
        with pytest.raises(LockedError, match=message), locked(path):
            raise AssertionError("two have it")
        process.communicate("")
        assert process.returncode == 0
    with locked(path):
        pass


def test_a_killed_owner_is_followed_at_once(path):
    with held_by_another_process(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        assert json.loads(path.read_text())["pid"] == process.pid
        assert time.time() - path.stat().st_mtime < SILENT_SECONDS
        with locked(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"[1]", b"null", b"\xff\x00", b'{"host": '])
def test_a_file_without_an_owner_is_taken(path, content):
    path.parent.mkdir()
    path.write_bytes(content + b" " * 500)
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_an_owner_that_has_not_written_yet(path):
    import fcntl

    path.parent.mkdir()
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="is in use by another run; wait"), locked(path):
            raise AssertionError("two have it")
    with locked(path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "scan.run").write_text("a file")
    with pytest.raises(OSError, match=r"scan\.run"), locked(tmp_path / "scan.run" / "lock"):
        raise AssertionError("there is no folder")


# --- other hosts ------------------------------------------------------------------------------------------------


def other_host(path, age):
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "node-77", "pid": 4, "since": "2026-01-02 03:04:05"}))
    then = time.time() - age
    os.utime(path, (then, then))


@pytest.mark.parametrize("age", [0, SILENT_SECONDS - 15])
def test_a_live_owner_on_another_host(path, age):
    other_host(path, age)
    before = path.read_bytes(), path.stat().st_mtime
    message = r"in use by a run on node-77, process 4, since 2026-01-02 03:04:05; wait"
    for _ in range(2):  # and asking does not make it look alive
        with pytest.raises(LockedError, match=message), locked(path):
            raise AssertionError("two have it")
        assert (path.read_bytes(), path.stat().st_mtime) == before


def test_a_silent_owner_on_another_host(path):
    other_host(path, SILENT_SECONDS + 1)
    with locked(path):
        words = json.loads(path.read_text())
        assert (words["host"], words["pid"]) == (HERE, os.getpid())
        assert time.time() - path.stat().st_mtime < 30
    assert not path.exists()


def test_the_heartbeat(path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    with locked(path):
        for _ in range(2):
            os.utime(path, (0, 0))
            end = time.monotonic() + 20
            while path.stat().st_mtime == 0 and time.monotonic() < end:
                os.sched_yield()
            assert time.time() - path.stat().st_mtime < 30
    assert not path.exists()


@pytest.mark.parametrize("words", [None, {"host": "node-77", "run": "another"}])
def test_the_heartbeat_touches_nothing_of_others(path, monkeypatch, words):
    """A file that was removed does not come back, and the lock of the next owner gets no older owner's beats."""
    looks, opened = [], os.open
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.001)
    with locked(path):
        path.unlink()
        if words is not None:
            path.write_text(json.dumps(words))
            os.utime(path, (0, 0))
        monkeypatch.setattr(os, "open", lambda *args: (looks.append(1), opened(*args))[1])
        end = time.monotonic() + 20
        while len(looks) < 6 and time.monotonic() < end:
            os.sched_yield()
        assert len(looks) >= 6
        assert path.exists() is (words is not None)
        assert words is None or path.stat().st_mtime == 0
    assert path.exists() is (words is not None)


def test_a_lock_that_cannot_be_written_is_not_held(path, monkeypatch):
    """Neither by this process, which may go on for long: the next try has it."""

    def full(handle, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space") as caught, locked(path):
            pass
        assert str(path) in str(caught.value)
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


# --- file systems without locks ---------------------------------------------------------------------------------

#: ENOLCK of NFS, ENOSYS of Lustre, EINVAL and EOPNOTSUPP of others, 524 of Cray's DVS
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, 524)


def flock_ends_in(monkeypatch, number):
    import fcntl

    def refuse(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def no_locks(monkeypatch):
    flock_ends_in(monkeypatch, errno.ENOSYS)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_what_says_that_another_process_holds_it(path, monkeypatch, number):
    flock_ends_in(monkeypatch, number)
    with pytest.raises(LockedError, match="is in use by another run"), locked(path):
        raise AssertionError("another process holds it")


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_file_system_without_locks(path, monkeypatch, no_locks, number):
    """The words decide, between two runs of this host as well."""
    flock_ends_in(monkeypatch, number)
    for _ in range(2):
        with locked(path) as lock:
            assert lock.without == os.strerror(number)
            message = rf"in use by a run on {re.escape(HERE)}, process {os.getpid()}, since"
            with pytest.raises(LockedError, match=message), locked(path):
                raise AssertionError("two have it")
            lock.check()
        assert not path.exists()


def test_another_process_without_locks(path, no_locks):
    with held_by_another_process(path) as process:
        os.utime(path, (0, 0))  # paused for long, and alive
        with pytest.raises(LockedError, match=f"process {process.pid}"), locked(path):
            raise AssertionError("two have it")
        process.kill()
        process.wait(20)
        os.utime(path)  # it touched the file a moment before it died
        with locked(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_number_that_another_process_has_by_now(path, no_locks):
    with locked(path):
        words = json.loads(path.read_text())
    path.write_text(json.dumps({**words, "started": "1"}))
    with locked(path):
        assert json.loads(path.read_text())["run"] != words["run"]


@pytest.mark.parametrize("age", [0, SILENT_SECONDS + 1])
def test_a_number_in_another_container(path, no_locks, age):
    """It says nothing here, although the host has the same name: the heartbeat decides."""
    with locked(path):
        words = json.loads(path.read_text())
    path.write_text(json.dumps({**words, "numbering": "of another start of the machine", "pid": 0}))
    os.utime(path, (time.time() - age,) * 2)
    if age:
        with locked(path):
            return
    with pytest.raises(LockedError, match="in use by a run on"), locked(path):
        raise AssertionError("two have it")


@pytest.mark.parametrize("age", [0, SILENT_SECONDS + 1])
def test_an_owner_on_another_host_without_locks(path, no_locks, age):
    other_host(path, age)
    if age:
        with locked(path):
            return
    with pytest.raises(LockedError, match="node-77"), locked(path):
        raise AssertionError("two have it")


# --- taken over -------------------------------------------------------------------------------------------------


def test_two_hosts_take_over_at_once(path, monkeypatch):
    """Both found the owner silent; of both that wrote their words the last one has it."""
    other_host(path, SILENT_SECONDS + 1)
    winner = json.dumps({"host": "node-78", "pid": 5, "since": "now", "run": "of node-78"})
    monkeypatch.setattr(module.time, "sleep", lambda seconds: path.write_text(winner))
    with pytest.raises(LockedError, match="a run on node-78, process 5"), locked(path):
        raise AssertionError("two have it")
    assert path.read_text() == winner


def test_an_owner_that_was_taken_over_notices(path):
    with locked(path) as lock:
        lock.check()
        winner = json.dumps({"host": "node-78", "pid": 5, "since": "now", "run": "of node-78"})
        path.write_text(winner)
        with pytest.raises(
            LockedError, match="taken over by a run on node-78, process 5"
        ) as caught:
            lock.check()
        assert caught.value.exit_code == 6
    assert path.read_text() == winner


def test_an_owner_whose_file_is_gone_notices(path):
    with locked(path) as lock:
        path.unlink()
        with pytest.raises(LockedError, match=r"scan\.run/lock is gone"):
            lock.check()
    assert not path.exists()
