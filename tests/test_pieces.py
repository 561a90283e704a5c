"""Blocks that are gone through a few patterns at a time, and what is found on the way."""

import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_dask.core import batches as pieces_module
from stem_dask.core.batches import Block, ChangedBlock, Deferred, copied, joined, of_type, split
from stem_dask.job.run import run
from stem_dask.kernels.intensity import add_patterns, native_dtype
from stem_dask.readers.views import Part
from stem_dask.stages.analyze import block_statistics
from stem_dask.stages.blocks import as_arrays
from stem_dask.stages.downsample import downsample, downsample_blocks
from stem_dask.stages.export import open_store
from stem_dask.writers.codecs import whole_chunks


class Seen:
    """Keeps everything that passes."""

    def __init__(self):
        self.patterns: list[np.ndarray] = []

    def add(self, piece, here):
        self.patterns.append(piece.copy())

    def result(self):
        return {"seen": np.concatenate(self.patterns)}


def numbers(*shape, dtype="u2"):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def plus_one(piece, here, out):
    np.add(piece, 1, out=out)


def changed(block):
    return ChangedBlock(block, plus_one, block.shape[-2:], block.dtype)


@pytest.fixture
def small_pieces(monkeypatch):
    """Three patterns of 2 x 2 uint16 at once."""
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 3 * 8)


@pytest.fixture
def passes(monkeypatch):
    """How many patterns of a file each pass went through."""
    found: list[int] = []
    plain = Part._pieces

    def noted(self):
        found.append(int(np.prod(self.shape[:-2])))
        return plain(self)

    monkeypatch.setattr(Part, "_pieces", noted)
    return found


@pytest.mark.usefixtures("small_pieces")
def test_what_is_made_of_what_is_made():
    block = numbers(2, 7, 2, 2)
    twice = changed(changed(block))
    assert (twice.shape, twice.dtype, twice.ndim) == (block.shape, block.dtype, block.ndim)
    assert twice.nbytes == block.nbytes
    assert [len(piece) for piece in twice.pieces()] == [3, 3, 1, 3, 3, 1]
    np.testing.assert_array_equal(np.asarray(twice), block + 2)
    np.testing.assert_array_equal(twice[1, 2:], block[1, 2:] + 2)
    assert np.asarray(twice, np.float32).dtype == np.float32


@pytest.mark.usefixtures("small_pieces")
def test_watchers_see_every_pattern_once():
    block = numbers(2, 7, 2, 2)
    first = changed(block)
    second = changed(first)
    before, after = Deferred(first, Seen), Deferred(second, Seen)
    assert before.found is None
    for _ in second.pieces():
        pass
    np.testing.assert_array_equal(before.found["seen"], block.reshape(-1, 2, 2) + 1)
    np.testing.assert_array_equal(after.found["seen"], block.reshape(-1, 2, 2) + 2)
    np.asarray(second)  # again: nobody watches any more
    assert len(before.found["seen"]) == 14


@pytest.mark.usefixtures("small_pieces")
def test_what_was_broken_off_is_begun_anew():
    block = changed(numbers(7, 2, 2))
    seen = Deferred(block, Seen)
    stream = block.pieces()
    next(stream)
    stream.close()
    assert seen.found is None
    np.asarray(block)
    np.testing.assert_array_equal(seen.found["seen"], numbers(7, 2, 2) + 1)


def test_no_cycle_keeps_a_block_that_was_gone_through():
    class Large(np.ndarray):
        """An array that a weak reference can point to."""

    gc.disable()
    try:
        block = np.zeros((3, 2, 2)).view(Large)
        gone = weakref.ref(block)
        made = changed(block)
        later = Deferred(made, Seen)
        np.asarray(made)
        del block, made
        assert gone() is None
        assert later.found["seen"].shape == (3, 2, 2)
    finally:
        gc.enable()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 40), st.booleans())
def test_runs(lengths, size, apart):
    """Split and joined again, patterns are the same in the same order, whatever the pieces."""
    data = numbers(sum(lengths), 1, 3)
    block: Any = ChangedBlock(data, copied, (1, 3), data.dtype) if apart else data
    edges = np.cumsum([0, *lengths])
    expected = [data[a:b] for a, b in itertools.pairwise(edges) if a < b]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pieces_module, "PIECE_BYTES", size)
        found: dict[int, list[np.ndarray]] = {}
        for run, piece, first in split(block, lengths):
            assert first == (run not in found)
            found.setdefault(run, []).append(piece.copy())
        assert list(found) == [i for i, n in enumerate(lengths) if n]
        for mine, other in zip(found.values(), expected, strict=True):
            np.testing.assert_array_equal(np.concatenate(mine), other)
        whole = [run.copy() for run in joined(block, [n for n in lengths if n])]
        for mine, other in zip(whole, expected, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_more_patterns_than_runs():
    with pytest.raises(ValueError, match="more patterns than the runs"):
        list(split(numbers(2 * 2**20, 1, 1), [2**20]))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    st.integers(1, 200),
    st.booleans(),
)
def test_chunks_of_a_block(shape, chunks, size, listed):
    """As a slow twin cuts them out of the padded array."""
    data = numbers(*shape, 2, 3) + 1
    region: tuple[slice, ...] = (slice(12, 12 + shape[0]), slice(60, 60 + shape[1]))
    if listed:
        data, region, chunks = (
            data.reshape(-1, 2, 3),
            (slice(60, 60 + shape[0] * shape[1]),),
            chunks[1:],
        )
    full = np.zeros(
        [-(-n // c) * c for n, c in zip(data.shape, chunks, strict=False)] + [2, 3], "u2"
    )
    full[tuple(slice(n) for n in data.shape)] = data
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pieces_module, "PIECE_BYTES", size)
        block, ends = ChangedBlock(data, copied, (2, 3), data.dtype), [r.stop for r in region]
        found = {
            at: chunk.copy() for at, chunk in whole_chunks(block, region, (*chunks, 2, 3), ends)
        }
        arrays = {
            at: chunk.copy() for at, chunk in whole_chunks(data, region, (*chunks, 2, 3), ends)
        }
    expected = {
        (*(r.start + i * c for r, i, c in zip(region, place, chunks, strict=True)), 0, 0): full[
            tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunks, strict=True))
        ]
        for place in np.ndindex(*(n // c for n, c in zip(full.shape, chunks, strict=False)))
    }
    assert list(found) == list(arrays) == list(expected)
    for at, chunk in expected.items():
        np.testing.assert_array_equal(found[at], chunk)
        np.testing.assert_array_equal(arrays[at], chunk)


def test_types():
    block = numbers(3, 2, 2)
    assert of_type(block, np.dtype("u2")) is block
    assert of_type(block, np.dtype(">u2")).dtype == np.dtype(">u2")
    swapped = of_type(changed(block), np.dtype(">u2"))
    assert isinstance(swapped, Block)
    np.testing.assert_array_equal(np.asarray(swapped), block + 1)


def test_blocks_of_public_functions_are_arrays():
    import xarray as xr

    data = numbers(4, 6, 8, 8)
    patterns = xr.DataArray(data, dims=("scan_y", "scan_x", "ky", "kx")).chunk(scan_y=2)
    small = downsample(patterns, 2, method="stride")
    assert isinstance(small.data.blocks[0, 0].compute(), np.ndarray)
    np.testing.assert_array_equal((small + 1).compute(), data[..., ::2, ::2] + 1)
    of_a_job = downsample_blocks(
        patterns, 2, method="stride", reduce="mean", sigma=None, device="cpu"
    )
    assert isinstance(of_a_job.data.blocks[0, 0].compute(), Block)
    np.testing.assert_array_equal(as_arrays(of_a_job), data[..., ::2, ::2])


@pytest.mark.parametrize(
    "dtype", ["u1", "u2", ">u2", "u4", "u8", "i1", "i2", "i4", "?", "f2", "f4", "f8"]
)
def test_sums_and_highest(dtype):
    """The twin: numpy over the whole block."""
    rng = np.random.default_rng(3)
    block = rng.integers(-50 if np.dtype(dtype).kind == "i" else 0, 100, (5, 9, 7)).astype(dtype)
    total, highest = np.zeros((9, 7)), np.full(7, block.min(), native_dtype(block.dtype))
    for piece in (block[:2], block[2:]):
        add_patterns(piece, total, highest)
    np.testing.assert_array_equal(total, block.astype("f8").sum(axis=0))
    np.testing.assert_array_equal(highest, block.max(axis=(0, 1)))


def test_sums_hold_the_largest_counts():
    block = np.full((70_000, 1, 2), 65535, "u2")  # more than 32 bits hold
    total, highest = np.zeros((1, 2)), np.zeros(2, "u2")
    add_patterns(block, total, highest)
    assert total.tolist() == [[70_000 * 65535] * 2]


def test_statistics_of_floats_leave_out_what_is_not_finite():
    import xarray as xr

    data = np.array([1.0, np.nan, np.inf, -np.inf, 7.0, 2.0]).reshape(6, 1, 1)
    patterns = xr.DataArray(data, dims=("pattern", "ky", "kx")).chunk(pattern=3)
    found = [block_statistics(patterns).blocks[i].compute().get() for i in range(2)]
    assert [block["highest"].tolist() for block in found] == [[1.0], [7.0]]
    assert found[0]["sum"].shape == (1, 1, 1)
    dark = block_statistics(patterns.copy(data=np.full((6, 1, 1), np.nan)))
    assert dark.compute().get()["highest"] == -np.inf


def test_a_crop_that_is_written_reads_each_pattern_once(tmp_path, make_config, passes):
    """Cut, measured, made smaller, summed up and encoded while it passes."""
    data = np.zeros((4, 8, 32, 32), "u2")
    data[:, :, 12:20, 10:22] = 9
    np.save(tmp_path / "a.npy", data)
    outcome = run(
        make_config(tmp_path / "a.npy", downsample={"factor": 2}, output={"dtype": "float16"})
    )
    assert sum(passes) == 2 * 32  # analysis, and crop
    assert outcome.results["validation"]["min_retention"] == 1.0
    patterns, _ = open_store(tmp_path / "out.zarr")
    assert patterns.dtype == np.float16
    assert float(patterns.max()) == 9.0


def test_a_conversion_with_analysis_reads_each_pattern_once(tmp_path, make_config, passes):
    np.save(tmp_path / "a.npy", numbers(4, 8, 8, 8))
    run(make_config(tmp_path / "a.npy", crop={"enabled": False}, analyze={"ahead": True}))
    assert sum(passes) == 32
    patterns, _ = open_store(tmp_path / "out.zarr")
    np.testing.assert_array_equal(patterns.values, numbers(4, 8, 8, 8))
