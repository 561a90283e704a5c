"""Verdict and advice of a finished run; advice consists of overrides to append to the same command."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dask
import numpy as np
import xarray as xr

from stem_dask.config.load import to_dict
from stem_dask.config.options import Config
from stem_dask.core.model import Window
from stem_dask.core.patterns import lead_dims
from stem_dask.core.text import by
from stem_dask.report.text import MAX_HOT, background_threshold, kept_pixels
from stem_dask.stages.analyze import stored_radii
from stem_dask.stages.crop import choose_window
from stem_dask.writers.zarr import open_group

#: a window with more than this share of the pixels hardly reduces the data
LITTLE_GAINED = 0.8

#: target retentions to suggest if the window hardly reduces the data
OTHER_TARGETS = (0.95, 0.9)

#: coverages to suggest in that case
COVERAGES = (0.999, 0.99)

#: upper bound of the tasks that read the stored profiles
PROFILE_TASKS = 64

#: part of every suggestion, because the output is complete
REPLACE = "output.overwrite=true"

#: overrides, the shape of the window in source pixels, and its effect
Way = tuple[str, tuple[int, int], str]


def too_little_kept(config: Config, results: Mapping[str, Any]) -> str:
    """The reason for exit code 4; empty without one."""
    validation = results["validation"]
    if validation.get("passes_min_threshold") is None:
        return ""
    n = validation["n_patterns"] - validation["n_empty"]
    below = n - validation["passes_min_threshold"]
    allowed = n - math.ceil(config.crop.coverage * n)
    if below <= allowed:
        return ""
    return (
        f"{below:,} of {n:,} patterns keep less than validate.min_retention {config.validation.min_retention:g} "
        f"(lowest: {validation['min_retention']:.4f}); crop.coverage {config.crop.coverage:g} allows {allowed:,}"
    )


def verdict(
    config: Config, results: Mapping[str, Any], known: xr.Dataset | None, window: Window | None
) -> list[str]:
    """Problems of a finished run, one text each."""
    out = []
    n_missing = results["quarantined"]["n_patterns"]
    if n_missing:
        out.append(f"incomplete: {n_missing:,} patterns could not be read")
    if too_little := too_little_kept(config, results):
        out.append(too_little)
    if known is not None and window is not None:
        kept = kept_pixels(window, known)
        if kept > LITTLE_GAINED:
            out.append(f"little was gained: the window keeps {kept:.0%} of the pixels")
    return out


def advice(
    config: Config,
    store: str,
    results: Mapping[str, Any],
    known: xr.Dataset | None,
    window: Window | None,
    hot: Sequence[Sequence[int]],
) -> dict[str, str]:
    """Overrides to append to the same command, and the effect of each.

    Parameters
    ----------
    store : the finished output, which holds the profiles
    results : of the run, as in results.json
    known : the analysis, of a crop with the retention; None without one
    window : of a crop
    hot : [y, x] of suspected hot pixels
    """
    out: dict[str, str] = {}
    if known is not None and window is not None and config.crop.size != "common":
        if too_little_kept(config, results):
            out |= _larger(config, store, known)
        elif kept_pixels(window, known) > LITTLE_GAINED:
            out |= _smaller(config, store, known, window)
    anew = [] if config.analyze.known is None else ["analyze.from=null"]
    threshold = None if known is None else background_threshold(known)
    if threshold is not None:
        line = _line(f"analyze.threshold={threshold:.12g}", *anew)
        out[line] = "counts the background as 0 in the analysis"
    mask = _mask(config, hot)
    if mask is not None:
        out[_line(f"input.mask={mask}", *anew)] = f"masks the {len(hot):,} suspected hot pixels"
    return out


def _line(*overrides: str) -> str:
    return " ".join([*map(shlex.quote, overrides), REPLACE])


def _larger(config: Config, store: str, known: xr.Dataset) -> dict[str, str]:
    """Suggestions for a window from the config that keeps too little; a window from the analysis keeps enough."""
    out = {line: gives for line, _, gives in _of_given(config, store, known)}
    kept = known["retention"].values
    kept = np.sort(kept[np.isfinite(kept)])
    allowed = kept.size - math.ceil(config.crop.coverage * kept.size)
    reached = math.floor(1e4 * float(kept[allowed])) / 1e4
    if reached > 0:
        out[_line(f"validate.min_retention={reached:g}")] = "accepts what this window keeps"
    return out


def _smaller(config: Config, store: str, known: xr.Dataset, window: Window) -> dict[str, str]:
    """Suggestions for a smaller window, one per size."""
    given = config.crop.size != "auto" or config.crop.window is not None
    ways = (_of_given if given else _of_found)(config, store, known)
    out, seen = {}, {window.shape}
    for line, shape, gives in ways:
        if math.prod(shape) < math.prod(window.shape) and shape not in seen:
            seen.add(shape)
            out[line] = gives
    return out


def _of_given(config: Config, store: str, known: xr.Dataset) -> Iterator[Way]:
    """Alternatives to a window from the config: one that holds the target retention, and one that holds the minimum."""
    options = _window_options(config)
    free = ["crop.window=null"] * (config.crop.window is not None)
    found = choose_window(known, **options)
    gives = f"gives {by(found.shape)} px, enough for analyze.target_retention {found.target_retention:g}"
    yield _line(*(free or ["crop.size=auto"])), found.shape, gives
    least = config.validation.min_retention
    if least > 0:
        (other,) = _at_targets(store, known, [least])
        found = choose_window(other, **{**options, "margin_pixels": 0})
        if len(found.cropped_axes) == 2:
            gives = f"gives {by(found.shape)} px, enough for validate.min_retention {least:g}"
            yield _line(*free, f"crop.size={found.shape[0]}"), found.shape, gives


def _of_found(config: Config, store: str, known: xr.Dataset) -> Iterator[Way]:
    """Alternatives to a window from the analysis: with lower targets and coverages."""
    options, least = _window_options(config), config.validation.min_retention
    targets = [target for target in OTHER_TARGETS if target < config.analyze.target_retention]
    for target, other in zip(targets, _at_targets(store, known, targets), strict=True):
        shape = choose_window(other, **options).shape
        lower = [f"validate.min_retention={target:g}"] * (target < least)
        line = _line(f"analyze.target_retention={target:g}", *lower)
        yield line, shape, f"gives {by(shape)} px, enough for {target:g} of the intensity"
    for coverage in COVERAGES:
        if coverage < config.crop.coverage:
            shape = choose_window(known, **{**options, "coverage": coverage}).shape
            gives = f"gives {by(shape)} px, enough for {coverage:g} of the patterns"
            yield _line(f"crop.coverage={coverage:g}"), shape, gives


def _window_options(config: Config) -> dict[str, Any]:
    options = config.crop.model_dump(exclude={"enabled", "size", "window"})
    return {**options, "factor": config.downsample.factor}


def _at_targets(store: str, known: xr.Dataset, targets: Sequence[float]) -> list[xr.Dataset]:
    """The analysis with the radii for other targets, from the stored profiles, which are read once."""
    stored = open_group(store, "analysis")
    first, rows = lead_dims(stored)[0], stored["profile"].encoding["chunks"][0]
    together = math.ceil(stored.sizes[first] / PROFILE_TASKS / rows) * rows
    stored = stored.chunk({**dict.fromkeys(stored.dims, -1), first: together})
    exact = known["max_pattern"].dtype.kind in "ui"
    metric = str(known.attrs["radius_metric"])
    found = dask.compute(*(stored_radii(stored, target, metric, exact) for target in targets))
    return [known.assign(radius=known["radius"].copy(data=radii)) for radii in found]


def _mask(config: Config, hot: Sequence[Sequence[int]]) -> str | None:
    """The value of ``input.mask`` that also masks the hot pixels; None without any, or if they do not fit a line."""
    given = config.input.mask
    if not hot or isinstance(given, str):
        return None
    if given is None and config.crop.enabled:
        return "auto"
    if len(hot) > MAX_HOT:
        return None
    listed = {} if given is None else to_dict(config)["input"]["mask"]
    listed["pixels"] = [*listed.get("pixels", []), *map(list, hot)]
    return json.dumps(listed, separators=(",", ":"))
