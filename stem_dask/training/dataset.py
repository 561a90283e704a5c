"""Patterns of one or more files as a dataset of PyTorch."""

import hashlib
import json
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.machine import usable_cores
from stem_dask.core.text import by
from stem_dask.kernels.training import METHODS, gather, table_of
from stem_dask.storage.location import is_url
from stem_dask.training.fields import FIELDS, field_of
from stem_dask.training.reading import Options, Scan
from stem_dask.training.split import Split, leak_of, mask_of, settled_split
from stem_dask.training.statistics import Statistics, constants, statistics_of
from stem_dask.writers.torch import signed_dtype

_DTYPES = ("float32", "float16", "bfloat16", "stored")

#: marks of a mask
TRAIN, VAL, TEST, GUARD, LEFT_OUT = 0, 1, 2, 3, 255


@dataclass(frozen=True)
class Normalization:
    """A pointwise normalization: ``(f(x) - mean) / std`` with f(x) = log(1 + x) (log, log-zscore), a square root, or x (none).

    Examples
    --------
    >>> Normalization("log").mean
    0.0
    """

    method: str
    mean: float = 0.0
    std: float = 1.0


class PatternDataset:
    """Patterns of 4D-STEM files for training: a map-style dataset of PyTorch that reads straight from the files.

    Parameters
    ----------
    data : path of a file that `stem_dask.open` reads, or a list of paths
    dataset, scan_shape, scan_roi, scan_step : as of `stem_dask.open`
    downsample, method, sigma : as ``factor``, ``method`` and ``sigma`` of `stem_dask.downsample`; on counts, before the logarithm
    normalize : ``none``, ``log`` (log(1 + x)), ``sqrt``, ``log-zscore`` (log, then mean 0 and standard deviation 1), or the
        `normalization` of another dataset
    dtype : ``float32``, ``float16``, ``bfloat16``, or ``stored``: the smallest signed type that holds the stored one, not normalized
    fields : of each pattern, any of position, center, center_out, radius, retention, total, window, dataset
    empty : ``drop`` or ``keep`` patterns that are zero everywhere; patterns that could not be read are always left out

    Attributes
    ----------
    shape : (1, height, width) of a pattern
    positions : (N, 3) int64: number of the file, row and column in the scan of the source
    normalization : the `Normalization`; its constants are those of the training part
    mask : after `split`, uint8 (scan_y, scan_x): 0 train, 1 val, 2 test, 3 guard, 255 left out; a list for several files
    leak : after `split`, correlation of validation patterns with their nearest training pattern

    Raises
    ------
    SourceError
        When a file cannot be read, is damaged, or has changed since it was opened.
    ConfigError
        When an option does not fit the files.

    Examples
    --------
    >>> import numpy as np, stem_dask as sd, tempfile; path = tempfile.mkdtemp() + "/scan.npy"
    >>> np.save(path, np.random.default_rng(0).poisson(2, (6, 5, 8, 8)).astype("u2"))
    >>> ds = sd.PatternDataset(path, downsample=2, normalize="log", fields=("position",))
    >>> len(ds), ds.shape, ds.positions[-1].tolist()
    (30, (1, 4, 4), [0, 5, 4])
    """

    def __init__(
        self,
        data: str | PathLike | Sequence[str | PathLike],
        *,
        dataset: str | int | None = None,
        scan_shape: Sequence[int] | None = None,
        scan_roi: Sequence[int] | None = None,
        scan_step: int = 1,
        downsample: int = 1,
        method: str = "bin",
        sigma: float | None = None,
        normalize: str | Normalization = "log-zscore",
        dtype: str = "float32",
        fields: Sequence[str] = (),
        empty: str = "drop",
    ) -> None:
        names = [data] if isinstance(data, (str, PathLike)) else [*data]
        paths = tuple(p if is_url(p) else str(Path(p).expanduser().absolute()) for p in names)
        if not paths:
            raise ConfigError("data is an empty list; expected a path, or a list of paths")
        shape = None if scan_shape is None else (int(scan_shape[0]), int(scan_shape[1]))
        roi = None if scan_roi is None else tuple(map(int, scan_roi))
        options = Options(dataset, shape, roi, scan_step, downsample, method, sigma)
        self._setup(paths, options, normalize, dtype, tuple(fields), empty, None, "")
        self._say_left_out()

    def _setup(
        self,
        paths: tuple[str, ...],
        options: Options,
        normalize: str | Normalization,
        dtype: str,
        fields: tuple[str, ...],
        empty: str,
        recipe: Split | None,
        name: str,
    ) -> None:
        """Open the files; ``recipe`` and ``name`` are of a part of a split."""
        self.paths, self.options, self.dtype, self.fields, self.empty = paths, options, dtype, fields, empty
        self.normalize, self.recipe, self.name = normalize, recipe, name
        method = normalize.method if isinstance(normalize, Normalization) else normalize
        expected = {
            "normalize": (method, METHODS), "dtype": (dtype, _DTYPES), "empty": (empty, ("drop", "keep")),
        }  # fmt: skip
        for option, (value, known) in expected.items():
            if value not in known:
                raise ConfigError(f"{option} is {value!r}; expected one of {', '.join(known)}")
        for field in fields:
            if field not in FIELDS:
                raise ConfigError(f"there is no field {field!r}; expected some of {', '.join(FIELDS)}")
        if dtype == "stored" and method != "none":
            raise ConfigError(f"dtype='stored' keeps counts as they are, and normalize is {method!r}; set normalize='none'")
        self.scans = [Scan(path, options) for path in paths]
        first = self.scans[0]
        for scan in self.scans:
            if scan.detector != first.detector:
                raise ConfigError(
                    f"the patterns of {first.path} have {by(first.detector)} px, those of {scan.path} {by(scan.detector)} px; crop "
                    "them to one size: crop.size=common"
                )
            stated = str(scan.info.about.get("intensity", ""))
            if method in ("log", "sqrt", "log-zscore") and stated.startswith("z-score"):
                raise ConfigError(
                    f"{scan.path} is normalized already ({stated}); set normalize='none' (--no_normalize)"
                )
        self.shape = (1, *first.detector)
        # sums of integers have one scale in all files; a mean of floats beside them makes all means
        same = len({(scan.dtype, scan.scale) for scan in self.scans}) == 1
        self._types = None if same else np.result_type(*(scan.values for scan in self.scans))
        self._last = local()

    # --- which patterns -----------------------------------------------------------------------------------------

    @cached_property
    def _yielded(self) -> list[NDArray[np.bool_]]:
        """Positions of each scan that are neither missing nor, by default, empty."""
        return [self._kept(scan, i) for i, scan in enumerate(self.scans)]

    def _kept(self, scan: Scan, number: int) -> NDArray[np.bool_]:
        valid = scan.valid()
        return valid if self.empty == "keep" else valid & ~self._statistics[number].empty

    @cached_property
    def _statistics(self) -> list[Statistics]:
        """Of each scan: what is stored with the patterns, or found in one pass over them."""
        method = self.normalize.method if isinstance(self.normalize, Normalization) else self.normalize
        return [statistics_of(scan, logs=method == "log-zscore") for scan in self.scans]
