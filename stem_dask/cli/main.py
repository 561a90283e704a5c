"""stem-dask: all commands."""

import argparse
import difflib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stem_dask import __version__
from stem_dask.cli.analyze import add_analyze_options, analyze_command
from stem_dask.cli.demo import add_demo_options, demo_command
from stem_dask.cli.job_array import add_batch_options, batch_command
from stem_dask.cli.run import (
    EXIT_CODES,
    add_config_options,
    add_run_options,
    check_command,
    run_file,
)
from stem_dask.cli.scripts import add_script_options, script_command
from stem_dask.cli.signals import each, guarded, program, refuse_lost_output
from stem_dask.cli.train import add_train_options, train_command
from stem_dask.cli.train import main as train
from stem_dask.cli.watch import add_watch_options, watch_command
from stem_dask.core.text import size
from stem_dask.storage.location import without_secrets

if TYPE_CHECKING:
    from stem_dask.readers.open import Found


#: the commands by task, each task with an example
TASKS = {
    "look at a file": (("demo", "info", "analyze", "view"), "stem-dask analyze scan.dm4"),
    "decide": (("init", "check"), "stem-dask check crop.yaml analyze.target_retention=0.99"),
    "make": (
        ("run", "crop", "convert", "virtual", "preprocess", "batch", "watch", "verify"),
        "stem-dask crop scan.dm4 out.zarr --size 64",
    ),
    "train": (("train",), "stem-dask train --data out.zarr --output_dir outputs"),
    "set up": (("keys", "completion"), 'eval "$(stem-dask completion bash)"'),
}

COMMANDS = tuple(name for names, _ in TASKS.values() for name in names)

#: completion in a shell; the flags of a command are those that its own help names
_BASH = r"""_stem_dask() {
  local word=${COMP_WORDS[COMP_CWORD]}
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "COMMANDS" -- "$word"))
  elif [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$(stem-dask "${COMP_WORDS[1]}" --help 2>/dev/null | grep -oE -- '--[a-z][a-z_-]*' | sort -u)" -- "$word"))
  else
    COMPREPLY=()
  fi
}
complete -o default -o bashdefault -F _stem_dask stem-dask"""

_FISH = r"""complete -c stem-dask -n __fish_use_subcommand -f -a 'COMMANDS'
complete -c stem-dask -n 'not __fish_use_subcommand; and string match -q -- "-*" (commandline -ct)' -a '(
  stem-dask (commandline -opc)[2] --help 2>/dev/null | string match -ra -- "--[a-z][a-z_-]*" | sort -u)'"""

SCRIPTS = {
    "bash": _BASH,
    "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{_BASH}",
    "fish": _FISH,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch a command; returns the exit code."""
    words = sys.argv[1:] if argv is None else [*argv]

    def command() -> int:
        if words[:1] == ["train"]:  # which names the flag that is nearest to an unknown one
            return train(words[1:])
        _refuse_misspelt(words)
        # within: the parser shows words that it does not know
        options = _parser().parse_args(without_secrets(words))
        options.typed = shlex.join(["stem-dask", *without_secrets(words)])
        code = int(options.command(options))
        if options.command in (info_command, init_command, check_command, keys_command):
            refuse_lost_output()  # their result is what they print
        return code

    return guarded(command, as_json="--json" in words)


def info_command(options: argparse.Namespace) -> int:
    """Print what files hold."""
    from stem_dask.config.load import found_inputs

    documents: list[dict[str, Any]] = []

    def info(path: str) -> int:
        found = _found(path, overrides)
        if options.json:
            documents.append(file_document(found))
            return 0
        from stem_dask.cli.jobs import shown
        from stem_dask.job.describe import describe_file
        from stem_dask.job.preview import preview

        print("\n".join([*describe_file(found), *preview(found)]))
        words = shlex.join([shown(path), *overrides])
        print(f"next        stem-dask analyze {words}")
        return 0

    files, overrides = _files_and_overrides(options)
    inputs = found_inputs(files, series="input.series=true" in map(str.lower, overrides))
    if not options.json:
        return each(inputs, str, info)
    for path in inputs:
        info(path)
    print(json.dumps(documents[0] if len(inputs) == 1 else documents))
    return 0


def file_document(found: "Found") -> dict[str, Any]:
    """What an input holds, for programs."""
    info = found.info
    names = ("name", "size", "scale", "offset", "units")
    energy = info.given.get("beam_energy_kv", info.about.get("beam_energy_kv"))
    return {
        "path": info.path,
        "kind": info.kind,
        "shape": [int(n) for n in info.shape],
        "dtype": str(info.dtype),
        "bytes": int(found.n_bytes),
        "axes": [{name: getattr(axis, name) for name in names} for axis in info.axes],
        "beam_energy_kv": energy,
        "camera_length_mm": info.about.get("camera_length_mm"),
        "notes": list(info.notes),
    }


def init_command(options: argparse.Namespace) -> int:
    """Print a config for a file, or a preset or template of the package as it stands."""
    from stem_dask.core.errors import ConfigError
    from stem_dask.job.describe import config_for, shipped

    files, overrides = _files_and_overrides(options)
    if len(files) > 1:
        raise ConfigError(
            f"init takes one file, not {len(files)}; in its config, input.path may be a list or a glob"
        )
    preset = shipped().get(files[0])
    if preset is None or os.path.lexists(files[0]):
        print(config_for(_found(files[0], overrides), overrides), end="")
    elif overrides:
        raise ConfigError(
            f"init {files[0]} takes no {overrides[0]}; append it to the command that runs the file"
        )
    else:
        print(preset.read_text(encoding="utf-8"), end="")
    return 0


def _files_and_overrides(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    from stem_dask.core.errors import ConfigError

    files = [word for word in options.words if "=" not in word or os.path.lexists(word)]
    if not files:
        raise ConfigError(f"no file among {', '.join(options.words)}; give one before key=value")
    dataset = [] if options.dataset is None else [f"input.dataset={options.dataset}"]
    return files, [*(word for word in options.words if word not in files), *dataset]


def _found(path: str, overrides: Sequence[str]) -> "Found":
    from stem_dask.config.load import config_of
    from stem_dask.job.plan import find_input

    return find_input(config_of(path, overrides))


def virtual_command(options: argparse.Namespace) -> int:
    """Write a store of references to the patterns of a file."""
    from stem_dask.config.load import config_of
    from stem_dask.core.errors import ConfigError
    from stem_dask.storage.location import refuse_url

    files, overrides = _files_and_overrides(options)
    overrides += ["output.overwrite=true"] * options.overwrite
    path = options.output or f"{Path(files[0]).stem}.json"
    refuse_url("--output", path, "references are written into a local file")
    if len(files) > 1:
        raise ConfigError(
            f"virtual takes one file, not {len(files)}; input.series=true joins files"
        )
    if not path.endswith(".json") or "*" in path:
        raise ConfigError(f"--output is {path}; expected the name of a file that ends with .json")
    config = config_of(files[0], overrides)
    changed = [key for key in ("dark", "gain", "mask") if getattr(config.input, key) is not None]
    if changed:
        raise ConfigError(
            f"input.{changed[0]} changes values, and references give those of the file; leave it out, or write a copy with "
            "stem-dask convert"
        )
    from stem_dask.job.plan import find_input
    from stem_dask.stages.open import lazy_array, lazy_blocks
    from stem_dask.writers.references import write_references

    found = find_input(config)
    source, patterns = found.source, lazy_blocks(found, found.source.shape[:-2], lazy_array)
    if options.analysis is not None:
        from stem_dask.job.analysis import window_for
        from stem_dask.readers.views import View

        window = window_for(found, config, options.analysis)
        ky, kx = (slice(at, at + n) for at, n in zip(window.origin, window.shape, strict=True))
        source = View.of(source).select(*(slice(None),) * (patterns.ndim - 2), ky, kx)
        patterns = patterns.isel(ky=ky, kx=kx).assign_attrs(
            window=[ky.start, ky.stop, kx.start, kx.stop]
        )
    n = write_references(path, source, patterns, overwrite=config.output.overwrite)
    print(f"file        {path}: {n:,} references, {size(os.path.getsize(path))}")
    fo = {"fo": path}
    print(f"next        in Python: xarray.open_zarr('reference://', storage_options={fo})")
    return 0


def view_command(options: argparse.Namespace) -> int:
    """Print where the report of an output is, written if it is missing, and open it in a browser if there is one."""
    from stem_dask.job.show import report

    path = os.path.abspath(report(options.output).path)
    print(f"file        {path}")
    if not options.no_browser and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        import webbrowser

        webbrowser.open(f"file://{path}")
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """Test every chunk of a finished store."""
    from stem_dask.core.errors import StoreError
    from stem_dask.readers.zarr_chunks import damaged_chunks

    damaged = list(damaged_chunks(options.store))
    if damaged:
        raise StoreError(
            f"{options.store} is damaged: {'; '.join(damaged)}; make it again with output.overwrite=true"
        )
    print(f"{options.store}: every chunk is there and holds what was written")
    return 0


def completion_command(options: argparse.Namespace) -> int:
    """Print a script that completes commands, flags and file names."""
    print(SCRIPTS[options.shell].replace("COMMANDS", " ".join(COMMANDS)))
    return 0


def keys_command(options: argparse.Namespace) -> int:
    """Write TLS keys for a cluster that the user starts."""
    from stem_dask.cluster.security import write_keys

    for name, value in write_keys(options.folder).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _refuse_misspelt(words: Sequence[str]) -> None:
    """Raise ConfigError for a first word that is no command, with the one that was meant."""
    from stem_dask.core.errors import ConfigError

    word = words[0] if words else "--help"
    if word.startswith("-") or word in COMMANDS:
        return
    near = difflib.get_close_matches(word, COMMANDS, 1)
    if near:
        raise ConfigError(f"{word} is no command; did you mean {near[0]}?")
    if os.path.lexists(word):
        raise ConfigError(
            f"{word} is a file, and the command is missing, as in: stem-dask info {word}"
        )
    raise ConfigError(f"{word} is no command; known are {', '.join(COMMANDS)}")


class _InAnyOrder(argparse.ArgumentParser):
    """A subparser whose positional arguments may precede, follow and separate its options.

    argparse supports that (``run crop.yaml --quiet crop.size=40``) only in `parse_known_intermixed_args`, which a parent
    parser does not call.
    """

    _within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an unknown flag is an error here, which prints the usage of this command and not of its parent."""
        if self._within:  # called by parse_known_intermixed_args
            return super().parse_known_args(args, namespace)
        self._within = True
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._within = False
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stem-dask",
        description="Out-of-core 4D-STEM preprocessing: read, find the window, crop, check, downsample, export.",
        usage="stem-dask COMMAND ...   (stem-dask COMMAND --help explains it)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stem-dask {__version__}")
    commands = parser.add_subparsers(
        prog="stem-dask",
        required=True,
        metavar="COMMAND",
        help=argparse.SUPPRESS,
        parser_class=_InAnyOrder,
    )

    texts: dict[str, str] = {}

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        texts[name] = text
        sub = commands.add_parser(name, description=text)
        sub.set_defaults(command=command)
        return sub

    add_run_options(add("run", run_file, "run the whole job of a config"))
    sub = add("check", check_command, "print what a config would do; computes nothing")
    add_config_options(sub)
    text = "cores of the job in the sbatch line (default: as many as this machine has)"
    sub.add_argument("--cpus", type=int, metavar="N", help=text)
    sub = add("verify", verify_command, "read a finished store again and test every checksum")
    sub.add_argument("store", help="NAME.zarr")
    example = "print a commented config for a file: stem-dask init scan.dm4 > crop.yaml"
    words = "a file (info: several, or globs), then overrides that it needs, such as input.scan_shape=[256,256]"
    dataset = "name or number of the array, when the file holds several"
    info = add("info", info_command, "print what a file holds")
    init = add("init", init_command, example)
    init.epilog = "instead of a file, the name of a config or template of the package: stem-dask init batch > batch.yaml"
    for sub in (info, init):
        sub.add_argument("words", nargs="+", metavar="FILE | key=value", help=words)
        sub.add_argument("--dataset", help=dataset)
    text = "print one JSON document, a list for several files"
    info.add_argument("--json", action="store_true", help=text)
    sub = add("view", view_command, "open the report of a finished output")
    sub.add_argument("output", help="NAME.zarr")
    sub.add_argument("--no-browser", action="store_true", help="only print where it is")
    text = "a zarr store without a copy: references to the bytes of a raw file, for xarray, dask and LiberTEM"
    sub = add("virtual", virtual_command, text)
    sub.add_argument("words", nargs="+", metavar="FILE | key=value", help=words)
    text = "NAME.json; default: named after the file, in the working directory"
    sub.add_argument("-o", "--output", metavar="NAME", help=text)
    text = "NAME_analysis.zarr of the same file: only the window that it gives"
    sub.add_argument("--analysis", metavar="NAME", help=text)
    sub.add_argument("--overwrite", action="store_true", help="replace an existing NAME.json")
    sub.add_argument("--dataset", help=dataset)
    add_demo_options(add("demo", demo_command, "make a small scan, and run the whole job on it"))
    text = "find the window of a file, for a report to look at and later crops"
    add_analyze_options(add("analyze", analyze_command, text))
    text = "the jobs of several configs: one after another here, or as a job array of SLURM"
    add_batch_options(add("batch", batch_command, text))
    text = "run the job of a config on every file of a folder that fills"
    add_watch_options(add("watch", watch_command, text))
    text = "write TLS keys for your own scheduler and workers, and print the environment variables that make Dask use them"
    sub = add("keys", keys_command, text)
    text = "folder for the keys, readable by all nodes and by no other user"
    sub.add_argument("folder", help=text)
    text = "print a script that completes commands and flags in a shell"
    sub = add("completion", completion_command, text)
    text = 'as in: eval "$(stem-dask completion bash)"'
    sub.add_argument("shell", choices=[*SCRIPTS], help=text)
    for name, text in (
        ("convert", "write files in another format"),
        ("preprocess", "make tensors for training: downsample, cast, normalize"),
        ("crop", "crop files, each into one file"),
    ):
        add_script_options(add(name, script_command, text), name)
    add_train_options(
        add("train", train_command, "train an autoencoder on the patterns of any file")
    )
    lines = []
    for task, (names, example) in TASKS.items():
        lines += [
            f"{task}:",
            *(f"  {name:11} {texts[name]}" for name in names),
            f"      {example}",
            "",
        ]
    parser.epilog = "\n".join([*lines, EXIT_CODES])
    return parser


def entry_point() -> NoReturn:
    """Entry point of the command ``stem-dask``."""
    program(main)


if __name__ == "__main__":
    entry_point()
