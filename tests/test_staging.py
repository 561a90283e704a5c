"""A worker of an earlier start that wakes up late changes nothing, and `finish` finds what is not as it was written."""

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from numpy.typing import NDArray
from test_exports import values

from stem_dask.core.batches import ChangedBlock
from stem_dask.core.errors import StoreError
from stem_dask.core.formats import FORMATS
from stem_dask.core.model import Axis, Record, Region
from stem_dask.core.patterns import as_patterns
from stem_dask.job.run import run
from stem_dask.readers.detector_first import TransposedFile, TransposedSink
from stem_dask.stages.export import Target
from stem_dask.storage import staging
from stem_dask.storage.publish import publish
from stem_dask.writers.spool import SpoolSink

SHAPE = (4, 3, 8, 6)
REGIONS: tuple[Region, ...] = ((slice(0, 2), slice(0, 3)), (slice(2, 4), slice(0, 3)))
LATE = r"the run was started again; this block of an earlier start is not written"
OTHER = r"it changed after it was written; the same command writes it again"
#: formats whose sink leaves a file that is compared: in HDF5 it is the spool
COMPARED = (".zarr", ".npy", ".pt", ".h5")
ours = np.arange(np.prod(SHAPE), dtype="i2").reshape(SHAPE)
foreign = -ours - 1


@dataclass
class Output:
    """One output, and the blocks of its pass."""

    path: Path
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        axes = [Axis(name, n) for name, n in zip(("scan_y", "scan_x", "ky", "kx"), SHAPE, strict=True)]  # fmt: skip
        patterns = as_patterns(da.from_array(ours, chunks=(2, 3, 8, 6)), axes, {})
        self.target = Target(str(self.path), patterns, folder=str(self.path.parent / "spool"))
        self.sink: Any = self.target.sink()

    def begin(self, *, resume: bool = False) -> Any:
        """A start; returns the sink as a worker has it."""
        self.sink = self.target.sink()
        self.sink.create(resume=resume)
        return pickle.loads(pickle.dumps(self.sink))

    def blocks(self, i: int, array: NDArray) -> dict[str, Any]:
        found: dict[str, Any] = {"patterns": array[REGIONS[i]]}
        if "navigator" in self.target.outputs():
            found["navigator"] = array[REGIONS[i]].sum((2, 3), dtype=float)
        return found

    def write(self, indices: Sequence[int] = (0, 1), array: NDArray = ours) -> None:
        for i in indices:
            extra = self.sink.write(i, REGIONS[i], self.blocks(i, array))
            self.records.append(Record(i, 0, 0, 0, extra))

    def finish(self) -> NDArray:
        """Give the output its name; returns the patterns in it."""
        self.sink.finish(sorted(self.records, key=lambda record: record.index))
        self.target.finish()
        publish(self.path)
        return np.asarray(values(self.path)).reshape(SHAPE)

    def file(self) -> Path:
        """Where the second block lies until `finish`."""
        built = Path(self.target.built)
        return {
            ".zarr": built / "patterns" / "c.1.0.0.0",
            ".h5": self.path.parent / "spool" / "000001.block",
        }.get(self.path.suffix, built)


@pytest.fixture(params=FORMATS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    if request.param == ".pt":
        pytest.importorskip("torch")
    return Output(tmp_path / f"scan{request.param}")


@pytest.fixture(params=COMPARED)
def compared(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    if request.param == ".pt":
        pytest.importorskip("torch")
    return Output(tmp_path / f"scan{request.param}")


# --- fenced -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_worker_of_an_earlier_start_writes_nothing(output: Output, resume: bool) -> None:
    late = output.begin()
    output.begin(resume=resume)
    output.write()
    with pytest.raises(StoreError, match=LATE):
        late.write(1, REGIONS[1], output.blocks(1, foreign))
    np.testing.assert_array_equal(output.finish(), ours)


@pytest.mark.parametrize("resume", [False, True])
def test_a_start_while_a_worker_writes(output: Output, resume: bool) -> None:
    """It sleeps in the middle of a block; the next start writes all blocks before it wakes up."""
    late = output.begin()

    def change(piece: NDArray, here: slice, out: NDArray) -> None:
        if not output.records:
            output.begin(resume=resume)
            output.write()
        np.copyto(out, piece)

    sleeping = ChangedBlock(foreign[REGIONS[1]], change, SHAPE[2:], np.dtype("i2"))
    blocks = {**output.blocks(1, foreign), "patterns": sleeping}
    # a file written in place is a new inode by now; the late bytes go into the unlinked one
    in_place = output.path.suffix in (".npy", ".pt") and not resume
    with contextlib.nullcontext() if in_place else pytest.raises(StoreError, match=LATE):
        late.write(1, REGIONS[1], blocks)
    np.testing.assert_array_equal(output.finish(), ours)


def test_a_worker_that_wakes_up_when_all_is_over(output: Output) -> None:
    """Nothing appears beside the output, which would be taken for an unfinished one."""
    late = output.begin()
    output.begin()
    output.write()
    output.finish()
    shutil.rmtree(output.target.spool, ignore_errors=True)  # as the end of a run does
    with pytest.raises((StoreError, FileNotFoundError)):
        late.write(1, REGIONS[1], output.blocks(1, foreign))
    np.testing.assert_array_equal(np.asarray(values(output.path)).reshape(SHAPE), ours)
    assert [path.name for path in output.path.parent.iterdir()] == [output.path.name]


def test_the_nonce_is_in_no_output(output: Output) -> None:
    found = []
    for _ in range(2):
        output.records.clear()
        output.begin()
        output.write()
        output.finish()
        files = [output.path] if output.path.is_file() else sorted(output.path.rglob("*"))
        found.append([(path.name, path.read_bytes()) for path in files if path.is_file()])
    if output.path.suffix not in (".h5", ".hspy"):  # HDF5 notes the time
        assert found[0] == found[1]
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]
    assert not [name for name, _ in found[0] if "partial" in name]


def test_a_late_worker_of_the_first_pass(tmp_path: Path) -> None:
    """Of a file with the detector slowest: slabs go into one file, in place."""
    turned = TransposedFile(str(tmp_path / "a.raw"), np.dtype("u1"), (2, 3, 4, 2), (1, 3), (2, 2))
    slabs = np.arange(48, dtype="u1").reshape(4, 2, 2, 3)
    regions = ((slice(0, 2), slice(0, 2)), (slice(2, 4), slice(0, 2)))
    first = TransposedSink(turned)
    first.create(resume=False)
    late = pickle.loads(pickle.dumps(first))
    for resume in (False, True):
        sink = TransposedSink(turned)
        sink.create(resume=resume)
        records = []
        for i, region in enumerate(regions):
            extra = sink.write(i, region, {"slab": slabs[region]})
            bounds = [[part.start, part.stop] for part in region]
            records.append(Record(i, 0, 0, 0, {**extra, "region": bounds}))
        with pytest.raises(StoreError, match=LATE):
            late.write(1, regions[1], {"slab": 255 - slabs[regions[1]]})
        sink.finish(records)
        whole = (slice(None),) * 4
        np.testing.assert_array_equal(turned[whole], slabs.transpose(2, 3, 0, 1))
        assert os.path.getsize(turned.path) == slabs.nbytes
    flip(Path(turned.path), 30)
    sink = TransposedSink(turned)
    sink.create(resume=True)
    flip(Path(turned.path), 31)
    with pytest.raises(StoreError, match=OTHER):
        sink.finish(records)


# --- compared ---------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def place_of(output: Output) -> int:
    """A byte of the second block in its file."""
    sizes = {".npy": 128, ".pt": getattr(output.sink, "offset", [0])[0]}
    if output.path.suffix not in sizes:
        return output.file().stat().st_size // 2
    return sizes[output.path.suffix] + ours.nbytes // 2


def test_finish_finds_a_byte_that_changed(compared: Output) -> None:
    compared.begin()
    compared.write()
    flip(compared.file(), place_of(compared))
    with pytest.raises(StoreError, match=OTHER):
        compared.finish()
    compared.begin(resume=True)  # the same command, which finds out which block it is
    bad = [record for record in compared.records if compared.sink.verify(record)]
    assert [record.index for record in bad] == [1]
    compared.write([1])
    del compared.records[1]
    np.testing.assert_array_equal(compared.finish(), ours)


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
def test_finish_finds_a_file_of_another_run(tmp_path: Path, suffix: str) -> None:
    """Whole, of the same size, and with its own time."""
    other = Output(tmp_path / "other" / f"scan{suffix}")
    other.path.parent.mkdir()
    output = Output(tmp_path / f"scan{suffix}")
    for one, array in ((output, ours), (other, foreign)):
        one.begin()
        one.write(array=array)
    shutil.copy2(other.file(), output.file())
    with pytest.raises(StoreError, match=OTHER):
        output.finish()


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
@pytest.mark.parametrize("damage", ["cut", "grown", "gone"])
def test_finish_finds_a_file_of_another_size(tmp_path: Path, suffix: str, damage: str) -> None:
    """Also when its time says nothing."""
    output = Output(tmp_path / f"scan{suffix}")
    output.begin()
    output.write()
    file = output.file()
    status = file.stat()
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, status.st_size + (1 if damage == "grown" else -1))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(StoreError, match=OTHER):
        output.finish()


def test_what_was_only_touched_is_whole(compared: Output) -> None:
    compared.begin()
    compared.write()
    compared.file().touch()
    np.testing.assert_array_equal(compared.finish(), ours)


@pytest.mark.parametrize("has_fractions", [True, False])
def test_what_nobody_touched_is_not_read_again(compared, has_fractions, monkeypatch):
    """Some file systems, such as Lustre, keep times in whole seconds: there the size alone is compared."""
    compared.begin()
    compared.write([0])
    compared.begin(resume=True)
    compared.write([1])
    if not has_fractions:
        os.utime(compared.file(), (1e9, 1e9))
    monkeypatch.setattr(staging, "damage", lambda *args: "it was read")
    monkeypatch.setattr(type(compared.sink), "verify", lambda *args: "it was read")
    np.testing.assert_array_equal(compared.finish(), ours)


def test_a_spool_says_when_an_array_is_not_what_was_written(tmp_path: Path) -> None:
    spool = SpoolSink(str(tmp_path / "spool"))
    spool.create(resume=False)
    arrays = {"first": np.arange(50), "second": np.arange(7.0)}
    spool.write(0, (slice(0, 1),), arrays)
    file = tmp_path / "spool" / "000000.block"
    ((_, found),) = spool.blocks(1)
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }
    flip(file, file.stat().st_size - 1)
    ((_, found),) = spool.blocks(1, ("first",))
    assert list(found) == ["first"]
    with pytest.raises(StoreError, match=r"000000\.block does not hold what was written; the same"):
        list(spool.blocks(1))


# --- whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scan.zarr", "scan.npy", "scan.pt"])
def test_a_run_never_ends_well_with_foreign_rows(beam_file, beam, make_config, tmp_path, name):
    """Something writes into the unfinished output; the same command then makes the block again."""
    if name == "scan.pt":
        pytest.importorskip("torch")
    config = make_config(beam_file, name, crop={"enabled": False}, output={"chunk_mb": 0.02})
    built = tmp_path / f"{name}.incomplete"

    def spoil(step: Any) -> None:
        if (step.stage, step.done) == ("convert", step.total):
            file = built / "patterns" / "c.1.0.0.0" if built.is_dir() else built
            flip(file, file.stat().st_size // 2)

    with pytest.raises(StoreError, match=OTHER):
        run(config, progress=spoil)
    assert not (tmp_path / name).exists()
    assert run(config).exit_code == 0
    np.testing.assert_array_equal(np.asarray(values(tmp_path / name)).reshape(beam.shape), beam)


def test_a_folder_that_grows_while_it_is_removed(tmp_path, monkeypatch):
    """A worker of a killed run may still be at it."""
    from stem_dask.storage.publish import remove

    folder, late = tmp_path / "scan.zarr.incomplete", [b"1", b"2"]
    (folder / "patterns").mkdir(parents=True)
    rmdir: Callable[..., None] = os.rmdir

    def grown(path: Any, *args: Any, **options: Any) -> None:
        if late and str(path).endswith("patterns"):
            (folder / "patterns" / "c.0.0.0.0").write_bytes(late.pop())
        rmdir(path, *args, **options)

    monkeypatch.setattr(os, "rmdir", grown)
    remove(folder)
    assert not folder.exists()
    assert not late
