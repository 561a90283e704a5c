"""The folder of a run: its lock, what it was asked to do, its journal, and what is kept when it stops early.

``NAME.run/`` next to ``NAME.zarr`` holds ``lock``, ``run.json`` (token, options, the outputs that are built and those that
are replaced), ``journal`` and the blocks that wait to be joined. After a complete run ``run.json``, ``journal`` and
``report.json`` stay. A folder without a ``run.json`` of stem_dask is refused, and only names that a run makes are ever removed.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stem_dask.core.errors import (
    ConfigError,
    InterruptedRunError,
    LockedError,
    OutputExistsError,
    StoreError,
)
from stem_dask.engine.journal import Journal
from stem_dask.engine.lock import locked
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import (
    kind_of,
    opened,
    publish,
    refuse_taken,
    remove,
    replaced,
    run_folder,
    sync,
    temporary,
    temporary_names,
)

_logger = logging.getLogger("stem_dask")

#: folders that were reported to have no file locks
_without_locks: set[Path] = set()

WORDS = "run.json"

#: files that a run makes in its folder, except run.json
_FILES = ("journal", "report.json", "run.partial", "report.partial")

#: what may be there before run.json is: the lock, the name of an owner elsewhere, run.json on its way
_BEFORE = ("lock", "owner", "run.partial")

#: folders that a run makes there, and files in those
_FOLDERS = re.compile(
    r"turned|sample|friedel|analysis|kept|crop|convert|normalize|moments|chunks|export\.\w+|\w+\.zarr\.incomplete"
)
_BLOCKS = re.compile(r"\d{6}.*|patterns\.raw|zarr\.json|c(\.\d+)*(\..*)?|.*\.partial")

#: jobs that read a sample of the patterns: too little to go on with after an error
SAMPLES = frozenset({"survey", "friedel"})


class RunState:
    """What a live run knows of its past; made by `open_state`."""

    def __init__(
        self, folder: Path, outputs: Sequence[str], hold: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.outputs = folder, outputs
        self.journal = Journal(folder / "journal", hold)
        self.resumable, self.is_complete = True, False
        #: each raises when another run has taken the output over: the lock, and the hold on an object store
        self.holds = [hold]

    def check_ownership(self) -> None:
        """Raise LockedError when another run has taken the output over: this one must change nothing any more."""
        for hold in self.holds:
            hold()

    def publish(self, path: str, *, drop: str | None = None) -> None:
        """Give an output its final name, as long as it is this run's to give."""
        if path == self.outputs[0]:
            _refuse_newcomer(self.folder, path)
        publish(path, drop=drop, hold=self.check_ownership)

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
        self.publish(path)  # what a kill may have left of the older one
        return True

    def is_older(self, path: str) -> bool:
        """Whether what bears an output's final name was there before the run began."""
        return os.path.lexists(path) and _older(self.folder).get(Path(path).name) == _stamp(path)

    def replaces(self, path: str) -> bool:
        """Whether the run was begun with leave to replace an output that was there."""
        return Path(path).name in _older(self.folder)

    def settled(self, name: str, value: Any) -> Any:
        """A choice that must stay the same when the run goes on: the first one that was made; ``value`` may be a function."""
        words = _words_of(self.folder) or {}
        if name not in words:
            found = value() if callable(value) else value
            self.check_ownership()
            words = {**(_words_of(self.folder) or {}), name: found}
            _write(self.folder / WORDS, words)
        return words[name]

    def complete(self, report: Mapping[str, Any]) -> None:
        """Note that everything is done; only words stay in the folder."""
        self.check_ownership()
        _write(self.folder / "report.json", report)
        self.journal.close()
        _write(self.folder / WORDS, {**(_words_of(self.folder) or {}), "complete": True})
        _remove_blocks(self.folder)

    def drop(self, name: str) -> None:
        """Remove a folder of blocks that the run needs no longer."""
        self.check_ownership()
        _remove_blocks(self.folder, name)

    def forget(self) -> None:
        """Remove what the run made in its folder, of a run whose output needs it no longer."""
        self.check_ownership()
        _empty(self.folder)

    @property
    def goes_on(self) -> bool:
        """Whether, after an error, there is something for the same command to go on with."""
        return self.resumable and not SAMPLES.issuperset(self.journal.known)

    def leave(self) -> None:
        """After an error: keep what can be resumed, else leave nothing behind; of another run's everything stays."""
        with contextlib.suppress(OSError):  # the first error is raised, not its consequences
            self.journal.close()
        if self.goes_on:
            return
        with contextlib.suppress(LockedError):
            self.holds[0]()  # that of an object store was given up before
            for path in self.outputs:
                remove(temporary(path))
            _empty(self.folder)


@contextlib.contextmanager
def open_state(
    outputs: Sequence[str],
    token: str,
    options: Mapping[str, Any],
    *,
    restart: bool,
    is_complete: Callable[[], bool],
) -> Iterator[RunState]:
    """Lock the output and find out whether there is a run to go on with.

    Parameters
    ----------
    outputs : final names of all outputs on this machine; the folder lies next to the first
    token, options : of this run
    restart : drop an unfinished run, whatever its options
    is_complete : asked with the lock in hand: another run may just have come to its end

    Raises
    ------
    LockedError
        When a live run holds the output.
    ConfigError
        When an unfinished run with other options is in the way, what it was asked to do cannot be read, or the folder is
        not of a run.
    OutputExistsError
        When a file that is not of the run bears a name that it needs.
    """
    folder = Path(run_folder(outputs[0]))
    refuse_foreign(folder)  # before there is a lock in it
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, folder)
        lock = stack.enter_context(locked(folder / "lock"))
        if lock.without and folder.parent not in _without_locks:
            _without_locks.add(folder.parent)  # once for all datasets of a command
            _logger.warning(
                "%s: this file system has no file locks (%s); only the heartbeat in NAME.run/lock keeps two runs apart",
                folder.parent,
                lock.without,
            )
        sync(folder.parent)
        refuse_foreign(folder)
        if is_complete():
            state = RunState(folder, outputs, lock.check)
            state.is_complete = True
            yield state
            return
        before = _words_of(folder)
        if before is None and os.path.lexists(folder / WORDS):
            if not restart:
                refuse_damaged(folder, "--restart")
            before = {}
        elif before is not None and before.get("complete"):
            before = None
        if before is not None and not restart and before.get("token") != token:
            changed = (
                ", ".join(changed_options(before.get("options", {}), options)) or "the input file"
            )
            raise ConfigError(
                f"{folder} holds an unfinished run that differs in {changed}; run it with its own options to go on, "
                "or add --restart to drop it"
            )
        names = [Path(path).name for path in outputs]
        built = [] if before is None else before.get("outputs", names)
        for path, name in zip(outputs, names, strict=True):
            made = temporary_names(path)
            if name in built:  # a folder steps aside only where it was older
                made = made[1:] if before and name not in before.get("older", {}) else ()
            refuse_taken(made)
        if before is None or restart:
            for path in outputs:
                remove(temporary(path))
                aside = replaced(path)
                if aside in temporary_names(path) and os.path.lexists(aside):
                    if os.path.lexists(path):
                        remove(aside)
                    else:
                        os.rename(aside, path)  # the run was killed between two renames
            _empty(folder)
            words = {"token": token, "options": options, "outputs": names}
            older = {Path(path).name: _stamp(path) for path in outputs if os.path.lexists(path)}
            _write(folder / WORDS, {**words, "older": older} if older else words)
        else:
            _refuse_newcomer(folder, outputs[0])
            for path in outputs:
                _refuse_links(temporary(path))
            if not {*names} <= {*built}:
                _write(folder / WORDS, {**before, "outputs": sorted({*built, *names})})
        state = RunState(folder, outputs, lock.check)
        try:
            yield state
        except BaseException:
            state.leave()
            raise
        finally:
            state.journal.close()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _refuse_newcomer(folder: Path, store: str) -> None:
    """Refuse an output that appeared since the run was begun, which still builds its own."""
    if not (os.path.lexists(store) and os.path.lexists(temporary(store))):
        return
    if _older(folder).get(Path(store).name) != _stamp(store):
        raise OutputExistsError(
            f"{store} appeared or changed since the unfinished run in {folder} was begun; move it away, or add --restart "
            "--overwrite to begin again and replace it"
        )


def unfinished_token(store: str) -> str | None:
    """Token of an unfinished run of this output, if there is one."""
    before = _words_of(Path(run_folder(store)))
    return None if before is None or before.get("complete") else str(before["token"])


def unfinished_url(store: str) -> str | None:
    """Where in an object store an unfinished run writes whose folder lies next to this name."""
    before = _words_of(Path(run_folder(store))) or {}
    output = before.get("options", {}).get("output", {})
    return None if before.get("complete") else output.get("url")


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
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


def _older(folder: Path) -> dict[str, Any]:
    """Outputs that were there when the run began, each with its stamp."""
    return dict((_words_of(folder) or {}).get("older", {}))


def _stamp(path: str | Path) -> list[int]:
    """Tells an output from a newer one of the same name; stays the same when it is renamed or copied."""
    status = os.lstat(path)
    return [status.st_mtime_ns, status.st_size]


def refuse_foreign(folder: Path) -> None:
    """Raise ConfigError for a folder that is not of a run, or a link in place of it or of anything that a run makes in it."""
    if os.path.lexists(folder):
        with contextlib.suppress(FileNotFoundError):  # another run may just remove what is listed
            _refuse_foreign(folder)


def _refuse_foreign(folder: Path) -> None:
    needs = "the run keeps its journal in a folder of that name; move it away, or choose another output.path"
    if kind_of(folder) != "a folder":
        raise ConfigError(f"{folder} is {kind_of(folder)}, and {needs}")
    kinds = {name: kind_of(folder / name) for name in os.listdir(folder)}
    if WORDS in kinds:
        # a damaged one is of a run, since those of other programs need not be damaged
        is_run = kinds[WORDS] == "a file" and "token" in _parsed(folder / WORDS, damaged="token")
    else:
        is_run = kinds.keys() <= {*_BEFORE}
        if is_run and "lock" in kinds:
            is_run = kinds["lock"] == "a file" and "host" in _parsed(folder / "lock", empty="host")
    if not is_run:
        some = ", ".join(sorted(kinds)[:3])
        raise ConfigError(f"{folder} is not the folder of a run (it holds {some}), and {needs}")
    for name in (*_FILES, *_BEFORE):
        if kinds.get(name, "a file") != "a file":
            raise ConfigError(
                f"{folder / name} is {kinds[name]}, and the run needs that name; move it away"
            )
    for name in filter(_FOLDERS.fullmatch, kinds):
        _refuse_links(folder / name)


def _refuse_links(path: str | Path) -> None:
    """Refuse a link in the place of a file or folder, or anywhere below it."""
    if os.path.islink(path):
        raise ConfigError(f"{path} is a link, which a run neither makes nor follows; move it away")
    if os.path.isdir(path):
        with os.scandir(path) as entries:  # says what is a link without a look at each file
            for entry in entries:
                if entry.is_symlink() or entry.is_dir():
                    _refuse_links(entry.path)


def refuse_damaged(folder: Path, flags: str) -> None:
    """Raise ConfigError for a run.json that cannot be read; ``flags`` drop the run and what is in its way."""
    refuse_foreign(folder)
    path = folder / WORDS
    if os.path.lexists(path) and _words_of(folder) is None:
        what = "is damaged" if path.stat().st_size else "is empty"
        raise ConfigError(
            f"{path} {what}, so that the run in {folder} cannot go on; add {flags} to drop what it has finished and begin again"
        )


def _empty(folder: Path) -> None:
    """Remove what a run made but the lock, which its owner holds, and the name of an owner elsewhere; run.json goes last."""
    _remove_blocks(folder)
    for name in (*_FILES, WORDS):
        remove(folder / name)


def _remove_blocks(folder: Path, only: str = "") -> None:
    """Remove the folders of a run's blocks, or one of them; a file that no run makes stays, and its folder with it."""
    names = [only] if only else os.listdir(folder) if folder.is_dir() else []
    for name in filter(_FOLDERS.fullmatch, names):
        for root, _, files in os.walk(folder / name, topdown=False):
            for file in filter(_BLOCKS.fullmatch, files):
                os.unlink(os.path.join(root, file))
            _remove_if_empty(Path(root))


def _words_of(folder: Path) -> dict[str, Any] | None:
    """What run.json says; None where there is none, or it cannot be read."""
    with contextlib.suppress(OSError):
        words = _parsed(folder / WORDS)
        return words if "token" in words else None
    return None


def _parsed(path: Path, *, damaged: str = "", empty: str = "") -> dict[str, Any]:
    """A document of JSON; a dictionary with the key ``damaged`` or ``empty`` when it is that."""
    with opened(path, "rb") as file:
        content = file.read().strip(b" \0")
    with contextlib.suppress(ValueError):
        words = json.loads(content)
        return words if isinstance(words, dict) else {damaged: None}
    return {damaged if content else empty or damaged: None}


def _write(path: Path, words: Mapping[str, Any]) -> None:
    """Replace a document in one step, on disk when this returns."""
    partial = path.with_suffix(".partial")
    remove(partial)
    with translate(StoreError, partial), opened(partial, "w") as file:
        file.write(json.dumps(words, indent=1, default=str))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)
