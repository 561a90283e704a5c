"""The survey: the direct disc from a sample, and clear words where there is none."""

import json

import numpy as np
import pytest
from test_disc import disc

from stem_dask.kernels.disc import find_discs
from stem_dask.kernels.intensity import native
from stem_dask.kernels.symmetry import center_of_symmetry
from stem_dask.stages.survey import DEAD, GIVEN, HOT, NOT_FINITE, Survey, survey_of

SCAN, SHAPE = (10, 9), (72, 76)


def drawn(
    rng,
    *,
    radius=6.3,
    electrons=20000,
    scan=SCAN,
    shape=SHAPE,
    bragg=(),
    wander=(1.3, 1.8),
    haze=0.1,
):
    """Poisson patterns of a disc that wanders over the scan, Bragg discs (offset, intensity) about it, and the centers."""
    v, u = np.meshgrid(*(np.linspace(-1, 1, n) for n in scan), indexing="ij")
    centers = np.array(shape) / 2 + np.stack([wander[0] * v - 0.7 * u, 0.5 * v + wander[1] * u], -1)
    centers += rng.normal(0, 0.1, centers.shape)
    y, x = np.ogrid[: shape[0], : shape[1]]
    patterns = np.empty((*scan, *shape), "u2")
    for at in np.ndindex(*scan):
        near = np.exp(-np.hypot(y - centers[at][0], x - centers[at][1]) / (3 * radius))
        mean = haze * near / near.sum()
        for offset, share in (((0, 0), 1 - haze), *bragg):
            varying = share if offset == (0, 0) else share * rng.uniform(0.2, 1.8)
            mean = mean + varying * disc(shape, centers[at] + offset, radius) / np.pi / radius**2
        patterns[at] = rng.poisson(electrons * mean)
    return patterns, centers


def surveyed(patterns, **options):
    """The survey of the grid that TRUST samples, and the discs of all patterns."""
    scan = patterns.shape[:2]
    share = min(1, (256 / np.prod(scan)) ** 0.5)
    axes = [
        np.floor((np.arange(k := max(1, int(n * share))) + 0.5) * n / k).astype(int) for n in scan
    ]
    positions = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    survey = survey_of(patterns[tuple(positions.T)], positions, scan, **options)
    everywhere = np.argwhere(np.ones(scan, bool))
    discs = find_discs(
        native(patterns), survey.expected(everywhere), radius=survey.radius or 1.0, reach=survey.reach,
        good=survey.good, level=survey.level,
    )  # fmt: skip
    return survey, discs.center.reshape(*scan, 2)


def assert_within(centers, truth, goals):
    off = np.hypot(*np.moveaxis(centers - truth, -1, 0))
    assert np.isfinite(off).all()
    assert (np.array([np.median(off), np.percentile(off, 95), off.max()]) <= goals).all(), off


@pytest.mark.parametrize(
    ("name", "radius"),
    [
        ("nbed_strain_descan", 6.3),
        ("dpc_domains_descan", 13.4),
        ("amorphous_ring", 5.2),
        ("vacuum_reference", 6.3),
    ],
)
def test_discs_of_drawn_sets_meet_the_goals(shared_data, name, radius):
    pytest.importorskip("hdf5plugin")
    patterns, truth = shared_set(shared_data / "trust" / f"{name}.hspy")
    survey, centers = surveyed(patterns)
    assert survey.why == ""
    assert survey.radius == pytest.approx(radius, abs=0.12)
    assert_within(centers, truth, (0.1, 0.3, 0.5))


def shared_set(path):
    import h5py
    import hdf5plugin  # noqa: F401

    with h5py.File(path) as file:
        found = []
        file.visititems(
            lambda _, item: found.append(item) if getattr(item, "ndim", 0) == 4 else None
        )
        patterns = found[0][...]
    truth = json.loads(path.with_name(path.name.replace(".hspy", ".truth.json")).read_text())
    return patterns, np.array(truth["true_beam_centre"], float)


def test_overlapping_discs_are_refused_unless_the_radius_is_given(shared_data):
    patterns, truth = shared_set(shared_data / "trust" / "ptycho_overlap.hspy")
    survey, _ = surveyed(patterns)
    assert survey.radius is None
    assert "rim" in survey.why
    survey, _ = surveyed(patterns, radius=24.86)
    assert (survey.radius, survey.why) == (24.86, "")
    plane = survey.expected(np.argwhere(np.ones(truth.shape[:2], bool))).reshape(truth.shape)
    assert_within(plane, truth, (0.5, 0.8, 1.0))


def test_multislice_sets(shared_data):
    for name in ("au_np_descan_u16", "au_np_hot_dead_f32"):
        patterns, truth = shared_set(shared_data / "sim" / f"{name}.hspy")
        survey, centers = surveyed(patterns)
        assert survey.radius == pytest.approx(7.1, abs=0.25)
        assert_within(centers, truth, (0.25, 0.45, 0.55))  # the particle refracts the disc itself
        assert ((survey.flags & HOT) > 0).sum() == (12 if "hot" in name else 0)


def test_few_electrons_need_the_radius():
    patterns, truth = drawn(np.random.default_rng(1), radius=6.8, electrons=100)
    survey, _ = surveyed(patterns)
    assert survey.radius is None
    assert survey.why.endswith("expected 50%")
    survey, centers = surveyed(patterns, radius=6.8)
    assert survey.radius == 6.8
    assert_within(centers, truth, (0.8, 1.6, 4.0))


def test_brighter_bragg_discs_are_not_the_beam():
    bragg = [((20, 5), 1.5), ((-20, -5), 1.2), ((5, -20), 0.6), ((-5, 20), 0.6)]
    patterns, truth = drawn(np.random.default_rng(2), bragg=bragg)
    survey, centers = surveyed(patterns)
    assert survey.radius == pytest.approx(6.3, abs=0.1)
    assert_within(centers, truth, (0.1, 0.3, 0.5))


def test_a_beam_that_wanders_far_is_followed():
    patterns, truth = drawn(
        np.random.default_rng(3), wander=(13, -11), scan=(12, 12), shape=(90, 96)
    )
    survey, centers = surveyed(patterns)
    assert survey.radius == pytest.approx(6.3, abs=0.1)
    assert_within(centers, truth, (0.1, 0.3, 0.5))


def test_touching_discs_are_refused():
    turns = np.arange(6) * np.pi / 3
    bragg = [((16.4 * np.cos(a), 16.4 * np.sin(a)), 0.8) for a in turns]
    patterns, _ = drawn(np.random.default_rng(4), radius=8.2, bragg=bragg)
    for radius in (None, 8.2):
        survey, _ = surveyed(patterns, radius=radius)
        assert survey.radius is None
        assert survey.why
        assert survey.plane[0][1:] == survey.plane[1][1:] == (0, 0)


def test_a_cross_without_pixels_through_the_disc():
    patterns, truth = drawn(np.random.default_rng(5), radius=9.5)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    cross = (abs(y - 36) <= 1) | (abs(x - 38) <= 1)
    patterns[..., cross] = 0
    for radius in (None, 9.5):
        survey, centers = surveyed(patterns, given_mask=cross, radius=radius)
        assert survey.radius == pytest.approx(9.5, abs=0.15)
        assert_within(centers, truth, (0.2, 0.4, 0.6))
        assert ((survey.flags & GIVEN) > 0).tolist() == cross.tolist()


def test_under_a_beam_stop_the_survey_starts_at_the_center_of_symmetry(shared_data):
    patterns, truth = shared_set(shared_data / "trust" / "amorphous_ring.hspy")
    center = truth.mean((0, 1))
    y, x = np.mgrid[:128, :128] - (center + np.array([1.5, 2]))[:, None, None]
    covered = (np.hypot(y, x) < 9) | ((abs(y) < 4) & (x < 0))
    patterns[..., covered] = 0
    survey, _ = surveyed(patterns)
    assert survey.radius is None
    assert (survey.stop & covered).sum() > 0.95 * covered.sum()
    survey, _ = surveyed(patterns, given_mask=covered)
    assert survey.radius is None
    np.testing.assert_allclose(survey.start, center, atol=0.5)
    mean = patterns.mean((0, 1))
    found = center_of_symmetry(mean, survey.start, survey.good)
    np.testing.assert_allclose(found, center, atol=0.05)


def test_pedestal_and_threshold():
    rng = np.random.default_rng(6)
    patterns, truth = drawn(rng, radius=5.2)
    raised = (patterns + rng.poisson(2, patterns.shape)).astype("u2")
    survey, centers = surveyed(raised, threshold="auto", background="pedestal")
    assert (survey.pedestal, survey.level) == (2, 2)
    assert survey.noise == pytest.approx(1.4826)
    assert survey.threshold == pytest.approx(7.93, abs=0.01)
    assert_within(centers, truth, (0.1, 0.3, 0.5))
    survey, _ = surveyed(raised, threshold=3.0)
    assert (survey.pedestal, survey.threshold) == (0, 3)
    survey, _ = surveyed(patterns, threshold="auto", background="pedestal")
    assert (survey.pedestal, survey.level, survey.noise, survey.threshold) == (0, 0, 0, 0)
    # dark-subtracted: as many negative as positive values
    signed = patterns.astype("i2") + np.rint(rng.normal(0, 3, patterns.shape)).astype("i2")
    survey, centers = surveyed(signed, threshold="auto", background="pedestal")
    assert survey.pedestal <= 1
    assert survey.threshold == pytest.approx(12, abs=3)
    assert_within(centers, truth, (0.1, 0.3, 0.5))


def test_float_patterns_and_pixels_that_are_never_finite():
    patterns, truth = drawn(np.random.default_rng(7))
    floats = patterns.astype("f4") * 0.37
    floats[..., 40, 44], floats[..., 5, 6], floats[0, 0, 7, 7] = np.nan, np.inf, np.nan
    survey, centers = surveyed(floats)
    assert np.argwhere(survey.flags & NOT_FINITE).tolist() == [[5, 6], [40, 44]]
    assert_within(centers, truth, (0.1, 0.3, 0.5))


def test_hot_and_dead_pixels_change_little():
    patterns, truth = drawn(np.random.default_rng(8))
    clean, _ = surveyed(patterns)
    assert not clean.flags.any()
    patterns[..., 30, 31], patterns[..., 30, 32], patterns[..., 60, 9] = 6000, 5000, 900
    patterns[..., 37, 40] = 0
    survey, centers = surveyed(patterns)
    assert np.argwhere(survey.flags & HOT).tolist() == [[30, 31], [30, 32], [60, 9]]
    assert np.argwhere(survey.flags & DEAD).tolist() in ([], [[37, 40]])
    assert survey.radius == pytest.approx(clean.radius, abs=0.05)
    assert_within(centers, truth, (0.1, 0.3, 0.5))
    assert not surveyed(patterns, find_bad=False)[0].flags.any()


def test_empty_patterns_do_not_matter_unless_all_are():
    patterns, truth = drawn(np.random.default_rng(9))
    patterns[::3, ::2] = 0
    survey, centers = surveyed(patterns)
    filled = patterns.any(axis=(2, 3))
    assert np.isnan(centers[~filled]).all()
    assert_within(centers[filled][None], truth[filled][None], (0.1, 0.3, 0.5))
    survey, _ = surveyed(patterns * np.uint16(0))
    assert survey.radius is None
    assert survey.why == "all patterns of the sample are empty"


def test_a_list_of_patterns_has_one_place():
    patterns, truth = drawn(np.random.default_rng(10), wander=(0.5, 0.6))
    sample = patterns.reshape(-1, *SHAPE)
    survey = survey_of(sample, np.arange(90)[:, None], (90,))
    expected = survey.expected([[3], [80]])
    assert expected[0].tolist() == expected[1].tolist()
    np.testing.assert_allclose(expected[0], truth.mean((0, 1)), atol=0.3)
    assert survey.radius == pytest.approx(6.3, abs=0.1)


@pytest.mark.parametrize("scan", [(1, 40), (40, 1), (3, 3), (1, 1), (2, 30)])
def test_few_rows_or_columns(scan):
    patterns, truth = drawn(np.random.default_rng(11), scan=scan, wander=(0.6, 0.6))
    survey, centers = surveyed(patterns)
    assert survey.radius == pytest.approx(6.3, abs=0.15)
    assert_within(centers, truth, (0.12, 0.3, 0.5))


def test_a_disc_at_the_detector_edge():
    patterns, truth = drawn(np.random.default_rng(12), radius=7.0, wander=(0.8, 0.8))
    patterns, truth = patterns[:, :, 33:], truth - [33, 0]  # its upper third is off
    survey, centers = surveyed(np.ascontiguousarray(patterns), radius=7.0)
    off = np.hypot(*np.moveaxis(centers - truth, -1, 0))
    assert survey.radius == 7
    assert np.nanmedian(off) < 0.25
    assert np.isfinite(off).mean() > 0.9


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (2, 9), (5, 64), (12, 12)])
@pytest.mark.parametrize("dtype", ["u2", "f4", "?", "i4"])
def test_a_tiny_detector_has_no_disc_and_never_fails(shape, dtype):
    sample = np.random.default_rng(13).integers(0, 4, (30, *shape)).astype(dtype)
    positions = np.argwhere(np.ones((5, 6), bool))
    survey = survey_of(sample, positions, (5, 6), threshold="auto", background="pedestal")
    assert survey.radius is None
    assert survey.why
    assert np.isfinite(survey.expected(positions)).all()
    given = survey_of(sample, positions, (5, 6), radius=2.5, start=(0, 0))
    assert np.isfinite(given.expected(positions)).all()


def test_nothing_is_looked_for_unless_asked():
    patterns, _ = drawn(np.random.default_rng(14))
    survey, _ = surveyed(patterns, find_disc=False, find_bad=False)
    assert (survey.radius, survey.why) == (None, "")
    survey, _ = surveyed(patterns, start=(36.0, 38.0))
    assert survey.start == (36, 38)


def test_a_survey_survives_json():
    patterns, _ = drawn(np.random.default_rng(15))
    patterns[..., 60, 9] = 900
    mask = np.zeros(SHAPE, bool)
    mask[3:5, 7] = True
    survey, _ = surveyed(patterns, given_mask=mask)
    again = Survey.from_dict(json.loads(json.dumps(survey.to_dict())))
    assert again.to_dict() == survey.to_dict()
    assert again.flags.tobytes() == survey.flags.tobytes()
    assert again.flags.dtype == np.uint8
    assert (again.plane, again.start, again.scan_shape) == (survey.plane, survey.start, SCAN)
    everywhere = np.argwhere(np.ones(SCAN, bool))
    assert again.expected(everywhere).tobytes() == survey.expected(everywhere).tobytes()


def test_the_survey_changes_no_sample():
    patterns, _ = drawn(np.random.default_rng(16), scan=(4, 4))
    sample, before = patterns.reshape(-1, *SHAPE), patterns.copy()
    sample.setflags(write=False)
    survey_of(sample, np.argwhere(np.ones((4, 4), bool)), (4, 4))
    assert sample.tobytes() == before.tobytes()
