"""An output appears under its final name only when it is complete: temporary names, fsync, rename."""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from stem_dask.core.errors import (
    NO_ROOM,
    DiskFullError,
    OutputExistsError,
    StemDaskError,
    StoreError,
)
from stem_dask.storage.checksums import crc32
from stem_dask.storage.s3 import at

#: a worker of a killed run may add files to a folder while it is removed: one for each of its threads
REMOVE_ATTEMPTS = 100

#: files and folders that are brought to disk at the same time
SYNCED_AT_ONCE = 8


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Errors of the system tell the file: those of open and rename do by themselves, of write, fsync and close not.

    Examples
    --------
    >>> with named("scan.zarr"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'scan.zarr'
    """
    try:
        yield
    except OSError as error:
        # ours say what they have to say
        if (
            error.filename is None
            and error.errno is not None
            and not isinstance(error, StemDaskError)
        ):
            error.filename = os.fspath(path)
        raise


def make_folder(path: str | Path) -> None:
    """Make the folder that an output goes into, where it is not there yet.

    Raises
    ------
    StoreError
        When that cannot be done, or nothing can be written there; names the folder.
    """
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        at = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
        why = "there is a file of that name" if folder.is_file() else error.strerror
        raise StoreError(
            f"the folder {folder} cannot be made: {why}{at}; choose another output"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(
            f"nothing can be written into the folder {folder}: it is not yours, or its disk takes nothing; choose another output"
        )


@contextlib.contextmanager
def telling(path: str | Path) -> Iterator[None]:
    """Errors of the system while an output is made tell the output, and not the file on the way to it.

    Examples
    --------
    >>> with telling("scan.pt"):
    ...     open("/no/such/folder/scan.pt.incomplete")
    Traceback (most recent call last):
    stem_dask.core.errors.StoreError: scan.pt cannot be written: No such file or directory
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StemDaskError) or error.errno is None:
            raise
        kind = DiskFullError if error.errno in NO_ROOM else StoreError
        raise kind(f"{path} cannot be written: {os.strerror(error.errno)}") from error


def temporary(path: str | Path) -> str:
    """Where an output is built: beside its final name, so that the rename stays on one file system.

    Examples
    --------
    >>> temporary("out/scan.zarr")
    'out/scan.zarr.incomplete'
    """
    return f"{path}.incomplete"


def replaced(path: str | Path) -> str:
    """Where an older folder steps aside while the new one takes its name.

    Examples
    --------
    >>> replaced("out/scan.zarr")
    'out/scan.zarr.replaced'
    """
    return f"{path}.replaced"


def stem(path: str | Path) -> str:
    """What the names of everything beside an output begin with: a store's name without its suffix.

    Examples
    --------
    >>> stem("out/scan.zarr"), stem("out/scan.hspy")
    ('out/scan', 'out/scan.hspy')
    """
    return str(path).removesuffix(".zarr")


def run_folder(path: str | Path) -> str:
    """Folder for what a run keeps beside its output: ``NAME.run`` for ``NAME.zarr``, ``NAME.pt.run`` for ``NAME.pt``.

    Examples
    --------
    >>> run_folder("out/scan.zarr")
    'out/scan.run'
    """
    return f"{stem(path)}.run"


def is_folder(path: str | Path) -> bool:
    """Whether an output of this name is a folder: a zarr store is, every other output is one file.

    Examples
    --------
    >>> is_folder("scan.zarr"), is_folder("scan.zspy"), is_folder("scan.pt")
    (True, True, False)
    """
    return Path(path).suffix.lower() in (".zarr", ".zspy")


def made_beside(path: str | Path) -> tuple[str, ...]:
    """The names beside an output that exist while it is built and published.

    Examples
    --------
    >>> made_beside("scan.zarr"), made_beside("scan.pt")
    (('scan.zarr.incomplete', 'scan.zarr.replaced'), ('scan.pt.incomplete',))
    """
    return (temporary(path), replaced(path)) if is_folder(path) else (temporary(path),)


def kind_of(path: str | Path) -> str:
    """What bears a name: a link, a folder, or a file.

    Examples
    --------
    >>> kind_of("/"), kind_of("/dev/null")
    ('a folder', 'a file')
    """
    mode = os.lstat(path).st_mode
    return "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a file"


def refuse_taken(names: Iterable[str]) -> None:
    """Raise when a file bears one of the names that are needed while an output is built.

    Raises
    ------
    OutputExistsError
        Names the file; nothing is changed.
    """
    for name in names:
        if os.path.lexists(name):
            raise OutputExistsError(
                f"{name} exists ({kind_of(name)}) and is of no unfinished run; the output is built under that name: move it "
                "away, delete it if a killed export left it, or choose another output"
            )


def opened(path: str | Path, mode: str) -> IO[Any]:
    """Open a file; a link in its place is an error and is not followed.

    Examples
    --------
    >>> import tempfile; folder = tempfile.mkdtemp()
    >>> os.symlink("/dev/null", f"{folder}/link")
    >>> opened(f"{folder}/link", "rb")
    Traceback (most recent call last):
    OSError: [Errno 40] Too many levels of symbolic links: ...
    """
    encoding = None if "b" in mode else "utf-8"
    return open(path, mode, encoding=encoding, opener=_unfollowed)


def _unfollowed(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def remove(path: str | Path) -> None:
    """Remove a file or a folder; a missing one is fine, a link is removed and not followed."""
    path = Path(path)
    for attempts_left in reversed(range(REMOVE_ATTEMPTS)):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        try:
            shutil.rmtree(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or not attempts_left:
                raise


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise when an output exists and overwriting was not asked for, or what exists is no output of this kind."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputExistsError(
            f"{path} exists; choose another output, or set output.overwrite=true to replace it when the new one "
            "is complete"
        )
    there, wanted = kind_of(path), "a folder" if is_folder(path) else "a file"
    if there != wanted:
        raise OutputExistsError(
            f"{path} is {there}, and the output is {wanted}: overwriting replaces earlier outputs only; move it away, or "
            "choose another output"
        )


def publish(
    path: str | Path, *, drop: str | None = None, hold: Callable[[], None] | None = None
) -> None:
    """Bring ``PATH.incomplete`` to disk and give it its final name, replacing an older output.

    A file replaces a file in one step. A folder cannot: the older one steps aside as ``PATH.replaced`` for the moment
    between two renames, and is removed after. When a kill stopped it anywhere, calling it again does the rest.

    ``drop`` is a file that says that the older outputs are complete: it goes just before they are mixed with new ones.
    ``hold`` raises when another run has taken the output over: nothing gets or loses a name then.
    """
    path, built = Path(path), Path(temporary(path))
    aside = Path(replaced(path))
    if os.path.lexists(built):
        sync_tree(built)
    if hold is not None:
        hold()
    if os.path.lexists(built):
        if drop is not None:
            remove(drop)
        if os.path.lexists(path) and kind_of(built) == kind_of(path) == "a folder":
            remove(aside)
            os.rename(path, aside)
        os.replace(built, path)
        sync(path.parent)
    if is_folder(path):
        remove(aside)


def file_crc(path: str | Path) -> tuple[int, int]:
    """CRC-32 and length of a file.

    Examples
    --------
    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "x"
    >>> path.write_bytes(b"abc")
    3
    >>> file_crc(path)
    (891568578, 3)
    """
    crc = n_bytes = 0
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            crc, n_bytes = crc32(piece, crc), n_bytes + len(piece)
    return crc, n_bytes


def damage(path: str | Path, wanted: tuple[object, object]) -> str | None:
    """In what a file differs from the checksum and length that were noted; None when it does not."""
    try:
        found = file_crc(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if found[1] != wanted[1]:
        return f"{path} has {found[1]:,} bytes, not the {wanted[1]:,} that were written"
    return None if found[0] == wanted[0] else f"{path} does not hold what was written (checksum)"


def begin_sync(file: IO[Any], start: int = 0, n_bytes: int = 0) -> None:
    """Have the system begin to bring what was just written to disk, so that a later `sync` waits less: while tasks compute
    the disk would be idle.

    Parameters
    ----------
    file : open
    start, n_bytes : of the part that was written; 0 bytes stand for all that follows
    """
    # advice, which on Linux starts writing what is not on disk yet; what is stays out of the cache then
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(file.fileno(), start, n_bytes, os.POSIX_FADV_DONTNEED)


def sync_tree(path: str | Path) -> None:
    """fsync a file, or every file and folder below a folder, some at a time: each waits for the disk, which takes them together."""
    if not os.path.isdir(path):
        sync(path)
        return
    folders, files = [], []
    for folder, _, names in os.walk(path):
        folders.append(folder)
        files += [os.path.join(folder, name) for name in names]
    paths = files + folders
    with ThreadPoolExecutor(SYNCED_AT_ONCE) as pool:
        # a share for each thread: to hand over every path costs more than to sync it, and 2 kB
        shares = (paths[i::SYNCED_AT_ONCE] for i in range(SYNCED_AT_ONCE))
        for _ in pool.map(_sync_all, shares):
            pass  # the first error is raised


def _sync_all(paths: Iterable[str]) -> None:
    for path in paths:
        sync(path)


def sync(path: str | Path) -> None:
    """fsync one file or folder; systems that cannot open folders are spared the folder."""
    if os.name == "nt" and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(handle)
    finally:
        os.close(handle)


DOCUMENT = "zarr.json"


def read_document(folder: str | Path) -> dict[str, Any] | None:
    """What a folder says of itself; None when it is no node of a store, or a torn one."""
    try:
        found = json.loads(at(folder, DOCUMENT).read_bytes())
    except StemDaskError:  # of an object store
        raise
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_document(folder: str | Path, document: Mapping[str, Any], indent: int | None = 2) -> None:
    """Make a folder a node of the store; an older document stays until the new one is whole."""
    path = Path(folder, DOCUMENT)
    partial = path.with_name(f"{DOCUMENT}.partial")
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(document, indent=indent, allow_nan=False))
        os.replace(partial, path)  # a run that goes on keeps its shards only below a whole one
