"""The picture of a run: where the window lies, what it cut, and which patterns lost most."""

import math
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import StoreError
from stem_dask.core.model import Align, Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pair = tuple[int, int]

Worst = tuple[tuple[int, ...], NDArray, Pair, float]

Panel = tuple[str, Callable[["Axes", "FigureData", Any], None], Any]

COLUMNS, WIDTH, HEADER, CELL_HEIGHT = 4, 16.0, 0.9, 3.7

# Every place is fixed, in inches: to have matplotlib measure all texts costs more than all the rest.
LEFT, RIGHT, BELOW, ABOVE = 0.82, 0.7, 0.5, 0.5  # of a picture in its cell; a title has two lines

TEXT_LEFT, TEXT_TOP = 0.4, 3.5  # of the text in its cell

WINDOW, GOOD, BAD, ALLOWED, NOTHING = "#00e5ff", "#1b5e20", "#c00020", "#d17a00", "0.8"

MOST_PIXELS, MOST_TITLE, MOST_RINGS, MOST_BINS = 320, 110, 500, 60  # 320: what a panel can show

TEXT_COLUMNS, TEXT_ROWS = 44, 25


@dataclass(frozen=True, eq=False, kw_only=True)
class FigureData:
    """What the figure shows, as plain arrays in source pixels; what is None (or empty) has no panel.

    ``axes`` are the source's (ky, kx), ``scan_axes`` two for a scan and one for a list of patterns; "scan" below is
    their shape. ``worst`` has up to three (scan index, pattern, (first row, first column) of its window, retention).
    """

    title: str
    axes: tuple[Axis, Axis]
    scan_axes: tuple[Axis, ...]
    mean_pattern: NDArray | None = None  # (ky, kx)
    max_pattern: NDArray | None = None  # (ky, kx)
    output_axes: tuple[Axis, Axis] | None = None
    cropped_mean: NDArray | None = None  # output (ky, kx)
    window_y: NDArray | None = None  # scan, first row of each window; may leave the detector
    window_x: NDArray | None = None
    window_shape: Pair | None = None
    align: Align = "fixed"
    center_y: NDArray | None = None  # scan, NaN where empty; so are the next three
    center_x: NDArray | None = None
    radius: NDArray | None = None
    retention: NDArray | None = None
    worst: Sequence[Worst] = ()
    curve_size: NDArray | None = None  # (sizes,) window size against retention; all three or none
    curve_mean: NDArray | None = None
    curve_min: NDArray | None = None
    target_retention: float | None = None
    min_retention: float | None = None
    global_radius: int | None = None
    lines: tuple[str, ...] = ()


def draw(report: FigureData, path: str | PathLike[str]) -> None:
    """Write the figure as a PNG, equal data as equal bytes; raise `StoreError` where that fails."""
    with _style():
        figure = build(report)
        try:  # matplotlib's version in the file would make the bytes differ for nothing
            fast = {"compress_level": 1}
            figure.savefig(
                path, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs=fast
            )
        except OSError as error:
            problem = f"cannot write the figure {str(path)!r}: {error}; choose a writable folder"
            raise StoreError(problem) from error


def build(report: FigureData) -> "Figure":
    """Lay out the panels that have data; the label of each axes is its panel's name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(report)
    columns, rows = min(COLUMNS, len(panels)), -(-len(panels) // COLUMNS)
    height, cell = HEADER + CELL_HEIGHT * rows, WIDTH / max(columns, 3)
    left = (WIDTH - cell * columns) / 2 + LEFT
    size = (cell - LEFT - RIGHT) / WIDTH, (CELL_HEIGHT - BELOW - ABOVE) / height
    with _style():
        figure = Figure((WIDTH, height), DPI)
        FigureCanvasAgg(figure)  # not pyplot: needs no display, leaves the caller's figures alone
        for place, (name, paint, value) in enumerate(panels):
            row, column = divmod(place, COLUMNS)
            x, y = left + cell * column, CELL_HEIGHT * (rows - 1 - row) + BELOW
            ax = figure.add_axes((x / WIDTH, y / height, *size), label=name, anchor="N")
            paint(ax, report, value)
        verdict, color = _verdict(report)
        title = f"{printable(report.title[:MOST_TITLE])}\n{verdict}"
        look = {"y": 1 - 0.12 / height, "color": color, "fontsize": fitting(title, 100, 15)}
        figure.suptitle(title, **look)
    return figure


def _panels(report: FigureData) -> list[Panel]:
    """Name, drawing function and data of the panels that have data, in reading order."""
    panels: list[Panel] = [
        ("mean", _draw_pattern, report.mean_pattern),
        ("max", _draw_pattern, report.max_pattern),
        ("cropped mean", _draw_pattern, report.cropped_mean),
        ("text", _draw_text, report.lines),
        *((f"worst {rank}", _draw_worst, one) for rank, one in enumerate(report.worst, 1)),
        ("curve", _draw_curve, report.curve_size),
        ("radius", _draw_radius, report.radius),
        ("center_y", _draw_center, report.center_y),
        ("center_x", _draw_center, report.center_x),
        ("retention", _draw_retention, report.retention),
    ]
    return [panel for panel in panels if panel[2] is not None]


def _verdict(report: FigureData) -> tuple[str, str]:
    height, width = report.window_shape or (0, 0)
    text = f"window {height} x {width} px" if height else "not cropped"
    if not (known := _finite(report.retention)).size:
        return text, "black"
    below = int((known < (report.min_retention or 0)).sum())
    text += f", retention mean {known.mean():.3f}, min {known.min():.3f}"
    text += f", {below} of {known.size} patterns below {report.min_retention or 0:g}"
    return text, BAD if below else GOOD


def _draw_pattern(ax: "Axes", report: FigureData, pattern: NDArray) -> None:
    """Mean or maximum with the window (own windows: the median one and the reach of all), or cropped."""
    cropped = ax.get_label() == "cropped mean"
    ys, xs, shape = report.window_y, report.window_x, report.window_shape
    title, boxes = "", []
    if not (cropped or ys is None or xs is None or shape is None):
        if report.align == "pattern":
            reach = int(np.ptp(ys)) + shape[0], int(np.ptp(xs)) + shape[1]
            boxes.append(("reach", (int(ys.min()), int(xs.min())), reach))
            title = "\n(median window; dashed: reach of all)"
        middle = int(np.rint(np.median(ys))), int(np.rint(np.median(xs)))
        boxes.append(("window", middle, shape))
    _show_pattern(ax, pattern, (cropped and report.output_axes) or report.axes, boxes)
    rows, columns = pattern.shape
    headline(ax, f"{ax.get_label()} pattern, {rows} x {columns} px{title}")


def _draw_worst(ax: "Axes", report: FigureData, worst: Worst) -> None:
    index, pattern, origin, kept = worst
    shape = report.window_shape
    _show_pattern(ax, pattern, report.axes, [("window", origin, shape)] if shape else [])
    place = ", ".join(str(int(i)) for i in index)
    color = BAD if kept < (report.min_retention or 0) else "black"
    headline(ax, f"{ax.get_label()}: scan ({place}), retention {kept:.4f}", color)


def _draw_text(ax: "Axes", report: FigureData, lines: tuple[str, ...]) -> None:
    ax.axis("off")
    wrapper = textwrap.TextWrapper(TEXT_COLUMNS, subsequent_indent="  ")
    rows = [row for line in lines for row in wrapper.wrap(printable(line)) or [""]]
    rows[TEXT_ROWS:] = ["…"] if len(rows) > TEXT_ROWS else []
    x, y = np.array([TEXT_LEFT - LEFT, TEXT_TOP - BELOW]) / inches(ax)
    text = ax.text(x, y, "\n".join(rows), va="top", family="DejaVu Sans Mono", fontsize=9)
    text.set_linespacing(1.1)


def _draw_curve(ax: "Axes", report: FigureData, size: NDArray) -> None:
    target, floor = report.target_retention, report.min_retention
    ax.plot(size, np.asarray(report.curve_mean), ".-", color="C0", label="mean")
    ax.plot(size, np.asarray(report.curve_min), ".-", color="#d1495b", label="lowest")
    for value, label, color in ((target, "target", GOOD), (floor, "min", ALLOWED)):
        if value is not None:
            ax.axhline(value, color=color, ls="--", lw=1.4, label=f"{label} {value:g}")
    for side in sorted(set(report.window_shape or ())):
        ax.axvline(side, color="black", lw=2, label=f"window {side} px")
    # Only the part that decides: up to twice the window, from just below the lowest retention.
    lowest = min(target or 0.9, floor or 0.9, _finite(report.retention).min(initial=0.9))
    right = 2 * max(report.window_shape or (1, *size))
    ax.set(xlim=(0, right), ylim=(max(0.0, lowest - 0.1), 1.01))
    mark(ax.xaxis, "window size", "px", whole=True)
    mark(ax.yaxis, "retention")
    headline(ax, "retention against window size")
    ax.legend(loc="lower right", framealpha=1)


def _draw_radius(ax: "Axes", report: FigureData, radius: NDArray) -> None:
    known, chosen = _finite(radius), report.global_radius
    title = "radius: every pattern is empty"
    if known.size:
        low, high = int(known.min()), int(known.max())
        step = -(-(high - low + 1) // MOST_BINS)
        edges = (np.arange(low, high + step + 1, step) - 0.5).tolist()
        # A few patterns far out decide the window; among very many they show only on a log axis.
        log = known.size > 2000
        counts, _, _ = ax.hist(known, edges, color="#4c78a8", edgecolor="white", lw=0.5, log=log)
        most = float(np.max(counts))  # room for the legend above the bars
        ax.set(
            xlim=(low - 3, max(high, chosen or 0) + 3),
            ylim=(0.5, 5 * most) if log else (0, 1.25 * most),
        )
        title = f"radius per pattern: median {np.median(known):g}, max {high}"
    if chosen is not None:
        ax.axvline(chosen, color="black", lw=2, label=f"global radius {chosen}")
        ax.legend(loc="upper center", framealpha=1)
    mark(ax.xaxis, "radius", "px", whole=True)
    mark(ax.yaxis, "patterns", whole=True)
    headline(ax, title)


def _draw_center(ax: "Axes", report: FigureData, center: NDArray) -> None:
    known, both = _finite(center), map(_finite, (report.center_y, report.center_x))
    middle = float(np.median(known)) if known.size else 0.0
    far = np.concatenate([[0.0], *(abs(one - np.median(one)) for one in both if one.size)])
    # One scale for both maps, not stretched by a few stray patterns.
    most = max(float(np.quantile(far, 0.99, method="higher")), 0.01)
    extend = "both" if far.max() > most else "neither"
    values, span = np.asarray(center) - middle, {"vmin": -most, "vmax": most}
    _show_scan(ax, report, values, extend, cmap="RdBu_r", **span)
    headline(ax, f"{ax.get_label()} − median {middle:.2f} (px)")


def _draw_retention(ax: "Axes", report: FigureData, retention: NDArray) -> None:
    from matplotlib import colormaps

    values, floor = np.asarray(retention), report.min_retention or 0.0
    known, below = _finite(values), np.argwhere(values < floor)
    high = float(known.max(initial=floor + 1e-3))
    low = floor if len(below) else min(float(known.min(initial=high)), high - 1e-3)
    cmap, span = colormaps["viridis"].with_extremes(under=BAD), {"vmin": low, "vmax": high}
    if values.ndim == 1:
        ax.axhline(floor, color=ALLOWED, ls="--", lw=1.4)
    if 0 < len(below) <= MOST_RINGS:  # one pixel of a large map would not be seen
        y = below[:, 0] if values.ndim == 2 else values[below[:, 0]]
        ax.scatter(below[:, -1], y, 60, facecolors="none", edgecolors=BAD, linewidths=1.5)
    _show_scan(ax, report, values, "min" if len(below) else "neither", cmap=cmap, **span)
    headline(ax, f"retention ({len(below)} below {floor:g})", BAD if len(below) else "black")


def _show_pattern(
    ax: "Axes", pattern: NDArray, axes: tuple[Axis, Axis], boxes: Sequence[tuple[str, Pair, Pair]]
) -> None:
    """Draw on a log scale, in the units of the axes; what has no logarithm is black."""
    from matplotlib.colors import LogNorm

    image = np.where(np.isfinite(pattern), pattern, 0).astype(np.float64).clip(0, 1e300)
    (y, x), (rows, cols) = map(_shown, axes), image.shape
    step = -(-max(rows, cols) // MOST_PIXELS)
    for axis in (0, 1):  # the brightest pixel of each block, so that no lone spot is lost
        image = np.maximum.reduceat(image, np.arange(0, image.shape[axis], step), axis)
    bright = image[image > 1e-300] if image.max() > 1e-300 else np.ones(1)
    # Half the lowest value: a pixel with a single count has to differ from one with none.
    low = float(np.clip(bright.min() / 2, bright.max() * 1e-6, bright.max() * 0.1))
    edges = (x.value(-0.5), x.value(cols - 0.5), y.value(rows - 0.5), y.value(-0.5))
    shown = ax.imshow(image.clip(low), "magma", LogNorm(low, bright.max()), extent=edges)
    for name, origin, shape in boxes:
        _outline(ax, (y, x), origin, shape, name)
    _frame(ax, 1.0 if x.units == y.units else abs(x.scale / y.scale))
    mark(ax.xaxis, x.name, x.units)
    mark(ax.yaxis, y.name, y.units)
    color_bar(ax, shown)


def _outline(ax: "Axes", axes: tuple[Axis, Axis], origin: Pair, shape: Pair, name: str) -> None:
    """Draw a window along the edges of its pixels; the view grows where it leaves the detector."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    y, x = axes
    corner = x.value(origin[1] - 0.5), y.value(origin[0] - 0.5)
    box = Rectangle(corner, x.scale * shape[1], y.scale * shape[0], fill=False, color=WINDOW, lw=2)
    box.set(label=name, ls="--" if name == "reach" else "-", clip_on=False, zorder=3)
    box.set_path_effects([withStroke(linewidth=4, foreground="black")])
    ax.add_patch(box)
    ax.autoscale_view()


def _show_scan(ax: "Axes", report: FigureData, values: NDArray, extend: str, **look: Any) -> None:
    """Draw one value a scan position: a map in scan indices, or a line for a list of patterns."""
    steps = [f" (step {a.scale:.3g} {a.units})" * a.calibrated for a in report.scan_axes]
    names = [a.name + step for a, step in zip(report.scan_axes, steps, strict=True)]
    if values.ndim == 1:
        ax.plot(values, ".-" if values.size <= 2000 else ",", color="C0", lw=0.8)
        mark(ax.xaxis, names[-1], whole=True)
        mark(ax.yaxis, "")
        return
    shown = ax.imshow(np.ma.masked_invalid(values), **look)
    y, x = map(_shown, report.scan_axes)
    _frame(ax, abs(y.scale / x.scale) if x.units == y.units else 1.0)
    mark(ax.xaxis, names[1], whole=True)
    mark(ax.yaxis, names[0], whole=True)
    color_bar(ax, shown, extend)


def _frame(ax: "Axes", aspect: float) -> None:
    """Keep true proportions unless they would leave a thin stripe."""
    ratio = aspect * abs(np.subtract(*ax.get_ylim()) / np.subtract(*ax.get_xlim()))
    ax.set(facecolor=NOTHING, aspect=aspect if 0.5 <= ratio <= 2 else "auto")
    ax.apply_aspect()  # now, because the size decides how many ticks have room


def _shown(axis: Axis) -> Axis:
    """The axis as drawn: in its own units, in pixels without them."""
    good = axis.calibrated and 1e-30 < abs(axis.scale) < 1e30
    good = good and abs(axis.offset) < 1e9 * abs(axis.scale)
    return axis if good else replace(axis, scale=1.0, offset=0.0, units="px")


def _finite(values: NDArray | None) -> NDArray:
    flat = np.asarray([] if values is None else values, np.float64).ravel()
    return flat[np.isfinite(flat)]


def _style() -> AbstractContextManager[None]:
    """Matplotlib's own defaults, so that the user's settings change nothing."""
    import matplotlib

    # A title with a place is not moved, and then need not be measured against all ticks.
    ours = {
        "axes.titley": 1.0,
        "legend.fontsize": 9,
        "image.interpolation": "nearest",
        "image.interpolation_stage": "data",
    }
    ours |= {"xtick.labelsize": TICK_SIZE, "ytick.labelsize": TICK_SIZE}
    # All but the backend, which a context would not give back.
    default: dict[Any, Any] = {
        key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"
    }
    return matplotlib.rc_context(default | ours)


DPI = 110

TICK_SIZE, NAME_SIZE, TITLE_SIZE = 9.0, 10.0, 11.0  # points

LETTER, TICK, GAP = (
    0.08,
    0.1,
    0.04,
)  # inches: a digit, a tick and its distance from the number, the least distance

BAR_DISTANCE, BAR_WIDTH, BAR_TIP = 0.07, 0.12, 0.05  # inches; the tip is a part of the height

#: how many letters have room: those of longer texts are smaller, so that no text reaches into another panel
AXIS_LETTERS, BAR_LETTERS, NAME_LETTERS, TITLE_LETTERS = 6, 5, 40, 48

MOST_TICKS = 6


def inches(ax: "Axes") -> NDArray[np.float64]:
    """Width and height of the picture."""
    return np.array([ax.bbox.width, ax.bbox.height]) / DPI


def headline(ax: "Axes", text: str, color: str = "black") -> None:
    """Set the title, of one or two lines."""
    ax.set_title(text, color=color, fontsize=fitting(text, TITLE_LETTERS, TITLE_SIZE))


def mark(axis: Any, name: str, units: str = "", whole: bool = False) -> None:
    """Name an axis whose limits and size are final, and number it in as many round steps as have room."""
    low, high = (float(limit) for limit in np.sort(axis.get_view_interval()))
    across, (width, height) = axis.axis_name == "x", inches(axis.axes)
    power = math.floor(math.log10(max(abs(low), abs(high))))
    power = 0 if -4 < power < 6 else power  # a common factor keeps the numbers short
    if axis.get_scale() == "log":
        power, (ticks, texts) = 0, powers(low, high)
    else:
        ticks, texts = steps(low, high, MOST_TICKS, power, whole)
        for most in range(MOST_TICKS - 1, 0, -1):
            if not across or len(texts) * (LETTER * _longest(texts) + 2 * GAP) <= width:
                break
            ticks, texts = steps(low, high, most, power, whole)
    size = TICK_SIZE if across else fitting("\n".join(texts), AXIS_LETTERS, TICK_SIZE)
    axis.set_ticks(ticks, texts, fontsize=size)
    axis.set_ticks([], minor=True)
    unit = f"1e{power} {units}".strip() if power else units
    text = printable(f"{name} ({unit})" if unit else name)
    axis.set_label_text(text, fontsize=fitting(text, NAME_LETTERS, NAME_SIZE))
    # To find a place of its own for the name, matplotlib measures every number of the axis.
    numbers = 2 * LETTER if across else LETTER * _longest(texts) * size / TICK_SIZE
    away = -(TICK + numbers + GAP)
    axis.set_label_coords(*((0.5, away / height) if across else (away / width, 0.5)))


def color_bar(ax: "Axes", shown: Any, extend: str = "neither") -> None:
    """Add the scale of colors of a picture whose size is final, with a tip ("min", "max", "both") for what is outside.

    It is made of plain artists: matplotlib's own is a second set of axes, which costs more than the picture.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.image import BboxImage
    from matplotlib.lines import Line2D
    from matplotlib.markers import TICKRIGHT
    from matplotlib.patches import Polygon
    from matplotlib.transforms import Affine2D, Bbox, TransformedBbox

    cmap, norm, right = shown.get_cmap(), shown.norm, BAR_WIDTH
    low = BAR_TIP if extend in ("min", "both") else 0.0
    high = 1 - BAR_TIP if extend in ("max", "both") else 1.0
    # Across in inches beside the picture, upwards in parts of its height.
    width, _ = inches(ax)
    place = Affine2D().scale(1 / width, 1).translate(1 + BAR_DISTANCE / width, 0) + ax.transAxes
    look: dict[str, Any] = {"transform": place, "clip_on": False}
    colors = BboxImage(
        TransformedBbox(Bbox([[0, low], [right, high]]), place), cmap=cmap, origin="lower"
    )
    colors.set_data(np.linspace(0, 1, 256)[:, None])
    colors.set_clip_on(False)
    rim = [(0, low), (right / 2, 0), (right, low), (right, high), (right / 2, 1), (0, high)]
    under, over = cmap.get_under(), cmap.get_over()
    scale = powers if isinstance(norm, LogNorm) else steps
    ticks, texts = scale(float(norm.vmin), float(norm.vmax))
    heights = low + (high - low) * np.asarray(norm(ticks))
    dashes: dict[str, Any] = {
        "ls": "",
        "marker": TICKRIGHT,
        "ms": 3.5,
        "mew": 0.8,
        "color": "black",
    }
    for artist in (
        colors,
        Polygon(rim[:3], color=under, lw=0, **look),
        Polygon(rim[3:], color=over, lw=0, **look),
        Polygon(rim, fill=False, lw=0.8, **look),
        Line2D(np.full(len(ticks), right), heights, **dashes, **look),
    ):
        ax.figure.add_artist(artist)
    look |= {"va": "center", "fontsize": fitting("\n".join(texts), BAR_LETTERS, TICK_SIZE)}
    for y, text in zip(heights.tolist(), texts, strict=True):
        ax.text(right + TICK, y, text, **look)


def steps(
    low: float, high: float, most: int = MOST_TICKS, power: int = 0, whole: bool = False
) -> tuple[NDArray[np.float64], list[str]]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart, and their texts in units of 10**power.

    Parameters
    ----------
    low, high : the limits, which differ
    most : the most steps that have room
    power : of ten, by which the texts are divided
    whole : whether numbers between the integers make no sense

    Examples
    --------
    >>> ticks, texts = steps(-0.0125, 0.0125)
    >>> texts
    ['−0.010', '−0.005', '0.000', '0.005', '0.010']
    """
    least = (high - low) / most * (1 - 1e-9)
    digits = math.floor(math.log10(least))
    step = next(n * 10.0**digits for n in (1, 2, 5, 10) if n * 10.0**digits >= least)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = np.arange(first, last + 1, dtype=np.float64) * float(step)
    decimals = max(0, power - math.floor(math.log10(step) + 1e-9))
    return ticks, [f"{tick / 10.0**power:.{decimals}f}".replace("-", "−") for tick in ticks]


def powers(low: float, high: float) -> tuple[NDArray[np.float64], list[str]]:
    """Powers of ten from low to high, with numbers between them where there are few, and their texts.

    Examples
    --------
    >>> powers(3e-5, 8e9)[1]
    ['0.001', '1', '1000', '1e6', '1e9']
    >>> powers(0.4, 80)[1]
    ['1', '3', '10', '30']
    """
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    whole = last - first + (10.0**first >= low)
    between = {0: (1, 2, 5), 1: (1, 2, 5), 2: (1, 3)}.get(whole, (1,))
    step = math.ceil(max(whole, 1) / MOST_TICKS)
    every = (exponent for exponent in range(first, last + 1) if exponent % step == 0)
    ticks = np.array([part * 10.0**exponent for exponent in every for part in between])
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    return ticks, [_short(tick) for tick in ticks.tolist()]


def fitting(text: str, most: int, size: float) -> float:
    """The size at which a text takes no more room than ``most`` letters of ``size`` points.

    Examples
    --------
    >>> fitting("-0.0125", 6, 9.0) < fitting("-0.012", 6, 9.0) == 9.0
    True
    """
    return size * min(1.0, most / max(1, _longest(text.split("\n"))))


def printable(text: str) -> str:
    """Text that the fonts can draw and that is not taken for a formula."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans Mono"))
    known = (c if font.get_char_index(ord(c)) else "?" for c in text.expandtabs())
    return "".join(known).replace("$", r"\$")


def _longest(texts: list[str]) -> int:
    return max(map(len, texts), default=0)


def _short(value: float) -> str:
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}".replace("-", "−")
