"""The text of a report: results.json, warnings, and the closing lines."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.core.errors import StoreError
from stem_dask.core.model import LIST_DIMS, Axis, Window
from stem_dask.core.text import size
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import opened, publish, temporary

#: above this many patterns, results.json omits lists with one entry per pattern
MAX_LISTED = 100_000

#: hot pixels listed by position
MAX_HOT = 20

#: share of the total above which clipped negatives, or a constant background, are worth a warning
NOTICEABLE = 0.05


def statistics(values: NDArray) -> dict[str, float]:
    """mean, std (ddof 0), min, max, median of the finite values; NaN without any.

    Examples
    --------
    >>> statistics(np.array([1.0, np.nan, 3.0]))
    {'mean': 2.0, 'std': 1.0, 'min': 1.0, 'max': 3.0, 'median': 2.0}
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    names: dict[str, Callable[[NDArray], Any]] = {
        "mean": np.mean,
        "std": np.std,
        "min": np.min,
        "max": np.max,
        "median": np.median,
    }
    return {name: float(f(finite)) if finite.size else math.nan for name, f in names.items()}


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
            "center": list(window.center),
            "cropped_axes": list(window.cropped_axes),
            "radius_at_coverage": dict(window.radius_at),
            "set_by_patterns": [list(index) for index in window.setters],
        }
    if analysis is not None:
        radii = np.asarray(analysis["radius"].values).ravel()
        out["analysis"]["retention_stats"] = statistics(radii)
        if n_patterns <= listed:
            centers = zip(
                analysis["center_y"].values.ravel().tolist(),
                analysis["center_x"].values.ravel().tolist(),
                strict=True,
            )
            out["analysis"]["retention_radii"] = [_whole(r) for r in radii.tolist()]
            out["analysis"]["centers"] = list(centers)
    if retention is not None:
        out["validation"] |= {
            "mean_retention": retention["mean"],
            "median_retention": retention["median"],
            "min_retention": retention["min"],
            "max_retention": retention["max"],
            "std_retention": retention["std"],
            "total_retention": retention["total_ratio"],
            "passes_min_threshold": retention["n_min"],
            "passes_target_threshold": retention["n_target"],
            "n_empty": retention["n_empty"],
        }
    return out


def _whole(radius: float) -> int | float:
    return int(radius) if math.isfinite(radius) else math.nan


def analysis_warnings(analysis: xr.Dataset) -> list[str]:
    """Warnings about the data."""
    out = []
    total = float(np.nansum(analysis["total"].values))
    odd = {
        str(k): int(n)
        for k, n in zip(analysis["kind"].values, analysis["odd_pixels"].values, strict=True)
    }
    counted = [f"{n:,} {kind.replace('_', ' ')}" for kind, n in odd.items() if n]
    if counted:
        out.append(
            f"values that count as 0 in the analysis: {', '.join(counted)} (the data are not changed)"
        )
    clipped = float(analysis["negative_sum"])
    if _many_are_clipped(analysis):
        text = f"clipped negative values amount to {clipped / total:.1%} of the intensity"
        if not analysis.attrs["threshold"]:
            text += ": the background of a dark-subtracted detector counts as signal"
        out.append(text)
    level, share = pedestal(analysis)
    if share > NOTICEABLE:
        out.append(
            f"a constant background of about {level:.3g} counts in every pixel makes up {share:.0%} of the "
            "intensity and widens the window"
        )
    n_empty = int(analysis["n_empty"])
    if n_empty:
        out.append(
            f"{n_empty:,} empty patterns: no center, left out of the statistics, cropped at the median center"
        )
    return out


def calibration_warnings(axes: Sequence[Axis]) -> list[str]:
    """A warning about axes without a usable calibration.

    Examples
    --------
    >>> calibration_warnings([Axis("ky", 4, 0.1, 0.0, "1/nm"), Axis("kx", 4)])
    ['kx in pixels: the file has no usable calibration; input.calibration gives one']
    """
    names = [axis.name for axis in axes if not axis.calibrated and axis.name != LIST_DIMS[0]]
    if not names:
        return []
    text = "in pixels: the file has no usable calibration; input.calibration gives one"
    return [f"{', '.join(names)} {text}"]


def hot_pixel_warnings(hot: Sequence[Sequence[int]], *, masked: bool) -> list[str]:
    """A warning about suspected hot pixels: how many, and where."""
    if not hot:
        return []
    found = f"{len(hot):,} suspected hot pixel{'s' * (len(hot) != 1)}, in the mean pattern above 6 times all but 5 of their 24 neighbours"
    if masked:
        return [f"{found}, masked (input.mask: auto): {_where(hot)}"]
    return [f"{found}: {_where(hot)}"]


def left_hot_warnings(hot: Sequence[Sequence[int]]) -> list[str]:
    """A warning about hot pixels that remain after masking."""
    text = "suspected hot pixels remain after masking (input.mask: auto)"
    return [f"{text}: {_where(hot)}; list all bad pixels as input.mask.pixels"] if hot else []


def _where(hot: Sequence[Sequence[int]]) -> str:
    listed = ", ".join(f"[{y}, {x}]" for y, x in hot[:MAX_HOT])
    return listed + (f" and {len(hot) - MAX_HOT:,} more" if len(hot) > MAX_HOT else "")


def pedestal(analysis: xr.Dataset) -> tuple[float, float]:
    """Level of a constant background (5th percentile of the mean pattern), and its share of the intensity."""
    mean = np.asarray(analysis["mean_pattern"].values)
    level = float(np.percentile(mean, 5))
    total = float(mean.sum())
    return level, level * mean.size / total if total > 0 else 0.0


def _many_are_clipped(analysis: xr.Dataset) -> bool:
    """Whether clipped negative values are a noticeable share of the intensity."""
    total = float(np.nansum(analysis["total"].values))
    return total > 0 and float(analysis["negative_sum"]) > NOTICEABLE * total


def background_threshold(analysis: xr.Dataset) -> float | None:
    """A value of ``analyze.threshold`` above the background; None without a noticeable or separable background.

    The darkest 10 % of the pixels of the mean pattern are taken as background. The threshold is just above the maximum
    of 98 % of these pixels over all patterns.
    """
    if not _many_are_clipped(analysis) and pedestal(analysis)[1] <= NOTICEABLE:
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
    """Warnings about pixels that downsampling drops at the end of an axis, with their intensity if known.

    This happens only on uncropped axes: a cropped axis is a multiple of the factor.
    """
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


def kept_pixels(window: Window, analysis: xr.Dataset) -> float:
    """The window's share of the detector's pixels."""
    pixels = analysis.sizes["source_ky"] * analysis.sizes["source_kx"]
    return window.shape[0] * window.shape[1] / int(pixels)


def summary(results: Mapping[str, Any]) -> tuple[str, ...]:
    """The closing lines of a run."""
    analysis, validation = results["analysis"], results["validation"]
    (height, width), full = analysis["cropped_shape"], analysis["original_shape"]
    lines = []
    if analysis["global_radius"] is not None:
        lines.append(
            f"window      {height} x {width} px of {full[0]} x {full[1]} (global radius {analysis['global_radius']}, "
            f"align {results['window']['align']})"
        )
    else:
        lines.append(f"window      {height} x {width} px, not cropped")
    if "normalization" in results:
        found = results["normalization"]
        lines.append(
            f"values      z-scores of log(1 + counts): mean {found['mean']:.6g}, standard deviation {found['std']:.6g} "
            "of the logarithms"
        )
    elif analysis["global_radius"] is None and results["config"]["output"]["layout"] == "tensor":
        lines.append(
            "values      raw counts; earlier versions stored log z-scores (output.normalize=log-zscore)"
        )
    sizes = results["sizes"]
    lines.append(
        f"reduction   {size(sizes['input_bytes'])} -> {size(sizes['output_bytes'])} uncompressed "
        f"({sizes['reduction']:.1f} x), {size(sizes['stored_bytes'])} on disk"
    )
    if "mean_retention" in validation:
        n = validation["n_patterns"] - validation["n_empty"]
        below = n - validation["passes_min_threshold"]
        lines.append(
            f"retention   mean {validation['mean_retention']:.4f}, min {validation['min_retention']:.4f}, "
            f"sum inside / sum total {validation['total_retention']:.4f}"
        )
        lines.append(
            f"below       {below:,} of {n:,} patterns below min_retention {results['limits']['min_retention']:g}, "
            f"{n - validation['passes_target_threshold']:,} below target {results['limits']['target_retention']:g}"
        )
    if results["quarantined"]["n_patterns"]:
        lines.append(
            f"quarantined {results['quarantined']['n_patterns']:,} patterns that could not be read are zeros; the array "
            "valid says which"
        )
    lines += [f"warning     {text}" for text in results["warnings"]]
    lines += ["verdict     ok"] * (not results["verdict"]) + judgement_lines(results)
    lines += [f"file        {path} ({size(n)})" for path, n in results["files"].items()]
    lines.append(
        f"speed       {size(results['speed']['bytes_per_second'])}/s, {results['speed']['seconds']:.1f} s, "
        f"peak memory {size(results['peak_memory'])} a process"
    )
    return tuple(lines)


def judgement_lines(results: Mapping[str, Any], *before: str) -> list[str]:
    """Lines with verdict and advice; ``before`` precedes the overrides.

    Examples
    --------
    >>> advice = {"crop.size=40": "gives 40 x 40 px"}
    >>> judgement_lines({"verdict": ["little was gained"], "advice": advice})
    ['verdict     little was gained', 'advice      crop.size=40', '            gives 40 x 40 px']
    """
    out = [f"verdict     {text}" for text in results["verdict"]]
    for line, gives in results["advice"].items():
        out += [f"advice      {' '.join([*before, line])}", f"            {gives}"]
    return out


def sizes(input_bytes: int, output_bytes: int, stored_bytes: int) -> dict[str, float]:
    """Bytes of the input patterns, of the output patterns in memory, and on disk."""
    return {
        "input_bytes": int(input_bytes),
        "output_bytes": int(output_bytes),
        "stored_bytes": stored_bytes,
        "reduction": input_bytes / output_bytes,
    }


def versions(*names: str) -> dict[str, str]:
    """Installed versions of packages."""
    from importlib.metadata import version

    return {name: version(name) for name in names}


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
    if holes or not hasattr(status, "st_blocks"):
        return status.st_size
    return min(status.st_size, 512 * status.st_blocks)


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
        try:
            return json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):  # NaN, or a type that JSON lacks
            return json.dumps(to_json(value), allow_nan=False)
    inner = margin + " "
    lines = (
        f"{inner}{json.dumps(str(key))}: {_text(entry, inner)}" for key, entry in value.items()
    )
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
