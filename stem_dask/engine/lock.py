"""One live run for each output: a lock file here, and next to an output in an object store an object, name their owner.

On one host the system's file lock decides, and a dead owner's is free at once. Between hosts of a shared file system, and
where a file system has no file locks, the words in the file decide: the owner touches it every few seconds.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from stem_dask.core.errors import ConfigError, LockedError, StemDaskError, StoreError
from stem_dask.storage.errors import translate
from stem_dask.storage.location import at, of_output

_logger = logging.getLogger("stem_dask")

HEARTBEAT_SECONDS = 5.0

#: an owner on another host that was silent for so long is taken for dead
SILENT_SECONDS = 60.0

#: where no file lock decides, of all that write their words within this time the last one is the owner
SETTLE_SECONDS = 0.5

Owner = dict[str, Any]


class Lock:
    """The hold of this process on a lock file; made by `locked`.

    ``without`` is the reason why the system's file lock does not protect it, "" where it does.
    """

    def __init__(self, path: Path, handle: int, without: str) -> None:
        self.path, self.without, self.run = path, without, uuid4().hex
        words = {**_this_process(self.run), "started": _started(os.getpid()), "numbering": _numbering()}  # fmt: skip
        with translate(StoreError, path):
            # in one piece over the former words, so that the file is never without an owner, nor holds parts of two
            os.pwrite(handle, json.dumps(words).encode().ljust(512), 0)
            os.ftruncate(handle, 512)
            os.fsync(handle)

    def owner(self) -> Owner:
        """The words of the file, opened anew: a network file system may show an open handle an older state."""
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return {}
        with open(handle, "rb", buffering=0) as file:
            return _parsed(file.read(4096))

    def is_held(self) -> bool:
        """Whether the file still names this process."""
        return bool(self.owner().get("run") == self.run)

    def check(self) -> None:
        """Raise LockedError when another run has taken the lock over, or the file is gone."""
        owner = self.owner()
        if owner and owner.get("run") != self.run:
            raise LockedError(
                f"{self.path.parent} was taken over by {_name(owner)} while this run was silent for more than "
                f"{SILENT_SECONDS:.0f} s; this run stops and leaves the output to it"
            )
        if not owner:
            raise LockedError(
                f"{self.path} is gone: another run took it over and ended, or it was deleted; run the same command again"
            )

    def beat(self, stop: threading.Event) -> None:
        """Touch the file every few seconds."""
        while not stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self.is_held():
                    os.utime(self.path)


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
    path = Path(path)
    handle, without = _held(path, needs_flock)
    stop = threading.Event()
    try:
        owner = _parsed(os.pread(handle, 4096, 0))
        is_silent = time.time() - os.fstat(handle).st_mtime >= SILENT_SECONDS
        elsewhere = bool(owner) and owner.get("host") != socket.gethostname()
        if without:  # no lock has decided on this host
            elsewhere |= bool(owner) and owner.get("numbering") != _numbering()
        # of this host, another process may have its number by now
        lives = _lives(owner) and _started(owner["pid"]) in ("", owner.get("started"))
        if not is_silent if elsewhere else without and lives:
            raise _refusal(path, owner)
        lock = Lock(path, handle, without)
        if without or elsewhere:
            time.sleep(SETTLE_SECONDS)
            if not lock.is_held():
                raise _refusal(path, lock.owner())
        beat = threading.Thread(target=lock.beat, args=(stop,), daemon=True)
        beat.start()
        try:
            yield lock
        finally:
            stop.set()
            beat.join()
            with contextlib.suppress(OSError):
                if lock.is_held():
                    os.unlink(path)
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)  # else this process would hold the lock until its end


def _held(path: Path, needs_flock: bool) -> tuple[int, str]:
    """The open file under the system's lock, and why there is no such lock ("" where there is)."""
    try:
        import fcntl
    except ImportError:
        raise ConfigError(
            "this Python has no module fcntl, which locks the output; on Windows, run stem_dask in WSL2"
        ) from None

    for attempts_left in reversed(range(1000)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except (FileNotFoundError, FileExistsError):  # a run that ends may just remove the folder
            if not attempts_left:
                raise
            continue
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, handle)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileExistsError(errno.EEXIST, "not a regular file", str(path))
            without = ""
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                    raise _refusal(path, _new_owner(handle)) from None
                if needs_flock:
                    raise
                without = os.strerror(error.errno or 0)  # there are no locks here
            # the former owner may have removed the file between our open and our lock
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    stack.pop_all()
                    return handle, without
    raise _refusal(path, {})


def _parsed(content: bytes) -> Owner:
    with contextlib.suppress(ValueError):
        words = json.loads(content)
        return words if isinstance(words, dict) else {}
    return {}


def _new_owner(handle: int) -> Owner:
    """The owner of a lock that is held: a new one may not have written its name yet over that of a dead one."""
    for wait_seconds in (0.01, 0.05, 0.2):
        owner = _parsed(os.pread(handle, 4096, 0))
        if owner and (owner.get("host") != socket.gethostname() or _lives(owner)):
            return owner
        time.sleep(wait_seconds)
    return _parsed(os.pread(handle, 4096, 0))


def _lives(owner: Owner) -> bool:
    import psutil  # type: ignore[import-untyped]  # comes with distributed

    pid = owner.get("pid")
    return isinstance(pid, int) and bool(psutil.pid_exists(pid))


def _started(pid: int) -> str:
    """When a process began, as the system counts; "" where the system does not tell."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _numbering() -> str:
    """What process numbers are unique in: one start of this machine, and one container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _this_process(run: str) -> Owner:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _name(owner: Owner) -> str:
    words = "a run on {host}, process {pid}, since {since}"
    return words.format_map({"host": None, "pid": None, "since": None, **owner}) if owner else "another run"  # fmt: skip


def _refusal(path: Path, owner: Owner) -> LockedError:
    return LockedError(
        f"{path.parent} is in use by {_name(owner)}; wait for it, or choose another output.path"
    )


@contextlib.contextmanager
def owned(url: str, folder: str | Path) -> Iterator[Callable[[], None]]:
    """Hold an output in an object store, also from several machines, or raise at once; yields a check of the hold.

    The object ``NAME.zarr.owner`` is written on the condition that there is none, or that of the last run in ``folder``: the
    caller holds the lock of that folder, so that run is dead.

    Raises
    ------
    LockedError
        When a run elsewhere holds it, or the check finds that another one has taken it over.
    """
    place, note, run = at(f"{url}.owner"), Path(folder, "owner"), uuid4().hex

    def owner() -> Owner:
        with contextlib.suppress(FileNotFoundError), of_output():
            return _parsed(place.read_bytes())
        return {}

    def check() -> None:
        with contextlib.suppress(StoreError):  # the store does not answer: the next time
            if owner().get("run") != run:
                raise LockedError(
                    f"{url}: another run took it over, or {place} was removed; this run stops and leaves the output to it"
                )

    before = note.read_text() if note.exists() else None
    etag, other = "", {}
    with contextlib.suppress(FileNotFoundError), of_output():
        etag, other = place.stat().etag, owner()
    if etag and (before is None or other.get("run") != before):
        raise LockedError(
            f"{url} is in use by {_name(other)}; wait for it, or choose another output.path (if that run has died, remove "
            f"{place})"
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(run)  # first: should this run die, the next one in the folder knows its object
    try:
        place.write_bytes(json.dumps(_this_process(run)).encode(), onto=etag)
    except (FileExistsError, FileNotFoundError):
        if owner().get("run") != run:  # else the answer to a first try was lost
            raise LockedError(f"{url}: another run has just begun; wait for it") from None
    except StoreError as error:
        if error.errno == errno.EACCES and before is None:  # refused: nothing was written
            note.unlink()
        if error.errno != errno.ENOTSUP:
            raise
        _logger.warning("%s: this store does not write on condition; runs on two machines are not kept apart", url)  # fmt: skip
        yield lambda: None
        return
    try:
        yield check
    finally:
        with contextlib.suppress(StemDaskError):
            if owner().get("run") == run:
                place.unlink()
                note.unlink(missing_ok=True)
