"""Laws that hold for every set of patterns: the retention theorem, sums that add up, chunks that do not matter."""

import math

import dask
import numpy as np
import pytest
import twins
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import as_array, datasets, shares

import stem_dask as sd
from stem_dask.core.errors import ConfigError
from stem_dask.core.window import radii_for_target
from stem_dask.kernels.analysis import analyze_patterns
from stem_dask.stages.crop import placement

law = settings(max_examples=70, deadline=None)
aligns = st.sampled_from(["fixed", "pattern"])
metrics = st.sampled_from(["square", "circle"])
sizes = st.sampled_from(["auto", "fft"])
#: float sums in two orders differ by less, relative to the total
SLACK = 1e-12


@pytest.fixture(autouse=True)
def one_thread():
    """Small arrays: threads would only cost time; test_stages compares the schedulers."""
    with dask.config.set(scheduler="sync"):
        yield


def slack(data):
    return SLACK if data.dtype.kind == "f" else 0.0


@law
@given(
    datasets(), shares(), shares(), metrics, aligns, st.integers(0, 3), st.sampled_from([0, 1.5]),
    st.integers(1, 3), sizes,
)  # fmt: skip
def test_the_retention_theorem(
    data, target, coverage, metric, align, margin, threshold, factor, size
):
    """At least ceil(coverage * n) of the n non-empty patterns keep the target."""
    patterns = as_array(data)
    analysis = sd.analyze(
        patterns, target_retention=target, radius_metric=metric, threshold=threshold
    ).compute()
    assume((analysis.total > 0).any())  # not all of it in suspected hot pixels
    window = sd.choose_window(
        analysis, coverage=coverage, margin_pixels=margin, align=align, factor=factor, size=size
    )
    cropped = sd.crop(patterns, analysis, window)
    checked = sd.validate(patterns, cropped, analysis, min_retention=target).compute()
    n = int(np.isfinite(analysis.radius).sum())
    assert int(checked.n_empty) == checked.retention.size - n
    assert int(checked.n_target) == int(checked.n_min) >= math.ceil(coverage * n)
    # the same from the definition, without the package
    good = analysis["mask"].values == 0  # suspected bad pixels do not count
    counted = [
        twins.intensity(np.where(good, p, p.dtype.type(0)), threshold)
        for p in data.reshape(-1, *data.shape[-2:])
    ]
    kept = 0
    origins = zip(cropped.window_y.values.ravel(), cropped.window_x.values.ravel(), strict=True)
    for own, origin in zip(counted, origins, strict=True):
        total = twins.add(own)
        inside = twins.add(twins.crop(own, origin, window.shape))
        kept += total > 0 and inside >= (target - slack(data)) * total
    assert kept >= math.ceil(coverage * n)


@law
@given(datasets(), st.data(), aligns)
def test_the_window_and_what_lies_outside_add_up_to_the_total(data, draw, align):
    patterns = as_array(data)
    analysis = sd.analyze(patterns, target_retention=0.9, **twins.PLAIN).compute()
    beyond = 2 * (align == "pattern")
    size = draw.draw(st.tuples(*(st.integers(1, n + beyond) for n in data.shape[-2:])))
    window = sd.choose_window(analysis, size=size, align=align, size_multiple=1)
    cropped = sd.crop(patterns, analysis, window)
    back = sd.to_detector(cropped, analysis)
    checked = sd.validate(patterns, cropped, analysis)
    inside, restored, kept = dask.compute(cropped, back, checked.retention)
    outside = patterns.values.copy()
    origins = zip(inside.window_y.values.ravel(), inside.window_x.values.ravel(), strict=True)
    for rest, (row, col) in zip(outside.reshape(-1, *data.shape[-2:]), origins, strict=True):
        rest[max(row, 0) : row + window.shape[0], max(col, 0) : col + window.shape[1]] = 0
    counted = [
        np.array([float(twins.add(twins.intensity(p))) for p in part.reshape(-1, *part.shape[-2:])])
        for part in (inside.values, outside, data)
    ]
    np.testing.assert_allclose(counted[0] + counted[1], counted[2], rtol=slack(data))
    filled = counted[2] > 0
    share = counted[0][filled] / counted[2][filled]
    np.testing.assert_allclose(kept.values.ravel()[filled], share, rtol=slack(data))
    # what went through the window is unchanged, and the rest is 0
    np.testing.assert_array_equal(restored, np.where(outside == 0, data, 0) * (restored != 0))
    np.testing.assert_array_equal(np.where(restored != 0, restored, outside), data)


@law
@given(datasets(smallest=9, finite=True), st.integers(1, 4), aligns)
def test_downsampling_keeps_sums_and_means(data, k, align):
    patterns = as_array(data)
    analysis = sd.analyze(patterns, target_retention=0.5, **twins.PLAIN).compute()
    window = sd.choose_window(analysis, align=align, coverage=0.5, margin_pixels=0, factor=k)
    cropped = sd.crop(patterns, analysis, window)
    whole = tuple(n // k * k for n in window.shape)
    mean, total, fft, values = dask.compute(
        sd.downsample(cropped, k),
        sd.downsample(cropped, k, reduce="sum"),
        sd.downsample(cropped, k, method="fft"),
        cropped,
    )
    values = values.values[..., : whole[0], : whole[1]]
    for axis, name in enumerate(("ky", "kx")):  # nothing of a cropped axis is dropped
        assert name not in window.cropped_axes or whole[axis] == window.shape[axis]
    axes = (-2, -1)
    sums, n = values.sum(axes, dtype="f8"), math.prod(whole)
    if data.dtype.kind == "f":
        np.testing.assert_allclose(total.values.sum(axes), sums, **near(data, n))
    else:
        assert total.dtype.kind == data.dtype.kind
        np.testing.assert_array_equal(total.values.sum(axes), values.sum(axes))
    np.testing.assert_allclose(mean.values.sum(axes, dtype="f8") * k**2, sums, **near(data, n))
    for small in (mean, fft):
        np.testing.assert_allclose(small.values.mean(axes, dtype="f8"), sums / n, **near(data, 1))


def near(data, n):
    """float32 keeps 7 digits; sums of noise may cancel, so the largest of the n values counts too."""
    digits = 1e-12 if data.dtype == np.float64 else 1e-6
    return {"rtol": digits, "atol": digits * float(np.abs(data).max()) * n}


@law
@given(datasets(dtypes=("u2", "i4")), shares(), shares(), metrics, aligns)
def test_another_target_needs_no_second_look(data, first, second, metric, align):
    """From the stored profiles of integers comes the window that a fresh analysis gives."""
    patterns = as_array(data)
    options = {"coverage": 0.9, "align": align, "margin_pixels": 1}
    how = {"radius_metric": metric, **twins.PLAIN}
    stored = sd.analyze(patterns, target_retention=first, **how).compute()
    fresh = sd.analyze(patterns, target_retention=second, **how).compute()
    assert sd.choose_window(stored, target_retention=second, **options) == sd.choose_window(
        fresh, **options
    )


@law
@given(datasets(dtypes=("f4", "f8")), shares(), shares(), metrics)
def test_another_target_on_floats_keeps_at_least_the_target(data, first, second, metric):
    options = {"threshold": 0, "center": None, "metric": metric}
    profile = analyze_patterns(data, target_retention=first, **options).profile
    fresh = analyze_patterns(data, target_retention=second, **options)
    radii = radii_for_target(profile, fresh.total, second, metric, exact=False)
    known = fresh.radius
    np.testing.assert_array_equal(np.isnan(radii), np.isnan(known))
    filled = np.isfinite(known)
    assert (radii[filled] >= known[filled]).all()
    for i in np.flatnonzero(filled & (radii > known)):  # only where the share is at the target
        assert profile[i, int(known[i])] == pytest.approx(second, rel=2e-7)


@law
@given(
    datasets(dtypes=("u2",)), shares(), shares(), metrics, st.integers(0, 4), st.integers(1, 5),
    st.integers(1, 3), sizes, st.booleans(),
)  # fmt: skip
def test_a_fixed_window_holds_what_the_patterns_need_of_the_detector(
    data, target, coverage, metric, margin, multiple, factor, size, square
):
    """It equals its twin, lies inside the detector, and holds the own window of each covered pattern, cut at the detector."""
    patterns, detector = as_array(data), data.shape[-2:]
    how = {"target_retention": target, "radius_metric": metric, **twins.PLAIN}
    analysis = sd.analyze(patterns, **how).compute()
    options = {"coverage": coverage, "margin_pixels": margin, "size_multiple": multiple, "factor": factor, "size": size}  # fmt: skip
    window = sd.choose_window(analysis, **options)
    stacked = data.reshape(-1, *detector)
    known = twins.Analysis(stacked, target=target, metric=metric)
    radius = known.global_radius(coverage, "fixed") + max(margin, metric == "circle")

    def allowed(n):
        return twins.is_fast(n, factor) if size == "fft" else n % (multiple * factor) == 0

    box = known.window(radius, "fixed", allowed)
    assert window.origin == tuple(first for first, _ in box)
    assert window.shape == tuple(end - first for first, end in box)
    if square:
        try:
            window = sd.choose_window(analysis, **options, square=True)
        except ConfigError:
            assert detector[0] != detector[1]
        else:
            assert window.shape[0] == window.shape[1] >= max(end - first for first, end in box)
    held = 0
    ends = [first + n for first, n in zip(window.origin, window.shape, strict=True)]
    for own, center in zip(known.radii, known.centers, strict=True):
        if own is not None:
            around = zip(twins.window_center(center), window.origin, ends, detector, strict=True)
            held += all(
                first <= max(at - own, 0) and min(at + own, full) <= end
                for at, first, end, full in around
            )
    assert held >= math.ceil(coverage * sum(known.filled))
    for first, n, end, full in zip(window.origin, window.shape, ends, detector, strict=True):
        assert 0 <= first < end <= full
        assert allowed(n) or n == full
    placed = placement(analysis, window)
    assert (placed["filled_fraction"] == 0).all()


@law
@given(
    datasets(dtypes=("u2",)), st.one_of(st.just("auto"), st.integers(1, 20)), st.integers(1, 5),
    st.integers(1, 4), st.integers(0, 4), aligns,
)  # fmt: skip
def test_window_sizes(data, size, multiple, factor, margin, align):
    """The output of a cropped axis is a multiple; a window that would reach the detector is the whole axis.

    A given size is kept or refused; a fixed window of it is shifted inside the detector.
    """
    patterns = as_array(data)
    analysis = sd.analyze(patterns, target_retention=0.5, **twins.PLAIN).compute()
    options = {"size": size, "size_multiple": multiple, "factor": factor, "margin_pixels": margin, "align": align}  # fmt: skip
    refused = size != "auto" and any(
        (size < full and size % (multiple * factor)) or (size > full and align == "fixed")
        for full in data.shape[-2:]
    )
    if refused:
        with pytest.raises(ConfigError, match=f"size is {size}"):
            sd.choose_window(analysis, **options)
        return
    window = sd.choose_window(analysis, **options)
    filled = np.isfinite(analysis.radius.values)
    cropped = sd.crop(patterns, analysis, window)
    for axis, name in enumerate(("ky", "kx")):
        full, got = data.shape[-2 + axis], window.shape[axis]
        origin = cropped.coords["window_" + name[1]]
        centers = analysis[f"center_{name[1]}"].values[filled]
        middle = int(np.rint(np.median(centers)))
        wanted = size
        if size == "auto":
            wanted = 2 * window.global_radius
            if align == "fixed":
                rows = range(middle - window.global_radius, middle + window.global_radius)
                wanted = sum(0 <= row < full for row in rows)
        rounded = math.ceil(wanted / (multiple * factor)) * multiple * factor
        if rounded < full:
            assert name in window.cropped_axes
            assert got == rounded
            assert got % factor == 0
            assert got // factor % multiple == 0
            if align == "fixed":
                inside = range(full - got + 1)
                assert (origin == min(inside, key=lambda row: abs(row - middle + got // 2))).all()
        else:
            assert name not in window.cropped_axes
            assert got == full
            assert (origin == 0).all()
            assert any(note.startswith(f"{name} is not cropped") for note in window.notes)
        if name in window.aligned_axes:
            assert (origin.values[filled] + got // 2 == np.rint(centers)).all()
    assert cropped.shape[-2:] == window.shape
