"""MRC files (.mrc), and the _info.txt that Direct Electron's cameras write with them.

Rows keep the order of the file, as in RosettaSciIO.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import stated
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.source import (
    Candidate,
    as_raw,
    bytes_behind,
    calibrated,
    header_of,
    scan_axes,
    side_text,
    stack_axes,
)
from stem_dask.storage.errors import one_line
from stem_dask.storage.s3 import at

_HEADER_BYTES = 1024

_FIELDS = np.dtype([
    ("width", "u4"), ("height", "u4"), ("n", "u4"), ("mode", "u4"), ("lattice", "V60"), ("least", "f4"), ("most", "f4"),
    ("mean", "f4"), ("space group", "u4"), ("extended", "u4"), ("type", "V12"), ("version", "u4"), ("other", "V40"),
    ("stamp", "u4"), ("flags", "u4"), ("origin", "V64"), ("labels", "S80", (10,)),
])  # fmt: skip

_HEADERS = {"<": _FIELDS.newbyteorder("<"), ">": _FIELDS.newbyteorder(">")}

_DTYPES = {0: "u1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}

_IMOD_STAMP, _IMOD_SIGNED = 1146047817, 1

#: versions of the format whose bytes are signed; cameras that state them write unsigned bytes all the same
_SIGNED_VERSIONS = (20140, 20141)

#: YYYYMMDD_number[_suffix][_part]_movie.mrc, as Direct Electron names movies
_MOVIE = re.compile(r"(\d{8}_\d+_)(?:.+_)?movie")


def list_mrc(path: str) -> list[Candidate]:
    """The stack of patterns of an .mrc file, and its scan when the info file of a Direct Electron camera states one.

    Raises
    ------
    SourceError
        When the header is of another format, of complex or packed numbers, or states more than the file holds.
    """
    header = header_of(path, _HEADER_BYTES, "an MRC file")
    both = {order: np.frombuffer(header, layout)[0] for order, layout in _HEADERS.items()}
    known = [order for order, fields in both.items() if fields["mode"] in (*_DTYPES, 3, 4, 101)]
    if not known:
        raise SourceError(
            f"{path}: not an MRC file: the mode is {both['<']['mode']:,}, where one of "
            f"{', '.join(map(str, _DTYPES))} was expected"
        )
    # mode 0 is 0 in both byte orders, but in the wrong one the sizes are huge
    order = min(known, key=lambda one: max(_sizes(both[one])))
    fields = both[order]
    width, height, n, mode = _sizes(fields)
    if mode not in _DTYPES:
        raise SourceError(
            f"{path}: MRC mode {mode} (complex or packed numbers) is not read; save modes 0, 1, 2, 6 or 12"
        )
    dtype, signs = _type(fields, order, mode)
    offset = _HEADER_BYTES + int(fields["extended"])
    shape = (n, height, width)
    need, size = offset + math.prod(shape) * dtype.itemsize, at(path).stat().st_size
    if min(shape) < 1 or need > size:
        pattern_bytes = max(1, height * width * dtype.itemsize)
        there = max(0, size - offset) // pattern_bytes
        way = (
            f"; for these {as_raw(path, (there, height, width), dtype, offset)}"
            if there and min(shape)
            else ""
        )
        raise SourceError(
            f"{path}: the header says {by(shape)} {dtype} from byte {offset:,} on, {need:,} bytes in all, but the file "
            f"has {size:,}: {there:,} patterns; it was cut, or the header is damaged{way}"
        )
    more, odd = divmod(size - need, math.prod(shape[1:]) * dtype.itemsize)
    remedy = "if the number of patterns is wrong, " + as_raw(
        path, (n + more, height, width), dtype, offset
    )
    if odd:
        remedy = f"if the header is wrong, link the file as a .raw (ln -s) and give its sizes and input.offset={offset}"
    notes = bytes_behind(path, "patterns", shape, dtype, size - need, remedy, offset) + signs
    texts = (text.decode("latin-1").strip("\0 ") for text in fields["labels"])
    labels = [text for text in texts if text]
    metadata: dict[str, Any] = {
        "header": {"size": [width, height, n], "mode": mode, "data begin at": offset, "labels": labels}
    }  # fmt: skip
    ky, kx, scan, hint = Axis("ky", height), Axis("kx", width), None, ""
    info = _info_file(path)
    if info is not None:
        metadata["info"] = settings = _settings(side_text(info))
        scan, hint = _scan(settings), _not_by_rows(settings)
        ky, kx = (
            calibrated(f"k{x}", axis.size, _positive(settings, f"Diffraction Pixel Size {x.upper()}"), 0.0, "1/nm")
            for x, axis in (("y", ky), ("x", kx))
        )  # fmt: skip
    source = FlatFile(path, offset, dtype, shape)
    return [
        Candidate("patterns", source, stack_axes(n, ky, kx), metadata=metadata, scan=scan, notes=notes, hint=hint,
                  files=() if info is None else (info,), about=stated("Direct Electron", metadata.get("info", {})))
    ]  # fmt: skip


def _sizes(fields: np.void) -> tuple[int, ...]:
    """Columns, rows, patterns, mode."""
    return tuple(int(fields[name]) for name in ("width", "height", "n", "mode"))


def _type(fields: np.void, order: str, mode: int) -> tuple[np.dtype, tuple[str, ...]]:
    """The type of the numbers; of mode 0, whose sign is ambiguous, by IMOD's mark, else by the stated minimum."""
    if mode != 0:
        return np.dtype(order + _DTYPES[mode]), ()
    if fields["stamp"] == _IMOD_STAMP:
        return np.dtype("i1" if fields["flags"] & _IMOD_SIGNED else "u1"), ()
    least, most = fields["least"], fields["most"]
    if -128 <= least < 0 and least <= most <= 127:
        return np.dtype("i1"), ()
    stated = 0 <= least <= most  # the other way round it is not known
    if fields["version"] not in _SIGNED_VERSIONS or stated:
        return np.dtype("u1"), ()
    note = "bytes are read as counts of 0 to 255, as cameras write them; the format itself has them from -128 to 127"
    return np.dtype("u1"), (note,)


def _info_file(path: str) -> str | None:
    """The settings of a movie: of its own name, or of its acquisition."""
    folder, stem = path[: -len(Path(path).name)], Path(path).stem
    names = [f"{stem}_info.txt", f"{stem.removesuffix('_movie')}_info.txt"]
    if part := _MOVIE.fullmatch(stem):
        names.append(f"{part[1]}info.txt")
    return next((folder + name for name in names if at(folder + name).is_file()), None)


def _settings(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def _positive(settings: dict[str, str], name: str) -> str | None:
    """A size; Direct Electron writes -1 for unknown."""
    value = settings.get(name, "")
    return None if value.startswith("-") else value


def _path_of(settings: dict[str, str]) -> str:
    """The path of the beam, or that of its region of interest."""
    path = settings.get("Scan - Type", "Raster")
    in_region = settings.get("Scan - ROI Enable") == "Enable"
    return settings.get("Scan - ROI Type", path) if in_region else path


def _not_by_rows(settings: dict[str, str]) -> str:
    """Why the scan of an info file is not used, when it is not a raster."""
    if settings.get("Scan - Enable") != "Enable" or _path_of(settings) == "Raster":
        return ""
    return f"its _info.txt states a scan of the type {one_line(_path_of(settings))}, not row by row"


def _scan(settings: dict[str, str]) -> tuple[Axis, Axis] | None:
    """The scan; None for one that is not a raster, or of several repeats."""
    raster = {
        "Scan - Enable": "Enable",
        "Scan - Repeats": "1",
        "Scan - Points Per Camera Frame": "1",
    }
    if any(settings.get(name, value) != value for name, value in raster.items()):
        return None
    if _path_of(settings) != "Raster" or "Scan - Enable" not in settings:
        return None
    part = "ROI Size" if settings.get("Scan - ROI Enable") == "Enable" else "Size"
    steps = (_positive(settings, f"Specimen Pixel Size {x} (nanometers)") for x in "YX")
    return scan_axes(
        settings.get(f"Scan - {part} Y"), settings.get(f"Scan - {part} X"), *steps, units="nm"
    )
