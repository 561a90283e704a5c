"""stem-dask train: the model, resuming, what is refused, and the outputs."""

import json
import runpy
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.train import main

torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")

from stem_dask.training.dataset import Normalization, PatternDataset  # noqa: E402
from stem_dask.training.fit import FitOptions, pattern_losses  # noqa: E402
from stem_dask.training.maps import components  # noqa: E402
from stem_dask.training.model import (  # noqa: E402
    MOST_WEIGHTS,
    Model,
    autoencoder,
    grid,
    load_model,
)

SHORT = ["--epochs", "3", "--batch", "16", "--latent", "4", "--threads", "1", "-q"]


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of 12 x 10 patterns of 18 x 17 counts: a disc, and a second one in one half."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:18, :17]
    first, second = (y - 8) ** 2 + (x - 8) ** 2 < 12, (y - 4) ** 2 + (x - 13) ** 2 < 6
    rates = np.empty((12, 10, 18, 17))
    for i, j in np.ndindex(12, 10):
        rates[i, j] = 30.0 * first + 15.0 * second * (j > 4) + 0.1
    path = tmp_path_factory.mktemp("data") / "scan.npy"
    np.save(path, rng.poisson(rates).astype(np.uint16))
    return path


def train(data: Path, folder: Path, *more: str) -> int:
    return main(["--data", str(data), "--output_dir", str(folder), *SHORT, *more])


@pytest.fixture(scope="module")
def done(scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of an undisturbed training."""
    folder = tmp_path_factory.mktemp("done")
    assert train(scan, folder) == 0
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# --- the model


@pytest.mark.parametrize("latent", [1, 32, 300, 1000])
@pytest.mark.parametrize(
    "shape", [(1, 3), (8, 8), (9, 13), (59, 57), (96, 96), (8, 512), (700, 509)]
)
def test_weights_stay_below_the_limit(shape: tuple[int, int], latent: int) -> None:
    net = autoencoder(shape, latent)
    n = sum(weights.numel() for weights in net.parameters())
    assert n <= MOST_WEIGHTS
    if latent == 32:
        assert n >= 80_000
    rows, columns = grid(shape, latent)  # and as many cells as fit
    if (rows, columns) != (-(-shape[0] // 8), -(-shape[1] // 8)):
        assert n + (2 * latent + 1) * 112 * max(rows, columns) > MOST_WEIGHTS


@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (8, 9), (31, 64), (100, 130)])
def test_the_network_returns_the_size_it_gets(shape: tuple[int, int]) -> None:
    net = autoencoder(shape, 5)
    x = torch.rand(2, 1, *shape)
    assert net(x).shape == x.shape
    assert net.encoder(x).shape == (2, 5)


@pytest.mark.parametrize(
    ("shape", "latent", "match"),
    [
        ((40, 40), 0, "latent is 0; expected 1 to 1001"),
        ((40, 40), 5000, "latent is 5000; expected 1 to 1001"),
    ],
)
def test_what_no_network_fits(shape: tuple[int, int], latent: int, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        autoencoder(shape, latent)


def test_a_loaded_model_embeds_as_the_saved_one(tmp_path: Path) -> None:
    options = {"shape": [20, 17], "latent": 3}
    constants = Normalization("log-zscore", 0.3, 1.7)
    about = {"normalization": constants, "options": options, "axes": {}, "fingerprint": "f"}
    model = Model(autoencoder((20, 17), 3), **about)
    x = torch.rand(150, 1, 20, 17)
    model.save(tmp_path / "a.pt")
    model.save(tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    again = load_model(tmp_path / "a.pt")
    z = again.embed(x.numpy())
    assert (z.shape, z.dtype) == ((150, 3), torch.float32)
    assert torch.equal(z, model.embed(x))
    assert torch.equal(again.reconstruct(x), model.reconstruct(x))
    assert (again.normalization, again.options) == (constants, options)
    with torch.no_grad():
        assert torch.allclose(again.network(x), again.reconstruct(x), atol=1e-5)
    with pytest.raises(ConfigError, match=r"shape \(2, 1, 20, 18\); expected \(B, 1, 20, 17\)"):
        again.embed(torch.rand(2, 1, 20, 18))


def test_damaged_and_foreign_models_are_named(done: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    content = (done / "model.pt").read_bytes()
    damaged = bytearray(content)
    damaged[: len(content) // 2] = bytes(len(content) // 2)
    other = tmp_path / "other"
    torch.save({"weights": {}}, other)
    for bad in (content[:-1000], bytes(damaged), b"", b"no model", other.read_bytes()):
        path.write_bytes(bad)
        with pytest.raises(SourceError, match=r"model\.pt: not a readable model"):
            load_model(path)
    with pytest.raises(SourceError, match=r"nothing\.pt does not exist"):
        load_model(tmp_path / "nothing.pt")


@pytest.mark.parametrize("method", ["none", "log", "sqrt", "log-zscore"])
@pytest.mark.parametrize("loss", ["mse", "l1", "poisson"])
def test_losses_equal_their_twin(loss: str, method: str) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(3.0, (4, 1, 6, 5)).astype(np.float64)
    rates = counts + rng.uniform(0.5, 2, counts.shape)
    mean, std = (0.4, 1.3) if method == "log-zscore" else (0.0, 1.0)
    scale = {"none": np.asarray, "log": np.log1p, "sqrt": np.sqrt}
    scale["log-zscore"] = lambda values: (np.log1p(values) - mean) / std
    x, y = scale[method](counts), scale[method](rates)
    if loss == "poisson":
        positive = np.where(counts > 0, counts, 1)
        expected = rates - counts + counts * np.log(positive / rates)
    else:
        expected = abs(y - x) if loss == "l1" else (y - x) ** 2
    net = torch.nn.Module()
    net.forward = lambda patterns: torch.tensor(y, dtype=torch.float32)
    loss_of = pattern_losses(net, FitOptions(loss=loss), Normalization(method, mean, std))
    found, again = loss_of(torch.tensor(x, dtype=torch.float32))
    np.testing.assert_allclose(found, expected.mean((1, 2, 3)), rtol=2e-4)
    np.testing.assert_allclose(again, y, rtol=1e-6)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    z = np.random.default_rng(0).normal(size=(50, 6)) * [1, 9, 2, 7, 3, 1]
    u, s, _ = np.linalg.svd(z - z.mean(0), full_matrices=False)
    np.testing.assert_allclose(abs(components(z)), abs(u * s)[:, :3], atol=1e-9)


# --- the command


def test_outputs(done: Path, scan: Path) -> None:
    import xarray as xr

    found = results(done)
    assert [one["epoch"] for one in found["history"]] == [1, 2, 3]
    assert found["history"][-1]["train"] < found["history"][0]["train"]
    assert all(np.isfinite([one["train"], one["val"]]).all() for one in found["history"])
    assert found["normalization"]["method"] == "log-zscore"
    assert found["options"]["latent"] == 4
    assert found["leak"] is not None
    assert (done / "training.png").read_bytes()[:4] == b"\x89PNG"

    model = load_model(done / "model.pt")
    patterns = PatternDataset(str(scan), normalize=model.normalization)
    x = torch.stack([torch.as_tensor(patterns[i]["patterns"]) for i in range(len(patterns))])
    arrays = np.load(done / "embeddings.npz")
    assert arrays["z"].shape == (120, 4)
    np.testing.assert_allclose(arrays["z"], model.embed(x), atol=1e-5)
    np.testing.assert_array_equal(arrays["positions"], patterns.positions)

    maps = xr.open_zarr(done / "embeddings.zarr")
    assert dict(maps.sizes) == {"scan_y": 12, "scan_x": 10, "latent": 4}
    np.testing.assert_array_equal(maps.z.values.reshape(120, 4), arrays["z"])
    error = ((model.reconstruct(x) - x) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(maps.error.values.ravel(), error, rtol=1e-4)
    assert maps.valid.values.all()
    assert maps.split.dtype == np.uint8
    parts = found["patterns"]
    assert (parts["all"], parts["val"]) == (120, (maps.split.values == 1).sum())
    assert parts["train"] == (maps.split.values == 0).sum()
    # constants of the training part alone
    counts = np.load(scan).astype(np.float64)[maps.split.values == 0]
    assert found["normalization"]["mean"] == pytest.approx(np.log1p(counts).mean(), rel=1e-5)


def test_the_same_command_again(done: Path, scan: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    options = ["--data", str(scan), "--output-dir", str(done), *SHORT[:-1]]
    assert main(options) == 0
    out, err = capsys.readouterr()
    assert "already complete" in err
    assert out.startswith("patterns    120 of 18 x 17, ")
    assert "\nlosses      train 0." in out
    assert "\nleak        " in out
    assert f"\nmap         {done}/training.png\n" in out
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_stop_after_each_epoch(
    epoch: int, done: Path, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop comes just before the checkpoint of the next epoch is renamed, or before the model is."""
    import stem_dask.training.model as module

    plain, names = module.publish, []

    def publish(path: object) -> None:
        names.append(Path(str(path)).name)
        if len(names) == epoch + 2:
            raise KeyboardInterrupt
        plain(path)

    monkeypatch.setattr(module, "publish", publish)
    assert train(scan, tmp_path) == 75
    assert names[-1] == ("model.pt" if epoch == 3 else "checkpoint.pt")
    assert not (tmp_path / "model.pt").exists()
    monkeypatch.setattr(module, "publish", plain)
    assert train(scan, tmp_path) == 0
    for name in ("model.pt", "embeddings.npz"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()
    assert results(tmp_path)["history"] == results(done)["history"]
    assert not list(tmp_path.glob("*.incomplete"))


def test_time_limit_in_another_thread(done: Path, scan: Path, tmp_path: Path) -> None:
    codes: list[int] = []
    for limit in (["--time-limit", "0"], []):
        thread = threading.Thread(target=lambda x=limit: codes.append(train(scan, tmp_path, *x)))
        thread.start()
        thread.join()
    assert codes == [75, 0]
    assert (tmp_path / "model.pt").read_bytes() == (done / "model.pt").read_bytes()


def test_time_limit_in_the_main_thread(scan: Path, tmp_path: Path) -> None:
    assert train(scan, tmp_path, "--time-limit", "0") == 75


def test_other_options_are_refused_until_overwritten(
    done: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(scan, tmp_path, "--seed", "1", "--epochs", "1") == 0
    (tmp_path / "notes.txt").write_text("mine")
    assert train(scan, tmp_path) == 2
    err = capsys.readouterr().err
    assert "finished training of other options: --epochs was 1, is 3; --seed was 1, is 42" in err
    assert train(scan, tmp_path, "--overwrite") == 0
    assert (tmp_path / "model.pt").read_bytes() == (done / "model.pt").read_bytes()
    (tmp_path / "results.json").unlink()  # an unfinished one
    assert train(scan, tmp_path, "--latent", "5") == 2
    assert "an unfinished training of other options: --latent was 4, is 5" in capsys.readouterr().err  # fmt: skip
    other = tmp_path / "other.npy"
    np.save(other, np.load(scan)[:, :9])
    assert train(other, tmp_path) == 2
    assert "--data has other patterns" in capsys.readouterr().err
    assert train(scan, tmp_path) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model.pt", "checkpoint.pt", "results.json"])
def test_files_of_others_stay(
    name: str, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / name).write_text('{"options": 1}')
    assert train(scan, tmp_path, "--overwrite") in (2, 3)
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / name).read_text() == '{"options": 1}'
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_list_of_patterns_has_no_map(
    scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import xarray as xr

    path = tmp_path / "list.npy"
    np.save(path, np.load(scan).reshape(120, 18, 17)[:50])
    folder = tmp_path / "out"
    words = ["--data", str(path), "--output_dir", str(folder), *SHORT[:-1], "--split", "random"]
    assert main(words) == 0
    assert "no map: the data state no scan shape; give --scan-shape Y X" in capsys.readouterr().out
    maps = xr.open_zarr(folder / "embeddings.zarr")
    assert dict(maps.sizes) == {"pattern": 50, "latent": 4}
    words[words.index("random")] = "blocks"
    assert main([*words, "--scan-shape", "5", "10", "--overwrite"]) == 0
    assert "no map" not in capsys.readouterr().out
    maps = xr.open_zarr(folder / "embeddings.zarr")
    assert dict(maps.sizes) == {"scan_y": 5, "scan_x": 10, "latent": 4}


def test_several_datasets_are_groups(scan: Path, tmp_path: Path) -> None:
    import xarray as xr

    other = tmp_path / "other.npy"
    data = np.load(scan)[:6, :7].copy()
    data[2, 3] = 0  # an empty pattern is left out
    np.save(other, data)
    folder = tmp_path / "out"
    words = ["--data", str(scan), str(other), "--output_dir", str(folder), *SHORT]
    assert main([*words, "--split", "datasets", "--val", "0.3"]) == 0
    sizes, n_valid = [], 0
    for group in "01":
        maps = xr.open_zarr(folder / "embeddings.zarr", group=group)
        sizes.append((maps.sizes["scan_y"], maps.sizes["scan_x"]))
        n_valid += int(maps.valid.sum())
        assert (np.isfinite(maps.z.values).all(-1) == maps.valid.values).all()
        assert ((maps.split.values == 255) == ~maps.valid.values).all()
    assert sorted(sizes) == [(6, 7), (12, 10)]
    assert n_valid == len(np.load(folder / "embeddings.npz")["z"]) == 120 + 41


@pytest.mark.parametrize(
    "more", [["--loss", "l1"], ["--loss", "poisson", "--no_normalize"], ["--precision", "bf16"]]
)
def test_losses_and_precisions_learn(more: list[str], scan: Path, tmp_path: Path) -> None:
    assert train(scan, tmp_path, "--no_validation", *more) == 0
    history = results(tmp_path)["history"]
    assert history[-1]["train"] < history[0]["train"]
    assert {one["val"] for one in history} == {None}
    assert results(tmp_path)["leak"] is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--batch_size", "4"], "unknown: --batch_size; did you mean --batch?"),
        (["--epoch", "4"], "unknown: --epoch; did you mean --epochs?"),
        (["--learning"], "unknown: --learning"),
        (["--precision", "16", "--device", "cpu"], "precision is 16 on the CPU"),
        (["--epochs", "0"], "epochs is 0; expected a number above 0"),
        (["--lr", "nan"], "lr is nan"),
        (["--latent", "9999"], "latent is 9999"),
        (["--device", "tpu"], "device is tpu"),
        (["--split", "rows", "--val", "0.9"], "set --split blocks or --split random"),
        (["--memory", "1kB"], "set --memory 146880 or more"),
        (["--loss", "cosine"], "invalid choice: 'cosine'"),
    ],
)
def test_options_that_are_refused(
    words: list[str], text: str, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(scan, tmp_path / "out", *words) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.pt").exists()


def test_flags_of_the_earlier_scripts(
    scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--data", str(scan), "--output_dir", str(tmp_path), *SHORT[:-1], "--num_workers", "1"]
    words += ["--use_chunked", "--chunk_size", "64", "--pin-memory", "--persistent_workers"]
    assert main([*words, "--normalize", "--epochs", "1"]) == 0
    assert capsys.readouterr().err.count("has no effect") == 4


@pytest.mark.parametrize(
    ("data", "words", "code", "text"),
    [
        ("missing.npy", [], 3, "there is no such file; check --data"),
        ("missing*.npy", [], 2, "--data is missing*.npy, and nothing matches it"),
        ("scan.npy", ["--scan-shape", "5", "5"], 3, "--scan_shape"),
    ],
)
def test_errors_of_readers_name_flags(
    data: str,
    words: list[str],
    code: int,
    text: str,
    scan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    assert train(scan.parent / data, tmp_path / "out", *words) == code
    err = capsys.readouterr().err
    assert text.replace("missing", str(scan.parent / "missing")) in err or text in err
    assert "input." not in err


def test_an_output_folder_that_is_a_file(
    scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").write_text("mine")
    assert train(scan, tmp_path / "out") == 5
    assert "there is a file of that name" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_a_loss_that_is_no_number(
    scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(scan, tmp_path, "--lr", "1e30", "--epochs", "9") == 2
    assert "use a lower lr than 1e+30" in capsys.readouterr().err


def test_without_torch(scan: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from stem_dask.train import main\n"
        f"sys.exit(main(['--data', {str(scan)!r}, '--output_dir', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install -c constraints.txt -e '.[torch]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, stem_dask.cli.main as c\n"
        "try: c.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'dask', 'zarr', 'xarray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--num_workers" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


# --- the gold particle


def regions(patterns: np.ndarray) -> np.ndarray:
    """0 vacuum, 1 and 2 the twins of the simulated particle, from counts (scan_y, scan_x, ky, kx).

    In vacuum at most 5 % of the electrons are outside of the direct beam. The middle of each twin is a reference; a pattern
    belongs to the twin from which its scattered electrons come with the higher likelihood.
    """
    n = patterns.shape[-1] // 2
    distance = np.hypot(*np.mgrid[-n:n, -n:n])
    share = patterns[..., distance >= 11].sum(-1) / patterns.sum((-2, -1))
    scattered = patterns[..., distance >= 12].astype(float)
    likelihood = []
    for rows in (slice(6, 9), slice(17, 20)):
        rate = scattered[rows, 10:15].mean((0, 1)) + 1e-3
        likelihood.append(scattered @ np.log(rate / rate.sum()))
    return np.where(share <= 0.05, 0, 1 + np.argmax(likelihood, axis=0))


def adjusted_rand(a: np.ndarray, b: np.ndarray) -> float:
    """Hubert and Arabie, Journal of Classification 2 (1985) 193."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    both, first, second = ((n * (n - 1) / 2).sum() for n in (table, table.sum(1), table.sum(0)))
    expected = first * second / (len(a) * (len(a) - 1) / 2)
    return float((both - expected) / ((first + second) / 2 - expected))


def clusters(z: np.ndarray) -> np.ndarray:
    """k-means of 3, of 20 starts the one with the least inertia."""
    from scipy.cluster.vq import kmeans2

    found = []
    for seed in range(20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty cluster
            means, labels = kmeans2(z.astype(float), 3, minit="++", seed=seed)
        found.append((((z - means[labels]) ** 2).sum(), seed, labels))
    return min(found)[2]


@pytest.mark.timeout(900)  # 20 s on a quiet machine
def test_the_latent_shows_the_twins_of_the_gold_particle(shared_data: Path, tmp_path: Path) -> None:
    import stem_dask as sd
    from stem_dask.cli.main import main as command

    source, cropped = shared_data / "sim" / "au_np_descan_u16.hspy", tmp_path / "gold.zarr"
    words = ["--input", str(source), "--output", str(cropped), "--align", "pattern", "--quiet"]
    assert command(["crop", *words]) == 0
    options = ["--epochs", "30", "--batch", "64", "--latent", "16", "--downsample", "2", "--quiet"]
    options += ["--threads", "1"]  # several on a busy machine wait for each other
    words = ["--data", str(cropped), "--output_dir", str(tmp_path / "out"), *options]
    assert command(["train", *words]) == 0
    z = np.load(tmp_path / "out" / "embeddings.npz")["z"]
    expected = regions(sd.open(cropped).values).ravel()
    assert np.bincount(expected).min() > 100
    assert adjusted_rand(clusters(z), expected) >= 0.6
    assert adjusted_rand(clusters(components(z)), expected) >= 0.6
    assert results(tmp_path / "out")["history"][-1]["val"] < 0.1  # of a variance of 1


def test_the_example_runs(scan: Path, tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[1] / "examples" / "train_autoencoder.py"
    assert len(example.read_text().splitlines()) <= 60
    module = runpy.run_path(str(example))
    assert module["main"](str(scan), str(tmp_path / "out")) < 0.7
    stack = tmp_path / "list.npy"
    np.save(stack, np.load(scan).reshape(120, 18, 17))
    assert module["main"](str(stack), str(tmp_path / "stack"), epochs=1) < 2
    latent = torch.load(tmp_path / "out" / "example.pt", weights_only=False)["latent"]
    assert latent.shape == (12, 10, 8)
