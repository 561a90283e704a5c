"""stem-dask: all commands."""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stem_dask.io.read import Found
    from stem_dask.options import Config

from stem_dask.classic import add_convert_options, add_preprocess_options
from stem_dask.job_array import add_batch_options, run_configs, write_script
from stem_dask.run import EXIT_CODES, add_run_options, each, guarded, progress_shown, run_file, show


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch a command; returns the exit code."""
    options = _parser().parse_args(argv)
    return guarded(lambda: int(options.command(options)))


def run_command(options: argparse.Namespace) -> int:
    """The whole job of a config."""
    return run_file(options)


def info_command(options: argparse.Namespace) -> int:
    """What files hold."""
    from stem_dask.inputs import found_inputs

    def info(path: str) -> int:
        found = _found(path, overrides)
        from stem_dask.describe import describe_file

        print("\n".join(describe_file(found)))
        return 0

    files, overrides = _files_and_overrides(options)
    return each(found_inputs(files), str, info)


def init_command(options: argparse.Namespace) -> int:
    """A config for a file."""
    from stem_dask.errors import ConfigError

    files, overrides = _files_and_overrides(options)
    if len(files) > 1:
        raise ConfigError(
            f"init takes one file, not {len(files)}; in its config, input.path may be a list or a glob"
        )
    found = _found(files[0], overrides)
    from stem_dask.describe import config_for

    print(config_for(found, overrides), end="")
    return 0


def _files_and_overrides(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Which words are files, and which are key=value."""
    from stem_dask.errors import ConfigError

    files = [word for word in options.words if "=" not in word or os.path.lexists(word)]
    if not files:
        raise ConfigError(f"no file among {', '.join(options.words)}; give one before key=value")
    overrides = [word for word in options.words if word not in files]
    if options.dataset is not None:
        overrides.append(f"input.dataset={options.dataset}")
    return files, overrides


def _found(path: str, overrides: Sequence[str]) -> "Found":
    from stem_dask.config import config_of
    from stem_dask.preflight import described, find_input

    config = config_of(path, overrides)
    return described(config, find_input(config))


def check_command(options: argparse.Namespace) -> int:
    """What a config would do, for each of its inputs."""
    from stem_dask.config import load_configs

    def check(config: "Config") -> int:
        from stem_dask.preflight import prepare

        prepared = prepare(config)
        from stem_dask.describe import describe_job

        print("\n".join(describe_job(prepared.config, prepared.found, prepared.known)))
        if prepared.complete:
            print(f"already complete: {prepared.outputs.path}")
        return 0

    configs = load_configs(options.config, options.overrides)
    code = each(configs, lambda config: str(config.input.path), check)
    if len(configs) > 1:
        print(f"{len(configs)} datasets")
    return code


def verify_command(options: argparse.Namespace) -> int:
    """Test every chunk of a finished store."""
    from stem_dask.errors import StoreError
    from stem_dask.io.verify import damaged_chunks

    damaged = list(damaged_chunks(options.store))
    if damaged:
        raise StoreError(
            f"{options.store} is damaged: {'; '.join(damaged)}; make it again with output.overwrite=true"
        )
    print(f"{options.store}: every chunk is there and holds what was written")
    return 0


def batch_command(options: argparse.Namespace) -> int:
    """The jobs of several configs, here or as a job array."""
    from stem_dask.errors import ConfigError

    if not options.slurm:
        if options.submit:
            raise ConfigError("--submit needs --slurm; without it the jobs run here")
        return run_configs(options)
    print("\n".join(write_script(options)))
    return 0


def keys_command(options: argparse.Namespace) -> int:
    """Keys for a cluster of the user's own."""
    import shlex

    from stem_dask.trust import write_keys

    for name, value in write_keys(options.folder).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def convert_command(options: argparse.Namespace) -> int:
    """A file in another format."""
    from stem_dask.classic import convert_job

    return _run_job(options, convert_job(options))


def preprocess_command(options: argparse.Namespace) -> int:
    """A tensor for training, with the options of the earlier script."""
    from stem_dask.classic import preprocess_job

    return _run_job(options, preprocess_job(options), options.chunk_size)


def _run_job(
    options: argparse.Namespace, job: dict[str, Any], chunk_size: int | None = None
) -> int:
    from stem_dask.batch import run_all
    from stem_dask.config import configs_from

    flag = ["output.overwrite=true"] if options.overwrite else []
    configs = configs_from(job, [*options.overrides, *flag])
    if chunk_size is not None:
        configs = [_in_chunks(config, chunk_size) for config in configs]
    return run_all(
        configs, quiet=options.quiet, restart=options.restart, time_limit=options.time_limit
    )


def _in_chunks(config: "Config", n_patterns: int) -> "Config":
    """The job with so many patterns a task."""
    from stem_dask.preflight import find_input

    mib = chunk_mb(find_input(config), n_patterns)
    output = config.output.model_copy(update={"chunk_mb": mib})
    return config.model_copy(update={"output": output})


def chunk_mb(found: "Found", n_patterns: int) -> float:
    """MiB of so many patterns, as ``output.chunk_mb`` takes it."""
    from stem_dask.errors import ConfigError

    if n_patterns < 1:
        raise ConfigError(f"--chunk_size is {n_patterns}; expected a number of patterns above 0")
    source = found.source
    return n_patterns * source.shape[-1] * source.shape[-2] * source.dtype.itemsize / 2**20


def crop_command(options: argparse.Namespace) -> int:
    """Crop one file into one file, with the options and defaults of the earlier script."""
    from stem_dask.errors import ConfigError
    from stem_dask.io.publish import refuse_existing, remove, run_folder

    output = Path(options.output).absolute()
    if output.suffix not in (".pt", ".hspy", ".zarr"):
        raise ConfigError(
            f"--output {options.output}: expected a name ending in .pt, .hspy or .zarr"
        )
    if (options.input is None) == (not options.test_mode):
        raise ConfigError("give --input FILE, or --test-mode for made-up data")
    beside = [output.with_name(f"{output.stem}_results.json")]
    if not options.no_visualization:
        beside.append(output.with_name(f"{output.stem}_visualization.png"))
    for path in (output, *beside):
        refuse_existing(path, options.overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(run_folder(output))
    folder.mkdir(exist_ok=True)
    try:
        source = (
            _test_data(folder, options) if options.test_mode else Path(options.input).absolute()
        )
        return _crop(options, source, output, folder, beside)
    finally:
        remove(folder)


def _crop(
    options: argparse.Namespace, source: Path, output: Path, folder: Path, beside: list[Path]
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
        outcome = run(config, say=say, progress=progress)
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
            keep_dtype=as_tensor,
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stem-dask",
        description="Out-of-core 4D-STEM preprocessing: read, find the window, crop, check, downsample, export.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    add_run_options(add("run", run_command, "run the whole job of a config"))
    sub = add("check", check_command, "say what a config would do; computes nothing")
    sub.add_argument("config", help="YAML file")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override any key of the config"
    )
    sub = add("verify", verify_command, "read a finished store again and test every checksum")
    sub.add_argument("store", help="NAME.zarr")
    example = "print a commented config for a file: stem-dask init scan.dm4 > crop.yaml"
    for name, command, text in (
        ("info", info_command, "say what a file holds"),
        ("init", init_command, example),
    ):
        sub = add(name, command, text)
        sub.add_argument(
            "words",
            nargs="+",
            metavar="FILE | key=value",
            help="a file (of info: several, or globs), then what it does not say, such as input.scan_shape=[256,256]",
        )
        sub.add_argument(
            "--dataset", help="name or number of the array, when the file holds several"
        )
    text = "the jobs of several configs: one after another here, or as a job array of SLURM"
    add_batch_options(add("batch", batch_command, text))
    text = "make keys for a scheduler and workers of your own, and print what has Dask use them"
    sub = add("keys", keys_command, text)
    sub.add_argument("folder", help="where they go; all nodes must see it, and nobody else")
    add_convert_options(add("convert", convert_command, "write files in another format"))
    text = "make tensors for training: downsample, cast, normalize"
    add_preprocess_options(add("preprocess", preprocess_command, text))
    _add_crop_options(add("crop", crop_command, "crop one file into one file"))
    return parser


def _add_crop_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--input", help="any readable file")
    sub.add_argument("--output", required=True, help="its suffix decides: .pt, .hspy or .zarr")
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


if __name__ == "__main__":
    sys.exit(main())
