"""One look at each pattern: total, center, retention profile, radius, and what the block adds up to."""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.intensity import (
    ODD_PIXELS,
    accumulator,
    clean_pattern,
    lowest_counted,
    most_summed,
    native,
    needs_cleaning,
)
from stem_dask.kernels.rings import (
    circle_rings,
    circle_table,
    project,
    square_rings,
    square_rings_inward,
)

#: patterns that are in cache together while they are added to the block's sum and maximum: `_accumulate` names each
_GROUP = 4
#: how a pattern's rings are added up: any type by squares, whole numbers by squares, any type by circles
_SQUARE, _INWARD, _CIRCLE = range(3)


class PatternAnalysis(NamedTuple):
    """What `analyze_patterns` finds in a block of n patterns."""

    total: NDArray[np.float64]  #: (n,) intensity, exact below 2**53 counts
    com: NDArray[np.float64]  #: (n, 2) center of mass (y, x); NaN when empty
    center: NDArray[np.float64]  #: (n, 2) center by the chosen method (y, x)
    radius: NDArray[np.float32]  #: (n,) retention radius; NaN when empty
    profile: NDArray[
        np.float32
    ]  #: (n, r_max + 1) intensity inside radius r / total; NaN when empty
    sum_pattern: NDArray  #: (ky, kx) sum of the intensities, uint64 or float64
    max_pattern: NDArray  #: (ky, kx) maximum of the intensities, in the data's type
    odd: NDArray[np.int64]  #: counts of `ODD_PIXELS`
    negative_sum: float  #: what the negative values amounted to, as a positive number


def largest_radius(height: int, width: int, metric: str) -> int:
    """Smallest radius that holds the whole detector around any of its pixels.

    Examples
    --------
    >>> largest_radius(3, 4, "square"), largest_radius(4, 5, "circle")
    (4, 5)
    """
    if metric == "square":
        return max(height, width)
    return int(circle_table(height, width)[-1, -1])


def analyze_patterns(
    block: NDArray,
    *,
    target_retention: float,
    threshold: float,
    center: tuple[float, float] | None,
    metric: str,
) -> PatternAnalysis:
    """Analyze every pattern of a block; each is read from memory once.

    Parameters
    ----------
    block : (..., ky, kx) array, bool, integer or float
    target_retention : float, 0 < target <= 1
    threshold : float, values below it do not count
    center : (y, x) for all patterns, or None for each pattern's centroid
    metric : {"square", "circle"}

    Returns
    -------
    PatternAnalysis

    Raises
    ------
    ValueError
        When the threshold is above what the type can hold.
    OverflowError
        When a pattern's sums leave 64 bits.

    Notes
    -----
    The radius is the smallest r (from 1 for ``square``, 0 for ``circle``) with ``inside >= target * total``; inside
    is the total less what lies outside, so that a pattern without intensity outside r holds exactly its total.

    Examples
    --------
    >>> block = np.zeros((1, 8, 8), "u2"); block[0, 4, 4] = 98; block[0, 0, 0] = 2
    >>> found = analyze_patterns(block, target_retention=0.98, threshold=0, center=(4, 4), metric="square")
    >>> float(found.radius[0]), round(float(found.profile[0, 1]), 6), float(found.profile[0, 4])
    (1.0, 0.98, 1.0)
    """
    block = native(block)
    options = {"target_retention": target_retention, "threshold": threshold}
    analysis = Analysis(
        len(block), block.shape[1:], block.dtype, **options, center=center, metric=metric
    )
    analysis.add(block)
    return analysis.result()


class Analysis:
    """`analyze_patterns` of a block that comes in pieces.

    The sums of floats depend in their last digits on the sizes of the pieces, all else on the patterns alone.

    Parameters
    ----------
    n : patterns of the whole block
    detector, dtype : of the patterns
    target_retention, threshold, center, metric : see `analyze_patterns`
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
    ) -> None:
        height, width = detector
        dtype = native(np.empty((0, 1, 1), dtype)).dtype
        kind = accumulator(dtype, max(height, width) * 4)
        wide = np.float64 if kind == np.float64 else np.uint64
        n_radii = largest_radius(height, width, metric) + 1
        self.found = (
            np.zeros(n),  # total
            np.full((n, 2), np.nan),  # center of mass
            np.full((n, 2), np.nan),  # center
            np.full(n, np.nan, np.float32),  # radius
            np.full((n, n_radii), np.nan, np.float32),  # profile
        )
        self.total, self.highest = np.zeros(detector, wide), np.zeros(detector, dtype)
        self.odd, self.negative_sum = np.zeros(len(ODD_PIXELS), np.int64), np.zeros(1)
        self.how = (
            needs_cleaning(dtype, threshold),
            lowest_counted(dtype, threshold),
            np.array([np.nan, np.nan] if center is None else center, np.float64),
            _CIRCLE if metric == "circle" else _SQUARE if kind == np.float64 else _INWARD,
            circle_table(height, width) if metric == "circle" else np.zeros((1, 1), np.int32),
            float(target_retention),
        )
        self.sums, self.rings = np.zeros(detector, kind), np.zeros(n_radii, wide)
        #: patterns that sums can hold, that they do hold, and that were analyzed
        self.full = most_summed(dtype) if kind == np.uint32 else max(1, n)
        self.summed = self.done = 0

    def add(self, piece: NDArray) -> None:
        """Analyze the next patterns, (..., ky, kx).

        Raises
        ------
        OverflowError
            When a pattern's sums leave 64 bits.
        """
        piece = native(piece)
        for start in range(0, len(piece), self.full):
            some = piece[start : start + self.full]
            if self.summed + len(some) > self.full:
                self.total += self.sums
                self.sums[:], self.summed = 0, 0
            here = tuple(values[self.done : self.done + len(some)] for values in self.found)
            sums = (self.sums, self.rings, self.highest, self.odd, self.negative_sum)
            _analyze(some, *self.how, here, *sums)
            refuse_overflow(some, here[0], here[3], self.done)
            self.done, self.summed = self.done + len(some), self.summed + len(some)

    def result(self) -> PatternAnalysis:
        """What was found in all of them."""
        self.total += self.sums
        self.sums[:], self.summed = 0, 0
        negative = float(self.negative_sum[0])
        return PatternAnalysis(*self.found, self.total, self.highest, self.odd, negative)


def refuse_overflow(block: NDArray, total: NDArray, radius: NDArray, before: int) -> None:
    """Sums that left 64 bits: such a pattern has no center, or, of integers, a wrong one without a sign."""
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


@numba.njit(nogil=True, cache=True)
def _analyze(  # type: ignore[no-untyped-def]
    block,
    dirty,
    low,
    given,
    way,
    table,
    target,
    per_pattern,
    sums,
    rings,
    max_pattern,
    odd,
    negative_sum,
):
    n, height, width = block.shape
    cleaned = np.empty((_GROUP if dirty else 0, height, width), block.dtype)
    rows, cols = np.empty(height, sums.dtype), np.empty(width, sums.dtype)
    for start in range(0, n, _GROUP):
        stop = min(start + _GROUP, n)
        if dirty:
            for i in range(start, stop):
                clean_pattern(block[i], low, cleaned[i - start], odd, negative_sum)
        patterns = cleaned[: stop - start] if dirty else block[start:stop]
        for i in range(start, stop):
            _measure(
                patterns[i - start], i, given, way, table, target, rows, cols, rings, per_pattern
            )
        _accumulate(patterns, sums, max_pattern)


@numba.njit(nogil=True, cache=True)
def _measure(pattern, i, given, way, table, target, rows, cols, rings, per_pattern):  # type: ignore[no-untyped-def]
    """Total, centers, radius and profile of pattern i, which lies in cache."""
    total, com, center, radius, profile = per_pattern
    project(pattern, rows, cols)
    whole = rings.dtype.type(0)
    moment_y, moment_x = rings.dtype.type(0), rings.dtype.type(0)
    for y in range(rows.size):
        whole += rows[y]
        moment_y += rings.dtype.type(rows[y]) * rings.dtype.type(y)
    for x in range(cols.size):
        moment_x += rings.dtype.type(cols[x]) * rings.dtype.type(x)
    total[i] = whole
    if whole > 0:
        com[i, 0], com[i, 1] = moment_y / whole, moment_x / whole
    center[i, 0] = com[i, 0] if np.isnan(given[0]) else given[0]
    center[i, 1] = com[i, 1] if np.isnan(given[1]) else given[1]
    if not whole > 0:
        return
    near_y, near_x = np.rint(center[i, 0]), np.rint(center[i, 1])
    if not (0 <= near_y < rows.size and 0 <= near_x < cols.size):
        return  # only after an overflow, which the caller refuses
    ry, rx = int(near_y), int(near_x)
    if way == _CIRCLE:
        circle_rings(pattern, ry, rx, table, cols, rings)
    elif way == _INWARD:
        square_rings_inward(pattern, ry, rx, cols, rings)
    else:
        square_rings(pattern, ry, rx, cols, rings)
    outside = rings.dtype.type(0)
    least = target * float(whole)
    smallest = rings.size - 1
    lowest = 0 if way == _CIRCLE else 1
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


@numba.njit(nogil=True, cache=True)
def _accumulate(patterns, sums, highest):  # type: ignore[no-untyped-def]
    """Add up to `_GROUP` patterns to a sum of patterns and to their maximum; all four at once where there are so many."""
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
