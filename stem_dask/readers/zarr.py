"""Arrays of zarr stores: HyperSpy's .zspy, abTEM, xarray and stem_dask's own.

They are listed as keyword arguments of `stem_dask.readers.source.Candidate`.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers import own
from stem_dask.readers.arrays import ZarrArray
from stem_dask.readers.axes import (
    axis_along,
    axis_from,
    detector_last,
    odd_flags_note,
    spectra_hint,
)
from stem_dask.readers.calibration import of_abtem
from stem_dask.readers.containers import ZARR_ROOTS
from stem_dask.readers.source import packed
from stem_dask.readers.zarr_chunks import expect_codecs_of_numcodecs, refuse_outside
from stem_dask.storage.errors import one_line, translate
from stem_dask.storage.location import at, is_url
from stem_dask.storage.zarr_store import zarr_store

#: where HyperSpy puts its signals; below each are groups and arrays of metadata
_SIGNALS = "Experiments/"

#: groups deeper than this are not searched
_MAX_DEPTH = 12


def list_zarr(path: str) -> list[dict[str, Any]]:
    """Arrays of a zarr store with two or more axes: it is an array itself, or a group with patterns or groups of them.

    Raises
    ------
    SourceError
        When an array or a group in it is damaged, or a link leads out of it.
    """
    import zarr

    from stem_dask.storage.zarr_guard import refuse_hostile

    expect_codecs_of_numcodecs()
    with translate(SourceError, path, "not a readable zarr store"), _codecs_known(path):
        if not is_url(path) and not any(Path(path, name).exists() for name in ZARR_ROOTS):
            raise SourceError(
                f"{path}: not a readable zarr store: it holds none of {', '.join(ZARR_ROOTS)}; copy it again from where it was written"
            )
        for name in ZARR_ROOTS:
            refuse_outside(path, at(path, name))
        if not is_url(path):
            refuse_hostile(path)
        root = zarr.open(zarr_store(path), mode="r")
        if isinstance(root, zarr.Array):
            return [_zarr_array(path, "", root, None)]
        if is_url(path):
            return _arrays_below(path, root)
        broken: dict[str, Exception] = {}
        found = list(_arrays(path, "", 0, broken))
        known = own.of_zarr(path, dict(root.attrs), dict(found))
        least = 2 if known is None else 3  # own stores also hold the positions of the patterns
        if Path(path, _SIGNALS).is_dir():
            found = [one for one in _arrays(path, _SIGNALS, 1, broken) if one[0].endswith("/data")]
        elif known is None:
            found = list(_arrays(path, "", _MAX_DEPTH, broken))
        if broken and not any(array.ndim == 4 for _, array in found):
            raise next(iter(broken.values()))
        listed = [
            of_abtem(
                root.attrs,
                {**_zarr_array(path, name, array, root), **_stated_of(path, name, array, known)},
            )
            for name, array in found
            if array.ndim >= least
        ]
        lost = tuple(
            f"{one_line(name)} cannot be read ({one_line(error)})" for name, error in broken.items()
        )
        return [{**one, "notes": (*one.get("notes", ()), *lost)} for one in listed]


def _arrays_below(path: str, root: Any) -> list[dict[str, Any]]:
    """Arrays of a store below a URL, from its consolidated metadata: one request instead of one per array."""
    from zarr import Array

    members = root.members(max_depth=None if root.metadata.consolidated_metadata else 0)
    arrays = {name: array for name, array in members if isinstance(array, Array)}
    known = own.of_zarr(path, dict(root.attrs), arrays)
    least = 2 if known is None else 3
    first = {name: array for name, array in arrays.items() if "/" not in name}
    chosen = arrays if known is None else first
    return [
        of_abtem(
            root.attrs,
            {**_zarr_array(path, name, array, root), **(known or {} if name == "patterns" else {})},
        )
        for name, array in sorted(chosen.items())
        if array.ndim >= least
    ]


@contextlib.contextmanager
def _codecs_known(path: str) -> Iterator[None]:
    """Report a codec that is not installed as such, not as damage."""
    try:
        yield
    except (KeyError, ValueError) as error:
        if not re.search("unknown codec|codec not available", str(error), re.IGNORECASE):
            raise
        raise SourceError(
            f"{path}: the codec of the chunks is not installed ({one_line(error)}); save it again with blosc, zstd or gzip "
            "where it can be read"
        ) from error


def _stated_of(path: str, name: str, array: Any, known: dict[str, Any] | None) -> dict[str, Any]:
    """Metadata of an array from elsewhere in the store, in own stores and in signals of HyperSpy."""
    if name.startswith("Experiments/") and name.endswith("/data"):
        return own.of_zspy(path, name.removesuffix("/data"), array)
    return known or {} if name == "patterns" else {}


def _arrays(
    path: str, prefix: str, depth: int, broken: dict[str, Exception]
) -> Iterator[tuple[str, Any]]:
    """Name and array of every member; members that cannot be opened are put into ``broken``."""
    import zarr

    from stem_dask.storage.zarr_guard import HostileStoreError

    for folder in sorted(Path(path, prefix).iterdir()):
        roots = [root for name in ZARR_ROOTS if (root := folder / name).is_file()]
        for root in roots:
            refuse_outside(path, root)
        if not roots:
            continue
        name = f"{prefix}{folder.name}"
        try:
            node = None if _is_group(roots) else zarr.open(zarr_store(path), path=name, mode="r")
        except HostileStoreError:
            raise
        except Exception as error:  # each part of zarr has its own
            broken[name] = error
            continue
        if isinstance(node, zarr.Array):
            yield name, node
        elif depth:
            yield from _arrays(path, f"{name}/", depth - 1, broken)


def _is_group(roots: list[Path]) -> bool:
    """Whether a folder is a group of format 2, by its files: opening one takes some ms."""
    return [root.name for root in roots] == [".zgroup"]


def _zarr_array(path: str, name: str, array: Any, root: Any) -> dict[str, Any]:
    named = getattr(array.metadata, "dimension_names", None)
    named = named or array.attrs.get("_ARRAY_DIMENSIONS")  # as xarray names them in format 2
    dims: list[str | None] = [None] * array.ndim
    if isinstance(named, (list, tuple)) and len(named) == array.ndim:
        dims = [name if isinstance(name, str) else None for name in named]
    parent = root[str(Path(name).parent)] if root is not None and "/" in name else root
    axes, described = [], []
    for i, size in enumerate(array.shape):
        if parent is not None and dims[i] and dims[i] in parent:
            along = parent[dims[i]]
            axes.append(axis_along(dims[i], int(size), along, dict(along.attrs)))
        elif parent is not None and f"axis-{i}" in parent:  # as HyperSpy writes .zspy
            attrs = dict(parent[f"axis-{i}"].attrs)
            described.append(attrs)
            axes.append(axis_from(attrs.get("name", f"axis{i}"), int(size), attrs))
        else:
            axes.append(Axis(dims[i] or f"axis{i}", int(size)))
    chunks = getattr(array, "shards", None) or array.chunks
    if 0 in chunks and 0 not in array.shape:
        raise SourceError(
            f"{path}: {name or 'the array'} states chunks of {by(chunks)}; its metadata are damaged"
        )
    shape = tuple(int(n) for n in array.shape)
    chunk_bytes = int(math.prod(chunks) * array.dtype.itemsize)
    source = ZarrArray(path, name, np.dtype(array.dtype), shape, chunk_bytes=chunk_bytes)
    return {
        "name": name or "array",
        "source": source,
        "axes": tuple(axes),
        "chunks": tuple(chunks),
        "swapped": detector_last(described),
        "hint": spectra_hint(described),
        "fault": packed(path, name or "the array", array.attrs),
        "notes": odd_flags_note(described),
    }
