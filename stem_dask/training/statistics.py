"""Mean and standard deviation of log(1 + x) of every pattern, from which the constants of any part of a dataset follow.

A store that a job has written contains them. For other files they are found in one pass, and kept in the cache of the user.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError
from stem_dask.core.machine import usable_cores
from stem_dask.kernels.logarithm import add_logs
from stem_dask.readers.containers import ZarrArray
from stem_dask.readers.views import View
from stem_dask.training.fields import stored_arrays
from stem_dask.training.reading import Scan


@dataclass(frozen=True)
class Statistics:
    """Of each position of a scan (scan_y, scan_x), NaN where a value is negative, infinite or NaN.

    ``mean_pattern`` (ky, kx) is the mean over all other patterns, of which there are ``n``; None if it is not known.
    """

    log_mean: NDArray[np.float64]
    log_std: NDArray[np.float64]
    mean_pattern: NDArray[np.float64] | None
    n: int

    @property
    def empty(self) -> NDArray[np.bool_]:
        """Where all pixels are zero."""
        return (self.log_mean == 0) & (self.log_std == 0)


def statistics_of(scan: Scan, *, with_pattern: bool = False) -> Statistics:
    """The statistics of a scan as read and downsampled; ``with_pattern``, including the mean pattern."""
    found = _stored(scan)
    if found is None or (with_pattern and found.mean_pattern is None):
        found = _cached(scan)
    return found


def _stored(scan: Scan) -> Statistics | None:
    """What a job has written into the store."""
    source = View.of(scan.found.source).source
    if (
        not isinstance(source, ZarrArray)
        or source.name != "patterns"
        or scan.options.downsample > 1
    ):
        return None
    known = stored_arrays(scan.path, "output", {"log_mean", "log_std", "log_mean_pattern"})
    if "log_mean" not in known or known["log_mean"].size != prod(scan.sizes):
        return None
    mean, std = (scan.by_position(known[name]) for name in ("log_mean", "log_std"))
    pattern = known["log_mean_pattern"] if mean.size == known["log_mean"].size else None
    return Statistics(mean, std, pattern, int(np.isfinite(mean).sum()))


def _cached(scan: Scan) -> Statistics:
    """From the cache of the user, or else found in one pass and put there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "stem_dask")
    token = repr((scan.path, scan.identity, scan.options, scan.shape, scan.detector))
    file = folder / f"{hashlib.sha256(token.encode()).hexdigest()[:32]}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, BadZipFile):
        with open(file, "rb") as content, np.load(content) as kept:
            mean, std, pattern = (kept[name] for name in ("log_mean", "log_std", "mean_pattern"))
            found = Statistics(mean, std, pattern, int(kept["n"]))
        if found.log_mean.shape == scan.shape:
            return found
    found = _one_pass(scan)
    with contextlib.suppress(OSError):  # without a cache the next process makes a pass of its own
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{uuid4().hex}.npz"
        np.savez(partial, allow_pickle=False, **vars(found))
        os.replace(partial, file)
    return found


def _one_pass(scan: Scan) -> Statistics:
    """Read all patterns once."""
    means, stds = np.full((2, scan.shape[0] * scan.shape[1]), np.nan)
    total = np.zeros(scan.detector)
    chunk, row = scan.places
    order = np.argsort(chunk, kind="stable")
    valid, starts = scan.valid.ravel(), np.searchsorted(chunk[order], np.arange(scan.n_chunks + 1))

    def logs(i: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        here = order[starts[i] : starts[i + 1]]
        here = here[valid[here]]
        patterns, part = np.empty((scan.most, *scan.detector), scan.dtype), np.zeros(scan.detector)
        if here.size:
            scan.read(i, patterns)
        patterns = patterns[row[here]]
        if scan.scale != 1.0:
            patterns = (patterns * scan.scale).astype(np.float32)
        return here, add_logs(patterns, part), part

    with ThreadPoolExecutor(usable_cores()) as pool, _progress(scan) as advance:
        for first in range(0, scan.n_chunks, 64):  # a few at a time, so that an error comes soon
            for here, found, part in pool.map(logs, range(first, min(first + 64, scan.n_chunks))):
                means[here], stds[here] = found
                total += part
                advance()
    n = int(np.isfinite(means).sum())
    return Statistics(means.reshape(scan.shape), stds.reshape(scan.shape), total / max(1, n), n)


@contextlib.contextmanager
def _progress(scan: Scan) -> Any:
    """A bar on a terminal; yields a function to call after each chunk."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"statistics of {Path(scan.path).name}", total=scan.n_chunks)
        yield lambda: progress.advance(task)


def constants(
    found: Sequence[Statistics], chosen: Sequence[NDArray[np.bool_]], scans: Sequence[Scan]
) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0) of log(1 + x) over all pixels of the chosen patterns of each scan.

    Raises
    ------
    ConfigError
        When a value has no logarithm, all values are the same, or there are none.
    """
    for one, here, scan in zip(found, chosen, scans, strict=True):
        for y, x in np.argwhere(here & ~np.isfinite(one.log_mean))[:1]:
            raise ConfigError(
                f"{scan.path}: the pattern at scan position ({scan.y[y]}, {scan.x[x]}) has a negative, infinite or NaN value, which has no "
                "logarithm; set normalize='none' (stem-dask train: --no_normalize), or subtract the background before"
            )
    means, stds = (
        np.concatenate([getattr(one, name)[here] for one, here in zip(found, chosen, strict=True)])
        for name in ("log_mean", "log_std")
    )
    mean = float(means.mean()) if means.size else 0.0
    std = float(np.sqrt(np.mean(stds**2) + np.mean((means - mean) ** 2))) if means.size else 0.0
    if not std > 1e-12 * (1 + abs(mean)):
        what = "all values are the same" if means.size else "there are no patterns"
        raise ConfigError(
            f"{', '.join(scan.path for scan in scans)}: {what}, so that normalize='log-zscore' has no standard deviation; set normalize='log'"
        )
    return mean, std
