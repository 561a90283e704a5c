"""What a file states about microscope, sample and calibration arrives in the attributes and in every output."""

import json
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from frames_made import blo, mrc, numbers

import stem_dask as sd
from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import NAMES, stated
from stem_dask.job.run import run
from stem_dask.readers.open import find

hs = pytest.importorskip("hyperspy.api")

GMS = {
    "beam_energy_kv": 200.0,
    "camera_length_mm": 550.0,
    "magnification": 225000.0,
    "microscope": "FEI Titan",
    "acquisition_mode": "STEM",
    "exposure_s": pytest.approx(0.02001),
    "dwell_time_s": 0.02,
    "stage_tilt_alpha_deg": 0.002439998066344124,
    "stage_tilt_beta_deg": 0.0,
    "stage_x_mm": -0.308049,
    "stage_y_mm": -0.318151,
    "stage_z_mm": pytest.approx(-0.0134304),
}


def instrument(attrs: Any) -> dict[str, Any]:
    return {name: attrs[name] for name in NAMES if name in attrs}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found |= (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def loaded(path: Path) -> dict[str, Any]:
    """HyperSpy's metadata of the last signal of a file, without what it says of the loading itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signal = hs.load(path, lazy=True)
    signal = signal[-1] if isinstance(signal, list) else signal
    known = leaves(signal.metadata.as_dictionary())
    left_out = ("General.FileIO", "General.original_filename", "_HyperSpy", "stem_dask", "Maps")
    return {name: value for name, value in known.items() if not name.startswith(left_out)}


def axes_of(patterns: xr.DataArray) -> list[tuple[Any, ...]]:
    attrs = [patterns[dim].attrs for dim in patterns.dims]
    return [(a["scale"], a["offset"], a["units"]) for a in attrs]


# --- Gatan: attributes, every output, HyperSpy ---


def test_what_a_dm4_states_reaches_every_output(
    shared_data: Path, make_config: Any, tmp_path: Path
) -> None:
    path = shared_data / "sim/au_np_gms_stemx_u16.dm4"
    patterns = sd.open(path)
    assert instrument(patterns.attrs) == GMS
    assert patterns.attrs["title"] == "Diffraction SI"
    export = {"export": ["pt", "h5", "hspy", "zspy"]}
    run(make_config(path, crop={"size": 40}, downsample={"factor": 2}, output=export))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = xr.open_zarr(tmp_path / "out.zarr").attrs
    assert instrument(root) == GMS
    assert root["title"] == "Diffraction SI"
    assert instrument(torch.load(tmp_path / "out.pt", weights_only=True)) == GMS
    with h5py.File(tmp_path / "out.h5") as file:
        assert instrument(file.attrs) == GMS
    tem = {NAMES[name]: value for name, value in GMS.items()}
    for suffix in (".hspy", ".zspy"):
        known = loaded(tmp_path / f"out{suffix}")
        assert {place: known[place] for place in tem} == tem
        assert known["General.title"] == "Diffraction SI"
    for suffix in (".zarr", ".pt", ".h5", ".hspy", ".zspy"):
        again = sd.open(tmp_path / f"out{suffix}").attrs
        assert instrument(again) == GMS
        assert again["metadata"] == patterns.attrs["metadata"]
        assert again["title"] == "Diffraction SI"


#: files of the shared folder that HyperSpy reads, too, how we open them, and what of HyperSpy's metadata ours need not have
BOTH = [
    ("sim/au_np_gms_stemx_u16.dm4", {}, ("beam_current", "Noise_properties")),  # a current of 0 is unknown
    ("sim/au_np_descan_u16.hspy", {}, ()),
    ("sim/au_np_hot_dead_f32.hspy", {}, ()),
    ("trust/ptycho_overlap.hspy", {}, ()),
    ("real/merlin_4x2_6bit.mib", {"scan_shape": (2, 4)}, ("signal_type", "title")),
    ("real/topspin_test_A.app5", {}, ("signal_type", "title", "notes")),  # HyperSpy composes notes, and takes an identifier for the title
    ("cases/e2_pyxem_signal_type/pyxem.hspy", {}, ()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "others"), BOTH, ids=lambda one: str(one)[:40])
@pytest.mark.parametrize("suffix", [".hspy", ".zspy"])
def test_our_signal_states_what_hyperspy_finds_in_the_source(
    shared_data: Path, tmp_path: Path, name: str, options: Any, others: Any, suffix: str
) -> None:
    if not (shared_data / name).exists():
        pytest.skip(f"{name} is not in the shared folder")
    wanted = loaded(shared_data / name)
    wanted = {k: v for k, v in wanted.items() if not any(word in k for word in others)}
    sd.export(sd.open(shared_data / name, **options), tmp_path / f"a{suffix}")
    known = loaded(tmp_path / f"a{suffix}")
    assert {place: known.get(place) for place in wanted} == wanted


def test_values_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    info = {
        "Voltage": 0.0,
        "STEM Camera Length": 0.0,
        "Indicated Magnification": float("nan"),
        "Name": "[]",
    }
    assert stated("Gatan", {"Microscope Info": info, "Session Info": {"Operator": " "}}) == {}
    tem = {"Illumination Mode": "TEM", "Imaging Mode": "DIFFRACTION", "Indicated Magnification": 320.0,
           "STEM Camera Length": 900.0}  # fmt: skip
    known = stated("Gatan", {"Microscope Info": tem})
    assert known == {"camera_length_mm": 320.0, "acquisition_mode": "TEM"}
    assert stated("Gatan", {"Microscope Info": {"Illumination Mode": "", "Name": {"a": 1}}}) == {}
    imaging = stated("Gatan", {"Microscope Info": {**tem, "Imaging Mode": "MAG1"}})
    assert imaging == {"magnification": 320.0, "acquisition_mode": "TEM"}


def test_what_the_user_gives_replaces_what_the_file_states(
    shared_data: Path, tmp_path: Path
) -> None:
    patterns = sd.open(shared_data / "sim/au_np_gms_stemx_u16.dm4", beam_energy_kv=80)
    sd.export(patterns, tmp_path / "a.hspy", title="mine")
    known = loaded(tmp_path / "a.hspy")
    assert known["Acquisition_instrument.TEM.beam_energy"] == 80
    assert known["General.title"] == "mine"


def test_info_prints_beam_energy_and_camera_length(shared_data: Path, capsys: Any) -> None:
    from stem_dask.cli import main as cli

    assert cli.main(["info", str(shared_data / "sim/au_np_gms_stemx_u16.dm4")]) == 0
    assert "beam        200 kV, camera length 550 mm\n" in capsys.readouterr().out


# --- signals of HyperSpy ---


def signal_of_a_user() -> Any:
    signal = hs.signals.Signal2D(numbers())
    notes = "second try; " * 200  # 2,400 characters
    signal.metadata.add_dictionary(
        {
            "General": {"title": "area/3", "authors": "A. Person", "notes": notes, "date": "2023-05-01", "doi": "10.1/x"},
            "Sample": {"description": "NiPd on C", "elements": ["Ni", "Pd"], "thickness": 12.5},
            "Signal": {"quantity": "Counts"},
            "Acquisition_instrument": {
                "TEM": {"beam_energy": 200.0, "rocking_angle": 1.0, "beam_current": 0.0, "Detector": {"Camera": {"name": "Medipix"}}},
            },
            "Lab": {"shift": "night", "readings": [1.5, 2.5]},
        }
    )  # fmt: skip
    signal.metadata.Signal.signal_type = "electron_diffraction"
    return signal


@pytest.mark.parametrize("between", [".hspy", ".zspy", ".zarr", ".h5", ".pt"])
def test_a_signal_keeps_its_metadata(
    tmp_path: Path, between: str, caplog: Any, make_config: Any
) -> None:
    """Through a convert or a crop into every format and back into a .hspy."""
    signal_of_a_user().save(tmp_path / "in.hspy")
    wanted = loaded(tmp_path / "in.hspy")
    sd.export(sd.open(tmp_path / "in.hspy"), tmp_path / f"one{between}")
    crop = {"window": [0, 4, 1, 5]}
    run(make_config(tmp_path / f"one{between}", "two.zarr", crop=crop, output={"export": ["hspy", "zspy"]},
                    validate={"min_retention": 0.0}))  # fmt: skip
    for suffix in (".hspy", ".zspy"):
        known = loaded(tmp_path / f"two{suffix}")
        assert {k: plain(v) for k, v in known.items()} == {k: plain(v) for k, v in wanted.items()}


def plain(value: Any) -> Any:
    """Lists of numbers are arrays in some files."""
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    return (
        [v.decode() if isinstance(v, bytes) else v for v in value]
        if isinstance(value, list)
        else value
    )


def test_signal_type_stays_empty_where_none_is_stated(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbers())
    sd.export(sd.open(tmp_path / "a.npy"), tmp_path / "a.hspy")
    assert loaded(tmp_path / "a.hspy") == {"General.title": "4D-STEM", "Signal.signal_type": ""}


def test_odd_metadata_of_a_signal(tmp_path: Path) -> None:
    """Groups where values are expected, texts in place of groups, long and odd values: nothing breaks, nothing is invented."""
    with h5py.File(tmp_path / "a.hspy", "w") as file:
        signal = file.create_group("Experiments/t")
        signal.create_dataset("data", data=numbers())
        tree = signal.create_group("metadata")
        tree.attrs["General"] = "a text"
        tree.create_group("Acquisition_instrument/TEM/beam_energy").attrs["inner"] = 1.0
        tem = tree["Acquisition_instrument/TEM"]
        tem.attrs["camera_length"] = "long"
        tem.attrs["magnification"] = -5.0
        tem.attrs["convergence_angle"] = np.nan
        tree.create_dataset("large", data=np.zeros(10_000))
        tree.create_group("_sig_other").attrs["x"] = 1
    patterns = sd.open(tmp_path / "a.hspy")
    assert instrument(patterns.attrs) == {}
    for suffix in (".hspy", ".zspy", ".pt", ".h5", ".zarr"):
        sd.export(patterns, tmp_path / f"b{suffix}")
        again = sd.open(tmp_path / f"b{suffix}")
        assert instrument(again.attrs) == {}
        np.testing.assert_array_equal(again.values, numbers())
    known = loaded(tmp_path / "b.hspy")
    assert known["Acquisition_instrument.TEM.camera_length"] == "long"
    assert "large" not in known


@pytest.mark.parametrize("title", ["x" * 400, "ü" * 150, "..", "a/b"])
def test_titles_that_are_no_names_of_folders(tmp_path: Path, title: str) -> None:
    np.save(tmp_path / "a.npy", numbers())
    for suffix in (".hspy", ".zspy"):
        sd.export(
            sd.open(tmp_path / "a.npy", beam_energy_kv=60), tmp_path / f"a{suffix}", title=title
        )
        known = loaded(tmp_path / f"a{suffix}")
        assert known["General.title"] == title.strip(".")
        assert known["Acquisition_instrument.TEM.beam_energy"] == 60
        np.testing.assert_array_equal(sd.open(tmp_path / f"a{suffix}").values, numbers())


# --- cameras and scan generators ---


def test_blo(tmp_path: Path) -> None:
    path = blo(tmp_path / "a.blo", numbers((3, 4, 6, 6)), volt=300000, length=2000, scan=2500)
    wanted = {"beam_energy_kv": 300.0, "camera_length_mm": 200.0, "scan_rotation_deg": 25.0}
    assert instrument(sd.open(path).attrs) == wanted
    unknown = blo(tmp_path / "b.blo", numbers((3, 4, 6, 6)), volt=0)
    assert instrument(sd.open(unknown).attrs) == {"scan_rotation_deg": 0.0}


EMPAD = {
    "<iom_measurements><high_voltage>300000.0</high_voltage><nominal_camera_length>0.57</nominal_camera_length>"
    "</iom_measurements><exposure_time>1.0</exposure_time><scan_parameters mode='search'><scan_rotation>5</scan_rotation>"
    "</scan_parameters><scan_parameters mode='acquire'><scan_rotation>-90.0</scan_rotation></scan_parameters>":
    {"beam_energy_kv": 300.0, "camera_length_mm": 570.0, "exposure_s": 0.001, "scan_rotation_deg": -90.0},
    "<iom_measurements><source.get_voltage>80000</source.get_voltage><optics.get_cameralength>0.115</optics.get_cameralength>"
    "</iom_measurements>": {"beam_energy_kv": 80.0, "camera_length_mm": 115.0},
    "<iom_measurements><high_voltage>none</high_voltage></iom_measurements>": {},
}  # fmt: skip


@pytest.mark.parametrize("xml", EMPAD)
def test_empad(tmp_path: Path, xml: str) -> None:
    np.zeros((6, 130, 128), "f4").tofile(tmp_path / "a.raw")
    (tmp_path / "a.xml").write_text(
        f"<root><raw_file filename='a.raw'/><pix_y>2</pix_y><pix_x>3</pix_x>{xml}</root>"
    )
    assert instrument(sd.open(tmp_path / "a.xml").attrs) == EMPAD[xml]


def test_direct_electron(tmp_path: Path) -> None:
    path = mrc(tmp_path / "a.mrc", numbers((12, 6, 5)))
    info = {"Instrument Accelerating Voltage (V)": 200000, "Instrument Project Camera Length (centimeters)": -1,
            "Scan - Dwell Time (microseconds)": 500, "Instrument Project Magnification": 0}  # fmt: skip
    (tmp_path / "a_info.txt").write_text("".join(f"{k} = {v}\n" for k, v in info.items()))
    known = instrument(sd.open(path, scan_shape=(3, 4)).attrs)
    assert known == {"beam_energy_kv": 200.0, "dwell_time_s": pytest.approx(0.0005)}


@pytest.mark.parametrize(("mode", "name"), [(1, "magnification"), (2, "camera_length_mm")])
@pytest.mark.parametrize("ht", [200, 200_000])
def test_tvips(tmp_path: Path, mode: int, name: str, ht: int) -> None:
    array = numbers((12, 6, 5))
    header = struct.pack("<13I", 256, 2, 5, 6, 16, 0, 0, 1, 1, 15600, ht, 950, 60).ljust(256, b"\0")
    frame = struct.pack(
        "<4If2I5fIff", 0, 0, 0, 0, 0.0, 0, mode, 1.0, 2.0, 3.0, 10.5, -2.0, 0, 0.0, 0.0
    )
    (tmp_path / "a.tvips").write_bytes(header + b"".join(frame + one.tobytes() for one in array))
    known = instrument(sd.open(tmp_path / "a.tvips", scan_shape=(3, 4)).attrs)
    assert known == {"beam_energy_kv": 200.0, name: 950.0, "stage_tilt_alpha_deg": 10.5, "stage_tilt_beta_deg": -2.0}  # fmt: skip


def test_nexus_of_dectris(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["entry/data/data"] = numbers()
        file["entry/instrument/beam/incident_energy"] = 200000.0
        file["entry/instrument/detector/count_time"] = 0.5
        file["entry/instrument/detector/count_time"].attrs["units"] = "ms"
        file["entry/instrument/detector/detector_distance"] = [0.0]
    known = instrument(sd.open(tmp_path / "a.h5").attrs)
    assert known == {"beam_energy_kv": 200.0, "exposure_s": 0.0005}


# --- programs: axes and microscope ---


def nion(path: Path, array: Any = None, name: str = "data", **changes: Any) -> Path:
    array = numbers() if array is None else array
    axes = [("nm", 0.5, -2.0), ("nm", 0.25, 1.0), ("mrad", 1.0, -3.0), ("mrad", 2.0, -4.0)]
    said = {
        "title": "map 7", "is_sequence": False, "collection_dimension_count": 2, "datum_dimension_count": 2,
        "dimensional_calibrations": [dict(zip(("units", "scale", "offset"), a, strict=True)) for a in axes[-array.ndim :]],
        "metadata": {"instrument": {"high_tension": 60000, "convergence_angle": 0.035}, "scan": {"rotation": 0.0},
                     "hardware_source": {"exposure": 0.002}},
        "session_metadata": {"instrument": "UltraSTEM", "microscopist": "A. Person", "sample": "WS2"},
    } | changes  # fmt: skip
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=array).attrs["properties"] = json.dumps(said)
    return path


def test_nion_swift(tmp_path: Path) -> None:
    patterns = sd.open(nion(tmp_path / "a.h5"))
    assert axes_of(patterns) == [(0.5, -2.0, "nm"), (0.25, 1.0, "nm"), (1.0, -3.0, "mrad"), (2.0, -4.0, "mrad")]  # fmt: skip
    assert instrument(patterns.attrs) == {
        "beam_energy_kv": 60.0, "convergence_angle_mrad": 35.0, "scan_rotation_deg": 0.0,
        "exposure_s": 0.002, "microscope": "UltraSTEM",
    }  # fmt: skip
    assert patterns.attrs["title"] == "map 7"
    assert patterns.attrs["metadata"] == {
        "General": {"authors": "A. Person"},
        "Sample": {"description": "WS2"},
    }
    exported = nion(tmp_path / "b.h5", name="data/0")
    assert axes_of(sd.open(exported)) == axes_of(patterns)


def test_nion_swift_of_other_dimensions(tmp_path: Path) -> None:
    sequence = nion(tmp_path / "a.h5", is_sequence=True, collection_dimension_count=1)
    (note,) = sd.open(sequence).attrs["notes"]
    assert note.startswith("Nion Swift states a sequence of 3 line scans of 4 positions")
    line = nion(tmp_path / "b.h5", numbers()[0], collection_dimension_count=1)
    patterns = sd.open(line)
    assert patterns.shape == (1, 4, 6, 5)
    assert axes_of(patterns)[1:] == [(0.25, 1.0, "nm"), (1.0, -3.0, "mrad"), (2.0, -4.0, "mrad")]
    spectra = nion(tmp_path / "c.h5", numbers()[0], datum_dimension_count=1)
    with pytest.raises(
        SourceError, match=r"c\.h5: data is no array of patterns: .* data of 1 dimensions"
    ):
        find(spectra)


@pytest.mark.parametrize("properties", ["{", "[1]", '{"a": 1}', '{"datum_dimension_count": 2, "dimensional_calibrations": [1, 2]}'])  # fmt: skip
def test_properties_that_are_none_of_nion(tmp_path: Path, properties: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", data=numbers()).attrs["properties"] = properties
    assert axes_of(sd.open(tmp_path / "a.h5")) == [(1.0, 0.0, "")] * 4


def test_nion_exports_are_read(tmp_path: Path) -> None:
    exported = nion(tmp_path / "a.nhdf", name="data/0")
    patterns = sd.open(exported)
    assert patterns.attrs["beam_energy_kv"] == 60
    with h5py.File(exported) as file:
        properties = file["data/0"].attrs["properties"]
    np.save(tmp_path / "data.npy", numbers())
    for name in ("b.ndata1", "b.ndata"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("metadata.json", properties)
            archive.write(tmp_path / "data.npy", "data.npy")
        archived = sd.open(tmp_path / name)
        np.testing.assert_array_equal(archived.values, numbers())
        assert axes_of(archived) == axes_of(patterns)
        assert archived.attrs["beam_energy_kv"] == 60


@pytest.mark.parametrize("place", ["root/metadatabundle/calibration", "root/calibration", "root/cube/calibration",
                                   "4DSTEM_experiment/metadata/calibration"])  # fmt: skip
@pytest.mark.parametrize("as_attributes", [False, True])
def test_py4dstem(tmp_path: Path, place: str, as_attributes: bool) -> None:
    name = "4DSTEM_experiment/data/datacubes/cube" if place.startswith("4D") else "root/cube"
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file[f"{name}/data"] = numbers()
        for i, (n, size) in enumerate(zip(("Rx", "Ry", "Qx", "Qy"), (3, 4, 6, 5), strict=True)):
            file[f"{name}/dim{i}"] = np.arange(size)
            file[f"{name}/dim{i}"].attrs.update({"name": n, "units": "pixels"})
        said = {"R_pixel_size": 2.5, "R_pixel_units": "nm", "Q_pixel_size": 0.02, "Q_pixel_units": "A^-1",
                "qx0_mean": 3.0, "convergence_semiangle_mrad": 1.5}  # fmt: skip
        group = file.require_group(place)
        for key, value in said.items():
            if as_attributes:
                group.attrs[key] = value
            else:
                group[key] = value.encode() if isinstance(value, str) else value
    patterns = sd.open(tmp_path / "a.h5")
    assert axes_of(patterns) == [(2.5, 0.0, "nm")] * 2 + [(0.02, -0.06, "A^-1"), (0.02, 0.0, "A^-1")]  # fmt: skip
    assert instrument(patterns.attrs) == {"convergence_angle_mrad": 1.5}


def test_py4dstem_without_a_calibration(tmp_path: Path) -> None:
    """A new data cube states one pixel a pixel."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["root/cube/data"] = numbers()
        group = file.create_group("root/metadatabundle/calibration")
        group["R_pixel_size"], group["Q_pixel_size"] = 1, 1
        group["R_pixel_units"], group["Q_pixel_units"] = b"pixels", b"pixels"
    assert axes_of(sd.open(tmp_path / "a.h5")) == [(1.0, 0.0, "")] * 4


SCAN_AXES = [{"label": label, "units": "Å", "sampling": 0.4, "offset": 1.5, "type": "ScanAxis"} for label in "xy"]  # fmt: skip
K_AXES = [{"label": k, "units": "1/Å", "sampling": s, "offset": o, "fftshift": True, "type": "ReciprocalSpaceAxis"}
          for k, s, o in (("kx", 0.1, -0.3), ("ky", 0.2, -0.4))]  # fmt: skip
INSTRUMENT = {"energy": 80000.0, "semiangle_cutoff": 25.0, "label": "intensity"}
ABTEM = [
    {"metadata0": {**INSTRUMENT, "axes": {f"axis_{i}": a for i, a in enumerate(SCAN_AXES + K_AXES)},
                   "data_origin": "abTEM_v1.0.10", "type": "DiffractionPatterns"}},
    {"kwargs0": {"sampling": [0.1, 0.2], "fftshift": True, "metadata": INSTRUMENT, "ensemble_axes_metadata": SCAN_AXES},
     "type0": "DiffractionPatterns"},
    {"kwargs0": {"sampling": {"_type": "tuple", "_value": [0.1, 0.2]}, "fftshift": True, "metadata": INSTRUMENT,
                 "ensemble_axes_metadata": SCAN_AXES}, "type0": "DiffractionPatterns"},
]  # fmt: skip


@pytest.mark.parametrize("attrs", ABTEM, ids=["new", "1.0.9", "tuple"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_abtem(tmp_path: Path, attrs: Any, zarr_format: Any) -> None:
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=zarr_format)
    root.attrs.update(attrs)
    root.create_array("array0", data=numbers(dtype="f4"))
    patterns = sd.open(tmp_path / "a.zarr")
    wanted = [(0.4, 1.5, "Å"), (0.4, 1.5, "Å"), (0.1, -0.3, "1/Å"), (0.2, -0.4, "1/Å")]
    for known, one in zip(axes_of(patterns), wanted, strict=True):
        assert known == (one[0], pytest.approx(one[1]), one[2])
    assert instrument(patterns.attrs) == {"beam_energy_kv": 80.0, "convergence_angle_mrad": 25.0}


def test_abtem_with_the_beam_at_the_corners(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path / "a.zarr", mode="w")
    root.attrs["kwargs0"] = {**ABTEM[1]["kwargs0"], "fftshift": False}
    root.create_array("array0", data=numbers(dtype="f4"))
    assert any("fftshift=False" in note for note in sd.open(tmp_path / "a.zarr").attrs["notes"])
