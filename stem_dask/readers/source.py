"""The data model of all readers: a lazy array (`Source`) with its axes and metadata (`Candidate`)."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import number, whole
from stem_dask.core.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS, Axis
from stem_dask.core.text import by
from stem_dask.storage.location import at, opened_file

#: larger text files of settings are refused
MOST_HEADER_BYTES = 4 << 20

Slices = tuple[slice, ...]


class Source(Protocol):
    """An array in a file: small, picklable, opened by name on the worker.

    ``source[slices]``, with slices of positive steps, reads a part and returns a C-contiguous array. A source may also have
    an attribute ``reading``, see `Reading`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, slowest first."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the elements, byte order of the file."""

    def __getitem__(self, part: Slices) -> NDArray:
        """Read a part."""


@dataclass(frozen=True)
class Reading:
    """What it takes to read a block of a source.

    Parameters
    ----------
    in_pieces : whether each pattern is contiguous in the file, so that a few are read as efficiently as many
    copies : how often a block is copied while it is read
    library_bytes : memory of the library that reads
    chunk_bytes : decoded size of a chunk, which is held together with its encoded bytes; 0 without chunks
    """

    in_pieces: bool = False
    copies: int = 0
    library_bytes: int = 0
    chunk_bytes: int = 0


def reading_of(source: Source) -> Reading:
    """What it takes to read a block of a source, as it states."""
    found: Reading = getattr(source, "reading", Reading())
    return found


@dataclass(frozen=True)
class Wrapped:
    """A source that reads from another one, pattern by pattern, of the same type unless it says otherwise."""

    source: Source

    @property
    def dtype(self) -> np.dtype:
        """Type of the source."""
        return self.source.dtype

    @property
    def reading(self) -> Reading:
        """As of the source, and a copy more."""
        inner = reading_of(self.source)
        return replace(inner, copies=inner.copies + 1)


def stored(source: Source) -> Source:
    """The array in the file, without its wrappers."""
    while isinstance(source, Wrapped):
        source = source.source
    return source


@dataclass(frozen=True)
class Candidate:
    """An array of a file that may hold the patterns.

    Parameters
    ----------
    name, number : select the array as ``input.dataset``
    source, axes, chunks : the array, its axes and chunks as stored
    swapped : whether the detector axes are the fastest, when the file states the order (Gatan's tag)
    metadata : all that the file states, as nested dictionaries
    scan : axes (scan_y, scan_x) of a stack (n, ky, kx), when the file states them
    notes : what the reader noticed
    files : further files that hold patterns or settings
    about : attributes of the patterns, see `stem_dask.readers.own.about`
    valid : False where a pattern is missing, shaped as patterns of one pixel
    hint : what the header says of a scan that remains ambiguous
    part : the larger acquisition that the array is a part of
    scan_part : (size as acquired, first, step) of scan_y and scan_x, when only a part of the scan was selected
    fault : why the array cannot be read; raised if it is chosen
    """

    name: str
    source: Source
    axes: tuple[Axis, ...]
    number: int | None = None
    chunks: tuple[int, ...] | None = None
    swapped: bool | None = None
    metadata: Mapping[str, Any] | None = None
    scan: tuple[Axis, Axis] | None = None
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    about: Mapping[str, Any] | None = None
    valid: Source | None = None
    hint: str = ""
    part: str = ""
    scan_part: tuple[tuple[int, int, int], ...] = ()
    fault: str = ""


def calibrated(name: str, size: int, scale: Any, offset: Any = 0.0, units: str = "") -> Axis:
    """An axis; in pixels when its scale is missing, zero or not finite."""
    step, start = number(scale), number(offset)
    if not step or not units:
        return Axis(name, size)
    return Axis(name, size, step, start or 0.0, units)


def stack(source: Source, ky: Axis, kx: Axis, name: str = "patterns", **more: Any) -> Candidate:
    """A stack of patterns (n, ky, kx); ``more`` are fields of `Candidate`."""
    ky, kx = (replace(axis, name=dim) for axis, dim in zip((ky, kx), DETECTOR_DIMS, strict=True))
    return Candidate(name, source, (Axis(LIST_DIMS[0], source.shape[0]), ky, kx), **more)


def scan_axes(height: Any, width: Any, *steps: Any, units: str = "") -> tuple[Axis, Axis] | None:
    """The axes of a scan, calibrated by ``steps`` (of y, of x) where they are usable; None without sizes."""
    n_y, n_x = whole(height), whole(width)
    if n_y is None or n_x is None:
        return None
    step_y, step_x = steps or (None, None)
    y, x = SCAN_DIMS
    return (calibrated(y, n_y, step_y, 0.0, units), calibrated(x, n_x, step_x, 0.0, units))


def header_of(path: str, n_bytes: int, what: str) -> bytes:
    """The first ``n_bytes`` of a file, which must not be shorter."""
    with opened_file(path) as file:
        header: bytes = file.read(n_bytes)
    if len(header) < n_bytes:
        raise SourceError(
            f"{path}: {len(header):,} bytes are fewer than the header of {what} has ({n_bytes:,}); the file was cut"
        )
    return header


def record_of(path: str, layout: np.dtype, what: str) -> dict[str, Any]:
    """The fields of the header at the beginning of a file, as Python numbers."""
    record = np.frombuffer(header_of(path, layout.itemsize, what), layout)[0]
    return dict(zip(layout.names or (), record.item(), strict=True))


def bytes_behind(
    path: str,
    what: str,
    shape: Sequence[int],
    dtype: np.dtype,
    rest: int,
    remedy: str,
    offset: int = 0,
) -> tuple[str, ...]:
    """A note on ``rest`` bytes that follow the numbers of a file, which begin at byte ``offset``.

    Raises
    ------
    SourceError
        When they are at least as many as a row, column or pattern has, or the same number for each pattern: then a size
        is too small, or patterns have headers, and patterns would be shifted against each other.
    """
    if rest <= 0:
        return ()
    n_bytes = math.prod(shape) * dtype.itemsize
    n = math.prod(shape[:-2])
    wrong = f"{path}: {by(shape)} {dtype} are {n_bytes:,} bytes, but {n_bytes + rest:,} are there: a size or the type is wrong"
    if n > 1 and rest % n == 0 and rest < n_bytes:
        with_frames = as_raw(path, (n, *shape[-2:]), dtype, offset, more=rest // n)
        raise SourceError(
            f"{wrong}, or each of {n:,} patterns has a header or footer of {rest // n:,} bytes: {with_frames}; {remedy}"
        )
    if n_bytes and rest >= n_bytes // max(shape, default=1):
        raise SourceError(f"{wrong}; {remedy}")
    return (f"{rest:,} bytes after the {what} are not read",)


def as_raw(
    path: str, shape: Sequence[int], dtype: np.dtype, offset: int, header: int = 0, more: int = 0
) -> str:
    """The commands that read a file of another format as plain numbers [n, ky, kx], through a link.

    ``header`` bytes precede each pattern; ``more`` bytes are either before or after it.

    Examples
    --------
    >>> as_raw("/raw/a.mrc", (34, 16, 16), np.dtype("u2"), 1024)
    'ln -s /raw/a.mrc a.raw, then open a.raw with input.shape=[34,16,16] input.dtype=uint16 input.offset=1024'
    """
    link = shlex.quote(f"{Path(path).stem}.raw")
    kind = dtype.name if dtype.isnative else f"'{dtype.str}'"
    sizes = ",".join(map(str, shape))
    keys = f"input.shape=[{sizes}] input.dtype={kind} input.offset={offset}"
    if more:
        before = f" input.frame_header={header}" if header else ""
        keys += f" input.frame_header={header + more}, or{before} input.frame_footer={more}"
    elif header:
        keys += f" input.frame_header={header}"
    return f"ln -s {shlex.quote(path)} {link}, then open {link} with {keys}"


def side_text(path: str) -> str:
    """A small text file of settings that belongs to the data; must exist."""
    try:
        size = at(path).stat().st_size
    except FileNotFoundError as error:
        raise SourceError(f"{path}: there is no such file; copy it with the data") from error
    if size > MOST_HEADER_BYTES:
        raise SourceError(f"{path}: {size:,} bytes are too many for a text of settings")
    text: str = at(path).read_bytes().decode("utf-8-sig", "replace")
    return text


def identity(path: str, *more: str) -> tuple[str, int, int]:
    """Name, size and modification time in ns of a file, or of the root document of a store.

    With ``more`` files size and time are sums, which change when one of the files does.
    """
    file = at(path)
    if file.is_dir():
        roots = [file / name for name in ("zarr.json", ".zgroup", ".zarray", ".zmetadata")]
        file = next((root for root in roots if root.exists()), file)
    stats = [file.stat(), *(at(one).stat() for one in more)]
    return (str(path), sum(s.st_size for s in stats), sum(s.st_mtime_ns for s in stats))


def packed(path: str, name: str, attrs: Mapping[str, Any]) -> str:
    """Why packed numbers (netCDF's ``scale_factor`` and ``add_offset``) are refused; empty when they are not packed."""
    scale, offset = number(attrs.get("scale_factor")), number(attrs.get("add_offset"))
    scale, offset = 1.0 if scale is None else scale, offset or 0.0
    if (scale, offset) == (1.0, 0.0):
        return ""
    return (
        f"{path}: the numbers of {name} are packed, value = {scale:g} * number + {offset:g} (attributes scale_factor and add_offset); "
        "save the values (with xarray: dataset.drop_encoding().to_zarr(PATH)), or take the attributes away where the numbers themselves are meant"
    )
