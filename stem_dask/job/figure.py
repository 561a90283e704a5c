"""The figure of a run: beam, disc and window on single patterns, bad pixels, and maps over the scan."""

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
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
from stem_dask.job.results import LITTLE_GAINED
from stem_dask.job.summary import closing_lines
from stem_dask.kernels.pixels import DEAD, GIVEN, HOT, NOT_FINITE, STOP
from stem_dask.stages.crop import disc_radius_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pair = tuple[int, int]

#: name, scan index, part of the pattern around its window, first row and column of that part
Picture = tuple[str, tuple[int, ...], NDArray, Pair]

DPI = 110

GOOD, BAD, ALLOWED = "#1b5e20", "#c00020", "#d17a00"
WINDOW, BEAM, WORST = "#00e5ff", "#39ff14", "#ff1744"

#: bits of the mask, their names, and colors that differ from those of a pattern
KINDS = (
    (HOT, "hot", "#00e676"),
    (DEAD, "dead", "#64a8ff"),
    (STOP, "beam stop", "#9e9e9e"),
    (GIVEN, "given", "#ffea00"),
    (NOT_FINITE, "not finite", "#f06292"),
)

#: a legend below the label of the x axis
BELOW: dict[str, Any] = {
    "loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.3, "borderpad": 0.0, "ncols": 3,
    "frameon": False, "fontsize": 8.5, "columnspacing": 1.0, "labelspacing": 0.2,
}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class FigureData:
    """The data of the figure, as arrays in source pixels; None or empty data have no panel.

    ``axes`` are the source's (ky, kx), ``scan_axes`` two for a scan and one for a list of patterns; "scan" below is
    their shape. The pictures are those of `choose_pictures`.
    """

    title: str
    axes: tuple[Axis, Axis]
    scan_axes: tuple[Axis, ...]
    mean_pattern: NDArray | None = None  # (ky, kx)
    mask: NDArray | None = None  # (ky, kx), flags of bad pixels
    output_axes: tuple[Axis, Axis] | None = None
    output_mean: NDArray | None = None  # output (ky, kx)
    pictures: Sequence[Picture] = ()
    disc_radius: float | None = None
    window_y: NDArray | None = None  # scan, first row of each window; may leave the detector
    window_x: NDArray | None = None
    window_shape: Pair | None = None
    align: Align = "fixed"
    center_y: NDArray | None = None  # scan, NaN where none was found
    center_x: NDArray | None = None
    bright_field: NDArray | None = None  # scan, NaN where empty; so are the next four
    dark_field: NDArray | None = None
    total: NDArray | None = None
    radius: NDArray | None = None
    retention: NDArray | None = None
    deflection_y: NDArray | None = None  # scan, center - descan
    deflection_x: NDArray | None = None
    descan_order: int | None = None
    curve_size: NDArray | None = None  # (sizes,) window size against retention; all three or none
    curve_mean: NDArray | None = None
    curve_min: NDArray | None = None
    target_retention: float | None = None
    min_retention: float | None = None
    global_radius: int | None = None
    lines: tuple[str, ...] = ()
    is_ok: bool = True  # whether the verdict has nothing to say


def figure_data(
    patterns: xr.DataArray,
    out: xr.DataArray,
    mean: NDArray[np.float64],
    analysis: xr.Dataset | None,
    window: Window | None,
    results: Mapping[str, Any],
    read: Callable[[tuple[int, ...]], NDArray],
    *,
    title: str,
) -> FigureData:
    """Collect the arrays of the figure, and read at most eight patterns from the source.

    ``mean`` is the mean output pattern; ``analysis`` (with the retention) and ``window`` belong to a crop; ``read`` returns the
    pattern at a scan index.
    """
    axes = axes_of(patterns)
    data = FigureData(
        title=title,
        axes=(axes[-2], axes[-1]),
        scan_axes=axes[:-2],
        output_axes=(axes_of(out)[-2], axes_of(out)[-1]),
        output_mean=mean,
        lines=_lines(results),
        is_ok=not results["verdict"],
    )
    if window is None or analysis is None:
        return data
    names = [
        "mean_pattern", "mask", "window_y", "window_x", "center_y", "center_x", "radius", "retention",
    ]  # fmt: skip
    names += ["bright_field", "dark_field"] if "bright_field" in analysis else ["total"]
    if analysis.attrs["center_method"] != "friedel":  # whose centers are the fit
        names += ["deflection_y", "deflection_x"]
    curve_mean = analysis["curve_mean"].values
    known: dict[str, Any] = {name: analysis[name].values for name in names if name in analysis}
    data = replace(
        data,
        **known,
        disc_radius=disc_radius_of(analysis),
        descan_order=analysis.attrs.get("descan", {}).get("order"),
        window_shape=window.shape,
        align=window.align,
        curve_size=2 * np.arange(1, len(curve_mean)),
        curve_mean=curve_mean[1:],
        curve_min=analysis["curve_min"].values[1:],
        target_retention=window.target_retention,
        min_retention=float(results["limits"]["min_retention"]),
        global_radius=window.global_radius,
    )
    return with_pictures(data, read)


def _lines(results: Mapping[str, Any]) -> tuple[str, ...]:
    """The closing lines with the verdict first, and advice without its command, which cannot be copied from a picture."""
    lines = closing_lines({**results, "files": {}})
    return tuple(
        line.partition(": stem-dask ")[0] if line.startswith("advice") else line
        for line in sorted(lines, key=lambda line: not line.startswith("verdict"))
    )


def choose_pictures(retention: NDArray) -> dict[str, tuple[int, ...]]:
    """Scan indices of the patterns to show: the three of lowest retention, that of median retention, and the corners.

    Of a list of patterns, and of a scan of one row or column, the ends are shown instead of corners. Patterns without a
    retention are empty or could not be read, and are left out.

    Examples
    --------
    >>> found = choose_pictures(np.array([[0.9, 0.8, 0.85], [0.7, np.nan, 0.6]]))
    >>> found["worst 1"], found["median"], found["corner 2"]
    ((1, 2), (0, 1), (0, 2))
    """
    flat, shape = retention.ravel(), retention.shape
    order = np.argsort(flat, kind="stable")[: int(np.isfinite(flat).sum())]  # NaN comes last
    chosen = {f"worst {rank}": int(i) for rank, i in enumerate(order[:3], 1)}
    if len(order) > 3:
        chosen["median"] = int(order[len(order) // 2])
    ends = np.array(list(itertools.product(*((0, n - 1) for n in shape))))
    corners = np.unique(np.ravel_multi_index(tuple(ends.T), shape))
    kind = "corner" if len(corners) == 4 else "end"
    if len(corners) > 1:
        chosen |= {f"{kind} {k}": int(i) for k, i in enumerate(corners, 1) if np.isfinite(flat[i])}
    return {name: tuple(int(i) for i in np.unravel_index(at, shape)) for name, at in chosen.items()}


def with_pictures(report: FigureData, read: Callable[[tuple[int, ...]], NDArray]) -> FigureData:
    """Add the pictures, each cut to window and disc with a margin; ``read`` returns the pattern at a scan index."""
    assert report.retention is not None
    assert report.window_shape is not None
    pictures = []
    for name, index in choose_pictures(report.retention).items():
        parts = []
        for first, center, size, axis in zip(
            (report.window_y, report.window_x),
            (report.center_y, report.center_x),
            report.window_shape,
            report.axes,
            strict=True,
        ):
            assert first is not None
            assert center is not None
            low, high = int(first[index]), int(first[index]) + size
            if np.isfinite(center[index]):
                reach = (report.disc_radius or 0.0) + 1
                low = min(low, math.floor(center[index] - reach))
                high = max(high, math.ceil(center[index] + reach) + 1)
            margin = max(4, size // 4)
            parts.append(slice(max(0, low - margin), min(axis.size, high + margin)))
        cut = read(index)[tuple(parts)].copy()  # without the rest of a large pattern
        pictures.append((name, index, cut, (parts[0].start, parts[1].start)))
    return replace(report, pictures=pictures)


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

    groups: dict[str, list[Any]] = {"worst": [], "median": [], "corner": [], "end": []}
    for one in report.pictures:
        groups[one[0].partition(" ")[0]].append((one[0], _draw_picture, one))
    # panels of one cell share its place
    patterns: list[list[tuple[str, Any, Any]]] = [
        [("mean", _draw_mean, report.mean_pattern)],
        [("output", _draw_output, report.output_mean)],
        groups["median"],
        [("text", _draw_text, report.lines or None)],
        *([one] for one in groups["worst"]),
        groups["corner"] or groups["end"],
    ]
    maps: list[list[tuple[str, Any, Any]]] = [
        [("bright_field", _draw_field, report.bright_field)],
        [("dark_field", _draw_field, report.dark_field)],
        [("total", _draw_total, report.total)],
        *([(name, _draw_center, getattr(report, name))] for name in _wander(report)),
        [("retention", _draw_retention, report.retention)],
    ]
    charts: list[list[tuple[str, Any, Any]]] = [
        [("radius", _draw_radius, report.radius)],
        [("curve", _draw_curve, report.curve_size)],
    ]
    patterns, maps, charts = (
        [cell for cell in cells if cell and cell[0][2] is not None]
        for cells in (patterns, maps, charts)
    )
    # the maps of a long scan have the last two rows to themselves, so that they keep its aspect
    is_wide, is_high = _is_long(report)
    strips = maps if is_wide or is_high else []
    cells = patterns + charts if strips else patterns + maps + charts
    verdict, color = _verdict(report)
    columns, rows = max(3, min(4, len(cells))), max(1, -(-len(cells) // 4))
    with _style():
        inches = 1.25 + 3.5 * (rows + 2 * bool(strips))
        figure = Figure((16.0, inches), DPI)
        FigureCanvasAgg(figure)  # without pyplot: needs no display, keeps the caller's figures
        # places are fixed: a layout engine measures every text and takes three times as long
        around = {"left": 0.055, "right": 0.945, "bottom": 1.1 / inches, "top": 1 - 1.15 / inches}
        look = {"wspace": 0.54, "hspace": 0.4}
        grid: Any = figure.add_gridspec(rows + 2 * bool(strips), columns, **look, **around)
        places = list(grid)[: len(cells)]
        if strips:
            shape, look["hspace"] = ((len(strips), 1), 1.2) if is_wide else ((1, len(strips)), 0)
            places += grid[rows:, :].subgridspec(*shape, **look)
        for place, cell in zip(places, cells + strips, strict=True):
            within: Any = [place]
            if len(cell) > 1:
                within = place.subgridspec(-(-len(cell) // 2), 2, wspace=0.15, hspace=0.25)
            for part, (name, paint, value) in zip(within, cell, strict=False):
                paint(figure.add_subplot(part, label=name, anchor="N"), report, value)
        title = f"{_printable(report.title[:110])}\n{verdict}"
        size = _fitting(title, 100, 15)
        figure.suptitle(title, y=1 - 0.12 / inches, color=color, fontsize=size)
        if report.pictures:
            disc = "" if report.disc_radius is None else " and direct disc"
            words = f"cyan: window        green: center{disc}        red circles: worst patterns"
            figure.text(0.5, 0.1 / inches, words, ha="center", fontsize=10)
    return figure


def _is_long(report: FigureData) -> tuple[bool, bool]:
    """Whether the maps of the scan are far wider than high, and far higher than wide."""
    if len(report.scan_axes) != 2 or min(axis.size for axis in report.scan_axes) == 1:
        return False, False
    rows, columns = (axis.size for axis in report.scan_axes)
    ratio = _scan_aspect(report) * rows / columns
    return ratio < 0.2, ratio > 5


def _scan_aspect(report: FigureData) -> float:
    """Height of a scan position by its width."""
    y, x = map(_in_units, report.scan_axes)
    return abs(y.scale / x.scale) if x.units == y.units else 1.0


def _verdict(report: FigureData) -> tuple[str, str]:
    """Second line of the title, and its color."""
    if report.window_shape is None:
        return "NOT CROPPED", ALLOWED  # as the config says
    full = tuple(axis.size for axis in report.axes)
    is_whole = report.window_shape == full
    text = "window"
    if is_whole:
        text = "NOT CROPPED: the window is the whole detector,"
    elif math.prod(report.window_shape) > LITTLE_GAINED * math.prod(full):
        text = f"LITTLE GAINED: window of {by(full)} px cut to"
    text += f" {by(report.window_shape)} px"
    below, known = 0, _finite(report.retention)
    if known.size:
        least = report.min_retention or 0
        below = int((known < least).sum())
        text += f", retention mean {known.mean():.3f}, min {known.min():.3f}"
        text += f", {below:,} of {known.size:,} patterns below {least:g}"
    good = (GOOD if report.is_ok else ALLOWED) if known.size else "black"
    return text, BAD if below or is_whole else good


def _wander(report: FigureData) -> tuple[str, str]:
    """The two maps of the centers: what a fit leaves of them, or all."""
    what = "center" if report.deflection_y is None else "deflection"
    return f"{what}_y", f"{what}_x"


def _draw_mean(ax: "Axes", report: FigureData, pattern: NDArray) -> None:
    """The mean with the window (own windows: the median one and the reach of all) and the bad pixels."""
    title, boxes = "", []
    ys, xs, shape = report.window_y, report.window_x, report.window_shape
    if ys is not None and xs is not None and shape is not None:
        if report.align != "fixed":
            reach = int(np.ptp(ys)) + shape[0], int(np.ptp(xs)) + shape[1]
            boxes.append(("reach", (int(ys.min()), int(xs.min())), reach))
            title = "\n(median window; dashed: reach of all)"
        boxes.append(("window", (int(np.rint(np.median(ys))), int(np.rint(np.median(xs)))), shape))
    _show_pattern(ax, pattern, report.axes, boxes=boxes, mask=report.mask)
    if report.mask is not None:
        _draw_bad(ax, report.mask, report.axes)
    _headline(ax, f"mean pattern, {by(pattern.shape)} px{title}")


def _draw_bad(ax: "Axes", mask: NDArray, axes: tuple[Axis, Axis]) -> None:
    """Mark bad pixels by kind, each large enough to be seen, and count them in a legend below the pattern."""
    (y, x), step = map(_in_units, axes), _step(mask.shape)
    size = max(3.5, 150 / max(mask.shape))  # points; a pixel of a small detector is larger
    for bit, kind, color in KINDS:
        found = np.argwhere(mask & bit)
        if not len(found):
            continue
        label = f"{len(found):,} {kind}"
        # one mark where several would coincide
        at_y, at_x = (np.unique(found // step, axis=0) * step + (step - 1) / 2).T
        marks: dict[str, Any] = {"marker": "s", "ms": size, "mew": 0, "ls": "none", "color": color}
        ax.plot(x.offset + x.scale * at_x, y.offset + y.scale * at_y, label=label, **marks)
    if ax.lines:
        legend = ax.legend(handles=ax.lines, handletextpad=0.1, **BELOW)
        for handle in legend.get_lines():
            handle.set_markersize(7)


def _draw_output(ax: "Axes", report: FigureData, pattern: NDArray) -> None:
    mask = _hot_in_windows(report, pattern.shape)
    _show_pattern(ax, pattern, report.output_axes or report.axes, mask=mask)
    _headline(ax, f"mean output pattern, {by(pattern.shape)} px")


def _hot_in_windows(report: FigureData, shape: tuple[int, ...]) -> NDArray | None:
    """The output pixels, of ``shape``, that a hot pixel of the detector reaches in any window."""
    ys, xs, window = report.window_y, report.window_x, report.window_shape
    if report.mask is None or ys is None or xs is None or window is None:
        return None
    hot = np.argwhere(report.mask & HOT)
    first = np.unique(np.stack([ys.ravel(), xs.ravel()], 1).astype(np.intp), axis=0)
    out = np.zeros(shape, np.uint8)
    for place in hot:
        inside = place - first
        inside = inside[((inside >= 0) & (inside < window)).all(1)]
        y, x = (inside * shape // window).T
        out[y, x] = HOT
    return out


def _draw_picture(ax: "Axes", report: FigureData, picture: Picture) -> None:
    """One pattern around its window, with crosshair and disc at its center."""
    name, index, cut, origin = picture
    boxes, center, mask = [], None, report.mask
    ys, xs, shape = report.window_y, report.window_x, report.window_shape
    if ys is not None and xs is not None and shape is not None:
        boxes = [("window", (int(ys[index]), int(xs[index])), shape)]
    if report.center_y is not None and report.center_x is not None:
        center = float(report.center_y[index]), float(report.center_x[index])
    if mask is not None:
        part = (slice(at, at + n) for at, n in zip(origin, cut.shape, strict=True))
        mask = mask[tuple(part)]
    kind = name.partition(" ")[0]
    small, place = kind in ("corner", "end"), ", ".join(map(str, index))
    _show_pattern(
        ax, cut, report.axes, origin, boxes=boxes, center=center, radius=report.disc_radius,
        mask=mask, small=small,
    )  # fmt: skip
    kept = math.nan if report.retention is None else float(report.retention[index])
    color = BAD if kept < (report.min_retention or 0) else "black"
    if small:
        ax.set_title(
            text := f"{kind} ({place})", color=color, fontsize=_fitting(text, 17, 9), pad=3
        )
    else:
        _headline(ax, f"{name}: scan ({place}), retention {kept:.4f}", color)


def _draw_text(ax: "Axes", report: FigureData, lines: tuple[str, ...]) -> None:
    ax.axis("off")
    rows = []
    for line in lines:  # the verdict is never cut
        most = None if line.startswith("verdict") else 4
        wrapper = textwrap.TextWrapper(44, subsequent_indent="  ", max_lines=most, placeholder=" …")
        rows += wrapper.wrap(_printable(line)) or [""]
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
    # the relevant range: up to twice the window or the size that would do, from just below the lowest retention
    lowest = min(target or 0.9, floor or 0.9, _finite(report.retention).min(initial=0.9))
    enough = size[np.asarray(report.curve_min) >= (floor or 0)]
    right = max(2 * max(report.window_shape or (1, *size)), 1.1 * min(enough, default=0))
    ax.set(xlim=(0, right), ylim=(max(0.0, lowest - 0.1), 1.01))
    _mark(ax.xaxis, "window size", "px", whole=True)
    _mark(ax.yaxis, "retention")
    _headline(ax, "retention against window size")
    ax.legend(**BELOW)


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


def _draw_field(ax: "Axes", report: FigureData, values: NDArray) -> None:
    name = str(ax.get_label()).replace("_", " ")
    _show_scan(ax, report, values, cmap="gray")
    _ring(ax, report, values)
    inside = "in" if name == "bright field" else "outside"
    _headline(ax, f"{name} (intensity {inside} the direct disc)")


def _draw_total(ax: "Axes", report: FigureData, values: NDArray) -> None:
    _show_scan(ax, report, values, cmap="gray")
    _ring(ax, report, values)
    _headline(ax, "specimen (intensity of each pattern)")


def _draw_center(ax: "Axes", report: FigureData, center: NDArray) -> None:
    """The center relative to its median, or to the fitted descan."""
    name, is_fit = str(ax.get_label()), report.deflection_y is not None
    known = [_finite(getattr(report, one)) for one in _wander(report)]
    middles = [0.0 if is_fit or not one.size else float(np.median(one)) for one in known]
    pairs = zip(known, middles, strict=True)
    far = np.concatenate([[0.0], *(abs(one - middle) for one, middle in pairs)])
    # one scale for both maps, not stretched by a few stray patterns
    most = max(float(np.quantile(far, 0.99, method="higher")), 0.01)
    extend = "both" if far.max() > most else "neither"
    middle = middles[name.endswith("x")]
    _show_scan(ax, report, center - middle, extend, cmap="RdBu_r", vmin=-most, vmax=most)
    title = f"{name} − median {middle:.2f} (px)"
    if is_fit:
        title = f"{name}: center − fit of order {report.descan_order} (px)"
    _headline(ax, title)


def _draw_retention(ax: "Axes", report: FigureData, values: NDArray) -> None:
    from matplotlib import colormaps

    floor = report.min_retention or 0.0
    known, below = _finite(values), np.argwhere(values < floor)
    high = float(known.max(initial=floor + 1e-3))
    low = floor if len(below) else min(float(known.min(initial=high)), high - 1e-3)
    cmap = colormaps["viridis"].with_extremes(under=BAD)
    extend = "min" if len(below) else "neither"
    _show_scan(ax, report, values, extend, cmap=cmap, vmin=low, vmax=high)
    if _line_axis(values) is not None:
        ax.axhline(floor, color=ALLOWED, ls="--", lw=1.4)
    few = len(below) <= min(500, values.size / 10)  # one pixel of a large map would not be seen
    _ring(ax, report, values, below if few else ())
    _headline(ax, f"retention ({len(below):,} below {floor:g})", BAD if len(below) else "black")


def _ring(ax: "Axes", report: FigureData, values: NDArray, more: Any = ()) -> None:
    """Circle the worst patterns, and more scan indices, in a map or on a line."""
    worst = [index for name, index, *_ in report.pictures if name.startswith("worst")]
    marked = list(dict.fromkeys([*worst, *(tuple(map(int, index)) for index in more)]))
    if not marked:
        return
    along = _line_axis(values)
    x = [index[-1 if along is None else along] for index in marked]
    y = [index[0] for index in marked] if along is None else [values[index] for index in marked]
    look: dict[str, Any] = {"facecolors": "none", "edgecolors": WORST, "linewidths": 1.7}
    ax.scatter(x, y, 70, label="worst", zorder=3, **look)


def _show_pattern(
    ax: "Axes",
    pattern: NDArray,
    axes: tuple[Axis, Axis],
    origin: Pair = (0, 0),
    *,
    boxes: Sequence[tuple[str, Pair, Pair]] = (),
    center: tuple[float, float] | None = None,
    radius: float | None = None,
    mask: NDArray | None = None,
    small: bool = False,
) -> None:
    """Draw a part of the detector on a log scale, in the units of the axes; what has no logarithm is black.

    ``boxes`` are windows along the edges of their pixels, center and radius those of the direct disc. Pixels of the mask
    have no part in the scale. ``small`` is without numbers.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Ellipse, Rectangle
    from matplotlib.patheffects import withStroke

    image = np.where(np.isfinite(pattern), pattern, 0).astype(np.float64).clip(0, 1e300)
    (y, x), step = map(_in_units, axes), _step(image.shape)
    good = image if mask is None or mask.all() else image[mask == 0]
    bright = good[good > 1e-300] if good.max(initial=0) > 1e-300 else np.ones(1)
    # half the lowest value, so that a single count differs from none
    low = float(np.clip(bright.min() / 2, bright.max() * 1e-6, bright.max() * 0.1))
    for axis in (0, 1):  # maximum of each block, so that no single spot is lost
        image = np.maximum.reduceat(image, np.arange(0, image.shape[axis], step), axis)
    ends = [at + step * n - 0.5 for at, n in zip(origin, image.shape, strict=True)]
    edges = (x.value(origin[1] - 0.5), x.value(ends[1]), y.value(ends[0]), y.value(origin[0] - 0.5))
    norm = LogNorm(low, bright.max())
    shown = ax.imshow(image.clip(low), "magma", norm, extent=edges)
    # the view grows where a window or a disc leaves the part that is drawn
    corners: list[Any] = [origin, np.add(origin, pattern.shape)]
    black = [withStroke(linewidth=3 if small else 4, foreground="black")]
    look: dict[str, Any] = {"clip_on": False, "zorder": 3, "path_effects": black}
    for name, first, shape in boxes:
        corners += [first, np.add(first, shape)]
        corner = x.value(first[1] - 0.5), y.value(first[0] - 0.5)
        box = Rectangle(corner, x.scale * shape[1], y.scale * shape[0], fill=False, **look)
        ls = "--" if name == "reach" else "-"
        ax.add_patch(box).set(label=name, color=WINDOW, ls=ls, lw=1.3 if small else 2)
    if center is not None and np.isfinite(center).all():
        place = x.value(center[1]), y.value(center[0])
        look["path_effects"] = [withStroke(linewidth=1.6 if small else 2, foreground="black")]
        arms = 5.0 if small else 11.0  # points
        if radius is not None:
            around = np.add(center, 0.5)
            corners += [around - radius, around + radius]
            width, height = 2 * radius * abs(x.scale), 2 * radius * abs(y.scale)
            disc = Ellipse(place, width, height, fill=False, **look)
            ax.add_patch(disc).set(label="disc", color=BEAM, lw=0.8 if small else 1)
            # half the disc, in a panel of 180 points
            arms = min(arms, max(5.0, 180 * radius / max(pattern.shape)))
        ax.plot(*place, "+", color=BEAM, label="center", ms=arms, mew=0.8 if small else 1, **look)
    (top, left), (bottom, right) = np.min(corners, 0) - 0.5, np.max(corners, 0) - 0.5
    ax.set(xlim=(x.value(left), x.value(right)), ylim=(y.value(bottom), y.value(top)))
    _frame(ax, None if small else shown, 1.0 if x.units == y.units else abs(x.scale / y.scale))
    if small:
        ax.set(xticks=[], yticks=[])
        return
    _mark(ax.xaxis, x.name, x.units, whole=x.units == "px")
    _mark(ax.yaxis, y.name, y.units, whole=y.units == "px")


def _step(shape: Sequence[int]) -> int:
    """Side of the blocks that are drawn as one: 320 fill a panel."""
    return -(-max(shape) // 320)


def _line_axis(values: NDArray) -> int | None:
    """The axis along which values are drawn as a line: that of a list, of a row, or of a column; None for a map."""
    if values.ndim == 1:
        return 0
    return int(values.shape[0] == 1) if 1 in values.shape else None


def _show_scan(
    ax: "Axes", report: FigureData, values: NDArray, extend: str = "neither", **look: Any
) -> None:
    """Draw one value a scan position: a map in scan indices, or a line for a list of patterns and for a single row."""
    steps = [f" (step {a.scale:.3g} {a.units})" * a.calibrated for a in report.scan_axes]
    names = [a.name + step for a, step in zip(report.scan_axes, steps, strict=True)]
    along = _line_axis(values)
    if along is not None:
        ax.plot(values.ravel(), ".-" if values.size <= 2000 else ",", color="C0", lw=0.8)
        _mark(ax.xaxis, names[along], whole=True)
        _mark(ax.yaxis, "")
        return
    shown = ax.imshow(np.ma.masked_invalid(values), **look)
    width, height = _frame(ax, shown, _scan_aspect(report), extend)
    _mark(ax.xaxis, names[1], whole=True, inches=width)
    _mark(ax.yaxis, names[0], whole=True, inches=height)


def _inches(ax: "Axes") -> tuple[float, float]:
    """Width and height of the place of a panel, which its picture may not fill."""
    place = ax.get_position(original=True).transformed(ax.figure.transFigure)
    return place.width / ax.figure.dpi, place.height / ax.figure.dpi


def _frame(ax: "Axes", shown: Any, aspect: float, extend: str = "neither") -> tuple[float, float]:
    """Equal scales on both axes, unless the picture were thinner than 0.1 inch, and a color bar, if one is shown.

    Return width and height of the picture in inches.
    """
    ratio = aspect * abs(np.subtract(*ax.get_ylim()) / np.subtract(*ax.get_xlim()))
    width, height = _inches(ax)
    fits = min(width, height / ratio), min(height, width * ratio)
    if min(fits) >= 0.1:
        width, height = fits
    ax.set(facecolor="0.8", aspect=aspect if min(fits) >= 0.1 else "auto")
    if shown is not None:
        beside = ax.inset_axes((1 + 0.075 / width, 0, 0.125 / width, 1))
        ax.figure.colorbar(shown, cax=beside, extend=extend).minorticks_off()
    return width, height


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
    most = round(min(48, 19 * _inches(ax)[0]))
    ax.set_title(text, color=color, fontsize=_fitting(text, most, 10.5))


def _mark(axis: Any, name: str, units: str = "", whole: bool = False, inches: float = 2.4) -> None:
    """Name an axis with final limits, of a length in inches; ``whole`` restricts its ticks to integers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    power = math.floor(math.log10(max(map(abs, axis.get_view_interval()))))
    if axis.get_scale() == "linear":
        most = max(3, inches) if axis.axis_name == "x" else min(5, 5 * inches)
        most = 1 if inches < 0.4 else int(most)
        axis.set_major_locator(MaxNLocator(most, integer=whole))
        if not -3 < power < 6:  # a common factor keeps the numbers short
            axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick / 10.0**power:.6g}"))
            units = f"1e{power} {units}".strip()
    text, most = _printable(f"{name} ({units})" if units else name), 40
    if axis.axis_name == "y" and inches < 1.0:  # beside a flat map
        text, most = text.replace(" (", "\n("), 14
    axis.set_label_text(text, fontsize=_fitting(text, most, 10.0))


def _fitting(text: str, most: int, size: float) -> float:
    """The font size at which a text is no wider than ``most`` letters of ``size`` points."""
    return size * min(1.0, most / max(1, *map(len, text.split("\n"))))


def _printable(text: str) -> str:
    """Text that the font can draw, with ``$`` escaped."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans Mono"))
    known = (c if font.get_char_index(ord(c)) else "?" for c in text.expandtabs())
    return "".join(known).replace("$", r"\$")
