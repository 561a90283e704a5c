"""Workers in jobs of SLURM, which dask-jobqueue submits; each hands over in time, and the next job takes its place."""

import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stem_dask.cluster.local import started
from stem_dask.cluster.scratch import keys
from stem_dask.core.errors import ConfigError
from stem_dask.core.machine import ONE_THREAD

#: where a job's output goes and, while it runs, the keys: as most sites have it, all nodes see the home folder
LOG_DIRECTORY = "~/.stem_dask/jobs"

#: of the process that starts a job's workers and watches them
WATCHER_BYTES = 300 * 10**6

#: a worker that has nothing to do for so many seconds is given up, where the number of jobs may change
IDLE_SECONDS = 60

#: another job is asked for when the workers have more than this under way, each on average; Dask is never shown more than a
#: few tasks a thread, so that with its own 5 s no job would be added for blocks that take less than a second
BUSY_SECONDS = 0.1

#: how often the queue is asked about jobs that have not come yet, in seconds
ASK_EVERY = 2.0

#: a worker that left may come back as long
GONE_SECONDS = 10.0

_WALLTIME = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")


@dataclass(frozen=True)
class Jobs:
    """What is asked of SLURM, for every job alike.

    least, most : how many jobs; where they differ, as many as the work needs
    workers, threads : processes in a job, and threads of each
    memory : bytes of each worker
    walltime : ``[days-]hours:minutes:seconds``
    queue, account, extra : SLURM's partition and account, and any other option, such as ``--constraint=skylake``
    folder : for the jobs' output; must be seen by all nodes
    """

    least: int
    most: int
    workers: int
    threads: int
    memory: int
    walltime: str
    queue: str | None = None
    account: str | None = None
    extra: tuple[str, ...] = ()
    folder: str = LOG_DIRECTORY


def seconds_of(walltime: str) -> int:
    """A wall time in seconds.

    Examples
    --------
    >>> seconds_of("1:30:00"), seconds_of("2-00:00:00")
    (5400, 172800)
    """
    match = _WALLTIME.fullmatch(walltime)
    if match is None:
        raise ConfigError(
            f"cluster.walltime is {walltime!r}; expected hours:minutes:seconds, such as 12:00:00 or 2-00:00:00"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def lifetime(walltime: str) -> tuple[int, int]:
    """When a worker stops before its job is killed: seconds, and by how many the workers differ, so that not all go at once.

    Examples
    --------
    >>> lifetime("1:00:00"), lifetime("0:10:00")
    ((3000, 300), (480, 60))
    """
    total = seconds_of(walltime)
    spare = min(300, total // 10)
    return total - 2 * spare, spare


def script_lines(settings: Mapping[str, Any]) -> list[str]:
    """What a job sets before its workers start: Dask's settings as in this process, and one thread per numeric library.

    Examples
    --------
    >>> script_lines({"distributed.worker.memory.spill": False})[-1]
    'export DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False'
    """
    names = {
        f"DASK_{key.replace('.', '__').replace('-', '_').upper()}": value
        for key, value in settings.items()
    }
    return [f"export {name}={shlex.quote(str(v))}" for name, v in {**ONE_THREAD, **names}.items()]


def cluster_options(jobs: Jobs, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What dask-jobqueue's SLURMCluster is given."""
    seconds, stagger = lifetime(jobs.walltime)
    n_cores, n_bytes = jobs.workers * jobs.threads, jobs.workers * jobs.memory
    return {
        "cores": n_cores,
        "processes": jobs.workers,
        "memory": f"{n_bytes}B",
        "job_mem": f"{-(-(n_bytes + WATCHER_BYTES) // 2**20)}M",
        "walltime": jobs.walltime,
        "queue": jobs.queue,
        "account": jobs.account,
        "job_extra_directives": list(jobs.extra),
        "job_name": "stem_dask",
        "log_directory": os.path.expanduser(jobs.folder),
        "local_directory": '"${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"',  # as it is on the node
        "python": sys.executable,
        "job_script_prologue": script_lines(settings),
        "worker_extra_args": [
            "--lifetime", f"{seconds}s", "--lifetime-stagger", f"{stagger}s", "--no-dashboard",
        ],
        "silence_logs": logging.CRITICAL,
    }  # fmt: skip


@contextlib.contextmanager
def slurm_cluster(
    jobs: Jobs,
    *,
    scheduler: Mapping[str, Any],
    security: Any,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
) -> Iterator[Any]:
    """Submit the jobs and wait for the first worker; gives a client. At the end the jobs are cancelled.

    Parameters
    ----------
    scheduler : where the scheduler listens, and its dashboard
    security : keys of this run, or None for plain text
    settings : of Dask, for the workers
    say : gets a line for the user while there is no worker

    Raises
    ------
    ConfigError
        When dask-jobqueue is missing, SLURM does not take the jobs, or all end before their workers come.
    """
    from distributed import Client
    from distributed.deploy import Adaptive

    folder = Path(jobs.folder).expanduser()
    if re.search(r"\s", str(folder)):  # dask-jobqueue writes names into the jobs as they are
        raise ConfigError(
            f"cluster.log_directory is {str(folder)!r}; expected a folder that all nodes see, without a space in its name"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cluster.log_directory is {str(folder)!r}, which cannot be made: {error.strerror}; expected a folder that all nodes see"
        ) from error
    options = cluster_options(jobs, settings)
    own_cluster = _slurm_cluster()
    with contextlib.ExitStack() as stack:
        keys_folder = stack.enter_context(keys(folder))

        def start() -> Any:
            with warnings.catch_warnings():
                # the port may be taken between this check and the start; the printed address is right
                warnings.filterwarnings("ignore", message=r"\s*Port \d+ is already in use")
                return own_cluster(
                    **options,
                    scheduler_options=dict(scheduler),
                    security=security,
                    shared_temp_directory=keys_folder,
                )

        cluster = started(start)
        stack.callback(_close_keys, cluster)
        stack.callback(cluster.close)
        _refuse_what_slurm_refuses(cluster.job_script())  # a cluster whose jobs fail does not close
        cluster.scale(jobs=jobs.least)
        stack.enter_context(cluster)
        client = stack.enter_context(Client(cluster))
        _wait_for_one(client, cluster, folder, say)
        # also with equal numbers: a job that has handed over is replaced
        cluster.adapt(
            Adaptive=replacing(Adaptive),
            minimum_jobs=jobs.least,
            maximum_jobs=jobs.most,
            wait_count=IDLE_SECONDS,
            target_duration=BUSY_SECONDS,
        )
        yield client


def _close_keys(cluster: Any) -> None:
    """dask-jobqueue holds the files of the keys open, and would look for them when their folder has gone."""
    for name, file in vars(cluster).items():
        if name.startswith("_job_") and hasattr(file, "close"):
            file.close()


def _refuse_what_slurm_refuses(script: str) -> None:
    line = ["sbatch", "--test-only"]
    try:
        done = subprocess.run(line, input=script, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"no job can be submitted: {error}; is this a SLURM cluster?") from error
    if done.returncode:
        raise ConfigError(f"SLURM does not take the jobs: {_last_line(done.stderr)}")


def _slurm_cluster() -> Any:
    """The class of dask-jobqueue; loading it must not change what Ctrl-C does."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ConfigError(
            "cluster.kind is slurm, which needs the package dask-jobqueue; "
            "pip install -c constraints.txt 'stem_dask[hpc]', or choose another cluster.kind"
        ) from error
    except ValueError as error:  # it sets a signal handler, which only the main thread may
        raise ConfigError(
            f"cluster.kind is slurm, and dask-jobqueue cannot be loaded in this thread: {error}; "
            "import dask_jobqueue in the main thread first"
        ) from error
    if handler is not None and signal.getsignal(signal.SIGINT) is not handler:
        # dask-jobqueue makes Ctrl-C end the process with exit code 0
        signal.signal(signal.SIGINT, handler)
    return SLURMCluster


def replacing(adaptive: Any) -> Any:
    """A `distributed.deploy.Adaptive` that also replaces jobs of several workers when all of these have left."""

    class Replacing(adaptive):  # type: ignore[misc]
        #: jobs that had a worker, each with the time when it had one last
        seen: dict[str, float]

        async def target(self) -> Any:
            now, self.seen = time.monotonic(), getattr(self, "seen", {})
            names = [
                str(worker["name"]) for worker in self.cluster.scheduler_info["workers"].values()
            ]
            for job in list(self.cluster.worker_spec):
                if any(name.startswith(f"{job}-") for name in names):
                    self.seen[job] = now
                elif now - self.seen.get(job, now) > GONE_SECONDS:
                    del self.seen[job]
                    await self.cluster.scale_down([job])
            return await super().target()

    return Replacing


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def _wait_for_one(client: Any, cluster: Any, folder: Path, say: Callable[[str], None]) -> None:
    numbers = [str(job.job_id) for job in cluster.workers.values()]
    say(f"cluster     waiting for one of SLURM's jobs {', '.join(numbers)} (squeue --me)")
    while not client.nthreads():
        if not _queued(numbers):
            logs = sorted(folder.glob("stem_dask-*.err"), key=os.path.getmtime)
            last = _last_line(logs[-1].read_text(errors="replace") if logs else "")
            raise ConfigError(
                f"SLURM's jobs {', '.join(numbers)} ended before a worker started: {last}; "
                f"their output is in {folder}. Nodes must reach {cluster.scheduler_address} (cluster.host) and see {folder} "
                "(cluster.log_directory)"
            )
        time.sleep(ASK_EVERY)


def _queued(numbers: list[str]) -> bool:
    """Whether a job is waiting or running; SLURM forgets those that ended. While it does not answer, they are taken to be."""
    line = ["squeue", "--noheader", "--format=%i", "--jobs", ",".join(numbers)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        return True
    return bool(done.stdout.strip())
