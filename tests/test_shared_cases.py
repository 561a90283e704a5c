"""The small inputs beside the checkout that were once misread or refused without a way out, each with its truth."""

import json
import multiprocessing
import os
import shutil

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from frames_made import agrees
from test_containers import opened_by, refusal, typed
from test_hdf5_locks import hold_open

import stem_dask as sd
from stem_dask.job.run import run
from stem_dask.readers.open import find


@pytest.fixture
def cases(shared_data):
    if not (shared_data / "cases").is_dir():
        pytest.skip("the shared cases are not on this machine")
    return shared_data / "cases"


def test_c1_an_empad_line_scan_keeps_its_direction(cases):
    found = find(cases / "c1_empad_search_turned" / "scan.xml")
    assert found.info.shape == (1, 4, 128, 128)
    assert any("not 4 x 1 by the mode acquire" in note for note in found.info.notes)


def test_d1_a_dectris_master_is_read(cases):
    folder = cases / "d1_dectris_master"
    truth = np.load(folder / "truth.npy")
    found = find(folder / "lamella_master.h5", scan_shape=(10, 12))
    agrees(found, truth)
    assert found.info.about["beam_energy_kv"] == 300
    for i in (1, 2):
        message = refusal(folder / f"lamella_data_{i:06d}.h5")
        assert "would fit" not in message
        agrees(opened_by(message), truth)


@pytest.mark.parametrize("name", ["ky_kx_y_x", "qy_qx_ry_rx"])
def test_f1_names_of_zarr_axes_decide(cases, name):
    folder = cases / "f1_zarr_dims_detector_first"
    found = find(folder / f"{name}.zarr")
    agrees(found, np.load(folder / "truth.npy"))
    assert any("the detector's axes come first" in note for note in found.info.notes)


def test_g2_an_hdf5_file_that_is_open_elsewhere_is_read(cases, tmp_path):
    path = tmp_path / "a.h5"
    shutil.copy(cases / "g2_hdf5_lock" / "a.h5", path)
    os.chmod(path, 0o644)
    truth = find(path).source[(slice(None),) * 4]
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold_open, args=(str(path), None, ready, done))
    process.start()
    try:
        assert ready.wait(60)
        found = find(path)
        np.testing.assert_array_equal(found.source[(slice(None),) * 4], truth)
        assert "close it there" in found.info.notes[-1]
    finally:
        done.set()
        process.join()


def test_i1_a_folder_of_images_is_a_scan(cases):
    folder = cases / "i1_folder_of_tif"
    assert "input.series=true" in refusal(folder / "frames")
    for name in ("frames", "frames/*.tif"):
        agrees(find(folder / name, series=True), np.load(folder / "truth.npy"))


@pytest.mark.parametrize("name", ["t5.npy", "t5.h5"])
def test_j1_a_scan_of_a_series_is_chosen(cases, name):
    path = cases / "j1_time_series" / name
    assert "input.index={t: 0}" in refusal(path)
    series = np.load(cases / "j1_time_series" / "t5.npy")
    agrees(find(path, index={"t": 1}), series[1])
    agrees(find(path, series=True), series.reshape(6, 4, 16, 16))


@pytest.mark.parametrize("name", ["a.ndata", "a.prz", "store.zip", "store"])
def test_k1_a_zip_archive_is_no_tensor(cases, tmp_path, name):
    folder = cases / "k1_zip_is_no_pt"
    copy = shutil.copytree if name == "store" else shutil.copy
    copy(folder / name, tmp_path / name)
    there = name
    if name == "store":
        there = refusal(tmp_path / name).rpartition("rename it to ")[2]
        (tmp_path / name).rename(tmp_path / there)
    elif name == "store.zip":
        way = refusal(tmp_path / name).rpartition("unpack it: ")[2]
        command, _, there = way.partition(", and open ")
        typed(command, tmp_path)
        there = there or command.split()[-1]
    agrees(find(tmp_path / there), np.load(folder / "truth.npy"))


def test_n1_an_array_of_a_notebook_is_patterns(cases):
    array = np.load(cases / "n1_array_in_notebook" / "a.npy")
    dims = ("scan_y", "scan_x", "ky", "kx")
    shapes = {
        sd.choose_window(sd.analyze(given).compute()).shape
        for given in (array, da.from_array(array), xr.DataArray(array, dims=dims))
    }
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("name", "shape"),
    [("au_np_gms_stemx_u16.dm4", (9, 7, 76, 60)), ("au_np_hot_dead_f32.hspy", (14, 11, 128, 128))],
)
def test_a_crop_keeps_the_calibration(shared_data, make_config, name, shape):
    config = make_config(shared_data / "sim" / name, crop={"size": 40})
    run(config)
    root = xr.open_zarr(config.output.path)
    assert root.patterns.shape == (*shape[:2], 40, 40)
    assert root.ky.attrs["units"] == "1/nm"
    truth = json.loads((shared_data / "sim" / f"{name.split('.')[0]}.truth.json").read_text())
    assert root.ky.attrs["scale"] == pytest.approx(truth["k_step_inv_nm"], rel=1e-6)
    if "gms" in name:
        assert root.scan_x.attrs["scale"] == pytest.approx(0.457142857)
