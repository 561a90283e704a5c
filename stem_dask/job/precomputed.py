"""Find a precomputed analysis: from ``analyze.ahead``, in a converted store or next to a file, or from a finished crop."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stem_dask.config.load import defaults, to_dict
from stem_dask.config.options import Config
from stem_dask.core.errors import ConfigError
from stem_dask.readers.open import Found
from stem_dask.storage.publish import read_document, stem

#: options of the input that do not change what an analysis finds
_HARMLESS = ("path", "calibration", "beam_energy_kv")

#: options of the analysis that stored profiles cannot answer for
_FIXED = ("center_method", "manual_center", "radius_metric", "threshold")


@dataclass(frozen=True)
class Precomputed:
    """A store with the analysis of the patterns that a job reads; the crop is the same as with a new analysis.

    ``note`` is shown to the user; ``hot`` lists [y, x] of the pixels that ``input.mask: auto`` masked for the analysis.
    """

    store: str
    note: str
    hot: list[list[int]] = field(default_factory=list)


def analysis_path(path: str | Path) -> str:
    """Path of the analysis that is written with a file: a .zarr store itself, else a store next to the file.

    Examples
    --------
    >>> analysis_path("scan.zarr"), analysis_path("scan.hspy")
    ('scan.zarr', 'scan.hspy_analysis.zarr')
    """
    return str(path) if stem(path) != str(path) else f"{path}_analysis.zarr"


def find_precomputed(
    config: Config, found: Found, contents: Mapping[str, str] | None = None
) -> Precomputed | None:
    """Find the analysis that ``analyze.from`` names, or that was made when the input was converted; None without one.

    Parameters
    ----------
    contents : digests of the mask, dark and gain files

    Raises
    ------
    ConfigError
        If ``analyze.from`` was made from other patterns or with other options.
    """
    if not config.crop.enabled:
        return None
    if config.analyze.known is not None:
        return _named(config, found, config.analyze.known, contents or {})
    path = analysis_path(found.info.path)
    attrs = _stored(path)
    if attrs is None or not _own(found, path, attrs) or _different(config, found, attrs):
        return None
    return Precomputed(path, f"the analysis is taken from {path}")


def _named(config: Config, found: Found, path: str, contents: Mapping[str, str]) -> Precomputed:
    store = path if path.rstrip("/").endswith(".zarr") else analysis_path(path)
    attrs = _stored(store)
    if attrs is None:
        raise ConfigError(
            f"analyze.from is {path}, which holds no analysis of whole patterns; name a finished crop of this input, or the "
            "output of stem-dask convert --analyze, or leave analyze.from out"
        )
    own = _own(found, store, attrs)
    different = _different(config, found, attrs, None if own else contents)
    if different:
        raise ConfigError(
            f"analyze.from is {path}, which was made from other patterns or with other options: "
            f"{'; '.join(different)}; change them, or leave analyze.from out"
        )
    return Precomputed(store, f"the analysis is taken from {path}", attrs["hot_pixels"])


def _stored(path: str) -> dict[str, Any] | None:
    """Attributes of a store and of its analysis; None if it has no analysis of whole patterns."""
    try:
        root, group = _document(path), _document(path, "analysis")
        attrs: dict[str, Any] = {**root["attributes"], "analysis": group["attributes"]}
        arrays = (_document(path, "analysis", name) for name in ("center_y", "mean_pattern"))
        shape = [size for array in arrays for size in array["shape"]]
        config = attrs["config"]
        whole = config["analyze"]["ahead"] or config["crop"]["enabled"]
    except (KeyError, TypeError):
        return None
    return {"hot_pixels": [], **attrs, "shape": shape} if whole else None


def _document(*names: str) -> dict[str, Any]:
    return read_document(os.path.join(*names)) or {}


def _own(found: Found, store: str, attrs: Mapping[str, Any]) -> bool:
    """Whether the input was written together with this analysis; a crop writes other patterns than it analyzes."""
    if attrs["config"]["crop"]["enabled"]:
        return False
    if os.path.realpath(found.info.path) == os.path.realpath(store):
        return True
    return attrs.get("of") == list(found.identity[1:])


def _different(
    config: Config,
    found: Found,
    attrs: Mapping[str, Any],
    contents: Mapping[str, str] | None = None,
) -> list[str]:
    """Differences between a job and the run that made an analysis.

    ``contents`` are the digests of the mask, dark and gain files; None if the input was written with the analysis.
    """
    own = contents is None
    options, before = to_dict(config), attrs["config"]
    out = [
        f"analyze.{key} was {before['analyze'][key]}, and is {options['analyze'][key]}"
        for key in _FIXED
        if before["analyze"][key] != options["analyze"][key]
    ]
    if attrs["shape"] != list(found.source.shape):
        out.append(f"shape was {attrs['shape']}, and is {list(found.source.shape)}")
    # an input written with the analysis holds the analyzed patterns, and must be read unchanged
    was = before["input"]
    if own:  # its array may be given by name
        was = {**defaults("input"), "dataset": options["input"]["dataset"]}
    out += [
        f"input.{key} was {was.get(key)}, and is {value}"
        for key, value in options["input"].items()
        if key not in _HARMLESS and was.get(key) != value
    ]
    if contents is not None:
        before_files = attrs.get("contents", {})
        changed = [key for key in contents if before_files.get(key) != contents[key]]
        out += [f"the content of input.{key} has changed" for key in changed]
        if attrs.get("quarantined"):
            out.append(f"it lacks {attrs['quarantined']:,} patterns that could not be read")
    made_from = (attrs["input"]["bytes"], attrs["input"]["modified_ns"])
    if not own and made_from != tuple(found.identity[1:]):
        out.append(
            f"it was made from another file, or another state of it ({attrs['input']['path']})"
        )
    return out
