"""Loading for training: CPU time per pattern of common loaders and of stem_dask, and the work that none can avoid.

    python -m benchmarks.loading [--json benchmarks/results/loading.json] [--picture docs/loading.png] [--sizes 0.5 2 4] [--quick]

A job writes a simulated scan as .zarr (lz4), .pt, .hspy (gzip) and .npy. All loaders yield random batches, float32, after log(1 + x) and
a z-score, in turns, with one thread; the least CPU time of all rounds counts, of all threads and child processes, with a warm page
cache. Loaders that read one pattern at a time from compressed files are measured on a sample.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import limits, paper
from benchmarks.data import scan_rows, write_scan
from benchmarks.peers.loading import Load, loaders
from benchmarks.rows import ROOT
from benchmarks.watch import watch

#: positions along y and x, pixels, batch, patterns that slow loaders read, rounds, epochs of which the noise is measured, GB for memory
FULL = ((64, 128), 96, 128, 256, 7, 10, [0.5, 2, 4])
QUICK = ((6, 8), 32, 16, 8, 1, 2, [0.0003])
SUFFIXES = (".zarr", ".hspy", ".pt", ".npy")
LIMIT, OWN = "limit: decode, checksum, gather", "stem_dask .zarr, blocks"
#: of the two windows in block mode
MEMORY = "64MB"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and draw everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="*", help="GB, for memory (0.5 2 4)")
    parser.add_argument("--quick", action="store_true", help="next to no data")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--picture", type=Path, help="also draw them here")
    # in a process of its own
    parser.add_argument("--task", choices=("imports", "first", "epoch"), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.task:
        task(options.task, options.path)
        return {}
    words = sys.argv[1:] if argv is None else argv
    scan, detector, batch, sample, rounds, epochs, sizes = QUICK if options.quick else FULL
    sizes = sizes if options.sizes is None else options.sizes
    found = {"command": paper.command("benchmarks.loading", words), **paper.circumstances()}
    found |= {"scan": scan, "detector": detector, "batch": batch}
    with tempfile.TemporaryDirectory(prefix="stem_dask-bench-") as folder:
        store = write(Path(folder, "scan.zarr"), *scan, detector, "[pt,hspy,npy]")
        parts = limits.loading_parts(store, batch)
        loads = own(store, batch) | loaders(store, batch, sample) | parts
        found["microseconds"] = in_turns(loads, rounds)
        found["microseconds"][LIMIT] = sum(found["microseconds"][name] for name in parts)
        found["noise"] = noise(store, batch, epochs)
        paths = [store.with_suffix(suffix) for suffix in SUFFIXES]
        runs = {path.suffix: [child("first", path)[0] for _ in range(rounds)] for path in paths}
        found["first_batch"] = {name: np.min(one, axis=0).tolist() for name, one in runs.items()}
        found["memory"] = [memory(size, scan[1], detector) for size in sizes]
    print(text_of(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.picture:
        draw(found, options.picture)
    return found


def write(store: Path, rows: int, width: int, detector: int, exports: str = "[]") -> Path:
    """Simulate a scan and write it by a job."""
    import stem_dask as sd

    source = write_scan(store.with_suffix(".dm4"), rows, width, detector)
    paths = [f"input.path={source}", f"output.path={store}", f"output.export={exports}"]
    given = [*paths, "crop.enabled=false", "output.figure=false", "cluster.kind=threads"]
    sd.run_config(sd.load_config(ROOT / "configs" / "crop.yaml", overrides=given))
    source.unlink()
    return store


def in_turns(loads: dict[str, Load], rounds: int) -> dict[str, float]:
    """Least microseconds of CPU time per pattern; a first round compiles, and fills the memory."""

    def seconds() -> float:  # also of children that have ended
        return time.process_time() + sum(os.times()[2:4])

    found = dict.fromkeys(loads, np.inf)
    for turn in range(rounds + 1):
        for name, load in loads.items():
            begun = seconds()
            n = load()
            if turn:
                found[name] = min(found[name], (seconds() - begun) / n * 1e6)
    return found


def own(store: Path, batch: int) -> dict[str, Load]:
    """The loader of stem_dask: shuffled in blocks, and from memory."""

    def load(suffix: str, **how: Any) -> Load:
        batches = batches_of(store.with_suffix(suffix), batch, **how)
        return lambda: sum(len(b["index"]) for b in batches)

    modes = {"blocks": {"memory": MEMORY, "cache": False}, "in memory": {"cache": True}}
    return {
        f"stem_dask {s}, {name}": load(s, **how) for s in SUFFIXES for name, how in modes.items()
    }


def batches_of(path: Path, batch: int, **how: Any) -> Any:
    """A loader with one thread, without its warning on the noise, which is measured."""
    import stem_dask as sd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return sd.loader(sd.PatternDataset(path), batch, threads=1, **how)


def noise(store: Path, batch: int, epochs: int) -> list[dict[str, float]]:
    """Variance of batch means relative to that of random batches, for windows of K chunks, and its bound."""
    import stem_dask as sd

    ds = sd.PatternDataset(store, downsample=4, normalize="log")
    whole = np.concatenate([b["patterns"].flatten(1) for b in sd.loader(ds, batch, shuffle=False)])
    whole, chunk, n = whole - whole.mean(0), ds.chunks[0], len(whole)
    spread = float(np.square(whole).sum(1).mean())
    means = np.array([whole[chunk == one].mean(0) for one in np.unique(chunk)])
    each = n / len(means)
    rho = (each * float(np.square(means).sum(1).mean()) / spread - 1) / (each - 1)
    found = []
    for k in (8, 32, 128):
        held = 2 * k * ds.most * 16 * prod(ds.shape) * 2
        batches = batches_of(store, batch, memory=held, cache=False, drop_last=True)
        indices = [b["index"].numpy() for _ in range(epochs) for b in batches]
        variance = float(np.mean([np.square(whole[index].mean(0)).sum() for index in indices]))
        ratio = variance * batch / spread * (n - 1) / (n - batch)
        k = batches.plan.K
        found.append({"K": k, "rho": rho, "noise": ratio, "bound": 1 + rho * batch / k})
    return found


def memory(gigabytes: float, width: int, detector: int) -> dict[str, Any]:
    """Peak bytes of a process that reads an epoch in block mode, and of one that only imports."""
    with tempfile.TemporaryDirectory(prefix="stem_dask-bench-") as folder:
        rows = scan_rows(int(gigabytes * 1e9), width, detector)
        store = write(Path(folder, "large.zarr"), rows, width, detector)
        (_, seconds), peak = child("epoch", store, memory=True)
        imports = child("imports", store, memory=True)[1]
    return {"gigabytes": gigabytes, "seconds": seconds, "peak": peak, "imports": imports}


def task(name: str, path: Path) -> None:
    """Imports, then the first batch or an epoch; prints the seconds that numba needs to start, and those after that."""
    import imagecodecs
    import torch

    import stem_dask as sd
    from stem_dask.kernels.logarithm import add_logs

    loaded = (imagecodecs.blosc_decode, torch.Tensor, sd.PatternDataset, sd.loader)
    begun = time.perf_counter()
    add_logs(np.ones((1, 1, 1), np.uint16), np.zeros((1, 1)))
    started = time.perf_counter()
    if name != "imports" and loaded:
        for _ in batches_of(path, 128, memory=MEMORY, cache=False):
            if name == "first":
                break
    print(started - begun, time.perf_counter() - started)


def child(name: str, path: Path, **how: Any) -> tuple[list[float], int]:
    """Seconds that a task printed, and its peak memory."""
    command = [sys.executable, "-m", "benchmarks.loading", "--task", name, "--path", str(path)]
    watched = watch(command, **how)
    return [float(word) for word in watched.output.split()[-2:]], watched.peak_bytes


def text_of(found: dict[str, Any]) -> str:
    """The table in Markdown, and a line for each of the other results."""
    cpu = dict(sorted(found["microseconds"].items(), key=lambda item: -item[1]))
    lines = ["| loader | us per pattern | / limit | / stem_dask .zarr |", "|---|---:|---:|---:|"]
    for name, value in cpu.items():
        ratios = (value, value / cpu[LIMIT], value / cpu[OWN])
        cells = (f"{one:,.0f}" if one >= 100 else f"{one:.3g}" for one in ratios)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = "first batch of a {}: {:.2f} s for numba to start, and {:.2f} s"
    lines += ["", *(first.format(name, *one) for name, one in found["first_batch"].items())]
    text = "noise, K = {K}: {noise:.2f} x random batches, bound {bound:.2f} (rho {rho:.2f})"
    lines += [text.format(**one) for one in found["noise"]]
    for one in found["memory"]:
        sizes = f"{one['peak'] / 1e6:.0f} MB, of which {one['imports'] / 1e6:.0f} MB are imports"
        lines.append(
            f"peak memory of an epoch of {one['gigabytes']:g} GB, memory={MEMORY}: {sizes}"
        )
    return "\n".join(lines)


def draw(found: dict[str, Any], picture: Path) -> None:
    """A bar for each loader, and the limit as a line."""
    from matplotlib.figure import Figure

    cpu = found["microseconds"]
    names = sorted((name for name in cpu if not name.startswith("limit")), key=lambda n: cpu[n])
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, white = figure.subplots(), {"facecolor": "white", "linewidth": 0, "pad": 0}
    for color, who, is_own in (("#08519c", "stem_dask", True), ("#fd8d3c", "by hand", False)):
        rows = [i for i, name in enumerate(names) if name.startswith("stem_dask") == is_own]
        bars = axes.barh(rows, [cpu[names[i]] for i in rows], color=color, label=who)
        axes.bar_label(
            bars, [f" {cpu[names[i]]:,.{cpu[names[i]] < 100:d}f}" for i in rows], bbox=white
        )
    axes.axvline(
        cpu[LIMIT], color="black", lw=1.5, label=f"{LIMIT} of the .zarr ({cpu[LIMIT]:.1f})"
    )
    axes.set_yticks(range(len(names)), [name.removeprefix("stem_dask ") for name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, 4 * max(cpu.values()))
    axes.set_xlabel("CPU time per pattern, microseconds (shuffled, float32, log and z-score)")
    axes.legend(frameon=False, loc="upper right")
    patterns = (
        f"{np.prod(found['scan']):,} patterns of {found['detector']} x {found['detector']} px"
    )
    machine = f"{found['machine']['processor']}, commit {found['commit'][:7]}"
    axes.set_title(f"{patterns}, uint16, one thread, warm page cache; {machine}", size=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
