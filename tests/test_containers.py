"""Archives, folders, and one acquisition in several files: the way out that a refusal names is followed."""

import contextlib
import re
import shlex
import shutil
import subprocess
import warnings
import zipfile

import h5py
import hdf5plugin
import numpy as np
import pytest
import tifffile
import yaml
import zarr
from frames_made import SHAPE, agrees, numbers
from test_dm import one_image

import stem_dask as sd
from stem_dask.config.load import parse_config
from stem_dask.core.errors import ConfigError, SourceError
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


@pytest.mark.parametrize("name", ["a.ndata", "a.npz", "a b.zip"])
def test_an_archive_of_arrays_is_read_where_it_lies(tmp_path, name):
    archive_of_arrays(tmp_path / name, metadata__json="{}", small__txt=b"1")
    agrees(find(tmp_path / name), numbers())
    np.savez(tmp_path / "two.npz", patterns=np.asfortranarray(numbers()), mean=numbers()[0, 0])
    agrees(find(tmp_path / "two.npz"), numbers())


@pytest.mark.parametrize("name", ["a.pt", "a.dat"])
def test_an_archive_of_another_name(tmp_path, name):
    archive_of_arrays(tmp_path / name)
    message = refusal(tmp_path / name)
    assert f"{name}: an archive of numpy arrays" in message
    command, _, there = message.rpartition("unpack it: ")[2].partition(", and open ")
    typed(command, tmp_path)
    agrees(find(tmp_path / there.strip("'")), numbers())


def test_a_compressed_archive_is_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", patterns=numbers())
    message = refusal(tmp_path / "a.npz")
    assert "a.npz: patterns.npy in it is compressed, and is not read" in message
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
    assert "by its content it is a PyTorch file; rename it to a.pt" in refusal(tmp_path / "a.zip")


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
    if name == "six.npy":
        assert "choose one of its scans with input.index={axis0: 0, axis1: 0}" in message
        index, first = {"axis0": 1, "axis1": 2}, series[1, 2]
    else:
        assert "choose one of its scans with input.index={t: 0}, or read all of them" in message
        index, first = {"t": 1}, series[1]
        together = find(tmp_path / name, series=True)
        agrees(together, series.reshape(-1, *SHAPE[1:]))
        assert "2 scans of 3 x 4, one after another along scan_y" in together.info.notes
        unfolded = sd.open(tmp_path / name, series=True).coarsen(scan_y=3).construct(scan_y=("t", "scan_y"))  # fmt: skip
        assert unfolded.dims == ("t", "scan_y", "scan_x", "ky", "kx")
        np.testing.assert_array_equal(unfolded, series)
    agrees(find(tmp_path / name, index=index), first)
    with pytest.raises(ConfigError, match=r"input\.index is .*expected 0 to 1"):
        find(tmp_path / name, index={**index, next(iter(index)): 2})
    with pytest.raises(ConfigError, match=r"expected an index for [12] of them, such as"):
        find(tmp_path / name, index={"energy": 0})


def test_an_index_of_a_scan(tmp_path):
    np.save(tmp_path / "a.npy", numbers())
    with pytest.raises(ConfigError, match="no array of more than four axes; leave it out"):
        find(tmp_path / "a.npy", index={"t": 0})


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
            mask = np.zeros(part.shape[1:], "u4")
            mask[0, 1] = mask[3, 2] = 1
            file["entry/instrument/detector/pixel_mask"] = mask
            file["entry/instrument/beam/incident_energy"] = 300000.0
    return [folder / name for name in names]


def test_a_master_file_and_its_data_files(tmp_path):
    array = numbers((10, 12, 6, 5))
    files = dectris(tmp_path, array, 100)
    found = find(tmp_path / "scan_master.h5", scan_shape=(10, 12))
    agrees(found, array)
    assert found.files == tuple(map(str, files))
    assert any("2 bad pixels, which are not masked: input.mask={pixels: [[0,1],[3,2]]}" in note for note in found.info.notes)  # fmt: skip
    assert found.info.about["beam_energy_kv"] == 300
    assert "a stack of 120 patterns" in refusal(tmp_path / "scan_master.h5")
    assert "open the master file scan_master.h5 in it" in refusal(tmp_path)
    for file, which in zip(files, ("1 to 100", "101 to 120"), strict=True):
        message = refusal(file)
        assert f"it holds patterns {which} of an acquisition in 2 files" in message
        assert "would fit" not in message
        agrees(opened_by(message), array)
    found = find(files[0], scan_shape=(10, 10))
    assert "it holds patterns 1 to 100 of an acquisition in 2 files" in found.info.notes[-1]
    before = find(tmp_path / "scan_master.h5", scan_shape=(10, 12))
    with h5py.File(files[1], "a") as file:
        file["more"] = 1
    assert before.change() is not None


def opened_by(message):
    """The file opened with the keys at the end of a message, for a scan of 10 x 12."""
    words = shlex.split(message.rpartition("open all of them: ")[2])
    keys = dict(word.removeprefix("input.").split("=", 1) for word in words)
    series = keys.get("series") == "true"
    return find(keys["path"], series=series, scan_shape=(10, 12))


@pytest.mark.parametrize("low", [True, False])
def test_data_files_without_their_master(tmp_path, low):
    array = numbers((10, 12, 6, 5))
    files = dectris(tmp_path, array, 100, master=False, low=low)
    agrees(opened_by(refusal(files[0])), array)


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
    agrees(find(tmp_path / "scan_master.h5", scan_shape=(10, 10)), array)
    assert "would fit" not in refusal(file)


@pytest.mark.parametrize("folder", ["..", "/tmp", "other"])
def test_links_out_of_the_folder_are_not_followed(tmp_path, folder):
    (tmp_path / "here" / "other").mkdir(parents=True)
    dectris(tmp_path / "here", numbers((10, 12, 6, 5)), 100, master=False)
    with h5py.File(tmp_path / "here" / "evil_master.h5", "w") as file:
        file["entry/data/data_1"] = h5py.ExternalLink(f"{folder}/scan_data_000001.h5", "entry/data")
    message = refusal(tmp_path / "here" / "evil_master.h5")
    assert "links are followed within the folder of the file only" in message


@pytest.mark.parametrize("target", ["entry/data", "entry/nothing", "entry/data/data/more"])
def test_links_to_no_patterns(tmp_path, target):
    dectris(tmp_path, numbers((10, 12, 6, 5)), 100, master=False)
    with h5py.File(tmp_path / "a_master.h5", "w") as file:
        file["entry/data/data_1"] = h5py.ExternalLink("scan_data_000001.h5", target)
    assert "where no patterns are" in refusal(tmp_path / "a_master.h5")


def test_a_master_of_files_that_are_not_alike(tmp_path):
    dectris(tmp_path, numbers((10, 12, 6, 5)), 100)
    with h5py.File(tmp_path / "scan_data_000002.h5", "w") as file:
        file["entry/data/data"] = numbers((20, 6, 6))
    assert "patterns of several kinds: 6 x 5 uint16, 6 x 6" in refusal(tmp_path / "scan_master.h5")


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
    assert f"a folder of 36 {path.suffix} files, an image each; read them as one scan" in message
    more = {} if turned else {"scan_shape": (3, 12)}
    for name in (folder, folder / f"*{path.suffix}"):
        found = find(name, series=True, **more)
        agrees(found, array)
        for part in (np.s_[1:3, 2:11:4, :4, 1:], np.s_[:1, 5:6, :, :], np.s_[:0, :, :, :]):
            np.testing.assert_array_equal(found.source[part], array[part])
    if not turned:
        assert "give its scan as input.scan_shape" in refusal(folder, series=True)


def test_stacks_and_scans_one_after_another(tmp_path):
    stacks, scans = numbers((10, 6, 5)), numbers((2, 3, 4, 6, 5))
    for i in (2, 10):  # by their numbers, not as text
        np.save(tmp_path / f"stack{i}.npy", stacks[:6] if i == 2 else stacks[6:])
        np.save(tmp_path / f"scan{i}.npy", scans[int(i == 10)])
    agrees(
        find(tmp_path / "stack*.npy", series=True, scan_shape=(2, 5)), stacks.reshape(2, 5, 6, 5)
    )
    found = find(tmp_path / "scan*.npy", series=True)
    agrees(found, scans.reshape(6, 4, 6, 5))
    assert found.info.notes == ("2 files, scan2.npy to scan10.npy: scans of 3 x 4 x 6 x 5, one after another",)  # fmt: skip
    np.save(tmp_path / "scan10.npy", scans[1] * 2)
    assert found.change() is not None


def test_files_that_are_no_series(tmp_path):
    np.save(tmp_path / "1.npy", numbers((6, 5)))
    np.save(tmp_path / "2.npy", numbers((6, 6)))
    message = refusal(tmp_path / "*.npy", series=True)
    assert "2.npy: 6 x 6 uint16; expected 6 x 5 uint16, as in" in message
    assert "there are no such files" in refusal(tmp_path / "*.tif", series=True)
    (tmp_path / "notes.txt").write_text("a")
    assert "files of several types (.npy, .txt)" in refusal(tmp_path, series=True)


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
    assert "is one image of many: read them as one scan: " in message
    assert message.count("input.series=true") == 1
