"""The Python face: what objects show, what `run_config`, `open`, `export`, `plot` and `report` take and return."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import stem_dask as sd
from stem_dask.writers.synthetic import Synthetic, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scan.dm4 and its crop, crop.zarr."""
    place = tmp_path_factory.mktemp("face")
    write_dataset(str(place / "scan.dm4"), Synthetic(scan_shape=(8, 6)))
    return place


def options(folder: Path, name: str = "crop.zarr", **output: object) -> dict:
    return {
        "input": {"path": str(folder / "scan.dm4")},
        "output": {"path": str(folder / name), "export": [], **output},
    }


@pytest.fixture(scope="module")
def outcome(folder: Path) -> sd.Outcome:
    return sd.run_config(options(folder))


def test_objects_are_short(outcome: sd.Outcome, folder: Path) -> None:
    height, width = outcome.results["window"]["size"]
    text = repr(outcome)
    assert len(text) <= 400
    kept = outcome.results["validation"]["min_retention"]
    for words in (f"window {height} x {width} px", f"min {kept:.4f}", "crop.zarr"):
        assert words in text
    table = outcome._repr_html_()
    assert table.startswith("<table>")
    assert f"{height} x {width} px" in table
    assert f"{kept:.4f}" in table
    window = sd.choose_window(sd.analyze(sd.open(folder / "scan.dm4")).compute())
    assert isinstance(window, sd.Window)
    assert len(repr(window)) <= 160
    assert f"{window.shape[0]} x {window.shape[1]} px" in repr(window)


def test_an_outcome_opens(outcome: sd.Outcome) -> None:
    patterns = outcome.open()
    assert patterns.shape[-2:] == tuple(outcome.results["window"]["size"])
    assert patterns.dims == ("scan_y", "scan_x", "ky", "kx")


def test_a_config_shows_what_is_not_at_its_default(tmp_path: Path) -> None:
    path = tmp_path / "crop.yaml"
    path.write_text("{input: {path: a.dm4}, output: {path: a.zarr}, analyze: {from: b.zarr}}")
    config = sd.load_config(path, ["crop.size=40", "device=auto"])
    assert isinstance(config, sd.Config)
    text = repr(config)
    assert len(text) <= 600
    for words in ("crop.size=40", "analyze.from=", "device=auto", "a.dm4"):
        assert words in text
    assert "coverage" not in text
    long = [
        f"input.path={'x' * 900}.dm4",
        f"analyze.from={'y' * 900}",
        f"input.dark={'z' * 99}.npy",
    ]
    assert len(repr(sd.load_config(path, long))) <= 600


@pytest.mark.parametrize("key", ["target_retention", "target_retenton"])
def test_a_key_without_its_section(tmp_path: Path, key: str) -> None:
    path = tmp_path / "crop.yaml"
    path.write_text("{input: {path: a.dm4}, output: {path: a.zarr}}")
    with pytest.raises(sd.ConfigError, match=r"did you mean analyze\.target_retention\?"):
        sd.load_config(path, [f"{key}=0.9"])


def test_a_connection_is_short() -> None:
    with sd.connect("threads", threads_per_worker=1) as cluster:
        assert isinstance(cluster, sd.Connection)
        assert len(repr(cluster)) <= 160
        assert "1 worker" in repr(cluster)


def test_dir_has_public_names_only() -> None:
    assert dir(sd) == sorted(sd.__all__)


def test_run_config_takes_a_path_and_overrides(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"input: {{path: {folder / 'scan.dm4'}}}\noutput: {{path: a.zarr, export: []}}"
    Path("crop.yaml").write_text(text)
    found = sd.run_config("crop.yaml", ["crop.size=40"])
    assert found.results["window"]["size"] == [40, 40]
    assert (tmp_path / "a.zarr").is_dir()
    assert found.open().shape[-2:] == (40, 40)
    given = {"input": {"path": folder / "scan.dm4"}, "output": {"path": "b.npy"}}
    assert sd.run_config(given).exit_code == 0
    assert (tmp_path / "b.npy").is_file()
    again = sd.run_config(given)
    assert again.lines[0].startswith("already complete")
    assert len(repr(again)) <= 400
    assert again.open().shape == sd.open("b.npy").shape
    with pytest.raises(sd.ConfigError, match="overrides are for a path or a dictionary"):
        sd.run_config(sd.load_config("crop.yaml"), ["crop.size=40"])
    with pytest.raises(sd.ConfigError, match="the config is a int; expected the path"):
        sd.run_config(3)
    with pytest.raises(sd.ConfigError, match="names 2 inputs"):
        sd.run_config({"input": {"path": ["a", "b"]}, "output": {"path": "{stem}.zarr"}})


def test_export_returns_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = np.arange(2 * 3 * 4 * 4, dtype="u2").reshape(2, 3, 4, 4)
    assert sd.export(data, "a.npy") == str(tmp_path / "a.npy")
    with pytest.warns(UserWarning, match="requires hdf5plugin") as told:
        assert sd.export(data, "a.h5", codec="lz4") == str(tmp_path / "a.h5")
    assert told[0].filename == __file__


def ring_sums(data: np.ndarray, inner: float, outer: float, centers: np.ndarray) -> np.ndarray:
    """The slow twin of `virtual_image`."""
    out = np.zeros(data.shape[:-2])
    for index in np.ndindex(*data.shape[:-2]):
        cy, cx = centers[index]
        for y, x in np.ndindex(*data.shape[-2:]):
            if inner <= np.sqrt((y - cy) ** 2 + (x - cx) ** 2) < outer:
                out[index] += data[index][y, x]
    return out


@pytest.mark.parametrize(("inner", "outer"), [(0, 1), (0, 4.5), (3, 6), (2.5, np.inf)])
@pytest.mark.parametrize("center", [None, (3, 7.5), (-2, 30)])
def test_virtual_image(inner: float, outer: float, center: tuple | None) -> None:
    data = np.random.default_rng(1).poisson(3, (4, 3, 11, 12)).astype("u2")
    lazy = xr.DataArray(data, dims=("scan_y", "scan_x", "ky", "kx")).chunk(scan_y=2, ky=5)
    image = sd.virtual_image(lazy, inner, outer, center)
    assert image.chunks is not None
    assert image.dims == ("scan_y", "scan_x")
    expected = ring_sums(
        data, inner, outer, np.full((4, 3, 2), (5, 6) if center is None else center)
    )
    np.testing.assert_array_equal(image.values, expected)
    listed = sd.virtual_image(data.reshape(12, 11, 12), inner, outer, center)
    np.testing.assert_array_equal(listed.values, expected.ravel())


def test_virtual_image_about_own_centers(folder: Path) -> None:
    patterns = sd.open(folder / "scan.dm4").isel(ky=slice(0, 60)).load()
    patterns = patterns.copy(data=patterns.values.copy())
    patterns[2, 3] = 0
    analysis = sd.analyze(patterns).compute()
    image = sd.virtual_image(patterns, 1, 7, analysis).compute()
    centers = np.rint(np.stack([analysis.center_y.values, analysis.center_x.values], axis=-1))
    expected = ring_sums(patterns.values[:3], 1, 7, np.nan_to_num(centers[:3]))
    expected[2, 3] = np.nan
    np.testing.assert_array_equal(image.values[:3], expected)
    for align in ("fixed", "pattern"):
        window = sd.choose_window(analysis, align=align, size=30)
        cropped = sd.crop(patterns, analysis, window)
        np.testing.assert_array_equal(sd.virtual_image(cropped, 1, 7, analysis), image)
    with pytest.raises(sd.ConfigError, match="give the center"):
        sd.virtual_image(sd.downsample(cropped, 2), 1, 7, analysis)
    with pytest.raises(sd.ConfigError, match="the analysis is of"):
        sd.virtual_image(patterns[1:], 1, 7, analysis)
    with pytest.raises(sd.ConfigError, match="expected 0 <= inner < outer"):
        sd.virtual_image(patterns, 7, 7)


def test_open_in_blocks_of_the_callers(folder: Path) -> None:
    path = folder / "scan.dm4"
    assert sd.open(path, chunks=(3, 2)).chunks[:2] == ((3, 3, 2), (2, 2, 2))
    assert sd.open(path, chunks=(1, -1)).chunks[:2] == ((1,) * 8, (6,))
    assert sd.open(path, chunks=None).chunks == sd.open(path).chunks
    np.testing.assert_array_equal(sd.open(path, chunks=(3, 2))[5], sd.open(path)[5])
    for wrong in ((3,), (0, 1), (1.5, 2), (1, 2, 3, 4)):
        with pytest.raises(sd.ConfigError, match=r"expected \(rows, columns\)"):
            sd.open(path, chunks=wrong)


def test_open_a_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = np.arange(3 * 2 * 2 * 4 * 5, dtype="u2").reshape(3, 2, 2, 4, 5)
    for name, one in zip("abc", data, strict=True):
        np.save(f"{name}.npy", one)
    found = sd.open("?.npy", chunks=(1, 1))
    assert found.dims == ("t", "scan_y", "scan_x", "ky", "kx")
    assert found.chunks[:3] == ((1, 1, 1), (1, 1), (1, 1))
    np.testing.assert_array_equal(found.values, data)
    np.testing.assert_array_equal(sd.open(["c.npy", Path("a.npy")]).values, data[[2, 0]])
    assert sd.open(["a.npy"]).shape == (1, 2, 2, 4, 5)
    assert float(sd.virtual_image(found[1], 0, 1)[0, 0]) == data[1, 0, 0, 2, 2]
    np.save("d.npy", np.zeros((2, 2, 4, 6), "u2"))
    with pytest.raises(
        sd.ConfigError, match=r"d\.npy has the shape \(2, 2, 4, 6\).*\(2, 2, 4, 5\)"
    ):
        sd.open("*.npy")
    with pytest.raises(sd.SourceError, match=r"nothing matches x\*\.npy"):
        sd.open("x*.npy")
    Path("e[1].npy").write_bytes(Path("a.npy").read_bytes())
    assert sd.open("e[1].npy").dims[0] == "scan_y"


def test_plot(folder: Path, outcome: sd.Outcome) -> None:
    import sys

    from matplotlib.figure import Figure

    analysis = sd.analyze(sd.open(folder / "scan.dm4")).compute()
    window = sd.choose_window(analysis, size=30)
    figure = sd.plot(analysis, window)
    assert isinstance(figure, Figure)
    axes = {ax.get_label(): ax for ax in figure.axes}
    assert {"mean", "curve"} < {*axes}
    assert {*axes} & {"bright_field", "total"}
    (box,) = [patch for patch in axes["mean"].patches if patch.get_label() == "window"]
    scales = [abs(sd.open(folder / "scan.dm4")[name].attrs["scale"]) for name in ("kx", "ky")]
    assert abs(box.get_width()) == pytest.approx(30 * scales[0])
    assert "30 x 30 px" in figure.get_suptitle()
    mean = axes["curve"].lines[0]
    np.testing.assert_allclose(mean.get_ydata(), analysis.curve_mean.values[1:])
    for one in (outcome, folder / "crop.zarr", analysis.drop_vars("bright_field", errors="ignore")):
        assert len(sd.plot(one).axes) >= 3
    other = sd.run_config(options(folder, "sized.zarr"), ["crop.size=44"])
    for one in (other, folder / "sized.zarr"):
        assert "44 x 44 px" in sd.plot(one).get_suptitle()
    assert figure._repr_png_().startswith(b"\x89PNG")
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
    with pytest.raises(sd.SourceError, match="holds no analysis"):
        sd.plot(folder / "scan.dm4")
    with pytest.raises(sd.ConfigError, match="still lazy"):
        sd.plot(sd.analyze(sd.open(folder / "scan.dm4")))


def test_report(folder: Path, outcome: sd.Outcome) -> None:
    found = sd.report(outcome)
    assert found.path == str(folder / "crop_report.html")
    assert sd.report(folder / "crop.zarr") == sd.report(found.path) == found
    shown = found._repr_html_()
    assert shown.startswith("<iframe title='Report'")
    assert "&lt;html lang=" in shown
    with pytest.raises(sd.SourceError, match=r"there is no report .*other_report\.html"):
        sd.report(folder / "other.zarr")


def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    source = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"
    assert "/home/" not in source.read_text()
    notebook = nbformat.read(source, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own packages
        nbclient.NotebookClient(
            notebook,
            timeout=120,
            kernel_name="python3",
            resources={"metadata": {"path": str(tmp_path)}},
        ).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert not [one for found in outputs for one in found if one.output_type == "error"]
    data = [one.data for found in outputs for one in found if "data" in one]
    assert sum("image/png" in one for one in data) == 3
    (ran,) = [found for found in outputs if any("exit code" in str(one) for one in found)]
    texts = [one["data"]["text/plain"] for one in ran if "data" in one]
    line = r"^analyze +(\d+)/\1  100%  stage 2 of \d  .* GB/s  took .*  worker memory .* GB$"
    assert re.search(line, texts[0], re.MULTILINE), texts
    assert len(texts[0].splitlines()) <= 40
    assert any("<iframe" in one.get("text/html", "") for one in data)


def test_public_classes_are_classes() -> None:
    for name in sd.__all__:
        assert isinstance(getattr(sd, name), type) or not name[0].isupper(), name
