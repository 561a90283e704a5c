"""The blocks that several lazy outputs share, and the part of their graph that each needs."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from dask.utils import is_arraylike

from stem_dask.errors import StoreError
from stem_dask.model import Record, Region

if TYPE_CHECKING:
    import dask.array as da


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
        self.edges = [(0, *itertools.accumulate(chunks)) for chunks in self.lead_chunks]

    @functools.cached_property
    def tasks(self) -> dict[Any, Any]:
        """The optimized graph of all outputs, made once."""
        from dask.array.optimization import optimize

        keys = list(flatten([array.__dask_keys__() for array in self.outputs.values()]))
        graph = HighLevelGraph.merge(*(array.dask for array in self.outputs.values()))
        return dict(optimize(graph, keys))

    def payload(self, index: int) -> tuple[Region, bytes]:
        """Region along the leading axes, and pickled sub-graph of a block."""
        block = self._block(index)
        wanted = {
            name: (array.name, *block, *(0,) * (array.ndim - len(block)))
            for name, array in self.outputs.items()
        }
        return self.region(index), _pickled((cut(self.tasks, wanted.values()), wanted))

    def region(self, index: int) -> Region:
        """Where a block lies along the leading axes."""
        block = self._block(index)
        return tuple(
            slice(edges[i], edges[i + 1]) for edges, i in zip(self.edges, block, strict=True)
        )

    def holds(self, record: Record) -> bool:
        """Whether a record is of a block of this grid; another memory limit makes other blocks."""
        return 0 <= record.index < self.n_blocks and record.extra.get("region") == bounds(
            self.region(record.index)
        )

    def _block(self, index: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(index, self.numblocks))


def bounds(region: Region) -> list[list[int]]:
    """A region as JSON can hold it."""
    return [[int(part.start), int(part.stop)] for part in region]


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


def _pickled(work: Any) -> bytes:
    """Tasks for a worker, which read with `read_part`: dask.array takes a second and 60 MB to load, there for nothing."""
    from dask.array.core import getter

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            return (_reader, ()) if value is getter else super().reducer_override(value)

    with io.BytesIO() as file:
        Pickler(file).dump(work)
        return file.getvalue()


def _reader() -> Callable[..., Any]:
    return read_part


def read_part(source: Any, index: Any, asarray: bool = True, lock: Any = None) -> Any:
    """What dask.array puts into a graph to read a part of something like an array.

    Examples
    --------
    >>> read_part(np.arange(6), slice(2, 4)).tolist()
    [2, 3]
    """
    if lock or (isinstance(index, tuple) and None in index):
        from dask.array.core import getter

        return getter(source, index, asarray, lock)
    part = source[index]
    return part if is_arraylike(part) or not asarray else np.asarray(part)


def place(region: Region) -> str:
    """A region along the leading axes, for people.

    Examples
    --------
    >>> place((slice(0, 2), slice(0, 256)))
    '[0:2, 0:256]'
    """
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in region) + "]"
