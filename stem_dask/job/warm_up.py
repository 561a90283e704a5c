"""Workers load what tasks need before the first block: code and compiled kernels take longer than a block does."""

import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stem_dask.core.errors import SourceError, StemDaskError, StoreError, WorkerLostError
from stem_dask.core.machine import exempt_from_collection
from stem_dask.engine.clients import KILLED
from stem_dask.kernels.analysis import analyze_patterns
from stem_dask.kernels.crop import crop_patterns, window_intensity
from stem_dask.kernels.downsample import downsample_patterns
from stem_dask.kernels.intensity import CACHE, add_patterns, native
from stem_dask.storage.location import at
from stem_dask.writers.codecs import blosc_bytes

#: compiling all kernels takes 10 to 20 seconds, once on a machine
LONGEST_SECONDS = 60.0


def rehearse(
    client: Any,
    dtype: np.dtype,
    *,
    metric: str | None,
    bins: bool,
    on_gpu: Callable[[], None] | None = None,
    owned: bool = False,
) -> bool:
    """Have every worker work on a pattern of 4 x 4 pixels; failures here recur, and are reported, with real ones.

    Parameters
    ----------
    client : a `distributed.Client`, or None for threads of this process, which load as they go
    dtype : of the patterns
    metric : of the analysis, ``square`` or ``circle``; None when nothing is analyzed and cropped
    bins : whether a mean or sum of pixels is made
    on_gpu : compiles the kernels of a run on GPUs, see `stem_dask.kernels.gpu.code.Kernels`
    owned : whether the workers' processes end with the run

    Returns
    -------
    bool
        Whether the compiled kernels are kept on the disk, as far as is known.

    Raises
    ------
    WorkerLostError
        When workers end of it, as they do where their memory does not even suffice for the code.
    """
    if client is None:
        return True
    from distributed import KilledWorker, wait

    # as many as there are workers, so that an idle one gets one; a call that is tied to a worker would wait for ever
    # when that one has to be started again
    calls = [
        client.submit(play, dtype, metric, bins, on_gpu, owned, pure=False)
        for _ in client.nthreads()
    ]
    with contextlib.suppress(TimeoutError):  # a worker that hangs does not delay the others
        wait(calls, timeout=LONGEST_SECONDS)
    for call in calls:
        if call.status == "error" and isinstance(call.exception(), KilledWorker):
            raise WorkerLostError(KILLED) from call.exception()
    return all(call.result() for call in calls if call.status == "finished")


def reach(client: Any, urls: Mapping[str, type[SourceError] | type[StoreError]]) -> None:
    """Have the workers look into the object stores of a job: their environment is their own.

    Parameters
    ----------
    client : a `distributed.Client`, or None for threads of this process, whose access was seen before
    urls : of the input and the output, each with the error to raise

    Raises
    ------
    SourceError, StoreError
        When one of them cannot; names it, and why.
    """
    if client is None or not urls:
        return
    from distributed import wait

    calls = [client.submit(unreached, tuple(urls), pure=False) for _ in client.nthreads()]
    with contextlib.suppress(TimeoutError):
        wait(calls, timeout=LONGEST_SECONDS)
    for call in calls:
        if call.status == "finished" and (why := call.result()):
            host, url, words = why
            raise urls[url](
                f"a worker on {host} cannot reach {url}: {words}. Start workers with the environment that this "
                "command has: the variables AWS_*, or the files of AWS_PROFILE"
            )


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
) -> bool:
    """Load the libraries and run the kernels in this process; returns whether compiled kernels are kept on the disk.

    Examples
    --------
    >>> kept = play(np.dtype("u2"), "square", bins=True)
    """
    block, origin = np.ones((1, 4, 4), dtype), np.zeros(1, np.int64)
    if metric is not None:
        analyze_patterns(block, target_retention=0.98, threshold=0, center=None, metric=metric)
        window_intensity(crop_patterns(block, origin, origin, (2, 2)), threshold=0)
    if bins:
        downsample_patterns(block, 2, method="bin")
    add_patterns(block, np.zeros(block.shape[1:]), native(block)[0, 0].copy())
    blosc_bytes(block, "lz4", "bitshuffle")
    if on_gpu is not None:
        on_gpu()
    if owned:
        exempt_from_collection()
    return CACHE
