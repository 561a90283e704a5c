"""stem-dask verify: a damaged store is found out and its file is named; so it is when such a store is read."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

import stem_dask
from stem_dask.cli.main import main
from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.core.patterns import as_patterns
from stem_dask.readers.open import find
from stem_dask.readers.zarr_chunks import damaged_chunks
from stem_dask.stages.export import export, export_from_store

SHAPE = (6, 5, 16, 12)
SHARD = "patterns/c.1.0.0.0"
ANALYSIS = "analysis/radius/c.0.0"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of three shards with an analysis."""
    import dask.array as da

    path = tmp_path_factory.mktemp("made") / "a.zarr"
    array = np.random.default_rng(3).poisson(2.0, SHAPE).astype("u2")
    names = ("scan_y", "scan_x", "ky", "kx")
    axes = [Axis(name, n) for name, n in zip(names, SHAPE, strict=True)]
    dims = ("scan_y", "scan_x")
    analysis = xr.Dataset(
        {
            "radius": (dims, np.arange(30, dtype="f4").reshape(6, 5)),
            "center_y": (dims, np.full((6, 5), np.nan)),
            "mean_pattern": (("source_ky", "source_kx"), np.ones((16, 12))),
        }
    )
    data = da.from_array(array, chunks=(2, 5, 16, 12))
    export(as_patterns(data, axes, {}), path, analysis=analysis)
    return path, array


@pytest.fixture
def store(made, tmp_path):
    return Path(shutil.copytree(made[0], tmp_path / "scan.zarr"))


def flipped(path):
    bad = bytearray(path.read_bytes())
    bad[len(bad) // 2] ^= 4
    path.write_bytes(bad)


def refused(capsys, store, code):
    """Runs the command, which must end with this code; what it said."""
    assert main(["verify", str(store)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_good_store(store, capsys):
    assert main(["verify", str(store)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{store}: every chunk is there and holds what was written\n"
    assert err == ""
    assert list(damaged_chunks(str(store))) == []


@pytest.mark.parametrize("name", [SHARD, ANALYSIS, "analysis/center_y/c.0.0", "ky/c.0"])
def test_a_missing_file(store, capsys, name):
    (store / name).unlink()
    assert f"{store / name} is missing or empty" in refused(capsys, store, 5)


@pytest.mark.parametrize("name", [SHARD, ANALYSIS])
def test_a_file_cut_or_with_a_flipped_bit_anywhere(store, capsys, name):
    good = (store / name).read_bytes()
    cut = [good[: len(good) * i // 20] for i in range(20)]
    places = [*(len(good) * i // 20 for i in range(20)), len(good) - 1]
    other = [good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] for i in places]
    for bad in (bytes(len(good)), *cut, *other):
        (store / name).write_bytes(bad)
        (found,) = damaged_chunks(str(store))
        what = "cannot be decoded" if bad else "is missing or empty"
        assert found.startswith(f"{store / name} {what}"), len(bad)
        if name == SHARD:
            with pytest.raises(SourceError, match=r"scan\.zarr.* (cannot be decoded|or empty)"):
                stem_dask.open(store).compute()
    said = refused(capsys, store, 5)
    assert said.startswith(f"error: {store} is damaged: {store / name} cannot be decoded")
    assert said.endswith("make it again with output.overwrite=true\n")
    (store / name).write_bytes(good)
    assert list(damaged_chunks(str(store))) == []


@pytest.mark.parametrize("name", [ANALYSIS, "ky/c.0"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b""), flipped])
def test_an_export_of_a_store_with_a_damaged_small_array(store, tmp_path, name, damage):
    """Axes and analysis go into the file: a lost chunk of theirs must not read as zeros."""
    damage(store / name)
    with pytest.raises(SourceError, match=str(store)):
        export_from_store(str(store), str(tmp_path / "scan.hspy"))
    assert [path.name for path in tmp_path.iterdir()] == ["scan.zarr"]


def test_every_damaged_file_is_named(store, capsys):
    for i in range(3):
        (store / f"patterns/c.{i}.0.0.0").unlink()
    os.truncate(store / ANALYSIS, 3)
    said = refused(capsys, store, 5)
    assert said.count("is missing or empty") == 3
    assert str(store / ANALYSIS) in said


def test_an_array_without_its_own_description(store, capsys):
    """The root lists what belongs to the store, so that a lost folder is noticed."""
    shutil.rmtree(store / "analysis" / "radius")
    assert f"{store / ANALYSIS} is missing or empty" in refused(capsys, store, 5)


@pytest.mark.parametrize("what", ["nothing", "file", "folder", "junk", "npy"])
def test_not_a_store(tmp_path, capsys, what):
    path = tmp_path / "scan.zarr"
    if what == "file":
        path.write_bytes(b"abc")
    elif what == "npy":
        np.save(path := tmp_path / "scan.npy", np.ones(3))
    elif what != "nothing":
        path.mkdir()
        if what == "junk":
            (path / "zarr.json").write_text("{")
    said = refused(capsys, path, 3)
    assert said.startswith(f"error: {path}: not a readable zarr store")
    assert "Traceback" not in said


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: os.truncate(path, 0)])
def test_reading_a_store_without_one_of_its_shards(made, store, spoil):
    spoil(store / SHARD)
    patterns = stem_dask.open(store)
    with pytest.raises(SourceError) as caught:
        patterns.compute()
    assert str(caught.value) == (
        f"{store / SHARD} is missing or empty (1 of the 3 chunk files of these patterns); copy it again, or "
        "set input.missing_chunks=zero to read it as zeros"
    )
    np.testing.assert_array_equal(stem_dask.open(made[0]), made[1])
    np.testing.assert_array_equal(stem_dask.open(store, scan_roi=[0, 2, 0, 5]), made[1][:2])
    with pytest.raises(SourceError, match=r"is missing"):
        stem_dask.open(store, scan_roi=[3, 4, 2, 3]).compute()


def test_exporting_a_store_without_one_of_its_shards(store, tmp_path):
    (store / SHARD).unlink()
    with pytest.raises(SourceError, match=r"patterns/c.1.0.0.0 is missing"):
        export(stem_dask.open(store), tmp_path / "b.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["scan.zarr"]


@pytest.mark.parametrize(
    ("rows", "needs_it"),
    [(slice(0, 4), False), (slice(3, 5), True), (slice(0, 6, 4), True), (slice(0, 6, 3), False),
     (slice(-1, None), True), (slice(5, 5), False)],
)  # fmt: skip
def test_a_part_needs_only_its_own_files(store, rows, needs_it):
    (store / "patterns/c.2.0.0.0").unlink()
    source = find(store).source
    part = (rows, slice(1, 2), slice(None), slice(None))
    if needs_it:
        with pytest.raises(SourceError, match=r"patterns/c\.2\.0\.0\.0 is missing"):
            source[part]
    else:
        source[part]


def test_missing_chunks_of_format_2_are_read_when_asked_for(tmp_path):
    """There an absent chunk is a legal way to write zeros; only the user can know."""
    path = tmp_path / "old.zarr"
    array = zarr.create_array(
        path, shape=(4, 3, 8, 8), chunks=(1, 3, 8, 8), dtype="u2", zarr_format=2
    )
    array[:2] = 1
    assert int(stem_dask.open(path, missing_chunks="zero").sum()) == 2 * 3 * 64
