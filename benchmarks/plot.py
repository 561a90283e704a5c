"""Plot a result of `benchmarks.table`: speed of all libraries, memory against size.

python -m benchmarks.plot [benchmarks/results/table.json] [docs/benchmarks.png]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.compare import RESULTS
from benchmarks.rows import ROOT
from benchmarks.table import median

PICTURE = ROOT / "docs" / "benchmarks.png"
#: one color per library; the settings of stem_dask share a hue
COLORS = {
    "stem_dask 2x1": "#08519c", "stem_dask 1x2": "#4292c6", "numpy": "#969696", "dask": "#fd8d3c", "torch": "#e6550d",
    "hyperspy": "#31a354", "libertem": "#756bb1", "py4dstem": "#c51b8a",
}  # fmt: skip


def main(argv: list[str] | None = None) -> Path:
    """Draw the figure; returns its path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", default=RESULTS / "table.json")
    parser.add_argument("picture", type=Path, nargs="?", default=PICTURE)
    options = parser.parse_args(argv)
    result = json.loads(options.result.read_text())
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    speed, memory = figure.subplots(1, 2, width_ratios=(2, 1))
    _draw_speed(speed, result)
    _draw_memory(memory, result)
    figure.legend(*_legend(speed, memory), loc="outside lower center", ncols=9, frameon=False)
    figure.suptitle(_title(result), fontsize=9)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, dpi=110)
    print(f"drew {options.picture}")
    return options.picture


def _title(result: dict[str, Any]) -> str:
    machine = result["machine"]
    text = (
        f"{result['gigabytes']:g} GB, {machine['processor']}, {result['cores']} cores, "
        f"commit {result['commit'][:7]}, median of {result['rounds']}"
    )
    return f"{text}\n{result['note']}" if result["note"] else text


def _draw_speed(axes: Any, result: dict[str, Any]) -> None:
    """Bars of GB/s for each row, and a line at the limit of the machine."""
    for i, row in enumerate(result["rows"]):
        width = 0.8 / len(row["runs"])
        for j, (who, runs) in enumerate(row["runs"].items()):
            at = i - 0.4 + (j + 0.5) * width
            axes.barh(at, row["bytes"] / median(runs) / 1e9, width, color=COLORS[who], label=who)
        limit = row["bytes"] / row["limit"]["seconds"] / 1e9
        axes.plot([limit] * 2, [i - 0.4, i + 0.4], color="black", lw=1.5, label="limit")
    axes.set_yticks(range(len(result["rows"])), [row["title"] for row in result["rows"]])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("GB of input per second")


def _draw_memory(axes: Any, result: dict[str, Any]) -> None:
    """Peak memory of the whole job against the size of the input."""
    for who in dict.fromkeys(one["who"] for one in result["memory"]):
        ones = [one for one in result["memory"] if one["who"] == who]
        sizes = [one["gigabytes"] for one in ones]
        peaks = [one["peak_bytes"] / 1e9 for one in ones]
        axes.plot(sizes, peaks, "o-", color=COLORS[who], label=who)
    axes.set_xlabel("GB of input, whole job")
    axes.set_ylabel("peak memory, all processes, GB")
    if result["memory"]:
        axes.set_ylim(bottom=0)


def _legend(*all_axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels, each label once."""
    found: dict[str, Any] = {}
    for axes in all_axes:
        for mark, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, mark)
    return list(found.values()), list(found)


if __name__ == "__main__":
    main()
