"""Write patterns as .zarr, .pt or .hspy: lazy in, a file out, block by block."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stem_dask import engine
from stem_dask.errors import ConfigError
from stem_dask.io.hspy import HspySink
from stem_dask.io.lazy import lazy_array
from stem_dask.io.metadata import hdf5_tree
from stem_dask.io.pt import PtSink, layout_shape, signed_dtype
from stem_dask.io.publish import publish, refuse_existing, remove, temporary
from stem_dask.io.sources import ZarrArray, identity
from stem_dask.io.store import (
    ABOUT_SOURCE,
    StoreSink,
    finish_store,
    plain,
    store_chunks,
    write_coordinates,
    write_dataset,
    write_valid,
)
from stem_dask.io.verify import decoded
from stem_dask.journal import Journal
from stem_dask.stages.patterns import (
    as_patterns,
    axes_of,
    axis_of,
    blocks_of,
    lead_dims,
    lead_shape,
)
from stem_dask.stages.validate import intensity_inside

#: what of the analysis goes into a .pt and a .hspy, one value a pattern
BY_POSITION = (
    "center_y", "center_x", "radius", "total", "retention", "window_y", "window_x", "filled_fraction",
    "center_out_y", "center_out_x",
)  # fmt: skip
#: coordinates of patterns that are written with them
POSITION_COORDS = ("window_y", "window_x", "valid")
WINDOW_ATTRS = (
    "window_size",
    "align",
    "k_origin",
    "global_radius",
    "cropped_axes",
    "aligned_axes",
    "target_retention",
    "coverage",
)


def export(
    patterns: xr.DataArray,
    path: str | Path,
    *,
    analysis: xr.Dataset | None = None,
    layout: str = "scan",
    keep_dtype: bool = False,
    overwrite: bool = False,
    client: Any = None,
    progress: engine.Progress | None = None,
    title: str | None = None,
    journal: Journal | None = None,
    folder: str | None = None,
) -> list[str]:
    """Compute lazy patterns into a file; its suffix decides the format.

    Parameters
    ----------
    patterns : (…, ky, kx)
    path : ending in .zarr, .pt or .hspy
    analysis : what is known of each pattern, stored with them
    layout : for .pt: ``scan`` and ``nchw`` make a dictionary with ``patterns`` (scan_y, scan_x, H, W) or
        (N, 1, H, W); ``tensor`` makes the bare tensor (N, 1, H, W), ``bare`` the bare tensor as the patterns are
    keep_dtype : for .pt: keep unsigned types, which torch can neither add nor compare
    overwrite : replace an older file when the new one is complete
    client : a `distributed.Client`; default the active one, else threads
    journal, folder : of a run that can be resumed: what is unfinished then stays after an error

    Returns
    -------
    list of str, what the user should know about the file

    Raises
    ------
    OutputExistsError
        When the file exists and ``overwrite`` is False.
    ConfigError
        When the suffix or layout is unknown.

    Examples
    --------
    >>> import tempfile; path = tempfile.mkdtemp() + "/scan.zarr"
    >>> patterns = xr.DataArray(np.ones((2, 3, 8, 8), "u2"), dims=("scan_y", "scan_x", "ky", "kx"))
    >>> export(patterns, path)
    []
    >>> int(xr.open_zarr(path).patterns.sum())
    384
    """
    path = str(Path(path).absolute())
    writers = {".zarr": _to_zarr, ".pt": _to_pt, ".hspy": _to_hspy}
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise ConfigError(
            f"{path}: cannot export to {suffix or 'no suffix'}; known are {', '.join(writers)}"
        )
    refuse_existing(path, overwrite)
    client = active_client() if client is None else client
    patterns = _regular(
        as_patterns(blocks_of(patterns), axes_of(patterns), patterns.attrs).assign_coords(
            {name: patterns.coords[name] for name in POSITION_COORDS if name in patterns.coords}
        )
    )
    options = {
        "journal": journal,
        "folder": folder or f"{path}.run",
        "layout": layout,
        "keep_dtype": keep_dtype,
        "title": title or str(patterns.attrs.get("title", "4D-STEM")),
    }
    try:
        notes = writers[suffix](patterns, path, analysis, options, client, progress)
        publish(path)
    except BaseException:
        if journal is None:
            remove(temporary(path))
        raise
    finally:
        if journal is None:
            remove(f"{path}.run")
    return notes


def export_from_store(
    store: str,
    path: str,
    *,
    layout: str = "scan",
    keep_dtype: bool = False,
    title: str | None = None,
    overwrite: bool = False,
    client: Any = None,
    progress: engine.Progress | None = None,
    journal: Journal | None = None,
    folder: str | None = None,
    codec: str = "auto",
    rechunk: bool = True,
) -> list[str]:
    """Export a finished store; see `export`."""
    patterns, analysis = open_store(store)
    return export(
        patterns,
        path,
        analysis=analysis,
        layout=layout,
        keep_dtype=keep_dtype,
        title=title,
        overwrite=overwrite,
        client=client,
        progress=progress,
        journal=journal,
        folder=folder,
    )


@dataclass(frozen=True)
class Target:
    """TEMPORARY until the exporters land."""

    path: str
    patterns: xr.DataArray
    layout: str = "scan"
    codec: str = "auto"
    rechunk: bool = True
    title: str = ""
    folder: str = ""

    def outputs(self) -> dict[str, Any]:
        found = {"patterns": self.patterns.data}
        if self.path.endswith(".hspy"):
            found["navigator"] = intensity_inside(self.patterns, 0.0)
        return found

    def sink(self) -> Any:
        patterns, path = self.patterns, temporary(self.path)
        if self.path.endswith(".zarr"):
            return store_target(path, patterns)
        if self.path.endswith(".pt"):
            content = None if self.layout in ("tensor", "bare") else _content(patterns, None)
            shape = layout_shape(lead_shape(patterns), patterns.shape[-2:], self.layout)
            dtype = signed_dtype(patterns.dtype, None)
            return PtSink(path, lead_shape(patterns), shape, str(dtype), content)
        chunks, _ = store_chunks(patterns)
        return HspySink(
            path,
            self.folder,
            patterns.shape,
            str(patterns.dtype),
            axes_of(patterns),
            chunks,
            self.title,
            {},
        )

    def finish(self, **known: Any) -> list[str]:
        return []


def store_target(path: str, patterns: xr.DataArray) -> Any:
    inner, shards = store_chunks(patterns)
    dims = tuple(str(dim) for dim in patterns.dims)
    return StoreSink(path, patterns.shape, str(patterns.dtype), dims, inner, shards)


def export_job(path: str, layout: str) -> str:
    """Name of an export in the journal: with the layout for .pt, whose file depends on it."""
    suffix = Path(path).suffix
    return f"export {suffix} {layout}" if suffix == ".pt" else f"export {suffix}"


def open_store(store: str) -> tuple[xr.DataArray, xr.Dataset | None]:
    """The patterns of a store, lazy, one block a shard; and its analysis (small arrays), when it has one."""
    import zarr

    root = zarr.open_group(store, mode="r")
    array: Any = root["patterns"]
    dims = array.metadata.dimension_names
    with decoded(store, root):
        described = xr.open_zarr(store)
    axes = [axis_of(described, dim) for dim in dims]
    source = ZarrArray(store, "patterns", np.dtype(array.dtype), tuple(array.shape))
    lead = [min(n, size) for n, size in zip(array.shards[:-2], array.shape, strict=False)]
    token = hashlib.sha256(repr((identity(store), lead)).encode()).hexdigest()[:16]
    attrs = {**array.attrs, "title": root.attrs.get("title", "4D-STEM")}
    attrs |= {name: root.attrs[name] for name in ABOUT_SOURCE if name in root.attrs}
    patterns = as_patterns(lazy_array(source, lead, f"store-{token}"), axes, attrs)
    if "valid" in described and not described["valid"].all():
        patterns = patterns.assign_coords(valid=described["valid"].load())
    if "analysis" not in root:
        return patterns, None
    with decoded(store, root["analysis"]):
        analysis = xr.open_zarr(store, group="analysis").drop_vars("profile", errors="ignore")
        return patterns, analysis.load()


def active_client() -> Any:
    """The client of this process, or None; distributed is not loaded to find out."""
    import sys

    if "distributed" not in sys.modules:
        return None
    from distributed import default_client

    try:
        return default_client()
    except ValueError:
        return None


def _regular(patterns: xr.DataArray) -> xr.DataArray:
    """Equal blocks along the scan, as every grid of chunks needs; lazy patterns of this package are like that."""
    data = patterns.data
    lead = tuple(chunks[0] for chunks in data.chunks[:-2])
    wanted = {i: n for i, n in enumerate(lead)}
    return (
        patterns.copy(data=data.rechunk(wanted))
        if any(len(set(chunks[:-1])) > 1 or chunks[-1] > chunks[0] for chunks in data.chunks[:-2])
        else patterns
    )


def _to_zarr(
    patterns: xr.DataArray,
    path: str,
    analysis: Any,
    options: Mapping[str, Any],
    client: Any,
    progress: Any,
) -> list[str]:
    inner, shards = store_chunks(patterns)
    dims = tuple(str(dim) for dim in patterns.dims)
    built = temporary(path)
    sink = StoreSink(built, patterns.shape, str(patterns.dtype), dims, inner, shards)
    engine.run(
        {"patterns": patterns.data},
        len(dims) - 2,
        sink,
        client=client,
        progress=progress,
        journal=options["journal"],
        job=export_job(path, options["layout"]),
    )
    write_coordinates(built, patterns)
    if "valid" in patterns.coords:
        write_valid(built, patterns.coords["valid"].values, dims[:-2])
    if analysis is not None:
        write_dataset(built, "analysis", analysis)
    finish_store(built, {"title": options["title"]}, patterns.attrs)
    return []


def _to_pt(
    patterns: xr.DataArray,
    path: str,
    analysis: Any,
    options: Mapping[str, Any],
    client: Any,
    progress: Any,
) -> list[str]:
    lead, detector = lead_shape(patterns), patterns.shape[-2:]
    highest = patterns.attrs.get("maximum")
    dtype = patterns.dtype if options["keep_dtype"] else signed_dtype(patterns.dtype, highest)
    content = None if options["layout"] in ("tensor", "bare") else _content(patterns, analysis)
    shape = layout_shape(lead, detector, options["layout"])
    sink = PtSink(temporary(path), lead, shape, str(dtype), content)
    engine.run(
        {"patterns": patterns.data},
        len(lead),
        sink,
        client=client,
        progress=progress,
        journal=options["journal"],
        job=export_job(path, options["layout"]),
    )
    if dtype == patterns.dtype:
        return []
    why = (
        "the largest value is " + f"{highest:,.0f}"
        if highest is not None
        else "the largest value is not known"
    )
    return [
        f"{Path(path).name} holds {dtype}: torch neither adds nor compares {patterns.dtype}, and {why}"
    ]


def _content(patterns: xr.DataArray, analysis: xr.Dataset | None) -> dict[str, Any]:
    """What a .pt says beside the patterns, in plain Python and small arrays."""
    axes = [
        {"name": a.name, "size": a.size, "scale": a.scale, "offset": a.offset, "units": a.units}
        for a in axes_of(patterns)
    ]
    attrs = plain(patterns.attrs)
    content: dict[str, Any] = {
        "axes": axes,
        "window": {name: attrs[name] for name in WINDOW_ATTRS if name in attrs},
        "intensity": attrs.get("intensity", "counts"),
        "downsample_factor": attrs.get("downsample_factor", 1),
    }
    if "beam_energy_kv" in attrs:
        content["beam_energy_kv"] = attrs["beam_energy_kv"]
    known = {} if analysis is None else _by_position(analysis)
    for name in POSITION_COORDS:
        if name in patterns.coords:
            known.setdefault(name, np.asarray(patterns.coords[name].values))
    content["analysis"] = known
    return content


def _by_position(analysis: xr.Dataset) -> dict[str, Any]:
    return {
        name: np.ascontiguousarray(analysis[name].values)
        for name in BY_POSITION
        if name in analysis.variables
    }


def _to_hspy(
    patterns: xr.DataArray,
    path: str,
    analysis: Any,
    options: Mapping[str, Any],
    client: Any,
    progress: Any,
) -> list[str]:
    chunks, _ = store_chunks(patterns)
    content = _content(patterns, analysis)
    metadata = {**content["window"], "intensity": content["intensity"], **content["analysis"]}
    metadata["downsample_factor"] = content["downsample_factor"]
    sink = HspySink(
        temporary(path),
        options["folder"],
        patterns.shape,
        str(patterns.dtype),
        axes_of(patterns),
        tuple(min(n, size) for n, size in zip(chunks, patterns.shape, strict=True)),
        options["title"],
        metadata,
        hdf5_tree(patterns.attrs.get("original_metadata", {})),
        content.get("beam_energy_kv"),
    )
    outputs = {"patterns": patterns.data, "navigator": intensity_inside(patterns, 0.0)}
    engine.run(
        outputs,
        len(lead_dims(patterns)),
        sink,
        client=client,
        progress=progress,
        journal=options["journal"],
        job=export_job(path, options["layout"]),
    )
    return []
