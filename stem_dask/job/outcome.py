"""What a run returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Exit code, results, and closing lines of a run."""

    exit_code: int
    results: Mapping[str, Any]
    lines: tuple[str, ...]
