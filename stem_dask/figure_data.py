"""From a finished store to what the figure shows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stem_dask.figure import FigureData
from stem_dask.model import Axis, Window
from stem_dask.report import summary
from stem_dask.stages.patterns import axes_of, axis_of

if TYPE_CHECKING:
    import xarray as xr
    import zarr

N_WORST = 3


def figure_data(
    store: str,
    patterns: "xr.DataArray",
    window: Window | None,
    results: Mapping[str, Any],
    n_worst: int = N_WORST,
) -> FigureData:
    """Collect the figure's arrays: the analysis and means from the store, the worst patterns from the source.

    Parameters
    ----------
    store : finished zarr store
    patterns : the lazy source
    window : the window that was cut, or None when nothing was cropped
    results : what results.json says
    n_worst : so many patterns are read from the source and shown; 0 where it holds the windows only
    """
    import zarr

    root = zarr.open_group(store, mode="r")  # xarray would open every array of the three groups
    axes = axes_of(patterns)
    common: dict[str, Any] = {
        "title": str(root.attrs["title"]),
        "axes": axes[-2:],
        "scan_axes": axes[:-2],
        "output_axes": (_axis(root, "ky"), _axis(root, "kx")),
        "cropped_mean": np.asarray(root["output/mean_pattern"]),
        "lines": summary({**results, "files": {}}),
    }
    if window is None:
        return FigureData(**common)
    known: dict[str, Any] = {
        name: np.asarray(root[f"analysis/{name}"])
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
    for flat in order[:n_worst]:
        index = np.unravel_index(flat, known["retention"].shape)
        kept = float(known["retention"][index])
        if np.isfinite(kept):
            pattern = np.asarray(patterns.data[index].compute(scheduler="sync"))
            place = (int(known["window_y"][index]), int(known["window_x"][index]))
            worst.append((tuple(int(i) for i in index), pattern, place, kept))
    curve_mean = np.asarray(root["analysis/curve_mean"])
    return FigureData(
        **common,
        **known,
        window_shape=window.shape,
        align=window.align,
        worst=worst,
        curve_size=2 * np.arange(1, len(curve_mean)),
        curve_mean=curve_mean[1:],
        curve_min=np.asarray(root["analysis/curve_min"])[1:],
        target_retention=window.target_retention,
        min_retention=float(results["limits"]["min_retention"]),
        global_radius=window.global_radius,
    )


def _axis(root: "zarr.Group", dim: str) -> Axis:
    """An axis of the output from its coordinate, whose attributes xarray would only hand on."""
    import xarray as xr

    stored = root[dim]
    return axis_of(xr.Dataset(coords={dim: (dim, np.asarray(stored), dict(stored.attrs))}), dim)
