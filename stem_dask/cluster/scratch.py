"""The folder with the TLS keys of a run for workers in jobs of SLURM."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from stem_dask.core.errors import LockedError
from stem_dask.engine.lock import locked

#: prefix of such folders, and suffix of their locks
KEYS, HELD = "keys-", ".lock"


@contextlib.contextmanager
def keys(place: str | Path) -> Iterator[str]:
    """A folder that only its owner reads, below one that other machines see too; removed at the end, as are those of dead runs.

    Next to it lies a lock (`stem_dask.engine.lock`), which is held before the folder is made, and longer than it lasts: that of a run
    on this machine is free at its end, and of one elsewhere that was silent for a minute. Without locks nothing is removed
    but the own folder.

    Examples
    --------
    >>> import tempfile
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
