"""Figure and report of a finished run or an analysis, for notebooks."""

import contextlib
import html
import json
import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.model import Window
from stem_dask.core.patterns import axis_of, lead_dims
from stem_dask.job.figure import FigureData, build
from stem_dask.job.outcome import Outcome
from stem_dask.job.report import write_report
from stem_dask.stages.blocks import require_computed
from stem_dask.stages.crop import choose_window, detector_of, disc_radius_of, window_origins
from stem_dask.storage.location import is_url
from stem_dask.storage.publish import publish, temporary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(
    analysis: xr.Dataset | Outcome | str | PathLike[str], window: Window | None = None
) -> "Figure":
    """Mean pattern with the window, image of the specimen, and retention against window size.

    Parameters
    ----------
    analysis : computed result of `analyze`, the path of a .zarr that holds one, or the result of `run_config`
    window : result of `choose_window`; default that of the run, or what `choose_window` finds

    Returns
    -------
    matplotlib Figure without pyplot: it stays until it is dropped, and a notebook shows it once

    Raises
    ------
    ConfigError, SourceError
        When there is no analysis, or it is still lazy.

    Examples
    --------
    >>> import numpy as np, stem_dask as sd
    >>> analysis = sd.analyze(np.ones((2, 3, 16, 16), "u2")).compute()
    >>> [ax.get_label() for ax in plot(analysis).axes if ax.get_label() in ("mean", "curve")]
    ['mean', 'curve']
    """
    known, title = (analysis, "analysis") if isinstance(analysis, xr.Dataset) else _stored(analysis)
    require_computed(known)
    window = window or _window_of(analysis) or choose_window(known)
    windows = window_origins(known, window)
    maps: dict[str, Any] = {
        name: known[name].values
        for name in ("mean_pattern", "mask", "bright_field", "dark_field")
        if name in known
    }
    if "bright_field" not in maps:
        maps["total"] = known["total"].values
    curve_mean, curve_min = (known[name].values for name in ("curve_mean", "curve_min"))
    figure = build(
        FigureData(
            title=title,
            axes=detector_of(known),
            scan_axes=tuple(axis_of(known, dim) for dim in lead_dims(known)),
            window_y=np.asarray(windows[0]),
            window_x=np.asarray(windows[1]),
            window_shape=window.shape,
            align=window.align,
            disc_radius=disc_radius_of(known),
            curve_size=2 * np.arange(1, len(curve_mean)),
            curve_mean=curve_mean[1:],
            curve_min=curve_min[1:],
            target_retention=window.target_retention,
            global_radius=window.global_radius,
            **maps,
        )
    )
    # a notebook knows figures only after an import of pyplot; then it uses its own way instead of this one
    figure._repr_png_ = MethodType(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: "Figure") -> bytes:
    import io

    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _stored(given: Outcome | str | PathLike[str]) -> tuple[xr.Dataset, str]:
    """The analysis in a store, without the profiles, and a title."""
    from stem_dask.writers.zarr import open_group

    path = _path(given)
    for group in ("analysis", ""):
        try:
            found = open_group(path, group)
        except (OSError, KeyError, ValueError):
            continue
        if "curve_mean" in found and "mean_pattern" in found:
            return found.drop_vars("profile", errors="ignore").load(), Path(path).stem
    raise SourceError(
        f"{path} holds no analysis; give the .zarr of a crop, or analysis = sd.analyze(sd.open(path)).compute()"
    )


def _window_of(given: Any) -> Window | None:
    """The window of a finished run; None for an analysis alone."""
    if isinstance(given, xr.Dataset):
        return None
    results = given.results if isinstance(given, Outcome) else {}
    with contextlib.suppress(OSError, ValueError):
        name = f"{os.path.splitext(_path(given))[0]}_results.json"
        results = results or json.loads(Path(name).read_text(encoding="utf-8"))
    found, limits = results.get("window"), results.get("limits", {})
    if not found:
        return None
    return Window(
        tuple(found["size"]),
        found["align"],
        tuple(found["origin"]),
        tuple(found["cropped_axes"]),
        results["analysis"]["global_radius"],
        results["config"]["crop"]["coverage"],
        limits["target_retention"],
    )


def _path(given: Outcome | str | PathLike[str]) -> str:
    path = given.path if isinstance(given, Outcome) else os.fspath(given)
    if path is None:
        raise ConfigError("this run stored no patterns; give the path of its analysis")
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path))


@dataclass(frozen=True)
class Report:
    """The report of a finished run, which a notebook shows in a frame."""

    path: str

    def _repr_html_(self) -> str:
        page = html.escape(Path(self.path).read_text(encoding="utf-8"))
        style = "width: 100%; height: 640px; border: 1px solid #ccc"
        return f"<iframe title='Report' style='{style}' srcdoc=\"{page}\"></iframe>"


def report(path: Outcome | str | PathLike[str]) -> Report:
    """The report of a finished run, to look at in a notebook or, as a file, in a browser.

    Parameters
    ----------
    path : an output of the run, such as NAME.zarr, the report NAME_report.html itself, or the result of `run_config`; a missing
        report is written

    Returns
    -------
    Report, whose ``path`` is that of the file

    Raises
    ------
    SourceError
        When the report is missing, and there are no results of a finished run to write it from.
    """
    name = _path(path)
    if name.endswith(".html"):
        places = [name]
    else:
        bare = os.path.splitext(name)[0]
        places = [
            f"{one}_report.html" for one in dict.fromkeys((bare, bare.removesuffix("_analysis")))
        ]
    for place in places:
        if os.path.isfile(place):
            return Report(place)
    try:
        results = json.loads(Path(f"{os.path.splitext(name)[0]}_results.json").read_text("utf-8"))
        write_report(temporary(places[0]), results, name if name.endswith(".zarr") else None)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"there is no report {places[0]}, and it cannot be written without the results of a finished run"
        ) from error
    publish(places[0])
    return Report(places[0])
