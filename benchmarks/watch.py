"""Run a command in a separate process and measure wall time, CPU time and memory."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: runs a command and reaps orphaned descendants, too: the system counts CPU seconds only of processes that were waited for
#: (36 is PR_SET_CHILD_SUBREAPER)
_WAIT_FOR_ALL = """
import ctypes, os, subprocess, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
code = subprocess.call(sys.argv[1:])
try:
    while True:
        os.wait()
except ChildProcessError:
    sys.exit(code)
"""


@dataclass(frozen=True)
class Watched:
    """Wall and CPU seconds of a command and its descendants, its output, and its peak memory if measured."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def watch(
    command: Sequence[str], *, memory: bool = False, env: dict[str, str] | None = None
) -> Watched:
    """Run a command to its end.

    Parameters
    ----------
    memory : sample the sum of anonymous resident memory over all processes (RssAnon, without the page cache) every
        20 ms. Linux only; sampling slows the command, so measure speed without it
    env : added to the environment

    Raises
    ------
    SystemExit
        If the command fails, with the end of its output.
    """
    environment = {**os.environ, **(env or {})}
    # otherwise each process would compile the package to bytecode again
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        whole = [sys.executable, "-c", _WAIT_FOR_ALL, *command]
        run = subprocess.Popen(whole, stdout=file, stderr=file, env=environment)
        peak = _watch_memory(run.pid) if memory else 0
        _, status, usage = os.wait4(run.pid, 0)
        seconds = time.perf_counter() - begun
        run.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait again
        file.seek(0)
        output = file.read()
    if run.returncode:
        raise SystemExit(
            f"ended with exit code {run.returncode}: {' '.join(command)}\n{output[-3000:]}"
        )
    return Watched(seconds, usage.ru_utime + usage.ru_stime, peak, output)


def _watch_memory(root: int) -> int:
    """The largest sum until the process has ended; it remains a zombie without memory."""
    if sys.platform != "linux":
        raise SystemExit("memory is read from /proc, which only Linux has")
    peak = 0
    while not _ended(root):
        peak = max(peak, sum(_anonymous(pid) for pid in _tree(root)))
        time.sleep(0.02)
    return peak


def _ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _tree(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def _anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024
