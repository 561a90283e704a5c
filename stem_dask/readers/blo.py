"""NanoMEGAS block files (.blo): square patterns of bytes, each behind the mark AA 55 and its number."""

import struct

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.instrument import stated
from stem_dask.readers.flat import FramedFile, Run, framed, refuse_sheared
from stem_dask.readers.source import Candidate, calibrated, header_of, scan_axes, stack_axes
from stem_dask.storage.s3 import opened_file

_HEADER = struct.Struct("<6sH3I5H2dI2Hd")

_NAMES = ("id", "magic", "offset of the image", "offset of the patterns", "flags", "size of a pattern",
          "rotation of a pattern", "scan x", "scan y", "scan rotation", "step x (nm)", "step y (nm)",
          "beam energy (V)", "pixels per cm x 100", "camera length", "time")  # fmt: skip

_LEAD = 6  # bytes before each pattern

_MARK = b"\xaa\x55"  # the first two of them


def list_blo(path: str) -> list[Candidate]:
    """The patterns of a .blo file, uint8, folded into the scan that its header states.

    Raises
    ------
    SourceError
        When the header is of another format, contradicts itself or the length of the file.
    """
    raw = header_of(path, _HEADER.size, "a block file")
    said = dict(zip(_NAMES, _HEADER.unpack(raw), strict=True))
    if said["magic"] != 0x0102 or raw[:3] != b"IMG":
        raise SourceError(
            f"{path}: not a NanoMEGAS block file: it begins with {raw[:6]!r} and the mark {said['magic']:#06x}, where "
            "IMGBLO and 0x0102 were expected"
        )
    size, start = said["size of a pattern"], said["offset of the patterns"]
    u1 = np.dtype("u1")
    source, notes = framed(path, start, size * size + _LEAD, u1, (size, size), lead=_LEAD)
    with opened_file(path) as file:
        file.seek(start)
        mark = file.read(2)
    if mark != _MARK:
        raise SourceError(
            f"{path}: no pattern begins at byte {start:,}, where the header says the first one does (bytes "
            f"{mark.hex(' ')}, expected aa 55); the file is damaged"
        )
    scan = scan_axes(
        said["scan y"], said["scan x"], said["step y (nm)"], said["step x (nm)"], units="nm"
    )
    if scan is not None and (n := scan[0].size * scan[1].size) < source.shape[0]:
        with opened_file(path) as file:
            file.seek(start + n * (size * size + _LEAD))
            after = file.read(2)
        if (
            after != _MARK
        ):  # else there are more patterns than the scan has, which is told when it is folded
            source = _first(source, n)
            notes = (f"bytes after the {n:,} patterns of the scan are not read",)
    refuse_sheared(source, _LEAD, _MARK)
    density = said["pixels per cm x 100"]
    step = 100 / density if density else None
    ky, kx = (calibrated(name, size, step, 0.0, "cm") for name in ("ky", "kx"))
    axes = stack_axes(source.shape[0], ky, kx)
    about = stated("NanoMEGAS block file", said)
    return [Candidate("patterns", source, axes, metadata=said, scan=scan, notes=notes, about=about)]


def _first(source: FramedFile, n: int) -> FramedFile:
    run = source.runs[0]
    return FramedFile((Run(run.path, run.offset, run.stride, n),), source.dtype, source.frame_shape)
