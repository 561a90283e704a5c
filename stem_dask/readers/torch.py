"""Tensors in files of ``torch.save``, read without importing torch (4 s).

Such a file is a zip archive of uncompressed records: a pickle that describes the tensors (see
`stem_dask.readers.torch_pickle`), and one record per storage.
"""

import math
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers import own
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.layout import axis_from
from stem_dask.readers.source import Candidate, Source
from stem_dask.readers.torch_pickle import MOST_BYTES, Numpy, Other, Tensor, described
from stem_dask.readers.views import View
from stem_dask.storage.errors import one_line, translate

_REMEDY = "it is truncated, damaged, or holds other Python objects, which are never run: save it again with torch.save(tensor, path)"


def list_tensors(path: str) -> list[Candidate]:
    """Tensors of a ``torch.save`` file, a bare one or a dictionary; only the description is read.

    Raises
    ------
    SourceError
        When it is damaged, holds anything but plain tensors, or a tensor of numbers that numpy lacks.
    """
    with open(path, "rb") as file:
        if file.read(14)[2:] == b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19":
            raise SourceError(
                f"{path}: saved in the format of torch before 1.6; load it and torch.save it again"
            )
    with translate(f"{path}: not a readable PyTorch file of plain tensors", _REMEDY):
        with zipfile.ZipFile(path) as archive:
            records = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
            loaded = _unpickled(archive, records)
            order = records.get("byteorder")
            big_endian = order is not None and archive.open(order).read(4) == b"big"
        if isinstance(loaded, Numpy):
            raise SourceError(
                f"{path}: holds a numpy array, not a tensor; save torch.from_numpy(array), or numpy.save(path, array)"
            )
        if not isinstance(loaded, (dict, list, tuple, Tensor, Other)):
            raise SourceError(
                f"{path}: holds a {type(loaded).__name__}; expected a tensor, or a dictionary or list of them"
            )
        tensors = loaded if isinstance(loaded, dict) else {"tensor": loaded}
        named: list[tuple[str, Any]] = [(str(name), one) for name, one in tensors.items()]
        if not any(isinstance(one, Other) or _n_axes(one) > 2 for _, one in named):
            named = list(_within(loaded, "", set()))
        axes = tensors.get("axes")
        axes = axes if isinstance(axes, (list, tuple)) else ()
        found = [
            _candidate(path, name, tensor, records, big_endian, axes)
            for name, tensor in named
            if isinstance(tensor, Other) or _n_axes(tensor) > 2
        ]
        if named and not found:
            listed = [
                f"{name}: {by(one.shape)} {one.kind}"
                for name, one in named
                if isinstance(one, Tensor)
            ]
            raise SourceError(
                f"{path}: no 4D tensor (scan_y, scan_x, ky, kx) and no stack of patterns; the file holds "
                + (one_line("; ".join(listed)) or "no tensor")
            )
        if isinstance(loaded, Tensor):
            return [replace(one, about=own.of_results(path, one.source.shape)) for one in found]
        known = own.of_tensors(tensors)
        patterns = next((one for one in found if one.name == "patterns"), None)
        if known is None or patterns is None:
            return found
        analysis = tensors.get("analysis")
        valid = analysis.get("valid") if isinstance(analysis, dict) else None
        if isinstance(valid, Tensor):
            known |= _lost(
                _candidate(path, "analysis.valid", valid, records, big_endian, ()), patterns
            )
        return [replace(patterns, **known, scan=_scan(patterns, axes))]


def _n_axes(content: Any) -> int:
    return len(content.shape) if isinstance(content, Tensor) else 0


def _within(content: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """All tensors in nested dictionaries and lists, by their path; each container is visited once."""
    if isinstance(content, (Tensor, Other)):
        yield name or "tensor", content
    elif isinstance(content, (dict, list, tuple)) and id(content) not in seen:
        seen.add(id(content))
        for key, item in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _within(item, f"{name}/{key}" if name else str(key), seen)


def _unpickled(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> Any:
    entry = records["data.pkl"]
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > MOST_BYTES:
        raise ValueError("its description is compressed, or too long")
    return described(archive.read(entry))


def _candidate(
    path: str,
    name: str,
    tensor: Tensor | Other,
    records: dict[str, zipfile.ZipInfo],
    big_endian: bool,
    axes: Any,
) -> Candidate:
    if isinstance(tensor, Other):
        raise SourceError(f"{path}: {name} is {tensor.what}")
    try:
        dtype = np.dtype(tensor.kind).newbyteorder(">" if big_endian else "<")
    except TypeError as error:
        raise SourceError(
            f"{path}: {name} is {tensor.kind}, which numpy lacks; save tensor.float()"
        ) from error
    shape, entry = tensor.shape, records[f"data/{tensor.storage.key}"]
    if min(shape) < 0 or tensor.first < 0 or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is damaged")
    order = sorted(range(len(shape)), key=lambda i: -tensor.strides[i])  # slowest first
    if _contiguous(shape, tensor.strides):
        order = list(range(len(shape)))
    stored = tuple(shape[i] for i in order)
    if not _contiguous(stored, tuple(tensor.strides[i] for i in order)):
        raise SourceError(f"{path}: {name} is not contiguous; save tensor.contiguous()")
    n_bytes = math.prod(shape) * dtype.itemsize
    begin = tensor.first * dtype.itemsize
    if begin + n_bytes > entry.file_size:
        raise SourceError(
            f"{path}: {name} needs {begin + n_bytes:,} bytes, but {entry.file_size:,} are stored; the file is damaged"
        )
    offset = _place(path, entry) + begin
    if offset + n_bytes > (size := Path(path).stat().st_size):
        raise SourceError(
            f"{path}: {name} needs {offset + n_bytes:,} bytes; the file has {size:,}: it was cut"
        )
    source: Source = FlatFile(path, offset, dtype, stored)
    if order != sorted(order):
        source = View.of(source).transpose([order.index(i) for i in range(len(shape))])
    return Candidate(name, source, _axes(shape, axes))


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements follow one another, the last axis fastest; strides of axes of length 1 do not matter."""
    step, expected = 1, []
    for size in reversed(shape):
        expected.append(step)
        step *= size
    pairs = zip(shape, strides, reversed(expected), strict=True)
    return step == 0 or all(size == 1 or stride == right for size, stride, right in pairs)


def _place(path: str, entry: zipfile.ZipInfo) -> int:
    """Byte offset of a record's content, after its local header."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise ValueError(f"no record begins at byte {entry.header_offset:,}")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return entry.header_offset + 30 + name + extra


def _axes(shape: tuple[int, ...], stated: Any) -> tuple[Axis, ...]:
    """The axes as stem_dask's own files describe them."""
    plain = [Axis(f"axis{i}", n) for i, n in enumerate(shape)]
    known = [axis_from(a.get("name"), a["size"], a) for a in stated if _describes_axis(a)]
    if tuple(axis.size for axis in known) == shape:
        plain = known
    elif tuple(axis.size for axis in known[-2:]) == shape[-2:]:  # (N, 1, H, W) of a scan or a list
        plain[-2:] = known[-2:]
    return tuple(plain)


def _scan(patterns: Candidate, stated: Any) -> tuple[Axis, Axis] | None:
    """The scan of own patterns that are a list of its positions, (N, 1, H, W)."""
    shape = patterns.source.shape
    known = [axis_from(a.get("name"), a["size"], a) for a in stated if _describes_axis(a)]
    if len(known) == 4 and len(shape) == 4 and shape[1] == 1:
        y, x = known[:2]
        return (y, x) if y.size * x.size == shape[0] else None
    return None


def _lost(valid: Candidate, patterns: Candidate) -> dict[str, Any]:
    """Positions of unreadable patterns, from ``valid``; also of a list (N, 1, H, W)."""
    positions, lead = valid.source, patterns.source.shape[:-2]
    if not isinstance(positions, FlatFile) or math.prod(positions.shape) != math.prod(lead):
        return {}
    if positions.shape != lead:
        positions = replace(positions, shape=(math.prod(lead),))
    return own.lost(positions)


def _describes_axis(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("size"), int)
