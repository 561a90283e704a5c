"""The folder of a run: what is gone on with, what is refused, what is kept and what is dropped."""

import contextlib
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from stem_dask.core.errors import ConfigError, InterruptedRunError, LockedError, StoreError
from stem_dask.core.model import Record
from stem_dask.engine.state import open_state, refuse_foreign, unfinished_token
from stem_dask.storage import publish as publishing
from stem_dask.storage.publish import publish, run_folder, temporary

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


def snapshot(folder):
    """Every name below a folder, with the content of files and the target of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


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
    (tmp_path / "scan.json").write_text("another file")
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
    """Its output is gone, or is to be overwritten: nothing of its journal counts."""
    with output.begin() as state:
        note(state, 2)
        state.complete({})
    with output.begin(token) as state:
        assert state.journal.known == {}
        assert listing(output.folder) == ["lock", "run.json"]
        assert "complete" not in output.words()
        note(state, 1)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("\0" * 64, "is damaged"),
        ("junk", "is damaged"),
        ("[1]", "is damaged"),
        ('{"token": "t1"', "is damaged"),
    ],
)
def test_words_that_are_empty_or_damaged(output, tmp_path, text, what):
    """The progress is never dropped without being asked: the message names the way out, and the way out works."""
    output.stop()
    (output.folder / "run.json").write_text(text)
    before = snapshot(tmp_path)
    message = (
        rf"scan\.run/run\.json {what}, so that the run in .*scan\.run cannot go on; add --restart"
    )
    with pytest.raises(ConfigError, match=message) as caught, output.begin():
        raise AssertionError("it was refused")
    assert caught.value.exit_code == 2
    assert snapshot(tmp_path) == before
    with output.begin(restart=True) as state:
        assert state.journal.known == {}
        assert not any(os.path.lexists(path) for path in output.temporaries)
        note(state, 1)
    assert unfinished_token(output.store) == "t1"


def test_words_and_folder_are_on_disk_before_there_is_a_journal(output, monkeypatch):
    """The document before its name, then the folder; the journal's folder when the journal is made."""
    synced = []
    plain = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(handle):
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), output.folder.parent))
        plain["fsync"](handle)

    def replace(old, new):
        synced.append(f"{os.path.basename(new)} named")
        plain["replace"](old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with output.begin() as state:
        assert synced == [
            "scan.run/lock",
            ".",
            "scan.run/run.partial",
            "run.json named",
            "scan.run",
        ]
        synced.clear()
        note(state, 1)
        assert synced == ["scan.run"]
        synced.clear()
        state.complete({})
    assert synced == [
        "scan.run/report.partial", "report.json named", "scan.run", "scan.run/journal", "scan.run/run.partial",
        "run.json named", "scan.run",
    ]  # fmt: skip


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
        monkeypatch.setattr(os, "replace", stop)
        state.complete({})
    monkeypatch.undo()
    assert unfinished_token(output.store) == "t1"
    with output.begin() as state:
        assert len(state.journal.records("crop")) == 2


def test_publish_in_its_order(tmp_path, monkeypatch):
    """The new output is on disk before the older results go; the folder is on disk after the new one has its name."""
    path, results = tmp_path / "scan.zarr", tmp_path / "scan_results.json"
    folder_output(path, "older")
    folder_output(temporary(path), "new")
    results.write_text("older")
    seen = []
    fsync = os.fsync

    def noted(handle):
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)
        seen.append((name, results.exists(), text_of(path) if path.exists() else None))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    publish(path, drop=str(results))
    built = {"scan.zarr.incomplete", "scan.zarr.incomplete/zarr.json"}
    assert {name for name, _, _ in seen[:-1]} == built
    assert all((there, text) == (True, "older") for _, there, text in seen[:-1])
    assert seen[-1] == (".", False, "new"), "the fsync of the output's folder"
    assert not results.exists()


def test_a_kill_after_the_older_results_are_gone_leaves_none(tmp_path, monkeypatch):
    """Old and new outputs are never mixed under results that call them complete."""
    path, results = tmp_path / "scan.zarr", tmp_path / "scan_results.json"
    folder_output(path, "older")
    folder_output(temporary(path), "new")
    results.write_text("older")

    def kill(*names):
        raise Killed

    monkeypatch.setattr(os, "rename", kill)
    with pytest.raises(Killed):
        publish(path, drop=str(results))
    assert text_of(path) == "older"
    assert not results.exists()


def test_an_older_output_comes_back_when_a_run_killed_between_two_renames_is_dropped(output):
    folder_output(output.store, "older")
    output.stop()
    os.rename(output.store, f"{output.store}.replaced")
    with output.begin("t2", restart=True):
        assert Path(output.store, "zarr.json").read_text() == "older"
    assert not os.path.exists(f"{output.store}.replaced")


# --- what is not of a run ---------------------------------------------------------------------------------------


def thesis(folder):
    (folder / "raw").mkdir(parents=True)
    (folder / "thesis.txt").write_text("x")


def home(folder):
    """A link to a folder with files of the user."""
    thesis(folder.parent / "home")
    os.symlink(folder.parent / "home", folder)


def plain_file(folder):
    folder.write_text("mine")


def json_of_another_program(folder):
    folder.mkdir()
    (folder / "run.json").write_text('{"experiment": 7}')
    (folder / "journal").write_text("dear diary")


def words_behind_a_link(folder):
    folder.mkdir()
    (folder.parent / "words.json").write_text('{"token": "t1"}')
    os.symlink(folder.parent / "words.json", folder / "run.json")


def blocks_without_words(folder):
    (folder / "analysis").mkdir(parents=True)
    (folder / "analysis" / "000000.block").write_text("block")


def lock_behind_a_link(folder):
    folder.mkdir()
    (folder.parent / "victim.txt").write_text("precious")
    os.symlink(folder.parent / "victim.txt", folder / "lock")


def lock_of_another_program(folder):
    folder.mkdir()
    (folder / "lock").write_text("1234")


FOREIGN = [
    thesis, home, plain_file, json_of_another_program, words_behind_a_link, blocks_without_words,
    lock_behind_a_link, lock_of_another_program,
]  # fmt: skip


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("make", FOREIGN)
def test_a_folder_that_is_not_of_a_run(output, tmp_path, make, restart):
    make(output.folder)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"scan\.run") as caught, output.begin(restart=restart):
        raise AssertionError("it was refused")
    assert caught.value.exit_code == 2
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "name",
    ["journal", "run.partial", "lock", "report.json", "crop", "crop/000001.block", "analysis"],
)
def test_a_link_in_the_folder_of_a_run(output, tmp_path, name, restart):
    """The folder is of a run; a link in place of one of its files or folders is not followed."""
    output.stop()
    thesis(tmp_path / "home")
    place = output.folder / name
    if place.is_dir():
        place.rename(tmp_path / "was")
    place.unlink(missing_ok=True)
    os.symlink(tmp_path / "home", place)
    before = snapshot(tmp_path)
    with (
        pytest.raises(ConfigError, match=rf"scan\.run/{name} is a link"),
        output.begin(restart=restart),
    ):
        raise AssertionError("it was refused")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["scan.zarr.incomplete", "scan.pt.incomplete", "scan.zarr.incomplete/zarr.json"]
)
def test_a_link_in_what_an_unfinished_run_has_built(output, tmp_path, name):
    output.stop()
    thesis(tmp_path / "home")
    (tmp_path / name).rename(tmp_path / "was")
    (tmp_path / name).symlink_to(tmp_path / "home")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=rf"{name} is a link, which a run"), output.begin():
        raise AssertionError("it was refused")
    assert snapshot(tmp_path) == before
    with output.begin(restart=True):  # removes the link, and not what it leads to
        assert not os.path.lexists(output.temporaries[0])
    assert (tmp_path / "home" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("entries", [[], ["lock"], ["lock", "run.partial"], ["lock", "owner"]])
def test_what_a_kill_leaves_at_the_very_beginning(output, tmp_path, entries):
    output.folder.mkdir()
    for name in entries:
        (output.folder / name).write_bytes(b"")
    with output.begin() as state:
        note(state, 1)
    assert unfinished_token(output.store) == "t1"


def test_a_kill_at_every_step_of_the_beginning(output, monkeypatch):
    """What is there then is known again, and the same command begins."""
    for call in range(20):
        n_calls = [0]

        def killing(function, n_calls=n_calls, call=call):
            def replaced(*args, **options):
                n_calls[0] += 1
                if n_calls[0] == call + 1:
                    raise Killed
                return function(*args, **options)

            return replaced

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in ("unlink", "rmdir"):  # a kill cleans nothing up
                patch.setattr(os, name, lambda *args, **options: None)
            for name in ("fsync", "replace", "pwrite", "mkdir"):
                patch.setattr(os, name, killing(getattr(os, name)))
            with output.begin():
                raise Killed
        if n_calls[0] <= call:
            break
    assert call > 4
    with output.begin() as state:
        note(state, 1)


@pytest.mark.parametrize("end", ["complete", "dropped", "restart", "forget"])
def test_a_file_of_the_user_in_the_folder_of_a_run_stays(output, end):
    output.stop(n_blocks=1)
    mine = [
        output.folder / "notes.txt",
        output.folder / "crop" / "mine.txt",
        output.folder / "pictures" / "a.png",
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    with contextlib.suppress(ZeroDivisionError), output.begin(restart=end == "restart") as state:
        if end in ("complete", "forget"):
            state.complete({})
        if end == "forget":
            state.forget()
        if end == "dropped":
            state.resumable = False
            raise ZeroDivisionError
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert not (output.folder / "crop" / "000000.block").exists()
    assert (output.folder / "run.json").exists() is (end in ("complete", "restart"))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("make", [thesis, home, plain_file])
@pytest.mark.parametrize(
    "name", ["scan.zarr.incomplete", "scan.zarr.replaced", "scan.pt.incomplete"]
)
def test_a_name_that_is_needed_on_the_way(output, tmp_path, make, name, restart):
    make(tmp_path / name)
    before = snapshot(tmp_path)
    with (
        pytest.raises(StoreError, match=rf"{name} exists \(a ") as caught,
        output.begin(restart=restart),
    ):
        raise AssertionError("it was refused")
    assert caught.value.exit_code == 2
    assert snapshot(tmp_path) == before


def test_a_name_that_an_unfinished_run_of_fewer_outputs_did_not_make(output):
    with open_state(
        (output.store,), "t1", OPTIONS, restart=False, is_complete=lambda: False
    ) as state:
        note(state, 1)
    Path(output.temporaries[1]).write_text("mine")
    for restart in (False, True):
        with (
            pytest.raises(StoreError, match=r"scan\.pt\.incomplete exists"),
            output.begin(restart=restart),
        ):
            raise AssertionError("it was refused")
    assert Path(output.temporaries[1]).read_text() == "mine"
    Path(output.temporaries[1]).unlink()
    with output.begin():  # which makes both now
        Path(output.temporaries[1]).write_text("built")
    with output.begin(restart=True):
        assert not os.path.lexists(output.temporaries[1])


def test_a_folder_stepped_aside_only_where_there_was_an_older_one(output, tmp_path):
    output.stop()
    thesis(tmp_path / "scan.zarr.replaced")
    for restart in (False, True):
        with (
            pytest.raises(StoreError, match=r"scan\.zarr\.replaced exists \(a folder\)"),
            output.begin(restart=restart),
        ):
            raise AssertionError("it was refused")
    assert (tmp_path / "scan.zarr.replaced" / "thesis.txt").read_text() == "x"


def test_a_file_beside_an_output_that_is_no_folder_stays(output, tmp_path):
    """Only folders step aside: SCAN.pt.replaced is nobody's but the user's."""
    (tmp_path / "scan.pt.replaced").write_text("mine")
    with output.begin():
        Path(output.temporaries[1]).write_text("built")
        publish(output.other)
    assert (tmp_path / "scan.pt.replaced").read_text() == "mine"
    assert Path(output.other).read_text() == "built"


def test_an_output_that_appeared_since_the_run_was_begun(output, tmp_path):
    """It was not there when leave to replace was given, or not given."""
    output.stop()
    folder_output(output.store, "copied here since")
    with (
        pytest.raises(StoreError, match=r"scan\.zarr appeared or changed since") as caught,
        output.begin(),
    ):
        raise AssertionError("it was refused")
    assert caught.value.exit_code == 2
    assert text_of(output.store) == "copied here since"


# --- taken over by another run ----------------------------------------------------------------------------------


def take_over(output):
    """What a run on another host leaves in the lock of one that was silent for too long."""
    words = {"host": "node-77", "pid": 4, "since": "2026-01-02 03:04:05", "run": "another"}
    (output.folder / "lock").write_text(json.dumps(words))


@pytest.mark.parametrize("gone", [False, True])
def test_an_owner_that_was_taken_over_changes_nothing_any_more(output, tmp_path, gone):
    """It was paused for too long; the other run may have ended by now."""
    message = "gone" if gone else "by a run on node-77, process 4"
    with (  # noqa: PT012
        pytest.raises(LockedError, match=message) as caught,
        output.begin() as state,
    ):
        output.build()
        note(state, 2)
        if gone:
            (output.folder / "lock").unlink()
        else:
            take_over(output)
        before = snapshot(tmp_path)
        for change in (
            lambda: state.publish(output.store),
            lambda: state.complete({}),
            lambda: state.settled("block", 1),
            state.forget,
        ):
            with pytest.raises(LockedError):
                change()
        state.resumable = False  # after an error of the data nothing would be left
        state.check_ownership()
    assert caught.value.exit_code == 6
    assert snapshot(tmp_path) == before


def test_the_journal_takes_no_line_of_an_owner_that_was_taken_over(output, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("stem_dask.engine.journal.time.monotonic", lambda: now[0])
    with pytest.raises(LockedError, match="taken over"), output.begin() as state:  # noqa: PT012
        note(state, 1)
        take_over(output)
        before = (output.folder / "journal").read_bytes()
        now[0] += 100
        note(state, 1, job="export")
    assert (output.folder / "journal").read_bytes() == before


def test_what_another_run_removes_meanwhile_is_not_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts at once: the other one drops the unfinished run between our look at the folder and at its files."""
    (tmp_path / "run.json").write_text('{"token": "a"}')
    (tmp_path / "journal").write_text("")
    listed = os.listdir

    def listing(folder: Path) -> list[str]:
        names = listed(folder)
        (tmp_path / "journal").unlink()
        return names

    monkeypatch.setattr(os, "listdir", listing)
    refuse_foreign(tmp_path)
