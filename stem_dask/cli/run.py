"""python -m stem_dask.run CONFIG [key=value ...]: the whole job of a config file."""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stem_dask.cli.signals import each, guarded, program
from stem_dask.storage.location import without_secrets

if TYPE_CHECKING:
    from stem_dask.config.options import Config

#: overrides that choose where a job runs
PLACES = ("cluster.kind=", "cluster.address=", "cluster.scheduler_file=")

EXIT_CODES = """exit codes:
  0 complete   2 configuration or existing output   3 input unreadable   4 too many patterns below min_retention
  5 disk, memory, or a worker lost   6 output in use by a live run   7 finished without unreadable parts
  75 interrupted, the same command resumes   1 internal error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a config; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m stem_dask.run",
        description="Read a 4D-STEM dataset, find its window, crop, check, downsample, store and export it.",
        epilog="example: python -m stem_dask.run configs/crop.yaml input.path=scan.dm4 output.path=out/scan.zarr\n\n"
        + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    words = sys.argv[1:] if argv is None else [*argv]
    # within: the parser shows words that it does not know
    parser.set_defaults(typed=shlex.join(["stem-dask", "run", *without_secrets(words)]))
    return guarded(
        lambda: run_file(parser.parse_intermixed_args(without_secrets(words))),
        as_json="--json" in words,
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a run, shared with ``stem-dask run``."""
    add_config_options(parser)
    parser.add_argument(
        "--cluster",
        metavar="WHERE",
        help="auto, threads, local, slurm, gpu, the address of a scheduler, or the file that describes it; replaces the "
        "config's cluster.kind, host, address and scheduler_file",
    )
    text = "as cluster.insecure=true: do without TLS"
    parser.add_argument("--insecure-cluster", action="store_true", help=text)
    text = "print what would be done, as stem-dask check does, and compute nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)
    parser.set_defaults(cpus=None)
    add_stop_options(parser)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the config, or data files, and the overrides."""
    text = "YAML file, see configs/crop.yaml; or a data file, for all keys at their defaults and NAME.zarr in the working directory"
    parser.add_argument("config", metavar="CONFIG | FILE", help=text)
    text = "override any key of the config; more data files"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=text)
    text = "print one JSON document to standard output, and everything else to standard error"
    parser.add_argument("--json", action="store_true", help=text)


def configs_of(first: str, rest: Sequence[str]) -> "list[Config]":
    """The jobs of a config with overrides; or those of data files, with all other keys at their defaults."""
    from stem_dask.config.load import configs_from, load_configs

    if first.lower().endswith((".yaml", ".yml")):
        return load_configs(first, rest)
    files = [first, *(word for word in rest if "=" not in word or os.path.lexists(word))]
    overrides = [word for word in rest if word not in files]
    job = {"input": {"path": files if files[1:] else first}, "output": {"path": "{stem}.zarr"}}
    return configs_from(job, overrides)


def add_stop_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that can be interrupted and resumed."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    text = "also print log records of stem_dask and Dask, to standard error"
    how.add_argument("-v", "--verbose", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="as output.overwrite=true")
    parser.add_argument("--restart", action="store_true", help="drop an unfinished run")
    text = "stop after this time; the same command resumes"
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help=text)


def run_file(options: argparse.Namespace) -> int:
    """Load a config, run the job of every input, print what happened; returns the exit code."""
    if options.dry_run:
        return check_command(options)
    given = ["output.overwrite=true"] * options.overwrite
    given += ["cluster.insecure=true"] * options.insecure_cluster
    given += [] if options.cluster is None else where(options.cluster, options.overrides)
    configs = configs_of(options.config, [*options.overrides, *given])
    from stem_dask.cli.jobs import run_all

    limit = options.time_limit
    return run_all(
        configs,
        quiet=options.quiet,
        verbose=options.verbose,
        restart=options.restart,
        time_limit=limit,
        as_json=options.json,
        command=options.typed,
    )


def check_command(options: argparse.Namespace) -> int:
    """Print what a config would do for each of its inputs."""
    documents: list[dict[str, Any]] = []
    if options.cpus is not None and options.cpus < 1:
        from stem_dask.core.errors import ConfigError

        raise ConfigError(f"--cpus is {options.cpus}; expected a whole number above 0")

    def check(config: "Config") -> int:
        from stem_dask.job.plan import prepare, refuse_too_small

        plan = prepare(config)
        from stem_dask.job.describe import describe_job, job_document

        command = _run_command(options, config if len(configs) > 1 else None)
        if options.json:
            documents.append(job_document(plan, command, options.cpus))
        else:
            print("\n".join(describe_job(plan, command, options.cpus)))
        if not plan.complete:
            refuse_too_small(plan, queued_only=False)
        elif not options.json:
            print(f"already complete: {plan.outputs.store}")
        return 0

    configs = configs_of(options.config, options.overrides)
    if options.json:
        for config in configs:
            check(config)
        print(json.dumps(documents[0] if len(configs) == 1 else documents))
        return 0
    code = each(configs, lambda config: str(config.input.path), check)
    if len(configs) > 1:
        print(f"{len(configs)} datasets")
    return code


def _run_command(options: argparse.Namespace, one: "Config | None") -> str:
    """The command that runs what was checked, or ``one`` of several datasets."""
    words = [options.config, *options.overrides]
    if one is not None:
        own = {"input.path": one.input.path, "output.path": one.output.path}
        rest = [word for word in options.overrides if "=" in word and not os.path.lexists(word)]
        words = [str(one.input.path), *rest]
        if options.config.lower().endswith((".yaml", ".yml")):
            rest = [word for word in rest if word.partition("=")[0] not in own]
            words = [options.config, *rest, *(f"{key}={path}" for key, path in own.items())]
    # a command that was called by its path is not found by name
    program = (
        "stem-dask" if shutil.which("stem-dask") else f"{shlex.quote(sys.executable)} -m stem_dask"
    )
    return f"{program} run {shlex.join(words)}"


def where(text: str, overrides: Sequence[str] = ()) -> list[str]:
    """The overrides for ``--cluster``, which replaces the place in the config and keeps the rest of its section.

    Examples
    --------
    >>> where("tls://node1:8786")[0], where("slurm")[-1]
    ('cluster.address=tls://node1:8786', 'cluster.kind=slurm')
    """
    from stem_dask.core.errors import ConfigError

    if "://" not in text and text.rpartition(":")[2].isdigit():
        raise ConfigError(f"--cluster is {text}; expected tls://{text}, or tcp://{text}")
    chosen = {"address": "null", "scheduler_file": "null", "kind": "auto"}
    is_file = os.sep in text or text.endswith(".json")
    key = "address" if "://" in text else "scheduler_file" if is_file else "kind"
    if text not in ("local", "slurm"):
        chosen["host"] = "null"  # this run starts no scheduler
    given = [f"cluster.{name}={value}" for name, value in {**chosen, key: text}.items()]
    for override in overrides:
        if override.startswith(PLACES) and override not in given:
            raise ConfigError(f"--cluster {text} and {override} are two places; leave one out")
    return given


if __name__ == "__main__":
    program(main)
