"""What a run has finished, line by line, so that the same command goes on where it was stopped."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from stem_dask.core.errors import StoreError
from stem_dask.core.model import Record
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import opened, sync

#: a finished block is on disk at the latest after this many seconds
SYNC_SECONDS = 1.0


class Journal:
    """Lines of JSON, one a finished block, only ever appended.

    A line that was torn by a kill does not parse, and its block is done again. Nothing is read but the lines' own
    words: no pickle.

    Examples
    --------
    >>> import tempfile
    >>> journal = Journal(tempfile.mkdtemp() + "/journal")
    >>> journal.append("crop", Record(0, 0.5, 10, 0, {"crc": 7}))
    >>> journal.close()
    >>> Journal(journal.path).records("crop")[0].extra
    {'crc': 7}
    """

    def __init__(self, path: str | Path, hold: Callable[[], None] = lambda: None) -> None:
        self.path = Path(path)
        #: raises when another run has taken the output over; asked once a second at most
        self.hold = hold
        self.known: dict[str, dict[int, Record]] = {}
        for line in self._lines():
            if "forgotten" in line:
                self.known.pop(str(line["forgotten"]), None)
                continue
            try:
                record = Record(
                    int(line["index"]),
                    float(line["seconds"]),
                    int(line["bytes_out"]),
                    int(line["peak_rss"]),
                    dict(line["extra"]),
                )
                self.known.setdefault(str(line["job"]), {})[record.index] = record
            except (KeyError, TypeError, ValueError):
                continue
        self._file: IO[bytes] | None = None
        self._synced = time.monotonic()
        self._later: threading.Timer | None = None

    def records(self, job: str) -> dict[int, Record]:
        """The blocks of a job that were finished, by index."""
        return dict(self.known.get(job, {}))

    def append(self, job: str, record: Record) -> None:
        """Note a finished block."""
        self.known.setdefault(job, {})[record.index] = record
        words: dict[str, Any] = {
            "job": job,
            "index": record.index,
            "seconds": round(record.seconds, 4),
            "bytes_out": record.bytes_out,
            "peak_rss": record.peak_rss,
            "extra": record.extra,
        }
        self._write(words)

    def forget(self, job: str) -> None:
        """Note that nothing of a job counts any more."""
        if self.known.pop(job, None):
            self._write({"forgotten": job})

    def _write(self, words: dict[str, Any]) -> None:
        due = time.monotonic() - self._synced > SYNC_SECONDS
        if due:
            self.hold()
        if self._file is None:
            is_new = not os.path.lexists(self.path)
            self._file = opened(self.path, "ab")
            if is_new:
                sync(self.path.parent)
            if self._file.tell():
                self._file.write(b"\n")  # ends a torn line, so that the next one is whole
        with translate(StoreError, self.path):
            self._file.write(json.dumps(words).encode() + b"\n")
            self._file.flush()
        if due:
            self.sync()
        elif self._later is None:
            self._later = threading.Timer(SYNC_SECONDS, self._sync_quietly)
            self._later.daemon = True
            self._later.start()

    def sync(self) -> None:
        """Bring all lines to the disk."""
        later, self._later = self._later, None
        if later is not None:
            later.cancel()
        file = self._file
        if file is not None:
            with translate(StoreError, self.path):
                file.flush()
                os.fsync(file.fileno())
        self._synced = time.monotonic()

    def _sync_quietly(self) -> None:
        """For the lines that no other follows within a second; what goes wrong, goes wrong again when the journal is closed."""
        with contextlib.suppress(OSError, ValueError):
            self.sync()

    def close(self) -> None:
        """Bring all lines to the disk and close; closed it is, whatever happens."""
        later, self._later = self._later, None
        if later is not None:
            later.cancel()
            later.join()
        file, self._file = self._file, None
        if file is not None:
            with translate(StoreError, self.path), file:
                file.flush()
                os.fsync(file.fileno())

    def _lines(self) -> list[dict[str, Any]]:
        if not os.path.lexists(self.path):
            return []
        found = []
        with opened(self.path, "rb") as file:
            content = file.read()
        for text in content.split(b"\n"):
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                found.append(line)
        return found
