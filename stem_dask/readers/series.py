"""Several files, or the five axes of one, as one scan: ``input.series`` and ``input.index``."""

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.model import LIST_DIMS, SCAN_DIMS, Axis
from stem_dask.core.text import by
from stem_dask.readers.source import Candidate
from stem_dask.readers.views import Joined, View
from stem_dask.storage.location import is_url


def files_of(name: str) -> list[str]:
    """The files of a folder or glob, in the order of the numbers in their names.

    Raises
    ------
    SourceError
        When there are none, or a folder has files of several types.
    """
    folder = Path(name)
    if is_url(name):
        raise SourceError(
            f"{name}: input.series is for files here, in a folder or matched by a glob"
        )
    if folder.is_dir():
        found = [str(one) for one in folder.iterdir() if one.is_file() and one.name[0] != "."]
        kinds = sorted({Path(one).suffix for one in found})
        if len(kinds) > 1:
            raise SourceError(
                f"{name}: the folder has files of several types ({', '.join(kinds)}); name them with a glob, such as "
                f"'{folder.name}/*{kinds[0]}'"
            )
    else:
        found = glob.glob(name, recursive=True)
    if not found:
        raise SourceError(f"{name}: there are no such files; input.series takes a folder or a glob")
    return sorted(found, key=_numbers)


def _numbers(path: str) -> list[Any]:
    """Text and numbers of a name, so that 10 comes after 9."""
    parts = re.split(r"(\d+)", path)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def open_series(
    name: str, open_file: Callable[[str], tuple[str, list[Candidate]]], dataset: str | int | None
) -> tuple[str, Candidate, str]:
    """One scan of all files of a folder or glob.

    Files with one image each are the positions of a scan: in the order of y and x in their names, such as
    ``pattern_x0_y0.tif``, else in that of their numbers. Stacks of patterns follow each other; scans do along scan_y.

    Parameters
    ----------
    name : of the folder, or the glob
    open_file : kind and arrays of a file
    dataset : name or number of the array in every file

    Returns
    -------
    Kind of the files, the patterns, and the first file
    """
    files = files_of(name)
    places = _places(files)
    if places is not None:
        files = [file for _, file in sorted(zip(places, files, strict=True))]
    kind, parts = "", list[Candidate]()
    for file in files:
        kind, candidates = open_file(file)
        one = _array(file, candidates, dataset)
        if one.fault:
            raise SourceError(one.fault)
        shape, dtype = (parts or [one])[0].source.shape, (parts or [one])[0].source.dtype
        # the last file of an acquisition may hold fewer patterns
        same = one.source.shape[1:] == shape[1:] if len(shape) > 2 else one.source.shape == shape
        if not same or one.source.dtype != dtype:
            raise SourceError(
                f"{file}: {by(one.source.shape)} {one.source.dtype}; expected {by(shape)} {dtype}, as in {files[0]}: all files "
                "of a series are alike"
            )
        parts.append(one)
    first, source = parts[0], Joined(tuple(one.source for one in parts))
    n = source.shape[0]
    listed = f"{len(files):,} files, {Path(files[0]).name} to {Path(files[-1]).name}"
    is_image = prod(shape[:-2]) == 1
    scan, note = None, f"{listed}, an image each"
    if is_image and places is not None:
        y, x = ({place[i] for place in places} for i in (0, 1))
        scan = (Axis(SCAN_DIMS[0], len(y)), Axis(SCAN_DIMS[1], len(x)))
        note += ", in the order of y and x in their names"
    elif not is_image:
        what = "scans" if len(shape) == 4 else "stacks"
        note = f"{listed}: {what} of {by(shape)}, one after another"
    lead = replace(first.axes[0], size=n) if len(shape) == 4 else Axis(LIST_DIMS[0], n)
    joined = replace(
        first,
        source=source,
        axes=(lead, *first.axes[len(first.axes) - len(source.shape) + 1 :]),
        scan=scan,
        hint="",
        part="",
        notes=(*first.notes, note),
        files=(*(file for one in parts for file in one.files), *files[1:]),
        valid=None,
    )
    return kind, joined, files[0]


def _array(file: str, found: Sequence[Candidate], dataset: str | int | None) -> Candidate:
    """The array of one file: that of the name or number, or the largest."""
    usable = [one for one in found if len(one.source.shape) in (2, 3, 4)]
    if dataset is not None:
        usable = [one for i, one in enumerate(usable) if dataset in (one.name, one.number, i)]
    if not usable:
        raise SourceError(f"{file}: no image, stack of patterns or scan of a series is in it")
    return max(usable, key=lambda one: prod(one.source.shape))


def _places(files: Sequence[str]) -> list[tuple[int, int]] | None:
    """Row and column of each file, by y and x in its name; None unless they fill a scan.

    Examples
    --------
    >>> _places(["a/x0_y1.tif", "a/x0_y0.tif"]), _places(["a/1.tif"])
    ([(1, 0), (0, 0)], None)
    """
    for first, second in ("yx", "xy"):
        pattern = rf"(?i){first}[_=-]?(\d+)[^\d]*?{second}[_=-]?(\d+)"
        found = [match for file in files if (match := re.search(pattern, Path(file).name))]
        if len(found) < len(files):
            continue
        pairs = [(int(match[1]), int(match[2])) for match in found]
        places = pairs if first == "y" else [(y, x) for x, y in pairs]
        n = prod(len({place[i] for place in places}) for i in (0, 1))
        return places if n == len(files) == len({*places}) else None
    return None


def of_axes(
    name: str, one: Candidate, index: Mapping[str, int] | None, *, series: bool
) -> Candidate:
    """The scan of an array with more than four axes that ``index`` chooses, or all of its scans one after another.

    Parameters
    ----------
    name : of the file
    one : the array
    index : by name of an axis, as in the file; ``t`` is the first axis of an array that names it otherwise
    series : whether the scans of five axes follow each other along scan_y
    """
    shape, names = one.source.shape, [axis.name for axis in one.axes]
    surplus = len(shape) - 4
    if surplus > 0 and index is not None:
        chosen = {
            names.index(key) if key in names else 0: key for key in index if key in (*names, "t")
        }
        if not len(chosen) == len(index) == surplus:
            example = ", ".join(
                f"{axis}: 0" for axis in (["t"] if surplus == 1 else names[:surplus])
            )
            raise ConfigError(
                f"input.index is {dict(index)}, and {one.name} in {name} has the axes {', '.join(names)} ({by(shape)}); expected an "
                f"index for {surplus} of them, such as {{{example}}}"
            )
        parts: list[slice | int] = [slice(None)] * len(shape)
        for axis, key in chosen.items():
            if not 0 <= index[key] < shape[axis]:
                raise ConfigError(
                    f"input.index is {dict(index)}, and {name} has {shape[axis]} of {key}; expected 0 to {shape[axis] - 1}"
                )
            parts[axis] = index[key]
        kept = [i for i in range(len(shape)) if i not in chosen]
        words = ", ".join(f"{key} {index[key]}" for key in chosen.values())
        return _cut(one, View.of(one.source).select(*parts), kept, f"took {words} of {by(shape)}")
    if series and surplus == 1:
        scans = (View.of(one.source).select(i, *[slice(None)] * 4) for i in range(shape[0]))
        note = f"{shape[0]:,} scans of {by(shape[1:3])}, one after another along scan_y"
        joined = _cut(one, Joined(tuple(scans)), [1, 2, 3, 4], note)
        lead = replace(joined.axes[0], size=shape[0] * shape[1])
        return replace(joined, axes=(lead, *joined.axes[1:]), chunks=None)
    return one


def _cut(one: Candidate, source: Any, kept: Sequence[int], note: str) -> Candidate:
    """Without the axes that are not kept."""
    return replace(
        one,
        source=source,
        axes=tuple(one.axes[i] for i in kept),
        chunks=None if one.chunks is None else tuple(one.chunks[i] for i in kept),
        notes=(*one.notes, note),
    )
