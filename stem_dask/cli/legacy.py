"""convert, preprocess and crop: the commands of the earlier scripts, as options of a job."""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stem_dask.cli.progress import progress_shown, show
from stem_dask.cli.run import add_stop_options
from stem_dask.cli.signals import each, stoppable

if TYPE_CHECKING:
    from stem_dask.cli.jobs import Row
    from stem_dask.config.options import Config
    from stem_dask.job.outputs import Outputs
    from stem_dask.job.prepare import Prepared
    from stem_dask.job.results import Outcome
    from stem_dask.readers.open import Found


def add_convert_options(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``stem-dask convert``."""
    _add_common(sub, "its suffix decides: .hspy, .zspy, .zarr, .h5, .npy or .pt")
    sub.add_argument(
        "--no-rechunk",
        action="store_true",
        help="chunks as large as the blocks that are read, instead of about 1 MiB (.zspy: 8 MiB) of whole patterns",
    )
    sub.add_argument("--chunk-mb", type=float, default=64.0, help="MiB that one task reads (64)")
    sub.add_argument("--codec", choices=("auto", "lz4", "zstd", "gzip", "none"), default="auto")
    sub.add_argument(
        "--analyze",
        action="store_true",
        help="analyze in the same read, so that a later crop reads the data only once",
    )


def convert_job(options: argparse.Namespace) -> dict[str, Any]:
    """The job of ``stem-dask convert``: one pass, patterns unchanged.

    Examples
    --------
    >>> parser = argparse.ArgumentParser()
    >>> add_convert_options(parser)
    >>> convert_job(parser.parse_args(["--input", "a.dm4", "--output", "a.hspy"]))["crop"]
    {'enabled': False}
    """
    return {
        "input": {"path": _paths(options.input)},
        "analyze": {"ahead": options.analyze},
        "crop": {"enabled": False},
        "output": {
            "path": options.output,
            "export": [],
            "figure": False,
            "rechunk": not options.no_rechunk,
            "chunk_mb": options.chunk_mb,
            "codec": options.codec,
        },
    }


def add_preprocess_options(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``stem-dask preprocess``."""
    _add_common(sub, "mostly NAME.pt: a bare tensor (N, 1, H, W)")
    sub.add_argument(
        "--downsample", type=int, default=1, metavar="K", help="K x K pixels become one"
    )
    sub.add_argument("--mode", choices=("bin", "stride", "gauss", "fft"), default="bin")
    sub.add_argument("--sigma", type=float, help="width of the blur for gauss, in pixels (K / 2)")
    for names, kind, text in (
        (("--scan_step", "--scan-step"), int, "every n-th position of the scan only"),
        (("--chunk_size", "--chunk-size"), int, "patterns that one task reads"),
    ):
        sub.add_argument(*names, type=kind, metavar="N", help=text)
    sub.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    text = "log(1 + x), then mean 0 and standard deviation 1 over the whole dataset"
    sub.add_argument("--normalize", choices=("none", "log-zscore"), default="none", help=text)
    text = "no longer needed: memory never grows with the file"
    sub.add_argument("--memory_efficient", "--memory-efficient", action="store_true", help=text)


def preprocess_job(options: argparse.Namespace) -> dict[str, Any]:
    """The job of ``stem-dask preprocess``, except ``--chunk_size``, which requires the size of a pattern."""
    return {
        "input": {"path": _paths(options.input), "scan_step": options.scan_step or 1},
        "crop": {"enabled": False},
        "downsample": {
            "factor": options.downsample,
            "method": options.mode,
            "sigma": options.sigma,
        },
        "output": {
            "path": options.output,
            "dtype": options.dtype,
            "normalize": options.normalize,
            "layout": "tensor",
            "export": [],
            "figure": False,
        },
    }


def separated(options: argparse.Namespace) -> None:
    """Move words of the form key=value after ``--input`` to the overrides, unless a file of that name exists.

    Examples
    --------
    >>> given = argparse.Namespace(input=["a.npy", "crop.size=40"], overrides=[])
    >>> separated(given); given.input, given.overrides
    (['a.npy'], ['crop.size=40'])
    """
    words = [w for w in options.input or () if "=" in w and not os.path.lexists(w)]
    if words:
        options.input = [word for word in options.input if word not in words]
        options.overrides = [*words, *options.overrides]


def chunk_mb(found: "Found", n_patterns: int) -> float:
    """MiB of ``n_patterns``, for ``output.chunk_mb``."""
    from stem_dask.core.errors import ConfigError

    if n_patterns < 1:
        raise ConfigError(f"--chunk_size is {n_patterns}; expected a number of patterns above 0")
    source = found.source
    return n_patterns * source.shape[-1] * source.shape[-2] * source.dtype.itemsize / 2**20


def _paths(given: list[str]) -> str | list[str]:
    return given[0] if len(given) == 1 else given


def _add_common(sub: argparse.ArgumentParser, output: str) -> None:
    text = "any readable file, files, or a glob"
    sub.add_argument("--input", required=True, nargs="+", help=text)
    text = f"{output}; with several inputs {{stem}} is their name"
    sub.add_argument("--output", required=True, help=text)
    text = "any key of a config, such as input.scan_shape=[256,256]"
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=text)
    add_stop_options(sub)


def crop_command(options: argparse.Namespace) -> int:
    """Crop every input into its own file; the others continue if one fails."""
    from stem_dask.config.inputs import found_inputs, named_outputs
    from stem_dask.core.errors import ConfigError
    from stem_dask.storage.location import refuse_url

    separated(options)
    options.overwrite |= "output.overwrite=true" in options.overrides  # advice suggests it
    for name, places in (("--output", [options.output]), ("--input", options.input or [])):
        for place in places:
            refuse_url(name, place, "this command works on files here; use stem-dask run")
    if (not options.input) == (not options.test_mode):
        raise ConfigError("give --input FILE, or --test-mode for made-up data")
    if options.test_mode:
        return _crop_into(options, None, options.output, time_limit=options.time_limit)
    inputs = found_inputs(options.input)
    outputs = named_outputs(inputs, options.output)
    if len(inputs) == 1:
        return _crop_into(options, inputs[0], outputs[0], time_limit=options.time_limit)
    if any(word.replace(" ", "") == "crop.size=common" for word in options.overrides):
        raise ConfigError(
            "crop.size=common needs the windows of all inputs first: stem-dask run configs/batch.yaml with these paths "
            "as input.path does that, or give --size"
        )
    return _crop_all(options, inputs, outputs)


def _crop_all(options: argparse.Namespace, inputs: Sequence[str], outputs: Sequence[str]) -> int:
    """Crop one input after another, and print a table at the end."""
    from stem_dask.cli.jobs import Row, table
    from stem_dask.core.errors import InterruptedRunError, StemDaskError

    rows = [Row(source, output) for source, output in zip(inputs, outputs, strict=True)]
    started, limit = time.monotonic(), options.time_limit

    def crop_one(row: Row) -> int:
        left = None if limit is None else max(0.0, limit - (time.monotonic() - started))
        try:
            row.exit_code = _crop_into(options, row.input, row.output, row, left)
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
    options: argparse.Namespace,
    given: str | None,
    place: str,
    row: "Row | None" = None,
    time_limit: float | None = None,
) -> int:
    """Crop one input, or test data, into one file; the intermediate store is removed."""
    from stem_dask.core.errors import ConfigError
    from stem_dask.storage.publish import make_folder

    output = Path(place).expanduser().absolute()
    if output.suffix not in (".pt", ".hspy", ".zarr"):
        raise ConfigError(f"--output {place}: expected a name ending in .pt, .hspy or .zarr")
    outputs = _outputs(output, figure=not options.no_visualization)
    make_folder(output)
    source = _test_data(output, options) if given is None else Path(given).expanduser().absolute()
    config = _config(options, source, output, outputs)
    with stoppable(time_limit):
        outcome = _outcome(config, outputs, quiet=options.quiet, restart=options.restart)
    if row is not None:
        row.results = outcome.results
    if not options.quiet:
        show(outcome)
    return outcome.exit_code


def _outputs(output: Path, *, figure: bool) -> "Outputs":
    """Names of the outputs; a .pt or .hspy is exported from an intermediate store, ``NAME.pt.zarr``."""
    from stem_dask.job.outputs import Outputs

    name, is_store = output.with_name(output.stem), output.suffix == ".zarr"
    return Outputs(
        str(output) if is_store else f"{output}.zarr",
        () if is_store else (str(output),),
        f"{name}_results.json",
        f"{name}_visualization.png" if figure else None,
        None,
    )


def _outcome(config: "Config", outputs: "Outputs", *, quiet: bool, restart: bool) -> "Outcome":
    """Run or resume the job, unless it is complete already."""
    from stem_dask.engine.state import token_of
    from stem_dask.job.outputs import check_lengths
    from stem_dask.job.prepare import begun, prepare
    from stem_dask.job.results import already_complete

    kept = replace(outputs, path=outputs.exports[0], exports=()) if outputs.exports else outputs
    check_lengths(outputs)
    # store and folder still exist if a kill prevented their removal
    prepared = prepare(config, outputs if os.path.lexists(outputs.store) else kept)
    if prepared.complete and token_of(outputs.path) is None:
        return already_complete(config, kept)
    if not prepared.complete:
        prepared = replace(prepared, outputs=outputs)
        _refuse_store_of_others(outputs)
    with begun(prepared, restart=restart) as state:
        if state.is_complete:
            outcome = already_complete(config, kept)
        else:
            from stem_dask.job.run import run

            with progress_shown(quiet) as (say, progress):
                outcome = run(prepared, say=say, progress=progress, state=state, alone=True)
            lines = tuple(line for line in outcome.lines if not line.startswith("file "))
            files = tuple(f"file        {path}" for path in kept.local())
            outcome = replace(outcome, lines=(*lines, *files))
        if prepared.outputs != kept:
            _drop_store(replace(prepared, outputs=kept), outputs.store)
        state.forget()
    return outcome


def _drop_store(prepared: "Prepared", store: str) -> None:
    """Copy the provenance from the intermediate store to results.json, and remove the store."""
    import json

    from stem_dask.job.results import made_by
    from stem_dask.report.text import write_json
    from stem_dask.storage.publish import opened, remove

    path = prepared.outputs.results
    with opened(path, "r") as file:
        results = json.load(file)
    write_json(path, {**results, **made_by(prepared)})
    remove(store)


def _refuse_store_of_others(outputs: "Outputs") -> None:
    """Refuse an existing store at the path of the intermediate store, which is removed in the end."""
    from stem_dask.core.errors import OutputExistsError
    from stem_dask.engine.state import token_of

    store = outputs.store
    if outputs.exports and os.path.lexists(store) and token_of(store) is None:
        raise OutputExistsError(
            f"{store} exists, and {Path(outputs.exports[0]).name} is made from a store of that name; move it away, or choose "
            "another --output"
        )


def _config(
    options: argparse.Namespace, source: Path, output: Path, outputs: "Outputs"
) -> "Config":
    from stem_dask.config.load import config_of, configs_from
    from stem_dask.job.prepare import find_input

    found = find_input(config_of(source, options.overrides))
    job = _crop_options(options, str(source), outputs.path, found)
    (config,) = configs_from(job, options.overrides)
    if output.suffix != ".pt" or source.suffix != ".pt":
        return config
    channel = len(found.info.stored_shape) == 4 and len(found.source.shape) == 3
    # a bare tensor of the input's rank; config files have no such layout
    layout = {"layout": "tensor" if channel else "bare"}
    return config.model_copy(update={"output": config.output.model_copy(update=layout)})


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
    output: dict[str, Any] = {
        "path": store,
        "export": [],
        "figure": not options.no_visualization,
        "overwrite": options.overwrite,
    }
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


def _test_data(output: Path, options: argparse.Namespace) -> Path:
    """Write test data next to the output; the file is kept, so that the same command resumes with it."""
    import torch

    from stem_dask.job.cropper import create_test_data
    from stem_dask.storage.publish import opened, publish, refuse_taken, temporary, temporary_names

    size = f"{options.test_patterns}x{options.test_size}"
    path = output.with_name(f"{output.stem}_test_data_{size}.pt")
    if not path.exists():
        refuse_taken(temporary_names(path))
        with opened(temporary(path), "wb") as file:
            torch.save(create_test_data(options.test_patterns, options.test_size), file)
        publish(path)
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
    add_stop_options(sub)
    sub.add_argument("--test-mode", action="store_true", help="crop made-up Airy discs")
    sub.add_argument("--test-patterns", type=int, default=100)
    sub.add_argument("--test-size", type=int, default=256)
