"""Choice of the window from the computed analysis, and its place on every pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.chunks import whole_number
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.model import Align, Window
from stem_dask.core.window import (
    axis_window,
    check_size,
    check_window,
    covering_radius,
    filled_fraction,
    radii_for_target,
    uncropped,
)

if TYPE_CHECKING:
    import xarray as xr


def choose_window(
    analysis: xr.Dataset,
    *,
    coverage: float = 0.999,
    margin_pixels: int = 3,
    align: Align = "fixed",
    size: Literal["auto"] | int | Sequence[int] = "auto",
    window: Sequence[int] | None = None,
    size_multiple: int = 2,
    factor: int = 1,
    target_retention: float | None = None,
) -> Window:
    """Choose the window that all patterns are cut to.

    Parameters
    ----------
    analysis : computed result of `analyze`
    coverage : share of the non-empty patterns, 0 < coverage <= 1, whose own radius the window must hold
    margin_pixels : added to the radius, in source pixels
    align : ``fixed``, one window for the dataset; ``pattern``, each pattern around its own center
    size : ``auto``, n, or [ny, nx] in source pixels: multiples of ``size_multiple * factor``, or the whole axis; with
        ``align="fixed"`` at most the detector
    window : [y0, y1, x0, x1] in source pixels, end exclusive; a fixed window of such a size
    size_multiple : the output's size is a multiple of this
    factor : the detector downsampling that follows
    target_retention : another target than the analysis was made with; decided from the stored profiles

    Returns
    -------
    Window

    Raises
    ------
    ConfigError
        When the analysis is still lazy, or an option is outside its range.
    SourceError
        When every pattern is empty.

    Examples
    --------
    >>> import numpy as np
    >>> from stem_dask.stages.analyze import analyze
    >>> data = np.zeros((1, 3, 32, 40), "u2"); data[:, :, 14:18, 19:23] = 9
    >>> import xarray as xr
    >>> patterns = xr.DataArray(data, dims=("scan_y", "scan_x", "ky", "kx"))
    >>> window = choose_window(analyze(patterns).compute(), margin_pixels=1)
    >>> window.shape, window.center, window.global_radius
    ((8, 8), (16, 20), 4)
    """
    require_computed(analysis)
    if not 0 < coverage <= 1:
        raise ConfigError(f"coverage is {coverage}; expected 0 < coverage <= 1")
    least = {"margin_pixels": (margin_pixels, 0), "size_multiple": (size_multiple, 1), "factor": (factor, 1)}  # fmt: skip
    for name, (value, lowest) in least.items():
        if whole_number(name, value, f"an integer >= {lowest}") < lowest:
            raise ConfigError(f"{name} is {value}; expected an integer >= {lowest}")
    if align not in ("fixed", "pattern"):
        raise ConfigError(f"align is {align!r}; expected fixed or pattern")
    known = float(analysis.attrs["target_retention"])
    target = known if target_retention is None else float(target_retention)
    if not 0 < target <= 1:
        raise ConfigError(f"target_retention is {target}; expected 0 < target_retention <= 1")
    metric, radii = analysis.attrs["radius_metric"], np.asarray(analysis["radius"], np.float32)
    if target != known:
        profile, total = np.asarray(analysis["profile"]), np.asarray(analysis["total"])
        exact = analysis["max_pattern"].dtype.kind in "ui"
        radii = radii_for_target(profile, total, target, metric, exact)
    filled = np.isfinite(radii)
    if not filled.any():
        threshold = analysis.attrs["threshold"]
        remedy = "lower analyze.threshold or check the data" if threshold else "check the data"
        raise SourceError(
            "every pattern is empty: no intensity is left after NaN, infinite, negative values and values below "
            f"the threshold ({threshold:g}) count as 0; {remedy}"
        )
    middle = _median_center(analysis, filled)
    needed = radii.astype(np.float64)
    if align == "fixed":  # the distance of the center from the median counts, too
        shift, other = (np.rint(analysis[f"center_{axis}"].values) for axis in "yx")
        for centers, center in zip((shift, other), middle, strict=True):
            centers -= center
            np.abs(centers, out=centers)
        needed += np.maximum(shift, other, out=shift)
    covered, notes, margin = needed[filled], [], margin_pixels
    if metric == "circle" and margin == 0:
        margin = 1
        notes.append("margin_pixels raised from 0 to 1, so that the window contains the disc")
    smallest = covering_radius(covered, coverage)
    detector = (int(analysis.sizes["source_ky"]), int(analysis.sizes["source_kx"]))
    wanted = _wanted_size(size, window, smallest + margin)
    if window is not None:
        if align == "pattern":
            raise ConfigError(
                f"window {list(window)} is fixed on the detector and align is pattern; give size instead"
            )
        check_window(window, detector)
        y0, y1, x0, x1 = window
        middle = (y0 + (y1 - y0) // 2, x0 + (x1 - x0) // 2)
    multiple = size_multiple * factor
    if window is not None or not isinstance(size, str):
        given = f"size is {size}" if window is None else f"window is {list(window)}"
        check_size(wanted, detector, multiple, keeps_whole=align == "pattern", given=given)
    (height, crops_y), (width, crops_x) = (
        axis_window(n, full, multiple) for n, full in zip(wanted, detector, strict=True)
    )
    crops = {"ky": crops_y, "kx": crops_x}
    whole = [(name, full) for name, full in zip(crops, detector, strict=True) if not crops[name]]
    notes += [uncropped(name, full) for name, full in whole]
    return Window(
        shape=(height, width),
        align=align,
        center=middle,
        cropped_axes=tuple(name for name in crops if crops[name]),
        global_radius=smallest + margin,
        coverage=coverage,
        target_retention=target,
        radius_at={f"{c:g}": covering_radius(covered, c) + margin for c in (1.0, 0.999, 0.99)},
        setters=tuple(tuple(index) for index in np.argwhere(needed == smallest)[:5].tolist()),
        notes=tuple(notes),
    )


def _wanted_size(
    size: Literal["auto"] | int | Sequence[int], window: Sequence[int] | None, radius: int
) -> tuple[int, int]:
    if window is not None:
        if size != "auto":
            raise ConfigError(
                f"both window {list(window)} and size {size} are given; give one of them"
            )
        if len(window) != 4:
            raise ConfigError(f"window is {list(window)}; expected [y0, y1, x0, x1]")
        for n in window:
            whole_number(f"window is {list(window)}, and a bound", n, "integers")
        return (window[1] - window[0], window[3] - window[2])
    if isinstance(size, str) and size == "auto":
        return (2 * radius, 2 * radius)
    if isinstance(size, (int, np.integer)):
        return (int(size), int(size))
    if isinstance(size, (str, float)) or len(size) != 2:
        raise ConfigError(f"size is {size!r}; expected auto, n, or [ny, nx] in source pixels")
    height, width = (whole_number(f"size is {list(size)}, and a side", n, "integers") for n in size)
    return height, width


def _median_center(analysis: xr.Dataset, filled: NDArray) -> tuple[int, int]:
    y, x = (float(np.median(analysis[name].values[filled])) for name in ("center_y", "center_x"))
    return int(np.rint(y)), int(np.rint(x))


def window_origins(analysis: xr.Dataset, window: Window) -> tuple[NDArray, NDArray]:
    """First row and column of the window on every pattern: int32, may be negative, 0 on an uncropped axis.

    If it is the same for all patterns, it is a read-only broadcast scalar.
    """
    origins: list[NDArray] = []
    filled = np.isfinite(np.asarray(analysis["radius"].values))
    for axis, name in enumerate(("ky", "kx")):
        half, centers = window.shape[axis] // 2, analysis[f"center_{name[1]}"].values
        if name in window.cropped_axes and window.align == "pattern":
            middle = _median_center(analysis, filled)[axis]
            origins.append((np.where(filled, np.rint(centers), middle) - half).astype(np.int32))
        else:
            first = window.center[axis] - half if name in window.cropped_axes else 0
            origins.append(np.broadcast_to(np.int32(first), centers.shape))
    return origins[0], origins[1]


def filled_fractions(analysis: xr.Dataset, window: Window) -> NDArray[np.float64]:
    """Share of each window outside the detector; for a fixed window a broadcast scalar."""
    origin_y, origin_x = window_origins(analysis, window)
    here = (slice(0, 1 if window.align == "fixed" else None),) * origin_y.ndim
    detector = (int(analysis.sizes["source_ky"]), int(analysis.sizes["source_kx"]))
    filled = filled_fraction(origin_y[here], origin_x[here], window.shape, detector)
    return np.broadcast_to(filled, origin_y.shape)


def require_computed(analysis: xr.Dataset) -> None:
    """Raise ConfigError for a lazy analysis, which every later stage would compute again."""
    needed = ("center_y", "center_x", "radius", "total")
    missing = {*needed} - set(analysis.variables)
    if missing:
        raise ConfigError(
            f"the analysis lacks {', '.join(sorted(missing))}; pass what sd.analyze returned"
        )
    if any(analysis[name].chunks is not None for name in needed):
        raise ConfigError(
            "the analysis is still lazy; compute it once: analysis = sd.analyze(patterns).compute()"
        )
