"""PyTorch files (.pt) written block by block, without torch: a zip archive with a hole that tasks fill, each at its own offset.

The checksum of the hole is combined from those of the blocks at the end."""

import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, ChangedBlock, copied
from stem_dask.core.errors import ConfigError, StoreError
from stem_dask.core.patterns import content_of
from stem_dask.readers.torch import STORAGES
from stem_dask.storage.errors import translate
from stem_dask.storage.staging import combine_crc, crc32
from stem_dask.writers.npy import InPlaceSink, Run

#: ``scan`` and ``bare`` have the shape of the patterns, ``nchw`` and ``tensor`` (N, 1, H, W); the last two are bare tensors
LAYOUTS = ("scan", "nchw", "tensor", "bare")


def signed_dtype(dtype: np.dtype) -> np.dtype:
    """Type of a tensor for patterns of a type: unsigned types become the next larger signed type, uint64 int64.

    Examples
    --------
    >>> [str(signed_dtype(np.dtype(kind))) for kind in ("?", "u1", "u2", "u4", "u8", "i2", "f4")]
    ['int16', 'int16', 'int32', 'int64', 'int64', 'int16', 'float32']
    """
    return np.dtype(f"i{min(2 * dtype.itemsize, 8)}") if dtype.kind in "bu" else dtype


def check_int64(largest: float) -> None:
    """Raise ConfigError if values exceed int64."""
    if largest > np.iinfo(np.int64).max:
        raise ConfigError(
            f"a .pt holds values up to {np.iinfo(np.int64).max:,}, the data reach {largest:,.0f}; "
            "use float32 (sd.cast, or output.dtype=float32)"
        )


@dataclass(frozen=True)
class Hole:
    """A tensor whose values are written by tasks."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class PtSink(InPlaceSink):
    """Writes ``patterns`` into a .pt file, as a dictionary with the content of the output, or as a bare tensor."""

    def converted(self, block: NDArray | Block) -> NDArray | Block:
        """The block in the type of its tensor; refuses uint64 values beyond int64."""
        dtype = self.output.dtype
        if block.dtype == dtype:
            return block

        def change(piece: NDArray, here: slice, out: NDArray) -> None:
            if piece.dtype == np.uint64 and dtype == np.int64:
                check_int64(int(piece.max()))
            copied(piece, here, out)

        return ChangedBlock(block, change, (block.shape[-2], block.shape[-1]), dtype)

    def _whole(self, arrays: Mapping[str, Any] | None = None) -> Any:
        """The tensor or dictionary in the file, with these arrays by position."""
        output, layout = self.output, self.output.layout
        flat = (prod(output.shape[:-2]), 1, *output.shape[-2:])
        patterns = Hole(output.shape if layout in ("scan", "bare") else flat, output.dtype)
        if layout in ("tensor", "bare"):
            return patterns
        content = {**output.content, **({} if arrays is None else {"analysis": arrays})}
        return {"patterns": patterns, "title": output.title, **content}

    def write_around(
        self, mode: str, runs: Sequence[Run], arrays: Mapping[str, Any] | None = None
    ) -> None:
        """Write the archive around the patterns; existing blocks stay."""
        crc, whole = combine_crc((n, crc) for _, n, crc in runs), self._whole(arrays)
        with translate(StoreError, self.output.path), open(self.output.path, mode) as file:
            self.offset[:] = [write_archive(file, whole, crc)]

    def complete(self, patterns: Any, analysis: Any, about: Mapping[str, Any]) -> list[str]:
        """Write the small tensors again with their final values; they must be those the file was begun with."""
        path, begun = self.output.path, self.output.content.get("analysis", {})
        if self.output.layout in ("tensor", "bare"):
            return []
        arrays = content_of(patterns, analysis)["analysis"]
        if "valid" not in begun and arrays.get("valid", np.False_).all():
            del arrays["valid"]  # not needed
        old, new = (
            [f"analysis/{name}: {array.dtype} {array.shape}" for name, array in those.items()]
            for those in (begun, arrays)
        )
        if old != new:
            raise StoreError(
                f"{path} was begun for the arrays {', '.join(old) or 'none'}, but is completed with "
                f"{', '.join(new) or 'none'}; pass all arrays, with their types, when it is begun"
            )
        with zipfile.ZipFile(path) as archive:
            (entry,) = (e for e in archive.infolist() if e.filename.endswith("/data/0"))
        self.write_around("r+b", [(0, entry.file_size, entry.CRC)], arrays)
        return []


_ALIGNMENT = 64

_MOST = 0xFFFFFFFF  # larger sizes and offsets are in a zip64 extra field


def write_archive(file: IO[bytes], whole: Any, crc: int) -> int:
    """Write an archive over an existing file, except for the content of its hole, whose checksum is ``crc``.

    ``whole`` is an array, a `Hole`, or nested dictionaries of these and plain values. The records have the order and the
    places that torch gives them. Returns the offset of the hole.
    """
    tensors: list[NDArray | Hole] = []
    described = b"".join((pickle.PROTO + b"\2", *_pickled(whole, tensors), pickle.STOP))
    contents: dict[str, Any] = {
        "data.pkl": described,
        ".format_version": b"1",
        ".storage_alignment": str(_ALIGNMENT).encode(),
        "byteorder": sys.byteorder.encode(),
        **{f"data/{i}": tensor for i, tensor in enumerate(tensors)},
        "version": b"3\n",
    }
    found = 0
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            # "archive" is torch's name when it writes into an open file
            entry, start = zipfile.ZipInfo(f"archive/{name}"), file.tell()
            size = len(content) if isinstance(content, bytes) else content.nbytes
            entry.header_offset, entry.file_size, entry.compress_size = start, size, size
            entry.flag_bits = 0x808 if size else 0x800  # the checksum follows the content
            entry.CRC = 0
            values = [size, size] * (size >= _MOST) + [start] * (start >= _MOST)
            if values:
                entry.extra = struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)
            fill = -(start + len(entry.FileHeader()) + 4) % _ALIGNMENT
            entry.extra += struct.pack("<2sH", b"FB", fill) + b"Z" * fill
            file.write(entry.FileHeader())
            if isinstance(content, Hole):
                entry.CRC, found = crc, file.tell()
                file.seek(size, 1)
            else:
                entry.CRC = crc32(content)
                file.write(content)
            if size:
                form = "<4sI2Q" if max(size, start) >= _MOST else "<4s3I"
                file.write(struct.pack(form, b"PK\7\10", entry.CRC, size, size))
            archive.filelist.append(entry)
            archive.start_dir = file.tell()
    file.truncate()
    return found


_STORAGE_OF = {kind: name for name, kind in STORAGES.items()}


def _pickled(value: Any, tensors: list[NDArray | Hole]) -> Iterator[bytes]:
    """Parts of a pickle of protocol 2, as torch writes it; appends its tensors to ``tensors``."""
    if isinstance(value, Mapping):
        yield pickle.EMPTY_DICT + pickle.MARK
        for key, inner in value.items():
            yield _plain(key)
            yield from _pickled(inner, tensors)
        yield pickle.SETITEMS
    elif isinstance(value, (Hole, np.ndarray)):
        yield _tensor(str(len(tensors)), value.dtype, value.shape)
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
        tensors.append(value)
    else:
        yield _plain(value)


def _plain(value: Any) -> bytes:
    """A value pickled without the protocol header (2 bytes) and the stop code (1 byte)."""
    return pickle.dumps(value, 2)[2:-1]


def _tensor(key: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Pickled call of ``torch._utils._rebuild_tensor_v2`` or ``_v3`` for the member ``key``.

    Arguments: storage, offset, sizes, strides, requires_grad, hooks; v3, for newer types, adds the type.
    """
    kind, n = dtype.name, prod(shape)
    later = kind in ("uint16", "uint32", "uint64")
    if not later and kind not in _STORAGE_OF:
        raise ConfigError(f"torch has no type for {dtype}; set output.dtype: float32")
    storage = "torch.storage\nUntypedStorage" if later else f"torch\n{_STORAGE_OF[kind]}"
    strides = tuple(
        prod(max(1, size) for size in shape[axis:]) for axis in range(1, len(shape) + 1)
    )
    return b"".join((
        f"ctorch._utils\n_rebuild_tensor_v{3 if later else 2}\n((".encode(),
        _plain("storage"), f"c{storage}\n".encode(), _plain(key), _plain("cpu"),
        _plain(n * dtype.itemsize if later else n), pickle.TUPLE, pickle.BINPERSID,
        _plain(0), _plain(shape), _plain(strides), pickle.NEWFALSE, b"ccollections\nOrderedDict\n)R",
        f"ctorch\n{kind}\n".encode() if later else b"", pickle.TUPLE, pickle.REDUCE,
    ))  # fmt: skip
