"""Batches: order, ranks, resume, noise, memory, and what happens to files that are damaged or change."""

import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import training_made as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stem_dask as sd
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.training import reading

torch = pytest.importorskip("torch", reason="the package torch is not installed")

#: bytes of a chunk of (2, 3) patterns of 16 x 12 pixels uint16
CHUNK = 6 * 16 * 12 * 2
#: that a plan is noisy is no matter in most of these tests
pytestmark = pytest.mark.filterwarnings("ignore:block. K:UserWarning")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of 7 x 11 patterns in 4 x 4 chunks, those at the edges with fewer patterns."""
    return made.hdf5(chunks=(2, 3, 16, 12))(tmp_path_factory.mktemp("loader"), made.counts())


@pytest.fixture(scope="module")
def paths(path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The scan, a line of a prime number of patterns, and a store of a run."""
    folder = tmp_path_factory.mktemp("joined")
    return [path, made.npy(folder, made.counts((1, 13))), made.run_of(folder, made.counts((5, 7)))]


def opened(path: Any, **options: Any) -> Any:
    return sd.PatternDataset(path, **{"normalize": "log"} | options)


def order(loader: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def block(ds: Any, batch: int = 5, k: int = 4, **options: Any) -> Any:
    """A loader of windows of k chunks."""
    return sd.loader(ds, batch, memory=2 * k * _chunk(ds), cache=False, **options)


def _chunk(ds: Any) -> int:
    return ds.most * ds.shape[1] * ds.shape[2] * ds.stored_dtype.itemsize


def of_mode(mode: str) -> Any:
    return block if mode == "block" else sd.loader


# --- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["block", "cache"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_hold_what_the_dataset_holds(mode: str, shuffle: bool, paths: list[Path]) -> None:
    ds = opened(paths, fields=("position", "dataset"))
    every = torch.stack([s["patterns"] for s in ds.__getitems__(range(len(ds)))])
    loader = of_mode(mode)(ds, 8, shuffle=shuffle)
    assert loader.plan.mode == mode
    kept, copies = [], []
    for epoch in range(2):
        found = list(loader)
        assert [len(b["index"]) for b in found] == [8] * 15 + [5]
        index = torch.cat([b["index"] for b in found])
        assert index.dtype == torch.int64
        assert sorted(index.tolist()) == list(range(125))
        assert (index.tolist() == list(range(125))) is not shuffle
        assert torch.equal(torch.cat([b["patterns"] for b in found]), every[index])
        where = torch.cat([b["position"] for b in found]).numpy()
        np.testing.assert_array_equal(where, ds.positions[index, 1:])
        kept += found
        copies += [b["patterns"].clone() for b in found]
        assert loader.epoch == epoch + 1
    assert all(torch.equal(b["patterns"], c) for b, c in zip(kept, copies, strict=True))


@pytest.mark.parametrize("mode", ["block", "cache"])
def test_the_order_depends_on_what_the_law_names(
    mode: str, paths: list[Path], tmp_path: Path
) -> None:
    make = of_mode(mode)
    for files in (paths[0], paths):
        ds = opened(files)
        wanted = order(make(ds, 7, seed=3))
        assert order(make(ds, 7, seed=3, threads=1)) == wanted
        assert order(make(ds, 7, seed=3, threads=4)) == wanted
        loader = make(pickle.loads(pickle.dumps(ds)), 7, seed=3)
        assert order(loader) == wanted
        second = order(loader)
        loader.set_epoch(0)
        assert order(loader) == wanted
        others = [second, order(make(ds, 7, seed=4))]
        others += [order(block(ds, 7, k=3, seed=3))] if mode == "block" else []
        assert wanted not in others
    copy = tmp_path / "elsewhere.h5"
    shutil.copy2(paths[0], copy)
    assert order(make(opened(copy), 7)) == order(make(opened(paths[0]), 7))
    store = tmp_path / "copy.zarr"
    shutil.copytree(paths[2], store)
    assert order(make(opened(store), 7)) == order(make(opened(paths[2]), 7))


def test_windows_are_as_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a window are mixed, and each chunk is read once an epoch."""
    reads: list[int] = []
    read = reading.Scan.read
    monkeypatch.setattr(
        reading.Scan, "read", lambda scan, i, out: (reads.append(i), read(scan, i, out))[1]
    )
    ds = opened(path)
    loader = block(ds, 2, k=5)
    assert loader.plan.K == 4  # of 16 chunks in 4 windows
    assert re.fullmatch(r"block: K = 4 chunks, .* 0 MB .*1\.50 .*", str(loader.plan))
    reads.clear()
    chunks = ds.chunks[0][np.concatenate(order(loader))]
    assert sorted(reads) == list(range(16))
    places = [np.flatnonzero(chunks == c) for c in range(16)]
    ends = sorted((p[0], p[-1]) for p in places)
    windows, last = [], -1
    for first, end in ends:
        if first > last:
            windows.append(0)
        windows[-1] += 1
        last = max(last, end)
    assert windows == [4, 4, 4, 4]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(1, 90), ranks=st.integers(1, 4), shuffle=st.booleans(), drop=st.sampled_from([None, True, False]),
    k=st.sampled_from([1, 3, 16, 0]), epoch=st.integers(0, 3), keep=st.integers(1, 77),
)  # fmt: skip
def test_ranks(
    batch: int,
    ranks: int,
    shuffle: bool,
    drop: bool | None,
    k: int,
    epoch: int,
    keep: int,
    path: Path,
) -> None:
    """They are disjoint; together they are everything but the dropped tail."""
    ds = opened(path, scan_roi=(0, 7, 0, 11) if keep > 20 else (0, keep % 7 + 1, 3, 11))
    n, dropped = len(ds), (shuffle and ranks > 1) if drop is None else drop
    how = {"shuffle": shuffle, "drop_last": drop, "world_size": ranks}
    if dropped and n < batch * (ranks if shuffle else 1):
        with pytest.raises(
            ConfigError,
            match=f"batch_size {batch} on {ranks} ranks.* {n} patterns.*drop_last=False",
        ):
            sd.loader(ds, batch, rank=0, **how)
        return
    make = (lambda *a, **b: block(*a, k=k, **b)) if k else sd.loader
    found = []
    for rank in range(ranks):
        loader = make(ds, batch, rank=rank, **how)
        loader.set_epoch(epoch)
        found.append(order(loader))
        assert len(found[-1]) == len(loader)
        assert loader.epoch == epoch + 1
        sizes = [len(b) for b in found[-1]]
        assert all(size == batch for size in sizes[: -1 if not dropped else None])
    lengths = [len(one) for one in found]
    union = [i for one in found for b in one for i in b]
    assert len(set(union)) == len(union)
    if not dropped:
        assert sorted(union) == list(range(n))
        assert max(lengths) - min(lengths) <= 1
    elif shuffle:
        assert len(set(lengths)) == 1
        assert n - len(union) == n % (batch * ranks)
    else:
        assert max(lengths) - min(lengths) <= 1
        assert n - len(union) == n % batch
    if not shuffle:
        assert union == list(range(len(union)))


def test_ranks_of_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = opened(path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    loader = sd.loader(ds, 8)
    assert (loader.rank, loader.world_size) == (1, 3)
    assert order(loader) == order(sd.loader(ds, 8, rank=1, world_size=3))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(
        ConfigError, match="rank is 3 and world_size 3; expected 0 <= rank < world_size"
    ):
        sd.loader(ds, 8)
    with pytest.raises(ConfigError, match="give both or none"):
        sd.loader(ds, 8, rank=0)


def test_transform_device_and_a_loop_that_ends_early(path: Path) -> None:
    ds = opened(path)
    loader = block(ds, 5, device="cpu", transform=lambda batch: batch["patterns"].sum())
    assert next(iter(loader)).shape == ()
    assert len(list(loader)) == 16
    with pytest.raises(ConfigError, match="device is 'nonsense', which torch cannot use here"):
        sd.loader(ds, device="nonsense")
    both = zip(block(ds, 5), block(ds, 5), strict=True)
    assert all(torch.equal(a["index"], b["index"]) for a, b in both)
    same = block(ds, 5)
    next(iter(same))
    first, second = iter(same), iter(same)  # two at a time do not share a buffer
    pairs = list(zip(first, second, strict=True))
    assert all(torch.equal(a["patterns"], b["patterns"]) for a, b in pairs)


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_size": 0}, "batch_size is 0; expected a whole number, 1 or more"), ({"batch_size": 2.5}, "batch_size is 2.5"), ({"seed": -1}, "seed is -1"), ({"memory": "much"}, "memory is 'much'; expected bytes"), ({"memory": 1.5}, "memory is 1.5"),
    ({"memory": CHUNK}, f"memory is {CHUNK:,} bytes; .* need {2 * CHUNK:,}: set memory={2 * CHUNK}"), ({"cache": "yes"}, "cache is 'yes'"),
    ({"memory": "10kB", "cache": True}, "cache=True needs 29,568 bytes .* set memory=29568 or cache='auto'"),
])  # fmt: skip
def test_options_that_are_refused(options: Any, message: str, path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        sd.loader(opened(path), **{"batch_size": 4} | options)


# --- resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["block", "cache"])
@pytest.mark.parametrize("how", [{}, {"shuffle": False}, {"rank": 1, "world_size": 2}])
def test_resume_after_every_batch(mode: str, how: Any, paths: list[Path]) -> None:
    ds, make = opened(paths), of_mode(mode)
    loader = make(ds, 9, seed=5, **how)
    loader.set_epoch(2)
    states, batches = [loader.state_dict()], []
    for _ in range(2):
        for batch in loader:
            batches.append(batch)
            states.append(json.loads(json.dumps(loader.state_dict())))
    n = len(loader)
    assert (states[n]["epoch"], states[n]["batch"]) == (3, 0)
    assert len(json.dumps(states[3])) < 500
    for done in range(n + 1):
        again = make(ds, 9, seed=5, **how)
        again.load_state_dict(states[done])
        assert again.state_dict() == states[done]
        rest = itertools.chain(again, again) if done < n else again
        for found, wanted in zip(rest, batches[done:], strict=True):
            assert torch.equal(found["index"], wanted["index"])
            assert torch.equal(found["patterns"], wanted["patterns"])
        assert again.state_dict() == states[-1]


def test_resume_reads_one_window(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = opened(path)
    loader = block(ds, 5, k=2)
    list(itertools.islice(loader, 14))
    state, reads, read = loader.state_dict(), [], reading.Scan.read
    monkeypatch.setattr(
        reading.Scan, "read", lambda scan, i, out: (reads.append(i), read(scan, i, out))[1]
    )
    again = block(ds, 5, k=2)
    again.load_state_dict(state)
    assert len(list(again)) == 2
    assert len(reads) <= 4


def test_states_that_are_refused(path: Path, paths: list[Path]) -> None:
    ds = opened(path)
    state = block(ds, 5).state_dict()
    for name, other in {
        "fingerprint": block(opened(paths[2]), 5), "batch_size": block(ds, 6), "world_size": block(ds, 5, rank=0, world_size=2, drop_last=False),
        "seed": block(ds, 5, seed=1), "memory": block(ds, 5, k=5), "shuffle": block(ds, 5, shuffle=False), "drop_last": block(ds, 5, drop_last=True),
        "mode": sd.loader(ds, 5, memory=8 * _chunk(ds), cache="auto"),
    }.items():  # fmt: skip
        if name == "mode" and other.plan.mode == "block":
            state = {**state, "mode": "cache"}
        with pytest.raises(ConfigError, match=f"the state is of {name} .*this loader has"):
            other.load_state_dict(state)
    with pytest.raises(ConfigError, match="the state is of fingerprint None"):
        block(ds, 5).load_state_dict({})


def test_memory_auto_is_taken_from_the_state(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = opened(path)
    monkeypatch.setattr("stem_dask.training.loader.free_bytes", lambda: 4 * 11 * CHUNK)
    loader = sd.loader(ds, 5)
    assert (loader.plan.mode, loader.plan.memory) == (
        "block",
        8 * CHUNK,
    )  # a power of two of chunks
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    rest = [b["index"].tolist() for b in iterator]
    monkeypatch.setattr("stem_dask.training.loader.free_bytes", lambda: 10**10)
    again = sd.loader(ds, 5)
    assert again.plan.mode == "cache"
    again.load_state_dict(state)
    assert (again.plan.mode, again.plan.memory) == ("block", 8 * CHUNK)
    assert order(again) == rest


# --- noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "k", "n_ranks"), [(16, 8, 1), (24, 12, 1), (40, 10, 1), (16, 8, 2)]
)
def test_noise_of_batch_means(batch: int, k: int, n_ranks: int, tmp_path: Path) -> None:
    """Variance of batch means, relative to truly random batches: at most 1 + rho b / K, and so below the bound of the plan."""
    rng = np.random.default_rng(0)
    level = rng.normal(100, 10, (60, 1)) + rng.normal(0, 4, (60, 20))
    data = np.broadcast_to(level[..., None, None], (60, 20, 2, 2)).astype("f4")
    ds = opened(made.hdf5(chunks=(1, 20, 2, 2))(tmp_path, data), normalize="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaders = [
            block(ds, batch, k, rank=r, world_size=n_ranks, drop_last=True) for r in range(n_ranks)
        ]
    values = level.ravel().astype("f4").astype("f8")
    within = level.var(axis=1).mean()
    rho = 1 - within / values.var() * 20 / 19
    means = [values[b["index"].numpy()].mean() for _ in range(60) for one in loaders for b in one]
    n = values.size
    random = values.var() / batch * (n - batch) / (n - 1)
    found = np.mean((np.array(means) - values.mean()) ** 2) / random
    assert rho > 0.8
    assert found <= 1.15 * (1 + rho * batch / loaders[0].plan.K)
    assert loaders[0].plan.bound == pytest.approx(1 + batch / loaders[0].plan.K)
    assert f"{loaders[0].plan.bound:.2f} x" in str(loaders[0].plan)


@pytest.mark.filterwarnings("default")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(1, 40),
    k=st.integers(1, 15),
    ranks=st.integers(1, 3),
    cache=st.sampled_from(["auto", False]),
)
def test_the_warning_names_what_helps(
    batch: int, k: int, ranks: int, cache: Any, large: Path
) -> None:
    """With it the bound is at most 1.5, and nothing warns."""
    ds, how = opened(large), {"rank": 0, "world_size": ranks, "drop_last": False, "cache": cache}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = sd.loader(ds, batch, memory=2 * k * _chunk(ds), **how)
    assert bool(caught) == (loader.plan.bound > 1.5)
    if not caught:
        return
    text = str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for memory in re.findall(r"memory='(\d+MB)'", text):
            assert sd.loader(ds, batch, memory=memory, **how).plan.bound <= 1.5
        for fewer in re.findall(r"batch_size=(\d+)", text):
            assert sd.loader(ds, int(fewer), memory=2 * k * _chunk(ds), **how).plan.bound <= 1.5
    assert re.search(r"memory='|batch_size=", text) or (k == 1 and ranks > 1)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 chunks of 4 MB, of which HDF5 writes none."""
    path = tmp_path_factory.mktemp("large") / "large.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (35, 8, 512, 512), "u2", chunks=(1, 8, 512, 512), fillvalue=1)
    return path


# --- damage -----------------------------------------------------------------------------------------------------


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x40
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(file: Path, n: int) -> None:
    file.write_bytes(file.read_bytes()[:-n])


def shards(store: Path) -> list[Path]:
    return sorted(
        p for p in (store / "patterns").rglob("*") if p.is_file() and p.name != "zarr.json"
    )


def read_all(ds: Any, mode: str) -> None:
    if mode == "items":
        for i in range(len(ds)):
            ds[i]
    else:
        list(of_mode(mode)(ds, 5, threads=3))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mode", ["items", "block", "cache"])
@pytest.mark.parametrize("codec", ["auto", "gzip", "none"])
@pytest.mark.parametrize("where", [100, -10, "cut", "gone", "empty"])
def test_damaged_shards(mode: str, codec: str, where: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    if codec == "auto":
        path = made.run_of(tmp_path, made.counts((6, 5)))
    else:
        made.exported("run.zarr", codec=codec)(tmp_path, made.counts((6, 5)))
    file = shards(path)[-1]
    if where == "gone":
        file.unlink()
    elif where in ("cut", "empty"):
        cut(file, 7 if where == "cut" else file.stat().st_size)
    else:
        flip(file, where)
    rows = "4 to 5" if codec == "auto" else "0 to 5"
    with pytest.raises(SourceError, match=rf"{file}.*scan positions y {rows}, x 0 to 4"):
        read_all(opened(path, empty="keep"), mode)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mode", ["items", "block", "cache"])
@pytest.mark.parametrize(
    "options",
    [{"compression": "gzip"}, {"compression": "gzip", "shuffle": True}, {"fletcher32": True}],
)
def test_damaged_chunks_of_hdf5(mode: str, options: Any, tmp_path: Path) -> None:
    path = made.hdf5(chunks=(2, 3, 16, 12), **options)(tmp_path, made.counts((4, 6)))
    with h5py.File(path) as file:
        place = file["data"].id.get_chunk_info(2)
    assert place.chunk_offset[:2] == (2, 0)
    flip(path, place.byte_offset + place.size // 2)
    with pytest.raises(SourceError, match=r"other\.h5.*scan positions y 2 to 3, x 0 to 2"):
        read_all(opened(path, empty="keep"), mode)


@pytest.mark.parametrize(
    "name",
    ["output/log_mean", "output/log_std", "output/log_mean_pattern", "analysis/radius", "valid"],
)
@pytest.mark.parametrize("how", ["flipped", "gone", "empty"])
def test_damage_beside_the_patterns(name: str, how: str, beside: Path, tmp_path: Path) -> None:
    """Never zeros in place of constants, fields, or what is known of missing patterns."""
    shutil.copytree(beside, tmp_path / "a.zarr")
    (file,) = [p for p in (tmp_path / "a.zarr" / name).iterdir() if p.name != "zarr.json"]
    file.unlink() if how == "gone" else cut(file, file.stat().st_size) if how == "empty" else flip(
        file, 9
    )
    with pytest.raises(SourceError, match=f"a.zarr/{name}/c.0"):
        sd.PatternDataset(tmp_path / "a.zarr", fields=("radius",))


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, data = tmp_path_factory.mktemp("beside"), np.zeros((4, 5, 40, 36), "u2")
    data[:, :, 16:22, 14:20] = 10
    return made.run_of(folder, data, crop={"size": 16})


@pytest.mark.parametrize("mode", ["items", "block", "cache"])
def test_a_file_that_ends_early(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is cut after it was opened, with the old time."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 4000)
    path = made.npy(tmp_path, made.counts((4, 6)))
    ds = opened(path, empty="keep")
    cut(path, 3000)
    with pytest.raises(SourceError, match=r"scan\.npy"):
        read_all(ds, mode)
    with pytest.raises(SourceError, match=r"scan\.npy"):
        read_all(opened(path, empty="keep"), mode)


CHANGES = {
    "same size": lambda file: file.write_bytes(file.read_bytes()),
    "touched": lambda file: os.utime(file, ns=(1, 1)),
    "replaced": lambda file: (shutil.copy2(file, f"{file}.new"), os.replace(f"{file}.new", file)),
    "removed": lambda file: file.unlink(),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["run", "h5", "npy", "pt", "zspy"])
def test_a_file_that_changes(
    change: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first read, between two windows, two samples and two epochs."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 4000)
    data = made.counts((8, 5))
    kinds = {
        "run": made.run_of,
        "h5": made.hdf5(chunks=(2, 3, 16, 12)),
        "npy": made.npy,
        "pt": made.exported("a.pt"),
        "zspy": made.exported("a.zspy"),
    }
    path = kinds[kind](tmp_path, data)
    files = shards(path) if kind == "run" else [path]
    if kind == "zspy":
        files = [p for p in path.rglob("*") if p.is_file() and p.name[0] in "01"]
    message = "has changed since it was opened|is missing|was removed"

    def changed() -> None:
        for file in files:
            CHANGES[change](file)

    def again() -> Any:
        if change == "removed":
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            kinds[kind](tmp_path, data)
        return opened(path, empty="keep")

    ds, between, cached = (opened(path, empty="keep") for _ in range(3))
    ds[0]
    kept = sd.loader(cached, 5)
    list(kept)
    loader = iter(block(between, 3, k=1))
    next(loader)
    blob = pickle.dumps(ds)
    changed()
    with pytest.raises(SourceError, match=message):
        ds[0]
    with pytest.raises(SourceError, match=message):
        list(block(ds, 3))
    if kind != "zspy":  # all of it is one window
        with pytest.raises(SourceError, match=message):
            list(loader)
    with pytest.raises(SourceError, match=message):
        list(kept)
    if change != "replaced":  # by a copy with the same content and time
        with pytest.raises(SourceError):
            pickle.loads(blob)[0]


# --- memory -----------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch, numpy as np, stem_dask as sd, stem_dask.training.loader, stem_dask.readers.open, imagecodecs, zarr, h5py, numba, scipy.spatial
def peak(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
before = peak("VmRSS")
ds = sd.PatternDataset(sys.argv[1])
loader = sd.loader(ds, 8, memory="16MB", threads=2)
n = sum(len(batch["index"]) for batch in loader)
print(n, loader.plan.mode, peak("VmHWM") - before, loader.plan.n_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures with /proc")
def test_memory_stays_within_its_bound(tmp_path: Path) -> None:
    pattern = np.random.default_rng(0).poisson(2, (256, 256)).astype("u2")
    data = np.broadcast_to(pattern, (40, 40, 256, 256))  # 210 MB
    path = tmp_path / "a.zarr"
    sd.export(made.labelled(data), path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    n, mode, peak, held = done.stdout.split()
    assert (n, mode) == ("1600", "block")
    assert int(held) <= 16e6
    assert int(peak) < 16e6 + int(held) + 100e6
