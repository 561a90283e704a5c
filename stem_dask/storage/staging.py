"""Checksums, and fences between the starts of a run: a worker of an earlier start that wakes up late cannot write.

The `create` of a sink begins a start and gives it a nonce. Files that are renamed are built in a staging folder named after the
nonce; `create` removes the staging folders of earlier starts, so that their renames fail. A file that is written in place ends
with the nonce until it is finished; a worker compares it after opening the file and before each write. A fresh start makes
a new file, so that open handles of earlier starts do not reach it.

`finish` compares each file with its record. Every writer encodes the checksum (in place: the nonce) in the fraction of a second
of the modification time; only a file without that mark is read again.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from stem_dask.core.errors import StoreError
from stem_dask.core.model import Record
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import remove

#: bytes of a nonce at the end of a file
NONCE_BYTES = 16


def begin_staging(folder: str | Path) -> str:
    """Make the staging folder of a new start, after removing those of earlier starts."""
    remove_unfinished(folder)
    stage = Path(folder, f"{uuid4().hex}.partial")
    stage.mkdir()
    return str(stage)


def remove_unfinished(folder: str | Path) -> None:
    """Remove staging folders and partial files below a folder."""
    for unfinished in list(Path(folder).rglob("*.partial")):
        remove(unfinished)


@contextlib.contextmanager
def staged(path: str | Path, stage: str | Path) -> Iterator[IO[bytes]]:
    """Open a new unbuffered file that is renamed to ``path`` when complete; raises StoreError after a later start."""
    partial = Path(stage, f"{Path(path).name}.{uuid4().hex}.partial")
    with translate(StoreError, path):
        try:
            with open(partial, "wb", buffering=0) as file:
                yield file
            os.replace(partial, path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError) and not os.path.isdir(stage):
                raise _replaced(path) from None
            raise


def append(file: IO[bytes], content: Any, crc: int = 0) -> int:
    """Write a buffer completely; returns the CRC-32 so far."""
    view = memoryview(content)
    view = view.cast("B") if view.nbytes else memoryview(b"")
    while view:
        view = view[file.write(view) :]
    return crc32(content, crc)


def begin_in_place(path: str | Path) -> bytes:
    """Append the nonce of a new start to a file that is written in place, and mark it; returns the nonce."""
    nonce = os.urandom(NONCE_BYTES)
    with translate(StoreError, path), open(path, "ab", buffering=0) as file:
        append(file, nonce)
        mark(file, crc32(nonce))
    return nonce


def refuse_late(file: IO[bytes], path: str | Path, nonce: bytes) -> None:
    """Raise StoreError unless an open file still ends with the nonce of this start."""
    end = os.fstat(file.fileno()).st_size
    if os.pread(file.fileno(), NONCE_BYTES, max(0, end - NONCE_BYTES)) != nonce:
        raise _replaced(path)


def _replaced(path: str | Path) -> StoreError:
    return StoreError(f"{path}: the run was started again; this block of an earlier start is not written")  # fmt: skip


def mark(file: IO[bytes], crc: int) -> None:
    """Encode a checksum in the modification time of an open file."""
    now = (int(time.time()) - 1) * 10**9 + _fraction(crc)
    with contextlib.suppress(OSError):  # the file is read again in `finish`
        os.utime(file.fileno(), ns=(now, now))


def _fraction(crc: int) -> int:
    """Nanoseconds, never 0, in whole microseconds: the precision of most file systems."""
    return (crc % 999_999 + 1) * 1000


def _is_marked(path: str | Path, crc: int | None, n_bytes: int | None = -1) -> bool:
    """Whether a file is unchanged since it was marked; true on file systems without fractions of a second."""
    if crc is None:
        return False
    with contextlib.suppress(OSError):
        status = os.stat(path)
        is_as_long = n_bytes in (-1, status.st_size)  # -1: of a file that is written in place
        return is_as_long and status.st_mtime_ns % 10**9 in (0, _fraction(crc))
    return False


def refuse_other_files(files: Iterable[tuple[str | Path, int | None, int | None]]) -> None:
    """Raise StoreError unless files match the CRC-32 and length in their records; marked files are not read."""
    for path, crc, n_bytes in files:
        if not _is_marked(path, crc, n_bytes):
            _refuse(damage(path, (crc, n_bytes)))


def refuse_other_bytes(
    path: str | Path,
    nonce: bytes,
    records: Iterable[Record],
    verify: Callable[[Record], str | None],
) -> None:
    """Raise StoreError unless a file written in place matches its records; a marked file is not read."""
    for record in () if _is_marked(path, crc32(nonce)) else records:
        _refuse(verify(record))


def _refuse(what: str | None) -> None:
    if what is not None:
        raise StoreError(f"{what}: it changed after it was written; the same command writes it again")  # fmt: skip


def file_crc(path: str | Path) -> tuple[int, int]:
    """CRC-32 and length of a file."""
    crc = n_bytes = 0
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            crc, n_bytes = crc32(piece, crc), n_bytes + len(piece)
    return crc, n_bytes


def damage(path: str | Path, wanted: tuple[object, object]) -> str | None:
    """Describe how a file differs from its recorded CRC-32 and length; None if it does not."""
    try:
        crc, n_bytes = file_crc(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if n_bytes != wanted[1]:
        return f"{path} has {n_bytes:,} bytes, not the {wanted[1]:,} that were written"
    return None if crc == wanted[0] else f"{path} does not hold what was written (checksum)"


def crc32(content: Any, crc: int = 0) -> int:
    """The CRC-32 of some bytes that follow others, as that of `zlib`; zlib-ng finds it three times as fast.

    Parameters
    ----------
    content : bytes, or a C-contiguous buffer
    crc : of the bytes before

    Examples
    --------
    >>> hex(crc32(b"456789", crc32(b"123")))  # the check value in the catalogue of CRCs
    '0xcbf43926'
    """
    from imagecodecs import zlibng_crc32

    view: Any = memoryview(content)
    # one without elements cannot be cast
    return int(zlibng_crc32(view.cast("B"), crc)) if view.nbytes else crc


def combine_crc(pieces: Iterable[tuple[int, int]]) -> int:
    """CRC-32 of joined pieces from (length, crc) of each.

    Source: M. Adler's crc32_combine in zlib; to append n zero bytes is to multiply by x^(8 n) modulo the polynomial.

    Examples
    --------
    >>> combine_crc([(3, crc32(b"abc")), (4, crc32(b"defg"))]) == crc32(b"abcdefg")
    True
    """
    total = 0
    for length, crc in pieces:
        total = _product(total, _power(8 * length)) ^ crc
    return total


@functools.lru_cache
def _power(n: int) -> int:
    """x^n modulo the polynomial; bit 31 is x^0."""
    found, factor = 1 << 31, 1 << 30
    while n:
        if n & 1:
            found = _product(found, factor)
        factor = _product(factor, factor)
        n >>= 1
    return found


def _product(a: int, b: int) -> int:
    """Product modulo 0xEDB88320, the reflected polynomial of CRC-32."""
    found = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            found ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return found
