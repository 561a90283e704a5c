"""`stem_dask.kernels.analysis` on a GPU: the same results and types; sums of floats have another order.

cupy is loaded when something is done, not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.analysis import PatternAnalysis, largest_radius, refuse_overflow
from stem_dask.kernels.gpu.buffers import (
    SLOT_BYTES,
    Fields,
    Ring,
    Taken,
    buffer_bytes,
    shared_buffer,
    slots_of,
    taken,
)
from stem_dask.kernels.gpu.code import (
    ANALYSIS_THREADS,
    BATCH,
    analysis_code,
    analysis_shared_bytes,
    compared,
    kernel,
    load_pixels,
    stored,
    wide,
)
from stem_dask.kernels.intensity import ODD_PIXELS, lowest_counted, native


class Analysis:
    """`stem_dask.kernels.analysis.Analysis` on the GPU: patterns come in pieces, from host memory.

    The last digits of float sums depend on ``slot_bytes``, see `stem_dask.kernels.gpu.buffers.Ring`. Raises ValueError when a
    pattern is too large for the shared memory of the GPU.
    """

    def __init__(
        self,
        n: int,
        detector: tuple[int, int],
        dtype: np.dtype,
        *,
        slot_bytes: int = SLOT_BYTES,
        **options: Any,
    ) -> None:
        self.works: list[AnalysisOfSlot] = []
        radii = largest_radius(*detector, options["metric"]) + 1
        self.found: list[Any] = [np.empty(shape, kind) for shape, kind in _fields(n, radii)]

        def work(size: int) -> AnalysisOfSlot:
            self.works.append(AnalysisOfSlot(size, detector, stored(dtype), radii, **options))
            return self.works[-1]

        self.ring = Ring(n, detector, dtype, work, slot_bytes)

    def add(self, piece: NDArray) -> None:
        """Analyze the next patterns, (n, ky, kx); raises OverflowError when the sums of one leave 64 bits."""
        self._keep(self.ring.add(piece))

    def result(self) -> PatternAnalysis:
        """What was found in all of them."""
        self._keep(self.ring.rest())
        total, com, center, radius, profile, odd, negative = self.found
        totals = np.add.reduce([work.total.get() for work in self.works])
        highest = np.maximum.reduce([work.highest.get() for work in self.works])
        return PatternAnalysis(
            total, com, center, radius, profile, totals, highest, odd.sum(axis=0, dtype=np.int64), float(negative.sum()),
            np.full(len(total), np.nan),
        )  # fmt: skip

    def _keep(self, done: Iterator[tuple[slice, list[NDArray]]]) -> None:
        for here, arrays in done:
            for all_of_them, values in zip(self.found, arrays, strict=True):
                all_of_them[here] = values[: here.stop - here.start]


class AnalysisOfSlot:
    """The analysis of the patterns of a slot, one time after another."""

    def __init__(
        self,
        size: int,
        detector: tuple[int, int],
        dtype: np.dtype,
        radii: int,
        *,
        target_retention: float,
        threshold: float,
        center: tuple[float, float] | None,
        metric: str,
    ) -> None:
        import cupy

        self.detector, self.pixels = detector, prod(detector)
        self.on_gpu, self.in_host = shared_buffer(_fields(size, radii))
        self.batch = min(size, BATCH)
        groups = -(-size // self.batch)
        kept, summed = compared(dtype), wide(dtype)
        self.sums = cupy.empty((groups, *detector), summed), cupy.empty((groups, *detector), kept)
        self.total, self.highest = cupy.zeros(detector, summed), cupy.zeros(detector, kept)
        y, x = (np.nan, np.nan) if center is None else center
        low, target = lowest_counted(kept, threshold), np.float64(target_retention)
        self.options = (low, np.float64(y), np.float64(x), target, np.int32(radii))
        vectors = self.pixels // load_pixels(dtype, detector[1])
        self.adders = -(-vectors // ANALYSIS_THREADS)
        self.shared = analysis_shared_bytes(dtype, detector, radii, ANALYSIS_THREADS)
        has = int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])
        if self.shared > has:
            raise ValueError(
                f"a detector of {detector[0]} x {detector[1]} pixels needs {self.shared} bytes of shared memory, and the GPU has "
                f"{has}; set device: cpu"
            )
        code = analysis_code(dtype, detector[1], threshold=threshold, metric=metric)
        self.analyze = kernel(code, "analyze", self.shared)
        self.fold = kernel(code, "fold")

    def launch(self, patterns: Any, here: slice) -> None:
        """Queue the kernels; what they find stays on the GPU."""
        n, (height, width) = here.stop - here.start, self.detector
        groups = -(-n // self.batch)
        sizes = (np.int64(n), np.int32(height), np.int32(width))
        shares = (np.int32(self.batch), np.int32(self.adders))
        arguments = (patterns, *sizes, *shares, *self.options, *self.on_gpu[1:], *self.sums)
        grid = (groups * (self.batch + self.adders),)
        self.analyze(grid, (ANALYSIS_THREADS,), arguments, shared_mem=self.shared)
        arguments = (*self.sums, np.int32(groups), np.int64(self.pixels), self.total, self.highest)
        self.fold((min(1024, -(-self.pixels // 256)),), (256,), arguments)

    def finish(self, patterns: NDArray, here: slice) -> tuple[slice, list[NDArray]]:
        """Place of the patterns and what was found of each, as the kernel's arrays."""
        arrays: list[NDArray] = self.in_host[1:]
        n = len(patterns)
        refuse_overflow(native(patterns), arrays[0][:n], arrays[3][:n], here.start)
        return here, arrays


def _fields(size: int, radii: int) -> Fields:
    """What the kernel finds of so many patterns, in the order of its arguments."""
    return [
        ((size,), "f8"),  # total
        ((size, 2), "f8"),  # center of mass
        ((size, 2), "f8"),  # center
        ((size,), "f4"),  # radius
        ((size, radii), "f4"),  # profile
        ((size, len(ODD_PIXELS)), "u4"),
        ((size,), "f8"),  # what negative values amounted to
    ]


def ring_bytes(n: int, detector: tuple[int, int], dtype: np.dtype, metric: str) -> Taken:
    """Memory that an `Analysis` of n patterns takes."""
    kept = stored(dtype)
    size, slots = slots_of(n, detector, kept)
    found = buffer_bytes(_fields(size, largest_radius(*detector, metric) + 1))
    # of each batch, and of all
    sums = (-(-size // BATCH) + 1) * prod(detector) * (8 + compared(kept).itemsize)
    return taken(slots, size * prod(detector) * kept.itemsize, found, sums)
