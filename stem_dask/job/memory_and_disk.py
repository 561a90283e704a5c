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

from stem_dask.config.options import Config
from stem_dask.core.batches import PIECE_BYTES as READ_PIECE_BYTES
from stem_dask.core.chunks import FILE_CHUNK_BYTES, MIB, PIECE_BYTES, SLAB_BYTES, lead_chunks
from stem_dask.core.errors import NO_ROOM, DiskFullError, MemoryBudgetError
from stem_dask.core.machine import machine_bytes
from stem_dask.core.model import USABLE_SHARE, Worker
from stem_dask.core.text import size
from stem_dask.core.window import axis_window
from stem_dask.kernels.analysis import largest_radius
from stem_dask.kernels.downsample import result_dtype
from stem_dask.kernels.gpu import analysis as analysis_on_gpu
from stem_dask.kernels.gpu import crop as crop_on_gpu
from stem_dask.kernels.gpu.buffers import Taken
from stem_dask.kernels.transpose import GATHERED
from stem_dask.readers.arrays import Hdf5Dataset
from stem_dask.readers.batches import is_read_in_pieces
from stem_dask.readers.detector_first import READ_BYTES, detector_first
from stem_dask.readers.flat import REQUEST_BYTES
from stem_dask.readers.mib import RawCounts
from stem_dask.readers.open import Found
from stem_dask.readers.source import Source, Wrapped
from stem_dask.readers.topspin import PatternGroups
from stem_dask.readers.views import ScanOfList, View
from stem_dask.report.text import tree_bytes
from stem_dask.stages.open import block_positions
from stem_dask.storage.location import is_url
from stem_dask.writers.torch import signed_dtype

_logger = logging.getLogger("stem_dask")

#: upper bound of a file's size, relative to its patterns: unsigned counts may need twice as much in a .pt, and HDF5
#: exists twice while it is assembled
FILE_TAKES = {"zarr": 1, "zspy": 1, "npy": 1, "pt": 2, "hspy": 2, "h5": 2}

#: memory of HDF5 with all its filters in a worker that reads it; measured: 26 to 41 MB
HDF5_BYTES = 30 * 10**6

#: buffers of a batch on its way: as read, cropped, downsampled, in a chunk, encoded
PASSING = 5

#: 8-byte values that the analysis keeps per pattern, in addition to its profile
VALUES_KEPT = 8

#: a detector-first file larger than this share of the machine's memory is transposed first; a smaller one stays in the
#: page cache while its blocks are read, so that nothing is read from the disk twice
CACHED_SHARE = 0.5


def task_bytes(lead_chunk: Sequence[int], *pattern_bytes: int) -> int:
    """Bytes that one task moves: its block, times the sum of the pattern sizes."""
    return math.prod(lead_chunk) * sum(pattern_bytes)


@dataclass(frozen=True)
class Footprint:
    """Peak memory of a task of one stage: a fixed part, and a part per scan position of its block."""

    fixed: int
    per_position: int

    def bytes(self, positions: int) -> int:
        """Peak memory for a block of ``positions``."""
        return self.fixed + positions * self.per_position


def footprints(
    source: int,
    out: int,
    *,
    copies: int,
    result: int,
    cropped: bool,
    exported: bool = True,
    packed: bool = True,
    waiting: int = 0,
    analyzes: bool = False,
    in_pieces: bool = False,
    fixed: int = 0,
) -> dict[str, Footprint]:
    """Peak memory of a task of each stage.

    Patterns pass in batches from the source to the file, so that cropped, downsampled and encoded patterns never exist
    for a whole block, except for ``waiting``.

    Parameters
    ----------
    source, out : bytes of one pattern as read, and as stored
    copies : how often a block is copied while it is read, to reorder its axes
    result : bytes that the analysis keeps per pattern
    cropped : whether an analysis pass precedes the pass that writes
    exported : whether the store is read again, to export or to normalize
    packed : whether one of the exports is HDF5, whose blocks are compressed as a whole
    waiting : bytes per pattern that are kept until the block is complete
    analyzes : whether the pass that writes also analyzes
    in_pieces : whether patterns are read in batches, so that no raw block is held
    fixed : bytes that a task needs independent of its block, such as dark, gain and batches

    Examples
    --------
    >>> sizes = footprints(131072, 2048, copies=0, result=600, cropped=True, in_pieces=True, fixed=2**20)
    >>> sizes["crop"].bytes(512) / 2**20, sizes["analyze"].bytes(512) / 2**20
    (1.01953125, 3.29296875)
    """
    read = 0 if in_pieces else source * (1 + copies)
    sums = 16 * source  # in the widest type, and their results
    kept = 8 + waiting + result * analyzes
    found = {"crop": Footprint(fixed + 8 * out + sums * analyzes, read + kept)}
    if cropped:
        found["analyze"] = Footprint(fixed + sums, read + result)
    if exported:
        # measured with noise: 3 for .pt, .npy and .zspy (compressed shard, decoded shard, patterns), 4 for HDF5 (patterns,
        # compressed chunks, and these joined)
        found["export"] = Footprint(0, (4 if packed else 3) * out)
    return found


def transpose_footprint(
    slab_pixels: int, scan: int, itemsize: int, gathered: int, read: int
) -> Footprint:
    """Peak memory of a task that transposes a slab: the slab, one part of it, gathered rows, and the read buffer.

    Parameters
    ----------
    slab_pixels, scan : pixels of the detector in a slab, positions of the whole scan
    itemsize : bytes of a pixel
    gathered : pixels that are gathered before they are transposed
    read : bytes of one read where only a part of each scan is needed

    Examples
    --------
    >>> transpose_footprint(1024, 256 * 256, 2, 128, 0).bytes(512) / 2**20
    129.125
    """
    return Footprint(slab_pixels * scan * itemsize + read, (slab_pixels + gathered) * itemsize)


def projected_bytes(sizes: Mapping[str, Footprint], positions: int, worker: Worker) -> int:
    """Resident memory that a worker needs for blocks of ``positions``."""
    return worker.loaded + worker.threads * max(stage.bytes(positions) for stage in sizes.values())


def most_positions(sizes: Mapping[str, Footprint], room: int) -> int:
    """The most positions of a block that fit into ``room`` bytes; 0 if not even one fits."""
    return max(0, min((room - stage.fixed) // stage.per_position for stage in sizes.values()))


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
    given = _given_window(config, detector) if window is None else (int(window[0]), int(window[1]))
    cut = given or detector
    down = config.downsample
    patterns = found.source.dtype
    if _references(config):
        patterns = np.dtype(np.float32)
    dtype = result_dtype(patterns, down.factor, down.method, down.reduce)
    if config.output.normalize != "none":
        dtype = np.dtype(np.float32)
    if config.output.dtype != "auto":
        dtype = np.dtype(config.output.dtype)
    out = (cut[0] // down.factor, cut[1] // down.factor)
    return Shapes(detector, cut, out, dtype, given is not None, patterns)


def memory_of(
    config: Config,
    found: Found,
    window: Sequence[int] | None = None,
    slab: Sequence[int] | None = None,
) -> dict[str, Footprint]:
    """Peak memory of a task of each stage, see `footprints`; ``slab`` is the result of `fitting_slab`, if any."""
    what, dtype = shapes(config, found, window), found.source.dtype
    pixels = math.prod(what.detector)
    radii = largest_radius(*what.detector, config.analyze.radius_metric) + 1
    references = _references(config)
    reads, stored = _read_copies(found.source), _stored(found.source)
    library = HDF5_BYTES * isinstance(stored, (Hdf5Dataset, PatternGroups))
    in_pieces = is_read_in_pieces(found.source)
    piece = pixels * max(1, READ_PIECE_BYTES // (pixels * dtype.itemsize))
    widest = max(kind.itemsize for kind in (dtype, what.patterns, what.dtype))
    sizes = footprints(
        pixels * dtype.itemsize,
        what.out_bytes,
        copies=reads,
        fixed=library
        + REQUEST_BYTES * is_url(found.info.path)
        + PASSING * piece * widest
        + task_memory(config, what).in_host
        + _filled_chunk(config)
        + (4 * pixels * (references + 3) if references else 0),  # and what reading one takes
        result=4 * radii + 8 * VALUES_KEPT,
        cropped=config.crop.enabled,
        exported=bool(config.output.export) or config.output.normalize != "none",
        packed=not {"hspy", "h5"}.isdisjoint(_kinds(config)),
        waiting=_waiting(config, what),
        analyzes=config.analyze.ahead,
        in_pieces=in_pieces,
    )
    # a chunk is held compressed and decoded until its part of the block is copied
    decoding = library + 2 * getattr(stored, "chunk_bytes", 0)
    transposing = {} if slab is None else {"turn": _transpose_footprint(found, slab)}
    held = 0 if in_pieces else pixels * dtype.itemsize * (1 + reads)
    return {"read": Footprint(decoding, max(1, held)), **sizes, **transposing}


def _waiting(config: Config, what: Shapes) -> int:
    """Bytes per pattern that a task keeps until its block is complete: encoded chunks, and these joined."""
    joined = is_url(config.output.path) or Path(config.output.path).suffix in (".hspy", ".h5")
    return 2 * what.out_bytes * joined


def _filled_chunk(config: Config) -> int:
    """Bytes of a .zspy chunk, raw and encoded; the chunks of all other formats are smaller than a batch."""
    return 2 * FILE_CHUNK_BYTES * ("zspy" in _kinds(config))


def _kinds(config: Config) -> tuple[str, ...]:
    """The suffixes of all outputs."""
    return (Path(config.output.path).suffix[1:], *config.output.export)


def fitting_block(config: Config, found: Found, worker: Worker) -> tuple[int, ...]:
    """Shape of a block along the scan: from ``output.chunk_mb``, or as large as the memory allows.

    Raises
    ------
    MemoryBudgetError
        If one pattern does not fit into a worker's memory.
    """
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


def transposed_bytes(found: Found) -> int:
    """Bytes of the intermediate file of an input that is transposed first; 0 if blocks are read directly.

    A detector-first file is transposed if the bytes to read exceed `CACHED_SHARE` of the machine's memory.
    """
    stored = detector_first(found.source)
    if stored is None or stored.bytes_read <= CACHED_SHARE * machine_bytes():
        return 0
    return math.prod(stored.shape) * stored.dtype.itemsize


def fitting_slab(found: Found, block: Sequence[int], worker: Worker) -> tuple[int, ...]:
    """Detector pixels (ky, kx) that one task transposes for the whole scan: 64 to 256 MiB, or what the memory allows.

    Raises
    ------
    MemoryBudgetError
        If one detector pixel of the whole scan does not fit into a worker's memory.
    """
    stored = detector_first(found.source)
    assert stored is not None
    scan, detector = stored.shape[2:], stored.shape[:2]
    plane_bytes = math.prod(scan) * found.source.dtype.itemsize
    least, most = SLAB_BYTES
    room = 4 * most if worker.room is None else worker.room
    one = _transpose_footprint(found, (1, 1))
    if one.bytes(math.prod(block)) > room:
        raise MemoryBudgetError(
            f"a worker with {worker} cannot transpose the detector-first input: it needs "
            f"{size(projected_bytes({'turn': one}, math.prod(block), worker))} for a single pixel of the detector; "
            "raise cluster.memory_limit, or use fewer threads_per_worker"
        )
    # a piece is as large as its slab at most
    rest = room - READ_BYTES - GATHERED * found.source.dtype.itemsize * math.prod(block)
    n_blocks = math.prod(scan) // math.prod(block)
    wanted = min(most, max(least, PIECE_BYTES * n_blocks), rest // 2)
    slab_mb = max(plane_bytes, wanted) / MIB
    return lead_chunks(detector, plane_bytes, slab_mb)


def _transpose_footprint(found: Found, slab: Sequence[int]) -> Footprint:
    scan, itemsize = math.prod(found.source.shape[:-2]), found.source.dtype.itemsize
    return transpose_footprint(math.prod(slab), scan, itemsize, GATHERED, READ_BYTES)


def check_memory(config: Config, found: Found, block: Sequence[int], worker: Worker) -> int:
    """Projected peak memory of a worker, in bytes.

    Raises
    ------
    MemoryBudgetError
        If it exceeds the memory of a worker; the message has a block size that fits.
    """
    sizes = memory_of(config, found)
    need = projected_bytes(sizes, math.prod(block), worker)
    if worker.limit is None or need <= worker.limit:
        return need
    pattern_bytes = math.prod(found.source.shape[-2:]) * found.source.dtype.itemsize
    auto = config.model_copy(
        update={"output": config.output.model_copy(update={"chunk_mb": "auto"})}
    )
    fits = math.prod(fitting_block(auto, found, worker)) * pattern_bytes / MIB
    raise MemoryBudgetError(
        f"a worker would need {size(need)} for blocks of {math.prod(block):,} patterns and has {size(worker.limit)}; "
        f"output.chunk_mb={math.floor(fits * 100) / 100:g} fits, or raise cluster.memory_limit to {math.ceil(need / 1e6)}MB"
    )


@dataclass(frozen=True)
class DiskNeed:
    """Lower bound (however well the data compress) and upper bound of the bytes that a job writes."""

    least: int
    most: int


def disk_need(
    config: Config, found: Found, n_blocks: int, window: Sequence[int] | None = None
) -> DiskNeed:
    """Bytes that a job writes, including intermediate files; .pt and per-pattern results are not compressed."""
    what = shapes(config, found, window)
    n = math.prod(found.source.shape[:-2])
    patterns = n * what.out_bytes
    kept = n * 8 + n_blocks * 8 * math.prod(what.out) if what.known else 0
    if config.crop.enabled or config.analyze.ahead:
        radii = largest_radius(*what.detector, config.analyze.radius_metric) + 1
        itemsize = what.patterns.itemsize
        kept += n * (4 * radii + 8 * VALUES_KEPT)
        kept += n_blocks * math.prod(what.detector) * (8 + itemsize)
    again = (
        kept if config.input.mask == "auto" else 0
    )  # a second analysis, when there are hot pixels
    transposed = transposed_bytes(found)
    least, most = transposed + kept, transposed + 2 * kept + again
    if config.output.normalize != "none":
        most += n * math.prod(what.out) * what.patterns.itemsize  # the counts wait in a store
    here = [] if is_url(config.output.path) else [Path(config.output.path).suffix[1:]]
    for kind in (*here, *config.output.export):
        most += FILE_TAKES[kind] * patterns
        least += patterns * what.known * (kind == "npy")
        if kind == "pt":
            wide = signed_dtype(what.dtype).itemsize
            least += patterns * what.known * wide // what.dtype.itemsize
    return DiskNeed(least, most)


def check_disk(folder: Path, need: DiskNeed, written: int = 0) -> bool:
    """Compare a need with the free space; returns whether the upper bound fits.

    Parameters
    ----------
    folder : where the outputs are, or will be
    need : result of `disk_need`
    written : bytes of it that exist already

    Raises
    ------
    DiskFullError
        If even the lower bound does not fit.
    """
    free = free_bytes(folder)
    least, most = (max(0, n - written) for n in (need.least, need.most))
    if free < least:
        raise DiskFullError(
            f"at least {size(least)} more are needed: {disk_words(folder, most)}. Or write elsewhere (output.path), or "
            "export less (output.export)"
        )
    return free >= most


def disk_words(folder: Path, need: int) -> str:
    """Message with the remaining need and the free space."""
    return (
        f"the job writes up to {size(need)} more ({need:,} bytes) in {folder}, which has {size(free_bytes(folder))} "
        "free; make room, and the same command goes on"
    )


@contextlib.contextmanager
def enough_room(
    folder: Path, need: DiskNeed, names: Sequence[str], *, warn: bool = False
) -> Iterator[None]:
    """Check the disk before the work inside; an error of a full disk is raised with the remaining need.

    Parameters
    ----------
    folder, need : see `check_disk`
    names : existing files and folders of the run
    warn : log a warning if the upper bound does not fit
    """
    written = _bytes_there(names)
    if not check_disk(folder, need, written) and warn:
        _logger.warning("the disk may become full: %s", disk_words(folder, need.most - written))
    try:
        yield
    except OSError as error:
        if not isinstance(error, DiskFullError) and error.errno not in NO_ROOM:
            raise
        left = max(0, need.most - _bytes_there(names))
        raise DiskFullError(f"{error}; {disk_words(folder, left)}") from error


def _bytes_there(names: Sequence[str]) -> int:
    """Bytes on disk of files and folders; holes of sparse files do not count."""
    return sum(tree_bytes(name, holes=False) for name in names)


def free_bytes(folder: Path) -> int:
    """Free space at a folder that exists or will be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _references(config: Config) -> int:
    """Number of dark and gain files; either makes the patterns float32."""
    return (config.input.dark is not None) + (config.input.gain is not None)


def _given_window(config: Config, detector: tuple[int, int]) -> tuple[int, int] | None:
    """The window's size if the config gives it."""
    if not config.crop.enabled:
        return detector
    wanted = config.crop.given
    if wanted is None:
        return None
    multiple = config.crop.size_multiple * config.downsample.factor
    height, width = (
        axis_window(n, full, multiple)[0] for n, full in zip(wanted, detector, strict=True)
    )
    return (height, width)


def _stored(source: Source) -> Source:
    """The array in the file, without its wrappers."""
    while isinstance(source, Wrapped):
        source = source.source
    return source


def _read_copies(source: Source) -> int:
    """How often a block is copied while it is read: when its axes are put in order, transposed, or put together."""
    n = 0
    while isinstance(source, Wrapped):
        n += isinstance(source, (ScanOfList, RawCounts))
        if isinstance(source, View):
            n += source.transposed + source.flipped
        source = source.source
    return n


#: memory of cupy and CUDA in a process; an estimate
CUDA_BYTES = 400 * 10**6

#: more patterns than a block has: the buffers do not grow with it
MANY = 2**31


def task_memory(config: Config, what: Shapes, positions: int = MANY) -> Taken:
    """GPU and host memory of one task of each pass, summed because cupy keeps its pool between passes; 0 on the CPU.

    Parameters
    ----------
    what : of the job's patterns
    positions : patterns of a block
    """
    analyze, crop, down = config.analyze, config.crop, config.downsample
    detector, dtype, taken = what.detector, what.patterns, []
    if config.device == "gpu" and (crop.enabled or analyze.ahead):
        metric = analyze.radius_metric
        taken.append(analysis_on_gpu.ring_bytes(positions, detector, dtype, metric))
    if config.device == "gpu" and (crop.enabled or down.factor > 1):
        how = down.model_dump(exclude={"sigma"})
        taken.append(crop_on_gpu.ring_bytes(positions, detector, dtype, what.window, **how))
    return Taken(sum(task.on_gpu for task in taken), sum(task.in_host for task in taken))


def with_cuda(config: Config, worker: Worker) -> Worker:
    """The worker, with the memory of CUDA if the job runs on a GPU."""
    if config.device != "gpu":
        return worker
    return replace(worker, loaded=worker.loaded + CUDA_BYTES)
