"""What a folder should hold after each command of a random story, and a reader of its own for what it does hold.

The model knows what each final name bears (nothing, or the whole output of config A or B), which files of the finished
store are damaged and how, whether the store stepped aside between two renames, and of which config there is a run to
go on with. ``older`` are the files that bore the final names when that run began: they tell what it has made itself.
Blocks that must be computed again are read off the disk: those without a line in the journal, and those whose file has
not the checksum of its line.
"""

import fcntl
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small import CONFIGS, JOBS, N_BLOCKS, RESULTS, STORE, content, deciding

Block = tuple[str, int]


@dataclass
class Model:
    """The folder of one story."""

    folder: Path
    exports: tuple[str, ...]
    references: dict[str, dict[str, Any]]
    held: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, bytes | None] = field(default_factory=dict)
    aside: bool = False
    unfinished: str | None = None
    older: dict[str, int] = field(default_factory=dict)
    pt_damaged: bool = False

    def __post_init__(self) -> None:
        #: in the order in which a run gives them
        self.names = (STORE, *self.exports, RESULTS)
        self.run = self.folder / "scan.run"

    def path(self, name: str) -> Path:
        return self.folder / f"scan{name}"

    def built(self, name: str) -> Path:
        return self.folder / f"scan{name}.incomplete"

    def plan(self, config: str, flags: tuple[str, ...]) -> str:
        """What a command should do."""
        named = {name: c for name, c in self.held.items() if not (self.aside and name == STORE)}
        if "--overwrite" not in flags and self.unfinished != config:
            if [named.get(name) for name in self.names] == [config] * len(self.names):
                return "complete"
            if named:
                return "exists"
        if "--restart" in flags or self.unfinished is None:
            return "begins"
        return "goes on" if self.unfinished == config else "differs"

    def whole(self, name: str) -> Any:
        """What a final name should bear."""
        config = self.held.get(name)
        if config is None or name != STORE:
            return None if config is None else self.references[config][name]
        files = {**self.references[config][STORE], **self.damaged}
        return {rel: words for rel, words in files.items() if words is not None}

    def made(self, name: str) -> bool:
        """Whether the unfinished run has given its output this name."""
        if self.unfinished is None or self.held.get(name) != self.unfinished or self.aside:
            return False
        ours = self.path(name).exists() and self.inode(name) != self.older.get(name)
        return ours and not self.built(name).exists()

    def inode(self, name: str) -> int:
        path = self.folder / "scan.zarr.replaced" if self.aside and name == STORE else None
        return (path or self.path(name)).stat().st_ino

    def inodes(self) -> dict[str, int]:
        return {name: self.inode(name) for name in self.held}

    def everything(self) -> dict[str, bytes]:
        """All files of the folder but the lock, which a command that is refused may hold for a moment."""
        files = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {str(path): path.read_bytes() for path in files if path.name != "lock"}

    def journal(self) -> bytes:
        path = self.run / "journal"
        return path.read_bytes() if path.exists() else b""

    def lines(self) -> Iterator[tuple[Block, dict[str, Any]]]:
        for text in self.journal().split(b"\n"):
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line["job"] != "survey":  # its blocks are settled, and not needed again
                yield (line["job"], line["index"]), line["extra"]

    def counts(self) -> Counter[Block]:
        return Counter(block for block, _ in self.lines())

    def blocks(self) -> set[Block]:
        jobs = ["analyze", *(JOBS[name] for name in self.names[:-1])]
        return {(job, i) for job in jobs for i in range(N_BLOCKS)}

    def files(self) -> Iterator[tuple[Block, Path, int]]:
        """Files of noted blocks that the next start needs, with their checksums."""
        for (job, i), said in self.lines():
            name = f"{i:06d}.block"
            if job in ("analyze", "crop"):
                spool = self.run / {"analyze": "analysis"}.get(job, job)
                yield (job, i), spool / name, said.get("beside", said)["spool_crc"]
            if job == "crop" and not self.made(STORE):
                yield (job, i), self.built(STORE) / said["shard"], said["crc"]
            if job == JOBS[".hspy"] and not self.made(".hspy"):
                yield (job, i), self.run / "export.hspy" / name, said["spool_crc"]

    def spoiled(self) -> dict[Block, list[Path]]:
        """Noted blocks that are not what was written, with their files."""
        found: dict[Block, list[Path]] = {}
        for block, path, crc in self.files():
            if not path.exists() or zlib.crc32(path.read_bytes()) != crc:
                found.setdefault(block, []).append(path)
        if not self.built(".pt").exists() and not self.made(".pt"):
            gone = [block for block in self.counts() if block[0] == JOBS[".pt"]]
            found |= {block: [self.built(".pt")] for block in gone}
        return found

    def unreadable(self) -> bool:
        """Whether an export still needs a damaged shard of the store that the unfinished run has published."""
        lost = {int(rel.split(".")[1]) for rel in self.damaged if rel.startswith("patterns/c.")}
        if not lost or not self.made(STORE):
            return False
        left = (self.blocks() - set(self.counts())) | set(self.spoiled())
        jobs = {JOBS[name] for name in self.exports if not self.made(name)}
        return any(job in jobs and i in lost for job, i in left)

    def before(self, *, again: bool) -> "Before":
        """What a command finds, to be compared with what it leaves."""
        lines, spoiled = (self.counts(), self.spoiled()) if again else (Counter(), {})
        unreadable = again and self.unreadable()
        state = (self.journal(), self.run_json(), self.inodes())
        return Before(again, again and self.made(STORE), lines, spoiled, unreadable, *state)

    def finished(self, config: str, before: "Before") -> None:
        """A run came to its end: all names bear its outputs, each block was computed as often as needed."""
        if not before.made_store:
            self.damaged = {}
        self.held, self.aside = dict.fromkeys(self.names, config), False
        redone = (self.blocks() - set(before.counts)) | set(before.spoiled)
        counts = self.counts()
        if self.pt_damaged and before.again:
            torn = {(JOBS[".pt"], i) for i in range(N_BLOCKS)}
            redone |= {block for block in torn if counts[block] > before.counts[block]}
        assert counts == before.counts + Counter(redone), "other blocks were computed"
        assert self.journal().startswith(before.journal if before.again else b"")
        self.unfinished, self.pt_damaged = None, False
        listed = {path.name for path in self.folder.iterdir()}
        assert listed == {"scan.run", *(f"scan{name}" for name in self.names)}
        assert {p.name for p in self.run.iterdir()} == {"journal", "run.json", "report.json"}

    def killed(self, config: str, before: "Before") -> None:
        """A run was killed: what bears a final name is what was there, or the whole new output."""
        found = {name: content(self.path(name)) for name in self.names}
        if found[STORE] is None and STORE in self.held:
            assert content(self.folder / "scan.zarr.replaced") == self.whole(STORE), "store lost"
            self.aside = True
        else:
            self.aside = False
        new = self.references[config]
        is_new = [found[name] == new[name] for name in self.names]
        counts = self.counts()
        for i, name in enumerate(self.names):
            if found[name] is None or found[name] == self.whole(name):
                kept = name not in self.held or found[name] is not None
                # results.json of an older run goes when its store does
                assert kept or self.aside or name == RESULTS, f"{name} is lost"
                if name == RESULTS and not kept:
                    assert all(counts["crop", i] for i in range(N_BLOCKS))
                    del self.held[name]
                continue
            assert is_new[i], f"{name} is torn"
            assert all(is_new[:i]), f"{name} before {self.names[:i]}"
            job = JOBS.get(name, "crop")
            assert all(counts[job, i] for i in range(N_BLOCKS)), f"{name} without its blocks"
            self.held[name] = config
            if name == STORE:
                self.damaged = {}
        self._killed_run(config, before)

    def _killed_run(self, config: str, before: "Before") -> None:
        """What is left of the run itself, and of one that was dropped for it."""
        words = self.run_words()
        same = before.run_json == self.run_json()
        if before.again or not same:
            assert before.again or words is None or deciding(words["options"]) == CONFIGS[config]
            if not before.again:
                self.older, self.pt_damaged = before.inodes, False
        if before.again:
            assert words is not None
            assert self.journal().startswith(before.journal)
        if words is None or words.get("complete"):
            self.unfinished = None
        else:
            options = deciding(words["options"])
            (self.unfinished,) = (name for name, keys in CONFIGS.items() if keys == options)

    def run_words(self) -> dict[str, Any] | None:
        path = self.run / "run.json"
        return json.loads(path.read_text()) if path.exists() else None

    def run_json(self) -> tuple[int, ...]:
        """Tells one run.json from another with the same words."""
        path = self.run / "run.json"
        if not path.exists():
            return ()
        status = path.stat()
        return (status.st_ino, status.st_mtime_ns)

    def check(self) -> None:
        """Every final name bears what it should, and nobody holds the lock."""
        for name in self.names:
            gone = self.aside and name == STORE
            assert content(self.path(name)) == (None if gone else self.whole(name)), name
        lock = self.run / "lock"
        if lock.exists():
            handle = os.open(lock, os.O_RDWR)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(handle)


@dataclass(frozen=True)
class Before:
    """What a command found."""

    again: bool
    made_store: bool
    counts: Counter[Block]
    spoiled: dict[Block, list[Path]]
    unreadable: bool
    journal: bytes
    run_json: tuple[int, ...]
    inodes: dict[str, int]
