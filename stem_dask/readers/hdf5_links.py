"""Datasets and links of HDF5 files: data in other files, acquisitions in several files, filters that are not installed."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import whole
from stem_dask.core.text import by
from stem_dask.readers.containers import can_be_quoted, opened_hdf5
from stem_dask.storage.errors import one_line

#: names of the data files of DECTRIS detectors
_DATA_FILE = re.compile(r"(.+)_data_\d+\.h5")

#: lower numbers are filters of HDF5 itself
_FIRST_PLUGIN = 256

#: counting this many chunks takes 0.4 s
_MOST_COUNTED = 10**6


def escaped(name: str | bytes) -> str:
    """A name as text: h5py returns names that are not UTF-8 as bytes."""
    return name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")


def as_bytes(name: str) -> bytes:
    """A name as stored in the file."""
    return name.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Outside:
    """A link in ``group`` to the object ``target`` of another file."""

    group: str
    file: str
    target: str


def datasets_below(
    file: Any, others: list[str], row_of: Callable[[str, Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows made of the name and the dataset of all numbers with two or more axes; ``others`` takes arrays of other types.

    Soft and external links are not followed, and no object is visited twice.
    """
    import h5py

    found = []

    def visit(key: str | bytes, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or item.ndim < 2:
            return
        name = escaped(key)
        if item.dtype.kind in "buifc":
            found.append(row_of(name, item))
        else:
            kind = one_line(item.dtype)
            others.append(
                f"{one_line(name)}: {by(item.shape)} of type {kind}, which are no numbers"
            )

    file.visititems(visit)
    return found


def links_below(file: Any, others: list[str]) -> list[Outside]:
    """Links to objects in other files; ``others`` takes links to nowhere. h5py cannot look up names that are not UTF-8."""
    import h5py

    links = []

    def visit(key: bytes, info: Any) -> None:
        if info.type not in (h5py.h5l.TYPE_SOFT, h5py.h5l.TYPE_EXTERNAL):
            return
        name = escaped(key)
        if not name.isprintable():  # surrogates
            return
        link = file.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            group = name.rpartition("/")[0]
            links.append(Outside(group, str(link.filename), str(link.path).strip("/")))
        elif file.get(name) is None:
            others.append(f"{one_line(name)}, a link to {one_line(link.path)}, where nothing is")

    file.id.links.visit(visit, info=True)
    return links


def in_other_files(path: str, links: Sequence[Outside]) -> str:
    """An error message for a file of links, such as the master file of a detector: where the patterns are, and what to type."""
    sets: dict[tuple[str, str], list[Outside]] = {}
    for link in links:
        sets.setdefault((link.group, link.target), []).append(link)
    parts = max(sets.values(), key=len)
    folder = Path(path).parent
    missing = [one_line(link.file) for link in parts if not (folder / link.file).is_file()]
    if missing:
        return f"the patterns are in {missing[0]}, which is missing; copy it too"
    if len(parts) == 1:
        [link] = parts
        return (
            f"the patterns are in another file; set input.path: {one_line(folder / link.file)} and input.dataset: "
            f"{one_line(link.target)}"
        )
    listed = f"g = h5py.File('{path}')['{parts[0].group or '/'}']; d = [g[k] for k in sorted(g, key=len) if g[k].ndim == 3]"
    return (
        f"a master file: the patterns are in {len(parts):,} files, {one_line(parts[0].file)} to "
        f"{one_line(parts[-1].file)}; "
        + _join(listed, Path(path).stem.removesuffix("_master"), path, parts[0].group)
    )


def part_of(path: str, name: str, attrs: Mapping[str, Any]) -> tuple[str, str]:
    """Message about the larger acquisition that a dataset is a part of, or a hint if that is uncertain.

    Detectors of DECTRIS write NAME_data_000001.h5 and so on, and list them in NAME_master.h5.
    """
    file = Path(path)
    found = _DATA_FILE.fullmatch(file.name)
    low, high = (whole(attrs.get(f"image_nr_{end}")) for end in ("low", "high"))
    if not found:
        return (
            ("", "")
            if (low or 1) == 1
            else (f"it holds patterns from {low:,} on of several files", "")
        )
    stem, there = found[1], sorted(file.parent.glob(f"{escape(found[1])}_data_*.h5"))
    n_files = max(len(there), _listed_by(file.with_name(f"{stem}_master.h5")))
    if n_files < 2 and (low or 1) == 1:
        return (
            "",
            "a detector's data file; its master file states the scan, or whether there are more",
        )
    which = f"patterns {low:,} to {high:,}" if low and high else "a part"
    words = f"it holds {which} of an acquisition in {max(n_files, 2):,} files or more"
    if len(there) < n_files or n_files < 2:
        return (
            f"{words}, of which {len(there):,} here; copy the others and the master file, too",
            "",
        )
    listed = (
        f"d = [h5py.File(p)['{name}'] for p in sorted(glob.glob('{file.parent / stem}_data_*.h5'))]"
    )
    words = f"it holds {which} of an acquisition in {n_files:,} files, {there[0].name} to {there[-1].name}"
    return f"{words}; {_join(listed, stem, name, str(file.parent))}", ""


def _listed_by(master: Path) -> int:
    """Number of data files that a master file links to; 0 without a master file."""
    if not master.is_file():
        return 0
    try:
        with opened_hdf5(str(master)) as file:
            return len({link.file for link in links_below(file, [])})
    except SourceError:  # reported when the master itself is opened
        return 0


def _join(listed: str, stem: str, *quoted: str) -> str:
    """A command that joins the datasets ``d``, unless a name from a file (``quoted``) is unsafe in a shell."""
    if not can_be_quoted(stem, *quoted):
        return "join them into one dataset, or rename files and groups to plain names"
    joined = "da.concatenate([da.from_array(x) for x in d]).rechunk((64, -1, -1))"
    return (
        f"join them: python -c \"import dask.array as da, glob, h5py, hdf5plugin; {listed}; {joined}.to_zarr('{stem}.zarr')\", "
        f"then open {stem}.zarr with input.scan_shape=[scan_y,scan_x]"
    )


def fault_of(path: str, name: str, data: Any) -> str:
    """Why a dataset cannot be read, or "".

    HDF5 reads missing parts of virtual datasets as zeros, and looks for external raw data in the working directory.
    """
    if data.external:
        return (
            f"{path}: the numbers of {name} are not in this file but in {one_line(data.external[0][0])}; copy the dataset "
            "into a file of its own where it was written, or open that file as a .raw with input.shape and input.dtype"
        )
    for part in data.virtual_sources() if data.is_virtual else ():
        if part.file_name != "." and "%" not in part.file_name:  # % stands for a number
            other = Path(path).parent / part.file_name
            if not other.is_file():
                return f"{path}: a part of {name} is in {one_line(other)}, which is missing; copy it too"
    properties = data.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        code, _, _, title = properties.get_filter(i)
        if code >= _FIRST_PLUGIN and not _is_known(code):
            what = one_line(title.decode("utf-8", "replace")) or "without a name"
            return (
                f"{path}: {name} is compressed by the HDF5 filter {code} ({what}), which is not installed; save it again with gzip "
                "where it can be read (h5repack -f GZIP=1)"
            )
    return ""


def unwritten(data: Any) -> tuple[str, ...]:
    """A note on chunks that were never written, as in an aborted acquisition: HDF5 reads fill values."""
    if data.ndim < 3 or data.external or data.is_virtual:
        return ()
    if data.chunks is None:
        nothing = data.size and not data.id.get_storage_size()
        return (f"nothing of it was ever written; it reads as {data.fillvalue}",) if nothing else ()
    n = math.prod(-(-size // chunk) for size, chunk in zip(data.shape, data.chunks, strict=True))
    there = data.id.get_num_chunks() if n <= _MOST_COUNTED else n
    if there >= n:
        return ()
    return (f"{n - there:,} of {n:,} chunks were never written; they read as {data.fillvalue}",)


def _is_known(code: int) -> bool:
    import h5py
    import hdf5plugin  # noqa: F401  registers blosc and others with HDF5

    return bool(h5py.h5z.filter_avail(code))


def name_behind(path: str, name: str, known: Iterable[str]) -> str | None:
    """The known dataset that ``name`` is a link to within the file, or None."""
    import h5py

    with opened_hdf5(path) as file:
        item = file.get(as_bytes(name))
        if not isinstance(item, h5py.Dataset):
            return None
        place = _place(item)
        return next(
            (one for one in known if one in file and _place(file[as_bytes(one)]) == place), None
        )


def _place(item: Any) -> tuple[int, int]:
    import h5py

    info = h5py.h5o.get_info(item.id)
    return info.fileno, info.addr
