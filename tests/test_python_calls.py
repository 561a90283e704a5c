"""What Python users pass to the functions: arrays, signals, partners of other patterns; and what the errors say."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import dask
import dask.array as da
import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from strategies import LIST, SCAN

import stem_dask as sd
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.model import Axis
from stem_dask.core.patterns import as_patterns
from stem_dask.stages.blocks import patterns_of
from stem_dask.stages.export import export

AXES = (
    Axis("scan_y", 6, 0.5, 3.0, "nm"),
    Axis("scan_x", 5, 0.25, -1.0, "um"),
    Axis("ky", 40, 0.1, -2.0, "1/nm"),
    Axis("kx", 36, 0.2, -3.6, "mrad"),
)


@pytest.fixture
def patterns(beam):
    """A calibrated scan."""
    return as_patterns(da.from_array(beam, chunks=(2, 5, -1, -1)), AXES, {"intensity": "counts"})


@pytest.fixture
def analysis(patterns):
    return sd.analyze(patterns).compute()


@pytest.fixture
def window(analysis):
    return sd.choose_window(analysis, margin_pixels=1)


@pytest.fixture
def cropped(patterns, analysis, window):
    return sd.crop(patterns, analysis, window)


def everything(patterns):
    """Results of all functions that take patterns."""
    analysis = sd.analyze(patterns).compute()
    window = sd.choose_window(analysis, margin_pixels=1)
    cropped = sd.crop(patterns, analysis, window)
    found = sd.validate(patterns, cropped, analysis).compute()
    whole = sd.to_detector(cropped, analysis)
    small, half = sd.downsample(patterns, 2), sd.cast(patterns, "float32")
    return analysis, *dask.compute(cropped, whole, small, half), found


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        xr.testing.assert_allclose(one, other, rtol=0)


# --- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "readonly", "dask", "h5py", "zarr", "DataArray"])
@pytest.mark.parametrize("lead", [2, 1])
def test_arrays_are_patterns(beam, kind, lead, tmp_path):
    array = beam if lead == 2 else beam[2]
    dims = SCAN if lead == 2 else LIST
    axes = [Axis(dim, n) for dim, n in zip(dims, array.shape, strict=True)]
    expected = everything(as_patterns(array, axes))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        given = {
            "numpy": lambda: array.copy(),
            "readonly": lambda: array,
            "dask": lambda: da.from_array(array, chunks=(1, *(3,) * (array.ndim - 1))),
            "h5py": lambda: file.create_dataset("patterns", data=array),
            "zarr": lambda: zarr.create_array({}, data=array),
            "DataArray": lambda: as_patterns(da.from_array(array), axes),
        }[kind]()
        same(everything(given), expected)


def test_an_array_is_exported(beam, tmp_path):
    sd.export(beam, tmp_path / "a.zarr")
    np.testing.assert_array_equal(sd.open(tmp_path / "a.zarr"), beam)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (np.zeros((4, 4)), r"have 2 axes; expected .*array\.reshape\(scan_y, scan_x, ky, kx\)"),
        (np.zeros((1, 2, 3, 4, 5)), "have 5 axes"),
        (np.ma.masked_array(np.zeros((2, 4, 4)), False), r"masked array; pass array\.filled\(0\)"),
        ("scan.dm4", r"the path 'scan\.dm4'; open it with sd\.open"),
        (Path("scan.dm4"), r"open it with sd\.open"),
        ([[1]], r"builtins\.list; expected an array of numpy or Dask, an xarray\.DataArray or a"),
        (None, r"builtins\.NoneType; expected an array"),
        (xr.Dataset({"a": 1, "b": 2}), r"Dataset; pass one of .*dataset\['b'\]"),
        (
            xr.DataArray(np.zeros((2, 2, 3, 4)), dims=("y", "x", "ky", "kx")),
            r"dimensions .* rename .* patterns\.rename\(\{'y': 'scan_y', 'x': 'scan_x'\}\)",
        ),
        (xr.DataArray(np.zeros((2, 2)), dims=("ky", "kx")), r"patterns\.isel\(scan_y=\[0\], scan_x=\[0\]\)"),
        (xr.DataArray(np.ones((2, 3, 4)), dims=("y", "ky", "kx")), r"dimensions .* expected \(scan_y, scan_x, ky, kx"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_patterns_is_refused_with_the_way_out(given, text):
    for call in (sd.analyze, lambda one: sd.downsample(one, 2), lambda one: sd.cast(one, "auto")):
        with pytest.raises(SourceError, match=text):
            call(given)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (np.ones((2, 3, 4), complex), "type complex128; expected bool, integer or float"),
        (np.ones((2, 3, 4), "M8[s]"), "type datetime64"),
        (np.ones((2, 0, 4, 5)), "there is nothing in them"),
    ],
)
def test_other_types_and_nothing_are_refused(data, text):
    with pytest.raises(SourceError, match=text):
        sd.analyze(data)


def test_the_ways_out_work(beam, patterns):
    other = patterns.rename(scan_y="y", scan_x="x")
    names = {"y": "scan_y", "x": "scan_x"}
    xr.testing.assert_identical(
        sd.analyze(other.rename(names)).compute(), sd.analyze(patterns).compute()
    )
    one = patterns.isel(scan_y=[0], scan_x=[0])
    assert sd.analyze(one).compute().total.values.tolist() == [[beam[0, 0].sum()]]
    with pytest.raises(ConfigError, match=r"path is a ndarray; .* sd\.analyze, .* take arrays"):
        sd.open(beam)


@pytest.mark.parametrize(
    "dims", [("scan_x", "scan_y", "ky", "kx"), ("ky", "kx", "scan_y", "scan_x"), (*SCAN[:2], "kx", "ky")]
)  # fmt: skip
def test_transposed_patterns(patterns, dims):
    valid = np.ones((6, 5), bool)
    valid[2, 1] = False
    patterns = patterns.assign_coords(valid=(SCAN[:2], valid))
    same(everything(patterns.transpose(*dims)), everything(patterns))


@pytest.mark.parametrize("line", [{"scan_y": 2}, {"scan_x": 3}])
def test_a_line_of_a_scan_is_a_scan_of_one_line(patterns, line):
    patterns = patterns.assign_coords(valid=(SCAN[:2], np.arange(30).reshape(6, 5) != 11))
    expected = everything(patterns.isel({dim: [i] for dim, i in line.items()}))
    same(everything(patterns.isel(line)), expected)
    bare = patterns.drop_vars([*SCAN, "valid"])
    lines = [bare.isel(line).T, bare.isel({dim: [i] for dim, i in line.items()})]
    np.testing.assert_array_equal(*(sd.analyze(one).compute().total for one in lines))


def test_stacked_positions_are_a_list(patterns):
    stacked = patterns.stack(pattern=SCAN[:2]).transpose("pattern", "ky", "kx")
    total = sd.analyze(stacked).compute().total
    np.testing.assert_array_equal(total.values, sd.analyze(patterns).compute().total.values.ravel())


# --- signals of HyperSpy ------------------------------------------------------------------------


@pytest.fixture
def signal(beam):
    hs = pytest.importorskip("hyperspy.api", reason="the package hyperspy is not installed")
    signal = hs.signals.Signal2D(beam.copy())
    for axis, ours in zip(
        [*signal.axes_manager.navigation_axes[::-1], *signal.axes_manager.signal_axes[::-1]],
        AXES,
        strict=True,
    ):
        axis.name, axis.scale, axis.offset, axis.units = ours.name, ours.scale, ours.offset, ours.units  # fmt: skip
    signal.metadata.General.title = "gold"
    signal.metadata.set_item("Acquisition_instrument.TEM.beam_energy", 200.0)
    return signal


@pytest.mark.parametrize("lazy", [False, True])
def test_a_signal_with_its_axes(patterns, signal, lazy):
    signal = signal.as_lazy() if lazy else signal
    same(everything(signal), everything(patterns))
    cropped = sd.crop(signal, *(lambda a: (a, sd.choose_window(a)))(sd.analyze(signal).compute()))
    assert (cropped.title, cropped.beam_energy_kv) == ("gold", 200.0)
    assert {dim: cropped[dim].units for dim in SCAN} == {a.name: a.units for a in AXES}


def test_a_signal_turned_and_cut(patterns, signal):
    same(everything(signal.transpose(navigation_axes=(1, 0))), everything(
        patterns.rename(scan_y="x", scan_x="scan_y").rename(x="scan_x").transpose(*SCAN)
    ))  # fmt: skip
    line = sd.analyze(signal.inav[:, 2]).compute()
    assert line.total.dims == ("pattern",)
    np.testing.assert_array_equal(line.total, sd.analyze(patterns[2]).compute().total[0])


def test_signals_that_hold_no_patterns(signal):
    with pytest.raises(SourceError, match=r"0 navigation and 2 signal axes; expected 1 or 2 and 2"):
        sd.analyze(signal.inav[0, 0])
    spectra = signal.transpose(signal_axes=1)
    with pytest.raises(SourceError, match=r"3 navigation and 1 .*signal\.transpose\(signal_axes=2"):
        sd.analyze(spectra)
    assert sd.analyze(spectra.transpose(signal_axes=2)).compute().total.shape == (6, 5)
    signal.axes_manager.signal_axes[0].convert_to_non_uniform_axis()
    with pytest.raises(SourceError, match=r"kx .* not uniform; .*convert_to_uniform_axis\(\)"):
        sd.analyze(signal)


# --- partners -----------------------------------------------------------------------------------

OTHERS = {
    "reversed scan": (lambda p: p[::-1], r"scan_y\[0\] is 5.5 nm, not 3 nm"),
    "swapped lines": (lambda p: p.isel(scan_y=[0, 1, 3, 2, 4, 5]), r"scan_y\[2\] is 4.5 nm, not 4"),
    "sliced detector": (lambda p: p[..., 2:, :], "ky has 38 values, not 40"),
    "shifted detector": (lambda p: p.assign_coords(kx=p.kx + 1), r"kx\[0\] is -2.6 mrad, not -3.6"),
    "reversed detector": (lambda p: p[..., ::-1], r"kx\[0\] is 3.4 mrad, not -3.6 mrad"),
    "downsampled": (lambda p: sd.downsample(p, 2), "ky has 20 values, not 40"),
    "other region": (
        lambda p: p.assign_coords(scan_x=p.scan_x + 0.25),
        r"scan_x\[0\] is -0.75 um, not -1 um",
    ),
    "other shape": (lambda p: p[:4], r"analysis is of \(6, 5\) positions, the patterns have \(4, 5"),
    "list": (
        lambda p: xr.DataArray(p.values.reshape(30, 40, 36), dims=LIST),
        r"analysis is of \(6, 5\) positions, the patterns have \(30,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_an_analysis_of_other_patterns_is_refused(patterns, analysis, window, cropped, other):
    change, text = OTHERS[other]
    with pytest.raises(ConfigError, match=text):
        sd.crop(change(patterns), analysis, window)
    with pytest.raises(ConfigError, match=text if "positions" not in text else "positions"):
        sd.validate(change(patterns), cropped, analysis)


def test_a_stored_analysis_is_known_again(patterns, tmp_path, beam_file, make_config):
    sd.run_config(make_config(beam_file, crop={"size": 16}))
    stored = xr.open_zarr(tmp_path / "out.zarr", group="analysis").load()
    source = sd.open(beam_file)
    window = sd.choose_window(sd.analyze(source).compute(), size=16)
    np.testing.assert_array_equal(
        sd.crop(source, stored, window), xr.open_zarr(tmp_path / "out.zarr").patterns
    )
    with pytest.raises(ConfigError, match=r"scan_y is in nm, not in px"):
        sd.crop(patterns, stored, window)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p, c, a: sd.validate(c, p, a), "no window_y and window_x; pass what sd.crop"),
        (lambda p, c, a: sd.validate(p, sd.downsample(c, 2), a), "by 2; validate before downsamp"),
        (lambda p, c, a: sd.validate(p, c / 2, a), "the type is float64, not uint16"),
        (lambda p, c, a: sd.validate(p, sd.cast(c, "float32"), a), "the type is float32"),
        (lambda p, c, a: sd.validate(p, c[..., 1:, :], a), "were cropped to 14 x 14 px and have 13 x"),
        (lambda p, c, a: sd.validate(p, c[::-1], a), r"scan_y\[0\] is 5.5 nm, not 3 nm"),
        (lambda p, c, a: sd.to_detector(c, sd.analyze(p[..., 2:, :]).compute()), "ky has 40 values, not 38"),
        (lambda p, c, a: sd.to_detector(c, sd.analyze(p.assign_coords(ky=p.ky + 1)).compute()), r"ky\[0\] is -2 1/nm, not -1 1/nm"),
        (lambda p, c, a: sd.to_detector(c[..., 1:], a), "were cropped to 14 x 14 px and have 14 x 13"),
        (lambda p, c, a: sd.to_detector(p, a), "no window_y"),
        (lambda p, c, a: sd.to_detector(sd.downsample(c, 2), a), "were downsampled by 2"),
        (lambda p, c, a: sd.validate(p, c.assign_coords(ky=c.ky * 2), a), r"coordinates than their crop: ky\[0\] is"),
        (lambda p, c, a: sd.to_detector(c.assign_coords(kx=c.kx / 2), a), r"coordinates than their crop: kx\[0\] is"),
    ],
)  # fmt: skip
def test_windows_that_do_not_belong_are_refused(patterns, cropped, analysis, call, text):
    with pytest.raises(ConfigError, match=text):
        call(patterns, cropped, analysis)


def test_windows_that_hold_more_than_their_patterns(patterns, cropped, analysis):
    for name in ("retention", "mean"):
        found = sd.validate(patterns, cropped * 2, analysis)[name]
        with pytest.raises(SourceError, match=r"exceeds 1 \(up to 2\)"):
            found.compute()


def test_some_windows_go_back(patterns, cropped, analysis):
    whole = sd.to_detector(cropped, analysis)
    xr.testing.assert_equal(sd.to_detector(cropped[2:5], analysis), whole[2:5])
    np.testing.assert_array_equal(sd.downsample(cropped, 2).window_y, cropped.window_y)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p, a: sd.downsample(p, 1.5), "downsample factor is 1.5; expected an integer"),
        (lambda p, a: sd.downsample(p, "2"), "downsample factor is 2; expected an integer"),
        (lambda p, a: sd.choose_window(a, margin_pixels=1.5), "margin_pixels is 1.5; expected an integer"),
        (lambda p, a: sd.choose_window(a, size_multiple=2.5), "size_multiple is 2.5; expected an integer"),
        (lambda p, a: sd.choose_window(a, factor=1.5), "factor is 1.5; expected an integer"),
        (lambda p, a: sd.choose_window(a, size=12.5), "size is 12.5; expected auto, fft, n, or"),
        (lambda p, a: sd.choose_window(a, size=[12, 12.5]), r"size is \[12, 12.5\].* is 12.5; expected int"),
        (lambda p, a: sd.choose_window(a, window=[0, 12.5, 0, 12]), "window is .* is 12.5; expected int"),
    ],
)  # fmt: skip
def test_numbers_of_pixels_are_whole(patterns, analysis, call, text):
    with pytest.raises(ConfigError, match=text):
        call(patterns, analysis)


def test_numbers_of_pixels_may_be_numpys(patterns, analysis):
    xr.testing.assert_identical(sd.downsample(patterns, np.int8(2)), sd.downsample(patterns, 2))
    chosen = sd.choose_window(
        analysis, margin_pixels=np.uint8(1), size=np.array([12, 14]), factor=np.int64(1)
    )
    assert chosen.shape == (12, 14)
    assert sd.choose_window(analysis, size=np.int64(6)).shape == (6, 6)


# --- the analysis as a dataset ------------------------------------------------------------------


def test_every_variable_has_a_name_and_units(patterns, cropped, analysis, beam_file, make_config, tmp_path):  # fmt: skip
    sd.run_config(make_config(beam_file, input={"mask": "auto"}))
    stored = xr.open_zarr(tmp_path / "out.zarr", group="analysis")
    for dataset in (analysis, sd.validate(patterns, cropped, analysis), stored):
        for name, variable in dataset.variables.items():
            assert variable.attrs.get("long_name"), name
            assert "units" in variable.attrs, name
    assert {"retention", "window_y", "center_out_x", "profile", "profile_radius"} <= {*stored.variables}  # fmt: skip
    assert (stored.window_y.long_name, stored.retention.units) == ("first row of the window", "1")


def test_the_radius_is_one_thing(analysis):
    assert analysis.radius.dims == ("scan_y", "scan_x")
    assert "radius" not in analysis.sizes
    assert analysis.profile.dims == ("scan_y", "scan_x", "profile_radius")
    assert analysis.profile_radius.values.tolist() == list(range(analysis.sizes["profile_radius"]))
    inside = analysis.profile.sel(profile_radius=int(analysis.radius[2, 3]))[2, 3]
    assert inside >= 0.98
    assert analysis.radius.units == "px"


def test_netcdf(patterns, analysis, cropped, tmp_path):
    """scipy writes netCDF 3, which has no unsigned types: small counts become signed."""
    found = sd.validate(patterns, cropped, analysis)
    small = sd.downsample(cropped, 2)
    for name, data in {"a": analysis, "c": cropped, "v": found, "s": small}.items():
        data.to_netcdf(tmp_path / f"{name}.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "c.nc", engine="scipy") as again:
        np.testing.assert_array_equal(again.patterns, cropped)
        assert again.window_y.dims == ("scan_y", "scan_x")
    with xr.open_dataset(tmp_path / "a.nc", engine="scipy") as again:
        np.testing.assert_array_equal(again.radius, analysis.radius)


def test_attributes_survive_netcdf_and_every_export(shared_data, tmp_path):
    source = sd.open(shared_data / "sim" / "au_np_gms_stemx_u16.dm4", beam_energy_kv=80)[:2, :3]
    assert isinstance(source.original_metadata, dict)
    analysis = sd.analyze(source).compute()
    cropped = sd.crop(source, analysis, sd.choose_window(analysis, size=16))
    cropped.to_netcdf(tmp_path / "a.nc", engine="scipy")
    valid = (str, int, float, list, tuple, np.ndarray, np.number)
    assert all(
        type(value) is not bool and isinstance(value, valid) for value in cropped.attrs.values()
    )
    for kind in ("zarr", "h5", "hspy", "zspy", "pt"):
        sd.export(cropped, tmp_path / f"a.{kind}")
        again = sd.open(tmp_path / f"a.{kind}")
        assert again.given == {"beam_energy_kv": 80.0}, kind
        assert {*again.original_metadata} == {*source.original_metadata}, kind
        assert again.beam_energy_kv == 80


# --- paths, words, clusters ---------------------------------------------------------------------


def test_a_path_in_the_home_folder(beam, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    np.save(tmp_path / "mask.npy", np.zeros((40, 36), bool))
    sd.export(beam, "~/made/a.npy")
    assert (tmp_path / "made" / "a.npy").exists()
    for path in ("~/made/a.npy", Path("~/made/a.npy")):
        np.testing.assert_array_equal(sd.open(path, mask="~/mask.npy"), beam)
    config = sd.load_config(
        io_config(tmp_path), ["input.path=~/made/a.npy", "output.path=~/made/b.zarr"]
    )
    sd.run_config(config)
    assert (tmp_path / "made" / "b.zarr").exists()


def io_config(folder):
    path = folder / "a.yaml"
    path.write_text("output: {export: [], figure: false}\ncluster: {kind: threads}\n")
    return str(path)


KEY = re.compile(r"\b(input|analyze|descan|crop|validate|downsample|output|cluster)\.\w+")


def bad_calls(beam, folder):
    """Calls that are refused, whose errors the command line words with keys of the config."""
    np.save(folder / "a.npy", beam)
    np.save(folder / "stack.npy", beam.reshape(30, 40, 36))
    (folder / "a.raw").write_bytes(b"12345678")
    with h5py.File(folder / "two.h5", "w") as file:
        file["a"] = file["b"] = beam
        file.copy("a", "c")
    path = folder / "a.npy"
    analysis = sd.analyze(np.zeros((2, 2, 8, 8))).compute()
    return {
        "no file": lambda: sd.open(folder / "none.dm4"),
        "raw": lambda: sd.open(folder / "a.raw"),
        "raw shape": lambda: sd.open(folder / "a.raw", shape=[2, 2], dtype="u1"),
        "raw type": lambda: sd.open(folder / "a.raw", shape=[2, 2, 2], dtype="what"),
        "raw size": lambda: sd.open(folder / "a.raw", shape=[1, 2, 2], dtype="u1"),
        "shape of .npy": lambda: sd.open(path, shape=[2, 2, 2]),
        "scan_shape": lambda: sd.open(path, scan_shape=[3, 3]),
        "skip_frames": lambda: sd.open(path, skip_frames=3),
        "fold": lambda: sd.open(folder / "stack.npy", scan_shape=[7, 4]),
        "list": lambda: sd.open(folder / "stack.npy", scan_roi=[0, 1, 0, 1]),
        "roi": lambda: sd.open(path, scan_roi=[0, 9, 0, 1]),
        "drop_columns": lambda: sd.open(path, drop_columns=9),
        "two arrays": lambda: sd.open(folder / "two.h5"),
        "dataset": lambda: sd.open(folder / "two.h5", dataset="z"),
        "missing chunks": lambda: sd.open(path, missing_chunks="zero"),
        "mask": lambda: sd.open(path, mask={"pixels": [[99, 0]]}),
        "negative": lambda: sd.open(path, mask={"rows": [-1]}),
        "calibration": lambda: sd.open(path, calibration={"kz": {"scale": 1, "units": "nm"}}),
        "dark": lambda: sd.open(path, dark=np.zeros((2, 2))),
        "exists": lambda: sd.export(beam, folder / "a.npy"),
        "suffix": lambda: sd.export(beam, folder / "a.xyz"),
        "codec": lambda: sd.export(beam, folder / "b.npy", codec="lz4"),
        "url": lambda: sd.export(beam, "s3://bucket/a.zarr"),
        "cluster": lambda: sd.connect("pbs"),
        "host": lambda: sd.connect("threads", host="::1"),
        "scheduler": lambda: sd.connect(scheduler_file="none.json"),
        "memory": lambda: sd.connect("threads", memory_limit="much"),
        "slurm": lambda: sd.connect("slurm"),
        "workers": lambda: sd.connect("threads", n_workers=2),
        "empty": lambda: sd.choose_window(analysis),
        "size": lambda: sd.choose_window(analysis, size="big"),
        "target": lambda: sd.analyze(beam, target_retention=2),
        "method": lambda: sd.downsample(beam, 2, method="cubic"),
        "type": lambda: sd.cast(beam, "int8"),
    }  # fmt: skip


def test_errors_speak_python(beam, tmp_path):
    for name, call in bad_calls(beam, tmp_path).items():
        with pytest.raises(sd.StemDaskError) as told:
            call()
        text = str(told.value)
        assert not KEY.search(text.replace(str(tmp_path), "")), (name, text)
        assert "overwrite=true" not in text
    with pytest.raises(sd.StemDaskError, match=r"overwrite=True"):
        sd.export(beam, tmp_path / "a.npy")
    with pytest.raises(sd.StemDaskError, match=r"output\.overwrite=true"):
        export(beam, tmp_path / "a.npy")  # as a run calls it


def test_functions_are_found_by_pickle():
    import pickle

    for name in sd.__all__:
        one = getattr(sd, name)
        if inspect.isfunction(one):
            assert pickle.loads(pickle.dumps(one)) is one
            assert inspect.getdoc(one)


def test_a_connection_without_with(beam):
    connection = sd.connect("threads", threads_per_worker=1, memory_limit="1GB")
    try:
        assert repr(connection).startswith(
            "<Connection threads: 1 worker with 1.00 GB, 1 thread, d"
        )
        from distributed import default_client

        assert default_client() is connection.client
        assert int(sd.analyze(beam).compute().total.sum()) == int(beam.sum())
    finally:
        connection.close()
    assert connection.client.status == "closed"
    connection.close()
    with pytest.raises(ValueError, match="No clients found"):
        default_client()
    with sd.connect("threads", threads_per_worker=1) as connection:
        assert connection.client.status == "running"
    assert connection.client.status == "closed"


def test_a_connection_that_is_never_closed_ends_with_the_program(tmp_path):
    script = tmp_path / "a.py"
    script.write_text(
        "import stem_dask as sd\n"
        "if __name__ == '__main__':\n"
        "    sd.connect('local', n_workers=1, threads_per_worker=1, memory_limit='1GB')\n"
        "    from distributed import default_client\n"
        "    print(default_client().submit(sum, [1, 2]).result())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_a_lazy_signal_of_hyperspy(shared_data):
    """Values, calibration and metadata are those of the file, and come back from the signal; nothing is computed."""
    path = shared_data / "sim" / "au_np_gms_stemx_u16.dm4"
    patterns = sd.open(path)
    signal = sd.to_hyperspy(patterns)
    assert signal._lazy
    assert signal.data is patterns.data
    assert signal.axes_manager.navigation_shape == (7, 9)
    assert signal.axes_manager.signal_shape == (60, 76)
    for axis, dim in zip(signal.axes_manager._axes, patterns.dims, strict=True):
        assert axis.name == dim
        np.testing.assert_allclose(axis.axis, patterns[dim].values)
        assert axis.units == patterns[dim].attrs["units"]
    assert signal.metadata.Acquisition_instrument.TEM.beam_energy == 200.0
    assert signal.metadata.General.title == patterns.attrs["title"]
    again = patterns_of(signal)
    np.testing.assert_array_equal(again, patterns)
    assert again.attrs["camera_length_mm"] == 550.0


def test_a_cropped_signal_keeps_its_metadata():
    """Cropped patterns hold metadata as JSON text; the signal made of them has the tree again."""
    import hyperspy.api as hs

    counts = np.zeros((2, 3, 16, 20), "u2")
    counts[..., 6:10, 8:12] = 9
    signal = hs.signals.Signal2D(counts)
    signal.metadata.set_item("General.authors", "A. Author")
    analysis = sd.analyze(signal).compute()
    cropped = sd.crop(signal, analysis, sd.choose_window(analysis, size=8))
    again = sd.to_hyperspy(cropped)
    assert again.metadata.General.authors == "A. Author"
    assert again.axes_manager.signal_shape == (8, 8)
    assert int(again.data.sum().compute()) == int(counts.sum())


def test_errors_are_public_and_also_the_builtins_that_a_caller_expects(tmp_path):
    with pytest.raises(sd.SourceError) as caught:
        sd.open(tmp_path / "a.dm4")
    assert isinstance(caught.value, (sd.StemDaskError, OSError))
    with pytest.raises(sd.ConfigError) as refused:
        sd.downsample(np.ones((2, 8, 8)), 1.5)
    assert isinstance(refused.value, ValueError)
