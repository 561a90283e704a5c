"""Export lazy patterns to .zarr, .pt, HDF5 (.hspy, .h5, .hdf5, .emd), .npy or .zspy, block by block, or to a signal of HyperSpy."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.chunks import INNER_CHUNK_BYTES, inner_chunk, shard_shape
from stem_dask.core.errors import ConfigError, SourceError, StoreError
from stem_dask.core.formats import FORMATS, Format, Output
from stem_dask.core.metadata import dig, from_text, tree_at
from stem_dask.core.patterns import (
    ABOUT_SOURCE,
    POSITION_COORDS,
    as_patterns,
    axes_of,
    axis_of,
    blocks_of,
    content_of,
    lead_dims,
)
from stem_dask.engine import run as engine
from stem_dask.engine.clients import connected, refuse_no_client
from stem_dask.engine.journal import Journal
from stem_dask.readers.containers import ZarrArray
from stem_dask.readers.source import identity
from stem_dask.readers.zarr_chunks import check_small_arrays
from stem_dask.stages.blocks import patterns_of
from stem_dask.stages.open import block_array, lazy_array
from stem_dask.stages.validate import inside_of_blocks
from stem_dask.storage.errors import translate
from stem_dask.storage.location import refuse_url
from stem_dask.storage.publish import (
    make_folder,
    publish,
    refuse_existing,
    refuse_taken,
    remove,
    temporary,
    temporary_names,
)
from stem_dask.storage.zarr_store import zarr_store
from stem_dask.writers.codecs import CODECS, LARGEST_CHUNK
from stem_dask.writers.hyperspy import signal_axis, signal_metadata
from stem_dask.writers.torch import LAYOUTS, check_int64, signed_dtype
from stem_dask.writers.zarr import open_group

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr


@dataclass(frozen=True)
class Target:
    """One output file, from the lazy patterns to the last attribute; its temporary name is ``PATH.incomplete``.

    To write it, compute `outputs` into `sink` with `stem_dask.engine.run.run`, call `finish`, then
    `stem_dask.storage.publish.publish`. `stem_dask.writers.spool.SplitSink` adds other outputs to the same pass.

    Parameters
    ----------
    path : its suffix, one of `stem_dask.core.formats.FORMATS`, decides the format
    patterns : lazy, (…, ky, kx), in equal blocks, with coordinates and attributes
    analysis : results by pattern. The layout of a .pt is fixed from the start: arrays that `finish` fills in must be here, or in
        the coordinates, with their names and types
    layout : for .pt, see `stem_dask.writers.torch.LAYOUTS`
    keep_dtype : for .pt: keep unsigned types
    title : in the metadata
    codec : one of `stem_dask.writers.codecs.CODECS`
    rechunk : chunks of whole patterns of about 1 MiB, of 8 MiB in .zspy; False makes one chunk of each block
    folder : for spooled blocks; default ``PATH.incomplete.blocks``
    url : of a store in an object store

    Raises
    ------
    ConfigError
        When the suffix, layout or codec is unknown, or they do not go together.
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
        path, suffix = self.path, Path(self.path).suffix.lower()
        if suffix not in FORMATS:
            known = ", ".join(FORMATS)
            raise ConfigError(
                f"{path}: cannot export to {suffix or 'no suffix'}; known are {known}"
            )
        if self.codec not in CODECS:
            known = ", ".join(CODECS)
            raise ConfigError(f"{path}: the codec is {self.codec!r}; expected one of {known}")
        if not self.format.is_packed and self.codec not in ("auto", "none"):
            packed = ", ".join(suffix for suffix, known in FORMATS.items() if known.is_packed)
            raise ConfigError(
                f"{path}: the codec is {self.codec}, but {suffix} files are not compressed; leave it at auto, or "
                f"write one of {packed}"
            )
        if suffix == ".pt" and self.layout not in LAYOUTS:
            known = ", ".join(LAYOUTS)
            raise ConfigError(f"layout is {self.layout!r}; expected one of {known}")
        if self.dtype == np.int64 and self.patterns.attrs.get("maximum", 0) > 2.0**63:
            check_int64(self.patterns.attrs["maximum"])  # a float: of 2**63 itself `PtSink` decides

    @property
    def format(self) -> Format:
        """Its row in the table of formats."""
        return FORMATS[Path(self.path).suffix.lower()]

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
        dtype = self.patterns.dtype.newbyteorder("=")
        is_signed = self.format is FORMATS[".pt"] and not self.keep_dtype
        return signed_dtype(dtype) if is_signed else dtype

    def outputs(self) -> dict[str, da.Array]:
        """Lazy arrays to compute: ``patterns``, and for HyperSpy ``navigator``, the intensity of each pattern."""
        found = {"patterns": blocks_of(self.patterns)}
        if self.format.has_navigator:
            found["navigator"] = inside_of_blocks(self.patterns, threshold=0.0, name="navigator")
        return found

    def sink(self) -> Any:
        """Sink for the blocks of `outputs`; raises ConfigError when a chunk is too large to be compressed."""
        patterns, form = self.patterns, self.format
        chunks, shards = store_chunks(patterns, self.rechunk, form.chunk_bytes)
        n_bytes = prod(chunks) * patterns.dtype.itemsize
        if form.is_packed and n_bytes > LARGEST_CHUNK:
            raise ConfigError(
                f"{self.path}: a chunk would have {n_bytes:,} bytes, more than {LARGEST_CHUNK:,}; leave rechunk at "
                "true, or lower output.chunk_mb"
            )
        output = Output(
            self.built,
            tuple(map(int, patterns.shape)),
            self.dtype,
            chunks,
            shards,
            self.codec,
            tuple(map(str, patterns.dims)),
            self.title,
            self.layout,
            self.spool,
            self.url,
            content_of(patterns, self.analysis),
        )
        return form.load()(output)

    def finish(
        self,
        analysis: xr.Dataset | None = None,
        valid: NDArray[np.bool_] | None = None,
        attrs: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Add small arrays and attributes after the pass; returns notes for the user.

        Parameters
        ----------
        analysis : replaces the one from before the pass; in a .pt with the same names and types
        valid : (scan_y, scan_x) or (pattern,), where the input could be read
        attrs, about : more attributes of the patterns (not for .pt), and of the file (.zarr and HDF5)
        """
        patterns = self.patterns.assign_attrs({**from_text(self.patterns.attrs), **(attrs or {})})
        if valid is not None:
            patterns = patterns.assign_coords(valid=(lead_dims(patterns), np.asarray(valid)))
        analysis = self.analysis if analysis is None else analysis
        sink, about = self.sink(), {"title": self.title, **(about or {})}
        with translate(StoreError, self.path):
            notes: list[str] = sink.complete(patterns, analysis, about)
        return notes


def store_chunks(
    patterns: xr.DataArray, rechunk: bool = True, most_bytes: int = INNER_CHUNK_BYTES
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(inner chunk, shard) of the output, for lazy patterns whose blocks become one shard each.

    With ``rechunk`` an inner chunk is whole patterns of up to ``most_bytes``, otherwise the whole block.
    """
    data = blocks_of(patterns)
    lead, detector = data.chunks[:-2], data.shape[-2:]
    for dim, chunks in zip(patterns.dims, lead, strict=False):
        if len(set(chunks[:-1])) > 1 or chunks[-1] > chunks[0]:
            raise StoreError(
                f"the blocks along {dim} are {chunks}; a store needs equal blocks (the last may be smaller): "
                f"rechunk, for example patterns.chunk({dim}={chunks[0]})"
            )
    block = tuple(chunks[0] for chunks in lead)
    pattern_bytes = prod(detector) * data.dtype.itemsize
    inner = inner_chunk(block, data.shape[:-2], pattern_bytes, most_bytes) if rechunk else block
    return (*inner, *detector), (*shard_shape(block, inner), *detector)


def export(
    patterns: Any,
    path: str | Path,
    *,
    analysis: xr.Dataset | None = None,
    layout: str = "scan",
    keep_dtype: bool = False,
    overwrite: bool = False,
    client: Any = None,
    progress: engine.Progress | None = None,
    title: str | None = None,
    codec: str = "auto",
    rechunk: bool = True,
) -> str:
    """Compute lazy patterns into a file; its suffix decides the format.

    Parameters
    ----------
    patterns : (scan_y, scan_x, ky, kx) or (pattern, ky, kx); see `analyze`
    path : ending in .zarr, .pt, .hspy, .h5, .hdf5, .emd, .npy or .zspy; a missing folder is created
    analysis : stored with the patterns; a .npy holds neither analysis nor axes
    layout : for .pt: ``scan`` and ``nchw`` make a dictionary with ``patterns`` (scan_y, scan_x, H, W) or
        (N, 1, H, W); ``tensor`` makes the bare tensor (N, 1, H, W), ``bare`` the bare tensor as the patterns are
    keep_dtype : for .pt: keep unsigned types, which torch can neither add nor compare
    overwrite : replace an older file when the new one is complete
    client : a `distributed.Client`; default the active one, else threads
    codec : ``lz4``, ``zstd`` (both of blosc), ``gzip``, ``none``, or ``auto``: lz4 in .zarr and .zspy, and gzip in HDF5
        files, which all programs open; .pt and .npy are not compressed
    rechunk : chunks of whole patterns of about 1 MiB, of 8 MiB in .zspy; False makes one chunk of each block

    Returns
    -------
    str, the absolute path of the file; what its readers need to know is a warning

    Raises
    ------
    OutputExistsError
        When the file exists and ``overwrite`` is False, is a link or a folder instead of a file, or a temporary name of the
        export, such as ``NAME.incomplete``, is taken.
    ConfigError
        When the suffix, layout or codec is unknown, the format is not compressed, or the client is asynchronous.
    SourceError, StoreError
        When workers do not see the input or the output folder, or the output cannot be written.

    Examples
    --------
    >>> import numpy as np, tempfile, xarray as xr; path = tempfile.mkdtemp() + "/scan.zarr"
    >>> patterns = xr.DataArray(np.ones((2, 3, 8, 8), "u2"), dims=("scan_y", "scan_x", "ky", "kx"))
    >>> int(xr.open_zarr(export(patterns, path)).patterns.sum())
    384
    """
    options: dict[str, Any] = {
        "layout": layout,
        "keep_dtype": keep_dtype,
        "codec": codec,
        "rechunk": rechunk,
    }
    target, notes = write_patterns(
        patterns, path, analysis=analysis, overwrite=overwrite, client=client, progress=progress,
        title=title, **options,
    )  # fmt: skip
    for note in notes:
        warnings.warn(note, stacklevel=3)  # of `speaking_python`, too
    return target


def write_patterns(
    patterns: Any,
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
    codec: str = "auto",
    rechunk: bool = True,
) -> tuple[str, list[str]]:
    """As `export`; returns the absolute path, and notes for the user.

    ``journal`` and ``folder`` are those of a resumable run, whose unfinished file is kept after an error.
    """
    way = "export writes local files; only the .zarr of a run can be in an object store"
    refuse_url("path", str(path), way)
    path = str(Path(path).expanduser().absolute())
    patterns = patterns_of(patterns)
    blocks = blocks_of(patterns)
    blocks = blocks.rechunk([chunks[0] for chunks in blocks.chunks])  # equal ones
    kept = {name: patterns.coords[name] for name in POSITION_COORDS if name in patterns.coords}
    patterns = as_patterns(blocks, axes_of(patterns), patterns.attrs).assign_coords(kept)
    title = title or str(patterns.attrs.get("title", "4D-STEM"))
    target = Target(
        path, patterns, analysis, layout, keep_dtype, title, codec, rechunk, folder or ""
    )
    refuse_existing(path, overwrite)
    if journal is None:  # a run may resume its own files
        refuse_taken((*temporary_names(path), target.spool))
    client = active_client() if client is None else client
    if client is not None:
        refuse_no_client(client)
    if client is not None and journal is None:  # a run has checked this
        _refuse_unseen(client, patterns, path)
    make_folder(path)
    try:
        # errors of a run name the temporary file, which is kept
        with translate(StoreError, path) if journal is None else contextlib.nullcontext():
            engine.run(
                target.outputs(),
                len(lead_dims(patterns)),
                target.sink(),
                client=client,
                progress=progress,
                journal=journal,
                job=export_job(path, layout, codec, rechunk),
            )
            notes = target.finish()
            refuse_existing(path, overwrite)  # it may have appeared in the meantime
            if journal is not None:
                journal.hold()
            publish(path)
    except BaseException:
        if journal is None:
            remove(temporary(path))
        raise
    finally:
        if journal is None:
            remove(target.spool)
    return path, notes


def _refuse_unseen(client: Any, patterns: xr.DataArray, path: str) -> None:
    """Refuse workers on machines that do not see the input or the output folder."""
    from stem_dask.engine.clients import see

    source = patterns.attrs.get("source")
    places: dict[str, Any] = {source: SourceError} if source and os.path.exists(source) else {}
    folder = next(parent for parent in Path(path).parents if parent.is_dir())
    own = tempfile.TemporaryDirectory(prefix=f".{Path(path).name}-", dir=folder)
    with translate(StoreError, path), own as made:
        try:
            with connected(client):
                see(client, {**places, made: StoreError})
        except StoreError as error:
            raise StoreError(str(error).replace(made, str(folder))) from None


def to_hyperspy(patterns: Any) -> Any:
    """Patterns as a lazy, calibrated HyperSpy signal over the same graph; nothing is computed.

    Parameters
    ----------
    patterns : (scan_y, scan_x, ky, kx) or (pattern, ky, kx), what any function of this package takes

    Returns
    -------
    hyperspy LazySignal2D; its navigation axes are the scan, its metadata what the file states about the microscope

    Raises
    ------
    ConfigError
        When HyperSpy is not installed.

    Examples
    --------
    >>> import numpy as np, stem_dask as sd
    >>> signal = sd.to_hyperspy(np.ones((2, 3, 8, 9), "u2"))
    >>> signal.axes_manager.navigation_shape, signal.axes_manager.signal_shape
    ((3, 2), (9, 8))
    """
    try:
        import hyperspy.api as hs
    except ImportError as error:
        raise ConfigError(
            f"HyperSpy cannot be imported ({error}); install the extra: pip install 'stem_dask[hyperspy]'"
        ) from error

    patterns = patterns_of(patterns)
    names = list(map(str, patterns.dims))
    axes = [signal_axis(axis, axis.name, names) for axis in axes_of(patterns)]
    title = {"General.title": str(patterns.attrs.get("title", ""))}
    metadata = tree_at(title, signal_metadata(from_text(patterns.attrs)))
    signal = hs.signals.Signal2D(blocks_of(patterns), axes=axes, metadata=metadata).as_lazy()
    signal.set_signal_type(dig(metadata, "Signal.signal_type") or "")
    return signal


def export_from_store(store: str, path: str, **options: Any) -> list[str]:
    """Export a finished store; the options are those of `write_patterns`, and notes for the user are returned."""
    patterns, analysis = open_store(store, block_array)
    return write_patterns(patterns, path, analysis=analysis, **options)[1]


def export_job(path: str, layout: str, codec: str = "auto", rechunk: bool = True) -> str:
    """Name of an export in the journal, including the options that change the file.

    Examples
    --------
    >>> export_job("scan.pt", "nchw"), export_job("scan.h5", "nchw", "lz4", rechunk=False)
    ('export .pt nchw', 'export .h5 lz4 whole blocks')
    """
    suffix = Path(path).suffix
    words = ["export", suffix, layout if suffix == ".pt" else "", codec if codec != "auto" else ""]
    return " ".join(filter(None, [*words, "" if rechunk else "whole blocks"]))


def open_store(
    store: str, as_dask: Callable[..., da.Array] = lazy_array
) -> tuple[xr.DataArray, xr.Dataset | None]:
    """Lazy patterns of a store, one block per shard, and its analysis without profiles, if any."""
    import zarr

    root = zarr.open_group(zarr_store(store), mode="r")
    array: Any = root["patterns"]
    dims = array.metadata.dimension_names
    check_small_arrays(store, root)
    described = open_group(store)
    axes = [axis_of(described, dim) for dim in dims]
    source = ZarrArray(store, "patterns", np.dtype(array.dtype), tuple(array.shape))
    lead = [min(n, size) for n, size in zip(array.shards[:-2], array.shape, strict=False)]
    token = hashlib.sha256(repr((identity(store), lead)).encode()).hexdigest()[:16]
    attrs = {**array.attrs, "title": root.attrs.get("title", "4D-STEM")}
    attrs |= {name: root.attrs[name] for name in ABOUT_SOURCE if name in root.attrs}
    patterns = as_patterns(as_dask(source, lead, f"{as_dask.__name__}-{token}"), axes, attrs)
    if "valid" in described and not described["valid"].all():
        patterns = patterns.assign_coords(valid=described["valid"].load())
    if "analysis" not in root:
        return patterns, None
    check_small_arrays(store, root["analysis"])
    stored = open_group(store, "analysis")
    return patterns, stored.drop_vars("profile", errors="ignore").load()


def active_client() -> Any:
    """The active client of this process, or None, without importing distributed."""
    distributed: Any = sys.modules.get("distributed")
    if distributed is not None:
        with contextlib.suppress(ValueError):
            return distributed.default_client()
    return None
