"""Analysis of each pattern in one pass: total, center, retention profile and radius, and sums over the block.

The rings around a center hold what the next larger window or disc adds; their sum from 0 to r is the intensity inside radius
r, so one pass over the pattern gives every radius at once.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.disc import direct_intensity
from stem_dask.kernels.intensity import (
    CACHE,
    GROUP,
    Intensity,
    accumulator,
    most_summed,
    native,
    native_dtype,
)

#: sums of floats may be reordered (SIMD); the result stays the same for the same pattern on the same machine
_FAST = {"reassoc", "nsz"}


class PatternAnalysis(NamedTuple):
    """Result of `analyze_patterns` for a block of n patterns."""

    total: NDArray[np.float64]  #: (n,) intensity, exact below 2**53 counts
    com: NDArray[np.float64]  #: (n, 2) center of mass (y, x); NaN when empty
    center: NDArray[np.float64]  #: (n, 2) center by the chosen method (y, x)
    radius: NDArray[np.float32]  #: (n,) retention radius; NaN when empty
    #: (n, r_max + 1) intensity inside radius r / total; NaN when empty
    profile: NDArray[np.float32]
    sum_pattern: NDArray  #: (ky, kx) sum of the intensities, uint64 or float64
    max_pattern: NDArray  #: (ky, kx) maximum of the intensities, in the data's type
    odd: NDArray[np.int64]  #: counts of `ODD_PIXELS`
    negative_sum: float  #: sum of the negative values, as a positive number
    direct: NDArray[
        np.float64
    ]  #: (n,) intensity of the direct disc; NaN without a radius or a center


def largest_radius(height: int, width: int, metric: str) -> int:
    """Smallest radius that holds the whole detector around any of its pixels."""
    if metric == "square":
        return max(height, width)
    return int(circle_table(height, width)[-1, -1])


def analyze_patterns(block: NDArray, **options: Any) -> PatternAnalysis:
    """Analyze every pattern of a block; each is read from memory once.

    The radius is the smallest r (from 1 for ``square``, 0 for ``circle``) with ``inside >= target * total``; inside
    is the total less what lies outside, so that a pattern without intensity outside r holds exactly its total.

    For the options and errors see `Analysis`.

    Examples
    --------
    >>> block = np.zeros((1, 8, 8), "u2"); block[0, 4, 4] = 98; block[0, 0, 0] = 2
    >>> found = analyze_patterns(block, target_retention=0.98, threshold=0, center=(4, 4), metric="square")
    >>> float(found.radius[0]), round(float(found.profile[0, 1]), 6), float(found.profile[0, 4])
    (1.0, 0.98, 1.0)
    """
    block = native(block)
    analysis = Analysis(len(block), block.shape[1:], block.dtype, **options)
    analysis.add(block)
    return analysis.result()


class Analysis:
    """`analyze_patterns` of n patterns, batch by batch.

    The last digits of float sums depend on the batch sizes, all else on the patterns alone.

    Parameters
    ----------
    n, detector, dtype : of the patterns
    target_retention : 0 < target <= 1
    threshold : values below it do not count; ValueError when it is above what the type can hold
    center : (y, x) for all patterns, or None for each pattern's centroid
    metric : {"square", "circle"}
    pedestal : subtracted from the values that count, see `stem_dask.kernels.intensity.Intensity`
    disc_radius : of the direct disc, whose intensity is summed about each center; None without one
    """

    def __init__(
        self,
        n: int,
        detector: tuple[int, int],
        dtype: np.dtype,
        *,
        target_retention: float,
        threshold: float,
        center: tuple[float, float] | None,
        metric: str,
        pedestal: float = 0.0,
        disc_radius: float | None = None,
    ) -> None:
        height, width = detector
        dtype = native_dtype(dtype)
        kind = accumulator(dtype, max(height, width) * 4)
        wide = np.float64 if kind == np.float64 else np.uint64
        n_radii = largest_radius(height, width, metric) + 1
        self.found: tuple[NDArray, ...] = (
            np.zeros(n),  # total
            np.full((n, 2), np.nan),  # center of mass
            np.full((n, 2), np.nan),  # center
            np.full(n, np.nan, np.float32),  # radius
            np.full((n, n_radii), np.nan, np.float32),  # profile
        )
        self.total, self.highest = np.zeros(detector, wide), np.zeros(detector, dtype)
        self.intensity = Intensity(detector, dtype, threshold, pedestal)
        self.disc_radius, self.direct = disc_radius, np.full(n, np.nan)
        self.center = np.array([np.nan, np.nan] if center is None else center, np.float64)
        floats = kind == np.float64
        self.how = (
            circle_table(height, width) if metric == "circle" else None,
            True if metric == "square" and not floats else None,  # inward
            True if metric == "square" and floats else None,  # outward
            float(target_retention),
        )
        self.sums, self.rings = np.zeros(detector, kind), np.zeros(n_radii, wide)
        #: number of patterns that the sums can hold, that they hold, and that were analyzed
        self.full = most_summed(dtype) if kind == np.uint32 else max(1, n)
        self.summed = self.done = 0

    def add(self, piece: NDArray, centers: NDArray[np.float64] | None = None) -> None:
        """Analyze the next patterns, (..., ky, kx); raises OverflowError when the sums of one leave 64 bits.

        ``centers`` (n, 2) take the place of the option ``center``; NaN stands for the centroid.
        """
        piece, before = native(piece), self.done
        given = np.broadcast_to(self.center, (len(piece), 2)) if centers is None else centers
        for some in self.intensity.parts(piece, self.full):
            n = len(some)
            if self.summed + n > self.full:
                self.total += self.sums
                self.sums[:], self.summed = 0, 0
            here = tuple(values[self.done : self.done + n] for values in self.found)
            those = np.ascontiguousarray(given[self.done - before : self.done - before + n])
            highest = self.highest.view(some.dtype)
            _analyze(some, those, *self.how, here, self.sums, self.rings, highest)
            if self.disc_radius is not None:
                found = self.direct[self.done : self.done + n]
                direct_intensity(some, here[2], self.disc_radius, found)
            self.done, self.summed = self.done + n, self.summed + n
        total, _, _, radius, _ = self.found
        refuse_overflow(piece, total[before : self.done], radius[before : self.done], before)

    def result(self) -> PatternAnalysis:
        """Result for all patterns."""
        self.total += self.sums
        self.sums[:], self.summed = 0, 0
        odd, negative = self.intensity.odd, float(self.intensity.negative_sum[0])
        sums = self.total, self.highest
        total, com, center, radius, profile = self.found
        return PatternAnalysis(
            total, com, center, radius, profile, *sums, odd, negative, self.direct
        )


def refuse_overflow(block: NDArray, total: NDArray, radius: NDArray, before: int) -> None:
    """Raise OverflowError if sums exceeded 64 bits, where a center would be missing or wrong."""
    lost = (total > 0) & np.isnan(radius)
    height, width = block.shape[1:]
    values = height * width * max(height, width)
    if (
        block.dtype.kind != "f"
        and float(np.iinfo(block.dtype).max) * values >= 2.0**63
        and float(block.max()) * values >= 2.0**63
    ):
        side = max(height, width)
        lost = [pattern.clip(0).sum(dtype=np.float64) * side >= 2.0**63 for pattern in block]
    for i in np.flatnonzero(lost):
        raise OverflowError(
            f"pattern {before + i} of the block has values up to {float(block[i].max()):g} and its sums do not fit "
            "into 64 bits; mask the bad pixels or repair the data"
        )


# What `_analyze` calls is compiled again with it, which takes seconds: it calls all by itself, and of the three ways to
# get the rings those that are None are left out.


@numba.njit(nogil=True, cache=CACHE)
def _analyze(  # type: ignore[no-untyped-def]
    block, given, table, inward, outward, target, per_pattern, sums, rings, highest
):
    n, height, width = block.shape
    rows, cols = np.empty(height, sums.dtype), np.empty(width, sums.dtype)
    for start in range(0, n, GROUP):
        stop = min(start + GROUP, n)
        for i in range(start, stop):
            pattern = block[i]
            project(pattern, rows, cols)
            ry, rx, whole = _find_center(i, given, rows, cols, rings, per_pattern)
            if ry < 0:
                continue
            if table is not None:
                circle_rings(pattern, ry, rx, table, cols, rings)
            elif inward is not None:
                square_rings_inward(pattern, ry, rx, cols, rings)
            elif outward is not None:
                square_rings(pattern, ry, rx, cols, rings)
            _find_radius(i, rings, whole, target, 1 if table is None else 0, per_pattern)
        _accumulate(block[start:stop], sums, highest)


@numba.njit(nogil=True, cache=CACHE)
def _find_center(i, given, rows, cols, rings, per_pattern):  # type: ignore[no-untyped-def]
    """Total and centers of pattern i, from its sums along both axes; the window center, or -1 where there is none, and the total."""
    total, com, center, _, _ = per_pattern
    kind = rings.dtype.type
    whole, moment_y, moment_x = kind(0), kind(0), kind(0)
    for y in range(rows.size):
        whole += rows[y]
        moment_y += kind(rows[y]) * kind(y)
    for x in range(cols.size):
        moment_x += kind(cols[x]) * kind(x)
    total[i] = whole
    if whole > 0:
        com[i, 0], com[i, 1] = moment_y / whole, moment_x / whole
    center[i, 0] = com[i, 0] if np.isnan(given[i, 0]) else given[i, 0]
    center[i, 1] = com[i, 1] if np.isnan(given[i, 1]) else given[i, 1]
    near_y, near_x = np.rint(center[i, 0]), np.rint(center[i, 1])
    # outside only after an overflow, which the caller refuses
    if not (whole > 0 and 0 <= near_y < rows.size and 0 <= near_x < cols.size):
        return -1, -1, whole
    return int(near_y), int(near_x), whole


@numba.njit(nogil=True, cache=CACHE)
def _find_radius(i, rings, whole, target, lowest, per_pattern):  # type: ignore[no-untyped-def]
    """Profile of pattern i, and its radius, which is ``lowest`` at least."""
    _, _, _, radius, profile = per_pattern
    least = target * float(whole)
    outside = rings.dtype.type(0)
    smallest = rings.size - 1
    for r in range(rings.size - 1, -1, -1):
        inside = float(whole - outside)
        if inside >= least and r >= lowest:
            smallest = r
        fraction = inside / float(whole)
        narrow = np.float32(fraction)
        # rounded down, so that a stored fraction never promises too much
        profile[i, r] = np.nextafter(narrow, np.float32(0)) if narrow > fraction else narrow
        outside += rings[r]
    radius[i] = smallest


@numba.njit(nogil=True, cache=CACHE)
def _accumulate(patterns, sums, highest):  # type: ignore[no-untyped-def]
    """Add up to `GROUP` patterns to a sum of patterns and to their maximum; all four at once where there are so many."""
    kind = sums.dtype.type
    height, width = np.uintp(patterns.shape[1]), np.uintp(patterns.shape[2])
    for y in range(height):
        total, most = sums[y], highest[y]
        if patterns.shape[0] == 4:
            a, b, c, d = patterns[0, y], patterns[1, y], patterns[2, y], patterns[3, y]
            for x in range(width):
                most[x] = max(max(most[x], max(a[x], b[x])), max(c[x], d[x]))
                two = kind(kind(a[x]) + kind(b[x]))
                total[x] = kind(total[x] + kind(two + kind(kind(c[x]) + kind(d[x]))))
            continue
        for i in range(patterns.shape[0]):
            row = patterns[i, y]
            for x in range(width):
                most[x] = max(most[x], row[x])
                total[x] = kind(total[x] + kind(row[x]))


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
    """`square_rings` of whole numbers, from the column sums of `project`: half of the pixels need not be looked at again.

    From the largest window inward, the outermost rows are taken off the column sums, which then hold what the
    outermost columns have left. Differences are exact in whole numbers only.
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
    """``table[dy, dx]`` = smallest integer r with ``dy² + dx² <= r²``, for distances up to the detector's size."""
    square = np.arange(height)[:, None] ** 2 + np.arange(width)[None, :] ** 2
    # exact to within one below 2**50, so mend by comparing integers
    root = np.sqrt(square).astype(np.int32)
    root += root.astype(np.int64) ** 2 < square
    return root


@numba.njit(nogil=True, cache=CACHE, fastmath=_FAST)
def circle_rings(pattern, ry, rx, table, fold, rings):  # type: ignore[no-untyped-def]
    """``rings[r]`` = intensity of the pixels with ``(r-1)² < (y-ry)² + (x-rx)² <= r²``.

    The four pixels at ``(±dy, ±dx)`` lie in one ring: they are folded onto one quadrant first, in contiguous
    passes, and only the quadrant is scattered.
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
