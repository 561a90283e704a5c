"""Arrays in files, read a block at a time: what a worker needs to read is small, picklable, and opens by name.

Every source has ``shape``, ``dtype`` and ``source[slices]``, slices with positive steps, and gives a
C-contiguous array. They nest: a selection of a scan made of a list of patterns in a flat file.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.readers.hdf5_heaps import hdf5_file
from stem_dask.readers.source import Slices
from stem_dask.storage.errors import told

#: what becomes of chunk files of a zarr store that are not there
Missing = Literal["refuse", "zero"]


@dataclass(frozen=True)
class Hdf5Dataset:
    """A dataset of an HDF5 file; ``chunk_bytes`` are those of a chunk when it is decoded, 0 when there are none.

    In ``name`` bytes that are no UTF-8 are escaped as Python escapes those of file names.
    """

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk_bytes: int = 0

    def __getitem__(self, part: Slices) -> NDArray:
        import hdf5plugin  # noqa: F401  registers blosc and others with HDF5

        what = f"{self.path}: dataset {self.name} cannot be read"
        with told(what, retried=True), hdf5_file(self.path) as file:
            name = self.name.encode("utf-8", "surrogateescape")
            return np.asarray(file[name][part])


@dataclass(frozen=True)
class ZarrArray:
    """An array of a zarr store, format 2 or 3; chunk files that are missing are refused, or zeros."""

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    missing: Missing = "refuse"
    chunk_bytes: int = 0  # of a chunk file (a shard, where there are shards) when it is decoded

    def __getitem__(self, part: Slices) -> NDArray:
        from stem_dask.readers.zarr_chunks import read_part

        return read_part(self.path, self.name, part, zero=self.missing == "zero")
