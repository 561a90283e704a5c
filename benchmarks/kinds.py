"""Speed for other data types, detector sizes and scan shapes: kernels and whole jobs.

    python -m benchmarks.kinds [--mb 32] [--detectors 64 128 256 512 1024] [--whole 0.25] [--json FILE]

The kernels run on blocks of equal bytes on one core, with the references of `benchmarks.kernels`. With ``--whole GB`` the
public command also crops files of that size: of every type, and scans of 1 x N and N x 1. Speeds are in bytes per
second, relative to uint16 on 256 x 256.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import paper
from benchmarks.data import scan_rows, write_scan
from benchmarks.kernels import DTYPES, HEADING, Speed, beams, measure
from benchmarks.rows import ROWS, job_command, job_results
from benchmarks.watch import watch

#: counts per pattern, so that no pixel exceeds the range of the type
ELECTRONS = {"uint8": 20_000, "int16": 100_000}
POSITIONS = 128


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure and print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=32, help="MB of a block")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, help="uint16 and others")
    parser.add_argument("--detectors", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--whole", type=float, default=0, help="GB of a whole job's input")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(argv)
    print(f"{HEADING} {'/ uint16 256':>13}")
    by_type = [
        speed
        for dtype in options.dtypes
        for speed in _measured(dtype, 256, options.mb, options.repeat)
    ]
    by_size = [
        speed
        for size in options.detectors
        if size != 256
        for speed in _measured("uint16", size, options.mb, options.repeat)
    ]
    plain = {speed.kernel: speed.speed for speed in by_type if speed.dtype == "uint16"}
    for speed in [*by_type, *by_size]:
        print(f"{speed.text} {speed.speed / plain[speed.kernel]:13.2f}", flush=True)
    kernels = [asdict(speed) for speed in (*by_type, *by_size)]
    words = sys.argv[1:] if argv is None else argv
    command = paper.command("benchmarks.kinds", words)
    found = {"command": command, **paper.circumstances(), "kernels": kernels, "jobs": []}
    if options.whole:
        found["jobs"] = _jobs(int(options.whole * 1e9))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _measured(dtype: str, size: int, megabytes: float, repeat: int) -> list[Speed]:
    """Every kernel on a block of about ``megabytes``."""
    n = max(1, round(megabytes * 1e6 / (size * size * np.dtype(dtype).itemsize)))
    return measure(beams(n, size, dtype), repeat)


def _jobs(n_bytes: int) -> list[dict[str, Any]]:
    """The whole job for every type, and for scans of a single line."""
    n = scan_rows(n_bytes)
    shapes = {f"{dtype} {POSITIONS} columns": (dtype, None) for dtype in DTYPES}
    shapes |= {"uint16 1 x N": ("uint16", (1, n * POSITIONS))}
    shapes |= {"uint16 N x 1": ("uint16", (n * POSITIONS, 1))}
    print(f"{'whole job':22} {'seconds':>9} {'cpu s':>7} {'GB/s':>7} {'GB/cpu s':>9}")
    found = []
    with tempfile.TemporaryDirectory(prefix="stem_dask-bench-") as folder:
        for name, (dtype, shape) in shapes.items():
            itemsize = np.dtype(dtype).itemsize
            rows, columns = shape or (scan_rows(n_bytes, itemsize=itemsize), POSITIONS)
            electrons = ELECTRONS.get(dtype, 100_000)
            source = Path(folder) / "scan.dm4"
            write_scan(source, rows, columns, electrons=electrons, dtype=dtype)
            found.append({"job": name, **_job(source, Path(folder) / "out.zarr")})
            job = found[-1]
            print(
                f"{name:22} {job['seconds']:9.2f} {job['cpu_seconds']:7.1f} "
                f"{job['bytes'] / job['seconds'] / 1e9:7.2f} {job['bytes'] / job['cpu_seconds'] / 1e9:9.2f}",
                flush=True,
            )
    return found


def _job(source: Path, output: Path) -> dict[str, float]:
    """The second run on threads of one process; the first compiles the kernels."""
    command = [*job_command(ROWS["crop"], "1x2", source, output, 2), "output.overwrite=true"]
    watch(command)
    watched = watch([*command, "--restart", "output.chunk_mb=64"])
    result = job_results(ROWS["crop"], output)
    return {
        "bytes": result.input_bytes,
        "seconds": result.seconds,
        "cpu_seconds": watched.cpu_seconds,
    }


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
