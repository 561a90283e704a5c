"""Transpose a large detector-first file, slab by slab, into an intermediate file that blocks of patterns are read from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dask.array as da

from stem_dask.core.errors import ConfigError, SourceError
from stem_dask.core.model import Record
from stem_dask.engine import run as engine
from stem_dask.readers.detector_first import TransposedFile, TransposedSink, detector_first
from stem_dask.readers.open import Found
from stem_dask.readers.views import View
from stem_dask.stages.open import block_array


@dataclass(frozen=True)
class Transpose:
    """A planned pass; ``found`` is the transposed input, which can be read after ``run``."""

    found: Found
    slabs: da.Array
    sink: TransposedSink

    def run(self, **options: Any) -> list[Record]:
        """Read the file once, slab by slab, and write blocks of patterns; ``options`` are those of `stem_dask.engine.run.run`."""
        try:
            return engine.run({"slab": self.slabs}, 2, self.sink, job="turn", **options)
        except SourceError as error:
            raise SourceError(
                f"{error}; this file is detector-first, and every pattern needs the block: on_error=quarantine cannot "
                "skip it. Run the same command again when it can be read"
            ) from error


def plan_transpose(
    found: Found, block: Sequence[int], slab: Sequence[int], folder: str | Path
) -> Transpose:
    """Plan the pass; nothing is read.

    Parameters
    ----------
    found : a detector-first input
    block : (scan_y, scan_x) shape of the blocks of all later passes
    slab : (ky, kx) pixels of one task, see `stem_dask.job.budget.fitting_slab`
    folder : of the run; the intermediate file is written to its subfolder ``turned``

    Raises
    ------
    ConfigError
        If the file is not detector-first.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from stem_dask.readers.open import find
    >>> folder = tempfile.mkdtemp()
    >>> np.save(f"{folder}/old.npy", np.arange(24, dtype="u2").reshape(2, 3, 2, 2))
    >>> found = find(f"{folder}/old.npy", scan_order="detector_first")
    >>> turn = plan_transpose(found, (1, 2), (1, 3), folder)
    >>> len(turn.run()), turn.found.source[(slice(0, 1), slice(1, 2), slice(None), slice(None))].tolist()
    (2, [[[[1, 5, 9], [13, 17, 21]]]])
    """
    stored = detector_first(found.source)
    if stored is None:
        raise ConfigError(f"{found.info.path}: this file is not detector-first")
    forwards = [slice(None, None, 1 if indices.step > 0 else -1) for _, indices in stored.axes]
    stored = stored.select(*forwards)  # flipped axes are flipped when the transposed file is read
    turned = TransposedFile(
        str(Path(folder) / "turned" / "patterns.raw"),
        stored.dtype,
        (*stored.shape[2:], *stored.shape[:2]),
        (block[0], block[1]),
        (slab[0], slab[1]),
    )
    token = hashlib.sha256(repr((found.identity, stored)).encode()).hexdigest()[:16]
    slabs = block_array(stored, turned.slab, f"slab-{token}")
    source = View.of(turned).select(*forwards[2:], *forwards[:2])
    return Transpose(replace(found, source=source), slabs, TransposedSink(turned))
