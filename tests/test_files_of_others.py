"""What files of other programs showed that ours did not: damage, single images, spectra, signs, archives."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
import xarray as xr
from frames_made import SHAPE, info, mrc, numbers, tiff

from stem_dask.core.errors import SourceError
from stem_dask.readers.open import find

ALL = (slice(None),) * 4


def with_texts(path):
    """A file whose axes have texts of variable length as units, as py4DSTEM and emdfile write them."""
    with h5py.File(path, "w") as file:
        group = file.create_group("cube")
        group["data"] = numbers()
        for i, size in enumerate(SHAPE):
            group[f"dim{i}"] = np.arange(size) * 0.5
            group[f"dim{i}"].attrs["units"] = "A^-1"
            group[f"dim{i}"].attrs["name"] = f"axis {i}"
    return path


@pytest.mark.parametrize("zeros", [(16, 32), (64, 128), (16, 1024)], ids=str)
@pytest.mark.parametrize("ending", ["h5", "emd"])
def test_a_block_of_zeros_among_the_texts_of_hdf5_is_told(tmp_path, zeros, ending):
    path = with_texts(tmp_path / f"a.{ending}")
    found = find(path)
    assert [axis.units for axis in found.info.axes] == ["A^-1"] * 4
    np.testing.assert_array_equal(found.source[ALL], numbers())
    content = bytearray(path.read_bytes())
    heap = content.find(b"GCOL")
    assert heap > 0
    content[heap + zeros[0] : heap + zeros[1]] = bytes(zeros[1] - zeros[0])
    path.write_bytes(content)
    # in a process of its own: HDF5 would walk on the spot, and no signal reaches Python then
    command = [sys.executable, "-m", "stem_dask.cli.main", "info", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3, done.stderr
    assert f"texts at byte {heap:,} have no end" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# --- what is no scan of patterns ----------------------------------------------------------------------------------


def test_a_single_image_is_called_one(tmp_path):
    path = tiff(tmp_path / "a.tif", numbers((1, 6, 5)))
    with pytest.raises(SourceError, match=r"is a single image of 6 x 5 pixels, no scan of patt.*\[1, 1\]"):  # fmt: skip
        find(path)
    assert find(path, scan_shape=(1, 1)).source.shape == (1, 1, 6, 5)


def spectra(path, shape, units="", flags=()):
    """A signal as HyperSpy writes it."""
    with h5py.File(path, "w") as file:
        signal = file.create_group("Experiments/a")
        signal["data"] = numbers(shape)
        for i, (size, flag) in enumerate(zip(shape, flags, strict=True)):
            axis = signal.create_group(f"axis-{i}")
            axis.attrs.update({"scale": 1.0, "offset": 0.0, "size": size, "navigate": flag})
            axis.attrs["units"] = units if i == len(shape) - 1 else "nm"
    return path


@pytest.mark.parametrize(
    ("units", "flags", "message"),
    [
        ("eV", (True, True, False), r"in eV, as of spectra, which are no patterns"),
        ("", (True, True, False), r"calls 2 of the 3 axes navigation, as of a map of spectra"),
        ("", (True, False, False), r"input\.scan_shape: \[scan_y, scan_x\] \(3 x 3 would fit\)"),
    ],
)
def test_spectra_are_called_spectra(tmp_path, units, flags, message):
    with pytest.raises(SourceError, match=message):
        find(spectra(tmp_path / "a.hspy", (9, 6, 20), units, flags))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n", "git lfs pull"),
        ("/annex/objects/SHA256E-s9--0a.dm4\n", "git annex get"),
        ("\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page, not the file"),
        ("<HTML><head></head></HTML>", "a web page, not the file"),
    ],
)
@pytest.mark.parametrize("ending", [".dm4", ".hspy", ".npy", ".pt", ".raw", ".tif", ".mib"])
def test_what_lies_in_place_of_a_file(tmp_path, ending, text, message):
    path = tmp_path / f"a{ending}"
    path.write_text(text)
    with pytest.raises(SourceError, match=message):
        find(path)


# --- .mrc ---------------------------------------------------------------------------------------------------------


def bytes_of_mrc(path, array, least, most, version):
    at = {"x76": ("f", least), "x80": ("f", most), "x108": ("I", version)}
    return mrc(path, array, 0, **at)


@pytest.mark.parametrize("order", "<>")
def test_bytes_of_mrc_below_zero_are_signed(tmp_path, order):
    array = numbers((12, 6, 5), "i1") - 64
    at = {"x76": ("f", -64), "x80": ("f", 63), "x108": ("I", 20141)}
    found = find(mrc(tmp_path / "a.mrc", array, 0, order, **at), scan_shape=(3, 4))
    assert found.source.dtype == "i1"
    np.testing.assert_array_equal(found.source[ALL], array.reshape(SHAPE))


@pytest.mark.parametrize(
    ("least", "most", "version", "noted"),
    [(0, 250, 20140, 0), (0, -1, 20140, 1), (0, -1, 0, 0), (-1000, 5, 20140, 1), (np.nan, 3, 20141, 1)],
)  # fmt: skip
def test_bytes_of_mrc_are_counts(tmp_path, least, most, version, noted):
    array = numbers((12, 6, 5), "u1")
    found = find(bytes_of_mrc(tmp_path / "a.mrc", array, least, most, version), scan_shape=(3, 4))
    np.testing.assert_array_equal(found.source[ALL], array.reshape(SHAPE))
    assert sum("counts of 0 to 255" in note for note in found.info.notes) == noted


@pytest.mark.parametrize("ours", [True, False], ids=["region", "whole"])
def test_a_path_that_is_no_raster_is_never_folded(tmp_path, ours):
    """Direct Electron states the path of a region by itself; as many positions as a raster has may be at random."""
    path = mrc(tmp_path / "a.mrc", numbers((12, 6, 5)))
    changes = {"Scan - ROI Size X": 4, "Scan - ROI Size Y": 3, "Scan - ROI Type": "Random",
               "Scan - ROI Enable": "Enable" if ours else "Disable"}  # fmt: skip
    info(path, "a_info.txt", **changes)
    if not ours:
        assert find(path).source.shape == SHAPE
        return
    with pytest.raises(SourceError, match=r"states a scan of the type Random, not row by row"):
        find(path)
    assert find(path, scan_shape=(2, 6)).source.shape == (2, 6, 6, 5)


# --- arrays with names and attributes -----------------------------------------------------------------------------


def labelled(dims):
    array = xr.DataArray(numbers(), dims=("scan_y", "scan_x", "ky", "kx"), name="patterns")
    array = array.assign_coords(ky=np.arange(6) * 0.1 - 0.3, kx=np.arange(5) * 0.2)
    return array.transpose(*dims).to_dataset()


OURS = ["kx ky scan_x scan_y", "scan_x scan_y kx ky", "scan_y scan_x kx ky", "ky kx scan_y scan_x", "scan_y scan_x ky kx"]  # fmt: skip


@pytest.mark.parametrize("dims", [one.split() for one in OURS], ids=OURS)
def test_axes_that_bear_our_names_are_put_in_order(tmp_path, dims):
    labelled(dims).to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
    found = find(tmp_path / "a.zarr")
    np.testing.assert_array_equal(found.source[ALL], numbers())
    assert [axis.scale for axis in found.info.axes[2:]] == pytest.approx([0.1, 0.2])
    part = (slice(1, 3), slice(0, 4, 2), slice(2, 5), slice(1, 2))
    np.testing.assert_array_equal(found.source[part], numbers()[part])
    # the user's word is the last
    as_it_is = find(tmp_path / "a.zarr", scan_order="scan_first")
    assert as_it_is.source.shape == labelled(dims)["patterns"].shape


def test_a_list_that_bears_our_names_is_put_in_order(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = numbers((12, 6, 5)).transpose(2, 1, 0)
        for i, name in enumerate(("kx", "ky", "pattern")):
            file[name] = np.arange(file["data"].shape[i]) * 1.0
            file[name].make_scale(name)
            file["data"].dims[i].attach_scale(file[name])
    found = find(tmp_path / "a.h5", scan_shape=(3, 4))
    np.testing.assert_array_equal(found.source[ALL], numbers())


@pytest.mark.parametrize("packing", [{"scale_factor": 0.5, "add_offset": 10.0}, {"add_offset": 1}])
@pytest.mark.parametrize("form", [2, 3, "h5"])
def test_packed_numbers_are_no_counts(tmp_path, packing, form):
    """What xarray and netCDF write with a scale and an offset was read without them."""
    path = tmp_path / ("a.h5" if form == "h5" else "a.zarr")
    data = labelled(("scan_y", "scan_x", "ky", "kx")).astype("f4")
    if form == "h5":
        with h5py.File(path, "w") as file:
            file["data"] = numbers()
            file["data"].attrs.update(packing)
    else:
        encoding = {"patterns": {"dtype": "int16", "_FillValue": -99, **packing}}
        data.to_zarr(path, encoding=encoding, zarr_format=form, consolidated=False)
    with pytest.raises(SourceError, match=r"are packed, value = .* save the values"):
        find(path)
    if form == "h5":
        return
    # the way out is one
    opened = xr.open_zarr(path, consolidated=False).drop_encoding()
    opened.to_zarr(tmp_path / "b.zarr", consolidated=False)
    np.testing.assert_array_equal(find(tmp_path / "b.zarr").source[ALL], numbers().astype("f4"))


def test_a_scale_of_one_is_no_packing(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = numbers()
        file["data"].attrs.update({"scale_factor": 1.0, "add_offset": np.zeros(1)})
    np.testing.assert_array_equal(find(tmp_path / "a.h5").source[ALL], numbers())


def test_what_was_never_written_is_noted(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", SHAPE, "u2", fillvalue=3)
    assert "nothing of it was ever written; it reads as 3" in find(tmp_path / "a.h5").info.notes


@pytest.mark.parametrize(
    ("length", "reciprocal"),
    [("nm", "1/nm"), ("Å", "Å⁻¹"), ("µm", "$A^{-1}$"), ("μm", "nm^-1"), ("Angstrom", "µrad"), ("\u212b", "1 / Å")],
)  # fmt: skip
def test_units_tell_a_detector_that_comes_first(tmp_path, length, reciprocal):
    """However they are written: a unit that was not understood left scan and detector mixed up."""
    array = numbers()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = array.transpose(2, 3, 0, 1)
        for i, size in enumerate(file["data"].shape):
            file[f"dim{i}"] = np.arange(size) * 0.5
            file[f"dim{i}"].attrs["units"] = reciprocal if i < 2 else length
    found = find(tmp_path / "a.h5")
    np.testing.assert_array_equal(found.source[ALL], array)
    assert any("the detector's axes come first" in note for note in found.info.notes)


def test_a_file_of_many_images(tmp_path):
    """One dataset per pattern, as scripts write them."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for i in range(50):
            file[f"group/{i}"] = numbers((6, 5))
    with pytest.raises(SourceError, match=r"no 4D array .* group/0: 6 x 5 uint16; .* and 38 more"):
        find(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["cube"] = numbers()
    np.testing.assert_array_equal(find(tmp_path / "a.h5").source[ALL], numbers())
