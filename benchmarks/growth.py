"""Growth of time and memory with the size of the data and with the number of blocks.

    python -m benchmarks.growth [--sizes 0.5 2 8 32] [--tile 0.25] [--blocks 4000] [--json FILE]

Sizes: the whole job on a scan that repeats a simulated file of ``--tile`` GB along scan_y. Every block is read from that
file by the usual calls; files that exceed the page cache are not measured. Memory is that of all processes (RssAnon).

Blocks: the whole job on many blocks of a single 16 x 16 pattern that is generated, not read. What remains is the cost of a
block in the graph, the scheduler, the journal and the files. It is compared with a run of 1 TB in 4,000 blocks,
extrapolated from the measured cost of a block and of a byte.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks import paper
from benchmarks.data import Made, Tiled, scan_rows, write_scan
from benchmarks.rows import ROOT, SETTINGS
from benchmarks.watch import watch

TERABYTE = 10**12
#: most blocks of a run of 1 TB, and blocks per task: each has 250 MB and takes 0.1 s to analyze, 0.2 s to crop
BLOCKS_OF_TERABYTE, CALLS_OF_TERABYTE = 4000, 4
#: pixels along each side of the generated pattern
TINY = 16


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure and print both, and the conclusions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.5, 2, 8, 32], help="GB")
    parser.add_argument("--tile", type=float, default=0.25, help="GB of the repeated file")
    parser.add_argument("--blocks", type=int, default=BLOCKS_OF_TERABYTE)
    parser.add_argument("--few", type=int, default=100, help="blocks of the baseline run")
    parser.add_argument("--setting", choices=SETTINGS, default="2x1")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--scan-x", type=int, default=128)
    parser.add_argument("--detector", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also write the results here")
    # one job, in a process of its own
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tiled", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.output is not None:
        job(options)
        return {}
    words = sys.argv[1:] if argv is None else argv
    found = {"command": paper.command("benchmarks.growth", words), **paper.circumstances()}
    found["sizes"] = sizes(options)
    found["blocks"] = blocks(options)
    if found["sizes"] and found["blocks"]:
        found["terabyte"] = terabyte(found["sizes"], found["blocks"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def sizes(options: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds and memory of every size, and the deviation from a line."""
    found: list[dict[str, float]] = []
    if not options.sizes:
        return found
    print(f"{'GB':>7} {'seconds':>9} {'cpu s':>8} {'GB/s':>7} {'peak MB':>8}")
    with tempfile.TemporaryDirectory(prefix="stem_dask-bench-") as name:
        tile = Path(name) / "tile.dm4"
        rows = scan_rows(int(options.tile * 1e9), options.scan_x, options.detector)
        write_scan(tile, rows, options.scan_x, options.detector)
        row_bytes = options.scan_x * options.detector**2 * 2
        for gigabytes in options.sizes:
            rows = max(1, round(gigabytes * 1e9 / row_bytes))
            row = _run(options, Path(name), ["--tiled", str(tile), "--rows", str(rows)])
            found.append({"gigabytes": rows * row_bytes / 1e9, **row})
            print(
                f"{found[-1]['gigabytes']:7.2f} {row['seconds']:9.2f} {row['cpu_seconds']:8.1f} "
                f"{found[-1]['gigabytes'] / row['seconds']:7.2f} {row['peak_bytes'] / 1e6:8.0f}",
                flush=True,
            )
    if len(found) > 1:
        slope, start, off = line([(f["gigabytes"], f["seconds"]) for f in found])
        peaks = [f["peak_bytes"] for f in found]
        print(
            f"time = {start:.2f} s + {slope:.2f} s per GB, within {off:.0%}; "
            f"memory {peaks[-1] / peaks[0] - 1:+.1%} from the first to the last"
        )
    return found


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Slope, intercept, and largest relative deviation from the fitted line, weighted by the values.

    Examples
    --------
    >>> slope, start, off = line([(1, 3), (2, 5), (4, 9)])
    >>> round(slope, 9), round(start, 9), round(off, 9)
    (2.0, 1.0, 0.0)
    """
    x, y = np.array(points, float).T
    slope, start = np.polyfit(x, y, 1, w=1 / y)
    return float(slope), float(start), float(np.abs((slope * x + start) / y - 1).max())


def blocks(options: argparse.Namespace) -> dict[str, float]:
    """Cost of a block in both passes together: the difference of two runs per block."""
    if not options.blocks:
        return {}
    with tempfile.TemporaryDirectory(prefix="stem_dask-bench-") as name:
        few, many = (
            _run(options, Path(name), ["--blocks", str(n)]) for n in (options.few, options.blocks)
        )
    n = options.blocks - options.few
    found = {"blocks": options.blocks, **{key: many[key] for key in ("seconds", "peak_bytes")}}
    for what in ("seconds", "cpu_seconds"):
        found[f"{what}_per_block"] = (many[what] - few[what]) / n
    print(
        f"{options.blocks:,} empty blocks: {many['seconds']:.2f} s, a block costs "
        f"{1e3 * found['seconds_per_block']:.2f} ms and {1e3 * found['cpu_seconds_per_block']:.2f} ms CPU "
        f"in both passes; peak memory {many['peak_bytes'] / 1e6:.0f} MB"
    )
    return found


def terabyte(sizes: Sequence[dict[str, float]], cost: dict[str, float]) -> dict[str, float]:
    """Share of the blocks in a run of 1 TB, extrapolated from the measured sizes.

    Examples
    --------
    >>> sizes = [{"gigabytes": g, "seconds": 2 + g, "cpu_seconds": 5 + 2 * g} for g in (1, 4)]
    >>> found = terabyte(sizes, {"seconds_per_block": 0.005, "cpu_seconds_per_block": 0.01})
    1 TB in 4,000 blocks, extrapolated: 1,002 s; blocks are 2.00% of the time and 2.00% of the CPU seconds (goal: below 2 %)
    """
    found = {}
    for what in ("seconds", "cpu_seconds"):
        points = [(one["gigabytes"], one[what]) for one in sizes]
        slope, start, _ = line(points) if len(points) > 1 else (points[0][1] / points[0][0], 0, 0)
        found[what] = start + slope * TERABYTE / 1e9
        found[f"{what}_share"] = cost[f"{what}_per_block"] * BLOCKS_OF_TERABYTE / found[what]
    print(
        f"1 TB in {BLOCKS_OF_TERABYTE:,} blocks, extrapolated: {found['seconds']:,.0f} s; blocks are "
        f"{found['seconds_share']:.2%} of the time and {found['cpu_seconds_share']:.2%} of the CPU seconds "
        "(goal: below 2 %)"
    )
    return found


def _run(options: argparse.Namespace, folder: Path, words: list[str]) -> dict[str, float]:
    """Run one job in a separate process."""
    command = [sys.executable, "-m", "benchmarks.growth", "--output", str(folder / "out.zarr")]
    command += [*words, "--setting", options.setting, "--cores", str(options.cores)]
    watched = watch(command, memory=True)
    seconds = json.loads((folder / "out_results.json").read_text())["speed"]["seconds"]
    return {
        "seconds": seconds,
        "cpu_seconds": watched.cpu_seconds,
        "peak_bytes": watched.peak_bytes,
    }


def job(options: argparse.Namespace) -> None:
    """The job of configs/crop.yaml on a repeated file, or on blocks that are generated."""
    from stem_dask.config.load import load_config
    from stem_dask.engine import submit as submission
    from stem_dask.job.plan import prepare
    from stem_dask.job.run import run
    from stem_dask.readers.open import find

    overrides = [text.format(cores=options.cores) for text in SETTINGS[options.setting]]
    source: Tiled | Made
    if options.tiled is not None:
        path, source = options.tiled, Tiled(find(options.tiled).source, options.rows)
        changed: Any = nullcontext()
    else:
        path, source = options.output.with_name("made.npy"), made_source(options.blocks)
        np.save(path, source[(slice(0, 1), slice(0, 1), slice(None), slice(None))])
        overrides.append(f"output.chunk_mb={source.pattern.nbytes / 2**20 * 1.01}")
        # otherwise dozens of these short blocks would share a task
        most = CALLS_OF_TERABYTE * options.cores * submission.IN_FLIGHT
        changed = patch.object(submission, "CALLS_IN_FLIGHT", most)
    given = [
        f"input.path={path}", f"output.path={options.output}", "output.export=[]", "output.figure=false",
        "output.codec=lz4", "output.overwrite=true", *overrides,
    ]  # fmt: skip
    plan = prepare(load_config(ROOT / "configs" / "crop.yaml", given))
    info = plan.found.info
    axes = tuple(replace(axis, size=n) for axis, n in zip(info.axes, source.shape, strict=True))
    found = replace(plan.found, source=source, info=replace(info, axes=axes))
    with changed:
        run(replace(plan, found=found))


def made_source(n_blocks: int) -> Made:
    """A scan of ``n_blocks`` positions in two rows, with a bright square in each pattern."""
    pattern = np.ones((TINY, TINY), np.uint16)
    pattern[5:9, 5:9] = 60
    return Made(pattern, (2, max(1, n_blocks // 2)))


if __name__ == "__main__":
    main()
