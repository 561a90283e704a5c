"""A scan as chunks: the positions of a chunk are read together, into a buffer of the caller.

Stores of stem_dask and chunked HDF5 files are decoded here: one `os.pread` per chunk, no lock, no open file between two reads, so
that threads and forked processes can share a scan. All other sources are read by their reader, about 1 MiB at a time.
"""

import contextlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from stem_dask.core.chunks import MIB
from stem_dask.core.errors import ConfigError, SourceError, StemDaskError
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.kernels.downsample import METHODS, downsample_patterns, result_dtype
from stem_dask.readers.containers import Hdf5Dataset, ZarrArray, hdf5_file
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.open import find
from stem_dask.readers.views import View
from stem_dask.readers.zarr_chunks import files_of
from stem_dask.stages.downsample import output_shift
from stem_dask.storage.errors import one_line, translate
from stem_dask.storage.location import is_url
from stem_dask.storage.zarr_guard import check_length
from stem_dask.storage.zarr_store import zarr_store

#: of a chunk of a source that has none
CHUNK_BYTES = MIB

#: and of one whose patterns are not contiguous, so that a read touches the whole file
SCATTERED_BYTES = 64 * MIB

#: filters of HDF5 that are decoded here
_DEFLATE, _SHUFFLE, _FLETCHER32, _BLOSC = 1, 2, 3, 32001

_COPY = "copy the file again from where it was written"

_kept = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: np.dtype) -> NDArray:
    """An array of this thread that the next call with this name may overwrite."""
    n_bytes = prod(shape) * dtype.itemsize
    if len(vars(_kept).get(name, ())) < n_bytes:
        vars(_kept)[name] = np.empty(n_bytes, np.uint8)
    held: NDArray = vars(_kept)[name]
    return held[:n_bytes].view(dtype).reshape(shape)


Signature = tuple[int, int, int]


def signature(status: os.stat_result) -> Signature:
    """What changes with a file: size, modification time and inode."""
    return (status.st_size, status.st_mtime_ns, status.st_ino)


class Chunks(Protocol):
    """Where the patterns of a scan lie, as stored."""

    #: scan positions of a chunk along y and x
    lead: tuple[int, int]

    def read(self, y: range, x: range, out: NDArray) -> None:
        """Read positions that lie in one chunk into (n, ky, kx)."""

    def files(self, y: range, x: range) -> list[str]:
        """The files that this reads."""


class _Decoded:
    """Chunks with whole patterns that are decoded as a whole."""

    lead: tuple[int, int]
    detector: tuple[int, int]
    dtype: np.dtype

    def read(self, y: range, x: range, out: NDArray) -> None:
        """Decode a chunk in place, or aside where only a part of its positions is wanted."""
        cell = (y[0] // self.lead[0], x[0] // self.lead[1])
        if (len(y), len(x)) == self.lead:
            self.decode(cell, out)
            return
        chunk = scratch("chunk", (*self.lead, *self.detector), self.dtype)
        self.decode(cell, chunk)
        first = [index * n for index, n in zip(cell, self.lead, strict=True)]
        part = (
            slice(r[0] - at, r[-1] - at + 1, r.step) for r, at in zip((y, x), first, strict=True)
        )
        out.reshape(len(y), len(x), *self.detector)[...] = chunk[tuple(part)]

    def decode(self, cell: tuple[int, int], out: NDArray) -> None:
        """Decode a chunk of the grid into a C-contiguous array of its size."""
        raise NotImplementedError


@dataclass
class Shards(_Decoded):
    """The patterns of a store of stem_dask: chunks with checksums in shards, see `stem_dask.writers.zarr`."""

    path: str
    array: Any
    lead: tuple[int, int]
    detector: tuple[int, int]
    dtype: np.dtype
    codec: str
    is_list: bool
    seen: dict[str, Signature]
    indexes: dict[str, NDArray] = field(default_factory=dict)

    def _shard(self, cell: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """File of a chunk, and its place in the shard."""
        shards = self.array.shards[:-2]
        per = [n // part for n, part in zip((1, *shards)[-2:], self.lead, strict=True)]
        place = [i // n for i, n in zip(cell, per, strict=True)]
        key = self.array.metadata.encode_chunk_key((*place[self.is_list :], 0, 0))
        return f"{self.path}/{key}", (cell[0] % per[0], cell[1] % per[1])

    def files(self, y: range, x: range) -> list[str]:
        """The shard."""
        return [self._shard((y[0] // self.lead[0], x[0] // self.lead[1]))[0]]

    def decode(self, cell: tuple[int, int], out: NDArray) -> None:
        """Read, check and decode a chunk."""
        path, inside = self._shard(cell)
        with open(path, "rb", buffering=0) as file:
            number, status = file.fileno(), os.fstat(file.fileno())
            refuse_changed(path, self.seen.get(path), signature(status))
            if path not in self.indexes:
                shards = (1, *self.array.shards[:-2])[-2:]
                grid = [n // part for n, part in zip(shards, self.lead, strict=True)]
                n_bytes = prod(grid) * 16 + 4
                content = os.pread(number, n_bytes, max(0, status.st_size - n_bytes))
                index = np.frombuffer(_checked(content), "<u8")
                self.indexes[path] = index.reshape(*grid, 2)
            first, n = map(int, self.indexes[path][inside])
            if first + n > status.st_size:  # also of a chunk that is not there
                raise ValueError("its shard does not hold it")
            chunk = _checked(os.pread(number, n, first))
        decompress(chunk, self.codec, out)


def _checked(content: bytes) -> NDArray[np.uint8]:
    """Bytes without the CRC-32C behind them, which must be theirs."""
    values = np.frombuffer(content, np.uint8)
    if len(values) < 4 or google_crc32c.value(values[:-4]) != int.from_bytes(
        content[-4:], "little"
    ):
        raise ValueError("its checksum is of other bytes")
    return values[:-4]


def decompress(content: Any, codec: str, out: NDArray) -> None:
    """Decode the bytes of a chunk, of which there must be as many as ``out`` holds."""
    import imagecodecs

    to: Any = out.reshape(-1).view(np.uint8)  # arrays, which the stubs of imagecodecs do not know
    if codec == "blosc":
        check_length(content)
        stated = int(content[4:8].view("<u4")[0])
        if stated != to.size:
            raise ValueError(f"it decodes to {stated:,} bytes, not {to.size:,}")
        imagecodecs.blosc_decode(content, out=to, numthreads=1)
        return
    if codec == "none":
        found: Any = content
    elif codec == "gzip":
        found = imagecodecs.gzip_decode(content, out=to.size + 1)
    else:
        found = imagecodecs.zlibng_decode(content, out=to.size + 1)
    if len(found) != to.size:
        raise ValueError(f"it decodes to {len(found):,} bytes, not {to.size:,}")
    to[:] = np.frombuffer(found, np.uint8)


def shards_of(source: ZarrArray, detector: tuple[int, int]) -> Shards | None:
    """The chunks of an array as stem_dask writes it; None for another layout."""
    import zarr

    with translate(SourceError, source.path, f"array {source.name or '/'} cannot be opened"):
        array: Any = zarr.open_array(zarr_store(source.path), path=source.name, mode="r")
    about: dict[str, Any] = array.metadata.to_dict()
    if array.metadata.zarr_format != 3 or not array.shards:
        return None
    (sharding,) = about["codecs"]
    parts, outer = sharding["configuration"], ("bytes", "crc32c")
    inner = tuple(codec["name"] for codec in parts["codecs"])
    index = tuple(codec["name"] for codec in parts["index_codecs"])
    packing = {("bytes", "crc32c"): "none", ("bytes", "gzip", "crc32c"): "gzip"}
    codec = "blosc" if inner == ("bytes", "blosc", "crc32c") else packing.get(inner, "")
    # types of one byte have no order of bytes
    orders = (one[0].get("configuration", {}) for one in (parts["codecs"], parts["index_codecs"]))
    little = all(order.get("endian", "little") == "little" for order in orders)
    ends = parts.get("index_location", "end") == "end"
    lead = tuple(array.chunks[:-2])
    if (
        index != outer
        or not codec
        or not little
        or not ends
        or tuple(array.chunks[-2:]) != detector
    ):
        return None
    folder = str(Path(source.path, source.name))
    return Shards(
        folder, array, (1, *lead)[-2:], detector, np.dtype(array.dtype), codec, len(lead) == 1, {}
    )


@dataclass
class Hdf5Chunks(_Decoded):
    """A chunked dataset of an HDF5 file; ``places`` has offset, size and skipped filters of each chunk of the grid."""

    path: str
    lead: tuple[int, int]
    detector: tuple[int, int]
    dtype: np.dtype
    filters: tuple[int, ...]
    fill: Any
    places: dict[tuple[int, int], tuple[int, int, int]]

    def files(self, y: range, x: range) -> list[str]:
        """The file."""
        return [self.path]

    def decode(self, cell: tuple[int, int], out: NDArray) -> None:
        """Read a chunk and undo its filters, the last one first."""
        if cell not in self.places:  # never written
            out[...] = self.fill
            return
        first, n, skipped = self.places[cell]
        with open(self.path, "rb", buffering=0) as file:
            content: Any = np.frombuffer(os.pread(file.fileno(), n, first), np.uint8)
        if len(content) != n:
            raise ValueError(f"the file ends before byte {first + n:,}")
        filters = [code for i, code in enumerate(self.filters) if not skipped >> i & 1]
        if filters[-1:] == [_FLETCHER32]:
            import imagecodecs

            if imagecodecs.h5checksum_fletcher32(content[:-4]) != int(content[-4:].view("<u4")[0]):
                raise ValueError("its checksum is of other bytes")
            filters, content = filters[:-1], content[:-4]
        shuffled = filters[:1] == [_SHUFFLE]
        codec = {(): "none", (_DEFLATE,): "deflate", (_BLOSC,): "blosc"}[tuple(filters[shuffled:])]
        if not shuffled:
            decompress(content, codec, out)
            return
        aside = scratch("shuffled", (out.itemsize, out.size), np.dtype(np.uint8))
        decompress(content, codec, aside)
        words = out.reshape(-1).view(f"<u{out.itemsize}")  # the inverse of codecs.bytes_apart
        words[:] = aside[0]
        for i in range(1, out.itemsize):
            words |= aside[i].astype(words.dtype) << words.dtype.type(8 * i)


def hdf5_chunks(source: Hdf5Dataset, detector: tuple[int, int]) -> Hdf5Chunks | FlatFile | None:
    """Where HDF5 has put the patterns; None when only HDF5 can read them."""
    import h5py

    dtype = source.dtype.newbyteorder("=") if source.dtype.itemsize == 1 else source.dtype
    if not dtype.isnative:
        return None
    with translate(SourceError, source.path), hdf5_file(source.path) as file:
        data = file[source.name.encode("utf-8", "surrogateescape")]
        layout, plist = data.id.get_create_plist().get_layout(), data.id.get_create_plist()
        if file.userblock_size or data.is_virtual or plist.get_external_count():
            return None
        if layout == h5py.h5d.CONTIGUOUS and data.id.get_offset() is not None:
            return FlatFile(source.path, data.id.get_offset(), dtype, source.shape)
        if layout != h5py.h5d.CHUNKED or tuple(data.chunks[-2:]) != detector:
            return None
        filters = tuple(plist.get_filter(i)[0] for i in range(plist.get_nfilters()))
        rest = filters[:-1] if filters[-1:] == (_FLETCHER32,) else filters
        rest = rest[1:] if rest[:1] == (_SHUFFLE,) else rest
        if rest not in ((), (_DEFLATE,), (_BLOSC,)):
            return None
        places: dict[tuple[int, int], tuple[int, int, int]] = {}
        lead = (1, *data.chunks[:-2])[-2:]

        def note(chunk: Any) -> None:
            y, x = (0, *chunk.chunk_offset[:-2])[-2:]
            place = (int(chunk.byte_offset), int(chunk.size), int(chunk.filter_mask))
            places[y // lead[0], x // lead[1]] = place

        data.id.chunk_iter(note)
        return Hdf5Chunks(source.path, lead, detector, dtype, filters, data.fillvalue, places)


@dataclass
class Plain:
    """Any source, read by its reader."""

    view: View
    lead: tuple[int, int]
    inputs: tuple[str, ...]

    @classmethod
    def of(cls, view: View, chunks: tuple[int, ...] | None, inputs: tuple[str, ...]) -> "Plain":
        """In the chunks of the source, if it has any, else in rows or parts of a row."""
        *sizes, height, width = (1, *view.shape)[-4:]
        most = SCATTERED_BYTES if view.transposed else CHUNK_BYTES
        n = max(1, most // (height * width * view.dtype.itemsize))
        if chunks is not None and not view.transposed:
            lead = (1, *chunks[:-2])[-2:]
            # a few small chunks at a time
            return cls(view, (lead[0], min(sizes[1], max(1, n // prod(lead)) * lead[1])), inputs)
        lead = (max(1, min(n // sizes[1], sizes[0])), min(n, sizes[1]))
        return cls(view, lead, inputs)

    def _part(self, y: range, x: range) -> View:
        parts = [_slice(r) for r in (y, x)][4 - self.view.ndim :]
        return self.view.select(*parts, slice(None), slice(None))

    def read(self, y: range, x: range, out: NDArray) -> None:
        """Read some positions."""
        part = self._part(y, x)
        to, flat = out.reshape(part.shape), part.source
        in_place = not (part.fixed or part.flipped or part.transposed)
        if isinstance(flat, FlatFile) and in_place and flat.dtype == out.dtype:
            with translate(SourceError, flat.path):
                flat.read_into(part.part, to)
        else:
            to[...] = part.read()

    def files(self, y: range, x: range) -> list[str]:
        """The files of the chunks of a zarr store, else all files of the input."""
        source = self.view.source
        if not isinstance(source, ZarrArray) or is_url(source.path):
            return [*self.inputs]
        part = self._part(y, x).part
        return [str(path) for path, _ in files_of(source.path, source.name, self._array, part)]

    @cached_property
    def _array(self) -> Any:
        import zarr

        source: Any = self.view.source
        return zarr.open_array(zarr_store(source.path), path=source.name, mode="r")


@dataclass(frozen=True)
class Options:
    """What is read of a file, and how patterns become smaller; see `PatternDataset`."""

    dataset: str | int | None = None
    scan_shape: tuple[int, int] | None = None
    scan_roi: tuple[int, ...] | None = None
    scan_step: int = 1
    downsample: int = 1
    method: str = "bin"
    sigma: float | None = None


class Scan:
    """The patterns of a file, in chunks.

    ``shape`` (scan_y, scan_x) is that of the scan as read; a list of n patterns without a scan is a line (1, n), and
    ``is_scan`` is False. ``y`` and ``x`` are the rows and columns of the source that are read. Patterns of ``detector`` pixels come
    in the type ``dtype``, in which ``scale`` times the value is that of `stem_dask.downsample`: means of integers are kept
    as sums, which a table can normalize.
    """

    def __init__(self, path: str, options: Options) -> None:
        names: dict[str, Any] = {"dataset": options.dataset, "scan_shape": options.scan_shape}
        whole = find(path, **names)
        if len(whole.source.shape) == 3 and (shape := _shape_beside(path, whole.source.shape[0])):
            names["scan_shape"] = shape
            whole = find(path, **names)
        part: dict[str, Any] = {"scan_roi": options.scan_roi, "scan_step": options.scan_step}
        found = whole if tuple(part.values()) == (None, 1) else find(path, **names, **part)
        self.path, self.options, self.found, self.info = path, options, found, found.info
        for note in found.info.notes:  # zeros in their place would be learned
            if note.startswith("unknown which patterns could not be read"):
                raise SourceError(f"{path}: {note}")
        self.is_scan = len(found.source.shape) == 4
        *lead, height, width = whole.source.shape
        self.sizes = (1, *lead)[-2:]
        y0, y1, x0, x1 = options.scan_roi or (0, self.sizes[0], 0, self.sizes[1])
        self.y, self.x = range(y0, y1, options.scan_step), range(x0, x1, options.scan_step)
        self.shape = (len(self.y), len(self.x))
        self._smaller(height, width)
        self.inputs = () if is_url(path) else (path, *found.files)
        self.chunks = self._chunks(View.of(whole.source), whole.info.chunks)
        self.groups = [
            _groups(r, n) for r, n in zip((self.y, self.x), self.chunks.lead, strict=True)
        ]
        self.seen = {file: signature(os.stat(file)) for file in self._files()}
        if isinstance(self.chunks, Shards):
            self.chunks.seen = self.seen

    def _smaller(self, height: int, width: int) -> None:
        """Size, type and axes of the patterns after downsampling."""
        k, method, stored = self.options.downsample, self.options.method, self.found.source.dtype
        if method not in METHODS:
            raise ConfigError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
        if not hasattr(k, "__index__") or k < 1 or min(height, width) < k:
            raise ConfigError(
                f"downsample is {k}; expected a whole number from 1 to {min(height, width)}, as the patterns of {self.path} "
                f"have {by((height, width))} px"
            )
        self.detector = (height // k, width // k)
        #: type of the values as `stem_dask.downsample` gives them
        self.values = result_dtype(stored, k, method, "mean")
        exact = stored.kind in "bui" and stored.itemsize < 4 and k > 1 and method == "bin"
        self.reduce = "sum" if exact else "mean"
        self.dtype = result_dtype(stored, k, method, self.reduce)
        self.scale = 1.0 / (k * k) if exact else 1.0
        shift = output_shift(k, method)
        self.axes = tuple(
            axis
            if axis.name not in ("ky", "kx") or k == 1
            else Axis(axis.name, axis.size // k, axis.scale * k, axis.value(shift), axis.units)
            for axis in self.info.axes
        )

    def as_means(self) -> None:
        """Keep means instead of sums of integers, as needed beside a file of floats."""
        self.reduce, self.dtype, self.scale = "mean", self.values, 1.0

    @cached_property
    def identity(self) -> tuple[int, int]:
        """Size and modification time of all files that are read, also of a copy elsewhere."""
        if not self.seen:
            return self.found.identity[1:]
        _, n_bytes, modified = self.found.identity
        files = self.seen.values()
        return n_bytes + sum(f[0] for f in files), modified + sum(f[1] for f in files)

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """(scan_y, scan_x), False where a pattern could not be read when the file was written."""
        if self.found.valid is None:
            return np.ones(self.shape, np.bool_)
        part = tuple(slice(0, n) for n in self.found.valid.shape)
        return self.found.valid[part].reshape(self.shape)

    def by_position(self, values: NDArray) -> NDArray:
        """Values for all positions of the source, as read: (scan_y, scan_x)."""
        return np.asarray(values).reshape(self.sizes)[_slice(self.y), _slice(self.x)]

    def _chunks(self, view: View, stated: tuple[int, ...] | None) -> Chunks:
        source = view.source
        direct = not (view.fixed or view.flipped or view.transposed) and view.shape == source.shape
        detector = (view.shape[-2], view.shape[-1])
        if direct and isinstance(source, ZarrArray) and not is_url(self.path):
            shards = shards_of(source, detector)
            if shards is not None:
                return shards
        if direct and isinstance(source, Hdf5Dataset):
            found = hdf5_chunks(source, detector)
            if isinstance(found, Hdf5Chunks):
                return found
            view, stated = (view, stated) if found is None else (View.of(found), None)
        return Plain.of(view, stated, self.inputs)

    def _files(self) -> list[str]:
        """All files that hold patterns."""
        if is_url(self.path):
            return []
        source = View.of(self.found.source).source
        if not isinstance(source, ZarrArray):
            return [*self.inputs]
        folder, found = Path(source.path, source.name), []
        for place, _, files in os.walk(folder):
            found += [
                f"{place}/{file}"
                for file in files
                if file not in ("zarr.json", ".zarray", ".zattrs")
            ]
        return found

    @property
    def n_chunks(self) -> int:
        """Number of chunks that hold positions which are read."""
        return len(self.groups[0]) * len(self.groups[1])

    @property
    def most(self) -> int:
        """Largest number of positions of a chunk."""
        y, x = (max(map(len, group)) for group in self.groups)
        return y * x

    @cached_property
    def places(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Number of the chunk of each position of the scan, row by row, and its row in what `read` fills."""
        (y, i, _), (x, j, lengths) = (
            [np.array(a, np.int32) for a in zip(*_numbered(g), strict=True)] for g in self.groups
        )
        chunk = y[:, None] * np.int32(len(self.groups[1])) + x
        return chunk.ravel(), (i[:, None] * lengths + j).ravel()

    def positions_of(self, chunk: int) -> tuple[range, range]:
        """Rows and columns of the source in a chunk."""
        y, x = divmod(chunk, len(self.groups[1]))
        return self.groups[0][y], self.groups[1][x]

    def read(self, chunk: int, out: NDArray) -> int:
        """Read a chunk into (`most`, ky, kx); returns the number of its patterns.

        Raises
        ------
        SourceError
            When the chunk is missing or damaged, or the file has changed since it was opened.
        """
        y, x = self.positions_of(chunk)
        self.refuse_changes(chunk)
        n, k = len(y) * len(x), self.options.downsample
        *_, height, width = self.found.source.shape
        dtype = self.found.source.dtype.newbyteorder("=")
        try:
            if k == 1 and out.dtype == dtype:
                self.chunks.read(y, x, out[:n])
            else:
                whole = scratch("whole", (n, height, width), dtype)
                self.chunks.read(y, x, whole)
                how: dict[str, Any] = {"method": self.options.method, "reduce": self.reduce}
                smaller = downsample_patterns(whole, k, **how, sigma=self.options.sigma)
                out[:n] = smaller
        except (MemoryError, ConfigError):
            raise
        except Exception as error:  # each codec has its own
            where = f"scan positions y {y[0]} to {y[-1]}, x {x[0]} to {x[-1]}"
            if isinstance(error, StemDaskError):
                raise SourceError(f"{error} ({where})") from error
            file, why = self.chunks.files(y, x)[0], one_line(error) or type(error).__name__
            raise SourceError(
                f"{file}: the chunk of {where} is damaged ({why}); {_COPY}"
            ) from error
        return n

    def refuse_changes(self, chunk: int | None = None) -> None:
        """Raise SourceError when a file of a chunk, by default of any, has changed since it was opened."""
        if is_url(self.path):
            if change := self.found.change():
                raise SourceError(
                    f"{self.path} has changed since it was opened ({change}); open it again"
                )
            return
        where = () if chunk is None else self.positions_of(chunk)
        for file in self.chunks.files(*where) if where else self.seen:
            try:
                found = signature(os.stat(file))
            except OSError as error:
                holds = [f"{axis} {r[0]} to {r[-1]}" for axis, r in zip("yx", where, strict=False)]
                at = f" of scan positions {', '.join(holds)}" if holds else ""
                raise SourceError(f"{file}{at} is missing ({error.strerror}): {_COPY}") from error
            refuse_changed(file, self.seen.get(file), found)


def refuse_changed(file: str, before: Signature | None, now: Signature) -> None:
    """Raise SourceError when a file is not the one that was opened."""
    if before != now:
        raise SourceError(
            f"{file} has changed since it was opened; wait until nothing writes to it, and open it again"
        )


def _shape_beside(path: str, n: int) -> tuple[int, int] | None:
    """The scan of a list of n patterns, from the results of the run that wrote the file."""
    for name in (path, str(Path(path).with_suffix(""))):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            y, x = map(int, json.loads(Path(f"{name}_results.json").read_text())["scan_shape"])
            if y * x == n:
                return y, x
    return None


def _slice(indices: range) -> slice:
    return slice(indices[0], indices[-1] + 1, indices.step)


def _groups(wanted: range, size: int) -> list[range]:
    """Split indices into those of each chunk of a size."""
    groups = []
    while wanted:
        n = len(range(wanted[0], min(wanted[-1] + 1, (wanted[0] // size + 1) * size), wanted.step))
        groups.append(wanted[:n])
        wanted = wanted[n:]
    return groups


def _numbered(groups: Sequence[range]) -> list[tuple[int, int, int]]:
    """Group of each index, its number in the group, and the length of the group."""
    return [(g, i, len(group)) for g, group in enumerate(groups) for i in range(len(group))]
