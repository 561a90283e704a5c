"""A whole run on a bad file: exit code 3, one message, nothing left, the older output as it was."""

import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from frames_made import SHAPE, blo, mib, numbers

from stem_dask.cli.run import main
from stem_dask.core.errors import SourceError
from stem_dask.readers.open import find
from stem_dask.writers.synthetic import Synthetic, write_dataset


def cut_dm4(path):
    write_dataset(path, Synthetic((3, 2), (16, 12), electrons=300, disc_radius=2))
    path.write_bytes(path.read_bytes()[:-5000])


def dm4_as_hspy(path):
    write_dataset(
        path.with_suffix(".dm4"), Synthetic((3, 2), (16, 12), electrons=300, disc_radius=2)
    )
    path.with_suffix(".dm4").rename(path)


def gigantic_npy(path):
    header = {"descr": "<u2", "fortran_order": False, "shape": (2**31, 2**31, 256, 256)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)


def gigantic_hdf5(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (2**20, 2**20, 256, 256), "u2", chunks=(1, 1, 256, 256))


def torn_zarr(path):
    zarr.create_array(path, data=numbers(), chunks=SHAPE)
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array", "shape": [3')


def zarr_with_a_link_out(path):
    root = zarr.open_group(path, mode="w")
    root.create_array("patterns", data=numbers(), chunks=SHAPE)
    place = path / "patterns" / "zarr.json"
    place.rename(path.parent / "elsewhere.json")
    place.symlink_to(path.parent / "elsewhere.json")


def hdf5_of_a_lost_part(path):
    layout = h5py.VirtualLayout(SHAPE, "u2")
    layout[...] = h5py.VirtualSource("gone.h5", "data", shape=SHAPE)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("data", layout)


def sheared_blo(path):
    blo(path, numbers((3, 4, 6, 6), "u1") + 1, size=5, nx=4, ny=4)


def sheared_mib(path):
    mib(path, numbers() + 1)
    path.write_bytes(path.read_bytes().replace(b",0005,0006,", b",0004,0006,", 1))


BAD = [
    ("a.dm4", cut_dm4, "the file is cut or damaged"),
    ("a.hspy", dm4_as_hspy, "by its content it is a Gatan DM4 file; rename it to a.dm4"),
    ("a.npy", gigantic_npy, "the header says 2,147,483,648 x 2,147,483,648 x 256 x 256"),
    ("a.h5", gigantic_hdf5, "144,115 TB, but"),
    ("a.zarr", torn_zarr, "not a readable zarr store"),
    ("a.zarr", zarr_with_a_link_out, "leads out of the store"),
    ("a.h5", hdf5_of_a_lost_part, "gone.h5, which is missing; copy it too"),
    ("a.blo", sheared_blo, "a size is wrong"),
    ("a.mib", sheared_mib, "a size is wrong"),
    ("a.pt", lambda path: path.write_bytes(b"\x80\x02cos\nsystem\n."), "never run"),
    ("a.emd", lambda path: path.mkdir(), "is a file, this is a folder"),
    (
        "a.tif",
        lambda path: path.write_bytes(b"II+\0" + bytes(9)),
        "not a readable TIFF file",
    ),
    ("a.xyz", lambda path: path.write_bytes(b"hello"), "known are .app5, .blo, .dm3"),
]


@pytest.mark.parametrize(("name", "make", "said"), BAD, ids=[row[1].__name__ for row in BAD])
def test_a_run_on_a_bad_file(tmp_path, capsys, name, make, said):
    make(tmp_path / name)
    (tmp_path / "out").mkdir()
    older = {
        n: tmp_path / "out" / n for n in ("b.zarr/zarr.json", "b.pt", "b.hspy", "b_results.json")
    }
    for n, path in older.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(n)
    config = tmp_path / "crop.yaml"
    config.write_text(f"input: {{path: {tmp_path / name}}}\noutput: {{path: {tmp_path}/out/b.zarr, overwrite: true}}\n")  # fmt: skip
    assert main([str(config)]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {tmp_path / name}: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err
    left = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert left == older.keys()
    assert all(path.read_text() == n for n, path in older.items())


ODD = [
    (np.full((4, 3, 32, 32), np.nan, "f4"), "every pattern is empty"),
    (np.full((4, 3, 32, 32), -2, "i2"), "every pattern is empty"),
    (np.zeros((4, 3, 32, 32), "u1"), "every pattern is empty"),
    (np.full((4, 3, 32, 32), 2**64 - 1, "u8"), "its sums do not fit into 64 bits"),
    (np.full((4, 3, 32, 32), 2**56 + 1, "i8"), "its sums do not fit into 64 bits"),
]


@pytest.mark.parametrize(("data", "said"), ODD, ids=["nan", "negative", "dark", "uint64", "int64"])
def test_a_run_on_odd_data(tmp_path, capsys, data, said):
    """Nothing is wrong with the file, and nothing can be done with what it holds."""
    np.save(tmp_path / "a.npy", data)
    config = tmp_path / "crop.yaml"
    config.write_text(f"input: {{path: {tmp_path}/a.npy}}\noutput: {{path: {tmp_path}/b.zarr}}\ncluster: {{kind: threads}}\n")  # fmt: skip
    assert main([str(config)]) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/a.npy: ")
    assert said in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "crop.yaml"]


def test_a_chunk_that_is_a_link_out_of_the_store(tmp_path):
    root = zarr.open_group(tmp_path / "a.zarr", mode="w")
    root.create_array("patterns", data=numbers(), chunks=SHAPE)
    place = tmp_path / "a.zarr/patterns/c/0/0/0/0"
    place.rename(tmp_path / "secret")
    place.symlink_to(tmp_path / "secret")
    source = find(tmp_path / "a.zarr").source
    with pytest.raises(SourceError, match=r"a\.zarr: .*leads out of the store, to .*secret"):
        source[(slice(0, 1),) * 4]
    (tmp_path / "b.zarr").symlink_to("a.zarr")  # a link to a whole store is none out of it
    place.unlink()
    Path(tmp_path / "secret").rename(place)
    assert find(tmp_path / "b.zarr").source[(slice(0, 1),) * 4].shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("6, 5)", "6, 4)"), ("6, 5)", "5, 5)"), ("(3,", "(2,"), ("<u2", "<u1"), (">u2", "|b1")],
)
def test_a_npy_that_says_less_than_it_holds(tmp_path, right, wrong):
    """Read all the same, every pattern but the first would begin in the one before."""
    np.save(tmp_path / "a.npy", numbers().astype(">u2" if right == ">u2" else "<u2"))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content.replace(right.encode(), wrong.encode(), 1))
    with pytest.raises(SourceError, match=r"a\.npy: .* but 720 are there: a size or the type is"):
        find(tmp_path / "a.npy")


def test_files_that_are_odd_but_sound(tmp_path):
    """Python 2's long integers in a .npy; a .zarr whose names of axes are no names."""
    text = "{'descr': '<u2', 'fortran_order': False, 'shape': (3L, 4L, 6L, 5L), }"
    head = b"\x93NUMPY\1\0" + struct.pack("<H", 118) + text.encode().ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(head + numbers().tobytes() + b"more")
    found = find(tmp_path / "a.npy")
    np.testing.assert_array_equal(found.source[(slice(None),) * 4], numbers())
    assert "4 bytes after the array are not read" in found.info.notes
    with open(tmp_path / "two.npy", "wb") as file:
        np.save(file, numbers())
        np.save(file, numbers())
    found = find(tmp_path / "two.npy")
    assert "bytes after the array, another one, are not read" in found.info.notes[0]
    root = zarr.open_group(tmp_path / "b.zarr", mode="w", zarr_format=2)
    array = root.create_array("patterns", data=numbers(), chunks=SHAPE)
    for names in (7, "abcd", [1, None, "ky", {}], {"a": 1}):
        array.attrs["_ARRAY_DIMENSIONS"] = names
        assert find(tmp_path / "b.zarr").info.shape == SHAPE
