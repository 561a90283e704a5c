"""HDF5 files that cannot be locked, or are open for writing elsewhere: they are read, and the notes say how."""

import multiprocessing
import os
import shutil
import subprocess
import sys

import h5py
import pytest
from frames_made import agrees, numbers

from stem_dask.core.errors import SourceError
from stem_dask.readers.containers import hdf5_file
from stem_dask.readers.open import find

NO_FLOCK = """
#include <errno.h>
#include <stdlib.h>
#include <sys/file.h>
int flock(int fd, int op) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""


def hold_open(path, libver, ready, done):
    with h5py.File(path, "a", libver=libver):
        ready.set()
        done.wait(60)


@pytest.fixture
def held(tmp_path):
    """Opens a file for writing in another process; gives its path."""
    stops = []

    def hold(libver=None):
        path = tmp_path / "a.h5"
        with h5py.File(path, "w", libver=libver) as file:
            file["data"] = numbers()
        context = multiprocessing.get_context("spawn")
        ready, done = context.Event(), context.Event()
        process = context.Process(target=hold_open, args=(str(path), libver, ready, done))
        process.start()
        stops.append((process, done))
        assert ready.wait(60)
        return path

    yield hold
    for process, done in stops:
        done.set()
        process.join()


@pytest.mark.parametrize("libver", [None, "latest"])
def test_a_file_that_is_open_for_writing_elsewhere(held, libver):
    found = find(held(libver))
    agrees(found, numbers())
    assert any("open for writing in another program" in note for note in found.info.notes)
    assert not any("damaged" in note for note in found.info.notes)


def test_a_file_that_is_open_for_writing_and_cannot_be_read(held):
    path = held()
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(SourceError, match=r"a\.h5: open for writing in another program, in a state") as caught:  # fmt: skip
        find(path)
    assert "copy it again" not in str(caught.value)


def test_a_file_that_the_same_process_has_open(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = numbers()
    with h5py.File(tmp_path / "a.h5", "r"):
        found = find(tmp_path / "a.h5")
        agrees(found, numbers())
    assert found.info.notes == ()


def test_a_file_system_without_locks(tmp_path):
    """Inputs are read and outputs are written there."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to make a flock that fails")
    (tmp_path / "lock.c").write_text(NO_FLOCK)
    make = ["gcc", "-shared", "-fPIC", "-o", "lock.so", "lock.c"]
    subprocess.run(make, check=True, cwd=tmp_path)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = numbers()
    code = (
        "from stem_dask.readers.open import find; from stem_dask.writers.hdf5 import Hdf5Sink\n"
        "from stem_dask.core.formats import Output; import numpy as np\n"
        "found = find('a.h5'); print(found.info.notes)\n"
        "array = found.source[(slice(None),) * 4]\n"
        "sink = Hdf5Sink(Output('./b.h5', array.shape, np.dtype('u2'), array.shape, spool='spool'))\n"
        "sink.create(resume=False)\n"
        "extra = sink.write(0, tuple(slice(0, n) for n in array.shape[:2]), {'patterns': array})\n"
        "from stem_dask.core.model import Record\n"
        "sink.finish([Record(0, 0.0, 0, 0, extra)])\n"
    )
    for number in (37, 38):  # of NFS without lockd, of Lustre
        there = {**os.environ, "LD_PRELOAD": str(tmp_path / "lock.so"), "FLOCK_ERRNO": str(number)}
        done = subprocess.run([sys.executable, "-c", code], env=there, cwd=tmp_path, capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert number == 38 or "the file system has no locks" in done.stdout
        agrees(find(tmp_path / "b.h5"), numbers())


def test_what_is_no_hdf5_file_stays_an_error(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(1000))
    with pytest.raises(OSError), hdf5_file(str(tmp_path / "a.h5")):  # noqa: PT011
        pass
