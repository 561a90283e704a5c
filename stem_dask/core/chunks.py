"""Sizes of blocks, chunks and shards, decided before any pixel is read."""

import operator
from collections.abc import Sequence
from math import prod
from typing import Any

from stem_dask.core.errors import ConfigError

MIB = 2**20

#: bytes that a task reads of a detector-first file, at least and at most, if memory allows
SLAB_BYTES = (64 * MIB, 256 * MIB)

#: bytes of the pieces that it is split into
PIECE_BYTES = MIB

#: number of blocks that ``auto`` does not exceed
MAX_TASKS = 4000

#: bytes of an inner chunk: a single pattern is read within milliseconds
INNER_CHUNK_BYTES = MIB

#: bytes of a chunk in formats with one file per chunk, so that a terabyte does not become millions of files
FILE_CHUNK_BYTES = 8 * MIB


def lead_chunks(
    lead_shape: Sequence[int],
    pattern_bytes: int,
    chunk_mb: float | str = "auto",
    most: int | None = None,
    source_chunk: Sequence[int] | None = None,
    auto_mb: int = 64,
) -> tuple[int, ...]:
    """Positions of a block along each scan axis (scan_y, scan_x), or of a list (n,).

    Whole scan rows when they fit, else a part of one row. Extents that do not cover an axis are powers of two, or
    multiples of the source's own chunks (where the memory allows), so that no chunk is decoded twice. A block has ``chunk_mb`` MiB
    of input; ``auto`` is ``auto_mb``, doubled until there are at most 4,000 tasks, and ``most`` positions.

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
        target: float = auto_mb * MIB
        # with more tasks the overhead of the scheduler becomes visible
        while prod(lead_shape) * pattern_bytes / target > MAX_TASKS:
            target *= 2
        positions = int(target // pattern_bytes)
        positions = max(1, positions if most is None else min(positions, most))
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


def inner_chunk(
    lead_chunk: Sequence[int],
    lead_shape: Sequence[int],
    pattern_bytes: int,
    most_bytes: int = INNER_CHUNK_BYTES,
) -> tuple[int, ...]:
    """Positions of an inner chunk of the store: whole patterns, at most ``most_bytes``.

    Where several blocks lie along an axis the inner chunk divides them, so that a shard is exactly a block. A block
    that covers its axis may be rounded up instead, and prime sizes do not end in chunks of one pattern.
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
    """A block's extents, rounded up to a multiple of the inner chunk."""
    return tuple(-(-size // part) * part for size, part in zip(lead_chunk, inner, strict=True))


def _power_of_two(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)


def whole_number(name: str, value: Any, expected: str) -> int:
    """Return an integer of Python or numpy; raise ConfigError for anything else instead of rounding it."""
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} is {value!s}; expected {expected}") from None
