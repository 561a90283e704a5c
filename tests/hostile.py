"""What a reader owes to any file whatever, and ways to damage one: cut, overwritten, lengthened, lying in its fields."""

import json
import random
import re
import shutil
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.readers.open import Found, find

#: what numbers of a header are set to: nothing, one, the largest of each width, minus one, a size beyond any disk
LIES = (0, 1, 2, 3, 7, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)  # fmt: skip
#: what numbers of a text are replaced by
WORDS = (b"0", b"-1", b"1", b"2", b"1e999", b"NaN", b"99999999999999999999", b"4294967296", b"1.5", b"", b"x", b"null",
         b"[]", b"{}", b'"2"', b"true")  # fmt: skip
#: processor time that a refusal may take
SECONDS = 2.0


@dataclass(frozen=True)
class Files:
    """A sound file with what belongs to it: ``content`` by name, ``path`` is what is opened with ``options``."""

    path: str
    content: Mapping[str, bytes]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, **options: Any) -> "Files":
        """Everything that lies in the folder of a file."""
        folder = path.parent
        content = {
            str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        return cls(path.name, content, options)

    def write(self, folder: Path, over: "Files | None" = None) -> Path:
        """Lay the files out in an emptied folder; what of ``over``, which lies there, is the very same stays."""
        if over is None:
            shutil.rmtree(folder, ignore_errors=True)
        there = {} if over is None else over.content
        for name in there.keys() - self.content.keys():
            (folder / name).unlink()
        for name, content in self.content.items():
            if there.get(name) is not content:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        return folder / self.path


def refused(path: Path, **options: Any) -> str | None:
    """The words in which a file is refused, or None when it is read.

    Whatever is in the file, opening it and reading its first and last pattern works, or ends in a `SourceError` of one
    line that names the file; quickly in both cases. Of reading, errors of the system are the engine's to tell.
    """
    began, message = time.process_time(), None
    try:
        found = find(path, **options)
    except SourceError as error:
        message = str(error)
    else:
        try:
            _read(found)
        except SourceError as error:
            message = str(error)
        except OSError as error:
            if not error.errno:
                raise
            message = str(error)
    assert time.process_time() - began < SECONDS
    if message is not None:
        assert any(p.name in message for p in (path, *path.parent.rglob("*"))), message
        assert message.isprintable(), repr(message)
        assert len(message) < 1500, message
    return message


def _read(found: Found) -> None:
    shape = found.source.shape
    assert shape == found.info.shape
    assert min(shape) > 0
    for place in ([0] * (len(shape) - 2), [n - 1 for n in shape[:-2]]):
        sizes = (*(1 for _ in place), *(min(n, 512) for n in shape[-2:]))
        block = found.source[
            (*(slice(i, i + 1) for i in place), *(slice(0, n) for n in sizes[-2:]))
        ]
        assert block.shape == sizes
        assert block.dtype.newbyteorder("=") == found.source.dtype.newbyteorder("=")
    if found.valid is not None:
        assert found.valid[(slice(None),) * (len(shape))].shape == (*shape[:-2], 1, 1)
    assert all(
        np.isfinite([axis.scale, axis.offset]).all() and axis.scale for axis in found.info.axes
    )
    json.dumps(found.info.metadata, allow_nan=False)


def damage(files: Files, number: int, header: int = 1 << 16) -> Files:
    """The same files, one of them changed in one to four places, mostly in its first ``header`` bytes.

    Each ``number`` is another way, the same whenever it is tried.
    """
    draw = random.Random(f"{files.path} {number}")
    name = draw.choice(sorted(files.content))
    content = files.content[name]
    for _ in range(draw.randint(1, 4)):
        content = bytes(_change(bytearray(content), header, draw))
    return Files(files.path, {**files.content, name: content}, files.options)


def _change(out: bytearray, header: int, draw: random.Random) -> bytearray:
    end = max(1, min(len(out), header))
    kind = draw.choice(
        ["lie", "lie", "lie", "word", "word", "flip", "fill", "cut", "append", "move"]
    )
    at = draw.randrange(end)
    if kind == "lie":
        code = draw.choice("BHIQ")
        n = struct.calcsize(code)
        at -= at % draw.choice([1, n])
        value = draw.choice([draw.choice(LIES), draw.getrandbits(64)]) % 2 ** (8 * n)
        out[at : at + n] = struct.pack(draw.choice("<>") + code, value)
    elif kind == "word":
        words = list(re.finditer(rb"\d[\d.e+-]*|\"[^\"]*\"", out[:header]))
        if words:
            word = words[at % len(words)]
            out[word.start() : word.end()] = draw.choice(WORDS)
    elif kind == "flip":
        out[at : at + 1] = bytes([out[at] ^ 1 << draw.randrange(8)]) if out else b"x"
    elif kind == "fill":
        out[at : at + draw.randint(1, 64)] = draw.randbytes(draw.randint(1, 64))
    elif kind == "cut":
        del out[draw.randint(0, len(out)) :]
    elif kind == "move":
        source = draw.randrange(end)
        n = draw.randint(1, 64)
        out[at : at + n] = out[source : source + n]
    else:
        out += draw.randbytes(draw.randint(1, 100))
    return out
