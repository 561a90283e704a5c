"""Stores that are written as plain files: zarr reads them, and its own documents are the same."""

import json
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec

from stem_dask.core import batches as pieces_module
from stem_dask.core.batches import ChangedBlock, copied
from stem_dask.storage.publish import file_crc, read_document, write_document
from stem_dask.writers.codecs import LEVELS, blosc_bytes, shuffle_of
from stem_dask.writers.zarr import (
    array_document,
    consolidate,
    group_document,
    write_array,
    write_shard,
)

CODECS = ["auto", "lz4", "zstd", "gzip", "none"]


def numbers(*shape: int, dtype: str = "u2") -> np.ndarray:
    return (np.arange(np.prod(shape)) % 251).reshape(shape).astype(dtype)


def by_zarr(
    group: Any,
    name: str,
    shape: Any,
    dtype: Any,
    dims: Any,
    chunks: Any,
    codec: str,
    shards: Any = None,
) -> Any:
    """The twin: the same array made by zarr."""
    codec = "lz4" if codec == "auto" else codec
    kind = np.dtype(dtype)
    packing: list[Any] = [Crc32cCodec()]
    if codec == "gzip":
        packing.insert(0, GzipCodec(level=LEVELS[codec]))
    elif codec != "none":
        blosc: Any = BloscCodec
        packing.insert(0, blosc(cname=codec, clevel=LEVELS[codec], shuffle=shuffle_of(kind)))
    return group.create_array(
        name, shape=shape, dtype=kind, chunks=chunks, shards=shards, compressors=packing,
        dimension_names=dims, fill_value=0, chunk_key_encoding={"name": "default", "separator": "."},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["?", "u1", "i2", "u4", "f2", "f4", "f8"])
@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_blosc_knows_the_size_of_an_element(codec: str, dtype: str) -> None:
    """Without it bits of all bytes are mixed, and shards of uint16 nearly twice as large."""
    chunk = numbers(2, 30, 40, dtype=dtype)
    packed = blosc_bytes(chunk, codec, shuffle_of(chunk.dtype))
    assert packed[3] == chunk.dtype.itemsize  # fourth byte of blosc's header
    assert numcodecs.blosc.decompress(packed) == chunk.tobytes()


def plain_document(path: Path) -> Any:
    return json.loads((path / "zarr.json").read_text())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["?", "u1", "i2", "u2", "i4", "u8", "f2", "f4", "f8"])
@pytest.mark.parametrize("shards", [None, (4, 6, 5)])
def test_documents_of_arrays_are_those_of_zarr(
    tmp_path: Path, codec: str, dtype: str, shards: tuple[int, ...] | None
) -> None:
    group = zarr.create_group(tmp_path / "a.zarr", zarr_format=3)
    dims = ["y", "x", "radius"]
    by_zarr(group, "a", (7, 6, 5), dtype, dims, (2, 3, 5), codec, shards)
    mine = array_document((7, 6, 5), np.dtype(dtype), dims, (2, 3, 5), shards, codec=codec)
    assert mine == plain_document(tmp_path / "a.zarr/a")


def test_a_tree_is_what_zarr_makes_of_it(tmp_path: Path) -> None:
    values = {"a": numbers(5, 3), "b": np.float64(2.5) * np.ones(()), "c": np.array([True, False])}
    attrs = {
        "units": "1/nm",
        "scale": np.float32(0.5),
        "n": [1, (2, 3)],
        "nothing": None,
        "nan": np.nan,
    }
    group = zarr.create_group(tmp_path / "theirs.zarr", zarr_format=3)
    inner = group.create_group("inner")
    for name, array in values.items():
        dims = ["y", "x"][: array.ndim]
        by_zarr(inner, name, array.shape, array.dtype, dims, array.shape, "lz4")[...] = array
        write_array(tmp_path / "mine.zarr/inner" / name, array, dims)
    plain = {**attrs, "scale": 0.5, "n": [1, [2, 3]], "nan": "nan"}
    group.attrs.update(plain)
    inner.attrs.update({"of": "inner"})
    write_document(tmp_path / "mine.zarr", group_document(attrs))
    write_document(tmp_path / "mine.zarr/inner", group_document({"of": "inner"}))
    consolidate(tmp_path / "mine.zarr")
    with pytest.warns(UserWarning, match="Consolidated metadata"):
        zarr.consolidate_metadata(tmp_path / "theirs.zarr")
    assert plain_document(tmp_path / "mine.zarr") == plain_document(tmp_path / "theirs.zarr")
    mine = {p.relative_to(tmp_path / "mine.zarr") for p in (tmp_path / "mine.zarr").rglob("*")}
    assert mine == {
        p.relative_to(tmp_path / "theirs.zarr") for p in (tmp_path / "theirs.zarr").rglob("*")
    }
    read = zarr.open_group(tmp_path / "mine.zarr", mode="r")
    for name, array in values.items():
        np.testing.assert_array_equal(read[f"inner/{name}"][...], array)
    consolidate(tmp_path / "mine.zarr")  # of what was consolidated before
    assert plain_document(tmp_path / "mine.zarr") == plain_document(tmp_path / "theirs.zarr")


@pytest.mark.parametrize("shape", [(), (0,), (5,), (5, 4), (1, 1, 1)])
def test_arrays_of_several_chunks(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = numbers(*shape, dtype="f4")
    write_array(tmp_path / "a", values, "abc"[: len(shape)], [2] * len(shape), {"k": 1})
    read = zarr.open_array(tmp_path / "a", mode="r")
    np.testing.assert_array_equal(read[...], values)
    assert read.attrs.asdict() == {"k": 1}
    write_array(tmp_path / "a", numbers(3), "a")  # in place of the other
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a", mode="r")[...], numbers(3))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["c.0", "zarr.json"]


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    write_array(tmp_path / "a", numbers(300), "a")
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
    tmp_path_factory: pytest.TempPathFactory,
    scan: Any,
    chunks: Any,
    codec: str,
    dtype: str,
    size: int,
) -> None:
    path = tmp_path_factory.mktemp("shards") / "a"
    data = numbers(*scan, 3, 4, dtype=dtype)
    native = data.astype(data.dtype.newbyteorder("="))
    shard = tuple(-(-n // c) * c for n, c in zip(scan, chunks, strict=True))
    document = array_document(
        data.shape, native.dtype, ("y", "x", "ky", "kx"), (*chunks, 3, 4), (*shard, 3, 4), codec=codec
    )  # fmt: skip
    write_document(path, document)
    region = tuple(slice(0, n) for n in scan)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pieces_module, "PIECE_BYTES", size)
        block = ChangedBlock(data, copied, (3, 4), native.dtype)
        place = path / "c.0.0.0.0"
        said = write_shard(place, block, region, (*chunks, 3, 4), (*shard, 3, 4), codec)
    assert said == file_crc(place)
    np.testing.assert_array_equal(zarr.open_array(path, mode="r")[...], native)
    content = place.read_bytes()
    assert write_shard(place, native, region, (*chunks, 3, 4), (*shard, 3, 4), codec) == said
    assert place.read_bytes() == content
    assert sorted(p.name for p in path.iterdir()) == ["c.0.0.0.0", "zarr.json"]


def test_a_shard_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def fails(piece: np.ndarray, here: slice, out: np.ndarray) -> None:
        raise OSError(5, "Input/output error")

    block = ChangedBlock(numbers(2, 2, 3, 3), fails, (3, 3), np.dtype("u2"))
    region = (slice(0, 2), slice(0, 2))
    with pytest.raises(OSError, match="Input/output error"):
        write_shard(tmp_path / "c/0", block, region, (1, 2, 3, 3), (2, 2, 3, 3), "lz4")
    assert list((tmp_path / "c").iterdir()) == []
