"""stem-dask batch: several configs in one command, one after another here, or as a job array of SLURM, a dataset a task."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stem_dask.cli.run import add_stop_options
from stem_dask.cli.signals import each
from stem_dask.core.errors import ConfigError

if TYPE_CHECKING:
    from stem_dask.config.options import Config

#: seconds before the wall time at which SLURM signals; it may be a minute early
SIGNAL_SECONDS = 120

#: end of the script, also of the templates in configs/slurm; a task that its user cancelled must not be requeued
END = (Path(__file__).parent / "array_end.sh").read_text(encoding="utf-8")


def add_batch_options(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``stem-dask batch``."""
    text = "YAML files, then overrides of any key in all of them"
    sub.add_argument("words", nargs="+", metavar="CONFIG | key=value", help=text)
    add_stop_options(sub)
    text = "write a job array for SLURM, one dataset a task, instead of running here"
    sub.add_argument("--slurm", action="store_true", help=text)
    sub.add_argument("--submit", action="store_true", help="with --slurm: submit it, too")
    text = "file to write (stem-dask-batch.sh)"
    sub.add_argument("--script", default="stem-dask-batch.sh", help=text)
    text = "cores of each task (4)"
    sub.add_argument("--cpus-per-task", type=int, default=4, metavar="N", help=text)
    text = "memory of each task with its unit, as sbatch takes it (16G)"
    sub.add_argument("--mem", default="16G", help=text)
    text = "run no more than so many tasks at a time"
    sub.add_argument("--at-once", type=int, metavar="N", help=text)


def batch_command(options: argparse.Namespace) -> int:
    """Run all jobs of all configs, or write a job array; returns the highest exit code."""
    from stem_dask.cli.jobs import run_all
    from stem_dask.config.load import load_configs

    files = [word for word in options.words if "=" not in word or os.path.lexists(word)]
    overrides = [word for word in options.words if word not in files]
    if not files:
        raise ConfigError(
            f"no config among {', '.join(options.words)}; give a YAML file before key=value"
        )
    if options.slurm:
        jobs = [(file, config) for file in files for config in load_configs(file, overrides)]
        return _write_script(script(jobs, overrides, options), len(jobs), options)
    if options.submit:
        raise ConfigError("--submit needs --slurm; without it the jobs run here")
    flags = ["output.overwrite=true"] if options.overwrite else []
    started, limit = time.monotonic(), options.time_limit

    def run(file: str) -> int:
        left = None if limit is None else max(0.0, limit - (time.monotonic() - started))
        configs = load_configs(file, [*overrides, *flags])
        return run_all(
            configs,
            quiet=options.quiet,
            verbose=options.verbose,
            restart=options.restart,
            time_limit=left,
        )

    return each(files, str, run)


def _write_script(text: str, n_jobs: int, options: argparse.Namespace) -> int:
    """Write the job array, and submit it with ``--submit``; returns exit code 0."""
    import subprocess

    path = Path(options.script).absolute()
    if path.exists() and path.read_text() != text:
        raise ConfigError(
            f"--script {path} exists with other contents; remove it, or choose another name"
        )
    path.write_text(text)
    print(f"wrote {path}: {n_jobs} datasets, one a task")
    if not options.submit:
        print(f"submit it with: sbatch {shlex.quote(str(path))}")
        return 0
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"{path} was not submitted: {error}; is this a SLURM cluster?") from error
    if done.returncode:
        raise ConfigError(f"{path} was not submitted: {done.stderr.strip()}")
    print(done.stdout.strip())
    return 0


def script(
    jobs: Sequence[tuple[str, "Config"]], overrides: Sequence[str], options: argparse.Namespace
) -> str:
    """The text of the job array; every job is given with its config file."""
    from stem_dask.cluster.slurm import seconds_of

    cases, makers = [], dict[str, str]()
    flags = [f"--{flag}" for flag in ("quiet", "verbose", "overwrite") if getattr(options, flag)]
    for number, (file, config) in enumerate(jobs, 1):
        place, output = str(config.input.path), config.output.path
        if config.crop.enabled and config.crop.size == "common":
            raise ConfigError(
                f"{file}: crop.size is common, which needs all datasets in one run; use stem-dask run, or crop.size=auto"
            )
        if config.cluster.kind == "slurm":
            raise ConfigError(
                f"{file}: cluster.kind is slurm, and every task of the array is a job of SLURM already; use "
                "cluster.kind=auto"
            )
        if makers.setdefault(output, place) != place or len(makers) < number:
            raise ConfigError(
                f"{file}: {place} would become {output}, and so would {makers[output]}; "
                "give each config its own output.path"
            )
        own = [f"input.path={place}", f"output.path={output}"]
        words = [os.path.abspath(file), *overrides, *own, *flags]
        cases.append(f"{number}) job=({shlex.join(words)}) ;;")
    cluster = jobs[0][1].cluster
    if cluster.walltime is None:
        raise ConfigError(
            "cluster.walltime is missing, the time that SLURM gives a task; add cluster.walltime=12:00:00"
        )
    if seconds_of(cluster.walltime) < 300:
        raise ConfigError(
            f"cluster.walltime is {cluster.walltime}; a task needs at least 5 minutes, because it is asked to stop two to "
            "three minutes before"
        )
    for name in ("cpus_per_task", "at_once"):
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {value}; expected a whole number above 0")
    if options.mem.isdecimal() and int(options.mem):  # 0 is all of the node
        raise ConfigError(
            f"--mem is {options.mem}, which SLURM takes for MB; give its unit, such as {options.mem}G"
        )
    at_once = "" if options.at_once is None else f"%{options.at_once}"
    # % starts a placeholder of SLURM
    log = str(Path(options.script).absolute().with_suffix("")).replace("%", "%%")
    directives = [
        "--job-name=stem-dask",
        f"--array=1-{len(jobs)}{at_once}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={options.cpus_per_task}",
        f"--mem={options.mem}",
        f"--time={cluster.walltime}",
        f"--signal=B:TERM@{SIGNAL_SECONDS}",
        "--requeue",
        "--open-mode=append",
        f"--output={log}-%A_%a.log",
    ]
    given = {"partition": cluster.queue, "account": cluster.account}
    directives += [f"--{name}={value}" for name, value in given.items() if value is not None]
    lines = [
        "#!/bin/bash",
        # quoted, because SLURM splits at spaces; cluster.job_extra is passed unchanged
        *(f"#SBATCH {text}" for text in (*map(shlex.quote, directives), *cluster.job_extra)),
        "",
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        "case $SLURM_ARRAY_TASK_ID in",
        *cases,
        "*) exit 1 ;;",
        "esac",
    ]
    command = f"{shlex.quote(sys.executable)} -m stem_dask.run"
    return "\n".join(lines) + "\n" + END.replace("{command}", command)
