"""The state that the passes of one run share."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.cluster.connect import Connection
from stem_dask.cluster.gpu import check_gpus, held_bytes, refuse_missing
from stem_dask.config.options import Config
from stem_dask.core.errors import SourceError, StoreError
from stem_dask.core.model import Device, Progress, Step, Window, Worker
from stem_dask.core.patterns import lead_dims, lead_shape
from stem_dask.engine import run as engine
from stem_dask.engine.clients import see
from stem_dask.engine.records import Tally
from stem_dask.engine.state import RunState
from stem_dask.job.memory_and_disk import (
    check_memory,
    disk_need,
    enough_room,
    fitting_block,
    memory_of,
    projected_bytes,
    shapes,
    task_memory,
    with_cuda,
)
from stem_dask.job.outputs import Outputs
from stem_dask.job.prepare import Prepared
from stem_dask.job.transpose import needed_transpose
from stem_dask.job.warm_up import reach, rehearse
from stem_dask.kernels.gpu.code import Kernels
from stem_dask.readers.detector_first import detector_first
from stem_dask.report import text as report
from stem_dask.stages.correct import apply_mask, corrected, read_mask
from stem_dask.stages.open import lazy_blocks
from stem_dask.storage.location import is_url
from stem_dask.storage.publish import temporary

#: kinds of clusters whose workers always run on this machine
HERE = ("threads", "local", "gpu")


@dataclass
class Job:
    """One run: options, cluster, journal, and what the passes have found so far."""

    prepared: Prepared
    connection: Connection
    state: RunState
    progress: Progress | None = None
    warnings: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    #: [y, x] of suspected hot pixels
    hot: list[list[int]] = field(default_factory=list)
    #: (ky, kx) in source pixels, True for a bad one
    mask: NDArray[np.bool_] | None = None
    #: detector pixels of one transpose task, of a detector-first input
    slab: tuple[int, int] | None = None
    #: whether blocks are read directly from a detector-first file
    detector_first: bool = False
    #: mean and standard deviation, of a run that normalizes
    constants: dict[str, float] | None = None
    #: seconds from the first submission until every pattern is analyzed; None without an analysis pass
    analyzed_after: float | None = None

    @property
    def config(self) -> Config:
        """All options."""
        return self.prepared.config

    @property
    def device(self) -> Device:
        """Where the kernels run; `stem_dask.job.prepare.prepare` resolves ``auto``."""
        return "gpu" if self.config.device == "gpu" else "cpu"

    @property
    def title(self) -> str:
        """Title of the outputs: the title of the input, else its name."""
        return self.prepared.found.info.title

    @property
    def worker(self) -> Worker:
        """The worker with the least memory per thread."""
        return with_cuda(self.config, self.connection.worker)

    @property
    def outputs(self) -> Outputs:
        """The names of the files."""
        return self.prepared.outputs

    @property
    def folder(self) -> str:
        """The folder of the unfinished run, next to its output."""
        return str(self.state.folder)

    def block(self) -> tuple[int, ...]:
        """Scan positions of a block, fixed for the whole run; raises MemoryBudgetError if a worker cannot hold it."""
        worker = self.worker
        block = fitting_block(self.config, self.prepared.found, worker)
        block = tuple(self.state.settled("block", block))
        check_memory(self.config, self.prepared.found, block, worker)
        if self.device == "gpu":
            check_gpus(self.connection.client, self._on_gpu(math.prod(block)))
        return block

    def _on_gpu(self, positions: int, window: Sequence[int] | None = None) -> int:
        """Upper bound of the GPU memory that the tasks of one worker use, in bytes."""
        what = shapes(self.config, self.prepared.found, window)
        return self.worker.threads * task_memory(self.config, what, positions).on_gpu

    def rehearse(self) -> None:
        """Import and compile on the workers what their tasks need; raises MemoryBudgetError if one pattern does not fit."""
        config = self.config
        fitting_block(config, self.prepared.found, self.worker)
        analyzes = config.crop.enabled or config.analyze.ahead
        corrects = config.input.dark is not None or config.input.gain is not None
        kept = rehearse(
            self.connection.client,
            np.dtype(np.float32) if corrects else self.prepared.found.source.dtype,
            metric=config.analyze.radius_metric if analyzes else None,
            bins=config.downsample.factor > 1 and config.downsample.method == "bin",
            on_gpu=None if self.device == "cpu" else self._kernels(),
            owned=self.connection.owned,
        )
        if not kept:
            self.warnings.append(
                "kernels are compiled again in every process, for 10 to 20 s: neither the folder of stem_dask nor the user's "
                "cache can be written; set NUMBA_CACHE_DIR to a folder that only you can write"
            )
        places: dict[str, type[SourceError] | type[StoreError]]
        places = {self.prepared.found.info.path: SourceError, self.outputs.store: StoreError}
        reach(self.connection.client, {at: kind for at, kind in places.items() if is_url(at)})
        if not self.connection.kind.startswith(HERE):
            places = {self.prepared.found.info.path: SourceError, self.folder: StoreError}
            see(self.connection.client, {at: k for at, k in places.items() if not is_url(at)})

    def _kernels(self) -> Kernels:
        """The kernels to compile for the workers' GPUs."""
        config, what = self.config, shapes(self.config, self.prepared.found)
        refuse_missing(self.connection.client)
        analyzes = config.crop.enabled or config.analyze.ahead
        options = config.downsample.model_dump(exclude={"sigma"})
        return Kernels(
            what.patterns,
            what.detector,
            config.analyze.threshold,
            config.analyze.radius_metric if analyzes else None,
            options if config.crop.enabled or options["factor"] > 1 else None,
        )

    def patterns(self, block: Sequence[int]) -> xr.DataArray:
        """The lazy input: transposed if necessary, corrected, bad pixels masked."""
        options, found = self.config.input, self.prepared.found
        turn = needed_transpose(found, block, self.connection, self.folder)
        if turn is not None:
            found, self.slab = turn.found, turn.slab
            with self.room(lazy_blocks(found, block), None):
                progress = self.reporter("turn", turn.sink.file.n_bytes)
                self.tally.note(turn.run(self.connection.client, progress, self.state.journal))
            self.refuse_changed_input()
        self.detector_first = detector_first(found.source) is not None
        lazy = corrected(lazy_blocks(found, block), options.dark, options.gain)
        if "valid" in lazy.coords:  # patterns that an earlier run could not read stay missing
            self.tally.lost = ~lazy.coords["valid"].values
        mask = None if options.mask == "auto" else options.mask  # found by the analysis
        listed = mask if mask is None or isinstance(mask, str) else mask.model_dump()
        return self.masked(lazy, listed)

    def masked(self, patterns: xr.DataArray, mask: str | Mapping[str, Any] | None) -> xr.DataArray:
        """Mask bad pixels, and keep the mask."""
        if mask is None:
            return patterns
        self.mask = read_mask(mask, patterns.shape[-2:])
        return apply_mask(patterns, self.mask, self.config.input.mask_fill)

    def compute(
        self,
        stage: str,
        outputs: Mapping[str, da.Array],
        like: xr.DataArray,
        sink: engine.Sink,
    ) -> None:
        """Run the lazy outputs of one stage into a sink; ``like`` has the same blocks."""
        try:
            records = engine.run(
                outputs,
                len(lead_dims(like)),
                sink,
                client=self.connection.client,
                progress=self.reporter(stage, self.prepared.found.n_bytes),
                journal=self.state.journal,
                job=stage,
                quarantine=self.config.on_error == "quarantine",
                unreadable=self.tally.unreadable,
            )
        except SourceError as error:
            self.refuse_changed_input()
            hint = "the same command goes on when it can be read, or with on_error=quarantine without it"
            raise SourceError(f"{self.with_path(error)}; {hint}") from error
        self.refuse_changed_input()
        self.tally.note(records)

    def refuse_changed_input(self) -> None:
        """Raise SourceError when the input is not the file that was opened; the results so far are then useless."""
        change = self.prepared.found.change()
        if change is None:
            return
        with self.state.nothing_to_go_on_with():
            raise SourceError(
                f"{self.prepared.found.info.path} changed while it was read ({change}); the results so far are dropped: "
                "run the same command again when nothing writes to the file any more"
            )

    def with_path(self, error: Exception) -> str:
        """The message of an error about the data, including the input's path."""
        path = self.prepared.found.info.path
        return str(error) if path in str(error) else f"{path}: {error}"

    def room(
        self, patterns: xr.DataArray, window: Window | None, *, warn: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Check the disk for what is still to be written; see `stem_dask.job.memory_and_disk.enough_room`."""
        shape = None if window is None else window.shape
        n_blocks = math.prod(patterns.data.numblocks)
        need = disk_need(self.config, self.prepared.found, n_blocks, shape)
        paths = self.outputs.local()
        # an older output keeps its disk space until the new one replaces it
        kept = [path for path in paths if not self.state.is_older(path)]
        names = (self.folder, *map(temporary, paths), *kept)
        return enough_room(Path(self.outputs.path).parent, need, names, warn=warn)

    def reporter(self, stage: str, input_bytes: int) -> engine.Progress | None:
        """Callback that reports every finished block to ``progress``."""
        progress = self.progress
        if progress is None:
            return None
        return lambda done, n, record: progress(Step(stage, done, n, input_bytes, record))

    def measured(
        self, patterns: xr.DataArray, window: Window | None, seconds: float
    ) -> dict[str, Any]:
        """Speed, memory, retries and warnings of the run, for results.json."""
        shape = None if window is None else window.shape
        sizes = memory_of(self.config, self.prepared.found, shape, self.slab)
        positions = math.prod(chunks[0] for chunks in patterns.data.chunks[:-2])
        gpu = {}
        if self.device == "gpu":
            held = self.connection.client.run(held_bytes).values()
            gpu = {"gpu": {"projected": self._on_gpu(positions), "measured": max(held)}}
        return {
            "speed": {
                "seconds": seconds,
                "seconds_until_analyzed": self.analyzed_after,
                "seconds_since_process_start": report.process_seconds(),
                "bytes_per_second": self.prepared.found.n_bytes / seconds,
            },
            "memory": {
                "projected": projected_bytes(sizes, positions, self.worker),
                "measured": self.tally.peak_rss,
                "limit": self.connection.worker.limit,
                **gpu,
            },
            "peak_memory": max(self.tally.peak_rss, engine.peak_rss()),
            **self.tally.words(lead_shape(patterns)),
            "cluster": str(self.connection),
            "warnings": self.warnings,
        }
