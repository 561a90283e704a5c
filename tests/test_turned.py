"""Files with the detector slowest: read in slabs, written in pieces, read as patterns; each against a slow twin."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import forward_slices

import stem_dask as sd
from stem_dask.core.chunks import SLAB_BYTES
from stem_dask.core.errors import (
    ConfigError,
    DiskFullError,
    InterruptedRunError,
    MemoryBudgetError,
    SourceError,
)
from stem_dask.core.model import USABLE_SHARE, WORKER_BYTES, Worker
from stem_dask.engine import run as engine
from stem_dask.engine.journal import Journal
from stem_dask.job import budget as projection
from stem_dask.job.budget import disk_need, fitting_slab, memory_of, transposed_bytes
from stem_dask.job.describe import describe_job
from stem_dask.job.passes import plan_transpose
from stem_dask.job.plan import prepare
from stem_dask.job.run import run
from stem_dask.job.summary import tree_bytes
from stem_dask.kernels import pixels as turn_kernel
from stem_dask.kernels.pixels import patterns_first
from stem_dask.readers import flat as sources
from stem_dask.readers.detector_first import (
    TransposedFile,
    TransposedSink,
    bytes_read,
    detector_first,
)
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.open import find
from stem_dask.readers.views import View
from stem_dask.stages.open import block_positions
from stem_dask.storage.staging import NONCE_BYTES
from stem_dask.writers.synthetic import write_dm4

DRAWN = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WHOLE = (slice(None),) * 4
#: scan_y, scan_x, ky, kx
SHAPE = (5, 4, 7, 6)


def numbers(shape: tuple[int, ...] = SHAPE, dtype: str = "u2") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def old_file(folder: Path, patterns: np.ndarray, name: str = "old.dm4", **options: Any) -> Path:
    """A .dm4 with the detector slowest."""
    stored = np.ascontiguousarray(patterns.transpose(2, 3, 0, 1))
    options = {"swapped": 0, "detector_first": True, **options}
    return write_dm4(
        folder / name, stored, patterns.shape[:2], patterns.shape[2:], patterns.dtype, **options
    )


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """File, position and bytes of every run that flat files are read in."""
    reads: list[tuple[str, int, int]] = []
    plain = FlatFile._fill

    def fill(self: FlatFile, file: int, position: int, run_: memoryview) -> None:
        reads.append((self.path, position, len(run_)))
        plain(self, file, position, run_)

    monkeypatch.setattr(FlatFile, "_fill", fill)
    monkeypatch.setattr(FlatFile, "_mapped", None)  # would not be counted
    return reads


# --- the kernel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", ">u2", "f4", "f8"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (128, 2, 7), (300, 3, 2)])
def test_patterns_first_is_a_transposition(shape: tuple[int, ...], dtype: str) -> None:
    """Also of a part of larger planes."""
    planes = numbers(shape, dtype)
    planes.flags.writeable = False
    for some in (planes, planes[:, :2, 1:]):
        turned = patterns_first(some)
        assert turned.flags.c_contiguous
        assert turned.dtype == planes.dtype
        np.testing.assert_array_equal(turned, np.transpose(some, (1, 2, 0)))


# --- what is read of the file -----------------------------------------------------------------------------------


@given(
    part=forward_slices(SHAPE),
    dtype=st.sampled_from(["u1", "<u2", ">u2", "i2", "u4", "<f4", ">f4", "f8"]),
    at_once=st.integers(1, 50),
    mapped=st.sampled_from([0, 4096]),
)
@DRAWN
def test_planes_are_turned_some_at_a_time(
    tmp_path: Path, part: Any, dtype: str, at_once: int, mapped: int
) -> None:
    """Also of longer runs, which are read and not mapped."""
    patterns = numbers(dtype=dtype)
    found = find(raw_file(tmp_path, patterns), shape=(7, 6, 5, 4), dtype=dtype, **DETECTOR_FIRST)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(turn_kernel, "GATHERED", at_once)
        patched.setattr(turn_kernel, "GATHERED_BYTES", 0)
        patched.setattr(sources, "MAPPED_RUN_BYTES", mapped)
        got = found.source[part]
    assert got.dtype == patterns.dtype
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, patterns[part])


def test_a_part_of_the_scan_is_read_in_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows of a part of the scan are one run for each pixel of the detector."""
    patterns = numbers((40, 80, 5, 4))
    source = find(old_file(tmp_path, patterns), scan_roi=[4, 36, 0, 80]).source
    stored = detector_first(source)
    assert stored is not None
    assert bytes_read(stored) == 5 * 4 * 32 * 80 * 2
    reads = reads_of(monkeypatch)
    np.testing.assert_array_equal(stored[WHOLE], patterns[4:36].transpose(2, 3, 0, 1))
    assert [n for _, _, n in reads] == [32 * 80 * 2] * 20
    source = find(old_file(tmp_path, patterns), scan_roi=[4, 36, 3, 60], scan_step=2).source
    stored = detector_first(source)
    assert stored is not None
    assert bytes_read(stored) == 5 * 4 * 31 * 80 * 2


def test_blocks_are_larger_where_pixels_lie_apart(tmp_path: Path) -> None:
    """The sparse file is opened only; what is asked for, and what the memory allows, stays as it is."""
    (tmp_path / "a.raw").touch()
    os.truncate(tmp_path / "a.raw", 2**29)
    shape = {"scan_first": [64, 64, 256, 256], "detector_first": [256, 256, 64, 64]}
    scan, detector = (
        find(str(tmp_path / "a.raw"), shape=stored, dtype="u2", scan_order=order)
        for order, stored in shape.items()
    )
    assert scan.source.shape == detector.source.shape == (64, 64, 256, 256)
    assert [block_positions(found) for found in (scan, detector)] == [(8, 64), (16, 64)]
    assert block_positions(detector, 64) == (8, 64)
    assert block_positions(detector, "auto", 700) == (8, 64)


def test_files_of_another_order_are_not_turned(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbers())
    np.save(tmp_path / "f.npy", np.asfortranarray(numbers()))
    for name in ("a.npy", "f.npy"):
        found = find(tmp_path / name, scan_roi=[1, 3, 0, 2], flip=True)
        assert detector_first(found.source) is None
        with pytest.raises(ConfigError, match=rf"{name}: this file is not detector-first"):
            plan_transpose(found, (1, 1), (1, 1), tmp_path)


# --- both passes ------------------------------------------------------------------------------------------------


@given(
    block=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    slab=st.tuples(st.integers(1, 7), st.integers(1, 6)),
    part=forward_slices(SHAPE),
    dtype=st.sampled_from(["u1", "<u2", ">f4"]),
    flip=st.booleans(),
)
@settings(DRAWN, max_examples=40)
def test_any_chunks_give_the_same_patterns(
    tmp_path: Path, block: Any, slab: Any, part: Any, dtype: str, flip: bool
) -> None:
    patterns = numbers(dtype=dtype)
    options = {"shape": (7, 6, 5, 4), "dtype": dtype, "flip": flip, **DETECTOR_FIRST}
    found = find(raw_file(tmp_path, patterns), **options)
    patterns = patterns[:, :, ::-1] if flip else patterns
    turn = plan_transpose(found, block, slab, tmp_path)
    turn.run()
    assert turn.found.source.shape == SHAPE
    np.testing.assert_array_equal(turn.found.source[part], patterns[part])
    assert turn.found.source[part].dtype == patterns.dtype
    assert os.path.getsize(tmp_path / "turned" / "patterns.raw") == patterns.nbytes


DETECTOR_FIRST: dict[str, Any] = {"scan_order": "detector_first"}


def raw_file(folder: Path, patterns: np.ndarray) -> Path:
    path = folder / "old.raw"
    path.write_bytes(patterns.transpose(2, 3, 0, 1).tobytes())
    return path


@pytest.mark.parametrize("options", [{"swapped": 0}, {"swapped": None}], ids=["tag", "units"])
def test_both_orders_of_dm4(tmp_path: Path, options: Any) -> None:
    patterns = numbers()
    old = find(old_file(tmp_path, patterns, **options))
    new = find(write_dm4(tmp_path / "new.dm4", patterns, SHAPE[:2], SHAPE[2:], "uint16"))
    turn = plan_transpose(old, (2, 4), (3, 6), tmp_path)
    turn.run()
    assert turn.found.info.axes == new.info.axes
    for source in (old.source, turn.found.source, new.source):
        np.testing.assert_array_equal(source[WHOLE], patterns)


def test_bytes_and_runs_of_both_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass reads every byte once; the second one reads a block from one place, slab after slab."""
    patterns = numbers((6, 8, 16, 16))
    found = find(old_file(tmp_path, patterns))
    turn = plan_transpose(found, (2, 8), (4, 16), tmp_path)
    reads = reads_of(monkeypatch)
    turn.run()
    assert sum(n for _, _, n in reads) == patterns.nbytes
    assert len(reads) == 4
    reads.clear()
    for y in (0, 2, 4):
        block = (slice(y, y + 2), *WHOLE[1:])
        np.testing.assert_array_equal(turn.found.source[block], patterns[y : y + 2])
    assert sum(n for _, _, n in reads) == patterns.nbytes
    ends = [position + n for _, position, n in reads]
    assert [position for _, position, _ in reads] == [0, *ends[:-1]]


# --- mishaps ----------------------------------------------------------------------------------------------------


def test_going_on_looks_at_every_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after four of seven slabs; a bit of one of them flipped meanwhile: it and the rest are made again."""
    patterns = numbers()
    turn = plan_transpose(find(old_file(tmp_path, patterns)), (2, 4), (1, 6), tmp_path)
    journal = Journal(tmp_path / "journal")

    def stop(done: int, n: int, record: Any) -> None:
        if done == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("dask.system.CPU_COUNT", 1)
    with pytest.raises(KeyboardInterrupt):
        turn.run(journal=journal, progress=stop)
    journal.close()
    again = Journal(tmp_path / "journal")
    known = again.records("turn")
    assert len(known) == 4
    whole, hurt, *_ = known
    place = list(turn.sink.file.pieces_of((slice(hurt, hurt + 1), slice(0, 6))))[1]
    with open(place.path, "r+b") as file:
        file.seek(place.offset + 5)
        (byte,) = file.read(1)
        file.seek(place.offset + 5)
        file.write(bytes([byte ^ 4]))
    assert turn.sink.verify(known[whole]) is None
    assert "patterns.raw does not hold what was written" in str(turn.sink.verify(known[hurt]))
    written: list[int] = []
    write = TransposedSink.write

    def counted(self: TransposedSink, index: int, *args: Any) -> Any:
        written.append(index)
        return write(self, index, *args)

    monkeypatch.setattr(TransposedSink, "write", counted)
    turn.run(journal=again)
    again.close()
    # what was in flight at the interrupt was written, but not noted
    assert sorted(written) == sorted({hurt, *range(7)} - (set(known) - {hurt}))
    np.testing.assert_array_equal(turn.found.source[WHOLE], patterns)


def test_a_lost_intermediate_file_is_made_again(tmp_path: Path) -> None:
    patterns = numbers()
    turn = plan_transpose(find(old_file(tmp_path, patterns)), (2, 4), (3, 6), tmp_path)
    journal = Journal(tmp_path / "journal")
    turn.run(journal=journal)
    os.remove(turn.sink.file.path)
    assert "No such file" in str(turn.sink.verify(journal.records("turn")[0]))
    turn.run(journal=journal)
    journal.close()
    np.testing.assert_array_equal(turn.found.source[WHOLE], patterns)


def test_a_cut_file_is_told(tmp_path: Path) -> None:
    path = old_file(tmp_path, numbers())
    turn = plan_transpose(find(path), (2, 4), (3, 6), tmp_path)
    with open(path, "r+b") as file:
        file.truncate(1200)
    with pytest.raises(
        SourceError,
        match=r"^block \[\d:\d, 0:6\]: .*old\.dm4: the file ends at byte 1,200.*this file is detector-first.*"
        r"quarantine cannot skip it",
    ):
        turn.run()


def test_a_full_disk_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = plan_transpose(find(old_file(tmp_path, numbers())), (2, 4), (3, 6), tmp_path)

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "patterns.raw")

    monkeypatch.setattr(TransposedSink, "write", full)
    with pytest.raises(DiskFullError, match=r"No space left.*patterns\.raw"):
        turn.run()


# --- what it needs ----------------------------------------------------------------------------------------------


def test_only_what_exceeds_the_memory_is_turned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = numbers((6, 8, 16, 12))
    found = find(old_file(tmp_path, patterns))
    assert transposed_bytes(found) == 0
    monkeypatch.setattr(projection, "machine_bytes", lambda: 2 * patterns.nbytes)
    assert transposed_bytes(found) == 0
    monkeypatch.setattr(projection, "machine_bytes", lambda: 2 * patterns.nbytes - 2)
    assert transposed_bytes(found) == patterns.nbytes
    part = find(found.info.path, scan_roi=[0, 6, 2, 4])
    # a quarter of every row, which has to be read whole
    assert transposed_bytes(part) == patterns.nbytes // 4
    np.save(tmp_path / "new.npy", patterns)
    assert transposed_bytes(find(tmp_path / "new.npy")) == 0


def test_the_disk_holds_the_input_once_more(
    tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(old_file(tmp_path, numbers()))
    found = find(config.input.path)
    before = disk_need(config, found, 3)
    monkeypatch.setattr(projection, "CACHED_SHARE", 0)
    after = disk_need(config, found, 3)
    n_bytes = numbers().nbytes
    assert (after.least - before.least, after.most - before.most) == (n_bytes, n_bytes)


def test_holes_take_no_room(tmp_path: Path) -> None:
    turned = TransposedFile(
        str(tmp_path / "run" / "a.raw"), np.dtype("u1"), (64, 64, 64, 64), (1, 1), (1, 1)
    )
    TransposedSink(turned).create(resume=False)
    assert tree_bytes(tmp_path / "run") == 64**4 + NONCE_BYTES
    assert tree_bytes(tmp_path / "run", holes=False) < 64**4 / 100


def test_check_tells_of_it(
    tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(old_file(tmp_path, numbers()))
    plan = prepare(config)
    assert not any(line.startswith("transposes") for line in describe_job(plan))
    monkeypatch.setattr(projection, "CACHED_SHARE", 0)
    (line,) = (line for line in describe_job(plan) if line.startswith("transposes"))
    assert (
        line == "transposes  1.68 kB first into an intermediate file: the input is detector-first"
    )


def slab_of(source: tuple[int, ...], limit: int | None, threads: int = 1) -> Any:
    _ky, _kx, _scan_y, scan_x = source
    file = FlatFile("scan.raw", 0, np.dtype("u2"), source)
    source, info = View.of(file).transpose((2, 3, 0, 1)), SimpleNamespace(path="scan.raw")
    found: Any = SimpleNamespace(source=source, info=info)
    return found, fitting_slab(found, (2, scan_x), Worker(limit, threads))


def test_a_slab_that_fits(make_config: Any) -> None:
    """Planes of 128 KiB, rows of the detector of 32 MiB, blocks of 512 patterns."""
    source = (256, 256, 256, 256)
    found, slab = slab_of(source, None)
    # 128 blocks, so that pieces of 1 MiB make slabs of 128
    assert slab == (4, 256)
    for megabytes in (320, 400, 500, 700, 900, 1400):
        for threads in (1, 2):
            limit = megabytes * 10**6
            room = (limit * USABLE_SHARE - WORKER_BYTES) / threads
            found, slab = slab_of(source, limit, threads)
            sizes = memory_of(make_config("scan.raw"), found, slab=slab)
            assert sizes["turn"].bytes(512) <= room
            assert np.prod(slab) * 65536 * 2 > min(2**27, room / 2 - 9e6) / 2


def test_a_slab_is_neither_small_nor_large() -> None:
    """However few or many blocks there are."""
    assert slab_of((256, 256, 8, 256), None)[1] == (64, 256)
    assert SLAB_BYTES[0] == 64 * 256 * 8 * 256 * 2
    assert slab_of((512, 512, 2048, 64), None)[1] == (2, 512)
    assert SLAB_BYTES[1] == 2 * 512 * 2048 * 64 * 2


def test_a_pixel_that_does_not_fit() -> None:
    with pytest.raises(
        MemoryBudgetError,
        match=r"with 300 MB for 1 thread cannot transpose .* needs 372 MB for a single",
    ):
        slab_of((8, 8, 8192, 8192), 300 * 10**6)


# --- the whole job ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["threads", "local"])
def test_the_job_writes_the_same_bytes(
    kind: str, tmp_path: Path, beam_file: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.load(beam_file)
    new = write_dm4(tmp_path / "new.dm4", data, data.shape[:2], data.shape[2:], "uint16")
    old = old_file(tmp_path, data)
    sections = {
        "output": {"export": ["pt"], "chunk_mb": 10 * 40 * 36 * 2 / 2**20},
        "downsample": {"factor": 2},
        "cluster": {"kind": kind, "threads_per_worker": 2, "n_workers": 1},
    }
    run(make_config(new, "new.zarr", **sections))
    direct = make_config(old, "direct.zarr", **sections)
    run(direct)
    jobs: list[str] = []
    plain = engine.run

    def noted(*args: Any, **options: Any) -> Any:
        jobs.append(options["job"])
        return plain(*args, **options)

    monkeypatch.setattr(engine, "run", noted)
    monkeypatch.setattr(projection, "CACHED_SHARE", 0)
    outcome = run(make_config(old, "turned.zarr", **sections))
    assert jobs[0] == "turn"
    assert outcome.exit_code == 0
    assert not (tmp_path / "turned.run" / "turned").exists()
    # the title and the file's own metadata, which a .pt keeps, are those of the file
    assert (tmp_path / "turned.pt").read_bytes() == (tmp_path / "direct.pt").read_bytes()
    found, expected = (sd.open(tmp_path / f"{name}.pt") for name in ("turned", "new"))
    assert found.drop_attrs(deep=False).equals(expected.drop_attrs(deep=False))
    for name in ("direct", "turned"):
        chunks = sorted((tmp_path / "new.zarr").rglob("c.*"))
        assert len(chunks) > 20
        for path in chunks:
            twin = tmp_path / f"{name}.zarr" / path.relative_to(tmp_path / "new.zarr")
            assert path.read_bytes() == twin.read_bytes(), twin


@pytest.mark.parametrize("align", ["fixed", "pattern"])
def test_the_crop_reads_nothing_but_the_windows(
    align: str, tmp_path: Path, beam_file: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that is not turned first, too: rows and columns of the detector; of the other order whole rows."""
    data = np.load(beam_file)
    full = data.shape[2:]
    old = old_file(tmp_path, data)
    new = write_dm4(tmp_path / "new.dm4", data, data.shape[:2], full, "uint16")
    reach: dict[str, list[set[tuple[int, int]]]] = {}
    plain = FlatFile.read_into

    def noted(self: FlatFile, part: Any, out: Any, file: Any = None) -> None:
        first = 0 if self.path == str(old) else 2
        axes = [s.indices(n)[:2] for s, n in zip(part, self.shape, strict=True)][first : first + 2]
        for seen, axis in zip(reach.setdefault(self.path, [set(), set()]), axes, strict=True):
            seen.add(axis)
        plain(self, part, out, file)

    crop = {"align": align, "margin_pixels": 0}
    for path in (old, new):
        known = tmp_path / f"{path.stem}-known.zarr"
        apart = {"crop": {"enabled": False}, "analyze": {"ahead": True}, "output": {"export": []}}
        run(make_config(path, known.name, **apart))
        monkeypatch.setattr(FlatFile, "read_into", noted)
        sections = {"crop": crop, "analyze": {"from": str(known)}, "output": {"export": []}}
        run(make_config(path, f"{path.stem}.zarr", **sections))
        monkeypatch.setattr(FlatFile, "read_into", plain)
    stored = xr.open_zarr(tmp_path / "old.zarr", group="analysis")
    sizes = xr.open_zarr(tmp_path / "old.zarr").patterns.shape[2:]
    expected = [
        (max(0, int(origin.min())), min(n, int(origin.max()) + size))
        for origin, size, n in zip(
            (stored.window_y.values, stored.window_x.values), sizes, full, strict=True
        )
    ]
    assert expected[1] != (0, full[1])
    for axis in (0, 1):
        seen = reach[str(old)][axis]
        assert (min(a for a, _ in seen), max(b for _, b in seen)) == expected[axis]
    assert reach[str(new)] == [{expected[0]}, {(0, full[1])}]
    patterns = [xr.open_zarr(tmp_path / f"{name}.zarr").patterns for name in ("old", "new")]
    np.testing.assert_array_equal(*patterns)


def test_a_job_goes_on_in_the_middle_of_turning(
    tmp_path: Path, beam_file: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it turns, and what was turned damaged: the same command gives what an undisturbed one does."""
    data = np.load(beam_file)
    old = old_file(tmp_path, data)
    output = {"export": ["pt"], "chunk_mb": 10 * 40 * 36 * 2 / 2**20}
    monkeypatch.setattr(projection, "CACHED_SHARE", 0)
    monkeypatch.setattr(projection, "SLAB_BYTES", (8 * 36 * 60, 8 * 36 * 60))
    run(make_config(old, "whole.zarr", output=output))

    def stop(step: Any) -> None:
        if (step.stage, step.done) == ("turn", 3):
            raise InterruptedRunError("stopped")

    with pytest.raises(InterruptedRunError):
        run(make_config(old, output=output), progress=stop)
    with open(tmp_path / "out.run" / "turned" / "patterns.raw", "r+b") as file:
        file.write(bytes(1000) + b"not what was written")
    steps: list[Any] = []
    assert run(make_config(old, output=output), progress=steps.append).exit_code == 0
    assert [step.total for step in steps if step.stage == "turn"] == [5] * 5
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
