"""Project the memory and disk space of a job before it runs, and refuse jobs that do not fit."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stem_dask.cluster.connect import WORKERS_SHARE, layout, loaded_bytes
from stem_dask.config.options import Config
from stem_dask.core.batches import PIECE_BYTES as READ_PIECE_BYTES
from stem_dask.core.chunks import INNER_CHUNK_BYTES, MIB, PIECE_BYTES, SLAB_BYTES, lead_chunks
from stem_dask.core.errors import NO_ROOM, DiskFullError, MemoryBudgetError
from stem_dask.core.formats import FORMATS, Format
from stem_dask.core.machine import free_bytes as free_memory
from stem_dask.core.machine import machine_bytes, network_file_system, usable_cores
from stem_dask.core.model import USABLE_SHARE, Worker
from stem_dask.core.text import size
from stem_dask.core.window import surplus
from stem_dask.job.summary import tree_bytes
from stem_dask.kernels.analysis import largest_radius
from stem_dask.kernels.downsample import result_dtype, thumbnail_cell
from stem_dask.kernels.gpu import analysis as analysis_on_gpu
from stem_dask.kernels.gpu import crop as crop_on_gpu
from stem_dask.kernels.gpu.buffers import Taken
from stem_dask.kernels.intensity import GROUP
from stem_dask.kernels.pixels import GATHERED
from stem_dask.readers.detector_first import bytes_read, detector_first
from stem_dask.readers.flat import REQUEST_BYTES
from stem_dask.readers.open import Found
from stem_dask.readers.source import reading_of
from stem_dask.stages.analyze import N_THUMBNAILS
from stem_dask.stages.open import block_positions, positions_of_sample
from stem_dask.storage.location import is_url
from stem_dask.writers.torch import signed_dtype

_logger = logging.getLogger("stem_dask")

#: buffers of a batch on its way: as read, cropped, downsampled, in a chunk, encoded
PASSING = 5

#: 8-byte values that the analysis keeps per pattern, in addition to its profile
VALUES_KEPT = 10

#: 8-byte values per pattern in the analysis of a finished crop
VALUES_STORED = 22

#: a detector-first file larger than this share of the machine's memory is transposed first; a smaller one stays in the
#: page cache while its blocks are read, so that nothing is read from the disk twice
CACHED_SHARE = 0.5

#: bytes/s that a batch job is assumed to read and write: each core, and all cores of a node together. At most a tenth of what
#: was measured (benchmarks/README.md), because storage is slower when others use it
CORE_SPEED, NODE_SPEED = 50 * 10**6, 200 * 10**6

#: seconds of a batch job until it reads, and what its wall time is a multiple of
START_SECONDS, WALL_SECONDS = 120, 600

#: memory of the client, next to worker processes
CLIENT_BYTES = 10**9

#: an input larger than this share of the memory that is free to cache it is read once: the second read would come from the disk
ONCE_SHARE = 0.5

#: share of the detector that a window is expected to have before it is chosen
USUAL_WINDOW = 1 / 8

#: memory of cupy and CUDA in a process; an estimate
CUDA_BYTES = 400 * 10**6


@dataclass(frozen=True)
class Footprint:
    """Peak memory of a task of one stage: a fixed part, and a part per scan position of its block."""

    fixed: int
    per_position: int

    def bytes(self, positions: int) -> int:
        """Peak memory for a block of ``positions``."""
        return self.fixed + positions * self.per_position


@dataclass(frozen=True)
class Shapes:
    """Shapes of a job's detector, window and output pattern; the window is the detector until it is ``known``."""

    detector: tuple[int, int]
    window: tuple[int, int]
    out: tuple[int, int]
    dtype: np.dtype
    known: bool
    patterns: np.dtype  # analyzed and cropped

    @property
    def out_bytes(self) -> int:
        """Bytes of one output pattern."""
        return math.prod(self.out) * self.dtype.itemsize


def shapes(config: Config, found: Found, window: Sequence[int] | None = None) -> Shapes:
    """The shapes of a job; ``window`` is the size from the analysis, if there is one."""
    detector = (int(found.source.shape[-2]), int(found.source.shape[-1]))
    down, wanted, known = config.downsample, config.crop.given, True
    if window is not None:
        cut = (int(window[0]), int(window[1]))
    elif wanted is not None:
        cut = (min(wanted[0], detector[0]), min(wanted[1], detector[1]))
    else:
        cut, known = detector, not config.crop.enabled
    patterns = np.dtype(np.float32) if _references(config) else found.source.dtype
    dtype = result_dtype(patterns, down.factor, down.method, down.reduce)
    if config.output.normalize != "none":
        dtype = np.dtype(np.float32)
    if config.output.dtype != "auto":
        dtype = np.dtype(config.output.dtype)
    out = (cut[0] // down.factor, cut[1] // down.factor)
    return Shapes(detector, cut, out, dtype, known, patterns)


def _references(config: Config) -> int:
    """Number of dark and gain files; either makes the patterns float32."""
    return (config.input.dark is not None) + (config.input.gain is not None)


def _formats(config: Config) -> list[Format]:
    """The formats of all outputs; the first is written by the pass, the others are exported from it."""
    first = Path(config.output.path).suffix
    return [FORMATS[suffix] for suffix in (first, *(f".{kind}" for kind in config.output.export))]


def stores_logs(config: Config) -> bool:
    """Whether the output is a store of counts, which also holds means and standard deviations of log(1 + x)."""
    return Path(config.output.path).suffix == ".zarr" and config.output.normalize == "none"


def _analyzes(config: Config) -> bool:
    return config.crop.enabled or config.analyze.ahead


def _surveys(config: Config) -> bool:
    """Whether a sample may be read first."""
    return _analyzes(config) or config.input.mask in ("auto", "stop")


def _kept_bytes(config: Config, what: Shapes) -> int:
    """Bytes that the analysis keeps per pattern: its profile and values."""
    return 4 * (largest_radius(*what.detector, config.analyze.radius_metric) + 1) + 8 * VALUES_KEPT


def memory_of(
    config: Config,
    found: Found,
    window: Sequence[int] | None = None,
    slab: Sequence[int] | None = None,
) -> dict[str, Footprint]:
    """Peak memory of a task of each stage; ``slab`` is the result of `fitting_slab`, if any.

    Patterns pass in batches, so that cropped and encoded ones never exist for a whole block, except where chunks are joined.
    """
    what, source = shapes(config, found, window), found.source
    pixels, out, dtype = math.prod(what.detector), what.out_bytes, source.dtype
    pattern = pixels * dtype.itemsize
    forms = _formats(config)
    reading = reading_of(source)
    held = 0 if reading.in_pieces else pattern * (1 + reading.copies)
    library = reading.library_bytes
    piece = pixels * max(1, READ_PIECE_BYTES // pattern)
    widest = max(kind.itemsize for kind in (dtype, what.patterns, what.dtype))
    fixed = library + PASSING * piece * widest + task_memory(config, what).in_host
    fixed += REQUEST_BYTES * is_url(found.info.path)
    # chunks larger than a batch (those of .zspy), raw and encoded
    fixed += 2 * sum({form.chunk_bytes for form in forms} - {INNER_CHUNK_BYTES})
    if n_references := _references(config):
        fixed += 4 * pixels * (n_references + 3)  # and what reading one takes
    # encoded chunks, and these joined, wait until their block is complete
    kept = 8 + 2 * out * (is_url(config.output.path) or forms[0].is_joined)
    sums = 16 * pattern  # in the widest type, and their results
    logs = 0
    if stores_logs(config):
        # their sum, and those of a few patterns that are not looked up; two values by position
        looked_up = what.dtype.kind != "f" and what.dtype.itemsize <= 2
        at_once = 0 if looked_up else min(GROUP, piece // pixels)
        logs, kept = 8 * math.prod(what.out) * (1 + at_once), kept + 16
    analysis, ahead = _kept_bytes(config, what), config.analyze.ahead
    # a chunk is held compressed and decoded until its part of the block is copied
    decoding = library + 2 * reading.chunk_bytes
    sizes = {
        "read": Footprint(decoding, max(1, held)),
        "crop": Footprint(fixed + 8 * out + logs + sums * ahead, held + kept + analysis * ahead),
    }
    if config.crop.enabled:
        sizes["analyze"] = Footprint(fixed + sums, held + analysis)
    if config.output.export or config.output.normalize != "none":
        # measured with noise: 3 for .pt, .npy and .zspy (compressed shard, decoded shard, patterns), 4 for HDF5 (patterns,
        # compressed chunks, and these joined)
        sizes["export"] = Footprint(0, (4 if any(form.is_joined for form in forms) else 3) * out)
    if slab is not None:
        sizes["turn"] = _transpose_footprint(found, slab)
    return sizes


def _transpose_footprint(found: Found, slab: Sequence[int]) -> Footprint:
    """A task that transposes: its slab, one part of it, gathered rows, and the read buffer."""
    scan, itemsize = math.prod(found.source.shape[:-2]), found.source.dtype.itemsize
    pixels = math.prod(slab)
    return Footprint(pixels * scan * itemsize + REQUEST_BYTES, (pixels + GATHERED) * itemsize)


def projected_bytes(sizes: Mapping[str, Footprint], positions: int, worker: Worker) -> int:
    """Resident memory that a worker needs for blocks of ``positions``."""
    return worker.loaded + worker.threads * max(stage.bytes(positions) for stage in sizes.values())


def most_positions(sizes: Mapping[str, Footprint], room: int) -> int:
    """The most positions of a block that fit into ``room`` bytes; 0 if not even one fits."""
    return max(0, min((room - stage.fixed) // stage.per_position for stage in sizes.values()))


def fitting_block(config: Config, found: Found, worker: Worker) -> tuple[int, ...]:
    """Shape of a block along the scan: from ``output.chunk_mb``, or what the memory allows; MemoryBudgetError if not one pattern."""
    if worker.room is None:
        return block_positions(found, config.output.chunk_mb)
    sizes = memory_of(config, found)
    most = most_positions(sizes, worker.room)
    if most < 1:
        need = projected_bytes(sizes, 1, worker) / USABLE_SHARE
        raise MemoryBudgetError(
            f"a worker with {worker} cannot hold a single pattern: it "
            f"needs {math.ceil(need / 1e6):,} MB; raise cluster.memory_limit, or use fewer threads_per_worker"
        )
    return block_positions(found, config.output.chunk_mb, most)


def check_memory(config: Config, found: Found, block: Sequence[int], worker: Worker) -> int:
    """Projected peak memory of a worker, in bytes; raises MemoryBudgetError with a block size that fits."""
    need = projected_bytes(memory_of(config, found), math.prod(block), worker)
    if worker.limit is None or need <= worker.limit:
        return need
    auto = config.output.model_copy(update={"chunk_mb": "auto"})
    fits = math.prod(fitting_block(config.model_copy(update={"output": auto}), found, worker))
    fits_mib = fits * math.prod(found.source.shape[-2:]) * found.source.dtype.itemsize / MIB
    raise MemoryBudgetError(
        f"a worker would need {size(need)} for blocks of {math.prod(block):,} patterns and has {size(worker.limit)}; "
        f"output.chunk_mb={math.floor(fits_mib * 100) / 100:g} fits, or raise cluster.memory_limit to {math.ceil(need / 1e6)}MB"
    )


def transposed_bytes(found: Found) -> int:
    """Bytes of the intermediate file of a detector-first input that is transposed first, see `CACHED_SHARE`; 0 for any other."""
    stored = detector_first(found.source)
    if stored is None or bytes_read(stored) <= CACHED_SHARE * machine_bytes():
        return 0
    return math.prod(stored.shape) * stored.dtype.itemsize


def passes(config: Config, found: Found, positions: int) -> tuple[int, str]:
    """How often a crop without an earlier analysis reads its input, 1 or 2, and why; no reason where it is read twice as usual.

    ``positions`` are those of a block.
    """
    asked = config.analyze.passes
    if asked == "two":
        return 2, ""
    why = "analyze.passes is one" if asked == "one" else far(found)
    if not why:
        task = max(stage.bytes(positions) for stage in memory_of(config, found).values())
        room = max(0, free_memory() - usable_cores() * task)
        if file_bytes(found) <= ONCE_SHARE * room:
            return 2, ""
        why = (
            f"the input is larger than half of the {size(room)} of memory that are free to cache it"
        )
    if config.device == "gpu":
        return 2, f"{why}, but a GPU is used"
    if transposed_bytes(found):
        return 2, f"{why}, but it is detector-first, and transposed first"
    return 1, why


def far(found: Found) -> str:
    """Says where an input lies that is read over a network; empty for others."""
    if is_url(found.info.path):
        return "the input is in an object store"
    kind = network_file_system(found.info.path)
    return f"the input is on a network file system ({kind})" if kind else ""


def file_bytes(found: Found) -> int:
    """Bytes of what is read of the input: those of the file where it is compressed, of the patterns in a store."""
    return (
        min(found.n_bytes, found.identity[1]) if Path(found.info.path).is_file() else found.n_bytes
    )


def usual_kept_bytes(config: Config, found: Found) -> int:
    """Bytes of the parts of all patterns that are kept for a crop when the input is read once, without compression.

    The window is the usual part of the detector unless it is given.
    """
    what = shapes(config, found)
    sides = list(what.window)
    if config.crop.window is None:
        share = 1.0 if what.known else USUAL_WINDOW**0.5
        own = (math.ceil(share * n) for n in what.window)
        sides = [min(n + 2 * surplus(n), full) for n, full in zip(own, what.detector, strict=True)]
    return math.prod(found.source.shape[:-2]) * math.prod(sides) * what.patterns.itemsize


def fitting_slab(found: Found, block: Sequence[int], worker: Worker) -> tuple[int, ...]:
    """Detector pixels (ky, kx) that one task transposes for the whole scan: 64 to 256 MiB, or what the memory allows."""
    scan, detector = found.source.shape[:-2], found.source.shape[-2:]
    itemsize, positions = found.source.dtype.itemsize, math.prod(block)
    least, most = SLAB_BYTES
    room = 4 * most if worker.room is None else worker.room
    one = _transpose_footprint(found, (1, 1))
    if one.bytes(positions) > room:
        raise MemoryBudgetError(
            f"a worker with {worker} cannot transpose the detector-first input: it needs "
            f"{size(projected_bytes({'turn': one}, positions, worker))} for a single pixel of the detector; "
            "raise cluster.memory_limit, or use fewer threads_per_worker"
        )
    # a piece is as large as its slab at most
    rest = room - REQUEST_BYTES - GATHERED * itemsize * positions
    wanted = min(most, max(least, PIECE_BYTES * (math.prod(scan) // positions)), rest // 2)
    plane_bytes = math.prod(scan) * itemsize
    return lead_chunks(detector, plane_bytes, max(plane_bytes, wanted) / MIB)


def task_memory(config: Config, what: Shapes, positions: int = 2**31) -> Taken:
    """GPU and host memory of one task of each pass, summed because cupy keeps its pool between passes; 0 on the CPU.

    ``positions`` is by default more than a block has, because the buffers do not grow with it.
    """
    down, taken = config.downsample, []
    task = (positions, what.detector, what.patterns)
    if config.device == "gpu" and _analyzes(config):
        taken.append(analysis_on_gpu.ring_bytes(*task, config.analyze.radius_metric))
    if config.device == "gpu" and (config.crop.enabled or down.factor > 1):
        how = down.model_dump(exclude={"sigma"})
        taken.append(crop_on_gpu.ring_bytes(*task, what.window, **how))
    return Taken(sum(task.on_gpu for task in taken), sum(task.in_host for task in taken))


def with_cuda(config: Config, worker: Worker) -> Worker:
    """The worker, with the memory of CUDA if the job runs on a GPU."""
    return replace(worker, loaded=worker.loaded + CUDA_BYTES * (config.device == "gpu"))


@dataclass(frozen=True)
class BatchJob:
    """What to ask a batch system for: cores and GPUs, memory, and time, in which so many bytes are read and written."""

    cores: int
    gpus: int
    memory: int
    seconds: int
    moved: int


def batch_job(config: Config, found: Found, passes: int, cores: int | None = None) -> BatchJob:
    """What a job asks for that runs on one node and reads the input ``passes`` times.

    Without ``cores`` they follow from the workers in the config, else from the cores of this machine and the number of
    blocks. The memory suffices for blocks as large as if there were no limit, or follows from ``cluster.memory_limit``.
    """
    cluster = config.cluster
    kind, workers, threads, limit = layout(cluster, found.n_bytes, config.device, cores)
    worker = Worker(limit if cluster.memory_limit else None, threads, loaded_bytes(kind))
    worker = with_cuda(config, worker)
    block = fitting_block(config, found, worker)
    lead = found.source.shape[:-2]
    n_tasks = math.prod(math.ceil(n / c) for n, c in zip(lead, block, strict=True))
    if cores is None and cluster.n_workers is None and cluster.threads_per_worker is None:
        threads = min(threads, n_tasks)
        workers = min(workers, n_tasks)
    client = 0 if kind == "threads" else CLIENT_BYTES
    if cluster.memory_limit:
        memory = workers * limit + client
    else:
        slab = fitting_slab(found, block, worker) if transposed_bytes(found) else None
        sizes = memory_of(config, found, slab=slab)
        need = projected_bytes(sizes, math.prod(block), replace(worker, threads=threads))
        memory = math.ceil(workers * need / (WORKERS_SHARE * USABLE_SHARE)) + client
    moved = passes * found.n_bytes + 2 * disk_need(config, found, n_tasks).most
    seconds = START_SECONDS + moved / min(workers * threads * CORE_SPEED, NODE_SPEED)
    gpus = workers * (config.device == "gpu")
    wall = math.ceil(seconds / WALL_SECONDS) * WALL_SECONDS
    return BatchJob(workers * threads, gpus, memory, wall, moved)


@dataclass(frozen=True)
class DiskNeed:
    """Lower bound (however well the data compress) and upper bound of the bytes that a job writes."""

    least: int
    most: int


def disk_need(
    config: Config,
    found: Found,
    n_blocks: int,
    window: Sequence[int] | None = None,
    kept: int = 0,
) -> DiskNeed:
    """Bytes that a job writes, including intermediate files; .pt and per-pattern results are not compressed.

    ``kept`` are those of `usual_kept_bytes`, or what is known of them, if the input is read once.
    """
    what = shapes(config, found, window)
    n, out = math.prod(found.source.shape[:-2]), math.prod(what.out)
    patterns, n_sums = n * what.out_bytes, 1 + stores_logs(config)
    stored = n * 8 + n_blocks * 8 * out * n_sums if what.known else 0
    stored += 16 * n * stores_logs(config)
    if _analyzes(config):
        stored += n * _kept_bytes(config, what)
        stored += n_blocks * math.prod(what.detector) * (8 + what.patterns.itemsize)
        cell = thumbnail_cell(what.detector)
        stored += min(n, N_THUMBNAILS) * math.prod(side // cell for side in what.detector)
    sample = 0
    if _surveys(config):
        pattern = math.prod(what.detector) * what.patterns.itemsize
        sample = math.prod(map(len, positions_of_sample(found))) * pattern
    transposed = transposed_bytes(found)
    least = transposed + stored + sample
    most = least + stored + kept + _analyzes(config) * 8 * n * (VALUES_STORED - VALUES_KEPT)
    if config.output.normalize != "none":
        most += n * out * what.patterns.itemsize  # the counts wait in a store
    # the first output may be in an object store
    for form in _formats(config)[is_url(config.output.path) :]:
        most += form.disk * patterns
        if what.known and form == FORMATS[".npy"]:
            least += patterns
        elif what.known and form == FORMATS[".pt"]:
            least += patterns * signed_dtype(what.dtype).itemsize // what.dtype.itemsize
    return DiskNeed(least, most)


@contextlib.contextmanager
def enough_room(
    folder: Path, need: DiskNeed, names: Sequence[str], *, warn: bool = False
) -> Iterator[None]:
    """Check the disk in ``folder`` before the work inside; a full disk raises DiskFullError with the remaining need.

    ``names`` are existing files and folders of the run, whose bytes are not needed again.
    """

    def left(bound: int) -> int:  # holes of sparse files do not count
        return max(0, bound - sum(tree_bytes(name, holes=False) for name in names))

    def words() -> str:
        most = left(need.most)
        return (
            f"the job writes up to {size(most)} more ({most:,} bytes) in {folder}, which has {size(free_bytes(folder))} "
            "free; make room, and the same command goes on"
        )

    free, least = free_bytes(folder), left(need.least)
    if free < least:
        raise DiskFullError(
            f"at least {size(least)} more are needed: {words()}. Or write elsewhere (output.path), or export less "
            "(output.export)"
        )
    if warn and free < left(need.most):
        _logger.warning("the disk may become full: %s", words())
    try:
        yield
    except OSError as error:
        if not isinstance(error, DiskFullError) and error.errno not in NO_ROOM:
            raise
        raise DiskFullError(f"{error}; {words()}") from error


def free_bytes(folder: Path) -> int:
    """Free space at a folder that exists or will be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
