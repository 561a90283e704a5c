"""How patterns are compressed: the same few words for every format that compresses."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stem_dask.model import Region

#: ``auto`` is what every reader of a format opens: blosc lz4 in zarr and .zspy, gzip in .hspy and .h5
CODECS = ("auto", "lz4", "zstd", "gzip", "none")
#: lz4 and zstd are those of blosc
LEVELS = {"lz4": 5, "zstd": 1, "gzip": 4}
#: the largest chunk that blosc takes, in bytes; HDF5 takes twice as much
LARGEST_CHUNK = 2**31 - 17


def shuffle_of(dtype: np.dtype) -> Literal["bitshuffle", "shuffle"]:
    """How blosc orders the bytes of a chunk of a zarr store: counts leave most bits unused, floats most bytes equal.

    Examples
    --------
    >>> shuffle_of(np.dtype("u2")), shuffle_of(np.dtype("f4"))
    ('bitshuffle', 'shuffle')
    """
    return "bitshuffle" if dtype.kind in "uib" else "shuffle"


@contextlib.contextmanager
def one_thread_blosc() -> Iterator[None]:
    """One thread a task for compression: threads are dask's, and bytes do not depend on how many there are."""
    import numcodecs.blosc

    before = numcodecs.blosc.use_threads
    numcodecs.blosc.use_threads = False
    try:
        yield
    finally:
        numcodecs.blosc.use_threads = before


def blosc_bytes(chunk: NDArray, codec: str, shuffle: str) -> bytes:
    """A C-contiguous chunk compressed by blosc; equal chunks give equal bytes."""
    from numcodecs import blosc

    how = {"bitshuffle": blosc.BITSHUFFLE, "shuffle": blosc.SHUFFLE}[shuffle]
    content = chunk.reshape(-1).view(np.uint8)
    with one_thread_blosc():
        packed: bytes = blosc.compress(
            content, codec.encode(), LEVELS[codec], how, typesize=chunk.dtype.itemsize
        )
    return packed


def whole_chunks(
    block: NDArray, region: Region, chunks: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], NDArray]]:
    """Chunks of a block and where each begins; one that reaches over the end of an axis is filled up with zeros.

    Parameters
    ----------
    block : (…, ky, kx), which begins on a chunk
    region : where the block lies along the leading axes
    chunks : extents of a chunk, whole patterns

    Examples
    --------
    >>> block = np.arange(3).reshape(3, 1, 1)
    >>> [(at, chunk.ravel().tolist()) for at, chunk in whole_chunks(block, (slice(4, 7),), (2, 1, 1))]
    [((4, 0, 0), [0, 1]), ((6, 0, 0), [2, 0])]
    """
    lead = tuple(chunks[: len(region)])
    counts = [-(-n // chunk) for n, chunk in zip(block.shape, lead, strict=False)]
    for place in np.ndindex(*counts):
        part = block[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, lead, strict=True))]
        if part.shape != tuple(chunks):
            full = np.zeros(tuple(chunks), part.dtype)
            full[tuple(slice(0, n) for n in part.shape)] = part
            part = full
        at = [r.start + i * n for r, i, n in zip(region, place, lead, strict=True)]
        yield (*at, 0, 0), np.ascontiguousarray(part)


def lies_on_chunks(region: Region, chunks: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a block begins and ends where chunks do (or the axis ends), so that no two tasks share a chunk.

    Examples
    --------
    >>> lies_on_chunks((slice(4, 7),), (2,), (7,)), lies_on_chunks((slice(4, 5),), (2,), (7,))
    (True, False)
    """
    return all(
        part.start % chunk == 0 and (part.stop % chunk == 0 or part.stop == size)
        for part, chunk, size in zip(region, chunks, shape, strict=False)
    )
