"""What a run reports: its exit code, its verdict, and advice as overrides to append to the same command."""

import contextlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.config.load import to_dict
from stem_dask.config.options import Config
from stem_dask.core.errors import ConfigError
from stem_dask.core.metadata import attribute, dig, number
from stem_dask.core.model import DETECTOR_DIMS, Window
from stem_dask.core.patterns import lead_dims
from stem_dask.core.text import by
from stem_dask.job import summary
from stem_dask.job.outcome import Outcome
from stem_dask.job.plan import Outputs, is_there, n_quarantined
from stem_dask.kernels.bragg import find_bragg_discs, kept_discs, mean_about
from stem_dask.stages.analyze import stored_radii
from stem_dask.stages.crop import beam_places, choose_window, disc_radius_of, window_origins
from stem_dask.storage.location import at, is_url
from stem_dask.writers.zarr import open_group

#: a window with more than this share of the pixels hardly reduces the data
LITTLE_GAINED = 0.8

#: centers are not credible where more than this share of the patterns has no disc
MOST_WITHOUT_DISC = 0.1

#: a center is an outlier beyond so many times the robust deviation from the descan, and so many px; so many are named
OUTLIER, OUTLIER_PX, MOST_NAMED = 5.0, 0.5, 5

#: overrides, the shape of the window in source pixels, and its effect
Way = tuple[str, tuple[int, int], str]


def exit_code(config: Config, results: Mapping[str, Any]) -> int:
    """7 if patterns could not be read; 4 if more patterns than the coverage allows are below the minimum retention."""
    if results["quarantined"]["n_patterns"]:
        return 7
    return 4 if config.output.patterns and _too_little_kept(config, results) else 0


def stored_results(outputs: Outputs) -> dict[str, Any]:
    """results.json of a finished run; empty if it is missing or was edited."""
    try:
        found = json.loads(Path(outputs.results).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def already_complete(config: Config, outputs: Outputs) -> Outcome:
    """The outcome for a complete output: exit code and closing lines of the run that made it."""
    nothing = {"validation": {}, "quarantined": {"n_patterns": 0}, "verdict": [], "advice": {}}
    results = {**nothing, **stored_results(outputs)}
    words = ""
    if n := n_quarantined(outputs):
        results["quarantined"] = {"n_patterns": n}
        words = f", without {n:,} patterns that could not be read"
    lines, code = [f"already complete: {outputs.store}{words}"], exit_code(config, results)
    if "speed" in results:  # else results.json is missing
        files = {path: stored_bytes(path) for path in outputs.all()}
        lines += summary.closing_lines({**results, "files": files})
    elif code == 4:
        lines += summary.judgement_lines(results)
    return Outcome(code, {}, tuple(lines))


def stored_bytes(path: str) -> int:
    """Bytes of a file, of all files below a folder, or of all objects below a URL."""
    if is_url(path):
        return sum(status.st_size for _, status in at(path).below())
    return summary.tree_bytes(path)


def _too_little_kept(config: Config, results: Mapping[str, Any]) -> str:
    """The reason for exit code 4; empty without one."""
    validation = results["validation"]
    if validation.get("passes_min_threshold") is None:
        return ""
    n = validation["n_patterns"] - validation["n_empty"]
    below_minimum = n - validation["passes_min_threshold"]
    allowed = n - math.ceil(config.crop.coverage * n)
    if below_minimum <= allowed:
        return ""
    return (
        f"{below_minimum:,} of {n:,} patterns keep less than validate.min_retention {config.validation.min_retention:g} "
        f"(lowest: {validation['min_retention']:.4f}); crop.coverage {config.crop.coverage:g} allows {allowed:,}"
    )


def verdict(
    config: Config, results: Mapping[str, Any], known: xr.Dataset | None, window: Window | None
) -> list[str]:
    """Problems of a finished run, one text each."""
    out = []
    if n_missing := results["quarantined"]["n_patterns"]:
        out.append(f"incomplete: {n_missing:,} patterns could not be read")
    if too_little := _too_little_kept(config, results):
        out.append(too_little)
    if words := _centers_not_credible(results.get("center", {})):
        out.append(
            f"centers not credible: {words}; look at the figure, or give analyze.guess or analyze.disc_radius"
        )
    discs = results.get("discs", {})
    if config.crop.criterion == "k_max" and discs.get("cut"):
        n = sum(discs[place] for place in ("inside", "cut", "outside"))
        out.append(
            f"{discs['cut']:,} of {n:,} discs are cut through; a crop.k_max or crop.n_alpha of another size keeps them whole"
        )
    if known is not None and window is not None:
        kept = _kept_pixels(window, known)
        if not window.cropped_axes:
            out.append(f"NOT CROPPED: the window is the whole detector, {by(window.shape)} px")
        elif kept > LITTLE_GAINED:
            out.append(f"little was gained: the window keeps {kept:.0%} of the pixels")
    return out


def _centers_not_credible(center: Mapping[str, Any]) -> str:
    """Why the centers cannot be right, as a clause; empty if nothing says so."""
    out, radius, n = [], center.get("disc_radius"), center.get("n_filled", 0)
    if center.get("method") != "disc":
        return ""
    if center["n_not_found"] > MOST_WITHOUT_DISC * n:
        out.append(f"no disc was found in {center['n_not_found']:,} of {n:,} patterns")
    s, apart = center.get("s"), center["com_distance"]
    if radius is not None and s is not None and s > radius / 2:
        out.append(
            f"they scatter by {s:.2f} px about the descan, more than half of the disc's radius of {radius:.1f} px"
        )
    if radius is not None and apart > radius:
        out.append(
            f"in half of the patterns the center of mass is more than {apart:.1f} px away, beyond the disc's radius of {radius:.1f} px"
        )
    return ", and ".join(out)


def center_quality(analysis: xr.Dataset) -> dict[str, Any]:
    """How far the centers can be trusted, in source pixels.

    ``s`` is their robust standard deviation about the descan, ``outliers`` the indices of the centers farthest from it,
    ``center_spread`` and ``com_distance`` are medians over the patterns. Without a fit, or discs, their values are left out.
    """
    filled = analysis["total"].values > 0
    y, x = (analysis[f"center_{axis}"].values for axis in "yx")
    apart = np.hypot(analysis["com_y"].values - y, analysis["com_x"].values - x)[filled]
    found: dict[str, Any] = {
        "n_filled": int(filled.sum()),
        "n_not_found": int((filled & np.isnan(y)).sum()),
        "com_distance": _median(apart),
    }
    if "center_spread" in analysis:
        found["center_spread"] = _median(analysis["center_spread"].values[filled])
    if fit := attribute(analysis.attrs, "descan"):
        s, order = fit["s"], fit["order"]
        off = np.hypot(*(analysis[f"deflection_{axis}"].values for axis in "yx"))
        off = np.where(filled & np.isfinite(off), off, 0.0)
        far = off > max(OUTLIER * s, OUTLIER_PX)
        worst = np.argsort(-off, axis=None, kind="stable")[: min(MOST_NAMED, int(far.sum()))]
        places = zip(*np.unravel_index(worst, off.shape), strict=True)
        found |= {
            "s": s,
            "descan_order": order,
            "n_outliers": int(far.sum()),
            "outliers": [[int(i) for i in place] for place in places],
        }
    return found


def _median(values: NDArray[np.float64]) -> float:
    """Median of the finite values, NaN without any."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan


def discs_of(
    analysis: xr.Dataset, window: Window, sample: tuple[NDArray, NDArray] | None = None
) -> dict[str, float]:
    """How many discs lie inside the windows, are cut through, and lie outside, and the share of the intensity of all in the last.

    The direct disc counts, too. ``sample`` holds patterns (n, ky, kx) and their positions (n, 1 or 2), whose mean about the beam
    shows the discs where they are; without it, as the mean pattern of the detector does. A disc is inside if the windows of all
    but 2 % of the patterns hold it, and outside if they do not touch it. Empty without a direct disc.
    """
    radius = disc_radius_of(analysis)
    filled = analysis["total"].values > 0
    if radius is None or not filled.any():
        return {}
    beams = np.stack(beam_places(analysis), axis=-1)
    middle = np.rint(np.nanmedian(beams[filled], axis=0)).astype(np.int64)
    mean, n = analysis["mean_pattern"].values, int(filled.sum())
    if sample is not None:
        own = beams[tuple(sample[1].T)]
        seen = np.isfinite(own).all(axis=1)
        mean = mean_about(sample[0][seen], own[seen].astype(np.int64), middle)
        n = int(seen.sum())
    places, counts = find_bragg_discs(mean, n, radius)
    # where the beam is in the windows
    shift = beams - np.stack(window_origins(analysis, window), axis=-1)
    least, most = np.nanpercentile(shift[filled], (1, 99), axis=0)
    places = places - middle + (least + most) / 2
    # what the detector cuts, a window that keeps the whole axis does not
    whole = [name not in window.cropped_axes for name in DETECTOR_DIMS]
    ends = [(-n, 3 * n) if one else (0, n) for n, one in zip(window.shape, whole, strict=True)]
    first, size = zip(*ends, strict=True)
    inside, cut = kept_discs(places, radius + (most - least) / 2, first, size)
    lost = counts[~inside & ~cut].sum()
    return {
        "inside": int(inside.sum()),
        "cut": int(cut.sum()),
        "outside": int((~inside & ~cut).sum()),
        "share_outside": float(lost / counts.sum()) if counts.size else 0.0,
    }


def dose_of(analysis: xr.Dataset, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Median intensity of the patterns that are not empty: in electrons where the metadata say what a count is, else in counts."""
    signal = dig(attrs.get("metadata") or {}, "Signal") or {}
    gain = number(dig(signal, "Noise_properties.Variance_linear_model.gain_factor"))
    total = analysis["total"].values
    median, units = _median(np.where(total > 0, total, np.nan)), "counts"
    if str(signal.get("quantity", "")).startswith("Electrons"):
        units = "electrons"
    elif gain is not None and gain > 0:
        median, units = median / gain, "electrons"
    return {"median": median, "units": units}


def _kept_pixels(window: Window, known: xr.Dataset) -> float:
    """The window's share of the detector's pixels."""
    return math.prod(window.shape) / (known.sizes["source_ky"] * known.sizes["source_kx"])


def advice(
    config: Config,
    store: str,
    results: Mapping[str, Any],
    known: xr.Dataset | None,
    window: Window | None,
    hot: Sequence[Sequence[int]],
) -> dict[str, str]:
    """Overrides to append to the same command, and the effect of each.

    ``store`` holds the profiles, ``known`` is the analysis (with the retention, of a crop), ``hot`` lists [y, x] of suspected hot pixels.
    """
    out: dict[str, str] = {}
    if known is not None and window is not None and config.crop.size != "common":
        if _too_little_kept(config, results):
            # a window from the config: one from the analysis keeps enough
            out = {line: gives for line, _, gives in _of_given(config, store, known)}
            kept = known["retention"].values
            kept = np.sort(kept[np.isfinite(kept)])
            allowed = kept.size - math.ceil(config.crop.coverage * kept.size)
            reached = math.floor(1e4 * float(kept[allowed])) / 1e4
            if reached > 0:
                line = _line(f"validate.min_retention={reached:g}")
                out[line] = "accepts what this window keeps"
        elif _kept_pixels(window, known) > LITTLE_GAINED:
            given, seen = config.crop.given is not None, {window.shape}
            for line, shape, gives in (_of_given if given else _of_found)(config, store, known):
                if math.prod(shape) < math.prod(window.shape) and shape not in seen:
                    seen.add(shape)
                    out[line] = gives
    anew = [] if config.analyze.known is None else ["analyze.from=null"]
    threshold = None if known is None else summary.background_threshold(known)
    if threshold is not None:
        line = _line(f"analyze.threshold={threshold:.12g}", *anew)
        out[line] = "counts the background as 0 in the analysis"
    mask = _mask(config, hot)
    if mask is not None:
        out[_line(f"input.mask={mask}", *anew)] = f"masks the {len(hot):,} suspected hot pixels"
    return out


def commands(
    config: Config, outputs: Outputs, command: str, given: Mapping[str, str]
) -> dict[str, str]:
    """Shell commands that follow advice, and the effect of each: ``command`` with the overrides and an output of its own."""
    dropped = ("--overwrite", "--restart", "--json", "-q", "--quiet")
    words = [word for word in shlex.split(command) if word not in dropped]
    out, taken = {}, set[str]()
    for line, gives in given.items() if words else ():
        changes = [word for word in shlex.split(line) if word != "output.overwrite=true"]
        names = {word.partition("=")[0] for word in changes}
        # another mask, threshold, or part of the input needs an analysis of its own
        same = all(
            name.startswith(("crop.", "validate.", "analyze.target_retention")) for name in names
        )
        if (
            same
            and config.crop.enabled
            and config.output.patterns
            and outputs.store.endswith(".zarr")
        ):
            changes.append(f"analyze.from={_shown(outputs.store)}")
        path = _free_name(config, outputs, changes[0], taken)
        taken.add(path)
        changes.append(f"output.path={_shown(path)}")
        names = {word.partition("=")[0] for word in changes}
        kept = [word for word in words if word.partition("=")[0] not in names]
        out[shlex.join([*kept, *changes])] = gives
    return out


def _free_name(config: Config, outputs: Outputs, change: str, taken: set[str]) -> str:
    """A name for the output of a changed job, of which no file exists."""
    value = change.partition("=")[2].replace("null", "auto")
    tag = "_".join(re.findall(r"[A-Za-z0-9.]+", value)) if len(value) <= 20 else "changed"
    base, suffix = os.path.splitext(outputs.store)
    if not config.output.patterns:
        base = base.removesuffix("_analysis")
    for i in itertools.count(1):
        path = f"{base}_{tag}{f'_{i}' * (i > 1)}{suffix}"
        output = config.output.model_copy(update={"path": path, "patterns": True})
        made = Outputs.of(config.model_copy(update={"output": output})).all()
        if path not in taken and not any(map(is_there, made)):
            return path
    raise AssertionError


def _shown(path: str) -> str:
    """A path relative to the working directory where it is below it."""
    if is_url(path) or not path.startswith(f"{os.getcwd()}{os.sep}"):
        return path
    return os.path.relpath(path)


def _line(*overrides: str) -> str:
    """An override of a complete output must replace it."""
    return " ".join([*map(shlex.quote, overrides), "output.overwrite=true"])


def _of_given(config: Config, store: str, known: xr.Dataset) -> Iterator[Way]:
    """Alternatives to a window from the config: one that holds the target retention, and one that holds the minimum."""
    options = {**_window_options(config), "size": "auto"}
    free = ["crop.window=null"] * (config.crop.window is not None)
    least = config.validation.min_retention
    with contextlib.suppress(ConfigError):  # crop.square, and the detector is too small
        found = choose_window(known, **options)
        gives = f"gives {by(found.shape)} px, enough for analyze.target_retention {found.target_retention:g}"
        yield _line(*(free or ["crop.size=auto"])), found.shape, gives
        for other in _at_targets(store, known, [least] if least > 0 else []):
            found = choose_window(other, **{**options, "margin_pixels": 0})
            if found.cropped_axes:
                height, width = found.shape
                size = f"{height}" if height == width else f"[{height},{width}]"
                gives = f"gives {by(found.shape)} px, enough for validate.min_retention {least:g}"
                yield _line(*free, f"crop.size={size}"), found.shape, gives


def _of_found(config: Config, store: str, known: xr.Dataset) -> Iterator[Way]:
    """Alternatives to a window from the analysis: with lower targets and coverages."""
    options, least = _window_options(config), config.validation.min_retention
    targets = [target for target in (0.95, 0.9) if target < config.analyze.target_retention]
    for target, other in zip(targets, _at_targets(store, known, targets), strict=True):
        shape = choose_window(other, **options).shape
        lower = [f"validate.min_retention={target:g}"] * (target < least)
        line = _line(f"analyze.target_retention={target:g}", *lower)
        yield line, shape, f"gives {by(shape)} px, enough for {target:g} of the intensity"
    for coverage in (0.999, 0.99):
        if coverage < config.crop.coverage:
            shape = choose_window(known, **{**options, "coverage": coverage}).shape
            gives = f"gives {by(shape)} px, enough for {coverage:g} of the patterns"
            yield _line(f"crop.coverage={coverage:g}"), shape, gives


def _window_options(config: Config) -> dict[str, Any]:
    options = config.crop.model_dump(exclude={"enabled", "window"})
    return {**options, "factor": config.downsample.factor}


def _at_targets(store: str, known: xr.Dataset, targets: Sequence[float]) -> list[xr.Dataset]:
    """The analysis with the radii for other targets, from the stored profiles, which at most 64 tasks read once."""
    stored = open_group(store, "analysis")
    first, rows = lead_dims(stored)[0], stored["profile"].encoding["chunks"][0]
    together = math.ceil(stored.sizes[first] / 64 / rows) * rows
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
    if len(hot) > summary.MAX_HOT:
        return None
    listed = {} if given is None else to_dict(config)["input"]["mask"]
    listed["pixels"] = [*listed.get("pixels", []), *map(list, hot)]
    return json.dumps(listed, separators=(",", ":"))
