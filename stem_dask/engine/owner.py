"""One live run for each output in an object store, also from several machines: an object that names its owner.

The lock of `stem_dask.engine.lock` is a file of one machine. This one is an object next to the output, ``NAME.zarr.owner``, that is
written on condition: to make it, there must be none; to renew it, it must be the one that was written last.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from stem_dask.core.errors import LockedError, StemDaskError, StoreError
from stem_dask.storage import s3 as objects

_logger = logging.getLogger("stem_dask")

HEARTBEAT_SECONDS = 30.0

#: an owner on another machine that was silent for so long is taken for dead; clocks may differ by a part of it
SILENT_SECONDS = 180.0


class Owner:
    """The hold of one run on an output; made by `owned`."""

    def __init__(self, url: str, folder: str | Path) -> None:
        self.url, self.store = f"{url}.owner", url
        #: names the last owner that had the folder: when it did not end, its object waits for the next one
        self.note = Path(folder, "owner")
        self.words: dict[str, Any] = {
            "run": uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self.etag = ""
        self.lost = False

    def take(self) -> None:
        """Become the owner, or raise LockedError; the place of a dead run is taken over."""
        before = self.note.read_text() if self.note.exists() else None
        onto = self._free_to_take(before)
        self.note.parent.mkdir(parents=True, exist_ok=True)
        self.note.write_text(self.words["run"])
        try:
            self.etag = self._put(onto)
        except (FileExistsError, FileNotFoundError):
            if not self._is_own():
                raise LockedError(
                    f"{self.store}: another run has just begun; wait for it"
                ) from None
        except StoreError as error:
            if (
                error.errno == errno.EACCES and before is None
            ):  # refused, so that nothing was written
                self.note.unlink()
            raise

    def _free_to_take(self, before: str | None) -> str:
        """The mark of the object that can be replaced, "" when there is none."""
        try:
            with objects.of_output():
                status, words = objects.look(self.url), self._read()
        except FileNotFoundError:
            return ""
        silent = time.time() - status.st_mtime_ns / 1e9
        # we hold the lock of the folder: the run that had it before is dead
        is_dead = before is not None and words.get("run") == before
        if not is_dead and silent < SILENT_SECONDS:
            raise LockedError(
                f"{self.store} is in use by a run on {words.get('host')}, process {words.get('pid')}, since "
                f"{words.get('since')}; wait for it, or choose another output.path (a run that died there is given up "
                f"after {SILENT_SECONDS / 60:.0f} minutes)"
            )
        return status.etag

    def beat(self) -> None:
        """Renew the object; find out whether another run has taken the output over."""
        with contextlib.suppress(StemDaskError):  # the store does not answer: the next time
            try:
                self.etag = self._put(self.etag)
            except (FileExistsError, FileNotFoundError):
                self.lost = not self._is_own()

    def check(self) -> None:
        """Raise LockedError when the output is another run's by now."""
        self.beat()
        if self.lost:
            raise LockedError(
                f"{self.store}: another run took it over, because this one was silent for too long "
                "(or the clocks of the machines differ); wait for it"
            )

    def release(self) -> None:
        """Remove the object, when it is still this run's."""
        with contextlib.suppress(StemDaskError):
            if not self.lost and self._is_own():
                objects.remove(self.url)
                self.note.unlink(missing_ok=True)

    def _is_own(self) -> bool:
        """Whether the object is this run's; its mark is noted: an answer may have been lost on its way."""
        try:
            self.etag = objects.look(self.url).etag
            return self._read().get("run") == self.words["run"]
        except FileNotFoundError:
            return False

    def _put(self, onto: str) -> str:
        return objects.put(self.url, json.dumps(self.words).encode(), onto=onto)

    def _read(self) -> dict[str, Any]:
        try:
            words = json.loads(objects.read(self.url))
        except ValueError:
            return {}
        return words if isinstance(words, dict) else {}


@contextlib.contextmanager
def owned(url: str, folder: str | Path) -> Iterator[Owner]:
    """Hold an output in an object store, or raise at once.

    Parameters
    ----------
    url : of the output
    folder : of the run, here; its lock is held by the caller

    Raises
    ------
    LockedError
        When a live run elsewhere holds it.
    """
    owner = Owner(url, folder)
    try:
        owner.take()
    except StoreError as error:
        if error.errno != errno.ENOTSUP:
            raise
        _logger.warning(
            "%s: this store does not write on condition; runs on two machines are not kept apart",
            url,
        )
        yield owner
        return
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(owner, stop), daemon=True)
    thread.start()
    try:
        yield owner
    finally:
        stop.set()
        thread.join()
        owner.release()


def _beat(owner: Owner, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        owner.beat()
