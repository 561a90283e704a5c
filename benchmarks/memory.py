"""Peak memory and time of the whole job against the size of the dataset.

    python -m benchmarks.memory [--sizes 0.5 1 2 4] [--kind local] [--keep FOLDER]

Memory is the largest sum, over all processes of the run, of anonymous resident memory (RssAnon: what the run holds
itself, without the page cache), sampled every 20 ms. Linux only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.data import scan_rows, write_scan


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Measure every size; prints one line each and the growth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[0.5, 1, 2, 4], help="GB of input"
    )
    parser.add_argument("--kind", choices=("threads", "local"), default="local")
    parser.add_argument("--export", default="[]", help="as output.export, for example [pt,hspy]")
    parser.add_argument("--json", type=Path, help="also write the figures here")
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
    """Run the whole job in processes of its own and watch its memory."""
    config = Path(__file__).resolve().parents[1] / "configs" / "crop.yaml"
    command = [
        sys.executable, "-m", "stem_dask.run", str(config), f"input.path={source}", f"output.path={output}",
        f"output.export={export}", "output.overwrite=true", f"cluster.kind={kind}", "output.figure=false", "--quiet",
    ]  # fmt: skip
    begun = time.perf_counter()
    run = subprocess.Popen(command)
    peak = 0
    while run.poll() is None:
        peak = max(peak, sum(_anonymous(pid) for pid in _tree(run.pid)))
        time.sleep(0.02)
    if run.returncode:
        raise SystemExit(f"the run ended with exit code {run.returncode}: {' '.join(command)}")
    results = json.loads(output.with_name(f"{output.stem}_results.json").read_text())
    return {
        "bytes": results["sizes"]["input_bytes"],
        "peak_bytes": peak,
        "work_seconds": results["speed"]["seconds"],
        "process_seconds": time.perf_counter() - begun,
    }


def _tree(root: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def _anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
