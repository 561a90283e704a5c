"""Files as ``torch.save`` writes them, made without torch, which takes a second or more and 200 MB to load.

Such a file is a zip archive of records that are not compressed: ``data.pkl`` is a pickle that describes the tensors, each
``data/N`` holds the numbers of one. Record for record this follows torch's own writer (``PyTorchStreamWriter`` in
``caffe2/serialize/inline_container.cc``, on miniz): the bytes of every record begin at a multiple of 64, up to which an
extra field ``FB`` fills its header, and its checksum follows them.
"""

import pickle
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import ConfigError
from stem_dask.io.checksums import crc32

#: torch's names of plain storages, and the types of their numbers
STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
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
class Record:
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


def records_of(whole: Any) -> list[Record]:
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
    records: list[Record] = []
    for name, content in contents.items():
        header = records[-1].end if records else 0
        records.append(Record(f"{_ROOT}/{name}".encode(), content, header))
    return records


def write_records(file: IO[bytes], records: Sequence[Record], of_hole: int) -> None:
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
