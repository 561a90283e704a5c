"""The figure of a run: the window, the cropped patterns, and the patterns with the lowest retention."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.core.errors import StoreError
from stem_dask.core.model import Align, Axis, Window
from stem_dask.core.patterns import axes_of
from stem_dask.core.text import by
from stem_dask.job.report import summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pair = tuple[int, int]

DPI = 110

GOOD, BAD, ALLOWED = "#1b5e20", "#c00020", "#d17a00"


@dataclass(frozen=True, eq=False, kw_only=True)
class FigureData:
    """The data of the figure, as arrays in source pixels; None or empty data have no panel.

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
    worst: Sequence[tuple[tuple[int, ...], NDArray, Pair, float]] = ()
    curve_size: NDArray | None = None  # (sizes,) window size against retention; all three or none
    curve_mean: NDArray | None = None
    curve_min: NDArray | None = None
    target_retention: float | None = None
    min_retention: float | None = None
    global_radius: int | None = None
    lines: tuple[str, ...] = ()


def figure_data(
    patterns: xr.DataArray,
    out: xr.DataArray,
    mean: NDArray[np.float64],
    analysis: xr.Dataset | None,
    window: Window | None,
    results: Mapping[str, Any],
    *,
    title: str,
) -> FigureData:
    """Collect the arrays of the figure, and read the patterns with the lowest retention from the source.

    ``mean`` is the mean output pattern; ``analysis`` (with the retention) and ``window`` belong to a crop.
    """
    axes = axes_of(patterns)
    data = FigureData(
        title=title,
        axes=(axes[-2], axes[-1]),
        scan_axes=axes[:-2],
        output_axes=(axes_of(out)[-2], axes_of(out)[-1]),
        cropped_mean=mean,
        lines=summary({**results, "files": {}}),
    )
    if window is None or analysis is None:
        return data
    names = (
        "mean_pattern", "max_pattern", "window_y", "window_x", "center_y", "center_x", "radius", "retention",
    )  # fmt: skip
    known: dict[str, Any] = {name: analysis[name].values for name in names}
    retention, worst = known["retention"], []
    for flat in np.argsort(np.where(np.isfinite(retention), retention, np.inf), axis=None)[:3]:
        index = tuple(int(i) for i in np.unravel_index(flat, retention.shape))
        if np.isfinite(retention[index]):
            pattern = np.asarray(patterns.data[index].compute(scheduler="sync"))
            place = (int(known["window_y"][index]), int(known["window_x"][index]))
            worst.append((index, pattern, place, float(retention[index])))
    curve_mean = analysis["curve_mean"].values
    return replace(
        data,
        **known,
        window_shape=window.shape,
        align=window.align,
        worst=worst,
        curve_size=2 * np.arange(1, len(curve_mean)),
        curve_mean=curve_mean[1:],
        curve_min=analysis["curve_min"].values[1:],
        target_retention=window.target_retention,
        min_retention=float(results["limits"]["min_retention"]),
        global_radius=window.global_radius,
    )


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

    panels: list[tuple[str, Any, Any]] = [
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
    panels = [panel for panel in panels if panel[2] is not None]
    verdict, color = "not cropped", "black"
    if report.window_shape is not None:
        verdict = f"window {by(report.window_shape)} px"
        if report.window_shape == tuple(axis.size for axis in report.axes):
            verdict = f"NOT CROPPED: the window is the whole detector, {by(report.window_shape)} px"
    if (known := _finite(report.retention)).size:
        least = report.min_retention or 0
        below = int((known < least).sum())
        verdict += f", retention mean {known.mean():.3f}, min {known.min():.3f}"
        verdict += f", {below} of {known.size} patterns below {least:g}"
        color = BAD if below or verdict.startswith("NOT") else GOOD
    columns, rows = max(3, min(4, len(panels))), -(-len(panels) // 4)
    with _style():
        inches = 0.9 + 3.7 * rows
        figure = Figure((16.0, inches), DPI)
        FigureCanvasAgg(figure)  # without pyplot: needs no display, keeps the caller's figures
        # places are fixed: a layout engine measures every text and takes three times as long
        figure.subplots_adjust(
            0.055, 0.55 / inches, 0.945, 1 - 1.35 / inches, wspace=0.6, hspace=0.42
        )
        for place, (name, paint, value) in enumerate(panels, 1):
            paint(figure.add_subplot(rows, columns, place, label=name, anchor="N"), report, value)
        title = f"{_printable(report.title[:110])}\n{verdict}"
        size = _fitting(title, 100, 15)
        figure.suptitle(title, y=1 - 0.12 / inches, color=color, fontsize=size)
    return figure


def _draw_pattern(ax: "Axes", report: FigureData, pattern: NDArray) -> None:
    """Mean or maximum with the window (own windows: the median one and the reach of all), or cropped."""
    name, axes, title, boxes = str(ax.get_label()), report.axes, "", []
    ys, xs, shape = report.window_y, report.window_x, report.window_shape
    if name == "cropped mean":
        axes = report.output_axes or axes
    elif ys is not None and xs is not None and shape is not None:
        if report.align != "fixed":
            reach = int(np.ptp(ys)) + shape[0], int(np.ptp(xs)) + shape[1]
            boxes.append(("reach", (int(ys.min()), int(xs.min())), reach))
            title = "\n(median window; dashed: reach of all)"
        boxes.append(("window", (int(np.rint(np.median(ys))), int(np.rint(np.median(xs)))), shape))
    _show_pattern(ax, pattern, axes, boxes)
    rows, columns = pattern.shape
    _headline(ax, f"{name} pattern, {rows} x {columns} px{title}")


def _draw_worst(ax: "Axes", report: FigureData, worst: Any) -> None:
    index, pattern, origin, kept = worst
    shape = report.window_shape
    _show_pattern(ax, pattern, report.axes, [("window", origin, shape)] if shape else [])
    place = ", ".join(str(int(i)) for i in index)
    color = BAD if kept < (report.min_retention or 0) else "black"
    _headline(ax, f"{ax.get_label()}: scan ({place}), retention {kept:.4f}", color)


def _draw_text(ax: "Axes", report: FigureData, lines: tuple[str, ...]) -> None:
    ax.axis("off")
    wrapper = textwrap.TextWrapper(44, subsequent_indent="  ")
    rows = [row for line in lines for row in wrapper.wrap(_printable(line)) or [""]]
    rows[25:] = ["…"] if len(rows) > 25 else []
    look: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": 8, "linespacing": 1.05}
    ax.text(0, 1, "\n".join(rows), va="top", **look)


def _draw_curve(ax: "Axes", report: FigureData, size: NDArray) -> None:
    target, floor = report.target_retention, report.min_retention
    ax.plot(size, np.asarray(report.curve_mean), ".-", color="C0", label="mean")
    ax.plot(size, np.asarray(report.curve_min), ".-", color="#d1495b", label="lowest")
    for value, label, color in ((target, "target", GOOD), (floor, "min", ALLOWED)):
        if value is not None:
            ax.axhline(value, color=color, ls="--", lw=1.4, label=f"{label} {value:g}")
    for side in sorted(set(report.window_shape or ())):
        ax.axvline(side, color="black", lw=2, label=f"window {side} px")
    # the relevant range: up to twice the window, from just below the lowest retention
    lowest = min(target or 0.9, floor or 0.9, _finite(report.retention).min(initial=0.9))
    right = 2 * max(report.window_shape or (1, *size))
    ax.set(xlim=(0, right), ylim=(max(0.0, lowest - 0.1), 1.01))
    _mark(ax.xaxis, "window size", "px", whole=True)
    _mark(ax.yaxis, "retention")
    _headline(ax, "retention against window size")
    ax.legend(loc="lower right", framealpha=1)


def _draw_radius(ax: "Axes", report: FigureData, radius: NDArray) -> None:
    known, chosen = _finite(radius), report.global_radius
    title = "radius: every pattern is empty"
    if known.size:
        low, high = int(known.min()), int(known.max())
        step = -(-(high - low + 1) // 60)  # at most 60 bars
        edges = (np.arange(low, high + step + 1, step) - 0.5).tolist()
        # a few outliers set the window; among many patterns they are visible only on a log axis
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
    _mark(ax.xaxis, "radius", "px", whole=True)
    _mark(ax.yaxis, "patterns", whole=True)
    _headline(ax, title)


def _draw_center(ax: "Axes", report: FigureData, center: NDArray) -> None:
    known, both = _finite(center), map(_finite, (report.center_y, report.center_x))
    middle = float(np.median(known)) if known.size else 0.0
    far = np.concatenate([[0.0], *(abs(one - np.median(one)) for one in both if one.size)])
    # one scale for both maps, not stretched by a few stray patterns
    most = max(float(np.quantile(far, 0.99, method="higher")), 0.01)
    extend = "both" if far.max() > most else "neither"
    _show_scan(ax, report, center - middle, extend, cmap="RdBu_r", vmin=-most, vmax=most)
    _headline(ax, f"{ax.get_label()} − median {middle:.2f} (px)")


def _draw_retention(ax: "Axes", report: FigureData, values: NDArray) -> None:
    from matplotlib import colormaps

    floor = report.min_retention or 0.0
    known, below = _finite(values), np.argwhere(values < floor)
    high = float(known.max(initial=floor + 1e-3))
    low = floor if len(below) else min(float(known.min(initial=high)), high - 1e-3)
    if values.ndim == 1:
        ax.axhline(floor, color=ALLOWED, ls="--", lw=1.4)
    if 0 < len(below) <= 500:  # one pixel of a large map would not be seen
        y = below[:, 0] if values.ndim == 2 else values[below[:, 0]]
        ax.scatter(below[:, -1], y, 60, facecolors="none", edgecolors=BAD, linewidths=1.5)
    cmap = colormaps["viridis"].with_extremes(under=BAD)
    extend = "min" if len(below) else "neither"
    _show_scan(ax, report, values, extend, cmap=cmap, vmin=low, vmax=high)
    _headline(ax, f"retention ({len(below)} below {floor:g})", BAD if len(below) else "black")


def _show_pattern(
    ax: "Axes", pattern: NDArray, axes: tuple[Axis, Axis], boxes: Sequence[tuple[str, Pair, Pair]]
) -> None:
    """Draw on a log scale, in the units of the axes, with windows along the edges of their pixels; what has no logarithm is black."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    image = np.where(np.isfinite(pattern), pattern, 0).astype(np.float64).clip(0, 1e300)
    (y, x), (rows, cols) = map(_in_units, axes), image.shape
    step = -(-max(rows, cols) // 320)  # 320 pixels fill a panel
    for axis in (0, 1):  # maximum of each block, so that no single spot is lost
        image = np.maximum.reduceat(image, np.arange(0, image.shape[axis], step), axis)
    bright = image[image > 1e-300] if image.max() > 1e-300 else np.ones(1)
    # half the lowest value, so that a single count differs from none
    low = float(np.clip(bright.min() / 2, bright.max() * 1e-6, bright.max() * 0.1))
    edges = (x.value(-0.5), x.value(cols - 0.5), y.value(rows - 0.5), y.value(-0.5))
    shown = ax.imshow(image.clip(low), "magma", LogNorm(low, bright.max()), extent=edges)
    for name, origin, shape in boxes:
        corner = x.value(origin[1] - 0.5), y.value(origin[0] - 0.5)
        box = Rectangle(corner, x.scale * shape[1], y.scale * shape[0], fill=False, lw=2)
        dashes = "--" if name == "reach" else "-"
        box.set(label=name, color="#00e5ff", ls=dashes, clip_on=False, zorder=3)
        box.set_path_effects([withStroke(linewidth=4, foreground="black")])
        ax.add_patch(box)
        ax.autoscale_view()  # the view grows where a window leaves the detector
    _frame(ax, shown, 1.0 if x.units == y.units else abs(x.scale / y.scale))
    _mark(ax.xaxis, x.name, x.units)
    _mark(ax.yaxis, y.name, y.units)


def _show_scan(ax: "Axes", report: FigureData, values: NDArray, extend: str, **look: Any) -> None:
    """Draw one value a scan position: a map in scan indices, or a line for a list of patterns."""
    steps = [f" (step {a.scale:.3g} {a.units})" * a.calibrated for a in report.scan_axes]
    names = [a.name + step for a, step in zip(report.scan_axes, steps, strict=True)]
    if values.ndim == 1:
        ax.plot(values, ".-" if values.size <= 2000 else ",", color="C0", lw=0.8)
        _mark(ax.xaxis, names[-1], whole=True)
        _mark(ax.yaxis, "")
        return
    shown = ax.imshow(np.ma.masked_invalid(values), **look)
    y, x = map(_in_units, report.scan_axes)
    _frame(ax, shown, abs(y.scale / x.scale) if x.units == y.units else 1.0, extend)
    _mark(ax.xaxis, names[1], whole=True)
    _mark(ax.yaxis, names[0], whole=True)


def _frame(ax: "Axes", shown: Any, aspect: float, extend: str = "neither") -> None:
    """Equal scales on both axes, unless that makes a thin stripe, and a colour bar as high as the picture."""
    ratio = aspect * abs(np.subtract(*ax.get_ylim()) / np.subtract(*ax.get_xlim()))
    ax.set(facecolor="0.8", aspect=aspect if 0.5 <= ratio <= 2 else "auto")
    bar = ax.figure.colorbar(shown, cax=ax.inset_axes((1.03, 0, 0.05, 1)), extend=extend)
    bar.minorticks_off()


def _in_units(axis: Axis) -> Axis:
    """The axis in its units, or in pixels if it has no usable calibration."""
    good = axis.calibrated and 1e-30 < abs(axis.scale) < 1e30
    good = good and abs(axis.offset) < 1e9 * abs(axis.scale)
    return axis if good else replace(axis, scale=1.0, offset=0.0, units="px")


def _finite(values: NDArray | None) -> NDArray:
    flat = np.asarray([] if values is None else values, np.float64).ravel()
    return flat[np.isfinite(flat)]


def _style() -> AbstractContextManager[None]:
    """Matplotlib's own defaults, so that the user's settings change nothing."""
    import matplotlib

    style: dict[Any, Any] = dict(matplotlib.rcParamsDefault)
    del style["backend"]  # which rc_context does not restore
    style |= dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 9)
    style |= {"axes.formatter.useoffset": False, "image.interpolation": "nearest"}
    return matplotlib.rc_context({**style, "image.interpolation_stage": "data"})


def _headline(ax: "Axes", text: str, color: str = "black") -> None:
    """Set the title, of one or two lines."""
    ax.set_title(text, color=color, fontsize=_fitting(text, 48, 10.5))


def _mark(axis: Any, name: str, units: str = "", whole: bool = False) -> None:
    """Name an axis with final limits; ``whole`` restricts its ticks to integers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    power = math.floor(math.log10(max(map(abs, axis.get_view_interval()))))
    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(3 if axis.axis_name == "x" else 5, integer=whole))
        if not -3 < power < 6:  # a common factor keeps the numbers short
            axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick / 10.0**power:.6g}"))
            units = f"1e{power} {units}".strip()
    text = _printable(f"{name} ({units})" if units else name)
    axis.set_label_text(text, fontsize=_fitting(text, 40, 10.0))


def _fitting(text: str, most: int, size: float) -> float:
    """The font size at which a text is no wider than ``most`` letters of ``size`` points."""
    return size * min(1.0, most / max(1, *map(len, text.split("\n"))))


def _printable(text: str) -> str:
    """Text that the font can draw, with ``$`` escaped."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans Mono"))
    known = (c if font.get_char_index(ord(c)) else "?" for c in text.expandtabs())
    return "".join(known).replace("$", r"\$")
