"""Tensors in files of ``torch.save``, read without importing torch (4 s); nothing in the files is run.

Such a file is a zip archive of uncompressed records: a pickle that describes the tensors, and one record per storage.
`pickle.Unpickler` calls and changes whatever a file names. `described` knows only the operations that torch writes, returns
descriptions in place of tensors, and takes time and memory proportional to the size of the pickle.
"""

import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from stem_dask.readers.views import View
from stem_dask.storage.errors import one_line, translate

#: torch's names of plain storages, and the types of their numbers
STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip

_TYPES = ("float", "double", "half", "bfloat16", "uint", "int", "short", "long", "bool", "complex", "sparse", "strided")  # fmt: skip

#: operations of a pickle whose argument is the value, and how many values others take from the stack
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8",
}  # fmt: skip
_TAKES = {
    "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "STACK_GLOBAL": 2, "REDUCE": 2, "BUILD": 1,
    "BINPERSID": 1, "POP": 1,
}  # fmt: skip
_TAKES_ALL_SINCE_MARK = ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS", "POP_MARK")


@dataclass(frozen=True)
class Name:
    """A type of torch, by its name; of a storage with the ``key`` of its record in the archive."""

    name: str
    key: str = ""


@dataclass(frozen=True)
class Tensor:
    """A tensor whose first element is number ``first`` of its storage; ``fault``, why it cannot be read."""

    storage: Name
    first: int = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    fault: str = ""


_SPARSE = Tensor(Name(""), fault="sparse; save tensor.to_dense()")


@dataclass(frozen=True)
class Numpy:
    """A number or an array of numpy, which is ignored."""


@dataclass(frozen=True)
class _Call:
    """A function that a pickle may call."""

    function: Callable[..., Any]


def _tensor(storage: Any, first: Any, shape: Any, strides: Any, *more: Any) -> Tensor:
    """A tensor; ``more`` are whether it has gradients, hooks, and what is to be negated or conjugated."""
    if not (isinstance(storage, Name) and storage.key):
        raise ValueError("a tensor has no storage")
    if len(more) > 2 and more[2]:
        return Tensor(storage, fault="a lazy view; save tensor.resolve_neg().resolve_conj()")
    return Tensor(storage, _integers((first,))[0], _integers(shape), _integers(strides))


def _tensor_of_type(storage: Any, *more: Any) -> Tensor:
    kind = more[5]
    return _tensor(Name(kind.name, storage.key), *more[:5], *more[6:])


def _integers(values: Any = ()) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(
        isinstance(value, int) and abs(value) < 2**63 for value in values
    ):
        raise ValueError("a tensor has sizes that are no whole numbers")
    return tuple(values)


def _dictionary() -> dict[Any, Any]:
    return {}


#: functions that a pickle may call
_KNOWN: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _dictionary,
    "torch Size": _integers,
    "torch device": lambda name, *_: Name(str(name)),
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of_type,
    "torch._utils _rebuild_parameter": lambda data, *more: data,
    "torch._utils _rebuild_sparse_tensor": lambda *_: _SPARSE,
    "torch.serialization _get_layout": lambda name: Name(str(name)),
    # bytes, in the pickles that torch writes
    **dict.fromkeys(("_codecs encode", "numpy dtype", "numpy ndarray"), lambda *_: Numpy()),
    **{
        f"numpy.{core}.{name}": lambda *_: Numpy()
        for core in ("core", "_core")
        for name in ("multiarray scalar", "multiarray _reconstruct", "numeric _frombuffer")
    },
}


def _named(module: Any, name: Any) -> _Call | Name:
    """The object of a name; a new one each time, so that no file can change it for the next file."""
    known = _KNOWN.get(f"{module} {name}")
    if known is not None:
        return _Call(known)
    if module in ("torch", "torch.storage") and name in (*STORAGES, "UntypedStorage"):
        return Name(STORAGES.get(name, "uint8"))
    if module == "torch" and name.startswith(_TYPES):
        return Name(name)
    raise ValueError(f"it holds {module}.{name}")


def _key(key: Any) -> str:
    """A key as text: the hashes of numbers and tuples can be foreseen, those of texts cannot."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(part is None or isinstance(part, (str, int, float)) for part in parts):
        raise ValueError("it holds a dictionary with keys other than texts and numbers")
    return str(key)


def described(content: bytes) -> Any:
    """The dictionaries, lists, plain values and descriptions of tensors in a pickle."""
    stack: list[list[Any]] = [[]]  # the values since each mark
    memory: dict[int, Any] = {}
    argument: Any
    for operation, argument, _ in pickletools.genops(content):
        name, taken = operation.name, []
        if name in _VALUES:
            stack[-1].append(argument)
            continue
        if name in _TAKES_ALL_SINCE_MARK:
            taken = stack.pop()
        elif n := _TAKES.get(name):
            taken = [stack[-1].pop() for _ in range(n)][::-1]
        top = stack[-1]
        match name:
            case "PROTO" | "FRAME" | "STOP" | "POP" | "POP_MARK":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                top.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "MARK":
                stack.append([])
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memory[len(memory) if argument is None else argument] = top[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                top.append(memory[argument])
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                top.append(tuple(taken))
            case "EMPTY_LIST" | "LIST":
                top.append(taken)
            case "APPEND" | "APPENDS" if isinstance(top[-1], list):
                top[-1].extend(taken)
            case "EMPTY_DICT":
                top.append({})
            case "DICT" | "SETITEM" | "SETITEMS" if name == "DICT" or isinstance(top[-1], dict):
                if name == "DICT":
                    top.append({})
                pairs = zip(taken[::2], taken[1::2], strict=True)
                top[-1].update((_key(key), value) for key, value in pairs)
            case "GLOBAL":
                top.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                top.append(_named(*taken))
            case "REDUCE" if isinstance(taken[0], _Call) and isinstance(taken[1], tuple):
                top.append(taken[0].function(*taken[1]))
            case "BUILD" if isinstance(top[-1], (dict, Numpy)):
                pass  # the state of torch's dictionaries and of numpy's arrays is ignored
            case "BINPERSID":
                word, kind, key, *_ = taken[0]
                if word != "storage" or not isinstance(kind, Name) or not isinstance(key, str):
                    raise ValueError("it refers to something other than the storage of a tensor")
                top.append(Name(kind.name, key))
            case _:
                raise ValueError(f"its description uses {name}, as torch does not")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError("its description is damaged")
    _count(stack[0][0], 0, [2_000_000])
    return stack[0][0]


def _count(value: Any, level: int, left: list[int]) -> None:
    """Refuse values that share parts so often that iterating over them would not end."""
    left[0] -= 1 + len(value) // 100 if isinstance(value, (str, bytes, bytearray)) else 1
    if level > 100 or left[0] < 0:
        raise ValueError("its description goes too deep, or repeats itself")
    if isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            _count(inner, level + 1, left)


def list_tensors(path: str) -> list[Candidate]:
    """Tensors of a ``torch.save`` file, a bare one or a dictionary; only the description is read."""
    with open(path, "rb") as file:
        if file.read(14)[2:] == b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19":
            raise SourceError(
                f"{path}: saved in the format of torch before 1.6; load it and torch.save it again"
            )
    remedy = "it is truncated, damaged, or holds other Python objects, which are never run: save it again with torch.save(tensor, path)"
    with translate(SourceError, path, "not a readable PyTorch file of plain tensors", remedy):
        with zipfile.ZipFile(path) as archive:
            records = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
            pickled, order = records["data.pkl"], records.get("byteorder")
            if pickled.compress_type != zipfile.ZIP_STORED or pickled.file_size > 64 << 20:
                raise ValueError("its description is compressed, or too long")
            loaded = described(archive.read(pickled))
            is_big = order is not None and archive.open(order).read(4) == b"big"
        if not isinstance(loaded, (dict, list, tuple, Tensor)):
            what = type(loaded).__name__
            if isinstance(loaded, Numpy):
                what = "numpy array, not a tensor; save torch.from_numpy(array), or numpy.save(path, array)"
            raise SourceError(
                f"{path}: holds a {what}; expected a tensor, or a dictionary or list of them"
            )
        tensors = loaded if isinstance(loaded, dict) else {"tensor": loaded}
        stated = tensors.get("axes")
        axes = [
            axis_from(one.get("name"), one["size"], one)
            for one in (stated if isinstance(stated, (list, tuple)) else ())
            if isinstance(one, dict) and isinstance(one.get("size"), int)
        ]
        named: list[tuple[str, Any]] = [(str(name), one) for name, one in tensors.items()]
        if not any(map(_may_hold_patterns, dict(named).values())):
            named = list(_within(loaded, "", set()))
        found = [
            _candidate(path, name, tensor, records, ">" if is_big else "<", axes)
            for name, tensor in named
            if _may_hold_patterns(tensor)
        ]
        if named and not found:
            listed = [f"{name}: {by(one.shape)} {one.storage.name}" for name, one in named if isinstance(one, Tensor)]  # fmt: skip
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
        lead = patterns.source.shape[:-2]
        analysis = tensors.get("analysis")
        valid = analysis.get("valid") if isinstance(analysis, dict) else None
        n = math.prod(lead)
        if isinstance(valid, Tensor) and not valid.fault and math.prod(valid.shape) == n:
            positions = _candidate(path, "valid", valid, records, "<", []).source
            if isinstance(positions, FlatFile):  # also of a list (N, 1, H, W)
                known |= own.lost(
                    replace(positions, shape=lead if positions.shape == lead else (n,))
                )
        if len(axes) == len(patterns.source.shape) == 4 and patterns.source.shape[1] == 1:
            y, x = axes[:2]  # (N, 1, H, W): the list of the positions of a scan
            known["scan"] = (y, x) if y.size * x.size == patterns.source.shape[0] else None
        return [replace(patterns, **known)]


def _may_hold_patterns(content: Any) -> bool:
    return isinstance(content, Tensor) and bool(content.fault or len(content.shape) > 2)


def _within(content: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """All tensors in nested dictionaries and lists, by their path; each container is visited once."""
    if isinstance(content, Tensor):
        yield name or "tensor", content
    elif isinstance(content, (dict, list, tuple)) and id(content) not in seen:
        seen.add(id(content))
        for key, item in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _within(item, f"{name}/{key}" if name else str(key), seen)


def _candidate(
    path: str,
    name: str,
    tensor: Tensor,
    records: dict[str, zipfile.ZipInfo],
    byte_order: str,
    stated: list[Axis],
) -> Candidate:
    try:
        dtype = np.dtype(byte_order + np.dtype(tensor.storage.name or "u1").str[1:])
    except TypeError:
        tensor = replace(tensor, fault=f"{tensor.storage.name}, which numpy lacks; save tensor.float()")  # fmt: skip
    if tensor.fault:
        raise SourceError(f"{path}: {name} is {tensor.fault}")
    shape, strides, entry = tensor.shape, tensor.strides, records[f"data/{tensor.storage.key}"]
    if min(shape, default=0) < 0 or tensor.first < 0 or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is damaged")
    stored_order = range(len(shape))
    slowest_first = sorted(stored_order, key=lambda i: -strides[i])
    orders = (one for one in (stored_order, slowest_first) if _is_contiguous(shape, strides, one))
    order = next(orders, None)
    if order is None:
        raise SourceError(f"{path}: {name} is not contiguous; save tensor.contiguous()")
    n_bytes, begin = math.prod(shape) * dtype.itemsize, tensor.first * dtype.itemsize
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise ValueError(f"no record begins at byte {entry.header_offset:,}")
    before = 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    offset = entry.header_offset + before + begin
    size = Path(path).stat().st_size
    if begin + n_bytes > entry.file_size or offset + n_bytes > size:
        raise SourceError(
            f"{path}: {name} needs {begin + n_bytes:,} bytes, but {min(entry.file_size, size - offset + begin):,} are stored; "
            "the file is cut or damaged"
        )
    source: Source = FlatFile(path, offset, dtype, tuple(shape[i] for i in order))
    if order is not stored_order:
        source = View.of(source).transpose([order.index(i) for i in stored_order])
    axes = [Axis(f"axis{i}", n) for i, n in enumerate(shape)]
    if tuple(axis.size for axis in stated) == shape:  # as in stem_dask's own files
        axes = stated
    elif tuple(axis.size for axis in stated[-2:]) == shape[-2:]:  # (N, 1, H, W) of a scan or a list
        axes[-2:] = stated[-2:]
    return Candidate(name, source, tuple(axes))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...], order: Sequence[int]) -> bool:
    """Whether the elements follow one another, the last axis in ``order`` fastest."""
    sizes = [shape[i] for i in order]
    steps = (math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
    pairs = zip(order, steps, strict=True)
    return 0 in shape or all(shape[i] == 1 or strides[i] == step for i, step in pairs)
