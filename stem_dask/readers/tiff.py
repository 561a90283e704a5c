"""Stacks of patterns in TIFF and BigTIFF files, opened by tifffile.

Uncompressed pages at regular offsets are read as a `FramedFile`; all others are decoded page by page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.readers.flat import FramedFile, Run
from stem_dask.readers.source import Candidate, Slices, Source, scan_axes, stack_axes
from stem_dask.storage.errors import COPY, translate

if TYPE_CHECKING:
    import tifffile

#: with more runs than this, seeking each page is as fast as remembering where it lies
_MOST_RUNS = 1024


@dataclass(frozen=True)
class TiffPages:
    """A stack (n, ky, kx) of pages that tifffile decodes.

    Parameters
    ----------
    path : name of the file
    dtype : of the decoded pixels
    frame_shape : (ky, kx)
    count : number of patterns
    planes : patterns per page
    """

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
    def chunk_bytes(self) -> int:
        """Bytes of a decoded page."""
        return self.planes * prod(self.frame_shape) * self.dtype.itemsize

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
    """The pages of a TIFF file as a stack of patterns.

    Raises
    ------
    SourceError
        When the file is cut or damaged, holds colors, or its pages differ in size.
    """
    import tifffile

    with open(path, "rb") as stream, translate(SourceError, path, "not a readable TIFF file"):
        file = tifffile.TiffFile(stream)
        first = file.pages.first
        shaped = next(iter(file.shaped_metadata or ()), {}).get("shape", ())
        text = first.description
        planes = _planes(path, first, shaped)
        shape = (first.imagelength, first.imagewidth)
        count, runs = _walk(path, file, planes)
        stated, scan = _stated(text, shaped)
        dtype = np.dtype(first.dtype)
        if count == 1 and runs and stated > 1:  # one directory, the pages follow it
            runs = [Run(path, runs[0].offset, runs[0].stride, stated)]
            count, need = stated, runs[0].offset + stated * runs[0].stride
            if need > file.filehandle.size:
                raise SourceError(
                    f"{path}: {stated:,} pages need {need:,} bytes, the file has "
                    f"{file.filehandle.size:,}; {COPY}"
                )
        source: Source
        if runs is not None:
            source = FramedFile(tuple(runs), dtype.newbyteorder(file.byteorder), shape)
        else:
            source = TiffPages(path, dtype, shape, count, planes)
        metadata = {
            "description": text,
            "pages": count,
            "compression": tifffile.COMPRESSION(first.compression).name,
        }
    axes = stack_axes(count, Axis("ky", shape[0]), Axis("kx", shape[1]))
    scan = scan if count == stated else None
    return [Candidate("pages", source, axes, metadata=metadata, scan=scan, hint=_hint(text))]


def _planes(path: str, page: Any, shaped: tuple[int, ...]) -> int:
    """Patterns per page: tifffile writes the 3 or 4 patterns of a scan line as the color planes of one page."""
    import tifffile

    n = page.samplesperpixel
    if page.imagedepth != 1 or (n > 1 and (page.planarconfig != 2 or tuple(shaped)[-3:-2] != (n,))):
        what = f"{n} values per pixel" if n > 1 else f"volumes of {page.imagedepth} slices"
        raise SourceError(
            f"{path}: the pages hold {what}; expected one gray value per pixel: save them as gray "
            "pages, or convert the stack to .npy or .zarr"
        )
    if page.compression != 1 and page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise SourceError(
            f"{path}: the pages are compressed by an unknown method (compression {page.compression}); "
            "save them without compression, or convert the stack to .npy or .zarr"
        )
    if page.dtype is None or page.dtype.kind not in "buif":
        raise SourceError(
            f"{path}: the pixels are {page.bitspersample} bits of sample format {page.sampleformat}; "
            "expected real numbers"
        )
    return int(n)


def _walk(path: str, file: tifffile.TiffFile, planes: int) -> tuple[int, list[Run] | None]:
    """Number of patterns, and where they lie; None when their pixels have to be decoded."""
    first, count = file.pages.first, 0
    runs: list[Run] | None = []
    n_bytes = first.imagelength * first.imagewidth * np.dtype(first.dtype).itemsize
    for page in file.pages:
        if (page.shape, page.dtype) != (first.shape, first.dtype):
            raise SourceError(
                f"{path}: page {count // planes + 1:,} is {page.shape} {page.dtype}, the first "
                f"{first.shape} {first.dtype}; expected patterns of one size"
            )
        ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
        if max(ends, default=0) > file.filehandle.size or 0 in page.dataoffsets:
            raise SourceError(
                f"{path}: the pixels of page {count // planes + 1:,} end beyond the {file.filehandle.size:,} "
                f"bytes of the file; {COPY}"
            )
        for i in range(planes):
            if runs is not None:
                plain = page.is_contiguous and len(runs) <= _MOST_RUNS
                runs = (
                    _joined(runs, path, page.dataoffsets[0] + i * n_bytes, n_bytes)
                    if plain
                    else None
                )
        count += planes
    return count, runs


def _joined(runs: list[Run], path: str, offset: int, n_bytes: int) -> list[Run]:
    """The pattern continues the last run, or begins another."""
    if runs:
        run = runs[-1]
        step = offset - run.offset if run.count == 1 else run.stride
        if step > 0 and offset == run.offset + run.count * step:
            return [*runs[:-1], Run(path, run.offset, step, run.count + 1)]
    return [*runs, Run(path, offset, n_bytes, 1)]


def _stated(text: str, shaped: tuple[int, ...]) -> tuple[int, tuple[Axis, Axis] | None]:
    """Number of patterns and the scan that the writer of the file describes.

    Examples
    --------
    >>> _stated("ImageJ=1.5\\nimages=12\\n", ())
    (12, None)
    >>> pages, scan = _stated("", (3, 4, 64, 64))
    >>> pages, [axis.size for axis in scan]
    (12, [3, 4])
    """
    found = re.search(r"^images=(\d{1,12})$", text, re.MULTILINE)
    if found and text.startswith("ImageJ="):
        return int(found[1]), None
    lead = shaped[:-2] if len(shaped) in (3, 4) else ()
    return prod(lead), scan_axes(*lead) if len(lead) == 2 else None


def _hint(text: str) -> str:
    """The axes of a stack as ImageJ or OME name them; they do not say which is the scan.

    Examples
    --------
    >>> _hint("ImageJ=1.5\\nimages=12\\nslices=4\\nframes=3\\n")
    'by ImageJ frames 3, slices 4'
    >>> _hint('<OME><Pixels SizeZ="4" SizeC="1" SizeT="3"/></OME>')
    'by OME SizeT 3, SizeZ 4'
    """
    if text.startswith("ImageJ="):
        writer = "ImageJ"
        sizes = re.findall(r"^(frames|slices|channels)=(\d{1,9})$", text, re.MULTILINE)
    elif "<OME" in text:
        writer, sizes = "OME", re.findall(r"\b(Size[TZC])=\"(\d{1,9})\"", text)
    else:
        return ""
    slowest = ("frames", "slices", "channels", "SizeT", "SizeZ", "SizeC")
    named_sizes = [(name, n) for name, n in dict(sizes).items() if n != "1"]
    named_sizes.sort(key=lambda pair: slowest.index(pair[0]))
    listed = ", ".join(f"{name} {n}" for name, n in named_sizes)
    return f"by {writer} {listed}" if listed else ""
