"""Stacks of patterns in TIFF and BigTIFF files: one gray value a pixel, plain or in codecs without loss.

Plain pages that lie in a row are read where they are; others through `stem_dask.io.tiff_packed`.
"""

import re
from dataclasses import dataclass, field
from math import prod

from stem_dask.errors import SourceError
from stem_dask.io.candidate import Candidate, scan_axes, stack_axes
from stem_dask.io.frames import FramedFile, Run
from stem_dask.io.sources import Source
from stem_dask.io.tiff_directory import READ, Directories, Page, stated_shape
from stem_dask.io.tiff_packed import PackedPages
from stem_dask.model import Axis

_MOST_RUNS, _MOST_KNOWN = 1024, 1024


@dataclass
class _Places:
    """Where pages are, in bounded memory: runs of plain ones, and every n-th directory."""

    path: str
    known: list[int] = field(default_factory=list)
    step: int = 1
    count: int = 0
    largest: int = 0  # bytes of a part
    #: None when pages do not lie there in runs
    runs: list[Run] | None = field(default_factory=list)

    def add(self, at: int, page: Page) -> None:
        """One page more."""
        if self.count % self.step == 0:
            self.known.append(at)
        if len(self.known) > _MOST_KNOWN:
            self.known, self.step = self.known[::2], self.step * 2
        self.count += 1
        self.largest = max(self.largest, prod(page.part) * page.dtype.itemsize)
        for i in range(page.planes):
            if self.runs is not None:
                self.runs = self._joined(self.runs, page.plane(i))

    def _joined(self, runs: list[Run], page: Page) -> list[Run] | None:
        """The page continues the last run, or begins another."""
        if not page.is_plain:
            return None
        offset = int(page.offsets[0])
        if runs:
            run = runs[-1]
            step = offset - run.offset if run.count == 1 else run.stride
            if step > 0 and offset == run.offset + run.count * step:
                runs[-1] = Run(self.path, run.offset, step, run.count + 1)
                return runs
        n_bytes = prod(page.shape) * page.dtype.itemsize
        runs.append(Run(self.path, offset, n_bytes, 1))
        return runs if len(runs) <= _MOST_RUNS else None


def list_tiff(path: str) -> list[Candidate]:
    """The pages of a TIFF file as a stack of patterns.

    Raises
    ------
    SourceError
        When the file is cut or damaged, in colours, compressed in a way that is not read, or its pages differ.
    """
    with open(path, "rb") as stream:
        directories = Directories(path, stream)
        first, places = _walk(directories)
        planes = directories.planes
    count, scan = _stated(first.description)
    n_bytes = prod(first.shape) * first.dtype.itemsize
    runs = places.runs
    if places.count == 1 and runs is not None and count > 1:
        start = int(first.offsets[0])
        need = start + count * n_bytes
        if need > directories.size:
            directories.fail(
                f"{count:,} pages need {need:,} bytes, the file has {directories.size:,}"
            )
        runs = [Run(path, start, n_bytes, count)]
    source: Source
    if runs is not None:
        source = FramedFile(tuple(runs), first.dtype, first.shape)
    else:
        known, largest = tuple(places.known), places.largest + n_bytes
        source = PackedPages(path, first.dtype, first.shape, places.count * planes, known, places.step, largest, planes)  # fmt: skip
    n = source.shape[0]
    said = {
        "description": first.description,
        "pages": n,
        "compression": READ[first.compression],
    }
    axes = stack_axes(n, Axis("ky", first.shape[0]), Axis("kx", first.shape[1]))
    return [
        Candidate(
            "pages",
            source,
            axes,
            metadata=said,
            scan=scan if count == n else None,
            hint=_hint(first.description),
        )
    ]


def _walk(directories: Directories) -> tuple[Page, _Places]:
    """The first page, and the places of all."""
    places, anchor = _Places(directories.path), -1
    first, at = None, directories.first
    while at:
        entries, following = directories.read(at)
        page = directories.page(entries)
        first = first or page.plane(0)
        if (page.shape, page.dtype) != (first.shape, first.dtype):
            raise SourceError(
                f"{directories.path}: page {places.count + 1:,} is {page.shape} {page.dtype}, the first {first.shape} "
                f"{first.dtype}; patterns of one size were expected"
            )
        places.add(at, page)
        # directories may lie in any order; the chain of a ring comes back to one of those at 1, 2, 4, 8 …
        if following in (at, anchor):
            directories.fail("the pages form a ring")
        if places.count & (places.count - 1) == 0:
            anchor = at
        at = following
    if first is None:
        directories.fail("it has no page")
    return first, places


def _stated(description: str) -> tuple[int, tuple[Axis, Axis] | None]:
    """Pages and scan that a writer describes: ImageJ and tifffile may write one directory, the pages follow it.

    Examples
    --------
    >>> _stated("ImageJ=1.5\\nimages=12\\n")
    (12, None)
    >>> pages, scan = _stated('{"shape": [3, 4, 64, 64]}')
    >>> pages, [axis.size for axis in scan]
    (12, [3, 4])
    """
    found = re.search(r"^images=(\d{1,12})$", description, re.MULTILINE)
    if found and description.startswith("ImageJ="):
        return int(found[1]), None
    shape = stated_shape(description)
    if len(shape) not in (3, 4):
        return 1, None
    lead = shape[:-2]
    return prod(lead), scan_axes(*lead) if len(lead) == 2 else None


def _hint(description: str) -> str:
    """The axes of a stack that ImageJ and OME write, in their own words: which of them the scan is they cannot say.

    Examples
    --------
    >>> _hint("ImageJ=1.5\\nimages=12\\nslices=4\\nframes=3\\n")
    'by ImageJ frames 3, slices 4'
    >>> _hint('<OME><Pixels SizeZ="4" SizeC="1" SizeT="3"/></OME>')
    'by OME SizeT 3, SizeZ 4'
    """
    if description.startswith("ImageJ="):
        writer, sizes = (
            "ImageJ",
            re.findall(r"^(frames|slices|channels)=(\d{1,9})$", description, re.MULTILINE),
        )
    elif "<OME" in description:
        writer, sizes = "OME", re.findall(r"\b(Size[TZC])=\"(\d{1,9})\"", description)
    else:
        return ""
    slowest = ("frames", "slices", "channels", "SizeT", "SizeZ", "SizeC")
    said = [(name, n) for name, n in dict(sizes).items() if n != "1"]
    said.sort(key=lambda pair: slowest.index(pair[0]))
    return f"by {writer} " + ", ".join(f"{name} {n}" for name, n in said) if said else ""
