"""NanoMEGAS block files (.blo): square patterns of bytes, each after the mark AA 55 and its number."""

from dataclasses import replace

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import stated
from stem_dask.readers.flat import framed, refuse_sheared
from stem_dask.readers.source import Candidate, calibrated, record_of, scan_axes, stack
from stem_dask.storage.location import opened_file

_HEADER = np.dtype([
    ("id", "S6"), ("magic", "<u2"), ("offset of the image", "<u4"), ("offset of the patterns", "<u4"), ("flags", "<u4"),
    ("size of a pattern", "<u2"), ("rotation of a pattern", "<u2"), ("scan x", "<u2"), ("scan y", "<u2"),
    ("scan rotation", "<u2"), ("step x (nm)", "<f8"), ("step y (nm)", "<f8"), ("beam energy (V)", "<u4"),
    ("pixels per cm x 100", "<u2"), ("camera length", "<u2"), ("time", "<f8"),
])  # fmt: skip

_LEAD, _MARK = 6, b"\xaa\x55"  # bytes before each pattern, and the first two of them


def list_blo(path: str) -> list[Candidate]:
    """The patterns of a .blo file, uint8, folded into the scan that its header states."""
    header = record_of(path, _HEADER, "a block file")
    if header["magic"] != 0x0102 or header["id"][:3] != b"IMG":
        raise SourceError(
            f"{path}: not a NanoMEGAS block file: it begins with {header['id']!r} and the mark {header['magic']:#06x}, where "
            "IMGBLO and 0x0102 were expected"
        )
    size, start = header["size of a pattern"], header["offset of the patterns"]
    source, notes = framed(path, start, size**2 + _LEAD, np.dtype("u1"), (size, size), lead=_LEAD)
    scan = scan_axes(
        header["scan y"], header["scan x"], header["step y (nm)"], header["step x (nm)"], units="nm"
    )
    n = scan[0].size * scan[1].size if scan is not None else source.shape[0]
    with opened_file(path) as file:
        file.seek(start)
        mark = file.read(2)
        file.seek(start + n * (size**2 + _LEAD))
        after = file.read(2)
    if mark != _MARK:
        raise SourceError(
            f"{path}: no pattern begins at byte {start:,}, where the header says the first one does (bytes "
            f"{mark.hex(' ')}, expected aa 55); the file is damaged"
        )
    if n < source.shape[0] and after != _MARK:  # folding refuses more patterns than the scan has
        source = replace(source, runs=(replace(source.runs[0], count=n),))
        notes = (f"bytes after the {n:,} patterns of the scan are not read",)
    refuse_sheared(source, _LEAD, _MARK)
    density = header["pixels per cm x 100"]
    step = 100 / density if density else None
    ky, kx = (calibrated(name, size, step, 0.0, "cm") for name in ("ky", "kx"))
    about = stated("NanoMEGAS block file", header)
    return [stack(source, ky, kx, metadata=header, scan=scan, notes=notes, about=about)]
