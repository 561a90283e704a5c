"""The figure: the artists hold the right values, and odd data are drawn without a warning."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from stem_dask.core.errors import StoreError
from stem_dask.core.model import Axis
from stem_dask.job.figure import (
    ALLOWED,
    BAD,
    DPI,
    GOOD,
    FigureData,
    build,
    choose_pictures,
    draw,
    with_pictures,
)
from stem_dask.kernels.pixels import DEAD, GIVEN, HOT, NOT_FINITE, STOP

INCH = {rows: 1.25 + 3.5 * rows for rows in (1, 2, 3, 4)}
DISC = 2.5


def beams(scan=(4, 5), detector=(24, 32), dtype=np.uint16, empty=()):
    """Patterns (n, ky, kx) of a beam that wanders over the detector, and its centers."""
    rng = np.random.default_rng(0)
    n, (rows, cols) = int(np.prod(scan)), detector
    center_y = rows / 2 + rng.uniform(-2, 2, n)
    center_x = cols / 2 + rng.uniform(-2, 2, n)
    y, x = np.mgrid[:rows, :cols]
    spread = (y - center_y[:, None, None]) ** 2 + (x - center_x[:, None, None]) ** 2
    patterns = rng.poisson(50 * np.exp(-spread / 8)).astype(dtype)
    patterns[list(empty)] = 0
    return patterns, center_y, center_x


def make(scan=(4, 5), detector=(24, 32), dtype=np.uint16, align="fixed", radius=6, empty=()):
    """`FigureData` of such patterns, with every number taken from them."""
    patterns, center_y, center_x = beams(scan, detector, dtype, empty)
    n, (rows, cols) = int(np.prod(scan)), detector
    ry, rx = np.rint(center_y).astype(int), np.rint(center_x).astype(int)
    if align == "fixed":
        ry[:], rx[:] = np.rint(np.median(center_y)), np.rint(np.median(center_x))
    padded = np.pad(patterns, ((0, 0), (2 * radius,) * 2, (2 * radius,) * 2))
    cut = np.array(
        [
            one[j + radius : j + 3 * radius, i + radius : i + 3 * radius]
            for one, j, i in zip(padded, ry, rx, strict=True)
        ]
    )
    gone = np.isin(np.arange(n), empty)
    total = np.where(gone, 1, patterns.sum((1, 2), dtype=float))
    retention = np.where(gone, np.nan, cut.sum((1, 2), dtype=float) / total)
    size = np.arange(2, 2 * rows, 2)
    units = {"scale": 0.5, "offset": -6.0, "units": "1/nm"}
    data = FigureData(
        title="test",
        axes=(Axis("ky", rows, **units), Axis("kx", cols, **units)),
        output_axes=(Axis("ky", 2 * radius, **units), Axis("kx", 2 * radius, **units)),
        scan_axes=tuple(
            Axis(name, length, 2.0, 0.0, "nm")
            for name, length in zip(("scan_y", "scan_x")[-len(scan) :], scan, strict=True)
        ),
        mean_pattern=patterns.mean(0),
        mask=np.zeros(detector, np.uint8),
        output_mean=cut.mean(0),
        disc_radius=DISC,
        window_y=(ry - radius).reshape(scan),
        window_x=(rx - radius).reshape(scan),
        window_shape=(2 * radius, 2 * radius),
        align=align,
        center_y=np.where(gone, np.nan, center_y).reshape(scan),
        center_x=np.where(gone, np.nan, center_x).reshape(scan),
        bright_field=np.where(gone, np.nan, 0.75 * total).reshape(scan),
        dark_field=np.where(gone, np.nan, 0.25 * total).reshape(scan),
        radius=np.where(gone, np.nan, radius - 1 - np.arange(n) % 3).reshape(scan),
        retention=retention.reshape(scan),
        curve_size=size,
        curve_mean=1 - np.exp(-size / 4),
        curve_min=1 - np.exp(-size / 6),
        target_retention=0.98,
        min_retention=0.9,
        global_radius=radius,
        lines=("source  test", "", "a line that is much too long for the panel " * 3),
    )
    return with_pictures(data, lambda index: patterns.reshape(*scan, *detector)[index])


def panels(data):
    figure = build(data)
    return figure, {ax.get_label(): ax for ax in figure.axes}


def outline(ax, name="window"):
    (box,) = [patch for patch in ax.patches if patch.get_label() == name]
    return box.get_bbox().extents.tolist()


def crosshair(ax):
    (line,) = [line for line in ax.lines if line.get_label() == "center"]
    return float(line.get_xdata()[0]), float(line.get_ydata()[0])


def rings(ax):
    (found,) = [one for one in ax.collections if one.get_label() == "worst"]
    return found.get_offsets().tolist()


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_all_panels_are_written(tmp_path):
    path = tmp_path / "x_visualization.png"
    assert draw(make(), path) is None
    assert png_size(path) == (16 * DPI, int(INCH[4] * DPI))
    _, found = panels(make())
    assert list(found) == [
        "mean", "output", "median", "text", "worst 1", "worst 2", "worst 3", "corner 1", "corner 2", "corner 3",
        "corner 4", "bright_field", "dark_field", "center_y", "center_x", "retention", "radius", "curve",
    ]  # fmt: skip


def test_equal_data_give_equal_bytes(tmp_path):
    draw(make(), tmp_path / "a.png")
    draw(make(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_settings_of_the_user_change_nothing(tmp_path):
    import matplotlib

    draw(make(), tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 30, "image.origin": "lower", "axes.facecolor": "red"}):
        draw(make(), tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_window_follows_the_pixel_edges_in_calibrated_units():
    data = replace(make(), window_y=np.full((4, 5), 3), window_x=np.full((4, 5), 7))
    data = replace(data, window_shape=(10, 12))
    _, found = panels(data)
    # first pixel edge: -6 + 0.5 * (7 - 0.5); last: -6 + 0.5 * (7 + 12 - 0.5)
    assert outline(found["mean"]) == [-2.75, -4.75, 3.25, 0.25]
    assert found["mean"].get_xlabel() == "kx (1/nm)"
    assert found["mean"].get_ylabel() == "ky (1/nm)"
    assert len(found["mean"].patches) == 1
    assert found["mean"].images[0].get_extent() == [-6.25, 9.75, 5.75, -6.25]
    assert found["mean"].get_ylim() == (5.75, -6.25)  # row 0 on top


@pytest.mark.parametrize("changes", [{"units": "px"}, {"scale": 0.0}, {"scale": np.nan}])
def test_axes_without_a_usable_calibration_are_drawn_in_pixels(changes):
    data = make()
    bare = tuple(replace(axis, **changes) for axis in data.axes)
    _, found = panels(replace(data, axes=bare, window_y=np.full((4, 5), 3)))
    assert found["mean"].images[0].get_extent() == [-0.5, 31.5, 23.5, -0.5]
    assert outline(found["mean"])[1] == 2.5
    assert found["mean"].get_xlabel() == "kx (px)"


def test_own_windows_show_the_median_one_and_the_reach_of_all():
    data = make((1, 3), align="pattern")
    data = replace(data, window_y=np.array([[0, 4, 5]]), window_x=np.array([[8, 2, 3]]))
    _, found = panels(data)
    edge = lambda index: -6 + 0.5 * (index - 0.5)  # noqa: E731
    assert outline(found["mean"]) == [edge(3), edge(4), edge(15), edge(16)]
    assert outline(found["mean"], "reach") == [edge(2), edge(0), edge(20), edge(17)]
    (reach,) = [p for p in found["mean"].patches if p.get_label() == "reach"]
    assert reach.get_linestyle() == "--"
    assert "dashed" in found["mean"].get_title()


def test_window_that_leaves_the_detector_is_seen_whole():
    data = replace(make(), window_y=np.full((4, 5), -4), window_x=np.full((4, 5), 25))
    _, found = panels(data)
    box = outline(found["mean"])
    (left, right), (bottom, top) = found["mean"].get_xlim(), found["mean"].get_ylim()
    assert left <= box[0] < box[2] <= right
    assert top <= box[1] < box[3] <= bottom


@pytest.mark.parametrize("align", ["fixed", "pattern"])
def test_patterns_have_window_crosshair_and_disc_at_their_own_places(align):
    data = make(align=align)
    patterns = beams()[0].reshape(4, 5, 24, 32)
    _, found = panels(data)
    assert {name for name, *_ in data.pictures} == {
        "worst 1", "worst 2", "worst 3", "median", "corner 1", "corner 2", "corner 3", "corner 4"
    }  # fmt: skip
    for name, index, *_ in data.pictures:
        ax, kept = found[name], data.retention[index]
        first_y, first_x = data.window_y[index], data.window_x[index]
        assert outline(ax)[:2] == [-6 + 0.5 * (first_x - 0.5), -6 + 0.5 * (first_y - 0.5)]
        y, x = -6 + 0.5 * data.center_y[index], -6 + 0.5 * data.center_x[index]
        np.testing.assert_allclose(crosshair(ax), (x, y))
        (disc,) = [patch for patch in ax.patches if patch.get_label() == "disc"]
        np.testing.assert_allclose(disc.center, (x, y))
        assert disc.width == disc.height == 2 * DISC * 0.5
        assert f"({index[0]}, {index[1]})" in ax.get_title()
        if not name.startswith("corner"):
            assert f"retention {kept:.4f}" in ax.get_title()
        # every pixel is drawn where it is on the detector
        shown = ax.images[0]
        left, _, _, top = shown.get_extent()
        row, column = round((top + 6) / 0.5 + 0.5), round((left + 6) / 0.5 + 0.5)
        values = shown.get_array()
        pattern = patterns[index][row : row + values.shape[0], column : column + values.shape[1]]
        bright = pattern >= 1
        np.testing.assert_array_equal(values[bright], pattern[bright])
        assert (values[~bright] < 1).all()  # no count is darker than one count


def test_patterns_are_cut_to_window_and_disc():
    large = make(detector=(400, 500), radius=20)
    for _, index, cut, (row, column) in large.pictures:
        assert cut.shape == (60, 60)  # a quarter of the window on every side
        assert cut.base is None
        assert (row, column) == (large.window_y[index] - 10, large.window_x[index] - 10)
    # a disc that is far from the window is shown, too
    far = replace(large, center_y=np.full((4, 5), 300.0))
    far = with_pictures(far, lambda index: np.ones((400, 500)))
    _, found = panels(far)
    for name, index, *_ in far.pictures:
        view = sorted(found[name].get_ylim())
        assert view[0] < outline(found[name])[1] < view[1]
        assert view[1] > -6 + 0.5 * (300 + DISC)
        assert np.isfinite(far.center_x[index])


def test_disc_that_was_not_found_has_no_crosshair():
    lost = make().center_y.copy()
    index = make().pictures[0][1]
    lost[index] = np.nan
    _, found = panels(replace(make(), center_y=lost))
    assert not found["worst 1"].lines
    assert [patch.get_label() for patch in found["worst 1"].patches] == ["window"]
    assert crosshair(found["worst 2"])


def test_centers_without_a_disc_have_a_crosshair_alone():
    figure, found = panels(replace(make(), disc_radius=None, bright_field=None, dark_field=None))
    assert [patch.get_label() for patch in found["median"].patches] == ["window"]
    assert crosshair(found["median"])
    assert "bright_field" not in found
    assert "disc" not in figure.texts[-1].get_text()
    assert "disc" in panels(make())[0].texts[-1].get_text()


def test_choice_of_the_patterns():
    retention = np.linspace(1, 0.9, 20).reshape(4, 5)
    assert choose_pictures(retention) == {
        "worst 1": (3, 4), "worst 2": (3, 3), "worst 3": (3, 2), "median": (1, 4), "corner 1": (0, 0),
        "corner 2": (0, 4), "corner 3": (3, 0), "corner 4": (3, 4),
    }  # fmt: skip
    retention[3, 3:] = retention[0, 0] = np.nan
    found = choose_pictures(retention)
    assert [found["worst 1"], found["worst 2"]] == [(3, 2), (3, 1)]
    assert [name for name in found if name.startswith("corner")] == ["corner 2", "corner 3"]
    assert choose_pictures(np.ones(1)) == {"worst 1": (0,)}
    assert choose_pictures(np.full((2, 2), np.nan)) == {}
    ends = {
        name: index for name, index in choose_pictures(np.ones((1, 9))).items() if "end" in name
    }
    assert ends == {"end 1": (0, 0), "end 2": (0, 8)}
    assert choose_pictures(np.ones(9))["end 2"] == (8,)


def test_bad_pixels_are_marked_by_kind_and_counted():
    mask = np.zeros((24, 32), np.uint8)
    mask[3, 4] = mask[20, 30] = HOT
    mask[7, 8], mask[9:12, 2:6], mask[0, 0], mask[1, 1] = DEAD, STOP, GIVEN, NOT_FINITE
    _, found = panels(replace(make(), mask=mask))
    lines = {line.get_label(): line for line in found["mean"].lines}
    assert list(lines) == ["2 hot", "1 dead", "12 beam stop", "1 given", "1 not finite"]
    assert lines["2 hot"].get_xdata().tolist() == [-6 + 0.5 * 4, -6 + 0.5 * 30]
    assert lines["2 hot"].get_ydata().tolist() == [-6 + 0.5 * 3, -6 + 0.5 * 20]
    assert len({line.get_color() for line in lines.values()}) == 5
    legend = [text.get_text() for text in found["mean"].get_legend().get_texts()]
    assert legend == list(lines)
    assert panels(make())[1]["mean"].get_legend() is None


@pytest.mark.parametrize("size", [8, 256, 2048])
def test_single_bad_pixel_is_large_enough_to_be_seen(size):
    mask = np.zeros((size, size), np.uint8)
    mask[size // 3, size // 2] = HOT
    _, found = panels(replace(make(), mask=mask, mean_pattern=np.ones((size, size)), pictures=()))
    (line,) = found["mean"].lines
    assert line.get_markersize() >= 3.5  # points
    at = np.array([line.get_xdata()[0], line.get_ydata()[0]])
    step = -(-size // 320)
    np.testing.assert_allclose((at + 6) / 0.5, [size // 2, size // 3], atol=step)


def test_bad_pixels_have_no_part_in_the_colors():
    data = make()
    mask, hot = data.mask.copy(), data.mean_pattern.copy()
    mask[2, 3], hot[2, 3] = HOT, 1e6
    _, found = panels(replace(data, mask=mask, mean_pattern=hot))
    assert found["mean"].images[0].norm.vmax == data.mean_pattern.max()


@pytest.mark.parametrize(("align", "factor"), [("fixed", 1), ("fixed", 2), ("pattern", 1)])
def test_hot_pixels_do_not_set_the_scale_of_the_output(align, factor):
    """Neither where all windows are equal, nor where a hot pixel wanders over them."""
    data = make(align=align)
    mask, sides = np.zeros((24, 32), np.uint8), np.array(data.window_shape)
    mask[8, 12] = HOT
    output = data.output_mean[::factor, ::factor].copy()
    for first in zip(data.window_y.ravel(), data.window_x.ravel(), strict=True):
        place = np.subtract((8, 12), first)
        if (place >= 0).all() and (place < sides).all():
            output[tuple(place // factor)] = 1e6
    assert output.max() == 1e6
    assert (output < 1e6).any()
    _, found = panels(replace(data, mask=mask, output_mean=output))
    shown = found["output"].images[0]
    assert shown.norm.vmax == output[output < 1e6].max()
    assert shown.get_array().max() == 1e6  # drawn all the same


def test_worst_patterns_are_circled_in_the_maps_of_the_specimen():
    data = make()
    worst = [[index[1], index[0]] for name, index, *_ in data.pictures if "worst" in name]
    assert len(worst) == 3
    _, found = panels(data)
    for name in ("bright_field", "dark_field"):
        assert rings(found[name]) == worst
        np.testing.assert_array_equal(found[name].images[0].get_array(), getattr(data, name))
    bare = {"bright_field": None, "dark_field": None, "total": 4 * data.dark_field}
    _, found = panels(replace(data, **bare))  # without a disc
    assert rings(found["total"]) == worst
    np.testing.assert_array_equal(found["total"].images[0].get_array(), bare["total"])
    along = make((9,))
    _, found = panels(along)
    chosen = [index for name, index, *_ in along.pictures if "worst" in name]
    assert rings(found["dark_field"]) == [[index[0], along.dark_field[index]] for index in chosen]


def test_title_tells_whether_the_crop_is_right():
    good = replace(make(), retention=np.full((4, 5), 0.991))
    figure, found = panels(good)
    assert figure.get_suptitle() == (
        "test\nwindow 12 x 12 px, retention mean 0.991, min 0.991, 0 of 20 patterns below 0.9"
    )
    assert "0 below 0.9" in found["retention"].get_title()
    assert figure._suptitle.get_color() == GOOD
    figure, _ = panels(replace(good, is_ok=False))  # such as discs that are cut through
    assert figure._suptitle.get_color() == ALLOWED
    lost = good.retention.copy()
    lost[1, 2], lost[0, 0] = 0.85, np.nan
    figure, found = panels(replace(good, retention=lost))
    assert "min 0.850, 1 of 19 patterns below 0.9" in figure.get_suptitle()
    assert [2.0, 1.0] in rings(found["retention"])  # (x, y)
    shown = found["retention"].images[0]
    assert shown.get_array().mask.sum() == 1
    assert shown.norm(0.85) < 0 <= shown.norm(0.9)  # drawn in the color of what is too low
    assert figure._suptitle.get_color() == found["retention"].title.get_color()


def test_title_says_that_nothing_was_cropped():
    data = make()
    whole = np.zeros_like(data.window_y)
    figure, _ = panels(replace(data, window_y=whole, window_x=whole, window_shape=(24, 32)))
    title = figure.get_suptitle()
    assert title.startswith("test\nNOT CROPPED: the window is the whole detector, 24 x 32 px, ")
    assert figure._suptitle.get_color() == BAD
    figure, _ = panels(replace(data, window_shape=(24, 28), is_ok=False))
    little = "test\nLITTLE GAINED: window of 24 x 32 px cut to 24 x 28 px, retention"
    assert figure.get_suptitle().startswith(little)
    figure, _ = panels(replace(data, window_shape=(24, 12)))
    assert figure.get_suptitle().startswith("test\nwindow 24 x 12 px, retention")


def test_histogram_counts_and_global_radius():
    data = make()
    _, found = panels(data)
    bars = {
        round(bar.get_x() + bar.get_width() / 2): bar.get_height()
        for bar in found["radius"].patches
    }
    values, counts = np.unique(data.radius, return_counts=True)
    assert bars == dict(zip(values.astype(int).tolist(), counts.tolist(), strict=True))
    assert found["radius"].lines[0].get_xdata()[0] == 6
    _, found = panels(replace(data, radius=np.arange(20.0).reshape(4, 5) ** 2))
    assert len(found["radius"].patches) <= 61
    assert sum(bar.get_height() for bar in found["radius"].patches) == 20


def test_center_maps_show_the_shift_from_the_median():
    data = make(empty=(3,))
    _, found = panels(data)
    for name in ("center_y", "center_x"):
        center = getattr(data, name)
        shown = found[name].images[0]
        np.testing.assert_allclose(shown.get_array().filled(np.nan), center - np.nanmedian(center))
        assert shown.norm.vmin == -shown.norm.vmax
        assert f"{np.nanmedian(center):.2f}" in found[name].get_title()


def test_deflection_replaces_the_centers():
    data, rng = make(), np.random.default_rng(1)
    deflection_y, deflection_x = rng.normal(0, [[[0.2]], [[0.1]]], (2, 4, 5))
    data = replace(data, deflection_y=deflection_y, deflection_x=deflection_x, descan_order=2)
    _, found = panels(data)
    assert "center_y" not in found
    assert found["deflection_y"].get_title() == "deflection_y: center − fit of order 2 (px)"
    for name in ("deflection_y", "deflection_x"):  # not relative to a median
        np.testing.assert_array_equal(found[name].images[0].get_array(), getattr(data, name))
    scales = [found[f"deflection_{axis}"].images[0].norm.vmax for axis in "yx"]
    assert scales[0] == scales[1]


def test_curve_marks_what_was_chosen():
    data = replace(make(), window_shape=(12, 16))
    _, found = panels(data)
    lines = {line.get_label(): line for line in found["curve"].lines}
    np.testing.assert_array_equal(lines["mean"].get_ydata(), data.curve_mean)
    np.testing.assert_array_equal(lines["lowest"].get_xdata(), data.curve_size)
    assert lines["target 0.98"].get_ydata()[0] == 0.98
    assert lines["min 0.9"].get_ydata()[0] == 0.9
    assert lines["window 12 px"].get_xdata()[0] == 12
    assert lines["window 16 px"].get_xdata()[0] == 16


def test_curve_reaches_the_size_that_would_do_and_its_legend_is_beside_it():
    data = replace(make(), window_shape=(4, 4), min_retention=0.99)
    enough = data.curve_size[data.curve_min >= 0.99][0]
    assert enough > 8
    figure, found = panels(data)
    assert enough < found["curve"].get_xlim()[1] < 2 * enough
    figure.canvas.draw()
    legend = found["curve"].get_legend().get_window_extent()
    assert not legend.overlaps(found["curve"].get_window_extent())


@pytest.mark.parametrize(("scan", "step"), [((4, 200), 1), ((20, 30), 10)])
def test_long_scans_keep_their_aspect(scan, step):
    """And their maps are as long as the picture, or two rows high."""
    data = make(scan, (12, 12), radius=3)
    first, second = (replace(axis, units="nm", scale=1.0) for axis in data.scan_axes)
    data = replace(data, scan_axes=(replace(first, scale=float(step)), second))
    figure, found = panels(data)
    figure.canvas.draw()
    for name in ("bright_field", "dark_field", "center_y", "center_x", "retention"):
        extent = found[name].get_window_extent()
        assert extent.height / extent.width == pytest.approx(step * scan[0] / scan[1], rel=0.01)
        assert max(extent.height, extent.width) > 5 * DPI


def test_verdict_comes_first_and_is_not_cut():
    verdict = "verdict     " + " ".join(f"reason{i}" for i in range(40))
    _, found = panels(replace(make(), lines=(verdict, *["dose        " + "word " * 60] * 9)))
    (shown,) = found["text"].texts
    words = shown.get_text().split()
    assert words[:41] == verdict.split()
    assert words.count("dose") > 2  # each cut, so that there is room for others


def test_result_that_is_not_cropped_says_so(tmp_path):
    data = make()
    bare = FigureData(title="raw", axes=data.axes, scan_axes=data.scan_axes, lines=data.lines)
    with_patterns = replace(bare, mean_pattern=data.mean_pattern, output_mean=data.mean_pattern)
    figure, found = panels(with_patterns)
    assert list(found) == ["mean", "output", "text"]
    assert not found["mean"].patches
    assert figure.get_suptitle() == "raw\nNOT CROPPED"
    draw(with_patterns, tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (16 * DPI, int(INCH[1] * DPI))
    draw(bare, tmp_path / "b.png")
    assert list(panels(bare)[1]) == ["text"]
    centered = replace(with_patterns, center_y=data.center_y, center_x=data.center_x)
    draw(replace(centered, radius=data.radius), tmp_path / "c.png")
    assert png_size(tmp_path / "c.png") == (16 * DPI, int(INCH[2] * DPI))


@pytest.mark.parametrize("scan", [(1, 1), (1, 7), (6, 1), (2, 40), (9,), (1,)])
@pytest.mark.parametrize("align", ["fixed", "pattern"])
def test_every_scan_shape_is_drawn(tmp_path, scan, align):
    data = make(scan, align=align)
    draw(data, tmp_path / "a.png")
    _, found = panels(data)
    assert len(found["retention"].images) == (min(scan) > 1 and len(scan) == 2)
    if 1 in scan or len(scan) == 1:  # a list, a row or a column
        shift = data.center_x.ravel() - np.median(data.center_x)
        np.testing.assert_allclose(found["center_x"].lines[0].get_ydata(), shift)
        assert (
            found["center_x"]
            .get_xlabel()
            .startswith(data.scan_axes[int(np.argmax(scan))].name if max(scan) > 1 else "scan")
        )
    place = ", ".join(map(str, data.pictures[0][1]))
    assert f"({place})" in found["worst 1"].get_title()


@pytest.mark.parametrize(
    ("dtype", "detector"), [(np.uint8, (8, 64)), (np.uint16, (400, 700)), (np.float16, (30, 20))]
)
def test_every_type_and_detector_shape_is_drawn(tmp_path, dtype, detector):
    draw(make((2, 3), detector, dtype, radius=3), tmp_path / "a.png")


def test_odd_patterns_are_drawn(tmp_path):
    odd = [
        np.zeros((24, 32), np.uint16),
        np.full((24, 32), -1.0, np.float32),
        np.full((24, 32), np.nan),
        np.full((24, 32), 7),
        np.where(np.eye(24, 32) > 0, np.inf, -np.inf),
        np.eye(24, 32) * 1e308,
        np.eye(24, 32) * 5e-324,
        np.eye(24, 32, dtype=bool),
        np.zeros((1, 1)),
        np.full((1, 1), 3, np.uint16),
        np.ones((1, 500)),
    ]
    pictures = [(f"worst {k}", (0, 0), one, (0, 0)) for k, one in enumerate(odd[2:], 1)]
    data = replace(make(), mean_pattern=odd[0], output_mean=odd[1], mask=None, pictures=pictures)
    draw(data, tmp_path / "a.png")


def test_empty_patterns_are_left_out(tmp_path):
    draw(make(empty=(0, 7)), tmp_path / "some.png")
    nothing = np.full((4, 5), np.nan)
    names = ("center_y", "center_x", "bright_field", "dark_field", "radius", "retention")
    data = replace(make(), pictures=(), **dict.fromkeys(names, nothing))
    draw(data, tmp_path / "all.png")
    figure, found = panels(data)
    assert "empty" in found["radius"].get_title()
    assert figure.get_suptitle() == "test\nwindow 12 x 12 px"


def test_lone_spot_of_a_large_detector_is_not_lost():
    pattern = np.zeros((1030, 1500))
    pattern[777, 501] = 9.0
    _, found = panels(replace(make(), mean_pattern=pattern, mask=None))
    shown = found["mean"].images[0].get_array()
    assert max(shown.shape) <= 320
    assert (shown == 9).sum() == 1


def test_any_text_is_drawn(tmp_path):
    text = "電子 $x_ $\\frac$ \tüÅ⁻¹ \udcff\n" * 3
    axes = tuple(replace(axis, units="$Å^{-1}") for axis in make().axes)
    data = replace(make(), title="名/" + "long_folder/" * 30, lines=(text,) * 40, axes=axes)
    draw(data, tmp_path / "a.png")
    draw(replace(data, title=text), tmp_path / "b.png")
    _, found = panels(data)
    (shown,) = found["text"].texts
    assert shown.get_text().count("\n") == 25
    assert shown.get_text().endswith("…")


def long_numbers():
    long = {"scale": 1e-4, "offset": -0.0125, "units": "1/nm"}
    data = make((4, 5), (64, 64), align="pattern")
    axes, output = ((Axis("ky", n, **long), Axis("kx", n, **long)) for n in (64, 12))
    return replace(data, axes=axes, output_axes=output)


def large_numbers():
    data = make()
    pictures = [(*where, 1e9 * cut, origin) for *where, cut, origin in data.pictures]
    names = ("mean_pattern", "output_mean", "bright_field", "dark_field")
    known = {name: 1e9 * getattr(data, name) for name in names}
    return replace(data, pictures=pictures, **known)


def bad_pixels():
    mask = np.zeros((24, 32), np.uint8)
    mask[:8], mask[10:20, 4:30], mask[9, 3:5] = GIVEN, STOP, HOT
    mask[21, 3:9], mask[22, 3] = DEAD, NOT_FINITE
    return replace(make(align="descan"), mask=mask)


def deflected():
    shift = 1e-3 * np.arange(20.0).reshape(4, 5)
    return replace(make(), deflection_y=shift, deflection_x=-shift, descan_order=1)


def small_units():
    small = {"scale": 1.7e-7, "offset": -2.3e-5, "units": "m"}
    return replace(make(), axes=(Axis("ky", 24, **small), Axis("kx", 32, **small)))


CASES = {
    "usual": make,
    "own windows": lambda: make(align="pattern"),
    "list": lambda: make((9,)),
    "row": lambda: make((1, 40)),
    "wide": lambda: make((2, 40), (12, 60)),
    "much text": lambda: replace(make(), lines=("all the words of a long report " * 5,) * 20),
    "long numbers": long_numbers,
    "large numbers": large_numbers,
    "small units": small_units,
    "bad pixels": bad_pixels,
    "deflected": deflected,
    "long scan": lambda: make((4, 200), (12, 12), radius=3),
    "high scan": lambda: make((200, 4), (12, 12), radius=3),
    "large scan": lambda: make((30, 1100), (12, 12), radius=3),
}


@pytest.mark.parametrize("case", CASES)
def test_no_text_overlaps_another_or_the_panels_of_others(case):
    figure, found = panels(CASES[case]())
    figure.canvas.draw()
    renderer, box, texts = figure.canvas.get_renderer(), figure.bbox, [*figure.texts]
    for ax in found.values():
        texts += [ax.title, *ax.texts]
        if ax.get_label() in {"mean", "curve"} and ax.get_legend():
            texts += ax.get_legend().get_texts()
        if ax.get_label() != "text":
            texts += [ax.xaxis.label, ax.yaxis.label, *in_view(ax.xaxis), *in_view(ax.yaxis)]
    extents = [
        (text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()
    ]
    assert len(extents) > 10
    for i, (text, one) in enumerate(extents):
        assert box.x0 <= one.x0 < one.x1 <= box.x1, text
        assert box.y0 <= one.y0 < one.y1 <= box.y1, text
        assert not [(text, other) for other, place in extents[:i] if one.overlaps(place)]
    for name in found.keys() - {"text"}:
        around = found[name].get_window_extent(renderer).padded(1)
        around.x1 += 0.2 * DPI  # its colorbar
        for other in found.keys() - {name}:
            for text in (*found[other].texts, found[other].title, found[other].yaxis.label):
                extent = text.get_window_extent(renderer)
                assert not (text.get_text() and around.overlaps(extent)), (name, other)


def in_view(axis):
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for place, label in ticks if low <= place <= high]


def test_small_units_are_numbered_with_a_common_factor():
    figure, found = panels(small_units())
    figure.canvas.draw()
    assert found["mean"].get_xlabel() == "kx (1e-5 m)"
    texts = [text.get_text() for text in found["mean"].get_yticklabels()]
    np.testing.assert_allclose([float(text) for text in texts], found["mean"].get_yticks() * 1e5)


def disc_file(folder):
    """A scan of 6 x 5 discs of radius 5 px that wander; two pixels are hot."""
    rng, (y, x) = np.random.default_rng(3), np.mgrid[:48, :48]
    data = np.empty((6, 5, 48, 48), np.uint16)
    for i, j in np.ndindex(6, 5):
        inside = np.clip(5.5 - np.hypot(y - 23 - 0.8 * i, x - 24 + 0.6 * j), 0, 1)
        data[i, j] = rng.poisson(60 * inside + 0.3 * np.exp(-np.hypot(y - 25, x - 23) / 6))
    data[:, :, 5, 7] = data[:, :, 40, 41] = 500
    np.save(folder / "discs.npy", data)
    return folder / "discs.npy"


def drawn(config, monkeypatch):
    """What a run draws."""
    from stem_dask.job import passes
    from stem_dask.job.run import run

    found = []
    monkeypatch.setattr(
        passes, "draw", lambda report, path: (found.append(report), draw(report, path))
    )
    run(config)
    return found[0]


def test_run_draws_the_beam_that_it_found(tmp_path, make_config, monkeypatch):
    path = disc_file(tmp_path)
    mask = {"pixels": [[30, 3]], "rows": [], "columns": []}
    config = make_config(
        path, input={"mask": mask}, output={"figure": True}, crop={"align": "descan"}
    )
    data = drawn(config, monkeypatch)
    assert data.disc_radius == pytest.approx(5, abs=0.2)
    assert np.argwhere(data.mask & HOT).tolist() == [[5, 7], [40, 41]]
    assert np.argwhere(data.mask & GIVEN).tolist() == [[30, 3]]
    assert len(data.pictures) == 8
    source, (_, found) = np.load(path), panels(data)
    source[:, :, 30, 3] = 0
    for name, index, cut, (y0, x0) in data.pictures:
        part = source[index][y0 : y0 + cut.shape[0], x0 : x0 + cut.shape[1]]
        np.testing.assert_array_equal(cut, part)
        x, y = crosshair(found[name])
        np.testing.assert_allclose((y, x), (23 + 0.8 * index[0], 24 - 0.6 * index[1]), atol=0.3)
    names = ["bright_field", "dark_field", "deflection_y", "deflection_x", "retention"]
    assert set(names) <= found.keys()
    assert data.lines[0].startswith("verdict  ")
    assert "stem-dask" not in "".join(data.lines)  # commands are in the report, to be copied
    np.testing.assert_allclose(found["deflection_y"].images[0].get_array(), 0, atol=0.3)
    # an anti-aliased disc has the area of its radius
    total = 60 * np.pi * 5**2
    np.testing.assert_allclose(found["bright_field"].images[0].get_array(), total, rtol=0.06)


@pytest.mark.parametrize("method", ["centroid", "friedel"])
def test_run_without_a_disc_draws_mask_and_centers(tmp_path, make_config, monkeypatch, method):
    analyze = {"center_method": method, "ignore_bad_pixels": False}
    mask = {"pixels": [[30, 3], [5, 7], [40, 41]]}
    config = make_config(
        disc_file(tmp_path), input={"mask": mask}, analyze=analyze, output={"figure": True}
    )
    data = drawn(config, monkeypatch)
    assert np.argwhere(data.mask & GIVEN).tolist() == sorted(mask["pixels"])
    assert data.disc_radius is None
    _, found = panels(data)
    assert not {"bright_field", "dark_field", "deflection_y"} & found.keys()
    assert {"center_y", "center_x", "median"} <= found.keys()
    source = np.load(tmp_path / "discs.npy").astype(float)
    source[..., [30, 5, 40], [3, 7, 41]] = 0
    np.testing.assert_allclose(found["total"].images[0].get_array(), source.sum((2, 3)))


def test_file_that_cannot_be_written_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match=r"cannot write the figure .*missing"):
        draw(make(), tmp_path / "missing" / "a.png")


def test_drawing_imports_no_pyplot_and_importing_no_matplotlib(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from stem_dask.job.figure import FigureData, draw\n"
        "from stem_dask.core.model import Axis\n"
        "assert 'matplotlib' not in sys.modules\n"
        "axes = (Axis('ky', 4), Axis('kx', 5))\n"
        "scan = (Axis('scan_y', 1), Axis('scan_x', 1))\n"
        "one = np.ones((4, 5))\n"
        "draw(FigureData(title='t', axes=axes, scan_axes=scan, mean_pattern=one), sys.argv[1])\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    path = tmp_path / "a.png"
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(path)], check=True, timeout=120)
    assert png_size(path)[0] == 16 * DPI
