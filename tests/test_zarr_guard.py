"""Stores that would run code when they are read are refused by every way in, before zarr looks for their codecs."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr
from numcodecs.abc import Codec
from numcodecs.registry import codec_registry

import stem_dask as sd
from stem_dask.cli.main import main
from stem_dask.core.errors import SourceError
from stem_dask.job.run import run

PICKLE = {"id": "pickle", "protocol": 5}
PICKLE_3 = {"name": "numcodecs.pickle", "configuration": {"protocol": 5}}
GROUP_3 = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}})


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that appears when code of a store is run; a codec that unpickles is there, whatever numcodecs is installed."""

    class Unpickles(Codec):  # type: ignore[misc]
        codec_id = "pickle"

        def __init__(self, protocol: int = 5) -> None: ...

        def encode(self, buf: Any) -> Any:
            raise NotImplementedError

        def decode(self, buf: Any, out: Any = None) -> Any:
            return pickle.loads(bytes(buf))

    path = tmp_path / "marker"
    monkeypatch.setitem(codec_registry, "pickle", Unpickles)
    assert isinstance(numcodecs.get_codec(PICKLE), Unpickles)
    pickle.loads(pickle.dumps(Marker(path)))
    path.unlink()  # so far it works
    return path


def write_hostile_array(folder: Path, marker: Path, **changes: Any) -> None:
    document = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": 0, "order": "C",
        "filters": [PICKLE], "compressor": None, **changes,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / ".zarray").write_text(json.dumps(document))
    (folder / "0").write_bytes(pickle.dumps(Marker(marker)))


def format_2(path: Path, marker: Path, **changes: Any) -> None:
    zarr.create_array(path / "patterns", data=np.ones((3, 4, 8, 9), "u2"), zarr_format=2)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    write_hostile_array(path / "thing", marker, **changes)


def in_a_filter(path: Path, marker: Path) -> None:
    format_2(path, marker)


def in_the_compressor_of_numbers(path: Path, marker: Path) -> None:
    format_2(path, marker, dtype="<f8", filters=None, compressor=PICKLE)


def behind_other_filters(path: Path, marker: Path) -> None:
    format_2(path, marker, filters=[{"id": "vlen-utf8"}, PICKLE])


def consolidated(path: Path, marker: Path) -> None:
    format_2(path, marker)
    names = ("patterns/.zarray", "thing/.zarray", ".zgroup")
    nodes = {name: json.loads((path / name).read_text()) for name in names}
    document = {"zarr_consolidated_format": 1, "metadata": nodes}
    (path / ".zmetadata").write_text(json.dumps(document))


def format_3(path: Path, codecs: Any) -> None:
    data = np.ones((3, 4, 8, 9), "u2")
    zarr.create_array(path / "patterns", data=data)
    (path / "zarr.json").write_text(GROUP_3)
    zarr.create_array(path / "thing", data=data)
    document = json.loads((path / "thing/zarr.json").read_text())
    (path / "thing/zarr.json").write_text(json.dumps({**document, "codecs": codecs}))


def in_format_3(path: Path, marker: Path) -> None:
    format_3(path, [PICKLE_3])


def in_a_shard(path: Path, marker: Path) -> None:
    inside = {"chunk_shape": [1], "codecs": [PICKLE_3], "index_codecs": ["bytes"]}
    format_3(path, [{"name": "sharding_indexed", "configuration": inside}])


def consolidated_in_format_3(path: Path, marker: Path) -> None:
    format_3(path, [PICKLE_3])
    nodes = {name: json.loads((path / name / "zarr.json").read_text()) for name in ("thing",)}
    root = json.loads(GROUP_3)
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": nodes}
    (path / "zarr.json").write_text(json.dumps(root))


WAYS_IN = [
    in_a_filter,
    in_the_compressor_of_numbers,
    behind_other_filters,
    consolidated,
    in_format_3,
    in_a_shard,
    consolidated_in_format_3,
]


@pytest.mark.parametrize("make", WAYS_IN, ids=lambda make: make.__name__)
def test_a_hostile_array_beside_the_patterns(
    make: Any, tmp_path: Path, marker: Path, make_config: Any, capsys: Any
) -> None:
    path = tmp_path / "a.zarr"
    make(path, marker)
    with pytest.raises(SourceError, match=r"array thing uses the codec (numcodecs\.)?pickle"):
        sd.open(path)
    with pytest.raises(SourceError, match="array thing"):
        run(make_config(path))
    for command in ("info", "check", "verify"):
        assert main([command, str(path)]) in (2, 3)
    assert main(["convert", "--input", str(path), "--output", str(tmp_path / "b.npy")]) == 3
    assert "Traceback" not in "".join(capsys.readouterr())
    assert not marker.exists()


def test_a_small_array_of_a_signal(tmp_path: Path, marker: Path, make_config: Any) -> None:
    path = tmp_path / "a.zspy"
    patterns = xr.DataArray(
        np.ones((3, 4, 8, 9), "u2"), dims=("scan_y", "scan_x", "ky", "kx"), name="patterns"
    )
    sd.export(patterns, path)
    sd.open(path)
    (signal,) = (path / "Experiments").glob("[!.]*")
    write_hostile_array(signal / "metadata" / "General" / "thing", marker)
    with pytest.raises(SourceError, match=r"array .*General/thing uses the codec pickle"):
        sd.open(path)
    assert main(["info", str(path)]) == 3
    with pytest.raises(SourceError):
        run(make_config(path))
    assert not marker.exists()


def test_texts_and_lists_that_hyperspy_writes_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.zspy"
    patterns = xr.DataArray(
        np.ones((3, 4, 8, 9), "u2"), dims=("scan_y", "scan_x", "ky", "kx"), name="patterns"
    )
    sd.export(patterns, path)
    (signal,) = (path / "Experiments").glob("[!.]*")
    for name, codec in (("ragged", {"id": "vlen-array", "dtype": "<f8"}), ("texts", {"id": "msgpack2"})):  # fmt: skip
        write_hostile_array(signal / "metadata" / name, tmp_path / "marker", filters=[codec])
    np.testing.assert_array_equal(sd.open(path), patterns)


@pytest.mark.parametrize("victim", ["analysis", "root"])
def test_an_analysis_and_a_finished_store(
    victim: str, tmp_path: Path, marker: Path, make_config: Any
) -> None:
    data = np.zeros((3, 4, 16, 16), "u2")
    data[..., 6:10, 6:10] = 5
    np.save(tmp_path / "a.npy", data)
    ahead = {"crop": {"enabled": False}, "analyze": {"ahead": True}}
    run(make_config(tmp_path / "a.npy", "known.zarr", **ahead))
    store = tmp_path / "known.zarr"
    thing = store / "analysis" / "total" if victim == "analysis" else store / "scan_y"
    document = json.loads((thing / "zarr.json").read_text())
    (thing / "zarr.json").write_text(json.dumps({**document, "codecs": [PICKLE_3]}))
    root = json.loads((store / "zarr.json").read_text())
    name = str(thing.relative_to(store))
    root["consolidated_metadata"]["metadata"][name]["codecs"] = [PICKLE_3]
    (store / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(SourceError, match=f"array .*{thing.name} uses the codec"):
        sd.open(store)
    with pytest.raises(SourceError, match=f"array .*{thing.name} uses the codec"):
        run(make_config(tmp_path / "a.npy", analyze={"from": str(store)}))
    assert main(["verify", str(store)]) == 3
    assert not marker.exists()


@pytest.mark.parametrize("version", [2, 3])
def test_numbers_and_texts_of_others_are_read(version: int, tmp_path: Path) -> None:
    found = xr.Dataset(
        {"patterns": (("scan_y", "scan_x", "ky", "kx"), np.ones((2, 3, 4, 5), "f4"))},
        coords={"scan_x": ["a", "b", "c"], "when": ("scan_y", np.array(["2026-01-01", "2026-01-02"], "M8[ns]"))},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.to_zarr(tmp_path / "a.zarr", zarr_format=version, consolidated=True)
    np.testing.assert_array_equal(sd.open(tmp_path / "a.zarr"), found.patterns)
