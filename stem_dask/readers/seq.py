"""Sequences of StreamPix (Norpix .seq), which cameras of Direct Electron write: patterns, each followed by its time."""

from dataclasses import replace

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.readers.flat import framed
from stem_dask.readers.source import Candidate, record_of, stack

#: the beginning of the header: all numbers are little-endian
_HEADER = np.dtype([
    ("magic", "<u4"), ("name", "S24"), ("version", "<i4"), ("header bytes", "<i4"), ("description", "V512"), ("width", "<u4"),
    ("height", "<u4"), ("bits allocated", "<u4"), ("bits used", "<u4"), ("image bytes", "<u4"), ("format", "<u4"), ("frames", "<u4"),
    ("origin", "<u4"), ("stride", "<u4"), ("frames per second", "<f8"), ("other", "V24"), ("compression", "<u4"),
])  # fmt: skip

_MAGIC = 0xFEED

#: byte of the first pattern, before and from version 5
_FIRST = (1024, 8192)


def list_seq(path: str) -> list[Candidate]:
    """The stack of patterns of a .seq file, without calibration and scan.

    Dark and gain references, and the list of bad pixels, are files beside it: ``input.dark``, ``input.gain`` and ``input.mask``.
    """
    header = record_of(path, _HEADER, "a .seq file")
    if header["magic"] != _MAGIC:
        raise SourceError(f"{path}: not a .seq file of StreamPix; it begins with other bytes")
    bits, fault = header["bits allocated"], ""
    if header["compression"]:
        fault = f"compressed (method {header['compression']})"
    elif bits not in (8, 16) or header["format"] not in (100, 101, 0):
        fault = f"images of {bits} bits in format {header['format']}"
    if fault:
        raise SourceError(
            f"{path}: the file has {fault}; expected gray images of 8 or 16 bits without compression, as StreamPix exports them"
        )
    dtype, shape = np.dtype(f"<u{bits // 8}"), (header["height"], header["width"])
    first = _FIRST[header["version"] >= 5]
    source, notes = framed(path, first, header["stride"], dtype, shape, marked=False)
    [run], n = source.runs, header["frames"]
    if 0 < n < run.count:  # the file is longer, because its space was allocated before
        source = replace(source, runs=(replace(run, count=n),))
        notes = (
            f"the header states {n:,} patterns; {run.count - n:,} more would fit into the file",
        )
    known = {name: value for name, value in header.items() if not isinstance(value, bytes)}
    ky, kx = Axis("ky", shape[0]), Axis("kx", shape[1])
    return [stack(source, ky, kx, metadata=known, notes=notes)]
