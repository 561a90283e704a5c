"""A GPU that is none: as much of cupy as the package uses, on numpy, with kernels that g++ compiled (see emulated.py).

It counts what is copied and launched. What is queued on a stream is done as late as can be, when somebody waits for it: a
result that is used too early is not there, and what is written over too early arrives wrong.
"""

import math
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from types import ModuleType

import emulated
import numpy as np


class Array(np.ndarray):
    """An array on the GPU: numpy may not touch it but through `get`, `set` and cupy's own functions."""

    def set(self, values, stream=None):
        assert type(values) is np.ndarray
        assert values.dtype == self.dtype
        assert values.shape == self.shape
        counted["uploads"] += 1
        counted["bytes up"] += values.nbytes
        stream.later(lambda: np.copyto(self, values.view(Array)))

    def get(self, stream=None, out=None, blocking=True):
        counted["downloads"] += 1
        counted["bytes down"] += self.nbytes
        out = np.empty(self.shape, self.dtype) if out is None else out
        stream = stream or _current.__dict__.get("stream")
        if blocking:
            if stream is not None:
                stream.run()
            out[...] = self.view(np.ndarray)
        else:
            stream.later(lambda: np.copyto(out, self.view(np.ndarray)))
        return out

    def astype(self, *args, **options):
        """numpy's, and all that is calculated with it, at once: then what was queued before must be over."""
        _current.stream.run()
        return super().astype(*args, **options)


#: uploads, downloads, bytes up, bytes down, launches, compilations
counted: Counter[str] = Counter()
_current = threading.local()


class OutOfMemoryError(MemoryError):
    """With arguments that only cupy's own class can be made of again."""

    def __init__(self, size, total):
        super().__init__(
            f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes)."
        )


class CUDARuntimeError(RuntimeError):
    def __init__(self, status):
        self.status = status
        super().__init__("cudaErrorMemoryAllocation: out of memory" if status == 2 else "?")


class Pool:
    """Memory that is held by arrays, in steps of 512 bytes, the most that was, and how much there is."""

    def __init__(self, limit=math.inf):
        self.held = self.most = 0
        self.limit = limit
        self.lock = threading.RLock()  # arrays may end at any time

    def take(self, array):
        n = -(-array.nbytes // 512) * 512
        with self.lock:
            if self.held + n > self.limit:
                raise OutOfMemoryError(n, self.held)
            self.held += n
            self.most = max(self.most, self.held)
        weakref.finalize(array, self.give, n)

    def give(self, n):
        with self.lock:
            self.held -= n

    def total_bytes(self):
        return self.most

    def free_bytes(self):
        return self.most - self.held


class PinnedPool:
    """Memory of the host in powers of two, kept by its size for whoever wants the same; ``held`` never becomes less."""

    def __init__(self):
        self.held, self.free = 0, Counter[int]()

    def empty(self, shape, dtype=float):
        made = np.empty(shape, dtype)
        made.reshape(-1).view(np.uint8).fill(0x5A)  # what lay there before is not what shall come
        size = 1 << max(9, (made.nbytes - 1).bit_length())
        if self.free[size]:
            self.free[size] -= 1
        else:
            self.held += size
        weakref.finalize(made, self.free.update, {size: 1})
        return made


class Stream:
    """What is `queued` on it may still run until somebody waits for it; what is in `over` is through before what comes."""

    def __init__(self, non_blocking=False):
        assert non_blocking
        self.waiting: deque[Callable[[], object]] = deque()
        self.queued: set[object] = set()
        self.over: set[object] = set()

    def __enter__(self):
        _current.stream = self
        return self

    def __exit__(self, *error):
        _current.stream = None

    def later(self, work):
        self.waiting.append(work)

    def run(self):
        while self.waiting:
            self.waiting.popleft()()

    def synchronize(self):
        counted["waits"] += 1
        self.run()
        self.queued.clear()

    def record(self):
        return self.queued | self.over

    def wait_event(self, event):
        self.over |= event


def transform(name):
    """numpy's, with plans as cupy has them: a thread's, by size, whose memory two transforms must not use at once."""

    def run(patterns):
        stream, plans = _current.stream, _current.__dict__.setdefault("plans", {})
        work, by = plans.get((name, patterns.shape), (None, stream))
        assert by is stream or work in stream.over or work not in by.queued
        plans[name, patterns.shape] = this, _ = object(), stream
        stream.queued.add(this)
        counted["transforms"] += 1
        return getattr(np.fft, name)(patterns)

    return run


class Kernel:
    def __init__(self, library, name):
        self.library, self.name = library, name
        self.max_dynamic_shared_size_bytes = 0

    def __call__(self, grid, block, args, *, shared_mem=0):
        assert shared_mem <= max(48 * 1024, self.max_dynamic_shared_size_bytes)
        assert all(isinstance(a, (Array, np.generic)) for a in args), [type(a) for a in args]
        assert getattr(_current, "stream", None) is not None
        counted[f"launches of {self.name}"] += 1
        plain = [a.view(np.ndarray) if isinstance(a, Array) else a for a in args]
        _current.stream.later(
            lambda: emulated.launch(self.library, self.name, grid[0], block[0], plain)
        )


class RawModule:
    def __init__(self, *, code, options):
        counted["compilations"] += 1
        defines = tuple(option[2:] for option in options if option.startswith("-D"))
        self.library = emulated.compiled(code, defines)

    def get_function(self, name):
        return Kernel(self.library, name)


def _module(name, **content):
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


def install(monkeypatch, n_devices=1):
    """Have ``import cupy`` find this one; returns what is counted from now on."""
    import scipy.ndimage

    import stem_dask.kernels.gpu.buffers as ring
    import stem_dask.kernels.gpu.code as kernels

    emulated.needs_compiler()

    pool, pinned = Pool(), PinnedPool()

    def empty(shape, dtype=float):
        made = zeros(shape, dtype)
        made.view(np.uint8).fill(0xA5) if made.size else None  # nobody shall trust it to be 0
        return made

    def zeros(shape, dtype=float):
        made = np.zeros(shape, dtype).view(Array)
        pool.take(made)
        return made

    cuda = _module(
        "cupy.cuda",
        Stream=Stream,
        get_current_stream=lambda: getattr(_current, "stream", None),
        runtime=_module(
            "runtime",
            getDeviceCount=lambda: n_devices,
            memGetInfo=lambda: (2**30, 2**31),
            getDevice=lambda: 0,
            deviceGetPCIBusId=lambda device: "0000:00:00.0",
            CUDARuntimeError=CUDARuntimeError,
        ),
        cufft=_module("cufft"),
        memory=_module("memory", OutOfMemoryError=OutOfMemoryError),
        Device=lambda: _module("device", attributes={"MaxSharedMemoryPerBlockOptin": 232448}, id=0),
    )
    ndimage = _module("ndimage", gaussian_filter=scipy.ndimage.gaussian_filter)
    transforms = {name: transform(name) for name in ("fft2", "ifft2")}
    transforms |= {"fftshift": np.fft.fftshift, "ifftshift": np.fft.ifftshift}
    cupy = _module(
        "cupy",
        empty=empty,
        zeros=zeros,
        cuda=cuda,
        RawModule=RawModule,
        fft=_module("fft", **transforms),
        get_default_memory_pool=lambda: pool,
    )
    cupyx = _module("cupyx", empty_pinned=pinned.empty, pinned=pinned)
    named = {
        "cupy": cupy, "cupy.cuda": cuda, "cupyx": cupyx, "cupyx.scipy": _module("scipy", ndimage=ndimage),
        "cupyx.scipy.ndimage": ndimage,
    }  # fmt: skip
    for name, module in named.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernels, "_modules", {})
    monkeypatch.setattr(ring, "_idle", [])
    counted.clear()
    return counted
