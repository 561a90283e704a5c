"""Every further format that RosettaSciIO reads (.prz, .ser, .rpl, …), lazily where its reader can.

What it returns is taken only if it is a stack of patterns: an array of 3 or 4 axes, the last two of which are its signal.
"""

import functools
import importlib
import os
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.metadata import of_signal
from stem_dask.core.text import by
from stem_dask.readers import own
from stem_dask.readers.layout import axis_from, order_by_flags
from stem_dask.readers.source import Candidate, Reading, Slices
from stem_dask.storage.errors import one_line, translate

#: all of its formats that no other reader opens, except plain images and tables, and .nc, whose reader has eval in it
SUFFIXES = (
    ".ali", ".asw", ".bcf", ".de5", ".dens", ".eds", ".elid", ".emi", ".ems", ".emsa", ".img", ".lsd", ".map", ".mas", ".mrcz",
    ".msa", ".prz", ".pro", ".pts", ".rpl", ".sac", ".sbc", ".ser", ".spc", ".spd", ".spx", ".sur", ".tvf", ".unf", ".wdf",
)  # fmt: skip


@dataclass(frozen=True)
class SciioArray:
    """The data of signal ``number`` of a file, by a ``plugin`` (module) of RosettaSciIO, opened by name on the worker."""

    path: str
    plugin: str
    number: int
    dtype: np.dtype
    shape: tuple[int, ...]
    held_bytes: int = 0

    @property
    def reading(self) -> Reading:
        """Memory of all of a file that is not read lazily."""
        return Reading(chunk_bytes=self.held_bytes)

    def __getitem__(self, part: Slices) -> NDArray:
        with translate(SourceError, self.path, f"{self.plugin} cannot read it"):
            changed = os.stat(self.path).st_mtime_ns
            data = _signals(self.path, self.plugin, changed)[self.number]["data"][part]
            if not isinstance(data, np.ndarray):
                data = data.compute(scheduler="synchronous")
        return np.ascontiguousarray(data)


@functools.lru_cache(maxsize=1)
def _signals(path: str, plugin: str, changed: int) -> list[dict[str, Any]]:
    """The signals of a file as it is since ``changed``; their data are dask arrays where the reader is lazy."""
    import rsciio

    rsciio.set_log_level("ERROR")
    # RosettaSciIO maps compressed members of archives as if they were plain
    lazy = True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            lazy = all(one.compress_type == zipfile.ZIP_STORED for one in archive.infolist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[dict[str, Any]] = importlib.import_module(plugin).file_reader(path, lazy=lazy)
    return found


def list_rsciio(path: str) -> list[Candidate]:
    """The stacks of patterns of a file in a format of RosettaSciIO, with their axes and metadata."""
    import rsciio

    suffix = Path(path).suffix.lower()
    plugins = [p for p in rsciio.IO_PLUGINS if suffix[1:] in map(str.lower, p["file_extensions"])]
    for plugin in plugins:
        try:
            remedy = f"convert it to .zarr, .hspy or .npy in the program that wrote it, or install what {plugin['api']} needs"
            with translate(SourceError, path, f"{plugin['api']} cannot read it", remedy):
                signals = _signals(path, plugin["api"], os.stat(path).st_mtime_ns)
            break
        except SourceError:
            if plugin is plugins[-1]:
                raise
    raw = str(Path(path).with_suffix(".raw"))
    files = (raw,) if suffix == ".rpl" and os.path.isfile(raw) else ()
    found, others = [], []
    for number, signal in enumerate(signals):
        data, axes = signal["data"], signal["axes"]
        known = signal.get("metadata") or {}
        title = one_line(known.get("General", {}).get("title") or f"signal {number}")
        is_lazy = not isinstance(data, np.ndarray)
        n_patterns = sum(not axis.get("navigate") for axis in axes)
        if data.ndim not in (3, 4) or n_patterns != 2 or len(axes) != data.ndim:
            others.append(f"{title}: {by(data.shape)}, {n_patterns} axes of signal")
            continue
        source = SciioArray(
            path,
            plugin["api"],
            number,
            np.dtype(data.dtype),
            data.shape,
            0 if is_lazy else data.nbytes,
        )
        held = () if is_lazy else ("it cannot be read in parts: every worker holds all of it",)
        along = (axis_from(a.get("name"), n, a) for a, n in zip(axes, data.shape, strict=True))
        trees = {"original_metadata": signal.get("original_metadata"), "metadata": known}
        found.append(
            Candidate(title, source, tuple(along), number=number, swapped=order_by_flags(axes).get("swapped"), files=files,
                      metadata={name: tree for name, tree in trees.items() if tree}, about=own.about(of_signal(known)),
                      notes=(f"read by {plugin['api']}", *held))
        )  # fmt: skip
    if not found:
        raise SourceError(
            f"{path}: no stack of patterns of 3 or 4 axes, 2 of them of the detector; {plugin['api']} finds "
            + ("; ".join(others[:6]) or "nothing")
        )
    return found
