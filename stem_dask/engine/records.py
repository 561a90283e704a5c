"""What a run meets on its way: memory, errors that passed, blocks that could not be read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.model import Record


@dataclass
class Tally:
    """Adds up what the records of finished blocks say.

    Examples
    --------
    >>> tally = Tally()
    >>> tally.note([Record(1, 0.1, 64, 0, {"region": [[2, 4]], "quarantined": "block [2:4]: gone"})])
    >>> tally.valid((6,)).tolist()
    [True, True, False, False, True, True]
    """

    peak_rss: int = 0
    n_retries: int = 0
    #: records of blocks that could not be read, by index
    quarantined: dict[int, Record] = field(default_factory=dict)
    #: positions that the input itself says are missing, by the array ``valid`` of an earlier run
    lost: NDArray[np.bool_] | None = None

    def note(self, records: Iterable[Record]) -> None:
        """Take in the records of a pass."""
        for record in records:
            self.peak_rss = max(self.peak_rss, record.peak_rss)
            self.n_retries += record.extra.get("retries", 0)
            if "quarantined" in record.extra:
                self.quarantined.setdefault(record.index, record)

    @property
    def unreadable(self) -> dict[int, str]:
        """Why a block could not be read, by its index."""
        return {index: record.extra["quarantined"] for index, record in self.quarantined.items()}

    def valid(self, lead: Sequence[int]) -> NDArray[np.bool_]:
        """Which positions of a scan (or list) could be read."""
        valid = np.ones(tuple(lead), bool) if self.lost is None else ~self.lost
        for record in self.quarantined.values():
            valid[tuple(slice(*part) for part in record.extra["region"])] = False
        return valid

    def words(self, lead: Sequence[int]) -> dict[str, Any]:
        """What the results say of it."""
        blocks = [
            {"region": record.extra["region"], "why": record.extra["quarantined"]}
            for _, record in sorted(self.quarantined.items())
        ]
        n_missing = int((~self.valid(lead)).sum())
        n_before = 0 if self.lost is None else int(self.lost.sum())
        return {
            "retries": self.n_retries,
            "quarantined": {"n_patterns": n_missing, "before": n_before, "blocks": blocks},
        }
