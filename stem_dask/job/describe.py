"""Text of ``info``, ``check`` and ``init``: what a file holds, what a config does, a config for a file."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.cluster.connect import planned
from stem_dask.core.chunks import inner_chunk, shard_shape
from stem_dask.core.text import size
from stem_dask.core.window import uncropped
from stem_dask.job import budget
from stem_dask.job.plan import Plan
from stem_dask.readers.open import Found
from stem_dask.storage.publish import run_folder


def describe_file(found: Found) -> tuple[str, ...]:
    """Shape, type, axes, beam, chunks and notes of an input."""
    info = found.info
    lines = [
        f"file        {info.path}",
        f"kind        {info.kind}",
        f"patterns    {_by(info.shape)} {info.dtype}, {size(found.n_bytes)}",
    ]
    for axis in info.axes:
        what = "NOT CALIBRATED"
        if axis.calibrated:
            what = f"{axis.scale:.6g} {axis.units} a step, first at {axis.offset:.6g} {axis.units}"
        lines.append(f"axis        {axis.name:8} {axis.size:6,}  {what}")
    energy = info.given.get("beam_energy_kv", info.about.get("beam_energy_kv"))
    length = info.about.get("camera_length_mm")
    words = [f"{energy:g} kV"] if energy else []
    words += [f"camera length {length:g} mm"] if length else []
    lines += [f"beam        {', '.join(words)}"] * bool(words)
    lines.append(f"chunks      {'one run of bytes' if info.chunks is None else _by(info.chunks)}")
    return (*lines, *(f"note        {note}" for note in info.notes))


def describe_job(plan: Plan, command: str = "", cores: int | None = None) -> tuple[str, ...]:
    """Shape, type, blocks, tasks and bytes per task of each stage, the outputs, and the line that submits ``command`` to SLURM.

    The window is known only after the analysis, unless ``crop.window`` or ``crop.size`` gives it; until then the
    whole detector stands for it, as the upper limit.
    """
    config, found, outputs = plan.config, plan.found, plan.outputs
    source, what, crop = found.source, budget.shapes(config, found), config.crop
    lead, precomputed = source.shape[:-2], plan.precomputed
    worker = budget.with_cuda(config, planned(config.cluster, found.n_bytes, config.device))
    block = budget.fitting_block(config, found, worker)
    n_tasks = math.prod(math.ceil(n / c) for n, c in zip(lead, block, strict=True))

    # the table of the stages
    rows = [("stage", "shape", "type", "block", "tasks", "bytes a task")]

    def row(stage: str, shape: Sequence[int], dtype: np.dtype, *pattern_bytes: int) -> None:
        moved, whole = size(math.prod(block) * sum(pattern_bytes)), f"{_by(lead)} x {_by(shape)}"
        rows.append((stage, whole, str(dtype), _by((*block, *shape)), f"{n_tasks:,}", moved))

    read_bytes = math.prod(what.detector) * source.dtype.itemsize
    window_bytes = math.prod(what.window) * what.patterns.itemsize
    row("read", what.detector, source.dtype, read_bytes)
    if (crop.enabled and precomputed is None) or config.analyze.ahead:
        row("analyze", what.detector, what.patterns, read_bytes, max(what.detector) * 4)
    if crop.enabled:
        stage = "crop" if what.known else "crop (at most)"
        row(stage, what.window, what.patterns, read_bytes, window_bytes)
    row("downsample", what.out, what.dtype, window_bytes, what.out_bytes)
    if config.output.normalize != "none":
        row("normalize", what.out, what.dtype, 2 * what.out_bytes)
    row("store", what.out, what.dtype, what.out_bytes)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]

    if crop.given is not None:
        axes = zip(("ky", "kx"), what.window, what.detector, strict=True)
        lines += [f"warning     {uncropped(name, full)}" for name, n, full in axes if n == full]
    n_passes, why, kept = _passes(plan, math.prod(block))
    times = ""
    if crop.enabled and config.output.patterns:
        times = ", once" if n_passes == 1 else ", twice: once to analyze, once to crop"
        times += f" ({why})" * bool(why)
    if precomputed is not None:
        times = ", once"
        lines.append(plan.analysis_note)
    lines.append(f"reads       {size(found.n_bytes)}{times}")
    slab = None
    if transposed := budget.transposed_bytes(found):
        slab = budget.fitting_slab(found, block, worker)
        most = "at most " if precomputed is not None else ""
        lines.append(
            f"transposes  {most}{size(transposed)} first into an intermediate file: the input is detector-first"
        )
    upper = "" if what.known else "at most "
    total = size(math.prod(lead) * what.out_bytes)
    shards = shard_shape(block, inner_chunk(block, lead, what.out_bytes))
    n_files = math.prod(math.ceil(n / c) for n, c in zip(lead, shards, strict=True))
    pieces = f", {n_files:,} shards" if config.output.path.endswith(".zarr") else ""
    lines.append(f"writes      {config.output.path}: {upper}{total} before compression{pieces}")
    lines += [f"exports     {path}: {upper}{total}" for path in outputs.exports]
    need = budget.projected_bytes(
        budget.memory_of(config, found, slab=slab), math.prod(block), worker
    )
    has = "" if worker.limit is None else f", which has {size(worker.limit)}"
    threads = f"{worker.threads} thread{'s' * (worker.threads != 1)}"
    lines.append(f"memory      {size(need)} a worker with {threads}{has}")
    if on_gpu := worker.threads * budget.task_memory(config, what, math.prod(block)).on_gpu:
        lines.append(f"gpu         {size(on_gpu)} of its memory for the tasks of a worker")
    if kept:
        lines.append(
            f"keeps       about {size(kept)} before compression in {run_folder(outputs.path)}: the part of each pattern that "
            "the window may need, until the output is complete"
        )
    disk, folder = (
        budget.disk_need(config, found, n_tasks, kept=kept),
        Path(outputs.path).parent,
    )
    free = f"{size(budget.free_bytes(folder))} free in {folder}"
    lines.append(f"disk        {size(disk.least)} to {size(disk.most)} in all, {free}")
    if command and (line := sbatch_line(plan, command, cores)):
        lines += [f"sbatch      {line}", f"            {_time_of(_batch_job(plan, cores))}"]
    return (*lines, "nothing was computed")


def sbatch_line(plan: Plan, command: str, cores: int | None = None) -> str | None:
    """The shell command that submits a run to SLURM as one job; None for a job that is complete or has its workers elsewhere."""
    cluster = plan.config.cluster
    elsewhere = cluster.address or cluster.scheduler_file or cluster.kind == "slurm"
    if plan.complete or elsewhere:
        return None
    job = _batch_job(plan, cores)
    minutes = job.seconds // 60
    given = {
        "cpus-per-task": job.cores,
        "gpus-per-node": job.gpus or None,
        "mem": f"{max(2, math.ceil(job.memory / 2**30))}G",
        "time": cluster.walltime or f"{minutes // 60:02}:{minutes % 60:02}:00",
        "partition": cluster.queue,
        "account": cluster.account,
    }
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    plain = not set(command) & set(
        '"$`\\!'
    )  # and then easier to read than with escaped single quotes
    wrapped = f'"{command}"' if plain else shlex.quote(command)
    return f"sbatch {shlex.join([*words, *cluster.job_extra])} --wrap {wrapped}"


def _batch_job(plan: Plan, cores: int | None) -> budget.BatchJob:
    passes = 1 + (plan.config.crop.enabled and plan.precomputed is None)
    return budget.batch_job(plan.config, plan.found, passes, cores)


def _time_of(job: budget.BatchJob) -> str:
    core, node = size(budget.CORE_SPEED), size(budget.NODE_SPEED)
    return (
        f"the time is for {size(job.moved)} at {core}/s a core, {node}/s in all at most; a job that SLURM ends resumes when "
        "the same line is submitted again"
    )


def job_document(plan: Plan, command: str = "", cores: int | None = None) -> dict[str, Any]:
    """What a config would do, for programs; the window is null where the analysis finds it, and sizes are then upper limits.

    ``sbatch`` submits ``command`` to SLURM.
    """
    config, found = plan.config, plan.found
    what = budget.shapes(config, found)
    worker = budget.with_cuda(config, planned(config.cluster, found.n_bytes, config.device))
    block = budget.fitting_block(config, found, worker)
    lead = found.source.shape[:-2]
    n_tasks = math.prod(math.ceil(n / c) for n, c in zip(lead, block, strict=True))
    slab = budget.fitting_slab(found, block, worker) if budget.transposed_bytes(found) else None
    memory = budget.memory_of(config, found, slab=slab)
    n_passes, _, kept = _passes(plan, math.prod(block))
    disk = budget.disk_need(config, found, n_tasks, kept=kept)
    return {
        "input": found.info.path,
        "input_bytes": int(found.n_bytes),
        "outputs": list(plan.outputs.all()),
        "complete": plan.complete,
        "analysis": None if plan.precomputed is None else plan.precomputed.store,
        "window": None if config.crop.given is None else [int(n) for n in what.window],
        "shape": [int(n) for n in (*lead, *what.out)],
        "dtype": str(what.dtype),
        "n_tasks": n_tasks,
        "passes": n_passes,
        "memory_per_worker": int(budget.projected_bytes(memory, math.prod(block), worker)),
        "disk_least": int(disk.least),
        "disk_most": int(disk.most),
        "sbatch": sbatch_line(plan, command, cores) if command else None,
    }


def shipped() -> dict[str, Path]:
    """The configs and the templates for SLURM that come with the package, by their names without suffix."""
    folder = Path(__file__).parents[1] / "config"
    return {
        path.stem: path for pattern in ("*.yaml", "slurm/*.sh") for path in folder.glob(pattern)
    }


def _passes(plan: Plan, positions: int) -> tuple[int, str, int]:
    """How often the input is read, why, and the bytes that are kept meanwhile; see `stem_dask.job.budget.passes`."""
    config, found = plan.config, plan.found
    once = plan.precomputed is not None or not (config.crop.enabled and config.output.patterns)
    n, why = (1, "") if once else budget.passes(config, found, positions)
    return n, why, budget.usual_kept_bytes(config, found) if why and n == 1 else 0


def config_for(found: Found, overrides: Sequence[str] = ()) -> str:
    """A commented config for a file: the shipped one with its path, a header that describes it, and overrides."""
    text = shipped()["crop"].read_text(encoding="utf-8")
    name = Path(found.info.path)
    header = "".join(f"# {line}\n" for line in describe_file(found))
    for key, value in (
        ("input.path", json.dumps(found.info.path)),
        ("output.path", json.dumps(f"{name.stem}_cropped.zarr")),
        *(override.split("=", 1) for override in overrides),
    ):
        section, _, leaf = key.strip().rpartition(".")
        place = rf"^{section}:\n(?:  .*\n)*?  {leaf}: " if section else rf"^{leaf}: "
        found_key = re.search(rf"({place})[^#\n]*", text, re.MULTILINE)
        if found_key is not None:
            start, end = found_key.end(1), found_key.end()
            text = f"{text[:start]}{value.strip()}  {text[end:]}"
    return header + text


def _by(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape)
