"""One HDF5 file for every program: HyperSpy, py4DSTEM, pyxem, LiberTEM, NeXus readers, xarray, and this package."""

import json
import os
import subprocess
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import stem_dask as sd
from stem_dask.cli.main import main
from stem_dask.core.formats import HDF5_SUFFIXES
from stem_dask.core.model import Axis
from stem_dask.core.patterns import as_patterns, axes_of
from stem_dask.writers.hdf5 import emd_axis

hs = pytest.importorskip("hyperspy.api")

SHAPE = (5, 4, 12, 10)
DIMS = ("scan_y", "scan_x", "ky", "kx")
AXES = (
    Axis("scan_y", 5, 0.5, 3.0, "nm"),
    Axis("scan_x", 4, 0.5, -1.0, "nm"),
    Axis("ky", 12, 0.1, -0.6, "1/nm"),
    Axis("kx", 10, 0.1, -0.5, "1/nm"),
)
NAMES = ("patterns", "Experiments/gold/data", "datacube_root/datacube/data", "stem/data/patterns")


def scan(axes: tuple[Axis, ...] = AXES, shape: tuple[int, ...] = SHAPE, **attrs: Any) -> Any:
    import dask.array as da

    array = (np.arange(prod(shape)) % 1999).reshape(shape).astype("u2")
    data = da.from_array(array, chunks=(2, *shape[1:]))
    known = {"intensity": "counts", "beam_energy_kv": 200.0, "convergence_angle_mrad": 3.0}
    return as_patterns(data, axes, {**known, **attrs})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same patterns under each suffix."""
    folder = tmp_path_factory.mktemp("layout")
    names = {suffix: folder / f"gold{suffix}" for suffix in HDF5_SUFFIXES}
    for path in names.values():
        sd.export(scan(), path, title="gold")
    return names


def test_the_suffix_changes_no_byte(files: dict[str, Path]) -> None:
    assert set(files) == {".h5", ".hdf5", ".emd", ".hspy"}
    assert len({path.read_bytes() for path in files.values()}) == 1


def test_the_patterns_are_stored_once(files: dict[str, Path]) -> None:
    with h5py.File(files[".h5"]) as file:
        assert file["patterns"].shape == SHAPE
        places = {h5py.h5o.get_info(file[name].id).addr for name in NAMES}
        assert len(places) == 1
        stored = file["patterns"].id.get_storage_size()
        assert "entry" not in file  # py4DSTEM takes a file that has it for one of an Arina
    assert files[".h5"].stat().st_size - stored < 100_000


def test_attributes_lead_to_the_plottable_data(files: dict[str, Path]) -> None:
    with h5py.File(files[".h5"]) as file:
        entry = file[file.attrs["default"]]
        data = entry[entry.attrs["default"]]
        assert [item.attrs["NX_class"] for item in (file, entry, data)] == [
            "NXroot",
            "NXentry",
            "NXdata",
        ]
        patterns = data[data.attrs["signal"]]
        np.testing.assert_array_equal(patterns[...], scan().values)
        assert tuple(data.attrs["axes"]) == DIMS
        for axis, dim in zip(AXES, patterns.dims, strict=True):
            for scale in (dim[0], data[axis.name], file[axis.name]):
                assert scale.is_scale
                assert scale.name.rpartition("/")[2] == axis.name
                values = axis.offset + axis.scale * np.arange(axis.size)
                np.testing.assert_allclose(scale[...], values, rtol=1e-12)
                assert scale.attrs["units"] == axis.units
        assert file.attrs["beam_energy_kv"] == patterns.attrs["beam_energy_kv"] == 200
        assert patterns.attrs["units"] == "counts"


@pytest.mark.parametrize("suffix", HDF5_SUFFIXES)
def test_hyperspy_opens_it(files: dict[str, Path], suffix: str) -> None:
    signal = hs.load(files[suffix], file_format="hspy")
    np.testing.assert_array_equal(signal.data, scan().values)
    axes = [(a.scale, a.offset, a.units) for a in signal.axes_manager._axes]
    assert axes == [(a.scale, a.offset, a.units) for a in AXES]
    assert signal.axes_manager.navigation_dimension == 2
    assert signal.metadata.Acquisition_instrument.TEM.beam_energy == 200


@pytest.mark.parametrize("suffix", HDF5_SUFFIXES)
@pytest.mark.parametrize("name", [None, *NAMES, "/patterns", "gold"])
def test_this_package_opens_it_by_every_name(
    files: dict[str, Path], suffix: str, name: str | None
) -> None:
    patterns = sd.open(files[suffix], dataset=name)
    np.testing.assert_array_equal(patterns.values, scan().values)
    assert axes_of(patterns) == AXES
    assert patterns.attrs["beam_energy_kv"] == 200
    assert patterns.attrs["title"] == "gold"


@pytest.mark.parametrize("suffix", [".hdf5", ".emd"])
def test_a_run_writes_it(
    tmp_path: Path, beam_file: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(beam_file), f"a{suffix}", "-q"]) == 0
    assert main(["convert", str(beam_file), f"a{suffix}"]) == 0
    assert capsys.readouterr().out.startswith("already complete")
    assert main(["crop", str(beam_file), "b.zarr", "-q", f"output.export=[{suffix[1:]}]"]) == 0
    np.testing.assert_array_equal(sd.open(f"a{suffix}").values, np.load(beam_file))
    cropped = sd.open("b.zarr")
    again = sd.open(f"b{suffix}")
    np.testing.assert_array_equal(again.values, cropped.values)
    assert [(a.scale, a.offset) for a in axes_of(again)] == [
        (a.scale, a.offset) for a in axes_of(cropped)
    ]
    assert sd.PatternDataset(f"b{suffix}", fields=("center", "window"))[3]["window"].shape == (2,)


def test_signal_type(tmp_path: Path, make_config: Any, files: dict[str, Path]) -> None:
    """Of the config, through the store into every export; without it that of the input."""
    output = {"export": ["hspy", "h5"], "signal_type": "electron_diffraction"}
    crop = {"window": [0, 8, 0, 8]}
    config = make_config(files[".hspy"], crop=crop, output=output, validate={"min_retention": 0})
    sd.run_config(config)
    sd.export(sd.open(tmp_path / "out.zarr"), tmp_path / "again.emd")
    for name in ("out.hspy", "out.h5", "again.emd"):
        with h5py.File(tmp_path / name) as file:
            (signal,) = file["Experiments"].values()
            assert signal["metadata/Signal"].attrs["signal_type"] == "electron_diffraction"
    with pytest.raises(sd.ConfigError, match=r"output\.signal_type is a b; expected a name"):
        make_config(files[".hspy"], output={"signal_type": "a b"})


# --- EMD, as py4DSTEM reads it ---


def emd(path: Path) -> tuple[dict[str, Any], list[tuple[list[float], str]]]:
    """Calibration and axes in the data cube."""
    with h5py.File(path) as file:
        assert file.attrs["emd_group_type"] == "file"
        assert (file.attrs["version_major"], file.attrs["version_minor"]) == (1, 0)
        root = file["datacube_root"]
        kept = root["metadatabundle/calibration"]
        values = {name: item[()] for name, item in kept.items() if isinstance(item, h5py.Dataset)}
        n = root["datacube/data"].ndim
        dims = [root[f"datacube/dim{i}"] for i in range(n)]
        texts = {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}
        return texts, [(dim[...].tolist(), dim.attrs["units"]) for dim in dims]


def test_emd_is_calibrated(files: dict[str, Path]) -> None:
    values, dims = emd(files[".emd"])
    assert values["R_pixel_size"] == 0.5
    assert values["R_pixel_units"] == "nm"
    assert values["Q_pixel_size"] == pytest.approx(0.01)
    assert values["Q_pixel_units"] == "A^-1"
    assert (values["qx0_mean"], values["qy0_mean"]) == pytest.approx((6, 5))
    assert values["convergence_semiangle_mrad"] == 3
    assert dims[0] == ([3.0, 3.5], "nm")
    assert dims[2] == (pytest.approx([-0.06, -0.05]), "A^-1")


def test_steps_that_differ_are_told(tmp_path: Path) -> None:
    axes = (AXES[0], Axis("scan_x", 4, 0.25, 0.0, "nm"), *AXES[2:])
    with pytest.warns(UserWarning, match=r"one pixel size for the scan; .* fast axis.*: 0\.25 nm"):
        sd.export(scan(axes), tmp_path / "a.emd")
    values, dims = emd(tmp_path / "a.emd")
    assert values["R_pixel_size"] == 0.25
    assert [dim[0] for dim in dims[:2]] == [[3.0, 3.5], [0.0, 0.25]]
    assert axes_of(sd.open(tmp_path / "a.emd")) == axes


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        (Axis("kx", 8, 0.2, -0.4, "1/Å"), (0.2, -0.4, "A^-1")),
        (Axis("kx", 8, 2e-3, -4e-3, "rad"), (2.0, -4.0, "mrad")),
        (Axis("kx", 8, 2.0, -4.0, "mrad"), (2.0, -4.0, "mrad")),
        (Axis("kx", 8, -0.5, 2.0, ""), (1.0, -4.0, "pixels")),
        (Axis("scan_x", 8, 2.0, 0.0, ""), (2.0, 0.0, "pixels")),
        (Axis("scan_x", 8, 2.0, 1.0, "µm"), (2.0, 1.0, "µm")),
    ],
)
def test_units_of_emd(axis: Axis, told: tuple[float, float, str]) -> None:
    found = emd_axis(axis)
    assert (found.scale, found.offset, found.units) == (*map(pytest.approx, told[:2]), told[2])
    # the pixel of value 0 stays the same
    assert found.offset / found.scale == pytest.approx(axis.offset / axis.scale)


def test_a_list_of_patterns(tmp_path: Path) -> None:
    """A data cube has four axes, so a list is an array of three."""
    axes = (Axis("pattern", 5, 2.0, 1.0, "s"), *AXES[2:])
    sd.export(scan(axes, (5, 12, 10)), tmp_path / "a.emd")
    with h5py.File(tmp_path / "a.emd") as file:
        assert file["datacube_root/datacube"].attrs["python_class"] == "Array"
    values, dims = emd(tmp_path / "a.emd")
    assert "R_pixel_size" not in values
    assert dims[0] == ([1.0, 3.0], "s")
    assert axes_of(sd.open(tmp_path / "a.emd")) == axes


# --- attributes and files of earlier versions ---


def test_long_attributes(tmp_path: Path) -> None:
    """HDF5 limits an attribute to 64 kB."""
    sd.export(scan(comment="x" * 70_000, numbers=list(range(9000))), tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["comment"].asstr()[()] == "x" * 70_000
        assert file["numbers"][...].tolist() == list(range(9000))
    np.testing.assert_array_equal(sd.open(tmp_path / "a.h5").values, scan().values)


def test_a_h5_of_an_earlier_version(tmp_path: Path) -> None:
    """Patterns, axes and metadata were at the root, without a signal of HyperSpy."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("patterns", data=scan().values)
        data.attrs.update({"intensity": "counts", "k_origin": "window_center"})
        file.attrs.update({"title": "gold", "beam_energy_kv": 200.0})
        file["given/beam_energy_kv"] = 200.0
        file.create_group("metadata/Sample").attrs["description"] = "Au"
        file.create_group("original_metadata/Camera").attrs["name"] = "Ångström"
        file["valid"] = np.arange(20).reshape(5, 4) != 7
        for i, axis in enumerate(AXES):
            scale = file.create_dataset(
                axis.name, data=axis.offset + axis.scale * np.arange(axis.size)
            )
            scale.attrs.update({"scale": axis.scale, "offset": axis.offset, "units": axis.units})
            scale.make_scale(axis.name)
            data.dims[i].label = axis.name
            data.dims[i].attach_scale(scale)
    patterns = sd.open(tmp_path / "a.h5")
    np.testing.assert_array_equal(patterns.values, scan().values)
    assert axes_of(patterns) == AXES
    assert patterns.attrs["title"] == "gold"
    assert patterns.attrs["k_origin"] == "window_center"
    assert patterns.attrs["metadata"] == {"Sample": {"description": "Au"}}
    assert patterns.attrs["original_metadata"] == {"Camera": {"name": "Ångström"}}
    assert int((~patterns.valid.values).sum()) == 1


def test_a_data_cube_that_py4dstem_saved(tmp_path: Path) -> None:
    """Its detector axes are positions in A^-1 minus an origin in pixels; the calibration is right."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        cube = file.create_group("datacube_root/datacube")
        cube["data"] = scan().values
        axes = [(0.0, 0.5, "nm"), (0.0, 0.5, "nm"), (-6.0, 0.01, "A^-1"), (-5.0, 0.01, "A^-1")]
        for i, (first, step, units) in enumerate(axes):
            dim = cube.create_dataset(f"dim{i}", data=first + step * np.arange(SHAPE[i]))
            dim.attrs.update({"name": ("Rx", "Ry", "Qx", "Qy")[i], "units": units})
        kept = file.create_group("datacube_root/metadatabundle/calibration")
        values = {"R_pixel_size": 0.5, "R_pixel_units": "nm", "Q_pixel_size": 0.01}
        for name, value in (values | {"qx0_mean": 6.0, "qy0_mean": 5.0}).items():
            kept[name] = value
        kept["Q_pixel_units"] = "A^-1"
    *_, ky, kx = axes_of(sd.open(tmp_path / "a.h5"))
    assert (ky.scale, ky.offset, ky.units) == (pytest.approx(0.01), pytest.approx(-0.06), "A^-1")
    assert (kx.scale, kx.offset, kx.units) == (pytest.approx(0.01), pytest.approx(-0.05), "A^-1")


# --- other programs, in environments of their own (make test-peers) ---

PEERS = Path(os.environ.get("PEERS", Path(__file__).parent.parent / ".peers")).absolute()

PROGRAMS = {
    "py4dstem": """
import py4DSTEM
cube = py4DSTEM.read(path)
told = [cube.R_pixel_size, cube.R_pixel_units, cube.Q_pixel_size, cube.Q_pixel_units, *cube.calibration.get_origin()]
total = cube.data.sum()
""",
    "xarray": """
import h5py, xarray
with h5py.File(path) as file:
    group = f"{file.attrs['default']}/{file[file.attrs['default']].attrs['default']}"
told = []
for place in (None, group):
    with xarray.open_dataset(path, engine="h5netcdf", group=place) as found:
        told.append([[dim, float(found[dim][1]), found[dim].attrs["units"]] for dim in found.patterns.dims])
        total = found.patterns.values.sum()
""",
    "libertem": """
import libertem.api, libertem.udf.sum
with libertem.api.Context.make_with("inline") as context:
    found = context.load("auto", path=path)
    sums = context.run_udf(found, libertem.udf.sum.SumUDF())
told, total = list(found.shape), sums["intensity"].data.sum()
""",
    "pyxem": """
import hyperspy.api as hs, pyxem
signal = hs.load(path, file_format="hspy", signal_type="electron_diffraction")
told = [type(signal).__name__, *[[a.name, a.scale, a.offset, a.units] for a in signal.axes_manager._axes]]
total = signal.data.sum()
""",
}
TOLD: dict[str, Any] = {
    "py4dstem": [0.5, "nm", pytest.approx(0.01), "A^-1", pytest.approx(6), pytest.approx(5)],
    "xarray": [[[a.name, pytest.approx(a.value(1)), a.units] for a in AXES]] * 2,
    "libertem": list(SHAPE),
    "pyxem": ["ElectronDiffraction2D",
              *([a.name.removeprefix("scan_"), a.scale, a.offset, a.units] for a in AXES)],
}  # fmt: skip


@pytest.mark.peers
@pytest.mark.parametrize("suffix", HDF5_SUFFIXES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_another_program_opens_it(files: dict[str, Path], program: str, suffix: str) -> None:
    python = PEERS / ("py4dstem" if program == "py4dstem" else "others") / "bin/python"
    if not python.exists():
        pytest.skip(f"{program} is not in {PEERS}; make test-peers installs it")
    if (program, suffix) == ("py4dstem", ".hspy"):
        pytest.skip("py4DSTEM opens .h5, .hdf5 and .emd")
    code = f"import json, sys; path = sys.argv[1]\n{PROGRAMS[program]}\nprint(json.dumps([told, int(total)]))"
    done = subprocess.run(
        [python, "-W", "ignore", "-c", code, files[suffix]], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, total = json.loads(done.stdout.splitlines()[-1])
    assert told == TOLD[program]
    assert total == int(scan().values.sum(dtype="i8"))
