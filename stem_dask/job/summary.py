"""results.json, warnings, and the closing lines of a run."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.core.errors import StoreError
from stem_dask.core.model import LIST_DIMS, Axis, Window
from stem_dask.core.text import size
from stem_dask.kernels.pixels import DEAD, HOT, spikes
from stem_dask.stages.descan import EXTRAPOLATED
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import opened, publish, temporary

if TYPE_CHECKING:
    from stem_dask.stages.survey import Survey

#: above this many patterns, results.json omits lists with one entry per pattern
MAX_LISTED = 100_000

#: hot pixels listed by position
MAX_HOT = 20

#: a scale that differs by more than this from that of the disc is worth a warning
WRONG_SCALE = 0.05

#: share of the total above which clipped negatives, or a constant background, are worth a warning
NOTICEABLE = 0.05


def results_of(
    analysis: xr.Dataset | None,
    retention: Mapping[str, float | int] | None,
    original_shape: Sequence[int],
    cropped_shape: Sequence[int],
    n_patterns: int,
    window: Window | None,
    listed: int = MAX_LISTED,
) -> dict[str, Any]:
    """The parts ``analysis`` and ``validation`` of the results, in the format of the earlier cropping script.

    Lists with one entry per pattern are omitted above ``listed`` patterns.
    """
    out: dict[str, Any] = {
        "analysis": {
            "global_radius": None if window is None else window.global_radius,
            "original_shape": tuple(int(n) for n in original_shape),
            "cropped_shape": tuple(int(n) for n in cropped_shape),
            "n_patterns": n_patterns,
        },
        "validation": {"n_patterns": n_patterns},
    }
    if window is not None:
        out["window"] = {
            "size": list(window.shape),
            "align": window.align,
            "origin": list(window.origin),
            "cropped_axes": list(window.cropped_axes),
            "radius_at_coverage": dict(window.radius_at),
            "set_by_patterns": [list(index) for index in window.setters],
        }
    if analysis is not None:
        radii = np.asarray(analysis["radius"].values).ravel()
        finite = radii[np.isfinite(radii)].astype(np.float64)
        out["analysis"]["retention_stats"] = {
            name: float(getattr(np, name)(finite)) if finite.size else math.nan
            for name in ("mean", "std", "min", "max", "median")
        }
        if n_patterns <= listed:
            whole = [int(r) if math.isfinite(r) else math.nan for r in radii.tolist()]
            centers = (analysis[name].values.ravel().tolist() for name in ("center_y", "center_x"))
            out["analysis"]["retention_radii"] = whole
            out["analysis"]["centers"] = list(zip(*centers, strict=True))
    if retention is not None:
        names = {
            "mean_retention": "mean",
            "median_retention": "median",
            "min_retention": "min",
            "max_retention": "max",
            "std_retention": "std",
            "total_retention": "total_ratio",
            "passes_min_threshold": "n_min",
            "passes_target_threshold": "n_target",
            "n_empty": "n_empty",
        }
        out["validation"] |= {name: retention[key] for name, key in names.items()}
    return out


def analysis_warnings(
    analysis: xr.Dataset, survey: "Survey | None", left: NDArray[np.bool_], mask: str | None
) -> list[str]:
    """Warnings about the data; ``left`` are hot pixels of the mean pattern, and ``mask`` is ``auto`` or ``stop`` if it was applied."""
    out = []
    for kind, flag in (("hot", HOT), ("dead", DEAD)):
        found = [] if survey is None else np.argwhere(survey.flags & flag).tolist()
        if found:
            how = f"masked (input.mask: {mask})" if mask else "left out of the analysis"
            if survey is not None and flag == HOT and survey.hot_share > NOTICEABLE:
                how += (
                    f", with {survey.hot_share:.0%} of the intensity (if they are the beam, set "
                    "analyze.ignore_bad_pixels=false)"
                )
            out.append(
                f"{len(found):,} suspected {kind} pixel{'s' * (len(found) != 1)}, {how}: {_where(found)}"
            )
    if left.any():
        found = np.argwhere(left).tolist()
        more = "more " if survey is not None and survey.suspected is not None else ""
        out.append(
            f"{len(found):,} {more}suspected hot pixel{'s' * (len(found) != 1)} in the mean pattern, above 6 times all but 5 of "
            f"their 24 neighbours: {_where(found)}; list bad pixels as input.mask.pixels"
        )
    if survey is not None and survey.stop is not None and mask != "stop":
        out.append(
            f"a dark region of {int(survey.stop.sum()):,} px covers the center, as a beam stop does: input.mask=stop masks it, "
            "and analyze.center_method=friedel then finds the center from the symmetry of the patterns"
        )
    mean, highest = analysis["mean_pattern"].values, analysis["max_pattern"].values
    found = np.argwhere(spikes(mean, highest)).tolist()
    if found:
        y, x = max(found, key=lambda place: highest[tuple(place)])
        out.append(
            f"{len(found):,} pixel{'s' * (len(found) != 1)} with a spike in a single pattern, above 50 times the mean + 100, "
            f"such as {highest[y, x]:,} at [{y}, {x}] (a cosmic ray?); they count in the retention, and hardly in disc centers"
        )
    odd = zip(analysis["kind"].values, analysis["odd_pixels"].values, strict=True)
    counted = [f"{int(n):,} {str(kind).replace('_', ' ')}" for kind, n in odd if n]
    if counted:
        out.append(
            f"values that count as 0 in the analysis: {', '.join(counted)} (the data are not changed)"
        )
    clipped, level, share = _background(analysis)
    if clipped > NOTICEABLE:
        text = f"clipped negative values amount to {clipped:.1%} of the intensity"
        if not analysis.attrs["threshold"]:
            text += ": the background of a dark-subtracted detector counts as signal"
        out.append(text)
    if share > NOTICEABLE:
        out.append(
            f"a constant background of about {level:.3g} counts in every pixel makes up {share:.0%} of the "
            "intensity and widens the window"
        )
    if n_empty := int(analysis["n_empty"]):
        out.append(
            f"{n_empty:,} empty patterns: no center, left out of the statistics, cropped at the median center"
        )
    return out


def _background(analysis: xr.Dataset) -> tuple[float, float, float]:
    """Clipped negative values relative to the intensity, level of a constant background, and its share.

    The level is the 5th percentile of the mean pattern.
    """
    intensity = float(np.nansum(analysis["total"].values))
    clipped = float(analysis["negative_sum"]) / intensity if intensity > 0 else 0.0
    mean = np.asarray(analysis["mean_pattern"].values)
    level, total = float(np.percentile(mean, 5)), float(mean.sum())
    return clipped, level, level * mean.size / total if total > 0 else 0.0


def calibration_warnings(axes: Sequence[Axis]) -> list[str]:
    """A warning about axes without a usable calibration."""
    names = [axis.name for axis in axes if not axis.calibrated and axis.name != LIST_DIMS[0]]
    if not names:
        return []
    text = "in pixels: the file has no usable calibration; input.calibration gives one"
    return [f"{', '.join(names)} {text}"]


def scale_warnings(found: Mapping[str, Any]) -> list[str]:
    """A warning where the direct disc implies another scale than the axes have; see `stem_dask.stages.calibrate`."""
    ratio = found.get("ratio")
    if ratio is None or abs(ratio - 1) <= WRONG_SCALE:
        return []
    text = (
        f"the direct disc of {found['disc_radius']:.1f} px and a convergence of {found['convergence_mrad']:g} mrad at "
        f"{found['beam_energy_kv']:g} kV give {_scale_words(found)}: the scale or the convergence is wrong"
    )
    return [text if found["applied"] else f"{text}; analyze.calibrate=disc takes that of the disc"]


def _scale_words(found: Mapping[str, Any]) -> str:
    text = f"{found['scale_per_nm']:.4g} 1/nm per px (± {100 * found['uncertainty']:.0f} %)"
    return text if found["ratio"] is None else f"{text}, {found['ratio']:.3f} of the file's scale"


def _where(hot: Sequence[Sequence[int]]) -> str:
    more = f" and {len(hot) - MAX_HOT:,} more" if len(hot) > MAX_HOT else ""
    return ", ".join(f"[{y}, {x}]" for y, x in hot[:MAX_HOT]) + more


def background_threshold(analysis: xr.Dataset) -> float | None:
    """A value of ``analyze.threshold`` above the background; None without a noticeable or separable background.

    The darkest 10 % of the pixels of the mean pattern are taken as background. The threshold is just above the maximum
    of 98 % of these pixels over all patterns.
    """
    clipped, _, share = _background(analysis)
    if clipped <= NOTICEABLE and share <= NOTICEABLE:
        return None
    mean, highest = analysis["mean_pattern"].values, analysis["max_pattern"].values
    dark = highest[mean <= np.percentile(mean, 10)].astype(np.float64)
    most = float(np.percentile(dark, 98, method="higher"))
    if highest.dtype.kind in "ui":
        threshold = most + 1
    else:
        step = 10.0 ** (math.floor(math.log10(most)) - 2) if most > 0 else 0.0
        threshold = (math.floor(most / step) + 1) * step if step else 0.0
    # a threshold above the mean pattern would remove the beam, too
    return threshold if most > 0 and mean.max() > threshold else None


def descan_warnings(analysis: xr.Dataset) -> list[str]:
    """Warnings about windows that follow a fit: what it removes, and where it is extrapolated."""
    fit, out = analysis.attrs["descan"], []
    if fit["leverage"] > EXTRAPOLATED:
        out.append(
            f"the descan is extrapolated: at a corner of the scan its predicted standard deviation is {fit['leverage']:.2f} px, "
            f"above {EXTRAPOLATED:g}; fit in a larger descan.region, or give a vacuum scan as descan.reference"
        )
    if not fit["reference"]:
        out.append(
            "align: descan follows the fitted wander of the beam; without a vacuum scan as descan.reference it also removes a "
            "field that grows linearly over the scan"
        )
    return out


def window_warnings(window: Window, filled: NDArray) -> list[str]:
    """Warnings about the window."""
    out = list(window.notes)
    if window.align == "pattern":
        out.append(
            "align: pattern centers every pattern by itself, which also removes real beam deflection "
            "(DPC, fields, strain tilt); sd.to_detector restores it"
        )
    n_filled = int((filled > 0).sum())
    if n_filled:
        out.append(
            f"{n_filled:,} windows leave the detector and are filled with 0 there, at most {filled.max():.1%} of one"
        )
    return out


def remainder_warnings(
    shape: Sequence[int], factor: int, mean_pattern: NDArray | None
) -> list[str]:
    """Warnings about pixels that downsampling drops at the end of an uncropped axis, with their intensity if known."""
    out = []
    for axis, (name, n) in enumerate(zip(("ky", "kx"), shape, strict=True)):
        rest = n % factor
        if rest:
            text = f"downsampling by {factor} drops the last {rest} of {n} pixels of {name}"
            if mean_pattern is not None and mean_pattern.sum() > 0:
                lost = np.take(mean_pattern, range(n - rest, n), axis).sum()
                text += f", {lost / mean_pattern.sum():.3%} of the intensity"
            out.append(text)
    return out


def closing_lines(results: Mapping[str, Any]) -> tuple[str, ...]:
    """The closing lines of a run."""
    analysis, kept = results["analysis"], results["validation"]
    (height, width), full = analysis["cropped_shape"], analysis["original_shape"]
    what = f"window      {height} x {width} px"
    radius = analysis["global_radius"]
    if radius is None:
        lines = [f"{what}, not cropped"]
    else:
        align = results["window"]["align"]
        lines = [f"{what} of {full[0]} x {full[1]} (global radius {radius}, align {align})"]
    if results.get("center"):
        lines.append(f"center      {center_words(results['center'])}")
    if found := results.get("calibration"):
        lines.append(f"calibration {_scale_words(found)}{', applied' * found['applied']}")
    if found := results.get("dose"):
        lines.append(f"dose        {found['median']:,.6g} {found['units']} per pattern (median)")
    if "normalization" in results:
        found = results["normalization"]
        lines.append(
            f"values      z-scores of log(1 + counts): mean {found['mean']:.6g}, standard deviation {found['std']:.6g} "
            "of the logarithms"
        )
    elif radius is None and results["config"]["output"]["layout"] == "tensor":
        lines.append(
            "values      raw counts; earlier versions stored log z-scores (output.normalize=log-zscore)"
        )
    sizes = results["sizes"]
    lines.append(
        f"reduction   {size(sizes['input_bytes'])} -> {size(sizes['output_bytes'])} uncompressed "
        f"({sizes['reduction']:.1f} x), {size(sizes['stored_bytes'])} on disk"
    )
    if "mean_retention" in kept:
        n, limits = kept["n_patterns"] - kept["n_empty"], results["limits"]
        lines += [
            *_kept_line(kept, results.get("discs") or {}),
            f"retention   mean {kept['mean_retention']:.4f}, min {kept['min_retention']:.4f}, "
            f"sum inside / sum total {kept['total_retention']:.4f}",
            f"below       {n - kept['passes_min_threshold']:,} of {n:,} patterns below min_retention "
            f"{limits['min_retention']:g}, {n - kept['passes_target_threshold']:,} below target "
            f"{limits['target_retention']:g}",
        ]
    if n_missing := results["quarantined"]["n_patterns"]:
        lines.append(
            f"quarantined {n_missing:,} patterns that could not be read are zeros; the array valid says which"
        )
    lines += [f"warning     {text}" for text in results["warnings"]]
    lines += ["verdict     ok"] * (not results["verdict"]) + judgement_lines(results)
    lines += [f"file        {path} ({size(n)})" for path, n in results["files"].items()]
    speed = results["speed"]
    lines.append(
        f"speed       {size(speed['bytes_per_second'])}/s, {speed['seconds']:.1f} s, peak memory "
        f"{size(results['peak_memory'])} a process"
    )
    return tuple(lines)


def _kept_line(kept: Mapping[str, Any], discs: Mapping[str, Any]) -> list[str]:
    """What the windows keep of all patterns together; empty without a direct disc."""
    if kept.get("direct_share") is None:
        return []
    scattered = kept["total_scattered_retention"]
    words = [f"{kept['total_retention']:.1%} of the intensity"]
    if scattered is not None and scattered < 0:
        words.append("less than the direct beam")
    elif scattered is not None and math.isfinite(scattered):
        words.append(f"{scattered:.1%} of the scattered")
    line = f"keeps       {', '.join(words)}; direct beam {kept['direct_share']:.0%}"
    n = sum(discs.get(place, 0) for place in ("inside", "cut", "outside"))
    if n > 1:
        line += f"; of {n:,} discs {discs['cut'] / n:.0%} are cut through, {discs['outside'] / n:.0%} lost"
    return [line]


def center_words(center: Mapping[str, Any]) -> str:
    """The method that found the centers, and why it was chosen."""
    method, radius = center["method"], center["disc_radius"]
    words = [f"disc, radius {radius:.1f} px" if method == "disc" else str(method)]
    if center["why"]:
        words = [f"{method}: no direct disc ({center['why']})"]
    if center.get("s") is not None:
        words.append(f"{center['s']:.2f} px about a descan of order {center['descan_order']}")
    if center.get("n_not_found"):
        words.append(f"not found in {center['n_not_found']:,} of {center['n_filled']:,} patterns")
    if n := center.get("n_outliers"):
        named = ", ".join(map(str, center["outliers"]))
        words.append(f"{n:,} far from it: {named}{' …' * (n > len(center['outliers']))}")
    return ", ".join(words)


def judgement_lines(results: Mapping[str, Any], *before: str) -> list[str]:
    """Lines with verdict and advice: commands where the run knows its own, else overrides, which ``before`` precedes."""
    out = [f"verdict     {text}" for text in results["verdict"]]
    if found := results.get("commands"):
        return [*out, *(f"advice      {gives}: {command}" for command, gives in found.items())]
    for line, gives in results["advice"].items():
        out += [f"advice      {' '.join([*before, line])}", f"            {gives}"]
    return out


def tree_bytes(path: str | Path, *, holes: bool = True) -> int:
    """Bytes of a file, or of all files below a folder; 0 without any. ``holes=False`` excludes holes of sparse files."""
    try:
        with os.scandir(path) as entries:
            return sum(
                tree_bytes(entry.path, holes=holes)
                if entry.is_dir(follow_symlinks=False)
                else _file_bytes(entry.stat(), holes)
                for entry in entries
            )
    except NotADirectoryError:
        return _file_bytes(os.stat(path), holes)
    except FileNotFoundError:  # or removed meanwhile by another process
        return 0


def _file_bytes(status: os.stat_result, holes: bool) -> int:
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if holes or blocks is None else min(status.st_size, 512 * blocks)


def process_seconds() -> float:
    """Seconds since this process was started, imports included; to 0.01 s on Linux, elsewhere perhaps to 1 s."""
    with contextlib.suppress(OSError, AttributeError), open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])  # since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    import psutil  # type: ignore[import-untyped]  # comes with distributed

    # its boot time may have a resolution of 1 s
    return time.time() - float(psutil.Process().create_time())


def write_json(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write results.json under a temporary name and publish it; NaN becomes null."""
    partial = temporary(path)
    with translate(StoreError, partial), opened(partial, "w") as file:
        file.write(_text(results, "") + "\n")
    publish(path)


def _text(value: Any, margin: str) -> str:
    """JSON with one line per dictionary entry; a list takes one line."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(to_json(value), allow_nan=False)
    inner = margin + " "
    lines = (f"{inner}{json.dumps(str(key))}: {_text(v, inner)}" for key, v in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"


def to_json(value: Any) -> Any:
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else None
    if value is None or kind in (int, str, bool):  # first, because lists are long
        return value
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return to_json(value.item()) if isinstance(value, np.generic) else str(value)
