"""Write a result of `benchmarks.table` as a Markdown table between two marks of a page.

python -m benchmarks.page [benchmarks/results/table.json] [benchmarks/README.md]
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare import RESULTS
from benchmarks.rows import ROOT, ROWS
from benchmarks.table import median

BEGIN, END = "<!-- benchmarks.page -->", "<!-- end -->"


def main(argv: list[str] | None = None) -> str:
    """Replace the text between the marks of a page; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", default=RESULTS / "table.json")
    parser.add_argument("page", type=Path, nargs="?", default=ROOT / "benchmarks" / "README.md")
    options = parser.parse_args(argv)
    text = markdown(json.loads(options.result.read_text()))
    options.page.write_text(replaced(options.page.read_text(), text))
    print(text)
    return text


def replaced(page: str, text: str) -> str:
    """The page with new text between the marks.

    Raises
    ------
    SystemExit
        If the page has no marks.

    Examples
    --------
    >>> replaced(f"a {BEGIN} b {END} c", "new")
    'a <!-- benchmarks.page -->\\nnew\\n<!-- end --> c'
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(
            f"the page has no {BEGIN} followed by {END}; add both where the table belongs"
        )
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def markdown(result: Mapping[str, Any]) -> str:
    """The machine, then one line per row: seconds, goal and limit; then memory."""
    names = list(dict.fromkeys(who for row in result["rows"] for who in row["runs"]))
    heads = ["seconds", *names, "goal", "limit", "best / limit", "goal / its limit"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in result["rows"]:
        limit = row["limit"]["seconds"]
        cells = [_seconds(median(row["runs"][who])) if who in row["runs"] else "–" for who in names]
        goal = "–" if row["goal"] is None else _seconds(row["goal"])
        ratio = f"{row['best'] / limit:.1f}"
        lines.append(_line([row["title"], *cells, goal, _seconds(limit), ratio, _aim(row["row"])]))
    for size in dict.fromkeys(one["gigabytes"] for one in result["memory"]):
        peaks = {o["who"]: o["peak_bytes"] for o in result["memory"] if o["gigabytes"] == size}
        cells = [f"{peaks[who] / 1e9:.2f}" if who in peaks else "–" for who in names]
        lines.append(_line([f"peak memory at {size:g} GB, GB", *cells, "0.8", "–", "–", "–"]))
    machine = result["machine"]
    caption = (
        f"{result['gigabytes']:g} GB, {result['cores']} of {machine['cores']} cores ({machine['processor']}), "
        f"commit {result['commit'][:7]}, median of {result['rounds']}"
    )
    note = f"**{result['note'][0].upper()}{result['note'][1:]}.**\n\n" if result["note"] else ""
    return f"{note}{caption}:\n\n" + "\n".join(lines)


def _aim(name: str) -> str:
    """Ratio of a goal to the limit of the machine it was set for."""
    row = ROWS[name]
    return f"{row.goal / row.goal_limit:.1f}" if row.goal and row.goal_limit else "–"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


if __name__ == "__main__":
    main()
