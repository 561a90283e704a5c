"""Files of numpy (.npy), and what all formats need whose blocks lie at their own offset of one file."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, of_type, split
from stem_dask.core.errors import StoreError
from stem_dask.core.formats import Output
from stem_dask.core.model import Record, Region
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import begin_sync, remove
from stem_dask.storage.staging import (
    append,
    begin_in_place,
    crc32,
    mark,
    refuse_late,
    refuse_other_bytes,
)

#: first byte behind the offset, length in bytes, CRC-32
Run = tuple[int, int, int]


@dataclass(frozen=True)
class InPlaceSink:
    """Writes each block at its offset of one file: a run of bytes if it has whole scan rows, else one run per row."""

    output: Output
    #: byte at which the patterns begin
    offset: list[int] = field(default_factory=list)
    #: nonce of this start, see `stem_dask.storage.staging`
    nonce: list[bytes] = field(default_factory=list, compare=False)

    def write_around(self, mode: str, runs: Sequence[Run]) -> None:
        """Write everything but the patterns, and find their offset; ``runs`` are empty until all are written."""
        raise NotImplementedError

    def converted(self, block: NDArray | Block) -> NDArray | Block:
        """The block in the type of the file."""
        return of_type(block, self.output.dtype)

    def create(self, *, resume: bool) -> None:
        """Make the file at its size; existing blocks stay when resuming."""
        path = self.output.path
        if not resume:
            remove(path)
        self.write_around("r+b" if os.path.exists(path) else "wb", ())
        self.nonce[:] = [begin_in_place(path)]

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write one block; raises StoreError when a later start has begun."""
        path, block = self.output.path, self.converted(blocks["patterns"])
        pattern_bytes = prod(block.shape[-2:]) * block.dtype.itemsize
        row = self.output.shape[len(region) - 1]
        if len(region) == 1:
            starts = [region[0].start]
        elif (region[1].start, region[1].stop) == (0, row):
            starts = [region[0].start * row]
        else:
            starts = [y * row + region[1].start for y in range(region[0].start, region[0].stop)]
        n = prod(block.shape[:-2]) // len(starts)
        starts, n_bytes = [start * pattern_bytes for start in starts], n * pattern_bytes
        checksums = [0] * len(starts)
        with translate(StoreError, path), open(path, "r+b", buffering=0) as file:
            for run, piece, first in split(block, [n] * len(starts)):
                if first:
                    file.seek(self.offset[0] + starts[run])
                content = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                refuse_late(file, path, self.nonce[0])
                checksums[run] = append(file, content, checksums[run])
            for start in starts:
                begin_sync(file, self.offset[0] + start, n_bytes)
            mark(file, crc32(self.nonce[0]))
        return {
            "runs": [(start, n_bytes, crc) for start, crc in zip(starts, checksums, strict=True)]
        }

    def verify(self, record: Record) -> str | None:
        """Read a block again and compare it with its checksums."""
        path = self.output.path
        try:
            with open(path, "rb") as file:
                for start, length, crc in record.extra["runs"]:
                    file.seek(self.offset[0] + start)
                    if crc32(file.read(length)) != crc:
                        return f"{path} does not hold what was written at byte {start:,}"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return None

    def finish(self, records: Sequence[Record]) -> None:
        """Complete the file; refuses blocks that do not tile the array, or changed after they were written."""
        output, end = self.output, 0
        runs = sorted(tuple(run) for record in records for run in record.extra["runs"])
        for start, size, _ in [*runs, (prod(output.shape) * output.dtype.itemsize, 0, 0)]:
            if start != end:
                raise StoreError(
                    f"{output.path}: bytes {end:,} to {start:,} of the data were not written"
                )
            end = start + size
        refuse_other_bytes(output.path, self.nonce[0], records, self.verify)
        self.write_around("r+b", runs)


class NpySink(InPlaceSink):
    """Writes ``patterns`` into a .npy file, C order and little-endian; `numpy.load` maps it."""

    def converted(self, block: NDArray | Block) -> NDArray | Block:
        """The block in little-endian order."""
        return of_type(block, self.output.dtype.newbyteorder("<"))

    def write_around(self, mode: str, runs: Sequence[Run]) -> None:
        """Write the header, and set the final size."""
        output, header = self.output, io.BytesIO()
        words = {
            "descr": np.lib.format.dtype_to_descr(output.dtype.newbyteorder("<")),
            "fortran_order": False,
            "shape": output.shape,
        }
        np.lib.format.write_array_header_1_0(header, words)
        self.offset[:] = [header.tell()]
        with translate(StoreError, output.path), open(output.path, mode) as file:
            file.write(header.getvalue())
            file.truncate(header.tell() + prod(output.shape) * output.dtype.itemsize)

    def complete(self, patterns: Any, analysis: Any, about: Mapping[str, Any]) -> list[str]:
        """A .npy holds only the patterns."""
        return []
