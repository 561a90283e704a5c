"""Blocks that are cropped, downsampled and summed on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, Deferred, Reducer, pieces
from stem_dask.core.errors import ConfigError
from stem_dask.kernels.downsample import result_dtype
from stem_dask.kernels.gpu.crop import Cutting


class IntensityReducer(Reducer, Protocol):
    """A reducer of the intensities in windows instead of the windows."""

    def note(self, inside: NDArray[np.float64]) -> None:
        """Take the intensities in the next windows, (n,)."""


class CutOnGpu(Block):
    """A block of windows of another block, whose patterns are copied to the GPU once.

    Parameters
    ----------
    block : (…, ky, kx), in host memory
    origin_y, origin_x : first row and column of each window, in the order of the patterns
    shape : (height, width) of the windows
    threshold : smaller values are ignored for the intensity in a window
    """

    def __init__(
        self,
        block: NDArray | Block,
        origin_y: NDArray,
        origin_x: NDArray,
        shape: tuple[int, int],
        threshold: float,
    ) -> None:
        super().__init__((*block.shape[:-2], *shape), block.dtype.newbyteorder("="))
        self.block, self.window = block, (origin_y, origin_x, shape)
        self.threshold = threshold
        self.how: dict[str, Any] = {}
        #: the windows before downsampling
        self.before: CutOnGpu | None = None
        #: reductions of the intensities in the windows
        self.counted: list[tuple[Deferred, Callable[[], IntensityReducer]]] = []

    @classmethod
    def whole(cls, block: NDArray | Block) -> CutOnGpu:
        """Whole patterns as windows."""
        origin = np.zeros(prod(block.shape[:-2]), np.int32)
        return cls(block, origin, origin, (block.shape[-2], block.shape[-1]), 0.0)

    def smaller(self, **how: Any) -> CutOnGpu:
        """Downsample the windows; see `stem_dask.kernels.downsample.downsample_patterns`."""
        if self.how:  # already downsampled and copied back
            return CutOnGpu.whole(self).smaller(**how)
        small = CutOnGpu(self.block, *self.window, self.threshold)
        factor, (height, width) = how["factor"], self.shape[-2:]
        small.shape = (*self.shape[:-2], height // factor, width // factor)
        small.dtype = result_dtype(self.dtype, factor, how["method"], how["reduce"])
        small.how, small.before = how, self
        return small

    def counts(self, threshold: float) -> bool:
        """Whether the intensity with this threshold is computed on the GPU."""
        return not self.how and threshold == self.threshold

    def intensities(self, reducer: Callable[[], IntensityReducer]) -> Deferred:
        """Deferred reduction of the intensities in the windows."""
        deferred = Deferred(self, reducer)
        self.deferred.remove(deferred)  # it does not need the windows themselves
        self.counted.append((deferred, reducer))
        return deferred

    def _pieces(self) -> Iterator[NDArray]:
        line = [self] if self.before is None else [self, self.before]
        asked = [(deferred, make()) for cut in line for deferred, make in cut.counted]
        for small, inside in self._passed():
            for _, reducer in asked:
                reducer.note(inside)
            yield small
        for deferred, reducer in asked:
            deferred.note(reducer)
        for cut in line:
            cut.counted.clear()

    def _passed(self) -> Iterator[tuple[NDArray, NDArray]]:
        n, detector = prod(self.shape[:-2]), (self.block.shape[-2], self.block.shape[-1])
        try:
            cutting = Cutting(
                n, detector, self.block.dtype, *self.window, threshold=self.threshold, **self.how
            )
        except ValueError as error:  # a part of CUDA is missing
            raise ConfigError(str(error)) from error
        for piece in pieces(self.block):
            yield from cutting.add(piece)
        yield from cutting.rest()
