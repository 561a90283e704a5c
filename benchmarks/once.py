"""Seconds and bytes of a crop that reads its input once, and of one that reads it twice, without the page cache.

    python -m benchmarks.once [--gb 4.2] [--rounds 3] [--mb-per-second 200] [--folder /data] [KEY=VALUE …]

The two alternate. While a crop runs, the pages of the input are dropped from the cache four times a second, so that a second
read comes from the disk, as that of an input larger than the memory does. Bytes are those of the whole process (rchar), and
those that the disk delivered. With a rate, the threads that read the input share it, as clients of a network share do: each read waits until
its turn is over.

The scan repeats a few rows: of 4.29 GB (256 rows) the sample would have every 16th, and know only one of them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.data import scan_rows, write_scan
from benchmarks.rows import ROOT

#: how often the pages of the input are dropped, in seconds
DROPPED = 0.25


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure both, print and return the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=4.2, help="size of the input")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--detector", type=int, default=256)
    parser.add_argument("--mb-per-second", type=float, help="rate at which the input is read")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("overrides", nargs="*", help="of the config, such as crop.size=64")
    options = parser.parse_args(argv)
    rounds: dict[str, list[dict[str, float]]] = {"two": [], "one": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        n_rows = scan_rows(round(options.gb * 1e9), detector=options.detector)
        path = write_scan(Path(folder, "scan.dm4"), n_rows, detector=options.detector)
        os.sync()  # dirty pages cannot be dropped
        for i in range(options.rounds):
            for passes, found in rounds.items():
                found.append(
                    measured(
                        path,
                        Path(folder, f"{passes}{i}.zarr"),
                        passes,
                        options.mb_per_second,
                        options.overrides,
                    )
                )
    medians = {
        passes: {name: statistics.median(one[name] for one in found) for name in found[0]}
        for passes, found in rounds.items()
    }
    size = n_rows * 128 * options.detector**2 * 2
    print(f"input of {size / 1e9:.2f} GB, median of {options.rounds}:")
    for passes, found in medians.items():
        print(
            f"passes {passes}: {found['seconds']:6.2f} s, {found['rchar'] / size:.2f} times the input read in all, "
            f"{found['read_bytes'] / size:.2f} times from the disk"
        )
    ratio = medians["one"]["seconds"] / medians["two"]["seconds"]
    print(f"one / two: {ratio:.2f} of the time", flush=True)
    return medians


def measured(
    path: Path, output: Path, passes: str, rate: float | None, more: Sequence[str]
) -> dict[str, float]:
    """Crop in a process of its own, from an empty cache."""
    slow = f"import benchmarks.once as once; once.slow_down({str(path)!r}, {rate}); " * bool(rate)
    command = [
        sys.executable, "-c", f"{slow}import sys; from stem_dask.cli.run import main; sys.exit(main())", str(ROOT / "configs" / "crop.yaml"), f"input.path={path}",
        f"output.path={output}", "output.export=[]", "output.figure=false", "cluster.kind=threads",
        f"analyze.passes={passes}", *more,
    ]  # fmt: skip
    with uncached(path):
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
            assert run.stdout is not None
            text = run.stdout.read()
            os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)  # it still tells what it has read
            seconds = time.perf_counter() - start
            told = Path(f"/proc/{run.pid}/io").read_text().splitlines()
        if run.returncode:
            raise SystemExit(text.decode())
    counts = {name: float(n) for name, n in (line.split(": ") for line in told)}
    return {"seconds": seconds, "rchar": counts["rchar"], "read_bytes": counts["read_bytes"]}


def slow_down(path: str, mb_per_second: float) -> None:
    """Read a file in this process at a rate that all threads share."""
    plain, lock, free_at = os.preadv, threading.Lock(), [0.0]

    def preadv(file: int, buffers: Sequence[Any], *rest: Any) -> int:
        n = plain(file, buffers, *rest)
        if os.readlink(f"/proc/self/fd/{file}") == path:
            with lock:
                free_at[0] = max(free_at[0], time.monotonic()) + n / (mb_per_second * 1e6)
            time.sleep(max(0.0, free_at[0] - time.monotonic()))
        return n

    os.preadv = preadv


@contextmanager
def uncached(path: Path) -> Iterator[None]:
    """Keep the pages of a file out of the cache."""
    ended = threading.Event()
    with open(path, "rb") as file:

        def drop() -> None:
            while True:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if ended.wait(DROPPED):
                    return

        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        thread = threading.Thread(target=drop)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


if __name__ == "__main__":
    main()
