"""Datasets of HDF5 files: HyperSpy, EMD, NeXus, py4DSTEM, MATLAB and stem_dask's own.

Links to other files are followed only as a detector's master file has them: by a plain name, to a file in the same folder.
"""

import contextlib
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import stated, text_of, whole
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers import own
from stem_dask.readers.calibration import value_at, with_stated
from stem_dask.readers.containers import Hdf5Dataset, opened_hdf5
from stem_dask.readers.hdf5_metadata import (
    as_bytes,
    attributes_of,
    first_scale,
    is_safe,
    member,
    names_of,
)
from stem_dask.readers.layout import axis_along, axis_from, order_by_flags
from stem_dask.readers.source import MOST_HEADER_BYTES, Candidate, Source, packed
from stem_dask.readers.views import Joined, View
from stem_dask.storage.errors import one_line


def list_hdf5(path: str) -> list[Candidate]:
    """Datasets of an HDF5 file with two or more axes, with the calibration that HyperSpy, EMD and others write."""
    unlocked: list[str] = []
    with opened_hdf5(path, unlocked) as file:
        found = _listed(path, file)
    return [Candidate(**{**one, "notes": (*one.get("notes", ()), *unlocked)}) for one in found]


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
    has = "; the file has " + "; ".join(others[:6]) if others else ""
    if links:
        try:
            return [_linked(path, file, links)]
        except SourceError as error:
            raise SourceError(f"{error}{has}") from error
    if others:
        raise SourceError(f"{path}: no 4D array of numbers and no stack of patterns{has}")
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


class Link(NamedTuple):
    """A link to another file: its name and group, the file, and the dataset there."""

    name: str
    group: str
    file: str
    target: str


def _links(file: Any, others: list[str]) -> list[Link]:
    """Links to other files, in the order of their numbers. ``others`` takes links to nowhere."""
    import h5py

    links = []

    def visit(key: bytes, info: Any) -> None:
        name = _escaped(key)
        if not name.isprintable():  # h5py cannot look up names that are not UTF-8
            return
        link = file.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            group = name.rpartition("/")[0]
            links.append(Link(name, group, str(link.filename), str(link.path).strip("/")))
        elif isinstance(link, h5py.SoftLink) and file.get(name) is None:
            others.append(f"{one_line(name)}, a link to {one_line(link.path)}, where nothing is")

    file.id.links.visit(visit, info=True)
    return sorted(links, key=lambda link: (len(link.name), link.name))


def _linked(path: str, file: Any, links: Sequence[Link]) -> dict[str, Any]:
    """The patterns of a file of links, such as the master file of a detector, as arguments of `Candidate`."""
    import h5py

    sets: dict[tuple[str, str], list[Link]] = {}
    for link in links:
        sets.setdefault((link.group, link.target), []).append(link)
    chosen, parts = max(sets.values(), key=len), []
    for link in chosen:
        if Path(link.file).name != link.file:
            raise SourceError(
                f"{path}: {one_line(link.name)} is a link to {one_line(link.file)}, and links are followed within the folder of the "
                "file only; open that file, or copy it there"
            )
        other = Path(path).with_name(link.file)
        if not other.is_file():
            raise SourceError(
                f"{path}: the patterns are in {one_line(link.file)}, which is missing; copy it too"
            )
        with opened_hdf5(str(other)) as there:
            data = member(there, link.target, h5py.Dataset)
            if data is None or data.ndim < 3:
                raise SourceError(
                    f"{path}: {one_line(link.name)} is a link to {one_line(link.target)} in {one_line(link.file)}, where no patterns are"
                )
            parts.append(_row(str(other), there, link.target, data))
    first, files = parts[0], tuple(str(Path(path).with_name(link.file)) for link in chosen)
    kinds = {(one["source"].shape[1:], str(one["source"].dtype)) for one in parts}
    if len(kinds) > 1:
        shapes = ", ".join(f"{by(shape)} {dtype}" for shape, dtype in sorted(kinds))
        raise SourceError(
            f"{path}: the files that it lists hold patterns of several kinds: {shapes}"
        )
    source = first["source"]
    notes = [*first["notes"]]
    if len(parts) > 1:
        source = Joined(tuple(one["source"] for one in parts))
        notes.append(f"joined {len(parts):,} files, {files[0]} to {Path(files[-1]).name}")
    else:
        notes.append(f"the patterns are in {files[0]}")
    about = stated("HDF5", lambda place: value_at(file, place))
    faults = [one["fault"] for one in parts if one["fault"]]
    return {
        **first,
        "name": chosen[0].group or "patterns",
        "source": source,
        "axes": (replace(first["axes"][0], size=source.shape[0]), *first["axes"][1:]),
        "part": "",
        "hint": "",
        "fault": faults[0] if faults else "",
        "about": {**(first.get("about") or {}), **about},
        "notes": (*notes, *_pixel_mask(path, file, source.shape[-2:])),
        "files": files,
    }


def _pixel_mask(path: str, file: Any, detector: tuple[int, ...]) -> tuple[str, ...]:
    """A note on the bad pixels that the detector states, and how to mask them."""
    import h5py

    found: list[Any] = []

    def visit(key: str | bytes, item: Any) -> None:
        is_mask = _escaped(key).rpartition("/")[2] == "pixel_mask"
        if is_mask and isinstance(item, h5py.Dataset) and item.shape == detector:
            found.append(item)

    file.visititems(visit)
    if not found or found[0].dtype.kind not in "bui":
        return ()
    bad = np.argwhere(found[0][...] != 0).tolist()
    if not bad:
        return ()
    way = "input.mask={pixels: " + str(bad).replace(" ", "") + "}"
    if len(bad) > 20:
        name = f"{Path(path).stem}_mask.npy"
        way = (
            f'python -c "import h5py, numpy; numpy.save({name!r}, h5py.File({path!r})[{found[0].name!r}][...] != 0)", then '
            f"input.mask={name}"
        )
        if not re.fullmatch(r"[\w/.,:+=@~ -]*", f"{path}{found[0].name}"):
            way = f"save {one_line(found[0].name)} != 0 as a .npy file, and give it as input.mask"
    return (f"the detector states {len(bad):,} bad pixels, which are not masked: {way}",)


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
        with contextlib.suppress(SourceError), opened_hdf5(str(master)) as links:
            n_files = len({link.file for link in _links(links, [])})
    n_files = max(len(there), n_files)
    if n_files < 2 and (low or 1) == 1:
        return "", "a detector's data file; its master file states the scan, or whether there are more"  # fmt: skip
    which = f"patterns {low:,} to {high:,}" if low and high else "a part"
    words = f"it holds {which} of an acquisition in {max(n_files, 2):,} files"
    if len(there) < n_files or n_files < 2:
        return f"{words} or more, of which {len(there):,} here; copy the others and the master file, too", ""  # fmt: skip
    way = shlex.quote(f"input.path={master}")
    if not master.is_file():
        way = shlex.quote(f"input.path={file.parent}/{stem}_data_*.h5") + " input.series=true"
    return f"{words}; open all of them: {way} input.scan_shape=[scan_y,scan_x]", ""


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
