"""Input that cannot be read: the run stops and names it, or goes on without it and says what is missing."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from stem_dask.core.errors import SourceError
from stem_dask.job.plan import begun, prepare
from stem_dask.job.run import run
from stem_dask.readers.flat import FlatFile

#: 30 x 5 patterns; the store below keeps two scan rows in a chunk, and so does a block
BLOCK = {"chunk_mb": 10 * 40 * 36 * 2 / 2**20}


@pytest.fixture
def data(beam_file: Path) -> np.ndarray:
    return np.load(beam_file)


@pytest.fixture
def damaged(data: np.ndarray, tmp_path: Path) -> Path:
    """A zarr input whose middle chunk, rows 2 and 3 of the scan, was damaged on the disk."""
    store = tmp_path / "input.zarr"
    zarr.create_array(str(store), data=data, chunks=(2, 5, 40, 36))
    chunk = store / "c" / "1" / "0" / "0" / "0"
    chunk.write_bytes(b"not what was written")
    return store


@pytest.mark.parametrize("align", ["fixed", "pattern"])
def test_the_rest_is_as_without_the_missing(
    align: str, damaged: Path, data: np.ndarray, beam_file: Path, make_config: Any
) -> None:
    """Nothing of the blocks that could be read depends on the one that could not."""
    window = {"align": align, "size": 16}
    config = make_config(damaged, crop=window, output=BLOCK, on_error="quarantine")
    outcome = run(config)
    whole = make_config(beam_file, "whole.zarr", crop=window, output=BLOCK)
    run(whole)
    assert outcome.exit_code == 7
    ours, theirs = (xr.open_datatree(c.output.path, engine="zarr") for c in (config, whole))
    valid = np.ones((6, 5), bool)
    valid[2:4] = False
    assert np.array_equal(ours.valid.values, valid)
    assert theirs.valid.values.all()
    assert not ours.patterns.values[2:4].any()
    for name in ("total", "radius", "com_y", "center_y", "retention"):
        mine, other = ours.analysis[name].values, theirs.analysis[name].values
        assert np.array_equal(mine[valid], other[valid]), name
    assert np.isnan(ours.analysis.retention.values[~valid]).all()
    if align == "pattern":
        assert np.array_equal(ours.patterns.values[valid], theirs.patterns.values[valid])
    mean = data[valid].mean(0)
    assert np.allclose(ours.analysis.mean_pattern.values, mean, rtol=1e-12)
    assert np.allclose(ours.output.mean_pattern.values, ours.patterns.values[valid].mean(0))
    logs = np.log1p(ours.patterns.values, dtype=np.float64)
    assert np.allclose(ours.output.log_mean_pattern.values, logs[valid].mean(0))
    assert np.array_equal(np.isnan(ours.output.log_mean.values), ~valid)
    assert np.allclose(ours.output.log_std.values[valid], logs[valid].std((1, 2)))
    assert outcome.results["validation"]["n_empty"] == 0
    assert ours.attrs["quarantined"] == 10


def test_what_is_said_of_it_and_that_it_is_complete(
    damaged: Path, make_config: Any, tmp_path: Path
) -> None:
    """Also for a command that would have stopped: the option does not change a byte of what can be read."""
    outcome = run(make_config(damaged, output=BLOCK, on_error="quarantine"))
    assert any("10 patterns that could not be read" in line for line in outcome.lines)
    for name in ("out_results.json", "out.run/report.json"):
        said = json.loads((tmp_path / name).read_text())["quarantined"]
        assert said["n_patterns"] == 10
        (block,) = said["blocks"]
        assert block["region"] == [[2, 4], [0, 5]]
        assert "input.zarr" in block["why"]
    again = run(make_config(damaged, output=BLOCK))
    assert again.exit_code == 7
    assert again.lines[0].startswith("already complete")
    assert "without 10 patterns" in again.lines[0]


def test_a_run_that_stopped_goes_on_without_it(damaged: Path, make_config: Any) -> None:
    stopped = make_config(damaged, output=BLOCK)
    told = r"^while a sample was read: .*input\.zarr.*cannot be decoded"
    with pytest.raises(SourceError, match=told):
        run(stopped)
    assert not Path(stopped.output.path).exists()
    config = make_config(damaged, output=BLOCK, on_error="quarantine")
    prepared = prepare(config)
    with begun(prepared) as state:
        n_done = len(state.journal.records("analyze"))
        outcome = run(prepared, state=state)
    assert n_done > 0
    assert outcome.exit_code == 7


def test_exports_say_what_is_missing(damaged: Path, make_config: Any, tmp_path: Path) -> None:
    import torch
    from rsciio.hspy import file_reader

    output = {**BLOCK, "export": ["pt", "hspy"]}
    run(make_config(damaged, output=output, on_error="quarantine"))
    content = torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)
    valid = content["analysis"]["valid"]
    assert valid.dtype == torch.bool
    assert valid.tolist() == [[i not in (2, 3)] * 5 for i in range(6)]
    (signal,) = file_reader(tmp_path / "out.hspy", lazy=True)
    assert np.array_equal(np.asarray(signal["metadata"]["stem_dask"]["valid"]), valid.numpy())


def test_without_cropping(damaged: Path, data: np.ndarray, make_config: Any) -> None:
    down = {"factor": 2, "reduce": "sum"}
    config = make_config(
        damaged, crop={"enabled": False}, downsample=down, output=BLOCK, on_error="quarantine"
    )
    assert run(config).exit_code == 7
    root = xr.open_zarr(config.output.path)
    sums = data.reshape(6, 5, 20, 2, 18, 2).sum((3, 5))
    sums[2:4] = 0
    assert np.array_equal(root.patterns.values, sums)


def test_nothing_could_be_read(damaged: Path, make_config: Any, tmp_path: Path) -> None:
    for chunk in (damaged / "c").rglob("0"):
        if chunk.is_file():
            chunk.write_bytes(b"not what was written")
    with pytest.raises(SourceError, match="empty"):
        run(make_config(damaged, output=BLOCK, on_error="quarantine"))
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("on_error", ["stop", "quarantine"])
def test_an_error_that_passes_is_tried_again(
    on_error: str, beam_file: Path, make_config: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    run(make_config(beam_file, "quiet.zarr", output=BLOCK))
    plain, left = FlatFile._fill, [2]

    def fill(self: FlatFile, file: Any, position: int, run_: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        plain(self, file, position, run_)

    monkeypatch.setattr(FlatFile, "_fill", fill)
    outcome = run(make_config(beam_file, output=BLOCK, on_error=on_error))
    assert outcome.exit_code == 0
    assert outcome.results["retries"] == 2
    shards = list((tmp_path / "quiet.zarr" / "patterns").glob("c.*"))
    assert shards
    for path in shards:
        other = tmp_path / "out.zarr" / path.relative_to(tmp_path / "quiet.zarr")
        assert other.read_bytes() == path.read_bytes()


def test_a_read_error_that_stays_names_the_file(
    beam_file: Path, make_config: Any, monkeypatch: Any
) -> None:
    def fill(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FlatFile, "_fill", fill)
    with pytest.raises(
        SourceError,
        match=r"^while a sample was read: .*beam\.npy cannot be read: Input/output error; .*on_error=quarantine",
    ):
        run(make_config(beam_file, output=BLOCK))
