"""Every kernel against its slow twin: types, layouts, odd values, edges, ties."""

import itertools
import json

import numpy as np
import pytest
import twins
from hypothesis import given, settings
from hypothesis import strategies as st

import stem_dask as sd
from stem_dask.kernels.analysis import analyze_patterns, largest_radius
from stem_dask.kernels.crop import crop_patterns, window_intensity
from stem_dask.kernels.downsample import (
    downsample_patterns,
    result_dtype,
    thumbnail_cell,
    thumbnails,
)
from stem_dask.kernels.intensity import accumulator, native
from stem_dask.kernels.pixels import (
    add_lit,
    correct_patterns,
    dead_pixels,
    fill_bad,
    hot_pixels,
    neighbours,
    stop_region,
)
from stem_dask.stages.blocks import sampled

SHAPE = (3, 5, 17, 22)
DTYPES = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "f2", "f4", "f8"]
METRICS = ["square", "circle"]
#: rounding of float64 sums, relative to the total
ROUNDING = 1e-12


def make(dtype, shape=SHAPE, seed=0):
    """Noise and a beam; negative values in signed types, NaN and infinities in floats; the second one is empty."""
    rng = np.random.default_rng(seed)
    data = rng.poisson(1.5, shape).astype(float)
    data[..., shape[-2] // 3, shape[-1] // 2] += 60
    kind = np.dtype(dtype).kind
    if kind in "if":
        data -= rng.integers(0, 3, shape)
    if kind == "f":
        data += rng.integers(0, 4, shape) / 4
        for odd in (np.nan, np.inf, -np.inf):
            data[rng.random(shape) < 0.02] = odd
    data.reshape(-1, *shape[-2:])[1] = 0
    return (data > 1).astype("?") if kind == "b" else data.astype(dtype)


def assert_analysis(block, *, target=0.9, threshold=0.0, metric="square", center=None):
    """Compare all that `analyze_patterns` finds with the twins."""
    found = analyze_patterns(
        block, target_retention=target, threshold=threshold, center=center, metric=metric
    )
    patterns = np.asarray(block).reshape(-1, *block.shape[-2:])
    known = twins.Analysis(
        patterns, target=target, threshold=threshold, metric=metric, given=center
    )
    exact = block.dtype.kind != "f"
    near = {"rtol": 0 if exact else ROUNDING, "atol": 0}
    np.testing.assert_allclose(found.total, np.array(known.totals, float), **near)
    np.testing.assert_allclose(found.com, known.com, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(found.center, known.centers, rtol=ROUNDING, atol=ROUNDING)
    n_radii = largest_radius(*block.shape[-2:], metric) + 1
    assert found.profile.shape == (len(patterns), n_radii)
    assert found.profile.dtype == np.float32
    for i, counted in enumerate(known.counted):
        if not known.filled[i]:
            assert np.isnan(found.radius[i])
            assert np.isnan(found.profile[i]).all()
            continue
        middle = twins.window_center(known.centers[i])
        assert found.radius[i] == known.radii[i]
        share = np.array(twins.profile(counted, middle, n_radii, metric))
        assert (found.profile[i] <= share + ROUNDING).all()
        np.testing.assert_allclose(found.profile[i], share, rtol=2e-7, atol=ROUNDING)
        assert found.profile[i, -1] == 1
    counted = np.array(known.counted)
    np.testing.assert_allclose(found.sum_pattern, counted.sum(0).astype(float), **near)
    assert found.sum_pattern.dtype == ("u8" if exact else "f8")
    np.testing.assert_array_equal(found.max_pattern, counted.max(0).astype(float))
    odd = [twins.odd_pixels(pattern, threshold) for pattern in patterns]
    np.testing.assert_array_equal(found.odd, np.sum([counts for counts, _ in odd], axis=0))
    assert found.negative_sum == pytest.approx(sum(total for _, total in odd), rel=ROUNDING)
    np.testing.assert_allclose(
        window_intensity(block, threshold=threshold), np.array(known.totals, float), **near
    )
    return found


# --- analysis -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_analysis_equals_its_twin_for_every_type(dtype, metric):
    found = assert_analysis(make(dtype), metric=metric)
    assert found.total[1] == 0


@pytest.mark.parametrize("threshold", [1, 1.5, 2.25, 3, 60.5])
@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "i2", "f4", "f8"])
def test_values_below_the_threshold_do_not_count(dtype, threshold):
    assert_analysis(make(dtype), threshold=threshold)


@pytest.mark.parametrize("dtype", ["u1", "i1"])
def test_a_threshold_no_value_can_reach_leaves_nothing(dtype):
    block = np.full((1, 3, 4), np.iinfo(dtype).max, dtype)
    found = assert_analysis(block, threshold=float(np.iinfo(dtype).max))
    assert found.total[0] == 12 * float(np.iinfo(dtype).max)
    with pytest.raises(ValueError, match=f"threshold 300 is above .* the largest {block.dtype}"):
        analyze_patterns(block, target_retention=0.9, threshold=300, center=None, metric="square")
    with pytest.raises(ValueError, match="lower the threshold"):
        window_intensity(block, threshold=300)


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">f2", ">f4", ">f8"])
def test_big_endian_data_give_the_same(dtype):
    assert_analysis(make(dtype))
    block = make(dtype)
    cut = crop_patterns(block.reshape(-1, 17, 22), np.full(15, -1), np.full(15, 3), (6, 8))
    assert cut.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(cut[:, 1:], block.reshape(-1, 17, 22)[:, :5, 3:11])


def unaligned(block):
    raw = np.zeros(block.nbytes + 1, "u1")
    raw[1:] = block.view("u1").ravel()
    return raw[1:].view(block.dtype).reshape(block.shape)


LAYOUTS = {
    "fortran": np.asfortranarray,
    "every second": lambda block: np.repeat(np.repeat(block, 2, 1), 2, 3)[:, ::2, :, ::2],
    "transposed": lambda block: np.ascontiguousarray(block.transpose(0, 1, 3, 2)).swapaxes(2, 3),
    "reversed": lambda block: np.ascontiguousarray(block[:, :, ::-1, ::-1])[:, :, ::-1, ::-1],
    "unaligned": unaligned,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_memory_does_not_matter(layout):
    block = make("f4")
    view = LAYOUTS[layout](block)
    assert view.flags.c_contiguous == (layout == "unaligned")
    np.testing.assert_array_equal(view, block)
    expected = assert_analysis(block)
    for a, b in zip(assert_analysis(view), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for method in ("bin", "stride", "gauss", "fft"):
        np.testing.assert_array_equal(
            downsample_patterns(view, 3, method=method),
            downsample_patterns(block, 3, method=method),
        )


def test_read_only_blocks_are_taken_as_they_are_and_left_as_they_were():
    block = make("u2")
    before = block.copy()
    block.setflags(write=False)
    assert np.shares_memory(native(block), block)
    assert_analysis(block, threshold=2)
    crop_patterns(block, np.zeros(15, int), np.zeros(15, int), (4, 4))
    for method in ("bin", "stride", "gauss", "fft"):
        downsample_patterns(block, 2, method=method)
    np.testing.assert_array_equal(block, before)
    writable = make("u2")
    native(writable)
    assert writable.flags.writeable


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_beams_at_every_edge_and_corner(dtype, metric):
    height, width = SHAPE[-2:]
    places = itertools.product((0, height // 2, height - 1), (0, width // 2, width - 1))
    block = np.zeros((9, height, width), dtype)
    for pattern, (y, x) in zip(block, places, strict=True):
        pattern[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = 10
        pattern[y, x] = 100
        pattern[(y + 5) % height, (x + 7) % width] = 3
    assert_analysis(block, metric=metric, target=0.95)
    assert_analysis(block, metric=metric, target=1.0)


@pytest.mark.parametrize("metric", METRICS)
def test_a_single_pixel_pattern_has_the_smallest_radius(metric):
    block = np.zeros((2, 5, 7), "u2")
    block[0, 0, 6], block[1, 4, 0] = 3, 1
    found = assert_analysis(block, metric=metric, target=1.0)
    assert found.radius.tolist() == [1 if metric == "square" else 0] * 2
    assert found.center.tolist() == [[0, 6], [4, 0]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("detector", [(1, 1), (1, 9), (8, 1), (2, 3)])
def test_thin_detectors(detector, metric):
    for dtype in ("u2", "f4"):
        assert_analysis(make(dtype, (2, 2, *detector), seed=3), metric=metric, target=1.0)
    with_center = (detector[0] // 2, detector[1] // 2)
    assert_analysis(make("u2", (4, *detector)), metric=metric, center=with_center)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "center", [(8.0, 11.0), (0.0, 21.0), (16.0, 0.0), (2.5, 3.5), (2.51, 8.49)]
)
def test_given_centers_are_rounded_half_to_even(center, metric):
    found = assert_analysis(make("u2"), metric=metric, center=center)
    assert (found.center == center).all()
    assert np.isnan(found.com[1]).all()


@pytest.mark.parametrize("dtype", ["u2", "i4", "f4", "f8"])
def test_the_radius_is_decided_by_at_least(dtype):
    block = np.zeros((1, 16, 20), dtype)
    block[0, 8, 10], block[0, 0, 0] = 98, 2
    options = {"threshold": 0, "center": (8, 10), "metric": "square"}
    tie = analyze_patterns(block, target_retention=0.98, **options)
    assert tie.radius[0] == 1
    above = analyze_patterns(block, target_retention=np.nextafter(0.98, 1), **options)
    assert above.radius[0] == 10  # column 0 lies in the window from column 10 - r
    block[0, 8, 10] = 97
    assert analyze_patterns(block, target_retention=0.98, **options).radius[0] == 10


@pytest.mark.parametrize("metric", METRICS)
def test_target_one_on_floats_keeps_every_last_bit(metric):
    rng = np.random.default_rng(5)
    block = rng.random((40, 15, 19)) ** 4
    block[:, :4] = 0
    block[:, :, 16:] = 0
    found = assert_analysis(block, metric=metric, target=1.0)
    for i, pattern in enumerate(block):
        middle = twins.window_center(found.center[i])
        inside = twins.within(pattern, middle, int(found.radius[i]), metric)
        assert inside == pytest.approx(pattern.sum(), rel=1e-15)


def test_large_integers_are_summed_exactly():
    block = np.full((2, 17, 22), 2**32 - 1, "u4")
    block[1, 3, 4] = 2**32 - 2
    found = assert_analysis(block)
    assert found.total.tolist() == [374 * (2**32 - 1), 374 * (2**32 - 1) - 1]
    assert found.sum_pattern[3, 4] == 2 * (2**32 - 1) - 1
    wide = np.zeros((1, 3, 5), "u8")
    wide[0, 1, 1], wide[0, 1, 2] = 2**52, 1
    assert assert_analysis(wide).total[0] == 2**52 + 1


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("u8", (2**63, 2**63, 5)), ("i8", (2**62, 2**62, 2**62, 2**62, 1)), ("f8", (1e308, 1e308)),
     ("f8", (1.7e308,))],
)  # fmt: skip
@pytest.mark.parametrize("metric", METRICS)
def test_sums_that_overflow_are_refused(dtype, values, metric):
    block = np.zeros((2, 6, 7), dtype)
    block[1].flat[20 : 20 + len(values)] = values
    with pytest.raises(OverflowError, match="pattern 1 of the block"):
        analyze_patterns(block, target_retention=0.9, threshold=0, center=None, metric=metric)


def test_accumulators_hold_the_largest_sums():
    assert accumulator(np.dtype("u2"), 65536) == "u4"
    assert accumulator(np.dtype("u2"), 65538) == "u8"
    assert accumulator(np.dtype("i2"), 131076) == "u4"
    assert accumulator(np.dtype("i2"), 131080) == "u8"
    assert accumulator(np.dtype("i8"), 1) == "u8"


# --- crop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_crop_equals_its_twin(dtype):
    block = make(dtype)
    starts = [-30, -22, -9, -1, 0, 2, 11, 16, 21, 40]
    origins = np.array(list(itertools.islice(itertools.product(starts, starts), 0, 100, 7)))[:15]
    for shape in ((6, 9), (1, 1), (17, 22), (25, 30)):
        out = crop_patterns(block, origins[:, 0], origins[:, 1], shape)
        assert out.dtype == block.dtype
        known = [
            twins.crop(pattern, origin, shape)
            for pattern, origin in zip(block.reshape(-1, 17, 22), origins, strict=True)
        ]
        np.testing.assert_array_equal(out, np.array(known))


# --- downsampling -------------------------------------------------------------------------------


def finite(dtype, shape=SHAPE):
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(make(dtype, shape), posinf=1, neginf=-1)


@pytest.mark.parametrize("factor", [2, 3, 5, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_downsampling_equals_its_twins(dtype, factor):
    block = finite(dtype)
    patterns = block.reshape(-1, *block.shape[-2:])
    lead, small = block.shape[:-2], (17 // factor, 22 // factor)
    float_type = "f8" if dtype == "f8" else "f4"
    known = {
        ("bin", "mean"): [twins.bin_pattern(p, factor, "mean") for p in patterns],
        ("bin", "sum"): [twins.bin_pattern(p, factor, "sum") for p in patterns],
        ("stride", "mean"): [twins.stride_pattern(p, factor) for p in patterns],
        ("gauss", "mean"): [twins.gauss_pattern(p, factor) for p in patterns],
        ("fft", "mean"): [twins.fft_pattern(p, factor) for p in patterns],
    }
    for (method, reduce), expected in known.items():
        out = downsample_patterns(block, factor, method=method, reduce=reduce)
        assert out.shape == (*lead, *small)
        assert out.dtype == result_dtype(block.dtype, factor, method, reduce)
        exact = method == "stride" or (reduce == "sum" and block.dtype.kind != "f")
        if method != "stride" and not exact:
            assert out.dtype == float_type
        tolerance = 0 if exact else 1e-12 if out.dtype == "f8" else 3e-6
        np.testing.assert_allclose(
            out.reshape(-1, *small).astype(float),
            np.array(expected).astype(float),
            rtol=tolerance,
            atol=tolerance * 20,
        )


def test_gauss_takes_a_sigma():
    block = finite("f8")[:1, :1]
    out = downsample_patterns(block, 2, method="gauss", sigma=1.7)
    np.testing.assert_allclose(out[0, 0], twins.gauss_pattern(block[0, 0], 2, 1.7), rtol=1e-10)
    assert not np.allclose(out, downsample_patterns(block, 2, method="gauss"))


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("detector", [(6, 12), (9, 10), (4, 7), (13, 6)])
def test_fft_keeps_the_zero_frequency_on_even_and_odd_axes(detector, factor):
    block = finite("f8", (2, *detector))
    known = [twins.fft_pattern(pattern, factor) for pattern in block]
    out = downsample_patterns(block, factor, method="fft")
    np.testing.assert_allclose(out, known, atol=1e-12)
    whole = block[:, : detector[0] // factor * factor, : detector[1] // factor * factor]
    np.testing.assert_allclose(out.mean((1, 2)), whole.mean((1, 2)), rtol=1e-12)


def test_sums_never_wrap():
    for dtype in ("?", "u1", "u2", "u4", "i1", "i2", "i4"):
        for factor in (2, 3, 16, 20):
            low, high = (0, 1) if dtype == "?" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
            for value in (low, high):
                out = downsample_patterns(
                    np.full((1, 20, 40), value, dtype), factor, method="bin", reduce="sum"
                )
                assert (out == int(value) * factor**2).all()
    types = {("?", 15): "u1", ("?", 16): "u2", ("u1", 16): "u2", ("u1", 17): "u4", ("i2", 2): "i4"}
    for (dtype, factor), wide in types.items():
        assert result_dtype(np.dtype(dtype), factor, "bin", "sum") == wide
    assert result_dtype(np.dtype(">u4"), 2, "bin", "sum") == "u8"
    assert result_dtype(np.dtype("f4"), 2, "bin", "sum") == "f4"
    assert result_dtype(np.dtype(">i2"), 2, "stride", "mean") == "i2"


def test_means_keep_constants_large_integers_nan_and_infinities():
    for method in ("bin", "stride", "gauss", "fft"):
        out = downsample_patterns(np.full((2, 9, 13), 7, "u2"), 4, method=method)
        np.testing.assert_allclose(out, np.full((2, 2, 3), 7), rtol=1e-6)
    for dtype in ("u8", "i8"):
        largest = np.iinfo(dtype).max
        out = downsample_patterns(np.full((1, 4, 6), largest, dtype), 2, method="bin")
        np.testing.assert_allclose(out, float(largest), rtol=1e-6)
    block = np.ones((1, 4, 6), "f4")
    block[0, 0, 0], block[0, 2, 2], block[0, 3, 4] = np.nan, np.inf, -np.inf
    out = downsample_patterns(block, 2, method="bin")
    np.testing.assert_array_equal(out[0], [[np.nan, 1, 1], [1, np.inf, -np.inf]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [5, 7, 64])
def test_thumbnails(dtype, side):
    patterns = make(dtype).reshape(-1, *SHAPE[-2:])
    cell = thumbnail_cell(SHAPE[-2:], side)
    assert max(SHAPE[-2:]) / cell <= side
    found = thumbnails(patterns, cell)
    for pattern, image in zip(patterns, found, strict=True):
        mean = np.zeros(image.shape)
        for y, x in np.ndindex(mean.shape):
            part = pattern[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].astype(float)
            mean[y, x] = max(0, np.where(np.isfinite(part), part, 0).mean())
        level = np.log1p(mean)
        expected = 255 * level / (level.max() or 1)
        assert np.abs(image - expected).max() <= 0.51  # rounded, of float32


def test_the_thumbnail_of_a_strip():
    cell = thumbnail_cell((3, 1000))
    assert thumbnails(np.ones((2, 3, 1000), "u2"), cell).shape == (2, 1, 333)


def test_factor_one_and_unknown_methods():
    block = make(">u2")
    np.testing.assert_array_equal(downsample_patterns(block, 1, method="bin"), block)
    with pytest.raises(ValueError, match="method is 'cubic'; expected one of bin, stride"):
        downsample_patterns(block, 2, method="cubic")


# --- dark and gain ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["?", "u1", ">u2", "i4", "u8", "f2", "f4", ">f8"])
@pytest.mark.parametrize("given", ["dark", "gain", "both"])
def test_dark_and_gain(dtype, given):
    block = finite(dtype) if dtype != "?" else finite("u1") > 3
    block.flags.writeable = False
    rng = np.random.default_rng(3)
    dark = None if given == "gain" else rng.normal(5, 2, SHAPE[-2:]).astype("f4")
    gain = None if given == "dark" else rng.uniform(0.5, 2, SHAPE[-2:]).astype("f4")
    known = [twins.correct(p, dark, gain) for p in block.reshape(-1, *SHAPE[-2:])]
    found = correct_patterns(block, dark, gain)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.reshape(-1, *SHAPE[-2:]), known)


def test_large_counts_keep_their_digits_and_infinite_ones_give_no_warning():
    block, dark = np.array([[[2**31 + 1]]], "u4"), np.array([[2**31]], "f4")
    assert correct_patterns(block, dark, None)[0, 0, 0] == 1
    block = np.array([[[1e300, np.nan, np.inf]]])
    found = correct_patterns(block, np.zeros((1, 3), "f4"), np.ones((1, 3), "f4"))
    np.testing.assert_array_equal(found, [[[np.inf, np.nan, np.inf]]])


# --- hot pixels ---------------------------------------------------------------------------------


def hot(patterns):
    lit = (patterns > 0).sum(0)
    return hot_pixels(patterns.sum(0) / len(patterns), lit, len(patterns), len(patterns))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 1), (2, 2), (3, 3), (9, 13)])
def test_hot_pixels(shape):
    rng = np.random.default_rng(4)
    n_found = 0
    for n in (1, 2, 7, 40, 300):
        rates = rng.choice([0.0, 0.02, 1.0, 9.0, 200.0], shape, p=[0.4, 0.3, 0.2, 0.05, 0.05])
        patterns = rng.poisson(rates, (n, *shape))
        found = hot(patterns)
        np.testing.assert_array_equal(found, twins.hot(patterns))
        n_found += found.sum()
    assert n_found or shape != (9, 13)


CLUSTERS = {
    "one": [(7, 7)],
    "a pair": [(7, 7), (7, 8)],
    "a pair one above the other": [(7, 7), (8, 7)],
    "a diagonal pair": [(7, 7), (8, 8)],
    "a square": [(7, 7), (7, 8), (8, 7), (8, 8)],
    "three in a row": [(7, 7), (7, 8), (7, 9)],
    "a row": [(10, x) for x in range(40)],
    "a column": [(y, 30) for y in range(36)],
    "corners": [(0, 0), (0, 39), (35, 0), (35, 39)],
    "a pair in a corner": [(0, 0), (0, 1)],
    "a square in a corner": [(34, 38), (34, 39), (35, 38), (35, 39)],
    "a pair at an edge": [(35, 17), (34, 17)],
    **{f"row {y}": [(y, x) for x in range(40)] for y in (0, 1, 34, 35)},
    **{f"column {x}": [(y, x) for y in range(36)] for x in (0, 1, 38, 39)},
}


@pytest.mark.parametrize("value", [15, 5000])
@pytest.mark.parametrize("where", CLUSTERS)
def test_clusters_of_hot_pixels(where, value):
    """All of them and no other, with a beam elsewhere and a faint background."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:36, :40]
    beam = 40.0 * ((y - 18) ** 2 + (x - 20) ** 2 <= 25) + 0.02
    patterns = rng.poisson(beam, (60, 36, 40))
    rows, columns = np.array(CLUSTERS[where]).T
    patterns[:, rows, columns] = value
    found = hot(patterns)
    np.testing.assert_array_equal(found, twins.hot(patterns))
    assert np.argwhere(found).tolist() == sorted(map(list, CLUSTERS[where]))


@pytest.mark.parametrize("pair", [[(18, 19), (18, 20)], [(17, 25), (18, 25)], [(18, 26), (18, 27)]])
def test_hot_pixels_within_the_beam_and_at_its_rim(pair):
    y, x = np.mgrid[:36, :40]
    patterns = np.random.default_rng(3).poisson(
        40.0 * ((y - 18) ** 2 + (x - 20) ** 2 <= 25) + 0.02, (60, 36, 40)
    )
    assert not hot(patterns).any()
    patterns[:, [pair[0][0], pair[1][0]], [pair[0][1], pair[1][1]]] = 5000
    assert np.argwhere(hot(patterns)).tolist() == [list(place) for place in pair]


def test_single_counts_in_the_dark_are_not_hot():
    patterns = np.zeros((150, 9, 9), "u2")
    patterns[3, 7, 7] = 1
    patterns[:74, 1, 7] = 40  # a spot of one grain
    patterns[:, 2:5, 2:5] = 200
    patterns[:, 8, 0] = 1  # faint, but always there
    patterns[::2, 8, 4] = 60_000
    assert np.argwhere(hot(patterns)).tolist() == [[8, 0], [8, 4]]
    mean = np.ones((3, 3))
    mean[0, 0] = 6  # exactly six times is not hot
    assert not hot_pixels(mean, mean, 400, 1).any()
    mean[0, 0] = np.nextafter(6, 7)
    assert np.argwhere(hot_pixels(mean, mean, 400, 1)).tolist() == [[0, 0]]


# --- dead pixels and beam stops -----------------------------------------------------------------


def dead(patterns):
    return dead_pixels(patterns.sum(0, dtype=float), (patterns > 0).sum(0), len(patterns))


@pytest.mark.parametrize("n", [1, 5, 60])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (17, 24)])
def test_dead_pixels(shape, n):
    rng = np.random.default_rng(n)
    rates = np.full(shape, 20.0 if n < 60 else 0.5)
    rates[:, 15:] /= rng.choice([1, 4, 30], rates[:, 15:].shape)
    rates[rng.random(shape) < 0.05] = 0
    patterns = rng.poisson(rates, (n, *shape))
    for units in (1, 100, 0.1):
        found = dead(patterns * units)
        np.testing.assert_array_equal(found, twins.dead(patterns * units))
        if shape[0] > 9 and units >= 1:
            assert found.any()


def test_dead_pixels_matter_where_there_is_intensity():
    """A gap through the disc is found, its rim is none, and an electron may count 100."""
    y, x = np.mgrid[:48, :50]
    rates = np.where((y - 24) ** 2 + (x - 25) ** 2 <= 144, 2.0, 0.01)
    rates[23:26] = rates[40, 40] = rates[28, 24] = 0
    patterns = np.random.default_rng(0).poisson(rates, (60, 48, 50))
    found = dead(patterns)
    assert set(np.unique(np.nonzero(found)[0])) == {23, 24, 25, 28}
    assert found[23:26, 22:28].all()
    assert found[28].sum() == 1
    faint = np.random.default_rng(0).poisson(0.03, (60, 48, 50))  # 1.8 electrons in all
    assert not dead(faint * 100).any()
    assert not dead(faint[:0]).any()


def shared_samples(folder):
    """Name, sample of at most 256 patterns and known answers of every simulated set."""
    for truth in [*folder.glob("sim/*.truth.json"), *folder.glob("trust/*.truth.json")]:
        known = json.loads(truth.read_text())
        patterns = sd.open(truth.with_name(known["file"]))
        yield known["file"], patterns.values[sampled(patterns.shape[:2])], known


def test_no_good_pixel_of_shared_data_is_dead(shared_data):
    n = 0
    for name, sample, known in shared_samples(shared_data):
        found = {tuple(place) for place in np.argwhere(dead(sample)).tolist()}
        assert found <= set(map(tuple, known.get("dead_pixels", []))), name
        # where it matters: in the direct disc
        beam = np.array(known["true_beam_centre"])
        y, x = np.rint(beam.mean((0, 1))).astype(int)
        before = sample[:, y, x].copy()
        sample[:, y, x] = 0
        assert dead(sample)[y, x], name
        sample[:, y, x] = before
        n += 1
        if name == "au_np_hot_dead_f32.hspy":
            assert found == {
                (62, 16)
            }  # on a Bragg disc; 19 lie where less than 12 counts are expected
    assert n == 8


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_stop_region(seed):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(24, 50)), int(rng.integers(24, 50)))
    center = rng.uniform(0.2, 0.8, 2) * shape
    y, x = np.indices(shape)
    mean = rng.uniform(0.5, 2, shape) / (1 + np.hypot(y - center[0], x - center[1]) / 9)
    mean[(np.hypot(y - center[0], x - center[1]) < rng.uniform(0, 5))] *= 0.05
    mean[(abs(x - center[1]) < rng.uniform(0, 3)) & (y < center[0])] *= rng.uniform(0, 0.3)
    good = rng.random(shape) > 0.03
    found, known = stop_region(mean, good, tuple(center)), twins.stop(mean, good, center)
    assert (found is None) == (known is None)
    if found is not None:
        np.testing.assert_array_equal(found, known)


def test_stops_of_shared_data(shared_data):
    """No set has one; a stop drawn over the beam is found where there is anything to see around it."""
    for name, sample, known in shared_samples(shared_data):
        mean = sample.mean(0)
        center = np.array(known["true_beam_centre"]).mean((0, 1))
        assert stop_region(mean, None, tuple(center)) is None, name
        y, x = np.indices(mean.shape) - center[:, None, None]
        true = (np.hypot(y - 2, x - 1.5) < 10) | ((abs(x) < 3) & (y < 0))
        found = stop_region(np.where(true, 0, mean), None, tuple(center))
        if name == "vacuum_reference.hspy":
            assert found is None
        else:
            assert found is not None, name
            assert found[true].all(), name


def test_a_large_detector_is_searched_on_squares():
    y, x = np.mgrid[:515, :700]
    mean = 1 / (1 + np.hypot(y - 250, x - 340) / 60)
    true = (np.hypot(y - 252, x - 345) < 30) | ((abs(y - 252) < 8) & (x < 340))
    found = stop_region(np.where(true, 0.01, mean), None, (250, 340))
    assert (true & ~found).sum() == 0
    assert found.sum() < 1.5 * true.sum()


def test_lit_pixels_are_counted_as_intensity_counts():
    lit = np.zeros((2, 3), "u2")
    for dtype in ("f4", "i2", "u1", "?"):
        add_lit(np.array([[0, 1, 1], [1, 0, 1]], dtype), 0, lit)
    add_lit(np.array([[np.nan, np.inf, -1], [0.5, 3, 2]]), 2, lit)
    assert lit.tolist() == [[0, 4, 4], [4, 1, 5]]


# --- mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u2", ">i4", "f4"])
def test_bad_pixels_become_zero_or_the_median_of_their_neighbours(dtype):
    block = finite(dtype)
    mask = np.random.default_rng(2).random(SHAPE[-2:]) < 0.15
    mask[0, 0] = mask[5:9, 6:10] = mask[-1, -3:] = True
    zero = fill_bad(block, mask, None)
    np.testing.assert_array_equal(zero, np.where(mask, 0, block))
    median = fill_bad(block, mask, neighbours(mask))
    known = [twins.fill_median(p, mask) for p in block.reshape(-1, *SHAPE[-2:])]
    np.testing.assert_array_equal(median.reshape(-1, *SHAPE[-2:]), known)
    assert zero.dtype == median.dtype == np.dtype(dtype).newbyteorder("=")


def test_a_lone_good_pixel_fills_the_rest():
    mask = np.ones((4, 6), bool)
    mask[3, 0] = False
    block = np.zeros((1, 4, 6), "u2")
    block[0, 3, 0] = 9
    assert (fill_bad(block, mask, neighbours(mask)) == 9).all()
