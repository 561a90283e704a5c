"""Fences between the starts of a run: a worker of an earlier start that wakes up late writes nothing into the output.

The `create` of a sink begins a start and gives it a nonce. A file that is renamed is built in a staging folder named after the
nonce. `create` removes the staging folders of earlier starts, so that no rename out of them can succeed any more, no matter
when it is tried. A file that is written in place ends with the nonce until it is finished: a worker compares it after it has
opened the file, and before each write. A fresh start makes a new file, so that an open handle never leads to its bytes.

`finish` compares each file with its record. Every writer puts a mark into the time of change, a fraction of a second that
follows from the checksum, or from the nonce of a file written in place. Only a file without its mark is read again.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from stem_dask.core.errors import StoreError
from stem_dask.core.model import Record
from stem_dask.storage.checksums import crc32
from stem_dask.storage.publish import damage, named, remove

#: bytes of a nonce at the end of a file
NONCE_BYTES = 16


def begin_staging(folder: str | Path) -> str:
    """Make the staging folder of a new start in a folder; what is unfinished in the folder is removed first."""
    remove_unfinished(folder)
    stage = Path(folder, f"{uuid4().hex}.partial")
    stage.mkdir()
    return str(stage)


def remove_unfinished(folder: str | Path) -> None:
    """Remove staging folders, and files that lack their name, below a folder."""
    for unfinished in list(Path(folder).rglob("*.partial")):
        remove(unfinished)


@contextlib.contextmanager
def staged(path: str | Path, stage: str | Path) -> Iterator[IO[bytes]]:
    """A new file, open for writing without a buffer, that is renamed to ``path`` when it is complete.

    Raises
    ------
    StoreError
        When a later start has removed the staging folder.
    """
    partial = Path(stage, f"{Path(path).name}.{uuid4().hex}.partial")
    try:
        with named(path), open(partial, "wb", buffering=0) as file:
            yield file
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError) and not os.path.isdir(stage):
            raise _replaced(path) from None
        raise


def append(file: IO[bytes], content: Any, crc: int = 0) -> int:
    """Write all of some bytes; returns the CRC-32 so far."""
    view = memoryview(content)
    view = view.cast("B") if view.nbytes else memoryview(b"")
    while view:
        view = view[file.write(view) :]
    return crc32(content, crc)


def begin_in_place(path: str | Path) -> bytes:
    """Append the nonce of a new start to a file that workers write in place, and mark the file; returns the nonce."""
    nonce = os.urandom(NONCE_BYTES)
    with named(path), open(path, "ab", buffering=0) as file:
        append(file, nonce)
        mark(file, crc32(nonce))
    return nonce


def refuse_late(file: IO[bytes], path: str | Path, nonce: bytes) -> None:
    """Raise StoreError unless an open file still ends with the nonce of this start."""
    end = os.fstat(file.fileno()).st_size
    if os.pread(file.fileno(), NONCE_BYTES, max(0, end - NONCE_BYTES)) != nonce:
        raise _replaced(path)


def _replaced(path: str | Path) -> StoreError:
    return StoreError(f"{path}: the run was started again, and this block belongs to an earlier start; it is not written")  # fmt: skip


def mark(file: IO[bytes], crc: int) -> None:
    """Set the time of change of an open file to one that belongs to a checksum."""
    now = (int(time.time()) - 1) * 10**9 + _fraction(crc)
    with contextlib.suppress(OSError):  # the file is read again in `finish`
        os.utime(file.fileno(), ns=(now, now))


def _is_marked(status: os.stat_result, crc: int) -> bool:
    """Whether nothing changed a file since it was marked; where times have no fractions of a second that cannot be seen."""
    return status.st_mtime_ns % 10**9 in (0, _fraction(crc))


def _fraction(crc: int) -> int:
    """Nanoseconds, never 0, in whole microseconds: the precision that most file systems have."""
    return (crc % 999_999 + 1) * 1000


def refuse_other_files(files: Iterable[tuple[str | Path, int | None, int | None]]) -> None:
    """Compare files with the CRC-32 and length in their records; a marked file of the right length is not read.

    Raises
    ------
    StoreError
        When a file is missing, or is not what was written.
    """
    for path, crc, n_bytes in files:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            if crc is not None and status.st_size == n_bytes and _is_marked(status, crc):
                continue
        _refuse(damage(path, (crc, n_bytes)))


def refuse_other_bytes(
    path: str | Path,
    nonce: bytes,
    records: Iterable[Record],
    verify: Callable[[Record], str | None],
) -> None:
    """Compare a file that was written in place with its records; it is not read when it has the mark of this start.

    Raises
    ------
    StoreError
        When it does not hold what was written.
    """
    with contextlib.suppress(OSError):
        if _is_marked(os.stat(path), crc32(nonce)):
            return
    for record in records:
        _refuse(verify(record))


def _refuse(what: str | None) -> None:
    if what is not None:
        raise StoreError(f"{what}: it is not as it was written; the same command makes it again")  # fmt: skip
