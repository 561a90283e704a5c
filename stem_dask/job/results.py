"""results.json and the exit code of a run."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

from stem_dask.config.load import to_dict
from stem_dask.config.options import Config
from stem_dask.core.model import Window
from stem_dask.core.patterns import lead_shape
from stem_dask.job.advice import too_little_kept
from stem_dask.job.outputs import Outputs
from stem_dask.job.prepare import Prepared, n_quarantined
from stem_dask.report import text as report
from stem_dask.stages.validate import FLOAT_SLACK, retention_statistics
from stem_dask.storage.location import at, is_url


def exit_code(config: Config, results: Mapping[str, Any]) -> int:
    """7 if patterns could not be read; 4 if more patterns than the coverage allows are below the minimum retention."""
    if results["quarantined"]["n_patterns"]:
        return 7
    return 4 if too_little_kept(config, results) else 0


@dataclass(frozen=True)
class Outcome:
    """Exit code, results, and closing lines of a run."""

    exit_code: int
    results: Mapping[str, Any]
    lines: tuple[str, ...]


def already_complete(config: Config, outputs: Outputs) -> Outcome:
    """The outcome for a complete output, with the exit code of the run that made it."""
    results = _stored(outputs)
    if n := n_quarantined(outputs):
        results = {**results, "quarantined": {"n_patterns": n}}
    words = f", without {n:,} patterns that could not be read" if n else ""
    lines = [f"already complete: {outputs.store}{words}"]
    code = exit_code(config, results)
    if code == 4:
        lines += report.judgement_lines(results)
    return Outcome(code, {}, tuple(lines))


def _stored(outputs: Outputs) -> dict[str, Any]:
    """results.json of a finished run; empty results if it is missing or was edited."""
    nothing = {"validation": {}, "quarantined": {"n_patterns": 0}, "verdict": [], "advice": {}}
    try:
        found = json.loads(Path(outputs.results).read_text(encoding="utf-8"))
        return {**nothing, **found}
    except (OSError, ValueError, TypeError):
        return nothing


def provenance(prepared: Prepared, n_missing: int, hot: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Provenance: attributes of the store's root group.

    Parameters
    ----------
    n_missing : patterns that could not be read
    hot : [y, x] of suspected hot pixels
    """
    config, info = prepared.config, prepared.found.info
    name, n_bytes, changed = prepared.found.identity
    return {
        "title": info.title,
        "token": prepared.token,
        "config": to_dict(config),
        "contents": prepared.contents,
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
    """The part of results.json about the data; lists the first suspected hot pixels."""
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
    made = {} if path.endswith(".zarr") else made_by(prepared)
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
        }
    )


def stored_bytes(path: str) -> int:
    """Bytes of a file, of all files below a folder, or of all objects below a URL."""
    if is_url(path):
        return sum(status.st_size for _, status in at(path).below())
    return report.tree_bytes(path)


def made_by(prepared: Prepared) -> dict[str, Any]:
    """Token and digests of the run, and the state of the file, for a format without attributes."""
    status = os.stat(prepared.outputs.path)
    return {
        "token": prepared.token,
        "contents": prepared.contents,
        "of": [status.st_size, status.st_mtime_ns],
    }
