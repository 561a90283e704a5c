"""convert, preprocess and crop: the commands of the earlier scripts, as tables of flags that stand for keys of a config."""

import argparse
import contextlib
import os
from typing import TYPE_CHECKING, Any

from stem_dask.cli.run import add_stop_options

if TYPE_CHECKING:
    from stem_dask.config.options import Config

_CODECS = ("auto", "lz4", "zstd", "gzip", "none")
_LATER = "analyze in the same read, so that a later crop reads the data only once"
_UNCHUNKED = "chunks as large as the blocks that are read, instead of about 1 MiB (.zspy: 8 MiB) of whole patterns"
_ZSCORE = "log(1 + x), then mean 0 and standard deviation 1 over the whole dataset"

#: per command: what its --output is, keys that it sets, and its flags; a flag with a key of a config sets that key
COMMANDS: dict[str, tuple[str, dict[str, Any], tuple[tuple[str, str, dict[str, Any]], ...]]] = {
    "convert": (
        "its suffix decides: .hspy, .zspy, .zarr, .h5, .hdf5, .emd, .npy or .pt",
        {"crop.enabled": False, "output.export": [], "output.figure": False},
        (
            ("--no-rechunk", "output.rechunk", {"action": "store_false", "help": _UNCHUNKED}),
            ("--chunk-mb", "output.chunk_mb", {"type": float, "default": 64.0, "help": "MiB that one task reads (64)"}),
            ("--chunk_size --chunk-size", "chunk_size", {"type": int, "metavar": "N", "help": "or so many patterns"}),
            ("--codec", "output.codec", {"choices": _CODECS, "default": "auto"}),
            ("--analyze", "analyze.ahead", {"action": "store_true", "help": _LATER}),
        ),
    ),
    "preprocess": (
        "mostly NAME.pt: a bare tensor (N, 1, H, W)",
        {"crop.enabled": False, "output.export": [], "output.figure": False, "output.layout": "tensor"},
        (
            ("--downsample", "downsample.factor", {"type": int, "default": 1, "metavar": "K", "help": "K x K pixels become one"}),
            ("--mode", "downsample.method", {"choices": ("bin", "stride", "gauss", "fft"), "default": "bin"}),
            ("--sigma", "downsample.sigma", {"type": float, "help": "width of the blur for gauss, in pixels (K / 2)"}),
            ("--scan_step --scan-step", "input.scan_step", {"type": int, "metavar": "N", "help": "every n-th position of the scan only"}),
            ("--chunk_size --chunk-size", "chunk_size", {"type": int, "metavar": "N", "help": "patterns that one task reads"}),
            ("--dtype", "output.dtype", {"choices": ("float32", "float16"), "default": "float32"}),
            ("--normalize", "output.normalize", {"choices": ("none", "log-zscore"), "default": "none", "help": _ZSCORE}),
            ("--memory_efficient --memory-efficient", "unused", {"action": "store_true", "help": "no longer needed: memory never grows with the file"}),
        ),
    ),
    "crop": (
        "its suffix decides: .pt, .hspy, .zarr, .zspy, .h5, .hdf5, .emd or .npy",
        {"output.export": []},
        (
            ("--target-retention", "analyze.target_retention", {"type": float, "help": "share of the intensity to keep"}),
            ("--min-retention", "validate.min_retention", {"type": float, "help": "lowest acceptable share"}),
            ("--margin-pixels", "crop.margin_pixels", {"type": int, "help": "added around the radius"}),
            ("--align", "crop.align", {"choices": ("fixed", "descan", "pattern"), "help": "one window, or one that follows the beam"}),
            ("--coverage", "crop.coverage", {"type": float, "help": "share of the patterns that set the radius"}),
            ("--size", "crop.size", {"type": int, "help": "size of the window, instead of the radius found"}),
            ("--center-method", "analyze.center_method", {"choices": ("auto", "disc", "centroid", "friedel", "center", "manual")}),
            ("--manual-center", "analyze.manual_center", {"type": float, "nargs": 2, "metavar": ("Y", "X")}),
            ("--chunk-size", "chunk_size", {"type": int, "help": "patterns a task"}),
            ("--use-gpu", "device", {"action": "store_const", "const": "gpu"}),
            ("--no-visualization", "output.figure", {"action": "store_false", "help": "no picture"}),
            ("--test-mode", "test_mode", {"action": "store_true", "help": "crop made-up Airy discs"}),
            ("--test-patterns", "test_patterns", {"type": int, "default": 100}),
            ("--test-size", "test_size", {"type": int, "default": 256}),
        ),
    ),
}  # fmt: skip

#: defaults of the earlier cropping script, whose command line has --input
EARLIER = {"crop.align": "pattern", "crop.coverage": 1.0, "analyze.center_method": "centroid"}


def add_script_options(sub: argparse.ArgumentParser, command: str) -> None:
    """The arguments of one of these commands."""
    output, fixed, flags = COMMANDS[command]
    sub.set_defaults(name=command, **fixed)
    sub.usage = f"stem-dask {command} INPUT ... OUTPUT [options] [key=value ...]"
    text = "files or globs to read, then the output; any key of a config, such as input.scan_shape=[256,256]"
    sub.add_argument("words", nargs="*", metavar="INPUT OUTPUT | key=value", help=text)
    text = "as INPUT"
    if command == "crop":
        text += "; aligns every pattern on its own centroid by default, as the earlier script did"
    sub.add_argument("--input", nargs="+", dest="input.path", metavar="INPUT", help=text)
    text = f"as OUTPUT: {output}; with several inputs {{stem}} is their name"
    sub.add_argument("--output", dest="output.path", metavar="OUTPUT", help=text)
    for flag, key, options in flags:
        if "type" in options:
            options = {"metavar": flag[2:].upper().replace("-", "_"), **options}
        sub.add_argument(*flag.split(), dest=key, **options)
    add_stop_options(sub)


def job_of(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The sections of the job that the flags describe, and its overrides, of which some may stand among the inputs.

    Examples
    --------
    >>> parser = argparse.ArgumentParser()
    >>> add_script_options(parser, "convert")
    >>> job, overrides = job_of(parser.parse_args(["a.npy", "a.hspy", "crop.size=40"]))
    >>> job["input"], job["output"]["path"], job["crop"], overrides
    ({'path': 'a.npy'}, 'a.hspy', {'enabled': False}, ['crop.size=40'])
    """
    from stem_dask.core.errors import ConfigError

    values = {key: value for key, value in vars(options).items() if "." in key or key == "device"}
    given = values["input.path"]
    made_up = getattr(options, "test_mode", False)
    if options.name == "crop" and (given or made_up):
        known = {key: value for key, value in values.items() if value is not None}
        values = {**values, **EARLIER, **known}
    words = [*(given or ()), *options.words]
    overrides = [word for word in words if "=" in word and not os.path.lexists(word)]
    paths = [word for word in words if word not in overrides]
    named = values["output.path"] is not None
    lacks_output = not named and not [word for word in options.words if word in paths]
    if lacks_output or len(paths) + named + made_up < 2:
        missing = "output" if paths and not named else "input"
        raise ConfigError(
            f"the {missing} is missing; as in: stem-dask {options.name} scan.dm4 out.zarr"
        )
    if not named:
        values["output.path"] = paths.pop()
    values["input.path"] = paths[0] if len(paths) == 1 else paths or None
    job: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if value is not None:
            (job.setdefault(section, {}) if section else job)[name] = value
    flag = ["output.overwrite=true"] if options.overwrite else []
    return job, [*overrides, *flag]


def script_command(options: argparse.Namespace) -> int:
    """Run the job of the flags for every input."""
    from stem_dask.cli.jobs import run_all
    from stem_dask.config.load import configs_from
    from stem_dask.core.errors import ConfigError

    job, overrides = job_of(options)
    test_data, is_crop = None, options.name == "crop"
    if is_crop:
        if ("path" in job.get("input", {})) == options.test_mode:
            raise ConfigError("give an input, or --test-mode for made-up data")
        if options.test_mode:
            size = f"{options.test_patterns}x{options.test_size}"
            test_data = f"{os.path.splitext(job['output']['path'])[0]}_test_data_{size}.pt"
            job["input"] = {"path": test_data}
    configs = configs_from(job, overrides)
    if test_data is not None and not os.path.exists(path := str(configs[0].input.path)):
        import stem_dask as sd
        from stem_dask.job.cropper import create_test_data

        # it is kept, so that the same command resumes with it
        data = create_test_data(options.test_patterns, options.test_size)
        sd.export(data[:, 0].numpy(), path, layout="tensor")
    configs = [_adapted(config, options.chunk_size, is_crop) for config in configs]
    try:
        return run_all(
            configs,
            quiet=options.quiet,
            verbose=options.verbose,
            restart=options.restart,
            time_limit=options.time_limit,
            command=options.typed,
        )
    finally:
        for config in configs if is_crop else ():
            _forget(config)


def _adapted(config: "Config", n_patterns: int | None, is_crop: bool) -> "Config":
    """The job with ``n_patterns`` per task; a crop of a .pt into a .pt keeps a bare tensor of the input's rank."""
    from stem_dask.core.errors import ConfigError, StemDaskError
    from stem_dask.job.plan import find_input

    if n_patterns is not None and n_patterns < 1:
        raise ConfigError(f"--chunk_size is {n_patterns}; expected a number of patterns above 0")
    paths = str(config.input.path), config.output.path
    tensors = is_crop and all(path.endswith(".pt") for path in paths)
    if n_patterns is None and not tensors:
        return config
    try:
        found = find_input(config)
    except StemDaskError:  # raised again by the job of this input
        return config
    changed: dict[str, Any] = {}
    shape, itemsize = found.source.shape, found.source.dtype.itemsize
    if n_patterns is not None:
        changed["chunk_mb"] = n_patterns * shape[-1] * shape[-2] * itemsize / 2**20
    if tensors:  # config files have no layout "bare"
        has_channel = len(found.info.stored_shape) == 4 and len(shape) == 3
        changed["layout"] = "tensor" if has_channel else "bare"
    return config.model_copy(update={"output": config.output.model_copy(update=changed)})


def _forget(config: "Config") -> None:
    """Remove the run folder of a finished crop; the earlier script left no folder."""
    from stem_dask.core.errors import StemDaskError
    from stem_dask.job.plan import begun, prepare

    output = config.output.model_copy(update={"overwrite": False})
    with contextlib.suppress(StemDaskError, OSError):
        prepared = prepare(config.model_copy(update={"output": output}))
        if prepared.complete:
            with begun(prepared) as state:
                state.forget()
