"""crop: one file, or several, each cropped into one file, with the options and defaults of the earlier script."""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stem_dask.io.read import Found
    from stem_dask.table import Row

from stem_dask.classic import chunk_mb, separated
from stem_dask.run import each, progress_shown, show


def crop_command(options: argparse.Namespace) -> int:
    """Crop every input into a file of its own; one that fails stops no other."""
    from stem_dask.errors import ConfigError
    from stem_dask.inputs import found_inputs, named_outputs
    from stem_dask.urls import refuse_url

    separated(options)
    for name, places in (("--output", [options.output]), ("--input", options.input or [])):
        for place in places:
            refuse_url(name, place, "this command works on files here; use stem-dask run")
    if (not options.input) == (not options.test_mode):
        raise ConfigError("give --input FILE, or --test-mode for made-up data")
    if options.test_mode:
        return _crop_into(options, None, options.output)
    inputs = found_inputs(options.input)
    outputs = named_outputs(inputs, options.output)
    if len(inputs) == 1:
        return _crop_into(options, inputs[0], outputs[0])
    if any(word.replace(" ", "") == "crop.size=common" for word in options.overrides):
        raise ConfigError(
            "crop.size=common needs the windows of all inputs first: stem-dask run configs/batch.yaml with these paths "
            "as input.path does that, or give --size"
        )
    return _crop_all(options, inputs, outputs)


def _crop_all(options: argparse.Namespace, inputs: Sequence[str], outputs: Sequence[str]) -> int:
    """One after another, and a table at the end."""
    from stem_dask.errors import InterruptedRunError, StemDaskError
    from stem_dask.table import Row, table

    rows = [Row(source, output) for source, output in zip(inputs, outputs, strict=True)]

    def crop_one(row: Row) -> int:
        try:
            row.exit_code = _crop_into(options, row.input, row.output, row)
        except InterruptedRunError:
            raise
        except (StemDaskError, OSError) as error:
            row.exit_code, row.words = getattr(error, "exit_code", 5), str(error)
            raise
        return row.exit_code

    try:
        return each(rows, lambda row: row.input, crop_one)
    finally:
        with progress_shown(options.quiet) as (say, _):
            for line in table(rows):
                say(line)


def _crop_into(
    options: argparse.Namespace, given: str | None, place: str, row: "Row | None" = None
) -> int:
    """Crop one input, or made-up data, into one file."""
    from stem_dask.errors import ConfigError
    from stem_dask.io.publish import make_folder, refuse_existing, remove, run_folder

    output = Path(place).expanduser().absolute()
    if output.suffix not in (".pt", ".hspy", ".zarr"):
        raise ConfigError(f"--output {place}: expected a name ending in .pt, .hspy or .zarr")
    beside = [output.with_name(f"{output.stem}_results.json")]
    if not options.no_visualization:
        beside.append(output.with_name(f"{output.stem}_visualization.png"))
    for path in (output, *beside):
        refuse_existing(path, options.overwrite)
    make_folder(output)
    folder = Path(run_folder(output))
    folder.mkdir(exist_ok=True)
    try:
        source = (
            _test_data(folder, options) if given is None else Path(given).expanduser().absolute()
        )
        return _crop(options, source, output, folder, beside, row)
    finally:
        remove(folder)


def _crop(
    options: argparse.Namespace,
    source: Path,
    output: Path,
    folder: Path,
    beside: list[Path],
    row: "Row | None",
) -> int:
    """Run the job into the run's folder, export from there, and move what was asked for beside the output."""
    from stem_dask.config import config_of, configs_from
    from stem_dask.exports import export_from_store
    from stem_dask.io.publish import publish, temporary
    from stem_dask.pipeline import run
    from stem_dask.preflight import find_input

    found = find_input(config_of(source, options.overrides))
    store = folder / f"{output.stem}.zarr"
    job = _crop_options(options, str(source), str(store), found)
    (config,) = configs_from(job, options.overrides)
    with progress_shown(options.quiet) as (say, progress):
        outcome = run(config, say=say, progress=progress, alone=True)
    if row is not None:
        row.results = outcome.results
    notes: list[str] = []
    if output.suffix == ".zarr":
        shutil.move(store, temporary(output))
        publish(output)
    else:
        as_tensor = output.suffix == ".pt" and source.suffix == ".pt"
        channel = len(found.info.stored_shape) == 4 and len(found.source.shape) == 3
        layout = ("tensor" if channel else "bare") if as_tensor else "scan"
        notes = export_from_store(
            str(store),
            str(output),
            layout=layout,
            overwrite=options.overwrite,
        )
    for path in beside:
        shutil.move(folder / path.name, path)
    if not options.quiet:
        kept = tuple(line for line in outcome.lines if not line.startswith("file "))
        noted = tuple(f"warning     {note}" for note in notes)
        written = tuple(f"file        {path}" for path in (output, *beside))
        show(replace(outcome, lines=(*kept, *noted, *written)))
    return outcome.exit_code


def _crop_options(
    options: argparse.Namespace, source: str, store: str, found: "Found"
) -> dict[str, Any]:
    crop: dict[str, Any] = {
        "coverage": options.coverage,
        "margin_pixels": options.margin_pixels,
        "align": options.align,
    }
    if options.size is not None:
        crop["size"] = options.size
    analyze: dict[str, Any] = {
        "target_retention": options.target_retention,
        "center_method": options.center_method,
    }
    if options.manual_center is not None:
        analyze["manual_center"] = options.manual_center
    output: dict[str, Any] = {"path": store, "export": [], "figure": not options.no_visualization}
    if options.chunk_size is not None:
        output["chunk_mb"] = chunk_mb(found, options.chunk_size)
    return {
        "input": {"path": source},
        "analyze": analyze,
        "crop": crop,
        "validate": {"min_retention": options.min_retention},
        "output": output,
        "device": "gpu" if options.use_gpu else "cpu",
    }


def _test_data(folder: Path, options: argparse.Namespace) -> Path:
    import torch

    from stem_dask.cropper import create_test_data

    path = folder / "test_data.pt"
    torch.save(create_test_data(options.test_patterns, options.test_size), path)
    return path


def add_crop_options(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``stem-dask crop``."""
    sub.add_argument("--input", nargs="+", help="any readable file, files, or a glob")
    text = "its suffix decides: .pt, .hspy or .zarr; with several inputs {stem} is their name"
    sub.add_argument("--output", required=True, help=text)
    text = "any key of a config, such as input.scan_shape=[256,256]"
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=text)
    sub.add_argument(
        "--target-retention", type=float, default=0.98, help="share of the intensity to keep"
    )
    sub.add_argument("--min-retention", type=float, default=0.95, help="lowest acceptable share")
    sub.add_argument("--margin-pixels", type=int, default=3, help="added around the radius")
    sub.add_argument(
        "--align",
        choices=("pattern", "fixed"),
        default="pattern",
        help="each pattern, or one window",
    )
    sub.add_argument(
        "--coverage", type=float, default=1.0, help="share of the patterns that set the radius"
    )
    sub.add_argument("--size", type=int, help="size of the window, instead of the radius found")
    sub.add_argument(
        "--center-method", choices=("centroid", "center", "manual"), default="centroid"
    )
    sub.add_argument("--manual-center", type=float, nargs=2, metavar=("Y", "X"))
    sub.add_argument("--chunk-size", type=int, help="patterns a task")
    sub.add_argument("--use-gpu", action="store_true")
    sub.add_argument("--no-visualization", action="store_true", help="no picture")
    sub.add_argument("--quiet", action="store_true", help="print errors only")
    sub.add_argument("--overwrite", action="store_true", help="replace an older output")
    sub.add_argument("--test-mode", action="store_true", help="crop made-up Airy discs")
    sub.add_argument("--test-patterns", type=int, default=100)
    sub.add_argument("--test-size", type=int, default=256)
