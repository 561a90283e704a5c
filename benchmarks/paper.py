"""What a measurement prints and records: lines, machine, commit."""

import os
import platform
import re
import shlex
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.limits import Machine
from benchmarks.rows import ROOT

Say = Callable[[str], None]

HEADING = (
    f"{'row':28} {'':13} {'seconds':>9} {'(process)':>10} {'cpu s':>8} {'GB/s':>7} {'x best':>7} "
    f"{'goal':>7} {'limit':>7} {'x limit':>8}"
)
PACKAGES = ("stem_dask", "numpy", "dask", "distributed", "zarr", "numba", "torch", "hyperspy")


def median(runs: Sequence[Mapping[str, float]], what: str = "seconds") -> float:
    """Median of one quantity over all rounds."""
    return statistics.median(run[what] for run in runs)


def command(module: str, words: Sequence[str]) -> str:
    """The command without folders of this machine.

    Examples
    --------
    >>> command("benchmarks.table", ["--peer-python", "libertem=/home/me/bin/python", "--json", "/data/a.json"])
    'python -m benchmarks.table --peer-python libertem=python --json a.json'
    """
    plain = [re.sub(r"(^|=)/.*/", r"\1", word) for word in words]
    return shlex.join(["python", "-m", module, *plain])


def circumstances() -> dict[str, Any]:
    """Commit, machine and versions."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in PACKAGES},
    }


def _git(*words: str) -> str:
    """Output of git; empty if the folder is not a checkout."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def say_machine(say: Say, result: Mapping[str, Any], found: Machine) -> None:
    """Print the machine, the commit, and the bandwidths behind the limits."""
    machine = result["machine"]
    say(
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, "
        f"python {machine['python']}; commit {result['commit'][:12] or 'unknown'}"
        f"{' with changes' if result['changed_files'] else ''}"
    )
    if result["note"]:
        say(result["note"])
    say(
        f"read {found.read / 1e9:.1f} GB/s warm on {found.cores} cores, {found.read_cold / 1e9:.2f} GB/s cold; "
        f"write and fsync {found.write / 1e9:.2f} GB/s"
    )


def say_row(say: Say, row: Mapping[str, Any]) -> None:
    """Print one line per library of a row, then those without the row."""
    limit = row["limit"]["seconds"]
    goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
    for i, (who, runs) in enumerate(row["runs"].items()):
        seconds = median(runs)
        process = f"({median(runs, 'process_seconds'):.1f})"
        title = row["title"] if i == 0 else ""
        say(
            f"{title:28} {who:13} {seconds:9.2f} {process:>10} "
            f"{median(runs, 'cpu_seconds'):8.1f} {row['bytes'] / seconds / 1e9:7.2f} {seconds / row['best']:7.2f} "
            f"{goal:>7} {limit:7.2f} {seconds / limit:8.1f}"
        )
    for why in dict.fromkeys(row["left_out"].values()):
        names = ", ".join(who for who, words in row["left_out"].items() if words == why)
        say(f"{'':28} without {names}: {why}")


def say_growth(say: Say, found: Sequence[Mapping[str, Any]]) -> None:
    """Print the peak memory of every library at every size, and the growth from the first to the last."""
    for who in dict.fromkeys(one["who"] for one in found):
        ones = [one for one in found if one["who"] == who]
        peaks = ", ".join(f"{o['peak_bytes'] / 1e6:.0f} MB at {o['gigabytes']:g} GB" for o in ones)
        growth = ones[-1]["peak_bytes"] / ones[0]["peak_bytes"] - 1
        say(f"memory {who:21} {peaks}: {growth:+.0%}")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds per GB of all rows and settings that both results contain."""
    old = {row["row"]: row for row in before["rows"]}
    machine = {
        name: now["machine"]["bandwidths"][name] / before["machine"]["bandwidths"][name]
        for name in ("read", "write")
    }
    found = []
    for row in now["rows"]:
        known = old.get(row["row"])
        for who in () if known is None else row["runs"].keys() & known["runs"].keys():
            pair = {
                what: [median(one["runs"][who], what) / one["bytes"] * 1e9 for one in (known, row)]
                for what in ("seconds", "cpu_seconds")
            }
            found.append({"row": row["row"], "who": who, "machine": machine, **pair})
    return found


def text_of(one: dict[str, Any], before: dict[str, Any]) -> str:
    """One line: before, after, the change, and the change of the machine.

    Examples
    --------
    >>> one = {"row": "crop", "who": "stem_dask 1x2", "seconds": [2, 1], "cpu_seconds": [2, 2], "machine": {"read": 1, "write": 2}}
    >>> text_of(one, {"commit": "c" * 40})
    'crop             stem_dask 1x2 2.00 -> 1.00 s per GB (-50%), CPU +0% since ccccccc; this machine reads +0%, writes +100%'
    """

    def change(pair: list[float]) -> str:
        return f"{pair[1] / pair[0] - 1:+.0%}"

    then, now = one["seconds"]
    return (
        f"{one['row']:16} {one['who']:13} {then:.2f} -> {now:.2f} s per GB ({change(one['seconds'])}), "
        f"CPU {change(one['cpu_seconds'])} since {before['commit'][:7]}; "
        f"this machine reads {one['machine']['read'] - 1:+.0%}, writes {one['machine']['write'] - 1:+.0%}"
    )
