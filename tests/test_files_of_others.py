"""What files of other programs showed that ours did not: damage, single images, spectra, signs, archives."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
from frames_made import SHAPE, numbers

from stem_dask.io.read import find


def with_texts(path):
    """A file whose axes have texts of variable length as units, as py4DSTEM and emdfile write them."""
    with h5py.File(path, "w") as file:
        group = file.create_group("cube")
        group["data"] = numbers()
        for i, size in enumerate(SHAPE):
            group[f"dim{i}"] = np.arange(size) * 0.5
            group[f"dim{i}"].attrs["units"] = "A^-1"
            group[f"dim{i}"].attrs["name"] = f"axis {i}"
    return path


@pytest.mark.parametrize("zeros", [(16, 32), (64, 128), (16, 1024)], ids=str)
@pytest.mark.parametrize("ending", ["h5", "emd"])
def test_a_block_of_zeros_among_the_texts_of_hdf5_is_told(tmp_path, zeros, ending):
    path = with_texts(tmp_path / f"a.{ending}")
    content = bytearray(path.read_bytes())
    heap = content.find(b"GCOL")
    assert heap > 0
    content[heap + zeros[0] : heap + zeros[1]] = bytes(zeros[1] - zeros[0])
    path.write_bytes(content)
    # in a process of its own: HDF5 would walk on the spot, and no signal reaches Python then
    command = [sys.executable, "-m", "stem_dask.cli", "info", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3, done.stderr
    assert f"texts at byte {heap:,} have no end" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_texts_of_hdf5_are_read_as_before(tmp_path):
    found = find(with_texts(tmp_path / "a.h5"))
    assert [axis.units for axis in found.info.axes] == ["A^-1"] * 4
    np.testing.assert_array_equal(found.source[(slice(None),) * 4], numbers())
