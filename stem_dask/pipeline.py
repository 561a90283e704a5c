"""The order of the stages: read, analyze, crop, validate, downsample, store, export. The only place that computes."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from stem_dask import engine, report
from stem_dask.cluster import Connection, connect
from stem_dask.config import Config, to_dict
from stem_dask.exports import export_from_store, export_job
from stem_dask.figure import draw
from stem_dask.figure_data import figure_data
from stem_dask.io.lazy import block_positions, lazy_patterns, masked
from stem_dask.io.publish import publish, temporary
from stem_dask.io.read import Found
from stem_dask.io.spool import SpoolSink
from stem_dask.io.store import (
    StoreSink,
    finish_store,
    store_chunks,
    write_coordinates,
    write_dataset,
    write_profiles,
)
from stem_dask.model import Record, Window
from stem_dask.preflight import Outputs, Prepared, begun, prepare, token
from stem_dask.stages.analyze import analysis_attrs, analysis_blocks, fold_analysis
from stem_dask.stages.crop import complete_analysis, crop, placement
from stem_dask.stages.downsample import cast, check_float16, downsample
from stem_dask.stages.patterns import axes_of, lead_dims, lead_shape
from stem_dask.stages.summary import block_statistics, stored_radii
from stem_dask.stages.validate import FLOAT_SLACK, intensity_inside, retention_statistics
from stem_dask.stages.window import choose_window
from stem_dask.state import RunState

#: targets that the verdict offers when little was gained
OTHER_TARGETS = (0.95, 0.9)

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


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, results, and the lines for the user."""

    exit_code: int
    results: Mapping[str, Any]
    lines: tuple[str, ...]


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
    Outcome; its exit code is 0, or 4 when too many patterns are below ``validate.min_retention``

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
    config, outputs, found = prepared.config, prepared.outputs, prepared.found
    if state is None or state.is_complete:
        return Outcome(0, {}, (f"already complete: {outputs.store}",))
    started = time.perf_counter()
    shape, dtype = found.source.shape, found.source.dtype
    n_bytes = math.prod(shape) * dtype.itemsize
    by = " x ".join(str(n) for n in shape)
    say(f"input       {found.info.path} ({by} {dtype}, {report.size(n_bytes)})")
    for note in found.info.notes:
        say(f"            {note}")
    n_done = sum(len(records) for records in state.journal.known.values())
    if n_done:
        say(f"resuming    {n_done:,} finished blocks; they are read again and checked")
    with connect(**config.cluster.model_dump(), input_bytes=n_bytes) as connection:
        say(f"cluster     {connection}, device cpu")
        say(f"dashboard   {connection.dashboard}")
        return Job(config, outputs, found, connection, state, progress).run(started)


@dataclass
class Job:
    """One run: what its steps share."""

    config: Config
    outputs: Outputs
    found: Found
    connection: Connection
    state: RunState
    progress: Progress | None = None
    warnings: list[str] = field(default_factory=list)
    peak_rss: int = 0

    def run(self, started: float) -> Outcome:
        """All stages in their order, then the report."""
        first = time.perf_counter()
        patterns = self.patterns()
        analysis = self.analyze(patterns) if self.config.crop.enabled else None
        window, cropped = None, patterns
        with self.state.nothing_to_go_on_with():
            if analysis is not None:
                window = self.choose(analysis)
                cropped = crop(patterns, analysis, window)
            out = self.shrink(cropped, analysis)
        known = self.write(patterns, cropped, out, analysis, window)
        for path in self.outputs.exports:
            self.export(path, math.prod(out.data.numblocks))
        seconds = time.perf_counter() - first
        results = self.results(patterns, out, known, window, seconds)
        if self.outputs.figure:
            data = figure_data(self.outputs.store, patterns, window, results)
            draw(data, temporary(self.outputs.figure))
            publish(self.outputs.figure)
        results["processing_time"] = time.perf_counter() - started
        report.write_json(self.outputs.results, results)
        self.state.complete(
            {k: results[k] for k in ("speed", "peak_memory", "processing_time", "cluster")}
        )
        files = {path: report.tree_bytes(path) for path in self.outputs.all()}
        lines = report.summary({**results, "files": files})
        return Outcome(_exit_code(self.config, results), results, lines)

    @property
    def folder(self) -> str:
        """What the run keeps beside its output until it is complete."""
        return str(self.state.folder)

    @property
    def store(self) -> str:
        """The store under its temporary name."""
        return temporary(self.outputs.store)

    def patterns(self) -> xr.DataArray:
        """The lazy input, without its bad pixels."""
        options = self.config.input
        budget = self.connection.thread_bytes
        block = block_positions(self.found, self.config.output.chunk_mb, budget)
        lazy = lazy_patterns(self.found, self.state.settled("block", block))
        mask = options.mask
        listed = mask if mask is None or isinstance(mask, str) else mask.model_dump()
        return masked(lazy, listed, options.mask_fill)

    def analyze(self, patterns: xr.DataArray) -> xr.Dataset:
        """The analysis pass: computed block by block into the run's folder, joined but for the profiles."""
        options = self.config.analyze.model_dump()
        blocks = analysis_blocks(patterns, **options)
        spool = SpoolSink(f"{self.folder}/analysis")
        n_blocks = self.compute("analyze", blocks, patterns, spool)
        names = [name for name in blocks if name != "profile"]
        found = fold_analysis(patterns, spool.blocks(n_blocks, names), analysis_attrs(**options))
        self.warnings += report.analysis_warnings(found)
        return found

    def choose(self, analysis: xr.Dataset) -> Window:
        """The window, and what is odd about it."""
        options = self.config.crop.model_dump(exclude={"enabled"})
        down = self.config.downsample
        window = choose_window(analysis, **options, factor=down.factor)
        filled = placement(analysis, window)["filled_fraction"].values
        self.warnings += report.window_warnings(window, filled)
        if self.config.output.dtype == "float16" and down.method != "fft":
            sums = down.method == "bin" and down.reduce == "sum"
            if not sums:  # no mean exceeds the maximum; sums are checked block by block
                check_float16(float(analysis["max_pattern"].max()))
        return window

    def shrink(self, cropped: xr.DataArray, analysis: xr.Dataset | None) -> xr.DataArray:
        """Downsample and cast; says what an uncropped axis loses at its end."""
        options = self.config.downsample
        mean = None if analysis is None else analysis["mean_pattern"].values
        self.warnings += report.remainder_warnings(dict(cropped.sizes), options.factor, mean)
        return cast(downsample(cropped, **options.model_dump()), self.config.output.dtype)

    def write(
        self,
        patterns: xr.DataArray,
        cropped: xr.DataArray,
        out: xr.DataArray,
        analysis: xr.Dataset | None,
        window: Window | None,
    ) -> xr.Dataset | None:
        """The crop pass: every block to its shard, then what is known of the patterns beside it."""
        outputs = {"patterns": out.data, **block_statistics(out)}
        if analysis is not None:
            outputs["inside"] = intensity_inside(cropped, float(analysis.attrs["threshold"]))
        inner, shards = store_chunks(out)
        spool = SpoolSink(f"{self.folder}/crop")
        dims = tuple(str(dim) for dim in out.dims)
        sink = StoreSink(self.store, out.shape, str(out.dtype), dims, inner, shards, spool)
        n_blocks = math.prod(out.data.numblocks)
        published = self.state.published(self.outputs.store, "crop", n_blocks)
        if not published:
            self.compute("crop", outputs, out, sink)
        lead = lead_shape(out)
        inside, highest, total = np.full(lead, np.nan), -math.inf, np.zeros(out.shape[-2:])
        for region, block in spool.blocks(n_blocks):
            inside[region] = block.get("inside", np.nan)
            highest = max(highest, float(block["highest"].max()))
            total += block["sum"][(0,) * len(lead)]
        known = None
        if analysis is not None and window is not None:
            known = complete_analysis(
                analysis, window, inside, axes_of(patterns)[-2:], self.config.downsample
            )
        if published:
            return known
        write_coordinates(self.store, out)
        if known is not None:
            profiles = SpoolSink(f"{self.folder}/analysis").blocks(n_blocks, ("profile",))
            chunk = tuple(chunks[0] for chunks in patterns.data.chunks[: len(lead)])
            write_profiles(self.store, profiles, (*lead_dims(out), "radius"), lead, chunk)
            write_dataset(self.store, "analysis", known)
        mean = xr.Dataset({"mean_pattern": (("ky", "kx"), total / math.prod(lead))})
        write_dataset(self.store, "output", mean)
        attrs = {k: v for k, v in out.attrs.items() if k not in ("source", "notes")}
        finish_store(self.store, self.provenance(), {**attrs, "maximum": highest})
        publish(self.outputs.store)
        return known

    def export(self, path: str, n_blocks: int) -> None:
        """Write one more format from the finished store."""
        kind = Path(path).suffix
        if self.state.published(path, export_job(path, self.config.output.layout), n_blocks):
            return
        self.warnings += export_from_store(
            self.outputs.store,
            path,
            layout=self.config.output.layout,
            overwrite=self.config.output.overwrite,
            client=self.connection.client,
            progress=self.reporter(f"export {kind[1:]}", 0),
            journal=self.state.journal,
            folder=f"{self.folder}/export{kind}",
        )

    def results(
        self,
        patterns: xr.DataArray,
        out: xr.DataArray,
        known: xr.Dataset | None,
        window: Window | None,
        seconds: float,
    ) -> dict[str, Any]:
        """Everything that results.json says."""
        limits = {
            "target_retention": self.config.analyze.target_retention,
            "min_retention": self.config.validation.min_retention,
        }
        statistics = None
        if known is not None:
            slack = FLOAT_SLACK if patterns.dtype.kind == "f" else 0.0
            retention, total = known["retention"].values, known["total"].values
            target, minimum = limits["target_retention"], limits["min_retention"]
            statistics = retention_statistics(retention, total, target, minimum, slack)
        shape = out.shape[-2:] if window is None else window.shape
        results = report.results_of(
            known, statistics, patterns.shape[-2:], shape, math.prod(lead_shape(out)), window
        )
        return results | {
            "config": to_dict(self.config),
            "limits": limits,
            "scan_shape": lead_shape(out),
            "output": {"shape": out.shape, "dtype": str(out.dtype)},
            "input": {
                "path": self.found.info.path,
                "shape": patterns.shape,
                "dtype": str(patterns.dtype),
                "notes": self.found.info.notes,
            },
            "sizes": report.sizes(
                patterns.nbytes, out.nbytes, report.tree_bytes(self.outputs.store)
            ),
            "speed": {"seconds": seconds, "bytes_per_second": patterns.nbytes / seconds},
            "peak_memory": max(self.peak_rss, engine.peak_rss()),
            "cluster": str(self.connection),
            "warnings": self.warnings,
            "verdict": [] if known is None or window is None else self.verdict(known, window),
        }

    def verdict(self, known: xr.Dataset, window: Window) -> list[str]:
        """A word on a crop that gained little; reads the stored profiles to say what would gain more."""
        if not report.gained_little(window, known):
            return []
        options = self.config.crop.model_dump(exclude={"enabled", "size", "window"})
        stored = xr.open_zarr(self.outputs.store, group="analysis")
        exact = known["max_pattern"].dtype.kind in "ui"
        by_target: dict[float, int] = {}
        for target in OTHER_TARGETS:
            if target < window.target_retention:
                radii = stored_radii(stored, target, str(known.attrs["radius_metric"]), exact)
                other = known.assign(radius=known["radius"].copy(data=radii.compute()))
                by_target[target] = choose_window(other, **options).global_radius or 0
        return report.verdict(window, known, by_target)

    def provenance(self) -> dict[str, Any]:
        """Attributes of the store's root: how it came to be."""
        name, n_bytes, changed = self.found.identity
        notes = list(self.found.info.notes)
        return {
            "title": Path(name).stem,
            "token": token(self.config, self.found),
            "config": to_dict(self.config),
            "input": {"path": name, "bytes": n_bytes, "modified_ns": changed, "notes": notes},
            "versions": report.versions("stem_dask", "numpy", "dask", "zarr", "numba"),
        }

    def compute(
        self, stage: str, outputs: Mapping[str, da.Array], like: xr.DataArray, sink: engine.Sink
    ) -> int:
        """Run one stage's lazy outputs into a sink; returns the number of blocks."""
        progress = self.reporter(
            stage, math.prod(self.found.source.shape) * self.found.source.dtype.itemsize
        )
        records = engine.run(
            outputs,
            len(lead_dims(like)),
            sink,
            client=self.connection.client,
            progress=progress,
            journal=self.state.journal,
            job=stage,
        )
        return len(records)

    def reporter(self, stage: str, input_bytes: int) -> engine.Progress:
        """Notes the memory of every task and passes its step on."""

        def note(done: int, total: int, record: Record) -> None:
            self.peak_rss = max(self.peak_rss, record.peak_rss)
            if self.progress is not None:
                self.progress(Step(stage, done, total, input_bytes, record))

        return note


def _exit_code(config: Config, results: Mapping[str, Any]) -> int:
    """4 when more patterns than the coverage leaves out are below the minimum."""
    validation = results["validation"]
    if "passes_min_threshold" not in validation:
        return 0
    n = validation["n_patterns"] - validation["n_empty"]
    allowed = n - math.ceil(config.crop.coverage * n)
    return 4 if n - validation["passes_min_threshold"] > allowed else 0
