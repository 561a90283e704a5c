"""A ring of buffers through which patterns reach the GPU, so that copies and kernels overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from stem_dask.kernels.gpu.code import stored
from stem_dask.kernels.gpu.device import refuse_missing_gpu, translate_full_gpu

#: bytes of patterns in one buffer, enough for full speed of bus and kernels
SLOT_BYTES = 16 * 2**20

#: unused streams, kept because cupy pools memory per stream
_idle: list[Any] = []

#: shape and type of each array in a shared buffer
Fields = Sequence[tuple[tuple[int, ...], Any]]


class Work(Protocol):
    """Computation for the patterns of one slot."""

    on_gpu: list[Any]
    in_host: list[NDArray]

    def launch(self, patterns: Any, here: slice) -> None:
        """Queue kernels for patterns on the GPU (n, ky, kx), whose slice is ``here``; results go into the shared buffer."""

    def finish(self, patterns: NDArray, here: slice) -> Any:
        """Result, after the stream is synchronized; ``patterns`` are in host memory."""


class Slot:
    """Patterns in pinned memory and on the GPU, and a stream."""

    @translate_full_gpu
    def __init__(
        self, shape: tuple[int, int, int], dtype: np.dtype, work: Callable[[int], Work]
    ) -> None:
        import cupy
        import cupyx

        try:  # not a look first: several threads take them
            self.stream = _idle.pop()
        except IndexError:
            self.stream = cupy.cuda.Stream(non_blocking=True)
        self.host: NDArray = cupyx.empty_pinned(shape, dtype)
        with self.stream:
            self.device = cupy.empty(shape, dtype)
            self.work = work(shape[0])
        self.here = slice(0, 0)
        self.busy = False

    @translate_full_gpu
    def start(self) -> None:
        """Queue copies and kernels; returns immediately."""
        n = self.here.stop - self.here.start
        with self.stream:
            self.device[:n].set(self.host[:n], stream=self.stream)
            self.work.launch(self.device[:n], self.here)
            self.work.on_gpu[0].get(stream=self.stream, out=self.work.in_host[0], blocking=False)
        self.busy = True

    def finish(self) -> Any:
        """Wait for the result."""
        self.stream.synchronize()
        here, self.here, self.busy = self.here, slice(0, 0), False
        return self.work.finish(self.host[: here.stop - here.start], here)


class Ring:
    """Passes n patterns (detector, dtype in any byte order) through a `Work`; results come in order.

    ``work`` makes the `Work` of a slot for so many patterns; a slot has up to ``slot_bytes`` of patterns, and one at least.
    Raises ValueError when there is no GPU.
    """

    def __init__(
        self,
        n: int,
        detector: tuple[int, int],
        dtype: np.dtype,
        work: Callable[[int], Work],
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        refuse_missing_gpu()
        dtype = stored(dtype)
        self.size, slots = slots_of(n, detector, dtype, slot_bytes)
        self.slots: list[Slot] = []
        for _ in range(
            slots
        ):  # if there is no room for the second, the stream of the first goes back
            self.slots.append(Slot((self.size, *detector), dtype, work))
        self.current = self.taken = 0

    def __del__(self) -> None:
        for slot in getattr(self, "slots", ()):
            slot.stream.synchronize()  # its memory may be another's from now on
            _idle.append(slot.stream)

    def add(self, piece: NDArray) -> Iterator[Any]:
        """Take the next patterns (n, ky, kx); yields results of earlier ones, valid until the next is requested."""
        if piece.dtype == np.bool_:
            piece = piece.view(np.uint8)
        while len(piece):
            slot = self.slots[self.current]
            if slot.busy:
                yield slot.finish()
            begun = slot.here.stop - slot.here.start
            some = piece[: self.size - begun]
            np.copyto(slot.host[begun : begun + len(some)], some)
            self.taken += len(some)
            slot.here = slice(self.taken - len(some) - begun, self.taken)
            piece = piece[len(some) :]
            if begun + len(some) == self.size:
                self._start(slot)

    def rest(self) -> Iterator[Any]:
        """Yield the remaining results."""
        slot = self.slots[self.current]
        if not slot.busy and slot.here.stop > slot.here.start:
            self._start(slot)
        for k in range(len(self.slots)):
            slot = self.slots[(self.current + k) % len(self.slots)]
            if slot.busy:
                yield slot.finish()

    def through(self, pieces: Iterable[NDArray]) -> Iterator[Any]:
        """Yield the results of all patterns."""
        for piece in pieces:
            yield from self.add(piece)
        yield from self.rest()

    def _start(self, slot: Slot) -> None:
        slot.start()
        self.current = (self.current + 1) % len(self.slots)


def slots_of(
    n: int, detector: tuple[int, int], dtype: np.dtype, slot_bytes: int = SLOT_BYTES
) -> tuple[int, int]:
    """Patterns that a slot of a `Ring` for n patterns holds, and how many slots it has."""
    size = max(1, min(n, slot_bytes // (prod(detector) * dtype.itemsize)))
    # one is filled while the other is processed
    return size, min(2, -(-max(1, n) // size))


class Taken(NamedTuple):
    """Bytes of memory: on the GPU, and pinned in the host."""

    on_gpu: int
    in_host: int


def taken(slots: int, patterns: int, found: int, more: int, pinned: int = 0) -> Taken:
    """What a `Ring` takes: bytes of a slot's patterns, of what comes back, and of what else it has on the GPU, and pinned."""
    on_gpu = slots * (patterns + found + more + 8 * 512)  # cupy rounds
    # cupy rounds pinned sizes up to powers of two, and keeps those of smaller blocks in its pool: at most as much again
    in_host = sum(1 << max(9, (size - 1).bit_length()) for size in (patterns, found, pinned))
    return Taken(on_gpu, 2 * slots * in_host)


def _places(fields: Fields) -> tuple[list[slice], int]:
    """Bytes of each array in a shared buffer, aligned to 256, and of all."""
    places, end = [], 0
    for shape, dtype in fields:
        n = prod(shape) * np.dtype(dtype).itemsize
        places.append(slice(end, end + n))
        end += -(-n // 256) * 256
    return places, end


def buffer_bytes(fields: Fields) -> int:
    """Bytes of a `shared_buffer`."""
    return _places(fields)[1]


def shared_buffer(fields: Fields) -> tuple[list[Any], list[Any]]:
    """Arrays on the GPU and the same in pinned memory, one after another: what is found comes back in one copy.

    Of each side the whole buffer as bytes comes first, then the arrays in it.
    """
    import cupy
    import cupyx

    places, end = _places(fields)
    sides = []
    for buffer in (cupy.empty(max(1, end), np.uint8), cupyx.empty_pinned(max(1, end), np.uint8)):
        arrays = [
            buffer[place].view(dtype).reshape(shape)
            for place, (shape, dtype) in zip(places, fields, strict=True)
        ]
        sides.append([buffer, *arrays])
    return sides[0], sides[1]
