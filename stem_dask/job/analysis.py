"""The analysis pass: centers, radii and profiles of every pattern, computed or read from a precomputed analysis."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.config.options import Config
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.model import Region, Window
from stem_dask.core.patterns import axes_of, coordinate, labelled, lead_dims, lead_shape
from stem_dask.core.text import by
from stem_dask.job.context import Job
from stem_dask.job.precomputed import Precomputed
from stem_dask.report import text as report
from stem_dask.stages.analyze import (
    PER_PATTERN,
    REDUCED,
    analysis_attrs,
    analysis_of_blocks,
    fold_analysis,
    stored_radii,
)
from stem_dask.stages.correct import suspected_hot_pixels
from stem_dask.stages.crop import choose_window, filled_fractions
from stem_dask.stages.downsample import check_float16
from stem_dask.writers.spool import SpoolSink
from stem_dask.writers.zarr import open_group


class Profiles(Protocol):
    """The retention profiles of the blocks, before they are joined."""

    def blocks(
        self, n: int, names: Sequence[str] | None = None
    ) -> Iterable[tuple[Region, Mapping[str, NDArray]]]:
        """Region and arrays of blocks 0 … n - 1."""


@dataclass(frozen=True)
class Analyzed:
    """The patterns (with hot pixels masked where requested), their analysis, and their profiles."""

    patterns: xr.DataArray
    analysis: xr.Dataset
    profiles: Profiles


def analysis_options(config: Config) -> dict[str, Any]:
    """Options of the analysis kernel."""
    return config.analyze.model_dump(exclude={"ahead", "known"})


def analyze(job: Job, patterns: xr.DataArray) -> Analyzed:
    """Analyze the patterns; with ``input.mask: auto``, again without the hot pixels that were found."""
    auto, precomputed = job.config.input.mask == "auto", job.prepared.precomputed
    if precomputed is not None:
        found = _from_precomputed(precomputed, patterns, job.config.analyze.target_retention)
    else:
        found = _analyzed(job, patterns)
    job.hot = hot_pixels(found.analysis)
    if auto:
        job.hot = job.state.settled(
            "hot_pixels", job.hot if precomputed is None else precomputed.hot
        )
    if auto and job.hot:
        patterns = job.masked(found.patterns, {"pixels": job.hot})
        if precomputed is None:
            found = _analyzed(job, patterns, "analyze again", "analysis-again")
            job.warnings += report.left_hot_warnings(hot_pixels(found.analysis))
        else:  # the precomputed analysis already excludes them
            found = replace(found, patterns=patterns)
    note_analysis(job, found.analysis)
    return found


def hot_pixels(analysis: xr.Dataset) -> list[list[int]]:
    """[y, x] of suspected hot pixels."""
    positions: list[list[int]] = np.argwhere(suspected_hot_pixels(analysis)).tolist()
    return positions


def note_analysis(job: Job, analysis: xr.Dataset) -> None:
    """Add warnings about the data."""
    job.warnings += report.hot_pixel_warnings(job.hot, masked=job.config.input.mask == "auto")
    job.warnings += report.analysis_warnings(analysis)


def _analyzed(
    job: Job, patterns: xr.DataArray, stage: str = "analyze", folder: str = "analysis"
) -> Analyzed:
    """Analyze block by block into the run's folder, and join everything but the profiles."""
    spool = SpoolSink(f"{job.folder}/{folder}")
    with job.room(patterns, None):
        job.compute(stage, _blocks(job, patterns), patterns, spool)
    return Analyzed(patterns, folded(job, patterns, spool), spool)


def _blocks(job: Job, patterns: xr.DataArray) -> dict[str, da.Array]:
    """The lazy outputs of the pass."""
    options = analysis_options(job.config)
    return {"analysis": analysis_of_blocks(patterns, **options, device=job.device)}


def folded(job: Job, patterns: xr.DataArray, spool: SpoolSink) -> xr.Dataset:
    """Join the analysis of all blocks, without the profiles."""
    options = analysis_options(job.config)
    stored = spool.blocks(math.prod(patterns.data.numblocks), (*PER_PATTERN, *REDUCED))
    n_missing = int((~job.tally.valid(lead_shape(patterns))).sum())
    return fold_analysis(patterns, stored, analysis_attrs(**options), n_missing)


def _from_precomputed(precomputed: Precomputed, patterns: xr.DataArray, target: float) -> Analyzed:
    """Read a precomputed analysis; a different target retention recomputes the radii."""
    stored = open_group(precomputed.store, "analysis")
    analysis = stored.drop_vars("profile").load()
    # a store keeps text in attributes; a crop also keeps the counts there
    if "odd_pixels" in analysis.attrs:
        counts = analysis.attrs.pop("odd_pixels")
        analysis["odd_pixels"] = ("kind", np.array(list(counts.values()), np.int64))
        kinds = list(counts)
    else:
        kinds = analysis.attrs.pop("kind")
    axes = axes_of(patterns)  # the config may replace the calibration
    names = (*lead_dims(patterns), "source_ky", "source_kx")
    coords = {name: coordinate(axis, name) for name, axis in zip(names, axes, strict=True)}
    analysis = labelled(analysis.assign_coords({**coords, "kind": kinds}))
    chunks = tuple(chunks[0] for chunks in patterns.data.chunks[:-2])
    profiles = StoredProfiles(stored["profile"], chunks)
    if analysis.attrs["target_retention"] != target:
        lazy = stored.chunk(dict(zip(lead_dims(stored), chunks, strict=True)))
        exact = analysis["max_pattern"].dtype.kind in "ui"
        radii = stored_radii(lazy, target, str(analysis.attrs["radius_metric"]), exact)
        analysis["radius"] = analysis["radius"].copy(data=radii.compute())
        analysis.attrs["target_retention"] = target
    return Analyzed(patterns, analysis, profiles)


@dataclass(frozen=True)
class StoredProfiles:
    """Profiles of a finished store."""

    profile: xr.DataArray
    chunks: tuple[int, ...]

    def blocks(
        self, n: int, names: Sequence[str] | None = None
    ) -> Iterable[tuple[Region, Mapping[str, NDArray]]]:
        """Region and profiles, a block of the patterns at a time."""
        grid = da.core.normalize_chunks(self.chunks, self.profile.shape[:-1])
        for region in da.core.slices_from_chunks(grid):
            yield region, {"profile": self.profile[region].values}


def stored_window(config: Config, store: str) -> Window:
    """The window that a finished dataset would get by itself, from its stored analysis."""
    stored = open_group(store, "analysis")
    return _window(config, stored.drop_vars("profile").load(), None)


def _window(config: Config, analysis: xr.Dataset, common: Sequence[int] | None) -> Window:
    options = config.crop.model_dump(exclude={"enabled"})
    if options["size"] == "common":
        options["size"] = "auto" if common is None else tuple(common)
    return choose_window(analysis, **options, factor=config.downsample.factor)


def settle_common(job: Job, common: Sequence[int] | None) -> None:
    """A run goes on with the common size that it was begun with, or not at all.

    Raises
    ------
    ConfigError
        When other inputs make another size now.
    """
    if job.config.crop.size != "common":
        return
    now = "its own" if common is None else f"{by(common)} px"
    begun = job.state.settled("common", now)
    if begun != now:
        raise ConfigError(
            f"{job.folder} holds an unfinished run that crops to {begun}, the size of the inputs that it was begun with, "
            f"and crop.size: common makes it {now} now; give the same inputs again, or add --restart to drop it"
        )


def choose(job: Job, analysis: xr.Dataset, common: Sequence[int] | None = None) -> Window:
    """Choose the window and add warnings about it; ``common`` is the size that several datasets share."""
    try:
        window = _window(job.config, analysis, common)
    except SourceError as error:
        raise SourceError(job.with_path(error)) from error
    down = job.config.downsample
    job.warnings += report.window_warnings(window, filled_fractions(analysis, window))
    output = job.config.output
    if output.dtype == "float16" and down.method != "fft" and output.normalize == "none":
        sums = down.method == "bin" and down.reduce == "sum"
        if not sums:  # no mean exceeds the maximum; sums are checked block by block
            check_float16(float(analysis["max_pattern"].max()))
    return window
