"""Files of the user beside an output: what is not of a run is refused by name, before anything is computed, and stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from batches import batch

import stem_dask as sd
from stem_dask import CroppingConfig, DiffractionCropper, create_test_data
from stem_dask.cli import main as cli
from stem_dask.core.errors import OutputExistsError
from stem_dask.stages.export import Target
from stem_dask.storage import publish as publishing

CASE = Path(__file__).resolve().parents[2] / "shared" / "data" / "cases" / "g1_no_flock_run"
THREADS = ("cluster.kind=threads", "cluster.threads_per_worker=1")


class Killed(BaseException):
    """The process ends here."""


def folder(path):
    (path / "raw").mkdir(parents=True)
    (path / "thesis.txt").write_text("x")


def link_to_home(path):
    folder(path.parent / "home")
    path.symlink_to(path.parent / "home")


def link_to_file(path):
    (path.parent / "victim.txt").write_text("precious")
    path.symlink_to(path.parent / "victim.txt")


def file(path):
    path.write_text("mine")


def snapshot(place):
    """Every name below a folder, with the content of files and the target of links."""
    found = {}
    for path in place.rglob("*"):
        name = str(path.relative_to(place))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def here(tmp_path, monkeypatch, beam_file):
    """The working directory, with a scan and a config for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "crop.yaml").write_text(
        "input: {path: beam.npy}\noutput: {path: scan.zarr, export: [pt], figure: false}\n"
        "cluster: {kind: threads, threads_per_worker: 1}\n"
    )
    return tmp_path


#: a command, and the names that it needs beside its output
COMMANDS = {
    "run": (("run", "crop.yaml"), "scan.run", "scan.zarr.incomplete", "scan.zarr.replaced", "scan.pt.incomplete"),
    "convert": (("convert", "--input", "beam.npy", "--output", "c.npy", *THREADS), "c.npy.run", "c.npy.incomplete"),
    "preprocess": (("preprocess", "--input", "beam.npy", "--output", "p.pt", *THREADS), "p.pt.run", "p.pt.incomplete"),
    "crop": (
        ("crop", "--input", "beam.npy", "--output", "x.pt", "--no-visualization", *THREADS),
        "x.pt.run", "x.pt.incomplete", "x_results.json.incomplete",
    ),
}  # fmt: skip
CASES = [(command, name) for command, (_, *names) in COMMANDS.items() for name in names]


@pytest.mark.parametrize("make", [folder, link_to_home, link_to_file, file])
@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_name_that_a_command_needs(here, capsys, command, name, make):
    make(here / name)
    before = snapshot(here)
    for flags in ((), ("--restart",), ("--overwrite",)):
        assert cli.main([*COMMANDS[command][0], *flags]) == 2
        said = capsys.readouterr()
        assert f"{here / name} " in said.err
        assert said.out == ""
    assert snapshot(here) == before


def test_a_batch_goes_on_with_the_others(batch_folder, capsys):
    folder(batch_folder / "out" / "b.run")
    assert batch("--quiet") == 2
    assert f"{batch_folder / 'out' / 'b.run'} is not the folder of a run" in capsys.readouterr().err
    assert (batch_folder / "out" / "b.run" / "thesis.txt").read_text() == "x"
    stores = (batch_folder / "out").glob("*.zarr")
    assert sorted(path.name for path in stores) == ["a.zarr", "c.zarr"]


def test_a_link_instead_of_the_lock(here, capsys):
    (here / "victim.txt").write_text("precious")
    (here / "scan.run").mkdir()
    (here / "scan.run" / "lock").symlink_to(here / "victim.txt")
    before = snapshot(here)
    assert cli.main(["run", "crop.yaml"]) == 2
    assert str(here / "scan.run") in capsys.readouterr().err
    assert snapshot(here) == before


@pytest.mark.parametrize("make", [folder, link_to_home, link_to_file, file])
@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".zarr", "incomplete"), (".zarr", "replaced"), (".pt", "incomplete"), (".hspy", "incomplete"),
        (".hspy", "incomplete.blocks"), (".zspy", "replaced"), (".zspy", "incomplete.blocks"),
    ],
)  # fmt: skip
def test_export_from_python(here, beam, suffix, make, kind):
    name = f"a{suffix}.{kind}"
    make(here / name)
    before = snapshot(here)
    patterns = sd.open(here / "beam.npy")
    with pytest.raises(OutputExistsError, match=rf"{name} exists \(a (folder|link|file)\)"):
        sd.export(patterns, here / f"a{suffix}", overwrite=True)
    assert snapshot(here) == before


@pytest.mark.parametrize("make", [folder, link_to_home, link_to_file])
@pytest.mark.parametrize("name", ["o.pt", "o.pt.incomplete", "o_results.json", "o_results.json.incomplete", "o_visualization.png"])  # fmt: skip
def test_the_cropper_of_tensors(here, make, name):
    make(here / name)
    before = snapshot(here)
    cropper = DiffractionCropper(CroppingConfig(verbose=False))
    with pytest.raises(OutputExistsError, match=name):
        cropper.process_dataset(create_test_data(4, 32), here / "o.pt")
    assert snapshot(here) == before


def test_a_file_of_the_user_in_the_folder_of_a_run_stays(here):
    assert cli.main(["run", "crop.yaml", "--quiet"]) == 0
    (here / "scan.run" / "notes.txt").write_text("mine")
    for words in (["--overwrite"], ["--overwrite", "--restart", "crop.margin_pixels=2"]):
        assert cli.main(["run", "crop.yaml", "--quiet", *words]) == 0
    names = sorted(path.name for path in (here / "scan.run").iterdir())
    assert names == ["journal", "notes.txt", "report.json", "run.json"]


@pytest.mark.parametrize(
    "words",
    [
        ["crop.yaml", "output.export=[pt, hspy, h5, npy, zspy]"],
        ["crop.yaml", "input.mask=auto"],
        ["crop.yaml", "output.normalize=log-zscore", "output.export=[]"],
        ["crop.yaml", "crop.enabled=false", "output.path=scan.hspy", "output.export=[]", "analyze.ahead=true"],
    ],
)  # fmt: skip
def test_a_run_leaves_nothing_that_it_would_not_know_again(here, words):
    """Every folder that a job makes is one of the names that `stem_dask.engine.state` knows."""
    assert cli.main(["run", *words, "--quiet"]) == 0
    (run,) = here.glob("*.run")
    assert sorted(path.name for path in run.iterdir()) == ["journal", "report.json", "run.json"]


# --- outputs that cannot get their names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make", "what"),
    [
        ("scan.zarr", link_to_home, "a link, and the output is a folder"),
        ("scan.zarr", file, "a file, and the output is a folder"),
        ("scan.pt", folder, "a folder, and the output is a file"),
        ("scan.pt", link_to_file, "a link, and the output is a file"),
        ("scan_results.json", folder, "a folder, and the output is a file"),
    ],
)
def test_overwriting_what_is_no_output(here, capsys, name, make, what):
    """The whole job would run before its output could not get its name."""
    make(here / name)
    before = snapshot(here)
    assert cli.main(["run", "crop.yaml", "--overwrite"]) == 2
    said = capsys.readouterr()
    assert f"{here / name} is {what}" in said.err
    assert said.out == ""
    if name in ("scan.zarr", "scan.pt"):
        with pytest.raises(OutputExistsError, match=f"{name} is {what[:6]}"):
            sd.export(sd.open(here / "beam.npy"), here / name, overwrite=True)
    assert snapshot(here) == before
    (here / name).rename(here / "moved away")
    assert cli.main(["run", "crop.yaml", "--overwrite", "--quiet"]) == 0


def test_a_finished_output_behind_a_link_is_complete(here, capsys):
    """Moved to a larger disk and linked: there is nothing to do, and nothing is replaced."""
    assert cli.main(["run", "crop.yaml", "--quiet"]) == 0
    (here / "disk").mkdir()
    (here / "scan.zarr").rename(here / "disk" / "scan.zarr")
    (here / "scan.zarr").symlink_to(here / "disk" / "scan.zarr")
    assert cli.main(["run", "crop.yaml"]) == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize("n", [250, 244, 240])
def test_a_name_that_is_too_long_for_what_is_made_beside_it(here, capsys, n):
    """NAME.zarr has room, and NAME.zarr.incomplete or NAME_results.json.incomplete have not."""
    name = "x" * (n - 5) + ".zarr"
    before = snapshot(here)
    assert cli.main(["run", "crop.yaml", f"output.path={name}"]) == 2
    said = capsys.readouterr()
    assert "bytes, and a name may have 255; choose a shorter output.path" in said.err
    assert said.out == ""
    assert snapshot(here) == before


def test_the_longest_name(here):
    name = "ü" * ((255 - len("_results.json.incomplete")) // 2)
    assert cli.main(["run", "crop.yaml", f"output.path={name}.zarr", "--quiet"]) == 0
    assert (here / f"{name}.zarr").is_dir()


def test_a_path_that_is_too_long(here, capsys):
    path = "/".join(["d" * 200] * 20) + "/scan.zarr"
    assert cli.main(["run", "crop.yaml", f"output.path={path}"]) == 2
    assert "a path with what the run makes below it may have 4,096" in capsys.readouterr().err
    assert not (here / ("d" * 200)).exists()


# --- outputs that appear, and runs that are taken over, in the meantime ------------------------------------------


@pytest.fixture
def before_it_is_published(here, monkeypatch):
    """Does something when an output is complete and has its temporary name yet."""
    plain = publishing.sync_tree

    def between(name, action):
        def sync_tree(path):
            plain(path)
            if Path(path).name == f"{name}.incomplete":
                action()

        monkeypatch.setattr(publishing, "sync_tree", sync_tree)

    return between


def test_a_run_that_was_taken_over_publishes_nothing(here, capsys, before_it_is_published):
    """It was paused for too long: the output is that of the run that took it over."""
    seen = {}

    def take_over():
        words = {"host": "node-77", "pid": 4, "since": "2026-01-02 03:04:05", "run": "another"}
        (here / "scan.run" / "lock").write_text(json.dumps(words))
        seen.update(snapshot(here))

    before_it_is_published("scan.zarr", take_over)
    assert cli.main(["run", "crop.yaml", "--quiet"]) == 6
    assert "scan.run was taken over by a run on node-77, process 4" in capsys.readouterr().err
    assert not (here / "scan.zarr").exists()
    assert snapshot(here) == seen


@pytest.mark.parametrize("text", ["", '{"token": "1'])
@pytest.mark.parametrize("name", ["scan.zarr", "scan.pt"])
def test_an_unfinished_run_whose_words_are_lost(here, capsys, before_it_is_published, name, text):
    """The power failed: what is finished is not dropped without being asked; every line that says what to type works."""

    killed = []

    def kill():
        if not killed:
            killed.append(name)
            raise Killed

    before_it_is_published(name, kill)
    with pytest.raises(Killed):
        cli.main(["run", "crop.yaml", "--quiet"])
    words = here / "scan.run" / "run.json"
    words.write_text(text)
    before = snapshot(here)
    # the store has its name when the export is written
    flags = ["--restart"] if name == "scan.zarr" else ["--restart", "--overwrite"]
    assert cli.main(["run", "crop.yaml"]) == 2
    said = capsys.readouterr()
    what = "is damaged" if text else "is empty"
    assert said.out == ""
    assert said.err == (
        f"error: {words} {what}, so that the run in {here}/scan.run cannot go on; add {' '.join(flags)} to drop what it has "
        "finished and begin again\n"
    )
    assert snapshot(here) == before
    assert cli.main(["run", "crop.yaml", *flags, "--quiet"]) == 0


@pytest.mark.parametrize("name", ["scan.zarr", "scan.pt"])
def test_an_output_that_appears_during_the_run(here, capsys, name):
    """Without --overwrite it is not replaced."""
    make = folder if name == "scan.zarr" else file

    def finish(self, *args, plain=Target.finish, **options):
        notes = plain(self, *args, **options)
        if self.path == str(here / name):
            make(here / name)
        return notes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "finish", finish)
        assert cli.main(["run", "crop.yaml", "--quiet"]) == 2
    assert f"{here / name} " in capsys.readouterr().err
    assert (here / name).is_dir() is (name == "scan.zarr")
    (here / name).rename(here / "mine")
    assert cli.main(["run", "crop.yaml", "--quiet"]) == 0


# --- stem-dask crop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "at"),
    [
        (".pt", "crop"), (".pt", "publish"), (".pt", "results"), (".pt", "cleanup"), (".hspy", "publish"), (".zarr", "crop"),
        (".zarr", "cleanup"),
    ],
)  # fmt: skip
def test_crop_goes_on(here, monkeypatch, capsys, suffix, at):
    """Wherever it is stopped, the same command goes on with what is finished, and leaves the same files."""
    flags = f"crop --input beam.npy --output a{suffix} --no-visualization --chunk-size 5"
    argv = [*flags.split(), *THREADS]
    whole = [f"b{suffix}" if word == f"a{suffix}" else word for word in argv]
    assert cli.main([*whole, "--quiet"]) == 0
    places = {
        "crop": "stem_dask.job.passes._join",
        "publish": "stem_dask.engine.state.RunState.publish",
        "results": "stem_dask.job.summary.write_json",
        "cleanup": "stem_dask.engine.state.RunState.forget",
    }
    with monkeypatch.context() as patch:

        def kill(*args, **options):
            raise Killed

        patch.setattr(places[at], kill)
        with pytest.raises(Killed):
            cli.main(argv)
    capsys.readouterr()
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    if at != "cleanup":
        assert "resuming    " in said
        assert "analyze     1/" not in said
    else:
        assert said.startswith(f"already complete: {here}/a{suffix}\n")
    names = {path.name for path in here.iterdir()} - {"beam.npy", "crop.yaml"}
    assert names == {f"{name}{kind}" for name in "ab" for kind in (suffix, "_results.json")}
    same = [
        path.read_bytes() if path.is_file() else snapshot(path / "patterns")
        for path in (here / f"a{suffix}", here / f"b{suffix}")
    ]
    if suffix != ".hspy":
        assert same[0] == same[1]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith(f"already complete: {here}/a{suffix}\n")


def test_crop_again_with_other_options(here, capsys):
    flags = "crop --input beam.npy --output a.pt --no-visualization --quiet"
    argv = [*flags.split(), *THREADS]
    assert cli.main(argv) == 0
    assert cli.main([*argv, "--margin-pixels", "1"]) == 2
    assert "a.pt exists, made with other options (crop.margin_pixels)" in capsys.readouterr().err
    assert cli.main([*argv, "--margin-pixels", "1", "--overwrite"]) == 0
    assert torch.load("a.pt", weights_only=True)["patterns"].shape[-1] < 14
    assert json.loads((here / "a_results.json").read_text())["config"]["crop"]["margin_pixels"] == 1


# --- file systems without locks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [37, 38, 524])
def test_a_job_on_a_file_system_without_locks(here, capsys, caplog, monkeypatch, number):
    """It runs, says once that the heartbeat alone keeps runs apart, and that it does."""
    import fcntl

    from stem_dask.config.load import load_config
    from stem_dask.job.plan import begun, prepare

    def refuse(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr("stem_dask.engine.lock.SETTLE_SECONDS", 0)
    with begun(prepare(load_config("crop.yaml"))):
        assert cli.main(["run", "crop.yaml"]) == 6
        assert f"scan.run is in use by a run on {os.uname().nodename}" in capsys.readouterr().err
    assert cli.main(["run", "crop.yaml", "--quiet"]) == 0
    (line,) = [record.getMessage() for record in caplog.records if record.name == "stem_dask"]
    assert line == (
        f"{here}: this file system has no file locks ({os.strerror(number)}); only the heartbeat in NAME.run/lock keeps two "
        "runs apart"
    )


def test_the_case_of_a_mount_without_locks(tmp_path):
    """Every process of the command is answered like this, workers too."""
    if not CASE.is_dir():
        pytest.skip("the shared cases do not lie beside this checkout")
    compiler = ["gcc", "-shared", "-fPIC", "-o", tmp_path / "lock.so", CASE / "lock.c"]
    if subprocess.run(compiler, check=False, capture_output=True).returncode:
        pytest.skip("no C compiler here")
    words = ["convert", "--input", CASE / "a.npy", "--output", tmp_path / "out.zarr"]
    line = [sys.executable, "-m", "stem_dask.cli.main", *words]
    env = {**os.environ, "FLOCK_ERRNO": "38", "LD_PRELOAD": str(tmp_path / "lock.so")}
    done = subprocess.run([*line, "--quiet"], env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("has no file locks (Function not implemented)") == 1
    assert np.array_equal(xr.open_zarr(tmp_path / "out.zarr").patterns, np.load(CASE / "a.npy"))
