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
    record_of,
    scan_axes,
    side_text,
    stack,
)
from stem_dask.storage.errors import one_line
from stem_dask.storage.location import at

_HEADER = np.dtype([
    ("width", "u4"), ("height", "u4"), ("n", "u4"), ("mode", "u4"), ("lattice", "V60"), ("least", "f4"), ("most", "f4"),
    ("mean", "f4"), ("space group", "u4"), ("extended", "u4"), ("type", "V12"), ("version", "u4"), ("other", "V40"),
    ("stamp", "u4"), ("flags", "u4"), ("origin", "V64"), ("labels", "V800"),
])  # fmt: skip

_DTYPES = {0: "u1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}

#: YYYYMMDD_number[_suffix][_part]_movie.mrc, as Direct Electron names movies
_MOVIE = re.compile(r"(\d{8}_\d+_)(?:.+_)?movie")


def list_mrc(path: str) -> list[Candidate]:
    """The stack of patterns of an .mrc file, and its scan when the info file of a Direct Electron camera states one."""
    layouts = {"<": _HEADER.newbyteorder("<"), ">": _HEADER.newbyteorder(">")}
    both = {order: record_of(path, layouts[order], "an MRC file") for order in layouts}
    known = [order for order in both if both[order]["mode"] in (*_DTYPES, 3, 4, 101)]
    # mode 0 is 0 in both byte orders, but in the wrong one the sizes are huge
    order = min(known, key=lambda o: max(both[o][k] for k in ("width", "height", "n")), default="<")
    fields = both[order]
    width, height, n, mode = (fields[name] for name in ("width", "height", "n", "mode"))
    if mode not in _DTYPES:
        what = f"MRC mode {mode} (complex or packed numbers) is not read" if known else f"not an MRC file: the mode is {mode:,}"  # fmt: skip
        raise SourceError(f"{path}: {what}; expected one of the modes 0, 1, 2, 6 and 12")
    dtype, notes = np.dtype(order + _DTYPES[mode]), tuple[str, ...]()
    if mode == 0:  # the sign is ambiguous: by IMOD's mark, else by the stated minimum
        least, most = fields["least"], fields["most"]
        is_imod = fields["stamp"] == 1146047817
        if fields["flags"] & 1 if is_imod else -128 <= least < 0 and least <= most <= 127:
            dtype = np.dtype("i1")
        elif not is_imod and fields["version"] in (20140, 20141) and not 0 <= least <= most:
            notes = ("bytes are read as counts of 0 to 255, as cameras write them; the format itself has them from -128 to 127",)  # fmt: skip
    offset, shape = _HEADER.itemsize + fields["extended"], (n, height, width)
    need, size = offset + math.prod(shape) * dtype.itemsize, at(path).stat().st_size
    pattern_bytes = max(1, height * width * dtype.itemsize)
    if min(shape) < 1 or need > size:
        there = max(0, size - offset) // pattern_bytes
        way = f"; for these {as_raw(path, (there, height, width), dtype, offset)}"
        raise SourceError(
            f"{path}: the header says {by(shape)} {dtype} from byte {offset:,} on, {need:,} bytes in all, but the file "
            f"has {size:,}: {there:,} patterns; it was cut, or the header is damaged"
            + (way if there and min(shape) else "")
        )
    more, odd = divmod(size - need, pattern_bytes)
    remedy = f"if the number of patterns is wrong, {as_raw(path, (n + more, height, width), dtype, offset)}"
    if odd:
        remedy = f"if the header is wrong, link the file as a .raw (ln -s) and give its sizes and input.offset={offset}"
    notes = bytes_behind(path, "patterns", shape, dtype, size - need, remedy, offset) + notes
    lines = (fields["labels"][i : i + 80].decode("latin-1").strip("\0 ") for i in range(0, 800, 80))
    labels = [text for text in lines if text]
    metadata: dict[str, Any] = {
        "header": {"size": [width, height, n], "mode": mode, "data begin at": offset, "labels": labels}
    }  # fmt: skip
    ky, kx, scan, hint = Axis("ky", height), Axis("kx", width), None, ""
    # the settings of a movie: of its own name, or of its acquisition
    folder, stem = path[: -len(Path(path).name)], Path(path).stem
    names = [f"{stem}_info.txt", f"{stem.removesuffix('_movie')}_info.txt"]
    if part := _MOVIE.fullmatch(stem):
        names.append(f"{part[1]}info.txt")
    info = next((folder + name for name in names if at(folder + name).is_file()), None)
    if info is not None:
        pairs = (line.partition("=") for line in side_text(info).splitlines())
        settings = {name.strip(): value.strip() for name, equals, value in pairs if equals}
        # Direct Electron writes -1 for unknown
        sizes = {k: None if v.startswith("-") else v for k, v in settings.items() if " Size " in k}
        scan, hint = _scan(settings, sizes)
        ky, kx = (
            calibrated(f"k{x}", axis.size, sizes.get(f"Diffraction Pixel Size {x.upper()}"), 0.0, "1/nm")
            for x, axis in (("y", ky), ("x", kx))
        )  # fmt: skip
        metadata["info"] = settings
    source, about = (
        FlatFile(path, offset, dtype, shape),
        stated("Direct Electron", metadata.get("info", {})),
    )
    more = {"scan": scan, "hint": hint, "files": () if info is None else (info,)}
    return [stack(source, ky, kx, metadata=metadata, notes=notes, about=about, **more)]


def _scan(
    settings: dict[str, str], sizes: dict[str, str | None]
) -> tuple[tuple[Axis, Axis] | None, str]:
    """The scan of an info file, or why there is none; one of several repeats is not a scan."""
    in_region = settings.get("Scan - ROI Enable") == "Enable"
    path = settings.get("Scan - Type", "Raster")
    path = settings.get("Scan - ROI Type", path) if in_region else path
    if settings.get("Scan - Enable") != "Enable":
        return None, ""
    if path != "Raster":
        return None, f"its _info.txt states a scan of the type {one_line(path)}, not row by row"
    if any(settings.get(f"Scan - {k}", "1") != "1" for k in ("Repeats", "Points Per Camera Frame")):
        return None, ""
    part = "ROI Size" if in_region else "Size"
    steps = (sizes.get(f"Specimen Pixel Size {x} (nanometers)") for x in "YX")
    lengths = (settings.get(f"Scan - {part} {x}") for x in "YX")
    return scan_axes(*lengths, *steps, units="nm"), ""
