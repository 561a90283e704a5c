"""stem-dask watch: the job of a config on every file of a folder that fills, as soon as a file has stopped changing."""

import argparse
import contextlib
import glob
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stem_dask.cli.run import add_stop_options
from stem_dask.core.errors import ConfigError, StemDaskError

if TYPE_CHECKING:
    from stem_dask.cli.jobs import Row
    from stem_dask.config.options import Config

#: seconds between two looks at the folder, at most
POLL_SECONDS = 5.0

#: bytes and modification time in ns, of all files of a store
State = tuple[int, int]


def add_watch_options(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``stem-dask watch``."""
    sub.usage = "stem-dask watch FOLDER OUTPUT [options] [key=value ...]"
    text = (
        'a folder or a glob in quotes, then the output with a placeholder, such as "out/{stem}.zarr"; any key of a config'
    )  # fmt: skip
    sub.add_argument("words", nargs="+", metavar="FOLDER OUTPUT | key=value", help=text)
    text = "YAML file with the other keys (all at their defaults); its input.path and output.path are not used"
    sub.add_argument("--config", metavar="CONFIG", help=text)
    text = "run a file when it has not changed for this time (30)"
    sub.add_argument("--settle", type=float, default=30.0, metavar="SECONDS", help=text)
    text = (
        "end when for this time no file was waiting, changing or running (default: end on Ctrl-C)"
    )
    sub.add_argument("--idle", type=float, metavar="SECONDS", help=text)
    add_stop_options(sub)


def watch_command(options: argparse.Namespace) -> int:
    """Run the job on every file that is there or appears; returns the highest exit code."""
    words = [word for word in options.words if "=" not in word or os.path.lexists(word)]
    overrides = [word for word in options.words if word not in words]
    if len(words) != 2:
        raise ConfigError(
            f"watch takes a folder or a glob in quotes, and an output; {len(words)} names are given: {' '.join(words[:9])}"
        )
    pattern, output = _pattern(words[0]), words[1]
    if "{" not in output:
        raise ConfigError(
            f"the output is {output}, one name for all files; put a placeholder into it, as in out/{{stem}}.zarr"
        )
    overrides += ["output.overwrite=true"] * options.overwrite
    from stem_dask.config.load import configs_from, load_configs, refuse_circles

    here = ["input.path=/scan.dm4", f"output.path={output}"]  # any name shows whether the keys fit
    if options.config is None:
        paths = {"input": {"path": "/scan.dm4"}, "output": {"path": output}}
        config = configs_from(paths, overrides)[0]
    else:
        config = load_configs(options.config, [*overrides, *here])[0]
    refuse_circles([], pattern, [config.output.path], config.output.export)
    if options.idle is None and _is_common(config):
        raise ConfigError(
            "crop.size is common, which is known when the last file has come; add --idle 600, so that all are cropped when for "
            "10 minutes no other has come"
        )
    incoming = Incoming(pattern, options.settle, partial(_job, config, pattern, output))
    return _watch(config, incoming, options, overrides)


def _watch(
    config: "Config", incoming: "Incoming", options: argparse.Namespace, overrides: Sequence[str]
) -> int:
    from stem_dask.cli.jobs import Batch, closing_lines, shown
    from stem_dask.cli.progress import progress_shown
    from stem_dask.cli.signals import stoppable

    common = _is_common(config)
    rows: dict[str, Row] = {}
    with (
        progress_shown(options.quiet, options.verbose) as line,
        stoppable(options.time_limit) as asked,
    ):
        ends = "" if options.idle is None else f", or after {options.idle:g} s without any"
        what = f"files that have not changed for {options.settle:g} s"
        line.say(f"watching    {incoming.pattern}: {what}; Ctrl-C ends{ends}")
        try:
            with contextlib.ExitStack() as stack:
                # a common size is missing until the end
                ending = [] if common else asked
                batch = Batch(config, [], line, asked, options.restart, stack, timed=True)
                for found in _until_idle(incoming, options.idle, ending):
                    batch.datasets = [row for row, _ in found]
                    rows |= {row.input: row for row in batch.datasets}
                    for row, error in found:
                        row.command = _alone(row, options.config, overrides)
                        if error is not None:
                            line.heading(f"{time.strftime('%H:%M:%S')} {shown(row.input)}")
                            batch.refuse(row, error)
                    batch.run(windows_only=common)
                    # of an acquisition in several files, the one that lists the others is run
                    rows = {name: row for name, row in rows.items() if name not in incoming.parts}
                if common:
                    batch.datasets = list(rows.values())
                    batch.run()
        finally:  # after the last messages of the workers
            line.close()
            for text in closing_lines(list(rows.values()), figure=config.output.figure):
                line.say(text)
    return max((row.exit_code or 0 for row in rows.values()), default=0)


def _until_idle(
    incoming: "Incoming", idle: float | None, asked: Sequence[int]
) -> Iterator[list[tuple["Row", Exception | None]]]:
    """The inputs that have settled, until none has come for ``idle`` seconds, or Ctrl-C while none is running."""
    last, pause = time.monotonic(), min(POLL_SECONDS, max(0.01, incoming.seconds / 4))
    while True:
        try:
            found, waiting = incoming.look(time.monotonic())
            if not found:
                now = time.monotonic()
                last = now if waiting else last
                if idle is not None and now - last >= idle:
                    return
                time.sleep(pause)
                continue
        except BaseException:
            if signal.SIGINT not in asked:
                raise  # a wall time interrupts the watch, and the same command goes on
            return
        yield found
        last = time.monotonic()


def _alone(row: "Row", config: str | None, overrides: Sequence[str]) -> str:
    """The command that makes one of the outputs."""
    from stem_dask.cli.jobs import shown

    path = shown(row.input)
    first = [path] if config is None else [config, f"input.path={path}"]
    return shlex.join(["stem-dask", "run", *first, *overrides, f"output.path={shown(row.output)}"])


class Settling:
    """Files, and since when they have not changed.

    Examples
    --------
    >>> files = Settling(30.0)
    >>> files.update({"a": (10, 1)}, 0.0)
    >>> files.update({"a": (20, 2)}, 20.0)
    >>> files.settled(["a"], 49.0), files.settled(["a"], 50.0)
    (False, True)
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.since: dict[str, tuple[State, float]] = {}

    def update(self, states: Mapping[str, State], now: float) -> None:
        """Compare the present states with the earlier ones; files that are not among them are forgotten."""
        before = self.since
        self.since = {
            path: before[path] if before.get(path, (None,))[0] == state else (state, now)
            for path, state in states.items()
        }

    def settled(self, paths: Iterable[str], now: float) -> bool:
        """Whether all of these files have been known, and unchanged, long enough."""
        return all(
            path in self.since and now - self.since[path][1] >= self.seconds for path in paths
        )


class Incoming:
    """The inputs that match a glob, each until it has settled, and again after it has changed.

    ``job`` makes the config of an input.
    """

    def __init__(self, pattern: str, seconds: float, job: Callable[[str], "Config"]) -> None:
        self.pattern, self.seconds, self.job = pattern, seconds, job
        self.settling = Settling(seconds)
        #: further files of the inputs that could be opened
        self.files: dict[str, tuple[str, ...]] = {}
        #: the state in which an input was run, or found to be unreadable
        self.done: dict[str, object] = {}
        self.faults: dict[str, str] = {}
        self.makers: dict[str, str] = {}

    @property
    def parts(self) -> set[str]:
        """Files that belong to an input with more files, or to an earlier one of as many."""
        taken: set[str] = set()
        for path in sorted(self.files, key=lambda path: (-len(self.files[path]), path)):
            if path not in taken:
                taken.update({*self.files[path]} - {path})
        return taken

    def look(self, now: float) -> tuple[list[tuple["Row", Exception | None]], bool]:
        """The inputs that have settled, planned or with the error of their plan, and whether others are waiting."""
        from stem_dask.cli.jobs import Row
        from stem_dask.readers.formats import READERS, is_one_input

        names = sorted(map(os.path.abspath, glob.glob(self.pattern, recursive=True)))
        inputs = [p for p in names if Path(p).suffix.lower() in READERS and is_one_input(p)]
        folders = {folder: _listed(folder) for folder in {os.path.dirname(p) for p in inputs}}
        pending = [path for path in inputs if self._state(path, folders) != self.done.get(path)]
        named = dict[
            str, list[str]
        ]()  # those of the same name belong together, such as the .hdr of a .mib
        for entry in (entry for entries in folders.values() for entry in entries):
            named.setdefault(os.path.splitext(entry)[0], []).append(entry)
        groups = {
            path: {path, *named.get(os.path.splitext(path)[0], ()), *self.files.get(path, ())}
            for path in pending
        }
        states = {path: _tree_state(path) for path in set().union(*groups.values())}
        self.settling.update({path: s for path, s in states.items() if s is not None}, now)
        found: list[tuple[Row, Exception | None]] = []
        waiting = False
        for path in pending:
            if not self.settling.settled(groups[path], now):
                waiting = True
                continue
            row = Row(path, path)
            try:
                row.config = _unless_complete(self.job(path))
                row.output = row.config.output.path
                self.files[path] = row.planned().found.files
            except (StemDaskError, OSError) as error:
                self.files.pop(path, None)
                self.done[path] = folders[os.path.dirname(path)]
                if self.faults.get(path) != str(error):
                    self.faults[path] = str(error)
                    found.append((row, error))
                continue
            if not groups[path].issuperset(self.files[path]):
                waiting = True  # until these have settled
                continue
            self.done[path] = self._state(path, folders)
            self.faults.pop(path, None)
            found.append((row, None))
        parts = self.parts
        return [self._apart(*one) for one in found if one[0].input not in parts], waiting

    def _apart(self, row: "Row", error: Exception | None) -> tuple["Row", Exception | None]:
        """With an error for an input whose output another one has."""
        other = row.input if error else self.makers.setdefault(row.output, row.input)
        if other != row.input:
            error = ConfigError(
                f"{other} and {row.input} would both become {row.output}; tell them apart with {{parent}} (the folder they are in) "
                "or {name} (with the suffix)"
            )
        return row, error

    def _state(self, path: str, folders: Mapping[str, Mapping[str, State]]) -> object:
        """The identity of an input that could be opened; else its folder, where what it lacks may come."""
        from stem_dask.readers.source import identity

        with contextlib.suppress(OSError):
            if path in self.files:
                return identity(path, *self.files[path])
        return folders[os.path.dirname(path)]


def _listed(folder: str) -> dict[str, State]:
    """Size and time of all entries of a folder; without those that cannot be reached now."""
    found = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                status = entry.stat()
                found[entry.path] = (status.st_size, status.st_mtime_ns)
    return found


def _tree_state(path: str) -> State | None:
    """Bytes and latest time of a file, or of all files of a store; None when it cannot be reached now."""
    paths = [path]
    if os.path.isdir(path):
        paths = [os.path.join(at, name) for at, _, names in os.walk(path) for name in names]
    try:
        found = [os.stat(one) for one in paths]
    except OSError:
        return None
    return sum(s.st_size for s in found), max((s.st_mtime_ns for s in found), default=0)


def _pattern(text: str) -> str:
    """The absolute glob of a folder, or of a glob."""
    from stem_dask.storage.location import is_url

    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(path):
        return os.path.join(glob.escape(path), "*")
    if is_url(text) or not glob.has_magic(path):
        raise ConfigError(f"{text} is no folder here; make it, or give a glob in quotes")
    return path


def _is_common(config: "Config") -> bool:
    return config.crop.enabled and config.crop.size == "common"


def _job(config: "Config", pattern: str, output: str, path: str) -> "Config":
    """The job of an input; refused if its outputs would be inputs."""
    from stem_dask.config.load import configs_from, only, refuse_circles, to_dict

    options = to_dict(config)
    options["input"]["path"], options["output"]["path"] = path, output
    job = only(configs_from(options))
    refuse_circles([], pattern, [job.output.path], job.output.export)
    return job


def _unless_complete(config: "Config") -> "Config":
    """With ``output.overwrite``, replace only what was made from another state of the input or with other options."""
    from stem_dask.job.plan import prepare

    if config.output.overwrite:
        output = config.output.model_copy(update={"overwrite": False})
        kept = config.model_copy(update={"output": output})
        with contextlib.suppress(StemDaskError, OSError):
            if prepare(kept).complete:
                return kept
    return config
