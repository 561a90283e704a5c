"""What a user types and sees: python -m stem_dask.run, stem-dask, messages, exit codes, progress."""

import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from stem_dask.cli import main as cli
from stem_dask.cli import progress, run
from stem_dask.cli.signals import Unfailing
from stem_dask.config.load import load_config
from stem_dask.core.model import Record, Step


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def crop_yaml() -> str:
    return str(Path(__file__).resolve().parents[1] / "configs" / "crop.yaml")


def test_the_newcomers_command(here: Path, crop_yaml: str) -> None:
    """A clean process, the shipped config, no data at hand: a real result with the known answer."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "stem_dask.run", crop_yaml],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "synthetic.dm4", "synthetic.hspy", "synthetic.pt", "synthetic.run", "synthetic.zarr", "synthetic_report.html",
        "synthetic_results.json", "synthetic_visualization.png",
    ]  # fmt: skip
    assert "dashboard   http://127.0.0.1:" in done.stdout
    assert "retention   mean" in done.stdout
    from stem_dask.writers.synthetic import Synthetic, beam_centers

    analysis = xr.open_zarr(here / "out" / "synthetic.zarr", group="analysis")
    cy, cx = beam_centers(Synthetic())
    assert float(np.abs(analysis.center_y - cy).max()) < 0.6
    assert float(np.abs(analysis.center_x - cx).max()) < 0.6


@pytest.mark.parametrize("command", [run.main, lambda argv: cli.main(["run", *argv])])
def test_the_flag_for_an_open_scheduler(here: Path, crop_yaml: str, command: Any) -> None:
    """With it the run gets as far as its input, which is missing; flags may stand between overrides."""
    argv = [crop_yaml, "input.path=gone.dm4", "cluster.address=tcp://192.0.2.1:8786"]
    assert command(argv) == 2
    assert command([*argv[:2], "--insecure-cluster", *argv[2:]]) == 3


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["input.path=missing.dm4"], 3, ["missing.dm4", "no such file"]),
        (["input.path=beam.txt"], 3, ["beam.txt", ".dm4"]),
        (["input.pth=beam.npy"], 2, ["input.pth", "path", "dataset"]),
        (["input.path=beam.npy", "crop.window=[0, 50, 0, 10]"], 2, ["[0, 50, 0, 10]", "40 x 36"]),
        (["input.path=beam.npy", "analyze.threshold=1000"], 3, ["every pattern is empty", "analyze.threshold"]),
        (["input.path=beam.npy", "cluster.scheduler_file=none.json"], 2, ["none.json", "does not exist"]),
        (["input.path=beam.npy", "cluster.address=tcp://192.0.2.1:8786"], 2,
         ["tcp://192.0.2.1:8786", "not encrypted", "run code", "tls://", "--insecure-cluster"]),
    ],
)  # fmt: skip
def test_errors_are_one_message_and_a_code(
    here: Path, beam_file: Path, crop_yaml: str, capsys: Any, overrides: list[str], code: int, words: list[str]
) -> None:  # fmt: skip
    assert run.main([crop_yaml, "output.path=out.zarr", *overrides]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert all(word in error for word in words)
    assert [path.name for path in here.iterdir() if "out" in path.name] == []


def test_the_input_is_never_the_output(
    here: Path, beam_file: Path, crop_yaml: str, capsys: Any
) -> None:
    common = ["output.export=[]", "output.figure=false"]
    assert run.main([crop_yaml, "input.path=beam.npy", "output.path=a.zarr", *common]) == 0
    again = [crop_yaml, "input.path=a.zarr", "output.path=a.zarr", "output.overwrite=true", *common]
    assert run.main(again) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert xr.open_zarr(here / "a.zarr").patterns.shape[:2] == (6, 5)


def test_exit_code_4_is_explained(here: Path, beam_file: Path, crop_yaml: str, capsys: Any) -> None:
    code = run.main(
        [crop_yaml, "input.path=beam.npy", "output.path=a.zarr", "crop.size=4", "output.export=[]"]
    )
    assert code == 4
    assert "too many patterns keep less than validate.min_retention" in capsys.readouterr().err
    assert (here / "a.zarr").is_dir()


def test_info_says_what_a_file_holds(shared_data: Path, capsys: Any) -> None:
    assert cli.main(["info", str(shared_data / "sim" / "au_np_gms_stemx_u16.dm4")]) == 0
    out = capsys.readouterr().out
    assert "patterns    9 x 7 x 76 x 60 uint16" in out
    assert "0.166667 1/nm a step, first at -6.33333 1/nm" in out
    assert "took image 2 (Diffraction SI)" in out


def test_init_gives_a_config_that_runs(here: Path, beam_file: Path, capsys: Any) -> None:
    assert cli.main(["init", "beam.npy"]) == 0
    text = capsys.readouterr().out
    (here / "mine.yaml").write_text(text)
    assert yaml.safe_load(text)["input"]["path"] == str(beam_file)
    assert run.main(["mine.yaml", "output.export=[]", "output.figure=false", "--quiet"]) == 0
    assert (here / "beam_cropped.zarr").is_dir()
    assert capsys.readouterr().out == ""


def test_init_prints_configs_and_templates(here: Path, capsys: Any) -> None:
    shipped = Path(__file__).resolve().parents[1] / "configs"
    for path in (*shipped.glob("*.yaml"), *shipped.glob("slurm/*.sh")):
        assert cli.main(["init", path.stem]) == 0
        assert capsys.readouterr().out == path.read_text()
    assert cli.main(["init", "batch", "crop.size=40"]) == 2
    assert "init batch takes no crop.size=40" in capsys.readouterr().err
    (here / "batch").symlink_to("beam.npy")  # a file of that name comes first
    assert cli.main(["init", "batch"]) == 3
    assert "there is no such file" in capsys.readouterr().err


def test_info_and_init_take_what_a_file_does_not_say(here: Path, capsys: Any) -> None:
    """A list of numbers: without its shape there is nothing to tell, with it the config knows it too."""
    np.arange(4 * 3 * 8 * 6, dtype=">u2").tofile("scan.raw")
    assert cli.main(["info", "scan.raw"]) == 3
    assert "input.shape" in capsys.readouterr().err
    given = ["input.shape=[4, 3, 8, 6]", "input.dtype='>u2'", "input.beam_energy_kv=200"]
    assert cli.main(["info", "scan.raw", *given]) == 0
    assert "patterns    4 x 3 x 8 x 6 >u2" in capsys.readouterr().out
    assert cli.main(["init", "scan.raw", *given, "on_error=quarantine"]) == 0
    (here / "mine.yaml").write_text(capsys.readouterr().out)
    config = load_config("mine.yaml")
    assert config.input.path == str(here / "scan.raw")
    assert config.input.shape == (4, 3, 8, 6)
    assert (config.input.dtype, config.input.beam_energy_kv) == (">u2", 200)
    assert config.on_error == "quarantine"
    assert cli.main(["info", "scan.raw", "input.shap=[4, 3, 8, 6]"]) == 2
    assert "did you mean shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["crop.size=41"], 2, "crop.size is 41; expected a multiple of 2 (size_multiple x downsampling): 40 or 42"),
        (["crop.size=1000"], 2, "crop.size is 1000, larger than the detector of 40 x 36 pixels; give at most that, or"),
        (["crop.size=[20,38]"], 2, "crop.size is [20, 38], larger than the detector of 40 x 36 pixels"),
        (["crop.window=[0,21,0,36]"], 2, "crop.window is [0, 21, 0, 36]; expected a multiple of 2"),
        (["crop.size=1000", "crop.align=pattern"], 0, "ky is not cropped: the window would reach its 40 pixels"),
        (["crop.size=36"], 0, "kx is not cropped: the window would reach its 36 pixels"),
        (["cluster.memory_limit=4"], 2, "cluster.memory_limit is 4; expected a number with its unit, such as 4GB"),
        (["cluster.memory_limit=4B"], 2, "memory_limit is '4B'; expected at least 1 MB, as a number with its unit"),
    ],
)  # fmt: skip
def test_check_says_what_a_run_says(
    here: Path, beam_file: Path, crop_yaml: str, capsys: Any, overrides: list[str], code: int, words: str
) -> None:  # fmt: skip
    argv = [crop_yaml, "input.path=beam.npy", "output.path=a.zarr", "output.export=[]", *overrides]
    for command in (["check", *argv], ["run", *argv, "output.figure=false"]):
        assert cli.main(command) == code
        said = capsys.readouterr()
        assert words in (said.err if code else said.out)


def test_check_computes_nothing_and_says_what_will_be(
    here: Path, beam_file: Path, crop_yaml: str, capsys: Any
) -> None:
    argv = ["check", crop_yaml, "input.path=beam.npy", "output.path=a.zarr", "crop.size=20", "downsample.factor=2",
            "output.chunk_mb=0.02"]  # fmt: skip
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert rows["crop"].split()[1:8] == ["6", "x", "5", "x", "20", "x", "20"]
    assert "float32" in rows["downsample"]
    assert "6 x 5 x 10 x 10" in rows["store"]
    assert "twice" in rows["reads"]
    assert "shards" in rows["writes"]
    assert sorted(path.name for path in here.iterdir()) == ["beam.npy"]


@pytest.mark.parametrize("shape", [(9, 1, 40, 36), (9, 40, 36), (3, 3, 40, 36)])
def test_crop_keeps_rank_and_type_of_a_tensor(
    here: Path, shape: tuple[int, ...], capsys: Any
) -> None:
    data = torch.zeros(shape, dtype=torch.int16)
    data[..., 17:23, 15:21] = 7
    torch.save(data, "in.pt")
    assert cli.main(["crop", "--input", "in.pt", "--output", "out.pt", "--margin-pixels", "1"]) == 0
    cropped = torch.load("out.pt", weights_only=True)
    assert cropped.dtype == torch.int16
    assert tuple(cropped.shape) == (*shape[:-2], 8, 8)
    assert int(cropped.sum()) == int(data.sum())
    made = ["in.pt", "out.pt", "out_report.html", "out_results.json", "out_visualization.png"]
    assert sorted(p.name for p in here.iterdir()) == made
    assert json.loads((here / "out_results.json").read_text())["analysis"]["global_radius"] == 4
    assert "file        " in capsys.readouterr().out


def test_crop_test_mode_and_other_suffixes(here: Path, beam_file: Path) -> None:
    quiet = ["--quiet", "--no-visualization"]
    size = ["--test-patterns", "12", "--test-size", "64"]
    assert cli.main(["crop", "--test-mode", *size, "--output", "t.pt", *quiet]) == 0
    assert torch.load("t.pt", weights_only=True).shape[:2] == (12, 1)
    beam = ["crop", "--input", "beam.npy", *quiet, "--output"]
    assert cli.main([*beam, "a.hspy", "--align", "fixed"]) == 0
    assert cli.main([*beam, "a.zarr", "--size", "12"]) == 2  # its a_results.json exists
    assert cli.main([*beam, "b.zarr", "--size", "20", "--chunk-size", "5"]) == 0
    assert xr.open_zarr(here / "b.zarr").patterns.shape == (6, 5, 20, 20)
    assert sorted(path.name for path in here.iterdir()) == [
        "a.hspy", "a_results.json", "b.zarr", "b_results.json", "beam.npy", "t.pt", "t_results.json",
        "t_test_data_12x64.pt",
    ]  # fmt: skip


def tree(path: str) -> dict[str, str]:
    """Everything in an HDF5 file but what is about the run."""
    found = {}

    def visit(name: str, item: Any) -> None:
        attrs = {key: item.attrs[key] for key in item.attrs if not key.endswith("_LIST")}
        found[name] = repr((attrs, item[()] if hasattr(item, "dtype") else None))

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@pytest.mark.parametrize("suffix", [".pt", ".hspy", ".zspy", ".h5", ".npy"])
def test_a_crop_writes_what_an_export_of_its_store_has(
    here: Path, beam_file: Path, crop_yaml: str, suffix: str
) -> None:
    """Patterns, axes, and the analysis by position, in one pass less; and the same words."""
    kind = suffix[1:]
    common = [crop_yaml, "input.path=beam.npy", "output.figure=false", "downsample.factor=2"]
    assert run.main([*common, "output.path=a.zarr", f"output.export=[{kind}]"]) == 0
    assert run.main([*common, f"output.path=b{suffix}", "output.export=[]"]) == 0
    results = [json.loads(Path(f"{name}_results.json").read_text()) for name in "ab"]
    for key in (
        "analysis",
        "validation",
        "window",
        "verdict",
        "advice",
    ):  # "commands" name their output
        assert results[1][key] == results[0][key]
    if suffix == ".pt":
        first, second = (torch.load(f"{name}.pt", weights_only=True) for name in "ab")
        assert first["analysis"].keys() == second["analysis"].keys()
        for name, values in first["analysis"].items():
            assert torch.equal(values.nan_to_num(), second["analysis"][name].nan_to_num()), name
        for name in ("axes", "window", "intensity", "downsample_factor"):
            assert first[name] == second[name]
    if suffix == ".hspy":
        assert tree("b.hspy") == tree("a.hspy")
    if suffix == ".h5":
        first, second = tree("a.h5"), tree("b.h5")  # which also holds the provenance
        assert {k: second[k] for k in first if k != "patterns"} == {
            k: first[k] for k in first if k != "patterns"
        }


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--output", "a.pt"], 2, "the input is missing; as in: stem-dask crop"),
        (["--input", "x.dm4", "--output", "a.txt"], 2, "expected a path that ends in"),
        (["--input", "x.dm4", "--output", "a.pt"], 3, "no such file"),
        (["--input", "beam.npy", "--output", "a.pt", "--target-retention", "2"], 2, "target_retention"),
        (["--input", "beam.npy", "--output", "a.pt", "--use-gpu"], 2, "device is gpu"),
        (["--input", "beam.npy", "--output", "a.pt", "--center-method", "manual"], 2, "manual_center"),
    ],
)  # fmt: skip
def test_crop_errors(
    no_gpu: None, here: Path, beam_file: Path, capsys: Any, argv: list[str], code: int, message: str
) -> None:
    assert cli.main(["crop", *argv]) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["beam.npy"]


def test_crop_of_several_files(here: Path, beam_file: Path, capsys: Any, connects: Any) -> None:
    """A glob and an output pattern; words behind --input; one failure stops no other, and the table says which."""
    data = np.load(beam_file)
    (here / "raw").mkdir()
    for name in "ac":
        np.save(here / f"raw/{name}.npy", data)
    (here / "raw/b.npy").write_bytes(b"\x93NUMPY\1\0")
    argv = ["crop", "--input", "raw/*.npy", "analyze.threshold=1", "--output", "out/{stem}.zarr"]
    assert cli.main([*argv, "--no-visualization"]) == 3
    said = capsys.readouterr()
    assert said.out.splitlines()[-5:-3] == [
        "input      output      window      mean    min     exit",
        "raw/a.npy  out/a.zarr  14 x 14 px  1.0000  1.0000  0",
    ]
    assert said.out.splitlines()[-3].startswith("raw/b.npy  out/b.zarr")
    assert said.out.endswith("2 of 3 complete\n")
    assert "b.npy: not a readable .npy file" in said.err
    made = sorted(path.name for path in (here / "out").iterdir())
    assert made == ["a.zarr", "a_results.json", "c.zarr", "c_results.json"]
    assert cli.main([*argv[:3], "--output", "out.zarr"]) == 2
    assert "one name for 3 inputs" in capsys.readouterr().err
    (here / "raw/b.npy").unlink()
    argv[-1] = "all/{stem}.zarr"
    assert cli.main([*argv, "--no-visualization", "crop.size=common"]) == 0
    assert "2 of 2 complete" in capsys.readouterr().out


def test_crop_refuses_an_existing_output(here: Path, beam_file: Path, capsys: Any) -> None:
    (here / "a.pt").write_text("precious")
    assert cli.main(["crop", "--input", "beam.npy", "--output", "a.pt"]) == 2
    assert "a.pt exists" in capsys.readouterr().err
    assert (here / "a.pt").read_text() == "precious"


def steps(n: int) -> list[Step]:
    return [
        Step("analyze", i + 1, n, 8_000_000_000, Record(i, 1.0, 0, 250_000_000, {}), 2, 4, 1.5)
        for i in range(n)
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("columns", "words", "last"),
    [
        (24, "4/8", "8/8"),
        (34, "4/8  about 0:16 left", "8/8  took 0:08"),
        (50, "4/8  50%  stage 2 of 4  about 0:16 left", "8/8  100%  stage 2 of 4  took 0:08"),
        (
            120,
            "4/8  50%  stage 2 of 4  1.00 GB/s  about 0:16 left  worker memory 0.25 GB",
            "8/8  100%  stage 2 of 4  1.00 GB/s  took 0:08  worker memory 0.25 GB",
        ),
    ],
)
def test_a_terminal_gets_one_live_line(
    monkeypatch: pytest.MonkeyPatch, columns: int, words: str, last: str
) -> None:
    """However narrow it is; the time left includes the later stages; the cursor stays visible, also after a kill."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    clock = iter(range(100))
    line = progress.ProgressLine(screen := Terminal(), live=True, clock=lambda: float(next(clock)))
    for step in steps(8)[:4]:
        line.step(step)
    assert screen.getvalue().rpartition("\x1b[?25")[2][0] == "h"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "\n" not in shown
    assert max(map(len, shown.split("\r"))) <= columns
    assert re.search(rf"^analyze [━╸╺ ]*{words} *$", shown.split("\r")[-1])
    assert ("━" in shown) == (columns != 50)
    for step in steps(8)[4:]:
        line.step(step)
    line.close()
    assert screen.getvalue().endswith(f"analyze     {last}\n")


def test_a_log_gets_a_line_every_30_seconds() -> None:
    clock = iter(range(0, 1000, 7))
    line = progress.ProgressLine(log := io.StringIO(), live=False, clock=lambda: float(next(clock)))
    for step in steps(20):
        line.step(step)
    lines = log.getvalue().splitlines()
    assert len(lines) == 4
    assert "\r" not in log.getvalue()
    assert lines[0].startswith("analyze     6/20  30%  stage 2 of 4  ")
    assert lines[-1].startswith("analyze     20/20  100%  stage 2 of 4  0.06 GB/s  took 2:14  ")
    assert re.search(r"  about \d:\d\d left  worker memory 0.25 GB  \d\d:\d\d:\d\d$", lines[0])


def test_progress_of_a_sample_does_not_extrapolate() -> None:
    """Its few patterns tell nothing about the passes over all of them."""
    line = progress.ProgressLine(log := io.StringIO(), live=False, clock=iter([0.0, 40.0]).__next__)
    for done in (1, 2):
        line.step(Step("survey", done, 4, 0, Record(done, 1.0, 0, 0, {}), 1, 4, None))
    assert re.match(r"survey      2/4  50%  stage 1 of 4  worker memory", log.getvalue())


@pytest.mark.parametrize("flags", [[], ["-v"], ["-q"]])
def test_log_records_are_shown_with_v(
    here: Path, beam_file: Path, capsys: Any, flags: list[str]
) -> None:
    logger = logging.getLogger("stem_dask")
    before = logger.level, [*logger.handlers]
    assert cli.main(["convert", "beam.npy", "a.npy", "output.dtype=float32", *flags]) == 0
    said = capsys.readouterr()
    assert ("stem_dask - INFO - convert: 1 blocks" in said.err) == (flags == ["-v"])
    assert ("convert     1/1  100%  stage 1 of 1  " in said.out) == (flags != ["-q"])
    assert (logger.level, logger.handlers) == before


@pytest.mark.parametrize("where", ["finalizer", "garbage collector", "import"])
def test_a_signal_where_errors_are_dropped_comes_again(where: str) -> None:
    """Python only prints what a finalizer or a callback of the garbage collector raises, and goes on."""
    import gc
    import signal
    import time

    from stem_dask.cli.signals import stoppable
    from stem_dask.core.errors import InterruptedRunError

    def signalled() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(100))

    class Late:
        def __del__(self) -> None:
            signalled()

    def callback(phase: str, info: object) -> None:
        try:
            signalled()
        finally:
            gc.callbacks.remove(callback)

    def wait() -> None:
        if where == "finalizer":
            Late()
        elif where == "import":  # as in the callback of importlib's weak references to locks
            dropped = "def cb():\n try:\n  os.kill(os.getpid(), signal.SIGTERM)\n  sum(range(100))\n except BaseException: pass"
            code = compile(f"{dropped}\ncb()", "<frozen importlib._bootstrap>", "exec")
            exec(code, {"os": os, "signal": signal})
        else:
            gc.callbacks.append(callback)
            gc.collect()
        end = time.monotonic() + 10
        while time.monotonic() < end:
            time.sleep(0.001)

    with pytest.raises(InterruptedRunError, match="asked to stop"), stoppable(None):
        wait()


def test_whatever_a_library_makes_of_a_stop_ends_in_the_same_way() -> None:
    """Some turn what is raised while they are imported into an ImportError, torch for one."""
    import signal
    import time

    from stem_dask.cli.signals import stoppable
    from stem_dask.core.errors import InterruptedRunError

    def imported() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt as error:
            raise ImportError("cannot be loaded") from error

    with pytest.raises(InterruptedRunError, match="asked to stop"), stoppable(None):
        imported()


def test_without_fcntl_one_line_names_wsl2(
    here: Path, beam_file: Path, crop_yaml: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    argv = [crop_yaml, "input.path=beam.npy", "output.path=a.zarr"]
    assert run.main(argv) == 2
    assert cli.main(["crop", "--input", "beam.npy", "--output", "b.pt"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("on Windows, run stem_dask in WSL2" in line for line in lines)


# --- standard output and error that cannot be written to ------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        "2>&1 | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}", ">/dev/full 2>/dev/full", "<&- >&- 2>&-",
    ],
)  # fmt: skip
def test_a_log_that_cannot_be_written_does_not_end_a_run(
    here: Path, beam_file: Path, crop_yaml: str, where: str
) -> None:
    """The exit code is the run's: 4, with a warning and an error line besides; on processes that inherit the streams."""
    command = (
        f"{sys.executable} -m stem_dask.run {crop_yaml} input.path=beam.npy output.path=a.zarr output.export=[] "
        f"output.figure=false crop.size=4 cluster.kind=local cluster.n_workers=1 {where}"
    )
    done = subprocess.run(["bash", "-c", command], check=False, timeout=120)
    assert done.returncode == 4
    assert xr.open_zarr(here / "a.zarr").patterns.shape == (6, 5, 4, 4)


class Full(io.BytesIO):
    def write(self, content: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_that_cannot_be_written_is_lost() -> None:
    stream = Unfailing(Full(), encoding="utf-8", line_buffering=True)
    assert stream.lost is None
    print("one line", file=stream)
    stream.flush()
    assert stream.lost is not None
    assert stream.lost.errno == errno.ENOSPC
    with pytest.raises(UnicodeEncodeError):
        Unfailing(io.BytesIO(), encoding="ascii").write("\N{MICRO SIGN}")


def test_a_config_that_is_lost_is_an_error(here: Path, beam_file: Path) -> None:
    """What ``init`` prints is its result; a reader that has seen enough is no error."""
    init = f"{sys.executable} -m stem_dask.cli.main init beam.npy"
    command = f"{init} >/dev/full; echo $?; {init} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], check=False, timeout=120, capture_output=True, text=True
    )
    assert done.stdout.split() == ["5", "0"]
    assert "cannot write to standard output: No space left on device" in done.stderr
