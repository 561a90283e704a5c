"""EMD, Topspin's .app5, TIFF, flattened DM stacks, and files whose content contradicts their name."""

import struct

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from frames_made import (
    GUID,
    SHAPE,
    agrees,
    app5,
    dm_image,
    emd,
    knows,
    numbers,
    opens_in_little,
    real,
    refuses,
    tiff,
)

from stem_dask.core.errors import SourceError
from stem_dask.readers.formats import READERS
from stem_dask.readers.open import find
from stem_dask.readers.rsciio import SUFFIXES

# --- EMD --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "first"), [("array", 0), (1, 1)])
@pytest.mark.parametrize("ends", [False, True])
def test_emd_of_py4dstem_and_ncem(tmp_path, kind, first, ends):
    scales = (0.5, 0.25, 0.02, 0.03)
    units = ("nm", "nm", "A^-1", "A^-1") if kind == "array" else ("[n_m]", "[n_m]", "[n_m^-1]", "[1/n_m]")  # fmt: skip
    dims = [
        (name, unit, np.arange(2 if ends else n) * scale + 1)
        for name, unit, n, scale in zip(("Rx", "Ry", "Qx", "Qy"), units, SHAPE, scales, strict=True)
    ]
    found = find(emd(tmp_path / "a.emd", numbers(), "root/datacube", dims, kind, first))
    agrees(found, numbers())
    assert found.info.kind == "an EMD file"
    assert [axis.scale for axis in found.info.axes] == pytest.approx(scales)
    assert [axis.offset for axis in found.info.axes] == pytest.approx([1.0] * 4)
    expected = ("nm", "nm", "A^-1", "A^-1") if kind == "array" else ("nm", "nm", "nm^-1", "1/nm")
    assert tuple(axis.units for axis in found.info.axes) == expected
    assert found.info.metadata["group"] == {"emd_group_type": kind}
    assert found.info.metadata["file"] == {"version_major": 1}


@pytest.mark.parametrize("positions", [[0, 0], [0, float("nan")], [1.0, 2.0, 5.0]])
def test_emd_without_calibration(tmp_path, positions):
    dims = [("Rx", "nm", positions)] + [("x", "nm", [0, 1])] * 3
    axis = find(emd(tmp_path / "a.emd", numbers(), "root", dims, "array")).info.axes[0]
    assert (axis.scale, axis.offset, axis.units) == (1.0, 0.0, "")


def test_emd_of_velox(tmp_path):
    with h5py.File(tmp_path / "a.emd", "w") as file:
        file["Version"] = [b'{"format": "Velox", "version": "1.9"}']
        file["Data/Image/abc/Data"] = numbers(SHAPE[:3])
    refuses(r"a\.emd: an EMD file of Velox holds images", tmp_path / "a.emd")


def test_real_py4dstem():
    path, fact = real("py4DSTEM_size2x3x4x5.h5")
    found = find(path)
    knows(found, fact)
    assert [axis.scale for axis in found.info.axes] == [a["scale"] for a in fact["axes"]]
    assert [axis.units for axis in found.info.axes] == ["nm", "nm", "A^-1", "A^-1"]
    assert found.info.metadata["group"]["python_class"] == "DataCube"


def test_real_hyperspy_of_bool():
    path, fact = real("pixelated_stem_bool_4d.hdf5")
    knows(find(path), fact)


def test_hdf5_with_axes_of_length_one(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", data=numbers((1, *SHAPE, 1)), chunks=(1, 2, 2, 6, 5, 1))
    found = find(tmp_path / "a.h5")
    agrees(found, numbers())
    assert found.info.notes == ("left out the axes of length 1 of 1 x 3 x 4 x 6 x 5 x 1",)
    assert found.info.chunks == (2, 2, 6, 5)


# --- .app5 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("session", ["", "b0dba950-15bf-4a74-a81c-9cea8560c2c8"])
@pytest.mark.parametrize("shape", [SHAPE, (4, 3, 6, 5), (1, 12, 6, 5), (12, 1, 6, 5)])
def test_app5(tmp_path, session, shape):
    array = numbers(shape, "f4")
    found = find(app5(tmp_path / "a.app5", array, session))
    agrees(found, array)
    y, x, ky, kx = found.info.axes
    if min(shape) > 1:
        assert (y.scale, y.offset, y.units) == (pytest.approx(2), pytest.approx(5), "nm")
        assert (x.scale, x.offset, x.units) == (pytest.approx(1), pytest.approx(7), "nm")
    assert (ky.scale, ky.offset, ky.units) == (0.01, -0.25, "rad")
    assert (kx.scale, kx.offset, kx.units) == (0.02, -0.5, "rad")


@pytest.mark.parametrize(
    "place",
    [
        lambda i: ("nan", 1e-9),
        lambda i: ("?", "?"),
        lambda i: (1e-9, 1e-9),
        lambda i: (i // 5 * 1e-9, i % 5 * 1e-9),
        lambda i: (i // 4 * 1e-9, (i % 4) * (1 if i < 8 else -1) * 1e-9),
    ],
)
def test_app5_without_a_plain_scan(tmp_path, place):
    path = app5(tmp_path / "a.app5", numbers(), place=place)
    refuses("a stack of 12 patterns of 6 x 5 pixels; give its scan", path)
    agrees(find(path, scan_shape=(3, 4)), numbers())


def test_app5_refused(tmp_path):
    path = app5(tmp_path / "a.app5", numbers())
    with h5py.File(path, "r+") as file:
        del file[f"{GUID}/5"]
    refuses(r"has 11 patterns, but they are not numbered 0 to 10; some are", path)
    path = app5(tmp_path / "b.app5", numbers())
    with h5py.File(path, "r+") as file:
        del file[f"{GUID}/5/Data"]
        file[f"{GUID}/5/Data"] = np.zeros((6, 6), "u2")
        del file[f"{GUID}/7/Data"]
    found = find(path)
    with pytest.raises(SourceError, match=r"pattern 5 of .* is \(6, 6\) uint16, the first is"):
        found.source[1:2, :, :, :]
    with pytest.raises(SourceError, match=r"b\.app5: pattern 7 of .* cannot be read"):
        found.source[1:2, 3:, :, :]
    with h5py.File(tmp_path / "c.app5", "w") as file:
        file["Metadata"] = b"<Metadata/>"
    refuses(r"c\.app5: no scan of patterns", tmp_path / "c.app5")
    (tmp_path / "d.app5").write_bytes(path.read_bytes()[:3000])
    refuses(r"d\.app5: not a readable HDF5 file", tmp_path / "d.app5")


def test_app5_does_not_believe_entities(tmp_path):
    path = app5(tmp_path / "a.app5", numbers())
    with h5py.File(path, "r+") as file:
        del file[f"{GUID}/0/Metadata"]
        file[f"{GUID}/0/Metadata"] = b"<!DOCTYPE x [<!ENTITY a 'b'>]><Metadata>&a;</Metadata>"
    refuses("give its scan", path)


def test_real_app5():
    path, fact = real("topspin_test_A.app5")
    found = find(path)
    knows(found, fact)
    assert [axis.scale for axis in found.info.axes] == pytest.approx([a["scale"] for a in fact["axes"]])  # fmt: skip
    assert [axis.offset for axis in found.info.axes] == pytest.approx([a["offset"] for a in fact["axes"]])  # fmt: skip


def test_hdf5_opens_in_little_memory(tmp_path):
    with h5py.File(tmp_path / "a.emd", "w") as file:
        file.create_dataset("a/data", (256,) * 4, "u2", chunks=(1, 1, 256, 256))
        for i in range(3):
            file.create_dataset(f"{GUID}/{i}/Data", (2**15, 2**15), "f4", chunks=(256, 256))
    n_bytes = (tmp_path / "a.emd").stat().st_size
    assert opens_in_little(tmp_path / "a.emd", n_bytes).source.shape == (256,) * 4
    (tmp_path / "a.emd").rename(tmp_path / "a.app5")
    with h5py.File(tmp_path / "a.app5", "r+") as file:
        file["Metadata"] = b""
    n_bytes = (tmp_path / "a.app5").stat().st_size
    found = opens_in_little(tmp_path / "a.app5", n_bytes, scan_shape=(1, 3))
    assert found.source.shape == (1, 3, 2**15, 2**15)
    assert found.source[:, 1:2, 5:7, :3].shape == (1, 1, 2, 3)


# --- TIFF -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("dtype", "rows"), [("u1", None), ("u2", 3), ("f4", 2), ("i4", None)])
def test_tiff(tmp_path, big, order, dtype, rows):
    array = numbers((12, 6, 5), dtype)
    path = tiff(tmp_path / "a.tif", array, order, big, rows, "a description" * 3)
    found = find(path, scan_shape=(3, 4))
    agrees(found, array.reshape(SHAPE))
    assert len(found.source.source.runs) <= 2
    assert found.info.metadata["description"] == "a description" * 3
    refuses("a stack of 12 patterns of 6 x 5 pixels; give its scan", path)


def test_tiff_of_imagej(tmp_path):
    array = numbers((12, 6, 5))
    path = tiff(tmp_path / "a.tiff", array[:1], description="ImageJ=1.5\nimages=12\n")
    path.write_bytes(path.read_bytes() + array[1:].tobytes())
    agrees(find(path, scan_shape=(3, 4)), array.reshape(SHAPE))
    path.write_bytes(path.read_bytes()[:-1])
    refuses("12 pages need", path)
    axes = "ImageJ=1.5\nimages=12\nchannels=1\nslices=4\nframes=3\n"
    path = tiff(tmp_path / "c.tiff", array, description=axes)
    refuses(r"scan_y, scan_x\] \(by ImageJ frames 3, slices 4\)$", path)
    refuses(r"scan_y, scan_x\] \(3 x 3 would fit\)$", tiff(tmp_path / "c.tiff", array[:9]))
    n_bytes = 2 * 65536 * 65536 + 1000
    one = np.zeros((1, 256, 256), "u2")
    path = tiff(tmp_path / "b.tiff", one, description="ImageJ=1.5\nimages=65536\n")
    assert opens_in_little(path, n_bytes, scan_shape=(256, 256)).source.shape == (256,) * 4


def test_tiff_cut_anywhere(tmp_path):
    path = tiff(tmp_path / "a.tif", numbers((3, 6, 5)))
    whole = path.read_bytes()
    for n in range(1, len(whole), 7):
        path.write_bytes(whole[:n])
        refuses(r"a\.tif: ", path, scan_shape=(1, 3))


def test_tiff_of_different_pages(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for shape in ((6, 5), (5, 5)):
            file.write(np.zeros(shape, "u2"), contiguous=False, metadata=None)
    refuses(r"page 2 is \(5, 5\) uint16, the first \(6, 5\) uint16", path)


# --- flattened stacks of Gatan files ----------------------------------------------------------------------------


def test_dm_stack_that_states_its_scan(tmp_path):
    from stem_dask.writers.synthetic import encode_tags

    array = numbers((12, 6, 5))

    def write(**shape):
        scan = {f"Scan shape {x}": np.int32(n) for x, n in shape.items()}
        image = dm_image(array, {"4D STEM Tags": scan})
        (tmp_path / "a.dm4").write_bytes(encode_tags({"ImageList": [image]}))
        return find(tmp_path / "a.dm4")

    found = write(X=4, Y=3)
    agrees(found, array.reshape(SHAPE))
    assert "the file states a scan of 3 x 4" in found.info.notes
    with pytest.raises(SourceError, match=r"the scan that the file states, 3 x 5 needs 15"):
        write(X=5, Y=3)
    with pytest.raises(SourceError, match="give its scan"):
        write(X=4)


def test_dm_images_go_by_the_numbers_that_are_shown(tmp_path):
    """A thumbnail is left out, and the next image stays number 1."""
    from stem_dask.writers.synthetic import encode_tags

    arrays = (numbers((6, 5)), numbers(), numbers() + 1)
    tags = {"Meta Data": {"Data Order Swapped": np.uint8(1)}}
    images = [dm_image(array, tags) for array in arrays]
    tree = {"ImageList": images, "Thumbnails": [{"ImageIndex": np.uint32(0)}]}
    (tmp_path / "a.dm4").write_bytes(encode_tags(tree))
    refuses(
        r"2 arrays of 4 axes; .*: image 1 \(it\): 3 x 4.*; image 2 \(it\): 3 x", tmp_path / "a.dm4"
    )
    for number in (1, 2):
        agrees(find(tmp_path / "a.dm4", dataset=number), numbers() + number - 1)
    refuses(
        r"there is no dataset 0; the file holds image 1 \(it\): ", tmp_path / "a.dm4", dataset=0
    )


# --- content and name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "suffix", "said"),
    [
        (b"\x89HDF\r\n\x1a\n", ".dm4", "an HDF5 file; rename it to a.h5"),
        (b"\0\0\0\4" + bytes(8) + b"\0\0\0\1", ".hspy", "a Gatan DM4 file; rename it to a.dm4"),
        (b"\0\0\0\3" + bytes(4) + b"\0\0\0\1", ".mib", "a Gatan DM3 file; rename it to a.dm3"),
        (b"\x93NUMPY\1\0", ".mrc", "a numpy file; rename it to a.npy"),
        (b"IMGBLO\2\1", ".h5", "a NanoMEGAS block file; rename it to a.blo"),
        (b"MQ1,0001", ".blo", "a Merlin file; rename it to a.mib"),
        (b"II*\0", ".dm3", "a TIFF file; rename it to a.tif"),
        (b"<?xml version='1.0'?>", ".tif", "an XML file; rename it to a.xml"),
        (bytes(52) + b"TVIPS ", ".mrc", "a TVIPS file; rename it to a.tvips"),
        (bytes(208) + b"MAP ", ".tvips", "an MRC file; rename it to a.mrc"),
    ],
)
def test_content_contradicts_the_name(tmp_path, content, suffix, said):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content.ljust(2000, b"\0"))
    refuses(rf"the name ends in \{suffix}, but by its content it is {said}", path)
    unknown = tmp_path / "a.dat"
    unknown.write_bytes(content.ljust(2000, b"\0"))
    refuses(r"the file extension \.dat is not known; by its content", unknown)


def test_a_store_under_the_name_of_a_file(tmp_path):
    zarr.create_array(tmp_path / "a.hspy", shape=SHAPE, dtype="u2")
    refuses(r"it is a zarr store; rename it to a\.zarr", tmp_path / "a.hspy")


def test_unknown_endings_list_all_the_known(tmp_path):
    refuses(r"a\.hdr: the settings of a Merlin file; open the \.mib", tmp_path / "a.hdr")
    (tmp_path / "a.dat").write_bytes(b"hello")
    with pytest.raises(SourceError, match=r"extension \.dat is not known; known are") as caught:
        find(tmp_path / "a.dat")
    assert all(suffix in str(caught.value) for suffix in READERS.keys() - {*SUFFIXES})


@pytest.mark.parametrize(
    "suffix", sorted(s for s, row in READERS.items() if not row.is_folder and s not in SUFFIXES)
)
def test_every_family_refuses_nothing_and_noise(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.touch()
    refuses(r"the file is empty \(0 bytes\)", path)
    rng = np.random.default_rng(3)
    for n in (1, 7, 100, 5000):
        path.write_bytes(rng.bytes(n))
        refuses(rf"a\{suffix}: ", path)


def test_a_run_on_a_camera_file(tmp_path):
    """From a stack behind headers to the store: the config's keys reach the reader, workers open it by name."""
    from stem_dask.config.load import parse_config
    from stem_dask.job.run import run

    y, x = np.indices((16, 16))
    pattern = np.where((y - 9) ** 2 + (x - 7) ** 2 <= 9, 50, 0)
    array = np.broadcast_to(pattern, (3, 4, 16, 16)).astype("u2")
    frames = [b"h" * 6 + frame.tobytes() for frame in array.reshape(-1, 16, 16)]
    head = struct.pack("<13I", 256, 2, 16, 16, 16, 0, 0, 1, 1, 1, 1, 1, 6).ljust(256, b"\0")
    (tmp_path / "a.tvips").write_bytes(head + b"h" * 6 + bytes(512) + b"".join(frames))
    given = {"path": str(tmp_path / "a.tvips"), "scan_shape": [3, 4], "skip_frames": 1,
             "drop_columns": 1, "flip": True}  # fmt: skip
    output = {"path": str(tmp_path / "a.zarr"), "export": [], "figure": False}
    run(parse_config({"input": given, "output": output, "cluster": {"kind": "threads"}}))
    store = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert store["patterns"].shape[:2] == (3, 3)
    np.testing.assert_allclose(store["analysis/center_y"][...], 15 - 9)
    np.testing.assert_allclose(store["analysis/center_x"][...], 7)
    np.testing.assert_array_equal(store["analysis/total"][...], pattern.sum())
