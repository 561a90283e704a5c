"""The order of the stages: read, analyze, crop, validate, downsample, store, export. The only place that computes."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from stem_dask import engine, report
from stem_dask.cluster import Connection, connect
from stem_dask.config import Config, to_dict
from stem_dask.errors import ConfigError, OutputExistsError
from stem_dask.export import export_from_store
from stem_dask.figure import draw
from stem_dask.figure_data import figure_data
from stem_dask.io.lazy import lazy_patterns, masked
from stem_dask.io.publish import publish, refuse_existing, remove, run_folder, temporary
from stem_dask.io.read import Found, find
from stem_dask.io.spool import SpoolSink
from stem_dask.io.store import (
    StoreSink,
    create_array,
    finish_store,
    store_chunks,
    write_coordinates,
    write_dataset,
)
from stem_dask.model import Record, Window
from stem_dask.stages.analyze import PROFILE_ATTRS, analysis_attrs, analysis_blocks, fold_analysis
from stem_dask.stages.crop import crop, window_attrs
from stem_dask.stages.downsample import cast, check_float16, downsample, output_shift
from stem_dask.stages.patterns import axes_of, lead_dims, lead_shape
from stem_dask.stages.validate import FLOAT_SLACK, intensity_inside, retention_statistics
from stem_dask.stages.window import choose_window, filled_fraction, radii_for_target, window_origins

#: targets that the verdict offers when little was gained
OTHER_TARGETS = (0.95, 0.9)

Say = Callable[[str], None]
Progress = Callable[[str, int, int, Record, int], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, results, and the lines for the user."""

    exit_code: int
    results: Mapping[str, Any]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Outputs:
    """The files of a run, all beside its store."""

    store: str
    exports: tuple[str, ...]
    results: str
    figure: str | None

    @classmethod
    def of(cls, config: Config) -> "Outputs":
        """Names from ``output.path``: NAME.zarr gives NAME.pt, NAME.hspy, NAME_results.json, NAME_visualization.png."""
        path = Path(config.output.path)
        stem = str(path.with_suffix(""))
        return cls(
            str(path),
            tuple(f"{stem}.{kind}" for kind in config.output.export),
            f"{stem}_results.json",
            f"{stem}_visualization.png" if config.output.figure else None,
        )

    def all(self) -> tuple[str, ...]:
        """Every name."""
        return (self.store, *self.exports, self.results, *((self.figure,) if self.figure else ()))


def run(
    config: Config, *, say: Say = lambda text: None, progress: Progress | None = None
) -> Outcome:
    """Run the whole job of a config.

    Parameters
    ----------
    config : validated options, paths absolute
    say : gets one line at a time for the user
    progress : gets (stage, blocks done, blocks, record, input bytes of the stage) after each block

    Returns
    -------
    Outcome; its exit code is 0, or 4 when too many patterns are below ``validate.min_retention``

    Raises
    ------
    StemDaskError
        When the job cannot be done; nothing appears under a final name, and older outputs stay.
    """
    started = time.perf_counter()
    outputs = Outputs.of(config)
    found = find_input(config)
    if config.device == "gpu":
        raise ConfigError(
            "device is gpu, but GPU kernels are not part of this version; set device: cpu"
        )
    complete = _already_complete(config, outputs, found)
    if complete is not None:
        return complete
    for path in outputs.all():
        refuse_existing(path, config.output.overwrite)
    Path(outputs.store).parent.mkdir(parents=True, exist_ok=True)
    input_bytes = math.prod(found.source.shape) * found.source.dtype.itemsize
    for note in found.info.notes:
        say(f"input       {note}")
    options = config.cluster.model_dump()
    with connect(**options, input_bytes=input_bytes) as connection:
        say(f"cluster     {connection}; dashboard {connection.dashboard}")
        job = Job(config, outputs, found, connection, progress, input_bytes)
        try:
            return job.run(started)
        except BaseException:
            # a failed run leaves nothing behind; it will resume from its folder when the engine keeps a journal
            for path in (outputs.store, *outputs.exports):
                remove(temporary(path))
            remove(run_folder(outputs.store))
            raise


def find_input(config: Config) -> Found:
    """Look into the input's header; ``synthetic`` is made beside the output first."""
    options = config.input
    path = options.path
    if path == "synthetic":
        from stem_dask.synthetic import write_dataset as write_synthetic

        path = str(Path(config.output.path).parent / "synthetic.dm4")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if not Path(path).exists():
            write_synthetic(path)
    return find(
        path,
        dataset=options.dataset,
        scan_shape=options.scan_shape,
        scan_order=options.scan_order,
        scan_roi=options.scan_roi,
        scan_step=options.scan_step,
    )


def token(config: Config, found: Found) -> str:
    """What can change bytes of the output: options of the stages and the state of the input, not cluster or names."""
    options = _deciding(to_dict(config))
    text = json.dumps([options, found.identity], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _deciding(options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        name: dict(options[name])
        for name in ("input", "analyze", "crop", "validate", "downsample", "output")
    }
    for key in ("path", "overwrite", "export", "layout", "figure"):
        kept["output"].pop(key)
    return {**kept, "device": options["device"]}


def _already_complete(config: Config, outputs: Outputs, found: Found) -> Outcome | None:
    """The outcome of an equal run that is complete already; refuses an output of other options."""
    if config.output.overwrite or not Path(outputs.store).is_dir():
        return None
    import zarr

    try:
        attrs = dict(zarr.open_group(outputs.store, mode="r").attrs)
    except (OSError, ValueError, KeyError):
        attrs = {}
    if attrs.get("token") == token(config, found) and all(Path(p).exists() for p in outputs.all()):
        return Outcome(0, {}, (f"already complete: {outputs.store}",))
    before, now = attrs.get("config"), to_dict(config)
    changed = []
    if isinstance(before, dict):
        old, new = _deciding({**now, **before}), _deciding(now)
        changed = [
            f"{section}.{key}"
            for section in old
            if isinstance(old[section], dict)
            for key in new[section]
            if old[section].get(key) != new[section][key]
        ]
    why = f" It was made with other options: {', '.join(changed)}." if changed else ""
    raise OutputExistsError(
        f"{outputs.store} exists.{why} Choose another output.path, or set output.overwrite=true to replace it "
        "when the new one is complete"
    )


class Job:
    """One run: what its steps share."""

    def __init__(
        self,
        config: Config,
        outputs: Outputs,
        found: Found,
        connection: Connection,
        progress: Progress | None,
        input_bytes: int,
    ) -> None:
        self.config, self.outputs, self.found = config, outputs, found
        self.connection, self.progress, self.input_bytes = connection, progress, input_bytes
        self.folder = run_folder(outputs.store)
        self.store = temporary(outputs.store)
        self.peak_rss = 0
        self.warnings: list[str] = []

    def run(self, started: float) -> Outcome:
        """All stages in their order, then the report."""
        first = time.perf_counter()
        patterns = self.patterns()
        analysis = window = None
        shaped = patterns
        if self.config.crop.enabled:
            analysis = self.analyze(patterns)
            window = self.choose(patterns, analysis)
            shaped = crop(patterns, analysis, window)
        out = self.shrink(shaped)
        folded = self.write(
            patterns, shaped if analysis is not None else None, out, analysis, window
        )
        publish(self.outputs.store)
        exported = [self.export(path) for path in self.outputs.exports]
        remove(self.folder)
        seconds = time.perf_counter() - first
        self.warnings += [note for notes in exported for note in notes]
        results = self.results(
            patterns, out, folded, window, seconds, time.perf_counter() - started
        )
        if self.outputs.figure:
            data = figure_data(self.outputs.store, patterns, window, results)
            draw(data, temporary(self.outputs.figure))
            publish(self.outputs.figure)
        lines = report.summary({**results, "files": self._files()})
        report.write_json(self.outputs.results, results)
        return Outcome(_exit_code(self.config, results), results, lines)

    def patterns(self) -> xr.DataArray:
        """The lazy input."""
        limit = self.connection.thread_bytes
        lazy = lazy_patterns(self.found, self.config.output.chunk_mb, limit)
        mask = self.config.input.mask
        return masked(
            lazy,
            mask if mask is None or isinstance(mask, str) else mask.model_dump(),
            self.config.input.mask_fill,
        )

    def analyze(self, patterns: xr.DataArray) -> xr.Dataset:
        """The analysis pass: computed block by block into the run's folder, joined here but for the profiles."""
        options = self.config.analyze.model_dump()
        outputs = analysis_blocks(patterns, **options)
        sink = SpoolSink(f"{self.folder}/analysis")
        remove(self.folder)
        self._run("analyze", outputs, patterns, sink, self.input_bytes)
        names = [name for name in outputs if name != "profile"]
        analysis = fold_analysis(
            patterns, sink.blocks(self._n_blocks(patterns), names), analysis_attrs(**options)
        )
        self.warnings += report.analysis_warnings(analysis)
        return analysis

    def choose(self, patterns: xr.DataArray, analysis: xr.Dataset) -> Window:
        """The window, and what is odd about it."""
        options = self.config.crop.model_dump(exclude={"enabled"})
        window = choose_window(analysis, **options, factor=self.config.downsample.factor)
        origin_y, origin_x = window_origins(analysis, window)
        detector = (patterns.sizes["ky"], patterns.sizes["kx"])
        filled = filled_fraction(origin_y.values, origin_x.values, window.shape, detector)
        self.warnings += report.window_warnings(window, filled, detector)
        if self.config.output.dtype == "float16":
            down = self.config.downsample
            pixels = down.factor**2 if down.method == "bin" and down.reduce == "sum" else 1
            if pixels == 1:
                check_float16(float(analysis["max_pattern"].max()))
        return window

    def shrink(self, shaped: xr.DataArray) -> xr.DataArray:
        """Downsample and cast; says what an uncropped axis loses at its end."""
        options = self.config.downsample
        for name in ("ky", "kx"):
            rest = shaped.sizes[name] % options.factor
            if rest:
                self.warnings.append(
                    f"downsampling by {options.factor} drops the last {rest} of {shaped.sizes[name]} pixels of {name}"
                )
        small = downsample(
            shaped,
            options.factor,
            method=options.method,
            reduce=options.reduce,
            sigma=options.sigma,
        )
        return cast(small, self.config.output.dtype)

    def write(
        self,
        patterns: xr.DataArray,
        cropped: xr.DataArray | None,
        out: xr.DataArray,
        analysis: xr.Dataset | None,
        window: Window | None,
    ) -> xr.Dataset:
        """The crop pass: every block to its shard, then the analysis beside it; returns what is known by position."""
        outputs = {"patterns": out.data, **_block_statistics(out)}
        if cropped is not None and analysis is not None:
            outputs["inside"] = intensity_inside(cropped, float(analysis.attrs["threshold"]))
        inner, shards = store_chunks(out)
        beside = SpoolSink(f"{self.folder}/crop")
        dims = tuple(str(dim) for dim in out.dims)
        sink = StoreSink(self.store, out.shape, str(out.dtype), dims, inner, shards, beside)
        self._run("crop", outputs, out, sink, self.input_bytes)
        n_lead = len(lead_dims(out))
        inside = np.full(lead_shape(out), np.nan)
        highest, total = -math.inf, np.zeros(out.shape[n_lead:])
        for region, block in beside.blocks(self._n_blocks(out)):
            if "inside" in block:
                inside[region] = block["inside"]
            highest = max(highest, float(block["highest"].max()))
            total += block["sum"][(0,) * n_lead]
        write_coordinates(self.store, out)
        folded = xr.Dataset()
        if analysis is not None and window is not None:
            folded = self.complete_analysis(analysis, window, inside, patterns)
            self.write_profiles(patterns)
            write_dataset(self.store, "analysis", folded)
        detector = xr.Dataset({"mean_output": (("ky", "kx"), total / math.prod(lead_shape(out)))})
        write_dataset(self.store, "output", detector)
        attrs = {k: v for k, v in out.attrs.items() if k not in ("source", "notes")}
        finish_store(self.store, self.provenance(patterns), {**attrs, "maximum": highest})
        return folded

    def complete_analysis(
        self, analysis: xr.Dataset, window: Window, inside: Any, patterns: xr.DataArray
    ) -> xr.Dataset:
        """The analysis with what the crop added, in the source frame but for the centers in the output."""
        total = analysis["total"].values
        with np.errstate(invalid="ignore", divide="ignore"):
            retention = np.where(total > 0, inside / total, np.nan)
        origin_y, origin_x = window_origins(analysis, window)
        down = self.config.downsample
        shift = output_shift(down.factor, down.method)
        detector = (patterns.sizes["ky"], patterns.sizes["kx"])
        like = analysis["center_y"]
        filled = filled_fraction(origin_y.values, origin_x.values, window.shape, detector)
        new = {
            "retention": like.copy(data=retention),
            "window_y": origin_y,
            "window_x": origin_x,
            "filled_fraction": like.copy(data=filled),
            "center_out_y": (analysis["center_y"] - origin_y - shift) / down.factor,
            "center_out_x": (analysis["center_x"] - origin_x - shift) / down.factor,
        }
        source = {
            axis.name: [axis.scale, axis.offset, axis.units] for axis in axes_of(patterns)[-2:]
        }
        counts = {
            f"odd_{k}": int(n)
            for k, n in zip(analysis["kind"].values, analysis["odd_pixels"].values, strict=True)
        }
        attrs = {**analysis.attrs, **window_attrs(window), "source_calibration": source, **counts}
        whole = analysis.drop_vars(["odd_pixels", "kind"]).assign(new).assign_attrs(attrs)
        intensity = self.config.downsample
        mean = intensity.factor > 1 and intensity.method != "stride" and intensity.reduce == "mean"
        return whole.assign_attrs(intensity="mean counts per source pixel" if mean else "counts")

    def write_profiles(self, patterns: xr.DataArray) -> None:
        """Copy the profiles from the run's folder into the store, block by block."""
        import zarr

        lead = lead_shape(patterns)
        chunk = tuple(chunks[0] for chunks in patterns.data.chunks[: len(lead)])
        array = None
        spool = SpoolSink(f"{self.folder}/analysis")
        for region, block in spool.blocks(self._n_blocks(patterns), ("profile",)):
            profile = block["profile"]
            if array is None:
                group = zarr.open_group(self.store, mode="r+").require_group("analysis")
                shape, dims = (*lead, profile.shape[-1]), (*lead_dims(patterns), "radius")
                array = create_array(
                    group, "profile", shape, "f4", dims, (*chunk, profile.shape[-1])
                )
                array.attrs.update(PROFILE_ATTRS)
            array[region] = profile

    def export(self, path: str) -> list[str]:
        """Write one more format from the finished store; returns what it has to say."""
        notes = export_from_store(
            self.outputs.store,
            path,
            layout=self.config.output.layout,
            title=Path(self.outputs.store).stem,
            overwrite=self.config.output.overwrite,
            client=self.connection.client,
            progress=self._reporter(f"export {Path(path).suffix}", None),
        )
        return notes

    def results(
        self,
        patterns: xr.DataArray,
        out: xr.DataArray,
        folded: xr.Dataset,
        window: Window | None,
        seconds: float,
        whole_seconds: float,
    ) -> dict[str, Any]:
        """Everything that results.json says."""
        detector = (patterns.sizes["ky"], patterns.sizes["kx"])
        config = self.config
        known = folded if window is not None else None
        statistics = None
        target, minimum = config.analyze.target_retention, config.validation.min_retention
        if known is not None:
            slack = FLOAT_SLACK if patterns.dtype.kind == "f" else 0.0
            statistics = retention_statistics(
                known["retention"].values, known["total"].values, target, minimum, slack
            )
        shape = out.shape if window is None else (*out.shape[:-2], *window.shape)
        results = report.results_of(
            known,
            statistics,
            detector,
            shape[-2:],
            math.prod(lead_shape(out)),
            None if window is None else window.global_radius,
        )
        stored = report.tree_bytes(self.outputs.store)
        output_bytes = int(out.nbytes)
        results |= {
            "processing_time": whole_seconds,
            "config": to_dict(config),
            "limits": {"target_retention": target, "min_retention": minimum},
            "scan_shape": lead_shape(out),
            "output_shape": out.shape,
            "output_dtype": str(out.dtype),
            "input": {
                "path": self.found.info.path,
                "shape": self.found.source.shape,
                "dtype": self.found.info.dtype,
            },
            "window": None
            if window is None
            else {**window_attrs(window), "radius_at": window.radius_at, "set_by": window.setters},
            "sizes": {
                "input_bytes": self.input_bytes,
                "output_bytes": output_bytes,
                "stored_bytes": stored,
                "reduction": self.input_bytes / output_bytes,
            },
            "speed": {"seconds": seconds, "bytes_per_second": self.input_bytes / seconds},
            "peak_memory": max(self.peak_rss, engine.peak_rss()),
            "cluster": str(self.connection),
            "warnings": self.warnings,
            "verdict": []
            if window is None
            else report.verdict(window, detector, self.ways_out(folded, window)),
        }
        return results

    def ways_out(self, analysis: xr.Dataset, window: Window) -> list[str]:
        """What other options would give; reads the stored profiles only when the crop gained little."""
        detector = (analysis.sizes["source_ky"], analysis.sizes["source_kx"])
        kept = window.shape[0] * window.shape[1] / (detector[0] * detector[1])
        if kept <= report.LITTLE_GAINED:
            return []
        by_target: dict[float, int] = {}
        options = self.config.crop.model_dump(exclude={"enabled", "size", "window"})
        stored = xr.open_zarr(self.outputs.store, group="analysis")
        profile = stored["profile"].data
        total = da.from_array(analysis["total"].values, chunks=profile.chunks[:-1])
        exact = analysis["max_pattern"].dtype.kind in "ui"
        for target in OTHER_TARGETS:
            if target < window.target_retention:
                radii = da.map_blocks(
                    _radii_block,
                    profile,
                    total[..., None],
                    target,
                    self.config.analyze.radius_metric,
                    exact,
                    drop_axis=profile.ndim - 1,
                    dtype=np.float32,
                ).compute()
                other = analysis.assign(radius=analysis["radius"].copy(data=radii))
                by_target[target] = choose_window(other, **options).global_radius or 0
        return report.ways_out(analysis, window, by_target)

    def provenance(self, patterns: xr.DataArray) -> dict[str, Any]:
        """Attributes of the store's root: how it came to be."""
        import stem_dask

        name, n_bytes, changed = self.found.identity
        return {
            "title": Path(self.outputs.store).stem,
            "token": token(self.config, self.found),
            "config": to_dict(self.config),
            "input": {
                "path": name,
                "bytes": n_bytes,
                "modified_ns": changed,
                "notes": list(self.found.info.notes),
            },
            "versions": {
                "stem_dask": stem_dask.__version__,
                **_versions("numpy", "dask", "zarr", "numba"),
            },
        }

    def _run(
        self,
        stage: str,
        outputs: Mapping[str, da.Array],
        like: xr.DataArray,
        sink: Any,
        n_bytes: int,
    ) -> None:
        engine.run(
            outputs,
            len(lead_dims(like)),
            sink,
            client=self.connection.client,
            progress=self._reporter(stage, n_bytes),
        )

    def _reporter(self, stage: str, n_bytes: int | None) -> engine.Progress:
        def report_block(done: int, n: int, record: Record) -> None:
            self.peak_rss = max(self.peak_rss, record.peak_rss)
            if self.progress is not None:
                self.progress(stage, done, n, record, n_bytes or 0)

        return report_block

    def _n_blocks(self, patterns: xr.DataArray) -> int:
        return math.prod(patterns.data.numblocks)

    def _files(self) -> dict[str, int]:
        made = [p for p in self.outputs.all() if Path(p).exists()]
        return {path: report.tree_bytes(path) for path in made}


def _radii_block(profile: Any, total: Any, target: float, metric: str, exact: bool) -> Any:
    flat = radii_for_target(
        profile.reshape(-1, profile.shape[-1]), total.ravel(), target, metric, exact
    )
    return flat.reshape(profile.shape[:-1])


def _block_statistics(out: xr.DataArray) -> dict[str, da.Array]:
    """Largest value and sum of the patterns of every block of the output."""
    data = out.data
    n_lead = data.ndim - 2
    ones = tuple((1,) * n for n in data.numblocks[:n_lead])
    highest = data.map_blocks(
        _highest_block,
        drop_axis=[n_lead, n_lead + 1],
        chunks=ones,
        dtype=np.float64,
        meta=np.empty((0,) * n_lead),
    )
    total = data.map_blocks(
        _sum_block,
        chunks=(*ones, *data.chunks[n_lead:]),
        dtype=np.float64,
        meta=np.empty((0,) * data.ndim),
    )
    return {"highest": highest, "sum": total}


def _highest_block(block: Any) -> Any:
    finite = block[np.isfinite(block)] if block.dtype.kind == "f" else block
    highest = float(finite.max()) if finite.size else -math.inf
    return np.full((1,) * (block.ndim - 2), highest)


def _sum_block(block: Any) -> Any:
    return block.sum(axis=tuple(range(block.ndim - 2)), dtype=np.float64, keepdims=True)


def _exit_code(config: Config, results: Mapping[str, Any]) -> int:
    validation = results["validation"]
    if "passes_min_threshold" not in validation:
        return 0
    n = validation["n_patterns"] - validation["n_empty"]
    allowed = n - math.ceil(config.crop.coverage * n)
    return 4 if n - validation["passes_min_threshold"] > allowed else 0


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}
