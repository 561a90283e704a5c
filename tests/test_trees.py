"""Files that hold several arrays by name: HDF5, zarr stores and tensors; what is found and where axes come from."""

import pickle
import tracemalloc
from math import prod
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from frames_made import refuses

from stem_dask.core.formats import Output
from stem_dask.core.model import Axis
from stem_dask.readers.open import find
from stem_dask.stages.export import export
from stem_dask.stages.open import open_patterns
from stem_dask.writers.torch import PtSink

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SHAPE = (4, 5, 6, 7)
SCAN = ("scan_y", "scan_x", "ky", "kx")
LIST = ("pattern", "ky", "kx")


def numbers(shape=SHAPE, dtype="u2"):
    return np.arange(prod(shape)).reshape(shape).astype(dtype)


def same(patterns, array, dims=SCAN):
    assert patterns.dims == dims
    assert patterns.dtype == array.dtype
    np.testing.assert_array_equal(patterns.values, array)


def axis(patterns, dim):
    attrs = patterns[dim].attrs
    return (attrs["scale"], attrs["offset"], attrs["units"])


def hdf5(path, array, name="Experiments/s/data"):
    with h5py.File(path, "w") as file:
        file[name] = array
    return path


# --- HDF5 -------------------------------------------------------------------------------------------------------


def test_hspy_written_by_hyperspy(tmp_path):
    hs = pytest.importorskip("hyperspy.api")
    array = numbers()
    signal = hs.signals.Signal2D(array)
    wanted = [
        ("x", 0.5, 1, "nm"),
        ("y", 0.25, 2, "nm"),
        ("kx", 3, -9, "1/nm"),
        ("ky", 4, -8, "1/nm"),
    ]
    for i, given in enumerate(wanted):
        for key, value in zip(("name", "scale", "offset", "units"), given, strict=True):
            setattr(signal.axes_manager[i], key, value)
    signal.metadata.General.title = "a scan"
    signal.metadata.set_item("Acquisition_instrument.TEM.camera_length", 45.0)
    signal.save(tmp_path / "a.hspy", chunks=(2, 5, 6, 7))
    found = find(tmp_path / "a.hspy")
    assert found.info.axes == (
        Axis("scan_y", 4, 0.25, 2.0, "nm"),
        Axis("scan_x", 5, 0.5, 1.0, "nm"),
        Axis("ky", 6, 4.0, -8.0, "1/nm"),
        Axis("kx", 7, 3.0, -9.0, "1/nm"),
    )
    assert found.info.chunks == (2, 5, 6, 7)
    kept = found.info.metadata["metadata"]
    assert kept["Acquisition_instrument"] == {"TEM": {"camera_length": 45.0}}
    same(open_patterns(tmp_path / "a.hspy"), array)
    same(open_patterns(tmp_path / "a.hspy", dataset="a scan"), array)


def test_plain_h5_with_loops_and_broken_links(tmp_path):
    path = hdf5(tmp_path / "a.h5", numbers(), name="a/b/data")
    with h5py.File(path, "r+") as file:
        file["a/b/loop"] = file["a"]
        file["a/again"] = file["a/b/data"]
        file["soft"] = h5py.SoftLink("/nowhere")
        file["out"] = h5py.ExternalLink("gone.h5", "/x")
        file["spectrum"] = np.zeros((3, 4))
        file["words"] = np.array([b"x"])
    patterns = open_patterns(path)
    same(patterns, numbers())
    (note,) = patterns.attrs["notes"]
    assert note.endswith(
        "(4 x 5 x 6 x 7) of: a/again: 4 x 5 x 6 x 7 uint16; spectrum: 3 x 4 float64"
    )


@pytest.mark.parametrize("link", [h5py.SoftLink("/nowhere"), h5py.ExternalLink("gone.h5", "/x")])
def test_hyperspy_layout_with_broken_links(tmp_path, link):
    path = hdf5(tmp_path / "a.hspy", numbers())
    with h5py.File(path, "r+") as file:
        file["Experiments/gone"] = link
    same(open_patterns(path), numbers())
    path = hdf5(tmp_path / "b.h5", numbers(), name="data")
    with h5py.File(path, "r+") as file:
        file["Experiments"] = link
    same(open_patterns(path), numbers())


def strange(file):
    """Everything but patterns."""
    file["fields"] = np.zeros(SHAPE, [("a", "u2"), ("b", "f4")])
    file.create_dataset("ragged", SHAPE, h5py.vlen_dtype("u2"))
    file["out"] = h5py.ExternalLink("gone.h5", "/x")
    file["soft"] = h5py.SoftLink("/nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (strange, r"in gone\.h5, which is missing; copy it too; the file has fields: 4 x 5 x 6 x 7 of type .*u2.* no numbers; "
                  r"ragged: .* of type object.*; soft, a link to /nowhere, where nothing is$"),
        (lambda file: file.create_dataset("a", SHAPE, "u2", external=[("gone.bin", 0, 1680)]),
         r"the numbers of a are not in this file but in gone\.bin; copy"),
    ],
)  # fmt: skip
def test_what_an_hdf5_has_instead_of_patterns_is_named(tmp_path, make, message):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        make(file)
    refuses(message, tmp_path / "a.h5")


def odd_axes(path, *axes):
    """A signal of HyperSpy whose axes say so."""
    with h5py.File(hdf5(path, numbers()), "r+") as file:
        for i, attrs in enumerate(axes):
            group = next(iter(file["Experiments"].values())).require_group(f"axis-{i}")
            group.attrs.clear()
            group.attrs.update(attrs)
    return path


def test_odd_axes_of_hyperspy(tmp_path):
    """Scales that are none mean pixels; bytes that are no text harm nothing; an axis that is not even has no scale."""
    nan, none = {"scale": np.nan, "units": "nm"}, {"units": "nm"}
    bad = {"scale": ["0.5"], "offset": "x", "units": b"n\xff", "name": b"\xfe"}
    patterns = open_patterns(odd_axes(tmp_path / "a.hspy", nan, none, {"scale": 0}, bad))
    assert [axis(patterns, dim) for dim in SCAN] == [(1.0, 0.0, "")] * 3 + [(0.5, 0.0, "n?")]
    export(patterns, tmp_path / "b.hspy")
    assert axis(open_patterns(tmp_path / "b.hspy"), "kx") == (0.5, 0.0, "n?")


@pytest.mark.parametrize("name", [b"Experiments/t\xfc/data", b"a\xff/b"])
def test_names_that_are_no_utf8(tmp_path, name):
    with h5py.File(tmp_path / "a.hspy", "w") as file:
        file[name] = numbers()
        file[name].parent.create_group(b"original_metadata/\xfe")
    patterns = open_patterns(tmp_path / "a.hspy")
    same(patterns, numbers())
    export(patterns, tmp_path / "b.hspy")
    same(open_patterns(tmp_path / "b.hspy"), numbers())


def test_the_detector_first_by_the_words_of_other_files(tmp_path):
    """HyperSpy's navigate, else names of axes, else their units, which are noted beside HyperSpy's word."""
    turned = numbers().transpose(2, 3, 0, 1)
    flags = [{"scale": i, "units": "nm", "navigate": i > 2} for i in (1, 2, 3, 4)]
    patterns = open_patterns(odd_axes(tmp_path / "a.hspy", *flags))
    same(patterns, turned)
    assert [axis(patterns, dim)[0] for dim in SCAN] == [3, 4, 1, 2]
    names = ["ky", "kx", "scan_y", "scan_x"]
    zarr.create_array(tmp_path / "b.zarr", data=numbers(), dimension_names=names)
    same(open_patterns(tmp_path / "b.zarr"), turned)
    same(open_patterns(tmp_path / "b.zarr", scan_order="scan_first"), numbers())
    units = [{"scale": 1, "units": word} for word in ("1/nm", "1/nm", "nm", "nm")]
    patterns = open_patterns(odd_axes(tmp_path / "c.hspy", *units))
    same(patterns, turned)
    assert patterns.attrs["notes"][-1].endswith("(by 1/nm, 1/nm, nm, nm)")
    export(open_patterns(tmp_path / "c.hspy", scan_order="scan_first"), tmp_path / "c.h5")
    same(open_patterns(tmp_path / "c.h5"), numbers())  # the names of the axes say it
    said = [{**attrs, "navigate": i < 2} for i, attrs in enumerate(units)]
    patterns = open_patterns(odd_axes(tmp_path / "d.hspy", *said))
    same(patterns, numbers())
    assert "input.scan_order: detector_first" in patterns.attrs["notes"][-1]
    said = [{"navigate": i < 3} for i in range(4)]
    patterns = open_patterns(odd_axes(tmp_path / "e.hspy", *said))
    same(patterns, numbers())
    assert patterns.attrs["notes"][-1].startswith("HyperSpy calls 3 of the 4 axes navigation")


def test_emd_of_hyperspy_is_turned_back(tmp_path):
    """RosettaSciIO writes and reads the data of an .emd transposed; others, such as ncempy, do not."""
    hs = pytest.importorskip("hyperspy.api")
    signal = hs.signals.Signal2D(numbers())
    units = ("nm", "um", "1/nm", "1/nm")
    for i, (along, unit) in enumerate(zip(signal.axes_manager._axes, units, strict=True)):
        along.name, along.scale, along.offset, along.units = f"a{i}", 2.0**i, -i, unit
    signal.save(tmp_path / "a.emd")
    patterns = open_patterns(tmp_path / "a.emd")
    same(patterns, numbers())
    assert [axis(patterns, dim) for dim in SCAN] == [(2.0**i, -i, u) for i, u in enumerate(units)]
    assert "reverse" in patterns.attrs["notes"][0]
    signal.inav[0].save(tmp_path / "b.emd")
    same(open_patterns(tmp_path / "b.emd", scan_shape=(2, 2)), numbers()[:, 0].reshape(2, 2, 6, 7))


def test_scales_that_netcdf_names_alone(tmp_path):
    """An axis has no label there, its scale has a name; one without values is no calibration."""
    path = hdf5(tmp_path / "a.h5", numbers(), name="data")
    with h5py.File(path, "r+") as file:
        for i, (dim, n) in enumerate(zip(("ky", "kx", "scan_y", "scan_x"), SHAPE, strict=True)):
            scale = file.create_dataset(dim, data=np.arange(n) * 0.5 * i)
            scale.make_scale(dim)
            scale.attrs["units"] = "nm"
            file["data"].dims[i].attach_scale(scale)
    patterns = open_patterns(path)
    same(patterns, numbers().transpose(2, 3, 0, 1))
    found = [axis(patterns, dim) for dim in SCAN]
    assert found == [(1.0, 0.0, "nm"), (1.5, 0.0, "nm"), (1.0, 0.0, ""), (0.5, 0.0, "nm")]


def test_a_broken_array_beside_the_patterns_does_no_harm(tmp_path):
    root = zarr.create_group(tmp_path / "a.zarr", zarr_format=2)
    for name in ("data", "other"):
        root.create_array(name, data=numbers(), chunks=SHAPE)
    said = tmp_path / "a.zarr/other/.zarray"
    said.write_text(said.read_text().replace("<u2", "|O"))
    patterns = open_patterns(tmp_path / "a.zarr")
    same(patterns, numbers())
    (note,) = patterns.attrs["notes"]
    assert note.startswith("other cannot be read (")
    assert "array other holds numbers of the type |O, which is not known here" in note
    (tmp_path / "a.zarr/data/.zarray").write_text("{")
    refuses(r"a\.zarr: not a readable zarr store", tmp_path / "a.zarr")


def test_chunks_that_were_never_written_are_noted(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("data", SHAPE, "u2", chunks=(1, 5, 6, 7), fillvalue=3)
        data[:3] = numbers()[:3]
    patterns = open_patterns(tmp_path / "a.h5")
    np.testing.assert_array_equal(patterns[3], 3)
    assert patterns.attrs["notes"] == ["1 of 4 chunks were never written; they read as 3"]


def test_a_dataset_by_its_links_and_others_that_cannot_be_read(tmp_path):
    path = hdf5(tmp_path / "a.h5", numbers(), name="entry/detector/data")
    with h5py.File(path, "r+") as file:
        file["entry/data"] = h5py.SoftLink("/entry/detector")
        file["hard"] = file["entry/detector/data"]
        file["nowhere"] = h5py.SoftLink("/gone")
        file.create_dataset("out", (4, 5), "u2", external=[("gone.bin", 0, 40)])
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((4, 5, 6))
        plist.set_filter(32845, h5py.h5z.FLAG_OPTIONAL, (1,))
        space = h5py.h5s.create_simple((4, 5, 6))
        h5py.h5d.create(file.id, b"coded", h5py.h5t.NATIVE_UINT16, space, plist)
    for dataset in (None, "/entry/data/data", "hard", "entry/detector/data"):
        same(open_patterns(path, dataset=dataset), numbers())
    for dataset, message in (
        ("out", r"the numbers of out are not in this file but in gone\.bin"),
        (
            "coded",
            r"a\.h5: coded is compressed by the HDF5 filter 32845 \(without a name\), which is not inst",
        ),
        ("nowhere", r"there is no dataset 'nowhere'; the file holds"),
        ("entry", r"there is no dataset 'entry'"),
    ):
        refuses(message, path, dataset=dataset)


def test_zarr_of_unknown_codecs_and_impossible_chunks(tmp_path):
    said = tmp_path / "a.zarr/zarr.json"
    for old, new, message in (
        ('"name": "bytes"', '"name": "magic"', r"array / is coded as magic, which is not known here"),
        ('"chunk_shape": [\n        4', '"chunk_shape": [\n        0', r"states chunks of 0 x 5 x 6 x 7"),
    ):  # fmt: skip
        zarr.create_array(tmp_path / "a.zarr", data=numbers(), chunks=SHAPE, overwrite=True)
        text = said.read_text()
        assert old in text
        said.write_text(text.replace(old, new))
        refuses(message, tmp_path / "a.zarr")


def test_several_datasets_are_listed_and_chosen(tmp_path):
    path = hdf5(tmp_path / "a.h5", numbers(), name="one")
    with h5py.File(path, "r+") as file:
        file["two"] = numbers() + 1
    refuses(r"2 arrays of 4 axes; choose one .*one: 4 x 5 .*two: 4 x 5", path)
    for name in ("two", "/two"):
        same(open_patterns(path, dataset=name), numbers() + 1)
    same(open_patterns(path, dataset=0), numbers())
    refuses(r"no dataset 'three'; the file holds one: .*; two: ", path, dataset="three")
    refuses(r"no dataset 2; the file holds", path, dataset=2)


def test_big_endian_parts_of_rows_reach_hspy_unswapped(tmp_path):
    np.save(tmp_path / "a.npy", numbers((20, 6, 7), ">u2"))
    patterns = open_patterns(tmp_path / "a.npy", scan_shape=(4, 5), chunk_mb=0.0002)
    assert patterns.data.chunksize[1] < 5
    export(patterns, tmp_path / "a.hspy")
    np.testing.assert_array_equal(open_patterns(tmp_path / "a.hspy").values, numbers())


# --- zarr -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_array_and_group(tmp_path, version):
    array = numbers()
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(2, 2, 6, 7), zarr_format=version)
    found = find(tmp_path / "a.zarr")
    assert found.info.chunks == (2, 2, 6, 7)
    same(open_patterns(tmp_path / "a.zarr"), array)
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=version)
    group.create_array("deep/er/data", data=array, chunks=(2, 5, 6, 7))
    group.create_array("image", data=array[0, 0])
    same(open_patterns(tmp_path / "g.zarr", dataset="deep/er/data"), array)
    same(open_patterns(tmp_path / "g.zarr"), array)
    group.create_array("list", data=array.reshape(20, 6, 7))
    same(open_patterns(tmp_path / "g.zarr"), array)
    same(open_patterns(tmp_path / "g.zarr", dataset="list"), array.reshape(20, 6, 7), LIST)
    group.create_array("a/b/c/d/scan", data=array + 1)
    group.create_array("scan", data=array + 1)
    refuses(r"3 arrays of 4 axes; .* a/b/c/d/scan: 4 x 5 .*; scan: ", tmp_path / "g.zarr")
    same(open_patterns(tmp_path / "g.zarr", dataset="scan"), array + 1)


def test_zarr_blocks_are_shards(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=numbers(), chunks=(1, 1, 6, 7), shards=(2, 5, 6, 7))
    assert find(tmp_path / "a.zarr").info.chunks == (2, 5, 6, 7)


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_of_xarray_keeps_its_coordinates(tmp_path, version):
    """Coordinates of others hold values and no scale: the scale is their step."""
    coords = {
        "scan_y": ("scan_y", 3 + 0.5 * np.arange(4), {"units": "nm"}),
        "ky": ("ky", -1 + 0.25 * np.arange(6), {"units": "1/nm"}),
        "kx": ("kx", np.arange(7) ** 2, {"units": "1/nm"}),
    }
    array = xr.DataArray(numbers(), dims=SCAN, coords=coords, name="patterns")
    array.to_dataset().to_zarr(tmp_path / "a.zarr", zarr_format=version, consolidated=version == 2)
    patterns = open_patterns(tmp_path / "a.zarr")
    same(patterns, numbers())
    assert axis(patterns, "scan_y") == (0.5, 3.0, "nm")
    assert axis(patterns, "ky") == (0.25, -1.0, "1/nm")
    assert axis(patterns, "scan_x") == axis(patterns, "kx") == (1.0, 0.0, "")


@pytest.fixture
def calibrated(tmp_path):
    """Patterns with another calibration on every axis."""
    path = hdf5(tmp_path / "calibrated.hspy", numbers())
    with h5py.File(path, "r+") as file:
        for i, units in enumerate(["nm", "um", "1/nm", "mrad"]):
            attrs = {"name": f"a{i}", "scale": 0.5 * (i + 1), "offset": -i, "units": units}
            file["Experiments/s"].create_group(f"axis-{i}").attrs.update(attrs)
    return open_patterns(path, chunk_mb=0.0005)


# --- .pt --------------------------------------------------------------------------------------------------------


def save(path, what, **options):
    torch = pytest.importorskip("torch")
    torch.save(what(torch), path, **options)
    return path


@pytest.mark.parametrize(
    ("stored", "shape", "dims"),
    [((20, 1, 6, 7), (20, 6, 7), LIST), ((20, 6, 7), (20, 6, 7), LIST), (SHAPE, SHAPE, SCAN)],
)
def test_pt_shapes(tmp_path, stored, shape, dims):
    array = numbers(dtype="i2")
    for what in (
        lambda torch: torch.from_numpy(array.reshape(stored)),
        lambda torch: {"patterns": torch.from_numpy(array.reshape(stored)), "note": "x"},
    ):
        path = save(tmp_path / "a.pt", what)
        same(open_patterns(path), array.reshape(shape), dims)
        if dims == LIST:
            same(open_patterns(path, scan_shape=(4, 5)), array)


def test_pt_with_several_tensors(tmp_path):
    path = save(
        tmp_path / "a.pt",
        lambda torch: {"patterns": torch.ones(2, 3, 4, 5), "dark": torch.zeros(2, 3, 4, 5), 7: 8},
    )
    refuses(r"2 arrays of 4 axes; .*patterns: .*; dark: ", path)
    assert float(open_patterns(path, dataset="patterns").sum()) == 120


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda t: t.zeros(3, 4, 4, dtype=t.bfloat16), "tensor is bfloat16, which numpy lacks"),
        (lambda t: t.zeros(3, 4, 4).to(t.float8_e5m2), "tensor is float8_e5m2, which numpy lacks"),
        (lambda t: t.zeros(3, 4, 4, dtype=t.complex64), "Save the intensity"),
        (lambda t: t.zeros(3, 4, 4).to_sparse(), r"tensor is sparse; save tensor\.to_dense\(\)"),
        (
            lambda t: t.zeros(3, 4, 1).expand(3, 4, 5),
            r"not contiguous; save tensor\.contiguous\(\)",
        ),
        (lambda t: "words", "holds a str; expected a tensor, or a dictionary or list of them"),
        (
            lambda t: {"a": 1, "b": t.zeros(3, 4)},
            r"no 4D tensor .*; the file holds b: 3 x 4 float32",
        ),
        (lambda t: [t.zeros(SHAPE)] * 2, "choose one with input.dataset: 0: 4 x 5 x 6 x 7; 1: 4 x"),
    ],
)
def test_pt_refused(tmp_path, what, message):
    refuses(message, save(tmp_path / "a.pt", what))


def test_pt_of_axes_in_another_order_and_tensors_within(tmp_path):
    """`permute` and channels_last leave the numbers where they are; containers may hold each other."""
    array = numbers(dtype="i4")
    for what in (
        lambda t: t.from_numpy(array.transpose(2, 3, 0, 1).copy()).permute(2, 3, 0, 1),
        lambda t: t.from_numpy(array).contiguous(memory_format=t.channels_last),
        lambda t: {"scan": {"data": t.from_numpy(array), "dark": t.zeros(6, 7)}, "n": [1]},
        lambda t: (t.from_numpy(array), "a word"),
    ):
        path = save(tmp_path / "a.pt", what)
        source = find(path).source
        np.testing.assert_array_equal(source[(slice(None),) * 4], array)
        part = (slice(1, 3), slice(0, 5, 2), slice(2, 4), slice(3, 4))
        np.testing.assert_array_equal(source[part], array[part])
    assert find(save(path, lambda t: {"scan": {"a": t.zeros(SHAPE)}}), dataset="scan/a")
    ring: list = []
    ring.append({"again": ring})
    refuses("goes too deep, or repeats itself", save(path, lambda t: ring))


def test_pt_of_old_torch_and_cut_files(tmp_path):
    path = save(
        tmp_path / "a.pt", lambda torch: torch.zeros(3, 4, 5), _use_new_zipfile_serialization=False
    )
    refuses(r"format of torch before 1\.6", path)
    path = save(tmp_path / "b.pt", lambda torch: torch.zeros(30, 40, 50))
    path.write_bytes(path.read_bytes()[:9000])
    refuses(r"b\.pt: not a readable PyTorch file", path)


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_pt_never_runs_code(tmp_path):
    mark = tmp_path / "executed"
    path = save(tmp_path / "a.pt", lambda torch: {"patterns": Hostile(mark)})
    refuses("not a readable PyTorch file of plain tensors", path)
    path.write_bytes(pickle.dumps(Hostile(mark)))
    refuses("not a readable PyTorch file of plain tensors", path)
    assert not mark.exists()


def test_our_own_pt_of_a_list_and_of_one_column(tmp_path, calibrated):
    """(n, 1, H, W) says by its axes whether the 1 is a column of the scan or a channel."""
    pytest.importorskip("torch")
    export(calibrated[:, :1], tmp_path / "column.pt", keep_dtype=True)
    column = open_patterns(tmp_path / "column.pt")
    same(column, numbers()[:, :1])
    assert axis(column, "scan_y") == axis(calibrated, "scan_y")
    patterns = calibrated[0].rename(scan_x="pattern")
    export(patterns, tmp_path / "list.pt", layout="nchw", keep_dtype=True)
    again = open_patterns(tmp_path / "list.pt")
    same(again, numbers()[0], LIST)
    assert axis(again, "kx") == axis(calibrated, "kx")


def test_opening_a_huge_pt_takes_no_memory(tmp_path):
    """4 TB of holes, larger than any memory: made, opened, and one pattern of them read."""
    pytest.importorskip("torch")
    path = tmp_path / "huge.pt"
    shape = (1000, 1000, 1024, 1024)
    small = tmp_path / "small.pt"
    PtSink(Output(str(small), (1, 1, 8, 8), np.dtype("f4"))).create(resume=False)
    open_patterns(small)[0, 0].compute()  # what is imported on the way does not count
    small.unlink()
    tracemalloc.start()
    try:
        PtSink(Output(str(path), shape, np.dtype("f4"))).create(resume=False)
        assert [entry.name for entry in tmp_path.iterdir()] == ["huge.pt"]
        assert path.stat().st_size > 4e12
        assert path.stat().st_blocks * 512 < 1e6
        patterns = open_patterns(path)
        assert patterns.shape == shape
        assert not patterns[999, 999].compute().any()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6
