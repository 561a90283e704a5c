"""The table of output formats, and one output file while it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.chunks import FILE_CHUNK_BYTES, INNER_CHUNK_BYTES
from stem_dask.core.errors import ConfigError, StoreError
from stem_dask.core.metadata import from_text, hdf5_tree, to_json
from stem_dask.core.patterns import axes_of, blocks_of, lead_dims, lead_shape
from stem_dask.engine import run as engine
from stem_dask.stages.validate import inside_of_blocks
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import temporary
from stem_dask.writers import hdf5 as h5
from stem_dask.writers import hspy, zspy
from stem_dask.writers.codecs import CODECS, LARGEST_CHUNK
from stem_dask.writers.hdf5 import Hdf5Sink
from stem_dask.writers.npy import NpySink
from stem_dask.writers.spool import SpoolSink
from stem_dask.writers.torch import PtSink, check_int64, layout_shape, signed_dtype
from stem_dask.writers.zarr import (
    ABOUT_SOURCE,
    StoreSink,
    finish_store,
    store_chunks,
    write_array,
    write_coordinates,
    write_dataset,
)
from stem_dask.writers.zarr_s3 import ObjectStoreSink

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

#: variables of the analysis in .pt, .hspy and .zspy files, one value per pattern
BY_POSITION = (
    "center_y", "center_x", "radius", "total", "retention", "window_y", "window_x", "filled_fraction",
    "center_out_y", "center_out_x",
)  # fmt: skip

#: coordinates that are written with the patterns
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


@dataclass(frozen=True)
class Target:
    """One output file, from the lazy patterns to the last attribute; its temporary name is ``PATH.incomplete``.

    To write it, compute `outputs` into `sink` with `stem_dask.engine.run.run`, call `finish`, then
    `stem_dask.storage.publish.publish`. `stem_dask.writers.spool.SplitSink` adds other outputs to the same pass.

    Parameters
    ----------
    path : its suffix, one of `FORMATS`, decides the format
    patterns : lazy, (…, ky, kx), in equal blocks, with coordinates and attributes
    analysis : results by pattern. The layout of a .pt is fixed from the start: arrays that `finish` fills in must be here, or in
        the coordinates, with their names and types
    layout : for .pt, see `stem_dask.writers.torch.LAYOUTS`
    keep_dtype : for .pt: keep unsigned types
    title : in the metadata
    codec : one of `stem_dask.writers.codecs.CODECS`
    rechunk : chunks of whole patterns of about 1 MiB, of 8 MiB in .zspy; False makes one chunk of each block
    folder : for spooled blocks; default ``PATH.incomplete.blocks``
    url : of a store in an object store, see `stem_dask.writers.zarr_s3`

    Raises
    ------
    ConfigError
        When the suffix or the codec is unknown, or they do not go together.

    Examples
    --------
    >>> import tempfile, dask.array as da, xarray as xr; path = tempfile.mkdtemp() + "/scan.npy"
    >>> patterns = xr.DataArray(da.ones((2, 3, 8, 8), dtype="u2"), dims=("scan_y", "scan_x", "ky", "kx"))
    >>> target = Target(path, patterns)
    >>> records = engine.run(target.outputs(), 2, target.sink())
    >>> target.finish()
    []
    >>> int(np.load(target.built, mmap_mode="r").sum())
    384
    """

    path: str
    patterns: xr.DataArray
    analysis: xr.Dataset | None = None
    layout: str = "scan"
    keep_dtype: bool = False
    title: str = "4D-STEM"
    codec: str = "auto"
    rechunk: bool = True
    folder: str = ""
    url: str = ""

    def __post_init__(self) -> None:
        if self.suffix not in FORMATS:
            raise ConfigError(
                f"{self.path}: cannot export to {self.suffix or 'no suffix'}; known are {', '.join(FORMATS)}"
            )
        if self.codec not in CODECS:
            raise ConfigError(
                f"{self.path}: the codec is {self.codec!r}; expected one of {', '.join(CODECS)}"
            )
        if not FORMATS[self.suffix].packed and self.codec not in ("auto", "none"):
            packed = ", ".join(suffix for suffix, known in FORMATS.items() if known.packed)
            raise ConfigError(
                f"{self.path}: the codec is {self.codec}, but {self.suffix} files are not compressed; "
                f"leave it at auto, or write one of {packed}"
            )
        if self.dtype == np.int64 and self.patterns.attrs.get("maximum", 0) > 2.0**63:
            check_int64(self.patterns.attrs["maximum"])  # a float: of 2**63 itself `PtSink` decides

    @property
    def suffix(self) -> str:
        """Suffix of the path in lower case."""
        return Path(self.path).suffix.lower()

    @property
    def built(self) -> str:
        """The temporary name."""
        return temporary(self.path)

    @property
    def spool(self) -> str:
        """Folder for spooled blocks."""
        return self.folder or f"{self.built}.blocks"

    @property
    def dtype(self) -> np.dtype:
        """Type of the patterns in the file."""
        if self.suffix == ".pt" and not self.keep_dtype:
            return signed_dtype(self.patterns.dtype)
        return self.patterns.dtype.newbyteorder("=")

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of a chunk.

        Raises
        ------
        ConfigError
            When it is too large to be compressed.
        """
        inner, _ = store_chunks(self.patterns, self.rechunk, FORMATS[self.suffix].chunk_bytes)
        n_bytes = prod(inner) * self.patterns.dtype.itemsize
        if n_bytes > LARGEST_CHUNK:
            raise ConfigError(
                f"{self.path}: a chunk would have {n_bytes:,} bytes, more than {LARGEST_CHUNK:,}; leave "
                "rechunk at true, or lower output.chunk_mb"
            )
        return inner

    def outputs(self) -> dict[str, da.Array]:
        """Lazy arrays to compute: ``patterns``, and for HyperSpy ``navigator``, the intensity of each pattern."""
        patterns = self.patterns
        found = {"patterns": blocks_of(patterns)}
        if FORMATS[self.suffix].navigator:
            found["navigator"] = inside_of_blocks(patterns, 0.0, "navigator")
        return found

    def sink(self) -> engine.Sink:
        """Sink for the blocks of `outputs`."""
        return FORMATS[self.suffix].sink(self)

    def finish(
        self,
        analysis: xr.Dataset | None = None,
        valid: NDArray[np.bool_] | None = None,
        attrs: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Add small arrays and attributes after the pass.

        Parameters
        ----------
        analysis : replaces the one from before the pass
        valid : (scan_y, scan_x) or (pattern,), where the input could be read
        attrs : more attributes of the patterns, not for .pt
        about : more attributes of the file, for .zarr and .h5

        Returns
        -------
        list of str, notes for the user

        Raises
        ------
        StoreError
            When a .pt gets arrays that it was not begun for, or the file cannot be written.
        """
        patterns = self.patterns.assign_attrs({**from_text(self.patterns.attrs), **(attrs or {})})
        if valid is not None:
            patterns = patterns.assign_coords(valid=(lead_dims(patterns), np.asarray(valid)))
        analysis = self.analysis if analysis is None else analysis
        about = {"title": self.title, **(about or {})}
        with translate(StoreError, self.path):
            return FORMATS[self.suffix].finish(self, patterns, analysis, about)


@dataclass(frozen=True)
class Format:
    """An output format: its sink, and how the file is completed."""

    sink: Callable[[Target], engine.Sink]
    finish: Callable[[Target, xr.DataArray, xr.Dataset | None, Mapping[str, Any]], list[str]]
    packed: bool = True
    navigator: bool = False
    chunk_bytes: int = INNER_CHUNK_BYTES


def content_of(patterns: xr.DataArray, analysis: xr.Dataset | None) -> dict[str, Any]:
    """The other entries of a .pt dictionary: plain values and small arrays."""
    axes = [
        {"name": a.name, "size": a.size, "scale": a.scale, "offset": a.offset, "units": a.units}
        for a in axes_of(patterns)
    ]
    attrs = to_json(from_text(patterns.attrs))
    content: dict[str, Any] = {
        "axes": axes,
        "window": {name: attrs[name] for name in WINDOW_ATTRS if name in attrs},
        "intensity": attrs.get("intensity", "counts"),
        "downsample_factor": attrs.get("downsample_factor", 1),
    }
    # through JSON, because a pickle records which texts are the same object
    content |= json.loads(json.dumps({name: attrs[name] for name in ABOUT_SOURCE if name in attrs}))
    found = {} if analysis is None else analysis.variables
    known = {name: found[name].values for name in BY_POSITION if name in found}
    for name in POSITION_COORDS:
        if name in patterns.coords:
            known.setdefault(name, patterns.coords[name].values)
    content["analysis"] = {name: np.ascontiguousarray(array) for name, array in known.items()}
    return content


def _zarr_sink(target: Target) -> engine.Sink:
    patterns, chunks = target.patterns, target.chunks
    _, shards = store_chunks(patterns, target.rechunk)
    dims = tuple(map(str, patterns.dims))
    dtype = str(target.dtype)
    options = (target.built, patterns.shape, dtype, dims, chunks, shards, target.codec)
    return ObjectStoreSink(*options, target.url) if target.url else StoreSink(*options)


def _zarr_finish(
    target: Target, patterns: xr.DataArray, analysis: xr.Dataset | None, about: Mapping[str, Any]
) -> list[str]:
    write_coordinates(target.built, patterns)
    if "valid" in patterns.coords:
        valid = Path(
            target.built, "valid"
        )  # False where the patterns could not be read and are zeros
        write_array(valid, patterns.coords["valid"].values, lead_dims(patterns))
    if analysis is not None:
        write_dataset(target.built, "analysis", analysis)
    finish_store(target.built, about, patterns.attrs)
    return []


def _pt_sink(target: Target) -> PtSink:
    patterns, lead = target.patterns, lead_shape(target.patterns)
    bare = target.layout in ("tensor", "bare")
    content = None if bare else {"title": target.title, **content_of(patterns, target.analysis)}
    shape = layout_shape(lead, patterns.shape[-2:], target.layout)
    return PtSink(target.built, lead, shape, str(target.dtype), content)


def _pt_finish(
    target: Target, patterns: xr.DataArray, analysis: xr.Dataset | None, about: Mapping[str, Any]
) -> list[str]:
    sink = target.sink()
    if isinstance(sink, PtSink) and sink.content is not None:
        begun = sink.content["analysis"]
        arrays = content_of(patterns, analysis)["analysis"]
        if "valid" not in begun and arrays.get("valid", np.False_).all():
            del arrays["valid"]  # not needed
        arrays = {name: arrays[name] for name in sorted(arrays, key=[*begun, *arrays].index)}
        sink.fill({"analysis": arrays})
    return []


def _hdf5_sink(target: Target) -> engine.Sink:
    group = f"{hspy.experiment(target.title)}/data" if target.suffix == ".hspy" else "patterns"
    shape, chunks = target.patterns.shape, target.chunks
    return Hdf5Sink(
        target.built, target.spool, shape, str(target.dtype), chunks, group, target.codec
    )


def _zspy_sink(target: Target) -> engine.Sink:
    shape, dtype = target.patterns.shape, str(target.dtype)
    return zspy.ZspySink(
        target.built, target.spool, shape, dtype, target.chunks, target.title, target.codec
    )


def _signal_finish(
    target: Target, patterns: xr.DataArray, analysis: xr.Dataset | None, about: Mapping[str, Any]
) -> list[str]:
    """Complete a .hspy or .zspy file."""
    total = np.zeros(lead_shape(patterns))
    n_blocks = prod(blocks_of(target.patterns).numblocks)
    for region, block in SpoolSink(target.spool).blocks(n_blocks, ("navigator",)):
        total[region] = block["navigator"]
    content = content_of(patterns, analysis)
    metadata = {**content["window"], "intensity": content["intensity"], **content["analysis"]}
    metadata["downsample_factor"] = content["downsample_factor"]
    if "given" in content:
        metadata["given"] = content["given"]
    signal = hspy.signal_of(
        axes_of(patterns),
        target.title,
        total,
        metadata,
        hdf5_tree(content.get("original_metadata", {})),
        hspy.signal_metadata(content),
    )
    write = hspy.write_signal if target.suffix == ".hspy" else zspy.write_signal
    write(target.built, signal)
    return _plugin_note(target)


def _h5_finish(
    target: Target, patterns: xr.DataArray, analysis: xr.Dataset | None, about: Mapping[str, Any]
) -> list[str]:
    h5.write_about(target.built, patterns, analysis, about)
    return _plugin_note(target)


def _plugin_note(target: Target) -> list[str]:
    if target.suffix == ".zspy" or target.codec not in ("lz4", "zstd"):
        return []
    name = Path(target.path).name
    return [f"{name} is compressed with blosc {target.codec}: reading it requires hdf5plugin"]


#: by suffix
FORMATS = {
    ".zarr": Format(_zarr_sink, _zarr_finish),
    ".pt": Format(_pt_sink, _pt_finish, packed=False),
    ".hspy": Format(_hdf5_sink, _signal_finish, navigator=True),
    ".npy": Format(
        lambda target: NpySink(target.built, target.patterns.shape, str(target.dtype)),
        lambda target, patterns, analysis, about: [],
        packed=False,
    ),
    ".h5": Format(_hdf5_sink, _h5_finish),
    ".zspy": Format(_zspy_sink, _signal_finish, navigator=True, chunk_bytes=FILE_CHUNK_BYTES),
}
