"""The pass before the first one, for files with the detector slowest: made of slabs, read as blocks of patterns."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dask.array as da

from stem_dask.cluster.connect import Connection
from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.model import Record
from stem_dask.engine import run as engine
from stem_dask.engine.journal import Journal
from stem_dask.job.memory_and_disk import fitting_slab, turned_bytes
from stem_dask.readers.detector_first import Turned, TurnedSink, detector_first
from stem_dask.readers.open import Found
from stem_dask.stages.open import block_array

JOB = "turn"


@dataclass(frozen=True)
class Turn:
    """A planned pass: ``found`` is the input as blocks read it once ``run`` has come to its end."""

    found: Found
    slab: tuple[int, int]
    slabs: da.Array
    sink: TurnedSink

    def run(
        self,
        client: Any = None,
        progress: engine.Progress | None = None,
        journal: Journal | None = None,
    ) -> list[Record]:
        """Read the file once, slab by slab, and write it in blocks of patterns; finished slabs are only checked.

        Parameters
        ----------
        client, progress, journal : see `stem_dask.engine.run.run`

        Raises
        ------
        SourceError
            When a part of the file cannot be read.
        DiskFullError
            When there is no room for the intermediate file.
        """
        try:
            return engine.run(
                {"slab": self.slabs},
                2,
                self.sink,
                client=client,
                progress=progress,
                journal=journal,
                job=JOB,
            )
        except SourceError as error:
            raise SourceError(
                f"{error}; the block is of the detector, which comes first in this file: every pattern needs it, so that "
                "on_error=quarantine cannot leave it out. The same command goes on when it can be read"
            ) from error


def needed_turn(
    found: Found, block: Sequence[int], connection: Connection, folder: str | Path
) -> Turn | None:
    """The pass of an input that must be turned, see `stem_dask.job.memory_and_disk.turned_bytes`; None for any other.

    Raises
    ------
    MemoryBudgetError
        When a worker's memory does not suffice for one pixel of the detector.
    """
    if not turned_bytes(found):
        return None
    slab = fitting_slab(found, block, connection.worker)
    return turn_of(found, block, slab, folder)


def turn_of(
    found: Found,
    block: Sequence[int],
    slab: Sequence[int],
    folder: str | Path,
) -> Turn:
    """Plan the pass; nothing is read.

    Parameters
    ----------
    found : an input whose file has the detector axes slowest
    block : (scan_y, scan_x) positions that the blocks of all later passes take
    slab : (ky, kx) pixels of one task, see `stem_dask.job.memory_and_disk.fitting_slab`
    folder : of the run; the intermediate file comes into ``turned`` below it

    Raises
    ------
    ConfigError
        When the file has another order.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from stem_dask.readers.open import find
    >>> folder = tempfile.mkdtemp()
    >>> np.save(f"{folder}/old.npy", np.arange(24, dtype="u2").reshape(2, 3, 2, 2))
    >>> found = find(f"{folder}/old.npy", scan_order="detector_first")
    >>> turn = turn_of(found, (1, 2), (1, 3), folder)
    >>> len(turn.run()), turn.found.source[(slice(0, 1), slice(1, 2), slice(None), slice(None))].tolist()
    (2, [[[[1, 5, 9], [13, 17, 21]]]])
    """
    stored = detector_first(found.source)
    if stored is None:
        raise ConfigError(f"{found.info.path}: the detector is not slowest in this file")
    ky, kx, scan_y, scan_x = stored.shape
    turned = Turned(
        str(Path(folder) / "turned" / "patterns.raw"),
        stored.dtype,
        (scan_y, scan_x, ky, kx),
        (block[0], block[1]),
        (slab[0], slab[1]),
    )
    token = hashlib.sha256(repr((found.identity, stored)).encode()).hexdigest()[:16]
    slabs = block_array(stored, turned.slab, f"slab-{token}")
    return Turn(
        replace(found, source=turned),
        turned.slab,
        slabs,
        TurnedSink(turned),
    )
