"""Write a result of `benchmarks.table` as a Markdown table between two marks of a page, and plot it.

python -m benchmarks.show [benchmarks/results/table.json] [benchmarks/README.md] [docs/benchmarks.png]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.paper import median
from benchmarks.rows import ROOT, ROWS

BEGIN, END = "<!-- benchmarks.show -->", "<!-- end -->"
#: one color per library; the settings of stem_dask share a hue
COLORS = {
    "stem_dask 2x1": "#08519c", "stem_dask 1x2": "#4292c6", "numpy": "#969696", "dask": "#fd8d3c", "torch": "#e6550d",
    "hyperspy": "#31a354", "libertem": "#756bb1", "py4dstem": "#c51b8a",
}  # fmt: skip


def main(argv: list[str] | None = None) -> str:
    """Replace the text between the marks of a page, and draw the figure; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = ROOT / "benchmarks"
    parser.add_argument("result", type=Path, nargs="?", default=folder / "results" / "table.json")
    parser.add_argument("page", type=Path, nargs="?", default=folder / "README.md")
    parser.add_argument("picture", type=Path, nargs="?", default=ROOT / "docs" / "benchmarks.png")
    options = parser.parse_args(argv)
    result = json.loads(options.result.read_text())
    text, page = markdown(result), options.page.read_text()
    if BEGIN not in page or END not in page:
        raise SystemExit(f"the page has no marks {BEGIN} and {END}")
    before, _, rest = page.partition(BEGIN)
    options.page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    draw(result, options.picture)
    print(text)
    return text


def markdown(result: dict[str, Any]) -> str:
    """The rows with a column per library, and the peak memory."""
    names = list(dict.fromkeys(who for row in result["rows"] for who in row["runs"]))
    heads = ["seconds", *names, "goal", "limit", "best / limit", "goal / its limit"]
    lines = [heads, ["---"] * len(heads)]
    for row in result["rows"]:
        limit, aim = row["limit"]["seconds"], ROWS[row["row"]]
        cells = [_seconds(median(row["runs"][who])) if who in row["runs"] else "–" for who in names]
        goal = "–" if row["goal"] is None else _seconds(row["goal"])
        # of the machine that the goal was set for
        ratio = f"{aim.goal / aim.goal_limit:.1f}" if aim.goal and aim.goal_limit else "–"
        cells += [goal, _seconds(limit), f"{row['best'] / limit:.1f}", ratio]
        lines.append([row["title"], *cells])
    for size in dict.fromkeys(one["gigabytes"] for one in result["memory"]):
        peaks = {o["who"]: o["peak_bytes"] for o in result["memory"] if o["gigabytes"] == size}
        cells = [f"{peaks[who] / 1e9:.2f}" if who in peaks else "–" for who in names]
        lines.append([f"peak memory at {size:g} GB, GB", *cells, "0.8", "–", "–", "–"])
    note = f"**{result['note'][0].upper()}{result['note'][1:]}.**\n\n" if result["note"] else ""
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{note}{caption(result)}:\n\n{rows}"


def caption(result: dict[str, Any]) -> str:
    """Size, machine and commit."""
    machine = result["machine"]
    return (
        f"{result['gigabytes']:g} GB, {result['cores']} of {machine['cores']} cores ({machine['processor']}), "
        f"commit {result['commit'][:7]}, median of {result['rounds']}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def draw(result: dict[str, Any], picture: Path) -> None:
    """Bars of GB/s for each row with the limit of the machine, and memory against size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    speed, memory = figure.subplots(1, 2, width_ratios=(2, 1))
    for i, row in enumerate(result["rows"]):
        width = 0.8 / len(row["runs"])
        for j, (who, runs) in enumerate(row["runs"].items()):
            at = i - 0.4 + (j + 0.5) * width
            speed.barh(at, row["bytes"] / median(runs) / 1e9, width, color=COLORS[who], label=who)
        limit = row["bytes"] / row["limit"]["seconds"] / 1e9
        speed.plot([limit] * 2, [i - 0.4, i + 0.4], color="black", lw=1.5, label="limit")
    speed.set_yticks(range(len(result["rows"])), [row["title"] for row in result["rows"]])
    speed.invert_yaxis()
    speed.set_xscale("log")
    speed.set_xlabel("GB of input per second")
    for who in dict.fromkeys(one["who"] for one in result["memory"]):
        ones = [one for one in result["memory"] if one["who"] == who]
        peaks = [one["peak_bytes"] / 1e9 for one in ones]
        memory.plot([one["gigabytes"] for one in ones], peaks, "o-", color=COLORS[who], label=who)
    memory.set_xlabel("GB of input, whole job")
    memory.set_ylabel("peak memory, all processes, GB")
    memory.set_ylim(bottom=0)
    marks = {
        name: mark
        for axes in (memory, speed)
        for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(marks.values(), marks, loc="outside lower center", ncols=9, frameon=False)
    figure.suptitle("\n".join(filter(None, (caption(result), result["note"]))), fontsize=9)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
