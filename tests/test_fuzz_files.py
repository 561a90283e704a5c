"""Files of every family, damaged in every way that a generator thinks of: they are read, or refused in one line.

``STEM_DASK_FUZZ=20`` tries 20 times as many, and others.
"""

import json
import os
import resource
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from frames_made import (
    SHAPE,
    app5,
    blo,
    by_turns,
    dm_image,
    emd,
    empad,
    hdr,
    info,
    mib,
    mrc,
    numbers,
    raw_mib,
    seq,
    tiff,
    tvips,
)  # fmt: skip
from hostile import Files, damage, refused

import stem_dask as sd
from stem_dask.readers.formats import READERS
from stem_dask.readers.rsciio import SUFFIXES
from stem_dask.writers.synthetic import encode_tags

MORE = int(os.environ.get("STEM_DASK_FUZZ", "1"))
STACK = {"scan_shape": (3, 4)}


def dm(path, version):
    along = {"Scale": np.float32(0.1), "Origin": np.float32(1), "Units": "nm"}
    tags = {"Meta Data": {"Data Order Swapped": np.uint8(1)}}
    image = dm_image(numbers(), tags, Calibrations={"Dimension": [along] * 4})
    path.write_bytes(encode_tags({"ImageList": [image]}, version=version))
    return path


def hdf5(path, libver):
    with h5py.File(path, "w", libver=libver) as file:
        group = file.create_group("a/b")
        group.create_dataset("data", data=numbers(), chunks=(1, 2, 6, 5), compression="gzip")
        group["loop"], file["soft"] = file["a"], h5py.SoftLink("/nowhere")
        file["elsewhere"] = h5py.ExternalLink("gone.h5", "/x")
        file.attrs["about"] = "a text"
    return path


def store(path, version, **options):
    root = zarr.open_group(path, mode="w", zarr_format=version)
    root.attrs["about"] = "words of which some may be lost " * 20
    root.create_array("patterns", data=numbers(), chunks=(3, 2, 6, 5), **options)
    return path


def emd_of(path, group, kind, first, ends):
    sizes = dict(zip("abcd", SHAPE, strict=True))
    dims = [(name, "nm", np.arange(2 if ends else n) * 0.5) for name, n in sizes.items()]
    return emd(path, numbers(), group, dims, kind, first)


def npy(path):
    np.save(path, numbers())
    return path


def archive(path):
    """A .npy file and the properties of Nion Swift in a zip archive."""
    axis = {"scale": 0.5, "offset": 1.0, "units": "nm"}
    properties = {
        "datum_dimension_count": 2,
        "collection_dimension_count": 2,
        "dimensional_calibrations": [axis] * 4,
    }
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("metadata.json", json.dumps(properties))
        with file.open("data.npy", "w") as member:
            np.save(member, numbers())
    return path


def pt(path):
    torch = pytest.importorskip("torch")
    axes = [{"name": "ky", "size": 6, "scale": 0.5, "units": "nm", "offset": 0.0}]
    torch.save({"patterns": torch.from_numpy(numbers(dtype="i2")), "axes": axes}, path)
    return path


def packed(path, codec):
    options = {"predictor": codec == "lzw", "rowsperstrip": 4, "photometric": "minisblack"}
    tifffile.imwrite(path, numbers(), compression=codec, **options)
    return path


def raw(path):
    path.write_bytes(numbers().tobytes())
    return path


def ours(folder, suffix):
    """What we write ourselves, with all that we read back."""
    patterns = sd.open(npy(folder / "a.npy"), beam_energy_kv=200)
    valid = np.arange(12).reshape(SHAPE[:2]) > 2
    patterns = patterns.assign_coords(valid=(("scan_y", "scan_x"), valid))
    patterns.attrs["original_metadata"] = {"tags": {"curve": [1, 2, 3], "text": "a"}}
    sd.export(patterns, folder / f"a{suffix}")
    (folder / "a.npy").unlink()
    return folder / f"a{suffix}"


STACKED = numbers((12, 6, 5))
WIDE = numbers((6, 8, 64), "i4") % 2  # a row of 64 bits
#: family -> how a sound file of it is made, and how it is opened
FAMILIES = {
    "dm3": (lambda f: dm(f / "a.dm3", 3), {}),
    "dm4": (lambda f: dm(f / "a.dm4", 4), {}),
    "hdf5 of before 1.8": (lambda f: hdf5(f / "a.h5", "earliest"), {}),
    "hdf5 of today": (lambda f: hdf5(f / "a.hdf5", "latest"), {}),
    "nexus": (lambda f: hdf5(f / "a.nxs", "latest"), {}),
    "emd of ncem": (lambda f: emd_of(f / "a.emd", "data/cube", 1, 1, False), {}),
    "emd of py4dstem": (lambda f: emd_of(f / "a.emd", "root/datacube", "array", 0, True), {}),
    "app5": (lambda f: app5(f / "a.app5", numbers()), {}),
    "zarr 2": (lambda f: store(f / "a.zarr", 2), {}),
    "zarr 3": (lambda f: store(f / "a.zarr", 3), {}),
    "zarr 3 with shards": (lambda f: store(f / "a.zarr", 3, shards=(3, 4, 6, 5)), {}),
    "npy": (lambda f: npy(f / "a.npy"), {}),
    "npz": (lambda f: archive(f / "a.npz"), {}),
    "zip": (lambda f: archive(f / "a.zip"), {}),
    "ndata": (lambda f: archive(f / "a.ndata"), {}),
    "ndata1": (lambda f: archive(f / "a.ndata1"), {}),
    "nhdf": (lambda f: hdf5(f / "a.nhdf", "latest"), {}),
    "pt": (lambda f: pt(f / "a.pt"), {}),
    "mib": (lambda f: hdr(mib(f / "a.mib", numbers()), ScanX=4, ScanY=3), {}),
    "mib of two counters": (lambda f: by_turns(f / "a.mib", STACKED, "01"), {"dataset": "counter 1", "scan_shape": (2, 3)}),
    "raw mib": (lambda f: hdr(raw_mib(f / "a.mib", WIDE, 1), ScanX=3, ScanY=2), {}),
    "raw mib of 24 bits": (lambda f: raw_mib(f / "a.mib", WIDE, 24), {"scan_shape": (2, 3)}),
    "raw mib of 2x2": (lambda f: raw_mib(f / "a.mib", numbers((6, 8, 8)), 12, 4), {"scan_shape": (2, 3)}),
    "blo": (lambda f: blo(f / "a.blo", numbers((3, 4, 6, 6), "u1")), {}),
    "empad": (lambda f: empad(f)[0], {}),
    "empad's raw": (lambda f: empad(f)[0].with_name("scan_x4_y3.raw"), {}),
    "mrc": (lambda f: info(mrc(f / "a.mrc", STACKED), "a_info.txt"), {}),
    "tvips": (lambda f: tvips(f / "a_000.tvips", STACKED), STACK),
    "seq": (lambda f: seq(f / "a.seq", STACKED), STACK),
    "tif": (lambda f: tiff(f / "a.tif", STACKED, rows=3), STACK),
    "bigtiff": (lambda f: tiff(f / "a.tiff", STACKED, ">", big=True), STACK),
    "tif of deflate": (lambda f: packed(f / "a.tif", "deflate"), {}),
    "tif of lzw": (lambda f: packed(f / "a.tif", "lzw"), {}),
    "tif of packbits": (lambda f: packed(f / "a.tif", "packbits"), {}),
    "our zarr": (lambda f: ours(f, ".zarr"), {}),
    "our zspy": (lambda f: ours(f, ".zspy"), {}),
    "our hspy": (lambda f: ours(f, ".hspy"), {}),
    "our h5": (lambda f: ours(f, ".h5"), {}),
    "our pt": (lambda f: ours(f, ".pt"), {}),
    "raw": (lambda f: raw(f / "a.raw"), {"shape": SHAPE, "dtype": "u2"}),
    "raw with headers": (lambda f: raw(f / "a.raw"), {"shape": (3, 4, 5, 5), "dtype": "u2", "frame_header": 10}),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def sound(request, tmp_path_factory):
    """A sound file of each family."""
    make, options = FAMILIES[request.param]
    files = Files.of(make(tmp_path_factory.mktemp("sound")), **options)
    assert refused(files.write(tmp_path_factory.mktemp("again")), **options) is None
    return files


def test_every_reader_is_tried(tmp_path):
    tried = set()
    for i, (make, _) in enumerate(FAMILIES.values()):
        (tmp_path / str(i)).mkdir()
        tried.add(make(tmp_path / str(i)).suffix)
    assert READERS.keys() - tried == {*SUFFIXES}  # which RosettaSciIO parses


def test_damaged(sound, tmp_path):
    """The files that a failure is about stay in the folder of the test."""
    tried, lying = {True: 0, False: 0}, None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(120 * MORE):
        files = damage(sound, number)
        path = files.write(tmp_path / "damaged", lying)
        tried[refused(path, **files.options) is None] += 1
        lying = files
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert min(tried.values()) > 0  # the mutations neither miss nor destroy everything


def test_lost(sound, tmp_path):
    """Without one of its files, with a folder or a loop in its place, or with a link to nowhere."""
    # some files from all over a store of many
    for name in list(sound.content)[:: max(1, len(sound.content) // (12 * MORE))]:
        rest = {n: content for n, content in sound.content.items() if n != name}
        path = Files(sound.path, rest).write(tmp_path / "lost")
        place = Path(tmp_path / "lost" / name)
        place.parent.mkdir(parents=True, exist_ok=True)
        refused(path, **sound.options)
        place.mkdir()
        refused(path, **sound.options)
        place.rmdir()
        for target in ("gone", place.name):
            place.symlink_to(target)
            refused(path, **sound.options)
            place.unlink()
