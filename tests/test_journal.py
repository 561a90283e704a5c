"""The journal: what was noted is known again, whatever a kill or a bad disk made of the file."""

import errno
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_dask.core.model import Record
from stem_dask.engine import journal as module
from stem_dask.engine.journal import Journal

DRAWN = settings(max_examples=60, deadline=None)


def record(index, /, **extra):
    return Record(index, 0.25, 8 * index, 10**8, extra or {"crc": index, "shard": f"c/{index}/0"})


def noted(path, job="crop", indices=range(4)):
    journal = Journal(path)
    for index in indices:
        journal.append(job, record(index))
    journal.close()
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


def test_what_was_noted_is_known_again(path):
    journal = Journal(path)
    assert journal.known == {}
    assert journal.records("crop") == {}
    for job in ("crop", "export .pt scan"):
        for index in (3, 0, 2):
            journal.append(job, record(index, runs=[[0, 8, 7]], shard=f"{job}/µ\n{index}"))
    before = journal.known
    journal.close()
    again = Journal(str(path))
    assert again.known == before
    assert list(again.records("crop")) == [3, 0, 2]
    assert again.records("crop")[2] == record(2, runs=[[0, 8, 7]], shard="crop/µ\n2")
    assert again.records("another") == {}


def test_no_file_is_made_before_there_is_something_to_note(path):
    journal = Journal(path)
    journal.sync()
    journal.forget("crop")
    journal.close()
    journal.close()
    assert not path.exists()


def test_the_later_line_counts(path):
    noted(path)
    journal = Journal(path)
    journal.append("crop", record(1, crc=99))
    journal.close()
    assert Journal(path).records("crop")[1].extra == {"crc": 99}
    assert len(Journal(path).records("crop")) == 4


def test_a_forgotten_job(path):
    noted(path, "crop")
    noted(path, "analyze")
    journal = Journal(path)
    journal.forget("crop")
    assert journal.records("crop") == {}
    journal.append("crop", record(7))
    journal.close()
    assert list(Journal(path).records("crop")) == [7]
    assert list(Journal(path).records("analyze")) == [0, 1, 2, 3]


def test_every_line_can_be_read_as_soon_as_it_is_noted(path):
    """A kill of the process takes nothing that append returned from."""
    journal = Journal(path)
    for index in range(5):
        journal.append("crop", record(index))
        assert list(Journal(path).records("crop")) == list(range(index + 1))
    journal.close()


@pytest.mark.parametrize(
    "junk",
    [
        b"junk",
        b"\x00" * 4096,
        bytes(range(256)),
        b"[]",
        b"7",
        b"null",
        b"{}",
        b'{"job": "crop"}',
        b'{"job": "crop", "index": 1, "extra": {}}',
        b'{"job": "crop", "index": "x", "seconds": 0, "bytes_out": 0, "peak_rss": 0, "extra": {}}',
        b'{"job": "crop", "index": null, "seconds": 0, "bytes_out": 0, "peak_rss": 0, "extra": {}}',
        b'{"job": "crop", "index": [], "seconds": 0, "bytes_out": 0, "peak_rss": 0, "extra": 3}',
    ],
    ids=range(12),
)
def test_junk_lines_are_passed_over(path, junk):
    good = noted(path).read_bytes().splitlines(keepends=True)
    path.write_bytes(good[0] + junk + b"\n" + b"".join(good[1:]) + junk)
    journal = Journal(path)
    assert journal.records("crop") == {index: record(index) for index in range(4)}
    journal.append("crop", record(4))
    journal.close()
    assert list(Journal(path).records("crop")) == [0, 1, 2, 3, 4]


def test_unknown_keys_are_passed_over(path):
    """What a later version adds does not stop this one."""
    words = [json.loads(line) for line in noted(path).read_text().split("\n") if line]
    path.write_text("\n".join(json.dumps({**w, "device": "gpu", "x": [1]}) for w in words))
    assert Journal(path).records("crop") == {index: record(index) for index in range(4)}


def test_a_journal_that_cannot_be_read_is_not_taken_for_an_empty_one(path):
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        Journal(path)


class Later:
    """A timer whose time comes when the test says so."""

    def __init__(self, seconds, function):
        self.seconds, self.function, self.daemon = seconds, function, False

    def start(self):
        self.waiting.append(self)

    def cancel(self):
        if self in self.waiting:
            self.waiting.remove(self)

    def join(self):
        pass


def test_lines_are_brought_to_the_disk(path, monkeypatch):
    """At once when the last time is long ago, else within a second, and at the end; the folder when the file is made."""
    synced = []

    def fsync(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        synced.append(os.fstat(handle).st_size if name == str(path) else name)

    monkeypatch.setattr(os, "fsync", fsync)
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.threading, "Timer", Later)
    waiting = Later.waiting = []
    journal = Journal(path)
    journal.append("crop", record(0))
    assert synced == [str(path.parent)], "the folder, which has a new file"
    assert [timer.seconds for timer in waiting] == [module.SYNC_SECONDS]
    now[0] += module.SYNC_SECONDS + 0.01
    journal.append("crop", record(1))
    assert synced[1:] == [path.stat().st_size]
    assert waiting == []
    journal.append("crop", record(2))
    journal.append("crop", record(3))
    assert len(synced) == 2
    (timer,) = waiting  # one for all lines of a second
    timer.function()  # no other block is finished in this second
    assert synced[2:] == [path.stat().st_size]
    journal.append("crop", record(4))
    journal.close()
    assert synced[3:] == [path.stat().st_size]


def test_lines_say_what_they_are(path):
    journal = Journal(path)
    journal.append("crop", Record(5, 0.123456789, 10, 20, {"crc": 1}))
    journal.close()
    assert json.loads(path.read_text()) == {
        "job": "crop",
        "index": 5,
        "seconds": 0.1235,
        "bytes_out": 10,
        "peak_rss": 20,
        "extra": {"crc": 1},
    }


TEXT = st.text(max_size=8)
EXTRA = st.dictionaries(TEXT, st.one_of(st.integers(), TEXT, st.none(), st.lists(st.integers())))
LINES = st.lists(st.tuples(TEXT, st.integers(0, 9), EXTRA), max_size=8)


@given(lines=LINES, data=st.data())
@DRAWN
def test_any_prefix_of_the_bytes_holds_a_prefix_of_the_records(tmp_path_factory, lines, data):
    path = tmp_path_factory.mktemp("run") / "journal"
    states = [{}]
    ends = [0]
    for job, index, extra in lines:
        journal = Journal(path)
        journal.append(job, record(index, **extra))
        states.append({job: dict(known) for job, known in journal.known.items()})
        journal.close()
        ends.append(path.stat().st_size)
    whole = path.read_bytes() if lines else b""
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    n_whole = max(i for i, end in enumerate(ends) if end - bool(i) <= cut)  # without its newline
    journal = Journal(path)
    assert journal.known == states[n_whole]
    journal.append("new", record(77))
    journal.append("new", record(78))
    expected = journal.known
    journal.close()
    assert Journal(path).known == expected
    assert list(expected["new"])[-2:] == [77, 78]
    assert {**expected, "new": None} == {**states[n_whole], "new": None}


@given(
    st.lists(
        st.one_of(st.binary(max_size=40), st.sampled_from([b"\n", b"{", b'"job"'])), max_size=9
    )
)
@DRAWN
def test_any_bytes_can_be_loaded_and_appended_to(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("run") / "journal"
    path.write_bytes(b"".join(pieces))
    journal = Journal(path)
    journal.append("crop", record(3))
    journal.close()
    assert Journal(path).records("crop") == {3: record(3)}


def test_it_is_closed_even_when_its_lines_do_not_reach_the_disk(path, monkeypatch):
    """The error tells the file and comes once: what ends a run after it may close it again."""
    journal = Journal(path)
    journal.append("crop", record(0))

    def broken(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output") as caught:
        journal.close()
    assert str(path) in str(caught.value)
    journal.close()
    assert list(Journal(path).records("crop")) == [0]
