"""Draw docs/architecture.svg: the route of one pattern, colored by folder.

python docs/architecture.py [docs/architecture.svg]
"""

import sys
from pathlib import Path
from typing import Any

#: one color per folder
COLORS = {
    "cli": "#f4cccc", "job": "#fce5cd", "cluster": "#fff2cc", "readers": "#d9ead3", "stages": "#d0e0e3",
    "writers": "#cfe2f3", "engine": "#d9d2e9", "storage": "#ead1dc",
}  # fmt: skip

#: name: (x, y, title, second line, folder)
BOXES = {
    "cli": (0.0, 6.0, "config, command", "cli/run.py", "cli"),
    "prepare": (2.5, 6.0, "prepare", "job/plan.py", "job"),
    "run": (5.0, 6.0, "run the passes", "job/run.py, passes.py", "job"),
    "cluster": (7.5, 6.0, "client", "cluster/connect.py", "cluster"),
    "submit": (5.0, 4.6, "one call per block", "engine/run.py", "engine"),
    "file": (0.0, 2.6, "patterns in a file", "readers/open.py", "readers"),
    "correct": (2.5, 2.6, "dark, gain, mask", "stages/correct.py", "stages"),
    "analyze": (5.0, 3.1, "pass 1: center, radius", "stages/analyze.py", "stages"),
    "spool": (10.0, 3.1, "spool file", "writers/spool.py", "writers"),
    "crop": (5.0, 1.9, "pass 2: window", "stages/crop.py", "stages"),
    "validate": (5.0, 0.7, "retention", "stages/validate.py", "stages"),
    "down": (7.5, 1.9, "downsample, cast", "stages/downsample.py", "stages"),
    "write": (10.0, 1.9, "encode: one shard", "writers/zarr.py", "writers"),
    "journal": (10.0, 4.6, "record of the block", "engine/journal.py", "engine"),
    "publish": (10.0, -0.5, "fsync, rename", "storage/publish.py", "storage"),
}  # fmt: skip

#: from, to
ARROWS = [
    ("cli", "prepare"), ("prepare", "run"), ("run", "cluster"), ("run", "submit"),
    ("file", "correct"), ("correct", "analyze"), ("correct", "crop"), ("analyze", "spool"),
    ("crop", "down"), ("crop", "validate"), ("down", "write"), ("write", "publish"),
]  # fmt: skip

WIDTH, HEIGHT = 2.0, 0.8


def main(argv: list[str]) -> Path:
    """Draw the picture; returns its path."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = Path(argv[0]) if argv else Path(__file__).with_suffix(".svg")
    # text stays text, and the same picture gives the same file
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stem_dask"}):
        figure = Figure(figsize=(12, 6.6))
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        draw(axes)
        figure.savefig(path, metadata={"Date": None})
    return path


def draw(axes: Any) -> None:
    """Boxes, arrows, and the frame around what runs on a worker."""
    from matplotlib.patches import FancyBboxPatch

    axes.set(xlim=(-0.3, 12.4), ylim=(-0.9, 7.2))
    axes.axis("off")
    style = "round,pad=0.02,rounding_size=0.1"
    frame = FancyBboxPatch((-0.2, 0.5), 12.4, 3.6, style, fc="#f7f7f7", ec="#999999", ls="--")
    axes.add_patch(frame)
    axes.text(
        -0.1,
        3.85,
        "one task on a worker: one block, a few patterns at a time",
        color="#555555",
        va="center",
    )
    for x, y, title, where, folder in BOXES.values():
        color = COLORS[folder]
        axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, style, fc=color, ec="#444444"))
        axes.text(x + WIDTH / 2, y + 0.53, title, ha="center", va="center", fontsize=10)
        axes.text(
            x + WIDTH / 2, y + 0.22, where, ha="center", va="center", fontsize=8, color="#333333"
        )
    for start, end in ARROWS:
        _arrow(axes, *_ends(start, end))
    _arrow(axes, (6.0, 4.6), (6.0, 4.12))
    _arrow(axes, (11.0, 4.12), (11.0, 4.6))
    for i, (folder, color) in enumerate(COLORS.items()):
        x = 0.1 + 1.2 * i
        axes.add_patch(FancyBboxPatch((x, -0.6), 0.3, 0.25, "square,pad=0", fc=color, ec="#444444"))
        axes.text(x + 0.4, -0.47, f"{folder}/", va="center", fontsize=9)


def _ends(start: str, end: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Points on the facing sides of two boxes."""
    (x, y, *_), (u, v, *_) = BOXES[start], BOXES[end]
    if x == u:
        return (x + WIDTH / 2, y), (u + WIDTH / 2, v + HEIGHT)
    return (x + WIDTH, y + HEIGHT / 2), (u, v + HEIGHT / 2)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    line = {"arrowstyle": "-|>", "color": "#444444", "shrinkA": 2, "shrinkB": 2}
    axes.annotate("", xy=end, xytext=start, arrowprops=line)


if __name__ == "__main__":
    main(sys.argv[1:])
