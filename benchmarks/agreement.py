"""Check that two outputs of a row are equal; without this, speeds cannot be compared."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: patterns compared at once
TOGETHER = 256
#: centroids are float64 of exact sums; means of four counts are rounded to float32 once or twice
CENTER_SLACK, FLOAT_SLACK = 1e-9, 1e-6


def patterns_of(path: Path) -> Any:
    """The array (n, ky, kx) or (scan_y, scan_x, ky, kx) in an output."""
    if path.suffix == ".zarr":
        import zarr

        return zarr.open_array(f"{path}/patterns", mode="r")
    if path.suffix == ".hspy":
        import h5py
        import hdf5plugin  # noqa: F401  registers blosc with HDF5

        (experiment,) = h5py.File(path, "r")["Experiments"].values()
        return experiment["data"]
    if path.suffix == ".zspy":
        import zarr

        (experiment,) = dict(zarr.open_group(str(path), mode="r")["Experiments"].groups()).values()
        return experiment["data"]
    import torch

    return torch.load(path, weights_only=True, mmap=True).numpy()[:, 0]


def part_of(patterns: Any, start: int, stop: int) -> NDArray:
    """Patterns (n, ky, kx) by number in scan order."""
    if len(patterns.shape) == 3:
        return np.asarray(patterns[start:stop])
    width = patterns.shape[1]
    first = start // width
    rows = np.asarray(patterns[first : -(-stop // width)])
    return rows.reshape(-1, *rows.shape[-2:])[start - first * width : stop - first * width]


def sample(path: Path, n_bytes: int) -> NDArray:
    """(n, ky, kx) from the middle of an output."""
    patterns = patterns_of(path)
    pattern_bytes = np.dtype(patterns.dtype).itemsize * math.prod(patterns.shape[-2:])
    middle = math.prod(patterns.shape[:-2]) // 2
    return part_of(patterns, middle, middle + max(1, n_bytes // pattern_bytes))


def check_patterns(reference: Path, other: Path) -> None:
    """Compare all patterns: counts exactly, floats to rounding; exits if they differ."""
    ours, theirs = patterns_of(reference), patterns_of(other)
    n = math.prod(ours.shape[:-2])
    same = n == math.prod(theirs.shape[:-2])
    slack = FLOAT_SLACK if ours.dtype.kind == "f" else 0.0
    for start in range(0, n, TOGETHER):
        a, b = (part_of(array, start, min(start + TOGETHER, n)) for array in (ours, theirs))
        if not same or a.shape != b.shape or not np.allclose(a, b, rtol=slack, atol=0):
            raise SystemExit(f"{other} differs from {reference} at pattern {start} or soon after")


def check_analysis(reference: Path, found: Path) -> None:
    """Compare centers to rounding, radii exactly; exits if they differ.

    ``reference`` is a store with the group ``analysis``, ``found`` a .npz with ``center`` (n, 2) and ``radius`` (n,).
    """
    import zarr

    analysis = zarr.open_group(f"{reference}/analysis", mode="r")
    center = np.stack([np.ravel(analysis[f"center_{axis}"][...]) for axis in "yx"], 1)
    radius = np.ravel(analysis["radius"][...])
    theirs = np.load(found)
    off = np.abs(theirs["center"] - center).max()
    if off > CENTER_SLACK * max(center.max(), 1):
        raise SystemExit(f"{found}: centers differ by up to {off:g} pixels")
    if not np.array_equal(theirs["radius"], radius):
        n = int((theirs["radius"] != radius).sum())
        raise SystemExit(f"{found}: {n:,} of {len(radius):,} radii differ")
