"""The intensity in windows, and blocks that are cropped, downsampled and summed on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, Deferred, pieces
from stem_dask.core.errors import ConfigError
from stem_dask.kernels.crop import window_intensity
from stem_dask.kernels.downsample import result_dtype
from stem_dask.kernels.gpu.crop import cutting


class Inside:
    """Reducer: the intensity in each window of a block, as an array of this name.

    Values below ``threshold`` and the pixels ``bad`` [y, x] of the detector count as 0, and ``pedestal`` is subtracted from the others;
    ``origins`` are the first row and column of each window.
    """

    def __init__(
        self,
        block: NDArray | Block,
        *origins: NDArray,
        name: str,
        threshold: float = 0.0,
        pedestal: float = 0.0,
        bad: NDArray[np.int64] | None = None,
    ) -> None:
        self.lead, self.name, self.shape = block.shape[:-2], name, block.shape[-2:]
        self.threshold, self.pedestal, self.bad = threshold, pedestal, bad
        self.origins = [origin.ravel() for origin in origins]
        self.found = np.empty(prod(self.lead))

    @property
    def is_plain(self) -> bool:
        """Whether only a threshold decides what counts."""
        return not self.pedestal and self.bad is None

    def add(self, piece: NDArray, here: slice) -> None:
        if self.bad is not None:
            piece = piece.copy()
            y, x = (
                bad - origin[here, None]
                for bad, origin in zip(self.bad.T, self.origins, strict=True)
            )
            inside = (y >= 0) & (y < self.shape[0]) & (x >= 0) & (x < self.shape[1])
            piece[np.nonzero(inside)[0], y[inside], x[inside]] = 0
        how = {"threshold": self.threshold, "pedestal": self.pedestal}
        self.found[here] = window_intensity(piece, **how)

    def result(self) -> dict[str, NDArray]:
        return {self.name: self.found.reshape(self.lead)}


class CutOnGpu(Block):
    """A block of windows of another block in host memory, whose patterns are copied to the GPU once.

    Origins are in the order of the patterns; values below the threshold are ignored for the intensity in a window.
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
        #: reductions of the intensities in the windows, which do not need the windows themselves
        self.counted: list[Deferred] = []

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

    def defer(self, deferred: Deferred) -> None:
        reducer = deferred.reducer()
        counts = (
            isinstance(reducer, Inside) and reducer.is_plain and reducer.threshold == self.threshold
        )
        (self.counted if counts and not self.how else self.deferred).append(deferred)

    def _pieces(self) -> Iterator[NDArray]:
        line = [self] if self.before is None else [self, self.before]
        running: list[tuple[Deferred, Any]]
        running = [(deferred, deferred.reducer()) for cut in line for deferred in cut.counted]
        detector, done = (self.block.shape[-2], self.block.shape[-1]), 0
        try:
            ring = cutting(
                prod(self.shape[:-2]), detector, self.block.dtype, *self.window, threshold=self.threshold, **self.how
            )  # fmt: skip
        except ValueError as error:  # a part of CUDA is missing
            raise ConfigError(str(error)) from error
        for small, inside in ring.through(pieces(self.block)):
            for _, reducer in running:
                reducer.found[done : done + len(inside)] = inside
            done += len(inside)
            yield small
        for deferred, reducer in running:
            deferred.note(reducer)
        for cut in line:
            cut.counted.clear()
