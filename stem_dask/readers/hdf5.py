"""Datasets of HDF5 files: HyperSpy, EMD, NeXus, py4DSTEM, MATLAB and stem_dask's own.

They are listed as keyword arguments of `stem_dask.readers.source.Candidate`. Links to other files are not followed: messages
say where the patterns are, and what to type.
"""

import math
import re
from collections.abc import Iterable, Mapping
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import text_of, whole
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers import own
from stem_dask.readers.calibration import with_stated
from stem_dask.readers.containers import Hdf5Dataset, can_be_quoted, opened_hdf5
from stem_dask.readers.hdf5_metadata import (
    as_bytes,
    attributes_of,
    first_scale,
    is_safe,
    names_of,
)
from stem_dask.readers.layout import axis_along, axis_from, order_by_flags
from stem_dask.readers.source import MOST_HEADER_BYTES, Source, packed
from stem_dask.readers.views import View
from stem_dask.storage.errors import one_line


def list_hdf5(path: str) -> list[dict[str, Any]]:
    """Datasets of an HDF5 file with two or more axes, with the calibration that HyperSpy, EMD and others write."""
    unlocked: list[str] = []
    with opened_hdf5(path, unlocked) as file:
        found = _listed(path, file)
    return [{**one, "notes": (*one.get("notes", ()), *unlocked)} for one in found]


def _listed(path: str, file: Any) -> list[dict[str, Any]]:
    import h5py

    version = file.get("Version")
    is_text = isinstance(version, h5py.Dataset) and version.size == 1 and version.dtype.kind in "OS"
    is_text = is_text and version.dtype.itemsize <= MOST_HEADER_BYTES and is_safe(version.dtype)
    # Velox stores series with the patterns as the last of three axes, and no scan
    if is_text and "Velox" in str(np.asarray(version[...]).reshape(-1)[0]):
        raise SourceError(
            f"{path}: an EMD file of Velox holds images and spectra, no scan of patterns; export the patterns from the "
            "camera's program"
        )
    experiments = file.get("Experiments")
    if isinstance(experiments, h5py.Group):
        names = [f"Experiments/{_escaped(name)}/data" for name in experiments]
        signals = [(name, file.get(as_bytes(name))) for name in names]
        return [_row(path, file, *one) for one in signals if isinstance(one[1], h5py.Dataset)]
    if own.is_h5(file):
        return [_row(path, file, "patterns", file["patterns"])]
    others: list[str] = []
    found = []

    def visit(key: str | bytes, item: Any) -> None:
        """Soft and external links are not followed, and no object is visited twice."""
        if isinstance(item, h5py.Dataset) and item.ndim > 1:
            name = _escaped(key)
            if item.dtype.kind in "buifc":
                found.append(_row(path, file, name, item))
            else:
                kind = f"of type {one_line(item.dtype)}, which are no numbers"
                others.append(f"{one_line(name)}: {by(item.shape)} {kind}")

    file.visititems(visit)
    if any(len(one["source"].shape) > 2 for one in found):
        return with_stated(path, file, found)
    links = _links(file, others)
    if others or links:
        has = "; the file has " + "; ".join(others[:6]) if others else ""
        what = _in_other_files(path, links) if links else "no 4D array of numbers and no stack of patterns"  # fmt: skip
        raise SourceError(f"{path}: {what}{has}")
    return found


def _row(path: str, file: Any, name: str, data: Any) -> dict[str, Any]:
    """A dataset, as arguments of `Candidate`."""
    shape = tuple(int(n) for n in data.shape)
    title = name.split("/")[1] if name.startswith("Experiments/") else name
    if data.ndim < 3:  # listed only; a file may have one for each pattern
        source: Source = Hdf5Dataset(path, name, data.dtype, shape)
        plain = tuple(Axis(f"axis{i}", n) for i, n in enumerate(shape))
        return {"name": title, "source": source, "axes": plain, "fault": _fault(path, name, data)}
    parent, chunks = data.parent, data.chunks
    parts = {"file": file, "group": parent, "dataset": data}
    attrs_of = {name: attributes_of(part) for name, part in parts.items()}
    labels, axes, described = names_of(data), [], []
    names = names_of(data, attrs_of["dataset"], attrs_of["group"])
    for i, size in enumerate(shape):
        found = parent.get(f"axis-{i}")
        along = parent.get(f"dim{i if 'dim0' in parent else i + 1}")  # EMD counts from 0, or from 1
        scale = first_scale(data, i)
        # netCDF names only the scale
        label = labels[i] or ("" if scale is None else text_of(scale.name or "").rpartition("/")[2])
        if found is None and scale is not None and label:
            axes.append(axis_along(label, size, scale, attributes_of(scale)))
        elif found is None and isinstance(along, type(data)):
            attrs = attributes_of(along)
            axes.append(axis_along(attrs.get("name", f"axis{i}"), size, along, attrs))
        else:
            attrs = attributes_of(found) if found is not None else {}
            described.append(attrs)
            axes.append(axis_from(attrs.get("name", names[i] or f"axis{i}"), size, attrs))
    source = Hdf5Dataset(path, name, data.dtype, shape, math.prod(chunks or (0,)) * data.dtype.itemsize)  # fmt: skip
    flags = order_by_flags(described)
    notes = (*flags["notes"], *_unwritten(data))
    if "MATLAB_class" in attrs_of["dataset"]:
        notes += (f"MATLAB stores axes in reverse: there it is {by(shape[::-1])}",)
    if name.startswith("signals/") and "emd_group_type" in file["signals"].attrs:
        source, axes = View.of(source).transpose(range(len(shape))[::-1]), axes[::-1]
        chunks = chunks and chunks[::-1]
        notes += ("HyperSpy writes the axes of .emd in reverse; they are put in order",)
    part, doubt = _part(path, name, attrs_of["dataset"]) if len(shape) == 3 else ("", "")
    metadata = {where: attributes for where, attributes in attrs_of.items() if attributes}
    known: dict[str, Any] = {"metadata": metadata}
    if name.startswith("Experiments/"):
        known = own.of_hspy(path, parent, metadata)
    elif own.is_h5(file):
        known = own.of_h5(path, file)
    return {
        "name": title,
        "source": source,
        "axes": tuple(axes),
        "chunks": chunks,
        "hint": doubt,
        **flags,
        "part": part,
        "fault": _fault(path, name, data) or packed(path, name, attrs_of["dataset"]),
        **known,
        "notes": (*notes, *known.get("notes", ())),
    }


def _escaped(name: str | bytes) -> str:
    """A name as text: h5py returns names that are not UTF-8 as bytes."""
    return name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")


def _links(file: Any, others: list[str]) -> list[tuple[str, str, str]]:
    """Links to other files: group, file and target. ``others`` takes links to nowhere."""
    import h5py

    links = []

    def visit(key: bytes, info: Any) -> None:
        name = _escaped(key)
        if not name.isprintable():  # h5py cannot look up names that are not UTF-8
            return
        link = file.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            links.append((name.rpartition("/")[0], str(link.filename), str(link.path).strip("/")))
        elif isinstance(link, h5py.SoftLink) and file.get(name) is None:
            others.append(f"{one_line(name)}, a link to {one_line(link.path)}, where nothing is")

    file.id.links.visit(visit, info=True)
    return links


def _in_other_files(path: str, links: list[tuple[str, str, str]]) -> str:
    """An error message for a file of links, such as the master file of a detector: where the patterns are, and what to type."""
    sets: dict[tuple[str, str], list[str]] = {}
    for group, file, target in links:
        sets.setdefault((group, target), []).append(file)
    (group, target), files = max(sets.items(), key=lambda item: len(item[1]))
    folder = Path(path).parent
    missing = [one_line(file) for file in files if not (folder / file).is_file()]
    if missing:
        return f"the patterns are in {missing[0]}, which is missing; copy it too"
    first, last, whole_name = one_line(files[0]), one_line(files[-1]), one_line(folder / files[0])
    if len(files) == 1:
        return f"the patterns are in another file; set input.path: {whole_name} and input.dataset: {one_line(target)}"
    listed = f"g = h5py.File('{path}')['{group or '/'}']; d = [g[k] for k in sorted(g, key=len) if g[k].ndim == 3]"
    way = _join(listed, Path(path).stem.removesuffix("_master"), path, group)
    return f"a master file: the patterns are in {len(files):,} files, {first} to {last}; {way}"


def _part(path: str, name: str, attrs: Mapping[str, Any]) -> tuple[str, str]:
    """Message about the larger acquisition that a dataset is a part of, or a hint if that is uncertain.

    Detectors of DECTRIS write NAME_data_000001.h5 and so on, and list them in NAME_master.h5.
    """
    file = Path(path)
    found = re.fullmatch(r"(.+)_data_\d+\.h5", file.name)
    low, high = (whole(attrs.get(f"image_nr_{end}")) for end in ("low", "high"))
    if not found:
        later = (low or 1) > 1
        return f"it holds patterns from {low:,} on of several files" if later else "", ""
    stem, there, n_files = found[1], sorted(file.parent.glob(f"{escape(found[1])}_data_*.h5")), 0
    master = file.with_name(f"{stem}_master.h5")
    if master.is_file():
        try:
            with opened_hdf5(str(master)) as links:
                n_files = len({link[1] for link in _links(links, [])})
        except SourceError:  # reported when the master itself is opened
            pass
    n_files = max(len(there), n_files)
    if n_files < 2 and (low or 1) == 1:
        return "", "a detector's data file; its master file states the scan, or whether there are more"  # fmt: skip
    which = f"patterns {low:,} to {high:,}" if low and high else "a part"
    words = f"it holds {which} of an acquisition in {max(n_files, 2):,} files"
    if len(there) < n_files or n_files < 2:
        return f"{words} or more, of which {len(there):,} here; copy the others and the master file, too", ""  # fmt: skip
    listed = (
        f"d = [h5py.File(p)['{name}'] for p in sorted(glob.glob('{file.parent / stem}_data_*.h5'))]"
    )
    way = _join(listed, stem, name, str(file.parent))
    return f"{words}, {there[0].name} to {there[-1].name}; {way}", ""


def _join(listed: str, stem: str, *quoted: str) -> str:
    """A command that joins the datasets ``d``, unless a name from a file (``quoted``) is unsafe in a shell."""
    if not can_be_quoted(stem, *quoted):
        return "join them into one dataset, or rename files and groups to plain names"
    joined = "da.concatenate([da.from_array(x) for x in d]).rechunk((64, -1, -1))"
    return (
        f"join them: python -c \"import dask.array as da, glob, h5py, hdf5plugin; {listed}; {joined}.to_zarr('{stem}.zarr')\", "
        f"then open {stem}.zarr with input.scan_shape=[scan_y,scan_x]"
    )


def _fault(path: str, name: str, data: Any) -> str:
    """Why a dataset cannot be read, or "".

    HDF5 reads missing parts of virtual datasets as zeros, and looks for external raw data in the working directory.
    """
    import h5py
    import hdf5plugin  # noqa: F401  registers blosc and others with HDF5

    if data.external:
        return (
            f"{path}: the numbers of {name} are not in this file but in {one_line(data.external[0][0])}; copy the dataset "
            "into a file of its own where it was written, or open that file as a .raw with input.shape and input.dtype"
        )
    for part in data.virtual_sources() if data.is_virtual else ():
        other = Path(path).parent / part.file_name
        # % stands for a number
        if part.file_name != "." and "%" not in part.file_name and not other.is_file():
            return (
                f"{path}: a part of {name} is in {one_line(other)}, which is missing; copy it too"
            )
    properties = data.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        code, _, _, title = properties.get_filter(i)
        if code >= 256 and not h5py.h5z.filter_avail(
            code
        ):  # lower numbers are filters of HDF5 itself
            what = one_line(title.decode("utf-8", "replace")) or "without a name"
            return (
                f"{path}: {name} is compressed by the HDF5 filter {code} ({what}), which is not installed; save it again with gzip "
                "where it can be read (h5repack -f GZIP=1)"
            )
    return ""


def _unwritten(data: Any) -> tuple[str, ...]:
    """A note on chunks that were never written, as in an aborted acquisition: HDF5 reads fill values."""
    if data.external or data.is_virtual:
        return ()
    if data.chunks is None:
        is_there = not data.size or data.id.get_storage_size()
        return (
            () if is_there else (f"nothing of it was ever written; it reads as {data.fillvalue}",)
        )
    n = math.prod(-(-size // chunk) for size, chunk in zip(data.shape, data.chunks, strict=True))
    there = data.id.get_num_chunks() if n <= 10**6 else n  # counting as many takes 0.4 s
    if there >= n:
        return ()
    return (f"{n - there:,} of {n:,} chunks were never written; they read as {data.fillvalue}",)


def name_behind(path: str, name: str, known: Iterable[str]) -> str | None:
    """The known dataset that ``name`` is a link to within the file, or None."""
    import h5py

    def place(item: Any) -> tuple[int, int]:
        info = h5py.h5o.get_info(item.id)
        return info.fileno, info.addr

    with opened_hdf5(path) as file:
        item = file.get(as_bytes(name))
        if not isinstance(item, h5py.Dataset):
            return None
        there = (one for one in known if one in file)
        return next((one for one in there if place(file[as_bytes(one)]) == place(item)), None)
