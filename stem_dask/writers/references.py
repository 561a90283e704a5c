"""A raw file as a zarr store without a copy: kerchunk's JSON of references, whose chunks are ranges of bytes of the file."""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import floordiv
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError, StoreError
from stem_dask.core.metadata import to_json
from stem_dask.readers.containers import Hdf5Dataset, ZarrArray, hdf5_file
from stem_dask.readers.flat import FlatFile, FramedFile
from stem_dask.readers.source import Source
from stem_dask.readers.views import Joined, ScanOfList, View
from stem_dask.storage.errors import translate
from stem_dask.storage.location import at, is_url, opened_file
from stem_dask.storage.publish import make_folder, opened, publish, refuse_existing, temporary

if TYPE_CHECKING:
    import xarray as xr

#: with more references than this a store takes seconds to open
MOST_REFERENCES = 300_000

#: a chunk has about a 4096th of the patterns, within these bounds
CHUNK_BYTES = (8 * 2**20, 64 * 2**20)

#: where no number of patterns near that divides the scan
LARGEST_CHUNK = 2**30

#: HDF5's filters (deflate, shuffle, blosc) as codecs of zarr 3; blosc states its parameters in each chunk
_CODECS = {
    1: {"name": "numcodecs.zlib", "configuration": {"level": 1}},
    2: {"name": "numcodecs.shuffle", "configuration": {}},
    32001: {
        "name": "blosc",
        "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0},
    },
}  # fmt: skip


class _NotReferableError(Exception):
    """Why ranges of bytes cannot describe an array."""


@dataclass(frozen=True)
class Places:
    """Where equal frames lie: frame i begins at byte ``first[i]`` of file ``files[which[i]]``.

    A frame has the two fastest axes of the file: a pattern, or of a detector-first file an image of the scan.

    Parameters
    ----------
    files : paths or URLs
    which, first : int64, shaped as the other axes
    dtype : of the file, with its byte order
    width : columns of a frame in the file
    rows, columns : the part of each frame that is used
    """

    files: tuple[str, ...]
    which: NDArray
    first: NDArray
    dtype: np.dtype
    width: int
    rows: range
    columns: range


@dataclass(frozen=True)
class Layout:
    """An array of the store in the order of the file: its chunks, what decodes them, and where each lies."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype
    #: index of a chunk and its reference
    chunks: Iterator[tuple[tuple[int, ...], Any]]
    codecs: tuple[dict[str, Any], ...] = ()
    fill: Any = 0


def write_references(
    path: str, source: Source, patterns: xr.DataArray, *, overwrite: bool = False
) -> int:
    """Write a store of references to the bytes of a source, and return the number of references.

    Parameters
    ----------
    path : of the JSON file
    source : uncompressed patterns in one or more files, transposed and cut as it may be, or whole chunks of an HDF5 file
    patterns : its dimensions, coordinates and attributes; its values are not read
    overwrite : replace an existing file

    Raises
    ------
    SourceError
        When ranges of bytes cannot describe the source, or too many would be needed.
    OutputExistsError, StoreError
        When the output exists, or cannot be written.
    """
    refuse_existing(path, overwrite)
    try:
        document = references(source, patterns)
    except _NotReferableError as error:
        where = patterns.attrs["source"]
        raise SourceError(
            f"{where}: {error}; write a copy instead: stem-dask convert {where} NAME.zarr"
        ) from error
    make_folder(path)
    with translate(StoreError, path), opened(temporary(path), "w") as file:
        json.dump(document, file)
    publish(path)
    return sum(isinstance(one, list) for one in document["refs"].values())


def references(source: Source, patterns: xr.DataArray) -> dict[str, Any]:
    """The document of a store with the array ``patterns`` and its coordinates; see `write_references`."""
    refs: dict[str, Any] = {}
    arrays = {}
    others = [str(name) for name in patterns.coords if name not in patterns.dims]
    for name, values in patterns.coords.items():
        content = np.asarray(values.values, order="C")
        content = content.astype(content.dtype.newbyteorder("<"))
        whole = Layout(content.shape, content.shape, content.dtype, iter(()))
        dims = [str(dim) for dim in values.dims]
        arrays[str(name)] = _array(whole, range(content.ndim), dims, dict(values.attrs))
        refs[f"{name}/c/{'/'.join('0' * content.ndim)}"] = _inline(content.tobytes())
    order: tuple[int, ...] = tuple(range(len(source.shape)))
    if isinstance(source, View):  # as stored: a codec puts the axes in order
        kept = sorted(source.order)
        order = tuple(kept.index(axis) for axis in source.order)
        source = source.transpose(np.argsort(order).tolist())
    layout = layout_of(source)
    attrs = {name: value for name, value in patterns.attrs.items() if name != "original_metadata"}
    attrs |= {"coordinates": " ".join(others)} if others else {}
    arrays["patterns"] = _array(layout, order, [str(dim) for dim in patterns.dims], attrs)
    for index, reference in layout.chunks:
        key = "/".join(str(index[axis]) for axis in order)
        refs[f"patterns/c/{key}"] = reference
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    known = {"kind": "inline", "must_understand": False, "metadata": arrays}
    documents = {"zarr.json": {**group, "consolidated_metadata": known}}
    documents |= {f"{name}/zarr.json": document for name, document in arrays.items()}
    texts = {name: json.dumps(document) for name, document in documents.items()}
    return {"version": 1, "refs": {**texts, **refs}}


def _array(
    layout: Layout, order: Sequence[int], dims: list[str], attrs: dict[str, Any]
) -> dict[str, Any]:
    """The metadata of a zarr array; its axis i is axis ``order[i]`` of the file."""
    endian = "big" if layout.dtype.newbyteorder("=") != layout.dtype else "little"
    codecs = [{"name": "bytes", "configuration": {"endian": endian}}, *layout.codecs]
    if list(order) != sorted(order):
        stored = np.argsort(order).tolist()
        codecs.insert(0, {"name": "transpose", "configuration": {"order": stored}})
    grid = {"chunk_shape": [layout.chunk[axis] for axis in order]}
    fill = np.asarray(layout.fill, layout.dtype).item()
    if isinstance(fill, float) and not math.isfinite(fill):
        fill = "NaN" if math.isnan(fill) else "Infinity" if fill > 0 else "-Infinity"
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [layout.shape[axis] for axis in order],
        "data_type": layout.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": to_json(attrs),
        "dimension_names": dims,
    }


def _inline(content: bytes) -> str:
    return f"base64:{base64.b64encode(content).decode()}"


def _url(path: str) -> str:
    return path if is_url(path) else f"file://{os.path.abspath(path)}"


def layout_of(source: Source) -> Layout:
    """The chunks of a source whose axes are in the order of the file."""
    inner, scan = source, None
    if isinstance(source, View) and source.shape == source.source.shape and not source.flipped:
        inner = source.source
    if isinstance(inner, ScanOfList):
        scan, inner = inner.scan_shape, inner.source
    if isinstance(inner, Hdf5Dataset) and inner.chunk_bytes:
        return _chunks_of_hdf5(inner, scan)
    return _chunks_of_frames(places_of(source))


# --- frames at known places -------------------------------------------------------------------------------------


def places_of(source: Source) -> Places:
    """Where the frames of a source lie in its files."""
    if isinstance(source, Hdf5Dataset):
        source = _contiguous(source)
    if isinstance(source, FlatFile):
        *lead, height, width = source.shape
        n_bytes = height * width * source.dtype.itemsize
        first = source.offset + np.arange(math.prod(lead)).reshape(lead) * n_bytes
        if source.stride:  # of the first axis
            gap = source.stride - n_bytes * math.prod(lead[1:])
            first += gap * np.arange(lead[0]).reshape(-1, *(1,) * (len(lead) - 1))
        rows, columns = range(height), range(width)
        return Places(
            (source.path,), np.zeros_like(first), first, source.dtype, width, rows, columns
        )
    if isinstance(source, FramedFile):
        height, width = source.frame_shape
        starts = [run.offset + np.arange(run.count) * run.stride for run in source.runs]
        files = tuple(dict.fromkeys(run.path for run in source.runs))
        numbers = [np.full(run.count, files.index(run.path)) for run in source.runs]
        first, which = np.concatenate(starts), np.concatenate(numbers)
        return Places(files, which, first, source.dtype, width, range(height), range(width))
    if isinstance(source, ScanOfList):
        inner = places_of(source.source)
        first, which = (one.reshape(source.scan_shape) for one in (inner.first, inner.which))
        return replace(inner, first=first, which=which)
    if isinstance(source, Joined):
        return _joined([places_of(one) for one in source.parts])
    if isinstance(source, View) and not source.transposed:
        return _selected(places_of(source.source), source)
    if isinstance(source, ZarrArray):
        raise SourceError(f"{source.path}: it is a zarr store already, which xarray opens as it is")
    raise _NotReferableError("its patterns are not stored one after another as plain numbers")


def _joined(parts: Sequence[Places]) -> Places:
    """Places one after another along the first axis; single frames become a stack."""
    one = parts[0]
    if any(
        replace(part, files=one.files, which=one.which, first=one.first) != one for part in parts
    ):
        raise _NotReferableError("its files store patterns of different kinds")
    lead = one.first.shape[1:]
    starts = [part.first.reshape(-1, *lead) for part in parts]
    before = itertools.accumulate((len(part.files) for part in parts), initial=0)
    numbers = [part.which.reshape(-1, *lead) + n for part, n in zip(parts, before, strict=False)]
    files = tuple(path for part in parts for path in part.files)
    return replace(one, files=files, first=np.concatenate(starts), which=np.concatenate(numbers))


def _selected(inner: Places, view: View) -> Places:
    """The places of a view whose axes are in the order of the file."""
    axes = dict(view.axes)
    n_lead = inner.first.ndim
    if not {n_lead, n_lead + 1} <= axes.keys():
        raise _NotReferableError("only one row or column of each pattern is read")
    rows, columns = axes[n_lead], axes[n_lead + 1]
    if (rows.step, columns.step) != (1, 1):
        raise _NotReferableError("patterns are flipped (input.flip), or pixels left out")
    fixed = dict(view.fixed)
    part = tuple(fixed.get(axis, axes.get(axis)) for axis in range(n_lead))
    wanted = np.ix_(*([one] if isinstance(one, int) else list(one or ()) for one in part))
    kept = tuple(len(axes[axis]) for axis in range(n_lead) if axis in axes)
    return replace(
        inner,
        first=inner.first[wanted].reshape(kept),
        which=inner.which[wanted].reshape(kept),
        rows=inner.rows[rows.start : rows.stop],
        columns=inner.columns[columns.start : columns.stop],
    )


def _chunks_of_frames(places: Places) -> Layout:
    """Chunks of several frames where these follow each other in the file, else of one.

    A chunk may be larger than the array: zarr drops the rest. Thus it may contain what lies between the frames if that is a number
    of whole rows, and a window of each frame is a chunk from its first pixel on, as wide as the frame.
    """
    dtype, width, rows, columns = places.dtype, places.width, places.rows, places.columns
    row_bytes, first, which = width * dtype.itemsize, places.first.ravel(), places.which.ravel()
    sizes = [at(path).stat().st_size for path in places.files]
    pitch, together = len(rows) * row_bytes, 1
    start = (rows.start * width + columns.start) * dtype.itemsize
    if len(columns) == width and len(first) > 1:
        step = int(first[1] - first[0])
        between = step - pitch
        is_there = between == 0 or bool(np.all(first + start + step <= np.array(sizes)[which]))
        if step % row_bytes == 0 and 0 <= between <= pitch // 8 and is_there:
            begins = np.flatnonzero((np.diff(first) != step) | (np.diff(which) != 0)) + 1
            together, pitch = math.gcd(len(first), int(np.gcd.reduce(begins))), step
    lead = places.first.shape
    leads = [(*(1,) * (len(lead) - 1), n) for n in _divisors(lead[-1])]
    if len(lead) == 2:
        leads += [(n, lead[1]) for n in _divisors(lead[0])]
    fitting = [
        one
        for one in leads
        if together % (n := math.prod(one)) == 0
        and len(first) <= MOST_REFERENCES * n
        and n * pitch <= LARGEST_CHUNK
    ]
    if not fitting:
        raise _NotReferableError(
            f"its {len(first):,} patterns need a reference each, more than {MOST_REFERENCES:,}"
        )
    least, most = CHUNK_BYTES
    target = min(max(least, len(first) * pitch // 4096), most)
    chosen = min(fitting, key=lambda one: abs(math.log(math.prod(one) * pitch / target)))
    n = math.prod(chosen)
    chunk = (*chosen, pitch // row_bytes, width)

    def chunks() -> Iterator[tuple[tuple[int, ...], Any]]:
        grid = [range(size // part) for size, part in zip(lead, chosen, strict=True)]
        places_of_chunks = zip(first[::n].tolist(), which[::n].tolist(), strict=True)
        for index, (begin, file) in zip(itertools.product(*grid), places_of_chunks, strict=True):
            begin, n_bytes, path = begin + start, n * pitch, places.files[file]
            reference: Any = [_url(path), begin, n_bytes]
            if begin + n_bytes > sizes[file]:  # of the last frame, when its window ends with it
                with opened_file(path) as opened_one:
                    opened_one.seek(begin)
                    reference = _inline(opened_one.read(n_bytes).ljust(n_bytes, b"\0"))
            yield (*index, 0, 0), reference

    return Layout((*lead, len(rows), len(columns)), chunk, dtype, chunks())


def _divisors(n: int) -> list[int]:
    small = [part for part in range(1, math.isqrt(n) + 1) if n % part == 0]
    return sorted({*small, *(n // part for part in small)})


# --- HDF5 -------------------------------------------------------------------------------------------------------


def _contiguous(source: Hdf5Dataset) -> FlatFile:
    """A dataset that HDF5 stores in one piece."""
    with translate(SourceError, source.path), hdf5_file(source.path) as file:
        data = file[source.name.encode("utf-8", "surrogateescape")]
        offset = data.id.get_offset()
    if source.chunk_bytes:
        raise _NotReferableError(
            "chunks of HDF5 are referenced only where all of one dataset is read, without a selection or window"
        )
    if offset is None:
        raise _NotReferableError("HDF5 stores it compact or virtual, or has not written it")
    return FlatFile(source.path, offset, source.dtype, source.shape)


def _chunks_of_hdf5(source: Hdf5Dataset, scan: tuple[int, int] | None) -> Layout:
    """The chunks of an HDF5 dataset; a stack may be folded into a ``scan`` if its lines consist of whole chunks."""
    with translate(SourceError, source.path), hdf5_file(source.path) as file:
        data = file[source.name.encode("utf-8", "surrogateescape")]
        properties, data_chunk = data.id.get_create_plist(), tuple(data.chunks)
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        if unknown := [str(code) for code in filters if code not in _CODECS]:
            raise _NotReferableError(
                f"its chunks are compressed by HDF5's filter {', '.join(unknown)}, which zarr cannot decode (gzip, shuffle and blosc "
                "it can)"
            )
        if (n := data.id.get_num_chunks()) > MOST_REFERENCES:
            raise _NotReferableError(f"it has {n:,} chunks, more than {MOST_REFERENCES:,}")
        found: list[Any] = []
        data.id.chunk_iter(found.append)
        fill = data.fillvalue
    if any(one.filter_mask for one in found):
        raise _NotReferableError("HDF5 has left some of its chunks uncompressed")
    shape, chunk, lines = source.shape, data_chunk, 0
    if scan is not None:
        n, width = chunk[0], scan[1]
        if width % n and n % width:
            raise _NotReferableError(f"its chunks of {n} patterns do not fit into lines of {width}")
        chunk, lines = (max(1, n // width), min(n, width), *chunk[1:]), max(1, width // n)
        shape = (*scan, *shape[1:])

    def chunks() -> Iterator[tuple[tuple[int, ...], Any]]:
        for one in found:
            index = tuple(map(floordiv, one.chunk_offset, data_chunk))
            index = (*divmod(index[0], lines), *index[1:]) if lines else index
            yield index, [_url(source.path), int(one.byte_offset), int(one.size)]

    codecs = [dict(_CODECS[code]) for code in filters]
    for codec in codecs:
        if codec["name"] == "numcodecs.shuffle":
            codec["configuration"] = {"elementsize": source.dtype.itemsize}
    return Layout(shape, chunk, source.dtype, chunks(), tuple(codecs), fill)
