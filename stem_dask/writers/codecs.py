"""Chunks of a block, and their compression with the same codecs for all formats."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, joined
from stem_dask.core.errors import StoreError
from stem_dask.core.model import Region
from stem_dask.storage.staging import crc32

#: ``auto`` is blosc lz4 in .zarr and .zspy, and gzip in HDF5 files, where all readers know it
CODECS = ("auto", "lz4", "zstd", "gzip", "none")

#: compression levels; lz4 and zstd within blosc
LEVELS = {"lz4": 5, "zstd": 1, "gzip": 4}

#: largest chunk of blosc in bytes; HDF5 allows twice as much
LARGEST_CHUNK = 2**31 - 17


def shuffle_of(dtype: np.dtype) -> Literal["bitshuffle", "shuffle"]:
    """Shuffle filter of blosc: counts leave most bits unused, in floats most bytes are equal."""
    return "bitshuffle" if dtype.kind in "uib" else "shuffle"


def blosc_bytes(chunk: NDArray, codec: str, shuffle: str) -> bytes:
    """Compress a C-contiguous chunk with blosc; equal chunks give equal bytes.

    Examples
    --------
    >>> len(blosc_bytes(np.zeros((1, 64, 64), "u2"), "lz4", "bitshuffle")) < 200
    True
    """
    # imports in a millisecond, numcodecs in a quarter of a second
    from imagecodecs import blosc_encode

    # an array, not bytes as in its stubs: the shuffle needs the item size
    content: Any = chunk.reshape(-1)
    level = LEVELS[codec]
    return bytes(blosc_encode(content, level, compressor=codec, shuffle=shuffle, numthreads=1))


def deflated(content: Any, level: int) -> bytes:
    """Compress bytes in the format of zlib with zlib-ng, two to four times as fast."""
    from imagecodecs import zlibng_encode

    return bytes(zlibng_encode(content, level=level))


def gzipped(content: Any, level: int) -> bytes:
    """Compress bytes in the format of gzip (RFC 1952), without time and name: equal bytes give equal files.

    Examples
    --------
    >>> import gzip
    >>> gzip.decompress(gzipped(b"abc", 4))
    b'abc'
    """
    head = b"\x1f\x8b\x08" + bytes(6) + b"\xff"  # deflate, no time, no name, unknown system
    ends = crc32(content).to_bytes(4, "little") + (len(content) % 2**32).to_bytes(4, "little")
    # without zlib's header (2 bytes) and checksum (4 bytes)
    return head + deflated(content, level)[2:-4] + ends


def bytes_apart(chunk: NDArray) -> NDArray[np.uint8]:
    """Filter ``shuffle`` of HDF5: (bytes of an element, elements), first the first bytes of all elements, and so on.

    Examples
    --------
    >>> bytes_apart(np.array([1, 258], "<u2")).tolist()
    [[1, 2], [0, 1]]
    """
    size = chunk.dtype.itemsize
    if size not in (2, 4):
        parts = chunk.reshape(-1).view(np.uint8).reshape(-1, size)
        return np.ascontiguousarray(parts.T)
    # with integer operations, which are vectorized: 11 instead of 3 GB/s for uint16
    words = chunk.reshape(-1).view(f"<u{size}")
    out = np.empty((size, words.size), np.uint8)
    for i in range(size):
        np.copyto(out[i], words >> (8 * i) if i else words, casting="unsafe")
    return out


def compressed(chunk: NDArray, codec: str = "auto") -> bytes:
    """Compress one chunk of a zarr array; equal chunks give equal bytes, while gzip of numcodecs writes the time."""
    codec = "lz4" if codec == "auto" else codec
    chunk = np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("<"))
    if codec == "none":
        return chunk.tobytes()
    if codec == "gzip":
        return gzipped(chunk.reshape(-1).view(np.uint8).data, LEVELS[codec])
    return blosc_bytes(chunk, codec, shuffle_of(chunk.dtype))


def checked(content: bytes) -> bytes:
    """Append the CRC-32C of some bytes.

    Examples
    --------
    >>> checked(b"123456789")[-4:].hex()  # 0xe3069283, the check value in the catalogue of CRCs
    '839206e3'
    """
    return content + int(google_crc32c.value(content)).to_bytes(4, "little")


def whole_chunks(
    block: NDArray | Block, region: Region, chunks: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], NDArray]]:
    """Yield (origin, C-contiguous chunk) of a block; a chunk is valid until the next is requested.

    Chunks are whole patterns, padded with zeros at the end of an axis. ``shape`` is that of the array. A block that shares a
    chunk with another task raises StoreError.

    Examples
    --------
    >>> block = np.arange(3).reshape(3, 1, 1)
    >>> [(at, chunk.ravel().tolist()) for at, chunk in whole_chunks(block, (slice(4, 7),), (2, 1, 1), (7, 1, 1))]
    [((4, 0, 0), [0, 1]), ((6, 0, 0), [2, 0])]
    """
    for along, chunk, size in zip(region, chunks, shape, strict=False):
        if along.start % chunk or (along.stop % chunk and along.stop != size):
            raise StoreError(f"a block at {along.start}:{along.stop} shares a chunk of {chunk}")
    detector = block.shape[-2:]
    height, width = (1, *block.shape[:-2])[-2:]  # a list is one row
    rows, columns = (1, *chunks[:-2])[-2:]
    # patterns that follow each other in a chunk, or in a row of chunks
    wide = columns if rows == 1 else width
    bands = [
        (y, x, min(rows, height - y), min(wide, width - x))
        for y in range(0, height, rows)
        for x in range(0, width, wide)
    ]
    for (y, x, n, m), band in zip(bands, joined(block, [n * m for *_, n, m in bands]), strict=True):
        patterns = band.reshape(n, m, *detector)
        for left in range(0, m, columns):
            part = patterns[:, left : left + columns]
            if part.shape[:2] != (rows, columns):
                full = np.zeros((rows, columns, *detector), part.dtype)
                full[:n, : part.shape[1]] = part
                part = full
            at = [r.start + i for r, i in zip(region, (y, x + left)[-len(region) :], strict=True)]
            yield (*at, 0, 0), np.ascontiguousarray(part).reshape(chunks)
