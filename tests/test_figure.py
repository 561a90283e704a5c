"""The figure: the artists hold the right values, and odd data are drawn without a warning."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from stem_dask.core.errors import StoreError
from stem_dask.core.model import Axis
from stem_dask.job.figure import BAD, DPI, FigureData, build, draw

INCH = {1: 4.6, 2: 8.3, 3: 12.0}


def make(scan=(4, 5), detector=(24, 32), dtype=np.uint16, align="fixed", radius=6, empty=()):
    """A beam that wanders over the detector, with every number of `FigureData` taken from it."""
    rng = np.random.default_rng(0)
    n, (rows, cols) = int(np.prod(scan)), detector
    center_y = rows / 2 + rng.uniform(-2, 2, n)
    center_x = cols / 2 + rng.uniform(-2, 2, n)
    y, x = np.mgrid[:rows, :cols]
    spread = (y - center_y[:, None, None]) ** 2 + (x - center_x[:, None, None]) ** 2
    patterns = rng.poisson(50 * np.exp(-spread / 8)).astype(dtype)
    patterns[list(empty)] = 0
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
    order = np.argsort(retention)[: min(3, n - len(empty))]
    size = np.arange(2, 2 * rows, 2)
    units = {"scale": 0.5, "offset": -6.0, "units": "1/nm"}
    return FigureData(
        title="test",
        axes=(Axis("ky", rows, **units), Axis("kx", cols, **units)),
        output_axes=(Axis("ky", 2 * radius, **units), Axis("kx", 2 * radius, **units)),
        scan_axes=tuple(
            Axis(name, length, 2.0, 0.0, "nm")
            for name, length in zip(("scan_y", "scan_x")[-len(scan) :], scan, strict=True)
        ),
        mean_pattern=patterns.mean(0),
        max_pattern=patterns.max(0),
        cropped_mean=cut.mean(0),
        window_y=(ry - radius).reshape(scan),
        window_x=(rx - radius).reshape(scan),
        window_shape=(2 * radius, 2 * radius),
        align=align,
        center_y=np.where(gone, np.nan, center_y).reshape(scan),
        center_x=np.where(gone, np.nan, center_x).reshape(scan),
        radius=np.where(gone, np.nan, radius - 1 - np.arange(n) % 3).reshape(scan),
        retention=retention.reshape(scan),
        worst=[
            (
                tuple(int(i) for i in np.unravel_index(k, scan)),
                patterns[k],
                (int(ry[k]) - radius, int(rx[k]) - radius),
                float(retention[k]),
            )
            for k in order
        ],
        curve_size=size,
        curve_mean=1 - np.exp(-size / 4),
        curve_min=1 - np.exp(-size / 6),
        target_retention=0.98,
        min_retention=0.9,
        global_radius=radius,
        lines=("source  test", "", "a line that is much too long for the panel " * 3),
    )


def panels(data):
    figure = build(data)
    return figure, {ax.get_label(): ax for ax in figure.axes}


def outline(ax, name="window"):
    (box,) = [patch for patch in ax.patches if patch.get_label() == name]
    return box.get_bbox().extents.tolist()


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_all_panels_are_written(tmp_path):
    path = tmp_path / "x_visualization.png"
    assert draw(make(), path) is None
    assert png_size(path) == (16 * DPI, 12 * DPI)
    _, found = panels(make())
    assert list(found) == [
        "mean", "max", "cropped mean", "text", "worst 1", "worst 2", "worst 3", "curve", "radius",
        "center_y", "center_x", "retention",
    ]  # fmt: skip


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
    for name in ("mean", "max"):
        assert outline(found[name]) == [-2.75, -4.75, 3.25, 0.25]
        assert found[name].get_xlabel() == "kx (1/nm)"
        assert found[name].get_ylabel() == "ky (1/nm)"
        assert len(found[name].patches) == 1
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
    assert outline(found["max"]) == [edge(3), edge(4), edge(15), edge(16)]
    assert outline(found["max"], "reach") == [edge(2), edge(0), edge(20), edge(17)]
    (reach,) = [p for p in found["max"].patches if p.get_label() == "reach"]
    assert reach.get_linestyle() == "--"
    assert "dashed" in found["max"].get_title()


def test_window_that_leaves_the_detector_is_seen_whole():
    data = replace(make(), window_y=np.full((4, 5), -4), window_x=np.full((4, 5), 25))
    _, found = panels(data)
    box = outline(found["mean"])
    (left, right), (bottom, top) = found["mean"].get_xlim(), found["mean"].get_ylim()
    assert left <= box[0] < box[2] < right
    assert top < box[1] < box[3] <= bottom


def test_worst_patterns_have_their_own_windows_and_say_where():
    data = make(align="pattern")
    _, found = panels(data)
    for rank, (index, pattern, (y0, x0), kept) in enumerate(data.worst, 1):
        ax = found[f"worst {rank}"]
        assert f"({index[0]}, {index[1]})" in ax.get_title()
        assert f"{kept:.4f}" in ax.get_title()
        assert outline(ax)[:2] == [-6 + 0.5 * (x0 - 0.5), -6 + 0.5 * (y0 - 0.5)]
        shown = ax.images[0].get_array()
        bright = pattern >= 1
        np.testing.assert_array_equal(shown[bright], pattern[bright])
        assert (shown[~bright] < 1).all()  # no count is darker than one count


def test_title_tells_whether_the_crop_is_right():
    good = replace(make(), retention=np.full((4, 5), 0.991))
    figure, found = panels(good)
    assert figure.get_suptitle() == (
        "test\nwindow 12 x 12 px, retention mean 0.991, min 0.991, 0 of 20 patterns below 0.9"
    )
    assert "0 below 0.9" in found["retention"].get_title()
    lost = good.retention.copy()
    lost[1, 2], lost[0, 0] = 0.85, np.nan
    figure, found = panels(replace(good, retention=lost))
    assert "min 0.850, 1 of 19 patterns below 0.9" in figure.get_suptitle()
    (rings,) = found["retention"].collections
    assert rings.get_offsets().tolist() == [[2.0, 1.0]]  # (x, y)
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
    figure, _ = panels(replace(data, window_shape=(24, 12)))
    assert "NOT CROPPED" not in figure.get_suptitle()


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


def test_without_a_crop_only_the_known_panels_are_drawn(tmp_path):
    data = make()
    bare = FigureData(title="raw", axes=data.axes, scan_axes=data.scan_axes, lines=data.lines)
    with_patterns = replace(bare, mean_pattern=data.mean_pattern, max_pattern=data.max_pattern)
    figure, found = panels(with_patterns)
    assert list(found) == ["mean", "max", "text"]
    assert not found["mean"].patches
    assert figure.get_suptitle() == "raw\nnot cropped"
    draw(with_patterns, tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (16 * DPI, round(INCH[1] * DPI))
    draw(bare, tmp_path / "b.png")
    assert list(panels(bare)[1]) == ["text"]
    centered = replace(with_patterns, center_y=data.center_y, center_x=data.center_x)
    draw(replace(centered, radius=data.radius), tmp_path / "c.png")
    assert png_size(tmp_path / "c.png") == (16 * DPI, round(INCH[2] * DPI))


@pytest.mark.parametrize("scan", [(1, 1), (1, 7), (2, 40), (9,), (1,)])
@pytest.mark.parametrize("align", ["fixed", "pattern"])
def test_every_scan_shape_is_drawn(tmp_path, scan, align):
    data = make(scan, align=align)
    draw(data, tmp_path / "a.png")
    _, found = panels(data)
    assert len(found["retention"].images) == (len(scan) == 2)
    if len(scan) == 1:
        shift = data.center_x - np.median(data.center_x)
        np.testing.assert_allclose(found["center_x"].lines[0].get_ydata(), shift)
        assert f"({data.worst[0][0][0]})" in found["worst 1"].get_title()


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
    worst = [((0, 0), pattern, (0, 0), np.nan) for pattern in odd[3:]]
    data = replace(make(), mean_pattern=odd[0], max_pattern=odd[1], cropped_mean=odd[2])
    draw(replace(data, worst=worst), tmp_path / "a.png")


def test_empty_patterns_are_left_out(tmp_path):
    draw(make(empty=(0, 7)), tmp_path / "some.png")
    nothing = np.full((4, 5), np.nan)
    data = replace(
        make(), center_y=nothing, center_x=nothing, radius=nothing, retention=nothing, worst=()
    )
    draw(data, tmp_path / "all.png")
    figure, found = panels(data)
    assert "empty" in found["radius"].get_title()
    assert figure.get_suptitle() == "test\nwindow 12 x 12 px"


def test_lone_spot_of_a_large_detector_is_not_lost():
    pattern = np.zeros((1030, 1500))
    pattern[777, 501] = 9.0
    _, found = panels(replace(make(), max_pattern=pattern))
    shown = found["max"].images[0].get_array()
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
    worst = [(index, 1e9 * pattern, *more) for index, pattern, *more in data.worst]
    known = {"mean_pattern": 1e9 * data.mean_pattern, "center_y": 1e3 * data.center_y}
    return replace(data, max_pattern=3e8 * data.max_pattern, worst=worst, **known)


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
}


@pytest.mark.parametrize("case", CASES)
def test_no_text_overlaps_another_or_the_panels_of_others(case):
    figure, found = panels(CASES[case]())
    figure.canvas.draw()
    renderer, box, texts = figure.canvas.get_renderer(), figure.bbox, [figure._suptitle]
    for ax in found.values():
        texts += [ax.title, *ax.texts]
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
