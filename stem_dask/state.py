"""The folder of a run: its lock, what it was asked to do, its journal, and what is kept when it stops early.

``NAME.run/`` beside ``NAME.zarr`` holds ``lock``, ``run.json`` (token, options, the outputs that are replaced), ``journal``
and the blocks that wait to be joined. After a complete run ``run.json``, ``journal`` and ``report.json`` stay.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stem_dask.errors import ConfigError, InterruptedRunError
from stem_dask.io.publish import named, publish, remove, replaced, run_folder, temporary
from stem_dask.journal import Journal
from stem_dask.lock import locked


class RunState:
    """What a live run knows of its past; made by `open_state`."""

    def __init__(self, folder: Path, temporaries: tuple[str, ...]) -> None:
        self.folder = folder
        self.temporaries = temporaries
        self.journal = Journal(folder / "journal")
        self.resumable = True
        self.is_complete = False
        #: raises when another run has taken the output over, which only one in an object store can be
        self.still_ours: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def nothing_to_go_on_with(self) -> Iterator[None]:
        """An error inside is one of the options or the data: the same command would end the same way."""
        try:
            yield
        except Exception as error:
            self.resumable = isinstance(error, InterruptedRunError)
            raise

    def published(self, path: str, job: str, n_blocks: int) -> bool:
        """Whether an output already bears its final name: all blocks are noted, and the temporary one is gone."""
        if len(self.journal.records(job)) != n_blocks or os.path.lexists(temporary(path)):
            return False
        if not os.path.lexists(path) or self.is_older(path):
            return False
        publish(path)  # what a kill may have left of the older one
        return True

    def is_older(self, path: str) -> bool:
        """Whether what bears an output's final name was there before the run began."""
        return os.path.lexists(path) and self._older().get(Path(path).name) == _stamp(path)

    def replaces(self, path: str) -> bool:
        """Whether the run was begun with leave to replace an output that was there."""
        return Path(path).name in self._older()

    def _older(self) -> dict[str, Any]:
        """Outputs that were there when the run began, each with its stamp."""
        words = _read(self.folder / "run.json") or {}
        return dict(words.get("older", {}))

    def settled(self, name: str, value: Any) -> Any:
        """A choice that must stay the same when the run goes on: the first one that was made."""
        words = _read(self.folder / "run.json") or {}
        if name not in words:
            words[name] = value
            _write(self.folder / "run.json", words)
        return words[name]

    def complete(self, report: Mapping[str, Any]) -> None:
        """Note that everything is done; only words stay in the folder."""
        _write(self.folder / "report.json", report)
        self.journal.close()
        words = json.loads((self.folder / "run.json").read_text())
        _write(self.folder / "run.json", {**words, "complete": True})
        for entry in self.folder.iterdir():
            if entry.is_dir():
                remove(entry)

    @property
    def goes_on(self) -> bool:
        """Whether, after an error, there is something for the same command to go on with."""
        return self.resumable and bool(self.journal.known)

    def leave(self) -> None:
        """After an error: keep what can be resumed, else leave nothing behind."""
        with contextlib.suppress(OSError):  # the first error is told, not what became of it
            self.journal.close()
        if not self.goes_on:
            for path in self.temporaries:
                remove(path)
            _empty(self.folder)


@contextlib.contextmanager
def open_state(
    store: str,
    temporaries: tuple[str, ...],
    token: str,
    options: Mapping[str, Any],
    *,
    restart: bool,
    is_complete: Callable[[], bool],
) -> Iterator[RunState]:
    """Lock the output and find out whether there is a run to go on with.

    Parameters
    ----------
    store : final name of the store
    temporaries : what a run that is given up leaves
    token, options : of this run
    restart : drop an unfinished run, whatever its options
    is_complete : asked with the lock in hand: another run may just have come to its end

    Raises
    ------
    LockedError
        When a live run holds the output.
    ConfigError
        When an unfinished run with other options is in the way.
    """
    folder = Path(run_folder(store))
    with _removed_when_empty(folder), locked(folder / "lock"):
        before = _read(folder / "run.json")
        if is_complete():
            state = RunState(folder, temporaries)
            state.is_complete = True
            yield state
            return
        fresh = restart or before is None or bool(before.get("complete"))
        if not fresh and before is not None and before.get("token") != token:
            changed = ", ".join(_changed(before.get("options", {}), options)) or "the input file"
            raise ConfigError(
                f"{folder} holds an unfinished run that differs in {changed}; run it with its own options to go on, "
                "or add --restart to drop it"
            )
        if fresh:
            for path in temporaries:
                remove(path)
            aside = Path(replaced(store))
            if os.path.lexists(aside) and not os.path.lexists(store):
                os.rename(aside, store)  # a run that is given up was killed between two renames
            _empty(folder)
            finals = [Path(path.removesuffix(temporary(""))) for path in temporaries]
            older = {path.name: _stamp(path) for path in finals if os.path.lexists(path)}
            begun = {"token": token, "options": options} | ({"older": older} if older else {})
            _write(folder / "run.json", begun)
        state = RunState(folder, temporaries)
        try:
            yield state
        except BaseException:
            state.leave()
            raise
        finally:
            state.journal.close()


@contextlib.contextmanager
def _removed_when_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def unfinished_token(store: str) -> str | None:
    """Token of an unfinished run of this output, if there is one."""
    before = _read(Path(run_folder(store)) / "run.json")
    return None if before is None or before.get("complete") else str(before.get("token"))


def unfinished_url(store: str) -> str | None:
    """Where in an object store an unfinished run writes that has its folder beside this name."""
    before = _read(Path(run_folder(store)) / "run.json") or {}
    output = before.get("options", {}).get("output", {})
    return None if before.get("complete") else output.get("url")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the options that differ: section.key, or the key of one that stands alone."""
    found = []
    for section, options in json.loads(json.dumps(now, default=str)).items():
        old = before.get(section)
        if isinstance(options, dict):
            known = old if isinstance(old, dict) else {}
            found += [f"{section}.{key}" for key in options if known.get(key) != options[key]]
        elif old != options:
            found.append(section)
    return found


def _stamp(path: str | Path) -> list[int]:
    """Tells an output from a newer one of the same name; stays the same when it is renamed or copied."""
    status = os.lstat(path)
    return [status.st_mtime_ns, status.st_size]


def _empty(folder: Path) -> None:
    """Remove everything but the lock, which its owner holds, and the name of an owner elsewhere."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name not in ("lock", "owner"):
            remove(entry)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        words = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return words if isinstance(words, dict) else None


def _write(path: Path, words: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with named(partial):
        partial.write_text(json.dumps(words, indent=1, default=str))
    os.replace(partial, path)
