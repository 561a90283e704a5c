"""Peak memory and time of the whole job against the size of the dataset.

    python -m benchmarks.memory [--sizes 0.5 1 2 4] [--kind local] [--json FILE]

Memory is the largest sum of anonymous resident memory over all processes of the run (RssAnon, which excludes the page
cache), sampled every 20 ms. Linux only.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.data import scan_rows, write_scan
from benchmarks.rows import ROOT
from benchmarks.watch import watch


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Measure and print every size, then the growth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.5, 1, 2, 4], help="GB of input"
    )
    parser.add_argument("--kind", choices=("threads", "local"), default="local")
    parser.add_argument("--export", default="[]", help="as output.export, for example [pt,hspy]")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(argv)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}, kind {options.kind}"
    )
    print(f"{'GB':>6} {'peak MB':>9} {'work s':>8} {'GB/s':>7} {'process s':>10}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for gigabytes in options.sizes:
            source = write_scan(Path(folder) / "scan.dm4", scan_rows(int(gigabytes * 1e9)))
            row = measure(source, Path(folder) / "out.zarr", options.kind, options.export)
            rows.append({"gigabytes": gigabytes, **row})
            print(
                f"{gigabytes:6.2f} {row['peak_bytes'] / 1e6:9.0f} {row['work_seconds']:8.2f} "
                f"{row['bytes'] / row['work_seconds'] / 1e9:7.2f} {row['process_seconds']:10.2f}",
                flush=True,
            )
    growth = rows[-1]["peak_bytes"] / rows[0]["peak_bytes"] - 1
    print(f"memory from {rows[0]['gigabytes']:g} to {rows[-1]['gigabytes']:g} GB: {growth:+.1%}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return rows


def measure(source: Path, output: Path, kind: str, export: str) -> dict[str, float]:
    """Run the whole job in separate processes and sample its memory."""
    config = ROOT / "configs" / "crop.yaml"
    command = [
        sys.executable, "-m", "stem_dask.run", str(config), f"input.path={source}", f"output.path={output}",
        f"output.export={export}", "output.overwrite=true", f"cluster.kind={kind}", "output.figure=false", "--quiet",
    ]  # fmt: skip
    watched = watch(command, memory=True)
    results = json.loads(output.with_name(f"{output.stem}_results.json").read_text())
    return {
        "bytes": results["sizes"]["input_bytes"],
        "peak_bytes": watched.peak_bytes,
        "work_seconds": results["speed"]["seconds"],
        "process_seconds": watched.seconds,
    }


def say_growth(say: Callable[[str], None], found: Iterable[Mapping[str, Any]]) -> None:
    """Print one line per library: the peak at every size, and the growth from the first to the last."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        by_name.setdefault(one["who"], []).append(one)
    for who, ones in by_name.items():
        peaks = ", ".join(
            f"{one['peak_bytes'] / 1e6:.0f} MB at {one['gigabytes']:g} GB" for one in ones
        )
        growth = ones[-1]["peak_bytes"] / ones[0]["peak_bytes"] - 1
        say(f"memory {who:21} {peaks}: {growth:+.0%}")


if __name__ == "__main__":
    main()
