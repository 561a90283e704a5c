"""Folders of a run for its workers: their files on this machine, and keys; what a run that was killed has left is removed."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stem_dask.core.errors import LockedError
from stem_dask.engine.lock import locked

#: of such folders; "new" while nobody holds it yet
PREFIX, NEW = "stem_dask-workers-", "stem_dask-new-"

#: of folders with keys, and of what is held while there is one
KEYS, HELD = "keys-", ".lock"


@contextlib.contextmanager
def scratch(place: str | Path) -> Iterator[str]:
    """A folder below ``place``, removed at the end; those of dead owners there are removed first.

    The owner holds the system's lock on its folder, which ends with the owner however that ends: no number of a process
    is looked at, which another process or another machine may have too. Where a file system has no such lock for
    folders (NFS), nothing is removed but the own one.

    Examples
    --------
    >>> with scratch(tempfile.gettempdir()) as folder:
    ...     print(os.path.isdir(folder))
    True
    """
    _remove_abandoned(Path(place))
    made = Path(tempfile.mkdtemp(prefix=NEW, dir=place))
    handle = _held(made)
    folder = made.with_name(PREFIX + made.name.removeprefix(NEW))
    made.rename(folder)  # only now, with the lock in hand, is it looked at by others
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _held(folder: Path) -> int | None:
    """A handle that holds the lock on a folder; None when another one does, or there are no locks here."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (ImportError, AttributeError, OSError):  # not POSIX; not a folder, or gone
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_abandoned(place: Path) -> None:
    """Folders of this user that nobody holds."""
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if os.lstat(folder).st_uid != os.getuid():
                continue
            handle = _held(folder)
            if handle is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


@contextlib.contextmanager
def keys(place: str | Path) -> Iterator[str]:
    """A folder that only its owner reads, below one that other machines see too; removed at the end, as are those of dead runs.

    Beside it lies a lock (`stem_dask.engine.lock`), which is held before the folder is made, and longer than it lasts: that of a run
    on this machine is free at its end, and of one elsewhere that was silent for a minute. Without locks nothing is removed
    but the own folder.

    Examples
    --------
    >>> with keys(tempfile.mkdtemp()) as folder:
    ...     oct(os.stat(folder).st_mode & 0o777)
    '0o700'
    """
    for lock in Path(place).glob(f"{KEYS}*{HELD}"):
        with contextlib.suppress(OSError, LockedError):
            if os.lstat(lock).st_uid == os.getuid():
                with locked(lock, needs_flock=True):
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    folder = Path(place) / f"{KEYS}{secrets.token_hex(8)}"
    lock = folder.with_name(folder.name + HELD)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, needs_flock=True))
        except (OSError, LockedError):
            lock.unlink(missing_ok=True)
        folder.mkdir(mode=0o700)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield str(folder)
