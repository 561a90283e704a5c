"""Opening a file takes memory that does not grow with it: of every family, 1,024 patterns against 65,536."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from frames_made import GUID, PIX, PLACE, blo, empad, mib, mrc, seq, tiff, tvips

from stem_dask.readers.formats import READERS
from stem_dask.readers.open import find
from stem_dask.readers.rsciio import SUFFIXES
from stem_dask.writers.synthetic import write_dm4

DETECTOR = (8, 8)
ONE = np.zeros((1, *DETECTOR), "u2")


def grown(path: Path, n_bytes: int) -> Path:
    """With a hole at its end."""
    os.truncate(path, n_bytes)
    return path


def made_npy(path: Path, n: int) -> Path:
    np.lib.format.open_memmap(path, "w+", np.uint16, (n, n, *DETECTOR))
    return path


def made_dm4(path: Path, n: int) -> Path:
    rows = (np.zeros((n, *DETECTOR), "u1") for _ in range(n))
    return write_dm4(path, rows, (n, n), DETECTOR, "uint8")


def made_hdf5(path: Path, n: int) -> Path:
    with h5py.File(path, "w") as file:
        name = "Experiments/a/data" if path.suffix == ".hspy" else "a/data"
        file.create_dataset(name, (n, n, *DETECTOR), "u2", chunks=(1, n, *DETECTOR))
    return path


def made_app5(path: Path, n: int) -> Path:
    """Every pattern is two datasets, which take time to make: 16 to 1,024 of them."""
    n //= 8
    with h5py.File(path, "w") as file:
        file["Metadata"] = b""
        for i in range(n * n):
            place = PLACE.format(scale=1, x=i % n, y=i // n)
            file[f"{GUID}/{i}/Data"] = ONE[0]
            file[f"{GUID}/{i}/Metadata"] = place.encode()
    return path


def made_zarr(path: Path, n: int) -> Path:
    options: dict[str, Any] = {"zarr_format": 2} if path.suffix == ".zspy" else {}
    shape, chunks = (n, n, *DETECTOR), (1, 32, *DETECTOR)
    zarr.create_array(str(path), shape=shape, chunks=chunks, dtype="u2", **options)
    return path


def made_pt(path: Path, n: int) -> Path:
    import torch

    torch.save(torch.zeros((n, n, *DETECTOR), dtype=torch.uint8), path)
    return path


def made_tif(path: Path, n: int) -> Path:
    """All pages have directories of their own: 64 and 4,096 of them."""
    n //= 4
    return tiff(path, np.zeros((n * n, 4, 4), "u1"))


def made_tiff(path: Path, n: int) -> Path:
    text = f"ImageJ=1.5\nimages={n * n}\n"
    return grown(tiff(path, ONE, description=text), 1000 + n * n * ONE.nbytes)


def made_xml(path: Path, n: int) -> Path:
    empad(path.parent, PIX.replace(">4<", f">{n}<").replace(">3<", f">{n}<"), n=1)
    grown(path.parent / "scan_x4_y3.raw", n * n * 130 * 128 * 4)
    return next(path.parent.glob("*.xml"))


def made_raw(path: Path, n: int) -> Path:
    path.touch()
    return grown(path, n * n * ONE.nbytes)


def made_mib(path: Path, n: int) -> Path:
    return grown(mib(path, ONE), n * n * (384 + ONE.nbytes))


def made_blo(path: Path, n: int) -> Path:
    return grown(blo(path, ONE[None], nx=n, ny=n), 0x1010 + n * n * (6 + 64))


def made_mrc(path: Path, n: int) -> Path:
    return grown(mrc(path, ONE, x8=("I", n * n)), 1024 + n * n * ONE.nbytes)


def made_seq(path: Path, n: int) -> Path:
    return grown(seq(path, ONE, frames=0), 8192 + n * n * (32 + ONE.nbytes))


def made_tvips(path: Path, n: int) -> Path:
    return grown(tvips(path, ONE), 256 + n * n * (60 + ONE.nbytes))


def made_npz(path: Path, n: int) -> Path:
    with path.open("wb") as file:
        np.savez(file, np.zeros((n, n, *ONE.shape), ONE.dtype))
    return path


MADE: dict[str, Callable[[Path, int], Path]] = {
    ".dm4": made_dm4, ".npy": made_npy, ".npz": made_npz, ".hspy": made_hdf5, ".hdf5": made_hdf5, ".h5": made_hdf5, ".emd": made_hdf5, ".nxs": made_hdf5,
    ".zarr": made_zarr, ".zspy": made_zarr, ".pt": made_pt, ".mib": made_mib, ".blo": made_blo, ".mrc": made_mrc,
    ".xml": made_xml, ".tvips": made_tvips, ".seq": made_seq, ".app5": made_app5, ".tif": made_tif, ".tiff": made_tiff, ".raw": made_raw,
}  # fmt: skip


def peak_of_opening(path: Path, **options: Any) -> int:
    tracemalloc.start()
    try:
        find(path, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_every_family_is_measured() -> None:
    # the readers of .dm4, .h5 and .npz read these, too
    same = {".dm3", ".nxs", ".nhdf", ".ndata", ".ndata1", ".zip"}
    assert {*MADE, *same, *SUFFIXES} == {*READERS}


@pytest.mark.parametrize("suffix", MADE)
def test_opening_takes_memory_that_does_not_grow(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for n in (32, 256):
        folder = tmp_path / str(n)
        folder.mkdir()
        path = MADE[suffix](folder / f"a{suffix}", n)
        options: dict[str, Any] = {}
        if suffix in (".mib", ".mrc", ".tvips", ".seq", ".tiff"):
            options = {"scan_shape": (n, n)}
        if suffix == ".tif":
            options = {"scan_shape": (n // 4, n // 4)}
        if suffix == ".raw":
            options = {"shape": (n, n, *DETECTOR), "dtype": "u2"}
        find(path, **options)  # what is imported then is not of the file
        peaks.append(peak_of_opening(path, **options))
    assert peaks[1] < peaks[0] + 2**20


def resident() -> tuple[int, int]:
    """Memory of this process in bytes: now, and at most since it was last forgotten."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        pytest.skip("this system does not tell")
    known = {line.split(":")[0]: line.split() for line in lines}
    return int(known["VmRSS"][1]) * 1024, int(known["VmHWM"][1]) * 1024


def test_the_older_order_maps_little_of_the_file(tmp_path: Path) -> None:
    """Every scan row has elements all over the file, and mapped pages are memory of the worker."""
    size = (64, 64, 64, 128)
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, size)[...] = 1  # 32 MiB
    source = find(tmp_path / "a.npy", scan_order="detector_first").source
    part = (slice(5, 6), slice(0, 128), slice(None), slice(None))
    source[part]
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not forget")
    before, _ = resident()
    block = source[part]
    assert block.nbytes == 2**19
    assert int(block.sum()) == 2**19
    assert resident()[1] - before < 8 * 2**20
