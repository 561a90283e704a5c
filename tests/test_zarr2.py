"""Zarr format 2, written as plain files: what zarr itself would write, and reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from stem_dask.writers.zspy import array_document, packed, write_array, write_group

TYPES = ("?", "i1", "u2", ">u2", "i4", "u8", "f4", ">f4", "f8", "c8", "c16")
SHAPES = ((2, 3), (7,), (1, 2, 3), ())


def drawn(shape, dtype):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_zarr_reads_the_same_array(tmp_path, dtype):
    for i, shape in enumerate(SHAPES):
        values = drawn(shape, dtype)
        write_array(tmp_path / str(i), values)
        read = zarr.open_array(tmp_path / str(i), mode="r", zarr_format=2)
        np.testing.assert_array_equal(read[...], values)
        assert read.dtype == values.dtype.newbyteorder("=")


def test_no_element_makes_no_chunk(tmp_path):
    write_array(tmp_path / "a", np.zeros((0, 2)))
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".zarray"]
    assert zarr.open_array(tmp_path / "a", mode="r")[...].shape == (0, 2)


@pytest.mark.parametrize("codec", ["auto", "lz4", "zstd", "gzip", "none"])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_document_is_the_one_that_zarr_writes(tmp_path, dtype, codec):
    import numcodecs

    ours = array_document((5, 4), np.dtype(dtype), (2, 4), codec)
    compressor = {
        "gzip": numcodecs.GZip(4),
        "none": None,
        "zstd": numcodecs.Blosc("zstd", 1, 2 if np.dtype(dtype).kind in "uib" else 1),
    }.get(codec, numcodecs.Blosc("lz4", 5, 2 if np.dtype(dtype).kind in "uib" else 1))
    zarr.create_array(
        tmp_path / "a", shape=(5, 4), dtype=np.dtype(dtype).newbyteorder("="), chunks=(2, 4), zarr_format=2,
        compressors=compressor, fill_value=0, chunk_key_encoding={"name": "v2", "separator": "/"},
    )  # fmt: skip
    assert ours == json.loads((tmp_path / "a" / ".zarray").read_text())


@pytest.mark.parametrize("codec", ["lz4", "zstd", "gzip", "none"])
def test_a_chunk_of_another_byte_order_is_turned(codec):
    values = np.arange(300, dtype=">u2")
    assert packed(values, codec) == packed(values.astype("<u2"), codec)


def test_groups(tmp_path):
    write_group(tmp_path, {"a": np.float32(0.5), "b": None, "c": float("nan")})
    write_group(tmp_path / "inner")
    root = zarr.open_group(tmp_path, mode="r", zarr_format=2)
    assert dict(root.attrs) == {"a": 0.5, "b": None, "c": "nan"}
    assert dict(root["inner"].attrs) == {}
    assert sorted(Path(tmp_path, "inner").iterdir()) == [tmp_path / "inner" / ".zgroup"]
