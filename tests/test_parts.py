"""Blocks that are read a piece at a time: the same patterns and the same analysis, in little memory."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stem_dask as sd
from stem_dask.core import batches as pieces_module
from stem_dask.core.batches import input_left_out, pieces
from stem_dask.core.errors import SourceError
from stem_dask.job.budget import memory_of
from stem_dask.job.plan import prepare
from stem_dask.job.run import run
from stem_dask.readers.containers import ZarrArray
from stem_dask.readers.flat import FlatFile, FramedFile, Run, buffer_for
from stem_dask.readers.open import find
from stem_dask.readers.source import Source, reading_of
from stem_dask.readers.views import Part, ScanOfList, View, read_block
from stem_dask.stages.analyze import analysis_blocks
from stem_dask.stages.open import block_positions, lazy_blocks

OPTIONS: dict[str, Any] = {
    "center_method": "centroid", "manual_center": None, "radius_metric": "square", "target_retention": 0.9,
    "threshold": 0.0,
}  # fmt: skip


def in_pieces(source: Source) -> bool:
    return reading_of(source).in_pieces


@st.composite
def blocks(draw):
    """A shape, a part of it with steps along the scan and rows of the detector, and bytes of a piece."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=3, max_size=4)))
    part = []
    for i, n in enumerate(shape):
        start = draw(st.integers(0, n - 1))
        step = draw(st.integers(1, 3)) if i < len(shape) - 2 else 1
        part.append(slice(start, draw(st.integers(start + 1, n)), step))
    return shape, tuple(part), draw(st.integers(1, 400))


def views(data, path):
    """Sources of a file in other ways, and the patterns (4, 6, ky, kx) or (24, ky, kx) that they hold."""
    data.tofile(path)
    flat = FlatFile(str(path), 0, data.dtype, (24, 5, 8))
    frames = FramedFile(
        (Run(str(path), 0, 80, 10), Run(str(path), 800, 80, 14)), data.dtype, (5, 8)
    )
    folded = data.reshape(4, 6, 5, 8)
    return {
        "folded": (ScanOfList(flat, (4, 6)), folded),
        "flipped": (View.of(ScanOfList(flat, (4, 6))).flip(-2), folded[..., ::-1, :]),
        "frames": (frames, data),
        "folded frames": (View.of(ScanOfList(frames, (4, 6))).select(*(slice(1, 4, 2), slice(0, 6, 2), slice(None), slice(None))),
                          folded[1::2, ::2]),
        "squeezed": (View.of(FlatFile(str(path), 0, data.dtype, (4, 1, 6, 5, 8))).select(slice(4), 0, slice(6), slice(5), slice(8)), folded),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["folded", "flipped", "frames", "folded frames", "squeezed"])
def test_pieces_of_what_is_seen_in_another_way(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 3 * 80)
    data = np.arange(24 * 5 * 8, dtype="<u2").reshape(24, 5, 8)
    source, expected = views(data, tmp_path / "a.raw")[kind]
    assert in_pieces(source)
    part = (*(slice(1, n) for n in expected.shape[:-2]), slice(1, 4), slice(0, 8))
    found = [piece.copy() for piece in Part(source, part).pieces()]
    assert max(len(piece) for piece in found) <= 5  # three patterns of five rows are five of three
    np.testing.assert_array_equal(np.concatenate(found), expected[part].reshape(-1, 3, 8))


@settings(max_examples=60, deadline=None)
@given(blocks(), st.sampled_from(["u1", ">u2", "<f4"]), st.booleans())
def test_pieces_are_the_patterns_in_their_order(tmp_path_factory, block, dtype, selected):
    shape, part, size = block
    data = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    path = tmp_path_factory.mktemp("parts") / "a.raw"
    data.tofile(path)
    source: Any = FlatFile(str(path), 0, np.dtype(dtype), shape)
    if selected:
        some = tuple(slice(None, None, 2 if i < len(shape) - 2 else 1) for i in range(len(shape)))
        source, data = View.of(source).select(*some), data[some]
    there, expected = Part(source, part), data[part]
    assert (there.shape, there.dtype, there.ndim) == (expected.shape, expected.dtype, data.ndim)
    np.testing.assert_array_equal(np.asarray(there), expected)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pieces_module, "PIECE_BYTES", size)
        found = [piece.copy() for piece in pieces(there)]
        whole = list(pieces(expected))
    assert [len(piece) for piece in found] == [len(piece) for piece in whole]
    assert max((p.nbytes for p in found), default=0) <= max(
        size, int(np.prod(expected.shape[-2:])) * expected.itemsize
    )
    for mine, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert sum(len(piece) for piece in found) == np.prod(expected.shape[:-2])


@pytest.mark.parametrize("dtype", ["u1", "u2", ">i2", "u4", "u8", "f4", "f8", "?"])
@pytest.mark.parametrize("metric", ["square", "circle"])
def test_the_analysis_is_the_same_to_the_last_bit(tmp_path, monkeypatch, dtype, metric):
    """Also where sums depend on the order: floats over sixteen orders of magnitude."""
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 3 * 12 * 10 * np.dtype(dtype).itemsize)
    rng = np.random.default_rng(5)
    data = rng.poisson(2, (3, 7, 12, 10)).astype(dtype)
    if data.dtype.kind == "f":
        data *= 10.0 ** rng.integers(-8, 8, data.shape)
    np.save(tmp_path / "a.npy", data)
    file = find(tmp_path / "a.npy")
    patterns = {
        False: sd.open(tmp_path / "a.npy", chunk_mb=0.001),
        True: lazy_blocks(file, block_positions(file, 0.001)),
    }
    options = {**OPTIONS, "radius_metric": metric}
    found = {}
    for apart in (False, True):
        assert isinstance(patterns[apart].data.blocks[0, 0].compute(), Part) == apart
        outputs = analysis_blocks(patterns[apart], **options)
        found[apart] = {name: array.compute() for name, array in outputs.items()}
    for name, values in found[False].items():
        assert values.tobytes() == found[True][name].tobytes(), name


def test_no_block_is_read_whole(tmp_path, make_config, monkeypatch):
    """Analysis and crop of a run read 64 KiB at a time, and of the detector the rows of the window."""
    data = np.zeros((8, 16, 64, 64), np.uint16)
    data[:, :, 24:40, 20:44] = 9
    np.save(tmp_path / "a.npy", data)
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 2**16)
    read: list[tuple[int, ...]] = []
    whole = FlatFile.read_into

    def noted(self, part, out, file=None):
        read.append(out.shape)
        whole(self, part, out, file)

    monkeypatch.setattr(FlatFile, "read_into", noted)
    plain = {"center_method": "centroid", "ignore_bad_pixels": False}  # reads no sample
    config = make_config(tmp_path / "a.npy", analyze=plain, crop={"margin_pixels": 0})
    results = run(config).results
    assert results["window"]["size"] == [24, 24]
    assert {shape[-2:] for shape in read} == {(64, 64), (24, 64)}
    assert max(2 * int(np.prod(shape)) for shape in read) <= 2**16
    assert sum(2 * int(np.prod(shape)) for shape in read) == data.nbytes * (64 + 24) // 64


def test_what_is_computed_or_decoded_is_read_whole(tmp_path):
    flat = FlatFile("a.raw", 0, np.dtype("u2"), (4, 4, 8, 8))
    assert in_pieces(flat)
    assert in_pieces(View.of(flat).flip(-2).select(*(slice(2),) * 4))
    assert not in_pieces(ZarrArray("a.zarr", "", np.dtype("u2"), (4, 4, 8, 8)))
    assert not in_pieces(View.of(flat).transpose((2, 3, 0, 1)))
    data = np.arange(384, dtype="u2").reshape(2, 3, 8, 8)
    data.tofile(tmp_path / "a.raw")
    flat = FlatFile(str(tmp_path / "a.raw"), 0, data.dtype, data.shape)
    for source in (flat, View.of(flat).transpose((2, 3, 0, 1))):
        region = tuple(slice(0, n) for n in source.shape)
        expected = source[region]
        block = read_block(source, region)
        np.testing.assert_array_equal(
            np.concatenate(list(block.pieces())).ravel(), expected.ravel()
        )
        part = block[:, :, 1:2, 0:2]
        assert isinstance(part, Part)
        np.testing.assert_array_equal(part, expected[..., 1:2, 0:2])
        with input_left_out():
            assert not read_block(source, region).any()


def test_a_file_that_was_cut_since_is_told(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 4, 16, 16), "u2"))
    file_found = find(tmp_path / "a.npy")
    outputs = analysis_blocks(lazy_blocks(file_found, (4, 4)), **OPTIONS)
    with open(tmp_path / "a.npy", "r+b") as file:
        file.truncate(6000)
    with pytest.raises(SourceError, match=r"a\.npy: the file ends at byte 6,000"):
        outputs["total"].compute()


def test_the_projection_knows(tmp_path, make_config):
    """What is read in pieces is never there as a block; what is put in another order is, twice for a moment."""
    np.save(tmp_path / "a.npy", np.ones((8, 8, 8, 8), "u2"))
    order = {"path": str(tmp_path / "a.npy"), "scan_order": "detector_first"}
    plain, turned = make_config(tmp_path / "a.npy"), make_config(tmp_path / "a.npy", input=order)
    mine = memory_of(plain, prepare(plain).found)
    other = memory_of(turned, prepare(turned).found)
    pattern = 8 * 8 * 2
    assert other["analyze"].per_position - mine["analyze"].per_position == 2 * pattern
    assert other["crop"].per_position - mine["crop"].per_position == 2 * pattern


@given(st.integers(0, 2**40), st.lists(st.integers(0, 9), min_size=1, max_size=4))
@pytest.mark.parametrize("dtype", ["u1", ">u2", "f8", "?"])
def test_it_lies_aligned_and_not_a_few_bytes_farther_into_a_page_than_the_data(
    dtype, offset, shape
):
    array = buffer_for(offset, shape, np.dtype(dtype))
    address = array.ctypes.data
    assert (array.shape, array.dtype) == (tuple(shape), np.dtype(dtype))
    assert (array.flags.c_contiguous, array.flags.writeable) == (True, True)
    array[...] = 1  # is all its own
    assert array.sum() == math.prod(shape)
    if array.size:
        assert address % 16 == 0
        assert (address - offset) % 64 >= 32
