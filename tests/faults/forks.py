"""Commands of stem_dask in real processes that cost milliseconds to start.

A server, one fresh process with a single thread, has imported everything and compiled the kernels. For each command it
forks a child, which runs the command line to its end and exits with its code, or ends itself with SIGKILL at a moment
that was asked for. Moments are counted, no clock is involved.
"""

import contextlib
import faulthandler
import gc
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
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

    ``name``: a rename to a name in the output's folder; ``block``: any other rename; ``removal``: of a file or folder;
    ``line``: of the journal. ``after`` is after the event; before the end of a line means that it is torn.
    """

    kind: str
    nth: int
    after: bool


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    text: str


class Forks:
    """The side of the tests: starts the server, sends commands, waits for their ends."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        checkout = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": checkout, "TMPDIR": str(folder)}
        environment.pop("SLURM_JOB_END_TIME", None)
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=folder,
            text=True,
        )

    def finish(
        self, program: str, *argv: str, pool: bool = True, at: Moment | None = None
    ) -> Ended:
        """Run ``main`` of a module in a fork; ``pool`` takes plain threads for a cluster of threads."""
        moment = None if at is None else [at.kind, at.nth, at.after]
        request = {"program": program, "argv": argv, "pool": pool, "at": moment}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({**request, "log": str(self.log)}) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the server of forks has ended"
        return Ended(int(answer), self.log.read_text(errors="replace"))

    def close(self) -> None:
        self.server.communicate("", timeout=PATIENCE)  # the end of its input is the end of its work


def serve(folder: str) -> None:
    """Fork a child for each line of the input, and answer with its exit code."""
    _warm(Path(tempfile.mkdtemp(dir=folder)))
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            _child(request)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _warm(folder: Path) -> None:
    """One whole run, for imports and compiled kernels; it leaves no thread, for a fork would not have it."""
    import dask
    import distributed  # noqa: F401  for those who take the real cluster
    import numpy as np
    from zarr.core.sync import cleanup_resources

    from stem_dask.run import main

    data = np.zeros((2, 2, 16, 16), np.uint16)
    data[..., 6:9, 6:9] = 9
    np.save(folder / "warm.npy", data)
    config = folder / "warm.yaml"
    config.write_text(
        f"{{input: {{path: {folder}/warm.npy}}, output: {{path: {folder}/warm.zarr, figure: false}}}}"
    )
    with dask.config.set(scheduler="sync"), _in_a_pool():
        assert main([str(config), "--quiet"]) == 0
    cleanup_resources()
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()


def main(argv: Sequence[str]) -> int:
    """Export a finished store, as the Python API does it; returns the exit code."""
    from stem_dask.exports import export_from_store
    from stem_dask.run import guarded

    store, path = argv
    return guarded(lambda: len(export_from_store(store, path)) and 0)


def _child(request: dict[str, Any]) -> NoReturn:
    """Run one command; never comes back."""
    code = 1
    gc.disable()  # it would touch, and so copy, every page of the server
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        if request["at"]:
            _kill_at(Moment(*request["at"]))
        with _in_a_pool() if request["pool"] else contextlib.nullcontext():
            code = importlib.import_module(request["program"]).main(request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _in_a_pool() -> Iterator[None]:
    """The engine on plain threads, as the Python API runs without a client: a cluster takes a second to start."""
    import stem_dask.pipeline
    from stem_dask.cluster import Connection
    from stem_dask.plan import Worker

    @contextlib.contextmanager
    def connect(**options: Any) -> Iterator[Connection]:
        yield Connection(None, "pool", 1, 2, "", Worker(None, 2))

    plain, stem_dask.pipeline.connect = stem_dask.pipeline.connect, connect
    try:
        yield
    finally:
        stem_dask.pipeline.connect = plain


def _kill_at(moment: Moment) -> None:
    """Count the events of a kind, and end this process at one of them."""
    from stem_dask.journal import Journal

    events = itertools.count(1)

    def kill() -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive")

    def counted(plain: Callable[..., Any], kind: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            hit = kind(*args) == moment.kind and next(events) == moment.nth
            if hit and not moment.after:
                kill()
            result = plain(*args, **options)
            if hit:
                kill()
            return result

        return call

    def renamed(source: Any, target: Any) -> str:
        """Blocks and metadata lie in the folders of a run and of its store."""
        place = os.fspath(target)
        return "block" if ".zarr.incomplete/" in place or place.endswith(".block") else "name"

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
        setattr(os, name, counted(getattr(os, name), lambda *args: "removal"))
    plain_write, Journal._write = Journal._write, write


if __name__ == "__main__":
    serve(sys.argv[1])
