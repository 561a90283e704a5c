"""The whole job: what it writes, what it refuses, what it leaves behind."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from stem_dask.core.errors import ConfigError, MemoryBudgetError, OutputExistsError, SourceError
from stem_dask.job.run import run


def test_seconds_of_a_process_are_its_own() -> None:
    code = "from stem_dask.job.summary import process_seconds; print(process_seconds())"
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < time.perf_counter() - begun


def test_store_holds_the_windows_and_what_is_known(beam_file: Path, make_config: Any) -> None:
    config = make_config(
        beam_file, analyze={"target_retention": 1.0}, validate={"min_retention": 1.0}
    )
    outcome = run(config)
    data = np.load(beam_file)
    root = xr.open_zarr(config.output.path)
    analysis = xr.open_zarr(config.output.path, group="analysis").load()
    assert outcome.exit_code == 0
    y0, x0 = int(analysis.window_y[0, 0]), int(analysis.window_x[0, 0])
    h, w = analysis.attrs["window_size"]
    assert np.array_equal(root.patterns.values, data[:, :, y0 : y0 + h, x0 : x0 + w])
    assert root.patterns.dims == ("scan_y", "scan_x", "ky", "kx")
    assert root.patterns.dtype == np.uint16
    assert np.array_equal(analysis.total.values, data.sum((2, 3)))
    assert np.array_equal(analysis.retention.values, np.ones((6, 5)))
    assert np.array_equal(analysis.mean_pattern.values, data.mean((0, 1)))
    assert np.array_equal(analysis.max_pattern.values, data.max((0, 1)))
    assert analysis.profile.shape == (6, 5, 41)
    assert np.allclose(analysis.center_out_y, analysis.center_y - y0)
    attrs = "global_radius coverage align k_origin intensity cropped_axes aligned_axes"
    assert {*attrs.split()} <= analysis.attrs.keys()
    assert analysis.radius.dtype == np.float32
    assert analysis.window_y.dtype == np.int32
    assert root.attrs["input"]["path"] == str(beam_file)
    assert root.attrs["config"]["analyze"]["target_retention"] == 1.0
    assert {"stem_dask", "zarr"} <= set(root.attrs["versions"])


def test_all_files_and_nothing_else(beam_file: Path, make_config: Any, tmp_path: Path) -> None:
    config = make_config(beam_file, output={"export": ["pt", "hspy"], "figure": True})
    outcome = run(config)
    made = "beam.npy out.hspy out.pt out.run out.zarr out_report.html out_results.json out_visualization.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == made.split()
    results = json.loads((tmp_path / "out_results.json").read_text())
    assert results["analysis"]["n_patterns"] == 30
    assert results["analysis"]["original_shape"] == [40, 36]
    assert len(results["analysis"]["centers"]) == 30
    assert results["validation"]["passes_min_threshold"] == 30
    assert results["sizes"]["input_bytes"] == 6 * 5 * 40 * 36 * 2
    parts = "processing_time config speed peak_memory warnings scan_shape"
    assert {*parts.split()} <= results.keys()
    assert any(line.startswith("retention   mean") for line in outcome.lines)
    torch = pytest.importorskip("torch")
    tensor = torch.load(tmp_path / "out.pt", weights_only=True)["patterns"]
    assert tensor.dtype == torch.int32


@pytest.mark.parametrize("kind", ["threads", "local"])
def test_scheduler_does_not_change_a_byte(
    beam_file: Path, make_config: Any, tmp_path: Path, kind: str
) -> None:
    sections = {"output": {"export": ["pt", "hspy"], "chunk_mb": 0.02}, "downsample": {"factor": 2}}
    one = make_config(beam_file, "one.zarr", **sections)
    other = make_config(
        beam_file, "other.zarr", **sections, cluster={"kind": kind, "threads_per_worker": 1}
    )
    run(one)
    run(other)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()
    chunks = sorted((tmp_path / "one.zarr").rglob("c.*"))
    assert len(chunks) > 20
    for path in chunks:
        twin = tmp_path / "other.zarr" / path.relative_to(tmp_path / "one.zarr")
        assert path.read_bytes() == twin.read_bytes(), path


def test_downsampled_output_has_the_means_and_its_own_frame(
    beam_file: Path, make_config: Any
) -> None:
    config = make_config(
        beam_file, downsample={"factor": 2}, crop={"align": "pattern", "coverage": 1.0}
    )
    run(config)
    root = xr.open_zarr(config.output.path)
    analysis = xr.open_zarr(config.output.path, group="analysis")
    inside = (analysis.retention * analysis.total).values
    assert np.allclose(root.patterns.values.sum((2, 3)) * 4, inside)
    assert root.patterns.dtype == np.float32
    expected = (analysis.center_y - analysis.window_y - 0.5) / 2
    assert np.allclose(analysis.center_out_y, expected)
    assert analysis.attrs["intensity"] == "mean counts per source pixel"
    assert root.patterns.attrs["k_origin"] == "window_center"
    assert float(root.ky[0]) == -(analysis.attrs["window_size"][0] // 2) + 0.5


def test_crop_disabled_skips_the_analysis_and_a_remainder_is_reported(
    beam_file: Path, make_config: Any
) -> None:
    config = make_config(
        beam_file,
        crop={"enabled": False},
        downsample={"factor": 3},
        output={"export": ["pt"], "figure": True},
    )
    outcome = run(config)
    root = xr.open_zarr(config.output.path)
    assert root.patterns.shape == (6, 5, 13, 12)
    assert not (Path(config.output.path) / "analysis").exists()
    text = "downsampling by 3 drops the last 1 of 40 pixels of ky"
    assert text in outcome.results["warnings"]
    assert "mean_retention" not in outcome.results["validation"]
    np.save(beam_file, np.ones((2, 2, 9, 8), np.uint16))
    outcome = run(make_config(beam_file, "whole.zarr", downsample={"factor": 2}))
    text = "downsampling by 2 drops the last 1 of 9 pixels of ky, 11.111% of the intensity"
    assert text in outcome.results["warnings"]


def test_second_equal_run_is_complete_and_a_changed_one_is_refused(
    beam_file: Path, make_config: Any
) -> None:
    config = make_config(beam_file)
    outcome = run(config)
    before = (Path(config.output.path) / "zarr.json").read_bytes()
    assert run(config).lines == (f"already complete: {config.output.path}", *outcome.lines)
    with pytest.raises(
        OutputExistsError, match=r"other options \(analyze.target_retention\).*overwrite=true"
    ):
        run(make_config(beam_file, analyze={"target_retention": 0.97}))
    assert (Path(config.output.path) / "zarr.json").read_bytes() == before
    run(make_config(beam_file, analyze={"target_retention": 0.97}, output={"overwrite": True}))
    again = xr.open_zarr(config.output.path, group="analysis")
    assert again.attrs["target_retention"] == 0.97
    np.save(beam_file, np.load(beam_file)[:5])
    with pytest.raises(OutputExistsError, match="another state of the input"):
        run(make_config(beam_file, analyze={"target_retention": 0.97}))


def test_a_failed_run_leaves_the_older_output(
    beam_file: Path, make_config: Any, tmp_path: Path
) -> None:
    run(make_config(beam_file))
    before = sorted(path.name for path in tmp_path.iterdir())
    stored = xr.open_zarr(tmp_path / "out.zarr").patterns.values
    np.save(beam_file, np.zeros((6, 5, 40, 36), np.uint16))
    with pytest.raises(SourceError, match="every pattern is empty"):
        run(make_config(beam_file, output={"overwrite": True}))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [name for name in before if name != "out.run"]
    assert np.array_equal(xr.open_zarr(tmp_path / "out.zarr").patterns.values, stored)


def test_coverage_allows_for_outliers(tmp_path: Path, make_config: Any) -> None:
    data = np.zeros((10, 10, 32, 32), np.uint16)
    data[:, :, 14:18, 14:18] = 5
    data[4, 4] = 0
    data[4, 4, 2, 2] = data[4, 4, 29, 29] = 9
    np.save(tmp_path / "outlier.npy", data)
    loose = run(make_config(tmp_path / "outlier.npy", "a.zarr", crop={"coverage": 0.99}))
    assert loose.exit_code == 0
    assert loose.results["analysis"]["cropped_shape"] == (10, 10)
    assert loose.results["validation"]["min_retention"] == 0.0
    strict = run(make_config(tmp_path / "outlier.npy", "b.zarr", crop={"coverage": 1.0}))
    assert strict.results["analysis"]["cropped_shape"] == (32, 32)
    assert strict.results["window"]["set_by_patterns"] == [[4, 4]]


def test_float16_is_refused_before_anything_is_written(tmp_path: Path, make_config: Any) -> None:
    np.save(tmp_path / "big.npy", np.full((2, 2, 8, 8), 70000, np.uint32))
    config = make_config(tmp_path / "big.npy", output={"dtype": "float16"})
    with pytest.raises(ConfigError, match=r"65504.*reach 70000"):
        run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["big.npy"]


def test_mask_roi_and_step_come_first(tmp_path: Path, make_config: Any) -> None:
    data = np.ones((8, 9, 16, 16), np.uint16)
    data[:, :, 3, 3] = 60000
    np.save(tmp_path / "hot.npy", data)
    config = make_config(
        tmp_path / "hot.npy",
        input={"scan_roi": [1, 8, 0, 9], "scan_step": 2, "mask": {"pixels": [[3, 3]]}},
        crop={"size": 8},
        validate={"min_retention": 0.0},
    )
    outcome = run(config)
    analysis = xr.open_zarr(config.output.path, group="analysis")
    assert analysis.total.shape == (4, 5)
    assert np.array_equal(analysis.total, np.full((4, 5), 255.0))
    assert outcome.results["scan_shape"] == (4, 5)
    assert xr.open_zarr(config.output.path).scan_y.values.tolist() == [1, 3, 5, 7]


def test_list_of_patterns(tmp_path: Path, make_config: Any) -> None:
    data = np.zeros((7, 20, 24), np.float32)
    data[:, 8:12, 10:14] = np.arange(1, 8)[:, None, None]
    data[3] = 0
    np.save(tmp_path / "list.npy", data)
    config = make_config(tmp_path / "list.npy", output={"export": ["pt", "hspy"], "figure": True})
    outcome = run(config)
    root = xr.open_zarr(config.output.path)
    assert root.patterns.dims == ("pattern", "ky", "kx")
    assert outcome.results["validation"]["n_empty"] == 1
    assert np.isnan(xr.open_zarr(config.output.path, group="analysis").radius.values[3])


def test_progress_and_words(beam_file: Path, make_config: Any) -> None:
    said: list[str] = []
    steps: list[tuple[str, int, int]] = []
    run(
        make_config(beam_file, output={"chunk_mb": 0.02}),
        say=said.append,
        progress=lambda step: steps.append((step.stage, step.done, step.total)),
    )
    assert any("127.0.0.1" in text for text in said)
    n_survey, n = steps[0][2], steps[-1][2]
    assert n > 1
    assert steps[:n_survey] == [("survey", i + 1, n_survey) for i in range(n_survey)]
    assert steps[n_survey:] == [("analyze", i + 1, n) for i in range(n)] + [
        ("crop", i + 1, n) for i in range(n)
    ]


STAGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "crop": ({"crop": {"size": 8}, "output": {"export": ["npy", "pt"]}}, ["survey", "analyze", "crop", "export npy", "export pt"]),
    "no survey": (
        {"analyze": {"center_method": "centroid", "ignore_bad_pixels": False}},
        ["analyze", "crop"],
    ),
    "normalize": ({"output": {"normalize": "log-zscore"}}, ["survey", "analyze", "downsample", "normalize"]),
    "convert": ({"crop": {"enabled": False}}, ["convert"]),
    "ahead": ({"crop": {"enabled": False}, "analyze": {"ahead": True}}, ["survey", "convert"]),
    "mask": ({"crop": {"enabled": False}, "input": {"mask": "auto"}}, ["survey", "convert"]),
    "analysis alone": ({"output": {"patterns": False}}, ["survey", "analyze"]),
    "turn": ({"input": {"scan_order": "detector_first"}}, ["turn", "survey", "analyze", "crop"]),
}  # fmt: skip


@pytest.mark.parametrize("name", [*STAGES])
def test_stages_are_counted(
    name: str, beam_file: Path, make_config: Any, shared_cluster: Any, monkeypatch: Any
) -> None:
    """Every step says which stage it belongs to, and of how many."""
    sections, stages = STAGES[name]
    monkeypatch.setattr("stem_dask.job.budget.CACHED_SHARE", 0)
    sections.setdefault("input", {})["path"] = str(beam_file)
    steps: list[Any] = []
    run(make_config(beam_file, **sections), progress=steps.append, connection=shared_cluster)
    seen = dict.fromkeys((step.number, step.stage, step.n_stages) for step in steps)
    assert [*seen] == [(i, stage, len(stages)) for i, stage in enumerate(stages, 1)]
    later = {step.stage: step.later for step in steps}
    assert later[stages[-1]] == 0
    if name == "crop":
        size = np.load(beam_file).nbytes
        exports = 2 * 4 * 6 * 5 * 8 * 8 * 2 / size  # of (6, 5, 8, 8) uint16
        assert later == {
            "survey": None,
            "analyze": pytest.approx(1 + exports),
            "crop": pytest.approx(exports),
            "export npy": 1,
            "export pt": 0,
        }


def test_a_reused_analysis_is_no_stage(
    beam_file: Path, make_config: Any, shared_cluster: Any
) -> None:
    config = make_config(beam_file)
    run(config, connection=shared_cluster)
    steps: list[Any] = []
    other = make_config(beam_file, "b.zarr", analyze={"from": config.output.path})
    run(other, progress=steps.append, connection=shared_cluster)
    seen = dict.fromkeys((step.number, step.stage, step.n_stages) for step in steps)
    assert [*seen] == [(1, "crop", 1)]


def test_a_sample_that_is_read_again_does_not_count_back(
    beam_file: Path, make_config: Any, shared_cluster: Any
) -> None:
    def stop(step: Any) -> None:
        if step.stage == "crop":
            raise KeyboardInterrupt

    config = make_config(beam_file)
    with pytest.raises(KeyboardInterrupt):
        run(config, progress=stop, connection=shared_cluster)
    shutil.rmtree(config.output.path.replace(".zarr", ".run") + "/sample")
    steps: list[Any] = []
    run(config, progress=steps.append, connection=shared_cluster)
    numbers = [step.number for step in steps]
    assert numbers == sorted(numbers)
    assert {step.n_stages for step in steps} == {3}


def test_too_little_memory_does_not_drop_an_unfinished_run(
    beam_file: Path, make_config: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The same command on a smaller machine is refused; on the first one it goes on where it was."""
    config = make_config(beam_file, output={"chunk_mb": 0.01})
    with monkeypatch.context() as patch:
        patch.setattr("stem_dask.job.passes.complete_analysis", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config)
    journal = (tmp_path / "out.run" / "journal").read_bytes()
    assert b'"crop"' in journal
    small = {"kind": "threads", "threads_per_worker": 2, "memory_limit": "200MB"}
    with pytest.raises(MemoryBudgetError, match=r"cannot hold a single pattern"):
        run(make_config(beam_file, output={"chunk_mb": 0.01}, cluster=small))
    assert (tmp_path / "out.run" / "journal").read_bytes() == journal
    assert run(config).exit_code == 0
