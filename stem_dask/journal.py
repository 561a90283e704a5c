"""What a run has finished, line by line, so that the same command goes on where it was stopped."""

import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from stem_dask.io.publish import named
from stem_dask.model import Record

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

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
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
        self._file: BinaryIO | None = None
        self._synced = time.monotonic()

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
        if self._file is None:
            self._file = open(self.path, "ab")  # noqa: SIM115  closed by close()
            if self._file.tell():
                self._file.write(b"\n")  # ends a torn line, so that the next one is whole
        with named(self.path):
            self._file.write(json.dumps(words).encode() + b"\n")
            self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring all lines to the disk."""
        if self._file is not None:
            with named(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Bring all lines to the disk and close; closed it is, whatever happens."""
        file, self._file = self._file, None
        if file is not None:
            with named(self.path), file:
                file.flush()
                os.fsync(file.fileno())

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        found = []
        for text in self.path.read_bytes().split(b"\n"):
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                found.append(line)
        return found
