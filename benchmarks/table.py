"""The table: every row for ours and for the peers, in one run, in turns, with goals and limits.

    python -m benchmarks.table [--gb 2.147] [--rows analysis crop ...] [--rounds 3] [--json benchmarks/results/table.json]
        [--peers numpy dask ...] [--peer-python libertem=/path/to/python] [--memory 0.5 4] [--note TEXT]

Ours are the public commands, in two settings (2x1: worker processes with a thread each; 1x2: threads of one
process), their seconds from the first submission to the last rename; in brackets the whole process. Peers are the
functions in benchmarks/peers, their seconds of work after imports. What they make is compared with ours.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import agreement, limits, memory, paper
from benchmarks.data import scan_rows, write_scan
from benchmarks.rows import ROWS, SETTINGS, Row, goal_seconds, our_command, our_results
from benchmarks.watch import Watched, watch

PEERS = ("numpy", "dask", "torch", "hyperspy")
Say = Callable[[str], None]


class Contest:
    """All runs of one row, which take turns."""

    def __init__(self, row: Row, source: Any, folder: Path, options: argparse.Namespace) -> None:
        self.row, self.source, self.folder, self.options = row, source, folder, options
        self.runs: dict[str, list[dict[str, float]]] = {}
        self.left_out: dict[str, str] = {}
        self.reference = folder / f"ours.{row.suffix}"
        self.ours: Any = None
        self.sample: Any = None

    def turn(self) -> None:
        """Each contestant once, ours first."""
        for setting in self.options.settings:
            self._ours(setting)
        for library in self.options.libraries:
            if library not in self.left_out:
                self._peer(library)

    def _ready(self) -> None:
        if self.row.cold:
            limits.drop_cache(self.source.path)

    def _ours(self, setting: str) -> None:
        kept = self.ours is not None
        output = self.folder / f"again.{self.row.suffix}" if kept else self.reference
        self._ready()
        command = our_command(self.row, setting, self.source.path, output, self.options.cores)
        watched = watch(command)
        found = our_results(self.row, output)
        self._note(f"ours {setting}", found.seconds, watched)
        if kept:
            remove_all(self.folder, "again")
        else:
            self.ours = found
            self.sample = agreement.sample(output, limits.SAMPLE_BYTES)

    def _peer(self, library: str) -> None:
        output = self.folder / f"peer.{self.row.suffix}"
        found = self.folder / "found.npz"
        task = self.source.task(library, self.row.name, output, found, self.options.cores)
        python = self.options.pythons.get(library, sys.executable)
        self._ready()
        try:
            watched = watch([python, "-m", "benchmarks.peers", json.dumps(task)])
        except SystemExit as error:  # of a peer, perhaps for want of memory: the others go on
            self.left_out[library] = f"failed: {str(error).strip().splitlines()[-1]}"
            remove_all(self.folder, "peer")
            return
        words = json.loads(watched.output.strip().splitlines()[-1])
        if "cannot" in words:
            self.left_out[library] = words["cannot"]
            return
        first = library not in self.runs
        self._note(library, words["seconds"], watched)
        if first:
            if found.exists():
                agreement.check_analysis(self.reference, found)
            if not self.row.analysis_only:
                agreement.check_patterns(self.reference, output)
        remove_all(self.folder, "peer")
        found.unlink(missing_ok=True)

    def _note(self, name: str, seconds: float, watched: Watched) -> None:
        run = {
            "seconds": seconds,
            "process_seconds": watched.seconds,
            "cpu_seconds": watched.cpu_seconds,
        }
        self.runs.setdefault(name, []).append(run)

    def words(self, machine: limits.Machine, before: dict[str, float]) -> dict[str, Any]:
        """What the result file says of the row; ``before`` has our medians of earlier rows."""
        n_bytes = self.ours.input_bytes
        best = min(median(runs) for name, runs in self.runs.items() if name.startswith("ours"))
        before[self.row.name] = best
        return {
            "row": self.row.name,
            "title": self.row.title,
            "bytes": n_bytes,
            "stored_bytes": self.ours.stored_bytes,
            "ours": best,
            "goal": goal_seconds(self.row, n_bytes, before),
            "limit": asdict(limits.limit_of(self.row, self.ours, machine, self.sample)),
            "runs": self.runs,
            "left_out": self.left_out,
        }


class ScanFile:
    """The input, and how its pixels lie in it, which peers are told."""

    def __init__(self, path: Path) -> None:
        from stem_dask.readers.open import find

        found = find(path)
        self.path, self.source = path, found.source

    def task(self, library: str, row: str, output: Path, found: Path, cores: int) -> dict[str, Any]:
        """One row for one peer; see `benchmarks.peers.Task`."""
        flat: Any = self.source
        return {
            "library": library,
            "row": row,
            "input": str(self.path),
            "offset": flat.offset,
            "shape": list(flat.shape),
            "dtype": str(flat.dtype),
            "output": str(output),
            "found": str(found),
            "cores": cores,
        }


def median(runs: Sequence[dict[str, float]], what: str = "seconds") -> float:
    """Of one figure over all rounds."""
    return statistics.median(run[what] for run in runs)


def remove_all(folder: Path, name: str) -> None:
    """Remove an output and what lies beside it."""
    from stem_dask.storage.publish import remove

    for path in folder.glob(f"{name}*"):
        remove(path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the table; prints it and returns what the result file says."""
    options = parsed(argv)
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    with tempfile.TemporaryDirectory(dir=options.folder, prefix="stem_dask-bench-") as name:
        folder = Path(name)
        result: dict[str, Any] = {
            "command": paper.command("benchmarks.table", options.argv),
            **paper.circumstances(),
            "note": options.note,
            "gigabytes": options.gb,
            "rounds": options.rounds,
            "cores": options.cores,
        }
        rows = scan_rows(int(options.gb * 1e9), options.scan_x, options.detector)
        scan = ScanFile(write_scan(folder / "scan.dm4", rows, options.scan_x, options.detector))
        warm_up(scan, folder, options)
        machine = limits.machine(scan.path, options.cores, options.written_bytes)
        paper.say_machine(say, result, machine)
        result["machine"]["bandwidths"] = machine.words()
        result |= {"rows": [], "memory": [], "lines": lines}
        for row in contests(scan, folder, options, machine, say):
            result["rows"].append(row)
            save(options.json, result)  # a long run that is stopped leaves what it has
        remove_all(folder, "scan")
        result["memory"] = memories(folder, options, say)
    save(options.json, result)
    return result


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result file, if one was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def warm_up(scan: ScanFile, folder: Path, options: argparse.Namespace) -> None:
    """Each of our commands once, not measured: kernels are compiled once for all time, files come into the cache."""
    for row in {ROWS[name].command: ROWS[name] for name in options.rows}.values():
        output = folder / f"warm.{row.suffix}"
        small = write_scan(folder / "warm.dm4", 2, 4, options.detector)
        watch(our_command(row, options.settings[0], small, output, options.cores))
        remove_all(folder, "warm")


def contests(
    scan: ScanFile, folder: Path, options: argparse.Namespace, machine: limits.Machine, say: Say
) -> Iterator[dict[str, Any]]:
    """All rows, each for all rounds before the next begins, so that what is compared was near in time."""
    say(paper.HEADING)
    before: dict[str, float] = {}
    for name in options.rows:
        contest = Contest(ROWS[name], scan, folder, options)
        for _ in range(options.rounds):
            contest.turn()
        words = contest.words(machine, before)
        paper.say_row(say, words)
        remove_all(folder, "ours")
        yield words


def memories(folder: Path, options: argparse.Namespace, say: Say) -> list[dict[str, Any]]:
    """Peak memory of the whole job against the size of the input, of ours and of the peers."""
    found: list[dict[str, Any]] = []
    for gigabytes in options.memory:
        rows = scan_rows(int(gigabytes * 1e9), options.scan_x, options.detector)
        scan = ScanFile(write_scan(folder / "scan.dm4", rows, options.scan_x, options.detector))
        output = folder / "out.zarr"
        commands = {
            f"ours {setting}": our_command(ROWS["crop"], setting, scan.path, output, options.cores)
            for setting in options.settings
        }
        for library in options.libraries:
            task = scan.task(library, "crop", output, folder / "found.npz", options.cores)
            python = options.pythons.get(library, sys.executable)
            commands[library] = [python, "-m", "benchmarks.peers", json.dumps(task)]
        for who, command in commands.items():
            try:
                peak = watch(command, memory=True).peak_bytes
            except SystemExit as error:
                if who.startswith("ours"):
                    raise
                say(f"memory {who} at {gigabytes:g} GB failed: {str(error).splitlines()[-1]}")
            else:
                found.append({"who": who, "gigabytes": gigabytes, "peak_bytes": peak})
            remove_all(folder, "out")
    memory.say_growth(say, found)
    return found


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """The options, with what follows from them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.147, help="GB of input")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    text = "NAME=PYTHON: a peer in an environment of its own (libertem, py4dstem, or hyperspy with zarr 2)"
    parser.add_argument("--peer-python", nargs="+", default=[], metavar="NAME=PYTHON", help=text)
    parser.add_argument("--memory", type=float, nargs="*", default=[0.5, 4], help="GB of input")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--scan-x", type=int, default=128)
    parser.add_argument("--detector", type=int, default=256)
    parser.add_argument(
        "--written-bytes", type=int, default=limits.WRITTEN_BYTES, help=argparse.SUPPRESS
    )
    parser.add_argument("--folder", help="where inputs and outputs are made and removed again")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument(
        "--note", default="", help="a word on the machine's state, kept with the result"
    )
    options = parser.parse_args(argv)
    options.argv = sys.argv[1:] if argv is None else argv
    options.pythons = dict(word.split("=", 1) for word in options.peer_python)
    options.libraries = list(dict.fromkeys([*options.peers, *options.pythons]))
    return options


if __name__ == "__main__":
    main()
