"""Formats that only RosettaSciIO reads: stacks of patterns with their axes; everything else is refused."""

import copy
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rsciio
from frames_made import SHAPE, agrees, numbers, refuses
from rsciio.pantarhei import file_writer as write_prz
from rsciio.ripple import file_writer as write_rpl

import stem_dask as sd
from stem_dask.core.model import Axis
from stem_dask.job.run import run
from stem_dask.readers.formats import READERS
from stem_dask.readers.open import find
from stem_dask.readers.rsciio import SUFFIXES

#: plain images and tables, which are no stacks
NO_STACKS = ("Image", "Impulse", "Protochips")


def signal(array: np.ndarray, n_navigation: int) -> dict[str, Any]:
    names = ("y", "x", "ky", "kx")[-array.ndim :]
    axes = [
        {"name": name, "size": n, "scale": 0.5 + i, "offset": -1.0, "units": "1/nm" if "k" in name else "nm",
         "navigate": i < n_navigation, "index_in_array": i}
        for i, (name, n) in enumerate(zip(names, array.shape, strict=True))
    ]  # fmt: skip
    tem = {"beam_energy": 200.0}
    metadata = {
        "General": {"title": "gold"},
        "Signal": {"signal_type": ""},
        "Acquisition_instrument": {"TEM": tem},
    }
    return copy.deepcopy({"data": array, "axes": axes, "metadata": metadata, "original_metadata": {}, "attributes": {}})  # fmt: skip


def test_the_table_has_all_formats_of_rosettasciio() -> None:
    plugins = [
        plugin for plugin in rsciio.IO_PLUGINS if plugin["name"] not in {*NO_STACKS, "netCDF"}
    ]
    known = {f".{end.lower()}" for plugin in plugins for end in plugin["file_extensions"]}
    others = {suffix for suffix, row in READERS.items() if row.kind != "a file of RosettaSciIO"}
    assert set(SUFFIXES) == known - others
    assert tuple(READERS)[-len(SUFFIXES) :] == SUFFIXES


def test_ripple(tmp_path: Path, make_config: Any) -> None:
    array = numbers((12, 6, 5))
    write_rpl(tmp_path / "a.rpl", signal(array, 1))
    found = find(tmp_path / "a.rpl", scan_shape=(3, 4))
    agrees(found, array.reshape(SHAPE))
    assert found.info.axes[2:] == (
        Axis("ky", 6, 1.5, -1.0, "1/nm"),
        Axis("kx", 5, 2.5, -1.0, "1/nm"),
    )
    assert found.info.kind == "a file of RosettaSciIO"
    assert found.files == (str(tmp_path / "a.raw"),)
    refuses(
        r"a\.rpl: .* is a stack of 12 patterns of 6 x 5 pixels; give its scan", tmp_path / "a.rpl"
    )
    given = {"path": str(tmp_path / "a.rpl"), "scan_shape": [3, 4]}
    run(
        make_config(
            tmp_path / "a.rpl", input=given, crop={"window": [0, 4, 0, 4], "size_multiple": 1}
        )
    )
    np.testing.assert_array_equal(sd.open(tmp_path / "out.zarr"), array.reshape(SHAPE)[..., :4, :4])


def test_panta_rhei(tmp_path: Path) -> None:
    """As the program writes it: an archive of arrays, its metadata as JSON; compressed ones are not read in parts."""
    calibrations = [
        {"unit": unit, "value": 0.5, "offset": 2.0} for unit in ("1/nm", "1/nm", "nm", "nm")
    ]
    types = ["CameraX", "CameraY", "ScanX", "ScanY"]
    metadata = json.dumps([{"content.types": types, "device.calib": calibrations, "type": "4D"}])
    for save, n_held in ((np.savez, 0), (np.savez_compressed, 720)):
        with open(tmp_path / "a.prz", "wb") as file:
            save(file, data=numbers(), meta_data_json=np.array(metadata))
        found = find(tmp_path / "a.prz")
        agrees(found, numbers())
        assert found.info.axes[3] == Axis("kx", 5, 0.5, 1.0, "1/nm")
        assert found.source.reading.chunk_bytes == n_held
        assert any("every worker holds all of it" in note for note in found.info.notes) == bool(
            n_held
        )


def test_pickled_metadata_are_not_read(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_prz(tmp_path / "a.prz", signal(numbers(), 2))
    found = find(tmp_path / "a.prz")
    agrees(found, numbers())
    assert "beam_energy_kv" not in found.info.about


def test_netcdf_is_not_read(tmp_path: Path) -> None:
    """RosettaSciIO's reader of it contains eval."""
    (tmp_path / "a.nc").write_bytes(b"CDF\x01" + bytes(60))
    refuses(r"a\.nc: the file extension \.nc is not known", tmp_path / "a.nc")


def test_what_is_no_stack_of_patterns(tmp_path: Path) -> None:
    write_rpl(tmp_path / "a.rpl", signal(numbers((4, 6, 5)), 2))
    refuses(
        r"a\.rpl: no stack of patterns .*rsciio\.ripple finds .*: 4 x 6 x 5, 1 axes of",
        tmp_path / "a.rpl",
    )
    (tmp_path / "a.ser").write_bytes(b"no series at all" * 10)
    refuses(r"a\.ser: rsciio\.tia cannot read it", tmp_path / "a.ser")
    (tmp_path / "a.mrcz").write_bytes(struct.pack("<I", 7) * 300)
    refuses(
        r"a\.mrcz: rsciio\.mrcz cannot read it .* or install what rsciio\.mrcz needs",
        tmp_path / "a.mrcz",
    )
