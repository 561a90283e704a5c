"""The beam in a whole job: survey, centers of discs, descan, windows around it, and pixels that do not count."""

import json

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import stem_dask as sd
from stem_dask.core.errors import ConfigError
from stem_dask.job.run import run

RADIUS = 5.3


def scan(shape=(9, 8), detector=(48, 52), slope=(2.0, -1.5), seed=0, counts=60.0):
    """Discs that wander linearly over the scan: patterns uint16, centers and descan (scan_y, scan_x, 2)."""
    rng = np.random.default_rng(seed)
    v, u = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    descan = np.stack([22.4 + slope[0] * v, 27.7 + slope[1] * u], axis=-1)
    centers = descan.copy()
    centers[3:5, 2:4] += 1.2  # the specimen
    y, x = np.mgrid[: detector[0], : detector[1]]
    far = np.hypot(y - centers[..., :1, None], x - centers[..., 1:, None])
    patterns = rng.poisson(counts * np.clip(RADIUS + 0.5 - far, 0, 1) + 0.05).astype("u2")
    return patterns, centers, descan


@pytest.fixture
def scan_file(tmp_path):
    np.save(tmp_path / "scan.npy", scan()[0])
    return tmp_path / "scan.npy"


def analysis_of(config):
    return xr.open_zarr(config.output.path, group="analysis").load()


def distance(found, names, truth):
    return np.hypot(
        *(found[f"{names}_{axis}"].values - truth[..., i] for i, axis in enumerate("yx"))
    )


def test_a_job_finds_the_disc_and_its_descan(scan_file, make_config, tmp_path):
    _, centers, descan = scan()
    steps = []
    config = make_config(scan_file, crop={"align": "descan"})
    outcome = run(config, progress=lambda step: steps.append(step.stage))
    found = analysis_of(config)
    assert [*dict.fromkeys(steps)] == ["survey", "analyze", "crop"]
    assert found.attrs["center_method"] == "disc"
    assert found.attrs["survey"]["radius"] == pytest.approx(RADIUS, abs=0.15)
    assert np.quantile(distance(found, "center", centers), 0.95) < 0.2
    assert distance(found, "descan", descan).max() < 0.15
    assert found.attrs["descan"]["order"] == 1
    for axis in "yx":  # law: exact
        both = found[f"descan_{axis}"] + found[f"deflection_{axis}"]
        np.testing.assert_allclose(both, found[f"center_{axis}"], rtol=0, atol=1e-12)
        assert float(found[f"deflection_{axis}"][3:5, 2:4].mean()) == pytest.approx(1.2, abs=0.1)
    assert found.attrs["k_origin"] == "beam"
    assert any(line.startswith("center      disc, radius 5.") for line in outcome.lines)
    results = json.loads((tmp_path / "out_results.json").read_text())
    assert results["center"]["method"] == "disc"
    # windows are whole pixels around the fit, and nothing else moves them
    size = found.attrs["window_size"][0]
    np.testing.assert_array_equal(found.window_y, np.rint(found.descan_y) - size // 2)
    # maps of the same read
    np.testing.assert_array_equal(found.bright_field, found.direct)
    np.testing.assert_array_equal(found.dark_field, found.total - found.direct)


def test_windows_around_the_descan_are_put_back(scan_file):
    patterns = sd.open(scan_file)
    analysis = sd.fit_descan(sd.analyze(patterns).compute())
    window = sd.choose_window(analysis, align="descan", margin_pixels=0)
    cropped = sd.crop(patterns, analysis, window)
    back, whole = sd.to_detector(cropped, analysis).values, patterns.values
    origins = (cropped.window_y.values, cropped.window_x.values)
    for index in np.ndindex(whole.shape[:2]):
        y, x = (int(origin[index]) for origin in origins)
        rows, columns = slice(max(y, 0), y + window.shape[0]), slice(max(x, 0), x + window.shape[1])
        np.testing.assert_array_equal(back[index][rows, columns], whole[index][rows, columns])
        assert back[index].sum() == whole[index][rows, columns].sum()
    assert cropped.ky.values[window.shape[0] // 2] == 0


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 8))
def test_chunks_change_no_byte(rows, columns):
    """Law: what the analysis finds depends on the patterns alone."""
    data = scan()[0]
    dims = ("scan_y", "scan_x", "ky", "kx")
    whole = sd.analyze(xr.DataArray(data, dims=dims)).compute()
    parts = {"scan_y": rows, "scan_x": columns}
    other = sd.analyze(xr.DataArray(data, dims=dims).chunk(parts)).compute()
    xr.testing.assert_identical(whole, other)
    assert whole.attrs["center_method"] == "disc"


@pytest.mark.parametrize("cluster", [{"threads_per_worker": 1}, {"kind": "local", "n_workers": 2}])
def test_workers_change_no_byte(cluster, scan_file, make_config):
    first = make_config(scan_file, "a.zarr", crop={"align": "descan"})
    second = make_config(
        scan_file, "b.zarr", crop={"align": "descan"}, output={"chunk_mb": 0.05}, cluster=cluster
    )
    run(first)
    run(second)
    one, other = analysis_of(first), analysis_of(second)
    xr.testing.assert_equal(one, other)
    assert one.attrs == other.attrs


@pytest.mark.parametrize(("part", "step"), [((0, 9, 0, 8), 2), ((2, 9, 1, 8), 1)])
def test_a_part_of_the_scan_keeps_its_descan(part, step, scan_file):
    """Coordinates are those of the scan as acquired: a fit to exact centers is the same where positions are left."""
    whole = sd.analyze(sd.open(scan_file), center_method="disc").compute()
    descan = scan()[2]
    some = sd.analyze(
        sd.open(scan_file, scan_roi=part, scan_step=step), center_method="disc"
    ).compute()
    fits = []
    for one, exact in (
        (whole, descan),
        (some, descan[part[0] : part[1] : step, part[2] : part[3] : step]),
    ):
        exact_centers = {
            f"center_{axis}": one[f"center_{axis}"].copy(data=exact[..., i])
            for i, axis in enumerate("yx")
        }
        fits.append(sd.fit_descan(one.assign(exact_centers), order=1))
    kept = fits[0].isel(scan_y=slice(part[0], part[1], step), scan_x=slice(part[2], part[3], step))
    np.testing.assert_allclose(fits[1].descan_y, kept.descan_y, atol=1e-6)
    np.testing.assert_allclose(fits[1].descan_x, kept.descan_x, atol=1e-6)


def test_bad_pixels_do_not_count_and_the_data_stay(scan_file, make_config, tmp_path):
    data = np.load(scan_file)
    clean = make_config(scan_file, "clean.zarr", crop={"align": "descan"})
    run(clean)
    hot = [[3, 4], [3, 5], [40, 50], [30, 20]]
    for y, x in hot:
        data[..., y, x] = 50_000
    np.save(tmp_path / "hot.npy", data)
    config = make_config(tmp_path / "hot.npy", "hot.zarr", crop={"align": "descan"})
    outcome = run(config)
    assert outcome.exit_code == 0
    one, other = analysis_of(config), analysis_of(clean)
    for name in ("center_y", "center_x", "descan_y"):
        np.testing.assert_allclose(one[name], other[name], atol=0.02)
    np.testing.assert_array_equal(np.argwhere(one["mask"].values & 2), sorted(hot))
    # retention is of the pixels that count
    patterns = xr.open_zarr(config.output.path)["patterns"].values.astype(np.int64)
    total = data.astype(np.int64)
    y, x = np.transpose(hot)
    total[..., y, x] = 0
    for index in np.ndindex(patterns.shape[:2]):
        kept = patterns[index].copy()
        places = np.array(hot) - [int(one.window_y[index]), int(one.window_x[index])]
        for a, b in places:
            if 0 <= a < kept.shape[0] and 0 <= b < kept.shape[1]:
                assert kept[a, b] == 50_000
                kept[a, b] = 0
        assert float(one.retention[index]) == kept.sum() / total[index].sum()


def test_they_count_if_asked(scan_file, make_config, tmp_path):
    data = np.load(scan_file)
    data[..., 3, 4] = 50_000
    np.save(tmp_path / "hot.npy", data)
    config = make_config(
        tmp_path / "hot.npy", analyze={"ignore_bad_pixels": False, "center_method": "centroid"}
    )
    run(config)
    found = analysis_of(config)
    np.testing.assert_allclose(found.total, data.sum(axis=(2, 3)))
    assert "mask" not in found  # nothing was surveyed


def test_what_the_survey_said_stays_when_a_run_goes_on(scan_file, make_config, tmp_path):
    config = make_config(scan_file, crop={"align": "descan"}, output={"chunk_mb": 0.05})

    def stop(step):
        if step.stage == "analyze":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, progress=stop)
    settled = json.loads((tmp_path / "out.run" / "run.json").read_text())["survey"]
    steps = []
    run(config, progress=lambda step: steps.append(step.stage))
    assert "survey" not in steps
    assert analysis_of(config).attrs["survey"] == settled
    whole = make_config(scan_file, "whole.zarr", crop={"align": "descan"})
    run(whole)
    xr.testing.assert_equal(analysis_of(config), analysis_of(whole))


def test_no_disc_is_a_centroid_and_says_why(tmp_path, make_config):
    noise = np.random.default_rng(0).poisson(2.0, (4, 4, 20, 20)).astype("u2")
    np.save(tmp_path / "noise.npy", noise)
    config = make_config(tmp_path / "noise.npy")
    outcome = run(config)
    assert analysis_of(config).attrs["center_method"] == "centroid"
    assert any("center      centroid: no direct disc (" in line for line in outcome.lines)
    with pytest.raises(ConfigError, match=r"no direct disc is found: .*give disc_radius"):
        sd.analyze(noise, center_method="disc")


def test_the_convergence_angle_gives_the_radius_where_none_can_be_told(tmp_path, make_config):
    patterns, centers, _ = scan(counts=0.5)  # about 45 electrons in the disc
    np.save(tmp_path / "dim.npy", patterns)
    scale = {"scale": 0.1, "units": "1/nm"}
    known = {"calibration": {"ky": scale, "kx": scale}, "beam_energy_kv": 200.0}
    blind = make_config(tmp_path / "dim.npy", "blind.zarr", input=known)
    run(blind)
    assert analysis_of(blind).attrs["center_method"] == "centroid"
    angle = 1e3 * 0.1 * RADIUS * 0.0025079  # alpha = wavelength * scale * radius
    config = make_config(tmp_path / "dim.npy", input=known, analyze={"convergence_mrad": angle})
    outcome = run(config)
    found = analysis_of(config)
    assert found.attrs["survey"]["radius"] == pytest.approx(RADIUS, rel=1e-3)
    assert np.nanmedian(distance(found, "center", centers)) < 1.2
    assert outcome.results["center"]["method"] == "disc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align": "descan"}, "needs what fit_descan|no fit of it"),
        ({"criterion": "scattered"}, "outside the direct disc|needs the direct disc"),
        ({"criterion": "k_max"}, "give either k_max or n_alpha"),
        ({"criterion": "k_max", "k_max": 2.0}, "the detector has no calibration"),
        ({"k_max": 2.0}, "expected a number above 0, with criterion k_max"),
    ],
)
def test_refusals_of_windows(options, message, scan_file):
    analysis = sd.analyze(sd.open(scan_file)).compute()
    with pytest.raises(ConfigError, match=message):
        sd.choose_window(analysis, **options)


def test_sizes_by_criterion(scan_file):
    analysis = sd.fit_descan(sd.analyze(sd.open(scan_file)).compute())
    around = {"align": "descan", "size_multiple": 1}
    window = sd.choose_window(analysis, criterion="k_max", n_alpha=2, **around)
    spread = np.abs(np.rint(analysis.center_y) - np.rint(analysis.descan_y)).values
    half = int(np.ceil(2 * json.loads(analysis.attrs["survey"])["radius"]))
    assert window.shape[0] in range(2 * half, 2 * half + 2 * int(spread.max()) + 1)


@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
def test_the_scattered_share_is_kept(target, tmp_path):
    """Against a slow twin: the smallest window around each beam that keeps the share of what the disc does not hold."""
    data, _, _ = scan(counts=40.0)
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:48, :52]
    ring = 6.0 * (np.abs(np.hypot(y - 22.4, x - 27.7) - 15) < 1.5)
    data = data + rng.poisson(ring, data.shape).astype("u2")
    analysis = sd.analyze(data, center_method="disc", target_retention=target).compute()
    window = sd.choose_window(
        analysis,
        align="pattern",
        criterion="scattered",
        coverage=1.0,
        margin_pixels=0,
        size_multiple=1,
    )
    radius, needed = json.loads(analysis.attrs["survey"])["radius"], 0
    for index in np.ndindex(data.shape[:2]):
        cy, cx = (float(analysis[f"center_{axis}"][index]) for axis in "yx")
        direct = int(data[index][np.hypot(y - cy, x - cx) <= radius + 1.5].sum())
        assert float(analysis.direct[index]) == direct
        total, r = int(data[index].sum()), int(np.ceil(radius + 2.5))
        ry, rx = round(cy), round(cx)
        while data[index][
            max(ry - r, 0) : ry + r, max(rx - r, 0) : rx + r
        ].sum() - direct < target * (total - direct):
            r += 1
        needed = max(needed, r)
    assert window.global_radius == needed


def test_a_job_by_scattered_intensity_is_the_same(scan_file, make_config):
    data = np.load(scan_file)
    y, x = np.mgrid[:48, :52]
    ring = 6.0 * (np.abs(np.hypot(y - 22.4, x - 27.7) - 15) < 1.5)
    data += np.random.default_rng(1).poisson(ring, data.shape).astype("u2")
    np.save(scan_file, data)
    crop = {"criterion": "scattered", "align": "pattern"}
    run(config := make_config(scan_file, crop=crop, output={"chunk_mb": 0.05}))
    found = analysis_of(config)
    analysis = sd.analyze(data).compute()
    window = sd.choose_window(analysis, **crop)
    assert found.attrs["window_size"] == list(window.shape)
    assert found.attrs["window_size"][0] > sd.choose_window(analysis, align="pattern").shape[0]
    scattered = found.retention_scattered.values
    assert (scattered >= 0.98).mean() >= 0.999


def test_another_target_by_scattered_intensity(scan_file, make_config):
    """The stored radii are of the target of their crop; another target is decided from the profiles."""
    data = np.load(scan_file)
    y, x = np.mgrid[:48, :52]
    ring = 6.0 * np.exp(-(((np.hypot(y - 22.4, x - 27.7) - 14) / 4) ** 2))
    data += np.random.default_rng(1).poisson(ring, data.shape).astype("u2")
    np.save(scan_file, data)
    run(config := make_config(scan_file, crop={"criterion": "scattered"}))
    stored = analysis_of(config)
    assert "radius_scattered" in stored
    fresh = sd.analyze(data, target_retention=0.5).compute()
    small = sd.choose_window(fresh, criterion="scattered").shape
    assert sd.choose_window(stored, criterion="scattered", target_retention=0.5).shape == small
    assert small < tuple(stored.attrs["window_size"])
    again = make_config(
        scan_file, "again.zarr", analyze={"from": config.output.path, "target_retention": 0.5},
        validate={"min_retention": 0.0},
    )  # fmt: skip
    run(again)
    assert "radius_scattered" not in analysis_of(again)


def test_a_pedestal_is_subtracted_for_the_analysis_alone(tmp_path, make_config):
    data = scan()[0] + np.uint16(7)
    np.save(tmp_path / "pedestal.npy", data)
    options = {"threshold": "auto", "background": "pedestal"}
    config = make_config(tmp_path / "pedestal.npy", analyze=options)
    run(config)
    found = analysis_of(config)
    survey = found.attrs["survey"]
    assert survey["pedestal"] == 7
    threshold = found.attrs["threshold"]
    counted = np.where(data >= threshold, data.astype(np.int64) - 7, 0)
    np.testing.assert_array_equal(found.total, counted.sum(axis=(2, 3)))
    kept = xr.open_zarr(config.output.path)["patterns"].values
    y, x = int(found.window_y[0, 0]), int(found.window_x[0, 0])
    np.testing.assert_array_equal(kept, data[..., y : y + kept.shape[2], x : x + kept.shape[3]])
    inside = counted[..., y : y + kept.shape[2], x : x + kept.shape[3]].sum(axis=(2, 3))
    np.testing.assert_array_equal(found.retention, inside / counted.sum(axis=(2, 3)))


def stopped(tmp_path):
    """A disc and a symmetric ring behind a round beam stop with an arm; the mask of it."""
    _, _, descan = scan(slope=(1.5, -1.0))
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:48, :52]
    far = np.hypot(y - descan[..., :1, None], x - descan[..., 1:, None])
    patterns = rng.poisson(60 * np.exp(-(((far - 13) / 3) ** 2)) + 200 * (far < 5)).astype("u2")
    mask = (np.hypot(y - 22, x - 28) < 8) | ((abs(x - 28) < 2) & (y > 22))
    patterns[..., mask] = 0
    np.save(tmp_path / "stop.npy", patterns)
    np.save(tmp_path / "mask.npy", mask)
    return descan


def test_the_beam_behind_a_stop(tmp_path, make_config):
    descan = stopped(tmp_path)
    config = make_config(
        tmp_path / "stop.npy", input={"mask": str(tmp_path / "mask.npy")},
        analyze={"center_method": "friedel"}, crop={"align": "descan"},
    )  # fmt: skip
    steps = []
    run(config, progress=lambda step: steps.append((step.number, step.stage, step.n_stages)))
    stages = [(1, "survey", 4), (2, "friedel", 4), (3, "analyze", 4), (4, "crop", 4)]
    assert [*dict.fromkeys(steps)] == stages
    found = analysis_of(config)
    assert np.median(distance(found, "center", descan)) < 0.15
    assert not found.deflection_y.any()
    np.testing.assert_array_equal(found["mask"].values & 1, np.load(tmp_path / "mask.npy"))
    patterns = sd.open(tmp_path / "stop.npy", mask=np.load(tmp_path / "mask.npy"))
    survey = sd.survey(patterns, center_method="friedel", mask=np.load(tmp_path / "mask.npy"))
    same = sd.analyze(patterns, center_method="friedel", survey=survey).compute()
    np.testing.assert_array_equal(same.center_y, found.center_y)


def test_a_stop_is_suggested_and_applied_only_if_asked(tmp_path, make_config):
    stopped(tmp_path)
    config = make_config(tmp_path / "stop.npy")
    outcome = run(config)
    assert any(
        "a dark region of" in text and "input.mask=stop" in text
        for text in outcome.results["warnings"]
    )
    assert analysis_of(config).attrs["center_method"] == "centroid"
    assert not (analysis_of(config)["mask"].values & 8).any()
    with pytest.raises(ConfigError, match="no beam stop is masked"):
        run(make_config(tmp_path / "stop.npy", "none.zarr", analyze={"center_method": "friedel"}))
    asked = make_config(
        tmp_path / "stop.npy",
        "stop.zarr",
        input={"mask": "stop"},
        analyze={"center_method": "friedel"},
    )
    run(asked)
    found = (analysis_of(asked)["mask"].values & 8) > 0
    mask = np.load(tmp_path / "mask.npy")
    assert (mask & ~found).sum() < 0.3 * mask.sum()
    assert found.sum() < 2.5 * mask.sum()


def test_the_gpu_says_what_it_lacks(scan_file):
    with pytest.raises(ConfigError, match="center_method disc is not available on the GPU"):
        sd.analyze(sd.open(scan_file), center_method="disc", device="gpu")


def test_discs_whose_center_is_off_the_detector():
    """No center is found for them, and the profile is taken about the nearest pixel."""
    patterns, centers, _ = scan(slope=(5.0, -1.5))
    cut = patterns[..., 20:, :]
    analysis = sd.analyze(cut, center_method="disc", disc_radius=RADIUS).compute()
    lost = np.isnan(analysis.center_y.values)
    assert lost[centers[..., 0] - 20 < -2].mean() > 0.5  # of the others too little is seen
    for axis, n in zip("yx", cut.shape[-2:], strict=True):
        found = np.rint(analysis[f"center_{axis}"].values[~lost])
        assert ((found >= 0) & (found < n)).all()
    assert np.isnan(analysis.center_spread.values[lost]).all()
    assert np.isfinite(analysis.radius.values).all()
    for align in ("fixed", "pattern"):
        window = sd.choose_window(analysis, align=align)
        checked = sd.validate(cut, sd.crop(cut, analysis, window), analysis).compute()
        assert int(checked.n_target) >= np.ceil(0.999 * lost.size)
