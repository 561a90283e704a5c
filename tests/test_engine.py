"""The engine: each block once, a few in flight, the first error ends it, records in order."""

import itertools
import pickle
import threading
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_dask import engine
from stem_dask.errors import SourceError, StoreError
from stem_dask.io.pt import combine_crc
from stem_dask.model import Record

DRAWN = settings(max_examples=40, deadline=None)
N_THREADS = 2
WINDOW = N_THREADS * engine.IN_FLIGHT


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
    grid = engine.Grid(outputs, 2)
    assert grid.n_blocks == len(y) * len(x)
    covered = np.zeros((7, 5), int)
    for number, (index, region, payload) in enumerate(grid.payloads()):
        assert index == number
        covered[region] += 1
        blocks = evaluate(payload)
        assert list(blocks) == ["patterns", "total"]
        np.testing.assert_array_equal(blocks["patterns"], array[region] * 2 + 1)
        np.testing.assert_array_equal(blocks["total"], (array[region] * 2 + 1).sum(axis=(2, 3)))
    assert (covered == 1).all()


def test_blocks_of_a_list():
    array = np.arange(7 * 6).reshape(7, 2, 3)
    grid = engine.Grid({"patterns": da.from_array(array, chunks=(3, 2, 3))}, 1)
    regions = [region for _, region, _ in grid.payloads()]
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
        engine.Grid({"one": first, "two": second}, 2)


def test_payloads_do_not_grow_with_the_number_of_blocks():
    def largest(n):
        array = da.zeros((n, 4, 8, 8), chunks=(1, 4, 8, 8), dtype="u2") + 1
        outputs = {"patterns": array, "total": array.sum(axis=(2, 3))}
        return max(len(payload) for *_, payload in engine.Grid(outputs, 2).payloads())

    assert largest(400) < largest(4) + 100 < 20_000


def test_payloads_of_an_array_in_memory_hold_their_block_only():
    array = np.random.default_rng(0).integers(0, 99, (16, 4, 32, 32)).astype("u2")
    grid = engine.Grid({"patterns": da.from_array(array, chunks=(1, 4, 32, 32))}, 2)
    assert max(len(payload) for *_, payload in grid.payloads()) < array[:1].nbytes + 5000


def test_cut_takes_what_is_needed_and_no_more():
    array = da.ones((4, 4), chunks=(2, 4)) + 1
    tasks = dict(array.__dask_graph__())
    part = engine.cut(tasks, [(array.name, 1, 0)])
    assert {key[1] for key in part} == {1}
    assert set(part) < set(tasks)


# --- in flight --------------------------------------------------------------------------------------------------


def square(n):
    return n * n


def test_all_results_come_once(client):
    assert sorted(engine.in_flight(client, ((square, (n,)) for n in range(50)))) == [
        n * n for n in range(50)
    ]
    assert list(engine.in_flight(client, [])) == []


def test_only_a_window_is_submitted(client):
    """Never more submitted than came back, plus three for each thread."""
    submitted = []
    calls = ((square, (n,)) for n in range(60) if submitted.append(n) is None)
    ahead = []
    for yielded, _ in enumerate(engine.in_flight(client, calls)):
        ahead.append(len(submitted) - yielded)
    assert len(submitted) == len(ahead) == 60
    assert max(ahead) == ahead[0] <= WINDOW + 1
    assert ahead[-1] == 1


def test_no_more_at_once_than_threads(client):
    running, most = set(), []
    lock = threading.Lock()
    state = (running, most, lock)
    _STATE["running"] = state

    assert len(list(engine.in_flight(client, ((_count, (n,)) for n in range(40))))) == 40
    assert 1 <= max(most) <= N_THREADS


_STATE: dict = {}


def _count(n):
    running, most, lock = _STATE["running"]
    with lock:
        running.add(n)
        most.append(len(running))
    zlib.crc32(bytes(100_000))
    with lock:
        running.remove(n)
    return n


def fail(n):
    if n == 3:
        raise SourceError("block 3: the file was cut")
    return n


def test_the_first_error_stops_it_and_is_raised_as_it_was(client):
    submitted = []
    calls = ((fail, (n,)) for n in range(100_000) if submitted.append(n) is None)
    with pytest.raises(SourceError, match=r"^block 3: the file was cut$") as caught:
        list(engine.in_flight(client, calls))
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
        list(engine.in_flight(client, [(_fail_when_the_other_runs, ()), (_work_on, ())]))
    assert _STATE["ended"] == [True]


def test_whoever_stops_listening_stops_the_submission(client):
    submitted = []
    calls = ((square, (n,)) for n in range(1000) if submitted.append(n) is None)
    results = engine.in_flight(client, calls)
    next(results)
    results.close()
    assert len(submitted) <= 2 * WINDOW


# --- run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderSink:
    """One file a block; notes what it was asked in files, so that it works in another process too."""

    folder: Path
    bad: int = -1

    def create(self):
        self.folder.mkdir()

    def write(self, index, region, blocks):
        if index == self.bad:
            raise SourceError(f"block {index} is bad")
        with open(self.folder / f"{index}.npy", "xb") as file:
            np.save(file, blocks["patterns"])
        return {"rows": (region[0].start, region[0].stop)}

    def verify(self, record):
        assert (self.folder / f"{record.index}.npy").exists()

    def finish(self, records):
        names = sorted(int(path.stem) for path in self.folder.glob("*.npy"))
        assert names == [record.index for record in records]
        (self.folder / "finished").touch()


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
    whole = np.concatenate([np.load(sink.folder / f"{i}.npy") for i in range(5)])
    np.testing.assert_array_equal(whole, np.arange(9 * 24).reshape(9, 2, 3, 4))


class LastFirst:
    """Block 0 ends after block 1 did."""

    other = threading.Event()

    def create(self):
        self.other.clear()

    def write(self, index, region, blocks):
        if index == 0:
            assert self.other.wait(20)
        _STATE["order"].append(index)
        if index == 1:
            self.other.set()
        return {}

    def verify(self, record):
        assert isinstance(record, Record)

    def finish(self, records):
        assert [record.index for record in records] == [0, 1, 2, 3, 4]


def test_records_are_in_the_order_of_blocks_not_of_time(client):
    _STATE["order"] = []
    engine.run({"patterns": lazy()}, 2, LastFirst(), client=client)
    assert _STATE["order"].index(0) > _STATE["order"].index(1)


def test_run_with_a_bad_block_is_not_finished(client, tmp_path):
    sink = FolderSink(tmp_path / "out", bad=2)
    with pytest.raises(SourceError, match=r"^block 2 is bad$"):
        engine.run({"patterns": lazy()}, 2, sink, client=client)
    assert not (sink.folder / "finished").exists()


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


# --- checksums --------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=70), max_size=8))
@DRAWN
def test_combined_checksums(pieces):
    known = [(len(piece), zlib.crc32(piece)) for piece in pieces]
    assert combine_crc(known) == zlib.crc32(b"".join(pieces))


def test_combined_checksums_of_long_pieces():
    pieces = [np.arange(n, dtype="u1").tobytes() for n in (3_000_001, 1, 2**20)]
    assert prod(len(p) for p in pieces) > 2**40
    assert combine_crc((len(p), zlib.crc32(p)) for p in pieces) == zlib.crc32(b"".join(pieces))
