"""The passes of a job before the one that writes: survey, analysis, and the choice of the window."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.config.options import Config, Descan, Edges
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.metadata import attribute
from stem_dask.core.model import Region, Window
from stem_dask.core.patterns import (
    as_patterns,
    attrs_of,
    axes_of,
    coordinate,
    labelled,
    lead_dims,
    lead_shape,
)
from stem_dask.core.text import by, size
from stem_dask.core.window import surplus
from stem_dask.job import budget, summary
from stem_dask.job.job import Job
from stem_dask.job.plan import analysis_in, reference_of
from stem_dask.job.results import center_quality
from stem_dask.kernels.pixels import DEAD, HOT, STOP
from stem_dask.readers.open import Found
from stem_dask.stages.analyze import (
    PER_PATTERN,
    REDUCED,
    analysis_attrs,
    analysis_dataset,
    analysis_of_blocks,
    fold_analysis,
    fold_thumbnails,
    stored_radii,
)
from stem_dask.stages.analyze import analyze as analyze_patterns
from stem_dask.stages.calibrate import (
    calibrated_by_disc,
    disc_calibration,
    refuse_uncalibrated,
    stated_radius,
)
from stem_dask.stages.correct import apply_mask, corrected, hot_in_mean
from stem_dask.stages.crop import (
    Kept,
    choose_window,
    disc_radius_of,
    filled_fractions,
    scattered_radii_of,
    window_origins,
)
from stem_dask.stages.descan import fit_descan, fit_of, fit_places, refuse_rough, with_descan
from stem_dask.stages.downsample import check_float16
from stem_dask.stages.friedel import SIDE, check_scan, places_of, surroundings, symmetric_blocks
from stem_dask.stages.open import (
    lazy_picked,
    lazy_sample,
    open_patterns,
    positions_of_sample,
)
from stem_dask.stages.survey import (
    Survey,
    refuse_no_disc,
    resolved_method,
    survey_sample,
)
from stem_dask.writers import zarr
from stem_dask.writers.spool import PatternSpool, SplitSink, SpoolSink, packed_bytes

#: of a larger share of the detector, compressing takes as long as reading it again from a disk of this machine
MOST_CUT = 0.6

#: what would take more than this share of the input's bytes is not kept: to write and read it costs as much as the input
MOST_KEPT = 0.35

#: how much more than that of the sample is expected
SPARE = 1.2


def settle_common(job: Job, common: Sequence[int] | None) -> None:
    """Refuse to go on with another common size than the run was begun with."""
    if job.config.crop.size != "common":
        return
    now = "its own" if common is None else f"{by(common)} px"
    begun = job.state.settled("common", now)
    if begun != now:
        raise ConfigError(
            f"{job.folder} holds an unfinished run that crops to {begun}, and with these inputs crop.size: common makes it "
            f"{now} now; give the same inputs again, or add --restart to drop it"
        )


def analyze(job: Job) -> None:
    """Analyze the patterns, or read a precomputed analysis, and fit the descan."""
    if job.plan.precomputed is None:
        settle_passes(job)
        spool = SpoolSink(f"{job.folder}/analysis")
        outputs: dict[str, da.Array] = lazy_analysis(job)
        sink: SpoolSink | SplitSink = spool
        if job.kept is not None:
            # first, so that the analysis is of the patterns that pass
            outputs = {"patterns": job.kept.cut(job.patterns), **outputs}
            # nothing will be cut from them where an interrupted run had published its output
            first = None if job.is_published() else PatternSpool(job.kept.folder)
            sink = SplitSink(first, ("patterns",), spool)
        with job.room(job.n_blocks):
            job.compute("analyze", outputs, sink)
        fold(job, spool)
    else:
        _read_analysis(job, job.plan.precomputed.store)
    fit(job)
    job.analysis = with_calibration(job)
    note_analysis(job)


def settle_passes(job: Job) -> None:
    """Settle whether the input is read once, and the part of the detector that the first pass then keeps for the second."""
    if not job.config.output.patterns:
        return
    words = job.state.settled("passes", lambda: _passes(job))
    if words["box"] is not None:
        job.kept, job.kept_bytes = _kept(job, words["box"]), words["bytes"]
        job.again = job.kept_bytes
    if words["why"]:
        job.say(f"passes      {'two' if job.kept is None else 'one'}: {words['why']}")


def _kept(job: Job, box: Sequence[int]) -> Kept:
    y0, y1, x0, x1 = box
    return Kept(f"{job.folder}/kept", (y0, y1, x0, x1), job.found.source.dtype.itemsize)


def _passes(job: Job) -> dict[str, Any]:
    """The part ``box`` [y0, y1, x0, x1] of the detector to keep, None to read the input twice, and why; and its bytes."""
    config, found = job.config, job.plan.found
    n, why = budget.passes(config, found, job.positions)
    twice: dict[str, Any] = {"box": None, "why": why}
    if n == 2:
        return twice
    job.samples = True
    sample, where = _sample(job)
    try:
        box = config.crop.window or _box_of(job, sample, where)
    except (ConfigError, SourceError) as error:
        return {**twice, "why": f"{why}, but the sample has no window ({error})"}
    kept = _kept(job, box)
    cut = math.prod(kept.shape) / math.prod(sample.shape[-2:])
    if cut > MOST_CUT and config.analyze.passes == "auto" and not budget.far(found):
        return {**twice, "why": f"{why}, but windows take {cut:.0%} of the detector"}
    packed = packed_bytes(kept.cut(sample).compute(scheduler="sync"))
    n_bytes = math.ceil(
        SPARE * packed * math.prod(lead_shape(job.patterns)) / math.prod(lead_shape(sample))
    )
    share = n_bytes / budget.file_bytes(found)
    if share > MOST_KEPT:
        return {**twice, "why": f"{why}, but {share:.0%} of its size would be kept for the crop"}
    most = budget.disk_need(config, found, job.n_blocks, kept.shape, n_bytes).most
    free = budget.free_bytes(Path(job.outputs.path).parent)
    if free < most:
        missing = f"up to {size(most)} would be written, and {size(free)} are free"
        return {**twice, "why": f"{why}, but the disk is too small: {missing}"}
    return {"box": list(box), "why": why, "bytes": n_bytes}


def _sample(job: Job) -> tuple[xr.DataArray, list[list[int]]]:
    """The patterns of the sample as they are analyzed, in one lazy block, and their places along the scan axes."""
    read, where = _read_sample(job)
    lead = tuple(map(len, where))
    *scan, ky, kx = axes_of(job.patterns)
    axes = [*(replace(axis, size=n) for axis, n in zip(scan, lead, strict=True)), ky, kx]
    data = da.from_array(read.reshape(*lead, *read.shape[-2:]), chunks=-1)
    sample = as_patterns(data, axes)
    if job.mask is not None:
        sample = apply_mask(sample, job.mask, job.config.input.mask_fill)
    return sample, where


def _box_of(job: Job, sample: xr.DataArray, where: Sequence[Sequence[int]]) -> Edges:
    """The part [y0, y1, x0, x1] of the detector that holds the windows of all patterns of the sample, enlarged.

    Patterns between those of the sample may need a little more.
    """
    lead = lead_shape(sample)
    options = _options(job)
    if job.survey is not None:  # the sample spans the scan
        options["survey"] = replace(job.survey, scan_shape=lead)
    centers = None if job.friedel is None else job.friedel.surface[np.ix_(*where)]
    lazy = analysis_of_blocks(sample, **options, centers=centers)
    found: dict[str, NDArray] = lazy.compute(scheduler="sync").get()
    reduced = {name: found[name][(0,) * len(lead)] for name in REDUCED}
    analysis = analysis_dataset(sample, found, reduced, analysis_attrs(**options))
    crop = job.config.crop
    align = "fixed" if crop.align == "fixed" else "pattern"
    crop = crop.model_copy(update={"coverage": 1.0, "align": align})
    window = _window(job.config.model_copy(update={"crop": crop}), analysis, None)
    box: list[int] = []
    origins = window_origins(analysis, window)
    for origin, n, full in zip(origins, window.shape, sample.shape[-2:], strict=True):
        first, last = int(origin.min()), int(origin.max()) + n
        more = surplus(last - first)
        box += max(0, first - more), min(full, last + more)
    return box[0], box[1], box[2], box[3]


def with_calibration(job: Job) -> xr.Dataset:
    """The analysis, with what the direct disc says about the detector's scale."""
    assert job.analysis is not None
    attrs = {name: value for name, value in job.analysis.attrs.items() if name != "calibration"}
    if job.calibration:
        attrs["calibration"] = job.calibration
    return job.analysis.drop_attrs(deep=False).assign_attrs(attrs)


def fit(job: Job) -> None:
    """Fit the descan of a scan in which discs were found, and of any scan where windows follow it."""
    assert job.analysis is not None
    needed = job.config.crop.enabled and job.config.crop.align == "descan"
    method, given = job.analysis.attrs["center_method"], job.config.descan != Descan()
    if not (needed or given) and method not in ("disc", "friedel"):
        return
    try:
        if job.friedel is None:
            job.analysis = with_descan(job.analysis, fit_of(job.analysis, **_descan_options(job)))
        else:
            job.analysis = with_descan(job.analysis, job.friedel)
    except ConfigError:
        if needed or given:
            raise
        return
    if needed:
        refuse_rough(job.analysis)
        job.warnings += summary.descan_warnings(job.analysis)


def _descan_options(job: Job) -> dict[str, Any]:
    options = job.config.descan
    return {"order": options.order, "region": options.region, "reference": _reference(job)}


def _reference(job: Job) -> xr.Dataset | None:
    """The vacuum scan with its fit: from its stored analysis, or from a new one of the whole scan."""
    where = reference_of(job.config)
    if where is None:
        return None
    try:
        if isinstance(where, str):
            stored = zarr.open_group(where, "analysis")
            if "descan" in stored.attrs:
                return stored
            return fit_descan(stored.drop_vars("profile").load())
        options = job.config.input.model_dump(exclude={"path", "scan_roi", "scan_step"})
        if job.config.analyze.center_method == "friedel":
            options["mask"] = None  # the beam stop is taken out for it
        elif options["mask"] is not None:
            options["mask"] = job.mask
        patterns = open_patterns(where.info.path, **options)
        radius = job.config.analyze.disc_radius
        found = analyze_patterns(patterns, center_method="disc", disc_radius=radius)
        return fit_descan(found.drop_vars("profile").compute())
    except ConfigError as error:
        raise ConfigError(f"descan.reference: {error}") from error


def survey(job: Job) -> None:
    """Survey a sample of the patterns, once per run, and mask what ``input.mask`` auto or stop find."""
    config, stored = job.config, job.plan.precomputed
    method = config.analyze.center_method
    if config.analyze.calibrate == "disc":
        refuse_uncalibrated(job.patterns, config.analyze.convergence_mrad)
    words: Any = None
    if stored is not None:
        words = attribute(zarr.open_group(stored.store, "analysis").attrs, "survey")
    elif job.surveys:
        words = job.state.settled("survey", lambda: _surveyed(job).to_dict())
    if words is not None:
        job.survey = Survey.from_dict(words)
        if stored is None:
            refuse_no_disc(job.survey, method)
        _mask_suspected(job)
    _calibrate(job)
    if words is not None and stored is None and method == "friedel":
        _find_symmetry(job)


def _calibrate(job: Job) -> None:
    """Compare the scale of the detector's axes with that of the direct disc, and replace it if asked."""
    options = job.config.analyze
    job.calibration = disc_calibration(job.patterns, job.survey, options.convergence_mrad)
    if options.convergence_mrad is not None:
        job.patterns = job.patterns.assign_attrs(convergence_angle_mrad=options.convergence_mrad)
    if options.calibrate == "disc":
        if not job.calibration:
            why = "it was not surveyed" if job.survey is None else job.survey.why
            raise ConfigError(
                f"analyze.calibrate is disc, and no direct disc is found: {why}; give analyze.disc_radius in px, or "
                "input.calibration for ky and kx"
            )
        job.patterns = calibrated_by_disc(job.patterns, job.calibration)
    if job.calibration:
        job.calibration["applied"] = options.calibrate == "disc"
    job.warnings += summary.scale_warnings(job.calibration)


def _find_symmetry(job: Job) -> None:
    """Find the center of symmetry at places of the scan, and fit the surface that all patterns get."""
    assert job.survey is not None
    lead = lead_shape(job.patterns)
    check_scan(lead)
    columns = SIDE * min(4, len(places_of(lead)[1]))
    around = surroundings(lead)
    where = [one.ravel().tolist() for one in around]
    picked = _corrected(job, lazy_picked(job.found, where, (SIDE, columns)))
    spool = SpoolSink(f"{job.folder}/friedel")
    blocks = {"friedel": symmetric_blocks(picked, job.survey)}
    with job.room(job.n_blocks):
        n = len(job.run("friedel", blocks, spool, 2, picked.nbytes))
    found = np.empty((*map(len, places_of(lead)), 2))
    for (rows, across), block in spool.blocks(n, ("symmetric",)):
        place = (slice(*(i // SIDE for i in (one.start, one.stop))) for one in (rows, across))
        found[tuple(place)] = block["symmetric"]
    part = job.patterns.attrs.get("scan_part")
    job.friedel = fit_places(found, around, lead, part, **_descan_options(job))


def _corrected(job: Job, picked: xr.DataArray) -> xr.DataArray:
    """Chosen patterns of the input with dark and gain references applied, as `open_input` does."""
    return corrected(picked, job.config.input.dark, job.config.input.gain)


def pattern_at(job: Job, index: tuple[int, ...]) -> NDArray:
    """One pattern (ky, kx) of the input as it is analyzed; no others of its block are read."""
    one = _corrected(job, lazy_picked(job.found, [[i] for i in index], (1,) * len(index)))
    if job.mask is not None:
        one = apply_mask(one, job.mask, job.config.input.mask_fill)
    return np.asarray(one.data.compute(scheduler="sync")).reshape(one.shape[-2:])


def _surveyed(job: Job) -> Survey:
    """Survey the sample; where no disc is found, again with the radius that convergence angle and calibration imply."""
    sample, where = _read_sample(job)
    asked = job.survey_options
    more: dict[str, Any] = {
        "given_mask": job.mask,
        "apply_stop": job.config.input.mask == "stop",
        "device": job.device,
    }
    found = survey_sample(sample, where, lead_shape(job.patterns), **asked, **more)
    stated = stated_radius(job.patterns, job.config.analyze.convergence_mrad)
    if found.radius is None and stated is not None and asked["center_method"] in ("auto", "disc"):
        asked["disc_radius"] = stated
        found = survey_sample(sample, where, lead_shape(job.patterns), **asked, **more)
    return found


def _read_sample(job: Job) -> tuple[NDArray, list[list[int]]]:
    """The patterns (n, ky, kx) of the sample, read by tasks of its own unless this run has read them, and their places."""
    sample, where = lazy_sample(job.found, job.positions), positions_of_sample(job.found)
    spool, n = SpoolSink(f"{job.folder}/sample"), math.prod(sample.data.numblocks)
    if job.survey is None or not os.path.isdir(spool.folder):
        patterns, lead = _corrected(job, sample), len(lead_dims(sample))
        with job.room(job.n_blocks):
            records = job.run("survey", {"sample": patterns.data}, spool, lead, patterns.nbytes)
        job.tally.note(replace(r, extra={"retries": r.extra.get("retries", 0)}) for r in records)
    blocks = (block["sample"] for _, block in spool.blocks(n, ("sample",)))
    return np.concatenate([one.reshape(-1, *sample.shape[-2:]) for one in blocks]), where


def clean_sample(job: Job) -> tuple[NDArray, NDArray] | None:
    """The sample without bad pixels, and its positions; None where there is no disc, or the analysis is precomputed."""
    if job.survey is None or job.survey.radius is None or job.plan.precomputed is not None:
        return None
    sample, where = _read_sample(job)
    sample[:, job.survey.flags > 0] = 0
    if job.left is not None:
        sample[:, job.left] = 0
    positions = np.stack([one.ravel() for one in np.meshgrid(*where, indexing="ij")], axis=-1)
    return sample, positions


def _mask_suspected(job: Job) -> None:
    """Mask suspected bad pixels in the data, if ``input.mask`` says so."""
    kinds = {"auto": HOT | DEAD, "stop": HOT | DEAD | STOP}.get(str(job.config.input.mask), 0)
    if job.survey is not None and (job.survey.flags & kinds).any():
        job.patterns = job.masked(job.patterns, (job.survey.flags & kinds) > 0)


def note_analysis(job: Job) -> None:
    """Look for hot pixels once more, in the mean of all patterns, and add the warnings about the data."""
    assert job.analysis is not None
    mask = job.config.input.mask
    applied = mask if isinstance(mask, str) and mask in ("auto", "stop") else None
    job.left = hot_in_mean(job.analysis)
    job.warnings += summary.analysis_warnings(job.analysis, job.survey, job.left, applied)


def hot_pixels(job: Job) -> list[list[int]]:
    """[y, x] of all suspected hot pixels."""
    found = np.zeros(job.patterns.shape[-2:], np.bool_) if job.left is None else job.left
    if job.survey is not None:
        found = found | ((job.survey.flags & HOT) > 0)
    positions: list[list[int]] = np.argwhere(found).tolist()
    return positions


def center_of(job: Job) -> dict[str, Any]:
    """How the centers were found, for the results; empty without an analysis."""
    if job.analysis is None:
        return {}
    found = {"method": job.analysis.attrs["center_method"], "disc_radius": None, "why": ""}
    if job.survey is not None:
        found["disc_radius"] = job.survey.radius
        if found["method"] == "centroid" and job.config.analyze.center_method == "auto":
            found["why"] = job.survey.why
    return found | center_quality(job.analysis)


def _options(job: Job) -> dict[str, Any]:
    """The resolved options of the analysis."""
    options = job.config.analyze
    kept = options.model_dump(include={"manual_center", "radius_metric", "target_retention"})
    return {
        **kept,
        "center_method": resolved_method(options.center_method, job.survey),
        "threshold": options.threshold if job.survey is None else job.survey.threshold,
        "survey": job.survey,
    }


def lazy_analysis(job: Job) -> dict[str, da.Array]:
    """The analysis of the patterns, one lazy array for the engine."""
    centers = None if job.friedel is None else job.friedel.surface
    options = {**_options(job), "centers": centers, "device": job.device}
    return {"analysis": analysis_of_blocks(job.patterns, **options)}


def fold(job: Job, spool: SpoolSink) -> None:
    """Join the analysis of all blocks, without the profiles, which stay in the spool."""
    stored = spool.blocks(job.n_blocks, (*PER_PATTERN, *REDUCED))
    n_missing = int((~job.tally.valid(lead_shape(job.patterns))).sum())
    attrs = analysis_attrs(**_options(job))
    job.analysis = fold_analysis(job.patterns, stored, attrs, n_missing)
    job.thumbnails = fold_thumbnails(job.patterns, spool.blocks(job.n_blocks, ("thumbnails",)))
    job.profiles = lambda: spool.blocks(job.n_blocks, ("profile",))


def _read_analysis(job: Job, store: str) -> None:
    """Read a precomputed analysis; a different target retention recomputes the radii."""
    stored, patterns = zarr.open_group(store, "analysis"), job.patterns
    # radii by scattered intensity are of the target of that crop
    analysis = stored.drop_vars(["profile", "radius_scattered"], errors="ignore").load()
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
    target = job.config.analyze.target_retention
    if analysis.attrs["target_retention"] != target:
        lazy = stored.chunk(dict(zip(lead_dims(stored), chunks, strict=True)))
        exact = analysis["max_pattern"].dtype.kind in "ui"
        radii = stored_radii(lazy, target, str(analysis.attrs["radius_metric"]), exact)
        analysis["radius"] = analysis["radius"].copy(data=radii.compute())
        analysis.attrs["target_retention"] = target

    def profiles() -> Iterator[tuple[Region, Mapping[str, NDArray]]]:
        grid = da.core.normalize_chunks(chunks, stored["profile"].shape[:-1])
        for region in da.core.slices_from_chunks(grid):
            yield region, {"profile": stored["profile"][region].values}

    job.analysis, job.profiles = analysis, profiles
    job.thumbnails = zarr.thumbnails_of(store)


def stored_window(config: Config, store: str) -> Window:
    """The window that a finished dataset would get by itself, from its stored analysis."""
    stored = zarr.open_group(store, "analysis")
    return _window(config, stored.drop_vars("profile").load(), None)


def window_for(found: Found, config: Config, store: str) -> Window:
    """The fixed window of a stored analysis of these patterns, with the options ``crop`` of a config.

    Raises ConfigError if the store holds the analysis of other patterns, or the window follows the beam.
    """
    about = analysis_in(store)
    if about is None:
        raise ConfigError(
            f"{store} holds no analysis of whole patterns; make one with stem-dask analyze"
        )
    made_from = about["input"]
    same = (made_from["bytes"], made_from["modified_ns"]) == tuple(found.identity[1:])
    if not same or about["shape"] != list(found.source.shape):
        raise ConfigError(
            f"{store} was made from {made_from['path']} ({by(about['shape'])}), and not from the patterns of {found.info.path} "
            f"({by(found.source.shape)}) in their present state; analyze them again"
        )
    if config.crop.align != "fixed":
        raise ConfigError(
            f"crop.align is {config.crop.align}, which gives each pattern a window of its own; a view has one (fixed)"
        )
    return stored_window(config, store)


def _window(config: Config, analysis: xr.Dataset, common: Sequence[int] | None) -> Window:
    options = config.crop.model_dump(exclude={"enabled"})
    if options["size"] == "common":
        options["size"] = "auto" if common is None else tuple(common)
    return choose_window(analysis, **options, factor=config.downsample.factor)


def _with_scattered_radii(job: Job) -> xr.Dataset:
    """The analysis with the radius that each pattern needs for its scattered intensity, from the profiles of all blocks."""
    assert job.analysis is not None
    radii = np.empty(lead_shape(job.patterns), np.float32)
    target = job.config.analyze.target_retention
    for region, block in job.profiles():
        radii[region] = scattered_radii_of(job.analysis, block["profile"], target, region)
    return job.analysis.assign(
        radius_scattered=(lead_dims(job.patterns), radii, attrs_of("radius_scattered"))
    )


def choose(job: Job, common: Sequence[int] | None = None) -> Window:
    """Choose the window and add warnings about it; ``common`` is the size that several datasets share."""
    assert job.analysis is not None
    if job.config.crop.criterion == "scattered" and disc_radius_of(job.analysis) is not None:
        job.analysis = _with_scattered_radii(job)
    try:
        window = _window(job.config, job.analysis, common)
    except SourceError as error:
        raise SourceError(job.with_path(error)) from error
    job.warnings += summary.window_warnings(window, filled_fractions(job.analysis, window))
    down, output = job.config.downsample, job.config.output
    sums = down.method == "bin" and down.reduce == "sum"
    means = down.method != "fft" and not sums and output.normalize == "none"
    if output.dtype == "float16" and means:
        # no mean exceeds the maximum; sums are checked block by block
        check_float16(float(job.analysis["max_pattern"].max()))
    return window
