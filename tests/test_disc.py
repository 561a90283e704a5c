"""The direct disc: against slow twins, and laws that hold whatever the batch, the place and the type."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_dask.kernels.disc import direct_intensity, find_discs, fit_rim, fit_rims
from stem_dask.kernels.intensity import native
from stem_dask.kernels.symmetry import OVERLAP, center_of_symmetry, symmetry


def disc(shape, center, radius):
    """An anti-aliased disc of height 1."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    return np.clip(radius + 0.5 - np.hypot(y - center[0], x - center[1]), 0, 1)


def drawn(rng, n, shape, radius, electrons=4000, haze=1.0, dtype="u2"):
    """Poisson patterns of a disc crossed by a dark line, and their centers."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    centers = np.array(shape) / 2 + rng.uniform(-2, 2, (n, 2))
    out = np.empty((n, *shape), dtype)
    for pattern, center in zip(out, centers, strict=True):
        mean = electrons / np.pi / radius**2 * disc(shape, center, radius) + haze
        mean[abs((y - center[0]) * 0.8 + (x - center[1]) * 0.6 - 1) < 0.8] *= 0.3
        pattern[...] = rng.poisson(mean)
    return out, centers


def slow_disc(pattern, expected, radius, reach, good, level=0.0):
    """`find_discs` of one pattern pixel by pixel, without what the rim adds: center, spread, whether the rim decides."""
    nothing = (np.full(2, np.nan), np.nan, False)
    height, width = pattern.shape
    values = pattern.astype(np.float64)
    values[~(np.isfinite(values) & (values > 0) & good)] = 0
    y, x = np.mgrid[:height, :width]
    half, most, place = max(1, round(0.7 * radius)), 0.0, None
    if not np.isfinite(expected).all():
        return nothing
    near = (abs(y - expected[0]) <= reach) & (abs(x - expected[1]) <= reach)
    for py, px in np.argwhere(near):
        box = np.s_[max(py - half, 0) : py + half + 1, max(px - half, 0) : px + half + 1]
        if values[box].sum() > most:
            most, place, n_box = values[box].sum(), (py, px), good[box].sum()
    if place is None:
        return nothing
    cap = most / n_box / 2
    if pattern.dtype.kind != "f":
        cap = max(1, math.floor(cap))
    center = np.array(place, np.float64)
    for _ in range(8):
        around = (y - center[0]) ** 2 + (x - center[1]) ** 2 <= (radius + 1.5) ** 2
        capped, raw = (np.where(around, some, 0) for some in (np.minimum(values, cap), values))
        if not capped.sum() > 0:
            return nothing
        before, center = (
            center,
            np.array([(y * capped).sum(), (x * capped).sum()]) / capped.sum(),
        )
        if (abs(center - expected) > reach + 1).any():
            return nothing
        if np.hypot(*(center - before)) < 0.01:
            break
    off = np.array([(y * raw).sum(), (x * raw).sum()]) / raw.sum() - center
    cy, cx = np.rint(center)
    distance = (y - cy) ** 2 + (x - cx) ** 2
    ring = (distance > (radius + 2) ** 2) & (distance <= (radius + 4) ** 2) & good
    if ring.any():
        least = 3 * max(0, values[ring].mean() - level) * n_box
        least += 3 * math.sqrt(least) if pattern.dtype.kind != "f" else 0
        if most - level * n_box < least:
            return nothing
    near = range(-math.ceil(radius) - 2, math.ceil(radius) + 3)
    lattice = [
        (int(cy) + dy, int(cx) + dx)
        for dy, dx in itertools.product(near, near)
        if np.hypot(cy + dy - center[0], cx + dx - center[1]) <= radius
    ]
    n_good = sum(0 <= v < height and 0 <= u < width and good[v, u] for v, u in lattice)
    return center, np.hypot(*off), n_good < 0.98 * len(lattice)


def slow_rim(pattern, center, radius, good):
    """`fit_rim` with whole arrays."""
    w, n_sectors = (2.0 if radius >= 8 else 1.5), (32 if radius >= 20 else 16)
    pad = math.ceil(radius + 2 * w) + 8
    values = pattern.astype(np.float64)
    values[~(np.isfinite(values) & (values > 0))] = 0
    values, counts = np.pad(values, pad), np.pad(good, pad)
    y, x = np.mgrid[: values.shape[0], : values.shape[1]] - float(pad)
    center, more, used = np.array(center, np.float64), np.nan, 0
    for _ in range(6):
        d = np.hypot(y - center[0], x - center[1])
        sector = (
            np.floor(np.arctan2(y - center[0], x - center[1]) * n_sectors / (2 * np.pi)) % n_sectors
        )
        annulus = abs(d - radius) <= 2 * w
        inner = annulus & (d < radius - w) & counts
        outer = annulus & (d > radius + w) & counts
        edge = (abs(d - radius) <= w) & counts
        if not (inner.any() and outer.any()):
            return (np.nan,) * 3 + (0,)
        inside, outside = values[inner].mean(), values[outer].mean()
        rows = []
        for s in range(n_sectors):
            here = sector == s
            a = (values[inner & here].sum() + 4 * inside) / ((inner & here).sum() + 4)
            b = (values[outer & here].sum() + 2 * outside) / ((outer & here).sum() + 2)
            n = (edge & here).sum()
            bad = (annulus & here & ~counts).sum()
            if (
                n == 0
                or 3 * bad > (annulus & here).sum()
                or a <= b
                or a - b < (inside - outside) / 4
            ):
                continue
            total = values[edge & here].sum()
            ideal = np.clip(radius - d[edge & here] + 0.5, 0, 1).sum()
            lever = n / (2 * w)
            angle = (s + 0.5) * 2 * np.pi / n_sectors
            weight = ((a - b) * lever) ** 2 / (total + inside)
            rows.append(
                [
                    np.sin(angle),
                    np.cos(angle),
                    1,
                    ((total - b * n) / (a - b) - ideal) / lever,
                    weight,
                ]
            )
        used = len(rows)
        if used < 3:
            return (np.nan,) * 3 + (0,)
        rows = np.array(rows)
        design, moved, weight, kept = rows[:, :3], rows[:, 3], rows[:, 4], np.ones(used)
        for _ in range(5):
            root = np.sqrt(weight * kept)
            fit = np.linalg.lstsq(design * root[:, None], moved * root)[0]
            off = np.sqrt(weight) * abs(moved - design @ fit)
            scale = 4.685 * 1.4826 * np.median(off)
            kept = np.maximum(1 - (off / scale) ** 2, 0) ** 2 if scale > 0 else kept
        center, more = center + fit[:2], fit[2]
        if fit[0] ** 2 + fit[1] ** 2 < 1e-6:
            break
    return *center, more, used


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "f4", "f8"])
@pytest.mark.parametrize("masked", [False, True])
def test_discs_are_those_of_the_slow_twin(dtype, masked):
    rng = np.random.default_rng(3)
    shape, n = (31, 36), 12
    for radius, reach in ((3.5, 3.0), (5.0, 4.2), (2.2, 6.0)):
        patterns, centers = drawn(rng, n, shape, radius, electrons=1500)
        if np.dtype(dtype).kind == "f":
            patterns = patterns + rng.uniform(0, 0.5, patterns.shape)
            patterns[:, 3, 4], patterns[:, 14, 15], patterns[:, 5, 6] = np.nan, np.inf, -7
        patterns = patterns.astype(dtype)
        if dtype == "i2":
            patterns[:, ::5, ::7] = -3
        patterns[1] = 0
        expected = centers + rng.uniform(-2, 2, (n, 2))
        expected[2], expected[3] = [np.nan, 3], [-40, 500]
        # at an edge, in a corner, off the detector by a bit
        for i, at in enumerate([(1.3, 15), (29.5, 34.2), (-1.2, 9), (16, 36.1)], start=4):
            patterns[i] = (rng.uniform(80, 99, shape) * disc(shape, at, radius) + 1).astype(dtype)
            expected[i] = at
        good = rng.uniform(size=shape) > (0.1 if masked else -1)
        found = find_discs(
            native(patterns), expected, radius=radius, reach=reach, good=good if masked else None, level=0.5
        )  # fmt: skip
        for i, pattern in enumerate(patterns):
            center, spread, cut = slow_disc(pattern, expected[i], radius, reach, good, 0.5)
            if cut:
                *center, _, sectors = slow_rim(pattern, center, radius, good)
                if sectors <= 5 or (abs(np.array(center) - expected[i]) > reach + 1).any():
                    center, spread = [np.nan, np.nan], np.nan
            # iterations of the rim enlarge what rounding did to sums of floats
            np.testing.assert_allclose(found.center[i], center, rtol=0, atol=1e-6 if cut else 1e-9)
            np.testing.assert_allclose(found.spread[i], spread, rtol=0, atol=1e-9)
        assert masked or np.isfinite(found.center[[0, 8, 9, 10, 11]]).all()
        assert np.isnan(found.center[1:4]).all()


@pytest.mark.parametrize("dtype", ["u2", "i4", "f4"])
def test_centers_do_not_depend_on_the_batch_nor_on_where_the_disc_is(dtype):
    rng = np.random.default_rng(5)
    patterns, centers = drawn(rng, 40, (40, 44), 5.3, electrons=600)
    patterns = native(patterns.astype(dtype))
    expected = np.rint(centers) + rng.uniform(-1, 1, centers.shape)
    whole = find_discs(patterns, expected, radius=5.3, reach=3.5, good=None)
    for size in (1, 3, 17):
        parts = [
            find_discs(
                patterns[i : i + size], expected[i : i + size], radius=5.3, reach=3.5, good=None
            )
            for i in range(0, 40, size)
        ]
        assert np.concatenate([part.center for part in parts]).tobytes() == whole.center.tobytes()
        assert np.concatenate([part.spread for part in parts]).tobytes() == whole.spread.tobytes()
    moved = native(np.pad(patterns, ((0, 0), (7, 2), (3, 11))))
    found = find_discs(moved, expected + np.array([7, 3]), radius=5.3, reach=3.5, good=None)
    np.testing.assert_allclose(found.center - [7, 3], whole.center, rtol=0, atol=1e-10)


def test_counts_of_any_integer_type_give_the_same_bytes():
    patterns, centers = drawn(np.random.default_rng(7), 12, (36, 40), 4.4, electrons=900)
    found = [
        find_discs(native(patterns.astype(dtype)), centers, radius=4.4, reach=3.0, good=None)
        for dtype in ("u1", "u2", "u4", "u8", "i2", "i4", "i8")
    ]
    for other in found[1:]:
        assert other.center.tobytes() == found[0].center.tobytes()
        assert other.spread.tobytes() == found[0].spread.tobytes()


def test_large_counts_stay_exact():
    patterns, centers = drawn(np.random.default_rng(8), 6, (36, 40), 4.4, electrons=900)
    found = find_discs(native(patterns), centers, radius=4.4, reach=3.0, good=None)
    # capped at half of the level, which is a whole number for both where every count is even
    many = find_discs(
        native(patterns.astype("u4") * 2**20), centers, radius=4.4, reach=3.0, good=None
    )
    np.testing.assert_allclose(many.center, found.center, atol=0.05)
    full = np.full((1, 300, 300), 65535, "u2")
    flat = find_discs(
        native(full), np.array([[150.0, 150.0]]), radius=140.0, reach=0.5, good=None, level=65535
    )
    assert flat.center.tolist() == [[150, 150]]
    assert flat.spread.tolist() == [0]


@given(
    st.integers(0, 2**32), st.floats(0.6, 9), st.floats(-3, 30), st.floats(-3, 34), st.floats(0, 8), st.booleans()
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_noise_alone_gives_what_the_twin_gives(seed, radius, y, x, reach, masked):
    rng = np.random.default_rng(seed)
    pattern = rng.poisson(rng.uniform(0, 3), (26, 30)).astype("u2")
    good = rng.uniform(size=(26, 30)) > 0.1 * masked
    found = find_discs(
        native(pattern), np.array([[y, x]]), radius=radius, reach=reach, good=good, level=9
    )
    center, spread, cut = slow_disc(pattern, np.array([y, x]), radius, reach, good, 9)
    if not cut:
        np.testing.assert_allclose(found.center[0], center, rtol=0, atol=1e-9)
        np.testing.assert_allclose(found.spread[0], spread, rtol=0, atol=1e-9)


def test_lines_within_the_disc_weigh_nothing():
    patterns, centers = drawn(np.random.default_rng(1), 50, (64, 60), 6.3, electrons=20000)
    found = find_discs(native(patterns), centers + 1, radius=6.3, reach=3.0, good=None)
    off = np.hypot(*(found.center - centers).T)
    assert np.median(off) < 0.2
    assert np.median(found.spread) > 0.05


@pytest.mark.parametrize("radius", [9.5, 22.0])
def test_the_rim_finds_a_disc_under_a_cross(radius):
    rng = np.random.default_rng(2)
    shape = (4 * round(radius) + 20,) * 2
    y, x = np.mgrid[: shape[0], : shape[1]]
    bad = (abs(y - shape[0] // 2) <= 1) | (abs(x - shape[1] // 2) <= 1)
    patterns, centers = drawn(rng, 40, shape, radius, electrons=20000, haze=0.2)
    patterns[:, bad] = 0
    found = find_discs(native(patterns), centers + 0.7, radius=radius, reach=3.0, good=~bad)
    off = np.hypot(*(found.center - centers).T)
    assert np.median(off) < 0.2
    assert np.percentile(off, 95) < 0.4
    assert off.max() < 0.6


@pytest.mark.parametrize(("radius", "sectors"), [(4.3, 16), (9.5, 16), (23.0, 32)])
def test_the_rim_is_that_of_the_slow_twin(radius, sectors):
    rng = np.random.default_rng(4)
    shape = (60, 64)
    patterns, centers = drawn(rng, 6, shape, radius, electrons=8000)
    good = rng.uniform(size=shape) > 0.05
    good[:, 40] = False
    found = fit_rims(native(patterns), centers + 0.5, radius - 0.3, good)
    for pattern, center, rim in zip(patterns, centers, found, strict=True):
        slow = slow_rim(pattern, center + 0.5, radius - 0.3, good)
        np.testing.assert_allclose(rim, slow, rtol=0, atol=1e-6)
        assert fit_rim(pattern, tuple(center + 0.5), radius - 0.3, good) == tuple(rim)
    assert (found[:, 3] <= sectors).all()
    np.testing.assert_allclose(found[:, :2], centers, atol=0.4)


def test_no_rim_is_nan():
    for center in ((np.nan, 4.0), (500.0, 4.0)):
        *rim, sectors = fit_rim(np.ones((20, 20)), center, 4.0, None)
        assert np.isnan(rim).all()
        assert sectors == 0


def test_nothing_is_found_where_nothing_is():
    empty, flat = np.zeros((20, 20)), np.full((20, 20), 5.0)
    lone = disc((20, 20), (4, 4), 2.5)
    for pattern, at in ((empty, (9, 9)), (flat, (9, 9)), (lone, (14, 14)), (empty - 1, (9, 9))):
        for dtype in ("f4", "i2"):
            found = find_discs(
                native((8 * pattern).astype(dtype)), np.array([at], float), radius=2.5, reach=3.0, good=None
            )  # fmt: skip
            assert np.isnan(found.center).all()
            assert np.isnan(found.spread).all()


@given(st.integers(0, 2**32), st.floats(0.5, 14), st.sampled_from(["u1", "u2", "u4", "f4"]))
@settings(max_examples=40, deadline=None)
def test_direct_intensity_sums_the_pixels_within(seed, radius, dtype):
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 250, (5, 19, 23)).astype(dtype)
    centers = rng.uniform(-4, 25, (5, 2))
    centers[1], centers[2] = np.nan, np.rint(centers[2])
    found, (y, x) = np.empty(5), np.mgrid[:19, :23]
    direct_intensity(native(patterns), centers, radius, found)
    for value, pattern, center in zip(found, patterns, centers, strict=True):
        within = (y - center[0]) ** 2 + (x - center[1]) ** 2 <= (radius + 1.5) ** 2
        assert value == pattern[within].sum(dtype=np.float64)


def test_symmetry_is_the_correlation_of_overlapping_good_pixels():
    rng = np.random.default_rng(0)
    image, good = rng.uniform(size=(9, 11)), rng.uniform(size=(9, 11)) > 0.2
    found = symmetry(np.where(good, image, np.nan), good)
    for i, j in itertools.product(range(17), range(21)):
        pairs = [
            (image[y, x], image[i - y, j - x])
            for y, x in itertools.product(range(9), range(11))
            if 0 <= i - y < 9 and 0 <= j - x < 11 and good[y, x] and good[i - y, j - x]
        ]
        if len(pairs) < OVERLAP * good.sum():
            assert found[i, j] == -np.inf
        else:
            assert found[i, j] == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1], abs=1e-9)


def test_the_center_of_symmetry_under_a_stop():
    rng = np.random.default_rng(6)
    y, x = np.mgrid[:64, :70]
    off = []
    for _ in range(10):
        center = np.array([31.0, 35.0]) + rng.uniform(-2, 2, 2)
        angle, r = np.arctan2(y - center[0], x - center[1]), np.hypot(y - center[0], x - center[1])
        mean = 40 * np.exp(-(((r - 20) / 3) ** 2)) * (1 + 0.5 * np.cos(4 * angle)) + 20 * np.exp(
            -r / 8
        )
        good = (abs(y - 32) > 5) | (x > 40)
        image = np.where(good, rng.poisson(mean), 0).astype(float)
        off.append(np.array(center_of_symmetry(image, (31, 35), good)) - center)
    assert np.hypot(*np.array(off).T).max() < 0.3
    assert np.isnan(center_of_symmetry(np.ones((9, 9)), (4, 4), np.zeros((9, 9), bool))).all()
    near = center_of_symmetry(image, (27, 29), good, reach=3.0)
    assert abs(near[0] - 27) <= 3.25
    assert abs(near[1] - 29) <= 3.25
