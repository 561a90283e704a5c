"""Hot pixels: found in a sample, always told, left out of the analysis, and masked in the data when asked."""

import json
import math

import numpy as np
import pytest
import xarray as xr

import stem_dask as sd
from stem_dask.core.errors import ConfigError
from stem_dask.job.run import run

HOT = [[3, 4], [0, 35], [39, 0]]


@pytest.fixture
def hot_file(beam_file):
    data = np.load(beam_file)
    for y, x in HOT:
        data[..., y, x] = 50_000
    np.save(beam_file, data)
    return beam_file


def analysis_of(config):
    return xr.open_zarr(config.output.path, group="analysis").load()


def test_they_are_told_and_left_out(hot_file, make_config, tmp_path):
    config = make_config(hot_file)
    outcome = run(config)
    (said,) = [text for text in outcome.results["warnings"] if "hot" in text]
    assert said.startswith("3 suspected hot pixels, left out of the analysis, with ")
    assert said.endswith(
        "% of the intensity (if they are the beam, set analyze.ignore_bad_pixels=false): [0, 35], [3, 4], [39, 0]"
    )
    assert any("suspected hot" in line for line in outcome.lines)
    results = json.loads((tmp_path / "out_results.json").read_text())
    assert results["hot_pixels"] == {"number": 3, "positions": sorted(HOT), "masked": False}
    assert float(analysis_of(config).max_pattern.max()) < 50_000
    counted = make_config(hot_file, "all.zarr", analyze={"ignore_bad_pixels": False})
    outcome = run(counted)
    (said,) = [text for text in outcome.results["warnings"] if "hot" in text]
    assert said.startswith(
        "3 suspected hot pixels in the mean pattern, above 6 times all but 5 of their 24 "
    )
    assert float(analysis_of(counted).max_pattern.max()) == 50_000


def test_spikes_are_told(beam_file, make_config):
    data = np.tile(np.load(beam_file), (3, 1, 1, 1))
    data[0, 1, 30, 7] = 60_000
    np.save(beam_file, data)
    (said,) = [text for text in run(make_config(beam_file)).results["warnings"] if "spike" in text]
    assert said.startswith(
        "1 pixel with a spike in a single pattern, above 50 times the mean + 100, such as 60,000 at [30, 7]"
    )


def test_only_twenty_are_named(tmp_path, make_config):
    data = np.ones((2, 2, 30, 30), "u2")
    data[..., ::3, 1:30:3] = 90
    np.save(tmp_path / "grid.npy", data)
    outcome = run(make_config(tmp_path / "grid.npy"))
    assert len(outcome.results["hot_pixels"]["positions"]) == 20
    assert outcome.results["hot_pixels"]["number"] == 100
    assert any("and 80 more" in text for text in outcome.results["warnings"])


@pytest.mark.parametrize("fill", ["zero", "median"])
def test_auto_is_as_the_list(fill, hot_file, make_config):
    auto = make_config(hot_file, "auto.zarr", input={"mask": "auto", "mask_fill": fill})
    listed = make_config(hot_file, "list.zarr", input={"mask": {"pixels": HOT}, "mask_fill": fill})
    outcome, other = run(auto), run(listed)
    one, two = (analysis_of(config) for config in (auto, listed))
    assert (np.argwhere(one["mask"].values == 2).tolist(), (two["mask"].values == 1).sum()) == (
        sorted(HOT),
        3,
    )
    flags = [x.attrs["survey"].pop("flags") for x in (one, two)]
    assert flags[0]["hot"] == flags[1]["given"] == sorted(HOT)
    shares = [x.attrs["survey"].pop("hot_share") for x in (one, two)]
    assert shares[0] > 0.5
    assert shares[1] == 0
    xr.testing.assert_identical(one.drop_vars("mask"), two.drop_vars("mask"))
    mine, theirs = (xr.open_zarr(config.output.path) for config in (auto, listed))
    xr.testing.assert_equal(mine, theirs)
    assert outcome.results["hot_pixels"]["masked"]
    assert any("masked (input.mask: auto)" in text for text in outcome.results["warnings"])
    assert other.results["hot_pixels"]["number"] == 0


def test_auto_without_hot_pixels_reads_once(beam_file, make_config):
    stages = set()
    run(
        make_config(beam_file, input={"mask": "auto"}), progress=lambda step: stages.add(step.stage)
    )
    assert stages == {"survey", "analyze", "crop"}


def test_auto_goes_on_with_what_was_settled(hot_file, make_config, tmp_path):
    config = make_config(hot_file, input={"mask": "auto"}, output={"chunk_mb": 0.02})
    done: list[str] = []

    def stop(step):
        done.append(step.stage)
        if done.count("analyze") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, progress=stop)
    settled = json.loads((tmp_path / "out.run" / "run.json").read_text())["survey"]
    assert settled["flags"]["hot"] == sorted(HOT)
    again: list[str] = []
    run(config, progress=lambda step: again.append(step.stage))
    assert "survey" not in again
    whole = make_config(hot_file, "whole.zarr", input={"mask": {"pixels": HOT}})
    run(whole)
    ours, theirs = (xr.open_zarr(c.output.path) for c in (config, whole))
    xr.testing.assert_equal(ours, theirs)
    assert run(config).lines[0].startswith("already complete")


def test_in_python(hot_file):
    with pytest.raises(ConfigError, match=r"mask=sd\.survey\(patterns\)\.flags > 0"):
        sd.open(hot_file, mask="auto")
    flags = sd.survey(sd.open(hot_file)).flags
    assert np.argwhere(flags > 0).tolist() == sorted(HOT)
    analysis = sd.analyze(sd.open(hot_file))
    with pytest.raises(ConfigError, match="compute"):
        sd.suspected_hot_pixels(analysis)
    with pytest.raises(ConfigError, match=r"no variable 'lit'.* analyze the patterns again"):
        sd.suspected_hot_pixels(analysis.compute().drop_vars("lit"))
    hot = sd.suspected_hot_pixels(analysis.compute())
    assert np.argwhere(hot).tolist() == sorted(HOT)
    clean = sd.analyze(sd.open(hot_file, mask=hot)).compute()
    assert not sd.suspected_hot_pixels(clean).any()


def test_the_shared_file(shared_data, make_config):
    name = shared_data / "sim" / "au_np_hot_dead_f32"
    truth = json.loads(name.with_suffix(".truth.json").read_text())
    analysis = sd.analyze(sd.open(name.with_suffix(".hspy"))).compute()
    assert np.argwhere(sd.suspected_hot_pixels(analysis)).tolist() == sorted(truth["hot_pixels"])


@pytest.mark.parametrize("name", ["au_np_descan_u16", "au_np_gms_stemx_u16"])
def test_pairs_and_rows_on_shared_data(name, shared_data, make_config, tmp_path):
    """Centers, radii and the window are those of the data without hot pixels, where these see no intensity."""
    (path,) = [p for p in (shared_data / "sim").glob(f"{name}.*") if p.suffix != ".json"]
    clean = sd.open(path)
    height, width = clean.shape[-2:]
    row = [[2, x] for x in range(width)]
    places = [[0, 0], [height - 1, 5], [6, 9], [6, 10], [height - 6, 8], [height - 5, 8], *row]
    data = clean.values.copy()
    y, x = np.transpose(places)
    data[..., y, x] = 0
    np.save(tmp_path / "clean.npy", data)
    data[..., y, x] = 60_000
    np.save(tmp_path / "hot.npy", data)
    run(make_config(tmp_path / "clean.npy", "clean.zarr"))
    outcome = run(make_config(tmp_path / "hot.npy", input={"mask": "auto"}))
    assert outcome.results["hot_pixels"] == {
        "number": len(places), "positions": sorted(places)[:20], "masked": True,
    }  # fmt: skip
    assert not any("more suspected" in text for text in outcome.results["warnings"])
    mine, theirs = (
        xr.open_zarr(tmp_path / n, group="analysis") for n in ("out.zarr", "clean.zarr")
    )
    for name in ("center_y", "center_x", "radius", "retention"):
        np.testing.assert_array_equal(mine[name], theirs[name])


def test_what_is_left_is_said(hot_file, make_config):
    """Of eight together the inner four are found only when the others are gone."""
    data = np.load(hot_file)
    data[..., 30:32, 3:7] = 50_000
    np.save(hot_file, data)
    outcome = run(make_config(hot_file, input={"mask": "auto"}))
    (said,) = [text for text in outcome.results["warnings"] if "more suspected" in text]
    assert said == (
        "4 more suspected hot pixels in the mean pattern, above 6 times all but 5 of their 24 neighbours: [30, 4], [30, 5], "
        "[31, 4], [31, 5]; list bad pixels as input.mask.pixels"
    )


@pytest.mark.parametrize("part", [(20, 13), (300,)])
def test_a_pixel_that_is_lit_in_half_of_the_sample(part):
    """The sample is spread over the scan, and the same for all chunks."""
    n = math.prod(part)
    data = np.zeros((n, 9, 9), "u2")
    data[:, 3:6, 3:6] = 9
    data[: n // 2 + 20, 0, 0] = 50  # a little more than half
    data[: n // 2 - 20, 8, 8] = 50  # a little less
    dims = ("pattern",) if len(part) == 1 else ("scan_y", "scan_x")
    patterns = xr.DataArray(data.reshape(*part, 9, 9), dims=(*dims, "ky", "kx"))
    found = [sd.analyze(patterns.chunk({dims[0]: size})).compute() for size in (1, 7, n)]
    for one in found:
        assert np.argwhere(sd.suspected_hot_pixels(one)).tolist() == [[0, 0]]
        xr.testing.assert_identical(one["lit"], found[0]["lit"])
    assert 240 < int(found[0]["lit"].max()) <= 256


@pytest.mark.parametrize(("enabled", "mask"), [(True, "auto"), (False, {"pixels": HOT})])
def test_the_mask_is_stored_once(hot_file, make_config, enabled, mask):
    config = make_config(hot_file, crop={"enabled": enabled}, input={"mask": mask})
    run(config)
    stored = xr.open_zarr(config.output.path, group="analysis")["mask"]
    assert stored.dims == ("source_ky", "source_kx")
    assert stored.dtype == np.uint8
    assert np.argwhere(stored.values == (2 if mask == "auto" else 1)).tolist() == sorted(
        map(list, HOT)
    )
