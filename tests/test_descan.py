"""The surface of descan: against a slow twin, its laws, and the true beams of drawn sets."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_dask.kernels.descan import (
    MOST,
    Descan,
    descan_weight,
    fit_constant,
    fit_descan,
    scan_coordinates,
)


def terms(order, v, u):
    """One row per position."""
    columns = [(i, j) for n in range(order + 1) for i in range(n, -1, -1) for j in [n - i]]
    return np.array([[a**i * b**j for i, j in columns] for a, b in zip(v, u, strict=True)])


def least_squares(design, beams, weight):
    root = np.sqrt(weight)[:, None]
    return np.linalg.lstsq(root * design, root * beams, rcond=None)[0]


def robust(design, beams, weight):
    found = least_squares(design, beams, weight)
    for _ in range(30):
        r = np.linalg.norm(beams - design @ found, axis=1)
        found = least_squares(design, beams, weight / np.maximum(r, 0.02))
    for _ in range(60):
        r = np.linalg.norm(beams - design @ found, axis=1)
        c = 4.685 * max(np.median(r) / 1.1774, 0.02)
        before, found = (
            found,
            least_squares(design, beams, weight * np.where(r < c, (1 - (r / c) ** 2) ** 2, 0)),
        )
        if abs(found - before).max() < 1e-10:
            break
    r = np.linalg.norm(beams - design @ found, axis=1)
    return found, max(np.median(r) / 1.1774, 0.02)


def twin(y, x, weight, order):
    """Coefficients, s, error of cross-validation and leverage; every position of the scan one after the other."""
    height, width = y.shape
    at = [(i, j) for i in range(height) for j in range(width) if np.isfinite(y[i, j])]
    v = [2 * i / (height - 1) - 1 for i, _ in at]
    u = [2 * j / (width - 1) - 1 for _, j in at]
    beams = np.array([(y[place], x[place]) for place in at])
    w = np.array([weight[place] for place in at])
    design = terms(order, v, u)
    found, s = robust(design, beams, w)
    fold = np.array([(4 * i // height + 4 * j // width) % 4 for i, j in at])
    off = np.empty(len(at))
    for held in range(4):
        others = fold != held
        fit, _ = robust(design[others], beams[others], w[others])
        off[~others] = np.linalg.norm(beams - design @ fit, axis=1)[~others]
    ranked = np.argsort(off)
    half = np.cumsum(w[ranked]) >= w.sum() / 2
    full = terms(2, v, u)
    inverse = np.linalg.inv(full.T @ (w[:, None] / w.max() * full))
    corners = terms(2, [-1, -1, 1, 1], [-1, 1, -1, 1])
    variance = max(corner @ inverse @ corner for corner in corners)
    return found.T, s, off[ranked][half][0], s * variance**0.5


def surface(rng, order, shape, scale=3.0):
    """A random polynomial (2, terms) and its values."""
    coefficients = rng.uniform(-scale, scale, (2, (1, 3, 6)[order]))
    coefficients[:, 0] += 64
    return coefficients, Descan(coefficients, order, 0.02).at(shape)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("shape", [(9, 13), (16, 5)])
def test_the_twin(order, shape):
    rng = np.random.default_rng(order)
    _, d = surface(rng, order, shape)
    y, x = np.moveaxis(d + rng.normal(0, 0.1, d.shape), -1, 0).copy()
    spread = np.abs(rng.normal(0, 0.2, shape))
    y[2:5, 1:4] += rng.normal(0, 4, (3, 3))
    x[rng.random(shape) < 0.1] = y[np.isnan(x)] = np.nan
    y[np.isnan(x)] = np.nan
    weight = descan_weight(spread)
    found = fit_descan(y, x, weight, order=order)
    coefficients, s, error, leverage = twin(y, x, weight, order)
    np.testing.assert_allclose(found.coefficients, coefficients, atol=1e-7)
    np.testing.assert_allclose([found.s, found.leverage], [s, leverage], rtol=1e-6)
    assert found.cv == {}
    auto = fit_descan(y, x, weight)
    np.testing.assert_allclose(auto.cv[order], error, rtol=1e-6)
    assert auto.order == order


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2), st.integers(0, 2))
def test_a_polynomial_of_whole_pixels_is_followed(seed, order, lower):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(5, 20)), int(rng.integers(5, 20)))
    _, d = surface(rng, order, shape)
    beam = d + rng.normal(0, 0.2, d.shape)
    beam[: shape[0] // 3] += rng.normal(0, 5, 2)
    whole = rng.integers(-30, 30, (2, (1, 3, 6)[min(lower, order)])).astype(float)
    added = Descan(whole, min(lower, order), 0.02).at(shape)
    before, after = (fit_descan(b[..., 0], b[..., 1], order=order) for b in (beam, beam + added))
    np.testing.assert_allclose(after.at(shape), before.at(shape) + added, atol=1e-6)
    np.testing.assert_allclose(beam + added - after.at(shape), beam - before.at(shape), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2), st.floats(8, 1e4), st.booleans())
def test_a_third_of_the_beams_may_be_anywhere(seed, order, least, together):
    """From 8 s on; moved by 5 to 7 s into one direction they still have a little weight."""
    rng = np.random.default_rng(seed)
    shape = (50, 60)
    beam = surface(rng, order, shape)[1] + rng.normal(0, 0.1, (*shape, 2))
    moved = rng.permuted(np.arange(3000) < 1000).reshape(shape)
    angle = rng.uniform(0, 2 * np.pi, () if together else shape)
    distance = 0.1 * least * (1 if together else rng.uniform(1, 3, shape))
    offset = np.stack([distance * np.sin(angle), distance * np.cos(angle)], -1)
    other = beam + moved[..., None] * offset
    clean, found = (fit_descan(b[..., 0], b[..., 1], order=order) for b in (beam, other))
    off = np.abs(found.at(shape) - clean.at(shape)).max()
    assert off < 0.1 * clean.s * np.sqrt((1, 3, 6)[order])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2), st.integers(1, 3), st.integers(0, 4))
def test_parts_of_the_scan_have_the_same_surface(seed, order, step, first):
    """scan_step and scan_roi: the beams lie on a surface, and the coordinates are those of the whole scan."""
    rng = np.random.default_rng(seed)
    shape = (24, 21)
    _, d = surface(rng, order, shape)
    part = (slice(first, None, step), slice(None, 19, step))
    v, u = (scan_coordinates(n)[some] for n, some in zip(shape, part, strict=True))
    y, x = np.moveaxis(d[part], -1, 0)
    for chosen in (order, "auto"):
        found = fit_descan(y, x, order=chosen, v=v, u=u)
        assert found.order == order
        np.testing.assert_allclose(found.at(shape), d, atol=1e-9)
        np.testing.assert_array_equal(found.at_points(v[:, None], u), found.at(shape)[part])


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("amorphous_ring", (0.05, 0.1, 0.15)),
        ("nbed_strain_descan", (0.05, 0.1, 0.15)),
        ("vacuum_reference", (0.05, 0.1, 0.15)),
        ("dpc_domains_descan", (0.35, 0.8, 1.0)),
    ],
)
def test_true_beams_with_noise(name, goal, shared_data):
    truth = json.loads((shared_data / "trust" / f"{name}.truth.json").read_text())
    beam, deflection = (np.array(truth[key]) for key in ("true_beam_centre", "deflection"))
    noisy = beam + np.random.default_rng(1).normal(0, 0.1, beam.shape)
    found = fit_descan(noisy[..., 0], noisy[..., 1])
    off = np.linalg.norm(found.at(beam.shape[:2]) - (beam - deflection), axis=-1)
    assert (np.percentile(off, [50, 95, 100]) <= goal).all()
    # nbed_strain_descan and its reference are a plane and a weak quadratic of 0.3 px
    assert found.order == (2 if name in ("nbed_strain_descan", "vacuum_reference") else 1)
    assert found.leverage < 0.25


def test_centers_of_mass_of_overlapping_discs(shared_data):
    truth = json.loads((shared_data / "trust" / "ptycho_overlap.truth.json").read_text())
    center, beam = (np.array(truth[key]) for key in ("com_noise_free", "true_beam_centre"))
    found = fit_descan(center[..., 0], center[..., 1])
    off = np.linalg.norm(found.at(beam.shape[:2]) - beam, axis=-1)
    assert (np.percentile(off, [50, 95, 100]) <= (0.5, 0.8, 1.0)).all()
    assert found.order == 1
    assert found.s > 0.25


def test_a_vacuum_reference_tells_a_field_from_descan(shared_data):
    """A field that grows over the scan is taken for descan, unless the shape is known from vacuum."""
    truth = json.loads((shared_data / "trust" / "vacuum_reference.truth.json").read_text())
    vacuum = np.array(truth["true_beam_centre"])
    rng = np.random.default_rng(3)
    noisy = vacuum + rng.normal(0, 0.1, vacuum.shape)
    reference = fit_descan(noisy[..., 0], noisy[..., 1])
    field = np.zeros_like(vacuum)
    field[4:] = np.linspace(0, 2, vacuum.shape[0] - 4)[:, None, None]
    beam = vacuum + 5 + field + rng.normal(0, 0.1, vacuum.shape)
    region = np.zeros(vacuum.shape[:2], bool)
    region[:4] = True
    found = fit_constant(reference, beam[..., 0], beam[..., 1], region=region)
    off = np.linalg.norm(found.at(vacuum.shape[:2]) - vacuum - 5, axis=-1)
    assert (np.percentile(off, [50, 95, 100]) <= (0.05, 0.1, 0.15)).all()
    np.testing.assert_array_equal(found.coefficients[:, 1:], reference.coefficients[:, 1:])
    assert found.leverage == reference.leverage
    alone = fit_descan(beam[..., 0], beam[..., 1])
    assert np.linalg.norm(alone.at(vacuum.shape[:2]) - vacuum - 5, axis=-1).max() > 0.5


@pytest.mark.parametrize("noise", [0.01, 0.1])
@pytest.mark.parametrize("order", ["auto", 0, 1, 2])
def test_five_rows_of_vacuum_do_not_reach_far(noise, order):
    rng = np.random.default_rng(0)
    beam = surface(rng, 1, (26, 20))[1] + rng.normal(0, noise, (26, 20, 2))
    region = np.zeros((26, 20), bool)
    region[:5] = True
    beam[5:] += rng.normal(0, 3, (21, 20, 2))
    assert fit_descan(beam[..., 0], beam[..., 1], order=order, region=region).leverage > 0.25
    assert fit_descan(*np.moveaxis(beam, -1, 0), order=1, region=~region[::-1]).leverage > 0.25


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (3, 30), (30, 2)])
def test_short_axes_have_no_terms(shape):
    rng = np.random.default_rng(1)
    along = 1 if shape[0] < 4 else 0
    _, d = surface(rng, 2, (1, shape[1]) if along else (shape[0], 1))
    d = np.broadcast_to(d, (*shape, 2))
    beam = d + rng.normal(0, 0.02, d.shape)
    found = fit_descan(beam[..., 0], beam[..., 1])
    assert found.order == 2
    np.testing.assert_allclose(found.at(shape), d, atol=0.05)
    gone = [1, 3, 4] if along == 1 else [2, 4, 5]
    assert (found.coefficients[:, gone] == 0).all()
    assert found.leverage < 0.25


def test_a_bowl_is_found_though_no_plane_is_better_than_a_constant():
    v, u = scan_coordinates(20)[:, None], scan_coordinates(21)
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 20, 21))
    found = fit_descan(60 + 2 * (v * v + u * u) + noise[0], 64 + v * u + noise[1])
    assert found.order == 2
    assert found.cv[1] > 2 / 3 * found.cv[0]


def test_three_by_three_is_a_constant():
    _, d = surface(np.random.default_rng(0), 1, (3, 3))
    found = fit_descan(d[..., 0], d[..., 1], order=0)
    assert np.ptp(found.at((3, 3)), axis=(0, 1)).tolist() == [0, 0]


@pytest.mark.parametrize(("n", "order"), [(2, "auto"), (2, 0), (8, 1), (17, 2)])
def test_too_few(n, order):
    y = np.full((9, 8), np.nan)
    y.flat[np.random.default_rng(0).permutation(72)[:n]] = 60
    with pytest.raises(ValueError, match=rf"descan.order {order}: {n} beams found, expected at"):
        fit_descan(y, y, order=order)


@pytest.mark.parametrize(("n", "most"), [(3, 0), (8, 0), (11, 0), (30, 1)])
def test_auto_lowers_the_order(n, most):
    rng = np.random.default_rng(2)
    _, d = surface(rng, 2, (9, 8))
    d[rng.permuted(np.arange(72) >= n).reshape(9, 8)] = np.nan
    assert fit_descan(d[..., 0], d[..., 1]).order >= most
    assert fit_descan(d[..., 0], d[..., 1]).order <= (n >= 9) + (n >= 18)


def test_beams_on_a_line_tell_no_plane():
    _, d = surface(np.random.default_rng(2), 0, (20, 20))
    y, x = np.moveaxis(d, -1, 0)
    row, diagonal = np.zeros((2, 20, 20), bool)
    row[7] = True
    np.fill_diagonal(diagonal, True)
    for line in (row, diagonal):
        with pytest.raises(ValueError, match=r"too few rows or columns.* descan.order=0"):
            fit_descan(y, x, order=1, region=line)
        found = fit_descan(y, x, region=line)
        assert found.order == 0
        assert found.leverage == np.inf


def test_a_narrow_region_is_fitted_as_well():
    _, d = surface(np.random.default_rng(4), 2, (512, 30))
    region = np.zeros((512, 30), bool)
    region[200:204] = True
    found = fit_descan(d[..., 0], d[..., 1], order=2, region=region)
    np.testing.assert_allclose(found.at((512, 30))[region], d[region], atol=1e-9)
    np.testing.assert_allclose(found.at((512, 30)), d, atol=1e-3)


def test_lists_have_no_scan():
    with pytest.raises(ValueError, match=r"shape \(9,\), expected \(scan_y, scan_x\): a list"):
        fit_descan(np.ones(9), np.ones(9))


def test_what_has_no_weight_has_no_part():
    rng = np.random.default_rng(5)
    _, d = surface(rng, 1, (12, 10))
    y, x = np.moveaxis(d + rng.normal(0, 0.1, d.shape), -1, 0).copy()
    spread = np.zeros((12, 10))
    spread[3, 2:6] = np.nan
    weight = descan_weight(spread)
    before = fit_descan(y, x, weight)
    weight[5] = 0
    y[3, 2:6] = 1e9
    region = np.ones((12, 10), bool)
    region[5] = False
    y[5], x[3, 3] = np.inf, np.nan
    after = fit_descan(y, x, weight)
    assert before.order == after.order == 1
    np.testing.assert_array_equal(
        after.coefficients, fit_descan(y, x, weight, region=region).coefficients
    )


def test_uneven_discs_count_less():
    """The specimen turns the surface, unless the spread of its discs is known."""
    rng = np.random.default_rng(6)
    _, d = surface(rng, 0, (20, 20))
    y, x = np.moveaxis(d + rng.normal(0, 0.05, d.shape), -1, 0).copy()
    spread = np.full((20, 20), 0.02)
    spread[8:], y[8:] = 0.8, y[8:] + rng.normal(0, 0.8, (12, 20)) + 0.7
    off = [np.abs(fit_descan(y, x, w, order=1).at((20, 20)) - d).max() for w in (1, descan_weight(spread))]  # fmt: skip
    assert off[1] < 0.1 < off[0]


@pytest.mark.parametrize("place", ["rows", "corner", "middle"])
def test_a_third_together_has_no_part_if_its_discs_are_uneven(place):
    _, d = surface(np.random.default_rng(8), 1, (40, 40))
    where = {
        "rows": np.s_[:13],
        "corner": np.s_[:23, :23],
        "middle": np.s_[9:32, 9:32],
    }[place]
    beam = d + np.random.default_rng(9).normal(0, 0.1, d.shape)
    beam[where] += 3
    spread = np.full((40, 40), 0.05)
    spread[where] = 0.5
    found = fit_descan(beam[..., 0], beam[..., 1], descan_weight(spread))
    assert found.order == 1
    assert np.abs(found.at((40, 40)) - d).max() < 0.05


def test_large_scans_take_part_of_the_beams_to_begin_with():
    rng = np.random.default_rng(7)
    shape = (256, 192)
    assert np.prod(shape) > 2 * MOST
    coefficients, d = surface(rng, 2, shape)
    beam = d + rng.normal(0, 0.1, d.shape)
    beam[50:120, 60:] += 3 * rng.normal(0, 1, (70, 132, 2))
    found = fit_descan(beam[..., 0], beam[..., 1])
    assert found.order == 2
    np.testing.assert_allclose(found.coefficients, coefficients, atol=0.01)
    np.testing.assert_allclose(found.s, 0.1, rtol=0.25)
