"""Archives, folders, and one acquisition in several files: the way out that a refusal names is followed."""

import contextlib
import re
import shlex
import shutil
import subprocess
import warnings
import zipfile
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
import tifffile
import yaml
import zarr
from frames_made import SHAPE, agrees, numbers
from test_dm import one_image

from stem_dask.config.load import parse_config
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.readers.containers import can_be_quoted
from stem_dask.readers.open import find
from stem_dask.writers.synthetic import encode_tags


def refusal(path, **options):
    with pytest.raises(SourceError) as caught:
        find(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def typed(command, folder):
    """Do what a user types in a shell; the Python of the line runs in this process, which takes less time."""
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a line of Python closes no file
        for words in " ".join(shlex.quote(word) for word in shlex.split(command)).split(" '&&' "):
            program, *arguments = shlex.split(words)
            if arguments[:2] == ["-m", "zipfile"]:
                zipfile.main(arguments[2:])
            elif program == "python":
                exec(arguments[1], {})
            else:
                subprocess.run(["bash", "-c", command], check=True)


def opened(words, folder, **more):
    """A file opened with the keys behind its name, as a message has them."""
    name, _, rest = words.partition(" with ")
    keys = dict(word.removeprefix("input.").split("=", 1) for word in rest.split() if "=" in word)
    given = {key: yaml.safe_load(value) for key, value in keys.items() if "scan_y" not in value}
    return find(folder / name, **given, **more)


# --- archives ---------------------------------------------------------------------------------------------------


def archive_of_arrays(path, **more):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in more.items():
            archive.writestr(name.replace("__", "."), content)
        with archive.open("data.npy", "w") as file:
            np.save(file, numbers())


ARCHIVES = {
    "a.ndata": ("a Nion Swift file", {"metadata__json": "{}"}),
    "a.npz": ("an archive of numpy arrays", {"small__npy": b"1"}),
    "a.zip": ("an archive of numpy arrays", {}),
    "a.pt": ("an archive of numpy arrays", {}),
    "a.dat": ("an archive of numpy arrays", {}),
    "a b.npz": ("an archive of numpy arrays", {}),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_of_arrays(tmp_path, name):
    what, more = ARCHIVES[name]
    archive_of_arrays(tmp_path / name, **more)
    message = refusal(tmp_path / name)
    assert f"{name}: {what}" in message
    command, _, there = message.rpartition("unpack it: ")[2].partition(", and open ")
    typed(command, tmp_path)
    agrees(find(tmp_path / there.strip("'")), numbers())


@pytest.mark.parametrize("inside", ["", "store/", "store.zarr/", "one/store/"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_store_in_an_archive(tmp_path, inside, zarr_format):
    store = tmp_path / "made" / inside
    group = zarr.open_group(store, mode="w", zarr_format=zarr_format)
    group.create_array("data", data=numbers(), chunks=SHAPE)
    shutil.make_archive(tmp_path / "a", "zip", tmp_path / "made")
    message = refusal(tmp_path / "a.zip")
    assert "a zarr store in a zip archive is not read" in message
    command, _, there = message.rpartition("unpack it: ")[2].partition(", and open ")
    typed(command, tmp_path)
    agrees(find(tmp_path / (there or command.split()[-1])), numbers())


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("scan.dm4", b"")
    assert "a zip archive of 1 files is not read; unpack it: python -m" in refusal(tmp_path / "a.zip")  # fmt: skip
    archive_of_arrays(tmp_path / "a.npz")
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    assert "a.npz: a zip archive; it is cut or damaged" in refusal(tmp_path / "a.npz")
    (tmp_path / "a.gz").write_bytes(b"\x1f\x8b")
    assert "unpack it (gunzip -k)" in refusal(tmp_path / "a.gz")


def test_what_torch_saves_is_renamed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert "by its content it is a PyTorch file: rename it to a.pt" in refusal(tmp_path / "a.zip")


# --- names ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_a_store(tmp_path):
    zarr.open_group(tmp_path / "my.scan", mode="w").create_array("data", data=numbers(), chunks=SHAPE)  # fmt: skip
    message = refusal(tmp_path / "my.scan")
    assert message.endswith("it is a zarr store; rename it to my.scan.zarr")
    (tmp_path / "my.scan").rename(tmp_path / "my.scan.zarr")
    agrees(find(tmp_path / "my.scan.zarr"), numbers())


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_place_within_a_store(tmp_path, zarr_format):
    root = zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=zarr_format)
    root.create_array("cube", data=numbers(), chunks=SHAPE)
    root.create_array("deep/cube", data=numbers() + 1, chunks=SHAPE)
    for inside, array in (("cube", numbers()), ("deep/cube", numbers() + 1)):
        message = refusal(tmp_path / "x.zarr" / inside)
        path, name = re.search(r"set input\.path: (\S+) and input\.dataset: (\S+)$", message).groups()  # fmt: skip
        agrees(find(path, dataset=name), array)
    assert "a group in the zarr store x.zarr" in refusal(tmp_path / "x.zarr" / "deep")


def test_files_and_folders_that_are_not_known(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "gone")
    (tmp_path / "scan").write_bytes(b"hello")
    assert "scan: a file without extension; known are .app5" in refusal(tmp_path / "scan")
    np.save(tmp_path / "scan.npy", numbers())
    (tmp_path / "scan.npy").rename(tmp_path / "scan")
    assert "a file without extension; by its content it is a numpy file: rename it to scan.npy" in refusal(tmp_path / "scan")  # fmt: skip
    assert "a folder without a file that can be read" in refusal(tmp_path)
    np.save(tmp_path / "scan.npy", numbers())
    assert f"name one of them, or the glob {tmp_path.name}/*.npy" in refusal(tmp_path)


def test_matlab(tmp_path):
    """Version 7.3 is HDF5 behind 512 bytes of text, with its axes in reverse."""
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        file["cube"] = numbers()
        file["cube"].attrs["MATLAB_class"] = np.bytes_(b"uint16")
    with open(tmp_path / "a.mat", "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116))
    assert refusal(tmp_path / "a.mat").endswith("an HDF5 file of MATLAB 7.3: rename it to a.h5")
    (tmp_path / "a.mat").rename(tmp_path / "a.h5")
    found = find(tmp_path / "a.h5")
    agrees(found, numbers())
    assert "MATLAB stores axes in reverse: there it is 5 x 6 x 4 x 3" in found.info.notes
    (tmp_path / "b.mat").write_bytes(b"MATLAB 5.0 MAT-file, Platform".ljust(200))
    assert "save(name, '-v7.3')" in refusal(tmp_path / "b.mat")


def test_nexus(tmp_path):
    with h5py.File(tmp_path / "a.nxs", "w") as file:
        file["entry/data/data"] = numbers()
    found = find(tmp_path / "a.nxs")
    agrees(found, numbers())
    assert found.info.kind == "a NeXus file"


def test_a_name_that_is_not_utf_8(tmp_path):
    """As old Windows programs write them, in Latin-1."""
    name = "5 \udcb5m probe.npy"
    with open(tmp_path / name, "wb") as file:
        np.save(file, numbers())
    agrees(find(tmp_path / name), numbers())
    with pytest.raises(ConfigError, match=r"input.path is .*5 \\xb5m probe\.npy, which is not") as caught:  # fmt: skip
        parse_config({"input": {"path": str(tmp_path / name)}, "output": {"path": "a.zarr"}})
    typed(str(caught.value).rpartition("rename the file: ")[2], tmp_path)
    agrees(find(tmp_path / "5 _m probe.npy"), numbers())
    with pytest.raises(ConfigError, match=r"output.path is .*, which is not UTF-8; choose another"):
        parse_config({"input": {"path": "a.npy"}, "output": {"path": "\udcb5.zarr"}})


# --- more axes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.npy", "t.h5", "t.zarr", "six.npy", "array.zarr"])
def test_a_series_of_scans(tmp_path, name):
    series = numbers((2, *SHAPE))
    if name == "six.npy":
        series = numbers((2, 3, *SHAPE))
    if name.endswith(".npy"):
        np.save(tmp_path / name, series)
    elif name == "t.h5":
        with h5py.File(tmp_path / name, "w") as file:
            file["entry/stack"] = series
    elif name == "t.zarr":
        zarr.open_group(tmp_path / name, mode="w").create_array("stack", data=series)
    else:
        zarr.save_array(str(tmp_path / name), series)
    message = refusal(tmp_path / name)
    assert f"of {series.ndim} axes write one scan into a file of its own" in message
    command, _, there = message.rpartition("its own: ")[2].partition(", then open ")
    typed(command, tmp_path)
    agrees(find(tmp_path / there), series.reshape(-1, *SHAPE)[0])


# --- one acquisition in several files ---------------------------------------------------------------------------


def dectris(folder, array, per_file, master=True, low=True):
    """Data files and their master, as DECTRIS detectors write them."""
    stack = array.reshape(-1, *array.shape[-2:])
    names = []
    for i, start in enumerate(range(0, len(stack), per_file)):
        part = stack[start : start + per_file]
        names.append(f"scan_data_{i + 1:06d}.h5")
        with h5py.File(folder / names[-1], "w") as file:
            data = file.create_dataset(
                "entry/data/data", data=part, chunks=(1, *part.shape[1:]), **hdf5plugin.Bitshuffle()
            )
            if low:
                data.attrs["image_nr_low"] = start + 1
                data.attrs["image_nr_high"] = start + len(part)
    if master:
        with h5py.File(folder / "scan_master.h5", "w") as file:
            for i, name in enumerate(names):
                link = h5py.ExternalLink(name, "entry/data/data")
                file[f"entry/data/data_{i + 1:06d}"] = link
            file["entry/instrument/detector/pixel_mask"] = np.zeros(part.shape[1:], "u4")
    return [folder / name for name in names]


def joined(message, folder, scan):
    command, _, there = message.rpartition("join them: ")[2].partition(", then open ")
    typed(command, folder)
    return opened(there, folder, scan_shape=scan)


def test_a_master_file_and_its_data_files(tmp_path):
    array = numbers((10, 12, 6, 5))
    files = dectris(tmp_path, array, 100)
    message = refusal(tmp_path / "scan_master.h5")
    assert "a master file: the patterns are in 2 files, scan_data_000001.h5 to scan_data_000002.h5" in message  # fmt: skip
    agrees(joined(message, tmp_path, (10, 12)), array)
    assert "open the master file scan_master.h5 in it" in refusal(tmp_path)
    for file, which in zip(files, ("1 to 100", "101 to 120"), strict=True):
        message = refusal(file)
        assert f"it holds patterns {which} of an acquisition in 2 files" in message
        assert "would fit" not in message
    shutil.rmtree(tmp_path / "scan.zarr")
    agrees(joined(message, tmp_path, (10, 12)), array)
    found = find(files[0], scan_shape=(10, 10))
    assert "it holds patterns 1 to 100 of an acquisition in 2 files" in found.info.notes[-1]


@pytest.mark.parametrize("low", [True, False])
def test_data_files_without_their_master(tmp_path, low):
    array = numbers((10, 12, 6, 5))
    files = dectris(tmp_path, array, 100, master=False, low=low)
    agrees(joined(refusal(files[0]), tmp_path, (10, 12)), array)


def test_data_files_that_are_missing(tmp_path):
    files = dectris(tmp_path, numbers((10, 12, 6, 5)), 100)
    files[1].unlink()
    assert "scan_data_000002.h5, which is missing; copy it too" in refusal(tmp_path / "scan_master.h5")  # fmt: skip
    message = refusal(files[0])
    assert "in 2 files or more, of which 1 here; copy the others" in message
    assert "would fit" not in message
    files = dectris(tmp_path, numbers((10, 12, 6, 5)), 100, master=False)
    (tmp_path / "scan_master.h5").unlink()
    files[0].unlink()
    assert "patterns 101 to 120" in refusal(files[1])


def test_the_only_data_file(tmp_path):
    array = numbers((10, 10, 6, 5))
    [file] = dectris(tmp_path, array, 100)
    message = refusal(tmp_path / "scan_master.h5")
    path, name = re.search(r"set input\.path: (\S+) and input\.dataset: (\S+)$", message).groups()
    agrees(find(path, dataset=name, scan_shape=(10, 10)), array)
    assert "would fit" not in refusal(file)


def test_links_with_names_that_a_shell_would_run(tmp_path):
    """A file may not put words into a command that a user pastes."""
    dectris(tmp_path, numbers((10, 12, 6, 5)), 100, master=False)
    with h5py.File(tmp_path / "evil_master.h5", "w") as file:
        for i in (1, 2):
            link = h5py.ExternalLink(f"scan_data_{i:06d}.h5", "entry/data/data")
            file[f"a'];$(touch owned)/data_{i}"] = link
    message = refusal(tmp_path / "evil_master.h5")
    assert "touch" not in message
    assert "python" not in message
    assert not can_be_quoted("$HOME")


@pytest.mark.parametrize(
    ("pattern", "turned"),
    [
        ("pattern_x{x}_y{y}.tif", True),
        ("y{y:03d}x{x:03d}.tif", True),
        ("run12_Y{y}-X{x}_20210507.tif", True),
        ("frame_{i}.tif", False),
        ("{y}_{x}.tif", False),
        ("{i}.npy", False),
        ("row{y}_col{x}.npy", False),
        ("{i}.dm4", False),
    ],
)
def test_a_folder_with_one_image_for_each_position(tmp_path, pattern, turned):
    array = numbers((3, 12, 6, 5))
    folder = tmp_path / "frames"
    folder.mkdir()
    for y, x in np.ndindex(3, 12):
        path = folder / pattern.format(x=x, y=y, i=y * 12 + x)
        if path.suffix == ".tif":
            tifffile.imwrite(path, array[y, x])
        elif path.suffix == ".npy":
            np.save(path, array[y, x])
        else:
            path.write_bytes(encode_tags(dm_image(array[y, x])))
    message = refusal(folder)
    assert f"a folder of 36 {path.suffix} files, an image each" in message
    command, _, there = message.rpartition("stack them: ")[2].partition(", then open ")
    typed(command, tmp_path)
    agrees(opened(there, tmp_path, **({} if turned else {"scan_shape": (3, 12)})), array)


def dm_image(array):
    """A tree with one image, of which RosettaSciIO asks more than is read here."""
    dimension = {"Origin": 0.0, "Scale": 1.0, "Units": ""}
    calibrations = {"Brightness": dimension, "Dimension": [dimension, dimension]}
    more = {"Calibrations": calibrations, "PixelDepth": 2}
    tree = one_image(array.ravel(), list(array.shape[::-1]), **more)
    tree["ImageList"][0]["ImageTags"] = {"Meta Data": {"Format": "Image"}}
    return tree


def test_an_image_of_a_folder(tmp_path):
    for i in range(3):
        tifffile.imwrite(tmp_path / f"{i}.tif", numbers((6, 5)))
    message = refusal(tmp_path / "1.tif")
    folder = re.search(r"one image of many: stem-dask info (\S+) prints how to stack", message)[1]
    assert "stack them: python -c" in refusal(Path(folder))
