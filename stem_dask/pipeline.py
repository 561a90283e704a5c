"""The order of the stages: read, analyze, crop, validate, downsample, store, export. The only place that computes."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from stem_dask import engine, report
from stem_dask.cluster import Connection, connect
from stem_dask.errors import SourceError
from stem_dask.exports import export_from_store, export_job
from stem_dask.figure import draw
from stem_dask.figure_data import figure_data
from stem_dask.io.lazy import corrected, lazy_patterns, masked
from stem_dask.io.publish import publish, temporary
from stem_dask.io.spool import SpoolSink
from stem_dask.io.store import (
    StoreSink,
    finish_store,
    store_chunks,
    write_coordinates,
    write_dataset,
    write_profiles,
    write_valid,
)
from stem_dask.model import Record, Window
from stem_dask.options import Config
from stem_dask.plan import projected_bytes
from stem_dask.preflight import Outputs, Prepared, begun, prepare
from stem_dask.projection import (
    check_memory,
    disk_need,
    enough_room,
    fitting_block,
    input_bytes,
    memory_of,
)
from stem_dask.results import Outcome, already_complete, exit_code, provenance, results_of_run
from stem_dask.stages.analyze import analysis_attrs, analysis_blocks, fold_analysis
from stem_dask.stages.crop import complete_analysis, crop, placement
from stem_dask.stages.downsample import cast, check_float16, downsample
from stem_dask.stages.mask import suspected_hot_pixels
from stem_dask.stages.patterns import axes_of, blank, lead_dims, lead_shape
from stem_dask.stages.summary import block_statistics
from stem_dask.stages.validate import intensity_inside
from stem_dask.stages.window import choose_window
from stem_dask.state import RunState
from stem_dask.tally import Tally
from stem_dask.turn import needed_turn

Say = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One block done, for whoever shows the progress."""

    stage: str
    done: int
    total: int
    input_bytes: int
    record: Record


Progress = Callable[[Step], None]


def run(
    config: Config | Prepared,
    *,
    say: Say | None = None,
    progress: Progress | None = None,
    state: RunState | None = None,
) -> Outcome:
    """Run the whole job of a config.

    Parameters
    ----------
    config : validated options, paths absolute; or what `stem_dask.preflight.prepare` made of them
    say : gets one line at a time for the user
    progress : gets a `Step` after each block
    state : lock and journal of the run, when the caller holds them already (see `stem_dask.preflight.begun`)

    Returns
    -------
    Outcome; its exit code is 0, 4 when too many patterns are below ``validate.min_retention``, or 7 when a part of the
    input could not be read (``on_error: quarantine``)

    Raises
    ------
    StemDaskError
        When the job cannot be done; nothing appears under a final name, and older outputs stay.
    """
    say = say or (lambda text: None)
    prepared = config if isinstance(config, Prepared) else prepare(config)
    if not prepared.complete and state is None:
        with begun(prepared) as state:
            return run(prepared, say=say, progress=progress, state=state)
    config, found = prepared.config, prepared.found
    if state is None or state.is_complete:
        return already_complete(prepared.outputs.store)
    started = time.perf_counter()
    shape, dtype, n_bytes = found.source.shape, found.source.dtype, input_bytes(found)
    say(
        f"input       {found.info.path} ({' x '.join(map(str, shape))} {dtype}, {report.size(n_bytes)})"
    )
    for note in found.info.notes:
        say(f"            {note}")
    n_done = sum(len(records) for records in state.journal.known.values())
    if n_done:
        say(f"resuming    {n_done:,} finished blocks; they are read again and checked")
    with connect(**config.cluster.model_dump(), input_bytes=n_bytes) as connection:
        say(f"cluster     {connection}, device cpu")
        say(f"dashboard   {connection.dashboard}")
        return Job(prepared, connection, state, progress).run(started)


@dataclass
class Job:
    """One run: what its steps share."""

    prepared: Prepared
    connection: Connection
    state: RunState
    progress: Progress | None = None
    warnings: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    hot: list[list[int]] = field(default_factory=list)
    profiles: SpoolSink | None = None
    slab: tuple[int, int] | None = None

    def run(self, started: float) -> Outcome:
        """All stages in their order, then the report."""
        first = time.perf_counter()
        block = self.block()
        patterns = self.patterns(block)
        analysis = None
        window = None
        if self.config.crop.enabled:
            patterns, analysis = self.analyze(patterns)
            with self.state.nothing_to_go_on_with():
                window = self.choose(analysis)
        with self.room(patterns, window, warn=True):
            out, known = self.write(patterns, analysis, window)
            for path in self.outputs.exports:
                self.export(path, math.prod(out.data.numblocks))
            seconds = time.perf_counter() - first
            results = results_of_run(self.prepared, patterns, out, known, window, self.hot)
            results |= self.measured(patterns, window, seconds)
            if self.outputs.figure:
                data = figure_data(self.outputs.store, patterns, window, results)
                draw(data, temporary(self.outputs.figure))
                publish(self.outputs.figure)
            results["processing_time"] = time.perf_counter() - started
            report.write_json(self.outputs.results, results)
            self.state.complete({name: results[name] for name in report.REPORTED})
        files = {path: report.tree_bytes(path) for path in self.outputs.all()}
        lines = report.summary({**results, "files": files})
        return Outcome(exit_code(self.config, results), results, lines)

    @property
    def config(self) -> Config:
        """All options."""
        return self.prepared.config

    @property
    def outputs(self) -> Outputs:
        """The names of the files."""
        return self.prepared.outputs

    @property
    def folder(self) -> str:
        """What the run keeps beside its output until it is complete."""
        return str(self.state.folder)

    @property
    def store(self) -> str:
        """The store under its temporary name."""
        return temporary(self.outputs.store)

    def block(self) -> tuple[int, ...]:
        """Positions of a block, settled once; refused when a worker has not the memory for it."""
        limit, threads = self.connection.worker_bytes, self.connection.worker_threads
        block = fitting_block(self.config, self.prepared.found, limit, threads)
        block = tuple(self.state.settled("block", block))
        check_memory(self.config, self.prepared.found, block, limit, threads)
        return block

    def patterns(self, block: Sequence[int]) -> xr.DataArray:
        """The lazy input, turned where it must be, corrected and without its bad pixels."""
        options, found = self.config.input, self.prepared.found
        turn = needed_turn(found, block, self.connection, self.folder)
        if turn is not None:
            found, self.slab = turn.found, turn.slab
            with self.room(lazy_patterns(found, block), None):
                progress = self.reporter("turn", input_bytes(found))
                self.tally.note(turn.run(self.connection.client, progress, self.state.journal))
        lazy = corrected(lazy_patterns(found, block), options.dark, options.gain)
        mask = None if options.mask == "auto" else options.mask  # not known yet
        listed = mask if mask is None or isinstance(mask, str) else mask.model_dump()
        return masked(lazy, listed, options.mask_fill)

    def analyze(self, patterns: xr.DataArray) -> tuple[xr.DataArray, xr.Dataset]:
        """The patterns and what is known of them; once more without their hot pixels, when these shall be masked."""
        auto = self.config.input.mask == "auto"
        found = self.analyzed(patterns, "analyze", "analysis")
        hot = np.argwhere(suspected_hot_pixels(found)).tolist()
        self.hot = self.state.settled("hot_pixels", hot) if auto else hot
        if auto and self.hot:
            patterns = masked(patterns, {"pixels": self.hot}, self.config.input.mask_fill)
            found = self.analyzed(patterns, "analyze again", "analysis-again")
        self.warnings += report.hot_pixel_warnings(self.hot, masked=auto)
        self.warnings += report.analysis_warnings(found)
        return patterns, found

    def analyzed(self, patterns: xr.DataArray, stage: str, folder: str) -> xr.Dataset:
        """One analysis pass: computed block by block into the run's folder, joined but for the profiles."""
        options = self.config.analyze.model_dump()
        blocks = analysis_blocks(patterns, **options)
        spare = self.spare(patterns)
        instead = None if spare is None else analysis_blocks(spare, **options)
        spool = self.profiles = SpoolSink(f"{self.folder}/{folder}")
        with self.room(patterns, None):
            self.compute(stage, blocks, instead, patterns, spool)
        names = [name for name in blocks if name != "profile"]
        stored = spool.blocks(math.prod(patterns.data.numblocks), names)
        n_missing = int((~self.tally.valid(lead_shape(patterns))).sum())
        return fold_analysis(patterns, stored, analysis_attrs(**options), n_missing)

    def choose(self, analysis: xr.Dataset) -> Window:
        """The window, and what is odd about it."""
        options = self.config.crop.model_dump(exclude={"enabled"})
        down = self.config.downsample
        window = choose_window(analysis, **options, factor=down.factor)
        filled = placement(analysis, window)["filled_fraction"].values
        self.warnings += report.window_warnings(window, filled)
        if self.config.output.dtype == "float16" and down.method != "fft":
            if (down.method, down.reduce) != ("bin", "sum"):  # sums are checked block by block
                check_float16(float(analysis["max_pattern"].max()))
        return window

    def outputs_of(
        self, patterns: xr.DataArray, analysis: xr.Dataset | None, window: Window | None
    ) -> tuple[xr.DataArray, dict[str, da.Array]]:
        """The lazy output, and what the crop pass computes together with it."""
        cropped = patterns
        if analysis is not None and window is not None:
            cropped = crop(patterns, analysis, window)
        small = downsample(cropped, **self.config.downsample.model_dump())
        out = cast(small, self.config.output.dtype)
        outputs = {"patterns": out.data, **block_statistics(out)}
        if analysis is not None:
            outputs["inside"] = intensity_inside(cropped, float(analysis.attrs["threshold"]))
        return out, outputs

    def spare(self, patterns: xr.DataArray) -> xr.DataArray | None:
        """What stands for patterns that cannot be read, when the run shall go on without them."""
        return None if self.config.on_error == "stop" else blank(patterns)

    def write(
        self, patterns: xr.DataArray, analysis: xr.Dataset | None, window: Window | None
    ) -> tuple[xr.DataArray, xr.Dataset | None]:
        """The crop pass: every block to its shard, then what is known of the patterns beside it."""
        with self.state.nothing_to_go_on_with():
            out, outputs = self.outputs_of(patterns, analysis, window)
        spare = self.spare(patterns)
        instead = None if spare is None else self.outputs_of(spare, analysis, window)[1]
        shape = patterns.shape[-2:] if window is None else window.shape
        mean = None if analysis is None else analysis["mean_pattern"].values
        self.warnings += report.remainder_warnings(shape, self.config.downsample.factor, mean)
        inner, shards = store_chunks(out)
        spool = SpoolSink(f"{self.folder}/crop")
        dims = tuple(str(dim) for dim in out.dims)
        sink = StoreSink(self.store, out.shape, str(out.dtype), dims, inner, shards, spool)
        n_blocks = math.prod(out.data.numblocks)
        published = self.state.published(self.outputs.store, "crop", n_blocks)
        # what the spool holds may be damaged also when the store has its name
        self.compute("crop", outputs, instead, out, spool if published else sink)
        lead = lead_shape(out)
        valid = self.tally.valid(lead)
        inside, highest, total = np.full(lead, np.nan), -math.inf, np.zeros(out.shape[-2:])
        for region, block in spool.blocks(n_blocks):
            inside[region] = block.get("inside", np.nan)
            highest = max(highest, float(block["highest"].max()))
            total += block["sum"][(0,) * len(lead)]
        inside[~valid] = np.nan
        known = None
        if analysis is not None and window is not None:
            known = complete_analysis(
                analysis, window, inside, axes_of(patterns)[-2:], self.config.downsample
            )
        if published:
            return out, known
        write_coordinates(self.store, out)
        write_valid(self.store, valid, lead_dims(out))
        if known is not None and self.profiles is not None:
            profiles = self.profiles.blocks(n_blocks, ("profile",))
            chunk = tuple(chunks[0] for chunks in patterns.data.chunks[: len(lead)])
            write_profiles(self.store, profiles, (*lead_dims(out), "radius"), lead, chunk)
            write_dataset(self.store, "analysis", known)
        output = xr.Dataset({"mean_pattern": (("ky", "kx"), total / max(1, valid.sum()))})
        write_dataset(self.store, "output", output)
        attrs = {k: v for k, v in out.attrs.items() if k not in ("source", "notes")}
        about = provenance(self.prepared, int((~valid).sum()), self.hot)
        finish_store(self.store, about, {**attrs, "maximum": highest})
        publish(self.outputs.store, drop=self.outputs.results)
        return out, known

    def export(self, path: str, n_blocks: int) -> None:
        """Write one more format from the finished store."""
        kind, job = Path(path).suffix, export_job(path, self.config.output.layout)
        if not self.state.published(path, job, n_blocks):
            self.warnings += export_from_store(
                self.outputs.store,
                path,
                layout=self.config.output.layout,
                overwrite=self.config.output.overwrite or self.state.replaces(path),
                client=self.connection.client,
                progress=self.reporter(f"export {kind[1:]}", 0),
                journal=self.state.journal,
                folder=f"{self.folder}/export{kind}",
            )
        self.tally.note(self.state.journal.records(job).values())

    def compute(
        self,
        stage: str,
        outputs: Mapping[str, da.Array],
        instead: Mapping[str, da.Array] | None,
        like: xr.DataArray,
        sink: engine.Sink,
    ) -> None:
        """Run one stage's lazy outputs into a sink."""
        try:
            records = engine.run(
                outputs,
                len(lead_dims(like)),
                sink,
                client=self.connection.client,
                progress=self.reporter(stage, input_bytes(self.prepared.found)),
                journal=self.state.journal,
                job=stage,
                instead=instead,
                unreadable=self.tally.unreadable,
            )
        except SourceError as error:
            hint = "the same command goes on when it can be read, or with on_error=quarantine without it"
            raise SourceError(f"{error}; {hint}") from error
        self.tally.note(records)

    def room(
        self, patterns: xr.DataArray, window: Window | None, *, warn: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Disk for what is still to be written; see `stem_dask.projection.enough_room`."""
        shape = None if window is None else window.shape
        n_blocks = math.prod(patterns.data.numblocks)
        need = disk_need(self.config, self.prepared.found, n_blocks, shape)
        paths = self.outputs.all()
        # an older output that is replaced takes room of its own until the new one is complete
        ours = [path for path in paths if not self.state.is_older(path)]
        names = (self.folder, *map(temporary, paths), *ours)
        return enough_room(Path(self.outputs.store).parent, need, names, warn=warn)

    def measured(
        self, patterns: xr.DataArray, window: Window | None, seconds: float
    ) -> dict[str, Any]:
        """Speed, memory and mishaps of the run."""
        shape = None if window is None else window.shape
        sizes = memory_of(self.config, self.prepared.found, shape, self.slab)
        positions = math.prod(chunks[0] for chunks in patterns.data.chunks[:-2])
        return {
            "speed": {
                "seconds": seconds,
                "seconds_since_process_start": report.process_seconds(),
                "bytes_per_second": input_bytes(self.prepared.found) / seconds,
            },
            "memory": {
                "projected": projected_bytes(sizes, positions, self.connection.worker_threads),
                "measured": self.tally.peak_rss,
                "limit": self.connection.worker_bytes,
            },
            "peak_memory": max(self.tally.peak_rss, engine.peak_rss()),
            **self.tally.words(lead_shape(patterns)),
            "cluster": str(self.connection),
            "warnings": self.warnings,
        }

    def reporter(self, stage: str, input_bytes: int) -> engine.Progress | None:
        """Passes every finished block on to whoever shows the progress."""
        progress = self.progress
        if progress is None:
            return None
        return lambda done, n, record: progress(Step(stage, done, n, input_bytes, record))
