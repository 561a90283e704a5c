"""Patterns of one or more files as a dataset of PyTorch."""

import hashlib
import json
import operator
import threading
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.text import by as by_size
from stem_dask.kernels.training import METHODS, gather, table_of
from stem_dask.storage.location import is_url
from stem_dask.training import import_torch
from stem_dask.training.fields import FIELDS, fields_of
from stem_dask.training.reading import Options, Scan
from stem_dask.training.split import (
    GUARD,
    LEFT_OUT,
    TEST,
    TRAIN,
    VAL,
    Mask,
    Split,
    leak,
    masks,
    settled,
)
from stem_dask.training.statistics import Statistics, constants, statistics_of
from stem_dask.writers.torch import check_int64, signed_dtype

_DTYPES = ("float32", "float16", "bfloat16", "stored")


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
        if not names:
            raise ConfigError("data is an empty list; expected a path, or a list of paths")
        self._paths = [
            str(p) if is_url(str(p)) else str(Path(p).expanduser().absolute()) for p in names
        ]
        self._options = Options(
            dataset,
            None if scan_shape is None else (int(scan_shape[0]), int(scan_shape[1])),
            None if scan_roi is None else tuple(map(int, scan_roi)),
            scan_step,
            downsample,
            method,
            sigma,
        )
        self._normalize, self._dtype, self._empty = normalize, dtype, empty
        self._fields = (fields,) if isinstance(fields, str) else tuple(fields)
        self._split: Split | None = None
        self._part = ""
        self.leak: float | None = None
        self._open()
        if text := self.left_out:
            warnings.warn(text, UserWarning, stacklevel=2)

    def _open(self) -> None:
        given = self._normalize
        method = given.method if isinstance(given, Normalization) else given
        for option, value, known in (
            ("normalize", method, METHODS),
            ("dtype", self._dtype, _DTYPES),
            ("empty", self._empty, ("drop", "keep")),
            *(("a field", field, tuple(FIELDS)) for field in self._fields),
        ):
            if value not in known:
                raise ConfigError(f"{option} is {value!r}; expected one of {', '.join(known)}")
        if self._dtype == "stored" and method != "none":
            raise ConfigError(
                f"dtype='stored' keeps the values of the file, and normalize is {method!r}; set normalize='none'"
            )
        self._method, self._last = method, threading.local()
        self.scans = [Scan(path, self._options) for path in self._paths]
        first = self.scans[0]
        for scan in self.scans:
            if scan.detector != first.detector:
                raise ConfigError(
                    f"the patterns of {first.path} have {by_size(first.detector)} px, those of {scan.path} {by_size(scan.detector)} px; "
                    "crop all of them to one size: crop.size=common"
                )
            intensity = str(scan.info.about.get("intensity", ""))
            if method != "none" and intensity.startswith("z-score"):
                raise ConfigError(
                    f"{scan.path} is normalized already ({intensity}), and normalize is {method!r}; set normalize='none' "
                    "(stem-dask train: --no_normalize)"
                )
        if len({scan.scale for scan in self.scans}) > 1:  # sums of integers beside means of floats
            for scan in self.scans:
                scan.as_means()
        self._fields_of = [fields_of(scan, i, self._fields) for i, scan in enumerate(self.scans)]
        self.shape = (1, *first.detector)
        #: of the values in a buffer, of which `scale` times is the value
        self.stored_dtype = np.result_type(*(scan.dtype for scan in self.scans))
        self.scale = self.scans[0].scale

    # --- which patterns -----------------------------------------------------------------------------------------

    @cached_property
    def _statistics(self) -> list[Statistics]:
        return [statistics_of(scan) for scan in self.scans]

    @cached_property
    def _kept(self) -> list[NDArray[np.bool_]]:
        """Positions of each scan that are neither missing nor, by default, empty."""
        if self._empty == "keep":
            return [scan.valid for scan in self.scans]
        pairs = zip(self.scans, self._statistics, strict=True)
        return [scan.valid & ~found.empty for scan, found in pairs]

    @property
    def left_out(self) -> str:
        """How many patterns are never yielded, and why; empty if all are."""
        n_missing = sum(int((~scan.valid).sum()) for scan in self.scans)
        n_empty = sum(int((scan.valid & ~kept).sum()) for scan, kept in zip(self.scans, self._kept, strict=True))  # fmt: skip
        n = sum(scan.valid.size for scan in self.scans)
        parts = []
        if n_missing:
            parts.append(f"{n_missing:,} that could not be read when the file was written")
        if n_empty:
            parts.append(f"{n_empty:,} that are zero everywhere (empty='keep' keeps them)")
        return f"of {n:,} patterns, these are left out: {', '.join(parts)}" if parts else ""

    @cached_property
    def _masks(self) -> list[Mask]:
        if self._split is None:
            return [np.where(kept, TRAIN, LEFT_OUT).astype(np.uint8) for kept in self._kept]
        found = masks(self._kept, self._split)
        if found is None:
            raise SourceError(
                f"{', '.join(self._paths)}: the split does not fit any more; split the dataset again"
            )
        return found

    @property
    def mask(self) -> Mask | list[Mask]:
        """Part of each position, uint8 (scan_y, scan_x), see `split`; a list for several files."""
        found = [mask.copy() for mask in self._masks]
        return found[0] if len(found) == 1 else found

    @cached_property
    def _places(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Number of the scan, and position in it (row by row), of each pattern."""
        value = {"": TRAIN, "train": TRAIN, "val": VAL, "test": TEST}[self._part]
        flat = [np.flatnonzero(mask == value) for mask in self._masks]
        number = np.repeat(np.arange(len(flat), dtype=np.int32), [one.size for one in flat])
        return number, np.concatenate(flat)

    def __len__(self) -> int:
        return len(self._places[0])

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """(N, 3): number of the file, row and column in the scan of the source."""
        out = np.empty((len(self), 3), np.int64)
        out[:, 0], flat = self._places
        for i, scan in enumerate(self.scans):
            here = out[:, 0] == i
            y, x = np.unravel_index(flat[here], scan.shape)
            out[here, 1], out[here, 2] = np.asarray(scan.y)[y], np.asarray(scan.x)[x]
        return out

    @cached_property
    def fingerprint(self) -> str:
        """Of the files and of all options on which the patterns and their numbers depend, not of paths."""
        files = [(*scan.identity, scan.found.source.shape, str(scan.found.source.dtype)) for scan in self.scans]  # fmt: skip
        recipe = None if self._split is None else asdict(self._split)
        text = json.dumps([files, asdict(self._options), self._empty, self._part, recipe])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def chunks(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Number of the chunk of each pattern, counted through all scans, and its row in what `read_chunk` fills."""
        chunk, row = np.empty((2, len(self)), np.int32)
        numbers, flat, before = *self._places, 0
        for i, scan in enumerate(self.scans):
            here, (of_all, rows) = numbers == i, scan.places
            chunk[here], row[here] = of_all[flat[here]] + before, rows[flat[here]]
            before += scan.n_chunks
        return chunk, row

    @property
    def most(self) -> int:
        """Largest number of patterns of a chunk."""
        return max(scan.most for scan in self.scans)

    def _located(self, chunk: int) -> tuple[Scan, int]:
        """The scan of a chunk, and its number there."""
        for scan in self.scans:
            if chunk < scan.n_chunks:
                return scan, chunk
            chunk -= scan.n_chunks
        raise IndexError(chunk)

    def read_chunk(self, chunk: int, out: NDArray) -> None:
        """Read a chunk into (`most`, height, width) of type `stored_dtype`."""
        scan, number = self._located(chunk)
        scan.read(number, out)

    def refuse_changes(self, chunk: int) -> None:
        """Raise SourceError when a file of a chunk has changed since it was opened."""
        scan, number = self._located(chunk)
        scan.refuse_changes(number)

    # --- samples ------------------------------------------------------------------------------------------------

    @cached_property
    def normalization(self) -> Normalization:
        """The normalization, with the constants of the training part."""
        if isinstance(self._normalize, Normalization):
            return self._normalize
        if self._method != "log-zscore":
            return Normalization(self._method)
        chosen = [mask == TRAIN for mask in self._masks]
        return Normalization(self._method, *constants(self._statistics, chosen, self.scans))

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        how = self.normalization
        return table_of(self.stored_dtype, how.method, how.mean, how.std, self.scale)

    @cached_property
    def _field_values(self) -> dict[str, NDArray]:
        """Fields of all patterns, by name."""
        numbers, flat = self._places
        parts = list(enumerate(self._fields_of))
        return {
            field: np.concatenate([one[field][flat[numbers == i]] for i, one in parts])
            for field in self._fields
        }

    def empty_batch(self, n: int) -> NDArray:
        """An array for n patterns."""
        values = signed_dtype(self._values) if self._dtype == "stored" else np.dtype(np.float32)
        return np.empty((n, *self.shape), values)

    @property
    def _values(self) -> np.dtype:
        """Type of the patterns as `stem_dask.downsample` gives them."""
        return self.stored_dtype if self.scale == 1.0 else self.scans[0].values

    def fill(
        self, patterns: NDArray, rows: NDArray[np.int64], index: NDArray[np.int64], out: NDArray
    ) -> None:
        """Normalize patterns into an array; ``index`` are their numbers, for messages."""
        if self._dtype == "stored":
            chosen = patterns[rows]
            if chosen.dtype == np.uint64:
                check_int64(chosen.max(initial=0))
            out[:, 0] = chosen if self.scale == 1.0 else (chosen * self.scale).astype(self._values)
            return
        how = self.normalization
        bad = gather(
            patterns, rows, out[:, 0], self._table, how.method, how.mean, how.std, self.scale
        )
        if bad >= 0:
            number, y, x = self.positions[index[bad]].tolist()
            raise ConfigError(
                f"{self._paths[number]}: the pattern at scan position ({y}, {x}) has a negative, infinite or NaN value, for which "
                f"normalize={how.method!r} is not defined; set normalize='none', or subtract the background before"
            )

    def as_tensors(self, out: NDArray, index: NDArray[np.int64]) -> dict[str, Any]:
        """The batch: ``patterns`` (n, 1, height, width), ``index`` (n,) and the fields."""
        torch = import_torch()
        patterns = torch.from_numpy(out)
        if self._dtype in ("float16", "bfloat16"):
            patterns, given = patterns.to(getattr(torch, self._dtype)), patterns
            too_large = given[patterns.isinf() & given.isfinite()]
            if len(too_large):
                raise ConfigError(
                    f"dtype={self._dtype!r} does not hold {float(too_large[0]):g}; set dtype='bfloat16', or 'float32'"
                )
        fields = {
            name: torch.from_numpy(values[index]) for name, values in self._field_values.items()
        }
        return {"patterns": patterns, "index": torch.from_numpy(index), **fields}

    def __getitem__(self, i: int) -> dict[str, Any]:
        (sample,) = self.__getitems__([i])
        return sample

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Samples by number; each chunk is read once."""
        wanted = np.array([operator.index(i) for i in indices], np.int64)
        outside = wanted[(wanted < -len(self)) | (wanted >= len(self))]
        if outside.size:
            raise IndexError(f"pattern {outside[0]} of {len(self):,}")
        wanted %= max(1, len(self))
        out = self.empty_batch(len(wanted))
        chunk, row = (of_all[wanted] for of_all in self.chunks)
        for one in np.unique(chunk):
            here = np.flatnonzero(chunk == one)
            to = np.empty((here.size, *self.shape), out.dtype)
            self.fill(self._chunk(int(one)), row[here].astype(np.int64), wanted[here], to)
            out[here] = to
        batch = self.as_tensors(out, wanted)
        return [
            {k: int(v[j]) if k == "index" else v[j] for k, v in batch.items()}
            for j in range(len(wanted))
        ]

    def _chunk(self, chunk: int) -> NDArray:
        """A chunk, which this thread keeps for the next sample."""
        kept = vars(self._last)
        if kept.get("number") != chunk:
            kept.pop("number", None)
            kept.setdefault("patterns", np.empty((self.most, *self.shape[1:]), self.stored_dtype))
            self.read_chunk(chunk, kept["patterns"])
            kept["number"] = chunk
        else:
            self.refuse_changes(chunk)
        patterns: NDArray = kept["patterns"]
        return patterns

    def _logs(self, number: int, flat: NDArray[np.int64]) -> NDArray[np.float64]:
        """log(1 + x) of patterns at some positions of a scan: (n, pixels)."""
        scan = self.scans[number]
        chunk, row = (of_all[flat] for of_all in scan.places)
        patterns = np.empty((flat.size, *scan.detector))
        held = np.empty((scan.most, *scan.detector), scan.dtype)
        for one in np.unique(chunk):
            scan.read(int(one), held)
            patterns[chunk == one] = held[row[chunk == one]]
        return np.log1p(np.fmax(patterns * scan.scale, 0.0)).reshape(flat.size, -1)

    # --- parts --------------------------------------------------------------------------------------------------

    def split(
        self,
        val: float = 0.1,
        test: float = 0.0,
        by: str = "blocks",
        block: int | None = None,
        guard: int | None = None,
        seed: int = 0,
    ) -> dict[str, "PatternDataset"]:
        """Split into ``train``, ``val`` and, unless it is 0, ``test``.

        Neighbours on a scan look alike: after a random split the validation loss is that of patterns which the model has
        almost seen. Prints the mean correlation of validation patterns with their nearest training pattern, which is also the attribute
        ``leak`` of the parts.

        Parameters
        ----------
        val, test : shares of the patterns, met within 20 % (by datasets: the nearest that whole files give)
        by : ``blocks`` (square tiles of the scan), ``rows`` (bands of whole rows), ``datasets`` (whole files), or ``random``
        block : side of a tile, or rows of a band; default such that about four are the share
        guard : positions within this distance, ``max(|dy|, |dx|)``, of validation and test leave the training part; default the first
            distance at which patterns correlate below 0.5, at least 1 and at most half a block
        seed : of the choice of blocks

        Raises
        ------
        ConfigError
            When a scan is too small for its blocks and their guard.
        """
        if self._split is not None:
            raise ConfigError(
                "this is a part of a split already; split the whole dataset into train, val and test at once"
            )
        mean = self._mean_log_pattern() if by != "datasets" else None
        recipe = settled(self._kept, by, val, test, block, guard, seed, self._logs, mean)
        parts = {name: self._with(recipe, name) for name in ("train", "val", "test")}
        if not test:
            del parts["test"]
        found = None if mean is None or not val else leak(parts["train"]._masks, self._logs, mean)
        for part in parts.values():
            part.leak = found
        sizes = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
        n_guard = sum(int((mask == GUARD).sum()) for mask in parts["train"]._masks)
        near = (
            ""
            if found is None
            else f"; validation patterns correlate {found:z.2f} with their nearest training pattern"
        )
        if by == "random":
            warnings.warn(f"by='random'{near}: the validation loss is not that of unseen patterns; set by='blocks'", UserWarning, stacklevel=2)  # fmt: skip
        print(f"split       {sizes}, guard {n_guard:,} patterns (by {by}){near}")
        return parts

    def _mean_log_pattern(self) -> NDArray[np.float64]:
        """Mean over all yielded patterns of log(1 + x)."""
        whole = [statistics_of(scan, with_pattern=True) for scan in self.scans]
        total = sum(one.mean_pattern * one.n for one in whole if one.mean_pattern is not None)
        return np.asarray(total / max(1, sum(map(np.sum, self._kept))))

    def _with(self, recipe: Split, name: str) -> "PatternDataset":
        """A part, which shares the open files."""
        part = object.__new__(PatternDataset)
        of_all = (
            "fingerprint",
            "_masks",
            "_places",
            "positions",
            "chunks",
            "normalization",
            "_table",
            "_field_values",
        )
        vars(part).update({key: value for key, value in vars(self).items() if key not in of_all})
        part._split, part._part = recipe, name
        return part

    def to_scan(self, values: Any, fill: float = np.nan) -> Any:
        """Values of all patterns (N, …) on the scan as read: (scan_y, scan_x, …), ``fill`` elsewhere; a list for several files."""
        values = np.asarray(values)
        if len(values) != len(self):
            raise ConfigError(f"there are {len(values):,} values for {len(self):,} patterns")
        dtype = np.result_type(values.dtype, np.min_scalar_type(fill))
        if values.dtype.kind in "iu" and dtype.kind == "f":
            dtype = np.dtype(np.float64)
        numbers, flat = self._places
        found = []
        for i, scan in enumerate(self.scans):
            out = np.full((scan.shape[0] * scan.shape[1], *values.shape[1:]), fill, dtype)
            out[flat[numbers == i]] = values[numbers == i]
            found.append(out.reshape(*scan.shape, *values.shape[1:]))
        return found[0] if len(found) == 1 else found

    def __getstate__(self) -> dict[str, Any]:
        if self._method == "log-zscore":  # workers need no pass of their own
            normalize: Any = self.normalization
        else:
            normalize = self._normalize
        names = ("_paths", "_options", "_dtype", "_fields", "_empty", "_split", "_part", "leak")
        return {
            **{name: vars(self)[name] for name in names},
            "_normalize": normalize,
            "fingerprint": self.fingerprint,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = state.pop("fingerprint")
        vars(self).update(state)
        self._open()
        if self.fingerprint != before:
            raise SourceError(
                f"{', '.join(self._paths)}: a file has changed since the dataset was opened; open it again"
            )
