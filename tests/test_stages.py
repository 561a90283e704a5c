"""Stages: lazy in, lazy out, one read a pass, the twins' values, the calibration, and every refusal."""

import pickle
import threading
from collections import Counter

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import twins
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.array_utils import byte_bounds
from strategies import LIST, SCAN, as_array, chunkings, datasets, pattern

import stem_dask as sd
from stem_dask.core.errors import ConfigError
from stem_dask.core.model import Axis
from stem_dask.core.patterns import as_patterns, axis_of
from stem_dask.stages.analyze import AnalysisReducer, analysis_attrs, fold_analysis
from stem_dask.stages.blocks import reduced
from stem_dask.stages.correct import apply_mask
from stem_dask.stages.crop import placement
from stem_dask.stages.validate import STATISTICS, retention_statistics

PER_PATTERN = ("center_y", "center_x", "com_y", "com_x", "radius", "total", "profile")


def scan(dtype="u2", shape=(3, 5, 17, 22), seed=0):
    """Beams, noise and empty patterns on a scan or in a list."""
    rng = np.random.default_rng(seed)
    kinds = ["beam", "noise", "beam", "empty", "pixel", "beam"]
    n = int(np.prod(shape[:-2]))
    patterns = [pattern(rng, kinds[i % 6], *shape[-2:], dtype) for i in range(n)]
    return np.stack(patterns).reshape(shape)


def calibrated(data, chunks=None):
    """The same with calibrated axes."""
    y, x = data.shape[-2:]
    lead = [Axis(name, n, 2.0, 7.0, "nm") for name, n in zip(SCAN, data.shape[:-2], strict=False)]
    if data.ndim == 3:
        lead = [Axis("pattern", data.shape[0])]
    axes = [*lead, Axis("ky", y, 0.25, -3.0, "1/nm"), Axis("kx", x, 0.5, -5.0, "1/nm")]
    return as_patterns(as_array(data, chunks).data, axes, {"source": "made"})


def raising(*args, **kwargs):
    raise AssertionError("something was computed while the graph was built")


class Source:
    """Read-only patterns that count how often each part of them was read."""

    def __init__(self, data):
        self.data = data.copy()
        self.data.setflags(write=False)
        self.shape, self.dtype, self.ndim = data.shape, data.dtype, data.ndim
        self.reads = Counter()
        self.lock = threading.Lock()

    def __getitem__(self, index):
        part = self.data[index]
        if part.size:
            with self.lock:
                self.reads[tuple((s.start, s.stop) for s in index)] += 1
        return part

    def patterns(self, chunks):
        array = da.from_array(self, chunks=(*chunks, -1, -1), meta=np.empty((0,) * 4, self.dtype))
        return xr.DataArray(array, dims=SCAN)


def run_all(data, chunks=None, metric="square", **options):
    """Every stage's result, computed."""
    patterns = calibrated(data, chunks)
    analysis = sd.analyze(patterns, radius_metric=metric, **twins.PLAIN).compute()
    window = sd.choose_window(analysis, margin_pixels=0, coverage=0.7, **options)
    cropped = sd.crop(patterns, analysis, window)
    checked = sd.validate(patterns, cropped, analysis)
    small = sd.downsample(cropped, 2) if min(cropped.shape[-2:]) > 1 else cropped
    small = sd.cast(small, "float32")
    return analysis, *dask.compute(cropped, checked, small)


# --- lazy, one read, nothing modified -----------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5, 17, 22), (7, 17, 22)])
def test_building_computes_nothing(shape):
    patterns = calibrated(scan(shape=shape), (2,) * (len(shape) - 2))
    with dask.config.set(scheduler=raising):
        lazy = sd.analyze(patterns, **twins.PLAIN)
        assert all(dask.is_dask_collection(lazy[name].data) for name in PER_PATTERN)
        with pytest.raises(AssertionError, match="was computed"):
            lazy.compute()
    analysis = lazy.compute()
    with dask.config.set(scheduler=raising):
        window = sd.choose_window(analysis, size=8)
        cropped = sd.crop(patterns, analysis, window)
        checked = sd.validate(patterns, cropped, analysis)
        made = [cropped, sd.to_detector(cropped, analysis), sd.cast(cropped, "float16")]
        for method in ("bin", "stride", "gauss", "fft"):
            made.append(sd.downsample(cropped, 2, method=method))
        made.append(apply_mask(patterns, np.eye(17, 22, dtype=bool), "median"))
        made.extend(checked[name] for name in ("retention", *STATISTICS))
    lead = len(shape) - 2
    for result in made:
        assert dask.is_dask_collection(result.data)
        known = result.compute()
        assert (known.dtype, known.shape) == (result.dtype, result.shape)
        if result.ndim > lead:
            assert result.data.chunks[:lead] == patterns.data.chunks[:lead]


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
@pytest.mark.parametrize("chunks", [(1, 2), (3, 5), (2, 3)])
def test_each_block_is_read_once_a_pass_and_not_modified(chunks, scheduler):
    data = scan("f4")
    source = Source(data)
    patterns = source.patterns(chunks)
    blocks = int(np.prod(patterns.data.numblocks))
    with dask.config.set(scheduler=scheduler):
        assert not source.reads
        analysis = sd.analyze(patterns, **twins.PLAIN).compute()
        assert len(source.reads) == blocks
        assert set(source.reads.values()) == {1}
        source.reads.clear()
        cropped = sd.crop(patterns, analysis, sd.choose_window(analysis, size=8))
        small = sd.cast(sd.downsample(cropped, 2), "float16")
        checked = sd.validate(patterns, cropped, analysis)
        dask.compute(small, checked)
        assert len(source.reads) == blocks
        assert set(source.reads.values()) == {1}
    np.testing.assert_array_equal(source.data, data)


@settings(max_examples=40, deadline=None)
@given(datasets(), st.data(), st.sampled_from(["fixed", "pattern"]), st.sampled_from(["square", "circle"]))  # fmt: skip
def test_results_depend_neither_on_chunks_nor_on_the_scheduler(data, draw, align, metric):
    with dask.config.set(scheduler="sync"):
        expected = run_all(data, metric=metric, align=align)
    with dask.config.set(scheduler="threads"):
        found = run_all(data, draw.draw(chunkings(data)), metric=metric, align=align)
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, xr.Dataset):
            reduced = ["mean_pattern", "curve_mean", "negative_sum"]
            xr.testing.assert_allclose(a, b, rtol=1e-12)
            a, b = a.drop_vars(reduced, errors="ignore"), b.drop_vars(reduced, errors="ignore")
        xr.testing.assert_identical(a, b)


def test_a_detector_cut_in_chunks_and_numpy_data_give_the_same():
    data = scan()
    dims = dict(zip(SCAN, (2, 3, 5, 7), strict=True))
    expected = sd.analyze(as_array(data)).compute()
    plain = xr.DataArray(data, dims=SCAN)
    xr.testing.assert_identical(sd.analyze(plain).compute(), expected)
    xr.testing.assert_identical(sd.analyze(plain.chunk(dims)).compute(), expected)
    window = sd.choose_window(expected, size=6)
    known = sd.crop(plain, expected, window).compute()
    for patterns in (plain.chunk(dims), pickle.loads(pickle.dumps(plain.chunk(dims)))):
        lazy = sd.crop(patterns, expected, pickle.loads(pickle.dumps(window)))
        lazy = cloudpickle.loads(cloudpickle.dumps(lazy))  # as it goes to a cluster
        xr.testing.assert_identical(lazy.compute(), known)
    lazy = cloudpickle.loads(cloudpickle.dumps(sd.analyze(plain.chunk(dims))))
    xr.testing.assert_identical(lazy.compute(), expected)


# --- analysis -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["square", "circle"])
@pytest.mark.parametrize("dtype", ["u2", "f4"])
@pytest.mark.parametrize("shape", [(3, 5, 17, 22), (7, 17, 22)])
def test_the_analysis_equals_the_twins(shape, dtype, metric):
    data = scan(dtype, shape)
    lead = shape[:-2]
    options = {"target_retention": 0.9, "threshold": 1.5, "radius_metric": metric}
    found = sd.analyze(calibrated(data, (2,) * len(lead)), **options, **twins.PLAIN).compute()
    flat = data.reshape(-1, 17, 22)
    known = twins.Analysis(flat, target=0.9, threshold=1.5, metric=metric)
    np.testing.assert_allclose(found.total.values.ravel(), known.totals, rtol=1e-12)
    centers = np.array(known.centers, float)
    np.testing.assert_allclose(found.center_y.values.ravel(), centers[:, 0], rtol=1e-12)
    np.testing.assert_allclose(found.com_x.values.ravel(), centers[:, 1], rtol=1e-12)
    radii = np.array([np.nan if r is None else r for r in known.radii])
    np.testing.assert_array_equal(found.radius.values.ravel(), radii)
    filled = np.array(known.filled)
    assert int(found.n_empty) == (~filled).sum() > 0
    counted = np.array(known.counted, float)
    np.testing.assert_allclose(found.mean_pattern, counted.mean(0), rtol=1e-12)
    np.testing.assert_array_equal(found.max_pattern, counted.max(0))
    odd = np.sum([twins.odd_pixels(p, 1.5)[0] for p in flat], axis=0)
    np.testing.assert_array_equal(found.odd_pixels, odd)
    negative = sum(twins.odd_pixels(p, 1.5)[1] for p in flat)
    assert float(found.negative_sum) == pytest.approx(negative)
    profiles = found.profile.values.reshape(len(flat), -1)[filled]
    np.testing.assert_allclose(found.curve_mean, profiles.mean(0, dtype="f8"), rtol=1e-12)
    np.testing.assert_array_equal(found.curve_min, profiles.min(0))
    assert found.radius.dims == (SCAN[:2] if len(lead) == 2 else LIST[:1])
    assert axis_of(found, "source_ky") == Axis("source_ky", 17, 0.25, -3.0, "1/nm")
    assert found.attrs == {"center_method": "centroid", **options}


@pytest.mark.parametrize("method", ["center", "manual"])
def test_given_centers_apply_to_empty_patterns_too(method):
    manual = (3.5, 20.0) if method == "manual" else None
    found = sd.analyze(as_array(scan()), center_method=method, manual_center=manual).compute()
    expected = manual or (8.0, 11.0)
    assert (found.center_y == expected[0]).all()
    assert (found.center_x == expected[1]).all()
    empty = found.total == 0
    assert empty.any()
    assert np.isnan(found.radius.values[empty]).all()
    cut = sd.crop(as_array(scan()), found, sd.choose_window(found, size=4, align="pattern"))
    assert (cut.window_y == np.rint(expected[0]) - 2).all()
    assert (cut.window_x == np.rint(expected[1]) - 2).all()


# --- window, crop and back ----------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["square", "circle"])
@pytest.mark.parametrize("align", ["fixed", "pattern"])
@pytest.mark.parametrize("coverage", [0.4, 0.8, 1.0])
def test_window_and_crop_equal_the_twins(align, metric, coverage):
    data = scan(seed=11)
    patterns = calibrated(data, (1, 3))
    analysis = sd.analyze(patterns, target_retention=0.6, radius_metric=metric).compute()
    window = sd.choose_window(
        analysis, coverage=coverage, margin_pixels=0, align=align, size_multiple=1, factor=2
    )
    known = twins.Analysis(data.reshape(-1, 17, 22), target=0.6, metric=metric)
    margin = 1 if metric == "circle" else 0
    radius = known.global_radius(coverage, align) + margin
    assert window.global_radius == radius
    assert window.radius_at["1"] == known.global_radius(1.0, align) + margin
    assert any("contains the disc" in note for note in window.notes) == (metric == "circle")
    box = known.window(radius, align, lambda n: n % 2 == 0)
    assert window.shape == tuple(end - first for first, end in box)
    assert window.origin == tuple(first for first, _ in box)
    assert window.cropped_axes == tuple(
        name for name, n, full in zip(("ky", "kx"), window.shape, (17, 22), strict=True) if n < full
    )
    assert window.aligned_axes == (window.cropped_axes if align == "pattern" else ())
    origins = np.array(known.origins(box, align))
    cropped = sd.crop(patterns, analysis, window).compute()
    assert cropped.window_y.dtype == cropped.window_x.dtype == np.int32
    np.testing.assert_array_equal(cropped.window_y.values.ravel(), origins[:, 0])
    np.testing.assert_array_equal(cropped.window_x.values.ravel(), origins[:, 1])
    expected = [
        twins.crop(p, o, window.shape)
        for p, o in zip(data.reshape(-1, 17, 22), origins, strict=True)
    ]
    np.testing.assert_array_equal(cropped.values.reshape(-1, *window.shape), expected)
    placed = placement(analysis, window, 2, "bin")
    fractions = [twins.filled_fraction(o, window.shape, (17, 22)) for o in origins]
    np.testing.assert_allclose(placed["filled_fraction"].values.ravel(), fractions, atol=1e-15)
    out = (analysis.center_y - cropped.window_y - 0.5) / 2
    np.testing.assert_array_equal(placed["center_out_y"], out)
    back = sd.to_detector(cropped, analysis).compute()
    y, x = np.indices((17, 22))
    for i, (row, col) in enumerate(origins):
        inside = (y >= row) & (y < row + window.shape[0]) & (x >= col) & (x < col + window.shape[1])
        restored = back.values.reshape(-1, 17, 22)[i]
        np.testing.assert_array_equal(restored, np.where(inside, data.reshape(-1, 17, 22)[i], 0))
    assert axis_of(back, "kx") == axis_of(patterns, "kx")


@pytest.mark.parametrize(("align", "n"), [("fixed", 1), ("pattern", 15)])
def test_what_is_the_same_for_all_patterns_takes_the_memory_of_one(align, n):
    analysis = sd.analyze(as_array(scan()), **twins.PLAIN).compute()
    window = sd.choose_window(analysis, align=align, size=6)
    placed = placement(analysis, window)
    for name in ("window_y", "window_x", "filled_fraction"):
        values = placed[name].values
        ends = byte_bounds(values)
        assert (ends[1] - ends[0], values.size) == (n * values.itemsize, 15), name


@pytest.mark.parametrize(("method", "one"), [("centroid", True), ("center", False)])
def test_center_and_center_of_mass_are_one_array_where_they_are_the_same(method, one):
    data = scan()
    center = None if method == "centroid" else (8.0, 11.0)
    options = {"target_retention": 0.98, "threshold": 0.0}
    options |= {"center": center, "metric": "square", "device": "cpu"}
    reducer = AnalysisReducer(data, *2 * [np.ones(data.shape[:-2], bool)], **options)
    reducer.add(data.reshape(-1, 17, 22), slice(0, 15))
    block = reducer.result()
    how = {"radius_metric": "square", "target_retention": 0.98, "threshold": 0.0}
    attrs = analysis_attrs(center_method=method, manual_center=None, **how)
    folded = fold_analysis(as_array(data), [((slice(0, 3), slice(0, 5)), block)], attrs)
    expected = sd.analyze(as_array(data), center_method=method).compute()
    for axis in "yx":
        center, mass = folded[f"center_{axis}"], folded[f"com_{axis}"]
        np.testing.assert_array_equal(mass, expected[f"com_{axis}"])
        np.testing.assert_array_equal(center, expected[f"center_{axis}"])
        assert np.shares_memory(center.values, mass.values) is one


class Asked:
    """An array that notes which rows of the detector are asked for."""

    def __init__(self, data):
        self.data, self.shape, self.dtype, self.ndim = data, data.shape, data.dtype, data.ndim
        self.rows = set()

    def __getitem__(self, part):
        self.rows.add((part[-2].start, part[-2].stop))
        return self.data[part]


def from_source(source):
    """Lazy blocks of one row of the scan, as `sd.open` makes them."""
    meta = np.empty((0,) * 4, source.dtype)
    return da.from_array(source, chunks=(1, -1, -1, -1), inline_array=True, name=False, meta=meta)


@pytest.mark.parametrize("box", [[2, 9, 4, 16], [0, 17, 3, 8], [9, 17, 0, 22]])
def test_rows_that_no_window_has_are_not_read(box):
    data = scan()
    source = Asked(data)
    axes = as_array(data)
    read = from_source(source)
    analysis = sd.analyze(axes).compute()
    window = sd.choose_window(analysis, window=box, size_multiple=1)
    found = sd.crop(axes.copy(data=read), analysis, window).compute()
    np.testing.assert_array_equal(found, data[..., box[0] : box[1], box[2] : box[3]])
    assert source.rows == {(box[0], box[1])}
    masked = read.map_blocks(lambda block: block, dtype="u2")  # what was computed is there whole
    again = sd.crop(axes.copy(data=masked), analysis, window).compute()
    np.testing.assert_array_equal(again, found)


def test_rows_of_own_windows_that_leave_the_detector():
    data = scan(seed=4)
    source = Asked(data)
    read = from_source(source)
    analysis = sd.analyze(as_array(data), **twins.PLAIN).compute()
    window = sd.choose_window(analysis, size=6, align="pattern")
    found = sd.crop(as_array(data).copy(data=read), analysis, window).compute()
    origins = np.stack([found.window_y, found.window_x], -1).reshape(-1, 2)
    expected = [
        twins.crop(p, o, (6, 6)) for p, o in zip(data.reshape(-1, 17, 22), origins, strict=True)
    ]
    np.testing.assert_array_equal(found.values.reshape(-1, 6, 6), expected)
    ys = origins[:, 0]
    assert source.rows == {(max(ys.min(), 0), min(ys.max() + 6, 17))}


def test_the_window_the_user_gives_is_cut():
    patterns = as_array(scan())
    analysis = sd.analyze(patterns, **twins.PLAIN).compute()
    window = sd.choose_window(analysis, window=[1, 9, 4, 16], size_multiple=4)
    cropped = sd.crop(patterns, analysis, window)
    assert (window.align, window.shape) == ("fixed", (8, 12))
    assert (int(cropped.window_y[0, 0]), int(cropped.window_x[0, 0])) == (1, 4)
    np.testing.assert_array_equal(cropped, scan()[..., 1:9, 4:16])
    for size, align in (np.array([5, 22]), "fixed"), ([5, 40], "pattern"):
        both = sd.choose_window(analysis, size=size, align=align, size_multiple=1)
        assert (both.shape, both.cropped_axes) == ((5, 22), ("ky",))
        assert both.notes == ("kx is not cropped: the window would reach its 22 pixels",)


@pytest.mark.parametrize(
    ("options", "first", "shape"),
    [
        ({}, (0, 28), (10, 12)),  # from rows -3 … 8 and columns 28 … 39
        ({"size_multiple": 8}, (0, 24), (16, 16)),  # grows where there is room
        ({"size_multiple": 11, "factor": 3}, (0, 7), (32, 33)),  # or is the whole axis
        ({"size": "fft"}, (0, 28), (10, 12)),
        ({"size": "fft", "factor": 4, "size_multiple": 3}, (0, 24), (16, 16)),
        ({"square": True}, (0, 28), (12, 12)),
        ({"size": [6, 8]}, (0, 30), (6, 8)),
        ({"size": 20}, (0, 20), (20, 20)),  # shifted inside
    ],
)
def test_a_beam_in_a_corner_has_a_window_within_the_detector(options, first, shape):
    data = np.zeros((2, 3, 32, 40), "u2")
    data[..., :7, 30:39] = 1 + np.arange(6).reshape(2, 3, 1, 1)
    patterns = calibrated(data)
    analysis = sd.analyze(patterns, target_retention=1.0).compute()
    assert (float(analysis.center_y[0, 0]), float(analysis.center_x[0, 0])) == (3, 34)
    window = sd.choose_window(analysis, margin_pixels=1, **options)
    assert window.global_radius == 6
    assert (window.origin, window.shape) == (first, shape)
    cropped = sd.crop(patterns, analysis, window)
    ends = [start + size for start, size in zip(first, shape, strict=True)]
    np.testing.assert_array_equal(cropped, data[..., first[0] : ends[0], first[1] : ends[1]])
    assert axis_of(cropped, "kx") == Axis("kx", shape[1], 0.5, -5.0 + 0.5 * first[1], "1/nm")
    placed = placement(analysis, window)
    assert (placed["filled_fraction"] == 0).all()
    assert (placed["center_out_y"] == 3).all()
    assert (placed["center_out_x"] == 34 - first[1]).all()
    back = sd.to_detector(cropped, analysis)
    if options.get("size") != [6, 8]:
        np.testing.assert_array_equal(back, data)
    assert axis_of(back, "kx") == axis_of(patterns, "kx")


@pytest.mark.parametrize("align", ["fixed", "pattern"])
@pytest.mark.parametrize(("method", "k"), [("bin", 2), ("stride", 2), ("gauss", 4), ("fft", 4)])
@pytest.mark.parametrize("cropped", [True, False])
def test_calibration_of_the_output(cropped, method, k, align):
    patterns = calibrated(scan())
    analysis = sd.analyze(patterns, **twins.PLAIN).compute()
    window = sd.choose_window(analysis, size=[8, 16 if cropped else 22], align=align, factor=k)
    small = sd.downsample(sd.crop(patterns, analysis, window), k, method=method)
    assert small.attrs["k_origin"] == ("detector" if align == "fixed" else "window_center")
    options = {"align": align, "k": k, "method": method}
    for i, (name, scale, offset) in enumerate([("ky", 0.25, -3.0), ("kx", 0.5, -5.0)]):
        own = cropped or name == "ky"
        origin = window.origin[i]
        known = twins.output_axis(scale, offset, window.shape[i], origin, cropped=own, **options)
        axis = axis_of(small, name)
        assert (axis.scale, axis.offset, axis.units) == pytest.approx((*known, "1/nm"))
        assert axis.size == window.shape[i] // k
        np.testing.assert_allclose(small[name], known[1] + known[0] * np.arange(axis.size))
    assert axis_of(small, "scan_x") == Axis("scan_x", 5, 2.0, 7.0, "nm")


def test_sliced_patterns_keep_their_calibration():
    patterns = calibrated(scan())
    part = patterns.isel(scan_y=slice(1, 2), scan_x=slice(None, None, 2), kx=slice(4, None))
    assert axis_of(part, "kx") == Axis("kx", 18, 0.5, -3.0, "1/nm")
    assert axis_of(part, "scan_x") == Axis("scan_x", 3, 4.0, 7.0, "nm")
    assert axis_of(part, "scan_y") == Axis("scan_y", 1, 2.0, 9.0, "nm")
    analysis = sd.analyze(part).compute()
    back = sd.to_detector(sd.crop(part, analysis, sd.choose_window(analysis, size=4)), analysis)
    np.testing.assert_array_equal(back.kx, part.kx)
    np.testing.assert_array_equal(back.scan_x, part.scan_x)


@pytest.mark.parametrize("align", ["fixed", "pattern"])
def test_the_detector_frame_keeps_what_is_known(align):
    """All attributes and coordinates but those of the window, and the calibration of the whole detector."""
    patterns = calibrated(scan()).assign_attrs(beam_energy_kv=200.0, title="a", intensity="counts")
    analysis = sd.analyze(patterns, **twins.PLAIN).compute()
    cropped = sd.crop(patterns, analysis, sd.choose_window(analysis, size=6, align=align))
    dims = ("scan_y", "scan_x")
    valid = np.arange(cropped.scan_y.size * cropped.scan_x.size).reshape(cropped.shape[:2]) > 3
    marked = cropped.assign_coords(valid=(dims, valid), dose=("scan_y", np.arange(cropped.sizes["scan_y"]) / 2.0))  # fmt: skip
    back = sd.to_detector(marked, analysis)
    detector = {"k_origin": "detector"} if align == "fixed" else {}
    assert back.attrs == {**patterns.attrs, **detector}
    assert {*back.coords} == {*patterns.dims, "valid", "dose"}
    np.testing.assert_array_equal(back.valid, valid)
    np.testing.assert_array_equal(back.dose, marked.dose)
    for name in patterns.dims:
        assert back[name].attrs == patterns[name].attrs
        np.testing.assert_array_equal(back[name], patterns[name])
    with pytest.raises(ConfigError, match="no window_y and window_x"):
        sd.to_detector(back, analysis)


# --- validation ---------------------------------------------------------------------------------


def test_validation_statistics():
    data = np.zeros((5, 16, 20), "u2")
    for i, outside in enumerate((0, 1, 10, 50)):
        data[i, 8, 10], data[i, 0, 0] = 100 - outside, outside
    patterns = as_array(data, (2,))
    # a single bright pixel is a hot one
    options = {"center_method": "center", "target_retention": 0.99, "ignore_bad_pixels": False}
    analysis = sd.analyze(patterns, **options).compute()
    cropped = sd.crop(patterns, analysis, sd.choose_window(analysis, size=4))
    found = sd.validate(patterns, cropped, analysis, min_retention=0.9).compute()
    kept = np.array([1.0, 0.99, 0.9, 0.5])
    np.testing.assert_array_equal(found.retention, [*kept, np.nan])
    expected = {
        "mean": kept.mean(), "median": 0.945, "min": 0.5, "max": 1.0, "std": kept.std(),
        "total_ratio": 339 / 400, "n_target": 2, "n_min": 3, "n_empty": 1,
    }  # fmt: skip
    assert {name: float(found[name]) for name in STATISTICS} == pytest.approx(expected)


def test_integers_reach_a_level_when_inside_is_at_least_level_times_total():
    target = np.nextafter(1 / 3, 1)  # 1 >= target * 3 in float64, although 1 / 3 < target
    found = retention_statistics(np.array([1 / 3]), np.array([3.0]), target, target)
    assert (found["n_target"], found["n_min"]) == (1, 1)
    nothing = retention_statistics(np.array([np.nan]), np.array([0.0]), 0.9, 0.9)
    assert nothing["n_empty"] == 1
    assert np.isnan(nothing["mean"])


def test_blocks_are_not_copied_on_their_way():
    """A block is in memory once: the kernel gets the very array that was read."""
    made = []

    def read(block):
        made.append(block + 1)
        return made[-1]

    def analysis(block, **options):
        assert block is made[-1]
        return AnalysisReducer(block, *2 * [np.ones(6, bool)], **options)

    data = da.ones((4, 3, 8, 6), chunks=(2, 3, 8, 6)).map_blocks(read, meta=np.empty((0,) * 4))
    options = {"target_retention": 0.9, "threshold": 0.0, "center": None, "metric": "square"}
    found = reduced(analysis, data, **options, device="cpu")
    assert found.chunks == ((2, 2), (3,))
    for i in (0, 1):
        assert (found.blocks[i].compute(scheduler="sync").get()["total"] == 96).all()
