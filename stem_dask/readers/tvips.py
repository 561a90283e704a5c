"""TVIPS files (.tvips), one or a series NAME_000.tvips, NAME_001.tvips, …: patterns, each after a header."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import stated
from stem_dask.core.model import Axis
from stem_dask.readers.flat import framed
from stem_dask.readers.source import Candidate, record_of, stack
from stem_dask.storage.location import opened_file

_FIELDS = (
    "size", "version", "dimx", "dimy", "bitsperpixel", "offsetx", "offsety", "binx", "biny", "pixelsize", "ht", "magtotal",
    "frameheaderbytes",
)  # fmt: skip
_HEADER = np.dtype([(name, "<u4") for name in _FIELDS])

#: the beginning of the header of a pattern, of version 2
_FRAME = np.dtype([
    ("other", "V16"), ("current", "<f4"), ("mag", "<u4"), ("mode", "<u4"), ("stage x", "<f4"), ("stage y", "<f4"),
    ("stage z", "<f4"), ("stage alpha", "<f4"), ("stage beta", "<f4"),
])  # fmt: skip

_PART = re.compile(r"(.*)_(\d{3,})", re.DOTALL)


def list_tvips(path: str) -> list[Candidate]:
    """The stack of patterns of a .tvips file and of those that follow it in its series.

    The header's pixel size is that of the camera in nm, so the axes are in pixels; it is in the metadata.
    """
    here = Path(path)
    part = _PART.fullmatch(here.stem)
    if part and int(part[2]):
        first = here.with_name(f"{part[1]}_{'0' * len(part[2])}{here.suffix}")
        raise SourceError(f"{path}: this is part {int(part[2])} of a series; open {first}")
    header = record_of(path, _HEADER, "a TVIPS file")
    if header["version"] not in (1, 2) or not 52 <= header["size"] <= 1 << 16:
        raise SourceError(
            f"{path}: not a TVIPS file: version {header['version']:,} and a header of {header['size']:,} bytes, where "
            "version 1 or 2 and 256 bytes were expected"
        )
    if header["bitsperpixel"] not in (8, 16):
        raise SourceError(
            f"{path}: {header['bitsperpixel']:,} bits a pixel, where 8 or 16 were expected; the header is damaged"
        )
    dtype, shape = np.dtype(f"<u{header['bitsperpixel'] // 8}"), (header["dimy"], header["dimx"])
    lead = header["frameheaderbytes"] if header["version"] == 2 else 12
    stride = lead + shape[0] * shape[1] * dtype.itemsize
    source, notes = framed(path, header["size"], stride, dtype, shape, lead, marked=False)
    numbers = {0: path}  # the files of the series
    for file in here.parent.iterdir() if part else ():
        found = _PART.fullmatch(file.stem)
        if found and part and found[1] == part[1] and file.suffix == here.suffix:
            numbers[int(found[2])] = str(file)
    missing = next((i for i, n in enumerate(sorted(numbers)) if i != n), None)
    if missing is not None:
        last = numbers[max(numbers)]
        raise SourceError(f"{path}: part {missing} of the series is missing; the last is {last}")
    more, runs = tuple(numbers[i] for i in sorted(numbers)[1:]), source.runs
    for other in more:
        then, rest = framed(other, 0, stride, dtype, shape, lead, marked=False)
        runs, notes = (*runs, *then.runs), notes + rest
    if more:
        source, notes = replace(source, runs=runs), (*notes, f"a series of {len(numbers)} files")
    first_frame = {}
    if header["version"] == 2 and lead >= _FRAME.itemsize:
        with opened_file(path) as opened:
            opened.seek(header["size"])
            fields = np.frombuffer(opened.read(_FRAME.itemsize), _FRAME)[0]
        first_frame = {name: fields[name].item() for name in _FRAME.names or () if name != "other"}
    ky, kx, about = (
        Axis("ky", shape[0]),
        Axis("kx", shape[1]),
        stated("TVIPS", {**header, **first_frame}),
    )
    return [stack(source, ky, kx, metadata=header, notes=notes, files=more, about=about)]
