"""Exports: patterns in, a file out that others open, on every kind of cluster, and never a half one."""

import contextlib
import logging
import os
import sys
import zipfile
from math import prod
from pathlib import Path

import dask
import dask.array as da
import h5py
import numpy as np
import pytest
import xarray as xr
import zarr

import stem_dask as sd
from stem_dask.cli import main as cli
from stem_dask.cluster import connect as cluster
from stem_dask.core.errors import (
    ConfigError,
    InterruptedRunError,
    OutputExistsError,
    SourceError,
    StoreError,
)
from stem_dask.core.formats import FORMATS, Output
from stem_dask.core.model import Axis, Record
from stem_dask.core.patterns import as_patterns
from stem_dask.engine.journal import Journal
from stem_dask.stages.export import (
    active_client,
    export,
    export_from_store,
    export_job,
    open_store,
    write_patterns,
)
from stem_dask.storage.publish import publish, temporary
from stem_dask.writers.torch import PtSink

MODULE = sys.modules[export.__module__]
SHAPE = (6, 5, 12, 10)
AXES = (
    Axis("scan_y", 6, 0.5, 3, "nm"),
    Axis("scan_x", 5, 0.25, -1, "um"),
    Axis("ky", 12, 0.1, -0.6, "1/nm"),
    Axis("kx", 10, 0.2, -1, "mrad"),
)
SUFFIXES = (".zarr", ".pt", ".hspy", ".npy", ".zspy")  # the other three of HDF5 have the same bytes
WINDOW = {"window_size": [12, 10], "align": "pattern", "k_origin": "window_center"}


def numbers(shape=SHAPE, dtype="u2"):
    return np.arange(prod(shape)).reshape(shape).astype(dtype)


def lazy(array, lead=(2, 5), **attrs):
    names = ("scan_y", "scan_x", "ky", "kx") if array.ndim == 4 else ("pattern", "ky", "kx")
    plain = [Axis(name, n) for name, n in zip(names, array.shape, strict=True)]
    axes = AXES if array.shape == SHAPE else plain
    data = da.from_array(array, chunks=(*lead, *array.shape[-2:]))
    return as_patterns(data, axes, {"intensity": "counts", **attrs})


def values(path):
    """The patterns of an exported file, read without this package."""
    if path.suffix == ".zarr":
        return zarr.open_array(path, path="patterns", mode="r")[...]
    if path.suffix == ".pt":
        return load_pt(path)["patterns"].numpy()
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    if path.suffix == ".zspy":
        ((_, group),) = zarr.open_group(path, mode="r")["Experiments"].groups()
        return group["data"][...]
    with h5py.File(path) as file:
        return file["patterns"][...]


def load_pt(path):
    torch = pytest.importorskip("torch")
    return torch.load(path, weights_only=True, mmap=True)


def sink_class(suffix):
    return type(FORMATS[suffix].load()(Output(f"a{suffix}", (1, 1, 1), np.dtype("u1"))))


def analysis():
    dims = ("scan_y", "scan_x")
    center = np.linspace(5, 6, 30).reshape(6, 5)
    center[1, 2] = np.nan
    return xr.Dataset(
        {
            "center_y": (dims, center),
            "window_y": (dims, np.arange(-15, 15, dtype="i4").reshape(6, 5)),
            "retention": (dims, center / 6),
            "mean": (("source_ky", "source_kx"), np.ones((3, 3))),
        }
    )


@pytest.fixture(autouse=True)
def no_client(monkeypatch):
    """What other tests left open is not used by accident."""
    monkeypatch.setattr(MODULE, "active_client", lambda: None)


@contextlib.contextmanager
def started(kind, **options):
    with cluster.connect(kind, **options) as connection:
        yield connection.client


@pytest.fixture(scope="module")
def processes():
    with started("local", n_workers=2, threads_per_worker=1) as client:
        yield client


@pytest.fixture(scope="module")
def threads():
    with started("threads", threads_per_worker=2) as client:
        yield client


@pytest.fixture(params=["none", "threads", "processes"])
def client(request):
    return None if request.param == "none" else request.getfixturevalue(request.param)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_on_every_cluster(tmp_path, client, suffix):
    done = []
    path = tmp_path / f"a{suffix}"
    export(
        lazy(numbers()),
        path,
        client=client,
        progress=lambda n, all_, record: done.append((n, all_)),
    )
    np.testing.assert_array_equal(values(path), numbers())
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_do_not_depend_on_run_name_or_threads(tmp_path, suffix, monkeypatch):
    def content(path):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        return [file.read_bytes() for file in files]

    found = []
    for threads_of_it, name in ((1, "one"), (2, "another")):
        monkeypatch.setattr("dask.system.CPU_COUNT", threads_of_it)
        path = tmp_path / f"{name}{suffix}"
        export(lazy(numbers(), (1, 5)), path, analysis=analysis())
        found.append(content(path))
    assert found[0] == found[1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_existing_files_are_kept_and_replaced_on_demand(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    export(lazy(numbers()), path)
    with pytest.raises(OutputExistsError, match=rf"a\{suffix} exists; choose another output"):
        export(lazy(numbers() + 1), path)
    np.testing.assert_array_equal(values(path), numbers())
    export(lazy(numbers() + 1, (3, 5)), path, overwrite=True)
    np.testing.assert_array_equal(values(path), numbers() + 1)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def failing(kind=OSError):
    """Patterns whose last block raises."""

    def block(part, block_info=None):
        if block_info[0]["chunk-location"][0] == 2:
            raise kind("the disk went away")
        return part

    patterns = lazy(numbers())
    return patterns.copy(data=patterns.data.map_blocks(block, dtype="u2", meta=patterns.data._meta))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("client", "kind"),
    [("none", OSError), ("threads", OSError), ("threads", ValueError), ("processes", ValueError)],
    indirect=["client"],
)  # read errors of processes, with their waits, are in the next test
def test_a_failing_block_leaves_nothing(tmp_path, client, suffix, kind):
    """An error of a file is told with its block; any other as it was raised."""
    raised, message = (
        (SourceError, r"^block \[4:6, 0:5\]: the disk went away$")
        if kind is OSError
        else (ValueError, r"^the disk went away$")
    )
    path = tmp_path / f"a{suffix}"
    with pytest.raises(raised, match=message):
        export(failing(kind), path, client=client)
    assert list(tmp_path.iterdir()) == []
    export(lazy(numbers()), path)
    with pytest.raises(raised, match=message):
        export(failing(kind), path, client=client, overwrite=True)
    np.testing.assert_array_equal(values(path), numbers())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_read_error_of_another_process_tells_its_block(tmp_path, processes):
    """With all its waits: 2.6 s."""
    with pytest.raises(SourceError, match=r"^block \[4:6, 0:5\]: the disk went away$") as caught:
        export(failing(), tmp_path / "a.zarr", client=processes)
    assert type(caught.value) is SourceError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_error_tells_its_block(tmp_path, suffix, monkeypatch):
    sink = sink_class(suffix)
    write = sink.write
    tries = []

    def write_badly(self, index, region, blocks):
        tries.append(index)
        if index == 1:
            raise OSError(5, "Input/output error")
        return write(self, index, region, blocks)

    monkeypatch.setattr(sink, "write", write_badly)
    with pytest.raises(StoreError, match=r"^block \[2:4, 0:5\]: \[Errno 5\] Input/output error$"):
        export(lazy(numbers()), tmp_path / f"a{suffix}")
    assert tries.count(1) == 4
    assert list(tmp_path.iterdir()) == []


def test_unknown_suffix_and_layout(tmp_path):
    with pytest.raises(
        ConfigError, match=r"cannot export to \.tif; known are \.zarr, \.pt, \.hspy"
    ):
        export(lazy(numbers()), tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=r"cannot export to no suffix"):
        export(lazy(numbers()), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"layout is 'rows'; expected one of scan, nchw, tensor"):
        export(lazy(numbers()), tmp_path / "a.pt", layout="rows")
    assert list(tmp_path.iterdir()) == []


def test_the_workers_load_no_heavy_libraries(tmp_path, processes):
    """Each would add hundreds of megabytes to every worker; and HDF5 is written by one process."""
    for suffix in SUFFIXES:
        export(lazy(numbers()), tmp_path / f"a{suffix}", client=processes, analysis=analysis())
    export(lazy(numbers()), tmp_path / "b.h5", client=processes, codec="gzip")

    def loaded():
        import sys

        heavy = ("torch", "hyperspy", "matplotlib", "rsciio.hspy", "h5py", "hdf5plugin")
        return [m for m in heavy if m in sys.modules]

    assert list(processes.run(loaded).values()) == [[], []]


def test_the_active_client_is_found(threads):
    with threads.as_current():
        assert active_client() is threads


# --- going on ---------------------------------------------------------------------------------------------------

COMPUTED: list[int] = []


def counted(part, block_info=None):
    COMPUTED.append(block_info[0]["chunk-location"][0])
    return part


def counted_patterns(array=None, lead=(1, 5)):
    """Patterns that note which of their blocks are computed."""
    patterns = lazy(numbers() if array is None else array, lead, **WINDOW)
    data = patterns.data.map_blocks(
        counted, dtype=patterns.dtype, meta=np.empty((0,) * patterns.ndim, patterns.dtype)
    )
    return patterns.copy(data=data)


class Run:
    """An export that may be stopped before it gets its name, and begun again as by a new process."""

    def __init__(self, folder, suffix):
        self.path = folder / f"a{suffix}"
        self.folder = folder / "a.run"
        self.folder.mkdir()

    @property
    def built(self):
        return Path(temporary(self.path))

    @property
    def spool(self):
        return self.folder / "export"

    def go(self, *, stop=False, patterns=None, **options):
        """Blocks that were computed."""
        COMPUTED.clear()
        journal = Journal(self.folder / "journal")
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            stack.callback(journal.close)
            if stop:
                patch.setattr(MODULE, "publish", _stop)
                stack.enter_context(pytest.raises(InterruptedRunError))
            write_patterns(
                counted_patterns() if patterns is None else patterns,
                self.path,
                analysis=analysis(),
                journal=journal,
                folder=str(self.spool),
                **options,
            )
        return sorted(COMPUTED)

    def files_of(self, index):
        """The files that hold a block, and where in them it lies."""
        if self.path.suffix == ".zarr":
            return self.built / "patterns" / f"c.{index}.0.0.0", None
        if self.path.suffix == ".zspy":
            return self.built / "Experiments/4D-STEM/data" / str(index) / "0" / "0" / "0", None
        if self.path.suffix == ".hspy":
            return self.spool / f"{index:06d}.block", None
        (start, length, _), *_ = (
            Journal(self.folder / "journal")
            .records(export_job(str(self.path), "scan"))[index]
            .extra["runs"]
        )
        npy = self.path.suffix == ".npy"
        offset = np.load(self.built, mmap_mode="r").offset if npy else _tensor_offset(self.built)
        return self.built, slice(offset + start, offset + start + length)


def _stop(path):
    raise InterruptedRunError("just before the end")


def _tensor_offset(path):
    with zipfile.ZipFile(path) as archive:
        (entry,) = (e for e in archive.infolist() if e.filename.endswith("/data/0"))
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        name, extra = np.frombuffer(file.read(4), "<u2").tolist()
    return entry.header_offset + 30 + name + extra


def tree(path):
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def truncated(file, part):
    """A .pt or .npy ends within the block."""
    size = file.stat().st_size
    os.truncate(file, size // 2 if part is None else (part.start + part.stop) // 2)


def zeroed(file, part):
    data = bytearray(file.read_bytes())
    part = part or slice(0, len(data))
    data[part] = bytes(len(data[part]))
    file.write_bytes(data)


def flipped(file, part):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if part is None else (part.start + part.stop) // 2] ^= 16
    file.write_bytes(data)


def deleted(file, part):
    """A .pt or .npy goes altogether."""
    file.unlink()


DAMAGE = [truncated, zeroed, flipped, deleted]


@pytest.fixture(params=SUFFIXES)
def a_run(request, tmp_path):
    if request.param == ".pt":
        pytest.importorskip("torch")
    return Run(tmp_path, request.param)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of exports that nothing stopped, by suffix."""
    folder = tmp_path_factory.mktemp("whole")
    for suffix in SUFFIXES:
        export(counted_patterns(), folder / f"a{suffix}", analysis=analysis())
    return {suffix: tree(folder / f"a{suffix}") for suffix in SUFFIXES}


def test_a_second_run_computes_nothing(a_run, whole, tmp_path):
    assert a_run.go(stop=True) == [0, 1, 2, 3, 4, 5]
    assert a_run.built.exists()
    assert not a_run.path.exists()
    assert a_run.go(stop=True) == []
    assert a_run.go() == []
    assert tree(a_run.path) == whole[a_run.path.suffix]
    np.testing.assert_array_equal(values(a_run.path), numbers())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.run", a_run.path.name])


@pytest.mark.parametrize("spoil", DAMAGE)
@pytest.mark.parametrize("blocks", [[3], [5], [0, 4]], ids=str)
def test_damaged_blocks_are_named_and_computed_again(a_run, whole, caplog, spoil, blocks):
    a_run.go(stop=True)
    pt = a_run.path.suffix in (".pt", ".npy")
    places = [a_run.files_of(index) for index in blocks]
    for place in places:
        if place[0].exists():
            spoil(*place)
    lost = blocks
    if pt and spoil is truncated:  # all that came after is gone too
        lost = list(range(min(blocks), 6))
    if pt and spoil is deleted:
        lost = [0, 1, 2, 3, 4, 5]
    with caplog.at_level(logging.WARNING, "stem_dask"):
        assert a_run.go() == lost
    assert tree(a_run.path) == whole[a_run.path.suffix]
    np.testing.assert_array_equal(values(a_run.path), numbers())
    said = [r.getMessage() for r in caplog.records if r.name == "stem_dask"]
    assert len(said) == len(lost)
    for line in said:
        assert line.startswith(f"{export_job(str(a_run.path), 'scan')}: ")
        assert line.endswith("; it is computed again")
    for file, _ in places:
        assert any(str(file) in line for line in said)


def test_a_run_that_stopped_in_the_middle_goes_on(a_run, whole):
    """What is kept is what the journal knows; the bytes are those of a run in one go."""

    def bad(part, block_info=None):
        if block_info[0]["chunk-location"][0] == 3:
            raise OSError("a cable")
        return part

    patterns = counted_patterns()
    broken = patterns.copy(
        data=patterns.data.map_blocks(bad, dtype=patterns.dtype, meta=patterns.data._meta)
    )
    with pytest.raises(SourceError, match=r"^block \[3:4, 0:5\]: a cable$"):
        a_run.go(patterns=broken)
    assert a_run.built.exists()
    job = export_job(str(a_run.path), "scan")
    noted = set(Journal(a_run.folder / "journal").records(job))
    assert 3 not in noted
    assert a_run.go() == sorted(set(range(6)) - noted)
    assert tree(a_run.path) == whole[a_run.path.suffix]


def test_an_older_file_stays_until_the_new_one_is_complete(a_run, whole):
    export(lazy(numbers() + 7), a_run.path)
    older = tree(a_run.path)
    a_run.go(stop=True, overwrite=True)
    assert tree(a_run.path) == older
    assert a_run.built.exists()  # without it the older one would be taken for the new
    assert a_run.go(overwrite=True) == []
    assert tree(a_run.path) == whole[a_run.path.suffix]
    assert not a_run.built.exists()
    publish(a_run.path)  # again, as after a kill right at the end
    assert tree(a_run.path) == whole[a_run.path.suffix]


@pytest.mark.parametrize("stopped", [False, True])
def test_the_temporary_name_is_there_from_the_start(a_run, monkeypatch, stopped):
    """For all blocks may be noted, and the file at its final name still be an older one."""
    if stopped:
        a_run.go(stop=True)

    def stop(self, records):
        assert a_run.built.exists()
        raise InterruptedRunError("before the first step of the end")

    monkeypatch.setattr(sink_class(a_run.path.suffix), "finish", stop)
    with pytest.raises(InterruptedRunError, match="first step"):
        a_run.go()
    assert a_run.built.exists()


def test_blocks_of_another_size(a_run, caplog):
    a_run.go(stop=True)
    with caplog.at_level(logging.WARNING, "stem_dask"):
        assert a_run.go(patterns=counted_patterns(lead=(4, 5))) == [0, 1]
    assert "blocks have another size than before" in caplog.text
    np.testing.assert_array_equal(values(a_run.path), numbers())


def test_a_pt_in_another_layout_and_back(tmp_path):
    """Both are built under one temporary name; their bytes lie in the same order, their shapes differ."""
    a_run = Run(tmp_path, ".pt")
    for layout in ("scan", "nchw"):
        assert a_run.go(stop=True, layout=layout) == [0, 1, 2, 3, 4, 5]
    assert a_run.go(layout="scan") == []
    loaded = load_pt(a_run.path)["patterns"]
    assert tuple(loaded.shape) == SHAPE
    np.testing.assert_array_equal(loaded.numpy(), numbers())


def test_the_small_tensors_of_a_pt_are_written_anew(tmp_path, whole):
    """They are in no record, so going on does not trust them."""
    a_run = Run(tmp_path, ".pt")
    a_run.go(stop=True)
    data = bytearray(a_run.built.read_bytes())
    first, last = a_run.files_of(0)[1].start, a_run.files_of(5)[1].stop
    data[:first] = bytes(first)
    data[last:] = bytes(len(data) - last)
    a_run.built.write_bytes(data)
    assert a_run.go() == []
    assert tree(a_run.path) == whole[".pt"]


def test_pt_verify_says_where(tmp_path):
    pytest.importorskip("torch")
    sink = PtSink(Output(str(tmp_path / "a.pt"), (3, 2, 4, 4), np.dtype("i2"), layout="bare"))
    sink.create(resume=False)
    extra = sink.write(1, (slice(1, 2), slice(0, 2)), {"patterns": np.ones((1, 2, 4, 4), "i2")})
    record = Record(1, 0, 0, 0, extra)
    assert sink.verify(record) is None
    flipped(Path(sink.output.path), slice(sink.offset[0] + 70, sink.offset[0] + 70))
    assert sink.verify(record) == f"{sink.output.path} does not hold what was written at byte 64"
    Path(sink.output.path).unlink()
    assert sink.verify(record) == f"{sink.output.path} cannot be read: No such file or directory"


# --- .zarr ------------------------------------------------------------------------------------------------------


def test_zarr_and_back(tmp_path):
    patterns = lazy(numbers(), maximum=3599, **WINDOW)
    export(patterns, tmp_path / "a.zarr", title="gold")
    with xr.open_zarr(tmp_path / "a.zarr") as found:
        assert found.attrs["title"] == "gold"
        assert found.patterns.attrs["window_size"] == [12, 10]
        assert found.ky.attrs == {"scale": 0.1, "offset": -0.6, "units": "1/nm"}
    again = open_store(str(tmp_path / "a.zarr"))[0]
    assert again.data.chunks == patterns.data.chunks
    xr.testing.assert_equal(again.compute(), patterns.compute())
    export_from_store(str(tmp_path / "a.zarr"), str(tmp_path / "a.pt"))
    assert str(load_pt(tmp_path / "a.pt")["patterns"].dtype) == "torch.int32"


@pytest.mark.parametrize("chunks", [((1, 3, 2), (5,)), ((2, 4), (5,)), ((6,), (2, 3))])
def test_irregular_blocks_are_made_regular(tmp_path, chunks):
    patterns = lazy(numbers())
    patterns = patterns.copy(data=patterns.data.rechunk((*chunks, 6, 5)))
    for suffix in SUFFIXES:
        export(patterns, tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(values(tmp_path / f"a{suffix}"), numbers())


# --- .pt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "shape"),
    [("scan", SHAPE), ("nchw", (30, 1, 12, 10)), ("tensor", (30, 1, 12, 10))],
)
@pytest.mark.parametrize("lead", [(2, 5), (1, 2)])
def test_pt_layouts(tmp_path, layout, shape, lead):
    path = tmp_path / "a.pt"
    export(lazy(numbers(), lead), path, layout=layout, analysis=analysis())
    loaded = load_pt(path)
    tensor = loaded if layout == "tensor" else loaded["patterns"]
    assert tuple(tensor.shape) == shape
    np.testing.assert_array_equal(tensor.numpy(), numbers().reshape(shape))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert len(archive.infolist()) > 5


def test_pt_content(tmp_path):
    path = tmp_path / "a.pt"
    patterns = lazy(numbers(), global_radius=6, downsample_factor=np.int64(2), **WINDOW)
    patterns = patterns.assign_coords(window_x=(("scan_y", "scan_x"), np.full((6, 5), 7, "i4")))
    export(patterns, path, analysis=analysis())
    loaded = load_pt(path)
    assert loaded["axes"] == [vars(axis) for axis in AXES]
    assert loaded["window"] == {**WINDOW, "global_radius": 6}
    assert (loaded["intensity"], loaded["downsample_factor"]) == ("counts", 2)
    known = loaded["analysis"]
    assert sorted(known) == ["center_y", "retention", "window_x", "window_y"]
    for name in ("center_y", "retention", "window_y"):
        expected = analysis()[name].values
        assert known[name].numpy().dtype == expected.dtype
        np.testing.assert_array_equal(known[name].numpy(), expected)
    assert (known["window_x"].numpy() == 7).all()


@pytest.mark.parametrize("layout", ["scan", "nchw", "tensor"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("?", "int16"), ("u1", "int16"), ("u2", "int32"), (">u2", "int32"), ("u4", "int64"), ("u8", "int64"),
        ("i1", "int8"), ("i2", "int16"), ("i4", "int32"), ("i8", "int64"),
        ("f2", "float16"), ("f4", "float32"), ("f8", "float64"),
    ],
)  # fmt: skip
def test_pt_type_depends_on_the_type_alone(tmp_path, dtype, expected, layout):
    for i, largest in enumerate((1, np.inf)):
        kind = np.dtype(dtype).kind
        most = {"b": 1, "f": 60000}.get(kind) or np.iinfo(dtype).max
        array = numbers(dtype="i8") % 2
        array[1, 2, 3, 4] = int(min(largest, most, np.iinfo("i8").max))
        attrs = {"maximum": float(array.max())}
        export(lazy(array.astype(dtype), **attrs), tmp_path / f"{i}.pt", layout=layout)
        loaded = load_pt(tmp_path / f"{i}.pt")
        tensor = loaded if layout == "tensor" else loaded["patterns"]
        assert str(tensor.dtype) == f"torch.{expected}"
        np.testing.assert_array_equal(tensor.numpy().reshape(SHAPE), array)
        if kind in "bu" and dtype != "u8":  # room for the sum of two
            assert int((tensor + tensor).max()) == 2 * int(array.max())


def test_pt_keep_dtype(tmp_path):
    export(lazy(numbers(), maximum=9), tmp_path / "a.pt", keep_dtype=True)
    assert str(load_pt(tmp_path / "a.pt")["patterns"].dtype) == "torch.uint16"
    np.testing.assert_array_equal(values(tmp_path / "a.pt"), numbers())


def test_pt_refuses_values_that_would_wrap(tmp_path):
    huge = np.full(SHAPE, 2**63, "u8")
    text = r"a \.pt holds values up to 9,223,372,036,854,775,807, the data reach {}; use float32 \(sd\.cast"
    with pytest.raises(ConfigError, match=text.format("9,223,372,036,854,775,808")):
        export(lazy(huge), tmp_path / "a.pt")
    with (
        dask.config.set(scheduler=lambda *args, **options: pytest.fail("something was computed")),
        pytest.raises(ConfigError, match=text.format("10,000,000,000,000,000,000")),
    ):
        export(lazy(huge, maximum=1e19), tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []
    largest = np.full(SHAPE, 2**63 - 1, "u8")
    export(lazy(largest, maximum=float(2**63 - 1)), tmp_path / "b.pt")
    np.testing.assert_array_equal(values(tmp_path / "b.pt"), largest)
    export(sd.cast(lazy(huge), "float32"), tmp_path / "a.pt")  # as the message says
    assert (values(tmp_path / "a.pt") == 2.0**63).all()


def test_convert_refuses_values_beyond_int64(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.full((3, 2, 8, 8), 2**63, "u8"))
    words = ["convert", "--input", "a.npy", "--output", "out.pt"]
    assert cli.main(words) == 2
    assert "the data reach 9,223,372,036,854,775,808; use float32" in capsys.readouterr().err
    assert not Path("out.pt").exists()
    assert cli.main([*words, "output.dtype=float32", "--restart"]) == 0  # as the message says
    assert str(load_pt("out.pt")["patterns"].dtype) == "torch.float32"


def test_all_tensors_of_a_batch_have_one_type(tmp_path, shared_data, make_config):
    """Case p1: counts of two scans in one `DataLoader` with workers."""
    data = pytest.importorskip("torch.utils.data", reason="the package torch is not installed")
    datasets = []
    for name in ("a", "b"):
        source = shared_data / "cases" / "p1_pt_types_of_a_batch" / f"{name}.npy"
        sd.run_config(make_config(source, f"{name}.zarr", output={"export": ["pt"]}))
        patterns = load_pt(tmp_path / f"{name}.pt")["patterns"]
        datasets.append(data.TensorDataset(patterns.flatten(0, 1)))
    for workers in (0, 2):
        loader = data.DataLoader(
            data.ConcatDataset(datasets),
            batch_size=24,
            num_workers=workers,
            timeout=30 if workers else 0,
        )
        [(batch,)] = loader
        assert sorted(set(batch.flatten().tolist())) == [0, 100, 300]
    first = datasets[0][0][0]
    assert sorted(set((first + first).flatten().tolist())) == [0, 200]


@pytest.mark.parametrize("way", ["run", "convert", "preprocess", "crop", "crop a tensor", "export"])
def test_every_command_writes_the_same_type(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    data = np.zeros((3, 2, 32, 32), "u2")
    data[..., 14:18, 14:18] = 7
    np.save("a.npy", data)
    torch = pytest.importorskip("torch", reason="the package torch is not installed")
    torch.save(torch.from_numpy(data), "a_tensor.pt")
    if way == "export":
        sd.export(sd.open("a.npy"), "out.pt")
    else:
        words = {
            "run": ["run", "a.yaml"],
            "convert": ["convert", "--input", "a.npy", "--output", "out.pt"],
            "preprocess": [
                "preprocess",
                "--input",
                "a.npy",
                "--output",
                "out.pt",
                "output.dtype=auto",
            ],
            "crop": ["crop", "--input", "a.npy", "--output", "out.pt"],
            "crop a tensor": ["crop", "--input", "a_tensor.pt", "--output", "out.pt"],
        }[way]
        output = "output: {path: out.zarr, export: [pt], figure: false}"
        Path("a.yaml").write_text(f"input: {{path: a.npy}}\n{output}\n")
        assert cli.main(words) == 0
    found = load_pt(tmp_path / "out.pt")
    tensor = found["patterns"] if isinstance(found, dict) else found
    assert (str(tensor.dtype), int(tensor.sum())) == ("torch.int32", int(data.sum()))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_pt_with_a_missing_block_is_refused(tmp_path, missing):
    pytest.importorskip("torch")
    sink = PtSink(Output(str(tmp_path / "a.pt"), (3, 2, 4, 4), np.dtype("i2"), layout="bare"))
    sink.create(resume=False)
    records = []
    for y in set(range(3)) - {missing}:
        block = {"patterns": np.ones((1, 2, 4, 4), "i2")}
        extra = sink.write(y, (slice(y, y + 1), slice(0, 2)), block)
        records.append(type("Record", (), {"extra": extra}))
    with pytest.raises(StoreError, match=r"were not written|blocks are missing"):
        sink.finish(records)
