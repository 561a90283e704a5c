"""Calls on workers or on threads of this process: a few in flight, results as they arrive."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import operator
import pickle
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from typing import Any
from uuid import uuid4

import dask

from stem_dask.core.errors import InterruptedRunError, StemDaskError, WorkerLostError
from stem_dask.engine.clients import KILLED, connected, is_lost, refuse_other_versions

_logger = logging.getLogger("stem_dask")

Call = tuple[Callable[..., Any], tuple[Any, ...]]

#: results of calls and finished futures, by the name of the flight
_news: dict[str, queue.SimpleQueue[Any]] = {}

#: flights that each client has under way
_flights: Counter[str] = Counter()

_lock = threading.Lock()

#: tasks in flight for each thread at most: enough that none waits, few enough that memory stays bounded; when only half
#: are left, the others are submitted together, which costs the scheduler little more than one
IN_FLIGHT = 4

#: short calls share a task, up to so many seconds of them: a task costs scheduler and worker 10 ms, a call in it about 2
TASK_SECONDS = 1.0

#: calls in flight at most, where tasks have several: each is some kB, and Dask warns of graphs above 10 MB
CALLS_IN_FLIGHT = 1000

#: so many tasks are left for each thread when tasks are made: towards the end they are shorter, so that no thread waits long
TASKS_LEFT = 4

#: how often the workers are counted, in seconds
WORKERS_SECONDS = 5.0

#: how often it is seen whether there is a worker at all, in seconds
ALONE_SECONDS = 30.0

#: how long the calls in flight may take to end after an error
LAST_CALLS_SECONDS = 60

#: message when ``distributed.scheduler.no-workers-timeout`` has passed
ALL_GONE = "all workers have gone, and none came back in time: their output says why; with new ones the same command goes on"


def in_flight(client: Any, calls: Iterable[Call]) -> Generator[Any, None, None]:
    """Results of calls as they come, with only a few submitted at a time.

    The first error stops the submission and is raised as the worker raised it, when the few calls that are in flight
    have ended: none of them shall write into what the caller now removes. An interrupt does not wait.

    Parameters
    ----------
    client : a `distributed.Client`, or None for threads of this process
    calls : functions and their arguments; an iterator may go on after it was exhausted, because of a result
    """
    if client is None:
        yield from _in_threads(calls)
        return
    from distributed import KilledWorker
    from distributed.scheduler import NoValidWorkerError, NoWorkerError

    with connected(client):
        flight = _Flight(client, calls)
        try:
            yield from flight.results()
        except BaseException as error:
            if not is_lost(client, error):  # else no scheduler is left that could stop a task
                flight.stop(
                    wait=isinstance(error, (Exception, GeneratorExit))
                    and not isinstance(error, InterruptedRunError)
                )
            if isinstance(error, Exception) and not isinstance(error, StemDaskError):
                _refuse_who_joined(client, error)
            if isinstance(error, KilledWorker):
                raise WorkerLostError(KILLED) from error
            if isinstance(error, (NoWorkerError, NoValidWorkerError)):
                raise WorkerLostError(ALL_GONE) from error
            raise
        finally:
            flight.end()


def _refuse_who_joined(client: Any, error: Exception) -> None:
    """Raise about other versions instead: a worker that has them may fail to read its task."""
    if is_lost(client, error):
        return
    with contextlib.suppress(OSError, TimeoutError):  # the first error is raised
        refuse_other_versions(client)


class _Flight:
    """Calls on the workers of a client.

    A call returns its result as an event in the stream of messages, before its task ends: fetching each result takes two
    more requests.
    """

    def __init__(self, client: Any, calls: Iterable[Call]) -> None:
        self.client, self.calls, self.numbers = client, iter(calls), itertools.count()
        self.name = f"stem_dask-{uuid4().hex}"
        self.news = _news[self.name] = queue.SimpleQueue()
        #: tasks that have not ended, and numbers of calls whose result has not come
        self.futures: set[Any] = set()
        self.missing: set[int] = set()
        #: workers whose versions have been compared
        self.workers: set[str] | None = None
        #: what a call takes, as far as it is known
        self.seconds = math.inf
        self.over = threading.Event()
        #: time of the last result
        self.last = time.monotonic()
        threading.Thread(target=_watch, args=(self,), daemon=True).start()
        with _lock:
            _flights[client.id] += 1
            # of a client's own topic the scheduler forgets all when the client is gone
            client.subscribe_topic(client.id, _note)

    def _submit(self, threads: int) -> None:
        """Bring the calls in flight to what is allowed, when half of them have come back."""
        left = operator.length_hint(self.calls, 0)  # 0 of an iterator that does not tell
        timely, few = int(TASK_SECONDS / self.seconds), CALLS_IN_FLIGHT // (threads * IN_FLIGHT)
        size = max(1, min(timely, few, left // (threads * TASKS_LEFT)))
        most = threads * IN_FLIGHT * size
        if len(self.missing) > most // 2:
            return
        some = list(itertools.islice(self.calls, most - len(self.missing)))
        if not some:
            return
        numbers = list(itertools.islice(self.numbers, len(some)))
        self.missing.update(numbers)
        # of one group of tasks: the scheduler keeps them until a thread is free
        starts = range(0, len(some), size)
        work = [some[i : i + size] for i in starts]
        keys = [(self.name, numbers[i]) for i in starts]
        how = {"flight": self.name, "to": self.client.id}
        futures = self.client.map(_report, numbers[::size], work, key=keys, pure=False, **how)
        self.futures.update(futures)
        for future in futures:
            future.add_done_callback(self.news.put)

    def results(self) -> Iterator[Any]:
        """What the calls return."""
        threads, asked = self._threads(), time.monotonic()
        self._submit(threads)
        while self.missing or self.futures:
            try:
                news = self.news.get(timeout=WORKERS_SECONDS)
                self.last = time.monotonic()
            except queue.Empty:
                news = None
                if self.client.status == "closed":  # given up
                    raise CancelledError(self.name) from None
            if isinstance(news, tuple):
                number, seconds, result = news
                if number not in self.missing:  # its task ran again, because a worker was lost
                    continue
                self.missing.remove(number)
                known = math.isfinite(self.seconds)
                self.seconds = (self.seconds + seconds) / 2 if known else seconds
                yield pickle.loads(result)
            elif news is not None:
                self.futures.discard(news)
                if news.status != "finished":
                    news.result()  # raises
            if time.monotonic() - asked > WORKERS_SECONDS:
                threads, asked = self._threads(), time.monotonic()
            self._submit(threads)

    def _threads(self) -> int:
        """Threads of the workers, which may join and leave while a job runs; at least 1."""
        workers = self.client.nthreads()
        if self.workers is not None and not workers.keys() <= self.workers:
            refuse_other_versions(self.client)
        self.workers = set(workers)
        return sum(workers.values()) or 1

    def stop(self, *, wait: bool) -> None:
        """Cancel what has not begun, and let the rest end first, if asked for."""
        from distributed import wait as wait_for

        if wait:
            # when no worker is left they never end
            with self.client.as_current(), contextlib.suppress(TimeoutError):
                wait_for(self.futures, timeout=LAST_CALLS_SECONDS)
        self.client.cancel(list(self.futures), force=True)

    def end(self) -> None:
        """Unsubscribe: a client that leaves while subscribed causes an error in the scheduler's log."""
        self.over.set()
        del _news[self.name]
        with _lock:
            _flights[self.client.id] -= 1
            if not _flights[self.client.id]:
                del _flights[self.client.id]
                if self.client.status == "running":
                    self.client.unsubscribe_topic(self.client.id)


def _watch(flight: _Flight) -> None:
    """Warn when no worker is left or workers are paused, and when work goes on."""
    before, client = "", flight.client
    while not flight.over.wait(ALONE_SECONDS):
        with contextlib.suppress(Exception):  # of a lost connection, which the flight itself meets
            idle = _why_idle(client, time.monotonic() - flight.last)
            if idle and idle != before:
                _logger.warning(idle)
            elif before and not idle:
                _logger.warning("there are workers again; the run goes on")
            before = idle


def _why_idle(client: Any, silent_seconds: float) -> str:
    """Why no worker works, as far as the user can change it; else empty."""
    n_workers = len(client.nthreads())
    if not n_workers:
        return "no worker is left; the run waits until there is one"
    n_running = len(client.sync(client.scheduler.ncores_running, workers=None))
    if n_running == n_workers or silent_seconds < ALONE_SECONDS / 2:
        return ""
    states = [w["status"] for w in client.scheduler_info(n_workers=-1)["workers"].values()]
    if "paused" not in states:
        return ""
    return (
        f"{states.count('paused')} of {len(states)} workers wait until less of their memory is used, which may be never; stop "
        "the run, start workers with more memory, or with distributed.worker.memory.pause at False, and the same command goes on"
    )


def _note(event: tuple[float, Any]) -> None:
    """Pass an event on to its flight."""
    event_data = event[1]  # Dask's own are dictionaries
    if isinstance(event_data, (list, tuple)) and len(event_data) == 4 and event_data[0] in _news:
        _news[event_data[0]].put(tuple(event_data[1:]))


def _report(first: int, calls: Sequence[Call], *, flight: str, to: str) -> None:
    """One task: make the calls and report each result at once, so that it is kept when a later call fails."""
    from distributed import get_worker

    for number, (function, arguments) in enumerate(calls, first):
        start = time.perf_counter()
        result = pickle.dumps(function(*arguments))
        get_worker().log_event(to, (flight, number, time.perf_counter() - start, result))


def _in_threads(calls: Iterable[Call]) -> Iterator[Any]:
    n_threads = dask.system.CPU_COUNT
    calls = iter(calls)
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
