"""Text of ``info``, ``check`` and ``init``: what a file holds, what a config does, a config for a file."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from stem_dask.cluster.connect import planned
from stem_dask.config.options import Config
from stem_dask.core.chunks import inner_chunk, shard_shape
from stem_dask.core.text import size
from stem_dask.core.window import uncropped
from stem_dask.job.memory_and_disk import (
    Shapes,
    disk_need,
    fitting_block,
    fitting_slab,
    free_bytes,
    memory_of,
    projected_bytes,
    shapes,
    task_bytes,
    task_memory,
    transposed_bytes,
    with_cuda,
)
from stem_dask.job.outputs import Outputs
from stem_dask.job.precomputed import Precomputed
from stem_dask.readers.open import Found


def describe_file(found: Found) -> tuple[str, ...]:
    """Shape, type, axes, chunks and notes of an input."""
    info = found.info
    n_bytes = math.prod(info.shape) * found.source.dtype.itemsize
    lines = [
        f"file        {info.path}",
        f"kind        {info.kind}",
        f"patterns    {_by(info.shape)} {info.dtype}, {size(n_bytes)}",
    ]
    for axis in info.axes:
        if axis.calibrated:
            what = f"{axis.scale:.6g} {axis.units} a step, first at {axis.offset:.6g} {axis.units}"
        else:
            what = "NOT CALIBRATED"
        lines.append(f"axis        {axis.name:8} {axis.size:6,}  {what}")
    lines += _microscope(found)
    lines.append(f"chunks      {'one run of bytes' if info.chunks is None else _by(info.chunks)}")
    lines += [f"note        {note}" for note in info.notes]
    return tuple(lines)


def _microscope(found: Found) -> list[str]:
    """A line with beam energy and camera length, if either is known."""
    info = found.info
    energy = info.given.get("beam_energy_kv", info.about.get("beam_energy_kv"))
    length = info.about.get("camera_length_mm")
    words = [f"{energy:g} kV"] if energy else []
    words += [f"camera length {length:g} mm"] if length else []
    return [f"beam        {', '.join(words)}"] if words else []


def describe_job(
    config: Config, found: Found, precomputed: Precomputed | None = None
) -> tuple[str, ...]:
    """Shape, type, blocks, tasks and bytes per task of each stage, and the outputs.

    The window is known only after the analysis, unless ``crop.window`` or ``crop.size`` gives it; until then the
    whole detector stands for it, as the upper limit.
    """
    source, what = found.source, shapes(config, found)
    n_bytes = math.prod(source.shape) * source.dtype.itemsize
    worker = with_cuda(config, planned(config.cluster, n_bytes, config.device))
    block = fitting_block(config, found, worker)
    n_tasks = math.prod(math.ceil(n / c) for n, c in zip(source.shape, block, strict=False))
    transposed = transposed_bytes(found)
    slab = fitting_slab(found, block, worker) if transposed else None
    table = _stages(config, found, what, block, n_tasks, precomputed)
    inner = inner_chunk(block, source.shape[:-2], what.out_bytes)
    shards = shard_shape(block, inner)
    n_files = math.prod(math.ceil(n / c) for n, c in zip(source.shape, shards, strict=False))
    pieces = f", {n_files:,} shards" if config.output.path.endswith(".zarr") else ""
    upper = "" if what.known else "at most "
    total = size(math.prod(source.shape[:-2]) * what.out_bytes)
    need = projected_bytes(memory_of(config, found, slab=slab), math.prod(block), worker)
    has = "" if worker.limit is None else f", which has {size(worker.limit)}"
    disk = disk_need(config, found, n_tasks)
    outputs = Outputs.of(config)
    folder = Path(outputs.path).parent
    on_gpu = worker.threads * task_memory(config, what, math.prod(block)).on_gpu
    return (
        *table,
        *_uncropped(config, what),
        f"reads       {size(n_bytes)}{_times(config, precomputed)}",
        *((f"transposes  {'at most ' * (precomputed is not None)}{size(transposed)} first into an intermediate file: the input is detector-first",)
          if transposed else ()),
        f"writes      {config.output.path}: {upper}{total} before compression{pieces}",
        *(f"exports     {path}: {upper}{total}" for path in outputs.exports),
        f"memory      {size(need)} a worker with {worker.threads} thread{'s' * (worker.threads != 1)}{has}",
        *((f"gpu         {size(on_gpu)} of its memory for the tasks of a worker",) if on_gpu else ()),
        f"disk        {size(disk.least)} to {size(disk.most)} in all, {size(free_bytes(folder))} free in {folder}",
        "nothing was computed",
    )  # fmt: skip


def _uncropped(config: Config, what: Shapes) -> list[str]:
    """A warning for every axis that a given window covers entirely."""
    if config.crop.given is None:
        return []
    axes = zip(("ky", "kx"), what.window, what.detector, strict=True)
    return [f"warning     {uncropped(name, full)}" for name, size, full in axes if size == full]


def _stages(
    config: Config,
    found: Found,
    what: Shapes,
    block: Sequence[int],
    n_tasks: int,
    precomputed: Precomputed | None,
) -> list[str]:
    """The table of the stages, one line each."""
    lead, dtype = found.source.shape[:-2], found.source.dtype
    rows = [("stage", "shape", "type", "block", "tasks", "bytes a task")]

    def row(stage: str, shape: Sequence[int], dtype: object, *sizes: int) -> None:
        moved = size(task_bytes(block, *sizes))
        whole = f"{_by(lead)} x {_by(shape)}"
        rows.append((stage, whole, str(dtype), _by((*block, *shape)), f"{n_tasks:,}", moved))

    pattern_bytes = math.prod(what.detector) * dtype.itemsize
    read_as = what.patterns
    window_bytes = math.prod(what.window) * read_as.itemsize
    row("read", what.detector, dtype, pattern_bytes)
    if (config.crop.enabled and precomputed is None) or config.analyze.ahead:
        row("analyze", what.detector, read_as, pattern_bytes, max(what.detector) * 4)
    if config.crop.enabled:
        stage = "crop" if what.known else "crop (at most)"
        row(stage, what.window, read_as, pattern_bytes, window_bytes)
    row("downsample", what.out, what.dtype, window_bytes, what.out_bytes)
    if config.output.normalize != "none":
        row("normalize", what.out, what.dtype, 2 * what.out_bytes)
    row("store", what.out, what.dtype, what.out_bytes)
    widths = [max(len(r[i]) for r in rows) for i in range(6)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip()
        for r in rows
    ]


def _times(config: Config, precomputed: Precomputed | None) -> str:
    """How often the input is read."""
    if precomputed is not None:
        return f", once: {precomputed.note}"
    if config.input.mask == "auto":
        return ", twice, or three times when there are hot pixels: to analyze, to analyze without them, to crop"
    return ", twice: once to analyze, once to crop" if config.crop.enabled else ""


def config_for(found: Found, overrides: Sequence[str] = ()) -> str:
    """A commented config for a file: the shipped one with its path, a header that describes it, and overrides."""
    text = (Path(__file__).parents[1] / "config" / "crop.yaml").read_text(encoding="utf-8")
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
