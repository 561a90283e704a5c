"""An input that changes while it is read is an error, and nothing of it gets a final name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import yaml
from frames_made import hdr, mib, numbers

import stem_dask as sd
from stem_dask.cli.run import main
from stem_dask.config.load import to_dict
from stem_dask.core.errors import ConfigError, InterruptedRunError, SourceError
from stem_dask.job.run import run
from stem_dask.readers.open import find
from stem_dask.storage.location import at

CHANGED = r"beam\.npy changed while it was read \({}\); the results so far are dropped: run the same command again"
MODIFIED = r"modified 20\d\d-\d\d-\d\d [\d:.]+ -> 20\d\d-\d\d-\d\d [\d:.]+"


@pytest.fixture
def changed(beam_file: Path, beam: Any) -> Callable[..., None]:
    """Writes twice the counts into the file; its time can be set back."""

    def change(*, hide: bool = False) -> None:
        status = beam_file.stat()
        np.save(beam_file, 2 * beam)
        now = status.st_mtime_ns if hide else status.st_mtime_ns + 10**9
        os.utime(beam_file, ns=(now, now))

    return change


def when(stage: str, done: int, act: Callable[[], Any]) -> Callable[[Any], None]:
    """For progress: act after so many blocks of a stage (negative: from its end)."""

    def progress(step: Any) -> None:
        if step.stage == stage and step.done == done % (step.total + 1):
            act()

    return progress


@pytest.mark.parametrize("stage", ["analyze", "crop"])
@pytest.mark.parametrize("done", [1, -1])
def test_a_file_that_is_written_while_it_is_read(
    beam_file: Path,
    beam: Any,
    make_config: Any,
    tmp_path: Path,
    changed: Any,
    stage: str,
    done: int,
) -> None:
    """After the first and after the last block of each pass; the same command then crops the new file."""
    config = make_config(beam_file, output={"chunk_mb": 0.02})
    with pytest.raises(SourceError, match=CHANGED.format(MODIFIED)) as caught:
        run(config, progress=when(stage, done, changed))
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["beam.npy"]
    assert run(config).exit_code == 0
    total = xr.open_zarr(config.output.path, group="analysis").total
    np.testing.assert_array_equal(total, 2 * beam.sum((2, 3)))


@pytest.mark.parametrize(
    ("name", "sections", "stage"),
    [
        ("out.pt", {"crop": {"enabled": False}}, "convert"),
        ("out.npy", {"crop": {"enabled": False}}, "convert"),
        ("out.zarr", {"output": {"normalize": "log-zscore"}}, "downsample"),
        ("out.zarr", {"output": {"normalize": "log-zscore"}}, "normalize"),
    ],
)
def test_every_pass_looks_at_the_input(
    beam_file: Path, make_config: Any, changed: Any, name: str, sections: Any, stage: str
) -> None:
    config = make_config(beam_file, name, **sections)
    with pytest.raises(SourceError, match=CHANGED.format(MODIFIED)):
        run(config, progress=when(stage, -1, changed))
    assert not Path(config.output.path).exists()


def test_the_turned_copy_of_a_file_that_changed_is_not_used(
    tmp_path: Path, make_config: Any, beam: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "beam.npy"
    np.save(path, np.ascontiguousarray(beam.transpose(2, 3, 0, 1)))
    monkeypatch.setattr("stem_dask.job.budget.CACHED_SHARE", 0)
    config = make_config(path, input={"scan_order": "detector_first"})
    with pytest.raises(SourceError, match=CHANGED.format(MODIFIED)):
        run(config, progress=when("turn", -1, lambda: os.utime(path, (2e9, 2e9))))


@pytest.mark.parametrize("on_error", ["stop", "quarantine"])
@pytest.mark.parametrize("grows", [True, False])
def test_a_file_that_grows_or_shrinks(
    beam_file: Path, make_config: Any, on_error: str, grows: bool
) -> None:
    """The read that fails is not what is reported, also where blocks that cannot be read are left out."""
    config = make_config(beam_file, output={"chunk_mb": 0.01}, on_error=on_error)
    size = beam_file.stat().st_size
    new = size + 4 if grows else size // 2
    with pytest.raises(SourceError, match=CHANGED.format(f"size {size:,} -> {new:,}, {MODIFIED}")):
        run(config, progress=when("analyze", 1, lambda: os.truncate(beam_file, new)))


def test_a_file_that_is_removed(
    beam_file: Path, beam: Any, make_config: Any, tmp_path: Path
) -> None:
    """The progress stays: it may be a share that comes back."""
    config, aside = make_config(beam_file), tmp_path / "aside.npy"
    with pytest.raises(SourceError, match=r"beam\.npy was removed, or cannot be reached any more"):
        run(config, progress=when("crop", -1, lambda: beam_file.rename(aside)))
    aside.rename(beam_file)
    said: list[str] = []
    assert run(config, say=said.append).exit_code == 0
    assert any(line.startswith("resuming") for line in said)


def test_a_change_that_leaves_size_and_time(
    beam_file: Path, beam: Any, make_config: Any, tmp_path: Path, changed: Any
) -> None:
    """The windows then hold more than the patterns did."""
    config = make_config(beam_file)
    message = r"beam\.npy: the retention of 30 patterns exceeds 1 \(up to 2\): their windows hold more.* Run the same command again"
    with pytest.raises(SourceError, match=message) as caught:
        run(config, progress=when("analyze", -1, lambda: changed(hide=True)))
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["beam.npy"]
    assert run(config).exit_code == 0
    np.testing.assert_array_equal(
        xr.open_zarr(config.output.path, group="analysis").total, 2 * beam.sum((2, 3))
    )


def test_validate_refuses_a_retention_above_one(beam: Any) -> None:
    patterns = xr.DataArray(beam, dims=("scan_y", "scan_x", "ky", "kx")).chunk(scan_y=2)
    analysis = sd.analyze(patterns).compute()
    cropped = sd.crop(patterns, analysis, sd.choose_window(analysis, size=30))
    assert float(sd.validate(patterns, cropped, analysis).compute()["max"]) == 1
    later = sd.crop(2 * patterns, analysis, sd.choose_window(analysis, size=30))
    found = sd.validate(patterns, later, analysis)
    for name in ("retention", "max"):
        with pytest.raises(
            SourceError, match=r"the retention of \d+ patterns exceeds 1 \(up to 2\)"
        ):
            found[name].compute()


def test_progress_of_the_file_before_is_not_taken_for_the_new_one(
    beam_file: Path, beam: Any, make_config: Any, tmp_path: Path, changed: Any
) -> None:
    """A change after the run was killed: it is refused by name, and the advice works."""
    config = make_config(beam_file)

    def stop() -> None:
        raise InterruptedRunError("stopped")

    with pytest.raises(InterruptedRunError):
        run(config, progress=when("crop", 1, stop))
    changed()
    message = r"out\.run holds an unfinished run that differs in the input file; .* add --restart to drop it"
    with pytest.raises(ConfigError, match=message):
        run(config)
    (tmp_path / "crop.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert main([str(tmp_path / "crop.yaml")]) == 2
    assert main(["--restart", str(tmp_path / "crop.yaml")]) == 0
    np.testing.assert_array_equal(
        xr.open_zarr(config.output.path, group="analysis").total, 2 * beam.sum((2, 3))
    )


def test_files_that_belong_to_the_input(tmp_path: Path) -> None:
    """The header beside the patterns is looked at, too."""
    path = hdr(mib(tmp_path / "a.mib", numbers()), ScanX="6", ScanY="2")
    found, header = find(path), tmp_path / "a.hdr"
    assert found.change() is None
    os.utime(header, (1e9, 1e9))
    assert found.change() == "modified"
    size = path.stat().st_size + header.stat().st_size
    os.truncate(header, 5)
    assert found.change() == f"size {size:,} -> {path.stat().st_size + 5:,}, modified"
    sd.export(xr.DataArray(numbers(), dims=("scan_y", "scan_x", "ky", "kx")), tmp_path / "a.zarr")
    found = find(tmp_path / "a.zarr")
    assert found.change() is None
    os.utime(tmp_path / "a.zarr" / "zarr.json", (1e9, 1e9))
    assert str(found.change()).startswith("modified 20")


def test_an_object_as_input(beam_file: Path, beam: Any, bucket: str) -> None:
    url = f"{bucket}/beam.npy"
    at(url).write_bytes(beam_file.read_bytes())
    found = find(url)
    assert found.change() is None
    np.save(beam_file, beam + 1)
    at(url).write_bytes(beam_file.read_bytes())
    assert str(found.change()).startswith("modified 20")
