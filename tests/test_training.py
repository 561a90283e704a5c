"""`PatternDataset` yields the right values for every format, type and option, and leaves out missing and empty patterns."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import training_made as made
import twins
import xarray as xr
import zarr

import stem_dask as sd
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.stages.export import export_from_store
from stem_dask.training import reading

torch = pytest.importorskip("torch", reason="the package torch is not installed")

METHODS = ("none", "log", "sqrt", "log-zscore")


def whole(ds: Any) -> Any:
    """All patterns of a dataset, (N, H, W)."""
    return torch.stack([sample["patterns"] for sample in ds.__getitems__(range(len(ds)))])[:, 0]


def stored(path: Any, **options: Any) -> Any:
    return sd.PatternDataset(path, **{"normalize": "none", "dtype": "stored"} | options)


# --- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", made.FORMATS)
def test_values_and_positions_of_each_format(name: str, tmp_path: Path) -> None:
    data = made.counts()
    path = made.FORMATS[name](tmp_path, data)
    data = data[..., :12, :] if name == "blo" else data
    shape = {"scan_shape": (7, 11)} if name == "mib" else {}
    for options in ({}, {"scan_step": 2}, {"scan_roi": (1, 6, 2, 11), "scan_step": 3}):
        ds = stored(path, **options, **shape)
        y0, y1, x0, x1 = options.get("scan_roi", (0, 7, 0, 11))
        step = options.get("scan_step", 1)
        lead = len(range(y0, y1, step)), len(range(x0, x1, step))
        where = np.array([(0, y, x) for y in range(y0, y1, step) for x in range(x0, x1, step)])
        np.testing.assert_array_equal(ds.positions, where)
        assert (len(ds), ds.shape) == (len(where), (1, *data.shape[2:]))
        wanted = data[where[:, 1], where[:, 2]]
        np.testing.assert_array_equal(whole(ds).numpy(), wanted)
        back = ds.to_scan(wanted)
        np.testing.assert_array_equal(back.reshape(wanted.shape), wanted)
        assert back.shape == (*lead, *data.shape[2:])
        sample = ds[-1]
        assert sample["index"] == len(ds) - 1
        np.testing.assert_array_equal(sample["patterns"][0].numpy(), wanted[-1])
    assert len(pickle.dumps(ds)) < 10_000


@pytest.mark.parametrize("dtype", made.DTYPES)
@pytest.mark.parametrize(
    "write", [made.npy, made.exported("a.zarr"), made.hdf5(chunks=(2, 3, 16, 12), shuffle=True)]
)
def test_types_and_normalizations(dtype: str, write: Any, tmp_path: Path) -> None:
    data = made.counts((3, 5), dtype=dtype)
    path = write(tmp_path, data)
    flat = data.reshape(15, 16, 12)
    for method in METHODS:
        ds = sd.PatternDataset(path, normalize=method)
        wanted, mean, std = twins.normalize(flat, method)
        found = whole(ds)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-6, atol=2e-6)
        assert ds.normalization.method == method
        assert ds.normalization.mean == pytest.approx(mean, rel=1e-6)
        assert ds.normalization.std == pytest.approx(std, rel=1e-6)
        for half, eps in (("float16", 2**-11), ("bfloat16", 2**-8)):
            small = whole(sd.PatternDataset(path, normalize=method, dtype=half))
            assert small.dtype == getattr(torch, half)
            np.testing.assert_allclose(small.float(), wanted, rtol=1.01 * eps, atol=1e-6)
    kept = whole(stored(path))
    np.testing.assert_array_equal(kept.numpy(), flat)
    kind = np.dtype(dtype)
    if kind.kind in "bu":
        assert kept.dtype == getattr(torch, f"int{min(64, 16 * kind.itemsize)}")
    else:
        assert str(kept.dtype)[6:] == kind.name


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("pedestal", [0.0, 300.0])
def test_logarithms_of_small_floats_and_on_a_pedestal(
    scale: float, pedestal: float, tmp_path: Path
) -> None:
    data = (np.random.default_rng(0).gamma(0.5, scale, (4, 5, 16, 12)) + pedestal * scale).astype(
        "f4"
    )
    path = made.npy(tmp_path, data)
    for method in ("log", "log-zscore"):
        wanted, _, _ = twins.normalize(data.reshape(20, 16, 12), method)
        found = whole(sd.PatternDataset(path, normalize=method)).numpy()
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * min(1, wanted.std()))


@pytest.mark.parametrize("dtype", ["?", "u1", "i2", "u2", ">u2", "u4", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize(
    ("method", "k"), [("bin", 2), ("bin", 3), ("stride", 3), ("gauss", 2), ("fft", 2)]
)
def test_downsampling_before_the_logarithm(method: str, k: int, dtype: str, tmp_path: Path) -> None:
    data = made.counts((3, 4), dtype=dtype)
    path = made.npy(tmp_path, data)
    smaller = sd.downsample(sd.open(path), k, method=method).values.reshape(12, 16 // k, 12 // k)
    ds = sd.PatternDataset(path, downsample=k, method=method, normalize="none")
    np.testing.assert_array_equal(whole(ds).numpy(), smaller.astype("f4"))
    kept = whole(stored(path, downsample=k, method=method))
    np.testing.assert_array_equal(kept.numpy(), smaller)
    if smaller.min() >= 0:
        wanted, mean, _ = twins.normalize(smaller, "log-zscore")
        ds = sd.PatternDataset(path, downsample=k, method=method)
        np.testing.assert_allclose(whole(ds).numpy(), wanted, rtol=2e-6, atol=2e-6)
        assert ds.normalization.mean == pytest.approx(mean, rel=1e-6)


def test_bin_and_stride_as_preprocess(tmp_path: Path) -> None:
    from stem_dask.cli.main import main

    path = made.npy(tmp_path, made.counts((3, 5), (17, 13)))
    for mode in ("bin", "stride"):
        out = tmp_path / f"{mode}.pt"
        command = ["preprocess", "--input", str(path), "--output", str(out), "--downsample", "2"]
        more = ["--mode", mode, "--scan_step", "2", "--normalize", "none", "--quiet"]
        assert main([*command, *more]) == 0
        ds = sd.PatternDataset(path, downsample=2, method=mode, scan_step=2, normalize="none")
        assert torch.equal(whole(ds)[:, None], torch.load(out, weights_only=True))


def test_large_numbers_beyond_the_table(tmp_path: Path) -> None:
    data = made.counts((2, 3), dtype="u4")
    data[0, 1, 3, 3], data[1, 2, 0, 0] = 2**16, 2**31
    path = made.npy(tmp_path, data)
    for method in METHODS:
        wanted, _, _ = twins.normalize(data.reshape(6, 16, 12), method)
        found = whole(sd.PatternDataset(path, normalize=method)).numpy()
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
    with pytest.raises(ConfigError, match=r"float16' does not hold 65536; set dtype='bfloat16'"):
        whole(sd.PatternDataset(path, normalize="none", dtype="float16"))
    np.save(tmp_path / "8.npy", np.array([[[[2**63 - 1, 0]], [[2**63, 1]]]], "u8"))
    ds = stored(tmp_path / "8.npy")
    assert ds[0]["patterns"].tolist() == [[[2**63 - 1, 0]]]
    with pytest.raises(ConfigError, match=r"up to 9,223,372,036,854,775,807"):
        ds[1]
    np.save(tmp_path / "f.npy", np.array([[[[np.inf, 0]], [[np.nan, 1]], [[np.nan, 7e4]]]], "f4"))
    ds = sd.PatternDataset(tmp_path / "f.npy", normalize="none", dtype="float16")
    np.testing.assert_array_equal(
        whole(
            sd.PatternDataset(
                tmp_path / "f.npy", normalize="none", dtype="float16", scan_roi=(0, 1, 0, 2)
            )
        ),
        [[[np.inf, 0]], [[np.nan, 1]]],
    )
    with pytest.raises(ConfigError, match="does not hold 70000"):
        ds[2]


@pytest.mark.parametrize("scan", [(1, 13), (13, 1), (5, 7), (1, 1)])
def test_lines_and_prime_scans(scan: tuple[int, int], tmp_path: Path) -> None:
    data = made.counts(scan)
    ds = stored(made.npy(tmp_path, data), scan_step=3)
    np.testing.assert_array_equal(whole(ds).numpy(), data[::3, ::3].reshape(-1, 16, 12))


def test_a_list_of_patterns(tmp_path: Path) -> None:
    data = made.counts((77,))
    path = made.npy(tmp_path, data)
    np.testing.assert_array_equal(stored(path).positions[:, 1:], [(0, i) for i in range(77)])
    np.testing.assert_array_equal(whole(stored(path)).numpy(), data)
    ds = stored(path, scan_shape=(7, 11), scan_step=2)
    np.testing.assert_array_equal(
        whole(ds).numpy(), data.reshape(7, 11, 16, 12)[::2, ::2].reshape(-1, 16, 12)
    )
    with pytest.raises(SourceError, match="77"):
        stored(path, scan_shape=(7, 12))


def test_the_scan_of_a_bare_tensor_is_in_the_results_beside_it(tmp_path: Path) -> None:
    data = made.counts()
    path = made.exported("t.pt", layout="tensor")(tmp_path, data)
    assert stored(path).to_scan(np.arange(77)).shape == (1, 77)
    for name in ("t.pt_results.json", "t_results.json"):
        (tmp_path / name).write_text(json.dumps({"scan_shape": [7, 11]}))
        ds = stored(path)
        np.testing.assert_array_equal(ds.to_scan(whole(ds)), data)
        (tmp_path / name).unlink()


def test_unwritten_chunks(tmp_path: Path) -> None:
    """HDF5 knows that they were never written; a lost file of a zarr store looks the same."""
    data = made.counts((4, 6))
    data[:2, 3:] = 7
    chunks, written = (2, 3, 16, 12), (np.s_[:2, :3], np.s_[2:, :3], np.s_[2:, 3:])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        out = file.create_dataset(
            "data", data.shape, "u2", chunks=chunks, fillvalue=7, shuffle=True
        )
        for part in written:
            out[part] = data[part]
    np.testing.assert_array_equal(whole(stored(tmp_path / "a.h5")), data.reshape(24, 16, 12))
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=data.shape, dtype="u2", chunks=chunks)
    for part in written:
        array[part] = data[part]
    with pytest.raises(
        SourceError, match=r"c/0/1/0/0 of scan positions y 0 to 1, x 0 to 5 is missing"
    ):
        stored(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    "name", ["au_np_gms_stemx_u16.dm4", "au_np_descan_u16.hspy", "au_np_hot_dead_f32.hspy"]
)
def test_simulated_files(name: str, shared_data: Path) -> None:
    path = shared_data / "sim" / name
    patterns = sd.open(path)
    ds = stored(path, empty="keep")
    np.testing.assert_array_equal(whole(ds).numpy(), patterns.values.reshape(-1, *ds.shape[1:]))
    assert ds.to_scan(np.zeros(len(ds))).shape == patterns.shape[:2]


def test_objects(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_dask.storage.location import at

    data = made.counts((4, 5))
    path = made.run_of(tmp_path, data)
    for file in path.rglob("*"):
        if file.is_file():
            at(f"{bucket}/a.zarr/{file.relative_to(path)}").write_bytes(file.read_bytes())
    monkeypatch.setattr("stem_dask.training.statistics._one_pass", None)  # the store has them
    ds = sd.PatternDataset(f"{bucket}/a.zarr", fields=("position",))
    wanted, _, _ = twins.normalize(data.reshape(20, 16, 12), "log-zscore")
    np.testing.assert_allclose(whole(ds).numpy(), wanted, rtol=2e-6, atol=2e-6)
    found = np.concatenate([b["index"] for b in sd.loader(ds, 4, memory="1MB")])
    assert sorted(found) == list(range(20))


# --- several files ----------------------------------------------------------------------------------------------


def test_joined_files_of_two_types(tmp_path: Path) -> None:
    small, large = made.counts((3, 5), dtype="i2"), made.counts((2, 7), dtype="u4", seed=1)
    small[0, 0, 5, 5], large[1, 1, 5, 5] = -3, 2**32 - 1
    made.npy(tmp_path, small)
    (tmp_path / "b").mkdir()
    paths = [tmp_path / "scan.npy", made.run_of(tmp_path / "b", large)]
    ds = stored(paths)
    joined = np.concatenate([a.reshape(-1, 16, 12).astype("i8") for a in (small, large)])
    np.testing.assert_array_equal(whole(ds).numpy(), joined)
    np.testing.assert_array_equal(
        ds.positions[[0, 14, 15, 28]], [(0, 0, 0), (0, 2, 4), (1, 0, 0), (1, 1, 6)]
    )
    back = ds.to_scan(joined.sum((1, 2)), fill=-1)
    np.testing.assert_array_equal(back[0], small.sum((2, 3)))
    np.testing.assert_array_equal(back[1], large.sum((2, 3)))
    with pytest.raises(ConfigError, match=r"scan\.npy.*\(0, 0\).*negative"):
        whole(sd.PatternDataset(paths, normalize="log"))
    halves = sd.PatternDataset(paths, downsample=2, normalize="none")  # sums beside means
    wanted = np.concatenate([sd.downsample(sd.open(p), 2).values.reshape(-1, 8, 6) for p in paths])
    np.testing.assert_allclose(whole(halves).numpy(), wanted, rtol=1e-7)


def test_files_of_unequal_patterns_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", made.counts((2, 3), (16, 12)))
    np.save(tmp_path / "b.npy", made.counts((2, 3), (16, 14)))
    with pytest.raises(ConfigError, match=r"a\.npy.*16 x 12.*b\.npy.*16 x 14.*crop\.size=common"):
        sd.PatternDataset([tmp_path / "a.npy", tmp_path / "b.npy"])
    with pytest.raises(ConfigError, match="empty list"):
        sd.PatternDataset([])


def test_constants_of_another_dataset(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", made.counts((2, 3)))
    np.save(tmp_path / "b.npy", made.counts((2, 3), seed=1) * 3)
    ours = sd.PatternDataset(tmp_path / "a.npy").normalization
    ds = sd.PatternDataset(tmp_path / "b.npy", normalize=ours)
    assert ds.normalization == ours
    wanted = (np.log1p(np.load(tmp_path / "b.npy").astype("f8")) - ours.mean) / ours.std
    np.testing.assert_allclose(whole(ds).numpy(), wanted.reshape(6, 16, 12), rtol=2e-6, atol=2e-6)


def test_fill_values_of_a_map(tmp_path: Path) -> None:
    data = made.counts((3, 5))
    data[1, 2] = 0
    with pytest.warns(UserWarning, match="1 that are zero everywhere"):
        ds = sd.PatternDataset(made.npy(tmp_path, data), normalize="none")
    for values, fill, dtype in (
        (np.arange(14), np.nan, "f8"), (np.arange(14), -1, "i8"), (np.arange(14, dtype="u1"), -1, "i2"), (np.arange(14), 0.5, "f8"),
        (np.arange(14, dtype="f4"), np.nan, "f4"), (np.ones(14, bool), False, "?"), (np.arange(14, dtype="u1"), 255, "u1"),
    ):  # fmt: skip
        found = ds.to_scan(values, fill=fill)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found[1, 2], fill)
        np.testing.assert_array_equal(np.delete(found.ravel(), 7), values)
    assert ds.to_scan(torch.ones(14, 3)).shape == (3, 5, 3)
    with pytest.raises(ConfigError, match="13 values for 14 patterns"):
        ds.to_scan(np.zeros(13))


# --- left out, refused ------------------------------------------------------------------------------------------


@pytest.fixture
def quarantined(tmp_path: Path) -> tuple[Path, Any]:
    """A store of a run whose input was damaged in rows 2 and 3; one more pattern is empty."""
    data = made.counts((7, 5))
    data[5, 1] = 0
    source = tmp_path / "damaged.zarr"
    zarr.create_array(str(source), data=data, chunks=(2, 5, 16, 12))
    (source / "c" / "1" / "0" / "0" / "0").write_bytes(b"not what was written")
    path = made.run_of(tmp_path, data, input={"path": str(source)}, on_error="quarantine")
    return path, data


def test_missing_and_empty_patterns_are_left_out(quarantined: Any) -> None:
    path, data = quarantined
    text = "of 35 patterns, these are left out: 10 that could not be read .*, 1 that are zero everywhere"
    with pytest.warns(UserWarning, match=text):
        ds = sd.PatternDataset(path, normalize="log")
    valid = np.ones((7, 5), bool)
    valid[2:4] = False
    kept = valid.copy()
    kept[5, 1] = False
    np.testing.assert_array_equal(ds.positions[:, 1:], np.argwhere(kept))
    np.testing.assert_array_equal(ds.mask, np.where(kept, 0, 255))
    np.testing.assert_allclose(whole(ds).numpy(), np.log1p(data[kept]), rtol=2e-6)
    assert "10 that could not be read" in str(sd.loader(ds, 4).plan)
    with pytest.warns(UserWarning, match="10 that could not be read when the file was written$"):
        ds = sd.PatternDataset(path, empty="keep")
    np.testing.assert_array_equal(ds.positions[:, 1:], np.argwhere(valid))
    _, mean, std = twins.normalize(data[valid], "log-zscore")
    assert (ds.normalization.mean, ds.normalization.std) == pytest.approx((mean, std), rel=1e-6)
    assert torch.isfinite(whole(ds)).all()
    for name in ("a.pt", "a.hspy", "a.zspy", "a.h5"):
        file = path.with_name(name)
        export_from_store(str(path), str(file))
        with pytest.warns(UserWarning, match="10 that could not be read"):
            ds = stored(file, empty="keep")
        np.testing.assert_array_equal(ds.positions[:, 1:], np.argwhere(valid))
        np.testing.assert_array_equal(whole(ds), data[valid])


def test_a_chunk_without_patterns(tmp_path: Path) -> None:
    """And a file without any."""
    data = made.counts((6, 5))
    data[2:4] = 0
    for path in (made.run_of(tmp_path, data), made.exported("a.hspy")(tmp_path, data)):
        with pytest.warns(UserWarning, match="10 that are zero everywhere"):
            ds = stored(path)
        np.testing.assert_array_equal(
            whole(ds).numpy(), np.delete(data, [2, 3], 0).reshape(20, 16, 12)
        )
        np.testing.assert_array_equal(
            whole(stored(path, empty="keep")).numpy(), data.reshape(30, 16, 12)
        )
    with pytest.warns(UserWarning, match="6 that are zero everywhere"):
        ds = stored(made.npy(tmp_path, np.zeros((2, 3, 4, 4), "u2")))
    assert len(ds) == 0
    with pytest.raises(ConfigError, match=r"no patterns.*zero everywhere"):
        sd.loader(ds)
    with pytest.raises(ConfigError, match="no standard deviation"):
        sd.PatternDataset(tmp_path / "scan.npy", empty="keep").normalization  # noqa: B018


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2"])
def test_values_without_a_logarithm(value: float, dtype: str, tmp_path: Path) -> None:
    if dtype == "i2" and value != -1:
        return
    data = made.counts((3, 5), dtype=dtype)
    data[1, 3, 15, 11] = value
    path = made.npy(tmp_path, data)
    for method in METHODS[1:]:
        with pytest.raises(
            ConfigError, match=r"scan\.npy.*\(1, 3\).*negative, infinite or NaN.*normalize='none'"
        ):
            whole(sd.PatternDataset(path, normalize=method))
    with pytest.raises(ConfigError, match=r"\(1, 3\)"):
        whole(sd.PatternDataset(path, scan_roi=(1, 3, 1, 5), normalize="log-zscore"))
    np.testing.assert_array_equal(whole(stored(path)).numpy(), data.reshape(15, 16, 12))
    found = whole(sd.PatternDataset(path, normalize="none"))
    np.testing.assert_array_equal(found, data.reshape(15, 16, 12).astype("f4"))


def test_what_is_normalized_already(tmp_path: Path) -> None:
    from stem_dask.cli.main import main

    path = made.npy(tmp_path, made.counts((3, 5)))
    out = tmp_path / "out.pt"
    assert (
        main(
            [
                "preprocess",
                "--input",
                str(path),
                "--output",
                str(out),
                "--normalize",
                "log-zscore",
                "--quiet",
            ]
        )
        == 0
    )
    with pytest.raises(ConfigError, match=r"out\.pt.*normalized already.*normalize='none'"):
        sd.PatternDataset(out)
    ds = sd.PatternDataset(out, normalize="none")
    assert torch.equal(whole(ds)[:, None], torch.load(out, weights_only=True))


@pytest.mark.parametrize(("options", "message"), [
    ({"normalize": "zscore"}, "normalize is 'zscore'; expected one of none, log, sqrt, log-zscore"),
    ({"dtype": "int8"}, "dtype is 'int8'; expected one of float32"), ({"empty": "zero"}, "empty is 'zero'; expected one of drop, keep"),
    ({"dtype": "stored"}, "set normalize='none'"), ({"downsample": 13}, "downsample is 13; expected a whole number from 1 to 12"),
    ({"downsample": 0}, "downsample is 0"), ({"downsample": 2, "method": "mean"}, "method is 'mean'"), ({"scan_step": 0}, "scan_step"),
    ({"fields": ("centre",)}, "a field is 'centre'; expected one of position"),
    ({"fields": ("center",)}, "has no field 'center'; it has position, dataset"),
])  # fmt: skip
def test_options_that_are_refused(options: Any, message: str, tmp_path: Path) -> None:
    path = made.npy(tmp_path, made.counts((2, 3)))
    with pytest.raises((ConfigError, SourceError), match=message):
        sd.PatternDataset(path, **options)


def test_numbers_outside(tmp_path: Path) -> None:
    ds = stored(made.npy(tmp_path, made.counts((2, 3))))
    for i in (6, -7):
        with pytest.raises(IndexError, match=f"pattern {i} of 6"):
            ds[i]
    assert [s["index"] for s in ds.__getitems__([5, 0, 5, -1])] == [5, 0, 5, 5]


# --- fields -----------------------------------------------------------------------------------------------------


def test_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store, its exports, and a scan of which only a part is read."""
    data = np.zeros((6, 5, 40, 36), "u2")
    for y, x in np.ndindex(6, 5):
        data[y, x, 10 + y : 16 + y, 14 + x : 20 + x] = 10 + x
    out = {
        "path": str(tmp_path / "run.zarr"),
        "figure": False,
        "chunk_mb": 0.01,
        "export": ["pt", "hspy"],
    }
    path = made.run_of(tmp_path, data, crop={"align": "pattern", "size": 16}, output=out)
    analysis = xr.open_datatree(path, engine="zarr").analysis
    names = (
        "position",
        "center",
        "center_out",
        "radius",
        "retention",
        "total",
        "window",
        "dataset",
    )
    for file in (path, tmp_path / "run.pt", tmp_path / "run.hspy"):
        ds = sd.PatternDataset(
            file, fields=names, scan_roi=(1, 6, 0, 5), scan_step=2, normalize="none"
        )
        batch = next(iter(sd.loader(ds, 9, shuffle=False)))
        assert set(batch) == {"patterns", "index", *names}
        sample = ds[4]
        for name in names:
            assert torch.equal(sample[name], batch[name][4])
        pairs = {
            "center": ("center_y", "center_x"),
            "center_out": ("center_out_y", "center_out_x"),
            "window": ("window_y", "window_x"),
        }
        for name in names[1:-1]:
            parts = [analysis[one].values[1::2, ::2].ravel() for one in pairs.get(name, (name,))]
            wanted = np.stack(parts, -1) if name in pairs else parts[0]
            np.testing.assert_array_equal(batch[name].numpy(), wanted)
        np.testing.assert_array_equal(batch["position"].numpy(), ds.positions[:, 1:])
        assert batch["dataset"].tolist() == [0] * 9
    both = sd.PatternDataset(
        [path, tmp_path / "run.pt"], fields=("dataset", "total"), normalize="none"
    )
    batch = next(iter(sd.loader(both, 60, shuffle=False)))
    assert batch["dataset"].tolist() == [0] * 30 + [1] * 30
    np.testing.assert_array_equal(batch["total"], 2 * analysis.total.values.ravel().tolist())


# --- statistics -------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the chunks that were read."""
    found: list[int] = []
    read = reading.Scan.read
    monkeypatch.setattr(
        reading.Scan, "read", lambda scan, i, out: (found.append(i), read(scan, i, out))[1]
    )
    return found


def test_a_store_of_a_run_needs_no_pass(tmp_path: Path, reads: list[int]) -> None:
    data = made.counts((8, 5))
    path = made.run_of(tmp_path, data)
    ds = sd.PatternDataset(path, scan_step=2)
    _, mean, std = twins.normalize(data[::2, ::2].reshape(-1, 16, 12), "log-zscore")
    assert (ds.normalization.mean, ds.normalization.std) == pytest.approx((mean, std), rel=1e-6)
    assert reads == []
    ds[0]
    ds[1]
    assert reads == [0]


def test_other_files_need_one_pass(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other one, in this process or the next; nothing is written beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    path = made.hdf5(chunks=(2, 5, 16, 12))(tmp_path / "in", made.counts((8, 5)))
    ds = sd.PatternDataset(path)
    first = ds.normalization
    ds.split(val=0.3, block=2, guard=1)
    n = len(reads)
    assert sorted(reads[:4]) == [0, 1, 2, 3]
    code = f"import stem_dask.training.statistics as s; s._one_pass = None; import stem_dask as sd; print(sd.PatternDataset({str(path)!r}).normalization)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(first)
    assert len(pickle.loads(pickle.dumps(ds))) == 40
    assert len(reads) == n
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["other.h5"]
    (kept,) = (tmp_path / "cache" / "stem_dask").iterdir()
    for content in (b"", b"PK\3\4 cut", kept.read_bytes()[:300], kept.read_bytes()[:-40]):
        kept.write_bytes(content)
        assert sd.PatternDataset(path).normalization == first
    assert len(reads) == n + 16


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = made.counts((3, 5))
    ds = sd.PatternDataset(made.npy(tmp_path, data))
    assert ds.normalization.mean == pytest.approx(np.log1p(data, dtype="f8").mean())


def test_statistics_are_of_the_file_as_it_is(tmp_path: Path) -> None:
    """Also where only chunks of a store of another program were rewritten, and its metadata stay."""
    path = made.zarr_of_others(tmp_path, made.counts((6, 5)))
    before = sd.PatternDataset(path).normalization
    zarr.open_array(str(path), mode="r+")[...] = made.counts((6, 5), seed=1) * 5
    ds = sd.PatternDataset(path)
    wanted = np.log1p(made.counts((6, 5), seed=1) * 5, dtype="f8").mean()
    assert ds.normalization.mean == pytest.approx(wanted) != before.mean
