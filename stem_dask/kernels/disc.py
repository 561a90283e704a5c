"""The direct disc in each pattern: its center, its rim, and the intensity that it holds.

All of it works on rows of a disc about a center, so that only pixels near the disc are read.
"""

import functools
import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.intensity import CACHE, accumulator, native

#: sums of float64 may be reordered (SIMD): those of integers stay exact below 2**53, and those of floats depend on the
#: pattern alone
_FAST = {"reassoc", "nsz", "contract"}

#: px beyond the radius that still count as the disc
MARGIN = 1.5

#: copies of the pixels near the disc are made for so many patterns at once
NEAR_BYTES = 2**19


class Discs(NamedTuple):
    """Result of `find_discs` for n patterns."""

    center: NDArray[np.float64]  #: (n, 2) center of the disc (y, x) in px; NaN where none was found
    spread: NDArray[
        np.float64
    ]  #: (n,) px between the centers with and without the cap; NaN where none was found


def find_discs(
    patterns: NDArray,
    expected: NDArray[np.float64],
    *,
    radius: float,
    reach: float,
    good: NDArray[np.bool_] | None,
    level: float = 0.0,
) -> Discs:
    """Find the center of the direct disc in every pattern, near the place where it is expected.

    The box of half side 0.7 radius that holds most intensity gives a place and a level. From there the center is the center of
    mass within ``radius + 1.5``, of values capped at half of the level, so that dark and bright lines within the disc
    weigh nothing. Where more than 2 % of the disc is masked or off the detector, the rim decides (see `fit_rim`).

    Parameters
    ----------
    patterns : (n, ky, kx) from `native`, raw values; negative, NaN and infinite values count as 0
    expected : (n, 2) expected centers (y, x) in px
    radius : of the disc in px
    reach : px in y and in x from the expected place within which the disc is searched
    good : (ky, kx) False where a pixel does not count, or None when all do
    level : background per pixel, above which the disc and its surroundings are compared

    Returns
    -------
    Discs, NaN for patterns that are empty, whose center leaves the reach by more than 1 px, whose disc is not three times as bright
    as a ring about it, or whose rim is seen in five sectors or fewer.

    Examples
    --------
    >>> y, x = np.mgrid[:24, :24]
    >>> pattern = 50 * ((y - 11) ** 2 + (x - 13) ** 2 <= 16).astype("u2")
    >>> find_discs(native(pattern), np.array([[10.0, 12.0]]), radius=4.0, reach=3.0, good=None).center.tolist()
    [[11.0, 13.0]]
    """
    n, dtype, masked = len(patterns), patterns.dtype, good is not None
    counts = np.ones((1, 1), np.bool_) if good is None else np.ascontiguousarray(good, np.bool_)
    expected = np.ascontiguousarray(expected, np.float64)
    whole, rows = dtype.kind != "f", 2 * math.ceil(reach + radius + 6)
    kept = np.dtype(f"u{dtype.itemsize}") if dtype.kind == "i" else dtype
    numbers = (float(radius), float(reach), max(1, round(0.7 * radius)), float(level), whole)
    sums = np.empty((2, rows), accumulator(kept, rows**2))
    how = (patterns.shape[1:], numbers, counts, masked, _tables(float(radius)), sums)
    found, cut = Discs(np.full((n, 2), np.nan), np.full(n, np.nan)), np.zeros(n, np.bool_)
    if dtype.kind == "u" and not masked:
        _find_discs(patterns, np.zeros((n, 2), np.int64), expected, *how, *found, cut)
    else:  # copies of what is near the disc, with zeros where a pixel does not count
        some = max(1, NEAR_BYTES // (rows**2 * kept.itemsize))
        near, origin = np.empty((min(some, n), rows, rows), kept), np.zeros((some, 2), np.int64)
        for i in range(0, n, some):
            part = slice(i, min(i + some, n))
            _copy_near(patterns[part], expected[part], counts, masked, origin, near)
            copies, into = native(near[: part.stop - i]), (values[part] for values in (*found, cut))
            _find_discs(copies, origin, expected[part], *how, *into)
    if cut.any():
        rims = fit_rims(patterns[cut], found.center[cut], radius, good)
        lost = ~(rims[:, 3] > 5) | (np.abs(rims[:, :2] - expected[cut]) > reach + 1).any(axis=1)
        rims[lost] = np.nan
        found.center[cut] = rims[:, :2]
        found.spread[cut] += 0 * rims[:, 0]  # NaN where none was found
    return found


@functools.lru_cache(8)
def _tables(radius: float) -> tuple[NDArray, ...]:
    """Pixels about a pixel: half widths of a disc of radius + 1.5 by row; at its edge, nearest first: places, distances from
    the edge, whether they are inside; places of the ring from radius + 2 to radius + 4."""
    most, around = math.ceil(radius + 4), radius + MARGIN
    y, x = np.mgrid[-most : most + 1, -most : most + 1]
    places, square = np.stack([y, x], axis=-1), (y**2 + x**2).astype(float)
    inside = square <= around**2
    halves = (inside[most : most + int(around) + 1].sum(axis=1) - 1) // 2
    gap = np.abs(np.sqrt(square) - around)
    edge = np.nonzero(gap < 1 + 1e-6)
    order = np.argsort(gap[edge], kind="stable")
    beyond = (square > (radius + 2) ** 2) & (square <= (radius + 4) ** 2)
    return (
        halves, places[edge][order], gap[edge][order] - 1e-9, inside[edge][order], places[beyond],
    )  # fmt: skip


@numba.njit(nogil=True, cache=CACHE)
def _copy_near(patterns, expected, counts, masked, origin, near):  # type: ignore[no-untyped-def]
    n, height, width = patterns.shape
    side, kind = near.shape[1], near.dtype.type
    for i in range(n):
        # NaN is left out later
        if abs(expected[i, 0]) < 1e9 and abs(expected[i, 1]) < 1e9:
            origin[i, 0] = int(np.rint(expected[i, 0])) - side // 2
            origin[i, 1] = int(np.rint(expected[i, 1])) - side // 2
        top, left = origin[i]
        first, last = min(max(0, -left), side), max(min(side, width - left), 0)
        for row in range(side):
            y, to = top + row, near[i, row]
            if y < 0 or y >= height or first >= last:
                to[:] = 0
                continue
            to[:first] = 0
            to[last:] = 0
            values, into = patterns[i, y, left + first : left + last], to[first:last]
            for x in range(values.size):
                value = values[x]
                into[x] = kind(value) if (value > 0) & (value - value == 0) else kind(0)
            if masked:
                good = counts[y, left + first : left + last]
                for x in range(values.size):
                    into[x] = into[x] if good[x] else kind(0)


@numba.njit(nogil=True, cache=CACHE)
def _spans(y, x, radius, y0, bounds, first, last):  # type: ignore[no-untyped-def]
    """First and last column of the pixels within a radius of (y, x) in each row from y0, within bounds; 0 and -1 where none is."""
    square = radius * radius
    least_y, most_y, least_x, most_x = bounds
    for k in range(first.size):
        row = y0 + float(k)
        dy2 = (row - y) * (row - y)
        half = math.sqrt(max(square - dy2, 0.0))
        a, b = np.ceil(x - half), np.floor(x + half)
        # what rounding of the root got wrong
        a -= 1.0 if (a - 1 - x) * (a - 1 - x) + dy2 <= square else 0.0
        b += 1.0 if (b + 1 - x) * (b + 1 - x) + dy2 <= square else 0.0
        a += 1.0 if (a - x) * (a - x) + dy2 > square else 0.0
        b -= 1.0 if (b - x) * (b - x) + dy2 > square else 0.0
        a, b = max(a, least_x), min(b, most_x)
        some = (row >= least_y) & (row <= most_y) & (a <= b)
        first[k] = np.int32(a) if some else np.int32(0)
        last[k] = np.int32(b) if some else np.int32(-1)


@numba.njit(nogil=True, cache=CACHE)
def _find_discs(  # type: ignore[no-untyped-def]
    patterns, origin, expected, detector, numbers, counts, masked, tables, sums, center, spread, cut
):
    """`find_discs` of unsigned or float patterns, or of parts of patterns that begin at an origin."""
    radius, reach, half, level, whole = numbers
    kind, around = sums.dtype.type, radius + MARGIN
    halves, rim, rim_gap, rim_inside, beyond = tables
    firsts, lasts = np.empty((2, int(2 * radius) + 2), np.int32)
    for i in range(len(patterns)):
        near_y, near_x = expected[i, 0] - origin[i, 0], expected[i, 1] - origin[i, 1]
        if not (abs(near_y) < 1e9 and abs(near_x) < 1e9):
            continue
        pattern, top, left = patterns[i], origin[i, 0], origin[i, 1]
        least_y, most_y = max(0, -top), min(pattern.shape[0], detector[0] - top) - 1
        least_x, most_x = max(0, -left), min(pattern.shape[1], detector[1] - left) - 1

        # the box that holds most, from sliding sums
        y0, y1 = (
            max(math.ceil(near_y - reach), least_y),
            min(math.floor(near_y + reach), most_y),
        )
        x0, x1 = (
            max(math.ceil(near_x - reach), least_x),
            min(math.floor(near_x + reach), most_x),
        )
        if y0 > y1 or x0 > x1:
            continue
        side, at_y, at_x = 2 * half + 1, -1, -1
        # sums over the rows of the box, of columns x0 - half to x1 + half
        cols = sums[0, : x1 - x0 + side]
        cols[:] = 0
        from_x, to_x = max(x0 - half, least_x), min(x1 + half, most_x) + 1
        inner = cols[from_x - x0 + half : to_x - x0 + half]
        for y in range(max(y0 - half, least_y), min(y0 + half, most_y) + 1):
            row = pattern[y, from_x:to_x]
            for x in range(inner.size):
                inner[x] = kind(inner[x] + kind(row[x]))
        box = kind(0)
        for y in range(y0, y1 + 1):
            if y > y0 and y + half <= most_y:
                row = pattern[y + half, from_x:to_x]
                for x in range(inner.size):
                    inner[x] = kind(inner[x] + kind(row[x]))
            if y > y0 and y - half - 1 >= least_y:
                row = pattern[y - half - 1, from_x:to_x]
                for x in range(inner.size):
                    inner[x] = kind(inner[x] - kind(row[x]))
            here = kind(0)
            for x in range(side):
                here = kind(here + cols[x])
            for x in range(x0, x1 + 1):
                if x > x0:
                    here = kind(here + cols[x - x0 + side - 1] - cols[x - x0 - 1])
                if here > box:
                    box, at_y, at_x = here, y, x
        if at_y < 0:
            continue
        n_box = 0
        for y in range(max(at_y - half, least_y), min(at_y + half, most_y) + 1):
            a, b = max(at_x - half, least_x), min(at_x + half, most_x)
            n_box += counts[y + top, a + left : b + left + 1].sum() if masked else b - a + 1
        if n_box == 0:
            continue

        # center of mass of capped values, and without the cap
        cap = float(box) / n_box / 2
        if whole:
            cap = max(1.0, math.floor(cap))
        most = kind(cap)
        # relative to a pixel, so that it is the same wherever the disc is
        off_y, off_x = 0.0, 0.0
        found, summed = False, False
        for turn in range(8):
            if not summed or off_y * off_y + off_x * off_x > 1:
                # about a pixel, row by row
                whole_y, whole_x = int(np.rint(off_y)), int(np.rint(off_x))
                at_y, at_x, off_y, off_x = (
                    at_y + whole_y,
                    at_x + whole_x,
                    off_y - whole_y,
                    off_x - whole_x,
                )
                summed = True
                sum_, sum_y, sum_x, all_, all_y, all_x = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
                tall = halves.size - 1
                sums[:, : 2 * tall + 1] = 0
                for k in range(max(-tall, least_y - at_y), min(tall, most_y - at_y) + 1):
                    a = max(at_x - halves[abs(k)], least_x)
                    b = min(at_x + halves[abs(k)], most_x) + 1
                    if a >= b:
                        continue
                    row = pattern[at_y + k, a:b]
                    capped = sums[0, a - at_x + tall : b - at_x + tall]
                    every = sums[1, a - at_x + tall : b - at_x + tall]
                    in_row, in_row_all = kind(0), kind(0)
                    for j in range(row.size):
                        high = kind(row[j])
                        low = kind(min(high, most))
                        in_row = kind(in_row + low)
                        in_row_all = kind(in_row_all + high)
                        capped[j] = kind(capped[j] + low)
                        every[j] = kind(every[j] + high)
                    sum_ += in_row
                    all_ += in_row_all
                    sum_y += float(in_row) * k
                    all_y += float(in_row_all) * k
                for j in range(2 * tall + 1):
                    sum_x += float(sums[0, j]) * (j - tall)
                    all_x += float(sums[1, j]) * (j - tall)
            # then only pixels at the edge can enter or leave
            off = math.sqrt(off_y * off_y + off_x * off_x)
            total, moment_y, moment_x = sum_, sum_y, sum_x
            total_all, moment_y_all, moment_x_all = all_, all_y, all_x
            for k in range(rim_gap.size):
                if rim_gap[k] > off:
                    break
                dy, dx = rim[k, 0], rim[k, 1]
                within = (dy - off_y) * (dy - off_y) + (dx - off_x) * (
                    dx - off_x
                ) <= around * around
                if (
                    within != rim_inside[k]
                    and least_y <= at_y + dy <= most_y
                    and least_x <= at_x + dx <= most_x
                ):
                    value = kind(pattern[at_y + dy, at_x + dx])
                    high, low = float(value), float(min(value, most))
                    if not within:
                        high, low = -high, -low
                    total += low
                    moment_y += low * dy
                    moment_x += low * dx
                    total_all += high
                    moment_y_all += high * dy
                    moment_x_all += high * dx
            if not total > 0:
                break
            before_y, before_x = off_y, off_x
            off_y, off_x = moment_y / total, moment_x / total
            if abs(at_y + off_y - near_y) > reach + 1 or abs(at_x + off_x - near_x) > reach + 1:
                break
            if turn == 7 or (off_y - before_y) ** 2 + (off_x - before_x) ** 2 < 1e-4:
                found = True
                break
        if not found:
            continue

        # a disc is three times as bright as the ring about it
        ring, n_ring = kind(0), 0
        around_y, around_x = at_y + int(np.rint(off_y)), at_x + int(np.rint(off_x))
        for k in range(len(beyond)):
            dy, dx = around_y + beyond[k, 0], around_x + beyond[k, 1]
            if least_y <= dy <= most_y and least_x <= dx <= most_x:
                ring += kind(pattern[dy, dx])
                n_ring += 1 if not masked or counts[dy + top, dx + left] else 0
        if n_ring > 0:
            least = 3 * max(0.0, float(ring) / n_ring - level) * n_box
            if whole:
                least += 3 * math.sqrt(least)
            if float(box) - level * n_box < least:
                continue
        center[i, 0], center[i, 1] = at_y + top + off_y, at_x + left + off_x
        spread[i] = 0.0
        if total_all > 0:
            uneven_y, uneven_x = moment_y_all / total_all - off_y, moment_x_all / total_all - off_x
            spread[i] = math.sqrt(uneven_y * uneven_y + uneven_x * uneven_x)

        # how much of the disc is masked or off the detector
        cy, cx = at_y + off_y, at_x + off_x
        if (
            masked
            or min(cy - least_y, most_y - cy) < radius
            or min(cx - least_x, most_x - cx) < radius
        ):
            base = math.ceil(cy - radius)
            _spans(cy, cx, radius, float(base), (-1e9, 1e9, -1e9, 1e9), firsts, lasts)
            n_disc, n_good = 0, 0
            for k in range(firsts.size):
                row = base + k + top
                n_disc += lasts[k] - firsts[k] + 1
                a, b = max(firsts[k] + left, 0), min(lasts[k] + left, detector[1] - 1)
                if 0 <= row < detector[0] and b >= a:
                    n_good += counts[row, a : b + 1].sum() if masked else b - a + 1
            cut[i] = n_good < 0.98 * n_disc


def direct_intensity(
    patterns: NDArray, centers: NDArray[np.float64], radius: float, out: NDArray[np.float64]
) -> None:
    """Sum of each pattern within ``radius + 1.5`` px of its center, into ``out`` (n,); exact for integers.

    ``patterns`` (n, ky, kx) are clean: unsigned or float without negative, NaN and infinite values, as `Intensity` gives them;
    ``centers`` (n, 2) are (y, x) in px, with a sum of 0 where NaN.

    Examples
    --------
    >>> found = np.zeros(2)
    >>> direct_intensity(np.ones((2, 9, 9), "u2"), np.array([[4, 4], [np.nan, 4]]), 0.5, found)
    >>> found.tolist()
    [13.0, 0.0]
    """
    zero = accumulator(patterns.dtype, patterns.shape[2]).type(0)  # of sums over a row
    _direct(patterns, centers, radius + MARGIN, zero, out)


@numba.njit(nogil=True, cache=CACHE, fastmath=_FAST)
def _direct(patterns, centers, around, zero, out):  # type: ignore[no-untyped-def]
    n, height, width = patterns.shape
    kind, bounds = type(zero), (0.0, height - 1.0, 0.0, width - 1.0)
    first, last = np.empty((2, int(2 * around) + 2), np.int32)
    for i in range(n):
        y, x = centers[i]
        total = 0.0
        if abs(y) < 1e9 and abs(x) < 1e9:  # not for NaN
            base = math.ceil(y - around)
            _spans(y, x, around, float(base), bounds, first, last)
            for k in range(first.size):
                if last[k] < 0:
                    continue
                row = patterns[i, base + k, first[k] : last[k] + 1]
                in_row = zero
                for j in range(row.size):
                    in_row = kind(in_row + kind(row[j]))
                total += in_row
        out[i] = total


def fit_rim(
    pattern: NDArray, center: tuple[float, float], radius: float, good: NDArray[np.bool_] | None
) -> tuple[float, float, float, int]:
    """Center (y, x) of a disc from its rim, by how much the radius is larger than given, and the sectors that tell it; see `fit_rims`.

    Examples
    --------
    >>> y, x = np.mgrid[:40, :40]
    >>> disc = 100 * np.clip(9.5 - np.hypot(y - 20.2, x - 18.7), 0, 1)
    >>> y, x, more, sectors = fit_rim(disc, (19.0, 19.0), 8.8, None)
    >>> round(y, 1), round(x, 1), round(more, 1), sectors
    (20.2, 18.7, 0.2, 16)
    """
    y, x, more, sectors = fit_rims(native(pattern), np.array([center], float), radius, good)[0]
    return float(y), float(x), float(more), int(sectors)


def fit_rims(
    patterns: NDArray,
    centers: NDArray[np.float64],
    radius: float,
    good: NDArray[np.bool_] | None,
) -> NDArray[np.float64]:
    """Fit the rim of a disc in every pattern: (n, 4) center (y, x), radius minus the given one, and number of sectors used.

    The annulus about the rim is divided into 16 sectors (32 from a radius of 20). How far the rim lies out in each follows from the
    intensity across it, between the levels inside and outside; a displacement of the disc and a change of its radius are fitted to
    them (Tukey's biweight), and the annulus moves along, up to 6 times. Sectors with more than a third of their pixels bad
    or off the detector, or without an edge, do not count; NaN and 0 where fewer than 3 are left.

    ``patterns`` (n, ky, kx) are of any real dtype, ``centers`` (n, 2) are within 2 px or so of the truth.
    """
    patterns, out = native(patterns), np.zeros((len(patterns), 4))
    good = np.ones(patterns.shape[1:], np.bool_) if good is None else good
    sectors = np.zeros((32 if radius >= 20 else 16, 8))
    _fit_rims(patterns, centers, float(radius), good, sectors, out)
    return out


@numba.njit(nogil=True, cache=CACHE)
def _fit_rims(patterns, centers, radius, good, sectors, out):  # type: ignore[no-untyped-def]
    n, height, width = patterns.shape
    n_sectors = sectors.shape[0]
    w = 2.0 if radius >= 8 else 1.5
    angle = 2 * np.pi / n_sectors
    design = np.empty((n_sectors, 5))  # sine, cosine, 1, displacement, 1 / variance
    for i in range(n):
        cy, cx = centers[i]
        used = 0
        for _ in range(6):
            used = 0
            if not (abs(cy) < 1e9 and abs(cx) < 1e9):
                break
            # sums over inside, numbers; outside, numbers; across the rim, numbers; across the rim of a disc of 1; all pixels
            sectors[:] = 0
            for y in range(math.ceil(cy - radius - 2 * w), math.floor(cy + radius + 2 * w) + 1):
                half = math.sqrt(max((radius + 2 * w) ** 2 - (y - cy) ** 2, 0.0))
                for x in range(math.ceil(cx - half), math.floor(cx + half) + 1):
                    d = math.sqrt((y - cy) ** 2 + (x - cx) ** 2)
                    if d < radius - 2 * w:
                        continue
                    turn = math.atan2(y - cy, x - cx) / angle
                    sector = sectors[math.floor(turn) % n_sectors]
                    sector[7] += 1
                    if y < 0 or x < 0 or y >= height or x >= width or not good[y, x]:
                        continue
                    value = np.float64(patterns[i, y, x])
                    if not ((value > 0) & (value < np.inf)):
                        value = np.float64(0)
                    k = 0 if d < radius - w else 2 if d > radius + w else 4
                    sector[k] += value
                    sector[k + 1] += 1
                    if k == 4:
                        sector[6] += min(max(radius - d + 0.5, 0.0), 1.0)
            n_in, n_out = sectors[:, 1].sum(), sectors[:, 3].sum()
            if n_in == 0 or n_out == 0:
                break
            inside, outside = sectors[:, 0].sum() / n_in, sectors[:, 2].sum() / n_out
            for s in range(n_sectors):
                in_sum, in_n, out_sum, out_n, edge, edge_n, disc, every = sectors[s]
                a = (in_sum + 4 * inside) / (in_n + 4)
                b = (out_sum + 2 * outside) / (out_n + 2)
                step = a - b
                bad = every - in_n - out_n - edge_n
                if edge_n == 0 or 3 * bad > every or not step > 0 or step < (inside - outside) / 4:
                    continue
                lever = edge_n / (2 * w)
                design[used, 0], design[used, 1] = (
                    math.sin((s + 0.5) * angle),
                    math.cos((s + 0.5) * angle),
                )
                design[used, 2] = 1
                design[used, 3] = ((edge - b * edge_n) / step - disc) / lever
                # counts scatter by their root; a pixel of the disc more, so that no sector is certain
                design[used, 4] = (step * lever) ** 2 / (edge + inside)
                used += 1
            if used < 3:
                break
            dy, dx, more = 0.0, 0.0, 0.0
            bisquare = np.ones(used)
            for _ in range(5):
                m = np.zeros((3, 4))
                for s in range(used):
                    weight = design[s, 4] * bisquare[s]
                    for p in range(3):
                        for q in range(4):
                            m[p, q] += weight * design[s, p] * design[s, q]
                for p in range(3):  # elimination; the matrix is positive definite
                    for q in range(p + 1, 3):
                        ratio = m[q, p] / m[p, p] if m[p, p] > 0 else 0.0
                        m[q] -= ratio * m[p]
                if not m[2, 2] > 1e-9 * m[0, 0]:
                    used = 0
                    break
                more = m[2, 3] / m[2, 2]
                dx = (m[1, 3] - m[1, 2] * more) / m[1, 1]
                dy = (m[0, 3] - m[0, 1] * dx - m[0, 2] * more) / m[0, 0]
                off = np.sqrt(design[:used, 4]) * np.abs(
                    design[:used, 3] - dy * design[:used, 0] - dx * design[:used, 1] - more
                )
                scale = 4.685 * 1.4826 * np.median(off)
                if scale > 0:
                    bisquare = np.maximum(1 - (off / scale) ** 2, 0.0) ** 2
            if used < 3:
                break
            cy, cx = cy + dy, cx + dx
            out[i, 2] = more
            if dy * dy + dx * dx < 1e-6:
                break
        out[i, 0], out[i, 1], out[i, 3] = cy, cx, used
        if used < 3:
            out[i] = np.nan
            out[i, 3] = 0
