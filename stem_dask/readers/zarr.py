"""Arrays of zarr stores: HyperSpy's .zspy, abTEM, xarray and stem_dask's own."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers import own
from stem_dask.readers.calibration import of_abtem
from stem_dask.readers.containers import ZARR_ROOTS, ZarrArray
from stem_dask.readers.layout import axis_along, axis_from, order_by_flags
from stem_dask.readers.source import Candidate, packed
from stem_dask.readers.zarr_chunks import refuse_outside
from stem_dask.storage.errors import one_line, translate
from stem_dask.storage.location import is_url
from stem_dask.storage.zarr_store import zarr_store

#: where HyperSpy puts its signals; below each are groups and arrays of metadata
_SIGNALS = "Experiments/"


def list_zarr(path: str) -> list[Candidate]:
    """Arrays of a zarr store with two or more axes: it is an array itself, or a group with patterns or groups of them."""
    import zarr

    from stem_dask.storage.zarr_guard import refuse_hostile

    remedy = "it is cut or damaged, or its codec is not installed: copy it again, or save it with blosc, zstd or gzip where it can be read"
    with translate(SourceError, path, "not a readable zarr store", remedy):
        if not is_url(path):
            if not any(Path(path, name).exists() for name in ZARR_ROOTS):
                raise SourceError(
                    f"{path}: not a readable zarr store: it holds none of {', '.join(ZARR_ROOTS)}; copy it again from where it was written"
                )
            for name in ZARR_ROOTS:
                refuse_outside(path, Path(path, name))
            refuse_hostile(path)
        root = zarr.open(zarr_store(path), mode="r")
        if isinstance(root, zarr.Array):
            return [Candidate(**_row(path, "", root, None))]
        broken: dict[str, Exception] = {}
        found: list[tuple[str, Any]]
        if is_url(path):  # by consolidated metadata: one request instead of one per array
            depth = None if root.metadata.consolidated_metadata else 0
            members = sorted(root.members(max_depth=depth))
            found = [one for one in members if isinstance(one[1], zarr.Array)]
            known = own.of_zarr(path, dict(root.attrs), dict(found))
            if known is not None:
                found = [one for one in found if "/" not in one[0]]
        else:
            found = list(_arrays(path, "", 0, broken))
            known = own.of_zarr(path, dict(root.attrs), dict(found))
            if Path(path, _SIGNALS).is_dir():
                signals = _arrays(path, _SIGNALS, 1, broken)
                found = [one for one in signals if one[0].endswith("/data")]
            elif known is None:
                found = list(_arrays(path, "", 12, broken))
        if broken and not any(array.ndim == 4 for _, array in found):
            raise next(iter(broken.values()))
        faults = ((one_line(name), one_line(error)) for name, error in broken.items())
        notes, rows = tuple(f"{name} cannot be read ({error})" for name, error in faults), []
        # own stores also hold the positions of the patterns
        found = [one for one in found if one[1].ndim > (1 if known is None else 2)]
        for name, array in found:
            more = (known or {}) if name == "patterns" else {}
            if name.startswith(_SIGNALS) and not is_url(path):
                more = own.of_zspy(path, name.removesuffix("/data"), array)
            row = of_abtem(root.attrs, {**_row(path, name, array, root), **more})
            rows.append(Candidate(**{**row, "notes": (*row.get("notes", ()), *notes)}))
        return rows


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
        name, node = f"{prefix}{folder.name}", None
        try:
            # opening a group takes some ms
            if roots and [root.name for root in roots] != [".zgroup"]:
                node = zarr.open(zarr_store(path), path=name, mode="r")
        except HostileStoreError:
            raise
        except Exception as error:  # each part of zarr has its own
            broken[name] = error
            continue
        if isinstance(node, zarr.Array):
            yield name, node
        elif roots and depth:
            yield from _arrays(path, f"{name}/", depth - 1, broken)


def _row(path: str, name: str, array: Any, root: Any) -> dict[str, Any]:
    named = getattr(array.metadata, "dimension_names", None)
    named = named or array.attrs.get("_ARRAY_DIMENSIONS")  # as xarray names them in format 2
    is_list = isinstance(named, (list, tuple)) and len(named) == array.ndim
    dims = [dim if isinstance(dim, str) else "" for dim in (named if is_list else array.shape)]
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
        "fault": packed(path, name or "the array", array.attrs),
        **order_by_flags(described),
    }
