"""Runs the real command in its own process group, stops it at a known moment, and compares what it leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from forks import Fork, Forks

#: one line of the scan a block
N_BLOCKS = 24
JOBS = ("analyze", "crop", "export .pt scan", "export .hspy")
PATIENCE = 60.0
POLL = 0.003

#: The client begins with this, and Python imports it at the start of each worker. FAULT is `before|after PATH-END [nth]`: the process
#: that renames something to that name ends its whole group there; `held PATH-END` stops (SIGSTOP) only itself, before the
#: rename; `torn PATH-END` ends only itself, before the rename, and only once; `remove PATH-END` is the moment before a folder is removed, `interrupt MODULE` a SIGTERM
#: within an exec when a module is looked for, `memory MODULE` 600 MB taken by a worker then, `endless MODULE` a thread
#: beside the main one that never ends to look for it, `asleep NAME` a process that stops itself (SIGSTOP) before it makes
#: an unfinished file of that name, and only once. No clock is involved.
SITE = """
import os, signal, threading

fault = os.environ.get("FAULT", "").split()
if fault:
    moment, end, nth = fault[0], fault[1], int(fault[2]) if len(fault) > 2 else 1

    def patched(plain):
        def rename(source, target, *args, **options):
            global nth
            hit = False
            if str(target).endswith(end):
                nth -= 1
                hit = nth == 0
            if hit and moment == "before":
                os.killpg(0, signal.SIGKILL)
            if hit and moment == "held":
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # at once
            if hit and moment == "torn":
                try:
                    os.close(os.open(os.environ["FAULT_MARK"], os.O_CREAT | os.O_EXCL))
                    os.kill(os.getpid(), signal.SIGKILL)
                except FileExistsError:
                    pass
            plain(source, target, *args, **options)
            if hit and moment == "after":
                os.killpg(0, signal.SIGKILL)
        return rename

    os.replace, os.rename = patched(os.replace), patched(os.rename)

    if moment == "asleep":
        import sys

        def asleep(event, arguments):
            if event != "open" or not isinstance(arguments[0], str):
                return
            if f"/{end}." in arguments[0] and arguments[0].endswith(".partial"):
                try:
                    os.close(os.open(os.environ["FAULT_MARK"], os.O_CREAT | os.O_EXCL))
                    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # at once
                except FileExistsError:
                    pass

        sys.addaudithook(asleep)

    if moment == "interrupt":
        import sys

        class Finder:
            def find_spec(self, name, path=None, target=None):
                main = threading.current_thread() is threading.main_thread()
                if not main and name == end.partition(".")[0]:
                    raise ImportError("left to the main thread, where signals are heard")
                if name == end:
                    exec("os.kill(os.getpid(), signal.SIGTERM)")

        sys.meta_path.insert(0, Finder())

    if moment == "endless":
        import sys

        class Endless:
            def find_spec(self, name, path=None, target=None):
                if name == end and threading.current_thread() is not threading.main_thread():
                    threading.Event().wait()

        sys.meta_path.insert(0, Endless())

    if moment == "memory":
        import sys

        class Hungry:
            def find_spec(self, name, path=None, target=None):
                if name == end and "spawn_main" in " ".join(sys.orig_argv):
                    taken.append(bytearray(b"x" * 600_000_000))

        taken = []
        sys.meta_path.insert(0, Hungry())

    if moment == "remove":
        plain_rmdir = os.rmdir

        def rmdir(path, *args, **options):
            if str(path).endswith(end):
                os.killpg(0, signal.SIGKILL)
            plain_rmdir(path, *args, **options)

        os.rmdir = rmdir
"""


@dataclass
class Command:
    """One command line, its output folder, and the processes that were started with it.

    The client is a fork of a process that has imported everything; without ``forks`` it is a Python of its own.
    """

    config: Path
    folder: Path
    forks: Forks | None
    name: str = "scan"
    overrides: tuple[str, ...] = ()
    started: list["Started"] = field(default_factory=list)

    @property
    def store(self) -> Path:
        return self.folder / f"{self.name}.zarr"

    @property
    def run_folder(self) -> Path:
        return self.folder / f"{self.name}.run"

    @property
    def journal(self) -> Path:
        return self.run_folder / "journal"

    def start(
        self,
        *more: str,
        kind: str = "local",
        fault: str = "",
        limits: dict[int, int] | None = None,
        own_python: bool = False,
    ) -> "Started":
        """Start it in a session of its own; `more` are options (first) and overrides (last)."""
        cluster = [f"cluster.kind={kind}"]
        if kind == "local":
            cluster += ["cluster.n_workers=2", "cluster.threads_per_worker=1"]
        elif kind == "threads":
            cluster += ["cluster.threads_per_worker=2"]
        flags = [text for text in more if text.startswith("-") or text.isdigit()]
        values = [text for text in more if text not in flags]
        argv = [*flags, str(self.config), f"output.path={self.store}"]
        argv += [*cluster, *self.overrides, *values]
        mark = str(self.folder / "fault_mark")
        path = _python_path(self.folder)
        environment = {**os.environ, "PYTHONPATH": path, "FAULT": fault, "FAULT_MARK": mark}
        environment.pop("SLURM_JOB_END_TIME", None)
        log = self.folder / f"log{len(self.started)}"
        process: Fork | subprocess.Popen[bytes]
        if own_python or self.forks is None:
            assert not limits, "a fork can be limited"
            process = _python("stem_dask.run", argv, log, environment, self.folder)
        else:
            how = {"environment": environment, "folder": str(self.folder), "limits": limits or {}}
            process = self.forks.start("stem_dask.run", argv, log, before=SITE, **how)
        self.started.append(Started(process, log))
        return self.started[-1]

    def finish(self, *more: str, **options: Any) -> "Started":
        """Run it to its end, whatever that is."""
        started = self.start(*more, **options)
        started.wait()
        return started

    def lines(self) -> list[tuple[str, int]]:
        """(job, index) of every whole line of the journal."""
        found = []
        for text in read(self.journal).split(b"\n"):
            with contextlib.suppress(ValueError, TypeError):
                line = json.loads(text)
                found.append((line["job"], line["index"]))
        return found

    def counts(self) -> Counter[str]:
        return Counter(job for job, _ in self.lines())

    def clean(self) -> None:
        for started in self.started:
            started.kill()


def _python_path(folder: Path) -> str:
    """Where Python finds this checkout's package, and what it begins with."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    return f"{site}{os.pathsep}{Path(__file__).resolve().parents[2]}"


def _python(
    program: str, argv: Sequence[str], log: Path, environment: dict[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", program, *argv],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=folder,
        )


@dataclass
class Started:
    process: Fork | subprocess.Popen[bytes]
    log: Path

    @property
    def code(self) -> int | None:
        return self.process.returncode

    @property
    def text(self) -> str:
        # a fork makes it a moment after it was asked for
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, seconds: float = PATIENCE) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Come back when a condition holds; it must before the process ends."""
        end = time.monotonic() + PATIENCE
        while not holds():
            assert self.process.poll() is None, f"ended ({self.code}) before {what}:\n{self.text}"
            assert time.monotonic() < end, f"no {what} after {PATIENCE} s:\n{self.text}"
            time.sleep(POLL)

    def kill(self) -> None:
        """SIGKILL for client, scheduler and workers at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        self.gone()

    def gone(self, seconds: float = 20.0) -> list[str]:
        """Processes of the group that are still alive after a while, as text."""
        end = time.monotonic() + seconds
        while (left := members(self.process.pid)) and time.monotonic() < end:
            time.sleep(POLL)
        return left


def members(group: int) -> list[str]:
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
    return found


def workers(pid: int) -> list[psutil.Process]:
    """Worker processes of a client."""
    below = psutil.Process(pid).children()
    return [child for child in below if "spawn_main" in " ".join(child.cmdline())]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def n_lines(command: Command, job: str) -> int:
    """Lines of a job, fast: for polling."""
    return read(command.journal).count(f'"job": "{job}"'.encode())


def tree(store: Path) -> dict[str, bytes]:
    """Every file of a store but its metadata, which holds the config with the output's name."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "zarr.json"
    }


def assert_identical(
    command: Command,
    reference: Command,
    *,
    redone: Sequence[tuple[str, int]] = (),
    folders: Sequence[str] = (),
) -> None:
    """Same bytes as the reference, every block noted once (but those redone), and nothing left beside."""
    ours, theirs = tree(command.store), tree(reference.store)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    for kind in (".pt", ".hspy"):
        a, b = (c.store.with_suffix(kind).read_bytes() for c in (command, reference))
        assert a == b, f"{kind} differs from the reference"
    wanted = Counter((job, i) for job in JOBS for i in range(N_BLOCKS)) + Counter(redone)
    lines = Counter(command.lines())
    assert {line: n for line, n in lines.items() if line[0] in JOBS} == wanted
    assert {n for line, n in lines.items() if line[0] not in JOBS} == {1}  # the survey's
    left = {path.name for path in command.run_folder.iterdir()}
    assert left == {"journal", "report.json", "run.json", *folders}
    names = {
        path.name for path in command.folder.iterdir() if path.name.startswith(f"{command.name}")
    }
    suffixes = (".zarr", ".pt", ".hspy", ".run", "_results.json")
    assert names == {f"{command.name}{suffix}" for suffix in suffixes}


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    words = bytearray(path.read_bytes())
    words[len(words) // 2] ^= 4
    path.write_bytes(words)


@contextlib.contextmanager
def cleaned(*commands: Command) -> Iterator[None]:
    try:
        yield
    finally:
        for command in commands:
            command.clean()


@contextlib.contextmanager
def external_cluster(folder: Path, **environment: str) -> Iterator[list[int]]:
    """A scheduler and two workers; gives the processes of the workers, and last that of the scheduler."""
    path = f"{folder}/scheduler.json"
    environment = {**os.environ, "PYTHONPATH": _python_path(folder), **environment}
    file = ["--scheduler-file", path]
    lines = [
        ["scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", ":0", *file],
        *[["worker", "--no-nanny", "--nthreads", "1", "--no-dashboard", *file]] * 2,
    ]
    processes = []
    try:
        with open(folder / "cluster.log", "wb") as log:
            for line in lines:
                argv = [sys.executable, "-m", "dask", *line]
                processes.append(
                    subprocess.Popen(argv, stdout=log, stderr=log, env=environment, cwd=folder)
                )
        end = time.monotonic() + PATIENCE
        while read(folder / "cluster.log").count(b"Registered to") < 2:
            assert time.monotonic() < end, read(folder / "cluster.log")
            time.sleep(POLL)
        yield [process.pid for process in (*processes[1:], processes[0])]
    finally:
        for process in processes:
            process.kill()
            process.wait()
