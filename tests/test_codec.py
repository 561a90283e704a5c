"""Compression and checksums beside the slower ones of Python; shards, chunks and small arrays that zarr reads."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_dask.core import batches as pieces_module
from stem_dask.core.batches import ChangedBlock, copied
from stem_dask.core.formats import Output
from stem_dask.storage.publish import read_document
from stem_dask.storage.staging import crc32, file_crc
from stem_dask.writers.codecs import CODECS, blosc_bytes, bytes_apart, deflated, gzipped, shuffle_of
from stem_dask.writers.hdf5 import pack_chunk
from stem_dask.writers.hyperspy import ZspySink, write_tree
from stem_dask.writers.zarr import StoreSink, write_array

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


def numbers(*shape: int, dtype: str = "u2") -> np.ndarray:
    return (np.arange(np.prod(shape)) % 251).reshape(shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["?", "u1", "i2", "u4", "f2", "f4", "f8"])
@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_blosc_knows_the_size_of_an_element(codec: str, dtype: str) -> None:
    """Without it bits of all bytes are mixed, and shards of uint16 nearly twice as large."""
    chunk = numbers(2, 30, 40, dtype=dtype)
    packed = blosc_bytes(chunk, codec, shuffle_of(chunk.dtype))
    assert packed[3] == chunk.dtype.itemsize  # fourth byte of blosc's header
    assert numcodecs.blosc.decompress(packed) == chunk.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (5,), (5, 4), (1, 1, 1)])
def test_small_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = numbers(*shape, dtype="f4")
    write_array(str(tmp_path), "a", values, "abc"[: len(shape)], {"k": np.float32(0.5)})
    read = zarr.open_array(tmp_path / "a", mode="r")
    np.testing.assert_array_equal(read[...], values)
    assert read.attrs.asdict() == {"k": 0.5}
    write_array(str(tmp_path), "a", numbers(300), "a")  # in place of the other
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a", mode="r")[...], numbers(300))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["c.0", "zarr.json"]
    content = bytearray((tmp_path / "a/c.0").read_bytes())
    content[30] ^= 4
    (tmp_path / "a/c.0").write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(tmp_path / "a", mode="r")[...]


def test_documents_that_are_none(tmp_path: Path) -> None:
    assert read_document(tmp_path) is None
    for text in ("", "[1]", "{"):
        (tmp_path / "zarr.json").write_text(text)
        assert read_document(tmp_path) is None


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(CODECS),
    st.sampled_from(["u1", "u2", ">i4", "f4", "?"]),
    st.integers(1, 300),
)
def test_zarr_reads_a_shard(
    tmp_path_factory: pytest.TempPathFactory, scan: Any, chunks: Any, codec: str, dtype: str, size: int
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("shards") / "a"
    data = numbers(*scan, 3, 4, dtype=dtype)
    native = data.astype(data.dtype.newbyteorder("="))
    shard = tuple(-(-n // c) * c for n, c in zip(scan, chunks, strict=True))
    sink = StoreSink(
        Output(str(path), data.shape, native.dtype, (*chunks, 3, 4), (*shard, 3, 4), codec, ("y", "x", "ky", "kx"))
    )  # fmt: skip
    sink.create(resume=False)
    region, place = tuple(slice(0, n) for n in scan), path / "patterns/c.0.0.0.0"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pieces_module, "PIECE_BYTES", size)
        block = ChangedBlock(data, copied, (3, 4), data.dtype)
        noted = sink.write(0, region, {"patterns": block})
    assert (noted["crc"], noted["bytes"]) == file_crc(place)
    read = zarr.open_array(path / "patterns", mode="r")
    np.testing.assert_array_equal(read[...], native)
    content = place.read_bytes()
    assert sink.write(0, region, {"patterns": native}) == noted
    assert place.read_bytes() == content
    assert sorted(p.name for p in place.parent.iterdir()) == ["c.0.0.0.0", "zarr.json"]


def test_a_shard_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def fails(piece: np.ndarray, here: slice, out: np.ndarray) -> None:
        raise OSError(5, "Input/output error")

    block = ChangedBlock(numbers(2, 2, 3, 3), fails, (3, 3), np.dtype("u2"))
    sink = StoreSink(Output(str(tmp_path / "a"), (2, 2, 3, 3), np.dtype("u2"), (1, 2, 3, 3), (2, 2, 3, 3)))  # fmt: skip
    sink.create(resume=False)
    with pytest.raises(OSError, match="Input/output error"):
        sink.write(0, (slice(0, 2), slice(0, 2)), {"patterns": block})
    assert [p.name for p in (tmp_path / "a/patterns").iterdir()] == ["zarr.json"]
    assert not list(tmp_path.rglob("*.partial/*"))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["?", "i1", ">u2", "u8", ">f4", "f8", "c16"])
def test_zarr_reads_chunks_of_format_2(tmp_path: Path, dtype: str, codec: str) -> None:
    values, native = numbers(4, 3, 2, dtype=dtype), np.dtype(dtype).newbyteorder("=")
    places = {"title": "t", "spool": f"{tmp_path}/s"}
    sink = ZspySink(
        Output(str(tmp_path / "a"), (4, 3, 2), native, (2, 3, 2), codec=codec, **places)
    )
    sink.create(resume=False)
    sink.write(0, (slice(0, 4),), {"patterns": values})
    read = zarr.open_array(tmp_path / "a/Experiments/t/data", mode="r", zarr_format=2)
    np.testing.assert_array_equal(read[...], values)


@pytest.mark.parametrize("shape", [(2, 3), (), (0, 2)])
def test_a_tree_of_format_2(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = numbers(*shape, dtype=">f4")
    tree = {"a": np.float32(0.5), "b": None, "c": float("nan"), "inner": {}, "array": values}
    write_tree(tmp_path, tree)
    root: Any = zarr.open_group(tmp_path, mode="r", zarr_format=2)
    assert dict(root.attrs) == {"a": 0.5, "b": "_None_", "c": "nan"}
    assert dict(root["inner"].attrs) == {}
    np.testing.assert_array_equal(root["array"][...], values)
    assert root["array"].dtype == np.dtype("f4")
