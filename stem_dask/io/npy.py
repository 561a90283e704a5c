"""numpy's own files (.npy): the header as numpy writes it, then every block at its own offset."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.io.flat import damaged_run, joined_runs, write_runs
from stem_dask.io.pieces import of_type
from stem_dask.io.publish import named, remove
from stem_dask.io.staging import begin_in_place, refuse_other_bytes
from stem_dask.model import Record, Region


@dataclass(frozen=True)
class NpySink:
    """Writes ``patterns`` into a .npy file, C order and little-endian; `numpy.load` maps it.

    Parameters
    ----------
    path : the file under its temporary name
    shape, dtype : of the patterns, (scan_y, scan_x, ky, kx) or (pattern, ky, kx)
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    #: of this start, see `stem_dask.io.staging`
    nonce: list[bytes] = field(default_factory=list, compare=False)

    @property
    def _little(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def _header(self) -> bytes:
        words = {
            "descr": np.lib.format.dtype_to_descr(self._little),
            "fortran_order": False,
            "shape": self.shape,
        }
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, words)
        return header.getvalue()

    def create(self, *, resume: bool) -> None:
        """Write the header, and make the file as long as it will be; around what is there when resuming."""
        if not resume:
            remove(self.path)
        mode = "r+b" if os.path.exists(self.path) else "wb"
        with named(self.path), open(self.path, mode) as file:
            file.write(self._header)
            file.truncate(len(self._header) + self._n_bytes)
        self.nonce[:] = [begin_in_place(self.path)]

    @property
    def _n_bytes(self) -> int:
        return prod(self.shape) * self._little.itemsize

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write one block at its offset."""
        block = of_type(blocks["patterns"], self._little)
        lead, offset = self.shape[: len(region)], len(self._header)
        return {"runs": write_runs(self.path, offset, lead, region, block, self.nonce[0])}

    def verify(self, record: Record) -> str | None:
        """Read a block again and compare it with its checksums."""
        return damaged_run(self.path, len(self._header), record.extra["runs"])

    def finish(self, records: Sequence[Record]) -> None:
        """Refuse when the blocks do not tile the array, or are not as they were written."""
        joined_runs(self.path, records, self._n_bytes)
        refuse_other_bytes(self.path, self.nonce[0], records, self.verify)
        with named(self.path):
            os.truncate(self.path, len(self._header) + self._n_bytes)
