"""The table: every row with stem_dask and with other libraries, alternating in one run, with goals and limits.

    python -m benchmarks.table [--gb 2.147] [--rows analysis crop ...] [--rounds 3] [--json benchmarks/results/table.json]
        [--peers numpy dask ...] [--peer-python libertem=/path/to/python] [--memory 0.5 4] [--note TEXT]
    python -m benchmarks.table --compare benchmarks/results/half.json [--rows crop convert]

stem_dask runs its public commands in two settings (2x1: worker processes with one thread each; 1x2: threads of one
process). Its seconds are from the first submission to the last rename; those of the whole process are in brackets. Peers
are the functions in benchmarks/peers; their seconds are of the work after imports. All outputs are compared.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import agreement, limits, paper
from benchmarks.data import scan_rows, write_scan
from benchmarks.paper import median
from benchmarks.rows import ROWS, SETTINGS, Row, goal_seconds, job_command, job_results
from benchmarks.watch import Watched, watch

PEERS = ("numpy", "dask", "torch", "hyperspy")
Say = Callable[[str], None]


class Contest:
    """All runs of one row, in alternation."""

    def __init__(self, row: Row, source: Any, folder: Path, options: argparse.Namespace) -> None:
        self.row, self.source, self.folder, self.options = row, source, folder, options
        self.runs: dict[str, list[dict[str, float]]] = {}
        self.left_out: dict[str, str] = {}
        self.reference = folder / f"reference.{row.suffix}"
        self.result: Any = None
        self.sample: Any = None

    def round(self) -> None:
        """Run each library once, stem_dask first."""
        for setting in self.options.settings:
            self._own(setting)
        for library in self.options.libraries:
            if library not in self.left_out:
                self._peer(library)

    def _ready(self) -> None:
        if self.row.cold:
            limits.drop_cache(self.source.path)

    def _own(self, setting: str) -> None:
        kept = self.result is not None
        output = self.folder / f"again.{self.row.suffix}" if kept else self.reference
        self._ready()
        command = job_command(self.row, setting, self.source.path, output, self.options.cores)
        watched = watch(command)
        found = job_results(self.row, output)
        self._note(f"stem_dask {setting}", found.seconds, watched)
        if kept:
            remove_all(self.folder, "again")
        else:
            self.result = found
            self.sample = agreement.sample(output, limits.SAMPLE_BYTES)

    def _peer(self, library: str) -> None:
        output = self.folder / f"peer.{self.row.suffix}"
        found = self.folder / "found.npz"
        task = self.source.task(library, self.row.name, output, found, self.options.cores)
        python = self.options.pythons.get(library, sys.executable)
        self._ready()
        try:
            watched = watch([python, "-m", "benchmarks.peers", json.dumps(task)])
        except SystemExit as error:  # a peer may run out of memory; continue with the others
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
        """The row for the result file; ``before`` holds the best medians of earlier rows."""
        n_bytes = self.result.input_bytes
        best = min(median(runs) for name, runs in self.runs.items() if name.startswith("stem_dask"))
        before[self.row.name] = best
        return {
            "row": self.row.name,
            "title": self.row.title,
            "bytes": n_bytes,
            "stored_bytes": self.result.stored_bytes,
            "best": best,
            "goal": goal_seconds(self.row, n_bytes, before),
            "limit": asdict(limits.limit_of(self.row, self.result, machine, self.sample)),
            "runs": self.runs,
            "left_out": self.left_out,
        }


class ScanFile:
    """The input, and the layout of its pixels, which peers receive."""

    def __init__(self, path: Path) -> None:
        from stem_dask.readers.open import find

        found = find(path)
        self.path, self.source = path, found.source

    def task(self, library: str, row: str, output: Path, found: Path, cores: int) -> dict[str, Any]:
        """The task of one row for one peer; see `benchmarks.peers.Task`."""
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


def remove_all(folder: Path, name: str) -> None:
    """Remove an output and the files with the same prefix."""
    from stem_dask.storage.publish import remove

    for path in folder.glob(f"{name}*"):
        remove(path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run and print the table; returns the content of the result file."""
    options = parsed(argv)

    def say(text: str) -> None:
        print(text, flush=True)

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
        result["machine"]["bandwidths"] = asdict(machine)
        result |= {"rows": [], "memory": []}
        for row in contests(scan, folder, options, machine, say):
            result["rows"].append(row)
            save(options.json, result)  # keep what an interrupted run has measured
        remove_all(folder, "scan")
        result["memory"] = memories(folder, options, say)
    save(options.json, result)
    if options.compare is not None:
        before = json.loads(options.compare.read_text())
        for one in paper.differences(before, result):
            say(paper.text_of(one, before))
    return result


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result file, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def warm_up(scan: ScanFile, folder: Path, options: argparse.Namespace) -> None:
    """Run each command of stem_dask once, unmeasured, to compile kernels and fill the page cache."""
    for row in {ROWS[name].command: ROWS[name] for name in options.rows}.values():
        output = folder / f"warm.{row.suffix}"
        small = write_scan(folder / "warm.dm4", 2, 4, options.detector)
        watch(job_command(row, options.settings[0], small, output, options.cores))
        remove_all(folder, "warm")


def contests(
    scan: ScanFile, folder: Path, options: argparse.Namespace, machine: limits.Machine, say: Say
) -> Iterator[dict[str, Any]]:
    """All rows; all rounds of a row run before the next row, so that compared runs are close in time."""
    say(paper.HEADING)
    before: dict[str, float] = {}
    for name in options.rows:
        contest = Contest(ROWS[name], scan, folder, options)
        for _ in range(options.rounds):
            contest.round()
        words = contest.words(machine, before)
        paper.say_row(say, words)
        remove_all(folder, "reference")
        yield words


def memories(folder: Path, options: argparse.Namespace, say: Say) -> list[dict[str, Any]]:
    """Peak memory of the whole job against the size of the input, for all libraries."""
    found: list[dict[str, Any]] = []
    for gigabytes in options.memory:
        rows = scan_rows(int(gigabytes * 1e9), options.scan_x, options.detector)
        scan = ScanFile(write_scan(folder / "scan.dm4", rows, options.scan_x, options.detector))
        output = folder / "out.zarr"
        commands = {
            f"stem_dask {setting}": job_command(
                ROWS["crop"], setting, scan.path, output, options.cores
            )
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
                if who.startswith("stem_dask"):
                    raise
                say(f"memory {who} at {gigabytes:g} GB failed: {str(error).splitlines()[-1]}")
            else:
                found.append({"who": who, "gigabytes": gigabytes, "peak_bytes": peak})
            remove_all(folder, "out")
    paper.say_growth(say, found)
    return found


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """The options, with derived ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.147, help="GB of input")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    text = "NAME=PYTHON: a peer in a separate environment (libertem, py4dstem, or hyperspy with zarr 2)"
    parser.add_argument("--peer-python", nargs="+", default=[], metavar="NAME=PYTHON", help=text)
    parser.add_argument("--memory", type=float, nargs="*", default=[0.5, 4], help="GB of input")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--scan-x", type=int, default=128)
    parser.add_argument("--detector", type=int, default=256)
    parser.add_argument(
        "--written-bytes", type=int, default=limits.WRITTEN_BYTES, help=argparse.SUPPRESS
    )
    parser.add_argument("--folder", help="folder for temporary inputs and outputs")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument(
        "--note", default="", help="remark on the state of the machine, stored with the result"
    )
    text = "print the difference to a result file; without other libraries, and of the same size"
    parser.add_argument("--compare", type=Path, metavar="FILE", help=text)
    options = parser.parse_args(argv)
    if options.compare is not None:  # in smaller inputs the constant cost of a job weighs more
        gigabytes = json.loads(options.compare.read_text())["gigabytes"]
        few = {
            "rows": ["crop", "convert"],
            "settings": ["1x2"],
            "rounds": 1,
            "peers": [],
            "memory": [],
        }
        parser.set_defaults(gb=gigabytes, **few)
        options = parser.parse_args(argv)
    options.argv = sys.argv[1:] if argv is None else argv
    options.pythons = dict(word.split("=", 1) for word in options.peer_python)
    options.libraries = list(dict.fromkeys([*options.peers, *options.pythons]))
    return options


if __name__ == "__main__":
    main()
