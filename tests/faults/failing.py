"""Runs the real command in a fork (see `forks`), on a disk that refuses a certain call.

Python's own calls are refused as the kernel would: what was asked for has not happened (of a
close it has, and what was written may be lost), and only open and rename tell the name of the file. HDF5 calls the
system itself; its files are refused as a whole, when they are opened and closed.
"""

import builtins
import contextlib
import io
import json
import os
import re
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

#: zarr's temporary names
RANDOM = re.compile(r"[0-9a-f]{32}")
#: arrays of the store that are written by the same lines: one of them stands for all
ALIKE = re.compile(r"(?<=\.zarr\.incomplete)/(?!patterns)(analysis/|output/)?\w+(?=/|$)")
#: so many calls of one line on one file are told apart
DIFFERENT = 2


class Disk:
    """Refuses calls on files below a folder.

    The first call of a kind (or of any) that is not among ``spared``, and then all of the kind on the same file, as long
    as the run lasts; all whatsoever when the disk is ``dead`` from there on. With ``passing`` every file is refused
    once, and only within tasks. A call is known by file, line of the package, and how often that was there.
    """

    def __init__(
        self, root: str, kind: str, error: int, spared: Sequence[str] = (), how: str = "file"
    ) -> None:
        self.root, self.kind, self.error, self.how = root, kind, error, how
        self.spared = set(spared)
        self.counts: Counter[str] = Counter()
        self.calls: list[tuple[str, str]] = []
        self.refused: list[dict[str, Any]] = []
        self.in_task = False
        self.handles: dict[int, str] = {}
        self.lock = threading.Lock()
        self.open, self.os_open, self.os_close = io.open, os.open, os.close

    def holds(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.root)

    def call(self, kind: str, path: Any, *, named: bool = False) -> None:
        """One call of the system: refused when its turn has come."""
        if not self.holds(path):
            return
        file = RANDOM.sub("*", os.path.relpath(path, self.root))
        with self.lock:
            self.calls.append((kind, file))
            if self.kind not in (kind, "any") or not self.refuses(kind, file):
                return
        raise OSError(self.error, os.strerror(self.error), *([os.fspath(path)] if named else []))

    def refuses(self, kind: str, file: str) -> bool:
        where = self.where()
        shown = {
            "passing": file,
            "file": ALIKE.sub("/*", file),
            "dead": file.split("/")[0],  # a few calls of each output will do
        }
        if self.how == "dead":
            where = where.partition(":")[0]
        name = f"{kind} {shown[self.how]}, {where}"
        self.counts[name] += 1
        if self.how == "passing":
            hit = where == "task" and self.counts[name] == 1
        elif self.refused:
            hit = self.how == "dead" or file == self.refused[0]["file"]
        else:
            name += f", {min(self.counts[name], DIFFERENT) if self.how == 'file' else 1}"
            hit = name not in self.spared
        if hit:
            self.refused.append({"turn": name, "file": file})
        return hit

    def where(self) -> str:
        """The two innermost lines of the package; of the main thread, when another one works for it."""
        main = threading.main_thread()
        if self.in_task and threading.current_thread() is not main:
            return "task"
        frame, lines = sys._current_frames().get(main.ident or 0), []
        while frame is not None and len(lines) < 2:
            if "/stem_dask/" in frame.f_code.co_filename:
                lines.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        return " < ".join(lines)

    def attach(self) -> None:
        """Put our functions in the place of Python's."""
        import h5py

        builtins.open = io.open = self.open_file  # type: ignore[assignment]
        os.open, os.close = self.open_handle, self.close_handle
        os.fsync = lambda handle: self.call("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        os.pwrite, os.ftruncate = self.on_handle(os.pwrite), self.on_handle(os.ftruncate)
        os.replace, os.rename = self.renamed(os.replace), self.renamed(os.rename)
        h5py.File = hdf5(self, h5py.File)

    def open_file(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **more: Any):
        if not (self.holds(file) and set(mode) & set("wax+")):
            return self.open(file, mode, buffering, *args, **more)
        self.call("open", file, named=True)
        more.pop("opener", None)  # which keeps links out, and there are none
        raw = raw_file(self, os.fspath(file), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        binary: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, *args, **more)

    def open_handle(self, path: Any, flags: int, *args: Any, **more: Any) -> int:
        writes = self.holds(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes:
            self.call("open", path, named=True)
        handle = self.os_open(path, flags, *args, **more)
        if writes:
            self.handles[handle] = os.fspath(path)
        return handle

    def close_handle(self, handle: int) -> None:
        self.os_close(handle)
        self.call("close", self.handles.pop(handle, None))

    def on_handle(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def write(handle: int, *args: Any) -> Any:
            self.call("write", self.handles.get(handle))
            return plain(handle, *args)

        return write

    def renamed(self, plain: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any, **more: Any) -> None:
            self.call("rename", target, named=True)
            plain(source, target, **more)

        return rename


def raw_file(disk: Disk, path: str, mode: str) -> io.FileIO:
    class Raw(io.FileIO):
        def write(self, words: Any) -> int:
            disk.call("write", path)
            return super().write(words)

        def truncate(self, size: int | None = None) -> int:
            disk.call("write", path)
            return super().truncate(size)

        def close(self) -> None:
            if not self.closed:
                super().close()
                disk.call("close", path)

    return Raw(path, mode)


def hdf5(disk: Disk, plain: Any) -> type:
    class File(plain):  # type: ignore[misc]
        written: Any = None

        def __init__(self, name: Any, mode: str = "r", *args: Any, **more: Any) -> None:
            if mode != "r":
                disk.call("open", name, named=True)
                self.written = name
            super().__init__(name, mode, *args, **more)

        def close(self) -> None:
            super().close()
            written, self.written = self.written, None
            disk.call("close", written)

    return File


def one_run(disk: Disk, argv: list[str]) -> dict[str, Any]:
    """Run the command in this process; what came of it."""
    from stem_dask.cli import run
    from stem_dask.engine import run as engine

    plain = engine._write_block

    def write_block(*args: Any) -> Any:
        disk.in_task = True
        try:
            return plain(*args)
        finally:
            disk.in_task = False

    engine._write_block = write_block
    disk.attach()
    try:
        code = run.main(argv)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return {"code": code, "refused": disk.refused, "calls": disk.calls}


def main(argv: Sequence[str]) -> int:
    """In a fork of `forks`: the disk and the file for the answer, as JSON, then the command line."""
    request = json.loads(argv[0])
    _one_after_another()
    answer = one_run(Disk(**request["disk"]), list(argv[1:]))
    with open(request["answer"], "w") as file:
        json.dump(answer, file)
    return int(answer["code"])


def _one_after_another() -> None:
    """One task at a time, so that a call is known again in the next run; nobody waits, and every line is synced."""
    import dask

    from stem_dask.cluster.connect import Connection
    from stem_dask.core.model import Worker
    from stem_dask.engine import journal
    from stem_dask.engine import run as engine
    from stem_dask.job import run as pipeline

    @contextlib.contextmanager
    def connect(**options: Any) -> Iterator[Connection]:
        yield Connection(None, "this process", 1, 1, "none", Worker(None, 1))

    pipeline.connect = connect
    engine.RETRY_SECONDS = (0.001, 0.001, 0.001)
    journal.SYNC_SECONDS = -1.0
    dask.system.CPU_COUNT = 1
    dask.config.set(scheduler="sync")
