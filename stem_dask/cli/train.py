"""stem-dask train: from a file of patterns to an autoencoder and its maps."""

import argparse
import contextlib
import difflib
import io
import json
import math
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NoReturn

from stem_dask.cli.run import EXIT_CODES
from stem_dask.cli.signals import guarded, program, stoppable
from stem_dask.core.errors import ConfigError, InterruptedRunError, OutputExistsError, StemDaskError
from stem_dask.storage.location import without_secrets

if TYPE_CHECKING:
    from stem_dask.training.dataset import PatternDataset

#: what a training leaves, in the order in which it is written
OUTPUTS = ("checkpoint.pt", "model.pt", "embeddings.zarr", "embeddings.npz", "training.png", "results.json")  # fmt: skip

#: flags of the earlier scripts without an effect
UNUSED = ("use_chunked", "chunk_size", "pin_memory", "persistent_workers")

#: options that do not change the result, or only in the last digits
_PLACES = ("data", "output_dir", "device", "threads", "time_limit", "overwrite", "quiet", *UNUSED)

_METHODS = ("none", "log", "sqrt", "log-zscore")
_Z = "none, log, sqrt, or log-zscore (default): log(1 + x), then mean 0 and standard deviation 1 over the training part"
_MEMORY = "for patterns, such as 4GB; all are kept in memory where they fit (default: auto, a quarter of what is free)"

#: name of each flag, and its options in argparse
FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("data", {"nargs": "+", "required": True, "metavar": "FILE", "help": "any readable file, files, or a glob"}),
    ("output_dir", {"required": True, "metavar": "FOLDER", "help": "for the model, embeddings, picture and results"}),
    ("dataset", {"metavar": "NAME", "help": "name or number of the array, if the file holds several"}),
    ("scan_shape", {"type": int, "nargs": 2, "metavar": ("Y", "X"), "help": "of the scan, if the file does not state it"}),
    ("scan_step", {"type": int, "default": 1, "metavar": "N", "help": "every n-th scan position only"}),
    ("downsample", {"type": int, "default": 1, "metavar": "K", "help": "K x K pixels become one"}),
    ("downsample_mode", {"choices": ("bin", "stride", "gauss", "fft"), "default": "bin"}),
    ("sigma", {"type": float, "help": "width of the blur for gauss, in pixels (K / 2)"}),
    ("normalize", {"nargs": "?", "const": _METHODS[-1], "default": _METHODS[-1], "choices": _METHODS, "metavar": "METHOD", "help": _Z}),
    ("no_normalize", {"dest": "normalize", "action": "store_const", "const": "none", "help": "as --normalize none"}),
    ("val", {"type": float, "default": 0.1, "metavar": "SHARE", "help": "of the patterns, for validation (0.1)"}),
    ("split", {"choices": ("blocks", "rows", "datasets", "random"), "default": "blocks", "help": "what validation consists of"}),
    ("no_validation", {"action": "store_true", "help": "train on all patterns"}),
    ("epochs", {"type": int, "default": 50, "metavar": "N"}),
    ("batch", {"type": int, "default": 128, "metavar": "N", "help": "patterns per step (128)"}),
    ("latent", {"type": int, "default": 32, "metavar": "N", "help": "latent dimensions (32)"}),
    ("lr", {"type": float, "default": 1e-3, "help": "highest learning rate (1e-3)"}),
    ("loss", {"choices": ("mse", "l1", "poisson"), "default": "mse"}),
    ("seed", {"type": int, "default": 42}),
    ("device", {"default": "auto", "help": "auto, cpu, cuda, or cuda:1"}),
    ("precision", {"choices": ("32", "bf16", "16"), "default": "32"}),
    ("memory", {"default": "auto", "metavar": "SIZE", "help": _MEMORY}),
    ("threads", {"type": int, "metavar": "N", "help": "threads (all cores of this process)"}),
    ("num_workers", {"type": int, "dest": "threads", "metavar": "N", "help": "as --threads"}),
    ("time_limit", {"type": float, "metavar": "SECONDS", "help": "stop after this time; the same command resumes"}),
    ("overwrite", {"action": "store_true", "help": "replace what an earlier training left in the folder"}),
    ("quiet", {"action": "store_true", "help": "print errors only"}),
    *((name, {"nargs": "?", "const": True, "metavar": "X", "help": "has no effect"}) for name in UNUSED),
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; stem-dask train --help lists all flags")


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code. Signals are handled only if this is the main thread.

    Examples
    --------
    >>> main(["--data", "scan.hspy", "--output_dir", "out", "--epoch_count", "3"])
    2
    """
    words = without_secrets(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        try:
            return train_command(_parsed(words))
        except StemDaskError as error:
            error.args = (_in_flags(str(error)),)
            raise

    return guarded(command)


def _in_flags(text: str) -> str:
    """A message of the library with flags in place of arguments and keys of a config.

    Examples
    --------
    >>> _in_flags("set by='rows', memory=4096, input.dataset: b, or another output.path")
    'set --split rows, --memory 4096, --dataset: b, or another --output_dir'
    """
    flags = {"by": "split", "batch_size": "batch", "path": "data"}
    text = text.replace("output.path", "--output_dir")
    names = "by|memory|batch_size|normalize|scan_shape|val"
    text = re.sub(rf"\b({names})='?([\w.-]+)'?", lambda m: f"--{flags.get(m[1], m[1])} {m[2]}", text)  # fmt: skip
    keys = r"\binput\.(path|dataset|scan_shape|scan_step)\b"
    return re.sub(keys, lambda m: f"--{flags.get(m[1], m[1])}", text)


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="stem-dask train",
        description="Train an autoencoder on the patterns of any readable file, and map its latent over the scan.",
        epilog="example: stem-dask train --data cropped.zarr --output_dir out --downsample 2\n\n"
        + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_train_options(parser)
    known, unknown = parser.parse_known_args(words)
    if unknown:
        flag = unknown[0].partition("=")[0]
        name, names = flag.lstrip("-").replace("-", "_"), [n for n, _ in FLAGS if n not in UNUSED]
        near = [n for n in names if n.startswith(name) or name.startswith(n)]
        near += difflib.get_close_matches(name, names, 1, 0.5)
        parser.error(f"unknown: {flag}" + (f"; did you mean --{near[0]}?" if near else ""))
    return known


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """All flags, spelled with _ or -."""
    for name, options in FLAGS:
        spelled = {f"--{name}", f"--{name.replace('_', '-')}"}
        spelled |= {"-q"} if name == "quiet" else set()
        parser.add_argument(*sorted(spelled, reverse=True), **{"dest": name, **options})


def train_command(options: argparse.Namespace) -> int:
    """Open the data, and train, unless an earlier run did all of it."""
    from stem_dask.engine.lock import locked
    from stem_dask.storage.publish import make_folder

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr, flush=True)

    for name in UNUSED:
        if getattr(options, name) is not None:
            say(f"note        --{name} has no effect: the loader needs no such setting")
    folder = os.path.abspath(os.path.expanduser(options.output_dir))
    end = time.monotonic() + (math.inf if options.time_limit is None else options.time_limit)
    is_main = threading.current_thread() is threading.main_thread()
    with contextlib.ExitStack() as stack:
        if is_main:  # other threads get no signals; they look at the clock
            stack.enter_context(stoppable(options.time_limit))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda text, *rest: say(f"warning     {_in_flags(str(text))}")
        patterns = _patterns(options, options.normalize)
        chosen = {key: value for key, value in vars(options).items() if key not in _PLACES}
        about = {"options": chosen, "fingerprint": patterns.fingerprint}
        make_folder(f"{folder}/train.lock")
        stack.enter_context(locked(f"{folder}/train.lock"))
        results = _left_by_earlier(folder, about, options.overwrite)
        if results is not None and not options.overwrite:
            say(f"already complete: {folder}")
        else:
            if results is not None:
                os.unlink(f"{folder}/results.json")  # the mark of completeness
            results = _train(options, patterns, folder, about, results is None, say, end)
    if not options.quiet:
        print("\n".join(summary(results, folder)))
    return 0


def _patterns(options: argparse.Namespace, normalize: Any) -> "PatternDataset":
    from stem_dask.config.load import found_inputs
    from stem_dask.training.dataset import PatternDataset

    return PatternDataset(
        found_inputs(options.data),
        dataset=options.dataset,
        scan_shape=options.scan_shape,
        scan_step=options.scan_step,
        downsample=options.downsample,
        method=options.downsample_mode,
        sigma=options.sigma,
        normalize=normalize,
    )


def _left_by_earlier(
    folder: str, about: Mapping[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """The results of a complete training, or None; raises if the folder holds something that must stay.

    checkpoint.pt and results.json state the options and data of their training. Without them, the other files are not ours.
    """
    there = [name for name in OUTPUTS if os.path.lexists(f"{folder}/{name}")]
    results, found = None, None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        with open(f"{folder}/results.json", encoding="utf-8") as file:
            read = json.load(file)
        found = {key: read[key] for key in about}
        results = read if {*OUTPUTS} <= {*there, "checkpoint.pt"} else None
    if found is None and "checkpoint.pt" in there:
        from stem_dask.training.fit import load_checkpoint

        found = (load_checkpoint(f"{folder}/checkpoint.pt") or {})["about"]
    if found is None and there:
        raise OutputExistsError(
            f"{folder} has {', '.join(there)} of something else than stem-dask train; choose another --output_dir"
        )
    if found is None or overwrite:
        return results
    before, now = found["options"], json.loads(json.dumps(about["options"]))
    other = [
        f"--{key} was {before.get(key)}, is {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    other += ["--data has other patterns"] * (found["fingerprint"] != about["fingerprint"])
    if other:
        raise ConfigError(
            f"{folder} has {'an unfinished' if results is None else 'a finished'} training of other options: "
            f"{'; '.join(other)}; choose another --output_dir, or add --overwrite"
        )
    return results


def _train(
    options: argparse.Namespace,
    patterns: "PatternDataset",
    folder: str,
    about: Mapping[str, Any],
    resume: bool,
    say: Callable[[str], None],
    end: float,
) -> dict[str, Any]:
    """Train and write all outputs; results.json comes last and marks them as complete."""
    import stem_dask
    from stem_dask.core.machine import usable_cores
    from stem_dask.job.summary import tree_bytes, write_json
    from stem_dask.training import import_torch, maps
    from stem_dask.training.fit import FitOptions, fit
    from stem_dask.training.model import Model, device_of

    torch, path = import_torch(), {name: f"{folder}/{name}" for name in OUTPUTS}
    device, threads = device_of(options.device), max(1, options.threads or usable_cores())
    names = {field.name for field in fields(FitOptions)} - {"device", "threads"}
    given = {name: getattr(options, name) for name in names}
    chosen, began = FitOptions(device=device, threads=threads, **given), time.monotonic()
    parts, val = {"train": patterns}, None
    if options.val and not options.no_validation:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            parts = patterns.split(val=options.val, by=options.split, seed=options.seed)
        say(printed.getvalue().rstrip())
        val = parts["val"]
    train = parts["train"]

    def progress(one: Mapping[str, Any]) -> None:
        judged = "" if one["val"] is None else f"  val {one['val']:.4g}"
        n, spent = f"{one['epoch']}/{options.epochs}", time.monotonic() - began
        say(f"epoch       {n:9} train {one['train']:.4g}{judged}  {spent:.0f} s")
        if time.monotonic() > end:
            raise InterruptedRunError(
                "the time is up; the same command goes on where this one ended"
            )

    say(f"training    {len(train):,} patterns on {device}, {threads} threads")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        network, history = fit(train, val, chosen, path["checkpoint.pt"], about, progress, resume)
        shape = list(train.shape[1:])
        axes = {axis.name: asdict(axis) for axis in patterns.scans[0].axes[-2:]}
        about_model = ({**about["options"], "shape": shape}, axes, patterns.fingerprint)
        model = Model(network, train.normalization, *about_model)
        model.save(path["model.pt"])
        whole = patterns if val is None else _patterns(options, train.normalization)
        z, error = maps.embed_all(model, whole, chosen)
    finally:
        torch.set_num_threads(threads_before)
    datasets = maps.scan_datasets(
        whole, z, error, None if val is None else train.mask, options.loss
    )
    versions = {"stem_dask": stem_dask.__version__, "torch": str(torch.__version__)}
    maps.write_embeddings(path["embeddings.zarr"], datasets, {**about, "versions": versions})
    maps.write_arrays(path["embeddings.npz"], z=z, positions=whole.positions)
    maps.draw(path["training.png"], model, whole, z, datasets, history)
    results = {
        **about,
        "data": [str(scan.path) for scan in whole.scans],
        "shape": shape,
        "patterns": {"all": len(whole), **{name: len(part) for name, part in parts.items()}},
        "normalization": asdict(train.normalization),
        "history": history,
        "leak": train.leak,
        "device": device,
        "threads": threads,
        "seconds": time.monotonic() - began,
        "files": {name: tree_bytes(path[name]) for name in OUTPUTS[1:-1]},
        "has_map": any(scan.is_scan for scan in whole.scans),
        "versions": versions,
    }
    write_json(path["results.json"], results)
    return results


def summary(results: Mapping[str, Any], folder: str) -> list[str]:
    """The closing lines of a training."""
    from stem_dask.core.text import by, size
    from stem_dask.training.maps import NO_MAP

    n, last, leak = results["patterns"], results["history"][-1], results["leak"]
    val = "no validation" if last["val"] is None else f"val {last['val']:.4g}"
    near = "correlation of validation patterns with their nearest training pattern"
    return [
        f"patterns    {n['all']:,} of {by(results['shape'])}, {n['train']:,} to train and {n.get('val', 0):,} to validate",
        f"losses      train {last['train']:.4g}, {val} ({results['options']['loss']}, epoch {last['epoch']})",
        *([] if leak is None else [f"leak        {leak:z.2f}: {near}"]),
        f"map         {folder}/training.png" if results["has_map"] else f"map         {NO_MAP}",
        *(f"file        {folder}/{name} ({size(n)})" for name, n in results["files"].items()),
    ]


if __name__ == "__main__":
    program(main)
