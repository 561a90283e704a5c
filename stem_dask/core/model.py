"""Small frozen dataclasses that all folders share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from stem_dask.core.text import by

Align = Literal["fixed", "descan", "pattern"]

Device = Literal["cpu", "gpu"]

SCAN_DIMS = ("scan_y", "scan_x")

LIST_DIMS = ("pattern",)

DETECTOR_DIMS = ("ky", "kx")

#: units of reciprocal length, in 1/nm
PER_NM = {"1/nm": 1.0, "nm^-1": 1.0, "nm-1": 1.0} | dict.fromkeys(
    ("1/Å", "1/A", "Å^-1", "A^-1", "1/Angstrom"), 10.0
)


@dataclass(frozen=True)
class Axis:
    """One calibrated axis: ``value = offset + scale * index``; pixel centers lie at integer indices."""

    name: str
    size: int
    scale: float = 1.0
    offset: float = 0.0
    units: str = ""

    @property
    def calibrated(self) -> bool:
        """Whether the axis has a unit other than pixels."""
        return self.units not in ("", "px", "pixel", "pixels")

    def value(self, index: float) -> float:
        """Position of a pixel index in this axis's units."""
        return self.offset + self.scale * index

    def part(self, start: int, size: int, step: int = 1) -> "Axis":
        """The axis of ``size`` elements ``start, start + step, …`` of this one."""
        return replace(
            self, size=size, scale=self.scale * step, offset=self.offset + self.scale * start
        )


@dataclass(frozen=True)
class Window:
    """The window (height, width) that is cut from every pattern, in source pixels.

    ``origin`` is the first row and column of a ``fixed`` window; with any other ``align``, of the window at the median center, which
    patterns without a center get. Axes that are not in ``cropped_axes`` are kept whole, and start at 0.
    """

    shape: tuple[int, int]
    align: Align
    origin: tuple[int, int]
    cropped_axes: tuple[str, ...]
    global_radius: int | None
    coverage: float
    target_retention: float
    radius_at: dict[str, int] = field(default_factory=dict)
    setters: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Size, alignment and place in one line.

        Examples
        --------
        >>> Window((64, 60), "fixed", (96, 98), ("ky", "kx"), 29, 0.999, 0.98)
        <Window 64 x 60 px, align fixed, origin (96, 98), radius 29>
        """
        words = [f"{by(self.shape)} px", f"align {self.align}", f"origin {self.origin}"]
        if not self.cropped_axes:
            words.append("not cropped")
        elif self.global_radius is not None:
            words.append(f"radius {self.global_radius}")
        return f"<{type(self).__name__} {', '.join(words)}>"

    @property
    def aligned_axes(self) -> tuple[str, ...]:
        """Axes along which the centers of all patterns coincide in the output."""
        return () if self.align == "fixed" else self.cropped_axes


@dataclass(frozen=True)
class SourceInfo:
    """What a reader found in the header of a file.

    ``axes`` has one `Axis` per dimension, slowest first; ``stored_shape`` is the shape in the file, before selection.
    ``scan_part`` has (size as acquired, first, step) of scan_y and scan_x, when only a part of the scan was selected;
    ``notes`` are remarks for the user; ``metadata`` is the metadata of the file as nested dictionaries; ``given`` holds values
    that the user set instead; ``about`` are attributes for the patterns (beam energy, title, and more in files of stem_dask).
    """

    path: str
    kind: str
    axes: tuple[Axis, ...]
    dtype: str
    stored_shape: tuple[int, ...] = ()
    chunks: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    scan_part: tuple[tuple[int, int, int], ...] = ()

    @property
    def title(self) -> str:
        """Title in the file, or else the name of the file."""
        return str(self.about.get("title") or Path(self.path).stem)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(axis.size for axis in self.axes)


#: where a block lies along the leading (scan) axes
Region = tuple[slice, ...]


@dataclass(frozen=True)
class Record:
    """What a task reports about the block it wrote; ``extra`` belongs to the sink."""

    index: int
    seconds: float
    bytes_out: int
    peak_rss: int
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One finished block of a stage, for progress reports.

    ``input_bytes`` is the size of what the stage reads, 0 if unknown. The stage is the ``number``-th of ``n_stages``; those after it
    are expected to take ``later`` times as long as this one, None if this one tells nothing about them.
    """

    stage: str
    done: int
    total: int
    input_bytes: int
    record: Record
    number: int = 1
    n_stages: int = 1
    later: float | None = 0.0


Progress = Callable[[Step], None]

#: resident memory without a block of a worker (217 MB were measured), and of a client whose threads do the work (299 MB)
WORKER_BYTES, PROCESS_BYTES = 225 * 10**6, 320 * 10**6

#: share of its memory limit that a worker may be expected to use
USABLE_SHARE = 0.95


@dataclass(frozen=True)
class Worker:
    """Memory of a worker: bytes that it may use (None if unknown), tasks at the same time, and bytes in use without a block."""

    limit: int | None
    threads: int
    loaded: int = WORKER_BYTES

    @property
    def room(self) -> int | None:
        """Bytes for the block of each thread."""
        if self.limit is None:
            return None
        return (int(self.limit * USABLE_SHARE) - self.loaded) // self.threads

    def __str__(self) -> str:
        plural = "s" * (self.threads != 1)
        has = "no known limit" if self.limit is None else f"{self.limit / 1e6:.0f} MB"
        return f"{has} for {self.threads} thread{plural}"
