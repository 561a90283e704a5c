"""From a finished store to what the figure shows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from stem_dask.figure import FigureData
from stem_dask.model import Window
from stem_dask.report import summary
from stem_dask.stages.patterns import axes_of, axis_of

N_WORST = 3


def figure_data(
    store: str, patterns: xr.DataArray, window: Window | None, results: Mapping[str, Any]
) -> FigureData:
    """Collect the figure's arrays: the analysis and means from the store, the worst patterns from the source.

    Parameters
    ----------
    store : finished zarr store
    patterns : the lazy source; three of its patterns are read
    window : the window that was cut, or None when nothing was cropped
    results : what results.json says
    """
    root = xr.open_zarr(store)
    output = xr.open_zarr(store, group="output")
    axes = axes_of(patterns)
    common: dict[str, Any] = {
        "title": str(root.attrs["title"]),
        "axes": axes[-2:],
        "scan_axes": axes[:-2],
        "output_axes": (axis_of(root, "ky"), axis_of(root, "kx")),
        "cropped_mean": output["mean_pattern"].values,
        "lines": summary({**results, "files": {}}),
    }
    if window is None:
        return FigureData(**common)
    analysis = xr.open_zarr(store, group="analysis")
    known = {
        name: analysis[name].values
        for name in (
            "mean_pattern",
            "max_pattern",
            "window_y",
            "window_x",
            "center_y",
            "center_x",
            "radius",
            "retention",
        )
    }
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
    half_sizes = np.arange(analysis.sizes["radius"])
    return FigureData(
        **common,
        **known,
        window_shape=window.shape,
        align=window.align,
        worst=worst,
        curve_size=2 * half_sizes[1:],
        curve_mean=analysis["curve_mean"].values[1:],
        curve_min=analysis["curve_min"].values[1:],
        target_retention=window.target_retention,
        min_retention=float(results["limits"]["min_retention"]),
        global_radius=window.global_radius,
    )
