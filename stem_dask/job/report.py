"""The report of a run: one HTML file to look at the scan, and to choose a window; nothing is loaded from elsewhere."""

import base64
import html
import io
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.config.load import defaults
from stem_dask.core.errors import StoreError
from stem_dask.core.text import by
from stem_dask.core.text import size as size_of
from stem_dask.job.summary import closing_lines, to_json
from stem_dask.kernels.downsample import thumbnail_cell, thumbnails
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import opened
from stem_dask.writers.zarr import open_group, thumbnails_of

PAGE = Path(__file__).parent / "page"

#: positions whose values the page holds; every n-th row and column of a larger scan
MOST_POSITIONS = 100_000

#: bytes of profiles that are in memory at a time
_BYTES = 2**26

#: smallest and largest target that the page offers
_TARGETS = (0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.998, 0.999)


def write_report(path: str | Path, results: Mapping[str, Any], store: str | None) -> None:
    """Write the report to ``path``.

    Parameters
    ----------
    path : of the HTML file
    results : those of the run, as in results.json
    store : its group ``analysis`` holds what is known of each pattern, with the profiles; None without an analysis
    """
    text = html_of(results, store)
    with translate(StoreError, path), opened(path, "w") as file:
        file.write(text)


def write_batch_report(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the report of several inputs: a table with the mean pattern of each.

    Parameters
    ----------
    path : of the HTML file
    rows : ``input``, ``output``, ``exit_code`` and ``words`` (why it is not 0) of each input; ``results`` as in results.json, empty
        without; ``report``, the path of its own report, or None
    """
    page = (PAGE / "batch.html").read_text(encoding="utf-8")
    done = sum(row["exit_code"] == 0 for row in rows)
    values = {
        "css": (PAGE / "page.css").read_text(encoding="utf-8"),
        "title": f"{done} of {len(rows)} complete",
        "kind": "ok" if done == len(rows) else "bad",
        "rows": "\n".join(_batch_row(row, Path(path).parent) for row in rows),
    }
    for name, value in values.items():
        page = page.replace(f"<!--{name}-->", value)
    with translate(StoreError, path), opened(path, "w") as file:
        file.write(page)


def _batch_row(row: Mapping[str, Any], folder: Path) -> str:
    """One input of a batch."""
    results, name = row["results"], html.escape(Path(row["input"]).name)
    window, kept = results.get("window"), results.get("validation") or {}
    if row["report"] is not None:
        link = quote(os.path.relpath(row["report"], folder))
        name = f'<a href="{link}">{name}</a>'
    shares = [kept.get(which) for which in ("mean_retention", "min_retention")]
    problems = [row["words"]] if row["words"] else results.get("verdict") or []
    cells = [
        _mean_pattern(row["output"], Path(row["input"]).name),
        "" if not window else f"{by(window['size'])} px",
        *("" if share is None else f"{100 * share:.2f} %" for share in shares),
        html.escape("; ".join(problems) or "ok"),
        str(row["exit_code"]),
    ]
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _mean_pattern(store: str, name: str) -> str:
    """The mean pattern of a .zarr store as a small image; empty for other outputs."""
    from matplotlib.image import imsave

    for group in ("analysis", "output"):
        try:
            mean = open_group(store, group)["mean_pattern"].values
        except (OSError, KeyError, ValueError):
            continue
        stream = io.BytesIO()
        [image] = thumbnails(mean[None], thumbnail_cell(mean.shape, 96))
        imsave(stream, image, cmap="gray", format="png")
        code = base64.b64encode(stream.getvalue()).decode("ascii")
        return f'<img alt="mean pattern of {html.escape(name)}" src="data:image/png;base64,{code}">'
    return ""


def html_of(results: Mapping[str, Any], store: str | None) -> str:
    """The report as text; see `write_report`."""
    title = Path(str(results["input"]["path"])).name
    data = {} if store is None or not results.get("window") else _data(results, store)
    lines = closing_lines({**results, "files": results.get("files", {})})
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in results["warnings"])
    advice = "".join(
        f"<li><code>{html.escape(line)}</code> {html.escape(why)}</li>"
        for line, why in (results.get("commands") or results["advice"]).items()
    )
    problems = results["verdict"]
    verdict = "; ".join(problems) or "ok"
    if results.get("window") and list(results["window"]["size"]) == list(
        results["analysis"]["original_shape"]
    ):
        verdict = f"NOT CROPPED: {verdict}"
    values = {
        "title": html.escape(title),
        "css": (PAGE / "page.css").read_text(encoding="utf-8"),
        "js": (PAGE / "page.js").read_text(encoding="utf-8"),
        "data": _embedded(data),
        "kind": "bad" if problems else "ok",
        "verdict": html.escape(verdict),
        "summary": html.escape("\n".join(lines)),
        "warnings": f"<ul>{warnings}</ul>" if warnings else "<p>None.</p>",
        "advice": f"<h2>Advice</h2><ul>{advice}</ul>" if advice else "",
        "look": _look(results, data) if data else "<p>This run has no analysis.</p>",
        "run": _run(results),
        "config": html.escape(json.dumps(to_json(results["config"]), indent=1)),
    }
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    for name, value in values.items():  # the data last: they may hold anything
        page = page.replace(f"<!--{name}-->", value)
    return page


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand within a script of a page."""
    return json.dumps(to_json(data)).replace("<", "\\u003c")


def _run(results: Mapping[str, Any]) -> str:
    """Speed, memory and provenance as rows of a table."""
    speed, found = results["speed"], results["input"]
    packages = ("stem_dask", "numpy", "dask", "zarr")
    rows = {
        "input": f"{found['path']}, {by(found['shape'])} {found['dtype']}, {size_of(results['sizes']['input_bytes'])}",
        "notes": "; ".join(found["notes"]),
        "command": results.get("command") or "",
        "duration": f"{results['processing_time']:.1f} s, {size_of(speed['bytes_per_second'])}/s",
        "memory": f"at most {size_of(results['peak_memory'])} in a process",
        "workers": results["cluster"],
        "repeated tasks": str(results["retries"]),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }
    return "".join(
        f'<tr><th scope="row">{name}</th><td>{html.escape(text)}</td></tr>'
        for name, text in rows.items()
        if text
    )


def _histogram(radius: NDArray, size: int) -> str:
    """Numbers of patterns by radius as bars; the radius that a window of ``size`` px holds is marked."""
    values = radius[np.isfinite(radius)]
    if not values.size:
        return ""
    half = size / 2
    low = math.floor(min(values.min(), half))
    high = math.ceil(max(values.max(), half)) + 1
    width = math.ceil((high - low) / 40)
    n, edges = np.histogram(values, np.arange(low, high + width, width))
    last = edges[-1]
    bars = "".join(
        f'<rect x="{first - low}" y="{1 - one / n.max():.4f}" width="{width * 0.9}" height="{one / n.max():.4f}">'
        f"<title>{first:g} to {first + width:g} px: {one:,} patterns</title></rect>"
        for first, one in zip(edges[:-1], n, strict=True)
    )
    thin = (last - low) / 200
    mark = f'<rect class="mark" x="{half - low - thin / 2}" y="0" width="{thin}" height="1"/>'
    text = f"{values.min():g} to {values.max():g} px, most often {edges[n.argmax()]:g} px"
    return (
        f'<figure><svg viewBox="0 0 {last - low} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="histogram of the radius: {text}">{bars}{mark}</svg>'
        f"<figcaption>Histogram of the radius: {text}; red: half the window</figcaption></figure>"
    )


def _look(results: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The part of the page that shows images, and chooses a window."""
    image = data["specimen"]["name"]
    maps = "".join(
        f'<figure><canvas id="map-{name}" role="img" aria-label="map of {name}"></canvas>'
        f"<figcaption>{name}: {picture['least']:.4g} to {picture['most']:.4g}</figcaption></figure>"
        for name, picture in data["pictures"].items()
    )
    options = "".join(
        f'<option value="{i}">{100 * one["target"]:g} %: {by([min(one["size"], full) for full in data["detector"]])} px</option>'
        for i, one in enumerate(data["targets"])
    )
    wander = ""
    if results["window"]["align"] == "fixed":
        wander = (
            f"<p>The retention of another size is that of windows about each pattern's own center. The centers wander by up to "
            f"{data['wander']:.1f} px; one fixed window must be larger by twice that to keep as much.</p>"
        )
    step = data["step"]
    worst = " ".join(
        f'<button type="button" data-index="{index}">{html.escape(text)}</button>'
        for index, text in data["least"]
    )
    pattern = ""
    if data["thumbnails"]:
        pattern = (
            '<figure><canvas id="pattern" role="img" aria-label="pattern of the chosen position with the window"></canvas>'
            '<figcaption>Pattern, logarithmic: <output id="pattern-of"></output></figcaption></figure>'
        )
    return f"""<div class="grid">
<figure><canvas id="specimen" tabindex="0" role="img" aria-label="specimen, {image}: click, or use the arrow keys, to see the values of a position"></canvas>
<figcaption>Specimen ({image}); red: the patterns that keep least. <output id="position"></output></figcaption></figure>
{pattern}
<figure><canvas id="mean" role="img" aria-label="mean pattern with the window"></canvas><figcaption>Mean pattern, logarithmic, and the window</figcaption></figure>
<figure><canvas id="maximum" role="img" aria-label="maximum of all patterns with the window"></canvas><figcaption>Maximum of all patterns, logarithmic</figcaption></figure>
</div>
<h2>Choose a window</h2>
<p><label for="size">Size of the window, px</label>
<input type="range" id="size" min="{step}" max="{data["largest"]}" step="{step}" value="{max(data["window"])}">
<label>or as a number <input type="number" id="number" min="{step}" max="{data["largest"]}" step="{step}" value="{max(data["window"])}"></label>
<label>or for a target <select id="targets"><option value="">share of the intensity</option>{options}</select></label></p>
<p>Window <output id="shown-window"></output>, retention <output id="shown-retention"></output>; <span id="shown-rest"></span></p>
{wander}<p>To get it: <code id="line"></code></p>
<h2>Patterns that keep least</h2><p>{worst}</p>
<h2>Maps</h2><div class="grid">{maps}{data["histogram"]}</div>"""


def _data(results: Mapping[str, Any], store: str) -> dict[str, Any]:
    """Numbers and images of the page, from the group ``analysis`` of a store."""
    stored = open_group(store, "analysis")
    known = stored.drop_vars("profile").load()
    total = known["total"].values
    filled, config = total > 0, results["config"]
    height, width = known["mean_pattern"].shape
    step = config["crop"]["size_multiple"] * config["downsample"]["factor"]
    limits, kept = results["limits"], results["validation"]
    curve, targets = _curves(stored, known["total"].values, limits, step)
    shape = list(results["window"]["size"])
    every = math.ceil((total.size / MOST_POSITIONS) ** (1 / total.ndim))
    maps = {
        name: _in_rows(known[variable].values, every)
        for name, variable in (
            ("center y", "center_y"), ("center x", "center_x"), ("radius", "radius"), ("retention", "retention"),
            ("total", "total"),
        )
        if variable in known
    }  # fmt: skip
    image = "bright_field" if "bright_field" in known else "total"
    centers = [known[f"center_{axis}"].values[known["total"].values > 0] for axis in "yx"]
    middle = [float(np.nanmedian(one)) for one in centers]
    retention = maps["retention"] if "retention" in maps else maps["radius"]
    order = np.argsort(np.where(np.isfinite(retention), retention, np.inf), axis=None)[:3]
    worst = [[int(i) for i in np.unravel_index(one, retention.shape)] for one in order]
    is_list = total.ndim == 1
    least = [
        (
            int(one),
            f"{_place(row, column, retention.shape, every, is_list)}: {retention[row, column]:.4g}",
        )
        for one, (row, column) in zip(order, worst, strict=True)
    ]
    path, stem = str(results["input"]["path"]), Path(str(results["input"]["path"])).stem
    origin = [max(0, min(first, full - n)) for first, n, full in zip(
        results["window"]["origin"], shape, (height, width), strict=True)]  # fmt: skip
    return {
        "detector": [height, width],
        "center": middle,
        "wander": max(float(np.nanmax(np.abs(one - np.nanmedian(one)))) for one in centers),
        "step": step,
        "largest": math.ceil(max(height, width) / step) * step,
        "n": total.size,
        "filled": int(filled.sum()),
        "itemsize": np.dtype(results["output"]["dtype"]).itemsize,
        "minimum": limits["min_retention"],
        "target": limits["target_retention"],
        "window": shape,
        "origin": origin,
        "kept": {"mean": kept["mean_retention"], "min": kept["min_retention"]},
        "curve": curve,
        "targets": targets,
        "input": shlex.quote(path),
        "stem": shlex.quote(stem),
        "options": "".join(f" {shlex.quote(one)}" for one in _given(config)),
        "line": results.get("command") or f"stem-dask crop {shlex.quote(path)} {shlex.quote(stem)}_cropped.zarr",
        "lead": list(maps["total"].shape),
        "is_list": is_list,
        "every": every,
        "first": int(np.ravel_multi_index((maps["total"].shape[0] // 2, maps["total"].shape[1] // 2), maps["total"].shape)),
        "worst": worst,
        "least": least,
        "histogram": _histogram(known["radius"].values[filled], max(shape)),
        "thumbnails": _thumbnails(thumbnails_of(store)),
        "windows": {} if results["window"]["align"] == "fixed" or "window_y" not in known else {
            axis: _text(_in_rows(known[f"window_{axis}"].values, every).astype("<f4")) for axis in "yx"
        },
        "specimen": {"name": image.replace("_", " "), **_image(_in_rows(known[image].values, every))},
        "mean_pattern": _image(known["mean_pattern"].values, logarithmic=True),
        "maximum_pattern": _image(known["max_pattern"].values, logarithmic=True),
        "maps": {name: _text(values.astype("<f4")) for name, values in maps.items()},
        "pictures": {
            name.replace(" ", "-"): _image(values)
            for name, values in maps.items() if name != "total"
        },
    }  # fmt: skip


def _place(row: int, column: int, shape: Sequence[int], every: int, is_list: bool) -> str:
    """The name of a position of a map."""
    if is_list:
        return f"pattern {(row * shape[1] + column) * every}"
    return f"row {row * every}, column {column * every}"


def _thumbnails(found: xr.Dataset | None) -> dict[str, Any]:
    """The small images of patterns for the page, and the scan indices of these patterns."""
    if found is None:
        return {}
    images = found["thumbnails"].values
    return {
        "rows": found["row"].values.tolist(),
        "columns": found["column"].values.tolist() if "column" in found else None,
        "shape": images.shape[-2:],
        "cell": found.attrs["cell"],
        "values": _text(images),
    }


def _in_rows(values: NDArray, every: int) -> NDArray:
    """Every n-th position, as an image; a list of patterns in rows of equal length, the last one filled up with NaN."""
    thin = values[(slice(None, None, every),) * values.ndim]
    if thin.ndim == 2:
        return thin
    columns = math.ceil(math.sqrt(thin.size))
    rows = math.ceil(thin.size / columns)
    filled = np.full(rows * columns, np.nan)
    filled[: thin.size] = thin
    return filled.reshape(rows, columns)


def _given(config: Mapping[str, Any]) -> list[str]:
    """Overrides for the options of reading, analysis, and descan that are not at their defaults."""
    out = []
    for section in ("input", "analyze", "descan", "downsample"):
        for key, value in defaults(section).items():
            now = config[section].get(key)
            if (section, key) != ("analyze", "from") and now != to_json(value):
                out.append(f"{section}.{key}={json.dumps(now, separators=(',', ':'))}")
    if config["crop"]["align"] != "fixed":
        out.append(f"crop.align={config['crop']['align']}")
    return out


def _curves(
    stored: xr.Dataset, total: NDArray, limits: Mapping[str, float], step: int
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Mean, minimum, and numbers of patterns below the limits, by radius; and the size for each target.

    The size for a target is what 99.9 % of the patterns need about their own centers.
    """
    profile = stored["profile"]
    n_radii, first = profile.shape[-1], profile.encoding["chunks"][0]
    row_bytes = 4 * math.prod(profile.shape[1:])
    rows = max(first, _BYTES // row_bytes // first * first)
    added, least = np.zeros(n_radii), np.full(n_radii, np.inf)
    below = {name: np.zeros(n_radii, np.int64) for name in limits}
    enough = [np.zeros(n_radii, np.int64) for _ in _TARGETS]
    filled = total > 0
    for start in range(0, len(total), rows):
        part = profile[start : start + rows].values[filled[start : start + rows]]
        if not len(part):
            continue
        added += part.sum(axis=0, dtype=np.float64)
        least = np.minimum(least, part.min(axis=0))
        for name, limit in limits.items():
            below[name] += (part < limit).sum(axis=0)
        for found, target in zip(enough, _TARGETS, strict=True):
            found += (part >= target).sum(axis=0)
    n = max(1, int(filled.sum()))
    curve = {
        "mean": (added / n).tolist(),
        "min": np.where(np.isfinite(least), least, 0).tolist(),
        "below": below["min_retention"].tolist(),
        "short": below["target_retention"].tolist(),
    }
    targets = []
    for target, found in zip(_TARGETS, enough, strict=True):
        radius = int(np.argmax(found >= math.ceil(0.999 * n)))
        size = math.ceil(2 * max(radius, 1) / step) * step
        targets.append({"target": target, "size": size})
    return curve, targets


def _image(values: NDArray, *, logarithmic: bool = False) -> dict[str, Any]:
    """An image of one byte a pixel, from the 0.5th to the 99.5th percentile; NaN is black.

    A ``logarithmic`` one shows four decades at most, up to the 99.95th percentile, so that hot pixels do not set the scale.
    """
    shown = np.asarray(values, np.float64)
    finite = shown[np.isfinite(shown)]
    if not finite.size:
        finite = np.zeros(1)
    least, most = float(finite.min()), float(finite.max())
    low, high = (float(one) for one in np.percentile(finite, (0.5, 99.5)))
    if logarithmic:
        high = float(np.percentile(finite, 99.95)) or most
        positive = finite[finite > 0]
        low = max(high / 1e4, float(np.percentile(positive, 1))) if positive.size else 0.0
        floor = low or 1.0
        shown, low, high = (
            np.log(np.maximum(shown, floor)),
            math.log(floor),
            math.log(max(high, floor)),
        )
    level = np.zeros(shown.shape, np.uint8)
    if high > low:
        level = np.nan_to_num(np.clip((shown - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return {"shape": list(level.shape), "values": _text(level), "least": least, "most": most}


def _text(values: NDArray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
