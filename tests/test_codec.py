"""Compression and checksums beside the slower ones of Python."""

import gzip
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stem_dask.storage.staging import crc32
from stem_dask.writers.codecs import bytes_apart, deflated, gzipped
from stem_dask.writers.hdf5 import pack_chunk

TYPES = ["?", "u1", "<u2", ">u2", "<i4", ">f4", "f2", "<f8", ">u8"]


def some(dtype: str) -> np.ndarray:
    return (np.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4) % 37 * 1719).astype(dtype)


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_crc_of_joined_pieces(pieces: list[bytes]) -> None:
    found = 0
    for piece in pieces:
        found = crc32(piece, found)
    assert found == zlib.crc32(b"".join(pieces))


@pytest.mark.parametrize("dtype", TYPES)
def test_crc_of_arrays(dtype: str) -> None:
    for array in (some(dtype), some(dtype)[0, 0, 0, 0], some(dtype)[:0]):
        assert crc32(np.ascontiguousarray(array).data, 5) == zlib.crc32(array.tobytes(), 5)


@given(st.binary(max_size=5000), st.sampled_from([1, 4, 9]))
def test_what_is_deflated_is_inflated_by_others(content: bytes, level: int) -> None:
    assert zlib.decompress(deflated(content, level)) == content
    assert gzip.decompress(gzipped(content, level)) == content
    assert gzipped(content, level)[4:8] == bytes(4)  # no time of day


@pytest.mark.parametrize("dtype", TYPES)
def test_bytes_apart_beside_a_slow_twin(dtype: str) -> None:
    chunk = some(dtype)
    content, size = chunk.tobytes(), chunk.dtype.itemsize
    slow = b"".join(content[i::size] for i in range(size))
    assert bytes_apart(chunk).tobytes() == slow
    assert zlib.decompress(pack_chunk(chunk, "gzip")) == slow
