"""The zarr 2 stores of .zspy: what is written is what zarr reads."""

import numpy as np
import pytest
import zarr

from stem_dask.core.formats import Output
from stem_dask.writers.codecs import compressed
from stem_dask.writers.zspy import ZspySink, write_tree

TYPES = ("?", "i1", "u2", ">u2", "i4", "u8", "f4", ">f4", "f8", "c8", "c16")
SHAPES = ((2, 3), (7,), (1, 2, 3), ())


def written(folder, values):
    write_tree(folder.parent, {folder.name: values})
    return zarr.open_array(folder, mode="r", zarr_format=2)


@pytest.mark.parametrize("dtype", TYPES)
def test_zarr_reads_the_same_array(tmp_path, dtype):
    for i, shape in enumerate(SHAPES):
        values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        read = written(tmp_path / str(i), values)
        np.testing.assert_array_equal(read[...], values)
        assert read.dtype == values.dtype.newbyteorder("=")


def test_an_array_without_elements(tmp_path):
    assert written(tmp_path / "a", np.zeros((0, 2)))[...].shape == (0, 2)


@pytest.mark.parametrize("codec", ["auto", "lz4", "zstd", "gzip", "none"])
@pytest.mark.parametrize("dtype", TYPES)
def test_zarr_reads_chunks_that_a_task_wrote(tmp_path, dtype, codec):
    values = np.arange(24).reshape(4, 3, 2).astype(dtype)
    output = Output(
        str(tmp_path / "a"), (4, 3, 2), np.dtype(dtype).newbyteorder("="), (2, 3, 2), codec=codec, title="t",
        spool=f"{tmp_path}/s",
    )  # fmt: skip
    sink = ZspySink(output)
    sink.create(resume=False)
    sink.write(0, (slice(0, 4),), {"patterns": values})
    read = zarr.open_array(tmp_path / "a/Experiments/t/data", mode="r", zarr_format=2)
    np.testing.assert_array_equal(read[...], values)


@pytest.mark.parametrize("codec", ["lz4", "zstd", "gzip", "none"])
def test_a_chunk_of_another_byte_order_is_swapped(codec):
    values = np.arange(300, dtype=">u2")
    assert compressed(values, codec) == compressed(values.astype("<u2"), codec)


def test_groups(tmp_path):
    write_tree(tmp_path, {"a": np.float32(0.5), "b": None, "c": float("nan"), "inner": {}})
    root = zarr.open_group(tmp_path, mode="r", zarr_format=2)
    assert dict(root.attrs) == {"a": 0.5, "b": "_None_", "c": "nan"}
    assert dict(root["inner"].attrs) == {}
