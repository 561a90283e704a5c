"""Workers load what tasks need before the first block: code and compiled kernels take longer than a block does."""

import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from stem_dask.core.errors import StemDaskError, WorkerLostError
from stem_dask.core.machine import exempt_from_collection
from stem_dask.engine.clients import KILLED
from stem_dask.kernels.analysis import analyze_patterns
from stem_dask.kernels.crop import crop_patterns, window_intensity
from stem_dask.kernels.downsample import downsample_patterns
from stem_dask.kernels.intensity import CACHE, add_patterns, native
from stem_dask.kernels.logarithm import add_logs
from stem_dask.storage.location import at
from stem_dask.writers.codecs import blosc_bytes


def rehearse(
    client: Any, play: Callable[[], bool], urls: Mapping[str, type[StemDaskError]]
) -> bool:
    """Have every worker rehearse, and look into the object stores of a job: its environment is its own.

    Returns whether the compiled kernels are kept on the disk, as far as is known. Failures of the kernels recur, and are reported,
    with real blocks. ``urls`` have the error to raise if a worker cannot reach them; without a client, threads load as they go.
    """
    if client is None:
        return True
    from distributed import KilledWorker

    calls = _on_workers(client, play)
    for call in calls:
        if call.status == "error" and isinstance(call.exception(), KilledWorker):
            raise WorkerLostError(KILLED) from call.exception()
    for call in _on_workers(client, partial(unreached, tuple(urls))) if urls else ():
        if call.status == "finished" and (why := call.result()):
            host, url, words = why
            raise urls[url](
                f"a worker on {host} cannot reach {url}: {words}. Start workers with the environment that this "
                "command has: the variables AWS_*, or the files of AWS_PROFILE"
            )
    return all(call.result() for call in calls if call.status == "finished")


def _on_workers(client: Any, call: Callable[[], Any]) -> list[Any]:
    """The futures of as many calls as there are workers; one tied to a worker would wait for ever if that was started again."""
    from distributed import wait

    calls = [client.submit(call, pure=False) for _ in client.nthreads()]
    with contextlib.suppress(TimeoutError):
        wait(calls, timeout=60.0)  # compiling all kernels takes 10 to 20 s, once on a machine
    return calls


def unreached(urls: Sequence[str]) -> tuple[str, str, str] | None:
    """Name of this machine, the first URL below which it cannot list what there is, and why; None when it can."""
    for url in urls:
        try:
            next(at(url).below(), None)
        except StemDaskError as error:
            return socket.gethostname(), url, str(error).removeprefix(f"{url}: ")
    return None


def play(
    dtype: np.dtype,
    metric: str | None,
    bins: bool,
    on_gpu: Callable[[], None] | None = None,
    owned: bool = False,
    stored: np.dtype | None = None,
) -> bool:
    """Run the kernels on a pattern of 4 x 4 pixels; returns whether compiled kernels are kept on the disk.

    ``metric`` is None when nothing is analyzed and cropped; ``owned`` processes end with the run; ``stored`` is the type of the
    patterns whose logarithms are summed, if any.
    """
    block, origin = np.ones((1, 4, 4), dtype), np.zeros(1, np.int64)
    if metric is not None:
        analyze_patterns(block, target_retention=0.98, threshold=0, center=None, metric=metric)
        window_intensity(crop_patterns(block, origin, origin, (2, 2)), threshold=0)
    if bins:
        downsample_patterns(block, 2, method="bin")
    add_patterns(block, np.zeros(block.shape[1:]), native(block)[0, 0].copy())
    if stored is not None:
        add_logs(block.astype(stored), np.zeros(block.shape[1:]))
    blosc_bytes(block, "lz4", "bitshuffle")
    if on_gpu is not None:
        on_gpu()
    if owned:
        exempt_from_collection()
    return CACHE
