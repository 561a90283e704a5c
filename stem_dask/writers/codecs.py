"""Compression of chunks, with the same codecs for all formats."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, joined
from stem_dask.core.model import Region
from stem_dask.storage.checksums import crc32

#: ``auto`` is blosc lz4 in .zarr and .zspy, and gzip in .hspy and .h5, where all readers know it
CODECS = ("auto", "lz4", "zstd", "gzip", "none")

#: compression levels; lz4 and zstd within blosc
LEVELS = {"lz4": 5, "zstd": 1, "gzip": 4}

#: gzip header: deflate, no time, no name, unknown system
_GZIP = b"\x1f\x8b\x08" + bytes(6) + b"\xff"

#: largest chunk of blosc in bytes; HDF5 allows twice as much
LARGEST_CHUNK = 2**31 - 17


def shuffle_of(dtype: np.dtype) -> Literal["bitshuffle", "shuffle"]:
    """Shuffle filter of blosc: counts leave most bits unused, in floats most bytes are equal.

    Examples
    --------
    >>> shuffle_of(np.dtype("u2")), shuffle_of(np.dtype("f4"))
    ('bitshuffle', 'shuffle')
    """
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
    packed = blosc_encode(
        content, level=LEVELS[codec], compressor=codec, shuffle=shuffle, numthreads=1
    )
    return bytes(packed)


def deflated(content: Any, level: int) -> bytes:
    """Compress bytes in the format of zlib with zlib-ng, two to four times as fast.

    Examples
    --------
    >>> import zlib
    >>> zlib.decompress(deflated(b"abc", 4))
    b'abc'
    """
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
    ends = crc32(content).to_bytes(4, "little") + (len(content) % 2**32).to_bytes(4, "little")
    # without zlib's header (2 bytes) and checksum (4 bytes)
    return _GZIP + deflated(content, level)[2:-4] + ends


def bytes_apart(chunk: NDArray) -> NDArray[np.uint8]:
    """Filter ``shuffle`` of HDF5: the first bytes of all elements, then the second ones, and so on.

    Parameters
    ----------
    chunk : C-contiguous, of any shape

    Returns
    -------
    (bytes of an element, elements)

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


def whole_chunks(
    block: NDArray | Block, region: Region, chunks: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], NDArray]]:
    """Yield the chunks of a block with their origin; chunks beyond the end of an axis are padded with zeros.

    Parameters
    ----------
    block : (…, ky, kx), which begins on a chunk
    region : of the block along the leading axes
    chunks : shape of a chunk, whole patterns

    Returns
    -------
    iterator of (origin, C-contiguous chunk), valid until the next is requested

    Examples
    --------
    >>> block = np.arange(3).reshape(3, 1, 1)
    >>> [(at, chunk.ravel().tolist()) for at, chunk in whole_chunks(block, (slice(4, 7),), (2, 1, 1))]
    [((4, 0, 0), [0, 1]), ((6, 0, 0), [2, 0])]
    """
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


def lies_on_chunks(region: Region, chunks: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a block consists of whole chunks, so that no two tasks share one.

    Examples
    --------
    >>> lies_on_chunks((slice(4, 7),), (2,), (7,)), lies_on_chunks((slice(4, 5),), (2,), (7,))
    (True, False)
    """
    return all(
        part.start % chunk == 0 and (part.stop % chunk == 0 or part.stop == size)
        for part, chunk, size in zip(region, chunks, shape, strict=False)
    )


#: codec of ``auto`` in .zarr and .zspy
CODEC = "lz4"


def compressed(chunk: NDArray, codec: str = "auto") -> bytes:
    """Compress one chunk of a zarr array; equal chunks give equal bytes, while gzip of numcodecs writes the time."""
    codec = CODEC if codec == "auto" else codec
    chunk = np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("<"))
    if codec == "none":
        return chunk.tobytes()
    if codec == "gzip":
        return gzipped(chunk.reshape(-1).view(np.uint8).data, LEVELS[codec])
    return blosc_bytes(chunk, codec, shuffle_of(chunk.dtype))


def encoded(chunk: NDArray, codec: str = "auto") -> bytes:
    """Encode one chunk of a zarr 3 array: compressed, with a checksum."""
    return checked(compressed(chunk, codec))


def checked(content: bytes) -> bytes:
    """Append the CRC-32C of some bytes.

    Examples
    --------
    >>> checked(b"123456789")[-4:].hex()  # 0xe3069283, the check value in the catalogue of CRCs
    '839206e3'
    """
    return content + int(google_crc32c.value(content)).to_bytes(4, "little")
