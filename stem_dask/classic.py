"""convert and preprocess: the commands of the earlier scripts, as options of a job."""

import argparse
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stem_dask.io.read import Found

from stem_dask.run import add_stop_options


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
        help="analyze in the same read, so that a later crop needs no look at the data of its own",
    )


def convert_job(options: argparse.Namespace) -> dict[str, Any]:
    """The job of ``stem-dask convert``: one pass, every pattern as it is.

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
    """The job of ``stem-dask preprocess``, but for ``--chunk_size``, which needs the size of a pattern."""
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
    """Words of the form key=value behind ``--input`` are options of the config, unless there is a file of that name.

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
    """MiB of so many patterns, as ``output.chunk_mb`` takes it."""
    from stem_dask.errors import ConfigError

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
