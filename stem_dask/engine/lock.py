"""One live run for each output: a lock file that names its owner.

On one host the system's file lock decides, and a dead owner's is free at once. Between hosts of a shared file system, and
where a file system has no file locks, the words in the file decide: the owner touches it every few seconds.
"""

import contextlib
import errno
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from stem_dask.core.errors import ConfigError, LockedError, StoreError
from stem_dask.storage.errors import translate

HEARTBEAT_SECONDS = 5.0

#: an owner on another host that was silent for so long is taken for dead
SILENT_SECONDS = 60.0

#: waits for the name of a new owner, in seconds
NAMED_SECONDS = (0.01, 0.05, 0.2)

#: where no file lock decides, of all that write their words within this time the last one is the owner
SETTLE_SECONDS = 0.5

#: flock ends in one of these where another process holds the lock; any other error says that there are no locks here
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)

#: the words take so many bytes, so that those of one owner cover another's
WORDS_BYTES = 512


class Lock:
    """The hold of this process on a lock file; made by `locked`.

    ``without`` is the reason why the system's file lock does not protect it, "" where it does.
    """

    def __init__(self, path: Path, handle: int, without: str) -> None:
        self.path, self.handle, self.without = path, handle, without
        self.words: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "numbering": _numbering(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "run": uuid4().hex,
        }

    def write(self) -> None:
        """Name this process as the owner."""
        with translate(StoreError, self.path):
            # in one piece over the former words, so that the file is never without an owner
            os.pwrite(self.handle, json.dumps(self.words).encode().ljust(WORDS_BYTES), 0)
            os.ftruncate(self.handle, WORDS_BYTES)
            os.fsync(self.handle)

    def is_held(self) -> bool:
        """Whether the file still names this process."""
        return _read(self.path).get("run") == self.words["run"]

    def check(self) -> None:
        """Raise LockedError when another run has taken the lock over, or the file is gone."""
        owner = _read(self.path)
        if owner.get("run") == self.words["run"]:
            return
        if owner:
            raise LockedError(
                f"{self.path.parent} was taken over by {_name(owner)} while this run was silent for more than "
                f"{SILENT_SECONDS:.0f} s; this run stops and leaves the output to it"
            )
        raise LockedError(
            f"{self.path} is gone: another run took it over and ended, or it was deleted; this run stops, run the same "
            "command again"
        )


@contextlib.contextmanager
def locked(path: str | Path, *, needs_flock: bool = False) -> Iterator[Lock]:
    """Hold the lock, or raise at once.

    Parameters
    ----------
    path : of the lock file; its folder is made where it is missing
    needs_flock : the heartbeat alone does not suffice

    Raises
    ------
    LockedError
        When a live run holds it; the message names host, process and since when.
    OSError
        When the file cannot be made, is a link or no regular file; or the file system has no locks, with ``needs_flock``.
    """
    lock = _acquire(Path(path), needs_flock)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, stop), daemon=True)
    beat.start()
    try:
        yield lock
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(OSError):
            if lock.is_held():
                os.unlink(lock.path)
        with contextlib.suppress(OSError):
            os.close(lock.handle)  # the file is gone: nothing can be lost with it


def _acquire(path: Path, needs_flock: bool) -> Lock:
    handle, without = _held(path, needs_flock)
    try:
        owner = _owner(handle)
        silent = time.time() - os.fstat(handle).st_mtime
        elsewhere = bool(owner) and owner.get("host") != socket.gethostname()
        if without:  # no lock has decided on this host
            elsewhere |= bool(owner) and owner.get("numbering") != _numbering()
        if silent < SILENT_SECONDS if elsewhere else without and _is_process(owner):
            raise LockedError(_refusal(path, owner))
        lock = Lock(path, handle, without)
        lock.write()
        if without or elsewhere:
            time.sleep(SETTLE_SECONDS)
            if not lock.is_held():
                raise LockedError(_refusal(path, _read(path)))
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(handle)  # this process would hold the lock until its end
        raise
    return lock


def _held(path: Path, needs_flock: bool) -> tuple[int, str]:
    """The open file under the system's lock, and why there is no such lock ("" where there is)."""
    try:
        import fcntl
    except ImportError:
        raise ConfigError(
            "this Python has no module fcntl, which locks the output; on Windows, run stem_dask in WSL2"
        ) from None

    while True:
        handle, without = _opened(path), ""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                owner = _live_owner(handle)
                os.close(handle)
                raise LockedError(_refusal(path, owner)) from None
            if needs_flock:
                os.close(handle)
                raise
            without = os.strerror(error.errno or 0)
        # the former owner may have removed the file between our open and our lock
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle, without
        os.close(handle)


def _opened(path: Path, attempts: int = 100) -> int:
    """The lock file, made when it is missing; a run that ends may remove the folder at this very moment."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except (FileNotFoundError, FileExistsError):
            attempts -= 1
            if not attempts:
                raise
            continue
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
        raise FileExistsError(errno.EEXIST, "not a regular file", str(path))


def _read(path: Path) -> dict[str, Any]:
    """The words of a lock file, opened anew: a network file system may show an open handle an older state."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {}
    try:
        return _owner(handle)
    finally:
        os.close(handle)


def _owner(handle: int) -> dict[str, Any]:
    try:
        words = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return words if isinstance(words, dict) else {}


def _live_owner(handle: int) -> dict[str, Any]:
    """The owner of a lock that is held: a new owner may not have written its name yet over that of a dead one."""
    for wait_seconds in NAMED_SECONDS:
        owner = _owner(handle)
        if owner and (owner.get("host") != socket.gethostname() or _lives(owner.get("pid"))):
            return owner
        time.sleep(wait_seconds)
    return _owner(handle)


def _lives(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def _is_process(owner: dict[str, Any]) -> bool:
    """Whether the process that a file of this host names still runs; another process may have its number by now."""
    pid = owner.get("pid")
    return _lives(pid) and _started(pid) in ("", owner.get("started"))


def _started(pid: Any) -> str:
    """When a process began, as the system counts; "" where the system does not tell."""
    try:
        words = Path(f"/proc/{int(pid)}/stat").read_text()
    except OSError:
        return ""
    return words.rpartition(")")[2].split()[19]


def _numbering() -> str:
    """What process numbers are unique in: one start of this machine, and one container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another run"
    return f"a run on {owner.get('host')}, process {owner.get('pid')}, since {owner.get('since')}"


def _refusal(path: Path, owner: dict[str, Any]) -> str:
    return f"{path.parent} is in use by {_name(owner)}; wait for it, or choose another output.path"


def _beat(lock: Lock, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            if lock.is_held():
                os.utime(lock.path)
