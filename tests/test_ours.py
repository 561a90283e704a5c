"""Our own outputs read back whole: a second job keeps calibration, beam energy, metadata, title, and what is missing."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from frames_made import numbers

import stem_dask as sd
from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.core.patterns import as_patterns
from stem_dask.job.run import run
from stem_dask.readers.open import find
from stem_dask.stages.export import export
from stem_dask.writers.synthetic import Synthetic, write_dataset

SUFFIXES = (".zarr", ".hspy", ".zspy", ".h5", ".pt")
SIGNALS = (".hspy", ".zspy", ".h5")  # whose axes without units are in px
GIVEN = {
    "calibration": {
        "ky": {"scale": 0.5, "units": "1/nm", "offset": -9.0},
        "kx": {"scale": 0.25, "units": "1/nm", "offset": -4.0},
        "scan_x": {"scale": 3.0, "units": "nm"},
    },
    "beam_energy_kv": 200.0,
}


def axes_told(patterns: xr.DataArray) -> dict[Any, tuple[Any, ...]]:
    return {
        dim: tuple(patterns[dim].attrs[key] for key in ("scale", "offset", "units"))
        for dim in patterns.dims
    }


@pytest.fixture
def damaged(beam_file: Path, tmp_path: Path) -> Path:
    """A store whose rows 2 and 3 of the scan cannot be read."""
    zarr.create_array(str(tmp_path / "in.zarr"), data=np.load(beam_file), chunks=(2, 5, 40, 36))
    (tmp_path / "in.zarr" / "c/1/0/0/0").write_bytes(b"junk")
    return tmp_path / "in.zarr"


@pytest.mark.parametrize("align", ["fixed", "pattern"])
@pytest.mark.parametrize("layout", ["scan", "nchw"])
def test_a_cropped_dataset_is_read_back_whole(
    damaged: Path, make_config: Any, tmp_path: Path, align: str, layout: str
) -> None:
    output = {
        "export": ["hspy", "zspy", "h5", "pt"],
        "layout": layout,
        "chunk_mb": 10 * 40 * 36 * 2 / 2**20,
    }
    given = {"path": str(damaged), **GIVEN}
    run(make_config(damaged, input=given, crop={"align": align}, output=output, on_error="quarantine"))  # fmt: skip
    stored = xr.open_zarr(tmp_path / "out.zarr")
    for suffix in SUFFIXES:
        patterns = sd.open(tmp_path / f"out{suffix}")
        np.testing.assert_array_equal(patterns.values, stored.patterns.values)
        assert axes_told(patterns) == {
            dim: (*told[:2], told[2] or ("px" if suffix in SIGNALS else ""))
            for dim, told in axes_told(stored.patterns.assign_coords(stored.coords)).items()
        }
        attrs = patterns.attrs
        assert attrs["beam_energy_kv"] == 200
        assert attrs["intensity"] == "counts"
        assert attrs["k_origin"] == {"fixed": "detector", "pattern": "window_center"}[align]
        assert (
            "10 of 30 patterns could not be read when this was written: they are zeros, and stay invalid"
            in (attrs["notes"])
        )
        assert attrs["given"] == stored.attrs["given"] == GIVEN
        assert attrs["title"] == "in"


def test_a_second_job_keeps_what_the_first_knew(tmp_path: Path, make_config: Any) -> None:
    """The tags of the .dm4, what was given, and mean counts, through two jobs and every format between them."""
    path = write_dataset(str(tmp_path / "a.dm4"), Synthetic(scan_shape=(3, 2)))
    first = make_config(
        path, "one.zarr", input={"path": str(path), "beam_energy_kv": 80.0}, downsample={"factor": 2},
        output={"export": ["hspy", "zspy", "h5", "pt"]},
    )  # fmt: skip
    run(first)
    tags = sd.open(path).attrs["original_metadata"]
    assert tags
    for suffix in SUFFIXES:
        between = tmp_path / f"one{suffix}"
        box = {"window": [2, 10, 4, 12]}
        run(make_config(between, "two.zarr", crop=box, validate={"min_retention": 0.0},
                        output={"overwrite": True}))  # fmt: skip
        root = zarr.open_group(tmp_path / "two.zarr", mode="r")
        assert root.attrs["beam_energy_kv"] == 80
        assert root["patterns"].attrs["intensity"] == "mean counts per source pixel"
        known, again = axes_told(sd.open(between)), axes_told(sd.open(tmp_path / "two.zarr"))
        assert again["ky"] == pytest.approx((known["ky"][0], known["ky"][1] + 2 * known["ky"][0], known["ky"][2]))  # fmt: skip
        assert known["ky"][2] == "1/nm"
        assert root.attrs["original_metadata"] == tags
        assert root.attrs["given"] == {"beam_energy_kv": 80.0}


def test_what_is_given_later_goes_before(beam_file: Path, tmp_path: Path) -> None:
    patterns = sd.open(beam_file, calibration=GIVEN["calibration"], beam_energy_kv=200)
    export(patterns, tmp_path / "a.zarr")
    kx = {"scale": 0.5, "units": "mrad"}
    again = sd.open(tmp_path / "a.zarr", calibration={"kx": kx}, beam_energy_kv=60)
    assert again.attrs["beam_energy_kv"] == 60
    assert again.attrs["given"]["beam_energy_kv"] == 60
    assert again.attrs["given"]["calibration"] == {**GIVEN["calibration"], "kx": kx}  # type: ignore[dict-item]
    assert axes_told(again)["ky"] == (0.5, -9.0, "1/nm")


def test_the_origin_holds_until_another_is_given(tmp_path: Path) -> None:
    axes = [Axis(n, s) for n, s in zip(("scan_y", "scan_x", "ky", "kx"), (3, 4, 6, 5), strict=True)]
    attrs = {"k_origin": "window_center", "intensity": "counts"}
    import dask.array as da

    export(as_patterns(da.from_array(numbers()), axes, attrs), tmp_path / "a.zarr")
    assert sd.open(tmp_path / "a.zarr").attrs["k_origin"] == "window_center"
    ky = {"scale": 1.0, "units": "mrad"}
    kept = sd.open(tmp_path / "a.zarr", calibration={"ky": ky})
    assert kept.attrs["k_origin"] == "window_center"
    moved = sd.open(tmp_path / "a.zarr", calibration={"ky": {**ky, "offset": 2.0}})
    assert "k_origin" not in moved.attrs


def test_a_crop_of_aligned_patterns_has_no_detector(beam_file: Path, tmp_path: Path) -> None:
    patterns = sd.open(beam_file)
    analysis = sd.analyze(patterns).compute()
    aligned = sd.crop(patterns, analysis, sd.choose_window(analysis, size=16, align="pattern"))
    export(aligned, tmp_path / "a.zarr")
    again = sd.open(tmp_path / "a.zarr")
    known = sd.analyze(again).compute()
    fixed = sd.crop(again, known, sd.choose_window(known, size=8))
    assert fixed.attrs["k_origin"] == "window_center"
    small = sd.downsample(sd.downsample(again, 2), 2, reduce="sum")
    assert small.attrs["intensity"] == "sums of mean counts per source pixel"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_list_of_patterns_comes_back_as_one(tmp_path: Path, suffix: str) -> None:
    array = numbers((7, 6, 5))
    np.save(tmp_path / "list.npy", array)
    export(sd.open(tmp_path / "list.npy"), tmp_path / f"a{suffix}")
    patterns = sd.open(tmp_path / f"a{suffix}")
    assert patterns.dims == ("pattern", "ky", "kx")
    np.testing.assert_array_equal(patterns.values, array)


def signal_of_others(path: Path) -> None:
    """A file or store as HyperSpy writes it."""
    root: Any = (
        h5py.File(path, "w")
        if path.suffix == ".hspy"
        else zarr.open_group(path, mode="w", zarr_format=2)
    )
    group = root.create_group("Experiments/other")
    group.create_group("metadata/General").attrs["title"] = "of others"
    group.create_group("metadata/Acquisition_instrument/TEM").attrs["beam_energy"] = 300.0
    tags = group.create_group("original_metadata/Micro∕scope")
    tags.attrs.update({"_list_empty_": "_None_", "lens": '[1, "x"]'})
    for parent, name, data in (
        (group, "data", numbers()),
        (tags, "curve", np.arange(3)),
        (tags, "large", np.zeros(5000)),
    ):
        create = parent.create_dataset if path.suffix == ".hspy" else parent.create_array
        create(name, data=data)
    if path.suffix == ".hspy":
        tags["out"] = h5py.ExternalLink("other.h5", "/")
        root.close()
    else:
        tags.attrs["gaps"] = [1.5, None]


@pytest.mark.parametrize("suffix", [".hspy", ".zspy"])
def test_a_signal_of_hyperspy(tmp_path: Path, suffix: str) -> None:
    """Not of ours: title, beam energy and its original metadata are kept as they are."""
    signal_of_others(tmp_path / f"a{suffix}")
    attrs = sd.open(tmp_path / f"a{suffix}").attrs
    assert (attrs["beam_energy_kv"], attrs["title"]) == (300, "of others")
    tags = attrs["original_metadata"]["original_metadata"]["Micro/scope"]
    assert tags.pop("gaps", None) == ([1.5, None] if suffix == ".zspy" else None)
    assert tags == {
        "": None,
        "lens": [1, "x"],
        "curve": [0, 1, 2],
        "large": "5,000 values, left in the input file",
    }


def test_metadata_of_a_zspy_that_are_damaged(tmp_path: Path) -> None:
    store = tmp_path / "a.zspy"
    signal_of_others(store)
    inside = store / "Experiments/other"
    file = inside / "metadata/General/.zattrs"
    file.write_text("{")
    with pytest.raises(
        SourceError, match=r"a\.zspy: the attributes in .*General/\.zattrs cannot be read"
    ):
        sd.open(store)
    file.write_text('["a list"]')
    assert "title" not in sd.open(store).attrs
    file.unlink()
    (inside / "metadata/Acquisition_instrument").rename(tmp_path / "elsewhere")
    (inside / "metadata/Acquisition_instrument").symlink_to(tmp_path / "elsewhere")
    assert "beam_energy_kv" not in sd.open(store).attrs
    chunk = inside / "original_metadata/Micro∕scope/curve/0"
    chunk.write_bytes(b"junk")
    with pytest.raises(SourceError, match=r"a\.zspy: Experiments/other/.*/curve cannot be read"):
        sd.open(store)


def test_a_pt_tells_what_it_is_in_plain_words(beam_file: Path, tmp_path: Path) -> None:
    """For `torch.load` with weights only; equal words make equal bytes, whether they are one object or two."""
    calibration = {"kx": {"scale": 0.25, "units": "1/nm"}}
    patterns = sd.open(beam_file, calibration=calibration, beam_energy_kv=200)
    for name, again in (("a", "nm"), ("b", "".join(["n", "m"]))):
        tree = {"tags": [{"units": "nm", "other": again}, 2**40, -1.5, None, True], "ü/x": {}}
        patterns.attrs["original_metadata"] = tree
        (tmp_path / name).mkdir()
        export(patterns, tmp_path / name / "x.pt", title="gold")
    content = torch.load(tmp_path / "a" / "x.pt", weights_only=True)
    assert content["title"] == "gold"
    assert content["given"] == {"calibration": calibration, "beam_energy_kv": 200.0}
    assert content["original_metadata"] == tree
    assert content["beam_energy_kv"] == 200
    assert (tmp_path / "a/x.pt").read_bytes() == (tmp_path / "b/x.pt").read_bytes()


def test_links_in_a_h5_are_not_followed(beam_file: Path, tmp_path: Path) -> None:
    export(sd.open(beam_file, beam_energy_kv=200), tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["given/beam_energy_kv"] = 5.0
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        own = file["Experiments/4D-STEM/metadata/stem_dask"]
        del own["given"]
        own["given"] = h5py.ExternalLink("b.h5", "given")
        own["valid"] = h5py.SoftLink("/patterns")
    attrs = sd.open(tmp_path / "a.h5").attrs
    assert attrs["beam_energy_kv"] == 200
    assert "given" not in attrs


def test_long_metadata_of_a_h5(tmp_path: Path, beam_file: Path) -> None:
    """What is too long for an attribute is a dataset there, and comes back as the text that it was."""
    patterns = sd.open(beam_file)
    tree = {"text": "x" * 40_000, "curve": [1.5, 2.5], "a/b": {"none": None, "odd": [1, "x"]}}
    patterns.attrs["original_metadata"] = tree
    export(patterns, tmp_path / "a.h5")
    again = sd.open(tmp_path / "a.h5").attrs["original_metadata"]
    assert again["text"] == "x" * 1000  # as much as is kept of any file's texts
    assert again["curve"] == [1.5, 2.5]
    assert again["a/b"] == {"none": None, "odd": [1, "x"]}


@pytest.mark.parametrize("damage", ["lost", "junk"])
def test_a_store_whose_valid_is_damaged(
    beam_file: Path, make_config: Any, tmp_path: Path, damage: str
) -> None:
    run(make_config(beam_file))
    chunk = tmp_path / "out.zarr" / "valid" / "c.0.0"
    chunk.unlink() if damage == "lost" else chunk.write_bytes(b"junk")
    (note,) = find(tmp_path / "out.zarr").info.notes
    assert note.startswith(f"unknown which patterns could not be read before: {chunk} ")


@pytest.mark.parametrize(
    "odd",
    [
        {"beam_energy_kv": "high", "given": [1], "title": 5, "k_origin": ["x"], "intensity": {}},
        {"beam_energy_kv": -1.0, "original_metadata": "none", "window": 7},
        {"given": {"calibration": 3, "other": 1}},
        {"axes": "none"},
        {"axes": [{"name": "scan_y"}] * 4},
        {"window": None, "analysis": torch.zeros(3)},
    ],
)
def test_a_dictionary_that_only_looks_like_ours(tmp_path: Path, odd: dict[str, Any]) -> None:
    names = ("scan_y", "scan_x", "ky", "kx")
    axes = [{"name": n, "size": s} for n, s in zip(names, (3, 4, 6, 5), strict=True)]
    content = {"patterns": torch.ones(3, 4, 6, 5), "axes": axes, "window": {}, "analysis": {}}
    torch.save({**content, **odd}, tmp_path / "a.pt")
    patterns = sd.open(tmp_path / "a.pt")
    assert int(patterns.sum()) == 360
    assert {*patterns.attrs} == {"source", "intensity", "notes"}
