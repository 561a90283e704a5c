"""PyTorch files (.pt) written block by block, without torch: a zip archive with a hole that tasks fill, each at its own offset.

The checksum of the hole is combined from those of the blocks at the end."""

import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, ChangedBlock, copied
from stem_dask.core.errors import ConfigError, StoreError
from stem_dask.core.model import Record, Region
from stem_dask.readers.torch import STORAGES
from stem_dask.storage.checksums import combine_crc, crc32
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import remove
from stem_dask.storage.staging import begin_in_place, refuse_other_bytes
from stem_dask.writers.npy import damaged_run, joined_runs, write_runs

LAYOUTS = ("scan", "nchw", "tensor", "bare")


def signed_dtype(dtype: np.dtype) -> np.dtype:
    """Type of a tensor for patterns of a type: unsigned types become the next larger signed type.

    uint64 becomes int64, and values beyond it are refused (`check_int64`); signed and float types stay.

    Examples
    --------
    >>> [str(signed_dtype(np.dtype(kind))) for kind in ("?", "u1", "u2", "u4", "u8", "i2", "f4")]
    ['int16', 'int16', 'int32', 'int64', 'int64', 'int16', 'float32']
    """
    if dtype.kind not in "bu":
        return dtype
    return np.dtype(f"i{min(2 * dtype.itemsize, 8)}")


def check_int64(largest: float) -> None:
    """Raise ConfigError if values exceed int64."""
    if largest > np.iinfo(np.int64).max:
        raise ConfigError(
            f"a .pt holds values up to {np.iinfo(np.int64).max:,}, the data reach {largest:,.0f}; "
            "use float32 (sd.cast, or output.dtype=float32)"
        )


def to_dtype(block: NDArray | Block, dtype: np.dtype) -> Block:
    """Convert a block to the type of its tensor; refuses uint64 values beyond int64."""

    def change(piece: NDArray, here: slice, out: NDArray) -> None:
        if piece.dtype == np.uint64 and dtype == np.int64:
            check_int64(int(piece.max()))
        copied(piece, here, out)

    return ChangedBlock(block, change, (block.shape[-2], block.shape[-1]), dtype)


@dataclass(frozen=True)
class PtSink:
    """Writes ``patterns`` into a .pt file.

    Parameters
    ----------
    path : the file under its temporary name
    lead_shape : (scan_y, scan_x) or (n,)
    tensor_shape : shape of the tensor in the file
    dtype : of the tensor
    content : other entries of the dictionary, plain values and arrays (see `fill`); None writes the bare tensor
    """

    path: str
    lead_shape: tuple[int, ...]
    tensor_shape: tuple[int, ...]
    dtype: str
    content: Mapping[str, Any] | None
    offset: list[int] = field(default_factory=list)
    #: nonce of this start, see `stem_dask.storage.staging`
    nonce: list[bytes] = field(default_factory=list, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Tasks get the sink without its content, which may take megabytes."""
        return {**self.__dict__, "content": None}

    @property
    def _native(self) -> np.dtype:
        """Type of the tensor; torch knows native byte order only."""
        return np.dtype(self.dtype).newbyteorder("=")

    def create(self, *, resume: bool) -> None:
        """Write the archive around the patterns; existing blocks stay when resuming."""
        if not resume:
            remove(self.path)
        self._write_around("r+b" if os.path.exists(self.path) else "wb", 0)
        self.nonce[:] = [begin_in_place(self.path)]

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write one block at its offset."""
        block: NDArray | Block = blocks["patterns"]
        if block.dtype != self._native:
            block = to_dtype(block, self._native)
        options = (self.path, self.offset[0], self.lead_shape, region, block, self.nonce[0])
        return {"runs": write_runs(*options)}

    def verify(self, record: Record) -> str | None:
        """Read a block again and compare it with its checksums."""
        return damaged_run(self.path, self.offset[0], record.extra["runs"])

    def finish(self, records: Sequence[Record]) -> None:
        """Write the checksum; refuses blocks that do not tile the tensor, or changed after they were written."""
        n_bytes = prod(self.tensor_shape) * self._native.itemsize
        runs = joined_runs(self.path, records, n_bytes)
        refuse_other_bytes(self.path, self.nonce[0], records, self.verify)
        self._write_around("r+b", combine_crc((n, crc) for _, n, crc in runs))

    def fill(self, content: Mapping[str, Any]) -> None:
        """Write the small tensors again with their final values, after all blocks.

        Parameters
        ----------
        content : arrays with the names, shapes and types of those the sink was begun with

        Raises
        ------
        StoreError
            When they differ.
        """
        begun, wanted = _layout(self.content or {}), _layout(content)
        if begun != wanted:
            raise StoreError(
                f"{self.path} was begun for the arrays {', '.join(begun) or 'none'}, but is completed with "
                f"{', '.join(wanted) or 'none'}; pass all arrays, with their types, when it is begun"
            )
        with zipfile.ZipFile(self.path) as archive:
            (patterns,) = (e.CRC for e in archive.infolist() if e.filename.endswith("/data/0"))
        self._write_around("r+b", patterns, content)

    def _write_around(self, mode: str, crc: int, later: Mapping[str, Any] | None = None) -> None:
        """Write everything but the patterns, whose checksum is ``crc``."""
        whole: Any = Hole(self.tensor_shape, self._native)
        if self.content is not None:
            whole = {"patterns": whole, **self.content, **(later or {})}
        records = records_of(whole)
        self.offset[:] = [one.first for one in records if isinstance(one.content, Hole)]
        with translate(StoreError, self.path), open(self.path, mode) as file:
            write_records(file, records, crc)


def layout_shape(lead: Sequence[int], detector: Sequence[int], layout: str) -> tuple[int, ...]:
    """Shape of the tensor: that of the patterns (``scan``, ``bare``), or ``(N, 1, H, W)``.

    Examples
    --------
    >>> layout_shape((3, 4), (8, 8), "nchw")
    (12, 1, 8, 8)
    """
    if layout in ("scan", "bare"):
        return (*lead, *detector)
    if layout in ("nchw", "tensor"):
        return (prod(lead), 1, *detector)
    raise ConfigError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")


def _layout(content: Mapping[str, Any]) -> list[str]:
    """Names, types and shapes of the arrays of nested dictionaries."""
    found = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            found += [f"{key}/{inner}" for inner in _layout(value)]
        elif isinstance(value, np.ndarray):
            found.append(f"{key}: {value.dtype} {value.shape}")
    return found


_STORAGE_OF = {kind: name for name, kind in STORAGES.items()}

#: newer types: an untyped storage, and the type as an argument
_WITHOUT_STORAGE = ("uint16", "uint32", "uint64")

_ROOT = "archive"  # torch's name when it writes into an open file

_ALIGNMENT = 64

_MOST = 0xFFFFFFFF  # larger sizes and offsets are in a zip64 extra field


@dataclass(frozen=True)
class Hole:
    """A tensor whose values are written by tasks."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ArchiveRecord:
    """A member of the archive; its header begins at byte ``header``."""

    name: bytes
    content: NDArray | Hole
    header: int

    @property
    def first(self) -> int:
        """Offset of its content."""
        used = self.header + 30 + len(self.name) + len(self._beyond) + 4
        return -(-used // _ALIGNMENT) * _ALIGNMENT

    @property
    def last(self) -> int:
        """End of its content."""
        return self.first + self.content.nbytes

    @property
    def end(self) -> int:
        """Offset of the next header."""
        return self.last + len(self._checksum(0))

    @property
    def _beyond(self) -> bytes:
        """The zip64 extra field, if sizes or offsets need it."""
        size = self.content.nbytes
        values = ([size, size] if size >= _MOST else []) + [self.header] * (self.header >= _MOST)
        return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""

    @property
    def _flags(self) -> int:
        """Zip flags: names are UTF-8, and the checksum follows the content."""
        return 0x808 if self.content.nbytes else 0x800

    def _checksum(self, crc: int) -> bytes:
        size = self.content.nbytes
        form = "<4sI2Q" if max(size, self.header) >= _MOST else "<4s3I"
        return struct.pack(form, b"PK\7\10", crc, size, size) if size else b""

    def crc(self) -> int:
        """Checksum of its content; 0 for a hole."""
        return 0 if isinstance(self.content, Hole) else crc32(self.content)

    def write(self, file: IO[bytes], crc: int) -> None:
        """Write header, content and checksum; the content of a hole is left untouched."""
        fill = self.first - self.header - 30 - len(self.name) - len(self._beyond) - 4
        extra = self._beyond + struct.pack("<2sH", b"FB", fill) + b"Z" * fill
        head = struct.pack("<4s2xH18x2H", b"PK\3\4", self._flags, len(self.name), len(extra))
        file.seek(self.header)
        file.write(head + self.name + extra)
        if not isinstance(self.content, Hole):
            file.write(self.content.data)
        file.seek(self.last)
        file.write(self._checksum(crc))

    def entry(self, crc: int) -> bytes:
        """Its entry in the directory of the archive."""
        size, extra = min(self.content.nbytes, _MOST), self._beyond
        figures = (crc, size, size, len(self.name), len(extra), min(self.header, _MOST))
        return struct.pack("<4s4xH6x3I2H10xI", b"PK\1\2", self._flags, *figures) + self.name + extra


def records_of(whole: Any) -> list[ArchiveRecord]:
    """Members of the archive in the order of torch; tensors in the order of the dictionary.

    Parameters
    ----------
    whole : an array, a `Hole`, or nested dictionaries of these and plain values
    """
    tensors: list[NDArray | Hole] = []
    described = b"".join((pickle.PROTO + b"\2", *_pickled(whole, tensors), pickle.STOP))
    contents: dict[str, NDArray | Hole] = {
        "data.pkl": _bytes(described),
        ".format_version": _bytes(b"1"),
        ".storage_alignment": _bytes(str(_ALIGNMENT).encode()),
        "byteorder": _bytes(sys.byteorder.encode()),
        **{f"data/{i}": tensor for i, tensor in enumerate(tensors)},
        "version": _bytes(b"3\n"),
    }
    records: list[ArchiveRecord] = []
    for name, content in contents.items():
        header = records[-1].end if records else 0
        records.append(ArchiveRecord(f"{_ROOT}/{name}".encode(), content, header))
    return records


def write_records(file: IO[bytes], records: Sequence[ArchiveRecord], of_hole: int) -> None:
    """Write the archive over an existing file, except for the content of its hole, whose checksum is ``of_hole``."""
    crcs = [of_hole if isinstance(one.content, Hole) else one.crc() for one in records]
    for record, crc in zip(records, crcs, strict=True):
        record.write(file, crc)
    directory = b"".join(one.entry(crc) for one, crc in zip(records, crcs, strict=True))
    start, n = records[-1].end, len(records)
    file.seek(start)
    file.write(directory)
    if start + len(directory) >= _MOST:
        versions = (44, 0x31E, 45, 0, 0)  # as miniz: made by 3.0 on Unix, to read with 4.5
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", *versions, n, n, len(directory), start))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1))
    places = (len(directory), min(start, _MOST))
    file.write(struct.pack("<4s4x2H2I2x", b"PK\5\6", n, n, *places))
    file.truncate()


def _bytes(content: bytes) -> NDArray:
    return np.frombuffer(content, "u1")


def _pickled(value: Any, tensors: list[NDArray | Hole]) -> Iterator[bytes]:
    """Parts of a pickle of protocol 2, as torch writes it; appends its tensors to ``tensors``."""
    if isinstance(value, Mapping):
        yield pickle.EMPTY_DICT + pickle.MARK
        for key, inner in value.items():
            yield _plain(key)
            yield from _pickled(inner, tensors)
        yield pickle.SETITEMS
    elif isinstance(value, Hole):
        yield _tensor(str(len(tensors)), value.dtype, value.shape)
        tensors.append(value)
    elif isinstance(value, np.ndarray):
        yield _tensor(str(len(tensors)), value.dtype, value.shape)
        tensors.append(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
    else:
        yield _plain(value)


def _plain(value: Any) -> bytes:
    """A value pickled without the protocol header (2 bytes) and the stop code (1 byte)."""
    return pickle.dumps(value, 2)[2:-1]


def _tensor(key: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Pickled call of ``torch._utils._rebuild_tensor_v2`` or ``_v3`` for the member ``key``.

    Arguments: storage, offset, sizes, strides, requires_grad, hooks; v3 adds the type.
    """
    kind, n = dtype.name, prod(shape)
    later = kind in _WITHOUT_STORAGE
    if not later and kind not in _STORAGE_OF:
        raise ConfigError(f"torch has no type for {dtype}; set output.dtype: float32")
    storage = "torch.storage UntypedStorage" if later else f"torch {_STORAGE_OF[kind]}"
    length = n * dtype.itemsize if later else n
    strides = tuple(
        prod(max(1, size) for size in shape[axis:]) for axis in range(1, len(shape) + 1)
    )
    return b"".join((
        _named(f"torch._utils _rebuild_tensor_v{3 if later else 2}"), pickle.MARK,
        pickle.MARK, _plain("storage"), _named(storage), _plain(key), _plain("cpu"), _plain(length), pickle.TUPLE,
        pickle.BINPERSID, _plain(0), _plain(shape), _plain(strides), pickle.NEWFALSE,
        _named("collections OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE,
        _named(f"torch {kind}") if later else b"", pickle.TUPLE, pickle.REDUCE,
    ))  # fmt: skip


def _named(name: str) -> bytes:
    """Pickled reference to an object of a module."""
    return pickle.GLOBAL + "".join(f"{part}\n" for part in name.split()).encode()
