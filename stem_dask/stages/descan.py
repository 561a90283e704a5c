"""Descan: the part of the beam's wander that the instrument causes, fitted to the centers of all patterns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError
from stem_dask.core.metadata import as_text, attribute
from stem_dask.core.model import SCAN_DIMS
from stem_dask.core.patterns import labelled
from stem_dask.core.text import by
from stem_dask.kernels import descan as kernel
from stem_dask.kernels.descan import Descan, descan_weight, fit_constant, scan_coordinates
from stem_dask.stages.blocks import require_computed

if TYPE_CHECKING:
    import xarray as xr

#: predicted s.d. at a corner of the scan, in px, above which a fit is extrapolated
EXTRAPOLATED = 0.25


def fit_descan(
    analysis: xr.Dataset,
    *,
    order: Literal["auto", 0, 1, 2] = "auto",
    region: Sequence[int] | None = None,
    reference: xr.Dataset | None = None,
) -> xr.Dataset:
    """Fit the descan: the smooth surface over the scan that the beam follows.

    Robust, so that the specimen has no part in it; see `stem_dask.kernels.descan.fit_descan` for the method. A field that grows
    linearly over the scan cannot be distinguished from descan without a vacuum scan as ``reference``.

    Parameters
    ----------
    analysis : computed result of `analyze` for a scan
    order : 0, 1 or 2, of the polynomial; ``auto`` chooses it by cross-validation
    region : [y0, y1, x0, x1] of the scan, end exclusive, where to fit: for example vacuum
    reference : analysis with a fit, of a vacuum scan of the same shape and step: only a constant is fitted

    Returns
    -------
    The analysis with ``descan_y``, ``descan_x`` and ``deflection_y``, ``deflection_x`` (center - descan) by position, in source
    pixels, and the attribute ``descan``, JSON text: coefficients, order, s (robust s.d. in px), cv and leverage (px)

    Raises
    ------
    ConfigError
        When the patterns are no scan, too few centers were found for the order, the region lies outside the scan, or the
        reference has another shape.

    Examples
    --------
    >>> import numpy as np
    >>> import xarray as xr
    >>> from stem_dask.stages.analyze import analyze
    >>> data = np.zeros((4, 5, 16, 16), "u2")
    >>> for i in range(4): data[i, :, 5 + i, 8] = 9
    >>> patterns = xr.DataArray(data, dims=("scan_y", "scan_x", "ky", "kx"))
    >>> fitted = fit_descan(analyze(patterns, center_method="centroid").compute(), order=1)
    >>> fitted.descan_y[:, 0].values.round(6).tolist(), float(abs(fitted.deflection_y).max().round(6))
    ([5.0, 6.0, 7.0, 8.0], 0.0)
    """
    fit = fit_of(analysis, order=order, region=region, reference=reference)
    found = with_descan(analysis, fit)
    return found.drop_attrs(deep=False).assign_attrs(as_text(found.attrs))


def fit_of(
    analysis: xr.Dataset,
    *,
    order: Literal["auto", 0, 1, 2] = "auto",
    region: Sequence[int] | None = None,
    reference: xr.Dataset | None = None,
) -> Fit:
    """The surface that `fit_descan` adds to an analysis."""
    require_computed(analysis)
    if analysis["center_y"].dims != SCAN_DIMS:
        raise ConfigError(
            "a list of patterns has no descan; give input.scan_shape, or use crop.align fixed or pattern"
        )
    shape, parts = analysis["center_y"].shape, attribute(analysis.attrs, "scan_part")
    centers = (np.asarray(analysis[f"center_{axis}"].values) for axis in "yx")
    y, x = (np.where(analysis["total"].values > 0, one, np.nan) for one in centers)
    weight: Any = 1.0
    if "center_spread" in analysis:
        weight = descan_weight(analysis["center_spread"].values)
    everywhere = [np.arange(n)[:, None] for n in shape]
    how: dict[str, Any] = {"order": order, "region": region, "reference": reference}
    return fit_places(np.stack([y, x], axis=-1), everywhere, shape, parts, weight=weight, **how)


class Fit(NamedTuple):
    """A fitted surface, at all positions of the scan."""

    descan: Descan
    surface: NDArray[np.float64]  #: (scan_y, scan_x, 2)
    is_reference: bool


def fit_places(
    centers: NDArray[np.float64],
    around: Sequence[NDArray[np.int64]],
    shape: Sequence[int],
    parts: Sequence[Sequence[int]] | None,
    *,
    weight: Any = 1.0,
    order: Literal["auto", 0, 1, 2],
    region: Sequence[int] | None,
    reference: xr.Dataset | None,
) -> Fit:
    """Fit the descan to centers (places y, places x, 2), each of the mean pattern of some positions of a scan.

    ``around`` are, for both scan axes, the indices (places, n) that belong to a place; ``parts`` is the attribute ``scan_part`` of
    the patterns.
    """
    parts = parts or [(n, 0, 1) for n in shape]
    v, u = (
        scan_coordinates(full)[first::step][:n]
        for n, (full, first, step) in zip(shape, parts, strict=True)
    )
    inside = None
    if region is not None:
        inside = _region(region, shape, parts)[
            np.ix_(*(one[:, one.shape[1] // 2] for one in around))
        ]
    at: dict[str, Any] = {
        "region": inside, "v": v[around[0]].mean(axis=1), "u": u[around[1]].mean(axis=1),
    }  # fmt: skip
    y, x = np.moveaxis(centers, -1, 0)
    try:
        if reference is None:
            found = kernel.fit_descan(y, x, weight, order=order, **at)
        else:
            known = _reference(reference, parts)
            found = fit_constant(known, y, x, weight, **at)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Fit(found, found.at_points(v[:, None], u), reference is not None)


def with_descan(analysis: xr.Dataset, fit: Fit) -> xr.Dataset:
    """Add a fit to an analysis."""
    added, found = {}, fit.descan
    for i, axis in enumerate("yx"):
        like = analysis[f"center_{axis}"]
        added[f"descan_{axis}"] = like.copy(data=fit.surface[..., i])
        added[f"deflection_{axis}"] = like.copy(data=like.values - fit.surface[..., i])
    about = {
        "coefficients": found.coefficients.tolist(),
        "order": int(found.order),
        "s": float(found.s),
        "cv": {str(order): float(error) for order, error in found.cv.items()},
        "leverage": float(found.leverage),
        "reference": fit.is_reference,
    }
    return labelled(analysis.assign(added).assign_attrs(descan=about))


def _region(
    region: Sequence[int], shape: Sequence[int], parts: Sequence[Sequence[int]]
) -> NDArray[np.bool_]:
    """Which positions lie in a region of the scan as acquired."""
    y0, y1, x0, x1 = region
    (height, first_y, step_y), (width, first_x, step_x) = parts
    if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
        raise ConfigError(
            f"descan.region {list(region)} does not fit the scan of {height} x {width} positions; give [y0, y1, x0, x1] with "
            "0 <= y0 < y1 <= scan_y and 0 <= x0 < x1 <= scan_x"
        )
    y = first_y + step_y * np.arange(shape[0])
    x = first_x + step_x * np.arange(shape[1])
    return ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))


def _reference(reference: xr.Dataset, parts: Sequence[Sequence[int]]) -> Descan:
    """The fit of a reference, which must be of a scan of the same shape and step."""
    about = attribute(reference.attrs, "descan")
    if about is None:
        raise ConfigError("the reference has no descan; pass what sd.fit_descan returned for it")
    theirs = reference["center_y"].shape
    their_parts = attribute(reference.attrs, "scan_part") or [(n, 0, 1) for n in theirs]
    # the coordinates of the surface are those of the scan as acquired, whatever was read of it
    here, there = ([size for size, _, _ in of] for of in (parts, their_parts))
    if here != there:
        raise ConfigError(
            f"the reference is a scan of {by(there)} positions, and this one of {by(here)}; a vacuum scan of the same shape and step "
            "is needed"
        )
    cv = {int(order): error for order, error in about["cv"].items()}
    return Descan(
        np.array(about["coefficients"]), about["order"], about["s"], cv, about["leverage"]
    )


def refuse_rough(analysis: xr.Dataset) -> None:
    """Raise ConfigError where the centers do not follow the fitted surface, so that windows around it would miss the beam."""
    s, survey = attribute(analysis.attrs, "descan")["s"], attribute(analysis.attrs, "survey") or {}
    radius = survey.get("radius")
    if radius is not None and s > radius / 2:
        raise ConfigError(
            f"the centers do not follow a smooth surface: they scatter by {s:.2f} px about it, more than half of the disc's radius "
            f"of {radius:.1f} px; use crop.align=fixed or crop.align=pattern, or fit in a region of vacuum (descan.region)"
        )
