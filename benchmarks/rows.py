"""The rows of the table: the job, its command, its goal, and the work that bounds it."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: input size of the goals: a 128 x 128 scan of 256 x 256 uint16
GOAL_BYTES = 2_147_483_648

#: the other libraries center by the center of mass
_CROP = (
    "output.export=[]", "output.figure=false", "output.codec=lz4", "analyze.center_method=centroid",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One job.

    ``goal`` is in seconds for `GOAL_BYTES` on two Zen 5 cores, where the limit was ``goal_limit`` if it was measured;
    ``within`` is a factor of another row's seconds instead. ``command`` lacks input and output, ``suffix`` is the
    output's, ``reads`` the number of passes over the input. ``codec`` encodes the output; None if nothing is written.
    """

    name: str
    title: str
    goal: float | None
    command: tuple[str, ...]
    suffix: str
    reads: int = 1
    codec: str | None = "lz4"
    cold: bool = False
    analysis_only: bool = False
    within: tuple[str, float] | None = None
    goal_limit: float | None = None


def _run(*overrides: str) -> tuple[str, ...]:
    return ("stem_dask.run", str(ROOT / "configs" / "crop.yaml"), *_CROP, *overrides)


def _convert(*options: str) -> tuple[str, ...]:
    return ("stem_dask.cli.main", "convert", *options)


ROWS = {
    row.name: row
    for row in (
        Row("analysis", "analysis (centers and radii)", 0.30, _run(), "zarr", codec=None, analysis_only=True, goal_limit=0.06),
        Row("crop", "whole job -> zarr lz4", 1.2, _run(), "zarr", reads=2, goal_limit=0.25),
        Row("cold", "whole job, cold cache", 1.7, _run(), "zarr", reads=2, cold=True, goal_limit=0.75),
        Row("bin", "detector bin x2 -> zarr lz4", 1.0, _run("crop.enabled=false", "downsample.factor=2"), "zarr"),
        Row("convert", "dm4 -> zarr lz4", 1.0, _convert("--codec", "lz4"), "zarr", goal_limit=0.39),
        Row("convert-analyze", "the same with the analysis", None, _convert("--codec", "lz4", "--analyze"), "zarr",
            within=("convert", 1.15)),
        Row("hspy-gzip", "dm4 -> hspy gzip-4", 5.9, _convert("--codec", "gzip"), "hspy", codec="gzip", goal_limit=4.9),
        Row("hspy-lz4", "dm4 -> hspy lz4", 1.3, _convert("--codec", "lz4"), "hspy", goal_limit=0.4),
        Row("zspy", "dm4 -> zspy lz4", 1.6, _convert("--codec", "lz4"), "zspy"),
        Row("pt", "dm4 -> .pt, downsample 2", 3.0,
            ("stem_dask.cli.main", "preprocess", "--downsample", "2", "--dtype", "float32"), "pt", codec="none"),
    )
}  # fmt: skip

#: ways to run stem_dask: processes x threads, for two cores
SETTINGS = {
    "2x1": ("cluster.kind=local", "cluster.n_workers={cores}", "cluster.threads_per_worker=1"),
    "1x2": ("cluster.kind=threads", "cluster.threads_per_worker={cores}"),
}


@dataclass(frozen=True)
class JobResult:
    """Time and sizes of one run of stem_dask."""

    seconds: float
    input_bytes: int
    output_bytes: int
    stored_bytes: int


def job_command(row: Row, setting: str, source: Path, output: Path, cores: int) -> list[str]:
    """The public command of a row."""
    module, *words = row.command
    if module == "stem_dask.run":
        paths = [f"input.path={source}", f"output.path={output}"]
    else:
        paths = ["--input", str(source), "--output", str(output)]
    cluster = [text.format(cores=cores) for text in SETTINGS[setting]]
    first, rest = (words[:1], words[1:])
    return [sys.executable, "-m", module, *first, *paths, *rest, *cluster, "--quiet"]


def job_results(row: Row, output: Path) -> JobResult:
    """Results that a run recorded: seconds from the first submission to the last rename, and sizes."""
    path = output.with_name(f"{output.name.removesuffix('.zarr')}_results.json")
    results = json.loads(path.read_text())
    speed, sizes = results["speed"], results["sizes"]
    seconds = speed["seconds_until_analyzed" if row.analysis_only else "seconds"]
    return JobResult(seconds, sizes["input_bytes"], sizes["output_bytes"], sizes["stored_bytes"])


def goal_seconds(row: Row, n_bytes: int, earlier: Mapping[str, float]) -> float | None:
    """The goal scaled to another size; ``earlier`` are the seconds of the rows so far.

    Examples
    --------
    >>> goal_seconds(ROWS["crop"], GOAL_BYTES // 2, {})
    0.6
    >>> round(goal_seconds(ROWS["convert-analyze"], 1, {"convert": 2.0}), 6)
    2.3
    """
    if row.within is not None:
        other, factor = row.within
        return earlier[other] * factor if other in earlier else None
    return None if row.goal is None else row.goal * n_bytes / GOAL_BYTES
