"""Detector-first DM4 files: the rate of transposing them, and of reading the transposed file.

    python -m benchmarks.detector_first [--size 2] [--slab 64] [--block 64] [--direct N] [--folder FOLDER]

Writes the same scan in both orders of DM4 and measures each pass from a cold cache (as far as it can be dropped), on the
threads of this machine: transposing; reading all blocks of the transposed file; reading them from the scan-first file.
``--direct N`` also reads N blocks directly from the detector-first file. Bytes are those of the read calls and, on
Linux, those that came from the disk.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import numpy as np

from benchmarks.data import scan_rows, write_scan
from benchmarks.limits import drop_cache
from stem_dask.core.chunks import MIB, lead_chunks
from stem_dask.job.passes import plan_transpose
from stem_dask.readers.open import find
from stem_dask.readers.source import Source
from stem_dask.stages.open import block_positions
from stem_dask.writers.synthetic import write_dm4

SCAN_X = 128


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure and print every pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=2, help="GB of input")
    parser.add_argument("--detector", type=int, default=256, help="pixels along ky and kx")
    parser.add_argument("--slab", type=float, default=64, help="MiB of a slab of pixels")
    parser.add_argument("--block", type=float, default=64, help="MiB of a block of patterns")
    parser.add_argument("--direct", type=int, default=0, help="blocks read directly")
    parser.add_argument("--folder", help="folder for temporary files")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = scan_rows(int(options.size * 1e9), SCAN_X, options.detector)
        new = find(write_scan(Path(folder) / "new.dm4", rows, SCAN_X, options.detector))
        old = find(write_detector_first(Path(folder) / "old.dm4", new.source))
        block = block_positions(new, options.block)
        plane_bytes = rows * SCAN_X * new.source.dtype.itemsize
        slab = lead_chunks(new.source.shape[2:], plane_bytes, options.slab)
        turn = plan_transpose(old, block, slab, folder)
        n_bytes = turn.sink.file.n_bytes
        print(
            f"{n_bytes / 1e9:.2f} GB, blocks {block}, slabs {slab} of {turn.slabs.nbytes / turn.slabs.npartitions / MIB:.0f} "
            f"MiB, pieces of {np.prod((*block, *slab)) * 2 / 1024:.0f} KiB, {dask.system.CPU_COUNT} threads"
        )
        print(
            f"{'':28} {'s':>7} {'CPU s':>7} {'GB/s':>6} {'calls, x input':>15} {'disk, x input':>14}"
        )
        path = turn.sink.file.path
        found = {
            "transpose": measure("transpose", [old.info.path], n_bytes, turn.run),
            "transposed": measure("read the transposed file", [path], n_bytes, blocks(turn.found.source, block)),
            "scan first": measure("read the scan-first file", [new.info.path], n_bytes, blocks(new.source, block)),
        }  # fmt: skip
        if options.direct:
            some = blocks(old.source, block, options.direct)
            name = f"read {options.direct} blocks directly"
            part = options.direct * int(np.prod((*block, *new.source.shape[2:]))) * 2
            found["direct"] = measure(name, [old.info.path], part, some)
    return found


def write_detector_first(path: Path, source: Source) -> Path:
    """Write the same patterns detector-first, with a few rows of the detector in memory."""
    height, width = source.shape[2:]
    at_once = max(1, height // 16)

    def rows() -> Iterator[np.ndarray]:
        for y in range(0, height, at_once):
            part = source[slice(None), slice(None), slice(y, y + at_once), slice(None)]
            yield from np.ascontiguousarray(part.transpose(2, 3, 0, 1))

    shape, dtype = source.shape[:2], source.dtype
    return write_dm4(path, rows(), shape, (height, width), dtype, swapped=0, detector_first=True)


def blocks(source: Source, block: tuple[int, ...], most: int | None = None) -> Callable[[], None]:
    """A function that reads the blocks of patterns on all threads."""
    places = [
        (slice(y, y + block[0]), slice(x, x + block[1]), slice(None), slice(None))
        for y in range(0, source.shape[0], block[0])
        for x in range(0, source.shape[1], block[1])
    ][:most]

    def read() -> None:
        with ThreadPoolExecutor(dask.system.CPU_COUNT) as pool:
            for _ in pool.map(lambda place: source[place].shape, places):
                pass

    return read


def measure(
    name: str, paths: list[str], n_bytes: int, work: Callable[[], object]
) -> dict[str, float]:
    """Time and bytes of a pass that starts with its files dropped from the cache, where the system allows it."""
    for path in paths:
        drop_cache(Path(path))
    before, cpu, begun = counted(), time.process_time(), time.perf_counter()
    work()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    calls, disk = ((after - old) / n_bytes for after, old in zip(counted(), before, strict=True))
    rate = n_bytes / seconds
    print(
        f"{name:28} {seconds:7.2f} {cpu:7.2f} {rate / 1e9:6.2f} {calls:15.2f} {disk:14.2f}",
        flush=True,
    )
    return {"seconds": seconds, "cpu": cpu, "rate": rate, "calls": calls, "disk": disk}


def counted() -> tuple[int, int]:
    """Bytes that this process has read: by calls, and from the disk; 0 if the system does not count them."""
    try:
        words = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return 0, 0
    return int(words["rchar"]), int(words["read_bytes"])


if __name__ == "__main__":
    main()
