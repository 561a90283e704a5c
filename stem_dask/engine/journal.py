"""What a run has finished, line by line, so that the same command goes on where it was stopped."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import StoreError
from stem_dask.core.model import Record
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import opened, sync

#: a finished block is on disk at the latest after this many seconds
SYNC_SECONDS = 1.0


class Journal:
    """Lines of JSON, one a finished block, only ever appended.

    A line that was torn by a kill does not parse, and its block is done again.

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
        content = b""
        if os.path.lexists(self.path):
            with opened(self.path, "rb") as file:
                content = file.read()
        for text in content.split(b"\n"):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                line = json.loads(text)
                if "forgotten" in line:
                    self.known.pop(str(line["forgotten"]), None)
                    continue
                numbers = int(line["index"]), float(line["seconds"]), int(line["bytes_out"]), int(line["peak_rss"])  # fmt: skip
                record = Record(*numbers, dict(line["extra"]))
                self.known.setdefault(str(line["job"]), {})[record.index] = record
        self._file: IO[bytes] | None = None
        self._synced = time.monotonic()
        self._later: threading.Timer | None = None

    def records(self, job: str) -> dict[int, Record]:
        """The blocks of a job that were finished, by index."""
        return dict(self.known.get(job, {}))

    def append(self, job: str, record: Record) -> None:
        """Note a finished block."""
        self.known.setdefault(job, {})[record.index] = record
        self._write({"job": job, **asdict(record), "seconds": round(record.seconds, 4)})

    def forget(self, job: str) -> None:
        """Note that nothing of a job counts any more."""
        if self.known.pop(job, None):
            self._write({"forgotten": job})

    def _write(self, words: dict[str, Any]) -> None:
        is_due = time.monotonic() - self._synced > SYNC_SECONDS
        if is_due:
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
        if is_due:
            self.sync()
        elif self._later is None:  # no other line may follow
            self._later = threading.Timer(SYNC_SECONDS, self._sync_quietly)
            self._later.daemon = True
            self._later.start()

    def sync(self) -> None:
        """Bring all lines to the disk."""
        later, self._later = self._later, None
        if later is not None:
            later.cancel()
        if (file := self._file) is not None:
            with translate(StoreError, self.path):
                file.flush()
                os.fsync(file.fileno())
        self._synced = time.monotonic()

    def _sync_quietly(self) -> None:
        with contextlib.suppress(
            OSError, ValueError
        ):  # goes wrong again when the journal is closed
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


@dataclass
class Tally:
    """Adds up what the records of finished blocks say: memory, errors that passed, blocks that could not be read.

    Examples
    --------
    >>> tally = Tally()
    >>> tally.note([Record(1, 0.1, 64, 0, {"region": [[2, 4]], "quarantined": "block [2:4]: gone"})])
    >>> tally.valid((6,)).tolist()
    [True, True, False, False, True, True]
    """

    peak_rss: int = 0
    n_retries: int = 0
    #: records of blocks that could not be read, by index
    quarantined: dict[int, Record] = field(default_factory=dict)
    #: positions that the input itself says are missing, by the array ``valid`` of an earlier run
    lost: NDArray[np.bool_] | None = None

    def note(self, records: Iterable[Record]) -> None:
        """Take in the records of a pass."""
        for record in records:
            self.peak_rss = max(self.peak_rss, record.peak_rss)
            self.n_retries += record.extra.get("retries", 0)
            if "quarantined" in record.extra:
                self.quarantined.setdefault(record.index, record)

    @property
    def unreadable(self) -> dict[int, str]:
        """Why a block could not be read, by its index."""
        return {index: record.extra["quarantined"] for index, record in self.quarantined.items()}

    def valid(self, lead: Sequence[int]) -> NDArray[np.bool_]:
        """Which positions of a scan (or list) could be read."""
        valid = np.ones(tuple(lead), bool) if self.lost is None else ~self.lost
        for record in self.quarantined.values():
            valid[tuple(slice(*part) for part in record.extra["region"])] = False
        return valid

    def words(self, lead: Sequence[int]) -> dict[str, Any]:
        """What the results say of it."""
        blocks = [
            {"region": record.extra["region"], "why": record.extra["quarantined"]}
            for _, record in sorted(self.quarantined.items())
        ]
        n_missing = int((~self.valid(lead)).sum())
        n_before = 0 if self.lost is None else int(self.lost.sum())
        return {
            "retries": self.n_retries,
            "quarantined": {"n_patterns": n_missing, "before": n_before, "blocks": blocks},
        }
