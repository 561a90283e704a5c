"""stem-dask analyze: one read of a file, for a report to look at and an analysis that later crops reuse."""

import argparse
import os
import shlex
from pathlib import Path

from stem_dask.cli.run import add_stop_options


def add_analyze_options(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``stem-dask analyze``."""
    text = "a file, and any key of a config, such as analyze.target_retention=0.95"
    sub.add_argument("words", nargs="+", metavar="FILE | key=value", help=text)
    text = "NAME_analysis.zarr; default: named after the file, in the working directory"
    sub.add_argument("--output", metavar="NAME", help=text)
    text = "print one JSON document; everything else goes to standard error"
    sub.add_argument("--json", action="store_true", help=text)
    add_stop_options(sub)


def analyze_command(options: argparse.Namespace) -> int:
    """Analyze a file; write the analysis and the report."""
    from stem_dask.config.load import configs_from, found_inputs
    from stem_dask.core.errors import ConfigError

    words = [word for word in options.words if "=" not in word or os.path.lexists(word)]
    overrides = [word for word in options.words if word not in words]
    inputs = found_inputs(words) if words else []
    if len(inputs) != 1:
        raise ConfigError(f"analyze takes one file, and {len(inputs)} are given")
    path = inputs[0]
    output = options.output or f"{Path(path).stem}_analysis.zarr"
    output += "" if output.endswith(".zarr") else ".zarr"
    job = {"input": {"path": path}, "output": {"path": output, "patterns": False, "export": []}}
    overrides += ["output.overwrite=true"] * options.overwrite
    configs = configs_from(job, overrides)
    from stem_dask.cli.jobs import run_all

    limit = options.time_limit
    own = [word for word in overrides if not word.startswith("output.")]
    again = shlex.join(["stem-dask", "crop", *words, f"{Path(path).stem}_cropped.zarr", *own])
    code = run_all(
        configs,
        quiet=options.quiet,
        verbose=options.verbose,
        restart=options.restart,
        time_limit=limit,
        as_json=options.json,
        command=again,
    )
    if code == 0 and not (options.quiet or options.json):
        print(f"next        {again}")
    return code
