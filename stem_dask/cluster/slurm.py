"""Workers in jobs of SLURM, which dask-jobqueue submits; each hands over in time, and the next job takes its place."""

import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dask

from stem_dask.cluster.local import LOOPBACK, SETTINGS, dask_level, started, usual_port
from stem_dask.cluster.security import own_security
from stem_dask.config.options import Cluster
from stem_dask.core.errors import ConfigError, LockedError
from stem_dask.core.machine import ONE_THREAD
from stem_dask.engine.lock import locked

#: memory of the process that starts a job's workers and watches them
WATCHER_BYTES = 300 * 10**6

#: an idle worker is given up after so many seconds, where the number of jobs may change
IDLE_SECONDS = 60

#: a worker that left may come back as long
GONE_SECONDS = 10.0


def seconds_of(walltime: str) -> int:
    """A wall time in seconds.

    Examples
    --------
    >>> seconds_of("1:30:00"), seconds_of("2-00:00:00")
    (5400, 172800)
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", walltime)
    if match is None:
        raise ConfigError(
            f"cluster.walltime is {walltime!r}; expected hours:minutes:seconds, such as 12:00:00 or 2-00:00:00"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def lifetime(walltime: str) -> tuple[int, int]:
    """Seconds after which a worker stops, before its job is killed, and the spread, so that not all stop at once.

    Examples
    --------
    >>> lifetime("1:00:00"), lifetime("0:10:00")
    ((3000, 300), (480, 60))
    """
    total = seconds_of(walltime)
    spare = min(300, total // 10)
    return total - 2 * spare, spare


def script_lines(settings: Mapping[str, Any]) -> list[str]:
    """What a job sets before its workers start: Dask's settings as in this process, and one thread per numeric library."""
    names = {
        f"DASK_{key.replace('.', '__').replace('-', '_').upper()}": value
        for key, value in settings.items()
    }
    return [f"export {name}={shlex.quote(str(v))}" for name, v in {**ONE_THREAD, **names}.items()]


@contextlib.contextmanager
def start_jobs(
    options: Cluster, workers: int, threads: int, limit: int, say: Callable[[str], None]
) -> Iterator[Any]:
    """Submit jobs and wait for the first worker; gives a client. At the end the jobs are cancelled."""
    from distributed import Client
    from distributed.deploy import Adaptive

    if options.walltime is None or options.memory_limit is None:
        key = "walltime" if options.walltime is None else "memory_limit"
        raise ConfigError(f"cluster.{key} is missing; cluster.kind: slurm asks SLURM for it")
    jobs = options.jobs
    least, most = (jobs, jobs) if isinstance(jobs, int) else jobs
    if not 1 <= least <= most:
        raise ConfigError(f"cluster.jobs is {jobs}; expected a number above 0, or [least, most]")
    security = own_security(options.host or "0.0.0.0", insecure=options.insecure)
    # output of the jobs and, while they run, the keys: on most sites all nodes see the home folder
    folder = Path(options.log_directory or "~/.stem_dask/jobs").expanduser()
    what, expected = (
        f"cluster.log_directory is {str(folder)!r}",
        "expected a folder that all nodes see",
    )
    if re.search(r"\s", str(folder)):  # dask-jobqueue writes names into the jobs as they are
        raise ConfigError(f"{what}; {expected}, without a space in its name")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{what}, which cannot be made: {error.strerror}; {expected}") from error
    seconds, stagger = lifetime(options.walltime)
    job = {
        "cores": workers * threads,
        "processes": workers,
        "memory": f"{workers * limit}B",
        "job_mem": f"{-(-(workers * limit + WATCHER_BYTES) // 2**20)}M",
        "walltime": options.walltime,
        "queue": options.queue,
        "account": options.account,
        "job_extra_directives": list(options.job_extra),
        "job_name": "stem_dask",
        "log_directory": str(folder),
        "local_directory": '"${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"',  # as it is on the node
        "python": sys.executable,
        # workers start on other machines and do not inherit these settings
        "job_script_prologue": script_lines({key: dask.config.get(key) for key in SETTINGS}),
        "worker_extra_args": [
            "--lifetime", f"{seconds}s", "--lifetime-stagger", f"{stagger}s", "--no-dashboard",
        ],
        "silence_logs": dask_level(),
    }  # fmt: skip
    scheduler = {"port": 0, "dashboard_address": f"{LOOPBACK}:{usual_port()}"}
    scheduler |= {} if options.host is None else {"host": options.host}
    own_cluster = _slurm_cluster()
    with contextlib.ExitStack() as stack:
        job |= {"security": security, "shared_temp_directory": stack.enter_context(keys(folder))}
        cluster = started(lambda: own_cluster(**job, scheduler_options=scheduler))
        stack.callback(_close_keys, cluster)
        stack.callback(cluster.close)
        # a cluster whose jobs fail does not close
        line = ["sbatch", "--test-only"]
        try:
            done = subprocess.run(line, input=cluster.job_script(), capture_output=True, text=True, check=False)  # fmt: skip
        except OSError as error:
            raise ConfigError(
                f"no job can be submitted: {error}; is this a SLURM cluster?"
            ) from error
        if done.returncode:
            raise ConfigError(f"SLURM does not take the jobs: {_last_line(done.stderr)}")
        cluster.scale(jobs=least)
        stack.enter_context(cluster)
        client = stack.enter_context(Client(cluster))
        numbers = [str(job.job_id) for job in cluster.workers.values()]
        say(f"cluster     waiting for one of SLURM's jobs {', '.join(numbers)} (squeue --me)")
        while not client.nthreads():
            if not _queued(numbers):
                logs = sorted(folder.glob("stem_dask-*.err"), key=os.path.getmtime)
                last = _last_line(logs[-1].read_text(errors="replace") if logs else "")
                raise ConfigError(
                    f"SLURM's jobs {', '.join(numbers)} ended before a worker started: {last}; their output is in "
                    f"{folder}. Nodes must reach {cluster.scheduler_address} (cluster.host) and see {folder} "
                    "(cluster.log_directory)"
                )
            time.sleep(2.0)
        # also with equal numbers: a job that has handed over is replaced. Dask is never shown more than a few tasks a
        # thread, so that with its own target of 5 s no job would be added for blocks that take less than a second
        cluster.adapt(
            Adaptive=replacing(Adaptive),
            minimum_jobs=least,
            maximum_jobs=most,
            wait_count=IDLE_SECONDS,
            target_duration=0.1,
        )
        yield client


@contextlib.contextmanager
def keys(place: str | Path) -> Iterator[str]:
    """A folder for TLS keys that only its owner reads; removed at the end, as are those of dead runs.

    A lock (`stem_dask.engine.lock`) next to it outlasts it: that of a run on this machine is free at its end, and that of one
    elsewhere when it was silent for a minute. Without locks only the own folder is removed.
    """
    for lock in Path(place).glob("keys-*.lock"):
        with contextlib.suppress(OSError, LockedError):
            if os.lstat(lock).st_uid == os.getuid():
                with locked(lock, needs_flock=True):
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    folder = Path(place) / f"keys-{secrets.token_hex(8)}"
    lock = folder.with_name(f"{folder.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, needs_flock=True))
        except (OSError, LockedError):
            lock.unlink(missing_ok=True)
        folder.mkdir(mode=0o700)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield str(folder)


def _close_keys(cluster: Any) -> None:
    """dask-jobqueue holds the files of the keys open, and would look for them when their folder has gone."""
    for name, file in vars(cluster).items():
        if name.startswith("_job_") and hasattr(file, "close"):
            file.close()


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
            workers = self.cluster.scheduler_info["workers"].values()
            present = {str(worker["name"]).rpartition("-")[0] for worker in workers}
            for job in list(self.cluster.worker_spec):
                if str(job) in present:
                    self.seen[job] = now
                elif now - self.seen.get(job, now) > GONE_SECONDS:
                    del self.seen[job]
                    await self.cluster.scale_down([job])
            return await super().target()

    return Replacing


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def _queued(numbers: list[str]) -> bool:
    """Whether a job is waiting or running; SLURM forgets ended jobs. While it does not answer, they count as queued."""
    line = ["squeue", "--noheader", "--format=%i", "--jobs", ",".join(numbers)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        return True
    return bool(done.stdout.strip())
