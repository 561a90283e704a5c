"""What the stages refuse, with what is wrong, what was expected and what to do; and the small stages' options."""

import numpy as np
import pytest
import twins
from strategies import as_array
from test_stages import scan

import stem_dask as sd
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.stages.correct import apply_mask, read_mask


@pytest.fixture(scope="module")
def patterns():
    return as_array(scan(), (2, 2))


@pytest.fixture(scope="module")
def analysis(patterns):
    return sd.analyze(patterns).compute()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_retention": 0}, r"target_retention is 0; expected 0 < target_retention <= 1"),
        ({"target_retention": 1.01}, "target_retention is 1.01"),
        ({"target_retention": np.nan}, "target_retention is nan"),
        ({"threshold": -1}, "threshold is -1; expected a finite number >= 0"),
        ({"threshold": np.inf}, "threshold is inf"),
        ({"threshold": 65536}, "above 65535, the largest uint16: no pixel would count; lower the"),
        ({"radius_metric": "sqare"}, "radius_metric is 'sqare'; expected square or circle"),
        ({"center_method": "middle"}, "'middle'; expected auto, disc, centroid, friedel, center or manual"),
        ({"center_method": "manual"}, r"manual_center is missing; set manual_center to \(y, x\)"),
        ({"center_method": "manual", "manual_center": (16.5, 3)}, r"manual_center \(16\.5, 3\) lies outside the detector of 17 x 22 pixels"),
    ],
)  # fmt: skip
def test_analyze_refuses(patterns, options, text):
    with pytest.raises(ConfigError, match=text):
        sd.analyze(patterns, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"coverage": 0}, "coverage is 0; expected 0 < coverage <= 1"),
        ({"coverage": 1.5}, "coverage is 1.5"),
        ({"margin_pixels": -1}, "margin_pixels is -1; expected an integer >= 0"),
        ({"size_multiple": 0}, "size_multiple is 0; expected an integer >= 1"),
        ({"size": 9}, r"size is 9; expected a multiple of 2 \(size_multiple x downsampling\): 8 or 10"),
        ({"size": [8, 10], "factor": 2}, r"size is \[8, 10\]; expected a multiple of 4 .*: 8 or 12"),
        ({"size": 1}, "expected a multiple of 2 .*: 2$"),
        ({"size": 1000}, "size is 1000, larger than the detector of 17 x 22 pixels; give at most that"),
        ({"window": [2, 9, 4, 16]}, r"window is \[2, 9, 4, 16\]; expected a multiple of 2 .*: 6 or 8"),
        ({"factor": 0}, "factor is 0; expected an integer >= 1"),
        ({"target_retention": 2}, "target_retention is 2.0; expected 0 <"),
        ({"align": "patern"}, "align is 'patern'; expected fixed, descan or pattern"),
        ({"size": 0}, "size is 0; expected at least 1 pixel"),
        ({"size": "64"}, r"size is '64'; expected auto, fft, n, or \[ny, nx\]"),
        ({"size": [4]}, r"size is \[4\]; expected auto"),
        ({"size": [4, 8], "square": True}, r"size is \[4, 8\], which gives 4 x 8 px, and square is true; give one size of at most 17, or square=False"),
        ({"size": 18, "square": True, "align": "pattern"}, "size is 18, which gives 17 x 18 px, and square is true"),
        ({"window": [0, 4, 0, 8], "square": True}, "which gives 4 x 8 px, and square is true"),
        ({"margin_pixels": 20, "square": True}, "square is true and the window of 17 x 22 px becomes 22 x 22 px, more than the detector of "
         "17 x 22 pixels has; lower target_retention or coverage, give a size of at most 17, or square=False"),
        ({"window": [0, 4]}, r"window is \[0, 4\]; expected \[y0, y1, x0, x1\]"),
        ({"window": [0, 18, 0, 4]}, r"window \[0, 18, 0, 4\] does not fit the detector of 17 x 22"),
        ({"window": [4, 4, 0, 4]}, "give .* with 0 <= y0 < y1 <= height"),
        ({"window": [0, 4, 0, 4], "size": 4}, "both window .* and size 4 are given"),
        ({"window": [0, 4, 0, 4], "align": "pattern"}, "align is pattern; give size instead"),
    ],
)  # fmt: skip
def test_choose_window_refuses(analysis, options, text):
    with pytest.raises(ConfigError, match=text):
        sd.choose_window(analysis, **options)


def test_a_lazy_analysis_is_refused_with_the_remedy(patterns, analysis):
    lazy = sd.analyze(patterns)
    window = sd.choose_window(analysis, size=6)
    cropped = sd.crop(patterns, analysis, window)
    calls = (
        lambda: sd.choose_window(lazy),
        lambda: sd.crop(patterns, lazy, window),
        lambda: sd.validate(patterns, cropped, lazy),
    )
    for call in calls:
        with pytest.raises(ConfigError, match=r"still lazy; .* sd\.analyze\(patterns\)\.compute"):
            call()
    with pytest.raises(ConfigError, match=r"lacks radius; pass what sd\.analyze returned"):
        sd.choose_window(analysis.drop_vars("radius"))
    with pytest.raises(ConfigError, match=r"min_retention is 1\.5; expected 0 <= min"):
        sd.validate(patterns, patterns, analysis, min_retention=1.5)


@pytest.mark.parametrize("center", ["centroid", "center"])
def test_nothing_but_empty_patterns_is_refused(center):
    data = np.zeros((2, 3, 5, 7), "f4")
    data[0, 0, 0, :4] = np.nan, np.inf, -3, 0.5
    analysis = sd.analyze(as_array(data), threshold=1, center_method=center).compute()
    assert int(analysis.n_empty) == 6
    assert analysis.odd_pixels.values.tolist() == [1, 1, 1, 1]
    for options in ({}, {"size": 4}, {"window": [0, 4, 0, 4]}):
        with pytest.raises(SourceError, match=r"every pattern is empty.*threshold \(1\).*lower"):
            sd.choose_window(analysis, **options)


# --- downsampling, type, mask -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "options", "text"),
    [
        (0, {}, "factor is 0; expected 1 to 17, the shorter detector axis"),
        (18, {}, "factor is 18; expected 1 to 17"),
        (2, {"method": "cubic"}, "method is 'cubic'; expected one of bin, stride, gauss, fft"),
        (2, {"reduce": "max"}, "reduce is 'max'; expected mean or sum"),
        (2, {"method": "fft", "reduce": "sum"}, "reduce is sum with method fft; expected method bin"),
        (2, {"sigma": 1}, "sigma is 1 with method bin; expected sigma > 0 with method gauss"),
        (2, {"method": "gauss", "sigma": 0}, "sigma is 0 with method gauss"),
    ],
)  # fmt: skip
def test_downsample_refuses(patterns, factor, options, text):
    with pytest.raises(ConfigError, match=text):
        sd.downsample(patterns, factor, **options)


def test_cast_refuses_what_float16_cannot_hold(patterns):
    assert sd.cast(patterns, "auto") is patterns
    assert sd.cast(patterns, "float16").dtype == np.float16
    with pytest.raises(ConfigError, match="dtype is 'int8'; expected auto, float32 or float16"):
        sd.cast(patterns, "int8")
    data = np.array([[[[65504.0, -65504.0, np.inf, np.nan]]]])
    np.testing.assert_array_equal(sd.cast(as_array(data), "float16"), data)
    for value in (65505.0, -65505.0):
        data[0, 0, 0, 0] = value
        held = sd.cast(as_array(data), "float16")
        with pytest.raises(ConfigError, match="the data reach 65505; use float32, or auto"):
            held.compute()


def test_intensity_says_what_a_pixel_means(patterns):
    patterns = patterns.assign_attrs(intensity="counts")
    says = {("bin", "mean"): "mean counts per source pixel", ("bin", "sum"): "counts",
            ("stride", "mean"): "counts"}  # fmt: skip
    for (method, reduce), text in says.items():
        assert sd.downsample(patterns, 2, method=method, reduce=reduce).intensity == text
    assert sd.downsample(patterns, 1) is patterns


def test_masks(tmp_path):
    mask = read_mask({"pixels": [[1, 2]], "rows": [4], "columns": [0]}, (6, 7))
    assert mask.sum() == 13
    np.save(tmp_path / "mask.npy", mask.astype("u1"))
    np.testing.assert_array_equal(read_mask(str(tmp_path / "mask.npy"), (6, 7)), mask)
    with pytest.raises(ConfigError, match=r"outside the detector \(6, 7\)"):
        read_mask({"pixels": [[6, 0]]}, (6, 7))
    with pytest.raises(ConfigError, match=r"nowhere\.npy cannot be read"):
        read_mask("nowhere.npy", (6, 7))
    data = scan(shape=(4, 6, 7))
    filled = apply_mask(as_array(data, (3,)), mask, "median")
    np.testing.assert_array_equal(filled, [twins.fill_median(p, mask) for p in data])
    assert filled.attrs["masked_pixels"] == 13
    np.testing.assert_array_equal(apply_mask(as_array(data), mask), np.where(mask, 0, data))
    for bad, text in ((mask[1:], "has shape"), (mask | True, "every pixel as bad")):
        with pytest.raises(ConfigError, match=text):
            apply_mask(as_array(data), bad)
    with pytest.raises(ConfigError, match="mask_fill is 'mean'; expected zero or median"):
        apply_mask(as_array(data), mask, "mean")
