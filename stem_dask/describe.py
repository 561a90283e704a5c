"""What a file holds, what a config would do, a config for a file: in words, without computing anything."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from stem_dask.config import Config
from stem_dask.io.read import Found
from stem_dask.kernels.downsample import result_dtype
from stem_dask.plan import inner_chunk, lead_chunks, shard_shape, task_bytes
from stem_dask.report import size


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
    lines.append(f"chunks      {'one run of bytes' if info.chunks is None else _by(info.chunks)}")
    lines += [f"note        {note}" for note in info.notes]
    return tuple(lines)


def describe_job(config: Config, found: Found) -> tuple[str, ...]:
    """What each stage of a job gets and gives: shape, type, blocks, tasks, bytes of a task; what will be written.

    The window is known after the analysis only, unless ``crop.window`` or ``crop.size`` gives it; until then the
    whole detector stands for it, as the upper limit.
    """
    source = found.source
    lead, detector = source.shape[:-2], source.shape[-2:]
    pattern_bytes = math.prod(detector) * source.dtype.itemsize
    part = None if found.info.chunks is None else found.info.chunks[: len(lead)]
    block = lead_chunks(lead, pattern_bytes, config.output.chunk_mb, None, part)
    n_tasks = math.prod(math.ceil(n / c) for n, c in zip(lead, block, strict=True))
    rows: list[tuple[str, str, str, str, str, str]] = [
        ("stage", "shape", "type", "block", "tasks", "bytes a task")
    ]

    def row(stage: str, shape: Sequence[int], dtype: object, *sizes: int) -> None:
        whole = f"{_by(lead)} x {_by(shape)}"
        rows.append(
            (
                stage,
                whole,
                str(dtype),
                _by((*block, *shape)),
                f"{n_tasks:,}",
                size(task_bytes(block, *sizes)),
            )
        )

    row("read", detector, source.dtype, pattern_bytes)
    window, known = _window(config, detector)
    if config.crop.enabled:
        row("analyze", detector, source.dtype, pattern_bytes, max(detector) * 4)
        window_bytes = math.prod(window) * source.dtype.itemsize
        row(
            "crop" if known else "crop (at most)", window, source.dtype, pattern_bytes, window_bytes
        )
    down = config.downsample
    small = tuple(n // down.factor for n in window)
    dtype = result_dtype(source.dtype, down.factor, down.method, down.reduce)
    if config.output.dtype != "auto":
        dtype = dtype.type(0).astype(config.output.dtype).dtype
    out_bytes = math.prod(small) * dtype.itemsize
    row("downsample", small, dtype, math.prod(window) * source.dtype.itemsize, out_bytes)
    shards = shard_shape(block, inner_chunk(block, lead, out_bytes))
    row("store", small, dtype, out_bytes)
    widths = [max(len(r[i]) for r in rows) for i in range(6)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip()
        for r in rows
    ]
    n_files = math.prod(math.ceil(n / c) for n, c in zip(lead, shards, strict=True))
    upper = "" if known or not config.crop.enabled else "at most "
    total = math.prod(lead) * out_bytes
    table += [
        f"reads       {size(math.prod(source.shape) * source.dtype.itemsize)}"
        + (", twice: once to analyze, once to crop" if config.crop.enabled else ""),
        f"writes      {config.output.path}: {upper}{size(total)} before compression, {n_files:,} shards",
        *(f"exports     {Path(config.output.path).with_suffix('.' + kind)}: {upper}{size(total)}"
          for kind in config.output.export),
        "nothing was computed",
    ]  # fmt: skip
    return tuple(table)


def config_for(found: Found) -> str:
    """A commented config for a file: the shipped one with the file's name and what was found in it."""
    template = (Path(__file__).parent / "crop.yaml").read_text(encoding="utf-8")
    name = Path(found.info.path)
    header = "".join(f"# {line}\n" for line in describe_file(found))
    text = template.replace("path: synthetic  ", f"path: {json.dumps(str(name))}  ", 1)
    return header + text.replace("out/synthetic.zarr", json.dumps(f"{name.stem}_cropped.zarr"), 1)


def _window(config: Config, detector: Sequence[int]) -> tuple[tuple[int, int], bool]:
    """The window as far as the config gives it, and whether it does."""
    crop = config.crop
    if not crop.enabled:
        return (detector[0], detector[1]), True
    if crop.window is not None:
        y0, y1, x0, x1 = crop.window
        wanted: tuple[int, int] = (y1 - y0, x1 - x0)
    elif isinstance(crop.size, int):
        wanted = (crop.size, crop.size)
    elif not isinstance(crop.size, str):
        wanted = (crop.size[0], crop.size[1])
    else:
        return (detector[0], detector[1]), False
    from stem_dask.plan import axis_window

    multiple = crop.size_multiple * config.downsample.factor
    height, width = (
        axis_window(n, full, multiple)[0] for n, full in zip(wanted, detector, strict=True)
    )
    return (height, width), True


def _by(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape)
