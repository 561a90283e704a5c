"""The tensor face: names, structure and results that people's scripts rely on."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from stem_dask import CroppingConfig, DiffractionCropper, create_test_data

QUIET = CroppingConfig(verbose=False, visualization=False)


def beams(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Five patterns with a square beam of 6 x 6 pixels each, off center."""
    data = torch.zeros((5, 1, 40, 36), dtype=dtype)
    for i in range(5):
        data[i, 0, 15 + i : 21 + i, 16:22] = i + 1
    return data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_retention": 0}, "target_retention is 0"),
        ({"target_retention": 1.1}, "target_retention is 1.1"),
        ({"min_retention": 0.99}, "above target_retention"),
        ({"margin_pixels": -1}, "margin_pixels is -1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"center_method": "manual"}, "manual_center"),
        ({"center_method": "middle"}, "expected centroid, center or manual"),
    ],
)
def test_bad_options_are_value_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CroppingConfig(**options)


def test_defaults_are_the_known_ones() -> None:
    assert CroppingConfig() == CroppingConfig(
        0.98, 0.95, 3, 1000, False, "centroid", None, True, True
    )


def test_structure_of_the_results() -> None:
    cropped, results = DiffractionCropper(QUIET).process_dataset(beams())
    assert set(results) == {"analysis", "validation", "processing_time", "config"}
    analysis, validation = results["analysis"], results["validation"]
    assert set(analysis) == {
        "global_radius", "retention_radii", "retention_stats", "centers", "original_shape", "cropped_shape",
        "n_patterns",
    }  # fmt: skip
    assert set(analysis["retention_stats"]) == {"mean", "std", "min", "max", "median"}
    assert set(validation) >= {
        "mean_retention", "median_retention", "min_retention", "max_retention", "std_retention",
        "passes_min_threshold", "passes_target_threshold", "n_patterns",
    }  # fmt: skip
    assert (
        analysis["global_radius"] == 7
    )  # a beam of 6 pixels around x.5 rounds up to radius 4, and the margin
    assert tuple(cropped.shape) == (5, 1, 14, 14)
    assert analysis["centers"][2] == (19.5, 18.5)
    assert analysis["retention_radii"] == [4] * 5
    assert validation["mean_retention"] == 1.0
    assert validation["passes_target_threshold"] == 5
    assert results["config"] is QUIET
    cropper, data = DiffractionCropper(QUIET), beams()
    again = cropper.crop_patterns(data, cropper.analyze_patterns(data))
    assert torch.equal(cropped, again)
    assert cropper.validate_retention(data, again, analysis) == validation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.uint16])
@pytest.mark.parametrize("rank", [3, 4])
def test_rank_and_type_are_kept_and_every_beam_is_centered(dtype: torch.dtype, rank: int) -> None:
    data = beams(dtype) if rank == 4 else beams(dtype)[:, 0]
    cropped, results = DiffractionCropper(QUIET).process_dataset(data)
    assert cropped.dtype == dtype
    assert cropped.ndim == rank
    source = data.reshape(5, 40, 36).numpy()
    radius = results["analysis"]["global_radius"]
    for i, (cy, cx) in enumerate(results["analysis"]["centers"]):
        y, x = int(np.rint(cy)), int(np.rint(cx))
        expected = source[i, y - radius : y + radius, x - radius : x + radius]
        assert np.array_equal(cropped.reshape(5, 2 * radius, 2 * radius)[i].numpy(), expected)


def test_arrays_come_back_as_arrays_and_chunks_change_nothing() -> None:
    cropped, _ = DiffractionCropper(QUIET).process_dataset(beams().numpy())
    assert isinstance(cropped, np.ndarray)
    assert cropped.shape == (5, 1, 14, 14)
    data, chunked = create_test_data(23, 48), CroppingConfig(verbose=False, chunk_size=4)
    whole = DiffractionCropper(QUIET).process_dataset(data)[0]
    assert torch.equal(whole, DiffractionCropper(chunked).process_dataset(data)[0])


@pytest.mark.parametrize(("method", "center"), [("center", (20.0, 18.0)), ("manual", (19.0, 17.0))])
def test_given_centers(method: str, center: tuple[float, float]) -> None:
    manual = center if method == "manual" else None
    config = CroppingConfig(center_method=method, manual_center=manual, verbose=False)
    _, results = DiffractionCropper(config).process_dataset(beams())
    assert results["analysis"]["centers"] == [center] * 5


def test_files_beside_the_tensor(tmp_path: Path) -> None:
    data = create_test_data(12, 64)
    cropper = DiffractionCropper(CroppingConfig(verbose=False))
    cropped, results = cropper.process_dataset(data, tmp_path / "out.pt")
    made = "out.pt out_results.json out_visualization.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == made.split()
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(loaded, cropped)
    assert loaded.untyped_storage().nbytes() == loaded.numel() * 4
    stored = json.loads((tmp_path / "out_results.json").read_text())
    assert stored["analysis"]["global_radius"] == results["analysis"]["global_radius"]
    assert stored["config"]["target_retention"] == 0.98
    names = zipfile.ZipFile(tmp_path / "out.pt").namelist()
    assert not any("out" in name or "incomplete" in name for name in names)


def test_a_full_axis_keeps_both_whole() -> None:
    data = torch.ones((2, 1, 30, 20))
    with pytest.warns(UserWarning, match="nothing is cropped"):
        cropped, results = DiffractionCropper(QUIET).process_dataset(data)
    assert results["analysis"]["global_radius"] == 10
    assert results["analysis"]["cropped_shape"] == (30, 20)
    assert torch.equal(cropped, data)
    assert cropped.data_ptr() != data.data_ptr()


@pytest.mark.parametrize("n", [1, 3])
def test_tiny_patterns(n: int) -> None:
    data = torch.zeros((n, 1, 8, 8))
    data[:, :, 3:5, 3:5] = 1
    config = CroppingConfig(margin_pixels=0, verbose=False)
    cropped, results = DiffractionCropper(config).process_dataset(data)
    assert results["analysis"]["global_radius"] == 1
    assert tuple(cropped.shape) == (n, 1, 2, 2)


def test_empty_patterns_take_the_median_center() -> None:
    data = beams()
    data[1] = 0
    _, results = DiffractionCropper(QUIET).process_dataset(data)
    assert np.isnan(results["analysis"]["retention_radii"][1])
    assert results["validation"]["n_empty"] == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros((4, 8, 8)), "every pattern is empty"),
        (torch.zeros((8, 8)), r"shape \(8, 8\); expected"),
        (torch.zeros((2, 3, 8, 8)), r"expected \(N, 1, H, W\)"),
        (torch.zeros((2, 8, 8), dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros((2, 8, 8), dtype=torch.complex64), "complex64"),
    ],
)
def test_bad_data_are_refused(data: torch.Tensor, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        DiffractionCropper(QUIET).process_dataset(data)


def test_gpu_is_never_replaced_silently(no_gpu: None) -> None:
    with pytest.raises(ValueError, match="device is gpu"):
        DiffractionCropper(CroppingConfig(use_gpu=True))


def test_test_data_are_what_they_say() -> None:
    data = create_test_data(10, 64)
    assert tuple(data.shape) == (10, 1, 64, 64)
    assert data.dtype == torch.float32
    assert float(data.min()) >= 0
    assert tuple(create_test_data().shape) == (100, 1, 256, 256)
    _, results = DiffractionCropper(QUIET).process_dataset(create_test_data(20, 256))
    assert results["analysis"]["cropped_shape"][0] < 128
    assert len({tuple(c) for c in results["analysis"]["centers"]}) == 20
    clean = create_test_data(2, 64, noise_level=0.0)
    assert float(clean.max()) <= 1000
