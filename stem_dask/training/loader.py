"""Batches of a dataset in a random order that reads each chunk once an epoch, by threads of this process."""

import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from dask.utils import parse_bytes
from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError
from stem_dask.core.machine import free_bytes, usable_cores
from stem_dask.storage.errors import one_line
from stem_dask.training import import_torch
from stem_dask.training.dataset import PatternDataset
from stem_dask.training.reading import scratch

#: noise of batch means, relative to that of random batches, above which a warning names what helps
NOISY = 1.5


@dataclass(frozen=True)
class Plan:
    """How a loader reads.

    Parameters
    ----------
    mode : ``cache`` (all patterns are in memory, batches are truly random) or ``block`` (a window of chunks is shuffled)
    K : chunks in a window
    n_bytes : of the buffers
    bound : the variance of a batch mean is at most this multiple of that of truly random batches
    memory : bytes that were allowed
    left_out : how many patterns are never yielded
    """

    mode: str
    K: int
    n_bytes: int
    bound: float
    memory: int
    left_out: str = ""

    def __str__(self) -> str:
        held = "all patterns" if self.mode == "cache" else "windows"
        text = f"{self.mode}: K = {self.K} chunks, {held} of {self.n_bytes / 1e6:.0f} MB in memory; noise of batch means <= {self.bound:.2f} x that of random batches"
        return f"{text}; {self.left_out}" if self.left_out else text


class Loader:
    """An iterable of batches of a dataset; takes the place of `torch.utils.data.DataLoader`.

    A batch is a dictionary: ``patterns`` (B, 1, height, width), ``index`` (B,) int64, the numbers in ``ds``, and the fields of the dataset.
    Each epoch yields every pattern once, in an order that depends on the data, seed, epoch, batch size, number of ranks and
    memory only. The epoch advances by itself.

    Parameters
    ----------
    ds : a `PatternDataset`, or a part of a split
    batch_size : patterns of a batch
    shuffle : whether the order is random, else that of ``ds.positions``
    seed : of the order
    drop_last : leave out what does not fill a batch of every rank; default only when several ranks shuffle
    memory : bytes, or text such as ``"64MB"``, for patterns in memory; ``auto`` is a quarter of what is free, with `torch.distributed` the
        least of all ranks, which must all make the loader if it shuffles
    cache : ``auto`` keeps all patterns in memory if they fit ``memory``; True, False
    threads : that read and decode; default the cores of this process
    rank, world_size : default those of `torch.distributed`, else of the environment (RANK, WORLD_SIZE), else 0 and 1
    device : to which tensors are copied
    transform : function of each batch; what it returns is yielded

    Raises
    ------
    ConfigError
        When the memory holds less than two chunks, or an option is not valid.

    Examples
    --------
    >>> import numpy as np, stem_dask as sd, tempfile; path = tempfile.mkdtemp() + "/scan.npy"
    >>> np.save(path, np.random.default_rng(0).poisson(2, (6, 5, 8, 8)).astype("u2"))
    >>> batches = sd.loader(sd.PatternDataset(path, normalize="log"), batch_size=8)
    >>> [tuple(batch["patterns"].shape) for batch in batches]
    [(8, 1, 8, 8), (8, 1, 8, 8), (8, 1, 8, 8), (6, 1, 8, 8)]
    """

    def __init__(
        self,
        ds: PatternDataset,
        batch_size: int = 128,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool | None = None,
        memory: int | str = "auto",
        cache: bool | str = "auto",
        threads: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        device: Any = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self._is_joint = rank is None and _distributed() is not None
        self.rank, self.world_size = _ranks(rank, world_size)
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if not hasattr(value, "__index__") or value < least:
                raise ConfigError(f"{name} is {value}; expected a whole number, {least} or more")
        if not len(ds):
            raise ConfigError(
                f"the dataset has no patterns ({ds.left_out or 'an empty part of a split'})"
            )
        if cache not in ("auto", True, False):
            raise ConfigError(f"cache is {cache!r}; expected 'auto', True or False")
        self.dataset, self.batch_size, self.shuffle, self.seed = ds, batch_size, shuffle, seed
        self.drop_last = shuffle and self.world_size > 1 if drop_last is None else drop_last
        self.threads = usable_cores() if threads is None else max(1, threads)
        self.device, self.transform = _checked(device), transform
        self._cache_wanted, self._is_auto = cache, memory == "auto"
        self._chunks, self._rows = ds.chunks
        self._used = np.unique(self._chunks)  # in the order of the files
        self._patterns: NDArray | None = None  # all of them, in cache mode
        self._held: list[NDArray] = []  # of the last epoch, in block mode
        self.epoch = self._start = self._done = 0
        self._settle(self._bytes(memory))
        if self.drop_last and len(ds) < batch_size * (self.world_size if shuffle else 1):
            raise ConfigError(
                f"drop_last=True with batch_size {batch_size} on {self.world_size} ranks leaves nothing of {len(ds):,} patterns; make batch_size "
                "smaller, or set drop_last=False"
            )

    @property
    def _chunk_bytes(self) -> int:
        _, height, width = self.dataset.shape
        return self.dataset.most * height * width * self.dataset.stored_dtype.itemsize

    @property
    def _all_bytes(self) -> int:
        _, height, width = self.dataset.shape
        return len(self.dataset) * height * width * self.dataset.stored_dtype.itemsize

    def _bytes(self, memory: int | str) -> int:
        """Bytes for patterns; ``auto`` is rounded down, so that it is seldom another one in the next session."""
        if memory == "auto":
            on_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as torchrun sets it
            chunks = max(2, free_bytes() // (4 * on_node) // self._chunk_bytes)
            found = int(2 ** (chunks.bit_length() - 1)) * self._chunk_bytes
            if not (self._is_joint and self.shuffle):
                return found
            # in one mode and with equal windows, because else two ranks would yield the same patterns
            each = [0] * self.world_size
            import_torch().distributed.all_gather_object(each, found)
            return min(each)
        try:
            found = parse_bytes(memory) if isinstance(memory, str) else operator.index(memory)
        except (ValueError, TypeError):
            raise ConfigError(
                f"memory is {memory!r}; expected bytes, text such as '64MB', or 'auto'"
            ) from None
        return int(found)

    def _settle(self, memory: int) -> None:
        """Choose the mode, the window and what it costs."""
        n, chunk = len(self._used), self._chunk_bytes
        fits = self._all_bytes <= memory
        if self._cache_wanted is True and not fits:
            raise ConfigError(
                f"cache=True needs {self._all_bytes:,} bytes for all patterns, memory is {memory:,}; set memory={self._all_bytes} or cache='auto'"
            )
        if fits and self._cache_wanted is not False:
            self.plan = Plan("cache", n, self._all_bytes, 1.0, memory, self.dataset.left_out)
            return
        most = memory // (2 * chunk)
        if most < 1:
            raise ConfigError(
                f"memory is {memory:,} bytes; two chunks of the patterns need {2 * chunk:,}: set memory={2 * chunk} or more"
            )
        #: chunks of a window at most; the windows of an epoch hold equally many, or one less
        self._most = min(most, n)
        mine = -(-n // self.world_size) if self.shuffle else n
        windows = -(-mine // self._most)
        k = mine // windows
        is_whole = windows == self.world_size == 1  # all patterns are shuffled together
        bound = 1.0 + self.batch_size / k if self.shuffle and not is_whole else 1.0
        held = min(2, windows) * self._most * chunk
        self.plan = Plan("block", k, held, bound, memory, self.dataset.left_out)
        if bound > NOISY:
            few, fewer = int(mine * (NOISY - 1)) // self.batch_size, int(k * (NOISY - 1))
            helps = [2 * -(-mine // few) * chunk] if few else []
            helps += [2 * n * chunk] * (self.world_size == 1)
            helps += [self._all_bytes] * (self._cache_wanted is not False)
            ways = [f"memory='{-(-min(helps) // 10**6)}MB'"] if helps else []
            ways += [f"batch_size={fewer}"] * bool(fewer)
            warnings.warn(
                f"{self.plan}: patterns of a chunk look alike, and few chunks are shuffled together; {' or '.join(ways)} brings the noise "
                f"to {NOISY} or less",
                UserWarning,
                stacklevel=3,
            )

    # --- the order ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        n, b, ranks = len(self.dataset), self.batch_size, self.world_size
        if self.shuffle:
            first, last = self._share(n)
            return (last - first) // b if self.drop_last else -(-(last - first) // b)
        batches = n // b if self.drop_last else -(-n // b)
        return batches * (self.rank + 1) // ranks - batches * self.rank // ranks

    def _share(self, n: int) -> tuple[int, int]:
        """First and last of the patterns of this rank, in the order of the epoch."""
        if self.shuffle and self.drop_last:
            each = n // (self.batch_size * self.world_size) * self.batch_size
            return self.rank * each, (self.rank + 1) * each
        if self.shuffle:
            return n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size
        batches = n // self.batch_size if self.drop_last else -(-n // self.batch_size)
        first, last = (batches * r // self.world_size for r in (self.rank, self.rank + 1))
        return first * self.batch_size, min(n, last * self.batch_size)

    def _random(self, epoch: int, *more: int) -> np.random.Generator:
        token = int(self.dataset.fingerprint[:15], 16)
        return np.random.default_rng([token, self.seed, epoch, *more])

    def _order(self) -> list[NDArray[np.int64]]:
        """Numbers of the patterns of this rank in each window of the epoch; those of a window are still to be shuffled."""
        n = len(self.dataset)
        first, last = self._share(n)
        if not self.shuffle:
            order = np.arange(first, last)
            return [order] if self.plan.mode == "cache" else self._in_turn(order)
        if self.plan.mode == "cache":
            return [self._random(self.epoch).permutation(n)[first:last]]
        random = self._random(self.epoch)
        place = np.empty(int(self._used[-1]) + 1, np.int32)
        place[random.permutation(self._used)] = np.arange(len(self._used))
        place = place[self._chunks]
        # within a chunk random too, because two ranks may share one
        order = np.lexsort((random.random(n), place))[first:last]
        starts = np.flatnonzero(np.diff(place[order], prepend=-1))
        windows = -(-len(starts) // self._most) or 1
        cuts = [starts[len(starts) * w // windows] for w in range(1, windows)]
        return np.split(order, cuts)

    def _in_turn(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Windows of at most K chunks, in order."""
        chunks = self._chunks[order]
        cuts, held = [], set[int]()
        for i in np.flatnonzero(np.diff(chunks, prepend=-1)):
            chunk = int(chunks[i])
            if chunk not in held and len(held) == self._most:
                cuts.append(int(i))
                held = set()
            held.add(chunk)
        return np.split(order, cuts)

    # --- iteration ----------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Begin with this epoch."""
        self.epoch, self._start, self._done = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is, after the batch that was yielded last; small, and plain numbers and text."""
        return {
            "epoch": self.epoch, "batch": self._done, "seed": self.seed, "batch_size": self.batch_size, "world_size": self.world_size,
            "memory": self.plan.memory, "shuffle": self.shuffle, "drop_last": self.drop_last, "mode": self.plan.mode,
            "fingerprint": self.dataset.fingerprint,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a loader of the same patterns was; raises ConfigError for another seed, batch size, or other patterns."""
        mine = self.state_dict()
        for name in ("fingerprint", "batch_size", "world_size", "seed", "shuffle", "drop_last", "memory", "mode"):  # fmt: skip
            if name == "memory" and self._is_auto and "memory" in state:
                self._settle(int(state["memory"]))
                self._patterns, mine = None, self.state_dict()
            if state.get(name) != mine[name]:
                raise ConfigError(
                    f"the state is of {name} {state.get(name)!r}, this loader has {mine[name]!r}; make a loader with the same, or begin anew"
                )
        self.epoch, self._start = int(state["epoch"]), int(state["batch"])
        self._done = self._start

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        self._done = start
        return self._batches(start)

    def _batches(self, start: int) -> Iterator[Any]:
        n_batches, done, b = len(self), start, self.batch_size
        if not n_batches:  # of a rank, when there are fewer batches than ranks
            self.epoch += 1
            return
        windows = self._order()
        ends = np.cumsum([len(window) for window in windows])
        left = start * b  # patterns that were yielded before
        first = int(np.searchsorted(ends, left, side="right"))
        left -= int(ends[first - 1]) if first else 0
        n_last = int(ends[-1]) - (n_batches - 1) * b
        out, index, filled = None, np.empty(0, np.int64), 0
        pool = ThreadPoolExecutor(self.threads, "stem_dask-loader")
        try:
            for patterns, rows, numbers in self._read(pool, windows, first):
                at, left = left, 0
                while at < len(numbers) and done < n_batches:
                    if out is None:
                        size = min(b, n_last) if done == n_batches - 1 else b
                        out, index, filled = (
                            self.dataset.empty_batch(size),
                            np.empty(size, np.int64),
                            0,
                        )
                    n = min(len(out) - filled, len(numbers) - at)
                    index[filled : filled + n] = numbers[at : at + n]
                    self.dataset.fill(patterns, rows[at : at + n], numbers[at : at + n], out[filled : filled + n])  # fmt: skip
                    at, filled = at + n, filled + n
                    if filled == len(out):
                        batch, out = self._finished(self.dataset.as_tensors(out, index)), None
                        done += 1
                        self._done = done
                        if done == n_batches:
                            self.epoch, self._done = self.epoch + 1, 0
                        yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(
        self, pool: ThreadPoolExecutor, windows: list[NDArray[np.int64]], first: int
    ) -> Iterator[tuple[NDArray, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield patterns, rows in them, and numbers of each window, while the next one is read."""
        if self.plan.mode == "cache":
            patterns = self._all(pool)
            yield from ((patterns, numbers, numbers) for numbers in windows[first:])
            return
        epoch = self.epoch
        shape = (self.dataset.most, *self.dataset.shape[1:])
        most = max(len(np.unique(self._chunks[window])) for window in windows)
        # new memory for each epoch would cost a tenth of the time
        buffers, self._held = self._held, []
        if len(buffers) < min(2, len(windows)) or len(buffers[0]) < most:
            buffers = [np.empty((most, *shape), self.dataset.stored_dtype) for _ in windows[:2]]

        def begin(window: int) -> tuple[NDArray, NDArray[np.int32], list[Future[None]]]:
            chunks = np.unique(self._chunks[windows[window]])
            buffer, read = buffers[(window - first) % 2], self.dataset.read_chunk
            reading = [pool.submit(read, int(c), buffer[i]) for i, c in enumerate(chunks)]
            return buffer, chunks, reading

        following = begin(first)
        for window in range(first, len(windows)):
            buffer, chunks, reading = following
            for future in reading:
                future.result()
            if window + 1 < len(windows):
                following = begin(window + 1)
            numbers = windows[window]
            if self.shuffle:
                numbers = self._random(epoch, window, self.rank).permutation(numbers)
            rows = np.searchsorted(chunks, self._chunks[numbers]) * shape[0] + self._rows[numbers]
            yield buffer.reshape(-1, *shape[1:]), rows, numbers
        self._held = buffers

    def _all(self, pool: ThreadPoolExecutor) -> NDArray:
        """All patterns in memory, read once."""
        ds = self.dataset
        if self._patterns is not None:
            for scan in ds.scans:
                scan.refuse_changes()
            return self._patterns
        out = np.empty((len(ds), *ds.shape[1:]), ds.stored_dtype)
        order = np.argsort(self._chunks, kind="stable")
        starts = np.searchsorted(self._chunks[order], self._used)

        def keep(chunk: int, here: NDArray[np.int64]) -> None:
            held = scratch("held", (ds.most, *ds.shape[1:]), ds.stored_dtype)
            ds.read_chunk(chunk, held)
            out[here] = held[self._rows[here]]

        parts = np.split(order, starts[1:])
        for _ in pool.map(keep, map(int, self._used), parts):
            pass
        self._patterns = out
        return out

    def _finished(self, batch: dict[str, Any]) -> Any:
        if self.device is not None:
            batch = {
                name: value.to(self.device, non_blocking=True) for name, value in batch.items()
            }
        return batch if self.transform is None else self.transform(batch)


#: as the public name is spelled
loader = Loader


def _checked(device: Any) -> Any:
    """A device that exists."""
    if device is None:
        return None
    torch = import_torch()

    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device is {device!r}, which torch cannot use here: {one_line(error)}"
        ) from error


def _distributed() -> Any:
    """The module `torch.distributed` where this process has joined a group, else None."""
    found = getattr(sys.modules.get("torch"), "distributed", None)
    return found if found and found.is_available() and found.is_initialized() else None


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks, as given, of `torch.distributed`, of the environment, or 0 and 1."""
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank is {rank} and world_size {world_size}; give both or none")
    if rank is None and (distributed := _distributed()) is not None:
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
    elif rank is None:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not world_size or not 0 <= rank < world_size:
        raise ConfigError(
            f"rank is {rank} and world_size {world_size}; expected 0 <= rank < world_size"
        )
    return rank, world_size
