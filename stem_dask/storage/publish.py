"""An output gets its final name only when it is complete: temporary names, fsync, rename."""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from stem_dask.core.errors import OutputExistsError, StemDaskError, StoreError
from stem_dask.core.formats import format_of
from stem_dask.storage.errors import translate
from stem_dask.storage.location import at

DOCUMENT = "zarr.json"


def make_folder(path: str | Path) -> None:
    """Make the parent folder of an output; raises StoreError when that fails, or the folder is not writable."""
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
        why = "there is a file of that name" if folder.is_file() else error.strerror
        raise StoreError(
            f"the folder {folder} cannot be made: {why}{where}; choose another output"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(
            f"nothing can be written into the folder {folder}: it is not yours, or its disk takes nothing; choose another output"
        )


def temporary(path: str | Path) -> str:
    """Temporary name of an output, in the same folder so that it can be renamed: ``NAME.incomplete``."""
    return f"{path}.incomplete"


def replaced(path: str | Path) -> str:
    """Name of an older folder while the new one is renamed: ``NAME.replaced``."""
    return f"{path}.replaced"


def stem(path: str | Path) -> str:
    """Common prefix of all names of a run: the output without ``.zarr``; other suffixes stay."""
    return str(path).removesuffix(".zarr")


def run_folder(path: str | Path) -> str:
    """Folder of the state of a run: ``NAME.run`` for ``NAME.zarr``, ``NAME.pt.run`` for ``NAME.pt``."""
    return f"{stem(path)}.run"


def is_folder(path: str | Path) -> bool:
    """Whether an output of this name is a folder (.zarr, .zspy) or a file."""
    form = format_of(path)
    return form is not None and form.is_folder


def temporary_names(path: str | Path) -> tuple[str, ...]:
    """Temporary names that exist while an output is built and published."""
    return (temporary(path), replaced(path)) if is_folder(path) else (temporary(path),)


def kind_of(path: str | Path) -> str:
    """What exists under a name: "a link", "a folder" or "a file"."""
    mode = os.lstat(path).st_mode
    return "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a file"


def refuse_taken(names: Iterable[str]) -> None:
    """Raise OutputExistsError if one of the temporary names of an output is taken."""
    for name in filter(os.path.lexists, names):
        raise OutputExistsError(
            f"{name} exists ({kind_of(name)}) and belongs to no unfinished run, but the output is built under that name: move it "
            "away, delete it if a killed export left it, or choose another output"
        )


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise OutputExistsError if an output exists and must not, or cannot, be replaced."""
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
            f"{path} is {there}, and the output is {wanted}: only earlier outputs are overwritten; move it away, or "
            "choose another output"
        )


def opened(path: str | Path, mode: str) -> IO[Any]:
    """Open a file; a link in its place is not followed but raises OSError."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=opener)


def remove(path: str | Path) -> None:
    """Remove a file, folder or link, if it exists; links are not followed."""
    path = Path(path)
    # workers of a killed run may still add files to a folder, one per thread
    for attempts_left in reversed(range(100)):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        try:
            shutil.rmtree(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or not attempts_left:
                raise


def publish(
    path: str | Path, *, drop: str | None = None, hold: Callable[[], None] = lambda: None
) -> None:
    """Sync ``PATH.incomplete`` and give it its final name, replacing an older output.

    A file replaces a file in one step. An older folder is renamed to ``PATH.replaced`` first and removed last. Calling it
    again completes what a kill interrupted.

    Parameters
    ----------
    drop : file that marks the older outputs as complete; removed just before they are replaced
    hold : raises if another run has taken over the output; called before anything is renamed
    """
    path, built, aside = Path(path), Path(temporary(path)), Path(replaced(path))
    is_built = os.path.lexists(built)
    if is_built:
        sync_tree(built)
    hold()
    if is_built:
        if drop is not None:
            remove(drop)
        if os.path.lexists(path) and kind_of(built) == kind_of(path) == "a folder":
            remove(aside)
            os.rename(path, aside)
        os.replace(built, path)
        sync(path.parent)
    if is_folder(path):
        remove(aside)


def begin_sync(file: IO[Any], start: int = 0, n_bytes: int = 0) -> None:
    """Start writing a part of an open file to disk, so that a later `sync` waits less; 0 bytes stand for all from ``start`` on."""
    # on Linux this advice starts the write-back of dirty pages
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(file.fileno(), start, n_bytes, os.POSIX_FADV_DONTNEED)


def sync_tree(path: str | Path) -> None:
    """fsync a file, or all files and folders below a folder, several at a time."""
    folders, files = [], []
    for folder, _, names in os.walk(path):
        folders.append(folder)
        files += [os.path.join(folder, name) for name in names]
    paths = files + folders or [str(path)]

    def sync_all(share: Iterable[str]) -> None:
        for one in share:
            sync(one)

    with ThreadPoolExecutor(8) as pool:
        # one share per thread: a future per path costs more than its fsync
        for _ in pool.map(sync_all, (paths[i::8] for i in range(8))):
            pass  # the first error is raised


def sync(path: str | Path) -> None:
    """fsync a file or folder; Windows cannot open folders."""
    if os.name == "nt" and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with translate(StoreError, path):
            os.fsync(handle)
    finally:
        os.close(handle)


def read_document(folder: str | Path) -> dict[str, Any] | None:
    """The zarr.json of a folder; None if it is missing or truncated."""
    try:
        found = json.loads(at(folder, DOCUMENT).read_bytes())
    except StemDaskError:  # an object store that cannot be read
        raise
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
