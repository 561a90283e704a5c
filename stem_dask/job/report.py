"""The report of a run: one HTML file to look at the scan, and to choose a window."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stem_dask.core.errors import StoreError
from stem_dask.job.summary import to_json
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import opened


def write_report(path: str | Path, results: Mapping[str, Any], store: str | None) -> None:
    """Write the report to ``path``; the group ``analysis`` of ``store`` holds what is known of each pattern, with profiles."""
    text = html.escape(json.dumps(to_json(results), indent=1))
    with translate(StoreError, path), opened(str(path), "w") as file:
        file.write(f"<!doctype html><html lang='en'><title>Report</title><pre>{text}</pre></html>")
