"""One live run for each output: a lock file that names its owner.

On one host the system's file lock decides, and a dead owner's is free at once. Runs on other hosts of a shared file
system are told by the heartbeat: the owner touches the file every few seconds.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stem_dask.errors import ConfigError, LockedError
from stem_dask.io.publish import named

HEARTBEAT_SECONDS = 5.0
#: an owner on another host that was silent for so long is taken for dead
SILENT_SECONDS = 60.0
#: waits for the name of a new owner, in seconds
NAMED_SECONDS = (0.01, 0.05, 0.2)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the lock, or raise at once.

    Raises
    ------
    LockedError
        When a live run holds it; the message names host, process and since when.
    """
    path = Path(path)
    handle = _acquire(path)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            os.close(handle)  # the file is gone: nothing can be lost with it


def _acquire(path: Path) -> int:
    try:
        import fcntl
    except ImportError:
        raise ConfigError(
            "this Python has no module fcntl, which locks the output; on Windows, run stem_dask in WSL2"
        ) from None

    while True:
        handle = _opened(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = _live_owner(handle)
            os.close(handle)
            raise LockedError(_refusal(path, owner)) from None
        # the former owner may have removed the file between our open and our lock
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)
    owner = _owner(handle)
    silent = time.time() - os.fstat(handle).st_mtime
    if owner and owner.get("host") != socket.gethostname() and silent < SILENT_SECONDS:
        os.close(handle)
        raise LockedError(_refusal(path, owner))
    words = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    try:
        with named(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(words).encode(), 0)
    except OSError:
        with contextlib.suppress(OSError):
            os.close(handle)  # this process would hold the lock until its end
        raise
    return handle


def _opened(path: Path, attempts: int = 100) -> int:
    """The lock file, made when it is not there; a run that ends may remove the folder at this very moment."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileNotFoundError, FileExistsError):
            attempts -= 1
            if not attempts:
                raise


def _owner(handle: int) -> dict[str, Any]:
    try:
        words = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return words if isinstance(words, dict) else {}


def _live_owner(handle: int) -> dict[str, Any]:
    """The owner of a lock that is held: whoever just took it may not have written its name yet over that of a dead one."""
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
    except PermissionError:  # of somebody else
        return True
    return True


def _refusal(path: Path, owner: dict[str, Any]) -> str:
    who = "another run"
    if owner:
        who = (
            f"a run on {owner.get('host')}, process {owner.get('pid')}, since {owner.get('since')}"
        )
    return f"{path.parent} is in use by {who}; wait for it, or choose another output.path"


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
