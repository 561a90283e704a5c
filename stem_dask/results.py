"""What a run found and made: results.json, and how it ended."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import xarray as xr

from stem_dask import report
from stem_dask.config import to_dict
from stem_dask.io.objects import below
from stem_dask.io.store import open_group
from stem_dask.model import Window
from stem_dask.options import Config
from stem_dask.outputs import Outputs
from stem_dask.preflight import Prepared, contents, n_quarantined, token
from stem_dask.stages.patterns import lead_dims, lead_shape
from stem_dask.stages.summary import stored_radii
from stem_dask.stages.validate import FLOAT_SLACK, retention_statistics
from stem_dask.stages.window import choose_window
from stem_dask.urls import is_url

#: targets that the verdict offers when little was gained
OTHER_TARGETS = (0.95, 0.9)
#: in so many tasks at most the stored profiles are read for it
VERDICT_TASKS = 64


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, results, and the lines for the user."""

    exit_code: int
    results: Mapping[str, Any]
    lines: tuple[str, ...]


def already_complete(outputs: Outputs) -> Outcome:
    """There is nothing to do."""
    n = n_quarantined(outputs)
    missing = f", without {n:,} patterns that could not be read" if n else ""
    return Outcome(7 if n else 0, {}, (f"already complete: {outputs.store}{missing}",))


def provenance(prepared: Prepared, n_missing: int, hot: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Attributes of the store's root: how it came to be.

    Parameters
    ----------
    n_missing : patterns that could not be read
    hot : [y, x] of suspected hot pixels
    """
    config, info = prepared.config, prepared.found.info
    name, n_bytes, changed = prepared.found.identity
    return {
        "title": Path(name).stem,
        "token": token(config, prepared.found),
        "config": to_dict(config),
        "contents": contents(config),
        "input": {
            "path": name,
            "bytes": n_bytes,
            "modified_ns": changed,
            "notes": list(info.notes),
        },
        "versions": report.versions("stem_dask", "numpy", "dask", "zarr", "numba"),
        "quarantined": n_missing,
        "hot_pixels": hot,
    }


def results_of_run(
    prepared: Prepared,
    patterns: xr.DataArray,
    out: xr.DataArray,
    known: xr.Dataset | None,
    window: Window | None,
    hot: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """What results.json says of the data; of the suspected hot pixels it names the first."""
    config, info = prepared.config, prepared.found.info
    limits = {
        "target_retention": config.analyze.target_retention,
        "min_retention": config.validation.min_retention,
    }
    statistics = None
    if known is not None:
        slack = FLOAT_SLACK if patterns.dtype.kind == "f" else 0.0
        retention, total = known["retention"].values, known["total"].values
        target, minimum = limits["target_retention"], limits["min_retention"]
        statistics = retention_statistics(retention, total, target, minimum, slack)
        statistics["n_empty"] = int(known["n_empty"])
    shape = out.shape[-2:] if window is None else window.shape
    n_patterns = math.prod(lead_shape(out))
    found = report.results_of(known, statistics, patterns.shape[-2:], shape, n_patterns, window)
    path = prepared.outputs.store
    made = {} if path.endswith(".zarr") else _made(prepared)
    return (
        found
        | made
        | {
            "config": to_dict(config),
            "limits": limits,
            "scan_shape": lead_shape(out),
            "output": {"shape": out.shape, "dtype": str(out.dtype)},
            "intensity": out.attrs.get("intensity", "counts"),
            "input": {
                "path": info.path,
                "shape": patterns.shape,
                "dtype": str(prepared.found.source.dtype),
                "notes": info.notes,
            },
            "sizes": report.sizes(prepared.found.n_bytes, out.nbytes, stored_bytes(path)),
            "hot_pixels": {
                "number": len(hot),
                "positions": hot[: report.MAX_HOT],
                "masked": config.input.mask == "auto",
            },
            "verdict": []
            if known is None or window is None
            else verdict(config, path, known, window),
        }
    )


def stored_bytes(path: str) -> int:
    """Bytes of a file, of all files below a folder, or of all objects below a URL."""
    if is_url(path):
        return sum(status.st_size for _, status in below(path))
    return report.tree_bytes(path)


def _made(prepared: Prepared) -> dict[str, Any]:
    """What a store says in its attributes: the run that made a file of another format, and that file's state."""
    status = os.stat(prepared.outputs.path)
    return {
        "token": token(prepared.config, prepared.found),
        "contents": contents(prepared.config),
        "of": [status.st_size, status.st_mtime_ns],
    }


def verdict(config: Config, store: str, known: xr.Dataset, window: Window) -> list[str]:
    """A word on a crop that gained little; reads the stored profiles to say what would gain more."""
    if not report.gained_little(window, known):
        return []
    options = config.crop.model_dump(exclude={"enabled", "size", "window"})
    stored = open_group(store, "analysis")
    first, rows = lead_dims(stored)[0], stored["profile"].encoding["chunks"][0]
    together = math.ceil(stored.sizes[first] / VERDICT_TASKS / rows) * rows
    stored = stored.chunk({**dict.fromkeys(stored.dims, -1), first: together})
    exact = known["max_pattern"].dtype.kind in "ui"
    metric = str(known.attrs["radius_metric"])
    targets = [target for target in OTHER_TARGETS if target < window.target_retention]
    # together, so that profiles are read once
    found = dask.compute(*(stored_radii(stored, target, metric, exact) for target in targets))
    by_target: dict[float, int] = {}
    for target, radii in zip(targets, found, strict=True):
        other = known.assign(radius=known["radius"].copy(data=radii))
        by_target[target] = choose_window(other, **options).global_radius or 0
    return report.verdict(window, known, by_target)


def exit_code(config: Config, results: Mapping[str, Any]) -> int:
    """7 when patterns could not be read; 4 when more than the coverage leaves out are below the minimum."""
    if results["quarantined"]["n_patterns"]:
        return 7
    validation = results["validation"]
    if "passes_min_threshold" not in validation:
        return 0
    n = validation["n_patterns"] - validation["n_empty"]
    allowed = n - math.ceil(config.crop.coverage * n)
    return 4 if n - validation["passes_min_threshold"] > allowed else 0
