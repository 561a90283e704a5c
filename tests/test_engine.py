"""The engine: each block once, a few in flight, errors are tried again, what a journal notes is read again."""

import errno
import gc
import itertools
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from distributed.core import Status
from hypothesis import given, settings
from hypothesis import strategies as st

import stem_dask as sd
from stem_dask.core.errors import (
    MemoryBudgetError,
    NoMemoryError,
    SourceError,
    StoreError,
    WorkerLostError,
)
from stem_dask.core.model import Record
from stem_dask.engine import run as engine
from stem_dask.engine import submit as submission
from stem_dask.engine.blocks import Grid, bounds
from stem_dask.engine.journal import Journal
from stem_dask.engine.submit import in_flight
from stem_dask.readers.open import find
from stem_dask.stages.crop import crop_blocks
from stem_dask.stages.downsample import downsample_blocks
from stem_dask.stages.open import lazy_blocks
from stem_dask.storage.staging import combine_crc, damage, file_crc

DRAWN = settings(max_examples=40, deadline=None)
N_THREADS = 2
WINDOW = N_THREADS * submission.IN_FLIGHT


@pytest.fixture(scope="module")
def threads_client():
    with (
        dask.config.set({"distributed.worker.memory.spill": False}),
        Client(
            processes=False,
            n_workers=1,
            threads_per_worker=N_THREADS,
            dashboard_address="127.0.0.1:0",
            set_as_default=False,
        ) as client,
    ):
        yield client


@pytest.fixture(params=["pool", "client"])
def client(request, monkeypatch):
    """None (a pool of two threads), or a client of a worker with two threads."""
    monkeypatch.setattr(dask.system, "CPU_COUNT", N_THREADS)
    return None if request.param == "pool" else request.getfixturevalue("threads_client")


def chunks_of(n):
    """Ways to cut n into pieces."""
    return st.lists(st.integers(1, n), min_size=1, max_size=n).map(
        lambda parts: tuple(
            b - a for a, b in itertools.pairwise(sorted({0, *(sum(parts[:i]) % n for i in range(1, len(parts))), n}))
        )
    )  # fmt: skip


def payloads(grid):
    return [(index, *grid.payload(index)) for index in range(grid.n_blocks)]


def evaluate(payload):
    graph, wanted = pickle.loads(payload)
    return dict(zip(wanted, dask.get(graph, list(wanted.values())), strict=True))


# --- blocks -----------------------------------------------------------------------------------------------------


@given(y=chunks_of(7), x=chunks_of(5))
@DRAWN
def test_blocks_tile_the_scan(y, x):
    array = np.arange(7 * 5 * 2 * 3).reshape(7, 5, 2, 3)
    patterns = da.from_array(array, chunks=(y, x, 2, 3)) * 2 + 1
    outputs = {"patterns": patterns, "total": patterns.sum(axis=(2, 3))}
    grid = Grid(outputs, 2)
    assert grid.n_blocks == len(y) * len(x)
    covered = np.zeros((7, 5), int)
    for number, (index, region, payload) in enumerate(payloads(grid)):
        assert index == number
        covered[region] += 1
        blocks = evaluate(payload)
        assert list(blocks) == ["patterns", "total"]
        np.testing.assert_array_equal(blocks["patterns"], array[region] * 2 + 1)
        np.testing.assert_array_equal(blocks["total"], (array[region] * 2 + 1).sum(axis=(2, 3)))
    assert (covered == 1).all()


def test_blocks_of_a_list():
    array = np.arange(7 * 6).reshape(7, 2, 3)
    grid = Grid({"patterns": da.from_array(array, chunks=(3, 2, 3))}, 1)
    regions = [region for _, region, _ in payloads(grid)]
    assert regions == [(slice(0, 3),), (slice(3, 6),), (slice(6, 7),)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (da.zeros((4, 4, 2, 2), chunks=(2, 4, 2, 2)), da.zeros((4, 4), chunks=(4, 4))),
        (da.zeros((4, 4, 2, 2), chunks=(2, 4, 2, 2)), da.zeros((4, 4, 2, 2), chunks=(4, 2, 2, 2))),
        (da.zeros((4, 4), chunks=(2, 4)), da.zeros((4, 4, 2, 2), chunks=(2, 4, 1, 2))),
        (da.zeros((4, 4, 2, 2), chunks=(2, 4, 2, 1)), da.zeros((4, 4), chunks=(2, 4))),
        (da.zeros((4, 4), chunks=((1, 3), 4)), da.zeros((4, 4), chunks=((3, 1), 4))),
    ],
    ids=["count", "axis", "detector", "first", "sizes"],
)
def test_blocks_that_do_not_belong_together(first, second):
    with pytest.raises(StoreError, match=r"output \w+ has blocks"):
        Grid({"one": first, "two": second}, 2)


def test_payloads_do_not_grow_with_the_number_of_blocks():
    def largest(n):
        array = da.zeros((n, 4, 8, 8), chunks=(1, 4, 8, 8), dtype="u2") + 1
        outputs = {"patterns": array, "total": array.sum(axis=(2, 3))}
        return max(len(payload) for *_, payload in payloads(Grid(outputs, 2)))

    assert largest(400) < largest(4) + 100 < 20_000


def test_payloads_of_an_array_in_memory_hold_their_block_only():
    array = np.random.default_rng(0).integers(0, 99, (16, 4, 32, 32)).astype("u2")
    grid = Grid({"patterns": da.from_array(array, chunks=(1, 4, 32, 32))}, 2)
    assert max(len(payload) for *_, payload in payloads(grid)) < array[:1].nbytes + 5000


def test_payloads_of_a_fixed_window_hold_no_origins():
    """They are the same for all patterns: of the 32,768 of this block they would take 4 bytes each, twice."""
    made = da.ones((256, 128, 8, 8), "u1", chunks=-1)
    patterns = xr.DataArray(made, dims=("scan_y", "scan_x", "ky", "kx"))
    analysis = sd.analyze(patterns).compute()
    cropped = sd.crop(patterns, analysis, sd.choose_window(analysis, size=4))
    assert len(Grid({"patterns": cropped.data}, 2).payload(0)[1]) < 4000


def test_functions_of_a_script_travel_with_their_code(monkeypatch):
    """A worker cannot import them; others go by their name."""
    twice = lambda block: 2 * block  # noqa: E731
    named = Grid({"one": da.ones((2, 3), chunks=(1, 3)).map_blocks(np.negative)}, 1)
    assert b"cloudpickle" not in named.payload(0)[1]
    for name in ("__main__", __name__):
        monkeypatch.setattr(twice, "__module__", name)
        grid = Grid({"one": da.ones((2, 3), chunks=(1, 3)).map_blocks(twice)}, 1)
        assert b"cloudpickle" in grid.payload(0)[1]
        np.testing.assert_array_equal(evaluate(grid.payload(0)[1])["one"], [[2, 2, 2]])


def test_a_worker_loads_no_dask_array_to_read_analyze_and_crop(beam_file, tmp_path):
    """A fresh process does the work of two blocks; dask.array would bring xarray, pandas and scipy along."""
    patterns = lazy_blocks(find(beam_file), (2, 8))
    analysis = sd.analyze(sd.open(beam_file)).compute()
    cropped = crop_blocks(patterns, analysis, sd.choose_window(analysis), detector_first=False)
    how = {"method": "bin", "reduce": "mean", "sigma": None, "device": "cpu"}
    small = downsample_blocks(cropped, 2, **how)
    total = sd.analyze(patterns).total.data
    lazy = {"total": total, "patterns": small.data}
    files = [tmp_path / name for name in lazy]
    for file, (name, array) in zip(files, lazy.items(), strict=True):
        file.write_bytes(Grid({name: array}, 2).payload(0)[1])
    code = (
        "import pickle, sys\n"
        "import numpy as np\n"
        "from stem_dask.engine.blocks import computed\n"
        f"for name in {[str(file) for file in files]!r}:\n"
        "    graph, wanted = pickle.load(open(name, 'rb'))\n"
        "    values = computed(graph, wanted.values())\n"
        "    print([np.asarray(v).dtype.str for v in values.values()])\n"
        "print(sorted({'dask.array', 'xarray', 'pandas', 'zarr'} & {*sys.modules}))"
    )
    run = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['<f8']", "['<f4']", "[]"]


# --- in flight --------------------------------------------------------------------------------------------------


def square(n):
    return n * n


def test_all_results_come_once(client):
    assert sorted(in_flight(client, ((square, (n,)) for n in range(50)))) == [
        n * n for n in range(50)
    ]
    assert list(in_flight(client, [])) == []


def test_two_at_once_do_not_mix(client):
    """Two jobs of one client, in threads of their own, or one within the other."""
    both = [in_flight(client, ((square, (n,)) for n in range(first, 90, 2))) for first in (0, 1)]
    pairs = list(zip(*both, strict=True))
    for first in (0, 1):
        assert sorted(pair[first] for pair in pairs) == [n * n for n in range(first, 90, 2)]


def test_only_a_window_is_submitted(client):
    """Never more submitted than came back, plus four for each thread."""
    submitted = []
    calls = ((square, (n,)) for n in range(60) if submitted.append(n) is None)
    ahead = []
    for yielded, _ in enumerate(in_flight(client, calls)):
        ahead.append(len(submitted) - yielded)
    assert len(submitted) == len(ahead) == 60
    assert max(ahead) == ahead[0] <= WINDOW + 1
    assert ahead[-1] == 1


_STATE: dict = {}


def fail(n):
    if n == 3:
        raise SourceError("block 3: the file was cut")
    return n


def test_the_first_error_stops_it_and_is_raised_as_it_was(client):
    submitted = []
    calls = ((fail, (n,)) for n in range(100_000) if submitted.append(n) is None)
    with pytest.raises(SourceError, match=r"^block 3: the file was cut$") as caught:
        list(in_flight(client, calls))
    assert type(caught.value) is SourceError
    assert len(submitted) < 2000


def _fail_when_the_other_runs():
    _STATE["barrier"].wait(20)
    raise SourceError("it fails")


def _work_on():
    _STATE["barrier"].wait(20)
    for _ in range(40):
        zlib.compress(bytes(1_000_000), 9)
    _STATE["ended"].append(True)


def test_an_error_waits_for_what_still_runs(client):
    """Else a late task would write into what is being removed, or into the next run's output."""
    _STATE.update(barrier=threading.Barrier(2), ended=[])
    with pytest.raises(SourceError, match="it fails"):
        list(in_flight(client, [(_fail_when_the_other_runs, ()), (_work_on, ())]))
    assert _STATE["ended"] == [True]


def test_whoever_stops_listening_stops_the_submission(client):
    submitted = []
    calls = ((square, (n,)) for n in range(1000) if submitted.append(n) is None)
    results = in_flight(client, calls)
    next(results)
    results.close()
    assert len(submitted) <= 2 * WINDOW


class Counted:
    """Calls that tell how many are left."""

    def __init__(self, calls):
        self.calls = list(calls)

    def __iter__(self):
        return self

    def __length_hint__(self):
        return len(self.calls)

    def __next__(self):
        if not self.calls:
            raise StopIteration
        return self.calls.pop(0)


@pytest.fixture
def one_thread():
    """A client of one worker with one thread, and the numbers of calls of the tasks that it is given."""
    options = {"processes": False, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(n_workers=1, **options) as cluster, Client(cluster) as client:
        sizes, submit = [], client.map

        def counting(function, work, **how):
            sizes.extend(map(len, work))
            return submit(function, work, **how)

        client.map = counting
        yield client, sizes


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 1), (1e6, 3)])
def test_long_calls_and_many_calls(one_thread, monkeypatch, seconds, most):
    """A long call has a task of its own, and no more are in flight than the scheduler takes."""
    client, sizes = one_thread
    monkeypatch.setattr(submission, "TASK_SECONDS", seconds)
    monkeypatch.setattr(submission, "CALLS_IN_FLIGHT", 3 * submission.IN_FLIGHT)
    assert len(list(in_flight(client, Counted((square, (n,)) for n in range(100))))) == 100
    assert max(sizes) == most


def test_short_calls_share_tasks(one_thread, monkeypatch):
    """All of them come once; the first and the last by themselves, so that no thread works on when others have ended."""
    client, sizes = one_thread
    monkeypatch.setattr(submission, "TASK_SECONDS", 1e6)
    assert sorted(in_flight(client, Counted((square, (n,)) for n in range(1000)))) == [
        n * n for n in range(1000)
    ]
    assert sum(sizes) == 1000
    assert sizes[: submission.IN_FLIGHT] == [1] * submission.IN_FLIGHT
    assert sizes[-1] == 1
    assert max(sizes) == (1000 - submission.IN_FLIGHT) // submission.TASKS_LEFT
    assert len(sizes) < 100


def test_what_was_done_before_an_error_in_the_same_task_comes(one_thread, monkeypatch):
    client, sizes = one_thread
    monkeypatch.setattr(submission, "TASK_SECONDS", 1e6)
    results, calls = [], [(square, (n,)) for n in range(240)]
    calls[100] = (fail, (3,))
    with pytest.raises(SourceError, match=r"^block 3: the file was cut$"):
        results.extend(in_flight(client, Counted(calls)))
    # its task; a small one that was submitted later may have run before those that waited in the scheduler
    first = max(start for start in itertools.accumulate(sizes, initial=0) if start <= 100)
    assert first < 100
    assert {n * n for n in range(first, 100)} <= set(results)


# --- run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderSink:
    """One file a block; notes what it was asked in files, so that it works in another process too."""

    folder: Path

    def note(self, *words):
        with open(f"{self.folder}.log", "a") as file:
            file.write(" ".join(map(str, words)) + "\n")

    def noted(self, verb):
        """What was asked so far, sorted, and then forgotten."""
        path = Path(f"{self.folder}.log")
        words = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        path.write_text("".join(" ".join(w) + "\n" for w in words if w[0] != verb))
        return sorted(int(what) for said, what in words if said == verb)

    def path(self, index):
        return self.folder / f"{index}.npy"

    def create(self, *, resume):
        if not resume:
            self.folder.mkdir()

    def write(self, index, region, blocks):
        self.note("write", index)
        with open(self.path(index), "wb") as file:
            np.save(file, blocks["patterns"])
        return {"rows": (region[0].start, region[0].stop), "file": file_crc(self.path(index))}

    def verify(self, record):
        self.note("verify", record.index)
        return damage(self.path(record.index), tuple(record.extra["file"]))

    def finish(self, records):
        names = sorted(int(path.stem) for path in self.folder.glob("*.npy"))
        assert names == [record.index for record in records]
        (self.folder / "finished").touch()


class AnyFolderSink(FolderSink):
    """One that starts anew where something is."""

    def create(self, *, resume):
        self.note("create", int(resume))
        if not resume:
            for path in self.folder.glob("*"):
                path.unlink()
            self.folder.mkdir(exist_ok=True)


def lazy(n=9):
    return da.arange(n * 24, chunks=-1).reshape((n, 2, 3, 4)).rechunk((2, 2, 3, 4))


def test_run(client, tmp_path):
    sink = FolderSink(tmp_path / "out")
    seen = []

    def progress(done, n, record):
        assert not (sink.folder / "finished").exists()
        seen.append((done, n, record.index))

    records = engine.run({"patterns": lazy()}, 2, sink, client=client, progress=progress)
    assert [record.index for record in records] == [0, 1, 2, 3, 4]
    assert [record.extra["rows"] for record in records] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    assert [record.bytes_out for record in records] == [384] * 4 + [192]
    assert all(record.seconds > 0 and record.peak_rss > 1e6 for record in records)
    assert [(done, n) for done, n, _ in seen] == [(i, 5) for i in range(1, 6)]
    assert sorted(index for *_, index in seen) == [0, 1, 2, 3, 4]
    assert (sink.folder / "finished").exists()
    assert sink.noted("write") == [0, 1, 2, 3, 4]  # each once
    assert sink.noted("verify") == []
    whole = np.concatenate([np.load(sink.folder / f"{i}.npy") for i in range(5)])
    np.testing.assert_array_equal(whole, np.arange(9 * 24).reshape(9, 2, 3, 4))


class LastFirst:
    """Block 0 ends after block 1 did."""

    other = threading.Event()

    def create(self, *, resume):
        assert resume is False
        self.other.clear()

    def write(self, index, region, blocks):
        if index == 0:
            assert self.other.wait(20)
        _STATE["order"].append(index)
        if index == 1:
            self.other.set()
        return {}

    def verify(self, record):
        raise AssertionError(f"nobody noted block {record.index}")

    def finish(self, records):
        assert [record.index for record in records] == [0, 1, 2, 3, 4]


def test_records_are_in_the_order_of_blocks_not_of_time(client):
    _STATE["order"] = []
    engine.run({"patterns": lazy()}, 2, LastFirst(), client=client)
    assert _STATE["order"].index(0) > _STATE["order"].index(1)


class BusySink(LastFirst):
    """Notes in memory which blocks it began and which it ended."""

    def write(self, index, region, blocks):
        _STATE["began"].append(index)
        zlib.compress(bytes(3_000_000), 9)
        _STATE["ended"].append(index)
        return {}

    def finish(self, records):
        raise AssertionError("it is not complete")


def test_an_error_in_the_progress_bar_leaves_nothing_running(client):
    _STATE.update(began=[], ended=[])

    def progress(done, n, record):
        raise RuntimeError("the terminal went away")

    with pytest.raises(RuntimeError, match="the terminal went away") as caught:
        engine.run({"patterns": lazy(90)}, 2, BusySink(), client=client, progress=progress)
    assert caught.tb is not None
    began, ended = len(_STATE["began"]), len(_STATE["ended"])
    assert began == ended <= 2 * WINDOW


def test_run_checks_the_blocks_before_it_creates(tmp_path):
    sink = FolderSink(tmp_path / "out")
    with pytest.raises(StoreError, match="must agree"):
        engine.run({"a": lazy(), "b": lazy().rechunk((3, 2, 3, 4))}, 2, sink)
    assert not sink.folder.exists()


# --- errors that pass, and errors that stay ---------------------------------------------------------------------


def unsteady(block, block_info=None):
    """Raises what the test wants, as often as it wants."""
    index = block_info[0]["chunk-location"][0]
    _STATE["tries"].append(index)
    if index == 2 and _STATE["tries"].count(index) <= _STATE["n_errors"]:
        raise _STATE["error"]
    return block


def unsteady_patterns():
    patterns = lazy()
    return patterns.map_blocks(unsteady, dtype=patterns.dtype, meta=patterns._meta)


class UnsteadySink(FolderSink):
    """The same, where a block is written."""

    def write(self, index, region, blocks):
        unsteady(None, {0: {"chunk-location": (index,)}})
        return super().write(index, region, blocks)


def stale():
    return OSError(errno.ESTALE, "stale file handle")


def wrapped():
    error = SourceError("a.h5: cannot be read")
    error.__cause__ = stale()
    return error


@pytest.mark.parametrize("where", ["read", "write"])
@pytest.mark.parametrize("error", [stale, wrapped])
@pytest.mark.parametrize("n_errors", [2, 3])
def test_an_error_that_passes(client, tmp_path, where, error, n_errors):
    _STATE.update(tries=[], n_errors=n_errors, error=error())
    sink = (FolderSink if where == "read" else UnsteadySink)(tmp_path / "out")
    patterns = unsteady_patterns() if where == "read" else lazy()
    records = engine.run({"patterns": patterns}, 2, sink, client=client)
    assert [record.index for record in records] == [0, 1, 2, 3, 4]
    assert sorted(_STATE["tries"]) == [0, 1, *[2] * (n_errors + 1), 3, 4]
    np.testing.assert_array_equal(np.load(sink.path(2)), lazy()[4:6].compute())


@pytest.mark.parametrize(
    ("where", "kind"), [("read", SourceError), ("write", StoreError)], ids=["read", "write"]
)
def test_an_error_that_stays(client, tmp_path, where, kind):
    """Four tries, then it is said in whose block it was."""
    _STATE.update(tries=[], n_errors=99, error=stale())
    sink = (FolderSink if where == "read" else UnsteadySink)(tmp_path / "out")
    patterns = unsteady_patterns() if where == "read" else lazy()
    with pytest.raises(
        kind, match=r"^block \[4:6, 0:2\]: \[Errno \d+\] stale file handle$"
    ) as caught:
        engine.run({"patterns": patterns}, 2, sink, client=client)
    assert type(caught.value) is kind
    assert _STATE["tries"].count(2) == 4
    assert not (sink.folder / "finished").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "no space left"),
            r"^block \[4:6, 0:2\]: \[Errno \d+\] no space left$",
        ),
        (
            PermissionError(errno.EACCES, "not yours"),
            r"^block \[4:6, 0:2\]: \[Errno \d+\] not yours$",
        ),
        (
            StoreError("70,000 does not fit int16"),
            r"^block \[4:6, 0:2\]: 70,000 does not fit int16$",
        ),
    ],
    ids=["full", "permission", "refusal"],
)
def test_what_will_not_pass_is_not_tried_again(client, tmp_path, error, message):
    _STATE.update(tries=[], n_errors=99, error=error)
    with pytest.raises(StoreError, match=message):
        engine.run({"patterns": lazy()}, 2, UnsteadySink(tmp_path / "out"), client=client)
    assert _STATE["tries"].count(2) == 1


def test_an_error_of_the_program_is_raised_as_it_is(client, tmp_path):
    _STATE.update(tries=[], n_errors=99, error=ZeroDivisionError("by hand"))
    with pytest.raises(ZeroDivisionError, match=r"^by hand$"):
        engine.run({"patterns": unsteady_patterns()}, 2, FolderSink(tmp_path / "o"), client=client)
    assert _STATE["tries"].count(2) == 1


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError(), NoMemoryError, r"^block \[4:6, 0:2\]: the memory of the process is full; lower output"),
        (MemoryError("3 GiB"), NoMemoryError, r"^block \[4:6, 0:2\]: 3 GiB; lower output\.chunk_mb, or use fewer"),
        (MemoryBudgetError("ours"), MemoryBudgetError, "^ours$"),
    ],
)  # fmt: skip
def test_memory_that_is_full(client, tmp_path, error, kind, message):
    _STATE.update(tries=[], n_errors=99, error=error)
    with pytest.raises(kind, match=message) as caught:
        engine.run({"patterns": unsteady_patterns()}, 2, FolderSink(tmp_path / "o"), client=client)
    assert type(caught.value) is kind
    assert _STATE["tries"].count(2) == 1


class Watched(np.ndarray):
    """An array that a weak reference can point to."""


_READ = []


def read_watched(block):
    out = (block + 1).view(Watched)
    _READ.append(weakref.ref(out))
    return out


class LonelySink(FolderSink):
    def write(self, index, region, blocks):
        assert [read() for read in _READ] == [None]
        return {}


def test_a_value_goes_as_soon_as_nothing_needs_it():
    """The input of a block is gone before the block is written, and not only at the next garbage collection."""
    _READ.clear()
    ones = da.ones((2, 2, 4, 4), chunks=(1, 2, 4, 4))
    sums = ones.map_blocks(read_watched, meta=np.empty((0,) * 4)).sum((-2, -1))
    region, payload = Grid({"sums": sums}, 2).payload(1)
    gc.disable()
    try:
        (record,) = engine._write_block(payload, LonelySink(Path("unused")), 1, region)
    finally:
        gc.enable()
    assert record.extra == {"region": [[1, 2], [0, 2]]}


# --- going on ---------------------------------------------------------------------------------------------------


def digests(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def run_noted(sink, client, patterns=None, **options):
    """A run with the journal beside the sink's folder, as a new process would open it."""
    journal = Journal(f"{sink.folder}.journal")
    try:
        outputs = {"patterns": lazy() if patterns is None else patterns}
        return engine.run(outputs, 2, sink, client=client, journal=journal, job="crop", **options)
    finally:
        journal.close()


def test_the_same_run_again_reads_and_computes_nothing(client, tmp_path):
    sink = FolderSink(tmp_path / "out")
    first = run_noted(sink, client)
    assert (sink.noted("write"), sink.noted("verify")) == ([0, 1, 2, 3, 4], [])
    before = digests(sink.folder)
    seen = []
    _STATE.update(tries=[], n_errors=0)
    again = run_noted(
        sink, client, unsteady_patterns(), progress=lambda done, n, _: seen.append((done, n))
    )
    assert _STATE["tries"] == []
    assert (sink.noted("write"), sink.noted("verify")) == ([], [0, 1, 2, 3, 4])
    assert [record.index for record in again] == [0, 1, 2, 3, 4]
    assert [record.bytes_out for record in again] == [record.bytes_out for record in first]
    assert seen == [(i, 5) for i in range(1, 6)]
    assert digests(sink.folder) == before
    assert Path(f"{sink.folder}.journal").read_bytes().count(b"index") == 5  # nothing twice


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = [truncated, zeroed, flipped, Path.unlink]


@pytest.mark.parametrize("spoil", DAMAGE)
@pytest.mark.parametrize("blocks", [[2], [4], [1, 3], [0, 1, 2, 3, 4]], ids=str)
def test_damaged_blocks_are_named_and_computed_again(client, tmp_path, caplog, spoil, blocks):
    sink = FolderSink(tmp_path / "out")
    run_noted(sink, client)
    before = digests(sink.folder)
    for index in blocks:
        spoil(sink.path(index))
    sink.noted("write")
    with caplog.at_level(logging.WARNING, "stem_dask"):
        records = run_noted(sink, client)
    assert [record.index for record in records] == [0, 1, 2, 3, 4]
    assert sink.noted("verify") == [0, 1, 2, 3, 4]
    assert sink.noted("write") == blocks
    assert digests(sink.folder) == before
    said = sorted(r.getMessage() for r in caplog.records if r.name == "stem_dask")
    assert len(said) == len(blocks)
    for index, line in zip(blocks, said, strict=True):
        assert line.startswith(f"crop: {sink.path(index)} ")
        assert line.endswith("; it is computed again")
    run_noted(sink, client)  # and the journal knows the new ones
    assert sink.noted("write") == []


def test_a_run_that_stopped_goes_on(client, tmp_path):
    """What is missing is computed, what was noted is only read."""
    _STATE.update(tries=[], n_errors=99, error=stale())
    sink = AnyFolderSink(tmp_path / "out")  # the bad block may come before any was noted
    with pytest.raises(SourceError, match=r"^block \[4:6, 0:2\]: "):
        run_noted(sink, client, unsteady_patterns())
    noted = sorted(Journal(f"{sink.folder}.journal").records("crop"))
    assert 2 not in noted
    sink.noted("write")
    records = run_noted(sink, client)
    assert [record.index for record in records] == [0, 1, 2, 3, 4]
    assert sink.noted("verify") == noted
    assert sink.noted("write") == sorted({0, 1, 2, 3, 4} - set(noted))
    whole = np.concatenate([np.load(sink.path(i)) for i in range(5)])
    np.testing.assert_array_equal(whole, np.arange(9 * 24).reshape(9, 2, 3, 4))


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_blocks_of_another_size_are_not_taken_for_these(tmp_path, caplog, rows):
    """Another memory limit gives other blocks under the same token."""
    sink = AnyFolderSink(tmp_path / "out")
    run_noted(sink, None)
    sink.noted("write")
    other = lazy().rechunk((rows, 2, 3, 4))
    n = other.numblocks[0]
    for created, written in ((0, list(range(n))), (1, [])):
        sink.noted("create")
        with caplog.at_level(logging.WARNING, "stem_dask"):
            run_noted(sink, None, other)
        assert sink.noted("create") == [created]
        assert sink.noted("write") == written
        whole = np.concatenate([np.load(sink.path(i)) for i in range(n)])
        np.testing.assert_array_equal(whole, np.arange(9 * 24).reshape(9, 2, 3, 4))
    assert [record.getMessage() for record in caplog.records] == [
        "crop: blocks have another size than before; all are computed again"
    ]


class MemorySink:
    """Keeps what was written in a dictionary; the test says what is damaged."""

    def __init__(self, damaged):
        self.damaged, self.written, self.finished = set(damaged), [], None

    def create(self, *, resume):
        self.resumed = resume

    def write(self, index, region, blocks):
        self.written.append(index)
        return {}

    def verify(self, record):
        return f"block {record.index} is gone" if record.index in self.damaged else None

    def finish(self, records):
        self.finished = [record.index for record in records]


@given(n=st.integers(1, 30), data=st.data())
@DRAWN
def test_any_part_noted_and_any_part_of_it_damaged(tmp_path_factory, n, data):
    patterns = da.zeros((n, 1, 1, 1), chunks=(1, 1, 1, 1))
    noted = data.draw(st.sets(st.integers(0, n - 1)))
    damaged = data.draw(st.sets(st.sampled_from(sorted(noted)))) if noted else set()
    journal = Journal(tmp_path_factory.mktemp("run") / "journal")
    grid = Grid({"patterns": patterns}, 2)
    for index in noted:
        region = bounds(grid.region(index))
        journal.append("crop", Record(index, 0.5, 8, 0, {"region": region}))
    sink = MemorySink(damaged)
    engine.run({"patterns": patterns}, 2, sink, journal=journal, job="crop")
    journal.close()
    assert sink.resumed is bool(noted)
    assert sorted(sink.written) == sorted(set(range(n)) - noted | damaged)
    assert sink.finished == list(range(n))
    assert sorted(Journal(journal.path).records("crop")) == list(range(n))


# --- checksums --------------------------------------------------------------------------------------------------


def test_combined_checksums_of_long_pieces():
    pieces = [np.arange(n, dtype="u1").tobytes() for n in (3_000_001, 1, 2**20)]
    assert prod(len(p) for p in pieces) > 2**40
    assert combine_crc((len(p), zlib.crc32(p)) for p in pieces) == zlib.crc32(b"".join(pieces))


def test_workers_that_do_not_come_back():
    """Where the scheduler is told to wait for so long, as in the template for many nodes."""
    options = {"processes": False, "n_workers": 0, "dashboard_address": ":0"}
    with (
        dask.config.set({"distributed.scheduler.no-workers-timeout": "50ms"}),
        Client(**options, set_as_default=False) as client,
        pytest.raises(WorkerLostError, match="all workers have gone") as caught,
    ):
        list(in_flight(client, [(int, ("7",))]))
    assert caught.value.exit_code == 5


def test_that_no_worker_is_left_is_told(monkeypatch):
    """The run waits, and goes on when one comes."""
    monkeypatch.setattr(submission, "ALONE_SECONDS", 0.01)
    options = {"processes": False, "threads_per_worker": 1, "dashboard_address": ":0"}
    told = []

    class Listener(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())
            cluster.scale(1)

    listener, logger = Listener(), logging.getLogger("stem_dask")
    with LocalCluster(n_workers=0, **options) as cluster, Client(cluster) as client:
        logger.addHandler(listener)
        try:
            assert list(in_flight(client, [(int, ("7",))])) == [7]
        finally:
            logger.removeHandler(listener)
    assert told[0] == "no worker is left; the run waits until there is one"


def test_that_workers_are_paused_is_told():
    """Dask has a worker wait that is nearly full, where it was not told otherwise; nothing said why a run stood still."""
    options = {"processes": False, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(n_workers=2, **options) as cluster, Client(cluster) as client:
        assert submission._why_idle(client) == ""
        for status, told in [(Status.paused, "1 of 2 workers wait until less of"), (Status.running, "")]:  # fmt: skip
            cluster.workers[0].status = status
            end = time.monotonic() + 20
            while bool(found := submission._why_idle(client)) != bool(told):
                assert time.monotonic() < end  # the scheduler hears it in a moment
            assert found.startswith(told)


def test_workers_that_join_get_tasks(monkeypatch):
    """Four in flight for each thread there is by then."""
    monkeypatch.setattr(submission, "WORKERS_SECONDS", 0.0)
    issued, most, got = 0, [], 0

    def calls():
        nonlocal issued
        for i in range(40):
            issued += 1
            yield int, (i,)

    options = {"processes": False, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(n_workers=1, **options) as cluster, Client(cluster) as client:
        for _ in in_flight(client, calls()):
            got += 1
            most.append(issued - got)
            if got == 10:
                cluster.scale(3)
                client.wait_for_workers(3)
    assert got == 40
    assert max(most[:9]) <= 4
    assert max(most) == 12 - 1  # one has just come back
