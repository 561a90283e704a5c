"""Every format keeps what it is given: values, axes, words and arrays; in every codec, and what comes late."""

import gzip
import json
import shutil
import zipfile
from dataclasses import replace
from math import prod

import dask.array as da
import h5py
import hdf5plugin
import hyperspy.api as hs
import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import stem_dask as sd
from stem_dask.core.errors import ConfigError, DiskFullError, StoreError
from stem_dask.core.formats import HDF5_SUFFIXES, Output
from stem_dask.core.model import Axis
from stem_dask.core.patterns import as_patterns, axes_of
from stem_dask.engine import run as engine
from stem_dask.readers.hdf5 import list_hdf5
from stem_dask.stages.export import Target, export, export_job, write_patterns
from stem_dask.storage.publish import publish
from stem_dask.writers.codecs import CODECS
from stem_dask.writers.hdf5 import Hdf5Sink
from stem_dask.writers.hyperspy import ZspySink
from stem_dask.writers.spool import SplitSink, SpoolSink

SCAN = ("scan_y", "scan_x")
SHAPE, LEAD = (7, 11, 6, 5), (3, 4)
PACKED = (".zarr", ".hspy", ".zspy")
SUFFIXES = (*PACKED, ".pt", ".npy")  # the other three of HDF5 have the same bytes
AXES = {
    "scan_y": (0.5, 3.0, "nm"),
    "scan_x": (0.25, -1.0, "µm"),
    "pattern": (2.0, 1.0, "s"),
    "ky": (0.1, -0.6, "1/nm"),
    "kx": (-0.2, -1.0, "mrad"),
}
ATTRS = {
    "beam_energy_kv": 200.0,
    "align": "pattern",
    "window_size": [6, 5],
    "cropped_axes": ["ky", "kx"],
    "original_metadata": {"Camera": {"name": "Ångström", "gains": [1.5, 2.0]}, "n/a": None},
}


def numbers(shape=SHAPE, dtype="u2"):
    return (np.arange(prod(shape)) % (2 if dtype == "bool" else 2039)).reshape(shape).astype(dtype)


def lazy(array, lead=LEAD, **attrs):
    dims = (*SCAN, "ky", "kx") if array.ndim == 4 else ("pattern", "ky", "kx")
    axes = [Axis(dim, n, *AXES[dim]) for dim, n in zip(dims, array.shape, strict=True)]
    data = da.from_array(array, chunks=(*lead, *array.shape[-2:]))
    return as_patterns(data, axes, {"intensity": "counts", **attrs})


def positions(patterns):
    """Per-position arrays, and which positions could be read."""
    dims = patterns.dims[:-2]
    shape = patterns.shape[:-2]
    center = np.linspace(5, 6, prod(shape)).reshape(shape)
    center.flat[3] = np.nan
    origin = np.arange(prod(shape), dtype="i4").reshape(shape) - 9
    known = xr.Dataset({"center_y": (dims, center), "window_y": (dims, origin)})
    return known, np.arange(prod(shape)).reshape(shape) % 5 != 2


class Back:
    """What others' readers find in a file."""

    def __init__(self, path):
        self.axes = self.title = self.energy = self.valid = None
        self.known, self.dtype = {}, None
        getattr(self, "hspy" if path.suffix in HDF5_SUFFIXES else path.suffix[1:])(path)

    def zarr(self, path):
        root = xr.open_zarr(path)
        self.values = root.patterns.values
        self.axes = [
            tuple(root[d].attrs[k] for k in ("scale", "offset", "units"))
            for d in root.patterns.dims
        ]
        self.title, self.energy = root.attrs["title"], root.attrs["beam_energy_kv"]
        self.valid = root["valid"].values
        self.known = xr.open_zarr(path, group="analysis")

    def pt(self, path):
        found = torch.load(path, weights_only=True, mmap=True)
        self.values, self.energy = found["patterns"].numpy(), found["beam_energy_kv"]
        self.axes = [(axis["scale"], axis["offset"], axis["units"]) for axis in found["axes"]]
        self.known = found["analysis"]
        self.valid = self.known["valid"].numpy()

    def npy(self, path):
        self.values = np.load(path, mmap_mode="r")

    def hspy(self, path):
        self.zspy(path)
        with h5py.File(path) as file:
            data = file["patterns"]
            scales = [data.dims[i][0] for i in range(data.ndim)]
            for scale, label in zip(scales, data.dims, strict=True):
                assert scale.is_scale
                assert scale.name == f"/{label.label}"
                positions = scale.attrs["offset"] + scale.attrs["scale"] * np.arange(scale.size)
                np.testing.assert_allclose(scale[...], positions, rtol=1e-12)
            axes = [tuple(scale.attrs[k] for k in ("scale", "offset", "units")) for scale in scales]
            assert axes == self.axes
            assert file.attrs["title"] == self.title
            assert file.attrs["beam_energy_kv"] == data.attrs["beam_energy_kv"] == self.energy
            np.testing.assert_array_equal(file["valid"][...], self.valid)
            for name, array in file["analysis"].items():
                np.testing.assert_array_equal(array[...], self.known[name])
            assert data.attrs["window_size"].tolist() == [6, 5]
            assert file["analysis/center_y"].dims[0].label == data.dims[0].label

    def zspy(self, path):
        signal = hs.load(path, file_format="zspy" if path.suffix == ".zspy" else "hspy")
        self.values = signal.data
        self.axes = [(a.scale, a.offset, a.units) for a in signal.axes_manager._axes]
        self.title = signal.metadata.General.title
        self.energy = signal.metadata.Acquisition_instrument.TEM.beam_energy
        self.known = signal.metadata.stem_dask.as_dictionary()
        self.valid = self.known["valid"]
        assert list(self.known["window_size"]) == [6, 5]
        assert list(self.known["cropped_axes"]) == ["ky", "kx"]
        assert signal.original_metadata.Camera.name == "Ångström"
        assert list(signal.original_metadata.Camera.gains) == [1.5, 2.0]
        total = self.values.sum(axis=(-2, -1), dtype="f8")
        np.testing.assert_array_equal(signal.navigator.data, total)
        names = [axis.name for axis in signal.axes_manager._axes]
        assert names in (["y", "x", "ky", "kx"], ["pattern", "ky", "kx"])


def check(path, array, *, known=None, valid=None):
    """All that the format has a place for is there."""
    found = Back(path)
    np.testing.assert_array_equal(found.values, array)
    if path.suffix != ".npy":
        dims = (*SCAN, "ky", "kx") if array.ndim == 4 else ("pattern", "ky", "kx")
        assert found.axes == [AXES[dim] for dim in dims]
        assert found.energy == 200
        np.testing.assert_array_equal(found.valid, valid)
        for name in known:
            np.testing.assert_array_equal(np.asarray(found.known[name]), known[name].values)
    if path.suffix not in (".pt", ".npy"):
        assert found.title == "gold/on carbon"
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("shape", "lead", "dtype"),
    [
        *((SHAPE, LEAD, dtype) for dtype in ("u2", ">u2", ">f4", "bool", "f2", "u8", "i2")),
        ((11, 8, 6), (4,), ">f4"), ((1, 7, 8, 6), (1, 2), "u2"), ((7, 1, 8, 6), (2, 1), "bool"),
    ],
)  # fmt: skip
def test_everything_comes_back(tmp_path, suffix, shape, lead, dtype):
    array, path = numbers(shape, dtype), tmp_path / f"a{suffix}"
    patterns = lazy(array, lead, maximum=2038, **ATTRS)
    known, valid = positions(patterns)
    patterns = patterns.assign_coords(valid=(patterns.dims[:-2], valid))
    export(patterns, path, analysis=known, title="gold/on carbon")
    found = check(path, array, known=known, valid=valid)
    if not (suffix == ".pt" and array.dtype.kind in "bu"):
        assert found.values.dtype == array.dtype.newbyteorder("=")
    again = sd.open(path)
    np.testing.assert_array_equal(again.values, array)
    if suffix != ".npy":
        axes = [(axis.scale, axis.offset, axis.units) for axis in axes_of(again)]
        assert axes == [AXES[axis.name] for axis in axes_of(again)]
        assert again.dims == patterns.dims


# --- codecs -----------------------------------------------------------------------------------------------------

SHUFFLED = {"shuffle": (2,), "gzip": 4}
FILTERS = {
    "auto": SHUFFLED, "gzip": SHUFFLED, "none": {},
    # revision of the filter and of blosc's format, bytes of a number and of a chunk; level, bitshuffle, lz4 or zstd
    "lz4": {"32001": (2, 2, 2, 480, 5, 2, 1)}, "zstd": {"32001": (2, 2, 2, 480, 1, 2, 5)},
}  # fmt: skip
ZARR = {
    "auto": ("blosc", "lz4", 5), "lz4": ("blosc", "lz4", 5), "zstd": ("blosc", "zstd", 1),
    "gzip": ("gzip", None, 4), "none": None,
}  # fmt: skip


def tree(path):
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec(tmp_path, suffix, codec, monkeypatch):
    array, trees = numbers((7, 4, 6, 5)), []
    patterns = lazy(array, (2, 4), **ATTRS)
    known, valid = positions(patterns)
    patterns = patterns.assign_coords(valid=(SCAN, valid))
    for second in (1e9, 2e9):
        monkeypatch.setattr(gzip.time, "time", lambda now=second: now)  # gzip's headers have it
        path = tmp_path / f"{second}{suffix}"
        notes = write_patterns(patterns, path, analysis=known, title="gold/on carbon", codec=codec)[
            1
        ]
        trees.append(tree(path))
    monkeypatch.undo()
    assert trees[0] == trees[1]
    check(path, array, known=known, valid=valid)
    np.testing.assert_array_equal(sd.open(path).values, array)
    blosc = suffix == ".hspy" and codec in ("lz4", "zstd")
    told = f"{path.name} is compressed with blosc {codec}: reading it requires hdf5plugin"
    assert notes == ([told] if blosc else [])
    if suffix == ".hspy":
        with h5py.File(path) as file:
            assert file["patterns"]._filters == FILTERS[codec]
            assert file["patterns"].chunks == (2, 4, 6, 5)
    elif suffix == ".zarr":
        inner = zarr.open_array(path, path="patterns").metadata.to_dict()["codecs"][0]
        codecs = inner["configuration"]["codecs"]
        *packed, crc = [entry for entry in codecs if entry["name"] != "bytes"]
        assert crc["name"] == "crc32c"
        told = [
            (c["name"], c["configuration"].get("cname"), c["configuration"].get("clevel", 4))
            for c in packed
        ]
        assert told == ([ZARR[codec]] if ZARR[codec] else [])
    else:
        compressor = zarr.open_array(
            path, path="Experiments/gold-on carbon/data"
        ).metadata.compressor
        got = compressor and compressor.get_config()
        told = got and (got["id"], got.get("cname"), got.get("clevel", got.get("level")))
        assert told == ZARR[codec]


def test_blosc_chunks_are_those_that_hdf5_makes(tmp_path):
    """The same filter, asked for by h5py, gives the same numbers back and the same settings."""
    array = numbers((4, 3, 6, 5))
    with pytest.warns(
        UserWarning, match=r"a\.hspy is compressed with blosc lz4: reading it requires"
    ):
        export(lazy(array, (2, 3)), tmp_path / "a.hspy", codec="lz4")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        options = hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.BITSHUFFLE)
        file.create_dataset("patterns", data=array, chunks=(2, 3, 6, 5), **options)
    with h5py.File(tmp_path / "a.hspy") as ours, h5py.File(tmp_path / "b.h5") as theirs:
        assert ours["patterns"]._filters == theirs["patterns"]._filters
        np.testing.assert_array_equal(ours["patterns"][...], theirs["patterns"][...])


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
@pytest.mark.parametrize("codec", ["lz4", "zstd", "gzip"])
def test_flat_files_have_no_codec(tmp_path, suffix, codec):
    message = rf"a\{suffix}: the codec is {codec}, but \{suffix} files are not compressed; leave it at auto"
    with pytest.raises(ConfigError, match=message):
        export(lazy(numbers()), tmp_path / f"a{suffix}", codec=codec)
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / f"a{suffix}"
    assert export(lazy(numbers(dtype="i2")), path, codec="none") == str(path)


def test_what_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"the codec is 'lzma'; expected one of auto, lz4, zstd"):
        export(lazy(numbers()), tmp_path / "a.h5", codec="lzma")
    huge = as_patterns(
        da.zeros((1, 2**15, 256, 256), dtype="u2", chunks=(1, -1, -1, -1)),
        [Axis(name, n) for name, n in zip((*SCAN, "ky", "kx"), (1, 2**15, 256, 256), strict=True)],
    )
    with pytest.raises(ConfigError, match=r"a chunk would have 4,294,967,296 bytes.*lower output"):
        export(huge, tmp_path / "a.h5", rechunk=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("rechunk", [True, False])
def test_rechunk(tmp_path, suffix, rechunk):
    """5 patterns make 1 MiB, and 42 make 8 MiB, which a file of its own has."""
    block = (4, 16) if suffix == ".zspy" else (2, 8)
    chunk = (*(block if not rechunk else (2, 16) if suffix == ".zspy" else (1, 4)), 384, 256)
    array = numbers((5, block[1], 384, 256))
    path = tmp_path / f"a{suffix}"
    export(lazy(array, block), path, rechunk=rechunk, codec="none")
    if suffix == ".hspy":
        with h5py.File(path) as file:
            assert file["patterns"].chunks == chunk
            np.testing.assert_array_equal(file["patterns"][4], array[4])
    else:
        name = "patterns" if suffix == ".zarr" else "Experiments/4D-STEM/data"
        stored = zarr.open_array(path, path=name, mode="r")
        assert stored.chunks == chunk
        np.testing.assert_array_equal(stored[4], array[4])


def test_the_name_of_an_export_tells_what_its_bytes_depend_on():
    assert export_job("a.h5", "scan") == "export .h5"
    assert export_job("a.pt", "nchw", "none") == "export .pt nchw none"
    assert export_job("a.zarr", "scan", "zstd", False) == "export .zarr zstd whole blocks"


# --- what is known only after the pass ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".h5"])
def test_one_pass_into_a_file_and_what_comes_late(tmp_path, suffix):
    """As a pipeline does: patterns into the file, sums into a spool, then what follows from them."""
    array, path = numbers(dtype="i2"), tmp_path / f"a{suffix}"
    patterns = lazy(array, **ATTRS)
    known, valid = positions(patterns)
    begun = patterns.assign_coords(valid=(SCAN, np.ones(SHAPE[:2], bool)))
    target = Target(
        str(path), begun, xr.zeros_like(known), title="gold/on carbon", folder=f"{tmp_path}/export"
    )
    spool = SpoolSink(f"{tmp_path}/sums")
    outputs = {**target.outputs(), "sum": patterns.data.sum((2, 3))}
    sink = SplitSink(target.sink(), tuple(target.outputs()), spool)
    records = engine.run(outputs, 2, sink)
    assert all(sink.verify(record) is None for record in records)
    total = np.zeros(SHAPE[:2])
    for region, block in spool.blocks(len(records)):
        assert list(block) == ["sum"]
        total[region] = block["sum"]
    np.testing.assert_array_equal(total, array.sum((2, 3)))
    assert target.finish(known, valid, {"maximum": 2038}, {"run": {"hot": [[1, 2]]}}) == []
    publish(path)
    found = check(path, array, known=known, valid=valid)
    assert found.values.dtype == np.dtype("i2")
    if suffix == ".zarr":
        assert xr.open_zarr(path).patterns.attrs["maximum"] == 2038
        assert xr.open_zarr(path).attrs["run"] == {"hot": [[1, 2]]}
    if suffix in HDF5_SUFFIXES:
        with h5py.File(path) as file:
            assert file["patterns"].attrs["maximum"] == 2038
            told = json.loads(file.attrs.get("run", "null"))
            assert told == (None if suffix == ".hspy" else {"hot": [[1, 2]]})
    if suffix == ".pt":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


def test_a_pt_holds_only_what_it_was_begun_for(tmp_path):
    patterns = lazy(numbers(dtype="i2"))
    known, valid = positions(patterns)
    target = Target(str(tmp_path / "a.pt"), patterns)
    engine.run(target.outputs(), 2, target.sink())
    assert target.finish(valid=np.ones_like(valid)) == []  # that all are valid needs no array
    message = r"was begun for the arrays none, but is completed with analysis/valid: bool \(7, 11\); pass all arrays"
    with pytest.raises(StoreError, match=message):
        target.finish(valid=valid)
    with pytest.raises(StoreError, match=r"analysis/center_y: float64"):
        target.finish(known)
    with pytest.raises(StoreError, match=r"was begun for the arrays analysis/center_y: float32"):
        replace(target, analysis=known.astype("f4")[["center_y"]]).finish(known[["center_y"]])


@pytest.mark.parametrize("suffix", [".hspy", ".zspy", ".zarr"])
def test_no_room_at_the_end_is_told(tmp_path, suffix, monkeypatch):
    """Workers are done by then; HDF5 would only complain to the terminal."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("stem_dask.writers.hdf5.shutil.disk_usage", lambda path: free)
    monkeypatch.setattr("stem_dask.writers.zarr.write_array", full)
    monkeypatch.setattr("stem_dask.writers.hyperspy.signal_of", full)
    with pytest.raises(DiskFullError, match=r"cannot be written: No space left on device"):
        export(lazy(numbers()), tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


# --- single formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u2", ">f4", "bool", "f2"])
@pytest.mark.parametrize(("shape", "lead"), [(SHAPE, LEAD), ((11, 8, 6), (4,))])
def test_npy_is_what_numpy_saves(tmp_path, dtype, shape, lead):
    array = numbers(shape, dtype)
    export(lazy(array, lead), tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", array.astype(array.dtype.newbyteorder("<")))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)


@pytest.mark.parametrize("suffix", [".hspy", ".zspy"])
def test_a_signal_opens_lazily_in_hyperspy(tmp_path, suffix):
    array = numbers()
    patterns = lazy(array, **ATTRS)
    known, _ = positions(patterns)
    export(patterns, tmp_path / f"a{suffix}", analysis=known, title="gold")
    signal = hs.load(tmp_path / f"a{suffix}", lazy=True)
    assert type(signal).__name__ == "LazySignal2D"
    assert signal.data.chunks == ((3, 3, 1), (4, 4, 3), (6,), (5,))
    np.testing.assert_array_equal(signal.inav[10, 6].data.compute(), array[6, 10])
    np.testing.assert_array_equal(signal.data.compute(), array)
    axes = signal.axes_manager._axes
    assert [(axis.name, axis.navigate) for axis in axes] == [
        ("y", True), ("x", True), ("ky", False), ("kx", False)
    ]  # fmt: skip
    np.testing.assert_array_equal(signal.navigator.data, array.sum(axis=(2, 3)))
    np.testing.assert_array_equal(signal.metadata.stem_dask.center_y, known.center_y.values)
    if suffix == ".hspy":
        signal.close_file()


def small_zspy(folder, shape, **options):
    output = Output(
        f"{folder}/a.zspy", shape, np.dtype("u1"), (2, 2, 2), title="t", spool=f"{folder}/spool", **options
    )  # fmt: skip
    return ZspySink(output)


@pytest.mark.parametrize("codec", ["zstd", "gzip"])
def test_going_on_in_a_zspy_of_another_codec_starts_anew(tmp_path, codec):
    for now, n_chunks in (("auto", 0), (codec, 0), (codec, 1)):
        sink = small_zspy(tmp_path, (2, 2, 2), codec=now)
        sink.create(resume=True)
        assert len(list(tmp_path.rglob("data/0/0/0"))) == n_chunks
        sink.write(0, (slice(0, 2),), {"patterns": np.ones((2, 2, 2), "u1")})


@pytest.mark.parametrize("kind", [Hdf5Sink, ZspySink])
def test_blocks_that_share_a_chunk_are_refused(tmp_path, kind):
    sink = kind(Output(str(tmp_path / "a"), (7, 2, 2), np.dtype("u1"), (2, 2, 2)))
    for region in (slice(1, 2), slice(2, 5)):
        with pytest.raises(StoreError, match=r"a block at \d:\d shares a chunk of 2"):
            sink.write(3, (region,), {"patterns": np.zeros((1, 2, 2), "u1")})


def test_scales_of_another_program_are_read(tmp_path):
    """Only positions, no scale and offset; one axis uneven, one without a scale."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", data=numbers((3, 4, 6, 5)))
        places = {0: [5.0, 7, 9], 1: [0.0, 1, 4, 9], 2: np.arange(6) * 0.25 - 1}
        for i, name in enumerate(("y", "x", "qy", "qx")):
            data.dims[i].label = name
            if i in places:
                file[name] = np.asarray(places[i])
                file[name].make_scale(name)
                file[name].attrs["units"] = "nm"
                data.dims[i].attach_scale(file[name])
    (found,) = list_hdf5(str(path))
    assert found.axes == (
        Axis("y", 3, 2.0, 5.0, "nm"),
        Axis("x", 4),
        Axis("qy", 6, 0.25, -1.0, "nm"),
        Axis("qx", 5),
    )
    assert found.metadata == {}
