"""Intensity of one pattern by rings around a center: what the next larger window or disc adds.

The sum over rings 0 … r is the intensity inside radius r, so one pass over the pattern gives every radius at once.
All functions work on one pattern in cache, walk rows contiguously, and add in the type of their accumulators.
"""

import numba
import numpy as np

from stem_dask.kernels.caching import CACHE

#: sums of floats may be reordered (SIMD); the result stays the same for the same pattern on the same machine
_FAST = {"reassoc", "nsz"}


@numba.njit(nogil=True, cache=CACHE, fastmath=_FAST)
def project(pattern, rows, cols):  # type: ignore[no-untyped-def]
    """Sums along both axes: ``rows[y] = sum_x``, ``cols[x] = sum_y``, in one traversal."""
    height, width = pattern.shape
    kind = cols.dtype.type
    for x in range(width):
        cols[x] = 0
    for y in range(height):
        row = pattern[y]
        total = kind(0)
        for x in range(width):
            value = kind(row[x])
            total = kind(total + value)
            cols[x] = kind(cols[x] + value)
        rows[y] = total


@numba.njit(nogil=True, cache=CACHE)
def square_ring(distance):  # type: ignore[no-untyped-def]
    """Smallest r whose interval ``-r … r-1`` contains the signed distance from the center."""
    return distance + 1 if distance >= 0 else -distance


@numba.njit(nogil=True, cache=CACHE, fastmath=_FAST)
def square_rings(pattern, ry, rx, wings, rings):  # type: ignore[no-untyped-def]
    """``rings[r]`` = intensity that the window of half-size r has and that of r - 1 has not.

    The window of half-size r is rows ``ry-r … ry+r-1`` and columns ``rx-r … rx+r-1``, cut at the detector edge.
    In row y, which enters with ring q, the columns inside half-size q enter together with it; the columns farther
    out (the wings) enter with their own ring and are first gathered by column.

    Parameters
    ----------
    pattern : (ky, kx) array
    ry, rx : int, the window center
    wings : (kx,) scratch in the accumulator's type
    rings : (r_max + 1,) uint64 or float64, r_max >= max(ky, kx); overwritten
    """
    height, width = pattern.shape
    kind = wings.dtype.type
    rings[:] = 0
    wings[:] = 0
    for y in range(height):
        q = square_ring(y - ry)
        first = min(max(rx - q, 0), width)
        last = max(min(rx + q, width), 0)
        inner = pattern[y, first:last]
        inside = kind(0)
        for x in range(inner.size):
            inside = kind(inside + kind(inner[x]))
        rings[q] += inside
        left, left_sum = pattern[y, :first], wings[:first]
        for x in range(left.size):
            left_sum[x] = kind(left_sum[x] + kind(left[x]))
        right, right_sum = pattern[y, last:], wings[last:]
        for x in range(right.size):
            right_sum[x] = kind(right_sum[x] + kind(right[x]))
    for x in range(width):
        rings[square_ring(x - rx)] += wings[x]


@numba.njit(nogil=True, cache=CACHE)
def square_rings_inward(pattern, ry, rx, cols, rings):  # type: ignore[no-untyped-def]
    """`square_rings` of whole numbers, from the column sums: half of the pixels need not be looked at again.

    From the largest window inward, the outermost rows are taken off the column sums, which then hold what the
    outermost columns have left. Differences are exact in whole numbers only.

    Parameters
    ----------
    cols : (kx,) sums over ky from `project`; used up
    rings : (r_max + 1,) uint64, r_max >= max(ky, kx); overwritten
    """
    height, width = pattern.shape
    kind = cols.dtype.type
    rings[0] = 0
    for r in range(rings.size - 1, 0, -1):
        top, bottom, left, right = ry - r, ry + r - 1, rx - r, rx + r - 1
        # unsigned, so that LLVM need not think of indices from the end
        first, stop = np.uintp(max(left, 0)), np.uintp(max(min(right + 1, width), 0))
        ring = kind(0)
        if top >= 0 and bottom < height:
            y, z = np.uintp(top), np.uintp(bottom)
            for x in range(first, stop):
                both = kind(kind(pattern[y, x]) + kind(pattern[z, x]))
                ring = kind(ring + both)
                cols[x] = kind(cols[x] - both)
        elif top >= 0 or bottom < height:
            y = np.uintp(top if top >= 0 else bottom)
            for x in range(first, stop):
                value = kind(pattern[y, x])
                ring = kind(ring + value)
                cols[x] = kind(cols[x] - value)
        if left >= 0:
            ring = kind(ring + cols[np.uintp(left)])
        if right < width:
            ring = kind(ring + cols[np.uintp(right)])
        rings[r] = ring


def circle_table(height: int, width: int) -> np.ndarray:
    """``table[dy, dx]`` = smallest integer r with ``dy² + dx² <= r²``, for distances up to the detector's size.

    Examples
    --------
    >>> circle_table(2, 3)
    array([[0, 1, 2],
           [1, 2, 3]], dtype=int32)
    """
    square = np.arange(height)[:, None] ** 2 + np.arange(width)[None, :] ** 2
    root = np.sqrt(square).astype(
        np.int32
    )  # exact to within one below 2**50, so mend by comparing integers
    root += root.astype(np.int64) ** 2 < square
    return root


@numba.njit(nogil=True, cache=CACHE, fastmath=_FAST)
def circle_rings(pattern, ry, rx, table, fold, rings):  # type: ignore[no-untyped-def]
    """``rings[r]`` = intensity of the pixels with ``(r-1)² < (y-ry)² + (x-rx)² <= r²``.

    The four pixels at ``(±dy, ±dx)`` lie in one ring: they are folded onto one quadrant first, in contiguous
    passes, and only the quadrant is scattered.

    Parameters
    ----------
    table : (ky, kx) int32 from `circle_table`
    fold : (kx,) scratch in the accumulator's type
    rings : (r_max + 1,) uint64 or float64; overwritten
    """
    height, width = pattern.shape
    kind = fold.dtype.type
    rings[:] = 0
    reach = max(rx, width - 1 - rx) + 1
    for dy in range(max(ry, height - 1 - ry) + 1):
        fold[:reach] = 0
        for side in range(2):
            y = ry + dy if side == 0 else ry - dy
            if y < 0 or y >= height or (side == 1 and dy == 0):
                continue
            right = pattern[y, rx:]
            for x in range(right.size):
                fold[x] = kind(fold[x] + kind(right[x]))
            left = pattern[y, :rx]
            n = left.size
            for x in range(n):
                fold[x + 1] = kind(fold[x + 1] + kind(left[n - 1 - x]))
        ring = table[dy]
        for x in range(reach):
            rings[ring[x]] += fold[x]
