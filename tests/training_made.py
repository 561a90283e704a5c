"""The same patterns as a file of each format that a dataset for training reads."""

import warnings
from pathlib import Path
from typing import Any

import frames_made
import h5py
import hdf5plugin
import numpy as np
import xarray as xr
import zarr

import stem_dask as sd

#: every type that detectors and programs store
DTYPES = ("?", "u1", "i1", "i2", "u2", ">u2", "u4", "i4", "u8", "i8", "f2", "f4", ">f4", "f8")


def counts(lead: tuple[int, ...] = (7, 11), shape: tuple[int, int] = (16, 12), dtype: str = "u2", seed: int = 0) -> Any:  # fmt: skip
    """Patterns of which no two are alike and none is empty."""
    rng, kind = np.random.default_rng(seed), np.dtype(dtype).kind
    data = rng.poisson(rng.uniform(0.2, 6, (*lead, 1, 1)), (*lead, *shape)).clip(0, 100)
    data[..., 0, 0] = 1
    return (data * 0.37).astype(dtype) if kind == "f" else data.astype(dtype)


def labelled(data: Any) -> xr.DataArray:
    names = ("scan_y", "scan_x", "ky", "kx") if data.ndim == 4 else ("pattern", "ky", "kx")
    return xr.DataArray(data, dims=names)


def exported(name: str, **options: Any) -> Any:
    def write(folder: Path, data: Any) -> Path:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*requires hdf5plugin")
            sd.export(labelled(data), folder / name, **options)
        return folder / name

    return write


def run_of(folder: Path, data: Any, name: str = "run.zarr", **sections: Any) -> Path:
    """A store that `stem-dask run` wrote, with the patterns as they are and several shards."""
    from stem_dask.config.load import parse_config
    from stem_dask.job.run import run

    np.save(folder / f"{name}.npy", data)
    mb = 2 * data.shape[1] * data[0, 0].nbytes / 2**20  # two rows of the scan in a shard
    options = {"input": {"path": str(folder / f"{name}.npy")}, "crop": {"enabled": False},
               "output": {"path": str(folder / name), "export": [], "figure": False, "chunk_mb": mb},
               "cluster": {"kind": "threads", "threads_per_worker": 2}} | sections  # fmt: skip
    run(parse_config(options))
    return folder / name


def hdf5(**options: Any) -> Any:
    def write(folder: Path, data: Any) -> Path:
        with h5py.File(folder / "other.h5", "w") as file:
            file.create_dataset("data", data=data, **options)
        return folder / "other.h5"

    return write


def npy(folder: Path, data: Any) -> Path:
    np.save(folder / "scan.npy", data)
    return folder / "scan.npy"


def zarr_of_others(folder: Path, data: Any, **options: Any) -> Path:
    how = {"chunks": (3, 4, *data.shape[2:])} | options
    zarr.create_array(str(folder / "other.zarr"), data=data, **how)
    return folder / "other.zarr"


def split_in_patterns(folder: Path, data: Any) -> Path:
    return zarr_of_others(folder, data, chunks=(2, 5, 8, 7))


def fortran(folder: Path, data: Any) -> Path:
    """The detector axes vary slowest in the file, the scan axes fastest."""
    np.save(folder / "turned.npy", np.asfortranarray(data))
    return folder / "turned.npy"


def detector_first(folder: Path, data: Any) -> Path:
    names = ("ky", "kx", "scan_y", "scan_x")
    turned = np.ascontiguousarray(data.transpose(2, 3, 0, 1))
    zarr.create_array(str(folder / "turned.zarr"), data=turned, dimension_names=names)
    return folder / "turned.zarr"


#: by name; .blo holds square patterns of uint8 only
FORMATS: dict[str, Any] = {
    "run": run_of,
    **{f"zarr {codec}": exported("c.zarr", codec=codec) for codec in ("lz4", "zstd", "gzip", "none")},
    "zspy": exported("s.zspy"),
    "hspy gzip": exported("g.hspy"),
    "hspy lz4": exported("l.hspy", codec="lz4"),
    "hspy none": exported("n.hspy", codec="none"),
    "h5": exported("s.h5"),
    "h5 zstd": exported("z.h5", codec="zstd"),
    "h5 contiguous": hdf5(),
    "h5 shuffle": hdf5(chunks=(3, 4, 16, 12), shuffle=True, compression="gzip"),
    "h5 fletcher32": hdf5(chunks=(3, 4, 16, 12), fletcher32=True),
    "h5 all": hdf5(chunks=(1, 4, 16, 12), fletcher32=True, shuffle=True, compression="gzip"),
    "h5 lzf": hdf5(chunks=(3, 4, 16, 12), compression="lzf"),
    "h5 bitshuffle": hdf5(chunks=(3, 4, 16, 12), **hdf5plugin.Bitshuffle()),
    "h5 blosc": hdf5(chunks=(3, 4, 16, 12), **hdf5plugin.Blosc(cname="zstd")),
    "h5 split": hdf5(chunks=(2, 5, 8, 7), compression="gzip"),
    "npy": npy,
    "npy fortran": fortran,
    "zarr of others": zarr_of_others,
    "zarr split": split_in_patterns,
    "zarr detector first": detector_first,
    "pt scan": exported("s.pt"),
    "pt nchw": exported("n.pt", layout="nchw"),
    "pt bare": exported("b.pt", layout="bare"),
    "mib": lambda folder, data: frames_made.mib(folder / "a.mib", data),
    "blo": lambda folder, data: frames_made.blo(folder / "a.blo", data[..., :12, :]),
}  # fmt: skip
