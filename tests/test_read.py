"""Opening a file: which words refuse it, how axes, scan and mask are settled, and that nothing is read."""

import pickle
import tracemalloc
import warnings
from math import prod
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from stem_dask.core.errors import SourceError
from stem_dask.readers.open import find
from stem_dask.stages.open import open_patterns

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SHAPE = (4, 5, 6, 7)
SCAN = ("scan_y", "scan_x", "ky", "kx")
LIST = ("pattern", "ky", "kx")
BIG = (1000, 1000, 64, 64)


def numbers(shape=SHAPE, dtype="u2"):
    return np.arange(prod(shape)).reshape(shape).astype(dtype)


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the shared file {name} is not on this machine")
    return path


def same(patterns, array, dims=SCAN):
    assert patterns.dims == dims
    assert patterns.dtype == array.dtype
    np.testing.assert_array_equal(patterns.values, array)


def axis(patterns, dim):
    attrs = patterns[dim].attrs
    return (attrs["scale"], attrs["offset"], attrs["units"])


@pytest.fixture
def npy(tmp_path):
    """Saves an array and gives its path."""

    def save(array, name="a.npy"):
        np.save(tmp_path / name, array, allow_pickle=True)
        return tmp_path / name

    return save


# --- names and places -------------------------------------------------------------------------------------------


def test_wrong_suffix_lists_the_known(tmp_path):
    with pytest.raises(
        SourceError, match=r"extension \.jpg is not known; known are .*\.dm3, \.dm4, .*\.h5"
    ):
        find(tmp_path / "a.jpg")
    for name in ("a", "a.npy", "a.zarr"):
        with pytest.raises(SourceError, match=rf"{name}: there is no such file.*relative to /"):
            find(tmp_path / name)


@pytest.mark.parametrize("suffix", ["dm4", "hspy", "h5", "npy", "pt"])
def test_empty_damaged_and_folder(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.touch()
    with pytest.raises(SourceError, match=r"the file is empty \(0 bytes\)"):
        find(path)
    path.write_bytes(b"this is no such file at all" * 40)
    with pytest.raises(SourceError, match=rf"a\.{suffix}: "):
        find(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(SourceError, match="is a file, this is a folder"):
        find(path)


def test_zarr_is_a_folder(tmp_path):
    (tmp_path / "a.zarr").write_bytes(b"x")
    with pytest.raises(SourceError, match="is a folder, this is a file"):
        find(tmp_path / "a.zarr")
    (tmp_path / "b.zarr").mkdir()
    with pytest.raises(SourceError, match=r"b\.zarr: not a readable zarr store"):
        find(tmp_path / "b.zarr")
    zarr.create_group(tmp_path / "c.zarr")
    with pytest.raises(SourceError, match="holds no array of numbers"):
        find(tmp_path / "c.zarr")


# --- .npy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u2", ">u2", "f4", ">f8", "bool", "i1", "f2"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("shape", "dims"), [(SHAPE, SCAN), (SHAPE[1:], LIST)])
def test_npy(npy, dtype, order, shape, dims):
    array = np.asarray(numbers(shape, dtype), order=order)
    found = find(npy(array))
    assert found.info.shape == found.info.stored_shape == shape
    assert np.dtype(found.info.dtype) == array.dtype
    same(open_patterns(npy(array)), array, dims)


def test_npy_versions(tmp_path):
    for version in ((1, 0), (2, 0), (3, 0)):
        with open(tmp_path / "v.npy", "wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            np.lib.format.write_array(file, numbers(), version)
        same(open_patterns(tmp_path / "v.npy"), numbers())


def test_npy_that_was_cut(npy):
    path = npy(numbers())
    with open(path, "r+b") as file:
        file.truncate(128 + 1000)
    with pytest.raises(
        SourceError, match=r"says 4 x 5 x 6 x 7 uint16, 1,680 bytes, but 1,000 follow"
    ):
        find(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full(SHAPE, None), "holds Python objects, which are never unpickled"),
        (numbers().astype("c8"), r"of type complex64; .*Save the intensity"),
        (numbers().astype("M8[s]"), r"of type datetime64"),
        (np.zeros((4, 5, 6, 7), [("a", "u1")]), r"of type"),
        (numbers((4, 5)), r"no 4D array .* the file holds array: 4 x 5 uint16"),
        (numbers((2, 2, 2, 2, 2)), r"no 4D array .* 2 x 2 x 2 x 2 x 2"),
        (numbers((0, 5, 6, 7)), r"shape 0 x 5 x 6 x 7: it holds nothing"),
    ],
    ids=["object", "complex", "time", "record", "2D", "5D", "nothing"],
)
def test_npy_refused(npy, array, message):
    with pytest.raises(SourceError, match=message):
        find(npy(array))


# --- scan_shape, scan_roi, scan_step, scan_order ----------------------------------------------------------------


def test_scan_shape(npy):
    path = npy(numbers((20, 6, 7)))
    same(open_patterns(path, scan_shape=(4, 5)), numbers())
    with pytest.raises(
        SourceError,
        match=r"20 patterns; input.scan_shape 5 x 5 needs 25; set input.scan_shape: \[4, 5\]",
    ):
        find(path, scan_shape=(5, 5))
    with pytest.raises(
        SourceError,
        match=r"20 patterns; input.scan_shape 5 x 3 needs 15; set input.scan_shape: \[5, 4\], input.drop_columns: 1",
    ):
        find(path, scan_shape=(5, 3))
    for wrong in ((-4, -5), (0, 20), (20, 0)):
        with pytest.raises(SourceError, match="both sizes must be 1 or more"):
            find(path, scan_shape=wrong)
    with pytest.raises(SourceError, match=r"scan_shape is 5 x 4, but the data are a scan of 4 x 5"):
        find(npy(numbers()), scan_shape=(5, 4))
    same(open_patterns(npy(numbers()), scan_shape=(4, 5)), numbers())


def hdf5(path, array, axes=(), name="Experiments/s/data"):
    """A file as HyperSpy lays it out, its axes given as (scale, offset, units)."""
    with h5py.File(path, "w") as file:
        data = file.create_dataset(name, data=array)
        for i, (scale, offset, units) in enumerate(axes):
            attrs = {"name": f"a{i}", "scale": scale, "offset": offset, "units": units}
            data.parent.create_group(f"axis-{i}").attrs.update(attrs)
    return path


def test_roi_and_step_move_the_axes(tmp_path):
    axes = [(0.5, 10, "nm"), (0.25, -1, "um"), (2, -6, "1/nm"), (2, -7, "1/nm")]
    path = hdf5(tmp_path / "a.hspy", numbers(), axes)
    patterns = open_patterns(path, scan_roi=[1, 4, 2, 5], scan_step=2)
    same(patterns, numbers()[1:4:2, 2:5:2])
    assert axis(patterns, "scan_y") == (1.0, 10.5, "nm")
    assert axis(patterns, "scan_x") == (0.5, -0.5, "um")
    assert axis(patterns, "ky") == (2.0, -6.0, "1/nm")
    assert patterns.scan_y.values.tolist() == [10.5, 11.5]
    assert patterns.scan_x.values.tolist() == [-0.5, 0.0]
    stepped = open_patterns(path, scan_step=3)
    same(stepped, numbers()[::3, ::3])
    assert stepped.scan_y.values.tolist() == [10.0, 11.5]


@pytest.mark.parametrize(
    ("roi", "step", "message"),
    [
        ([0, 5, 0, 5], 1, r"\[0, 5, 0, 5\] does not fit the scan of 4 x 5"),
        ([0, 4, 0, 6], 1, r"does not fit"),
        ([-1, 4, 0, 5], 1, r"does not fit"),
        ([2, 2, 0, 5], 1, r"does not fit"),
        ([0, 4], 1, r"scan_roi \[0, 4\] has 2 numbers; give \[y0, y1, x0, x1\]"),
        (None, -2, r"scan_step is -2"),
    ],
)
def test_a_region_that_does_not_fit(npy, roi, step, message):
    with pytest.raises(SourceError, match=message):
        find(npy(numbers()), scan_roi=roi, scan_step=step)
    with pytest.raises(SourceError, match=r"a list of 20 patterns: give input\.scan_shape"):
        find(npy(numbers((20, 6, 7))), scan_roi=roi, scan_step=step)


def test_detector_first(tmp_path):
    axes = [(2, -6, "1/nm"), (3, -7, "1/nm"), (0.5, 10, "nm"), (0.25, -1, "nm")]
    array = numbers()
    path = hdf5(tmp_path / "a.hspy", array.transpose(2, 3, 0, 1), axes)
    patterns = open_patterns(path, scan_order="detector_first", scan_roi=[0, 2, 0, 5])
    same(patterns, array[:2])
    assert axis(patterns, "scan_y") == (0.5, 10.0, "nm")
    assert axis(patterns, "kx") == (3.0, -7.0, "1/nm")
    assert "detector's axes come first" in patterns.attrs["notes"][0]
    same(open_patterns(path, scan_order="scan_first"), array.transpose(2, 3, 0, 1))


# --- Gatan files and files that hold no patterns ----------------------------------------------------------------


def test_dm4():
    path = shared("sim/au_np_gms_stemx_u16.dm4")
    digitalmicrograph = pytest.importorskip("rsciio.digitalmicrograph")
    theirs = next(s for s in digitalmicrograph.file_reader(str(path)) if s["data"].ndim == 4)
    patterns = open_patterns(path)
    same(patterns, theirs["data"])
    assert (patterns.shape, int(patterns.sum())) == ((9, 7, 76, 60), 1118720)
    for dim, their in zip(SCAN, theirs["axes"], strict=True):
        ours = axis(patterns, dim)
        assert ours == (
            pytest.approx(their["scale"]),
            pytest.approx(their["offset"]),
            their["units"],
        )
    assert "took image" in patterns.attrs["notes"][0]


@pytest.mark.parametrize("name", ["dm3_2d_diffraction.dm3", "hspy_v3.1_2d.hspy"])
def test_one_pattern_is_not_a_scan(name):
    with pytest.raises(SourceError, match=r"no 4D array \(scan_y, scan_x, ky, kx\) and no stack"):
        find(shared(f"real/{name}"))


def test_a_stack_in_dm4_needs_its_scan():
    path = shared("real/dm4_3d_int16_64_65_66.dm4")
    with pytest.raises(
        SourceError, match="a stack of 66 patterns of 65 x 64 pixels; give its scan"
    ):
        find(path)
    assert open_patterns(path, scan_shape=(6, 11)).shape == (6, 11, 65, 64)


# --- lazy -------------------------------------------------------------------------------------------------------


def test_indexing_like_numpy(npy):
    array = numbers()
    for patterns in (
        open_patterns(npy(array), chunk_mb=0.0002),
        open_patterns(npy(array.reshape(20, 6, 7), "b.npy"), scan_shape=(4, 5), chunk_mb=0.0002),
    ):
        assert patterns.data.numblocks[:2] == (4, 3)
        for key in (
            (2, 3), (-1, -2), (slice(None, None, -1), slice(4, 1, -2)), (slice(1, 3), 0, slice(2, 5)),
            ([0, 3, 3],), (slice(0, 0), slice(1, 2)), (Ellipsis, 0), (1, slice(None), -1, slice(None, None, 3)),
        ):  # fmt: skip
            np.testing.assert_array_equal(patterns[key].compute().values, array[key])
        chosen = patterns.data.vindex[[0, 3], [1, 4]].compute()
        np.testing.assert_array_equal(chosen, array[[0, 3], [1, 4]])


def test_the_same_file_gives_the_same_graph(npy):
    path = npy(numbers())
    assert open_patterns(path).data.name == open_patterns(path).data.name
    assert open_patterns(path).data.name != open_patterns(path, scan_step=2).data.name


def test_opening_takes_no_memory(tmp_path):
    """8 GB of holes: opened, and one pattern of them read, in well under one block of memory."""
    path = tmp_path / "big.npy"
    header = {"descr": "<u2", "fortran_order": False, "shape": BIG}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + prod(BIG) * 2)
    tracemalloc.start()
    try:
        patterns = open_patterns(path)
        assert patterns.nbytes == 8_192_000_000
        assert not patterns[999, 999].compute().any()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    assert len(pickle.dumps(patterns.data.dask)) < 1e6
