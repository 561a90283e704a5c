"""The blocks that several lazy outputs share, and the part of their graph that each needs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
from cloudpickle.cloudpickle import list_registry_pickle_by_value
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph

from stem_dask.core.errors import SourceError, StoreError
from stem_dask.core.model import Record, Region

if TYPE_CHECKING:
    import dask.array as da


class Grid:
    """The blocks that several lazy outputs share, and the part of the graph that each needs."""

    def __init__(
        self, outputs: Mapping[str, da.Array], n_lead: int, *, is_here: bool = False
    ) -> None:
        """``is_here`` says that the blocks are computed in this process."""
        self.outputs, self.is_here = dict(outputs), is_here
        first = next(iter(self.outputs.values()))
        self.numblocks, lead_chunks = first.numblocks[:n_lead], first.chunks[:n_lead]
        for name, array in self.outputs.items():
            whole = array.numblocks[n_lead:] == (1,) * (array.ndim - n_lead)
            one_a_block = tuple((1,) * n for n in self.numblocks)  # sums and extremes
            if array.chunks[:n_lead] not in (lead_chunks, one_a_block) or not whole:
                raise StoreError(
                    f"output {name} has blocks {array.chunks}, the first output {first.chunks}; "
                    "they must agree along the scan and have one block along the detector"
                )
        self.n_blocks = prod(self.numblocks)
        self.edges = [(0, *itertools.accumulate(chunks)) for chunks in lead_chunks]

    @functools.cached_property
    def tasks(self) -> dict[Any, Any]:
        """The optimized graph of all outputs, made once."""
        from dask.array.optimization import optimize

        keys = list(flatten([array.__dask_keys__() for array in self.outputs.values()]))
        graph = HighLevelGraph.merge(*(array.dask for array in self.outputs.values()))
        return dict(optimize(graph, keys))

    def payload(self, index: int) -> tuple[Region, Any]:
        """Region along the leading axes, and pickled sub-graph of a block; as it is if it stays here and cannot be pickled.

        Raises
        ------
        SourceError
            When it holds what cannot be sent to workers, such as an open file.
        """
        block = tuple(map(int, np.unravel_index(index, self.numblocks)))
        wanted = {
            name: (array.name, *block, *(0,) * (array.ndim - len(block)))
            for name, array in self.outputs.items()
        }
        work = cut(self.tasks, wanted.values()), wanted
        with contextlib.suppress(Exception):  # cloudpickle says what is wrong
            pickled = pickle.dumps(work)
            if b"__main__" not in pickled and not list_registry_pickle_by_value():
                return self.region(index), pickled
        # functions that a worker cannot import travel with their code, which takes twice the time
        try:
            return self.region(index), cloudpickle.dumps(work)
        except TypeError as error:
            if self.is_here:
                return self.region(index), work
            raise SourceError(
                f"the patterns cannot be sent to workers ({error}); open their file with sd.open, or compute them here, without a "
                "cluster"
            ) from error

    def region(self, index: int) -> Region:
        """Where a block lies along the leading axes."""
        pairs = zip(self.edges, np.unravel_index(index, self.numblocks), strict=True)
        return tuple(slice(edges[i], edges[i + 1]) for edges, i in pairs)

    def holds(self, record: Record) -> bool:
        """Whether a record is of a block of this grid; another memory limit makes other blocks."""
        is_here = 0 <= record.index < self.n_blocks
        return is_here and record.extra.get("region") == bounds(self.region(record.index))


def bounds(region: Region) -> list[list[int]]:
    """A region as JSON can hold it."""
    return [[int(part.start), int(part.stop)] for part in region]


def place(region: Region) -> str:
    """A region along the leading axes, for people.

    Examples
    --------
    >>> place((slice(0, 2), slice(0, 256)))
    '[0:2, 0:256]'
    """
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in region) + "]"


def cut(tasks: Mapping[Any, Any], keys: Iterable[Any]) -> dict[Any, Any]:
    """The tasks that the keys need, out of a low-level graph, each after those that it needs.

    Examples
    --------
    >>> from dask._task_spec import Alias, DataNode
    >>> list(cut({"c": Alias("c", "b"), "b": Alias("b", "a"), "a": DataNode("a", 1), "z": DataNode("z", 2)}, ["c"]))
    ['a', 'b', 'c']
    """
    part: dict[Any, Any] = {}
    waiting = list(keys)
    while waiting:
        key = waiting[-1]
        missing = [needed for needed in tasks[key].dependencies if needed not in part]
        waiting += missing
        if not missing:
            part[waiting.pop()] = tasks[key]
    return part


def computed(part: Mapping[Any, Any], wanted: Collection[Any]) -> dict[Any, Any]:
    """Values of the wanted keys; ``part`` is what `cut` gives. Values are released as soon as no task needs them.

    Dask looks for the best order first, which takes longer than to call the few tasks of a block; and the closures of
    ``dask.get`` keep every value until the next garbage collection.
    """
    uses = Counter(key for task in part.values() for key in task.dependencies)
    values: dict[Any, Any] = {}
    for key, task in part.items():
        values[key] = task(values)
        for needed in task.dependencies:
            uses[needed] -= 1
            if not uses[needed] and needed not in wanted:
                del values[needed]
    return values
