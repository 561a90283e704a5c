"""TVIPS files (.tvips), one or a series NAME_000.tvips, NAME_001.tvips, …: patterns, each after a header."""

import re
from pathlib import Path

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import stated
from stem_dask.core.model import Axis
from stem_dask.readers.flat import FramedFile, framed
from stem_dask.readers.source import Candidate, record_of, stack_axes
from stem_dask.storage.s3 import opened_file

_HEADER = np.dtype([
    (name, "<u4") for name in
    ("size", "version", "dimx", "dimy", "bitsperpixel", "offsetx", "offsety", "binx", "biny", "pixelsize", "ht",
     "magtotal", "frameheaderbytes")
])  # fmt: skip

_DTYPES = {8: "u1", 16: "<u2"}

#: the beginning of the header of a pattern, of version 2
_FRAME = np.dtype([
    ("other", "V16"), ("current", "<f4"), ("mag", "<u4"), ("mode", "<u4"), ("stage x", "<f4"), ("stage y", "<f4"),
    ("stage z", "<f4"), ("stage alpha", "<f4"), ("stage beta", "<f4"),
])  # fmt: skip

_OLD_LEAD = 12  # bytes before each pattern in files of version 1

_PART = re.compile(r"(.*)_(\d{3,})", re.DOTALL)


def list_tvips(path: str) -> list[Candidate]:
    """The stack of patterns of a .tvips file and of those that follow it in its series.

    The header's pixel size is that of the camera in nm, so the axes are in pixels; it is in the metadata.

    Raises
    ------
    SourceError
        When the header is of another format, a part of the series is missing, or it is not the first part.
    """
    part = _PART.fullmatch(Path(path).stem)
    if part and int(part[2]):
        first = Path(path).with_name(f"{part[1]}_{'0' * len(part[2])}{Path(path).suffix}")
        raise SourceError(f"{path}: this is part {int(part[2])} of a series; open {first}")
    header = record_of(path, _HEADER, "a TVIPS file")
    if header["version"] not in (1, 2) or not 52 <= header["size"] <= 1 << 16:
        raise SourceError(
            f"{path}: not a TVIPS file: version {header['version']:,} and a header of {header['size']:,} bytes, where "
            "version 1 or 2 and 256 bytes were expected"
        )
    if header["bitsperpixel"] not in _DTYPES:
        raise SourceError(
            f"{path}: {header['bitsperpixel']:,} bits a pixel, where 8 or 16 were expected; the header is damaged"
        )
    dtype = np.dtype(_DTYPES[header["bitsperpixel"]])
    frame = (header["dimy"], header["dimx"])
    lead = header["frameheaderbytes"] if header["version"] == 2 else _OLD_LEAD
    stride = lead + frame[0] * frame[1] * dtype.itemsize
    source, notes = framed(path, header["size"], stride, dtype, frame, lead, marked=False)
    more = _parts(path, part)
    for other in more:
        then, rest = framed(other, 0, stride, dtype, frame, lead, marked=False)
        source = FramedFile((*source.runs, *then.runs), dtype, frame)
        notes += rest
    if more:
        notes += (f"a series of {len(more) + 1} files",)
    axes = stack_axes(source.shape[0], Axis("ky", frame[0]), Axis("kx", frame[1]))
    about = stated("TVIPS", {**header, **_first_frame(path, header)})
    return [
        Candidate("patterns", source, axes, metadata=header, notes=notes, files=more, about=about)
    ]


def _first_frame(path: str, header: dict[str, int]) -> dict[str, float]:
    """The header of the first pattern; those of version 1 have no fields."""
    if header["version"] == 1 or header["frameheaderbytes"] < _FRAME.itemsize:
        return {}
    with opened_file(path) as file:
        file.seek(header["size"])
        frame = np.frombuffer(file.read(_FRAME.itemsize), _FRAME)[0]
    return {name: frame[name].item() for name in _FRAME.names or () if name != "other"}


def _parts(path: str, part: re.Match[str] | None) -> tuple[str, ...]:
    """The files that follow, in their order; none may be missing between them."""
    if not part:
        return ()
    here = Path(path)
    numbers = {}
    for other in here.parent.iterdir():
        found = _PART.fullmatch(other.stem)
        if found and found[1] == part[1] and other.suffix == here.suffix:
            numbers[int(found[2])] = str(other)
    missing = sorted(set(range(max(numbers) + 1)) - set(numbers))
    if missing:
        raise SourceError(
            f"{path}: part {missing[0]} of the series is missing; the last is {numbers[max(numbers)]}"
        )
    return tuple(numbers[i] for i in sorted(numbers) if i)
