"""Commands of stem_dask in real processes that cost milliseconds to start.

A server, one fresh process with a single thread, has imported everything and compiled the kernels. For each command it
forks a child, in a session of its own, which runs the command line to its end and exits with its code, or ends itself
with SIGKILL at a moment that was asked for. Moments are counted, no clock is involved.
"""

import contextlib
import faulthandler
import gc
import importlib
import itertools
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

#: a command that takes longer is ended, and says where it stood
PATIENCE = 60


@dataclass(frozen=True)
class Moment:
    """SIGKILL at the n-th event of a kind, counted in one process.

    ``name``: a rename to a name in the output's folder; ``file``: a rename within a folder, as zarr writes documents;
    ``block``: any other rename; ``removal``: of a file or folder; ``line``: of the journal. ``after`` is after the event;
    before the end of a line means that it is torn.
    """

    kind: str
    nth: int
    after: bool


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    text: str


class Fork:
    """A command that runs; the verbs are those of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.returncode: int | None = None
        self.pid = self._answer()

    def _answer(self) -> int:
        answer = self.connection.recv(64)
        assert answer, "the server of forks has ended"
        return int(answer)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("fork", timeout or 0)
            self.returncode = self._answer()
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, sign: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sign)


class Forks:
    """The side of the tests: starts the server, sends commands, waits for their ends; threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, str(folder / "socket")
        self.numbers = itertools.count()
        checkout = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": checkout, "TMPDIR": str(folder)}
        environment.pop("SLURM_JOB_END_TIME", None)
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            env=environment,
            cwd=folder,
        )

    def start(self, program: str, argv: Sequence[str], log: Path, **how: Any) -> Fork:
        """Run ``main`` of a module in a fork.

        ``how``: ``pool`` takes plain threads for a cluster of threads, ``at`` is a moment, ``before`` is code that runs
        first; ``environment``, ``folder`` and ``limits`` are those of the process.
        """
        end = time.monotonic() + PATIENCE
        while not os.path.exists(self.address):
            assert self.server.poll() is None, "the server of forks has ended"
            assert time.monotonic() < end, "the server of forks does not begin"
            time.sleep(0.01)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self.address)
        request = {"program": program, "argv": argv, "log": str(log), **how}
        connection.sendall(json.dumps(request).encode())
        return Fork(connection)

    def finish(
        self,
        program: str,
        *argv: str,
        pool: bool = True,
        at: Moment | None = None,
        before: str = "",
    ) -> Ended:
        """Run it to its end."""
        log = self.folder / f"log{next(self.numbers)}"
        moment = None if at is None else [at.kind, at.nth, at.after]
        code = self.start(program, argv, log, pool=pool, at=moment, before=before).wait()
        ended = Ended(code, log.read_text(errors="replace"))
        log.unlink()
        return ended

    def close(self) -> None:
        self.server.communicate(
            b"", timeout=PATIENCE
        )  # the end of its input is the end of its work


def serve(folder: str) -> None:
    """Fork for each connection; the process of a command is told first, and then its exit code."""
    _warm(Path(tempfile.mkdtemp(dir=folder)))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{folder}/socket.new")
    listener.listen(16)
    os.rename(f"{folder}/socket.new", f"{folder}/socket")  # whoever sees it can connect
    running: dict[int, tuple[int, socket.socket]] = {}
    while sys.stdin not in (ready := select.select([listener, sys.stdin, *running], [], [])[0]):
        for handle in set(ready) & set(running):
            pid, connection = running.pop(handle)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            connection.send(str(code).encode())
            connection.close()
            os.close(handle)
        if listener in ready:
            connection, _ = listener.accept()
            request = json.loads(connection.recv(2**20))
            if not (pid := os.fork()):
                os.setsid()
                connection.send(str(os.getpid()).encode())
                _child(request)
            running[os.pidfd_open(pid)] = pid, connection


def _warm(folder: Path) -> None:
    """One whole run, for imports and compiled kernels; it leaves no thread, for a fork would not have it."""
    import dask
    import distributed  # noqa: F401  for those who take the real cluster
    import forks  # noqa: F401  this file as a module, for its command
    import numpy as np
    from zarr.core.sync import cleanup_resources

    import stem_dask.cli.jobs
    import stem_dask.cli.main
    import stem_dask.readers.zarr_chunks  # noqa: F401
    from stem_dask.cli.run import main

    data = np.zeros((2, 2, 16, 16), np.uint16)
    data[..., 6:9, 6:9] = 9
    np.save(folder / "warm.npy", data)
    config = folder / "warm.yaml"
    config.write_text(
        f"{{input: {{path: {folder}/warm.npy}}, output: {{path: {folder}/warm.zarr, export: [pt, hspy], figure: false}}}}"
    )
    with dask.config.set(scheduler="sync"), _in_a_pool():
        assert main([str(config), "--quiet"]) == 0
    cleanup_resources()
    for thread in set(threading.enumerate()) - {threading.main_thread()}:
        thread.join(PATIENCE)  # zarr tells its own to end, and does not wait for it
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()


def main(argv: Sequence[str]) -> int:
    """Export a finished store, as the Python API does it; returns the exit code."""
    from stem_dask.cli.signals import guarded
    from stem_dask.stages.export import export_from_store

    store, path = argv
    return guarded(lambda: len(export_from_store(store, path)) and 0)


def _child(request: dict[str, Any]) -> NoReturn:
    """Run one command; never comes back."""
    code = 1
    try:
        _settle(request)
        pool = request.get("pool", False)
        if pool:
            gc.disable()  # it is over soon
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
        if request.get("at"):
            _kill_at(Moment(*request["at"]))
        with _in_a_pool() if pool else contextlib.nullcontext():
            code = importlib.import_module(request["program"]).main(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _settle(request: dict[str, Any]) -> None:
    """What a process has from its parent, and the code that comes first."""
    import dask

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "environment" in request:
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        tempfile.tempdir = None
        dask.config.refresh()
    for what, n_bytes in request.get("limits", {}).items():
        resource.setrlimit(int(what), (n_bytes, n_bytes))
    exec(request.get("before", ""), {})


@contextlib.contextmanager
def _in_a_pool() -> Iterator[None]:
    """The engine on plain threads, as the Python API runs without a client: a cluster takes a second to start."""
    import stem_dask.job.run
    from stem_dask.cluster.connect import Connection
    from stem_dask.core.model import Worker

    @contextlib.contextmanager
    def connect(**options: Any) -> Iterator[Connection]:
        yield Connection(None, "pool", 1, 2, "", Worker(None, 2))

    plain, stem_dask.job.run.connect = stem_dask.job.run.connect, connect
    try:
        yield
    finally:
        stem_dask.job.run.connect = plain


def _kill_at(moment: Moment) -> None:
    """Count the events of a kind, and end this process at one of them."""
    from stem_dask.engine.journal import Journal

    events = itertools.count(1)

    def kill() -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive")

    def counted(plain: Callable[..., Any], kind: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            hit = kind(*args, **options) == moment.kind and next(events) == moment.nth
            if hit and not moment.after:
                kill()
            result = plain(*args, **options)
            if hit:
                kill()
            return result

        return call

    def renamed(source: Any, target: Any) -> str:
        """Blocks are staged in the folders of a run and of its store; zarr writes its files beside their names."""
        place = os.fspath(target)
        if ".zarr.incomplete/" not in place and not place.endswith(".block"):
            return "name"
        return "file" if os.path.dirname(source) == os.path.dirname(place) else "block"

    def removed(path: Any, **options: Any) -> str:
        """What is not there is only asked for."""
        return "removal" if "dir_fd" in options or os.path.lexists(path) else ""

    def write(journal: Any, words: Mapping[str, Any]) -> None:
        if moment.kind == "line" and next(events) == moment.nth:
            if moment.after:
                plain_write(journal, words)
            else:
                with open(journal.path, "ab") as file:
                    file.write(json.dumps(words).encode()[:30])
            kill()
        plain_write(journal, words)

    os.replace = counted(os.replace, renamed)
    os.rename = counted(os.rename, renamed)
    for name in ("unlink", "rmdir", "remove"):
        setattr(os, name, counted(getattr(os, name), removed))
    plain_write, Journal._write = Journal._write, write


if __name__ == "__main__":
    serve(sys.argv[1])
