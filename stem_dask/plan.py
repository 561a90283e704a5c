"""Integer decisions made before any pixel is read: chunks, shards, bytes of a task, and the window's size."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import ConfigError
from stem_dask.units import next_multiples

MIB = 2**20
DEFAULT_CHUNK_MB = 64
#: of a file with the detector slowest, whose pixels lie apart: the longer the run of each, the less the system has to look up
APART_CHUNK_MB = 128
#: what one task reads of a file with the detector slowest, at least and at most, if the memory allows
SLAB_BYTES = (64 * MIB, 256 * MIB)
#: and the size of the pieces that it is cut into, which tells how much: the more is read, the longer they are
PIECE_BYTES = MIB
#: above this many tasks the scheduler's share of the run becomes visible
MAX_TASKS = 4000
#: one random pattern must come back in milliseconds, so an inner chunk stays near this many bytes
INNER_CHUNK_BYTES = MIB
#: where each chunk is a file in folders of its own, a terabyte shall not become millions of them
FILE_CHUNK_BYTES = 8 * MIB
#: resident memory of a worker that has loaded what tasks need and holds no block: 181 MB were measured
WORKER_BYTES = 190 * 10**6
#: the same of one that is a copy of a process that has loaded it, with which it shares much: 105 to 119 MB were measured, and
#: 143 where it has loaded what an export reads with, too
COPY_BYTES = 145 * 10**6
#: and of the run's own process, where its threads do the work: 271 MB were measured
PROCESS_BYTES = 295 * 10**6
#: share of its memory limit that a worker may be expected to use
USABLE_SHARE = 0.95


def lead_chunks(
    lead_shape: Sequence[int],
    pattern_bytes: int,
    chunk_mb: float | str = "auto",
    most: int | None = None,
    source_chunk: Sequence[int] | None = None,
    auto_mb: int = DEFAULT_CHUNK_MB,
) -> tuple[int, ...]:
    """How many positions along each scan axis (or of a list) one block takes.

    Whole scan rows when they fit, else a part of one row. Extents that do not cover an axis are powers of two, or
    multiples of the source's own chunks (where the memory allows), so that no chunk is decoded twice.

    Parameters
    ----------
    lead_shape : (scan_y, scan_x) or (n,)
    pattern_bytes : bytes of one pattern in the source
    chunk_mb : MiB of input in a block; ``auto`` is 64, or ``auto_mb``, doubled until there are at most 4,000 tasks
    most : positions in a block that the memory allows, at least 1 (see `most_positions`); for ``auto``
    source_chunk : extents of the source's chunks on the same axes
    auto_mb : MiB that ``auto`` begins with

    Examples
    --------
    >>> lead_chunks((256, 256), 131072)
    (2, 256)
    >>> lead_chunks((1, 100_000), 131072)
    (1, 512)
    >>> lead_chunks((100, 100), 131072, source_chunk=(3, 50))
    (3, 100)
    """
    if chunk_mb == "auto":
        positions = _positions(prod(lead_shape), pattern_bytes, auto_mb, most)
    else:
        positions = max(1, int(float(chunk_mb) * MIB // pattern_bytes))
    room = 2**63 if most is None else most
    chunks: list[int] = []
    for i in range(len(lead_shape) - 1, -1, -1):  # fill the fastest axis first
        size, part = lead_shape[i], 1 if source_chunk is None else max(1, source_chunk[i])
        if positions >= size:
            take = size
        elif part > 1 and positions > 1 and part <= room:
            take = min(size, max(1, positions // part) * part)
        else:
            take = _power_of_two(positions)
        chunks.insert(0, take)
        positions = max(1, positions // take) if take == size else 1
        room //= take
    return tuple(chunks)


def _positions(n: int, pattern_bytes: int, auto_mb: int, most: int | None) -> int:
    """How many patterns a block holds where nobody said how much."""
    target: float = auto_mb * MIB
    while n * pattern_bytes / target > MAX_TASKS:
        target *= 2
    positions = int(target // pattern_bytes)
    return max(1, positions if most is None else min(positions, most))


def inner_chunk(
    lead_chunk: Sequence[int],
    lead_shape: Sequence[int],
    pattern_bytes: int,
    most_bytes: int = INNER_CHUNK_BYTES,
) -> tuple[int, ...]:
    """Positions in one inner chunk of the store: whole patterns, at most 1 MiB, or what ``most_bytes`` says.

    Where several blocks lie along an axis the inner chunk divides them, so that a shard is exactly a block. A block
    that covers its axis may be rounded up instead, and prime sizes do not end in chunks of one pattern.

    Examples
    --------
    >>> inner_chunk((2, 256), (256, 256), 2 * 60 * 60)
    (1, 128)
    >>> inner_chunk((6, 251), (100, 251), 2 * 20 * 20)
    (3, 251)
    """
    positions = max(1, most_bytes // max(1, pattern_bytes))
    chunks: list[int] = []
    for chunk, size in zip(reversed(lead_chunk), reversed(lead_shape), strict=True):
        if positions >= chunk:
            take = chunk
        elif chunk >= size:
            take = _power_of_two(positions)
        else:
            take = max(n for n in range(1, positions + 1) if chunk % n == 0)
        chunks.insert(0, take)
        positions = max(1, positions // take) if take == chunk else 1
    return tuple(chunks)


def shard_shape(lead_chunk: Sequence[int], inner: Sequence[int]) -> tuple[int, ...]:
    """A block's extents, rounded up to a multiple of the inner chunk.

    Examples
    --------
    >>> shard_shape((7, 11), (4, 11))
    (8, 11)
    """
    return tuple(
        math.ceil(size / part) * part for size, part in zip(lead_chunk, inner, strict=True)
    )


def task_bytes(lead_chunk: Sequence[int], *pattern_bytes: int) -> int:
    """Bytes that one task moves: its block of patterns at each of the given sizes."""
    return prod(lead_chunk) * sum(pattern_bytes)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a task of one stage holds at most: some in any case, and some for each position of its block."""

    fixed: int
    per_position: int

    def bytes(self, positions: int) -> int:
        """For a block of so many positions."""
        return self.fixed + positions * self.per_position


def footprints(
    source: int,
    out: int,
    *,
    copies: int,
    result: int,
    cropped: bool,
    exported: bool = True,
    packed: bool = True,
    waiting: int = 0,
    ahead: bool = False,
    in_pieces: bool = False,
    fixed: int = 0,
) -> dict[str, Footprint]:
    """What a task of each stage holds at its peak.

    Patterns pass a few at a time from the source to the file, so that windows, smaller patterns and their encoded chunks
    are never there for a whole block, but for what waits.

    Parameters
    ----------
    source, out : bytes of one pattern as read, and as stored
    copies : how often a block is copied while it is read: for another order of the axes
    result : bytes of what the analysis keeps of one pattern
    cropped : whether there is a pass that analyzes, before the one that writes
    exported : whether the store is read again: for other files, or to normalize it
    packed : whether one of these files is HDF5, whose blocks are compressed as a whole
    waiting : bytes of one pattern that are kept until its block is complete
    ahead : whether the pass that writes analyzes, too
    in_pieces : whether a few patterns are read at a time, so that no block is held as it was read
    fixed : bytes that a task needs beside its block, such as those of dark and gain, and of the pieces

    Examples
    --------
    >>> sizes = footprints(131072, 2048, copies=0, result=600, cropped=True, in_pieces=True, fixed=2**20)
    >>> sizes["crop"].bytes(512) / 2**20, sizes["analyze"].bytes(512) / 2**20
    (1.01953125, 3.29296875)
    """
    read = 0 if in_pieces else source * (1 + copies)
    sums = 16 * source  # of the widest type, and what becomes of them
    kept = 8 + waiting + result * ahead
    found = {"crop": Footprint(fixed + 8 * out + sums * ahead, read + kept)}
    if cropped:
        found["analyze"] = Footprint(fixed + sums, read + result)
    if exported:
        # of noise were measured: 3 for .pt, .npy and .zspy (a compressed shard, what is decoded of it, and the patterns), 4 for
        # HDF5 (the patterns, and what is packed of them, by itself and joined)
        found["export"] = Footprint(0, (4 if packed else 3) * out)
    return found


def turn_footprint(
    slab_pixels: int, scan: int, itemsize: int, gathered: int, read: int
) -> Footprint:
    """What a task holds that turns a slab: the slab, one piece of it, the rows that are gathered, what was read at once.

    Parameters
    ----------
    slab_pixels, scan : pixels of the detector in a slab, positions of the whole scan
    itemsize : bytes of a pixel
    gathered : pixels that are gathered before they are turned
    read : bytes that are read at once where only a part of each scan is wanted

    Examples
    --------
    >>> turn_footprint(1024, 256 * 256, 2, 128, 0).bytes(512) / 2**20
    129.125
    """
    return Footprint(slab_pixels * scan * itemsize + read, (slab_pixels + gathered) * itemsize)


@dataclass(frozen=True)
class Worker:
    """Memory of a worker.

    limit : bytes it may use; None when nobody says
    threads : tasks that it works on at the same time
    loaded : bytes it takes before it holds a block
    """

    limit: int | None
    threads: int
    loaded: int = WORKER_BYTES

    @property
    def room(self) -> int | None:
        """Bytes that each thread has for its block."""
        if self.limit is None:
            return None
        return (int(self.limit * USABLE_SHARE) - self.loaded) // self.threads

    def __str__(self) -> str:
        plural = "s" * (self.threads != 1)
        has = "no known limit" if self.limit is None else f"{self.limit / 1e6:.0f} MB"
        return f"{has} for {self.threads} thread{plural}"


def projected_bytes(sizes: Mapping[str, Footprint], positions: int, worker: Worker) -> int:
    """Resident memory that a worker needs for blocks of so many positions."""
    return worker.loaded + worker.threads * max(stage.bytes(positions) for stage in sizes.values())


def most_positions(sizes: Mapping[str, Footprint], room: int) -> int:
    """Positions that a block may have so that it takes no more than these bytes; 0 when not even one fits."""
    return max(0, min((room - stage.fixed) // stage.per_position for stage in sizes.values()))


def covering_radius(radii: NDArray, coverage: float) -> int:
    """Smallest integer R with at least ``ceil(coverage * n)`` of the n radii at or below it.

    Examples
    --------
    >>> covering_radius(np.array([3, 9, 4, 5]), 0.75), covering_radius(np.array([3, 9, 4, 5]), 1.0)
    (5, 9)
    """
    rank = min(max(math.ceil(coverage * radii.size), 1), radii.size) - 1
    return int(np.partition(radii.astype(np.int64), rank)[rank])


def axis_window(wanted: int, detector: int, multiple: int) -> tuple[int, bool]:
    """Size of the window on one axis, and whether it crops: (size, cropped).

    ``wanted`` is rounded up to a multiple; a window that would reach the detector's size is the whole axis.

    Examples
    --------
    >>> axis_window(41, 128, 2), axis_window(127, 128, 2)
    ((42, True), (128, False))
    """
    if wanted < 1:
        raise ConfigError(f"a window of {wanted} pixels was asked for; it needs at least 1")
    size = math.ceil(wanted / multiple) * multiple
    return (size, True) if size < detector else (detector, False)


def check_size(
    size: Sequence[int],
    detector: Sequence[int],
    multiple: int,
    *,
    keeps_whole: bool,
    given: str,
) -> None:
    """Refuse a size (height, width) of the window that was given and would not be kept as it is.

    Parameters
    ----------
    size, detector : (ky, kx) in pixels
    multiple : the size of a cropped axis is a multiple of this; of the whole axis it need not be
    keeps_whole : whether a window that exceeds the detector is the whole axis
    given : what the user gave, for the message

    Raises
    ------
    ConfigError
        When it is no multiple, or exceeds the detector.

    Examples
    --------
    >>> check_size((40, 25), (50, 25), 2, keeps_whole=False, given="size is (40, 25)")
    """
    height, width = detector
    for n, full in zip(size, detector, strict=True):
        if n > full and not keeps_whole:
            raise ConfigError(
                f"{given}, larger than the detector of {height} x {width} pixels; give at most that, or size auto"
            )
        if 0 < n < full and n % multiple:
            raise ConfigError(f"{given}; {next_multiples(n, multiple)}")


def uncropped(name: str, full: int) -> str:
    """What is said of an axis that the window covers."""
    return f"{name} is not cropped: the window would reach its {full} pixels"


def _power_of_two(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)


def check_window(window: Sequence[int], detector: Sequence[int]) -> None:
    """Refuse a window [y0, y1, x0, x1] that is empty or leaves the detector (ky, kx).

    Raises
    ------
    ConfigError
        When it does.

    Examples
    --------
    >>> check_window([0, 24, 2, 20], (24, 20))
    """
    y0, y1, x0, x1 = window
    if not (0 <= y0 < y1 <= detector[0] and 0 <= x0 < x1 <= detector[1]):
        raise ConfigError(
            f"window {list(window)} does not fit the detector of {detector[0]} x {detector[1]} pixels; "
            "give [y0, y1, x0, x1] with 0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width"
        )


def whole_number(name: str, value: Any, expected: str) -> int:
    """An integer of Python or numpy as it is; anything else is refused, never rounded.

    Raises
    ------
    ConfigError

    Examples
    --------
    >>> whole_number("factor", np.int64(2), "an integer")
    2
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} is {value!s}; expected {expected}") from None


def check_factor(factor: int, detector: Sequence[int]) -> None:
    """Refuse a downsampling of the detector (ky, kx) that is not an integer, or would leave no pixel of an axis.

    Raises
    ------
    ConfigError
        When it is, or would.

    Examples
    --------
    >>> check_factor(20, (24, 20))
    """
    whole_number("downsample factor", factor, "an integer")
    if factor < 1 or factor > min(detector):
        raise ConfigError(
            f"downsample factor is {factor}; expected 1 to {min(detector)}, the shorter detector axis"
        )


def check_center(center: Sequence[float], detector: Sequence[int]) -> None:
    """Refuse a center (y, x) outside of the detector (ky, kx).

    Raises
    ------
    ConfigError
        When it is.

    Examples
    --------
    >>> check_center((23, 0.5), (24, 20))
    """
    y, x = center
    if not (0 <= y <= detector[0] - 1 and 0 <= x <= detector[1] - 1):
        raise ConfigError(
            f"manual_center ({y:g}, {x:g}) lies outside the detector of {detector[0]} x {detector[1]} pixels; "
            "give (y, x) in source pixels"
        )
