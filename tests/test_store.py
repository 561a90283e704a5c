"""The zarr store: opened by everyone without a warning, one shard a block, and a flipped bit is noticed."""

import hashlib
import itertools
import json
from math import prod
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stem_dask.core.errors import StoreError
from stem_dask.core.formats import Output
from stem_dask.core.metadata import to_json
from stem_dask.core.model import Axis, Record
from stem_dask.core.patterns import as_patterns
from stem_dask.engine import run as engine
from stem_dask.stages.export import store_chunks
from stem_dask.writers import zarr as store
from stem_dask.writers.spool import SplitSink, SpoolSink
from stem_dask.writers.zarr import StoreSink, write_profiles

SHAPE = (7, 5, 12, 10)
AXES = (
    Axis("scan_y", 7, 0.5, 3, "nm"),
    Axis("scan_x", 5, 0.25, -1, "nm"),
    Axis("ky", 12, 0.1, -0.6, "1/nm"),
    Axis("kx", 10, 0.2, -1, "1/nm"),
)


def numbers(shape=SHAPE, dtype="u2"):
    return (np.arange(prod(shape)) % 60_000).reshape(shape).astype(dtype)


def lazy(array, lead, attrs=None):
    axes = AXES if array.shape == SHAPE else None
    if axes is None:
        names = ("scan_y", "scan_x", "ky", "kx")[-array.ndim :]
        names = names if array.ndim == 4 else ("pattern", *names[1:])
        axes = [Axis(name, n) for name, n in zip(names, array.shape, strict=True)]
    data = da.from_array(array, chunks=(*lead, *array.shape[-2:]))
    return as_patterns(data, axes, attrs)


def write_store(path, patterns, client=None, analysis=None):
    sink = sink_of(path, patterns)
    engine.run({"patterns": patterns.data}, patterns.ndim - 2, sink, client=client)
    sink.complete(patterns, analysis, {"title": "t", "shape": np.array([1, 2])})
    return path


def sink_of(path, patterns):
    native, dims = patterns.dtype.newbyteorder("="), tuple(map(str, patterns.dims))
    return StoreSink(Output(str(path), patterns.shape, native, *store_chunks(patterns), dims=dims))


def shard_files(path):
    """Index of the shard -> its file."""
    files = sorted((Path(path) / "patterns").glob("c.*"))
    return {tuple(map(int, file.name.split(".")[1:])): file for file in files}


def digests(path):
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(path).rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def analysis():
    dims = ("scan_y", "scan_x")
    return xr.Dataset(
        {
            "center_y": (dims, np.where(np.arange(35) % 7, 0.5, np.nan).reshape(7, 5)),
            "radius": (dims, np.arange(35, dtype="i4").reshape(7, 5), {"units": "px"}),
            "mean": (("source_ky", "source_kx"), np.ones((12, 10))),
            "n_empty": ((), np.int64(3)),
        },
        attrs={"threshold": np.float64(0), "targets": (0.9, np.nan)},
    )


# --- who opens it -----------------------------------------------------------------------------------------------


def test_xarray_opens_it_without_a_warning(tmp_path, analysis):
    path = write_store(
        tmp_path / "a.zarr", lazy(numbers(), (2, 5), {"maximum": np.uint16(9)}), analysis=analysis
    )
    with xr.open_zarr(path) as found:
        assert found.patterns.dims == ("scan_y", "scan_x", "ky", "kx")
        assert found.patterns.dtype == np.dtype("u2")
        np.testing.assert_array_equal(found.patterns.values, numbers())
        assert found.attrs == {"title": "t", "shape": [1, 2]}
        assert found.patterns.attrs["maximum"] == 9
        for axis in AXES:
            np.testing.assert_allclose(found[axis.name].values, axis.value(np.arange(axis.size)))
            assert found[axis.name].attrs["units"] == axis.units
    with xr.open_zarr(path, group="analysis") as found:
        xr.testing.assert_equal(found.load(), analysis)
        assert found.radius.dtype == np.dtype("i4")
        assert found.attrs == {"threshold": 0.0, "targets": [0.9, "nan"]}
    with xr.open_datatree(path, engine="zarr") as tree:
        assert set(tree.children) == {"analysis"}
        np.testing.assert_array_equal(tree["patterns"].values, numbers())
        assert int(tree["analysis/n_empty"]) == 3


def test_metadata_are_in_one_document(tmp_path, analysis):
    path = write_store(tmp_path / "a.zarr", lazy(numbers(), (2, 5)), analysis=analysis)
    root = json.loads((path / "zarr.json").read_text())
    assert root["zarr_format"] == 3
    members = root["consolidated_metadata"]["metadata"]
    assert {"patterns", "ky", "analysis", "analysis/center_y"} <= set(members)
    assert members["patterns"]["dimension_names"] == ["scan_y", "scan_x", "ky", "kx"]


# --- blocks and shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "lead", "n_shards"),
    [
        ((7, 5, 12, 10), (2, 5), 4),
        ((7, 5, 12, 10), (1, 2), 21),
        ((7, 11, 64, 48), (7, 11), 1),
        ((13, 17, 8, 8), (4, 17), 4),
        ((1, 23, 16, 16), (1, 4), 6),
        ((23, 1, 16, 16), (4, 1), 6),
        ((1, 1, 5, 3), (1, 1), 1),
        ((31, 12, 10), (8,), 4),
        ((251, 300, 260), (251,), 1),
    ],
)
def test_one_shard_a_block(tmp_path, shape, lead, n_shards):
    array = numbers(shape)
    patterns = lazy(array, lead)
    path = write_store(tmp_path / "a.zarr", patterns)
    stored = zarr.open_array(path, path="patterns", mode="r")
    assert stored.shape == shape
    assert stored.chunks[-2:] == stored.shards[-2:] == shape[-2:]
    assert prod(stored.chunks) * 2 <= 2**20
    for n, shard, size, inner in zip(lead, stored.shards, shape, stored.chunks, strict=False):
        assert shard % inner == 0
        assert shard == n or n >= size  # a block that covers its axis may be rounded up
    files = shard_files(path)
    assert len(files) == n_shards == prod(patterns.data.numblocks)
    assert set(files) == set(np.ndindex(patterns.data.numblocks))
    np.testing.assert_array_equal(stored[...], array)


@given(n_y=st.integers(1, 40), n_x=st.integers(1, 40), detector=st.integers(1, 700), data=st.data())
@settings(max_examples=80, deadline=None)
def test_shard_grid_is_the_block_grid(n_y, n_x, detector, data):
    """For any sizes: shards hold whole inner chunks and there is exactly one for each block."""
    lead = data.draw(st.integers(1, n_y)), data.draw(st.integers(1, n_x))
    array = da.zeros((n_y, n_x, detector, 700), chunks=(*lead, -1, -1), dtype="u2")
    patterns = xr.DataArray(array, dims=("scan_y", "scan_x", "ky", "kx"))
    inner, shards = store_chunks(patterns)
    assert all(shard % part == 0 for shard, part in zip(shards, inner, strict=True))
    grid = tuple(-(-n // shard) for n, shard in zip(array.shape, shards, strict=True))
    assert grid == array.numblocks
    assert prod(inner) * 2 <= max(2**20, detector * 700 * 2)


@pytest.mark.parametrize("chunks", [((3, 2, 2), (5,)), ((2, 5), (5,)), ((7,), (1, 4))])
def test_irregular_blocks_are_refused(chunks):
    patterns = lazy(numbers(), (7, 5))
    patterns = patterns.copy(data=patterns.data.rechunk((*chunks, 12, 10)))
    with pytest.raises(StoreError, match=r"the blocks along scan_[yx] are .*needs equal blocks"):
        store_chunks(patterns)


# --- what is noticed --------------------------------------------------------------------------------------------


def test_all_zero_data_still_write_their_shards(tmp_path):
    path = write_store(tmp_path / "a.zarr", lazy(np.zeros(SHAPE, "u2"), (2, 5)))
    assert len(shard_files(path)) == 4
    assert not zarr.open_array(path, path="patterns", mode="r")[...].any()


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_flipped_bit_is_noticed(tmp_path, where, bit):
    path = tmp_path / "a.zarr"
    if not path.exists():
        write_store(path, lazy(numbers(), (4, 5)))
    file = shard_files(path)[0, 0, 0, 0]
    good = file.read_bytes()
    bad = bytearray(good)
    bad[int(where * len(bad))] ^= 1 << bit
    file.write_bytes(bad)
    try:
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)checksum|crc"):
            zarr.open_array(path, path="patterns", mode="r")[:4]
    finally:
        file.write_bytes(good)


# --- going on ---------------------------------------------------------------------------------------------------


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-1])


def zeroed(file):
    file.write_bytes(bytes(file.stat().st_size))


def flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "{} has {:,} bytes, not the {:,} that were written"),
        (zeroed, "{} does not hold what was written (checksum)"),
        (flipped, "{} does not hold what was written (checksum)"),
        (Path.unlink, "{} cannot be read: No such file or directory"),
    ],
)
def test_verify_says_what_is_wrong(tmp_path, spoil, message):
    sink = small_sink(tmp_path / "a.zarr")
    sink.create(resume=False)
    extra = sink.write(1, (slice(2, 3),), {"patterns": np.ones((1, 4, 4), "u1")})
    record = Record(1, 0, 0, 0, json.loads(json.dumps(extra)))
    assert sink.verify(record) is None
    file = shard_files(tmp_path / "a.zarr")[1, 0, 0]
    assert extra["shard"] == str(file.relative_to(tmp_path / "a.zarr"))
    size = file.stat().st_size
    spoil(file)
    assert sink.verify(record) == message.format(file, size - 1, size)
    assert sink.write(1, (slice(2, 3),), {"patterns": np.ones((1, 4, 4), "u1")}) == extra
    assert sink.verify(record) is None


def test_what_a_kill_left_beside_the_shards_is_removed(tmp_path):
    """A worker writes NAME.partial and renames it; between the two it may be killed."""
    path = write_store(tmp_path / "a.zarr", lazy(numbers(), (4, 5)))
    before = digests(path)
    for folder in (path, path / "patterns"):
        (folder / "c.0.0.0.0.5f3a.partial").write_bytes(b"half a shard")
    sink = sink_of(path, lazy(numbers(), (4, 5)))
    sink.create(resume=True)
    sink.finish([])
    assert digests(path) == before
    sink.create(resume=False)
    assert shard_files(path) == {}


def test_going_on_without_what_was_there_starts_anew(tmp_path):
    sink = small_sink(tmp_path / "a.zarr")
    sink.create(resume=True)
    sink.write(1, (slice(2, 3),), {"patterns": np.ones((1, 4, 4), "u1")})
    assert list(shard_files(tmp_path / "a.zarr")) == [(1, 0, 0)]


# --- deterministic bytes ----------------------------------------------------------------------------------------


def test_what_a_broken_run_left_is_removed(tmp_path):
    path = write_store(tmp_path / "a.zarr", lazy(numbers(), (1, 5)))
    assert len(shard_files(path)) == 7
    write_store(path, lazy(numbers() + 1, (4, 5)))
    assert len(shard_files(path)) == 2
    np.testing.assert_array_equal(xr.open_zarr(path).patterns.values, numbers() + 1)


# --- small things -----------------------------------------------------------------------------------------------


class Noting:
    """A sink that notes what it is asked for."""

    def __init__(self, wrong=None):
        self.calls = []
        self.wrong = wrong

    def create(self, *, resume):
        self.calls.append("resume" if resume else "create")

    def write(self, index, region, blocks):
        self.calls.append((index, region, {name: block.tolist() for name, block in blocks.items()}))
        return {"crc": index}

    def verify(self, record):
        self.calls.append(("verify", record.extra.get("crc")))
        return self.wrong

    def finish(self, records):
        self.calls.append(("finish", [record.extra for record in records]))


def small_sink(path, **options):
    options = {"shards": (2, 4, 4), "dims": ("pattern", "ky", "kx"), **options}
    return StoreSink(Output(str(path), (3, 4, 4), np.dtype("u1"), (2, 4, 4), **options))


def test_other_outputs_go_to_the_next_sink(tmp_path):
    noting = Noting()
    sink = SplitSink(small_sink(tmp_path / "a.zarr"), ("patterns",), noting)
    sink.create(resume=False)
    region = (slice(0, 2),)
    extra = sink.write(0, region, {"patterns": np.ones((2, 4, 4), "u1"), "sum": np.array([3, 4])})
    assert extra["beside"] == {"crc": 0}
    assert extra["crc"] != 0  # that of the shard
    record = Record(0, 0, 0, 0, extra)
    assert sink.verify(record) is None
    sink.create(resume=True)
    sink.finish([record])
    assert noting.calls == [
        "create",
        (0, region, {"sum": [3, 4]}),
        ("verify", 0),
        "resume",
        ("finish", [{"crc": 0}]),
    ]
    (file,) = shard_files(tmp_path / "a.zarr").values()
    flipped(file)
    assert "checksum" in sink.verify(record)


def test_only_what_is_beside_a_complete_output_is_made(tmp_path):
    spool = SpoolSink(str(tmp_path / "spool"))
    sink = SplitSink(None, ("patterns",), spool)
    sink.create(resume=False)
    assert "cannot be read" in sink.verify(Record(0, 0, 0, 0, {"crc": 1}))
    blocks = {"patterns": np.ones((1, 4, 4), "u1"), "sum": np.array([3])}
    extra = sink.write(0, (slice(0, 1),), blocks)
    assert sink.verify(Record(0, 0, 0, 0, extra)) is None
    sink.finish([Record(0, 0, 0, 0, extra)])
    ((_, kept),) = spool.blocks(1)
    assert list(kept) == ["sum"]


@pytest.mark.parametrize("codec", ["zstd", "gzip", "none", "auto"])
def test_going_on_in_a_store_of_another_codec_starts_anew(tmp_path, codec):
    """Its metadata say how the chunks are read."""
    path = tmp_path / "a.zarr"
    for now in ("lz4", codec, codec):
        sink = small_sink(path, codec=now)
        sink.create(resume=True)
        kept = now == codec and bool(shard_files(path))
        sink.write(0, (slice(0, 2),), {"patterns": np.ones((2, 4, 4), "u1")})
    assert kept
    zarr.open_group(path, mode="r+")["patterns"].attrs["maximum"] = (
        3  # what an interrupted finish left
    )
    sink.create(resume=True)
    assert len(shard_files(path)) == 1
    np.testing.assert_array_equal(zarr.open_array(path, path="patterns", mode="r")[:2], 1)
    small_sink(path, codec=codec, shards=(4, 4, 4)).create(resume=True)
    assert shard_files(path) == {}


@pytest.mark.parametrize("most", [(2**20, 256), (2**20, 2), (1, 256)], ids=["one", "few", "own"])
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((7, 5), (4, 5)), ((7, 5), (2, 3)), ((9,), (2,)), ((3, 4), (3, 4)), ((2, 2, 3), (1, 2, 2))],
    ids=["rows", "columns", "list", "whole", "stack"],
)
def test_profiles_are_written_block_by_block(tmp_path, monkeypatch, shape, chunk, most):
    """Several rows of blocks in a file, as many as its bounds allow, at least one; a torn file of before goes."""
    monkeypatch.setattr(store, "PROFILE_FILE_BYTES", most[0])
    monkeypatch.setattr(store, "PROFILE_FILE_CHUNKS", most[1])
    profile = np.random.default_rng(0).random((*shape, 3)).astype("f4")
    grid = [range(0, n, size) for n, size in zip(shape, chunk, strict=True)]
    regions = [
        tuple(slice(a, min(a + size, n)) for a, size, n in zip(at, chunk, shape, strict=True))
        for at in itertools.product(*grid)
    ]
    blocks = ((region, {"profile": profile[region]}) for region in regions)
    dims = [*(f"i{i}" for i in range(len(shape))), "radius"]
    folder = tmp_path / "analysis" / "profile"
    folder.mkdir(parents=True)
    (folder / "c.99").write_bytes(b"torn")
    write_profiles(str(tmp_path), blocks, dims, shape, chunk)
    array = zarr.open_array(tmp_path, path="analysis/profile", mode="r")
    np.testing.assert_array_equal(array[...], profile)
    assert array.chunks == (*chunk, 3)
    in_row, rows = len(regions) // len(grid[0]), len(grid[0])
    each = max(1, min(most[1] // in_row, rows)) if most[0] > 1 else 1
    assert array.shards == (each * chunk[0], *(len(g) * c for g, c in zip(grid[1:], chunk[1:], strict=True)), 3)  # fmt: skip
    assert len(list(folder.glob("c.*"))) == -(-rows // each)


def test_no_profiles(tmp_path):
    write_profiles(str(tmp_path), iter(()), ("i", "radius"), (0,), (1,))
    assert list(tmp_path.iterdir()) == []


def test_plain_attributes():
    given = {
        "a": np.float32(0.5), "b": np.array([1, 2]), "c": (np.int64(3), None), "d": {1: np.inf},
        "e": Path("x"), "f": np.bool_(True), "g": float("nan"),
    }  # fmt: skip
    expected = {
        "a": 0.5, "b": [1, 2], "c": [3, None], "d": {"1": "inf"}, "e": "x", "f": True, "g": "nan",
    }  # fmt: skip
    assert to_json(given) == expected
    json.dumps(to_json(given), allow_nan=False)
