"""Integer decisions made before any pixel is read: chunks, shards, bytes of a task, and the window's size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from stem_dask.core.model import Worker


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


def projected_bytes(sizes: Mapping[str, Footprint], positions: int, worker: Worker) -> int:
    """Resident memory that a worker needs for blocks of so many positions."""
    return worker.loaded + worker.threads * max(stage.bytes(positions) for stage in sizes.values())


def most_positions(sizes: Mapping[str, Footprint], room: int) -> int:
    """Positions that a block may have so that it takes no more than these bytes; 0 when not even one fits."""
    return max(0, min((room - stage.fixed) // stage.per_position for stage in sizes.values()))
