"""Limits of the machine: bandwidths of memory, disk and codecs, and the minimum time of a row.

The bound includes only the work that every implementation must do: the cores read the input into a buffer that fits the
cache and encode the output; the disk stores the output, or provides cold input. Cores and disk may work concurrently.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from benchmarks.rows import JobResult, Row

MIB = 2**20
#: size of the file that measures the disk's bandwidth
WRITTEN_BYTES = 256 * MIB
#: most bytes of patterns that a codec is timed on
SAMPLE_BYTES = 16 * MIB


@dataclass(frozen=True)
class Machine:
    """Bandwidths in bytes per second."""

    cores: int
    read: float  # of all cores together, warm, into a reused buffer of 1 MiB
    read_cold: float
    write: float  # with fsync


@dataclass(frozen=True)
class Limit:
    """Minimum seconds of a row, and of its parts if each had the machine alone."""

    seconds: float
    read: float
    encode: float
    write: float


def machine(source: Path, cores: int, written_bytes: int = WRITTEN_BYTES) -> Machine:
    """Measure the bandwidths; afterwards the file is in the page cache."""
    size = source.stat().st_size
    drop_cache(source)
    cold = size / _seconds(lambda: read_part(source, 0, size))
    warm = max(size / _seconds(lambda: _read_together(source, cores)) for _ in range(3))
    return Machine(cores, warm, cold, _write_bandwidth(source.parent, written_bytes))


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def drop_cache(path: Path) -> None:
    """Drop a file from the page cache where the system allows it (Linux does)."""
    os.sync()  # otherwise pending writes would slow what follows
    handle = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def read_part(path: Path, start: int, stop: int) -> None:
    """Read a part of a file through a buffer of 1 MiB."""
    buffer = memoryview(bytearray(MIB))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        left = stop - start
        while left > 0:
            n = file.readinto(buffer[: min(MIB, left)])
            if not n:
                return
            left -= n


def _read_together(path: Path, cores: int) -> None:
    edges = np.linspace(0, path.stat().st_size, cores + 1).astype(int)
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(lambda i: read_part(path, edges[i], edges[i + 1]), range(cores)))


def _write_bandwidth(folder: Path, n_bytes: int) -> float:
    piece = np.random.default_rng(0).bytes(MIB)
    with tempfile.NamedTemporaryFile(dir=folder) as file:

        def write() -> None:
            for _ in range(n_bytes // MIB):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

        return n_bytes // MIB * MIB / _seconds(write)


def encode_bandwidth(patterns: NDArray, codec: str) -> float:
    """Bytes of patterns that one core encodes per second, best of three.

    Parameters
    ----------
    patterns : (n, ky, kx), a sample of the output
    codec : ``lz4`` (blosc, in chunks of 1 MiB), ``gzip`` (level 4 after a shuffle of bytes), or ``none``
    """
    if codec == "none":
        return float("inf")
    from stem_dask.writers.codecs import blosc_bytes, bytes_apart, deflated, shuffle_of

    def encode(chunk: NDArray) -> object:
        if codec == "gzip":
            return deflated(bytes_apart(chunk), 4)
        return blosc_bytes(chunk, codec, shuffle_of(chunk.dtype))

    many = max(1, MIB // max(1, patterns[0].nbytes))
    chunks = [np.ascontiguousarray(patterns[i : i + many]) for i in range(0, len(patterns), many)]
    best = min(_seconds(lambda: [encode(chunk) for chunk in chunks]) for _ in range(3))
    return patterns.nbytes / best


def limit_of(row: Row, result: JobResult, found: Machine, sample: NDArray) -> Limit:
    """Minimum seconds of a row on this machine.

    Parameters
    ----------
    result : sizes of input and output
    sample : (n, ky, kx), patterns of the output
    """
    warm = (row.reads - row.cold) * result.input_bytes / found.read
    cold = result.input_bytes / found.read_cold if row.cold else 0.0
    if row.codec is None:
        return Limit(warm + cold, warm + cold, 0.0, 0.0)
    encode = result.output_bytes / encode_bandwidth(sample, row.codec) / found.cores
    write = result.stored_bytes / found.write
    # the second pass depends on the first, so a cold first read adds to the total
    return Limit(cold + max(warm + encode, write), warm + cold, encode, write)


def loading_parts(store: Path, batch: int) -> dict[str, Callable[[], int]]:
    """What every loader of shuffled batches must do, into buffers that are used again; each part returns its number of patterns.

    ``store`` is a .zarr of stem_dask, lz4.
    """
    import google_crc32c
    import imagecodecs
    import zarr

    array: Any = zarr.open_array(store / "patterns", mode="r")
    chunks, n = [], prod(array.shards) // prod(array.chunks)
    for shard in (store / "patterns").glob("c.*"):
        content = shard.read_bytes()
        # at the end, offsets and sizes, and a checksum of 4 bytes, as behind each chunk
        places = np.frombuffer(content[-16 * n - 4 : -4], "<u8").reshape(n, 2).tolist()
        chunks += [content[at : at + size - 4] for at, size in places]
    buffer = np.empty(prod(array.chunks) * 2, np.uint8)
    patterns = array[:].reshape(-1, prod(array.shape[-2:]))
    rows = np.random.default_rng(0).permutation(min(len(patterns), 2**25 // patterns[0].nbytes))
    table, out = np.log1p(np.arange(2**16, dtype="f4")), np.empty((batch, patterns.shape[1]), "f4")

    def gather() -> int:
        for at in range(0, len(rows), batch):
            _gather(patterns, rows[at : at + batch], table, out)
        return len(rows)

    def each(work: Callable[[bytes], Any]) -> Callable[[], int]:
        return lambda: [work(chunk) for chunk in chunks] and len(patterns)

    decode = each(lambda chunk: imagecodecs.blosc_decode(chunk, out=buffer, numthreads=1))
    return {
        "limit: decode": decode,
        "limit: checksum": each(google_crc32c.value),
        "limit: gather": gather,
    }


@numba.njit
def _gather(patterns, rows, table, out):  # type: ignore[no-untyped-def]
    for i in range(rows.size):
        pattern, to = patterns[rows[i]], out[i]
        for j in range(pattern.size):
            to[j] = table[pattern[j]]
