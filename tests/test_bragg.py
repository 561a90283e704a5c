"""Diffracted discs: found where they were drawn, and kept, cut or lost as pixel by pixel."""

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stem_dask as sd
from stem_dask.job.results import discs_of
from stem_dask.kernels.bragg import find_bragg_discs, kept_discs, mean_about
from stem_dask.stages.descan import fit_descan

OFFSETS = [(0, 0), (0, 20), (20, 0), (0, -20), (-20, 0), (21, 21)]


def drawn(center, radius=5.2, slope=0.0, shape=(90, 90), background=0.05):
    """A pattern of discs about a center, brighter on one side by a slope; the first is the brightest."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    out = np.full(shape, background)
    for i, (a, b) in enumerate(OFFSETS):
        dy, dx = y - center[0] - a, x - center[1] - b
        inside = (radius + 0.5 - np.hypot(dy, dx)).clip(0, 1)
        out += (8 if i == 0 else 2 / i) * inside * (1 + slope * (dy + dx) / radius / 1.5)
    return out


@pytest.mark.parametrize(("slope", "error"), [(0.0, 0.2), (0.9, 0.7)])
def test_discs_are_found_where_they_were_drawn(slope, error):
    counts = np.random.default_rng(3).poisson(400 * drawn((44.3, 43.8), slope=slope)) / 400
    places, found = find_bragg_discs(counts, 400, 5.2)
    assert len(places) == len(OFFSETS)
    true = np.array([44.3, 43.8]) + OFFSETS
    apart = np.hypot(*(places[:, None] - true).transpose(2, 0, 1))
    assert apart.min(axis=1).max() < error
    assert apart[0].argmin() == 0  # the brightest is first
    assert (np.diff(found) <= 0).all()


def test_noise_rings_and_hot_sides_are_no_discs():
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:80, :80]
    assert len(find_bragg_discs(rng.poisson(3.0, (80, 80)), 1, 5.0)[0]) == 0
    assert len(find_bragg_discs(np.zeros((80, 80)), 1, 5.0)[0]) == 0
    ring = 5 * np.exp(-(((np.hypot(y - 40, x - 40) - 25) / 8) ** 2)) + 1.0
    places, _ = find_bragg_discs(ring + 50 * (np.hypot(y - 40, x - 40) < 5), 100, 5.0)
    assert places.round().tolist() == [[40, 40]]


@given(
    st.lists(st.tuples(st.floats(-5, 45), st.floats(-5, 45)), min_size=1, max_size=5),
    st.floats(1, 9),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
    st.tuples(st.integers(2, 30), st.integers(2, 30)),
)
def test_kept_discs_against_their_twin(places, radius, origin, shape):
    inside, cut = kept_discs(np.array(places), radius, origin, shape)
    for (y, x), whole, part in zip(places, inside, cut, strict=True):
        sides = [
            (one - radius, one + radius, first - 0.5, first + n - 0.5)
            for one, first, n in zip((y, x), origin, shape, strict=True)
        ]
        assert whole == all(low >= a and high <= b for low, high, a, b in sides)
        # the point of the window that is nearest to the center
        near = [min(max((low + high) / 2, a), b) for low, high, a, b in sides]
        distance = np.hypot(near[0] - y, near[1] - x)
        if abs(distance - radius) > 1e-9:
            assert (whole or part) == (distance < radius)
        assert not (whole and part)


@given(st.data())
def test_mean_about_against_its_twin(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    n, height, width = (data.draw(st.integers(1, most)) for most in (4, 6, 7))
    patterns = rng.normal(2, 2, (n, height, width))
    patterns[rng.random(patterns.shape) < 0.1] = np.nan
    places, middle = rng.integers(-9, 9, (n, 2)), rng.integers(-3, 9, 2)
    expected = np.zeros((height, width))
    for i, y, x in product(range(n), range(height), range(width)):
        a, b = y + places[i, 0] - middle[0], x + places[i, 1] - middle[1]
        if 0 <= a < height and 0 <= b < width and patterns[i, a, b] > 0:
            expected[y, x] += patterns[i, a, b] / n
    np.testing.assert_allclose(mean_about(patterns, places, middle), expected, atol=1e-12)


def scan(wander, seed=1):
    """A scan of 6 x 6 positions whose beam moves by ``wander`` px from end to end along y."""
    rng = np.random.default_rng(seed)
    rows = [drawn((44.0 + wander * (i / 5 - 0.5), 44.0)) for i in range(6)]
    return np.stack([rng.poisson(10 * row, (6, *row.shape)) for row in rows]).astype("u2")


@pytest.mark.parametrize(
    ("align", "size", "expected"),
    [
        ("descan", 52, (5, 1, 0)),  # the disc at (21, 21) reaches 26.2 px
        ("descan", 56, (6, 0, 0)),
        ("descan", 30, (1, 2, 3)),  # of pixels from -15 to 14, discs begin 14.8 px from the beam
        (
            "fixed",
            52,
            (3, 3, 0),
        ),  # the beam wanders by 6 px along y: some patterns lose a part of three discs
        ("fixed", 72, (6, 0, 0)),
    ],
)
def test_discs_of_aligned_and_of_fixed_windows(align, size, expected):
    data = scan(6.0)
    analysis = fit_descan(sd.analyze(data, disc_radius=5.2).compute(), order=1)
    window = sd.choose_window(analysis, align=align, size=size)
    positions = np.argwhere(np.ones(data.shape[:2], bool))
    found = discs_of(analysis, window, (data.reshape(-1, *data.shape[2:]), positions))
    assert (found["inside"], found["cut"], found["outside"]) == expected
    assert found["share_outside"] == pytest.approx(3.4 / 12.57 if size == 30 else 0, abs=0.02)


def test_without_a_sample_the_mean_pattern_of_the_detector_shows_the_discs():
    analysis = fit_descan(sd.analyze(scan(0.0), disc_radius=5.2).compute(), order=0)
    found = discs_of(analysis, sd.choose_window(analysis, align="descan", size=28))
    assert found == {
        "inside": 1, "cut": 0, "outside": 5, "share_outside": pytest.approx(4.57 / 12.57, abs=0.02),
    }  # fmt: skip


def test_no_discs_without_a_direct_one(beam):
    analysis = sd.analyze(beam, center_method="centroid", ignore_bad_pixels=False).compute()
    assert discs_of(analysis, sd.choose_window(analysis)) == {}


@pytest.mark.parametrize("size", [52, 66])
def test_discs_of_a_strained_crystal(shared_data, size):
    """The four 100 discs reach 27 px from the beam, those of 110 33 px, those of 200 at least 35 px."""
    folder = shared_data / "trust"
    patterns = sd.open(folder / "nbed_strain_descan.hspy")
    truth = json.loads((folder / "nbed_strain_descan.truth.json").read_text())
    analysis = fit_descan(sd.analyze(patterns).compute())
    window = sd.choose_window(analysis, align="descan", size=size)
    data = patterns.values.reshape(-1, *patterns.shape[2:])
    found = discs_of(analysis, window, (data, np.argwhere(np.ones(patterns.shape[:2], bool))))
    hk = np.array([*product(range(-3, 4), repeat=2)])
    places = size // 2 + hk @ np.array(truth["basis_px"])
    inside, cut = kept_discs(places, truth["disc_radius"], (0, 0), (size, size))
    assert found["inside"] + found["cut"] == (inside | cut).sum() == {52: 9, 66: 13}[size]
    if size == 52:
        assert found["inside"] == inside.sum() == 1
    else:  # two of 110 end half a pixel from the edge, as far as the beam lies from the middle of its window
        assert 5 <= found["inside"] <= inside.sum() == 7
    assert found["outside"] >= 8  # those of 200 are lost, with little of the intensity
    assert 0 < found["share_outside"] < 0.01
