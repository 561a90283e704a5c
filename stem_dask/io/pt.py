"""PyTorch files written block by block: an archive with a hole, every block at its own offset in it, and the hole's
checksum, from those of the pieces, at the end."""

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import ConfigError, StoreError
from stem_dask.io.checksums import combine_crc
from stem_dask.io.flat import damaged_run, joined_runs, write_runs
from stem_dask.io.pieces import Changed, InPieces, copied
from stem_dask.io.publish import named, remove
from stem_dask.io.staging import begin_in_place, refuse_other_bytes
from stem_dask.io.torch_archive import Hole, records_of, write_records
from stem_dask.model import Record, Region

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
    #: of this start, see `stem_dask.io.staging`
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
