"""The folder of a run: what is gone on with, what is refused, what is kept and what is dropped."""

import contextlib
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from stem_dask import state as module
from stem_dask.errors import ConfigError, InterruptedRunError, LockedError, StoreError
from stem_dask.io import publish as publishing
from stem_dask.io.publish import publish, run_folder, temporary
from stem_dask.model import Record
from stem_dask.state import open_state, unfinished_token

OPTIONS = {"crop": {"size": 8, "roi": (1, 2)}, "output": {"dtype": "uint16"}, "device": "cpu"}


class Output:
    """A store in a folder, and its run."""

    def __init__(self, folder):
        self.store = str(folder / "scan.zarr")
        self.other = str(folder / "scan.pt")
        self.folder = Path(run_folder(self.store))
        self.outputs = (self.store, self.other)
        self.temporaries = tuple(temporary(path) for path in self.outputs)

    def begin(self, token="t1", options=OPTIONS, *, restart=False, complete=False):
        return open_state(
            self.outputs,
            token,
            options,
            restart=restart,
            is_complete=lambda: complete,
        )

    def build(self):
        """Something under every temporary name, and a spool."""
        os.makedirs(self.temporaries[0])
        Path(self.temporaries[0], "zarr.json").write_text("new")
        Path(self.temporaries[1]).write_text("new")
        (self.folder / "crop").mkdir()
        (self.folder / "crop" / "000000.block").write_text("block")

    def stop(self, error=InterruptedRunError, n_blocks=2, **how):
        """A run that noted some blocks and was stopped."""
        with pytest.raises(error), self.begin(**how) as state:  # noqa: PT012
            self.build()
            note(state, n_blocks)
            raise error("stopped")

    def words(self):
        return json.loads((self.folder / "run.json").read_text())


@pytest.fixture
def output(tmp_path):
    return Output(tmp_path)


def note(state, n_blocks, job="crop"):
    for index in range(n_blocks):
        state.journal.append(job, Record(index, 0.5, 8, 0, {"crc": index}))


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


KEPT = [
    "scan.pt.incomplete",
    "scan.run",
    "scan.run/crop",
    "scan.run/crop/000000.block",
    "scan.run/journal",
    "scan.run/run.json",
    "scan.zarr.incomplete",
    "scan.zarr.incomplete/zarr.json",
]


# --- a run and its end ------------------------------------------------------------------------------------------


def test_a_complete_run(output, tmp_path):
    with output.begin() as state:
        assert (state.folder, state.is_complete) == (output.folder, False)
        assert unfinished_token(output.store) == "t1"
        assert output.words() == {
            "token": "t1",
            "options": json.loads(json.dumps(OPTIONS)),
            "outputs": ["scan.zarr", "scan.pt"],
        }
        assert (output.folder / "lock").exists()
        (output.folder / "crop").mkdir()
        (output.folder / "crop" / "000000.block").write_text("block")
        note(state, 2)
        state.complete({"speed": {"seconds": 1.5}, "where": tmp_path})
    assert listing(output.folder) == ["journal", "report.json", "run.json"]
    assert output.words()["complete"] is True
    assert json.loads((output.folder / "report.json").read_text())["speed"] == {"seconds": 1.5}
    assert unfinished_token(output.store) is None


def test_one_live_run(output):
    with (
        output.begin() as state,
        pytest.raises(LockedError, match=r"scan\.run is in use by a run on"),
        output.begin(),
    ):
        raise AssertionError("two have it")
    assert state.folder.exists()


def test_somebody_else_has_just_completed_it(output):
    """Asked with the lock in hand; nothing of theirs is touched."""
    with output.begin() as state:
        note(state, 2)
        state.complete({})
    before = {name: (output.folder / name).read_bytes() for name in listing(output.folder)}
    with output.begin("t2", restart=True, complete=True) as state:
        assert state.is_complete is True
        assert (output.folder / "lock").exists()
    assert {name: (output.folder / name).read_bytes() for name in listing(output.folder)} == before


def test_a_folder_in_which_nothing_was_left_goes(output, tmp_path):
    with output.begin(complete=True):
        assert output.folder.exists()
    assert listing(tmp_path) == []

    def refuse():
        raise StoreError("it exists")

    with (
        pytest.raises(StoreError, match="it exists"),
        open_state(output.outputs, "t", {}, restart=False, is_complete=refuse),
    ):
        raise AssertionError("it was refused")
    assert listing(tmp_path) == []


# --- what is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, InterruptedRunError, StoreError, ValueError])
def test_a_stopped_run_that_finished_something_is_kept(output, tmp_path, error):
    output.stop(error)
    assert listing(tmp_path) == KEPT
    assert unfinished_token(output.store) == "t1"
    with output.begin() as state:
        assert sorted(state.journal.records("crop")) == [0, 1]
        note(state, 3)
        state.complete({})
    assert unfinished_token(output.store) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, InterruptedRunError, StoreError, ValueError])
def test_a_stopped_run_that_finished_nothing_is_dropped(output, tmp_path, error):
    (tmp_path / "scan.json").write_text("of somebody else")
    output.stop(error, n_blocks=0)
    assert listing(tmp_path) == ["scan.json"]


@pytest.mark.parametrize(
    ("error", "kept"),
    [(ConfigError, False), (ValueError, False), (KeyboardInterrupt, True), (InterruptedRunError, True)],
)  # fmt: skip
def test_an_error_of_the_options_leaves_nothing(output, tmp_path, error, kept):
    """The same command would end the same way; but an interrupt there is none of it."""
    with pytest.raises(error), output.begin() as state:  # noqa: PT012
        output.build()
        note(state, 2)
        with state.nothing_to_go_on_with():
            raise error("in the middle")
    assert listing(tmp_path) == (KEPT if kept else [])


def test_an_error_after_what_may_fail_for_good(output, tmp_path):
    with pytest.raises(ConfigError), output.begin() as state:  # noqa: PT012
        output.build()
        note(state, 2)
        with state.nothing_to_go_on_with():
            pass
        raise ConfigError("of something else")
    assert listing(tmp_path) == KEPT


def test_an_older_output_stays_in_any_case(output, tmp_path):
    os.makedirs(output.store)
    Path(output.store, "zarr.json").write_text("older")
    Path(output.other).write_text("older")
    output.stop(n_blocks=0)
    assert listing(tmp_path) == ["scan.pt", "scan.zarr", "scan.zarr/zarr.json"]
    output.stop()
    with output.begin("t2", restart=True):
        pass
    assert Path(output.store, "zarr.json").read_text() == "older"
    assert Path(output.other).read_text() == "older"


# --- what is gone on with ---------------------------------------------------------------------------------------


def test_the_journal_is_closed_and_complete_on_every_way_out(output):
    for error in (None, KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt), output.begin() as state:
            note(state, 4)
            if error:
                raise error
        assert state.journal._file is None
        assert len(state.journal.records("crop")) == 4


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"crop": {"size": 9, "roi": (1, 2)}}, "crop.size"),
        ({"crop": {"size": 9, "roi": (1, 3)}, "device": "gpu"}, "crop.size, crop.roi, device"),
        ({"output": {"dtype": "float32"}}, "output.dtype"),
        ({"device": "gpu"}, "device"),
        ({"mask": {"fill": "zero"}}, "mask.fill"),
        ({}, "the input file"),
    ],
)
def test_an_unfinished_run_with_another_token_is_refused(output, tmp_path, changed, named):
    output.stop()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = rf"scan\.run holds an unfinished run that differs in {named}; run it .* --restart"
    with (
        pytest.raises(ConfigError, match=message) as caught,
        output.begin("t2", {**OPTIONS, **changed}),
    ):
        raise AssertionError("it was refused")
    assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with output.begin() as state:  # and with its own it goes on
        assert len(state.journal.records("crop")) == 2


@pytest.mark.parametrize("token", ["t1", "t2"])
def test_restart_drops_it(output, token):
    output.stop()
    with output.begin(token, restart=True) as state:
        assert state.journal.known == {}
        assert listing(output.folder) == ["lock", "run.json"]
        assert not any(os.path.lexists(path) for path in output.temporaries)
        assert output.words()["token"] == token
        note(state, 1)


@pytest.mark.parametrize("token", ["t1", "t2"])
def test_a_complete_folder_is_started_fresh(output, token):
    """The output of it is gone, or is to be overwritten: nothing of its journal counts."""
    with output.begin() as state:
        note(state, 2)
        state.complete({})
    Path(output.temporaries[1]).write_text("left by somebody")
    with output.begin(token) as state:
        assert state.journal.known == {}
        assert listing(output.folder) == ["lock", "run.json"]
        assert not os.path.lexists(output.temporaries[1])
        assert "complete" not in output.words()
        note(state, 1)


@pytest.mark.parametrize("text", [None, "", "junk", "[1]", '{"token": "t1"'])
def test_a_folder_that_does_not_say_what_it_is_is_started_fresh(output, text):
    output.stop()
    (output.folder / "run.json").unlink()
    if text is not None:
        (output.folder / "run.json").write_text(text)
    assert unfinished_token(output.store) is None
    with output.begin() as state:
        assert state.journal.known == {}
        assert not any(os.path.lexists(path) for path in output.temporaries)
        note(state, 1)


def test_a_choice_is_settled_once(output):
    with output.begin() as state:
        note(state, 1)
        assert state.settled("block", (2, 5)) == (2, 5)
        assert state.settled("block", (9, 9)) == [2, 5]
    with output.begin() as state:
        assert state.settled("block", (4, 5)) == [2, 5]
    with output.begin(restart=True) as state:
        assert state.settled("block", (4, 5)) == (4, 5)
        note(state, 1)


# --- published --------------------------------------------------------------------------------------------------


def folder_output(path, text):
    os.makedirs(path)
    Path(path, "zarr.json").write_text(text)


def file_output(path, text):
    Path(path).write_text(text)


def text_of(path):
    path = Path(path)
    return (path / "zarr.json" if path.is_dir() else path).read_text()


@pytest.fixture(params=["folder", "file"])
def kind(request, output):
    """Where an output of this kind goes, and what makes one."""
    if request.param == "folder":
        return output.store, folder_output
    return output.other, file_output


@pytest.mark.parametrize(
    ("n_noted", "built", "older", "expected"),
    [
        (3, False, True, True),
        (3, True, False, False),  # built, not renamed
        (3, True, True, False),
        (3, False, False, False),  # somebody removed it
        (2, False, True, False),  # what is there is an older one
        (0, False, True, False),
        (4, False, True, False),
    ],
)
def test_whether_an_output_bears_its_final_name(output, kind, n_noted, built, older, expected):
    path, make = kind
    with output.begin() as state:
        note(state, n_noted)
        note(state, 3, job="another")
        if built:
            make(temporary(path), "new")
        if older:
            make(path, "there")
        assert state.published(path, "crop", 3) is expected
        assert os.path.lexists(temporary(path)) is built  # and nothing else is touched
        assert os.path.lexists(path) is older


def test_all_that_is_below_a_folder_is_brought_to_disk_once(tmp_path, monkeypatch):
    """Of thousands of files nothing but the names is held."""
    for i in range(40):
        folder = tmp_path / "out" / str(i) / "0"
        folder.mkdir(parents=True)
        for j in range(50):
            (folder / str(j)).touch()
    synced = []
    monkeypatch.setattr(publishing, "sync", synced.append)
    tracemalloc.start()
    try:
        publishing.sync_tree(tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(synced) == sorted(map(str, [tmp_path / "out", *(tmp_path / "out").rglob("*")]))
    assert len(synced) == 1 + 40 * 2 + 40 * 50
    assert peak < 1000 * len(synced)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("call", range(12))
def test_killed_anywhere_in_publish(output, kind, monkeypatch, call, older):
    """The next start finds out what was left to do, and the older one is there until the new one is."""
    path, make = kind
    n_calls = [0]

    def killing(function):
        def replaced(*args, **options):
            n_calls[0] += 1
            if n_calls[0] == call + 1:
                raise Killed
            return function(*args, **options)

        return replaced

    with output.begin() as state:
        note(state, 3)
        make(temporary(path), "new")
        if older:
            make(path, "older")
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in ("rename", "replace"):
                patch.setattr(publishing.os, name, killing(getattr(os, name)))
            for name in ("remove", "sync"):
                patch.setattr(publishing, name, killing(getattr(publishing, name)))
            publish(path)
        if n_calls[0] <= call:
            assert text_of(path) == "new"  # there was no such call: it is through
        names = (path, f"{path}.replaced") if older else (path,)
        there = [text_of(name) for name in names if os.path.lexists(name)]
        if older:
            assert set(there) & {"older", "new"}
        published = state.published(path, "crop", 3)
        assert published is not os.path.lexists(temporary(path))
        if not published:
            assert text_of(temporary(path)) == "new"
            publish(path)
            assert state.published(path, "crop", 3)
        assert text_of(path) == "new"
        assert not os.path.lexists(temporary(path))
        assert not os.path.lexists(f"{path}.replaced")


def test_the_words_are_replaced_in_one_step(output, monkeypatch):
    """A kill while they are written leaves the former ones."""
    output.stop()

    def stop(*args):
        raise Killed

    with pytest.raises(Killed), output.begin() as state:  # noqa: PT012
        monkeypatch.setattr(module.os, "replace", stop)
        state.complete({})
    monkeypatch.undo()
    assert unfinished_token(output.store) == "t1"
    with output.begin() as state:
        assert len(state.journal.records("crop")) == 2


def test_an_older_output_comes_back_when_a_run_killed_between_two_renames_is_dropped(output):
    output.stop()
    os.makedirs(f"{output.store}.replaced")
    Path(f"{output.store}.replaced", "zarr.json").write_text("older")
    with output.begin("t2", restart=True):
        assert Path(output.store, "zarr.json").read_text() == "older"
    assert not os.path.exists(f"{output.store}.replaced")
