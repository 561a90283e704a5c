"""Arrays in files, read in parts: every part equals the same part of the array in memory."""

import os
import pickle
from math import prod
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from strategies import forward_slices

from stem_dask.core.errors import SourceError
from stem_dask.readers.containers import Hdf5Dataset, ZarrArray
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.source import identity
from stem_dask.readers.views import ScanOfList, View

SHAPE = (4, 5, 6, 7)
WHOLE = slice(None)
DRAWN = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def numbers(shape=SHAPE, dtype="<u2"):
    """Every element another value, as far as the type allows."""
    return (np.arange(prod(shape)) % 251).reshape(shape).astype(dtype)


class Memory(SimpleNamespace):
    """A source that notes what was asked of it."""

    def __init__(self, array):
        super().__init__(array=array, shape=array.shape, dtype=array.dtype, asked=[])

    def __getitem__(self, part):
        assert all(isinstance(s, slice) and (s.step or 1) > 0 for s in part)
        self.asked.append(part)
        return np.array(self.array[part], order="C")


def flat_file(folder, array, offset=0):
    path = folder / "flat.bin"
    path.write_bytes(b"\xa5" * offset + array.tobytes())
    return FlatFile(str(path), offset, array.dtype, array.shape)


def same(got, expected):
    assert got.shape == expected.shape
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)


# --- flat files -------------------------------------------------------------------------------------------------


@given(part=forward_slices(SHAPE))
@example(part=(slice(None), slice(None), slice(1, 3), slice(2, 5)))
@example(part=(slice(None), slice(None), slice(2, 3), slice(None)))
@example(part=(slice(1, 2), slice(1, 4), slice(None), slice(None)))
@example(part=(slice(3, 1), slice(None), slice(None), slice(None)))
@DRAWN
def test_flat_file_parts(tmp_path, part):
    array = numbers(dtype=">u2")
    same(flat_file(tmp_path, array, 13)[part], array[part])


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple),
    dtype=st.sampled_from(["<u2", ">u2", ">f4", "|u1", "|b1", "<f8"]),
    offset=st.sampled_from([0, 1, 4099]),
    data=st.data(),
)
@DRAWN
def test_flat_file_of_any_rank_and_axes_of_one(tmp_path, shape, dtype, offset, data):
    array = numbers(shape, dtype)
    part = data.draw(forward_slices(shape))
    got = flat_file(tmp_path, array, offset)[part]
    assert got.dtype == array.dtype
    same(got, array[part])


def test_flat_file_needs_only_what_it_reads(tmp_path):
    """The bytes behind the part may be missing: a preview of a file that is still being written."""
    array = numbers()
    source = flat_file(tmp_path, array)
    with open(source.path, "r+b") as file:
        file.truncate(array[:2].nbytes)
    same(source[(slice(0, 2), *(slice(None),) * 3)], array[:2])
    with pytest.raises(
        SourceError, match=r"ends at byte 840, in the middle of the data, which need 1,260"
    ):
        source[(slice(0, 3), *(slice(None),) * 3)]


@pytest.mark.parametrize(
    "part",
    [
        (slice(None),) * 4,
        (slice(3, 4), slice(0, 5, 2), slice(None), slice(None)),
        (slice(None), slice(None), slice(1, 3), slice(2, 5)),
    ],
    ids=["run", "stepped", "detector first"],
)
def test_short_file_names_the_bytes(tmp_path, part):
    source = flat_file(tmp_path, numbers())
    with open(source.path, "r+b") as file:
        file.truncate(1501)
    with pytest.raises(
        SourceError, match=r"ends at byte 1,501.* need 1,(680|512|596) bytes; it was"
    ):
        source[part]


def test_a_file_that_is_cut_after_its_size_was_looked_at(tmp_path, monkeypatch):
    """It is mapped then, which Python refuses in words of its own."""
    path = tmp_path / "a.raw"
    np.zeros((4, 5, 6, 7), "u2").tofile(path)
    flat = FlatFile(str(path), 0, np.dtype("u2"), (4, 5, 6, 7))
    seen = os.fstat

    def fstat(number):
        status = seen(number)
        os.truncate(path, 100)
        return status

    monkeypatch.setattr("stem_dask.readers.flat.os.fstat", fstat)
    with pytest.raises(SourceError, match="the file ends at byte 100, in the middle of the data"):
        flat[(slice(4), slice(5), slice(1, 3), slice(2, 4))]


def test_missing_file_is_named(tmp_path):
    source = FlatFile(str(tmp_path / "gone.bin"), 0, np.dtype("u1"), (2, 2))
    with pytest.raises(FileNotFoundError, match=r"gone\.bin"):
        source[(slice(None), slice(None))]


def test_identity_tells_states_apart(tmp_path):
    source = flat_file(tmp_path, numbers())
    before = identity(source.path)
    assert before == identity(source.path)
    assert before[:2] == (source.path, 1680)
    with open(source.path, "ab") as file:
        file.write(b"x")
    assert identity(source.path) != before
    store = tmp_path / "a.zarr"
    zarr.create_array(store, shape=(2, 2), dtype="u1")
    assert identity(str(store))[1] == (store / "zarr.json").stat().st_size


# --- HDF5 and zarr ----------------------------------------------------------------------------------------------


@given(part=forward_slices(SHAPE))
@settings(DRAWN, max_examples=25)
def test_hdf5_and_zarr_parts(tmp_path, part):
    array = numbers()
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w") as file:
        file.create_dataset("g/data", data=array, chunks=(2, 2, 6, 7), compression="gzip")
    same(Hdf5Dataset(path, "g/data", array.dtype, SHAPE)[part], array[part])
    for version in (2, 3):
        path = str(tmp_path / f"{version}.zarr")
        zarr.create_array(
            path,
            name="g/data",
            data=array,
            chunks=(2, 2, 6, 7),
            zarr_format=version,
            overwrite=True,
        )
        same(ZarrArray(path, "g/data", array.dtype, SHAPE)[part], array[part])


def test_zarr_in_fortran_order_comes_out_in_c_order(tmp_path):
    array = numbers()
    path = str(tmp_path / "f.zarr")
    zarr.create_array(path, data=array, chunks=(2, 5, 6, 7), zarr_format=2, order="F")
    same(ZarrArray(path, "", array.dtype, SHAPE)[(slice(None),) * 4], array)


def test_damaged_hdf5_is_a_source_error(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(b"not HDF5 at all")
    with pytest.raises(SourceError, match=r"dataset data cannot be read"):
        Hdf5Dataset(str(path), "data", np.dtype("u2"), (2, 2))[(slice(None), slice(None))]


# --- views of sources -------------------------------------------------------------------------------------------


@given(part=forward_slices(SHAPE))
@example(part=(slice(0, 0), slice(1, 3), slice(None), slice(None)))
@example(part=(slice(2, 2), slice(None), slice(None), slice(None)))
@DRAWN
def test_scan_of_list(part):
    array = numbers(dtype=">u2")
    source = ScanOfList(Memory(array.reshape(20, 6, 7)), (4, 5))
    assert source.shape == SHAPE
    same(source[part], array[part])


@given(data=st.data())
@DRAWN
def test_a_chain_of_views_is_what_numpy_makes(data):
    """Transposed, flipped, selected and squeezed in any order."""
    expected = numbers((4, 1, 3, 5, 1))
    view = View.of(Memory(expected))
    for kind in data.draw(st.lists(st.sampled_from("tfss"), max_size=5)):
        if not (n := expected.ndim):
            break
        if kind == "t":
            order = data.draw(st.permutations(range(n)))
            view, expected = view.transpose(order), expected.transpose(order)
        elif kind == "f":
            axis = data.draw(st.integers(-n, n - 1))
            view, expected = view.flip(axis), np.flip(expected, axis)
        elif kind == "s":
            steps = st.integers(-3, 3).filter(bool).map(lambda step: slice(None, None, step))
            parts = tuple(data.draw(st.integers(0, m - 1) | steps) for m in expected.shape)
            view, expected = view.select(*parts), expected[parts]
    assert (view.shape, view.dtype) == (expected.shape, expected.dtype)
    part = data.draw(forward_slices(expected.shape))
    same(view[part], np.asarray(expected)[part])


def test_sources_travel_to_workers(tmp_path):
    """Nested as deep as they come, pickled in a few hundred bytes."""
    array = numbers()
    flat = flat_file(tmp_path, array.reshape(20, 6, 7), 5)
    source = View.of(ScanOfList(flat, (4, 5))).select(slice(1, 4, 2), slice(0, 5, 2), WHOLE, WHOLE)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert source == pickle.loads(sent)
    whole = (slice(None),) * 4
    np.testing.assert_array_equal(pickle.loads(sent)[whole], array[1:4:2, ::2])


# --- scan_roi and scan_step -------------------------------------------------------------------------------------
