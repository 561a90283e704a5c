"""Calibration and beam energy that the user gives: where they go, and that crop and downsampling carry them on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from rsciio.hspy import file_reader

import stem_dask as sd
from stem_dask.core.errors import ConfigError, OutputExistsError
from stem_dask.job.run import run
from stem_dask.stages.open import open_patterns

GIVEN = {
    "ky": {"scale": 0.5, "units": "1/nm", "offset": -10.0},
    "scan_x": {"scale": 2.0, "units": "nm"},
}


def axis(array: Any, name: str) -> tuple[float, float, str]:
    attrs = array[name].attrs
    return attrs["scale"], attrs["offset"], attrs["units"]


def test_the_job_carries_it_on(beam_file: Path, make_config: Any, tmp_path: Path) -> None:
    config = make_config(
        beam_file,
        input={"calibration": GIVEN, "beam_energy_kv": 200},
        crop={"window": [12, 28, 10, 26]},
        downsample={"factor": 2},
        output={"export": ["pt", "hspy"]},
    )
    outcome = run(config)
    root = xr.open_zarr(config.output.path)
    assert axis(root, "ky") == (1.0, -10 + 0.5 * 12 + 0.25, "1/nm")
    assert axis(root, "scan_x") == (2.0, 0.0, "nm")
    assert axis(root, "kx") == (2.0, 10.5, "")
    assert root.attrs["given"] == {"calibration": GIVEN, "beam_energy_kv": 200.0}
    assert root.attrs["beam_energy_kv"] == 200.0
    assert "given" not in root.patterns.attrs
    assert "ky as given: 0.5 1/nm a pixel" in outcome.results["input"]["notes"]
    assert "beam energy as given: 200 kV" in root.attrs["input"]["notes"]
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert content["beam_energy_kv"] == 200.0
    assert [a["scale"] for a in content["axes"]] == [1.0, 2.0, 1.0, 2.0]
    (signal,) = file_reader(tmp_path / "out.hspy")
    assert signal["metadata"]["Acquisition_instrument"]["TEM"]["beam_energy"] == 200.0
    with pytest.raises(OutputExistsError, match=r"input\.beam_energy_kv"):
        run(make_config(beam_file, input={"calibration": GIVEN, "beam_energy_kv": 300}))


def test_nothing_given_leaves_no_trace(beam_file: Path, make_config: Any, tmp_path: Path) -> None:
    config = make_config(beam_file, output={"export": ["pt", "hspy"]})
    run(config)
    assert not {"given", "beam_energy_kv"} & set(xr.open_zarr(config.output.path).attrs)
    assert "beam_energy_kv" not in torch.load(tmp_path / "out.pt", weights_only=True)
    (signal,) = file_reader(tmp_path / "out.hspy")
    assert "Acquisition_instrument" not in signal["metadata"]


def test_open_and_export_carry_it_too(beam_file: Path, tmp_path: Path) -> None:
    patterns = sd.open(beam_file, calibration=GIVEN, beam_energy_kv=80)
    assert patterns.attrs["beam_energy_kv"] == 80.0
    sd.export(patterns, tmp_path / "a.zarr")
    root = xr.open_zarr(tmp_path / "a.zarr")
    assert root.attrs["given"]["calibration"] == GIVEN
    assert axis(root, "ky") == (0.5, -10.0, "1/nm")


@pytest.mark.parametrize("offset", [None, 7.0])
def test_the_scale_is_of_the_whole_scan(offset: float | None, tmp_path: Path) -> None:
    """Giving it while reading a part is as reading a part of a file that has it."""
    import zarr

    data = np.zeros((9, 8, 5, 4), "u1")
    given: dict[str, Any] = {"scale": 0.5, "units": "nm"}
    if offset is not None:
        given["offset"] = offset
    stored = zarr.create_array(str(tmp_path / "a.zarr"), data=data, dimension_names=list("yxab"))
    del stored
    part = {"scan_roi": [2, 9, 1, 8], "scan_step": 3}
    patterns = open_patterns(tmp_path / "a.zarr", calibration={"scan_y": given}, **part)
    whole = open_patterns(tmp_path / "a.zarr", calibration={"scan_y": given})
    np.testing.assert_allclose(patterns.scan_y, whole.scan_y[2:9:3])


def test_without_an_offset_the_zero_stays(tmp_path: Path) -> None:
    patterns = sd.open(_centered(tmp_path))
    zero = float(np.interp(0, patterns.ky, np.arange(8)))
    again = sd.open(_centered(tmp_path), calibration={"ky": {"scale": 3.0, "units": "mrad"}})
    assert float(np.interp(0, again.ky, np.arange(8))) == pytest.approx(zero)
    assert zero == pytest.approx(4)


def _centered(folder: Path) -> Path:
    data = xr.DataArray(np.ones((2, 2, 8, 8), "u1"), dims=("scan_y", "scan_x", "ky", "kx"))
    data = data.assign_coords(ky=0.1 * (np.arange(8) - 4))
    path = folder / "centered.zarr"
    if not path.exists():
        sd.export(data, path)
    return path


BAD = [
    (
        {"pattern": {"scale": 1, "units": "nm"}},
        r"names pattern, which is not an axis .* scan_y, scan_x",
    ),
    ({"ky": {"scale": 0, "units": "nm"}}, r"calibration\.ky is .*a scale other than 0"),
    ({"ky": {"scale": float("nan"), "units": "nm"}}, "expected finite numbers"),
    ({"ky": {"scale": 1, "units": "nm", "offset": float("inf")}}, "expected finite numbers"),
    ({"ky": {"scale": 1}}, "expected scale, units and perhaps offset"),
    ({"ky": {"scale": 1, "units": "nm", "size": 3}}, "expected scale, units and perhaps offset"),
]


@pytest.mark.parametrize(("calibration", "expected"), BAD)
def test_refused(calibration: Any, expected: str, beam_file: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        sd.open(beam_file, calibration=calibration)


def test_refused_for_a_list_and_for_the_energy(tmp_path: Path) -> None:
    np.save(tmp_path / "list.npy", np.ones((3, 8, 8), "u1"))
    with pytest.raises(ConfigError, match=r"names scan_y.*expected pattern and ky and kx"):
        sd.open(tmp_path / "list.npy", calibration={"scan_y": {"scale": 1, "units": "nm"}})
    named = sd.open(tmp_path / "list.npy", calibration={"kx": {"scale": 2, "units": "nm"}})
    assert axis(named, "kx") == (2.0, 0.0, "nm")
    with pytest.raises(ConfigError, match="beam_energy_kv is -1"):
        sd.open(tmp_path / "list.npy", beam_energy_kv=-1)


@pytest.mark.parametrize("crops", [False, True])
def test_a_signal_that_reads_from_an_open_file_is_exported(tmp_path, crops):
    """HyperSpy's lazy signals hold the open file, which no worker could get."""
    hs = pytest.importorskip("hyperspy.api")
    data = np.zeros((3, 4, 16, 16), "u2")
    data[..., 6:11, 5:10] = np.arange(1, 13).reshape(3, 4, 1, 1)
    hs.signals.Signal2D(data).save(tmp_path / "a.hspy")
    signal = hs.load(tmp_path / "a.hspy", lazy=True)
    patterns = signal
    if crops:
        analysis = sd.analyze(signal).compute()
        patterns = sd.crop(signal, analysis, sd.choose_window(analysis))
    sd.export(patterns, tmp_path / "b.zarr")
    stored = sd.open(tmp_path / "b.zarr").values
    np.testing.assert_array_equal(stored.sum(axis=(2, 3)), data.sum(axis=(2, 3)))
    with (
        sd.connect("local", n_workers=1) as cluster,
        pytest.raises(
            sd.SourceError, match=r"cannot be sent to workers .*open their file with sd\.open"
        ),
    ):
        sd.export(patterns, tmp_path / "c.zarr", client=cluster.client)
