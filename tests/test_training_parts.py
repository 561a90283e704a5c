"""Parts of a scan for training, validation and test, and counts that are thinned."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training_made as made
import twins
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stem_dask as sd
from stem_dask.core.errors import ConfigError

torch = pytest.importorskip("torch", reason="the package torch is not installed")


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of 23 x 19 patterns of which neighbours look alike; two are empty."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("smooth")
    y, x = np.indices((23, 19))[:, :, :, None, None] / 6
    ky, kx = np.indices((10, 8))
    mean = 3 + 2 * np.sin(y + ky) + 2 * np.cos(x + kx / 2)
    data = rng.poisson(mean.clip(0)).astype("u2")
    data[4, 4] = data[20, 3] = 0
    return made.hdf5(chunks=(4, 5, 10, 8))(folder, data)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """Scans of several shapes with small patterns."""
    found = {}
    for lead in ((23, 19), (1, 61), (61, 1), (12, 12), (40, 7)):
        folder = tmp_path_factory.mktemp("flat")
        found[lead] = made.npy(folder, made.counts(lead, (3, 4)))
    return found


def opened(path: Any, **options: Any) -> Any:
    return sd.PatternDataset(path, **{"empty": "keep"} | options)


SHAPES = [(23, 19), (1, 61), (61, 1), (12, 12), (40, 7)]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lead=st.sampled_from(SHAPES), step=st.integers(1, 2), val=st.sampled_from([0.0, 0.1, 0.2, 0.3]), test=st.sampled_from([0.0, 0.15, 0.25]),
    by=st.sampled_from(["blocks", "rows"]), block=st.sampled_from([None, None, 1, 2, 3]), guard=st.sampled_from([None, 0, 1, 2]), seed=st.integers(0, 5),
)  # fmt: skip
def test_laws_of_a_split(
    lead: Any,
    step: int,
    val: float,
    test: float,
    by: str,
    block: Any,
    guard: Any,
    seed: int,
    flat: Any,
) -> None:
    ds = opened(flat[lead], scan_step=step)
    if val + test == 0:
        return
    try:
        parts = ds.split(val, test, by, block, guard, seed)
    except ConfigError as error:
        if re.search("too small for .*by='(rows|blocks)' or by='random'", str(error)):
            return
        raise
    assert set(parts) == {"train", "val", "test"} - ({"test"} if test == 0 else set())
    mask = parts["train"].mask
    assert (mask.dtype, mask.shape) == (
        np.uint8,
        (len(range(0, lead[0], step)), len(range(0, lead[1], step))),
    )
    for name, part in parts.items():
        np.testing.assert_array_equal(part.mask, mask)
        here = np.argwhere(mask == {"train": 0, "val": 1, "test": 2}[name])
        np.testing.assert_array_equal(part.positions[:, 1:], here * step)
        assert len(part) == len(here)
    assert abs((mask == 1).sum() - val * len(ds)) <= 0.2 * val * len(ds) + 1e-9
    assert abs((mask == 2).sum() - test * len(ds)) <= 0.2 * test * len(ds) + 1e-9
    assert len(parts["train"]) > 0
    chosen = np.argwhere((mask == 1) | (mask == 2))
    away = np.abs(np.argwhere(mask >= 0)[:, None] - chosen).max(-1).min(-1).reshape(mask.shape)
    recipe = parts["train"]._split
    if guard is not None:
        assert recipe.guard == guard
    else:
        assert 1 <= recipe.guard <= max(1, recipe.block // 2)
    np.testing.assert_array_equal(mask == 3, (away > 0) & (away <= recipe.guard))
    for y in range(0, mask.shape[0], recipe.block):  # tiles start at (0, 0)
        for x in range(0, mask.shape[1], recipe.block if by == "blocks" else mask.shape[1]):
            across = recipe.block if by == "blocks" else mask.shape[1]
            tile = mask[y : y + recipe.block, x : x + across]
            kind = tile[0, 0] if tile[0, 0] in (1, 2) else 0
            assert np.isin(tile, [kind] if kind else [0, 3]).all()
    again = ds.split(val, test, by, block, guard, seed)
    np.testing.assert_array_equal(again["train"].mask, mask)


def test_seeds_differ(flat: Any) -> None:
    ds = opened(flat[23, 19])
    masks = [ds.split(0.2, block=3, guard=1, seed=seed)["val"].mask for seed in range(4)]
    assert not any(np.array_equal(masks[0], mask) for mask in masks[1:])


def test_constants_are_those_of_the_training_part(smooth: Path) -> None:
    with pytest.warns(UserWarning, match="2 that are zero everywhere"):
        ds = sd.PatternDataset(smooth)
    data = sd.open(smooth).values
    parts = ds.split(0.2, 0.1, block=3, guard=1)
    mask = parts["train"].mask
    assert (mask == 255).sum() == 2
    _, mean, std = twins.normalize(data[mask == 0], "log-zscore")
    for part in parts.values():
        assert (part.normalization.mean, part.normalization.std) == pytest.approx(
            (mean, std), rel=1e-9
        )
        found = next(iter(sd.loader(part, 1000, shuffle=False)))["patterns"][:, 0]
        code = {"train": 0, "val": 1, "test": 2}[part._part]
        wanted = (np.log1p(data[mask == code]) - mean) / std
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
        assert torch.equal(part[3]["patterns"][0], found[3])
        again = pickle.loads(pickle.dumps(part))
        assert (again.normalization, again.leak) == (part.normalization, part.leak)
        np.testing.assert_array_equal(again.mask, mask)
    assert parts["train"].normalization != ds.normalization
    assert len({part.fingerprint for part in (ds, *parts.values())}) == 4
    with pytest.raises(ConfigError, match="this is a part of a split already"):
        parts["train"].split()


@pytest.mark.parametrize("by", ["blocks", "rows", "random"])
@pytest.mark.parametrize(
    "options", [{}, {"downsample": 2}, {"scan_step": 2}, {"normalize": "none"}]
)
@pytest.mark.filterwarnings("ignore:of .* patterns, these are left out")
def test_the_leak_number(
    by: str, options: Any, smooth: Path, capsys: pytest.CaptureFixture
) -> None:
    """As its slow twin finds it; printed, of a random split also in a warning."""
    ds = sd.PatternDataset(smooth, **options)
    how = {"by": by, "val": 0.2, "seed": 1, **({"block": 2, "guard": 1} if by != "random" else {})}
    if by == "random":
        with pytest.warns(
            UserWarning, match=r"by='random'; .* correlate 0\.\d\d with their nearest"
        ):
            parts = ds.split(**how)
    else:
        parts = ds.split(**how)
    step, k = options.get("scan_step", 1), options.get("downsample", 1)
    data = sd.open(smooth, scan_step=step)
    values = (sd.downsample(data, k) if k > 1 else data).values
    wanted = twins.leak(values, parts["train"].mask)
    assert abs(parts["train"].leak - wanted) < 0.005
    out = capsys.readouterr().out
    assert f"validation patterns correlate {wanted:.2f} with their nearest training pattern" in out
    assert f"train {len(parts['train'])}, val {len(parts['val'])}" in out


@pytest.mark.filterwarnings("ignore:of .* patterns, these are left out")
def test_the_leak_number_of_a_store_with_missing_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = made.counts((7, 5))
    data[5, 1] = 0
    source = tmp_path / "damaged.zarr"
    zarr.create_array(str(source), data=data, chunks=(2, 5, 16, 12))
    (source / "c" / "1" / "0" / "0" / "0").write_bytes(b"not what was written")
    path = made.run_of(tmp_path, data, input={"path": str(source)}, on_error="quarantine")
    monkeypatch.setattr("stem_dask.training.statistics._one_pass", None)  # the store has it all
    val = sd.PatternDataset(path).split(0.2, block=1, guard=1)["val"]
    assert val.leak == pytest.approx(twins.leak(data, val.mask), abs=1e-9)


@pytest.mark.filterwarnings("ignore:of .* patterns, these are left out", "ignore:by='random'")
def test_blocks_leak_less_than_random_positions(smooth: Path) -> None:
    ds = sd.PatternDataset(smooth)
    random, blocks = (ds.split(0.2, by=by)["val"].leak for by in ("random", "blocks"))
    assert random > 0.55 > blocks


@pytest.mark.filterwarnings("ignore:by='random'")
def test_a_random_split_has_no_guard(flat: Any) -> None:
    ds = opened(flat[23, 19])
    parts = ds.split(0.1, 0.2, by="random")
    assert [len(p) for p in parts.values()] == [306, 44, 87]
    assert not (parts["val"].mask == 3).any()


def test_several_datasets(flat: Any, smooth: Path) -> None:
    ds = opened(list(flat.values()))
    sizes = [437, 61, 61, 144, 280]
    assert len(ds) == sum(sizes)
    parts = ds.split(0.2, 0.1, block=3, guard=1)
    masks = parts["train"].mask
    assert [m.shape for m in masks] == SHAPES
    n_val = sum((m == 1).sum() for m in masks)
    assert abs(n_val - 0.2 * len(ds)) <= 0.04 * len(ds)
    for i, mask in enumerate(masks):
        chosen = np.argwhere((mask == 1) | (mask == 2))
        if len(chosen):
            away = (
                np.abs(np.argwhere(mask >= 0)[:, None] - chosen).max(-1).min(-1).reshape(mask.shape)
            )
            np.testing.assert_array_equal(mask == 3, (away == 1))
        here = parts["val"].positions[:, 0] == i
        np.testing.assert_array_equal(parts["val"].positions[here, 1:], np.argwhere(mask == 1))
    values = np.arange(len(parts["val"]))
    maps = parts["val"].to_scan(values)
    assert sorted(np.concatenate([m[np.isfinite(m)] for m in maps])) == values.tolist()


def test_whole_datasets(flat: Any) -> None:
    ds = opened(list(flat.values()))
    for val, test in ((0.1, 0.0), (0.3, 0.2), (0.02, 0.02)):
        parts = ds.split(val, test, by="datasets")
        assert all(len(np.unique(mask)) == 1 for mask in parts["train"].mask)
        assert all(len(part) for part in parts.values())
        assert parts["train"].leak is None
    two = opened([flat[12, 12], flat[40, 7]]).split(
        by="datasets"
    )  # the smaller one is nearer to a tenth
    assert [len(part) for part in two.values()] == [280, 144]
    with pytest.raises(
        ConfigError, match="by='datasets' needs several files; there is one: set by='blocks'"
    ):
        opened(flat[12, 12]).split(by="datasets")
    with pytest.raises(ConfigError, match="2 files are too few for val"):
        opened([flat[12, 12], flat[40, 7]]).split(0.3, 0.3, by="datasets")


@pytest.mark.parametrize(("options", "message"), [
    ({"by": "tiles"}, "by is 'tiles'; expected one of blocks, rows, datasets, random"), ({"val": 1.0}, "val is 1.0 and test 0.0; expected shares"),
    ({"val": 0.0}, "val is 0.0"), ({"val": -0.1}, "val is -0.1"), ({"val": 0.6, "test": 0.5}, "val is 0.6 and test 0.5"),
    ({"block": 9, "guard": 3}, r"12 x 12 positions is too small for blocks of 9 and a guard of 3.*by='rows'.*by='random'"),
    ({"block": 4, "guard": 12, "val": 0.2}, "too small for blocks of 4 and a guard of 12"), ({"by": "rows", "guard": 30}, "by='blocks'.*by='random'"),
    ({"block": 0}, "block is 0; expected a whole number, 1 or more"), ({"guard": -1}, "guard is -1; expected a whole number, 0"), ({"seed": -1}, "seed is -1"), ({"block": 2.5}, "block is 2.5"),
])  # fmt: skip
def test_splits_that_are_refused(options: Any, message: str, flat: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(flat[12, 12]).split(**options)


def test_a_scan_too_small_for_a_tile_and_its_guard(tmp_path: Path) -> None:
    ds = opened(made.npy(tmp_path, made.counts((2, 2), (3, 4))))
    with pytest.raises(ConfigError, match=r"2 x 2 .*by='rows'.*by='random'"):
        ds.split(0.1)


def test_the_default_guard_is_where_patterns_are_unlike(tmp_path: Path) -> None:
    """Patterns repeat five times along both axes: those four positions apart share few."""
    rng = np.random.default_rng(0)
    few = rng.poisson(3, (12, 12, 6, 6)).astype("u2")
    data = few.repeat(5, axis=0).repeat(5, axis=1)
    ds = opened(made.npy(tmp_path, data))
    parts = ds.split(0.2, block=20)
    assert 2 <= parts["train"]._split.guard <= 4
    assert parts["val"].leak < 0.5
    assert (
        opened(made.npy(tmp_path, rng.poisson(3, (40, 40, 6, 6))))
        .split(0.2, block=10)["val"]
        ._split.guard
        == 1
    )


# --- thinned counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64"])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_thinned_counts(dtype: str, p: float) -> None:
    """The halves of Poisson counts are independent, with means p and 1 - p of the whole."""
    mean, n = 12.0, 40_000
    counts = torch.poisson(
        torch.full((n // 4, 1, 2, 2), mean), generator=torch.Generator().manual_seed(1)
    ).to(getattr(torch, dtype))
    before = counts.clone()
    a, b = sd.thin(counts, p, torch.Generator().manual_seed(2))
    assert torch.equal(counts, before)
    assert a.dtype == b.dtype == counts.dtype
    assert a.shape == b.shape == counts.shape
    assert torch.equal(a + b, counts)
    assert min(int(a.min()), int(b.min())) >= 0
    again, _ = sd.thin(counts, p, torch.Generator().manual_seed(2))
    assert torch.equal(a, again)
    a, b = a.double().ravel().numpy(), b.double().ravel().numpy()
    for half, share in ((a, p), (b, 1 - p)):
        assert half.mean() == pytest.approx(share * mean, abs=0.1)
        assert half.var() == pytest.approx(share * mean, abs=0.4)
    assert abs(np.cov(a, b)[0, 1]) < 0.15


def test_thinning_large_counts_and_what_is_refused() -> None:
    large = torch.tensor([2**40, 2**53, 0])
    a, b = sd.thin(large, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(a + b, large)
    assert float(a[0]) / 2**40 == pytest.approx(0.25, abs=1e-4)
    assert sd.thin(torch.zeros(0, 3, dtype=torch.int32), 0.5)[0].shape == (0, 3)
    for counts, p, message in (
        (torch.ones(3), 0.5, "counts are torch.float32; expected whole numbers"), (torch.tensor([3, -2]), 0.5, "go down to -2"),
        (torch.tensor([True]), 0.5, "torch.bool"), (torch.tensor([1]), 1.5, "p is 1.5; expected 0 <= p <= 1"), (torch.tensor([1]), float("nan"), "p is nan"),
        (np.array([1, 2]), 0.5, "counts are a ndarray; expected a tensor"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=re.escape(message)):
            sd.thin(counts, p)
