"""What a run returns."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stem_dask.core.errors import ConfigError
from stem_dask.core.text import by

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, repr=False)
class Outcome:
    """Exit code, results, and closing lines of a run."""

    exit_code: int
    results: Mapping[str, Any]
    lines: tuple[str, ...]

    @property
    def path(self) -> str | None:
        """Path or URL of the patterns; None if the run stored none."""
        files = self.results.get("files") or {}
        options = (self.results.get("config") or {}).get("output") or {}
        if options.get("patterns") is False:
            return None
        return files.get("output") or options.get("path")

    def open(self) -> "xr.DataArray":
        """The patterns that the run wrote, as `stem_dask.open` returns them.

        Raises
        ------
        ConfigError
            When the run stored no patterns.
        """
        from stem_dask.stages.open import open_patterns

        if self.path is None:
            raise ConfigError("this run stored no patterns (output.patterns is false)")
        return open_patterns(self.path)

    def _rows(self) -> dict[str, str]:
        """What the run found, by name."""
        window, kept = self.results.get("window"), self.results.get("validation") or {}
        rows = {}
        if window:
            rows["window"] = f"{by(window['size'])} px"
        if "mean_retention" in kept:
            rows["retention"] = (
                f"mean {kept['mean_retention']:.4f}, min {kept['min_retention']:.4f}"
            )
        if self.path is not None:
            text = self.path
            rows["output"] = text if len(text) <= 160 else f"… {text[-150:]}"
        return rows

    def __repr__(self) -> str:
        words = [f"exit code {self.exit_code}"]
        words += [f"{name} {value}" for name, value in self._rows().items()]
        return f"<{type(self).__name__} {', '.join(words)}>"

    def _repr_html_(self) -> str:
        """A small table, for notebooks."""
        rows = {**self._rows(), "exit code": str(self.exit_code)}
        rows |= {"verdict": "; ".join(self.results.get("verdict") or ["ok"])}
        cells = (
            f"<tr><th scope='row' style='text-align:left'>{name}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in rows.items()
        )
        return f"<table>{''.join(cells)}</table>"
