"""Random stories of one output: start, kill, damage, resume, other options, verify, export; a simple model tells the end.

Each story is a sequence of commands in one folder. Every command line runs in a process of its own (see `forks`), every
kill is a SIGKILL of it. What the model is stands in `model`: above all, a final name never bears anything but a whole
output; a run that was killed goes on and computes only what is missing or damaged; what a run makes is the same, byte
by byte, as what an undisturbed one makes.
"""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from forks import Ended, Moment
from harness import flip, truncate, zero
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from model import Model
from small import CONFIGS, STORE, Small, content

pytestmark = pytest.mark.faults

#: how many at least, and how many are asked for: Hypothesis drops some after they were told
STORIES, ASKED = 200, 172
#: each one to three commands, beside those of the beginning
STEPS = 3
#: stories are of killed processes, not of lost power: they may lie in memory, where files are made faster
MEMORY = Path("/dev/shm")

#: how many events of each kind a run has, roughly: later ones do not come, and the run ends well. Most removals are of
#: the older store, which only few runs have
EVENTS = [("line", 24), ("name", 9), ("block", 24), ("file", 86), ("removal", 30), ("removal", 210)]
moments = st.sampled_from(EVENTS).flatmap(
    lambda event: st.builds(Moment, st.just(event[0]), st.integers(1, event[1]), st.booleans())
)
OVERWRITE, RESTART = "--overwrite", "--restart"
#: mostly those that get the command through, which is None
several_flags = st.sampled_from(
    [None, None, None, (), (), (OVERWRITE,), (RESTART,), (OVERWRITE, RESTART)]
)
#: mostly the config that is there already
usual = st.sampled_from([True, True, False])
which_file = st.integers(0, 99)


damages = st.sampled_from([truncate, zero, flip, Path.unlink])


class Story(RuleBasedStateMachine):
    """The rules draw without looking at the disk, where threads race; what does not apply does nothing."""

    small: Small
    place: str
    done: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.kills = self.steps = 0

    @initialize(
        kinds=st.sampled_from([(), ("pt",), ("hspy",), ("pt", "hspy")]),
        there=st.sampled_from([None, "A", "B"]),
        killed=st.sampled_from([True, True, False]),
        at=moments,
    )
    def begin(self, kinds: tuple[str, ...], there: str | None, killed: bool, at: Moment) -> None:
        """The outputs of a complete run, or a run that is killed, perhaps while it replaces such outputs."""
        self.kinds = kinds
        folder = Path(tempfile.mkdtemp(dir=self.place))
        self.model = Model(folder, tuple(f".{kind}" for kind in kinds), self.small.references)
        if there is not None:
            self.model.held = dict.fromkeys(self.model.names, there)
            for name in (*self.model.names, ".run"):
                source = self.small.folder / there / f"scan{name}"
                copy: Callable[..., Any] = shutil.copytree if source.is_dir() else shutil.copy2
                copy(source, self.model.path(name))
        if there is None or killed:
            self._command(there is None, None, at if killed else None)

    @rule(same=usual, flags=several_flags, pool=st.integers(0, 29))
    def start(self, same: bool, flags: tuple[str, ...] | None, pool: int) -> None:
        """Now and then on a real cluster of threads."""
        self._command(same, flags, None, pool=pool > 0)

    @rule(same=usual, flags=several_flags, at=moments)
    def kill(self, same: bool, flags: tuple[str, ...] | None, at: Moment) -> None:
        self._command(same, flags, at)

    def _command(
        self, same: bool, flags: tuple[str, ...] | None, at: Moment | None, *, pool: bool = True
    ) -> None:
        model = self.model
        now = model.unfinished or model.held.get(STORE, "A")
        config = now if same else "AB".replace(now, "")
        if flags is None:
            plan = model.plan(config, ())
            wants = {"exists": (OVERWRITE,), "differs": (OVERWRITE, RESTART)}
            flags = wants.get(plan, () if at is None or plan != "complete" else (OVERWRITE,))
        plan = model.plan(config, flags)
        self.done[plan] += 1
        if plan not in ("begins", "goes on"):
            self._refused(plan, config, flags, at)
            return
        before = model.before(again=plan == "goes on")
        ended = self._ended(config, flags, at=at, pool=pool)
        if ended.code == -9:
            assert at is not None
            self.kills += 1
            self.done[f"killed at a {at.kind}"] += 1
            model.killed(config, before)
            return
        noted = before.again and any(x.endswith(b"}") for x in before.journal.split(b"\n"))
        assert ("resuming" in ended.text) == noted, ended.text
        for files in before.spoiled.values():
            assert any(str(path) in ended.text for path in files), ended.text
        if before.unreadable:
            self.done["unreadable"] += 1
            assert ended.code == 3, ended.text
            assert str(model.path(STORE)) in ended.text
            model.killed(config, before)  # the same holds
            return
        assert ended.code == 0, ended.text
        model.finished(config, before)

    def _ended(self, config: str, flags: tuple[str, ...], **how: Any) -> Ended:
        return self.small.run(self.model.folder, config, *flags, kinds=self.kinds, **how)

    def _refused(self, plan: str, config: str, flags: tuple[str, ...], at: Moment | None) -> None:
        """Nothing changes, and the message says why."""
        everything = self.model.everything()
        ended = self._ended(config, flags, at=at)
        if ended.code == -9:  # when it gave the lock back
            assert plan == "differs"
            assert at is not None
            assert at.kind == "removal"
        else:
            assert ended.code == (0 if plan == "complete" else 2), ended.text
            said = {"complete": ["already complete"], "exists": ["exist", "overwrite"]}
            for word in said.get(plan, [RESTART, *CONFIGS["A"]]):
                assert word in ended.text
        assert self.model.everything() == everything

    @rule(at=moments, which=which_file, how=damages)
    def damage_and_go_on(self, at: Moment, which: int, how: Callable[[Path], None]) -> None:
        """A file of a finished block of a run that was killed: it is named, and computed again."""
        model = self.model
        if model.unfinished is None:
            self._command(True, None, at)
        files = [(block, path) for block, path, _ in model.files() if path.exists()]
        if model.unfinished is not None and files:
            block, path = files[which % len(files)]
            if which % 4 == 0 and model.built(".pt").exists() and not model.damaged:
                how(model.built(".pt"))
                model.pt_damaged = True
            elif block not in model.spoiled():
                how(path)
                assert block in model.spoiled()
            self.done["damaged block"] += 1
        self._command(True, None, None)

    @rule(which=which_file, how=st.none() | damages, kind=st.sampled_from([".pt", ".hspy"]))
    def read(self, which: int, how: Callable[[Path], None] | None, kind: str) -> None:
        """All damaged files are named, and no other. An export is the same file as the run's own, or nothing."""
        model = self.model
        if STORE not in model.held or model.aside:
            return
        if how is not None and not model.pt_damaged:
            self._damage_store(which, how)
        store, path = model.path(STORE), model.folder / f"other{kind}"
        said = self.small.forks.finish("stem_dask.cli.main", "verify", str(store))
        assert said.code == (5 if model.damaged else 0), said.text
        for name in model.references["A"][STORE]:
            assert (f"{store / name} " in said.text) == (name in model.damaged), said.text
        self.done["verified"] += 1
        ended = self.small.forks.finish("forks", str(store), str(path))
        unread = ("analysis/profile/", "output/")
        if all(name.startswith(unread) for name in model.damaged):
            assert ended.code == 0, ended.text
            assert path.read_bytes() == model.references[model.held[STORE]][kind]
            path.unlink()
            self.done["exported"] += 1
        else:
            assert ended.code == 3, ended.text
            self.done["export refused"] += 1
        assert not list(model.folder.glob("other*"))

    def _damage_store(self, which: int, how: Callable[[Path], None]) -> None:
        model = self.model
        files = [name for name in model.references["A"][STORE] if name not in model.damaged]
        if which % 2 or model.made(STORE):  # what a run that goes on may read
            files = [name for name in files if name.startswith("patterns/")]
        if files:
            name = files[which % len(files)]
            how(model.path(STORE) / name)
            model.damaged[name] = content(model.path(STORE) / name)
            self.done["damaged store"] += 1

    @invariant()
    def whole_outputs_and_a_free_lock(self) -> None:
        if hasattr(self, "model"):
            self.steps += 1
            self.model.check()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            shutil.rmtree(self.model.folder)
            self.done["stories"] += self.steps > 1
            self.done["stories with a kill"] += self.kills > 0
            self.done["kills"] += self.kills


class First(Story):
    """One thread's stories: the name decides which they are."""


class Second(Story):
    """Other ones."""


def _tell(kind: type[Story], small: Small, place: str) -> Counter[str]:
    """All stories of a thread; returns what happened in them."""
    number = int(os.environ.get("STEM_DASK_STORIES", "0"))
    done: Counter[str] = Counter()
    shared = {"small": small, "place": place, "done": done}
    run_state_machine_as_test(
        type(kind.__name__, (kind,), shared),
        settings=settings(
            max_examples=(number or ASKED) // 2,
            stateful_step_count=STEPS,
            derandomize=not number,
            database=None,
            deadline=None,
            phases=[Phase.generate, *([Phase.shrink] if number else [])],
            suppress_health_check=list(HealthCheck),
        ),
    )
    return done


@pytest.mark.timeout(900)
def test_stories(small: Small) -> None:
    """STEM_DASK_STORIES=1000 tells as many other ones each time, and shrinks what fails."""
    memory = str(MEMORY) if os.access(MEMORY, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(dir=memory, prefix="stem_dask-") as place,
        ThreadPoolExecutor(2) as pool,  # they wait for processes most of the time
    ):
        told = [pool.submit(_tell, kind, small, place) for kind in (First, Second)]
        done = told[0].result() + told[1].result()
    print(dict(done))
    assert done["stories"] >= STORIES
    assert done["stories with a kill"] >= 30
    for kind, _ in EVENTS:
        assert done[f"killed at a {kind}"] >= 15, done
    for event in ("goes on", "exists", "damaged block", "damaged store", "export refused"):
        assert done[event] >= 5, done
