"""Runs a lazy output block by block into a sink: one call a block, a few in flight, nothing held.

The protocol is small. The lazy outputs share one grid of blocks over the leading (scan) axes. Their graph is optimized
once; for each block the part that it needs is cut out and submitted as one call, which reads, runs all fused stages
and hands the result to the sink's ``write`` on the worker. Only a small record comes back. See docs/engine.md.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import logging
import pickle
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from stem_dask.core.batches import input_left_out
from stem_dask.core.errors import (
    NO_ROOM,
    NoMemoryError,
    SourceError,
    StemDaskError,
    StoreError,
)
from stem_dask.core.machine import keep_freed_memory
from stem_dask.core.model import Record, Region
from stem_dask.engine.blocks import Grid, bounds, computed, place
from stem_dask.engine.journal import Journal
from stem_dask.engine.submit import Call, in_flight
from stem_dask.storage.errors import translate

if TYPE_CHECKING:
    import dask.array as da

_logger = logging.getLogger("stem_dask")

#: output bytes of finished blocks that one task looks at again, and how many blocks: each takes less time than a task
VERIFIED_BYTES, VERIFIED_BLOCKS = 2**28, 64

#: waits before a task that met a read or write error tries again, in seconds
RETRY_SECONDS = (0.1, 0.5, 2.0)

#: errors of the system that do not go away by themselves
_LASTING = (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM)


class Sink(Protocol):
    """Where blocks go. ``create`` and ``finish`` run in the client, ``write`` and ``verify`` on workers."""

    def create(self, *, resume: bool) -> None:
        """Create the empty output under its temporary name; keep an existing one when resuming.

        From then on no worker of an earlier start can write into it; see `stem_dask.storage.staging`.
        """

    def write(self, index: int, region: Region, blocks: Mapping[str, Any]) -> dict[str, Any]:
        """Write one block of every output; returns what `verify` and `finish` need to know, as JSON can hold it.

        Blocks are arrays; those of patterns may be `stem_dask.core.batches.Block`, and what is found on the way `Deferred`.
        """

    def verify(self, record: Record) -> str | None:
        """What is wrong with a block that a record speaks of, read again from the disk; None when it is whole."""

    def finish(self, records: Sequence[Record]) -> None:
        """Make the output complete; records come in the order of their index."""


Progress = Callable[[int, int, Record], None]


def run(
    outputs: Mapping[str, da.Array],
    n_lead: int,
    sink: Sink,
    *,
    client: Any = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
    job: str = "",
    quarantine: bool = False,
    unreadable: Mapping[int, str] = MappingProxyType({}),
) -> list[Record]:
    """Compute lazy outputs into a sink.

    Parameters
    ----------
    outputs : dask arrays by name, with the same number of blocks along the leading axes and one along the others
    n_lead : how many leading axes carry the blocks: 2 for a scan, 1 for a list of patterns
    sink : receives every block once
    client : a `distributed.Client`, or None for threads of this process
    progress : called with (blocks done, blocks, record) after each block
    journal, job : where finished blocks are noted; blocks noted there are read again from the disk, and only those
        that are damaged or missing are computed again
    quarantine : a block whose input cannot be read is computed from zeros, which its record says; else the run stops
    unreadable : blocks that are known for that, and why: they are not tried again

    Returns
    -------
    list of Record, in the order of the blocks

    Raises
    ------
    StoreError
        When the blocks of the outputs do not belong together.
    """
    grid = Grid(outputs, n_lead, is_here=client is None)
    known = {} if journal is None else journal.records(job)
    if journal is not None and not all(grid.holds(record) for record in known.values()):
        _logger.warning("%s: blocks have another size than before; all are computed again", job)
        journal.forget(job)
        known = {}
    sink.create(resume=bool(known))
    calls = _Calls(grid, sink, known.values(), quarantine, unreadable)
    records: list[Record] = []
    name = "-".join(job.replace(".", "").split()[:2]) or "stem_dask"  # such as analyze, export-pt
    began = time.monotonic()
    _logger.info("%s: %d blocks, %d of them finished earlier", name, grid.n_blocks, len(known))
    with contextlib.closing(in_flight(client, calls, name)) as done:
        for result in itertools.chain.from_iterable(done):
            if isinstance(result, Again):
                how = "quarantined" if result.is_unreadable else "computed again"
                _logger.warning("%s: %s; it is %s", job or "block", result.what, how)
                known.pop(result.index, None)
                calls.to_write.append(result.index)
                if result.is_unreadable:
                    calls.unreadable[result.index] = result.what
                continue
            if journal is not None and result.index not in known:
                journal.append(job, result)
            records.append(result)
            if progress is not None:
                progress(len(records), grid.n_blocks, result)
    records.sort(key=lambda record: record.index)
    with translate(StoreError, getattr(sink, "path", job)):
        sink.finish(records)
    _logger.info("%s: finished in %.2f s", name, time.monotonic() - began)
    return records


@dataclass(frozen=True)
class Again:
    """A block that is to be computed after all: it was noted as finished and is damaged, or its input cannot be read."""

    index: int
    what: str
    is_unreadable: bool = False


class _Calls:
    """The calls that are left: blocks to write, then a second look at the finished ones.

    An iterator that may go on after it was exhausted, because a result can bring more work.
    """

    def __init__(
        self,
        grid: Grid,
        sink: Sink,
        finished: Collection[Record],
        quarantine: bool,
        unreadable: Mapping[int, str],
    ) -> None:
        self.grid, self.sink, self.quarantine = grid, sink, quarantine
        self.unreadable = dict(unreadable)
        indices = {record.index for record in finished}
        self.to_write = collections.deque(i for i in range(grid.n_blocks) if i not in indices)
        self.to_verify: collections.deque[list[Record]] = collections.deque()
        for record in finished:
            last = self.to_verify[-1] if self.to_verify else []
            n_bytes = sum(r.bytes_out for r in last)
            if not last or len(last) == VERIFIED_BLOCKS or n_bytes >= VERIFIED_BYTES:
                self.to_verify.append(last := [])
            last.append(record)

    def __iter__(self) -> Iterator[Call]:
        return self

    def __length_hint__(self) -> int:
        """Blocks to write; a second look takes as long as many of them, and is not counted."""
        return len(self.to_write)

    def __next__(self) -> Call:
        if self.to_write:
            index = self.to_write.popleft()
            region, payload = self.grid.payload(index)
            why = self.unreadable.get(index) if self.quarantine else None
            return _write_block, (payload, self.sink, index, region, self.quarantine, why)
        if self.to_verify:
            return _verify_blocks, (self.sink, self.to_verify.popleft())
        raise StopIteration


def _write_block(
    payload: Any,
    sink: Sink,
    index: int,
    region: Region,
    quarantine: bool = False,
    why: str | None = None,
) -> list[Record | Again]:
    """One task: compute a block of every output and write it; ``why`` says that its input is left out."""
    start = time.perf_counter()
    keep_freed_memory()
    graph, wanted = pickle.loads(payload) if isinstance(payload, bytes) else payload
    tries: list[int] = []

    def written() -> tuple[dict[str, Any], int]:
        with translate(SourceError):
            values = computed(graph, wanted.values())
        blocks = {name: values[key] for name, key in wanted.items()}
        # blocks in pieces are read only now, and tell errors of the input as such
        with translate(StoreError):
            extra = sink.write(index, region, blocks)
        return extra, sum(block.nbytes for block in blocks.values())

    try:
        with contextlib.nullcontext() if why is None else input_left_out():
            extra, n_bytes = _patiently(written, region, tries)
    except SourceError as error:
        if not quarantine:
            raise
        return [Again(index, str(error), is_unreadable=True)]
    extra = {**extra, "region": bounds(region)}
    if tries:
        extra["retries"] = len(tries)
    if why is not None:
        extra["quarantined"] = why
    return [Record(index, time.perf_counter() - start, n_bytes, peak_rss(), extra)]


def _patiently(work: Callable[[], Any], region: Region, tries: list[int]) -> Any:
    """Do the work; errors of files are tried again after longer and longer waits."""
    for wait_seconds in (*RETRY_SECONDS, None):
        try:
            return work()
        except (SourceError, StoreError) as error:
            refused = error.__cause__ is None  # by us, and again the next time
            if wait_seconds is None or refused or error.errno in _LASTING:
                raise type(error)(f"block {place(region)}: {error}") from error
            tries.append(error.errno or 0)
            time.sleep(wait_seconds)
        except MemoryError as error:
            if isinstance(error, StemDaskError):
                raise
            full = str(error) or "the memory of the process is full"
            break  # not within the except: its error would go along, and keep what the task held
    raise NoMemoryError(
        f"block {place(region)}: {full}; lower output.chunk_mb, or use fewer cluster.threads_per_worker"
    )


def _verify_blocks(sink: Sink, records: Sequence[Record]) -> list[Record | Again]:
    """One task: look at finished blocks again."""
    found = ((record, sink.verify(record)) for record in records)
    return [r if what is None else Again(r.index, what) for r, what in found]


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:
        for line in file:
            # getrusage would start with what the parent had when it made this process
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0
