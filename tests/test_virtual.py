"""Stores of references: xarray opens them with the values, axes and attributes of the file, and reads its bytes."""

import json
import os
import re
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
import xarray as xr
from frames_made import blo, mib, numbers
from hypothesis import given, settings
from hypothesis import strategies as st

import stem_dask as sd
from stem_dask.cli.main import main
from stem_dask.core.model import Axis
from stem_dask.core.patterns import as_patterns
from stem_dask.readers.flat import FlatFile, FramedFile, Run
from stem_dask.readers.views import ScanOfList, View
from stem_dask.stages.open import lazy_array
from stem_dask.storage.location import at
from stem_dask.writers.references import write_references
from stem_dask.writers.synthetic import write_dm4

SHAPE = (6, 10, 8, 12)
PATTERNS = numbers(SHAPE)

# zarr warns of the codecs that decode gzip and shuffle of HDF5
pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")


def opened(path, **options):
    """The store, as users of xarray open it."""
    return xr.open_zarr("reference://", storage_options={"fo": str(path)}, **options)


def references(path):
    """The ranges of bytes in a store, by the key of their chunk."""
    refs = json.loads(Path(path).read_text())["refs"]
    return {key: one for key, one in refs.items() if isinstance(one, list)}


def words_of(options):
    return [f"input.{key}={json.dumps(value)}" for key, value in options.items()]


def npy(array):
    return lambda folder: np.save(folder / "a.npy", array) or folder / "a.npy"


def raw(head, foot=0):
    def write(folder):
        frames = PATTERNS.reshape(-1, *SHAPE[2:])
        content = b"".join(bytes(head) + one.tobytes() + bytes(foot) for one in frames)
        (folder / "a.raw").write_bytes(content)
        return folder / "a.raw"

    return write, {
        "shape": list(SHAPE),
        "dtype": "uint16",
        "frame_header": head,
        "frame_footer": foot,
    }


def hdf5(array=PATTERNS, userblock=0, **how):
    def write(folder):
        with h5py.File(folder / "a.h5", "w", userblock_size=userblock) as file:
            file.create_dataset("patterns", data=array, **how)
        return folder / "a.h5"

    return write


def dm4(**how):
    def write(folder):
        rows = PATTERNS.transpose(2, 3, 0, 1) if how else PATTERNS
        write_dm4(folder / "a.dm4", rows, SHAPE[:2], SHAPE[2:], PATTERNS.dtype, **how)
        return folder / "a.dm4"

    return write


def series(folder):
    for i, pattern in enumerate(PATTERNS.reshape(-1, *SHAPE[2:])):
        np.save(folder / f"{i:03}.npy", pattern)
    return folder / "*.npy"


GZIP = {"chunks": (4, 3, 8, 12), "compression": "gzip"}
STACK = PATTERNS.reshape(-1, *SHAPE[2:])
SCAN = {"scan_shape": [6, 10]}

#: what writes a file, the options that read it, and the number of references
CASES = {
    "dm4": (dm4(), {}, 1),
    "dm4 detector first": (dm4(swapped=None, detector_first=True), {}, 1),
    "npy": (npy(PATTERNS), {}, 1),
    "npy big-endian": (npy(PATTERNS.astype(">f4")), {}, 1),
    "npy in Fortran's order": (npy(np.asfortranarray(PATTERNS)), {}, 1),
    "npy list": (npy(STACK), {}, 1),
    "npy bool": (npy(PATTERNS % 3 == 0), {}, 1),
    "npy name": (lambda folder: npy(PATTERNS)(folder).rename(folder / "a b%20#{{c}}.npy"), {}, 1),
    "mib": (lambda folder: mib(folder / "a.mib", PATTERNS), SCAN, 60),
    "blo": (lambda folder: blo(folder / "a.blo", PATTERNS[..., :8] % 251), {}, 60),
    "raw": (*raw(0), 1),
    "raw headers": (*raw(40), 60),
    "raw rows behind patterns": (*raw(0, 24), 1),
    "raw rows before patterns": (*raw(24), 60),
    "regions": (raw(0)[0], {**raw(0)[1], "scan_roi": [1, 5, 2, 8]}, 4),
    "steps": (raw(0)[0], {**raw(0)[1], "scan_step": 2}, 15),
    "flyback": (npy(PATTERNS), {"drop_columns": 4}, 6),
    "skipped": (npy(STACK), {"scan_shape": [5, 11], "skip_frames": [2, 3]}, 1),
    "series": (series, {"series": True, "scan_shape": [6, 10]}, 60),
    "hdf5": (hdf5(), {}, 1),
    "hdf5 big-endian with a user block": (hdf5(PATTERNS.astype(">i4"), 512), {}, 1),
    "hdf5 gzip": (hdf5(**GZIP), {}, 8),
    "hdf5 gzip with a user block": (hdf5(userblock=512, **GZIP), {}, 8),
    "hdf5 shuffle": (hdf5(PATTERNS.astype(">f8"), shuffle=True, **GZIP), {}, 8),
    "hdf5 chunks": (hdf5(chunks=(4, 3, 5, 5)), {}, 2 * 4 * 2 * 3),
    "hdf5 blosc": (hdf5(chunks=(2, 10, 8, 12), **hdf5plugin.Blosc(cname="zstd")), {}, 3),
    "hdf5 stack": (hdf5(STACK, chunks=(5, 8, 12), compression="gzip"), SCAN, 12),
    "hdf5 stack of lines": (hdf5(STACK, chunks=(40, 8, 12), compression="gzip"), SCAN, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_values_axes_and_attributes_are_those_of_the_file(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write, options, n = CASES[case]
    path = write(tmp_path)
    assert main(["virtual", str(path), "-o", "out/scan.json", *words_of(options)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"file        out/scan.json: {n:,} references, ")
    assert len(references("out/scan.json")) == n
    ours, found = sd.open(path, **options), opened("out/scan.json").patterns
    assert found.dtype == ours.dtype.newbyteorder("=")
    xr.testing.assert_equal(found, ours)  # dimensions and coordinates, too
    for name, axis in ours.coords.items():
        assert found[name].attrs == axis.attrs
    for name in ("source", "intensity", "beam_energy_kv"):
        assert found.attrs.get(name) == ours.attrs.get(name)
    assert sorted(os.listdir("out")) == ["scan.json"]


def test_a_real_file_is_read_by_dask(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = shared_data / "sim" / "au_np_gms_stemx_u16.dm4"
    assert main(["virtual", str(path)]) == 0
    found, ours = opened("au_np_gms_stemx_u16.json").patterns, sd.open(path)
    assert found.chunks == ((9,), (7,), (76,), (60,))
    xr.testing.assert_equal(found, ours)
    assert found.attrs["beam_energy_kv"] == ours.attrs["beam_energy_kv"]
    assert (found.ky.attrs["units"], found.scan_x.attrs["units"]) == ("1/nm", "nm")


def test_fill_values_stand_for_chunks_that_were_never_written(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        how = {"chunks": (1, *SHAPE[1:]), "fillvalue": np.nan}
        file.create_dataset("patterns", SHAPE, "f4", **how)[2] = PATTERNS[2]
    out = tmp_path / "a.json"
    assert main(["virtual", str(tmp_path / "a.h5"), "-o", str(out)]) == 0
    found = opened(out).patterns
    assert list(references(out)) == ["patterns/c/2/0/0/0"]
    np.testing.assert_array_equal(found[2], PATTERNS[2])
    assert np.isnan(found[3]).all()


def test_positions_that_were_lost_stay_invalid(tmp_path):
    patterns = sd.open(npy(PATTERNS)(tmp_path))
    valid = np.arange(60).reshape(6, 10) % 7 > 0
    lost = patterns.assign_coords(valid=(("scan_y", "scan_x"), valid))
    source = FlatFile(str(tmp_path / "a.npy"), 128, PATTERNS.dtype, SHAPE)
    assert write_references(str(tmp_path / "a.json"), source, lost) == 1
    found = opened(tmp_path / "a.json").patterns
    np.testing.assert_array_equal(found.valid, valid)


def test_references_to_an_object(bucket, tmp_path):
    url, out = f"{bucket}/a.npy", tmp_path / "a.json"
    at(url).write_bytes(npy(PATTERNS)(tmp_path).read_bytes())
    assert main(["virtual", url, "-o", str(out)]) == 0
    assert references(out) == {"patterns/c/0/0/0/0": [url, 128, PATTERNS.nbytes]}


# --- any layout ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_part_of_any_layout(data, tmp_path_factory):
    """Against plain indexing of the array: headers, footers, orders of axes, parts of the scan and windows of the detector."""
    draw, folder = data.draw, tmp_path_factory.mktemp("any")
    shape = tuple(draw(st.integers(1, most)) for most in (5, 6, 11, 7))
    dtype = np.dtype(draw(st.sampled_from(["u1", "<u2", ">i4", "<f8"])))
    array = numbers(shape, dtype)
    lead, head, behind = (draw(st.integers(0, 3)) * draw(st.sampled_from([1, dtype.itemsize * shape[3]])) for _ in range(3))  # fmt: skip
    n_bytes = shape[2] * shape[3] * dtype.itemsize
    path = folder / "a.bin"
    frames = array.reshape(-1, *shape[2:])
    content = bytes(lead) + b"".join(bytes(head) + one.tobytes() for one in frames)
    path.write_bytes(content + bytes(behind))
    runs = (Run(str(path), lead + head, head + n_bytes, len(frames)),)
    if len(frames) > 1:
        cut = draw(st.integers(1, len(frames) - 1))
        second = lead + head + cut * (head + n_bytes)
        runs = (Run(str(path), lead + head, head + n_bytes, cut), Run(str(path), second, head + n_bytes, len(frames) - cut))  # fmt: skip
    source = ScanOfList(FramedFile(runs, dtype, shape[2:]), shape[:2])
    if head == 0 and draw(st.booleans()):
        source = FlatFile(str(path), lead, dtype, shape)
    parts = []
    for i, size in enumerate(shape):
        start = draw(st.integers(0, size - 1))
        step = draw(st.sampled_from([1, 1, 2])) if i < 2 else 1
        parts.append(slice(start, draw(st.integers(start + 1, size)), step))
    if draw(st.booleans()):
        parts[2:] = [slice(0, size) for size in shape[2:]]
    order = draw(st.permutations(range(4)))
    view = View.of(source).select(*parts).transpose(order)
    expected = array[tuple(parts)].transpose(order)
    axes = [Axis(name, n) for name, n in zip(("scan_y", "scan_x", "ky", "kx"), view.shape, strict=True)]  # fmt: skip
    patterns = as_patterns(lazy_array(view, view.shape[:2], "any"), axes, {"source": str(path)})
    write_references(str(folder / "a.json"), view, patterns)
    np.testing.assert_array_equal(opened(folder / "a.json").patterns, expected)


@pytest.mark.parametrize("window", [(0, 8, 0, 12), (2, 6, 3, 9), (1, 8, 5, 12), (0, 8, 4, 8)])
def test_a_window_is_a_view(window, tmp_path):
    """Also where the last row of the last pattern is the end of the file."""
    y0, y1, x0, x1 = window
    patterns = sd.open(npy(PATTERNS)(tmp_path))
    part = (slice(None), slice(None), slice(y0, y1), slice(x0, x1))
    source = FlatFile(str(tmp_path / "a.npy"), 128, PATTERNS.dtype, SHAPE)
    write_references(str(tmp_path / "a.json"), View.of(source).select(*part), patterns[part])
    found = opened(tmp_path / "a.json").patterns
    xr.testing.assert_equal(found, patterns[part])
    assert found.ky.values.tolist() == list(range(y0, y1))


# --- the window of an analysis ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analyzed(beam, tmp_path_factory):
    """A scan and its analysis."""
    folder = tmp_path_factory.mktemp("analyzed")
    np.save(folder / "beam.npy", beam)
    threads = ["cluster.kind=threads", "output.figure=false", "-q"]
    store = str(folder / "beam_analysis.zarr")
    assert main(["analyze", str(folder / "beam.npy"), "--output", store, *threads]) == 0
    return folder


def test_the_window_of_an_analysis(analyzed, tmp_path, beam):
    out = str(tmp_path / "beam.json")
    words = ["virtual", str(analyzed / "beam.npy"), "-o", out]
    words += ["--analysis", str(analyzed / "beam_analysis.zarr")]
    assert main(words) == 0
    found = opened(out).patterns
    y0, y1, x0, x1 = found.attrs["window"]
    assert 0 < y0 < 16
    assert 27 <= y1 < 40
    assert found.shape == (6, 5, y1 - y0, x1 - x0)
    np.testing.assert_array_equal(found, beam[..., y0:y1, x0:x1])
    assert main([*words, "--overwrite", "crop.size=20"]) == 0
    assert opened(out).patterns.shape == (6, 5, 20, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["crop.align=pattern"], "crop.align is pattern, which gives each pattern a window"),
        (["--analysis", "nowhere.zarr"], "nowhere.zarr holds no analysis of whole patterns"),
        (["input.scan_step=2"], "6 x 5 x 40 x 36.* and not from the patterns of .* in their present state"),
    ],
)  # fmt: skip
def test_an_analysis_that_gives_no_window_of_these_patterns(
    analyzed, tmp_path, change, message, capsys
):
    words = ["virtual", str(analyzed / "beam.npy"), "-o", str(tmp_path / "a.json")]
    words += ["--analysis", str(analyzed / "beam_analysis.zarr"), *change]
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "a.json").exists()


# --- sizes and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((1024, 1024, 256, 256), (1, 256)),  # 137 GB
        ((509, 509, 256, 256), (1, 509)),  # a prime number of columns
        ((40, 30, 16, 16), (40, 30)),
    ],
)
def test_few_references_to_a_large_file(shape, chunk, tmp_path, capsys):
    with open(tmp_path / "a.raw", "wb") as file:
        file.truncate(2 * int(np.prod(shape)))
    out = tmp_path / "a.json"
    words = words_of({"shape": list(shape), "dtype": "uint16"})
    assert main(["virtual", str(tmp_path / "a.raw"), "-o", str(out), *words]) == 0
    assert len(references(out)) == shape[0] // chunk[0] * (shape[1] // chunk[1]) <= 4096
    assert out.stat().st_size < 1e6
    found = opened(out).patterns
    assert found.shape == shape
    assert found.encoding["chunks"] == (*chunk, *shape[2:])


FLAT = words_of({"shape": [1, 300_001, 2, 2], "dtype": "uint8", "frame_header": 1})
REFUSED = {
    "flipped": (npy(PATTERNS), ["input.flip=true"], 3, "patterns are flipped .* stem-dask convert .*a.npy NAME.zarr"),
    "filter": (hdf5(chunks=True, compression="lzf"), [], 3, "HDF5's filter 32000, which zarr cannot decode"),
    "part of chunks": (hdf5(**GZIP), ["input.scan_step=2"], 3, "chunks of HDF5 are referenced only where all"),
    "lines": (hdf5(STACK, chunks=(4, 8, 12)), ["input.scan_shape=[6,10]"], 3, "chunks of 4 patterns do not fit into lines of 10"),
    "dark": (npy(PATTERNS), ["input.dark=d.npy"], 2, "input.dark changes values"),
    "two": (npy(PATTERNS), ["b.npy"], 2, "virtual takes one file, not 2"),
    "name": (npy(PATTERNS), ["-o", "a.zarr"], 2, "--output is a.zarr; expected the name of a file that ends with .json"),
    "url": (npy(PATTERNS), ["-o", "s3://lab/a.json"], 2, "--output is s3://lab/a.json"),
    "exists": (npy(PATTERNS), ["-o", "there.json"], 2, "there.json exists"),
    "store": (lambda folder: sd.export(PATTERNS, folder / "a.zarr"), [], 3, "a.zarr: it is a zarr store already"),
    "tif": (lambda folder: write_tif(folder), ["input.scan_shape=[6,10]"], 3, "not stored one after another as plain numbers"),
    "many": (lambda folder: write_many(folder), FLAT, 3, "its 300,001 patterns need a reference each, more than 300,000"),
}  # fmt: skip


def write_tif(folder):
    import tifffile

    tifffile.imwrite(folder / "a.tif", STACK, compression="zlib", photometric="minisblack")
    return folder / "a.tif"


def write_many(folder):
    (folder / "a.raw").write_bytes(bytes(5 * 300_001))
    return folder / "a.raw"


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("mine")
    write, words, code, message = REFUSED[case]
    path = write(tmp_path)
    if "b.npy" in words:
        np.save("b.npy", PATTERNS)
    assert main(["virtual", str(path), *words]) == code
    assert re.search(message, capsys.readouterr().err)
    assert Path("there.json").read_text() == "mine"
    assert not Path("a.json").exists()
    assert not list(tmp_path.glob("*.incomplete"))


@pytest.mark.parametrize("change", ["removed", "cut"])
def test_a_file_that_is_gone_does_not_read_as_zeros(change, tmp_path):
    path, out = npy(PATTERNS)(tmp_path), tmp_path / "a.json"
    assert main(["virtual", str(path), "-o", str(out)]) == 0
    if change == "removed":
        path.unlink()
    else:
        os.truncate(path, 5000)
    with pytest.raises((RuntimeError, ValueError), match=r"failed to fetch|cannot reshape"):
        opened(out).patterns.compute()
