"""The beam behind a beam stop: the center of symmetry of the patterns at places of the scan, and a smooth surface through them.

There is no center of each pattern under a stop: every pattern gets the surface.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block
from stem_dask.core.errors import ConfigError
from stem_dask.core.patterns import blocks_of, lead_shape
from stem_dask.kernels.intensity import Intensity, native, native_dtype
from stem_dask.kernels.symmetry import center_of_symmetry
from stem_dask.stages.blocks import reduced, sample_positions
from stem_dask.stages.survey import Survey

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

#: places of a scan at most; their surroundings are 3 x 3 positions
PLACES, SIDE = 1024, 3


def places_of(scan_shape: Sequence[int]) -> list[list[int]]:
    """Indices of the places along both scan axes."""
    return sample_positions(scan_shape, PLACES)


def surroundings(scan_shape: Sequence[int]) -> list[NDArray[np.int64]]:
    """For both scan axes the three indices (places, 3) about each place; an edge of the scan counts twice."""
    return [
        np.clip(np.array(where)[:, None] + np.array([-1, 0, 1]), 0, n - 1)
        for where, n in zip(places_of(scan_shape), scan_shape, strict=True)
    ]


def symmetric_blocks(around: xr.DataArray, survey: Survey) -> da.Array:
    """Lazy centers of symmetry (1, n, 2), float64, of blocks of `surroundings`: 3 rows and 3 n columns of patterns each."""
    how = {"near": survey.start, "good": survey.good, "threshold": survey.threshold}
    return reduced(_Symmetric, blocks_of(around), **how)


class _Symmetric:
    """Reducer: the center of symmetry of the mean of each 3 x 3 patterns."""

    def __init__(
        self,
        block: NDArray | Block,
        near: tuple[float, float],
        good: NDArray[np.bool_] | None,
        threshold: float,
    ) -> None:
        self.lead, detector = block.shape[:2], (block.shape[-2], block.shape[-1])
        self.near, self.good = near, good
        self.intensity = Intensity(detector, native_dtype(block.dtype), threshold)
        self.sums = np.zeros((self.lead[1] // SIDE, *detector))

    def add(self, piece: NDArray, here: slice) -> None:
        place = np.arange(here.start, here.stop) % self.lead[1] // SIDE
        done = 0
        for some in self.intensity.parts(native(piece), max(1, len(piece))):
            for i, pattern in zip(place[done:], some, strict=False):
                self.sums[i] += pattern
            done += len(some)

    def result(self) -> dict[str, NDArray]:
        found = [center_of_symmetry(one, self.near, self.good) for one in self.sums]
        return {"symmetric": np.array(found, np.float64).reshape(1, -1, 2)}


def symmetric_centers(patterns: xr.DataArray, survey: Survey) -> NDArray[np.float64]:
    """Centers (y places, x places, 2) in lazy patterns, of which only the surroundings of the places are read."""
    import dask

    rows, columns = (one.ravel().tolist() for one in surroundings(lead_shape(patterns)))
    picked = [[patterns.data[y, x] for x in columns] for y in rows]
    out = []
    for y in range(0, len(rows), SIDE):
        loaded = dask.compute(*itertools.chain.from_iterable(picked[y : y + SIDE]))
        block = np.stack([np.asarray(one) for one in loaded])
        reducer = _Symmetric(
            block.reshape(SIDE, len(columns), *block.shape[1:]),
            survey.start,
            survey.good,
            survey.threshold,
        )
        reducer.add(block, slice(0, len(block)))
        out.append(reducer.result()["symmetric"][0])
    return np.stack(out)


def check_scan(lead: Sequence[int]) -> None:
    """Raise ConfigError for a list of patterns."""
    if len(lead) != 2:
        raise ConfigError(
            f"center_method is friedel, and the input is a list of {prod(lead):,} patterns; it needs a scan: give input.scan_shape, "
            "or use analyze.center_method=manual"
        )
