"""The table of output formats: all that the rest of the package asks of a format, and what its sink gets.

A format is a sink, a class in its own module. The engine calls `create`, `write`, `verify` and `finish` (see
`stem_dask.engine.run.Sink`), then `complete(patterns, analysis, about)` adds what is known only after the pass.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stem_dask.core.chunks import FILE_CHUNK_BYTES, INNER_CHUNK_BYTES

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Format:
    """An output format.

    Parameters
    ----------
    sink : ``module:class``; the class takes an `Output`
    is_folder : whether an output is a folder
    is_packed : whether chunks are compressed
    has_navigator : whether blocks come with ``navigator``, the intensity of each pattern
    is_joined : whether a worker holds the compressed chunks of a block until it is complete
    chunk_bytes : of a chunk, at most
    disk : most bytes on disk while it is written, relative to its patterns
    library : package that the client needs to write it, which takes a while to load
    """

    sink: str
    is_folder: bool = False
    is_packed: bool = True
    has_navigator: bool = False
    is_joined: bool = False
    chunk_bytes: int = INNER_CHUNK_BYTES
    disk: int = 1
    library: str = ""

    def load(self) -> Any:
        """The class of the sink."""
        module, _, name = self.sink.partition(":")
        return getattr(importlib.import_module(module), name)


_WRITERS = "stem_dask.writers"

#: HDF5 exists twice while it is assembled
_HDF5 = Format(f"{_WRITERS}.hdf5:Hdf5Sink", has_navigator=True, is_joined=True, disk=2, library="h5py")  # fmt: skip

#: suffixes of HDF5 files, which all have the same layout
HDF5_SUFFIXES = (".hspy", ".h5", ".hdf5", ".emd")

#: by suffix; unsigned counts need twice as much in a .pt
FORMATS = {
    ".zarr": Format(f"{_WRITERS}.zarr:store_sink", is_folder=True, library="zarr"),
    ".pt": Format(f"{_WRITERS}.torch:PtSink", is_packed=False, disk=2),
    **dict.fromkeys(HDF5_SUFFIXES, _HDF5),
    ".npy": Format(f"{_WRITERS}.npy:NpySink", is_packed=False),
    ".zspy": Format(
        f"{_WRITERS}.hyperspy:ZspySink", is_folder=True, has_navigator=True, chunk_bytes=FILE_CHUNK_BYTES, library="zarr"
    ),
}  # fmt: skip


def format_of(path: str | Path) -> Format | None:
    """The format of an output of this name."""
    return FORMATS.get(Path(path).suffix.lower())


@dataclass(frozen=True)
class Output:
    """One output array: what a sink needs to know of it; see `stem_dask.stages.export.Target`.

    Parameters
    ----------
    path, spool : temporary name of the file, and folder for blocks that wait until the pass is complete
    shape, dtype, dims : of the patterns in the file
    chunks, shards : whole patterns; a block is a shard
    content : `stem_dask.core.patterns.content_of` before the pass; tasks get none, because it may take megabytes
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...] = ()
    shards: tuple[int, ...] = ()
    codec: str = "auto"
    dims: tuple[str, ...] = ()
    title: str = "4D-STEM"
    layout: str = "scan"
    spool: str = ""
    url: str = ""
    content: dict[str, Any] = field(default_factory=dict, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "content": {}}
