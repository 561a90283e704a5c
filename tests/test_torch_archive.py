"""Files as torch.save writes them: torch reads them, and finds every record where it would have put it."""

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from stem_dask.core.errors import ConfigError
from stem_dask.writers.torch import Hole, write_archive

torch = pytest.importorskip("torch")

KINDS = ("u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "?", "c8", "c16")
ARRAYS = st.sampled_from([*KINDS, ">i2", ">f8"]).flatmap(
    lambda kind: of_numpy.arrays(kind, of_numpy.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=3))
)  # fmt: skip
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def save(path, whole):
    """Write it, and what torch makes of it."""
    with open(path, "wb") as file:
        write_archive(file, whole, 0)
    return torch.load(path, weights_only=True)


@pytest.fixture
def every_place_checked(monkeypatch):
    """torch compares the places of records with those that it would have chosen."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")


@pytest.mark.usefixtures("every_place_checked")
@settings(max_examples=40)
@given(arrays=st.lists(ARRAYS, min_size=1, max_size=4), plain=PLAIN, fortran=st.booleans())
@example(arrays=[np.array(np.nan, "f2")], plain=None, fortran=False)
def test_torch_reads_what_was_written(tmp_path_factory, arrays, plain, fortran):
    path = tmp_path_factory.mktemp("of_ours") / "a.pt"
    arrays = [np.asarray(one, order="F" if fortran else "C") for one in arrays]
    inner = {str(i): one for i, one in enumerate(arrays[1:])}
    loaded = save(path, {"patterns": arrays[0], "said": plain, "inner": inner})
    assert list(loaded) == ["patterns", "said", "inner"]
    assert loaded["said"] == plain
    for wanted, found in zip(arrays, [loaded["patterns"], *loaded["inner"].values()], strict=True):
        native = wanted.astype(wanted.dtype.newbyteorder("="))
        np.testing.assert_array_equal(found.numpy(), native, strict=True)
        assert found.stride() == torch.empty(native.shape).stride()
    alone = save(path, arrays[0])
    np.testing.assert_array_equal(alone.numpy(), loaded["patterns"].numpy(), strict=True)


@pytest.mark.usefixtures("every_place_checked")
def test_the_records_are_those_of_torch(tmp_path):
    arrays = {
        "patterns": np.arange(24, dtype="i2").reshape(2, 3, 4),
        "b": np.zeros(0),
        "c": np.ones(3, "u2"),
    }
    save(tmp_path / "ours.pt", arrays)
    with open(tmp_path / "theirs.pt", "wb") as file:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
    found = []
    for name in ("ours.pt", "theirs.pt"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert archive.testzip() is None
            found.append(
                {
                    e.filename: (e.flag_bits, e.compress_type, e.file_size, e.CRC)
                    for e in archive.infolist()
                }
            )
    ours, theirs = found
    del theirs["archive/.data/serialization_id"]  # for torch's own statistics
    sizes = [
        one.pop("archive/data.pkl")[2] for one in found
    ]  # texts that come twice are written twice
    assert list(ours.items()) == list(theirs.items())
    assert sizes[0] < 1.2 * sizes[1]


@pytest.mark.usefixtures("every_place_checked")
@pytest.mark.parametrize("n_bytes", [2**32 - 2, 2**32 - 1, 2**32, 2**32 + 2**20])
def test_more_than_four_gigabytes(tmp_path, n_bytes):
    """What 32 bits do not hold, of sizes and of places; the file is one hole."""
    path = tmp_path / "a.pt"
    after = np.arange(7.0)
    whole = {"patterns": Hole((n_bytes,), np.dtype("u1")), "after": after}
    with open(path, "wb") as file:
        first = write_archive(file, whole, 0x1234567)
        file.seek(first + n_bytes - 1)
        file.write(b"\7")
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert (loaded["patterns"].shape, int(loaded["patterns"][-1])) == ((n_bytes,), 7)
    np.testing.assert_array_equal(loaded["after"].numpy(), after)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").CRC == 0x1234567
        assert np.frombuffer(archive.read("archive/data/1")).tolist() == after.tolist()


def test_a_type_that_torch_lacks():
    with pytest.raises(ConfigError, match=r"torch has no type for datetime64\[s\]"):
        write_archive(io.BytesIO(), {"when": np.zeros(3, "M8[s]")}, 0)


def test_an_export_does_without_torch(tmp_path):
    script = f"""
import sys; sys.modules["torch"] = None
import numpy as np, xarray as xr, stem_dask as sd
patterns = xr.DataArray(np.ones((2, 3, 8, 8), "u2"), dims=("scan_y", "scan_x", "ky", "kx"))
sd.export(patterns, {str(tmp_path / "a.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert int(torch.load(tmp_path / "a.pt")["patterns"].sum()) == 384
