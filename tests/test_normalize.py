"""log(1 + x), then mean 0 and standard deviation 1 over a whole dataset, out of core."""

import json

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

import stem_dask as sd
from stem_dask.core.errors import ConfigError
from stem_dask.core.model import Axis
from stem_dask.core.patterns import as_patterns
from stem_dask.job.run import run
from stem_dask.kernels.pixels import joined, log_moments, log_zscore
from stem_dask.stages.normalize import log_constants, log_statistics, normalize

RNG = np.random.default_rng(3)
COUNTS = RNG.poisson(3, (4, 5, 6, 7)).astype(np.uint16)


def zscores(counts):
    """The slow twin: all at once, in float64."""
    logs = np.log1p(counts.astype(np.float64))
    return (logs - logs.mean()) / logs.std(ddof=0)


def lazy(array, chunks):
    axes = [Axis(n, s) for n, s in zip(("scan_y", "scan_x", "ky", "kx"), array.shape, strict=True)]
    return as_patterns(da.from_array(array, chunks=(*chunks, -1, -1)), axes)


@pytest.mark.parametrize("dtype", ["u1", ">u2", "i4", "f2", "f4", "f8", "u8"])
def test_moments_and_scores_are_those_of_numpy(dtype):
    patterns = COUNTS[0].astype(dtype)
    logs = np.log1p(patterns.astype(np.float64))
    n, mean, squares, lowest = log_moments(patterns)
    assert (n, lowest) == (logs.size, 0)
    assert mean == pytest.approx(logs.mean(), rel=1e-13)
    assert squares == pytest.approx(logs.var() * logs.size, rel=1e-12)
    scores = log_zscore(patterns, 0.25, 0.5)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, (logs - 0.25) / 0.5, rtol=1e-6, atol=1e-6)


def moments_of(patterns):
    """The moments of every block."""
    raw = log_statistics(patterns)
    return [raw.blocks[i].compute().get()["moments"] for i in np.ndindex(*raw.numblocks)]


@settings(deadline=None, max_examples=20)
@given(cuts=st.tuples(st.integers(1, 4), st.integers(1, 5)))
def test_constants_do_not_depend_on_the_blocks(cuts):
    found = log_constants(moments_of(lazy(COUNTS, cuts)))
    logs = np.log1p(COUNTS.astype(np.float64))
    assert found["mean"] == pytest.approx(logs.mean(), rel=1e-12)
    assert found["std"] == pytest.approx(logs.std(), rel=1e-12)
    scores = normalize(lazy(COUNTS, cuts), **found)
    np.testing.assert_allclose(scores.values, zscores(COUNTS), rtol=1e-5, atol=1e-6)
    assert scores.attrs["normalization"] == {"method": "log-zscore", **found}


def test_large_offsets_lose_no_digits():
    patterns = (1e12 + RNG.random((50, 8, 8))).astype(np.float64)
    n, _, squares, _ = log_moments(patterns)
    logs = np.log1p(patterns)
    assert squares / n == pytest.approx(logs.var(), rel=1e-2, abs=1e-30)
    assert log_moments(np.array([[[True, False]]]))[1] == pytest.approx(np.log(2) / 2)
    some, nothing = log_moments(COUNTS[0]), log_moments(COUNTS[0, :0])
    assert joined(nothing, some).tolist() == some.tolist()
    assert joined(nothing, nothing)[0] == 0


@pytest.mark.parametrize(
    ("value", "words"), [(-3, "hold -3"), (np.nan, "hold nan"), (-np.inf, "hold -inf")]
)
def test_negatives_and_nan_are_refused(value, words):
    counts = COUNTS.astype(np.float64)
    counts[3, 1, 2, 2] = value
    with pytest.raises(ConfigError, match=f"log-zscore.*{words}.*output.normalize=none"):
        log_constants(moments_of(lazy(counts, (2, 5))))
    with pytest.raises(ConfigError, match="all values are the same"):
        log_constants(moments_of(lazy(np.ones_like(COUNTS), (2, 5))))


# --- the whole job ------------------------------------------------------------------------------------------------


@pytest.fixture
def config(beam_file, tmp_path, make_config):
    def make(name="y.pt", **sections):
        output = {"normalize": "log-zscore", "layout": "tensor", "chunk_mb": 0.02}
        given = {"crop": {"enabled": False}, **sections}
        given["output"] = {**output, **sections.get("output", {})}
        return make_config(beam_file, name, **given)

    return make


def expected(path):
    """Downsample (gauss by 2), then normalize: all in memory."""
    counts = np.load(path).astype(np.float64)
    blurred = [[gaussian_filter(p, 1.0, truncate=4)[::2, ::2] for p in row] for row in counts]
    return zscores(np.array(blurred, np.float32))


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-5), ("float16", 4e-3)])
def test_a_tensor(config, beam_file, tmp_path, dtype, atol):
    job = config(downsample={"factor": 2, "method": "gauss"}, output={"dtype": dtype})
    outcome = run(job)
    tensor = torch.load(tmp_path / "y.pt")
    assert tensor.shape == (30, 1, 20, 18)
    assert str(tensor.dtype) == f"torch.{dtype}"
    wanted = expected(beam_file).reshape(tensor.shape)
    np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-3, atol=atol)
    found = json.loads((tmp_path / "y.pt_results.json").read_text())["normalization"]
    assert found == dict(outcome.results["normalization"])
    assert any("z-scores of log(1 + counts)" in line for line in outcome.lines)
    assert sorted(p.name for p in (tmp_path / "y.pt.run").iterdir()) == [
        "journal", "report.json", "run.json",
    ]  # fmt: skip
    assert run(job).lines[0] == f"already complete: {tmp_path}/y.pt"


def test_a_store_says_its_constants(config, beam_file, tmp_path):
    run(config("y.zarr", output={"export": ["pt"], "layout": "scan"}))
    root = xr.open_zarr(tmp_path / "y.zarr")
    np.testing.assert_allclose(root.patterns, zscores(np.load(beam_file)), rtol=1e-5, atol=1e-5)
    assert set(root.patterns.attrs["normalization"]) == {"method", "mean", "std"}
    assert "z-score" in root.patterns.attrs["intensity"]
    there = torch.load(tmp_path / "y.pt")
    np.testing.assert_array_equal(there["patterns"], root.patterns)


def test_a_crop_is_normalized_in_one_job(config, tmp_path, make_config, beam_file):
    """The z-scores are those of the cropped, smaller patterns; what was kept is told as without them."""
    np.save(beam_file, np.load(beam_file).astype("u4") * 7000)  # more than float16 holds
    sections = {"crop": {"align": "pattern", "margin_pixels": 1}, "downsample": {"factor": 2}}
    plain = run(make_config(beam_file, "plain.zarr", **sections))
    output = {"export": ["pt"], "dtype": "float16"}
    found = run(config("y.zarr", output=output, **sections))
    counts, scores = (xr.open_zarr(tmp_path / f"{name}.zarr") for name in ("plain", "y"))
    np.testing.assert_allclose(scores.patterns, zscores(counts.patterns.values), atol=4e-3)
    assert scores.patterns.dtype == np.float16
    for key in ("window", "validation"):
        assert found.results[key] == plain.results[key]
    assert set(found.results["normalization"]) == {"method", "mean", "std"}
    mine, theirs = (
        xr.open_zarr(tmp_path / f"{name}.zarr", group="analysis") for name in ("y", "plain")
    )
    np.testing.assert_array_equal(mine.retention, theirs.retention)
    assert torch.load(tmp_path / "y.pt").shape == (30, 1, *counts.patterns.shape[-2:])


def test_what_was_stopped_goes_on(config, tmp_path):
    whole = config("whole.pt")
    run(whole)
    for stage, n in (("downsample", 2), ("normalize", 4)):
        job, done = config(f"{stage}.pt"), []

        def stop(step, stage=stage, n=n, done=done):
            done.append(step.stage)
            if done.count(stage) == n:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(job, progress=stop)
        run(job)
        assert (tmp_path / f"{stage}.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


def test_negative_counts_leave_nothing(tmp_path, make_config):
    np.save(tmp_path / "n.npy", COUNTS.astype(np.int16) - 1)
    output = {"normalize": "log-zscore", "layout": "tensor"}
    job = make_config(tmp_path / "n.npy", "n.pt", crop={"enabled": False}, output=output)
    with pytest.raises(ConfigError, match="hold -1"):
        run(job)
    assert [path.name for path in tmp_path.iterdir()] == ["n.npy"]


@pytest.mark.parametrize(
    ("name", "sections", "expected"),
    [
        ("out.pt", {"normalize": "log-zscore", "layout": "tensor"}, "z-score of log(1 + counts)"),
        ("out.pt", {"normalize": "log-zscore", "layout": "scan"}, "z-score of log(1 + counts)"),
        ("out.npy", {"normalize": "log-zscore"}, "z-score of log(1 + counts)"),
        ("out.zarr", {"normalize": "log-zscore", "export": ["pt"], "layout": "tensor"}, "z-score of log(1 + counts)"),
        ("out.pt", {"layout": "tensor"}, "counts"),
    ],
)  # fmt: skip
def test_an_opened_tensor_says_what_its_values_are(make_config, tmp_path, name, sections, expected):
    np.save(tmp_path / "counts.npy", COUNTS)
    sections = {"output": sections, "crop": {"enabled": False}}
    for factor in (1, 2):
        folder = tmp_path / str(factor)
        config = make_config(
            tmp_path / "counts.npy", f"{factor}/{name}", downsample={"factor": factor}, **sections
        )
        run(config)
        means = (
            expected.replace("counts", "mean counts per source pixel") if factor == 2 else expected
        )
        for path in sorted(folder.glob("out.*")):
            if path.suffix in (".pt", ".npy", ".zarr"):
                assert sd.open(path).intensity == means, path


def test_results_beside_another_tensor_say_nothing_of_it(make_config, tmp_path):
    np.save(tmp_path / "counts.npy", COUNTS)
    output = {"normalize": "log-zscore", "layout": "tensor"}
    run(make_config(tmp_path / "counts.npy", "out.pt", output=output, crop={"enabled": False}))
    results = json.loads((tmp_path / "out.pt_results.json").read_text())
    del results["intensity"]  # as of earlier versions
    (tmp_path / "out.pt_results.json").write_text(json.dumps(results))
    assert sd.open(tmp_path / "out.pt").intensity == "z-score of log(1 + counts)"
    torch.save(torch.ones(4, 5, 6, 8), tmp_path / "out.pt")
    assert sd.open(tmp_path / "out.pt").intensity == "counts"
    for text in ("", "[]", '{"output": 3}', "{" * 5000):
        (tmp_path / "out.pt_results.json").write_text(text)
        assert sd.open(tmp_path / "out.pt").intensity == "counts"
