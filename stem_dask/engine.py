"""Runs a lazy output block by block into a sink: one task a block, a few in flight, nothing held.

The protocol is small. The lazy outputs share one grid of blocks over the leading (scan) axes. Their graph is optimized
once; for each block the part that it needs is cut out and submitted as one task, which reads, runs all fused stages
and hands the result to the sink's ``write`` on the worker. Only a small record comes back. See docs/engine.md.
"""

import contextlib
import itertools
import pickle
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from math import prod
from typing import Any, Protocol

import cloudpickle
import dask
import dask.array as da
from dask.array.optimization import optimize
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from numpy.typing import NDArray

from stem_dask.errors import StoreError
from stem_dask.model import Record, Region

#: tasks in flight for each thread: enough that none waits, few enough that memory stays bounded
IN_FLIGHT = 3
#: how long the calls in flight may take to end after an error
LAST_CALLS_SECONDS = 60


class Sink(Protocol):
    """Where blocks go. ``create``, ``verify`` and ``finish`` run in the client, ``write`` on workers."""

    def create(self) -> None:
        """Make the empty output under its temporary name."""

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write one block of every output; returns what `finish` needs to know (small, picklable)."""

    def verify(self, record: Record) -> None:
        """Raise when what a record speaks of is not there."""

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
) -> list[Record]:
    """Compute lazy outputs into a sink.

    Parameters
    ----------
    outputs : dask arrays by name, with the same number of blocks along the leading axes and one along the others
    n_lead : how many leading axes carry the blocks: 2 for a scan, 1 for a list of patterns
    sink : receives every block once
    client : a `distributed.Client`, or None for threads of this process
    progress : called with (blocks done, blocks, record) after each block

    Returns
    -------
    list of Record, in the order of the blocks

    Raises
    ------
    StoreError
        When the blocks of the outputs do not belong together.
    """
    grid = Grid(outputs, n_lead)
    sink.create()
    records: list[Record] = []
    calls = (
        (_write_block, (payload, sink, index, region)) for index, region, payload in grid.payloads()
    )
    with contextlib.closing(in_flight(client, calls)) as done:
        for record in done:
            sink.verify(record)
            records.append(record)
            if progress is not None:
                progress(len(records), grid.n_blocks, record)
    records.sort(key=lambda record: record.index)
    sink.finish(records)
    return records


class Grid:
    """The blocks that several lazy outputs share, and the part of the graph that each needs."""

    def __init__(self, outputs: Mapping[str, da.Array], n_lead: int) -> None:
        self.outputs = dict(outputs)
        first = next(iter(self.outputs.values()))
        self.numblocks = first.numblocks[:n_lead]
        self.lead_chunks = first.chunks[:n_lead]
        for name, array in self.outputs.items():
            whole = array.numblocks[n_lead:] == (1,) * (array.ndim - n_lead)
            one_a_block = tuple((1,) * n for n in self.numblocks)  # sums and extremes
            if array.chunks[:n_lead] not in (self.lead_chunks, one_a_block) or not whole:
                raise StoreError(
                    f"output {name} has blocks {array.chunks}, the first output {first.chunks}; "
                    "they must agree along the scan and have one block along the detector"
                )
        self.n_blocks = prod(self.numblocks)

    def payloads(self) -> Iterator[tuple[int, Region, bytes]]:
        """Index, region along the leading axes, and pickled sub-graph of each block."""
        keys = list(flatten([array.__dask_keys__() for array in self.outputs.values()]))
        graph = HighLevelGraph.merge(*(array.dask for array in self.outputs.values()))
        tasks = dict(optimize(graph, keys))
        edges = [(0, *itertools.accumulate(chunks)) for chunks in self.lead_chunks]
        for index, block in enumerate(itertools.product(*map(range, self.numblocks))):
            region = tuple(slice(e[i], e[i + 1]) for e, i in zip(edges, block, strict=True))
            wanted = {
                name: (array.name, *block, *(0,) * (array.ndim - len(block)))
                for name, array in self.outputs.items()
            }
            yield index, region, cloudpickle.dumps((cut(tasks, wanted.values()), wanted))


def cut(tasks: Mapping[Any, Any], keys: Iterable[Any]) -> dict[Any, Any]:
    """The tasks that the keys need, out of a low-level graph."""
    part: dict[Any, Any] = {}
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key not in part:
            part[key] = tasks[key]
            waiting.extend(tasks[key].dependencies)
    return part


def _write_block(payload: bytes, sink: Sink, index: int, region: Region) -> Record:
    start = time.perf_counter()
    graph, wanted = pickle.loads(payload)
    values = dask.get(graph, list(wanted.values()))
    blocks = dict(zip(wanted, values, strict=True))
    extra = sink.write(index, region, blocks)
    n_bytes = sum(block.nbytes for block in blocks.values())
    return Record(index, time.perf_counter() - start, n_bytes, peak_rss(), extra)


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_flight(
    client: Any, calls: Iterable[tuple[Callable[..., Any], tuple]]
) -> Generator[Any, None, None]:
    """Results of calls as they come, with only a few submitted at a time.

    The first error stops the submission and is raised as the worker raised it, when the few calls that are in flight
    have ended: none of them shall write into what the caller now removes. An interrupt does not wait.
    """
    if client is None:
        yield from _in_threads(calls)
        return
    from distributed import as_completed
    from distributed import wait as wait_for

    n_threads = sum(client.nthreads().values()) or 1
    calls = iter(calls)
    first = itertools.islice(calls, n_threads * IN_FLIGHT)
    waiting = {client.submit(f, *args, pure=False) for f, args in first}
    done = as_completed(waiting, loop=client.loop)
    try:
        for future in done:
            waiting.discard(future)
            yield future.result()
            for f, args in itertools.islice(calls, 1):
                waiting.add(new := client.submit(f, *args, pure=False))
                done.add(new)
    except BaseException as error:
        if isinstance(error, (Exception, GeneratorExit)):
            # when no worker is left they never end
            with client.as_current(), contextlib.suppress(TimeoutError):
                wait_for(waiting, timeout=LAST_CALLS_SECONDS)
        client.cancel(list(waiting), force=True)
        raise


def _in_threads(calls: Iterable[tuple[Callable[..., Any], tuple]]) -> Iterator[Any]:
    n_threads = dask.system.CPU_COUNT
    calls = iter(calls)
    with ThreadPoolExecutor(n_threads) as pool:
        waiting = {
            pool.submit(f, *args) for f, args in itertools.islice(calls, n_threads * IN_FLIGHT)
        }
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    waiting |= {pool.submit(f, *args) for f, args in itertools.islice(calls, 1)}
                    yield result
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
