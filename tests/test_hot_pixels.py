"""Hot pixels: found in the mean pattern, always told, masked when asked, and settled when a run goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import stem_dask as sd
from stem_dask.errors import ConfigError
from stem_dask.passes import analysis as analysis_pass
from stem_dask.pipeline import run

HOT = [[3, 4], [0, 35], [39, 0]]


@pytest.fixture
def hot_file(beam_file: Path) -> Path:
    data = np.load(beam_file)
    for y, x in HOT:
        data[..., y, x] = 50_000
    np.save(beam_file, data)
    return beam_file


def analysis_of(config: Any) -> xr.Dataset:
    return xr.open_zarr(config.output.path, group="analysis").load()


def test_they_are_told_and_left(hot_file: Path, make_config: Any, tmp_path: Path) -> None:
    config = make_config(hot_file)
    outcome = run(config)
    (said,) = [text for text in outcome.results["warnings"] if "hot" in text]
    assert said.startswith("3 suspected hot pixels, above 5 times each neighbour")
    assert "[0, 35], [3, 4], [39, 0]" in said
    assert any("suspected hot" in line for line in outcome.lines)
    results = json.loads((tmp_path / "out_results.json").read_text())
    assert results["hot_pixels"] == {"number": 3, "positions": sorted(HOT), "masked": False}
    assert float(analysis_of(config).max_pattern.max()) == 50_000


def test_only_twenty_are_named(tmp_path: Path, make_config: Any) -> None:
    data = np.ones((2, 2, 20, 20), "u2")
    data[..., ::2, ::2] = 9
    np.save(tmp_path / "grid.npy", data)
    outcome = run(make_config(tmp_path / "grid.npy"))
    assert len(outcome.results["hot_pixels"]["positions"]) == 20
    assert outcome.results["hot_pixels"]["number"] == 100
    assert any("and 80 more" in text for text in outcome.results["warnings"])


@pytest.mark.parametrize("fill", ["zero", "median"])
def test_auto_is_as_the_list(fill: str, hot_file: Path, make_config: Any) -> None:
    auto = make_config(hot_file, "auto.zarr", input={"mask": "auto", "mask_fill": fill})
    listed = make_config(hot_file, "list.zarr", input={"mask": {"pixels": HOT}, "mask_fill": fill})
    outcome, other = run(auto), run(listed)
    xr.testing.assert_identical(analysis_of(auto), analysis_of(listed))
    mine, theirs = (xr.open_zarr(config.output.path) for config in (auto, listed))
    xr.testing.assert_equal(mine, theirs)
    assert mine.attrs["hot_pixels"] == sorted(HOT)
    assert outcome.results["hot_pixels"]["masked"]
    assert any("masked (input.mask: auto)" in text for text in outcome.results["warnings"])
    assert other.results["hot_pixels"]["number"] == 0


def test_auto_without_hot_pixels_reads_once(beam_file: Path, make_config: Any) -> None:
    stages = set()
    run(
        make_config(beam_file, input={"mask": "auto"}),
        progress=lambda step: stages.add(step.stage),
    )
    assert stages == {"analyze", "crop"}


def test_auto_goes_on_with_what_was_settled(
    hot_file: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config(hot_file, input={"mask": "auto"}, output={"chunk_mb": 0.02})
    done: list[str] = []

    def stop(step: Any) -> None:
        done.append(step.stage)
        if done.count("analyze again") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, progress=stop)
    settled = json.loads((tmp_path / "out.run" / "run.json").read_text())["hot_pixels"]
    assert settled == sorted(HOT)
    monkeypatch.setattr(
        analysis_pass, "suspected_hot_pixels", lambda analysis: np.zeros((40, 36), bool)
    )
    run(config)
    whole = make_config(hot_file, "whole.zarr", input={"mask": {"pixels": HOT}})
    run(whole)
    ours, theirs = (xr.open_zarr(c.output.path) for c in (config, whole))
    xr.testing.assert_equal(ours, theirs)
    assert run(config).lines[0].startswith("already complete")


def test_in_python(hot_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"mask=sd\.suspected_hot_pixels\(analysis\)"):
        sd.open(hot_file, mask="auto")
    analysis = sd.analyze(sd.open(hot_file))
    with pytest.raises(ConfigError, match="compute"):
        sd.suspected_hot_pixels(analysis)
    hot = sd.suspected_hot_pixels(analysis.compute())
    assert np.argwhere(hot).tolist() == sorted(HOT)
    clean = sd.analyze(sd.open(hot_file, mask=hot)).compute()
    assert not sd.suspected_hot_pixels(clean).any()


def test_the_shared_file(shared_data: Path, make_config: Any) -> None:
    name = shared_data / "sim" / "au_np_hot_dead_f32"
    truth = json.loads(name.with_suffix(".truth.json").read_text())
    analysis = sd.analyze(sd.open(name.with_suffix(".hspy"))).compute()
    assert np.argwhere(sd.suspected_hot_pixels(analysis)).tolist() == sorted(truth["hot_pixels"])


@pytest.mark.parametrize(("enabled", "mask"), [(True, "auto"), (False, {"pixels": HOT})])
def test_the_mask_is_stored_once(
    hot_file: Path, make_config: Any, enabled: bool, mask: Any
) -> None:
    config = make_config(hot_file, crop={"enabled": enabled}, input={"mask": mask})
    run(config)
    stored = xr.open_zarr(config.output.path, group="analysis")["mask"]
    assert stored.dims == ("source_ky", "source_kx")
    assert stored.dtype == bool
    assert np.argwhere(stored.values).tolist() == sorted(map(list, HOT))
