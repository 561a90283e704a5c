"""Containers of arrays: HDF5 datasets and zarr arrays as sources; and archives and folders, with what to type to read them."""

import contextlib
import errno
import io
import os
import re
import shlex
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.readers.source import Reading, Slices
from stem_dask.storage.errors import COPY, one_line, translate
from stem_dask.storage.location import is_url

#: what to do about missing chunk files of a zarr store
Missing = Literal["refuse", "zero"]


@contextlib.contextmanager
def hdf5_file(path: str, notes: list[str] | None = None) -> Iterator[Any]:
    """An HDF5 file, open for reading; a file that cannot be locked is read without a lock, and noted in ``notes``.

    Without a lock it is opened through a Python file: HDF5 refuses to open a file twice with different kinds of locks.
    """
    import h5py

    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(h5py.File(path, "r"))
        except OSError as error:
            found = re.search(r"unable to lock file, errno = (\d+)", str(error))
            if not found and "file is already open for write" not in str(error):
                raise
            written = not found or int(found[1]) in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
            raw = stack.enter_context(open(path, "rb"))
            try:
                file = stack.enter_context(h5py.File(raw, "r"))
            except Exception as damage:  # h5py raises many kinds
                if not written:
                    raise
                raise SourceError(
                    f"{path}: open for writing in another program, in a state that cannot be read ({one_line(damage)}); "
                    "close it there"
                ) from damage
            note = "the file system has no locks; the file is read without a lock"
            if written:
                note = (
                    "the file is open for writing in another program, or was not closed properly; it is read without a lock "
                    "and may still change: close it there first"
                )
            if notes is not None:
                notes.append(note)
        yield file


@contextlib.contextmanager
def opened_hdf5(path: str, notes: list[str] | None = None) -> Iterator[Any]:
    """As `hdf5_file`, for headers: any error within the context becomes a `SourceError`."""
    import h5py

    # the first keeps the lock, which a program that writes the file refuses
    with (
        translate(SourceError, path, "not a readable HDF5 file"),
        hdf5_file(path, notes),
        _Watched(path) as raw,
    ):
        try:
            with h5py.File(raw, "r") as file:
                yield file
        finally:
            if raw.damaged is not None:
                raise SourceError(
                    f"{path}: not a readable HDF5 file (its texts at byte {raw.damaged:,} have no end); {COPY}"
                )


class _Watched(io.FileIO):
    """A file that raises instead of returning an endless global heap; ``damaged`` is the offset of that heap.

    Such heaps hold texts of variable length. Where zeros have damaged one, HDF5 loops forever and ignores Ctrl-C.
    """

    damaged: int | None = None

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer for HDF5."""
        start = self.tell()
        n = super().readinto(buffer) or 0
        for found in re.finditer(rb"GCOL\x01\0\0\0", memoryview(buffer)[:n]):
            place = start + found.start()
            if place % 8 == 0 and not self._ends(place):
                self.damaged = place
                raise OSError(f"the global heap at byte {place:,} has no end")
        self.seek(start + n)
        return n

    def _ends(self, place: int) -> bool:
        """Whether walking through a global heap as HDF5 does ends: each object has an index (0: free) and a size."""
        self.seek(place + 8)
        n_bytes = int.from_bytes(self.read(8), "little")
        if n_bytes > 1 << 24:  # a single large object, or HDF5 refuses it
            return True
        self.seek(place)
        heap, at = self.read(n_bytes), 16
        while at + 16 <= len(heap):
            index, _, _, size = struct.unpack_from("<HHIQ", heap, at)
            step = size if index == 0 else 16 + -(-size // 8) * 8
            if step == 0:
                return False
            at += step
        return True


#: memory of HDF5 with all its filters in a worker that reads it; measured: 26 to 41 MB
HDF5_BYTES = 30 * 10**6


@dataclass(frozen=True)
class Hdf5Dataset:
    """A dataset of an HDF5 file; ``chunk_bytes`` is the decoded size of a chunk, 0 without chunks.

    Bytes of ``name`` that are not UTF-8 are escaped by ``surrogateescape``.
    """

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk_bytes: int = 0

    @property
    def reading(self) -> Reading:
        """Memory of HDF5, and of a chunk."""
        return Reading(library_bytes=HDF5_BYTES, chunk_bytes=self.chunk_bytes)

    def __getitem__(self, part: Slices) -> NDArray:
        import hdf5plugin  # noqa: F401  registers blosc and others with HDF5

        what = f"dataset {self.name} cannot be read"
        with translate(SourceError, self.path, what), hdf5_file(self.path) as file:
            name = self.name.encode("utf-8", "surrogateescape")
            return np.asarray(file[name][part])


@dataclass(frozen=True)
class ZarrArray:
    """An array of a zarr store, format 2 or 3; a missing chunk file raises an error or reads as zeros."""

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    missing: Missing = "refuse"
    chunk_bytes: int = 0  # decoded size of a chunk file (a shard, where there are shards)

    @property
    def reading(self) -> Reading:
        """Memory of a chunk."""
        return Reading(chunk_bytes=self.chunk_bytes)

    def __getitem__(self, part: Slices) -> NDArray:
        from stem_dask.readers.zarr_chunks import read_part

        return read_part(self.path, self.name, part, zero=self.missing == "zero")


# --- archives and folders ---

#: documents of a zarr store or of a node in it
ZARR_ROOTS = ("zarr.json", ".zgroup", ".zarray")


def in_zip(path: str) -> tuple[str, str] | None:
    """Kind of a zip archive and how to open its content; ("", "") for files of ``torch.save``, None if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    names = [PurePosixPath(member.filename) for member in members]
    if any(name.name == "data.pkl" and len(name.parts) <= 2 for name in names):
        return "", ""
    stem, unpack = Path(path).stem, f"unpack it: python -m zipfile -e {shlex.quote(path)} "
    folder = shlex.quote(f"{stem}_unpacked")
    roots = [name.parent for name in names if name.name in ZARR_ROOTS]
    arrays = [member for member in members if member.filename.endswith(".npy")]
    if roots:
        kind = "a zarr store in a zip archive is not read"
        root = min(roots, key=lambda one: len(one.parts))
        suffix = ".zspy" if root / "Experiments" in roots else ".zarr"
        if not root.parts:
            return kind, f"{unpack}{shlex.quote(f'{stem}_unpacked{suffix}')}"
        if root.suffix in (".zarr", ".zspy"):
            return kind, f"{unpack}., and open {shlex.quote(str(root))}"
        new = shlex.quote(f"{root.name}{suffix}")
        return kind, f"{unpack}. && mv {shlex.quote(str(root))} {new}, and open {new}"
    if not arrays:
        kind = f"a zip archive of {len(names):,} files is not read"
        return kind, f"{unpack}{folder}, and open what was in it"
    is_nion = PurePosixPath("metadata.json") in names
    kind = f"{'a Nion Swift file' if is_nion else 'an archive of numpy arrays'} (a zip archive) is not read"
    largest = one_line(max(arrays, key=lambda member: member.file_size).filename)
    return kind, f"{unpack}{folder}, and open {shlex.quote(f'{stem}_unpacked/{largest}')}"


def in_folder(path: Path, readers: Mapping[str, Any]) -> str:
    """An error message for a folder without the name of a store: what to open instead.

    ``readers`` is `stem_dask.readers.formats.READERS`.
    """

    def is_zarr(folder: Path) -> bool:
        return any((folder / name).exists() for name in ZARR_ROOTS)

    if is_zarr(path):
        suffix = ".zspy" if (path / "Experiments").is_dir() else ".zarr"
        store = next((parent for parent in path.parents if not is_zarr(parent)), Path())
        store /= path.relative_to(store).parts[0]
        if store == path:
            name = path.stem if path.suffix in readers else path.name
            return f"by its content it is a zarr store; rename it to {name}{suffix}"
        name = path.relative_to(store).as_posix()
        root = str(store) if store.suffix in (".zarr", ".zspy") else f"{store}.zarr (renamed to it)"
        document = path / "zarr.json"
        text = document.read_text("utf-8", "replace") if document.is_file() else ""
        if (path / ".zarray").exists() or re.search(r'"node_type"\s*:\s*"array"', text):
            return f"an array in the zarr store {store.name}; set input.path: {root} and input.dataset: {name}"
        return f"a group in the zarr store {store.name}; set input.path: {root}, and input.dataset to an array such as {name}/NAME"
    files = sorted(one.name for one in path.iterdir() if one.is_file() and one.name[0] != ".")
    suffixes = [Path(name).suffix.lower() for name in files]
    masters = [name for name in files if name.endswith("_master.h5")]
    if len(masters) == 1:
        return f"a folder; open the master file {masters[0]} in it"
    known = sorted({s for s in suffixes if s in readers}, key=suffixes.count)
    if not known:
        kind = (
            f"{readers[path.suffix].kind} is a file, this is a folder"
            if path.suffix in readers
            else ""
        )
        return kind or "a folder without a file that can be read; name a file"
    same = [name for name, suffix in zip(files, suffixes, strict=True) if suffix == known[-1]]
    if len(same) > 1:
        with contextlib.suppress(SourceError):
            found = readers[known[-1]].candidates(str(path / same[0]))
            images = [one.source for one in found if len(one.source.shape) > 1]
            if images and all(prod(image.shape[:-2]) == 1 for image in images):
                name = path.name if len(same) == len(files) else f"{path.name}/*{known[-1]}"
                return (
                    f"a folder of {len(same):,} {known[-1]} files, an image each; read them as one scan: input.path={shlex.quote(name)} "
                    "input.series=true, and input.scan_shape=[scan_y,scan_x] unless their names have y and x"
                )
    return f"a folder with {len(same):,} {known[-1]} file{'s' * (len(same) > 1)}; name one of them, or the glob {path.name}/*{known[-1]}"


def of_many(path: str) -> str:
    """A hint if a single image is one of many in its folder, such as one file per scan position."""
    if is_url(path):
        return ""
    folder, suffix = Path(path).parent, Path(path).suffix.lower()
    with os.scandir(folder) as entries:
        same = (entry for entry in entries if Path(entry.name).suffix.lower() == suffix)
        if len(list(islice(same, 2))) < 2:
            return ""
    return f"is one image of many: read them as one scan: {shlex.quote(os.path.relpath(folder))} input.series=true"
