"""Blocks spooled to one file each in the folder of the run, to be joined in order at the end."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, Deferred, Regrouped, joined
from stem_dask.core.chunks import INNER_CHUNK_BYTES
from stem_dask.core.errors import StoreError
from stem_dask.core.model import Record, Region
from stem_dask.storage.publish import begin_sync
from stem_dask.storage.staging import (
    append,
    begin_staging,
    crc32,
    damage,
    mark,
    refuse_other_files,
    staged,
)
from stem_dask.writers.codecs import checked, compressed


def write_file(
    path: str | Path,
    stage: str | Path,
    contents: Iterable[Any],
    *,
    sync: bool = True,
    folders: Iterable[Path] = (),
) -> tuple[int, int]:
    """Write a file of a block in a staging folder and rename it; returns CRC-32 and length.

    With ``sync`` it is written to the disk at once, because this run does not read it again. ``folders`` are made for it, but
    not by a late worker, whose staging folder is gone.
    """
    crc = n_bytes = 0
    with staged(path, stage) as file:
        for content in contents:
            crc, n_bytes = append(file, content, crc), n_bytes + memoryview(content).nbytes
        for folder in folders:
            folder.mkdir(exist_ok=True)
        if sync:
            begin_sync(file)
        mark(file, crc)
    return crc, n_bytes


@dataclass(frozen=True)
class SpoolSink:
    """Writes the arrays of one task to one file; `blocks` reads them in order."""

    folder: str
    #: staging folder of this start
    stage: list[str] = field(default_factory=list, compare=False)

    def create(self, *, resume: bool) -> None:
        """Make the folder and begin a start."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        self.stage[:] = [begin_staging(self.folder)]

    def write(
        self, index: int, region: Region, blocks: Mapping[str, NDArray | Deferred]
    ) -> dict[str, Any]:
        """Write one file: a line of JSON, then the arrays."""
        arrays: dict[str, NDArray] = {}
        for name, block in blocks.items():
            arrays |= block.get() if isinstance(block, Deferred) else {name: block}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        words = {
            # with its bounds each file is self-describing
            "region": [[int(s.start), int(s.stop)] for s in region],
            "arrays": [[name, a.dtype.str, a.shape, crc32(a.data)] for name, a in arrays.items()],
        }
        contents = [json.dumps(words).encode() + b"\n", *(array.data for array in arrays.values())]
        return self._written(index, contents)

    def _written(self, index: int, contents: Iterable[Any]) -> dict[str, Any]:
        """Write the file of a block; its record."""
        crc, n_bytes = write_file(self._path(index), self.stage[0], contents, sync=False)
        return {"spool_crc": crc, "spool_bytes": n_bytes}

    def verify(self, record: Record) -> str | None:
        """Compare the file with the checksum in its record."""
        path, *wanted = self._noted(record)
        return damage(path, (wanted[0], wanted[1]))

    def finish(self, records: Sequence[Record]) -> None:
        """Compare every file with its record; `blocks` reads them."""
        refuse_other_files(map(self._noted, records))

    def _noted(self, record: Record) -> tuple[str, int | None, int | None]:
        """File of a block, with CRC-32 and length from its record."""
        extra = record.extra
        return self._path(record.index), extra.get("spool_crc"), extra.get("spool_bytes")

    def _path(self, index: int) -> str:
        return os.path.join(self.folder, f"{index:06d}.block")

    def blocks(
        self, n: int, names: Sequence[str] | None = None
    ) -> Iterator[tuple[Region, dict[str, NDArray]]]:
        """Yield region and arrays (all, or those named) of tasks 0 … n - 1; a wrong checksum raises StoreError."""
        for index in range(n):
            path = self._path(index)
            with open(path, "rb") as file:
                words = json.loads(file.readline())
                found = {}
                for name, dtype, shape, crc in words["arrays"]:
                    n_bytes = np.dtype(dtype).itemsize * math.prod(shape)
                    if names is not None and name not in names:
                        file.seek(n_bytes, os.SEEK_CUR)
                        continue
                    content = file.read(n_bytes)
                    if len(content) != n_bytes or crc32(content) != crc:
                        raise StoreError(
                            f"{path} does not hold what was written; the same command writes it again"
                        )
                    found[name] = np.frombuffer(content, dtype).reshape(shape)
            yield tuple(slice(*bounds) for bounds in words["region"]), found


@dataclass(frozen=True)
class PatternSpool(SpoolSink):
    """Writes the block ``patterns`` of one task to one file, compressed a few patterns at a time; `patterns` reads it.

    In the file, the length of each chunk (8 bytes) precedes it; a chunk ends with its CRC-32C.
    """

    def write(self, index: int, region: Region, blocks: Mapping[str, Any]) -> dict[str, Any]:
        """Write one file."""
        block: NDArray | Block = blocks["patterns"]
        return self._written(index, _packed(block))

    def patterns(self, index: int, shape: tuple[int, ...], dtype: np.dtype, most: int) -> Block:
        """The patterns of task ``index``, which are read when they are iterated, in batches of ``most``; see `Regrouped`."""
        return Regrouped(_Packed(self._path(index), shape, dtype), most)


def packed_bytes(block: NDArray | Block) -> int:
    """Bytes of the file that `PatternSpool` writes of a block."""
    return sum(map(len, _packed(block)))


def _packed(block: NDArray | Block) -> Iterator[bytes]:
    for chunk in joined(block, _lengths(block.shape, block.dtype)):
        content = checked(compressed(chunk))
        yield len(content).to_bytes(8, "little")
        yield content


def _lengths(shape: Sequence[int], dtype: np.dtype) -> list[int]:
    """Numbers of patterns in the chunks of a block."""
    n = math.prod(shape[:-2])
    most = max(1, INNER_CHUNK_BYTES // max(1, math.prod(shape[-2:]) * dtype.itemsize))
    return [min(most, n - start) for start in range(0, n, most)]


class _Packed(Block):
    """The patterns of a block in the chunks of its file."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        super().__init__(shape, dtype)
        self.path = path

    def _pieces(self) -> Iterator[NDArray]:
        from imagecodecs import blosc_decode

        lengths = _lengths(self.shape, self.dtype)
        buffer = np.empty((max(lengths, default=0), *self.shape[-2:]), self.dtype)
        with open(self.path, "rb") as file:
            for n in lengths:
                n_bytes = int.from_bytes(file.read(8), "little")
                content = file.read(
                    min(n_bytes, buffer.nbytes + 64)
                )  # of a damaged file it may be anything
                packed = content[:-4]
                if len(content) != n_bytes or checked(packed) != content:
                    raise StoreError(
                        f"{self.path} does not hold what was written; the same command writes it again"
                    )
                to: Any = buffer[:n].reshape(-1).view(np.uint8)  # see `stem_dask.training.reading`
                blosc_decode(packed, out=to, numthreads=1)
                yield buffer[:n]


@dataclass(frozen=True)
class SplitSink:
    """Splits the blocks of every task between two sinks.

    Parameters
    ----------
    first : sink of the blocks in ``names``; None drops them, if that output is already complete
    names : outputs of the first sink
    second : sink of all others; its part of the record is kept under ``beside``
    """

    first: Any
    names: tuple[str, ...]
    second: Any

    def create(self, *, resume: bool) -> None:
        """Begin both outputs."""
        for sink in filter(None, (self.first, self.second)):
            sink.create(resume=resume)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write the blocks of one task to their sinks."""
        chosen = {name: block for name, block in blocks.items() if name in self.names}
        rest = {name: block for name, block in blocks.items() if name not in self.names}
        extra = {} if self.first is None else self.first.write(index, region, chosen)
        return {**extra, "beside": self.second.write(index, region, rest)}

    def verify(self, record: Record) -> str | None:
        """Damage of the block in either output."""
        what: str | None = None if self.first is None else self.first.verify(record)
        return self.second.verify(_beside(record)) if what is None else what

    def finish(self, records: Sequence[Record]) -> None:
        """Complete both outputs."""
        if self.first is not None:
            self.first.finish(records)
        self.second.finish([_beside(record) for record in records])


def _beside(record: Record) -> Record:
    """The record of the second sink."""
    return replace(record, extra=record.extra.get("beside", {}))
