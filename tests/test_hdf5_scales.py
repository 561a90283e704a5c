"""Attributes that tie the axes of HDF5 datasets to scales, as HDF5 writes them and as it must not find them."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import stem_dask as sd
from stem_dask.core.errors import SourceError
from stem_dask.readers.hdf5_metadata import first_scale, names_of

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
        told = names_of(file[name])
        assert told == (("a" * 80,) * 4 if what == "texts of one length" else ("",) * 4)
        assert [first_scale(file[name], i) for i in range(4)] == [None] * 4
    np.testing.assert_array_equal(sd.open(tmp_path / "a.h5").values, values)


def test_scales_as_hdf5_writes_them(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("scan", SHAPE, "u2")
        assert names_of(data) == ("",) * 4
        assert first_scale(data, 3) is None
        for name, size in (("kx", 5), ("other", 5), ("ky", 4)):
            file[name] = np.arange(size) / 10
            file[name].make_scale(name)
        data.dims[3].label = "kx"
        data.dims[3].attach_scale(file["kx"])
        data.dims[3].attach_scale(file["other"])
        data.dims[2].attach_scale(file["ky"])
        assert names_of(data) == ("", "", "", "kx")
        found = [first_scale(data, i) for i in range(4)]
        assert [None if scale is None else scale.name for scale in found] == [None, None, "/ky", "/kx"]  # fmt: skip
    axes = sd.open(tmp_path / "a.h5").coords
    np.testing.assert_allclose(axes["ky"].values, np.arange(4) / 10, atol=1e-15)
    np.testing.assert_allclose(axes["kx"].values, np.arange(5) / 10, atol=1e-15)


def forged(item: Any, name: str, shape: tuple[int, ...] = (4,)) -> None:
    """An attribute or dataset whose bytes h5py takes for addresses of Python objects."""
    kind = h5py.h5t.create(h5py.h5t.OPAQUE, 8)
    kind.set_tag(b"NUMPY:|O")
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    content = np.full(shape, 0x4141414141, "u8").view("V8")
    if isinstance(item, h5py.AttributeManager):
        made = h5py.h5a.create(item._id, name.encode(), kind, space)
        made.write(content, mtype=kind)
    else:
        made = h5py.h5d.create(item.id, name.encode(), kind, space)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, content, mtype=kind)


@pytest.mark.parametrize("labelled", [False, True])
def test_addresses_of_objects_are_not_followed(tmp_path: Path, labelled: bool) -> None:
    """Each of them would end the process, or run what lies at the address."""
    values = np.arange(120, dtype="u2").reshape(SHAPE)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("patterns", data=values)
        for item in (file, data):
            forged(item.attrs, "title")
        forged(file, "Version", (1,))
        if labelled:
            for name in ("DIMENSION_LABELS", "DIMENSION_LIST"):
                forged(data.attrs, name)
        else:
            file["dim1"] = np.arange(2.0)
            forged(file["dim1"].attrs, "name", ())
    np.testing.assert_array_equal(sd.open(tmp_path / "a.h5").values, values)
    with h5py.File(tmp_path / "a.hspy", "w") as file:
        signal = file.create_group("Experiments/s")
        signal["data"] = values
        for group in ("original_metadata", "metadata/General"):
            signal.create_group(group)
            forged(signal[group], "thing")
            forged(signal[group].attrs, "title", ())
    found = sd.open(tmp_path / "a.hspy")
    np.testing.assert_array_equal(found.values, values)
    assert "Python objects, which are never read" in str(found.attrs["original_metadata"])
    with h5py.File(tmp_path / "b.h5", "w") as file:
        forged(file, "patterns", SHAPE)
    with pytest.raises(SourceError, match="which are no numbers"):
        sd.open(tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.hspy", "w") as file:
        forged(file.create_group("Experiments/s"), "data", SHAPE)
    with pytest.raises(SourceError, match="type object"):
        sd.open(tmp_path / "b.hspy")
