"""Calls on workers or on threads of this process: a few in flight, results as they arrive."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import math
import operator
import queue
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from typing import Any
from uuid import uuid4

import dask

from stem_dask.core.errors import InterruptedRunError, StemDaskError, WorkerLostError
from stem_dask.engine.clients import KILLED, connected, is_lost, refuse_other_versions

_logger = logging.getLogger("stem_dask")

Call = tuple[Callable[..., Any], tuple[Any, ...]]

#: tasks in flight for each thread at most: enough that none waits, few enough that memory stays bounded; when only half
#: are left, the others are submitted together, which costs the scheduler little more than one
IN_FLIGHT = 4

#: short calls share a task, up to so many seconds of them: a task costs scheduler and worker 10 ms, a call in it about 2
TASK_SECONDS = 1.0

#: calls in flight at most, where tasks have several: each is some kB, and Dask warns of graphs above 10 MB
CALLS_IN_FLIGHT = 1000

#: so many tasks are left for each thread when tasks are made: towards the end, and in small jobs, each block is a task, so that
#: no thread waits long and a kill costs few finished blocks
TASKS_LEFT = 16

#: how often the workers are counted, in seconds
WORKERS_SECONDS = 5.0

#: after so many seconds without a result it is seen whether there is a worker at all
ALONE_SECONDS = 30.0


def in_flight(
    client: Any, calls: Iterable[Call], name: str = "stem_dask"
) -> Generator[Any, None, None]:
    """Results of calls as they come, with only a few submitted at a time.

    The first error stops the submission and is raised as the worker raised it, when the few calls that are in flight
    have ended: none of them shall write into what the caller now removes. An interrupt does not wait.

    Parameters
    ----------
    client : a `distributed.Client`, or None for threads of this process
    calls : functions and their arguments; an iterator may go on after it was exhausted, because of a result
    name : of the tasks, on the dashboard
    """
    if client is None:
        yield from _in_threads(iter(calls))
        return
    from distributed import KilledWorker
    from distributed import wait as wait_for
    from distributed.scheduler import NoValidWorkerError, NoWorkerError

    futures: set[Any] = set()
    with connected(client):
        try:
            yield from _on_workers(client, iter(calls), futures, name)
        except BaseException as error:
            if is_lost(client, error):  # no scheduler is left that could stop a task
                raise
            if isinstance(error, (Exception, GeneratorExit)) and not isinstance(
                error, InterruptedRunError
            ):
                # when no worker is left they never end
                with client.as_current(), contextlib.suppress(TimeoutError):
                    wait_for(futures, timeout=60)
            client.cancel(list(futures), force=True)
            if isinstance(error, Exception) and not isinstance(error, StemDaskError):
                # a worker with other versions that joined may fail to read its task
                with contextlib.suppress(OSError, TimeoutError):
                    refuse_other_versions(client)
            if isinstance(error, KilledWorker):
                raise WorkerLostError(KILLED) from error
            if isinstance(error, (NoWorkerError, NoValidWorkerError)):
                raise WorkerLostError(
                    "all workers have gone, and none came back in time: their output says why; with new ones the same "
                    "command goes on"
                ) from error
            raise


def _on_workers(client: Any, calls: Iterator[Call], futures: set[Any], name: str) -> Iterator[Any]:
    """What the calls return; ``futures`` are the tasks that have not ended."""
    name, numbers = f"{name}-{uuid4().hex}", itertools.count()
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    results: collections.deque[Any] = collections.deque()
    failure: StemDaskError | None = None
    n_open = 0  # calls whose result has not been yielded
    call_seconds, threads, idle = math.inf, 1, ""
    workers: set[str] | None = None
    counted, last = -math.inf, time.monotonic()
    while True:
        if results:  # the first one may end it all
            n_open -= 1
            yield results.popleft()
        now = time.monotonic()
        if now - counted > WORKERS_SECONDS:  # they may join and leave while a job runs
            found, counted = client.nthreads(), now
            if workers is not None and not found.keys() <= workers:
                refuse_other_versions(client)
            workers, threads = set(found), sum(found.values()) or 1
        left = operator.length_hint(calls, 0)  # 0 of an iterator that does not tell
        timely, few = int(TASK_SECONDS / call_seconds), CALLS_IN_FLIGHT // (threads * IN_FLIGHT)
        size = max(1, min(timely, few, left // (threads * TASKS_LEFT)))
        most = threads * IN_FLIGHT * size
        if failure is None and n_open <= most // 2:
            some = list(itertools.islice(calls, most - n_open))
            work = [some[i : i + size] for i in range(0, len(some), size)]
            # of one group of tasks: the scheduler keeps them until a thread is free
            keys = [(name, next(numbers)) for _ in work]
            for future in client.map(_together, work, key=keys, pure=False) if work else ():
                futures.add(future)
                future.add_done_callback(ended.put)
            n_open += len(some)
        if results:
            continue
        if failure is not None:
            raise failure
        if not futures:
            return
        try:
            done = [ended.get(timeout=min(WORKERS_SECONDS, ALONE_SECONDS))]
        except queue.Empty:
            if client.status == "closed":  # given up
                raise CancelledError(name) from None
            if now - last >= ALONE_SECONDS:
                before, idle = idle, _why_idle(client)
                if idle != before:
                    _logger.warning(idle or "there are workers again; the run goes on")
            continue
        while not ended.empty():
            done.append(ended.get())
        last = time.monotonic()
        good = [future for future in done if future.status not in ("error", "cancelled")]
        for found_results, seconds, error in client.gather(good):
            results += found_results
            failure = failure or error
            if found_results:
                latest = seconds / len(found_results)
                is_known = math.isfinite(call_seconds)
                call_seconds = (call_seconds + latest) / 2 if is_known else latest
        futures.difference_update(good)
        if len(good) < len(done):
            yield from results
            next(future for future in done if future not in good).result()  # raises


def _together(calls: Sequence[Call]) -> tuple[list[Any], float, StemDaskError | None]:
    """One task: results of calls and the seconds that they took; an error ends it, and keeps the results before."""
    results: list[Any] = []
    start = time.perf_counter()
    error = None
    for function, arguments in calls:
        try:
            results.append(function(*arguments))
        except StemDaskError as failure:
            if not results:
                raise
            error = failure
            break
    return results, time.perf_counter() - start, error


def _why_idle(client: Any) -> str:
    """Why no worker works, as far as the user can change it; else empty."""
    n_workers = len(client.nthreads())
    if not n_workers:
        return "no worker is left; the run waits until there is one"
    states = [w["status"] for w in client.scheduler_info(n_workers=-1)["workers"].values()]
    if "paused" not in states:
        return ""
    return (
        f"{states.count('paused')} of {len(states)} workers wait until less of their memory is used, which may be never; stop "
        "the run, start workers with more memory, or with distributed.worker.memory.pause at False, and the same command goes on"
    )


def _in_threads(calls: Iterator[Call]) -> Iterator[Any]:
    n_threads = dask.system.CPU_COUNT
    with ThreadPoolExecutor(n_threads) as pool:
        waiting = {
            pool.submit(f, *args) for f, args in itertools.islice(calls, n_threads * IN_FLIGHT)
        }
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()  # first: it may bring more calls
                    waiting |= {pool.submit(f, *args) for f, args in itertools.islice(calls, 1)}
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
