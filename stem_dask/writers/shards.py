"""Shards of zarr 3, written chunk by chunk: one chunk is in memory at a time.

Layout of the codec ``sharding_indexed``: the encoded chunks, then offset and length of each chunk of the grid as uint64 (all bits
set if there is none), then the CRC-32C of that index. zarr's own writer gives the same bytes, but holds the shard in memory
three times, and its tasks share one thread of the process.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block
from stem_dask.core.model import Region
from stem_dask.storage.publish import begin_sync
from stem_dask.storage.staging import append, mark, staged
from stem_dask.writers.codecs import checked, encoded, whole_chunks

_MISSING = 2**64 - 1


def write_shard(
    path: Path,
    block: NDArray | Block,
    region: Region,
    chunks: Sequence[int],
    shard: Sequence[int],
    codec: str,
    stage: str | None = None,
) -> tuple[int, int]:
    """Write one block as one shard, under a temporary name that is then renamed.

    Parameters
    ----------
    path : of the shard
    block : (…, ky, kx)
    region : of the block along the leading axes; it begins on the shard
    chunks, shard : shape of an inner chunk and of the shard
    codec : one of `stem_dask.writers.codecs.CODECS`
    stage : staging folder, see `stem_dask.storage.staging`; default the folder of the shard

    Returns
    -------
    CRC-32 and length of the file
    """
    if stage is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    crc = n_bytes = 0
    with staged(path, stage or path.parent) as file:
        for content in shard_pieces(block, region, chunks, shard, codec):
            crc, n_bytes = append(file, content, crc), n_bytes + len(content)
        begin_sync(file)
        mark(file, crc)
    return crc, n_bytes


def shard_pieces(
    block: NDArray | Block,
    region: Region,
    chunks: Sequence[int],
    shard: Sequence[int],
    codec: str,
) -> Iterator[bytes]:
    """Yield the bytes of a shard: its encoded chunks, then the index; see `write_shard`."""
    counts = [whole // part for whole, part in zip(shard, chunks, strict=True)][: len(region)]
    strides = [prod(counts[i + 1 :]) for i in range(len(counts))]
    first, step = [part.start for part in region], chunks[: len(region)]

    def placed() -> Iterator[tuple[int, NDArray]]:
        for origin, chunk in whole_chunks(block, region, chunks):
            inside = zip(origin, first, step, strides, strict=False)
            yield sum((at - start) // size * n for at, start, size, n in inside), chunk

    return indexed(placed(), prod(counts), codec)


def indexed(
    chunks: Iterable[tuple[int, NDArray]], n_chunks: int, codec: str = "auto"
) -> Iterator[bytes]:
    """Yield the bytes of a shard from (number in the grid of the shard, chunk), then the index."""
    places = np.full((n_chunks, 2), _MISSING, "<u8")
    n_bytes = 0
    for place, chunk in chunks:
        content = encoded(chunk, codec)
        places[place] = n_bytes, len(content)
        n_bytes += len(content)
        yield content
    yield checked(places.tobytes())
