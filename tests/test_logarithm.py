"""What a store keeps of log(1 + x): by position and by pixel, compared with numpy and the slow twin."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import twins
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_dask.job.run import run
from stem_dask.kernels.logarithm import LOOKED_UP, add_logs

DTYPES = ("?", "u1", "u2", ">u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
#: the standard deviation of a pattern of equal values is a small number instead of 0
FLAT = 1e-6


def counts(rng: Any, n: int, dtype: str, odd: bool = True) -> np.ndarray:
    """Sparse and dense patterns (n, 9, 35), the first one empty; a few with values that have no logarithm."""
    kind = np.dtype(dtype).kind
    mean = rng.choice([0.01, 0.3, 5.0], (n, 1, 1))
    block = rng.poisson(mean, (n, 9, 35)).astype(float)
    block[0] = 0
    block[1:, 4, 7] += 1
    if kind == "f":
        block *= 0.37
    if odd and kind in "if":
        block[rng.random(n) < 0.2, 8, 34] = -1
    if odd and kind == "f":
        block[rng.random(n) < 0.1, 0, 1] = np.nan
        block[rng.random(n) < 0.1, 0, 0] = np.inf
    return block.clip(-1, 100).astype(dtype) if kind != "f" else block.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 14), cut=st.integers(0, 14))
def test_the_kernel_against_its_twin(dtype: str, seed: int, n: int, cut: int) -> None:
    """And the batches do not change a bit."""
    block = counts(np.random.default_rng(seed), n, dtype)
    total, again = np.zeros((9, 35)), np.zeros((9, 35))
    mean, std = found = add_logs(block, total)
    wanted = np.array([twins.logs(pattern) for pattern in block]).T
    np.testing.assert_allclose(mean, wanted[0], rtol=1e-13)
    np.testing.assert_allclose(std, wanted[1], rtol=1e-12, atol=FLAT)
    assert mean[0] == 0 or np.isnan(mean[0])
    good = block[np.isfinite(wanted[0])].astype(np.float64)
    np.testing.assert_allclose(total, np.log1p(good).sum(axis=0), rtol=1e-13)
    parts = np.concatenate([add_logs(part, again) for part in (block[:cut], block[cut:])], axis=1)
    np.testing.assert_array_equal(parts, found)
    np.testing.assert_array_equal(again, total)


@pytest.mark.parametrize("dtype", ["u4", "i4", "u8", "i8", "f4", "f8"])
def test_values_above_the_table(dtype: str) -> None:
    most = np.iinfo(dtype).max if dtype[0] != "f" else 1e30
    values = [0, 1, LOOKED_UP - 1, LOOKED_UP, LOOKED_UP + 1, most]
    block = np.array(values, dtype).reshape(6, 1, 1)
    total = np.zeros((1, 1))
    logs = np.log1p(block[:, 0, 0], dtype=np.float64)
    np.testing.assert_allclose(add_logs(block, total)[0], logs, rtol=1e-15)
    assert total[0, 0] == pytest.approx(logs.sum(), rel=1e-15)
    np.testing.assert_array_equal(add_logs(block[:3], total)[0], logs[:3])


@pytest.mark.parametrize("value", [1.0, 4e4])
def test_patterns_of_equal_values(value: float) -> None:
    mean, std = add_logs(np.full((3, 200, 300), value, "f4"), np.zeros((200, 300)))
    np.testing.assert_allclose(mean, np.log1p(value), rtol=1e-12)
    assert 0 <= std.max() < FLAT


def write(folder: Path, dtype: str, lead: tuple[int, ...] = (3, 4)) -> Path:
    block = counts(np.random.default_rng(1), int(np.prod(lead)), dtype, odd=False)
    np.save(folder / "in.npy", block.reshape(*lead, 9, 35))
    return folder / "in.npy"


@pytest.mark.parametrize(
    ("dtype", "lead", "sections"),
    [
        ("u1", (3, 4), {"crop": {"size": [8, 12], "align": "fixed"}}),
        ("u2", (3, 4), {"crop": {"size": [8, 12], "align": "pattern"}}),
        ("i4", (3, 4), {"crop": {"enabled": False}}),
        ("u2", (3, 4), {"crop": {"enabled": False}, "analyze": {"ahead": True}}),
        ("u2", (3, 4), {"crop": {"size": [8, 12]}, "downsample": {"factor": 2}}),
        ("f4", (12,), {"crop": {"enabled": False}, "downsample": {"factor": 2, "method": "stride"}}),
        ("f8", (3, 4), {"crop": {"enabled": False}, "output": {"dtype": "float16"}}),
    ],
)  # fmt: skip
def test_a_store_holds_them(
    dtype: str, lead: tuple[int, ...], sections: dict[str, Any], make_config: Any, tmp_path: Path
) -> None:
    """Of the patterns as they are stored; constants of any positions follow."""
    output = {"chunk_mb": 0.003, **sections.get("output", {})}
    config = make_config(write(tmp_path, dtype, lead), **{**sections, "output": output})
    run(config)
    patterns = xr.open_zarr(config.output.path).patterns
    stored = xr.open_zarr(config.output.path, group="output")
    logs = np.log1p(patterns.values, dtype=np.float64)
    np.testing.assert_allclose(stored.log_mean, logs.mean((-2, -1)), rtol=1e-13)
    np.testing.assert_allclose(stored.log_std, logs.std((-2, -1)), rtol=1e-12, atol=FLAT)
    axes = tuple(range(len(lead)))
    np.testing.assert_allclose(stored.log_mean_pattern, logs.mean(axes), rtol=1e-13)
    assert stored.log_mean.dims == stored.log_std.dims == patterns.dims[:-2]
    assert stored.log_mean_pattern.dims == ("ky", "kx")
    assert {stored[name].dtype.str for name in stored.data_vars} == {"<f8"}
    about = {"long_name": "mean of log(1 + x) over the output patterns", "units": "1"}
    assert stored.log_mean_pattern.attrs == about
    empty = ~patterns.values.any((-2, -1))
    assert empty.flat[0]
    assert np.array_equal(stored.log_mean.values == 0, empty)
    part = np.arange(12).reshape(lead) % 5 < 2
    mean, std = stored.log_mean.values[part], stored.log_std.values[part]
    whole = mean.mean()
    assert whole == pytest.approx(logs[part].mean(), rel=1e-12)
    squares = (std**2 + (mean - whole) ** 2).mean()
    assert squares**0.5 == pytest.approx(logs[part].std(), rel=1e-12)


def test_patterns_without_logarithms(make_config: Any, tmp_path: Path) -> None:
    """They are NaN, and are not in the mean by pixel; when no pattern is left, that is 0."""
    data = np.load(write(tmp_path, "f4"))
    data[0, 1, 2, 3], data[1, 2, 0, 0], data[2, 3, 8, 34] = -0.5, np.nan, np.inf
    odd = np.zeros((3, 4), bool)
    odd[0, 1] = odd[1, 2] = odd[2, 3] = True
    np.save(tmp_path / "odd.npy", data)
    np.save(tmp_path / "none.npy", np.full_like(data, -1))
    convert = {"crop": {"enabled": False}}
    for name in ("odd", "none"):
        run(make_config(tmp_path / f"{name}.npy", f"{name}.zarr", **convert))
    stored = xr.open_zarr(tmp_path / "odd.zarr", group="output")
    assert np.array_equal(np.isnan(stored.log_mean), odd)
    assert np.array_equal(np.isnan(stored.log_std), odd)
    logs = np.log1p(data[~odd], dtype=np.float64)
    np.testing.assert_allclose(stored.log_mean_pattern, logs.mean(0), rtol=1e-13)
    stored = xr.open_zarr(tmp_path / "none.zarr", group="output")
    assert np.isnan(stored.log_mean).all()
    assert not stored.log_mean_pattern.any()


def test_stores_of_z_scores_and_other_formats_do_not(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stem_dask.job.passes.pattern_logs", None)  # is not called
    path, convert = write(tmp_path, "u2"), {"crop": {"enabled": False}}
    run(make_config(path, "z.zarr", **convert, output={"normalize": "log-zscore"}))
    assert list(xr.open_zarr(tmp_path / "z.zarr", group="output").data_vars) == ["mean_pattern"]
    run(make_config(path, "out.npy", **convert))


def arrays(store: Path, *names: str) -> list[bytes]:
    """The bytes of arrays in the group ``output``."""
    files = (path for name in names for path in sorted((store / "output" / name).rglob("*")))
    return [path.read_bytes() for path in files if path.is_file()]


def test_blocks_and_a_stop_change_nothing(make_config: Any, tmp_path: Path) -> None:
    """The sum by pixel is added up block by block, in their order; what belongs to a position is its own."""
    path, by_position = write(tmp_path, "f4"), ("log_mean", "log_std")
    crop = {"size": [8, 12], "align": "pattern"}
    small = {"chunk_mb": 0.003}
    run(make_config(path, "small.zarr", crop=crop, output=small))
    run(make_config(path, "large.zarr", crop=crop))
    wanted = arrays(tmp_path / "small.zarr", *by_position)
    assert len(wanted) == 4
    assert arrays(tmp_path / "large.zarr", *by_position) == wanted

    class Stopped(Exception):
        pass

    def stop(step: Any) -> None:
        if step.stage == "crop" and step.done == 2:
            raise Stopped

    stopped = make_config(path, "stopped.zarr", crop=crop, output=small)
    with pytest.raises(Stopped):
        run(stopped, progress=stop)
    run(stopped)
    every = (*by_position, "log_mean_pattern")
    assert arrays(tmp_path / "stopped.zarr", *every) == arrays(tmp_path / "small.zarr", *every)
