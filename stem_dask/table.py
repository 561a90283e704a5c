"""What a command with several inputs says of each of them: its lines, and the table at the end."""

import json
import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stem_dask.io.candidate import by
from stem_dask.options import Config
from stem_dask.urls import is_url

if TYPE_CHECKING:
    from stem_dask.results import Outcome

#: characters of an error in the table; the whole of it stands above
SHOWN_CHARACTERS = 72
#: how an input ends that a command did not come to
NOT_DONE = 75


@dataclass
class Row:
    """One dataset in the table; without an exit code it was not brought to an end."""

    input: str
    output: str
    exit_code: int | None = None
    words: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> "Row":
        """Of a job that has not begun."""
        return cls(str(config.input.path), config.output.path)


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each dataset, under the names of the columns, and one that counts them.

    Examples
    --------
    >>> done = Row("/raw/a.npy", "/out/a.zarr", 0, "", {"window": {"size": [40, 44]}})
    >>> print(*table([done, Row("/raw/b.npy", "/out/b.zarr", 3, "/raw/b.npy is empty")]), sep="\\n")
    input       output       window      exit
    /raw/a.npy  /out/a.zarr  40 x 44 px  0
    /raw/b.npy  /out/b.zarr              3     is empty
    1 of 2 complete
    """
    cells = [("input", "output", "window", "mean", "min", "exit", ""), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    used = [i for i in range(7) if any(row[i] for row in cells[1:])]
    lines = ["  ".join(row[i].ljust(widths[i]) for i in used).rstrip() for row in cells]
    n_complete = sum(row.exit_code == 0 for row in rows)
    return [*lines, f"{n_complete:,} of {len(rows):,} complete"]


def _cells(row: Row) -> tuple[str, ...]:
    window, kept = row.results.get("window"), row.results.get("validation", {})
    shares = [kept.get(name) for name in ("mean_retention", "min_retention")]
    words = row.words if row.exit_code is not None else "not finished; the same command goes on"
    words = words.replace(row.input, "").lstrip(": ")
    return (
        shown(row.input),
        shown(row.output),
        "" if window is None else f"{by(window['size'])} px",
        *("" if share is None else f"{share:.4f}" for share in shares),
        str(NOT_DONE if row.exit_code is None else row.exit_code),
        textwrap.shorten(words, SHOWN_CHARACTERS, placeholder=" …"),
    )


def lines_of(outcome: "Outcome") -> list[str]:
    """What is said of one of several datasets at its end: one line, the warnings, the verdict unless it is ok, the advice."""
    results = outcome.results
    if not results:
        return list(outcome.lines)
    from stem_dask.report import judgement_lines  # which loads xarray

    kept, window = results["validation"], results.get("window")
    parts = ["not cropped"] if window is None else [f"{by(window['size'])} px"]
    if "mean_retention" in kept:
        parts.append(
            f"retention mean {kept['mean_retention']:.4f}, min {kept['min_retention']:.4f}"
        )
    parts.append(f"{results['processing_time']:.1f} s")
    done = f"done        {shown(results['config']['output']['path'])}: {', '.join(parts)}"
    warnings = [text for text in outcome.lines if text.startswith(("warning", "quarantined"))]
    only = shlex.quote(f"input.path={results['config']['input']['path']}")
    return [done, *warnings, *judgement_lines(results, only)]


def shortfall(row: Row) -> str:
    """Why a finished dataset is not as it was wanted, in a few words."""
    if row.exit_code == 7:
        n = row.results.get("quarantined", {}).get("n_patterns")
        return f"{n} patterns could not be read"
    kept = row.results["validation"]
    n = kept["n_patterns"] - kept["n_empty"] - kept["passes_min_threshold"]
    return f"{n:,} patterns below min_retention {row.results['limits']['min_retention']:g}"


def stored_results(config: Config) -> Mapping[str, Any]:
    """What results.json says of a finished job; nothing when it cannot be read."""
    from stem_dask.outputs import Outputs

    try:
        results = json.loads(Path(Outputs.of(config).results).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def shown(path: str) -> str:
    """A path for people: relative when it lies below the working directory."""
    if is_url(path):
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
