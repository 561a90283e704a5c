"""From what a run knows to what the figure shows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.core.model import Window
from stem_dask.report.figure import FigureData
from stem_dask.report.text import summary
from stem_dask.stages.patterns import axes_of

N_WORST = 3

#: arrays of the analysis that are drawn as they are
_SHOWN = (
    "mean_pattern", "max_pattern", "window_y", "window_x", "center_y", "center_x", "radius", "retention",
)  # fmt: skip


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
    """Collect the figure's arrays: what is known of the patterns, and the worst patterns from the source.

    Parameters
    ----------
    patterns, out : the lazy source and the lazy output
    mean : (ky, kx) mean output pattern
    analysis : complete analysis of a crop, None without one
    window : the window that was cut, or None when nothing was cropped
    results : what results.json says
    title : of the dataset
    """
    axes = axes_of(patterns)
    common: dict[str, Any] = {
        "title": title,
        "axes": axes[-2:],
        "scan_axes": axes[:-2],
        "output_axes": axes_of(out)[-2:],
        "cropped_mean": mean,
        "lines": summary({**results, "files": {}}),
    }
    if window is None or analysis is None:
        return FigureData(**common)
    known: dict[str, Any] = {name: analysis[name].values for name in _SHOWN}
    worst = []
    order = np.argsort(
        np.where(np.isfinite(known["retention"]), known["retention"], np.inf), axis=None
    )
    for flat in order[:N_WORST]:
        index = np.unravel_index(flat, known["retention"].shape)
        kept = float(known["retention"][index])
        if np.isfinite(kept):
            pattern = np.asarray(patterns.data[index].compute(scheduler="sync"))
            place = (int(known["window_y"][index]), int(known["window_x"][index]))
            worst.append((tuple(int(i) for i in index), pattern, place, kept))
    curve_mean = analysis["curve_mean"].values
    return FigureData(
        **common,
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
