"""A vacuum scan as reference for the descan: its analysis or its file, what is refused, and when it has changed."""

import json
import os
import shutil

import numpy as np
import pytest
import xarray as xr

import stem_dask as sd
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.job.plan import prepare
from stem_dask.job.run import run as run_job
from stem_dask.writers.synthetic import Synthetic, beam_centers, write_dataset

VACUUM = Synthetic((8, 9), (48, 44), disc_radius=5, spots=0, electrons=4000, seed=1)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A vacuum scan, and the same scan of a specimen whose field deflects the beam by up to 1.5 px in y, linearly."""
    folder = tmp_path_factory.mktemp("scans")
    write_dataset(folder / "vacuum.dm4", VACUUM)
    shape, (height, width) = VACUUM.scan_shape, VACUUM.detector_shape
    cy, cx = beam_centers(VACUUM)
    field = np.broadcast_to(np.linspace(-1.5, 1.5, shape[1]), shape)
    y, x = np.ogrid[:height, :width]
    far = np.hypot(y - (cy + field)[..., None, None], x - cx[..., None, None])
    mean = 60 * np.clip(5.5 - far, 0, 1) + 0.05
    np.save(folder / "specimen.npy", np.random.default_rng(0).poisson(mean).astype("u2"))
    return folder


@pytest.fixture
def here(scans, tmp_path):
    for name in ("vacuum.dm4", "specimen.npy"):
        shutil.copy(scans / name, tmp_path)
    return tmp_path


def made(config):
    outcome = run_job(config)
    assert outcome.exit_code == 0
    return outcome


def off(store, part=(slice(None), slice(None))):
    """Distance of the fitted descan from the true one, up to a constant, which no reference fixes."""
    found = xr.open_zarr(store, group="analysis")
    wrong = np.stack(
        [found[f"descan_{a}"] - b[part] for a, b in zip("yx", beam_centers(VACUUM), strict=True)]
    )
    return np.linalg.norm(wrong - wrong.mean((1, 2), keepdims=True), axis=0)


def vacuum_in(kind, make_config, here):
    """The vacuum scan as a user may have it."""
    raw = here / "vacuum.dm4"
    crop, whole = {"align": "pattern"}, {"crop": {"enabled": False}, "analyze": {"ahead": True}}
    if kind == "file":
        return raw
    if kind == "analysis":
        made(make_config(raw, "vacuum.zarr", **whole))
    elif kind == "analysis beside it":
        made(make_config(raw, "vacuum.hspy", **whole))
        return here / "vacuum.hspy"
    else:
        centers = {"center_method": "centroid"} if kind == "crop without a fit" else {}
        made(make_config(raw, "vacuum.zarr", crop=crop, analyze=centers))
        stored = xr.open_zarr(here / "vacuum.zarr", group="analysis")
        assert ("descan" in stored.attrs) == (not centers)
    return here / "vacuum.zarr"


@pytest.mark.parametrize(
    "kind", ["file", "analysis", "analysis beside it", "crop", "crop without a fit"]
)
def test_a_linear_field_stays_in_the_deflection(kind, here, make_config, connects):
    reference = vacuum_in(kind, make_config, here)
    descan, crop = {"reference": str(reference)}, {"align": "descan"}
    results = made(make_config(here / "specimen.npy", descan=descan, crop=crop)).results
    assert not any("without a vacuum scan" in text for text in results["warnings"])
    assert off(here / "out.zarr").max() < 0.1
    found = xr.open_zarr(here / "out.zarr", group="analysis")
    assert found.attrs["descan"]["reference"]
    slope = np.polyfit(np.linspace(-1.5, 1.5, 9), found.deflection_y.values.mean(0), 1)[0]
    assert slope == pytest.approx(1, abs=0.1)


def test_without_it_the_field_is_taken_for_descan(here, make_config, connects):
    results = made(make_config(here / "specimen.npy", crop={"align": "descan"})).results
    assert any("without a vacuum scan" in text for text in results["warnings"])
    assert off(here / "out.zarr").max() > 1


@pytest.mark.parametrize("kind", ["file", "analysis"])
def test_a_part_of_the_scan_takes_its_part_of_the_surface(kind, here, make_config, connects):
    reference = vacuum_in(kind, make_config, here)
    config = make_config(
        here / "specimen.npy",
        input={"path": str(here / "specimen.npy"), "scan_roi": [2, 8, 1, 9], "scan_step": 2},
        descan={"reference": str(reference)},
    )
    made(config)
    assert off(here / "out.zarr", (slice(2, 8, 2), slice(1, 9, 2))).max() < 0.1


def test_another_scan_is_refused_before_anything_is_read(here, make_config):
    np.save(here / "other.npy", np.ones((8, 8, 48, 44), "u2"))
    config = make_config(here / "specimen.npy", descan={"reference": str(here / "other.npy")})
    with pytest.raises(
        ConfigError, match=r"other.npy, with 8 x 8 positions, and the input is a scan of 8 x 9"
    ):
        prepare(config)
    np.save(here / "list.npy", np.ones((72, 48, 44), "u2"))
    config = make_config(here / "list.npy", descan={"reference": str(here / "vacuum.dm4")})
    with pytest.raises(ConfigError, match="the input is a list of patterns"):
        prepare(config)
    config = make_config(here / "specimen.npy", descan={"reference": str(here / "none.dm4")})
    with pytest.raises(SourceError, match=r"descan.reference: .*none.dm4"):
        prepare(config)


def test_patterns_that_lost_their_descan_are_refused(here, make_config, connects):
    made(make_config(here / "vacuum.dm4", "aligned.hspy", crop={"align": "pattern"}))
    config = make_config(here / "specimen.npy", descan={"reference": str(here / "aligned.hspy")})
    with pytest.raises(ConfigError, match="cut around its own beam"):
        prepare(config)


def test_a_scan_with_a_specimen_or_without_a_disc_says_whose_fault_it_is(
    here, make_config, connects
):
    np.save(here / "flat.npy", np.ones((8, 9, 48, 44), "u2"))
    config = make_config(here / "specimen.npy", descan={"reference": str(here / "flat.npy")})
    with pytest.raises(ConfigError, match=r"descan.reference: .*no direct disc"):
        run_job(config)


def test_a_changed_reference_makes_another_result(here, make_config, connects):
    vacuum = here / "vacuum.dm4"
    config = make_config(here / "specimen.npy", descan={"reference": str(vacuum)})
    plan = prepare(config)
    made(config)
    assert prepare(config).complete
    stated = json.loads((here / "out_results.json").read_text())
    assert stated["config"]["descan"]["reference"] == str(vacuum)
    os.utime(vacuum, ns=(0, os.stat(vacuum).st_mtime_ns + 1))
    assert not plan.is_current()
    with pytest.raises(sd.OutputExistsError, match=r"made with other options \(descan.reference\)"):
        prepare(config)
    # the analysis itself does not depend on it
    again = make_config(
        here / "specimen.npy", "again.zarr", descan={"reference": str(vacuum)},
        analyze={"from": str(here / "out.zarr")},
    )  # fmt: skip
    assert prepare(again).precomputed is not None


def test_the_shared_set(shared_data, make_config, connects, tmp_path):
    """The fit of the vacuum scan, moved onto the crystal, against the true descan."""
    trust = shared_data / "trust"
    truth = json.loads((trust / "nbed_strain_descan.truth.json").read_text())
    true = np.array(truth["true_beam_centre"]) - truth["deflection"]
    config = make_config(
        trust / "nbed_strain_descan.hspy",
        crop={"align": "descan"},
        descan={"reference": str(trust / "vacuum_reference.hspy")},
    )
    made(config)
    found = xr.open_zarr(tmp_path / "out.zarr", group="analysis")
    wrong = np.stack([found.descan_y, found.descan_x], -1) - true
    distances = np.percentile(np.linalg.norm(wrong, axis=-1), [50, 95, 100])
    assert (distances <= (0.05, 0.1, 0.15)).all(), distances
