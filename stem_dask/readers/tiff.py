"""Stacks of patterns in TIFF and BigTIFF files, opened by tifffile.

Uncompressed pages at regular offsets are read as a `FramedFile`; all others are decoded page by page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.readers.flat import FramedFile, Run
from stem_dask.readers.source import Candidate, Reading, Slices, Source, scan_axes, stack
from stem_dask.storage.errors import COPY, translate

if TYPE_CHECKING:
    import tifffile

#: with more runs than this, seeking each page is as fast as remembering where it lies
_MOST_RUNS = 1024


@dataclass(frozen=True)
class TiffPages:
    """A stack (n, ky, kx) of pages that tifffile decodes, ``planes`` patterns each."""

    path: str
    dtype: np.dtype
    frame_shape: tuple[int, int]
    count: int
    planes: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ky, kx)."""
        return (self.count, *self.frame_shape)

    @property
    def reading(self) -> Reading:
        """Memory of a decoded page."""
        return Reading(chunk_bytes=self.planes * prod(self.frame_shape) * self.dtype.itemsize)

    def __getitem__(self, part: Slices) -> NDArray:
        import tifffile

        frames = range(*part[0].indices(self.count))
        shape = (len(range(*s.indices(n))) for s, n in zip(part, self.shape, strict=True))
        out = np.empty(tuple(shape), self.dtype)
        with translate(SourceError, self.path), open(self.path, "rb") as stream:
            last, pixels = -1, np.empty(0)
            with translate(SourceError, self.path, "it has changed or is damaged"):
                pages = tifffile.TiffFile(stream).pages
            for target, frame in zip(out, frames, strict=True):
                number, plane = divmod(frame, self.planes)
                if number != last:
                    pixels, last = self._decoded(pages, number), number
                target[...] = pixels[plane][part[1:]]
        return out

    def _decoded(self, pages: tifffile.TiffPages, number: int) -> NDArray:
        """The patterns (planes, ky, kx) of a page."""
        with translate(SourceError, self.path, f"page {number + 1:,} cannot be decoded"):
            pixels = pages[number].asarray(maxworkers=1)
        wanted = (self.planes, *self.frame_shape)
        if pixels.size != prod(wanted) or pixels.dtype != self.dtype:
            raise SourceError(
                f"{self.path}: page {number + 1:,} is {pixels.shape} {pixels.dtype}; expected "
                f"{self.frame_shape} {self.dtype}; the file has changed since it was opened"
            )
        return pixels.reshape(wanted)


def list_tiff(path: str) -> list[Candidate]:
    """The pages of a TIFF file as a stack of patterns."""
    import tifffile

    with open(path, "rb") as stream, translate(SourceError, path, "not a readable TIFF file"):
        file = tifffile.TiffFile(stream)
        first, size = file.pages.first, file.filehandle.size
        text, dtype = first.description, np.dtype(first.dtype or "V1")
        stated = tuple(next(iter(file.shaped_metadata or ()), {}).get("shape", ()))
        # tifffile writes the 3 or 4 patterns of a scan line as the color planes of one page
        planes = int(first.samplesperpixel)
        fault = ""
        if planes > 1 and (first.planarconfig != 2 or stated[-3:-2] != (planes,)):
            fault = f"{planes} values per pixel"
        elif first.imagedepth != 1:
            fault = f"volumes of {first.imagedepth} slices"
        elif first.compression != 1 and first.compression not in tifffile.TIFF.DECOMPRESSORS:
            fault = f"pixels compressed by an unknown method (compression {first.compression})"
        elif dtype.kind not in "buif":
            fault = f"pixels of {first.bitspersample} bits of sample format {first.sampleformat}"
        if fault:
            raise SourceError(
                f"{path}: the pages hold {fault}; expected one gray value per pixel, a real number: save them as gray pages "
                "without compression, or convert the stack to .npy or .zarr"
            )
        shape, count = (first.imagelength, first.imagewidth), 0
        n_bytes = prod(shape) * dtype.itemsize
        # where the patterns lie; None when their pixels have to be decoded
        runs: list[Run] | None = []
        for page in file.pages:
            ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
            wrong = ""
            if (page.shape, page.dtype) != (first.shape, dtype):
                wrong = f"is {page.shape} {page.dtype}, the first {first.shape} {dtype}; expected patterns of one size"
            elif max(ends, default=0) > size or 0 in page.dataoffsets:
                wrong = f"ends beyond the {size:,} bytes of the file; {COPY}"
            if wrong:
                raise SourceError(f"{path}: page {count // planes + 1:,} {wrong}")
            if runs is not None and page.is_contiguous and len(runs) <= _MOST_RUNS:
                for i in range(planes):
                    _append(runs, path, page.dataoffsets[0] + i * n_bytes, n_bytes)
            else:
                runs = None
            count += planes
        scan = scan_axes(*stated[:2]) if len(stated) == 4 else None
        n = prod(stated[:-2]) if len(stated) in (3, 4) else 1
        images = re.search(r"^images=(\d{1,12})$", text, re.MULTILINE)
        if images and text.startswith("ImageJ="):
            n, scan = int(images[1]), None
        if count == 1 and runs and n > 1:  # one directory, the pages follow it
            runs, count = [replace(runs[0], count=n)], n
            if (need := runs[0].offset + n * n_bytes) > size:
                raise SourceError(
                    f"{path}: {n:,} pages need {need:,} bytes, the file has {size:,}; {COPY}"
                )
        source: Source = TiffPages(path, dtype, shape, count, planes)
        if runs is not None:
            source = FramedFile(tuple(runs), dtype.newbyteorder(file.byteorder), shape)
        codec = tifffile.COMPRESSION(first.compression).name
        metadata = {"description": text, "pages": count, "compression": codec}
    scan, (ky, kx) = scan if count == n else None, map(Axis, ("ky", "kx"), shape)
    return [stack(source, ky, kx, "pages", metadata=metadata, scan=scan, hint=_hint(text))]


def _append(runs: list[Run], path: str, offset: int, n_bytes: int) -> None:
    """The pattern at ``offset`` continues the last run, or begins another."""
    if runs:
        run = runs[-1]
        step = offset - run.offset if run.count == 1 else run.stride
        if step > 0 and offset == run.offset + run.count * step:
            runs[-1] = replace(run, stride=step, count=run.count + 1)
            return
    runs.append(Run(path, offset, n_bytes, 1))


def _hint(text: str) -> str:
    """The axes of a stack as ImageJ or OME name them; they do not say which is the scan."""
    names, pattern, writer = ("SizeT", "SizeZ", "SizeC"), r'\b{}="(\d{{1,9}})"', "OME"
    if text.startswith("ImageJ="):
        names, pattern, writer = ("frames", "slices", "channels"), r"^{}=(\d{{1,9}})$", "ImageJ"
    elif "<OME" not in text:
        return ""
    sizes = ((name, re.search(pattern.format(name), text, re.MULTILINE)) for name in names)
    listed = ", ".join(f"{name} {n[1]}" for name, n in sizes if n and n[1] != "1")
    return f"by {writer} {listed}" if listed else ""
