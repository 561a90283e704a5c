"""Attributes that tie the axes of HDF5 datasets to scales, as HDF5 writes them and as it must not find them."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import stem_dask as sd
from stem_dask.io.hdf5_scales import first_scale, labels

SHAPE = (2, 3, 4, 5)
TEXT = h5py.string_dtype()
#: each of them ends the process in HDF5's own functions
WRONG: dict[str, tuple[str, Any, Any]] = {
    "numbers as labels": ("DIMENSION_LABELS", np.arange(4) + 12345678, None),
    "texts of one length": ("DIMENSION_LABELS", np.array([b"a" * 80] * 4), None),
    "more labels than axes": ("DIMENSION_LABELS", np.array(["a" * 50] * 400, object), TEXT),
    "a label for four axes": ("DIMENSION_LABELS", np.array(["a"], object), TEXT),
    "one text": ("DIMENSION_LABELS", "kx", TEXT),
    "numbers as scales": ("DIMENSION_LIST", np.arange(4) + 12345678, None),
    "a number for four axes": ("DIMENSION_LIST", np.arange(1), None),
}


@pytest.mark.parametrize("name", ["patterns", "other"])
@pytest.mark.parametrize("what", WRONG)
def test_attributes_that_are_not_as_hdf5_writes_them(tmp_path: Path, what: str, name: str) -> None:
    values = np.arange(120, dtype="u2").reshape(SHAPE)
    attribute, content, dtype = WRONG[what]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset(name, data=values).attrs.create(attribute, content, dtype=dtype)
        told = labels(file[name])
        assert told == (("a" * 80,) * 4 if what == "texts of one length" else ("",) * 4)
        assert [first_scale(file[name], i) for i in range(4)] == [None] * 4
    np.testing.assert_array_equal(sd.open(tmp_path / "a.h5").values, values)


def test_scales_as_hdf5_writes_them(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("scan", SHAPE, "u2")
        assert labels(data) == ("",) * 4
        assert first_scale(data, 3) is None
        for name, size in (("kx", 5), ("other", 5), ("ky", 4)):
            file[name] = np.arange(size) / 10
            file[name].make_scale(name)
        data.dims[3].label = "kx"
        data.dims[3].attach_scale(file["kx"])
        data.dims[3].attach_scale(file["other"])
        data.dims[2].attach_scale(file["ky"])
        assert labels(data) == ("", "", "", "kx")
        found = [first_scale(data, i) for i in range(4)]
        assert [None if scale is None else scale.name for scale in found] == [None, None, "/ky", "/kx"]  # fmt: skip
    axes = sd.open(tmp_path / "a.h5").coords
    np.testing.assert_allclose(axes["ky"].values, np.arange(4) / 10, atol=1e-15)
    np.testing.assert_allclose(axes["kx"].values, np.arange(5) / 10, atol=1e-15)
