"""Figures that make a result trustworthy: scattered intensity kept, the scale from the disc, and a verdict on centers."""

import json
import shutil

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import stem_dask as sd
from stem_dask.core.errors import ConfigError
from stem_dask.job.results import center_quality, dose_of
from stem_dask.stages.calibrate import (
    calibrated_by_disc,
    disc_calibration,
    electron_wavelength_nm,
)
from stem_dask.stages.descan import fit_descan
from stem_dask.stages.survey import survey
from stem_dask.stages.validate import scattered_retention, scattered_statistics

DIMS = ("scan_y", "scan_x", "ky", "kx")

#: semi-angle in mrad of a disc of 5.5 px in a detector of 0.1 1/nm per px, at 200 kV
MRAD = 5.5 * 0.1 * electron_wavelength_nm(200.0) * 1e3


def drawn(shape=(5, 6), detector=(64, 60), radius=5.5, halo=0.6, moved=None, seed=2):
    """A disc about (31, 29) on a halo, moved by ``moved`` (scan_y, scan_x, 2)."""
    rng, out = np.random.default_rng(seed), np.empty((*shape, *detector), "u2")
    y, x = np.mgrid[: detector[0], : detector[1]]
    for index in np.ndindex(*shape):
        dy, dx = (0.0, 0.0) if moved is None else moved[index]
        distance = np.hypot(y - 31 - dy, x - 29 - dx)
        disc = 60 * (radius + 0.5 - distance).clip(0, 1)
        out[index] = rng.poisson(disc + halo * np.exp(-((distance / 18) ** 2)))
    return out


def calibrated(data, **attrs):
    """Patterns with 0.1 1/nm per pixel, 0 at the pixel (31, 29)."""
    axes = {"ky": 31, "kx": 29}
    coords = {
        name: (
            name,
            0.1 * (np.arange(n) - axes[name]),
            {"scale": 0.1, "offset": -0.1 * axes[name], "units": "1/nm"},
        )
        for name, n in zip(DIMS[2:], data.shape[2:], strict=True)
    }
    return xr.DataArray(data, dims=DIMS, coords=coords, attrs=attrs)


def stored_analysis(path):
    return xr.open_zarr(path, group="analysis")


# --- retention of what is scattered -----------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.integers(0, 10**6)] * 3), min_size=1, max_size=9))
def test_scattered_retention_against_its_twin(counts):
    total = np.array([a + b for a, b, _ in counts])
    direct = np.array([a for a, _, _ in counts])
    inside = np.array([min(c, a + b) for a, b, c in counts], float)
    for kept, i, d, t in zip(
        scattered_retention(inside, total, direct), inside, direct, total, strict=True
    ):
        if t - d < 1:
            assert np.isnan(kept)
        else:
            assert kept == (i - d) / (t - d)
            assert kept <= 1


def test_retention_of_a_run_against_sums_by_hand(tmp_path, make_config):
    data = drawn()
    data[1, 2] = 0
    np.save(tmp_path / "scan.npy", data)
    outcome = sd.run_config(make_config(tmp_path / "scan.npy", crop={"size": 32}, validate={"min_retention": 0.2}))  # fmt: skip
    analysis = stored_analysis(tmp_path / "out.zarr").load()
    y, x = np.mgrid[:64, :60]
    expected = np.full(data.shape[:2], np.nan)
    total = direct = lost = 0
    for index in np.ndindex(*data.shape[:2]):
        if not data[index].any():
            continue
        center = (float(analysis[f"center_{axis}"][index]) for axis in "yx")
        radius = analysis.attrs["survey"]["radius"] + 1.5
        cy, cx = center
        disc = data[index][(y - cy) ** 2 + (x - cx) ** 2 <= radius**2].sum()
        top, left = int(analysis.window_y[index]), int(analysis.window_x[index])
        inside = data[index][top : top + 32, left : left + 32].sum()
        expected[index] = (inside - disc) / (data[index].sum() - disc)
        total, direct = total + data[index].sum(), direct + disc
        lost += data[index].sum() - inside
    np.testing.assert_allclose(analysis.retention_scattered, expected, rtol=1e-12)
    assert analysis.retention_scattered.attrs["units"] == "1"
    validation = outcome.results["validation"]
    assert validation["mean_scattered_retention"] == pytest.approx(np.nanmean(expected))
    assert validation["min_scattered_retention"] == pytest.approx(np.nanmin(expected))
    assert validation["total_scattered_retention"] == pytest.approx(1 - lost / (total - direct))
    assert validation["direct_share"] == pytest.approx(direct / total)
    line = next(line for line in outcome.lines if line.startswith("keeps"))
    assert line == (
        f"keeps       {1 - lost / total:.1%} of the intensity, {1 - lost / (total - direct):.1%} of the scattered; "
        f"direct beam {direct / total:.0%}"
    )


def test_validate_gives_the_same():
    data = drawn(shape=(2, 3))
    analysis = sd.analyze(data).compute()
    window = sd.choose_window(analysis, size=32)
    found = sd.validate(data, sd.crop(data, analysis, window), analysis).compute()
    inside, total = found.retention.values * analysis.total.values, analysis.total.values
    expected = scattered_retention(np.rint(inside), total, analysis.direct.values)
    np.testing.assert_allclose(found.retention_scattered, expected)
    assert found.retention_scattered.values.min() < found.retention.values.min()


def test_without_a_disc_nothing_is_said_about_the_scattered(beam):
    analysis = sd.analyze(beam, center_method="centroid", ignore_bad_pixels=False).compute()
    window = sd.choose_window(analysis)
    assert "retention_scattered" not in sd.validate(beam, sd.crop(beam, analysis, window), analysis)
    assert scattered_statistics(analysis) == {}


# --- the scale from the disc ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv", "pm"), [(80, 4.1757), (200, 2.5079), (300, 1.9687), (1000, 0.8719)])
def test_wavelengths_of_the_tables(kv, pm):
    assert electron_wavelength_nm(kv) == pytest.approx(1e-3 * pm, rel=1e-4)


@pytest.mark.parametrize(
    ("scale", "units"),
    [(0.1, "1/nm"), (-0.1, "nm^-1"), (0.01, "1/Å"), (0.01, "A^-1"), (0.1 * electron_wavelength_nm(200) * 1e3, "mrad")],
)  # fmt: skip
def test_the_ratio_in_any_unit(scale, units):
    patterns = calibrated(drawn(), beam_energy_kv=200.0)
    found = survey(patterns)
    for name in ("ky", "kx"):
        values = scale * np.arange(patterns.sizes[name])
        patterns = patterns.assign_coords(
            {name: (name, values, {"scale": scale, "offset": 0.0, "units": units})}
        )
    calibration = disc_calibration(patterns, found, MRAD)
    assert calibration["ratio"] == pytest.approx(1, abs=0.03)
    assert calibration["scale_per_nm"] == pytest.approx(0.1, rel=0.03)
    assert calibration["scale_mrad"] == pytest.approx(MRAD / found.radius)


def test_nothing_without_energy_angle_or_disc():
    patterns = calibrated(drawn())
    found = survey(patterns)
    assert disc_calibration(patterns, found, MRAD) == {}
    patterns.attrs["beam_energy_kv"] = 200.0
    assert disc_calibration(patterns, found) == {}
    assert disc_calibration(patterns, None, MRAD) == {}
    patterns.attrs["convergence_angle_mrad"] = MRAD
    assert disc_calibration(patterns, found)["convergence_mrad"] == MRAD
    assert disc_calibration(patterns.drop_vars(["ky", "kx"]), found)["ratio"] is None


def test_the_zero_stays_at_its_pixel():
    patterns = calibrated(drawn(shape=(1, 1)))
    scaled = calibrated_by_disc(patterns, {"scale_per_nm": 0.25})
    assert scaled.ky.values[31] == pytest.approx(0, abs=1e-12)
    assert scaled.kx.values[29] == pytest.approx(0, abs=1e-12)
    assert scaled.ky.values[33] == pytest.approx(0.5)
    assert scaled.kx.attrs == {"scale": 0.25, "offset": pytest.approx(-7.25), "units": "1/nm"}


@pytest.fixture
def scan_file(tmp_path):
    """A scan of 0.125 1/nm per px by its file, and of 0.1 by its disc."""
    np.save(tmp_path / "scan.npy", drawn())
    axis = {"scale": 0.125, "units": "1/nm"}
    return {"path": str(tmp_path / "scan.npy"), "calibration": {"ky": axis, "kx": axis}}


def test_a_run_reports_the_scale_and_applies_it_when_asked(tmp_path, scan_file, make_config):
    options = {"input": {**scan_file, "beam_energy_kv": 200}, "validate": {"min_retention": 0.1}}
    crop = {"criterion": "k_max", "k_max": 2.0}
    reported = sd.run_config(
        make_config("", "a.zarr", **options, crop=crop, analyze={"convergence_mrad": MRAD})
    )
    found = reported.results["calibration"]
    assert found["ratio"] == pytest.approx(0.8, rel=0.03)
    assert not found["applied"]
    warning = next(text for text in reported.results["warnings"] if "convergence" in text)
    assert f"give {found['scale_per_nm']:.4g} 1/nm per px (± 3 %)" in warning
    assert "analyze.calibrate=disc takes that of the disc" in warning
    assert reported.results["window"]["size"] == [32, 32]  # 2.0 / 0.125
    assert xr.open_zarr(tmp_path / "a.zarr").ky.attrs["scale"] == 0.125

    analyze = {"convergence_mrad": MRAD, "calibrate": "disc"}
    applied = sd.run_config(make_config("", "b.zarr", **options, crop=crop, analyze=analyze))
    scale = found["scale_per_nm"]
    out = xr.open_zarr(tmp_path / "b.zarr")
    assert out.ky.attrs["scale"] == out.kx.attrs["scale"] == scale
    assert out.ky.attrs["units"] == "1/nm"
    half = int(np.ceil(2.0 / scale))
    assert applied.results["window"]["size"] == [2 * half] * 2
    stored = stored_analysis(tmp_path / "b.zarr")
    assert stored.attrs["calibration"] == {**found, "applied": True}
    assert stored.source_ky.attrs["scale"] == scale
    assert any(line.startswith(f"calibration {scale:.4g} 1/nm") for line in applied.lines)

    # a later crop may calibrate with the stored radius
    again = sd.run_config(
        make_config("", "c.zarr", **options, crop={"size": 32}, analyze={**analyze, "from": str(tmp_path / "a.zarr")})
    )  # fmt: skip
    assert again.results["calibration"] == applied.results["calibration"]
    assert xr.open_zarr(tmp_path / "c.zarr").kx.attrs["scale"] == scale


def test_a_file_without_calibration_gets_one(tmp_path, scan_file, make_config):
    options = {
        "input": {"path": scan_file["path"], "beam_energy_kv": 200},
        "validate": {"min_retention": 0.1},
    }
    analyze = {"convergence_mrad": MRAD, "calibrate": "disc"}
    crop = {"criterion": "k_max", "k_max": 2.0}
    outcome = sd.run_config(make_config("", **options, analyze=analyze, crop=crop))
    found = outcome.results["calibration"]
    assert found["ratio"] is None
    assert outcome.results["window"]["size"] == [2 * int(np.ceil(2.0 / found["scale_per_nm"]))] * 2
    assert not any("ky" in text for text in outcome.results["warnings"])


def test_a_conversion_is_calibrated_too(tmp_path, scan_file, make_config):
    analyze = {"convergence_mrad": MRAD, "calibrate": "disc"}
    options = {"input": {**scan_file, "beam_energy_kv": 200}, "crop": {"enabled": False}}
    sd.run_config(make_config("", **options, analyze=analyze))
    out = xr.open_zarr(tmp_path / "out.zarr")
    assert out.ky.attrs["scale"] == pytest.approx(0.1, rel=0.03)
    root = json.loads((tmp_path / "out.zarr" / "zarr.json").read_text())
    assert root["attributes"]["convergence_angle_mrad"] == MRAD


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {"convergence_mrad": 1.0}, r"does not state what it needs; give input\.beam_energy_kv"),
        ({"beam_energy_kv": 200}, {}, r"give analyze\.convergence_mrad, the semi-angle in mrad$"),
        ({}, {}, r"give input\.beam_energy_kv, in keV and analyze\.convergence_mrad"),
    ],
)  # fmt: skip
def test_a_calibration_that_lacks_something(scan_file, make_config, given, options, message):
    with pytest.raises(ConfigError, match=message):
        sd.run_config(
            make_config("", input={**scan_file, **given}, analyze={"calibrate": "disc", **options})
        )


def test_a_calibration_without_a_disc(tmp_path, make_config):
    np.save(tmp_path / "flat.npy", np.random.default_rng(1).poisson(1.0, (3, 3, 24, 24)).astype("u2"))  # fmt: skip
    analyze = {"calibrate": "disc", "convergence_mrad": 1.0, "center_method": "centroid"}
    config = make_config(tmp_path / "flat.npy", input={"beam_energy_kv": 200}, analyze=analyze)
    with pytest.raises(ConfigError, match=r"calibrate is disc, and no direct disc is found: .*; give analyze\.disc_radius"):  # fmt: skip
        sd.run_config(config)


# --- the verdict on centers -------------------------------------------------------------------------------------


def wandering(outliers=()):
    """Deflections by a plane over 8 x 9 positions, and a few more."""
    v, u = np.meshgrid(np.linspace(-1, 1, 8), np.linspace(-1, 1, 9), indexing="ij")
    moved = np.stack([2 * v, -1.5 * u + v], axis=-1)
    for index, shift in outliers:
        moved[index] += shift
    return moved


def test_outliers_are_named():
    moved = wandering([((2, 3), (0, 2.0)), ((5, 7), (-1.5, 0))])
    analysis = fit_descan(sd.analyze(drawn((8, 9), moved=moved)).compute())
    found = center_quality(analysis)
    assert found["outliers"] == [[2, 3], [5, 7]]
    assert found["n_outliers"] == 2
    assert (found["n_filled"], found["n_not_found"]) == (72, 0)
    assert 0.02 < found["s"] < 0.2
    assert 0 < found["center_spread"] < 0.3
    assert found["com_distance"] < 1


def test_no_more_than_five_are_named():
    moved = wandering([((i, i), (0, 1.5 + i / 10)) for i in range(7)])
    found = center_quality(fit_descan(sd.analyze(drawn((8, 9), moved=moved)).compute()))
    assert found["n_outliers"] == 7
    assert found["outliers"] == [[6, 6], [5, 5], [4, 4], [3, 3], [2, 2]]


def test_a_run_says_what_its_centers_are_worth(tmp_path, make_config):
    data = drawn((8, 9), moved=wandering([((2, 3), (0, 2.0))]))
    data[7, 8] = 0
    np.save(tmp_path / "scan.npy", data)
    outcome = sd.run_config(make_config(tmp_path / "scan.npy", validate={"min_retention": 0.1}))
    found = outcome.results["center"]
    assert (found["n_filled"], found["n_not_found"], found["outliers"]) == (71, 0, [[2, 3]])
    line = next(line for line in outcome.lines if line.startswith("center "))
    assert line.startswith("center      disc, radius 5.")
    assert line.endswith(f"{found['s']:.2f} px about a descan of order 1, 1 far from it: [2, 3]")
    assert not any("not credible" in text for text in outcome.results["verdict"])
    assert outcome.results["dose"] == {
        "median": float(np.median(data.sum(axis=(2, 3))[data.any(axis=(2, 3))])),
        "units": "counts",
    }


def test_discs_that_are_missing_make_a_verdict(tmp_path, make_config):
    data, rng = drawn((8, 9), moved=wandering()), np.random.default_rng(3)
    data[2:4] = rng.poisson(0.8, data[2:4].shape)
    np.save(tmp_path / "scan.npy", data)
    config = make_config(tmp_path / "scan.npy", validate={"min_retention": 0.1}, crop={"size": 40})
    outcome = sd.run_config(config)
    assert outcome.results["center"]["n_not_found"] == 18
    assert outcome.exit_code in (0, 4)
    text = next(text for text in outcome.results["verdict"] if "credible" in text)
    assert text.startswith("centers not credible: no disc was found in 18 of 72 patterns; look at")
    assert f"verdict     {text}" in outcome.lines


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ""),
        ({"n_not_found": 10}, ""),
        ({"n_not_found": 11}, "no disc was found in 11 of 100 patterns"),
        ({"s": 2.01}, "they scatter by 2.01 px about the descan, more than half of the disc's radius of 4.0 px"),
        ({"com_distance": 4.5}, "center of mass is more than 4.5 px away, beyond the disc's radius of 4.0 px"),
        ({"s": 3.0, "method": "centroid"}, ""),
    ],
)  # fmt: skip
def test_when_centers_are_not_credible(changed, words):
    from stem_dask.job.results import _centers_not_credible

    good = {"method": "disc", "disc_radius": 4.0, "n_filled": 100, "n_not_found": 0, "s": 0.1, "com_distance": 1.0}  # fmt: skip
    found = _centers_not_credible({**good, **changed})
    assert words in found
    assert bool(found) == bool(words)


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        ({}, (50.0, "counts")),
        ({"quantity": "Electrons (Counts)"}, (50.0, "electrons")),
        ({"quantity": "Intensity (a.u.)"}, (50.0, "counts")),
    ],
)
def test_electrons_only_where_the_metadata_say_so(signal, expected):
    analysis = xr.Dataset({"total": ("pattern", np.array([0.0, 40, 50, 60]))})
    found = dose_of(analysis, {"metadata": {"Signal": signal}})
    assert (found["median"], found["units"]) == expected
    assert dose_of(analysis, {})["units"] == "counts"


# --- images for HyperSpy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".hspy", ".zspy"])
def test_hyperspy_finds_images_of_the_scan(tmp_path, make_config, suffix):
    hs = pytest.importorskip("hyperspy.api")
    np.save(tmp_path / "scan.npy", drawn((4, 5), moved=wandering()[:4, :5]))
    axis = {"scale": 0.5, "units": "nm"}
    given = {"path": str(tmp_path / "scan.npy"), "calibration": {"scan_y": axis, "scan_x": axis}}
    options = {"input": given, "validate": {"min_retention": 0.1}}
    sd.run_config(make_config("", **options))
    analysis = stored_analysis(tmp_path / "out.zarr")
    contents = []
    for name in ("a", "b"):
        path = tmp_path / name / f"scan{suffix}"
        path.parent.mkdir()
        sd.run_config(make_config("", **{**options, "output": {"path": str(path)}}))
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    signal = hs.load(path)
    for name in ("total", "bright_field", "dark_field", "com_y", "com_x", "deflection_y", "deflection_x"):  # fmt: skip
        image = signal.metadata.Maps.get_item(name)
        assert type(image) is hs.signals.Signal2D
        np.testing.assert_array_equal(image.data, analysis[name].values.astype("f4"))
        x, y = image.axes_manager.signal_axes
        assert (x.name, x.size, x.scale, x.units) == ("x", 5, 0.5, "nm")
        assert (y.name, y.size, y.scale, y.units) == ("y", 4, 0.5, "nm")
    assert image.metadata.Signal.quantity == "column of the center - descan (px)"
    assert signal.metadata._HyperSpy.navigator.data.shape == (4, 5)
    # images are no metadata of the microscope
    assert "Maps" not in str(sd.open(path).attrs)


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_that_goes_on_counts_the_same_discs(tmp_path, make_config, monkeypatch, lost):
    np.save(tmp_path / "scan.npy", drawn((4, 5)))
    options = {"path": tmp_path / "scan.npy", "validate": {"min_retention": 0.1}}
    config = make_config(**options)
    with monkeypatch.context() as patch:
        patch.setattr("stem_dask.job.passes.discs_of", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sd.run_config(config)
    assert (tmp_path / "out.run" / "sample").is_dir()
    if lost:
        shutil.rmtree(tmp_path / "out.run" / "sample")
    assert sd.run_config(config).results["discs"] == {
        "inside": 1, "cut": 0, "outside": 0, "share_outside": 0.0,
    }  # fmt: skip
