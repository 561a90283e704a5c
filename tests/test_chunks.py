"""Chunk files of a zarr input that are missing or damaged: named, never read as zeros without a word."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
import zarr.codecs
from frames_made import agrees, numbers
from numcodecs import GZip

import stem_dask as sd
from stem_dask.core.errors import SourceError
from stem_dask.job.plan import prepare
from stem_dask.job.run import run
from stem_dask.readers import zarr_chunks as chunks
from stem_dask.readers.open import find
from stem_dask.readers.zarr_chunks import missing_files

WHOLE = (slice(None),) * 4
#: how an array may be stored, and the file of the chunk at scan rows 2 and 3, columns 3 to 5
KINDS = {
    "v2": ({"zarr_format": 2}, "1.1.0.0"),
    "v2 nested": ({"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}}, "1/1/0/0"),
    "v3": ({}, "c/1/1/0/0"),
    "v3 flat": ({"chunk_key_encoding": {"name": "default", "separator": "."}}, "c.1.1.0.0"),
    "v3 sharded": ({"shards": (2, 3, 6, 5), "chunks": (1, 3, 6, 5)}, "c/1/1/0/0"),
}  # fmt: skip
DATA = numbers((3, 7, 6, 5)) + np.uint16(
    1
)  # two chunks by three: none of them full at the far ends


def stored(tmp_path, kind="v3", **more):
    """A store, and the file of its chunk at (1, 1)."""
    options, file = KINDS[kind]
    store = tmp_path / "in.zarr"
    zarr.create_array(str(store), data=DATA, **{"chunks": (2, 3, 6, 5), **options, **more})
    return store, store / file


def without(*places, value=0):
    left = DATA.copy()
    for y, x in places:
        left[2 * y : 2 * y + 2, 3 * x : 3 * x + 3] = value
    return left


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_chunk_is_refused_unless_it_is_meant(tmp_path, kind):
    store, chunk = stored(tmp_path, kind)
    other = Path(str(chunk).replace("1/1/0/0", "0/2/0/0").replace("1.1.0.0", "0.2.0.0"))
    assert find(store).info.notes == ()
    np.testing.assert_array_equal(find(store).source[WHOLE], DATA)
    chunk.unlink()
    other.unlink()
    found = find(store)
    told = f"2 of 6 chunk files are missing, the first is {other}"
    assert found.info.notes == (
        f"{told}; reading what they held is refused, unless input.missing_chunks=zero",
    )
    with pytest.raises(SourceError) as caught:
        found.source[WHOLE]
    assert f"{other} is missing or empty (2 of the 6 chunk files" in str(caught.value)
    np.testing.assert_array_equal(found.source[0:2, 0:6, 1:3, :], DATA[0:2, 0:6, 1:3])
    zeros = find(store, missing_chunks="zero")
    assert zeros.info.notes == (f"{told}; they read as zeros",)
    np.testing.assert_array_equal(zeros.source[WHOLE], without((1, 1), (0, 2)))


def test_other_fill_values_are_told(tmp_path):
    store, chunk = stored(tmp_path, fill_value=7)
    chunk.unlink()
    found = find(store, missing_chunks="zero")
    assert found.info.notes[0].endswith("they read as the fill value 7")
    np.testing.assert_array_equal(found.source[WHOLE], without((1, 1), value=7))


def test_an_empty_file_was_cut_short(tmp_path):
    store, chunk = stored(tmp_path)
    os.truncate(chunk, 0)
    with pytest.raises(SourceError, match=rf"{chunk} is missing or empty"):
        find(store).source[WHOLE]
    with pytest.raises(SourceError, match=rf"{chunk} is empty \(0 bytes\).*cut short"):
        find(store, missing_chunks="zero").source[WHOLE]


def test_what_is_no_chunk_is_not_counted(tmp_path):
    """Of an array that was made smaller, and what lies around."""
    store, chunk = stored(tmp_path)
    for name in ("c/9/0/0/0", "c/0/0/0/0.abc.partial", "c/note.txt", "c/0/1/0/9"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"x")
    chunk.unlink()
    array = zarr.open_array(store, mode="r")
    assert missing_files(str(store), "", array) == (1, 6, chunk)


@pytest.mark.parametrize("kind", ["v2 nested", "v3"])
def test_links_in_a_store(tmp_path, kind):
    """A chunk that leads out of the store is refused with its place; folders that lead into themselves end."""
    store, chunk = stored(tmp_path, kind)
    chunk.rename(tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    (chunk.parent / "loop").symlink_to(chunk.parent)
    (chunk.parent / "7").symlink_to(chunk.parent)
    for missing in ("refuse", "zero"):
        found = find(store, missing_chunks=missing)
        assert found.info.notes == ()
        with pytest.raises(SourceError, match=rf"{chunk} leads out of the store, to .*elsewhere"):
            found.source[WHOLE]


def test_all_chunks_are_missing(tmp_path):
    zarr.create_array(str(tmp_path / "in.zarr"), shape=DATA.shape, chunks=(2, 3, 6, 5), dtype="u2")
    found = find(tmp_path / "in.zarr", missing_chunks="zero")
    assert found.info.notes[0].startswith("6 of 6 chunk files are missing")
    assert not found.source[WHOLE].any()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("length", [1_819_047_278, 0, 15])
def test_a_blosc_chunk_that_lies_about_its_length(tmp_path, version, length):
    """c-blosc would read as far as the header says: it ended the process."""
    codec = {2: numcodecs.Blosc("lz4"), 3: zarr.codecs.BloscCodec(cname="lz4")}[version]
    options: Any = {"zarr_format": version, "compressors": [codec], "chunks": (3, 4, 6, 5)}
    array = zarr.create_array(str(tmp_path / "a.zarr"), data=numbers(), **options)
    path = tmp_path / "a.zarr" / array.metadata.encode_chunk_key((0, 0, 0, 0))
    chunk = path.read_bytes()
    agrees(find(tmp_path / "a.zarr"), numbers())
    if length >= 16:
        path.write_bytes(chunk[:12] + length.to_bytes(4, "little") + chunk[16:])
    else:
        path.write_bytes(chunk[:length] or chunk[:-1])
    with pytest.raises(
        SourceError,
        match=r"cannot be decoded \(blosc: the header states [\d,]+ bytes, the chunk has",
    ):
        find(tmp_path / "a.zarr").source[(slice(0, 1),) * 4]


def test_a_size_that_is_only_claimed(tmp_path):
    """4,294,967,296 chunk files are missing by the store's word; only those that are there are listed."""
    store = tmp_path / "a.zarr"
    zarr.create_array(str(store), shape=(2**32, 4, 6, 5), chunks=(1, 4, 6, 5), dtype="u2")[:1] = 1
    tracemalloc.start()
    try:
        (note,) = find(store).info.notes
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert note.startswith(
        f"4,294,967,295 of 4,294,967,296 chunk files are missing, the first is {store}/c/1/0/0/0;"
    )


def test_other_files_have_no_chunks(tmp_path):
    np.save(tmp_path / "a.npy", DATA)
    with pytest.raises(SourceError, match=r"a\.npy: input\.missing_chunks is for zarr stores"):
        find(tmp_path / "a.npy", missing_chunks="zero")


def test_a_run_with_missing_chunks(beam_file, make_config, tmp_path):
    """The config's key reaches the reader, is part of the job, and the result says what is missing."""
    store = str(tmp_path / "in.zarr")
    zarr.create_array(store, data=np.load(beam_file), chunks=(2, 5, 40, 36))
    Path(store, "c/1/0/0/0").unlink()
    asked = {"path": store, "missing_chunks": "zero"}
    refused, zero = make_config(store), make_config(store, input=asked)
    with pytest.raises(SourceError, match=r"c/1/0/0/0 is missing or empty"):
        run(refused)
    assert prepare(refused).token != prepare(zero).token
    results = run(make_config(store, "zero.zarr", input=asked)).results
    assert "1 of 3 chunk files are missing" in results["input"]["notes"][0]
    assert results["validation"]["n_empty"] == 10
    assert sd.open(store, missing_chunks="zero")[2:4].sum() == 0


# --- damaged ------------------------------------------------------------------------------------------------------

CHECKED = [zarr.codecs.BloscCodec(), zarr.codecs.Crc32cCodec()]


@pytest.mark.parametrize(
    ("kind", "more"),
    [("v2", {}), ("v2 nested", {"compressors": GZip()}), ("v2", {"compressors": None}), ("v3", {"compressors": None}),
     ("v3", {"compressors": CHECKED}), ("v3 flat", {"compressors": zarr.codecs.GzipCodec()}), ("v3 sharded", {}),
     ("v3 sharded", {"compressors": CHECKED})],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_a_damaged_chunk_is_named(tmp_path, kind, more, damage):
    store, chunk = stored(tmp_path, kind, **more)
    good = chunk.read_bytes()
    junk = np.random.default_rng(0).bytes(len(good) - 2)
    chunk.write_bytes(junk if damage == "junk" else good[: len(good) // 2])
    source = find(store).source
    with pytest.raises(SourceError, match=rf"^{chunk} cannot be decoded \(.*\): it was damaged"):
        source[WHOLE]
    with pytest.raises(SourceError, match=rf"^{chunk} cannot be decoded"):
        source[2:3, 5:6, :, :]
    np.testing.assert_array_equal(source[0:2, :, :, :], DATA[:2])


@pytest.mark.parametrize("kind", ["v3", "v3 sharded"])
def test_a_checksum_that_does_not_fit_is_named(tmp_path, kind):
    store, chunk = stored(tmp_path, kind, compressors=CHECKED)
    bad = bytearray(chunk.read_bytes())
    bad[30] ^= 1
    chunk.write_bytes(bad)
    with pytest.raises(SourceError, match=rf"^{chunk} cannot be decoded \(.*checksum"):
        find(store).source[WHOLE]


def test_a_run_names_the_damaged_chunk_and_the_block(beam_file, make_config, tmp_path):
    group = zarr.open_group(tmp_path / "in.zarr", mode="w")
    group.create_array("scan", data=np.load(beam_file), chunks=(2, 5, 40, 36))
    chunk = tmp_path / "in.zarr" / "scan" / "c/1/0/0/0"
    os.truncate(chunk, 20)
    told = rf"^while a sample was read: {chunk} cannot be decoded .*; stem-dask verify lists all"
    with pytest.raises(SourceError, match=told):
        run(make_config(tmp_path / "in.zarr"))


# --- large chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_chunk_files_that_are_read_one_by_one(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(chunks, "_LARGE", 0)
    store, chunk = stored(tmp_path, kind)
    agrees(find(store), DATA)
    chunk.unlink()
    agrees(find(store, missing_chunks="zero"), without((1, 1)))


def test_large_chunks_are_decoded_one_at_a_time(tmp_path):
    """Eight of 2 MiB, into a block of 16: zarr by itself holds all of them at once."""
    array = np.random.default_rng(0).integers(0, 9, (8, 4, 512, 512)).astype("u2")
    zarr.create_array(str(tmp_path / "in.zarr"), data=array, chunks=(1, 4, 512, 512))
    source = find(tmp_path / "in.zarr").source
    assert source[(slice(1), slice(1), slice(1), slice(1))].shape == (1, 1, 1, 1)  # loads the code
    tracemalloc.start()
    try:
        block = source[WHOLE]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(block, array)
    # a chunk as it lies in the file, decoded, and the one before, which zarr's loop may not have let go yet
    assert peak < array.nbytes + 3 * array.nbytes // 8
