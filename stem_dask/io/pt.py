"""PyTorch files written block by block: a skeleton with empty tensors, then every block at its own offset.

``torch.save`` under ``skip_data`` makes a valid file whose tensors are holes; workers write bytes into them without
torch, and the checksums of the zip records are put right at the end from those of the pieces.
"""

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import ConfigError, StoreError
from stem_dask.io.checksums import combine_crc, crc32
from stem_dask.io.flat import damaged_run, joined_runs, write_runs
from stem_dask.io.pieces import Changed, InPieces, copied
from stem_dask.io.publish import named, naming
from stem_dask.model import Record, Region

LAYOUTS = ("scan", "nchw", "tensor", "bare")


def signed_dtype(dtype: np.dtype, maximum: float | None) -> np.dtype:
    """Type for counts in a tensor: torch neither adds nor compares uint16, uint32 and uint64.

    Those become the smallest signed type that holds the largest value (of the type, when it is not known); every
    other type stays.

    Examples
    --------
    >>> signed_dtype(np.dtype("u2"), 300), signed_dtype(np.dtype("u2"), None), signed_dtype(np.dtype("u1"), 9)
    (dtype('int16'), dtype('int32'), dtype('uint8'))
    """
    if dtype.kind != "u" or dtype.itemsize == 1:
        return dtype
    largest = int(np.iinfo(dtype).max) if maximum is None else int(maximum)
    for size in (1, 2, 4, 8):
        signed = np.dtype(f"i{size}")
        if largest <= int(np.iinfo(signed).max):
            return signed
    if maximum is None:
        return np.dtype(np.int64)  # checked block by block
    raise ConfigError(
        f"the largest value is {largest:,}, more than int64 holds; torch has no usable type for it: "
        "set output.dtype: float32"
    )


def to_dtype(block: NDArray | InPieces, dtype: np.dtype) -> InPieces:
    """The block in another integer type, refusing values that would wrap.

    Examples
    --------
    >>> np.asarray(to_dtype(np.array([[[7]]], "u2"), np.dtype("i1"))).dtype
    dtype('int8')
    """

    def change(piece: NDArray, here: slice, out: NDArray) -> None:
        if piece.dtype.kind == "u" and dtype.kind == "i":
            largest = int(piece.max())
            if largest > int(np.iinfo(dtype).max):
                raise ConfigError(
                    f"a value of {largest:,} does not fit {dtype}; set output.dtype: float32"
                )
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

    def __getstate__(self) -> dict[str, Any]:
        """What goes with every task; the content is for the client only, and may take megabytes."""
        return {**self.__dict__, "content": None}

    @property
    def _native(self) -> np.dtype:
        """Type of the tensor; torch has no other byte order than the machine's."""
        return np.dtype(self.dtype).newbyteorder("=")

    def create(self, *, resume: bool) -> None:
        """Write the skeleton, and the small tensors into it; around what is there when resuming."""
        mode = "r+b" if resume and os.path.exists(self.path) else "wb"
        torch = _torch()
        patterns = _without_memory(f"{self.path}.hole", self.tensor_shape, self._native)
        whole = patterns
        if self.content is not None:
            whole = {"patterns": patterns, **_tensors(self.content)}
        with named(self.path), open(self.path, mode) as file, torch.serialization.skip_data():
            torch.save(whole, file)
            file.truncate()
        small = list(_arrays(self.content or {}))
        first, *places = _storage_offsets(self.path, 1 + len(small))
        self.offset[:] = [first]
        self._write_small(places, small)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write one block at its offset."""
        block: NDArray | InPieces = blocks["patterns"]
        if block.dtype != self._native:
            block = to_dtype(block, self._native)
        return {"runs": write_runs(self.path, self.offset[0], self.lead_shape, region, block)}

    def verify(self, record: Record) -> str | None:
        """Read a block again and compare it with its checksums."""
        return damaged_run(self.path, self.offset[0], record.extra["runs"])

    def finish(self, records: Sequence[Record]) -> None:
        """Put the checksums of the zip records right; refuses when the blocks do not tile the tensor."""
        n_bytes = prod(self.tensor_shape) * self._native.itemsize
        runs = joined_runs(self.path, records, n_bytes)
        _mend_checksums(self.path, {self.offset[0]: combine_crc((n, crc) for _, n, crc in runs)})

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
        small = list(_arrays(content))
        begun, wanted = _layout(self.content or {}), _layout(content)
        if begun != wanted:
            raise StoreError(
                f"{self.path} was begun for {', '.join(begun) or 'no arrays'}, and is to hold "
                f"{', '.join(wanted) or 'none'}; name them all, with their types, when it is begun"
            )
        first, *places = _storage_offsets(self.path, 1 + len(small))
        with zipfile.ZipFile(self.path) as archive:
            (patterns,) = (e.CRC for e in archive.infolist() if e.filename.endswith("/data/0"))
        self._write_small(places, small)
        _mend_checksums(self.path, {first: patterns})

    def _write_small(self, places: Sequence[int], small: Sequence[NDArray]) -> None:
        with named(self.path), open(self.path, "r+b") as file:
            for place, array in zip(places, small, strict=True):
                file.seek(place)
                file.write(array.tobytes())


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


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConfigError("exporting .pt needs torch: pip install stem_dask[torch]") from error
    return torch


def _without_memory(path: str, shape: Sequence[int], dtype: np.dtype) -> Any:
    """A tensor of any size over a file that is one hole: it takes neither memory nor disk."""
    torch = _torch()
    n_bytes = prod(shape) * dtype.itemsize
    with named(path), open(path, "wb") as file:
        file.truncate(n_bytes)
    try:
        storage = torch.UntypedStorage.from_file(path, True, n_bytes)
    finally:
        os.remove(path)  # the mapping keeps it; a kill later leaves nothing
    return torch.empty(0, dtype=getattr(torch, str(dtype))).set_(storage, 0, tuple(shape))


def _arrays(content: Mapping[str, Any]) -> Iterator[NDArray]:
    """The arrays of nested dictionaries in the order in which `torch.save` meets them."""
    for value in content.values():
        if isinstance(value, Mapping):
            yield from _arrays(value)
        elif isinstance(value, np.ndarray):
            yield np.ascontiguousarray(value)


def _layout(content: Mapping[str, Any]) -> list[str]:
    """Names, types and shapes of the arrays of nested dictionaries, in the order of `_arrays`."""
    found = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            found += [f"{key}/{inner}" for inner in _layout(value)]
        elif isinstance(value, np.ndarray):
            found.append(f"{key}: {value.dtype} {value.shape}")
    return found


def _tensors(content: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values as they are, arrays as empty tensors of their shape."""
    torch = _torch()
    out: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            out[key] = _tensors(value)
        elif isinstance(value, np.ndarray):
            out[key] = torch.empty(value.shape, dtype=getattr(torch, str(value.dtype)))
        else:
            out[key] = value
    return out


def _storage_offsets(path: str, n: int) -> list[int]:
    """Byte offsets of the first n storages of the file, in the order in which their tensors were saved."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    with open(path, "rb") as file:
        return [_data_offset(file, entries[f"data/{i}"]) for i in range(n)]


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: after its local header, whose name and extra field have their own lengths."""
    file.seek(entry.header_offset + 26)
    name, extra = np.frombuffer(file.read(4), "<u2").tolist()
    return entry.header_offset + 30 + name + extra


@naming
def _mend_checksums(path: str, known: Mapping[int, int]) -> None:
    """Correct the CRC of every stored record: in its descriptor after the data, and in the central directory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        central = archive.start_dir
    with open(path, "r+b") as file:
        for entry in entries:
            data = _data_offset(file, entry)
            crc = known.get(data)
            if crc is None:
                file.seek(data)
                crc = crc32(file.read(entry.file_size))
            word = crc.to_bytes(4, "little")
            file.seek(data + entry.file_size)
            if file.read(4) == b"PK\x07\x08":
                file.seek(data + entry.file_size + 4)
            else:
                file.seek(entry.header_offset + 14)
            file.write(word)
            file.seek(central + 16)
            file.write(word)
            file.seek(central + 28)
            name, extra, comment = np.frombuffer(file.read(6), "<u2").tolist()
            central += 46 + name + extra + comment
        file.flush()
        os.fsync(file.fileno())
