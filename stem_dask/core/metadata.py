"""Metadata: what files state about the microscope, as attributes, as HyperSpy's nodes, and as JSON, HDF5 and netCDF store them.

A new family of files is one entry in `FAMILIES`. Unknown values are left out: not a number, a text without letters or digits,
and zero or less where only a positive number makes sense (a voltage, a camera length).
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

#: maximum bytes of the JSON of a file's metadata, and levels of groups
LIMIT, _LEVELS = 2**20, 16

#: maximum elements of a list in the metadata of a signal
_ELEMENTS = 4096

#: end of the texts that stand for large arrays
_ELSEWHERE = " values, left in the input file"

#: prefixes with a meaning to readers of .hspy, or to zarr
_RESERVED = ("_sig_", "_list_", "_tuple_", "_bs_", "_datetime_", "_hspy_", "_ragged_shapes_", ".z")


def number(value: Any) -> float | None:
    """A finite number, or None; also from text, as in headers, and from arrays of one element, as in MATLAB."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        found = float(value.item() if isinstance(value, np.ndarray) else value)
        return found if math.isfinite(found) else None
    return None


def whole(value: Any) -> int | None:
    """A positive integer, or None; also from text."""
    found = number(value)
    return int(found) if found is not None and found >= 1 and found == int(found) else None


def text_of(value: Any) -> str:
    """A text without lone surrogates and null characters."""
    value = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return str(value).encode("utf-8", "replace").decode().replace("\0", "")


@dataclass(frozen=True)
class ArrayTag:
    """An array of ``length`` elements that was not read; ``codes`` are tag type codes, one for each field of an element."""

    offset: int
    length: int
    codes: tuple[int, ...]
    n_bytes: int

    def __str__(self) -> str:
        return f"{self.length:,}{_ELSEWHERE}"


# --- JSON, HDF5 and netCDF ---


def to_json(value: Any, items: int | None = None, characters: int | None = None) -> Any:
    """A value as JSON: no numpy types, tuples as lists; NaN, infinity and objects as text.

    With limits, lists and texts are cut to the given numbers of items and characters, and groups after 16 levels.

    Examples
    --------
    >>> to_json({"a": np.float32(0.5), "b": b"text", "c": (1, {2}), "d": float("nan"), "e": np.arange(9)}, items=2)
    {'a': 0.5, 'b': 'text', 'c': [1, '{2}'], 'd': 'nan', 'e': [0, 1]}
    """

    def plain(value: Any, level: int) -> Any:
        if isinstance(value, np.ndarray):
            is_whole = items is None or value.ndim == 1
            value = value[:items].tolist() if is_whole else str(value.shape)
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, (bool, int)):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if items is not None and level >= _LEVELS and isinstance(value, (Mapping, list, tuple)):
            return "…"
        if isinstance(value, Mapping):
            return {text_of(k)[:characters]: plain(v, level + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item, level + 1) for item in value[:items]]
        return text_of(value)[:characters]

    return plain(value, 0)


def original(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a file as JSON of at most 1 MiB, with lists and texts of limited length."""
    for items, characters in ((64, 1000), (16, 100)):
        tree: dict[str, Any] = to_json(metadata, items, characters)
        size = len(json.dumps(tree))
        if size <= LIMIT:
            return tree
    return {"left out": f"{size:,} bytes of metadata, more than {LIMIT:,}, left in the input file"}


def signal_tree(value: Any, level: int = 0) -> Any:
    """Metadata of a signal as JSON; values that are too long, too deep, not finite, or not JSON are left out (None)."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist() if value.size <= _ELEMENTS else None
    if level > _LEVELS:
        return None
    if isinstance(value, Mapping):
        items = ((text_of(key), signal_tree(item, level + 1)) for key, item in value.items())
        tree = {key: item for key, item in items if item is not None and key[:1] != "_"}
        return tree if level or len(json.dumps(tree)) <= LIMIT else {}
    if isinstance(value, (list, tuple)):
        kept = [signal_tree(item, level + 1) for item in value[: _ELEMENTS + 1]]
        return None if None in kept or len(kept) > _ELEMENTS else kept
    if isinstance(value, (bytes, str)):
        text = text_of(value)
        return None if len(text) > 2**15 or text.endswith(_ELSEWHERE) else text
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else None  # as HDF5 holds them
    return value if isinstance(value, float) and math.isfinite(value) else None


def hdf5_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """JSON for HDF5: names without slashes, lists of numbers as arrays, other lists as text.

    Examples
    --------
    >>> hdf5_tree({"a/b": [1, "x"], "c": None})
    {'a∕b': '[1, "x"]', 'c': None}
    """

    def stored(value: Any) -> Any:
        if isinstance(value, Mapping):
            return hdf5_tree(value)
        if isinstance(value, str):
            return value.replace("\0", "")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return str(value)
        if not isinstance(value, list):
            return value
        try:
            array = np.array(value)
        except ValueError:  # rows of different lengths
            array = np.array(None)
        is_numbers = array.dtype.kind in "biuf" and len(value) > 0
        return array if is_numbers else json.dumps(value, ensure_ascii=False)

    return {hdf5_name(key): stored(value) for key, value in tree.items()}


def hdf5_name(key: str) -> str:
    """A valid HDF5 name without the marks of RosettaSciIO."""
    name = key.replace("/", "∕").replace("\0", "")
    return f"({name})" if name in ("", ".", "..") or name.startswith(_RESERVED) else name


def as_text(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes for netCDF: dictionaries and lists of texts as JSON, without None.

    Examples
    --------
    >>> as_text({"given": {"beam_energy_kv": 200.0}, "global_radius": None, "window_size": [8, 8], "cropped_axes": ["ky"]})
    {'given': '{"beam_energy_kv": 200.0}', 'window_size': [8, 8], 'cropped_axes': '["ky"]'}
    """
    found = {name: value for name, value in to_json(attrs).items() if value is not None}
    for name, value in found.items():
        items = value if isinstance(value, list) else [None]
        if isinstance(value, (dict, list)) and (not items or not all(map(_is_number, items))):
            found[name] = json.dumps(value, ensure_ascii=False)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number))


def attribute(attrs: Mapping[str, Any], name: str) -> Any:
    """An attribute before `as_text`, as a store holds it; None without it.

    Examples
    --------
    >>> attribute({"descan": '{"order": 1}'}, "descan"), attribute({"descan": {"order": 1}}, "descan"), attribute({}, "descan")
    ({'order': 1}, {'order': 1}, None)
    """
    return from_text({name: attrs[name]})[name] if name in attrs else None


def from_text(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes before `as_text`.

    Examples
    --------
    >>> from_text({"given": '{"beam_energy_kv": 200.0}', "cropped_axes": '["ky"]', "title": "[gold]"})
    {'given': {'beam_energy_kv': 200.0}, 'cropped_axes': ['ky'], 'title': '[gold]'}
    """
    found = dict(attrs)
    for name, value in attrs.items():
        if isinstance(value, str) and value[:1] in ("{", "["):
            with contextlib.suppress(ValueError):
                found[name] = json.loads(value)
    return found


def dig(tree: Any, place: str, between: str = ".") -> Any:
    """The value at a path in nested dictionaries, or None."""
    for name in place.split(between):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def tree_at(values: Mapping[str, Any], tree: dict[str, Any] | None = None) -> dict[str, Any]:
    """Nested dictionaries with values at their paths."""
    tree = {} if tree is None else tree
    for place, value in values.items():
        *groups, leaf = place.split(".")
        inner = tree
        for name in groups:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner[leaf] = value
    return tree


# --- the microscope ---

_TEM = "Acquisition_instrument.TEM."

#: attribute of the patterns (the suffix is the unit) -> its node in HyperSpy's metadata, in the same unit
NAMES = {
    "beam_energy_kv": f"{_TEM}beam_energy",
    "camera_length_mm": f"{_TEM}camera_length",
    "magnification": f"{_TEM}magnification",
    "microscope": f"{_TEM}microscope",
    "acquisition_mode": f"{_TEM}acquisition_mode",
    "convergence_angle_mrad": f"{_TEM}convergence_angle",
    "beam_current_na": f"{_TEM}beam_current",
    "exposure_s": f"{_TEM}Detector.Camera.exposure",
    "dwell_time_s": f"{_TEM}dwell_time",
    "scan_rotation_deg": f"{_TEM}rotation",
    "stage_tilt_alpha_deg": f"{_TEM}Stage.tilt_alpha",
    "stage_tilt_beta_deg": f"{_TEM}Stage.tilt_beta",
    "stage_x_mm": f"{_TEM}Stage.x",
    "stage_y_mm": f"{_TEM}Stage.y",
    "stage_z_mm": f"{_TEM}Stage.z",
}

#: by the unit of the attribute, conversion factors of other units
_UNITS: dict[str, dict[str, float]] = {
    "kv": {"V": 1e-3, "eV": 1e-3, "kV": 1, "keV": 1},
    "mm": {"m": 1e3, "cm": 10, "mm": 1, "0.1 mm": 0.1, "um": 1e-3},
    "mrad": {"rad": 1e3, "mrad": 1},
    "deg": {"deg": 1, "0.01 deg": 0.01, "rad": math.degrees(1)},
    "s": {"s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "na": {"A": 1e9, "nA": 1},
}

#: returns the value at a path (names joined by slashes) in the tags of a file, and its unit if stated
Lookup = Callable[[str], tuple[Any, str | None]]


class Tag(NamedTuple):
    """One value in the files of a family: one of `NAMES`, or a node in HyperSpy's metadata.

    ``reads`` is the unit of a number, or a function that converts a text; ``places`` are paths in the tags of the file, of which
    the first that states the value counts; ``when`` is a condition on other tags.
    """

    name: str
    reads: str | Callable[[Any], Any]
    places: str
    when: Callable[[Lookup], bool] = lambda _: True

    def values(self, lookup: Lookup) -> Iterator[Any]:
        """The usable values at the places, in the unit of the attribute."""
        units = _UNITS.get(self.name.rpartition("_")[2], {})
        for place in self.places.split(" | "):
            found, unit = lookup(place)
            if found is None or not self.when(lookup):
                continue
            if callable(self.reads):
                is_text = isinstance(found, (str, bytes)) and _text(found)
                value = self.reads(found) if is_text else None
            elif (value := number(found)) is not None:
                factor = units.get(unit or "", units.get(self.reads, 1))
                # 0.57 m are 570 mm, not 569.9999999999999
                value = float(f"{value * factor:.12g}") if factor > 1 else value * factor
            if _is_usable(self.name, value):
                yield value


def _text(value: Any) -> str | None:
    text = text_of(value).strip()
    return text if any(map(str.isalnum, text)) else None


def _mode(value: Any) -> str:
    """HyperSpy's name of the acquisition mode, from Gatan's illumination mode."""
    return next((mode for mode in ("STEM", "SEM") if mode in text_of(value)), "TEM")


def _date(value: Any) -> str | None:
    """The date in a text in ISO form; the month comes first in 05/06/2019, as in HyperSpy."""
    start = re.split("[ T]", text_of(value).strip())[0].replace(".", "/")
    for form in ("%Y-%m-%d", "%m/%d/%Y", "%d/%m/%Y"):
        with contextlib.suppress(ValueError):
            return datetime.strptime(start, form).date().isoformat()
    return None


def _time(value: Any) -> str | None:
    """The time in a text in ISO form."""
    clock = r"(?i)(\d{1,2}):(\d{2})(?::(\d{2}(?:\.\d+)?))?(?: ?([AP]M))?"
    if (found := re.search(clock, text_of(value))) is None:
        return None
    hour, minute, second, half = found.groups()
    of_day = int(hour) if half is None else int(hour) % 12 + 12 * (half.upper() == "PM")
    return f"{of_day:02}:{minute}:{second or '00'}" if of_day < 24 else None


def _quantity(value: Any) -> str | None:
    """HyperSpy's name of the quantity of a pixel."""
    unit = _text(value)
    return "Electrons (Counts)" if value == "e-" else unit and f"Intensity ({unit})"


def _in_tem(lookup: Lookup) -> bool:
    return lookup(f"{_INFO}/Illumination Mode")[0] == "TEM"


def _in_diffraction(lookup: Lookup) -> bool:
    return _in_tem(lookup) and lookup(f"{_INFO}/Imaging Mode")[0] == "DIFFRACTION"


_INFO, _STAGE = "Microscope Info", "Microscope Info/Stage Position"

_EXPOSURE = "Acquisition/Parameters/Detector/exposure (s)"

_ACQUIRE = "scan_parameters[@mode='acquire']"

#: by family, the values that its files may state
FAMILIES: dict[str, tuple[Tag, ...]] = {
    "Gatan": (  # places in ImageTags; the choice of the magnification is that of RosettaSciIO
        Tag("beam_energy_kv", "V", f"{_INFO}/Voltage"),
        Tag("camera_length_mm", "mm", f"{_INFO}/STEM Camera Length", lambda at: not _in_tem(at)),
        Tag("camera_length_mm", "mm", f"{_INFO}/Indicated Magnification", _in_diffraction),
        Tag("magnification", "", f"{_INFO}/Indicated Magnification", lambda at: not _in_diffraction(at)),
        Tag("microscope", _text, f"Session Info/Microscope | {_INFO}/Name | {_INFO}/Microscope"),
        Tag("acquisition_mode", _mode, f"{_INFO}/Illumination Mode"),
        Tag("beam_current_na", "nA", f"{_INFO}/Probe Current (nA)"),
        Tag("stage_tilt_alpha_deg", "deg", f"{_STAGE}/Stage Alpha"),
        Tag("stage_tilt_beta_deg", "deg", f"{_STAGE}/Stage Beta"),
        Tag("stage_x_mm", "um", f"{_STAGE}/Stage X"),
        Tag("stage_y_mm", "um", f"{_STAGE}/Stage Y"),
        Tag("stage_z_mm", "um", f"{_STAGE}/Stage Z"),
        Tag("exposure_s", "s", _EXPOSURE),
        Tag(f"{_TEM}Camera.exposure", "", _EXPOSURE, lambda at: at("DigiScan")[0] is None),
        Tag("dwell_time_s", "us", "DigiScan/Sample Time"),
        Tag("dwell_time_s", "s", "SI/Acquisition/Pixel time (s)"),
        Tag("scan_rotation_deg", "deg", "DigiScan/Rotation"),
        Tag("General.date", _date, "SI/Acquisition/Date"),
        Tag("General.time", _time, "SI/Acquisition/Start time"),
        Tag("General.date", _date, "DataBar/Acquisition Date"),
        Tag("General.time", _time, "DataBar/Acquisition Time"),
        Tag("General.authors", _text, "Session Info/Operator"),
        Tag("Sample.description", _text, "Session Info/Specimen"),
        Tag("Signal.quantity", _quantity, "Brightness units"),  # of ImageData/Calibrations
    ),
    "NanoMEGAS block file": (
        Tag("beam_energy_kv", "V", "beam energy (V)"),
        Tag("camera_length_mm", "0.1 mm", "camera length"),
        Tag("scan_rotation_deg", "0.01 deg", "scan rotation"),
    ),
    "Topspin": (
        Tag("beam_energy_kv", "V", "GunHighVoltage"),
        Tag("camera_length_mm", "m", "DiffractionCameraLength"),
        Tag("Sample.description", _text, "Specimen"),
        Tag("microscope", _text, "SystemName"),
        Tag("title", _text, "Title"),
        Tag("General.date", _date, "CreatedDateTime"),
        Tag("General.time", _time, "CreatedDateTime"),
    ),
    "EMPAD": (  # places in the XML, of three versions of the camera's program
        Tag("beam_energy_kv", "V", "iom_measurements/high_voltage | iom_measurements/source.get_voltage"),
        Tag("beam_energy_kv", "V", "iom_measurements/ColumnSourceHighVoltage"),
        Tag("camera_length_mm", "m", "iom_measurements/nominal_camera_length | iom_measurements/optics.get_cameralength"),
        Tag("camera_length_mm", "m", "iom_measurements/ColumnOpticsGetCameraLengthNominalCameraLength"),
        Tag("exposure_s", "ms", "exposure_time"),
        Tag("scan_rotation_deg", "deg", f"{_ACQUIRE}/scan_rotation"),
        Tag("General.date", _date, "timestamp/@isoformat"),
        Tag("General.time", _time, "timestamp/@isoformat"),
    ),
    "Merlin": (
        Tag("exposure_s", "s", "pattern/exposure (s)"),
        Tag("Acquisition_instrument.dwell_time", "", "pattern/exposure (s)"),  # where RosettaSciIO has it
        Tag("General.date", _date, "timestamp"),
        Tag("General.time", _time, "timestamp"),
        Tag("General.time_zone", lambda text: "UTC" if text_of(text).endswith("Z") else None, "timestamp"),
    ),
    "Direct Electron": (
        Tag("beam_energy_kv", "V", "Instrument Accelerating Voltage (V)"),
        Tag("camera_length_mm", "cm", "Instrument Project Camera Length (centimeters)"),
        Tag("magnification", "", "Instrument Project Magnification"),
        Tag("exposure_s", "ns", "Frame Exposure Time (nanoseconds)"),
        Tag("dwell_time_s", "us", "Scan - Dwell Time (microseconds)"),
        Tag("scan_rotation_deg", "deg", "Scan - Rotation"),
    ),
    "TVIPS": (  # one number is the camera length in diffraction (mode 2), the magnification in imaging (mode 1)
        Tag("beam_energy_kv", "kV", "ht", lambda at: at("ht")[0] < 10_000),
        Tag("beam_energy_kv", "V", "ht"),
        Tag("camera_length_mm", "mm", "magtotal", lambda at: at("mode")[0] == 2),
        Tag("magnification", "", "magtotal", lambda at: at("mode")[0] == 1),
        Tag("stage_tilt_alpha_deg", "deg", "stage alpha"),
        Tag("stage_tilt_beta_deg", "deg", "stage beta"),
    ),
    "HDF5": (  # NeXus as DECTRIS writes it, Diamond's ePSIC, py4DSTEM before version 0.13
        Tag("beam_energy_kv", "eV", "entry/instrument/beam/incident_energy | entry/instrument/source/energy"),
        Tag("camera_length_mm", "m", "entry/instrument/detector/detector_distance"),
        Tag("exposure_s", "s", "entry/instrument/detector/count_time"),
        Tag("dwell_time_s", "s", "entry/instrument/detector/frame_time"),
        Tag("beam_energy_kv", "V", "metadata/ht_value(V)"),
        Tag("camera_length_mm", "m", "metadata/nominal_camera_length(m)"),
        Tag("magnification", "", "metadata/magnification"),
        Tag("scan_rotation_deg", "deg", "metadata/nominal_scan_rotation"),
        Tag("beam_energy_kv", "V", "4DSTEM_experiment/metadata/microscope/accelerating_voltage"),
        Tag("beam_energy_kv", "eV", "4DSTEM_experiment/metadata/microscope/beam_energy"),
        Tag("camera_length_mm", "mm", "4DSTEM_experiment/metadata/microscope/camera_length"),
        Tag("magnification", "", "4DSTEM_experiment/metadata/microscope/magnification"),
    ),
    "py4DSTEM": (  # places in the calibration of a data cube
        Tag("convergence_angle_mrad", "mrad", "convergence_semiangle_mrad | probe_convergence_semiangle_mrad"),
    ),
    "abTEM": (
        Tag("beam_energy_kv", "eV", "energy"),
        Tag("convergence_angle_mrad", "mrad", "semiangle_cutoff"),
    ),
    "Nion": (  # places in the properties of a data item; nion/swift/model/Metadata.py lists them
        Tag("beam_energy_kv", "V", "metadata/instrument/high_tension | metadata/hardware_source/autostem/high_tension_v"),
        Tag("beam_energy_kv", "V", "metadata/hardware_source/autostem/high_tension | metadata/hardware_source/high_tension"),
        Tag("convergence_angle_mrad", "rad", "metadata/instrument/convergence_angle"),
        Tag("convergence_angle_mrad", "rad", "metadata/hardware_source/convergence_angle_rad"),
        Tag("beam_current_na", "A", "metadata/instrument/beam_current | metadata/hardware_source/beam_current_a"),
        Tag("exposure_s", "s", "metadata/hardware_source/exposure"),
        Tag("dwell_time_s", "us", "metadata/hardware_source/pixel_time_us"),
        Tag("scan_rotation_deg", "rad", "metadata/scan/rotation | metadata/hardware_source/rotation"),
        Tag("microscope", _text, "session_metadata/instrument"),
        Tag("General.authors", _text, "session_metadata/microscopist"),
        Tag("Sample.description", _text, "session_metadata/sample"),
        Tag("title", _text, "title"),
    ),
}  # fmt: skip


def stated(family: str, lookup: Lookup | Mapping[str, Any]) -> dict[str, Any]:
    """The microscope metadata of a file, by its tags as nested dictionaries, or a function that finds them.

    They are attributes of the patterns as in `NAMES`; all others are in ``metadata``, in the form of HyperSpy's metadata.

    Examples
    --------
    >>> stated("Gatan", {"Microscope Info": {"Voltage": 200000.0, "STEM Camera Length": 0.0}})
    {'beam_energy_kv': 200.0}
    >>> stated("abTEM", {"energy": 60e3, "semiangle_cutoff": 25})
    {'beam_energy_kv': 60.0, 'convergence_angle_mrad': 25.0}
    """

    def in_tree(place: str) -> tuple[Any, str | None]:
        return dig(lookup, place, "/"), None

    find = in_tree if isinstance(lookup, Mapping) else lookup
    found: dict[str, Any] = {}
    for tag in FAMILIES[family]:
        for value in tag.values(find):
            found.setdefault(tag.name, value)
    others = {name: found.pop(name) for name in list(found) if "." in name}
    return {**found, "metadata": tree_at(others)} if others else found


def _is_usable(name: str, value: Any) -> bool:
    any_sign = name.startswith(("stage_", "scan_rotation"))
    return value is not None and (isinstance(value, str) or any_sign or value > 0)


def checked(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The valid ones among the attributes of an own file, in the form of `stated` and `of_signal`."""
    found: dict[str, Any] = {}
    for name in NAMES:
        value = attrs.get(name)
        if name in ("microscope", "acquisition_mode"):
            value = _text(value) if isinstance(value, str) else None
        else:
            value = number(value) if _is_number(value) and not isinstance(value, bool) else None
        if _is_usable(name, value):
            found[name] = value
    tree = signal_tree(attrs.get("metadata"))
    return {**found, "metadata": tree} if isinstance(tree, dict) and tree else found


def of_signal(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a HyperSpy signal as attributes of the patterns.

    Names that begin with an underscore, stem_dask's own node, the log of loading and saving, markers, and all of ``Signal``
    but its type and quantity are left out.

    Examples
    --------
    >>> tem = {"beam_energy": 200.0, "rocking_angle": 1.0}
    >>> of_signal({"General": {"title": "area 3"}, "Acquisition_instrument": {"TEM": tem}})
    {'title': 'area 3', 'beam_energy_kv': 200.0, 'metadata': {'Acquisition_instrument': {'TEM': {'rocking_angle': 1.0}}}}
    """
    tree = signal_tree({k: v for k, v in metadata.items() if k not in ("stem_dask", "Markers")})
    found: dict[str, Any] = {}
    general, signal = (tree.get(name) for name in ("General", "Signal"))
    if isinstance(general, dict):
        general.pop("FileIO", None)
        title = general.pop("title", None)
        found = {"title": title} if isinstance(title, str) and title else {}
    if isinstance(signal, dict):
        tree["Signal"] = {k: signal[k] for k in ("signal_type", "quantity") if signal.get(k)}
    flat = checked({name: dig(tree, place) for name, place in NAMES.items()})
    for name in flat:
        groups, _, leaf = NAMES[name].rpartition(".")
        del dig(tree, groups)[leaf]
    tree = _without_empty_groups(tree)
    return {**found, **flat, **({"metadata": tree} if tree else {})}


def _without_empty_groups(tree: dict[str, Any]) -> dict[str, Any]:
    inner = {k: _without_empty_groups(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in inner.items() if v != {}}
