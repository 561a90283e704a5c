"""The names of axes in a file decide which of them are the scan."""

import h5py
import numpy as np
import pytest
import zarr
from frames_made import agrees, numbers

from stem_dask.readers.layout import order_by
from stem_dask.readers.open import find

TRUTH = numbers((3, 4, 6, 5))
#: names of scan_y, scan_x, ky, kx in the words of many programs
WORDS = [
    ("scan_y", "scan_x", "ky", "kx"), ("y", "x", "ky", "kx"), ("ry", "rx", "qy", "qx"), ("Ry", "Rx", "Qy", "Qx"),
    ("R_Ny", "R_Nx", "Q_Ny", "Q_Nx"), ("y", "x", "dy", "dx"), ("sy", "sx", "det_y", "det_x"), ("y", "x", "v", "u"),
    ("probe y", "probe x", "k_y", "k_x"), ("pos_y", "pos_x", "detector_y", "detector_x"),
    ("y_scan", "x_scan", "y_det", "x_det"), ("scan_row", "scan_col", "dif_y", "dif_x"),
]  # fmt: skip


def zarr3(folder, array, names):
    zarr.open_group(folder / "a.zarr", mode="w").create_array(
        "data", data=array, chunks=array.shape, dimension_names=list(names)
    )
    return folder / "a.zarr"


def zarr2(folder, array, names):
    group = zarr.open_group(folder / "a.zarr", mode="w", zarr_format=2)
    group.create_array("data", data=array, chunks=array.shape)
    group["data"].attrs["_ARRAY_DIMENSIONS"] = list(names)
    return folder / "a.zarr"


def hdf5_labels(folder, array, names):
    with h5py.File(folder / "a.h5", "w") as file:
        data = file.create_dataset("data", data=array)
        for dim, name in zip(data.dims, names, strict=True):
            dim.label = name
    return folder / "a.h5"


def hdf5_scales(folder, array, names):
    with h5py.File(folder / "a.h5", "w") as file:
        data = file.create_dataset("data", data=array)
        for dim, name in zip(data.dims, names, strict=True):
            file[f"of/{name}"] = np.arange(len(dim[0]) if len(dim) else data.shape[names.index(name)])  # fmt: skip
            file[f"of/{name}"].make_scale(name)
            dim.attach_scale(file[f"of/{name}"])
    return folder / "a.h5"


def nexus(folder, array, names):
    with h5py.File(folder / "a.h5", "w") as file:
        group = file.create_group("entry/data")
        group["data"] = array
        group.attrs["axes"] = list(names)
    return folder / "a.h5"


@pytest.mark.parametrize("write", [zarr3, zarr2, hdf5_labels, hdf5_scales, nexus])
@pytest.mark.parametrize("words", WORDS, ids=lambda words: "-".join(words))
def test_the_detector_first_by_its_names(tmp_path, write, words):
    """With no units, and whatever the program calls the axes."""
    names = (*words[2:], *words[:2])
    found = find(write(tmp_path, TRUTH.transpose(2, 3, 0, 1).copy(), names))
    agrees(found, TRUTH)
    assert [axis.name for axis in found.info.axes] == ["scan_y", "scan_x", "ky", "kx"]
    assert any("the detector's axes come first in the file" in note for note in found.info.notes)


@pytest.mark.parametrize("words", WORDS, ids=lambda words: "-".join(words))
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 3, 1), (0, 1, 3, 2), (1, 0, 2, 3)])  # fmt: skip
def test_any_order_by_names(tmp_path, words, order):
    """One pair of y before x shows that the file means its names; the other is turned, too."""
    found = find(zarr3(tmp_path, TRUTH.transpose(order).copy(), [words[i] for i in order]))
    agrees(found, TRUTH)
    assert any("put in order" in note for note in found.info.notes) == (order != (0, 1, 2, 3))


@pytest.mark.parametrize("names", [("x", "y", "kx", "ky"), ("Rx", "Ry", "Qx", "Qy"), ("R_Nx", "R_Ny", "Q_Nx", "Q_Ny")])  # fmt: skip
def test_x_before_y_is_noted(tmp_path, names):
    """py4DSTEM and Prismatic call the slower axis x: the order of the file stays."""
    found = find(zarr3(tmp_path, TRUTH, names))
    agrees(found, TRUTH)
    assert any(f"the slower axis ({names[0]} and {names[2]}) is read as y" in note for note in found.info.notes)  # fmt: skip
    found = find(zarr3(tmp_path, TRUTH.transpose(2, 3, 0, 1).copy(), (*names[2:], *names[:2])))
    agrees(found, TRUTH)
    notes = "; ".join(found.info.notes)
    assert "the detector's axes come first" in notes
    assert "is read as y" in notes


def test_names_decide_before_units(tmp_path):
    """Of the two, names are the clearer word."""
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    names = ("qy", "qx", "ry", "rx")
    array = TRUTH.transpose(2, 3, 0, 1).copy()
    group.create_array("data", data=array, chunks=array.shape, dimension_names=names)
    for name, n in zip(names, array.shape, strict=True):
        group.create_array(name, data=np.arange(n) * 0.5, chunks=(n,), dimension_names=[name])
        group[name].attrs["units"] = "nm"
    found = find(tmp_path / "a.zarr")
    agrees(found, TRUTH)
    assert [axis.scale for axis in found.info.axes] == [0.5] * 4


def test_what_the_user_says_goes_before_names(tmp_path):
    array = TRUTH.transpose(2, 3, 0, 1).copy()
    path = zarr3(tmp_path, array, ("ky", "kx", "y", "x"))
    agrees(find(path, scan_order="scan_first"), array)
    agrees(find(path, scan_order="detector_first"), TRUTH)


@pytest.mark.parametrize(
    ("names", "noted"),
    [
        (("a", "b", "c", "d"), True),
        (("time", "y", "depth", "kx"), True),
        (("y", "y", "y", "y"), True),
        (("axis0", "axis1", "axis2", "axis3"), False),
        (("dim_0", "dim_1", "dim_2", "dim_3"), False),
        (("rows", "columns", "ky", "kx"), False),
    ],
)
def test_names_that_are_not_recognised(tmp_path, names, noted):
    found = find(zarr3(tmp_path, TRUTH, names))
    agrees(found, TRUTH)
    listed = ", ".join(names)
    assert (f"the axis names {listed} are not recognised and were ignored" in found.info.notes) == noted  # fmt: skip


def test_one_pair_of_names_tells_where_the_other_is(tmp_path):
    found = find(zarr3(tmp_path, TRUTH.transpose(2, 3, 0, 1).copy(), ("qy", "qx", "line", "point")))
    agrees(found, TRUTH)


def test_a_list_of_patterns_by_its_names(tmp_path):
    array = numbers((7, 6, 5))
    for names, order in ((("qy", "qx", "n"), (1, 2, 0)), (("ky", "n", "kx"), (1, 0, 2))):
        found = find(zarr3(tmp_path, array.transpose(order).copy(), names))
        agrees(found, array)
    agrees(find(zarr3(tmp_path, array, ("frame", "y", "x"))), array)


def test_the_names_of_our_own_axes():
    assert order_by(("scan_x", "scan_y", "kx", "ky")) == (
        (1, 0, 3, 2),
        "the axes of the file are scan_x, scan_y, kx, ky; they are put in order",
    )
