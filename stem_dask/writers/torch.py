"""PyTorch files written block by block: an archive with a hole, every block at its own offset in it, and the hole's
checksum, from those of the pieces, at the end."""

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

from stem_dask.core.batches import Changed, InPieces, copied
from stem_dask.core.errors import ConfigError, StoreError
from stem_dask.core.model import Record, Region
from stem_dask.readers.torch_pickle import STORAGES
from stem_dask.storage.checksums import combine_crc, crc32
from stem_dask.storage.publish import named, remove
from stem_dask.storage.staging import begin_in_place, refuse_other_bytes
from stem_dask.writers.npy import damaged_run, joined_runs, write_runs

LAYOUTS = ("scan", "nchw", "tensor", "bare")


def signed_dtype(dtype: np.dtype) -> np.dtype:
    """Type of a tensor for patterns of a type: signed, with room for the sum of two.

    It depends on the type alone, so that all files of a batch agree. uint64 becomes int64 too, which refuses values beyond
    it, see `check_int64`; signed and float types stay.

    Examples
    --------
    >>> [str(signed_dtype(np.dtype(kind))) for kind in ("?", "u1", "u2", "u4", "u8", "i2", "f4")]
    ['int16', 'int16', 'int32', 'int64', 'int64', 'int16', 'float32']
    """
    if dtype.kind not in "bu":
        return dtype
    return np.dtype(f"i{min(2 * dtype.itemsize, 8)}")


def check_int64(largest: float) -> None:
    """Refuse a tensor of int64 for values that would wrap.

    Raises
    ------
    ConfigError
        When the largest value exceeds int64.
    """
    if largest > np.iinfo(np.int64).max:
        raise ConfigError(
            f"a .pt holds values up to {np.iinfo(np.int64).max:,}, the data reach {largest:,.0f}; "
            "use float32 (sd.cast, or output.dtype=float32)"
        )


def to_dtype(block: NDArray | InPieces, dtype: np.dtype) -> InPieces:
    """The block in the type of its tensor, refusing values that would wrap.

    Examples
    --------
    >>> np.asarray(to_dtype(np.array([[[7]]], "u2"), np.dtype("i4"))).dtype
    dtype('int32')
    """

    def change(piece: NDArray, here: slice, out: NDArray) -> None:
        if piece.dtype == np.uint64 and dtype == np.int64:
            check_int64(int(piece.max()))
        copied(piece, here, out)

    return Changed(block, change, (block.shape[-2], block.shape[-1]), dtype)


@dataclass(frozen=True)
class PtSink:
    """Writes ``patterns`` into a .pt file.

    Parameters
    ----------
    path : the file under its temporary name
    lead_shape : (scan_y, scan_x) or (n,)
    tensor_shape : shape of the tensor in the file, which has the same elements in the same order
    dtype : of the tensor
    content : what else the dictionary holds, plain values and arrays (see `fill`); None writes the bare tensor
    """

    path: str
    lead_shape: tuple[int, ...]
    tensor_shape: tuple[int, ...]
    dtype: str
    content: Mapping[str, Any] | None
    offset: list[int] = field(default_factory=list)
    #: of this start, see `stem_dask.storage.staging`
    nonce: list[bytes] = field(default_factory=list, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """What goes with every task; the content is for the client only, and may take megabytes."""
        return {**self.__dict__, "content": None}

    @property
    def _native(self) -> np.dtype:
        """Type of the tensor; torch has no other byte order than the machine's."""
        return np.dtype(self.dtype).newbyteorder("=")

    def create(self, *, resume: bool) -> None:
        """Write the archive around the patterns; blocks that are there stay when resuming."""
        if not resume:
            remove(self.path)
        self._write_around("r+b" if os.path.exists(self.path) else "wb", 0)
        self.nonce[:] = [begin_in_place(self.path)]

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write one block at its offset."""
        block: NDArray | InPieces = blocks["patterns"]
        if block.dtype != self._native:
            block = to_dtype(block, self._native)
        options = (self.path, self.offset[0], self.lead_shape, region, block, self.nonce[0])
        return {"runs": write_runs(*options)}

    def verify(self, record: Record) -> str | None:
        """Read a block again and compare it with its checksums."""
        return damaged_run(self.path, self.offset[0], record.extra["runs"])

    def finish(self, records: Sequence[Record]) -> None:
        """Put the checksum right; refuses when the blocks do not tile the tensor, or are not as they were written."""
        n_bytes = prod(self.tensor_shape) * self._native.itemsize
        runs = joined_runs(self.path, records, n_bytes)
        refuse_other_bytes(self.path, self.nonce[0], records, self.verify)
        self._write_around("r+b", combine_crc((n, crc) for _, n, crc in runs))

    def fill(self, content: Mapping[str, Any]) -> None:
        """Write the small tensors anew, when the file is finished otherwise: what is known after all blocks only.

        Parameters
        ----------
        content : with arrays under the same names and of the same shapes and types as that of the sink

        Raises
        ------
        StoreError
            When it has others: the places of all tensors are settled when the file is begun.
        """
        begun, wanted = _layout(self.content or {}), _layout(content)
        if begun != wanted:
            raise StoreError(
                f"{self.path} was begun for {', '.join(begun) or 'no arrays'}, and is to hold "
                f"{', '.join(wanted) or 'none'}; name them all, with their types, when it is begun"
            )
        with zipfile.ZipFile(self.path) as archive:
            (patterns,) = (e.CRC for e in archive.infolist() if e.filename.endswith("/data/0"))
        self._write_around("r+b", patterns, content)

    def _write_around(self, mode: str, crc: int, later: Mapping[str, Any] | None = None) -> None:
        """Write all but the patterns, whose checksum is ``crc``."""
        whole: Any = Hole(self.tensor_shape, self._native)
        if self.content is not None:
            whole = {"patterns": whole, **self.content, **(later or {})}
        records = records_of(whole)
        self.offset[:] = [one.first for one in records if isinstance(one.content, Hole)]
        with named(self.path), open(self.path, mode) as file:
            write_records(file, records, crc)


def layout_shape(lead: Sequence[int], detector: Sequence[int], layout: str) -> tuple[int, ...]:
    """Shape of the tensor: as the patterns are (``scan``, ``bare``), or ``(N, 1, H, W)``.

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

#: types that came later: a storage of bytes, and the type beside it
_WITHOUT_STORAGE = ("uint16", "uint32", "uint64")

_ROOT = "archive"  # as torch calls it when it writes into an open file

_ALIGNMENT = 64

_MOST = 0xFFFFFFFF  # of 32 bits: a larger size or place is in an extra field


@dataclass(frozen=True)
class Hole:
    """A tensor whose numbers others write, in place."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ArchiveRecord:
    """A part of the archive; its header begins at byte ``header``."""

    name: bytes
    content: NDArray | Hole
    header: int

    @property
    def first(self) -> int:
        """Where its bytes begin."""
        used = self.header + 30 + len(self.name) + len(self._beyond) + 4
        return -(-used // _ALIGNMENT) * _ALIGNMENT

    @property
    def last(self) -> int:
        """Where its bytes end."""
        return self.first + self.content.nbytes

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.last + len(self._checksum(0))

    @property
    def _beyond(self) -> bytes:
        """The extra field with what 32 bits do not hold."""
        size = self.content.nbytes
        values = ([size, size] if size >= _MOST else []) + [self.header] * (self.header >= _MOST)
        return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""

    @property
    def _flags(self) -> int:
        """That names are UTF-8, and that the checksum follows the bytes."""
        return 0x808 if self.content.nbytes else 0x800

    def _checksum(self, crc: int) -> bytes:
        size = self.content.nbytes
        form = "<4sI2Q" if max(size, self.header) >= _MOST else "<4s3I"
        return struct.pack(form, b"PK\7\10", crc, size, size) if size else b""

    def crc(self) -> int:
        """Checksum of its bytes; of a hole whoever fills it knows."""
        return 0 if isinstance(self.content, Hole) else crc32(self.content)

    def write(self, file: IO[bytes], crc: int) -> None:
        """Write all of it but the numbers of a hole."""
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
        """What the archive's directory says of it."""
        size, extra = min(self.content.nbytes, _MOST), self._beyond
        figures = (crc, size, size, len(self.name), len(extra), min(self.header, _MOST))
        return struct.pack("<4s4xH6x3I2H10xI", b"PK\1\2", self._flags, *figures) + self.name + extra


def records_of(whole: Any) -> list[ArchiveRecord]:
    """The records of a file, in torch's order; those of tensors in the order in which the dictionary names them.

    Parameters
    ----------
    whole : an array, a `Hole`, or a dictionary of such, of plain values and of such dictionaries

    Raises
    ------
    ConfigError
        When torch has no type for the numbers of an array.
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
    """Write a file but for the numbers of its hole, over what is there.

    Parameters
    ----------
    file : open for writing
    records : from `records_of`
    of_hole : the checksum of the numbers in the hole, as far as it is known
    """
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
    """A pickle of protocol 2, which is torch's, in parts; appends the tensors that it names."""
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
    """A value's part of a pickle: without the first two bytes, which say the protocol, and the last, which ends it."""
    return pickle.dumps(value, 2)[2:-1]


def _tensor(key: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The call that makes a tensor of the record ``key``: ``torch._utils._rebuild_tensor_v2`` or ``_v3``.

    Their arguments are the storage, the first element, sizes, strides, whether it requires a gradient, hooks; then the type.
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
    """Something of a module, by its name."""
    return pickle.GLOBAL + "".join(f"{part}\n" for part in name.split()).encode()
