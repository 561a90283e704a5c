"""Check that two outputs of a row are equal; without this, speeds cannot be compared."""

from collections.abc import Iterator
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


def batches(patterns: Any) -> Iterator[NDArray]:
    """All patterns as arrays (m, ky, kx), in scan order."""
    if len(patterns.shape) == 3:
        for start in range(0, patterns.shape[0], TOGETHER):
            yield np.asarray(patterns[start : start + TOGETHER])
        return
    for y in range(patterns.shape[0]):
        row = np.asarray(patterns[y])
        for start in range(0, len(row), TOGETHER):
            yield row[start : start + TOGETHER]


def sample(path: Path, n_bytes: int) -> NDArray:
    """(n, ky, kx) from the middle of an output."""
    patterns = patterns_of(path)
    many = max(
        1, n_bytes // (np.dtype(patterns.dtype).itemsize * int(np.prod(patterns.shape[-2:])))
    )
    middle = patterns.shape[0] // 2
    if len(patterns.shape) == 3:
        return np.asarray(patterns[middle : middle + many])
    rows = max(1, many // patterns.shape[1])
    part = np.asarray(patterns[middle : middle + rows])
    return part.reshape(-1, *part.shape[-2:])[:many]


def check_patterns(reference: Path, other: Path) -> None:
    """Compare all patterns: counts exactly, floats to rounding.

    Raises
    ------
    SystemExit
        If they differ, with the first difference.
    """
    pairs = zip(_regular(patterns_of(reference)), _regular(patterns_of(other)), strict=True)
    begin = 0
    for a, b in pairs:
        slack = FLOAT_SLACK if a.dtype.kind == "f" else 0.0
        if a.shape != b.shape or not np.allclose(a, b, rtol=slack, atol=0):
            raise SystemExit(f"{other} differs from {reference} at pattern {begin} or soon after")
        begin += len(a)


def _regular(patterns: Any) -> Iterator[NDArray]:
    """Batches of equal size, whatever the shape of the scan."""
    held: list[NDArray] = []
    for batch in batches(patterns):
        held.append(batch)
        if sum(map(len, held)) >= TOGETHER:
            joined = np.concatenate(held)
            yield joined[:TOGETHER]
            held = [joined[TOGETHER:]]
    if held and sum(map(len, held)):
        yield np.concatenate(held)


def check_analysis(reference: Path, found: Path) -> None:
    """Compare centers to rounding, radii exactly.

    Parameters
    ----------
    reference : a store with the group ``analysis``
    found : .npz with ``center`` (n, 2) and ``radius`` (n,)

    Raises
    ------
    SystemExit
        If they differ.
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
