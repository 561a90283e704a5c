"""The configs for typical experiments do what they promise, on small sets of each kind."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

import stem_dask as sd
from stem_dask.cli import run
from stem_dask.config.load import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PRESETS = (
    "ml", "dpc", "ptychography", "nbed_strain", "precession_acom", "beam_stop", "vacuum",
)  # fmt: skip
THREADS = ("cluster.kind=threads", "cluster.threads_per_worker=2", "output.figure=false")


@pytest.fixture
def made(tmp_path, connects):
    """Runs a preset; gives its results, the output and the analysis."""

    def make(preset, path, *overrides):
        store = tmp_path / f"{preset}.zarr"
        words = [str(CONFIGS / f"{preset}.yaml"), f"input.path={path}", f"output.path={store}"]
        assert run.main([*words, *THREADS, *overrides]) == 0
        results = json.loads((tmp_path / f"{preset}_results.json").read_text())
        return results, sd.open(store), xr.open_zarr(store, group="analysis").load()

    return make


@pytest.fixture
def trust(shared_data):
    return shared_data / "trust"


def descan_of(path):
    """The true descan (scan_y, scan_x, 2) of a shared set."""
    truth = json.loads(path.with_suffix(".truth.json").read_text())
    return np.array(truth["true_beam_centre"]) - truth["deflection"]


def distances(analysis, truth):
    """Median, 95 % and maximum of the distance of the fit from the truth, in px."""
    found = np.stack([analysis[f"descan_{axis}"].values for axis in "yx"], -1)
    return np.percentile(np.linalg.norm(found - truth, axis=-1), [50, 95, 100])


@pytest.mark.parametrize("preset", PRESETS)
def test_each_key_is_one_of_crop_yaml_and_has_a_comment_or_an_obvious_value(preset):
    text = (CONFIGS / f"{preset}.yaml").read_text()
    every = yaml.safe_load((CONFIGS / "crop.yaml").read_text())
    for section, keys in yaml.safe_load(text).items():
        assert set(keys) <= set(every[section])
    head = text.split("\n\n")[0]
    assert f"python -m stem_dask.run configs/{preset}.yaml input.path=" in head
    assert "docs/presets.md" in head
    load_config(CONFIGS / f"{preset}.yaml")


def test_ml(made, trust, tmp_path):
    results, out, analysis = made("ml", trust / "nbed_strain_descan.hspy")
    assert results["center"]["method"] == "disc"
    assert not results["verdict"]
    assert out.shape[2:] == (40, 40)  # a multiple of 8
    assert out.dtype == np.float32
    assert float(out.mean()) == pytest.approx(0, abs=1e-3)
    assert float(out.std()) == pytest.approx(1, abs=1e-3)
    assert (analysis.retention >= 0.98).all()
    # the beam stays within half a pixel of one place, which is that of the fit and not that of each pattern
    middle = np.hypot(analysis.center_out_y - 19.5, analysis.center_out_x - 19.5)
    assert np.median(middle) < 0.5
    assert np.percentile(np.hypot(analysis.deflection_y, analysis.deflection_x), 95) < 0.5
    torch = pytest.importorskip("torch")
    tensor = torch.load(tmp_path / "ml.pt", weights_only=True, mmap=True)["patterns"]
    assert tensor.shape == (16 * 14, 1, 40, 40)


def test_dpc(made, trust):
    path = trust / "dpc_domains_descan.hspy"
    truth = json.loads(path.with_suffix(".truth.json").read_text())
    results, out, analysis = made("dpc", path)
    assert results["center"]["method"] == "disc"
    assert results["window"]["align"] == "fixed"
    assert len({tuple(np.ravel(analysis[f"window_{axis}"])) for axis in "yx"}) <= 2
    # two radii of the disc about every beam
    beam = np.array(truth["true_beam_centre"])
    assert out.dtype == np.uint16
    for i, axis in enumerate("yx"):
        first, size = int(np.ravel(analysis[f"window_{axis}"])[0]), out.sizes[f"k{axis}"]
        assert beam[..., i].min() - 2 * truth["disc_radius"] > first - 1
        assert beam[..., i].max() + 2 * truth["disc_radius"] < first + size + 1
    # the maps: com of the whole detector, the beam, and its deflection
    com = np.stack([analysis.com_y, analysis.com_x], -1)
    np.testing.assert_allclose(com, truth["com_noise_free"], atol=0.6)
    found = np.stack([analysis.center_y, analysis.center_x], -1)
    assert np.median(np.linalg.norm(found - beam, axis=-1)) < 0.1
    assert (distances(analysis, descan_of(path)) <= (0.35, 0.8, 1.0)).all()
    deflection = np.stack([analysis.deflection_y, analysis.deflection_x], -1)
    off = np.linalg.norm(deflection - truth["deflection"], axis=-1)
    assert np.median(off) < 0.4


def test_ptychography(made, trust):
    path = trust / "ptycho_overlap.hspy"
    results, out, analysis = made("ptychography", path, "crop.k_max=4.9")
    assert results["center"]["method"] == "centroid"
    assert out.shape[2:] == (98, 98)  # 2 x 7 x 7
    assert analysis.attrs["descan"]["order"] == 1
    assert (distances(analysis, descan_of(path)) <= (0.5, 0.8, 1.0)).all()
    # the counts as recorded, each in its window
    source = sd.open(path)
    for i, j in ((0, 0), (7, 5), (15, 13)):
        y, x = (int(analysis[f"window_{axis}"][i, j]) for axis in "yx")
        assert np.array_equal(out[i, j], source[i, j, y : y + 98, x : x + 98])
        assert (y + 49, x + 49) == tuple(
            np.rint(analysis[f"descan_{a}"].values[i, j]) for a in "yx"
        )
    assert out.attrs["k_origin"] == "beam"


def test_strain(made, trust, tmp_path):
    """With the vacuum preset's output as reference; every first-order disc is whole."""
    path = trust / "nbed_strain_descan.hspy"
    reference, whole, vacuum = made("vacuum", trust / "vacuum_reference.hspy")
    assert reference["center"]["method"] == "disc"
    assert whole.shape == sd.open(trust / "vacuum_reference.hspy").shape
    assert vacuum.attrs["descan"]["order"] == 2
    assert (
        distances(vacuum, descan_of(trust / "vacuum_reference.hspy")) <= (0.05, 0.1, 0.15)
    ).all()
    where = f"descan.reference={tmp_path / 'vacuum.zarr'}"
    results, out, analysis = made("nbed_strain", path, where, "crop.k_max=5.5")
    assert results["center"]["method"] == "disc"
    assert analysis.attrs["descan"]["reference"]
    assert (distances(analysis, descan_of(path)) <= (0.05, 0.1, 0.15)).all()
    truth = json.loads(path.with_suffix(".truth.json").read_text())
    orders = [(h, k) for h in range(-2, 3) for k in range(-2, 3) if h * h + k * k <= 5]
    farthest = np.abs(orders @ np.array(truth["basis_px"])).max() * (1 + truth["strain"])
    assert out.shape[2] == out.shape[3] >= 2 * 55
    assert (
        farthest + truth["disc_radius"] + 0.5 < out.shape[2] // 2
    )  # with the rounding of the window
    assert results["discs"] == {"inside": 21, "cut": 0, "outside": 0, "share_outside": 0}
    assert "deflection_y" in analysis


def test_precession(made, trust):
    path = trust / "nbed_strain_descan.hspy"
    results, out, analysis = made("precession_acom", path, "crop.k_max=4")
    assert results["center"]["method"] == "disc"
    assert 40 <= out.shape[2] == out.shape[3] <= 44  # of twice 4 / 0.1 1/nm, binned
    axis = out.kx.values
    assert axis[1] - axis[0] == pytest.approx(0.2)
    assert (distances(analysis, descan_of(path)) <= (0.05, 0.1, 0.15)).all()
    assert analysis.attrs["k_origin"] == "beam"


def test_beam_stop(made, trust, tmp_path):
    """A stop is drawn over the beam of amorphous patterns, 2.5 px from its middle."""
    path = trust / "amorphous_ring.hspy"
    patterns = np.array(sd.open(path))
    y, x = np.ogrid[: patterns.shape[2], : patterns.shape[3]]
    middle = descan_of(path).mean((0, 1))
    stop = np.hypot(y - middle[0] - 2, x - middle[1] - 1.5) < 14
    patterns[..., stop] = 0
    np.save(tmp_path / "stopped.npy", patterns)
    scale = "input.calibration={ky: {scale: 0.1, units: 1/nm}, kx: {scale: 0.1, units: 1/nm}}"
    results, out, analysis = made("beam_stop", tmp_path / "stopped.npy", scale, "crop.k_max=4.8")
    assert results["center"]["method"] == "friedel"
    assert (analysis.mask.values[stop] > 0).all()
    assert (distances(analysis, descan_of(path)) <= (0.1, 0.2, 0.3)).all()
    assert abs(analysis.deflection_y).max() == abs(analysis.deflection_x).max() == 0
    assert out.shape[2:] == (96, 96)
