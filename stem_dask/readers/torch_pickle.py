"""Descriptions of the tensors in the pickle of a ``torch.save`` file; nothing in the pickle is run.

`pickle.Unpickler` calls and changes whatever a file names. This reader knows only the operations that torch writes, returns
descriptions in place of tensors, and takes time and memory proportional to the size of the pickle.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

#: bytes of a pickle; one tensor takes some hundred
MOST_BYTES = 64 << 20

#: levels of dictionaries and lists, and values in all of them, where a shared one counts in each place
_MOST_LEVELS, _MOST_VALUES = 100, 2_000_000

#: torch's names of plain storages, and the types of their numbers
STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip

_STORAGES = {**STORAGES, "UntypedStorage": "uint8"}

_TYPES = (
    "float", "double", "half", "bfloat16", "uint", "int", "short", "long", "bool", "complex", "sparse", "strided",
)  # fmt: skip


@dataclass(frozen=True)
class Name:
    """A type of torch, by its name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A record of the archive with the numbers of one or more tensors."""

    key: str
    kind: str


@dataclass(frozen=True)
class Tensor:
    """A tensor; ``first`` is the position of its first element in the storage."""

    storage: Storage
    kind: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Other:
    """A tensor that cannot be read; ``what`` completes the message "NAME is ..."."""

    what: str


@dataclass(frozen=True)
class Numpy:
    """A number or an array of numpy, which is ignored."""


@dataclass(frozen=True)
class _Call:
    """A function that a pickle may call."""

    function: Callable[..., Any]


def _tensor(storage: Any, first: Any, shape: Any, strides: Any, *more: Any) -> Tensor | Other:
    if len(more) > 2 and more[2]:  # numbers that are to be negated or conjugated
        return Other("a lazy view; save tensor.resolve_neg().resolve_conj()")
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    return Tensor(storage, storage.kind, _integers((first,))[0], _integers(shape), _integers(strides))  # fmt: skip


def _tensor_of_type(
    storage: Any, first: Any, shape: Any, strides: Any, grad: Any, hooks: Any, kind: Any, *more: Any
) -> Tensor | Other:
    found = _tensor(storage, first, shape, strides, grad, hooks, *more)
    if not isinstance(kind, Name):
        raise ValueError("a tensor has no type")
    return found if isinstance(found, Other) else replace(found, kind=kind.name)


def _integers(values: Any = ()) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(
        isinstance(value, int) and abs(value) < 2**63 for value in values
    ):
        raise ValueError("a tensor has sizes that are no whole numbers")
    return tuple(values)


def _dictionary(pairs: Any = ()) -> dict[Any, Any]:
    if pairs:
        raise ValueError("it holds a dictionary in a form that torch does not write")
    return {}


def _name(name: Any, *_: Any) -> Name:
    return Name(str(name)) if isinstance(name, (str, int)) else Name("")


#: functions that a pickle may call
_KNOWN: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _dictionary,
    "torch Size": _integers,
    "torch device": _name,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of_type,
    "torch._utils _rebuild_parameter": lambda data, *more: data,
    "torch._utils _rebuild_sparse_tensor": lambda *_: Other("sparse; save tensor.to_dense()"),
    "torch.serialization _get_layout": _name,
    **dict.fromkeys(
        [
            "_codecs encode",  # bytes, in the pickles that torch writes
            "numpy dtype",
            "numpy ndarray",
            *(
                f"numpy.{core}.{name}"
                for core in ("core", "_core")
                for name in ("multiarray scalar", "multiarray _reconstruct", "numeric _frombuffer")
            ),
        ],
        lambda *_: Numpy(),
    ),
}


def _named(module: Any, name: Any) -> _Call | Name:
    """The object of a name; a new one each time, so that no file can change it for the next file."""
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("its description is damaged")
    known = _KNOWN.get(f"{module} {name}")
    if known is not None:
        return _Call(known)
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return Name(_STORAGES[name])
    if module == "torch" and name.startswith(_TYPES):
        return Name(name)
    raise ValueError(f"it holds {module}.{name}")


def described(content: bytes) -> Any:
    """The dictionaries, lists, plain values and descriptions of tensors in a pickle.

    Raises
    ------
    ValueError
        When it does anything that torch does not do for tensors and plain values.
    """
    reader = _Reader(len(content))
    steps = reader.steps
    for operation, argument, _ in pickletools.genops(content):
        step = steps.get(operation.name)
        if step is None:
            raise ValueError(f"its description uses {operation.name}, which torch does not")
        step(argument)
    if len(reader.stack) != 1 or reader.marks:
        raise ValueError("its description is damaged")
    _count(reader.stack[0], 0, [_MOST_VALUES])
    return reader.stack[0]


def _count(value: Any, level: int, left: list[int]) -> None:
    """Refuse values that share parts so often that iterating over them would not end."""
    left[0] -= 1 + len(value) // 100 if isinstance(value, (str, bytes, bytearray)) else 1
    if level > _MOST_LEVELS or left[0] < 0:
        raise ValueError("its description goes too deep, or repeats itself")
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for inner in value:
        _count(inner, level + 1, left)


#: operations whose argument is the value
_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    "BYTEARRAY8",
)  # fmt: skip


def _key(key: Any) -> str:
    """A key as text: the hashes of numbers and tuples can be foreseen, those of texts cannot."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(part is None or isinstance(part, (str, int, float)) for part in parts):
        raise ValueError("it holds a dictionary with keys other than texts and numbers")
    return str(key)


class _Reader:
    """The stack and the memo of a pickle, and the operations on them."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memory: dict[int, Any] = {}
        push = self.stack.append
        self.steps: dict[str, Callable[[Any], Any]] = {
            **dict.fromkeys(_VALUES, push),
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self.put),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda i: push(self.memory[i])),
            "MEMOIZE": lambda _: self.put(len(self.memory)),
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "POP": lambda _: self.last(1),
            "POP_MARK": lambda _: self.since_mark(),
            "EMPTY_TUPLE": lambda _: push(()),
            "TUPLE1": lambda _: push(tuple(self.last(1))),
            "TUPLE2": lambda _: push(tuple(self.last(2))),
            "TUPLE3": lambda _: push(tuple(self.last(3))),
            "TUPLE": lambda _: push(tuple(self.since_mark())),
            "EMPTY_LIST": lambda _: push([]),
            "LIST": lambda _: push(self.since_mark()),
            "APPEND": lambda _: self.extend(self.last(1)),
            "APPENDS": lambda _: self.extend(self.since_mark()),
            "EMPTY_DICT": lambda _: push({}),
            "DICT": lambda _: self.dictionary(self.since_mark()),
            "SETITEM": lambda _: self.set_items(self.last(2)),
            "SETITEMS": lambda _: self.set_items(self.since_mark()),
            "GLOBAL": lambda both: push(_named(*both.split(" ", 1))),
            "STACK_GLOBAL": lambda _: push(_named(*self.last(2))),
            "REDUCE": lambda _: self.call(*self.last(2)),
            "BUILD": lambda _: self.drop_state(self.last(1)),
            "BINPERSID": lambda _: self.refer(*self.last(1)),
        }

    def put(self, i: int) -> None:
        if i > self.n_bytes:
            raise ValueError("its description is damaged")
        self.memory[i] = self.stack[-1]

    def last(self, n: int) -> list[Any]:
        """Pop values from the stack, above the last mark."""
        lowest = self.marks[-1] if self.marks else 0
        if len(self.stack) - n < lowest:
            raise ValueError("its description is damaged")
        taken = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return taken

    def since_mark(self) -> list[Any]:
        taken = self.last(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return taken

    def dictionary(self, items: list[Any]) -> None:
        self.stack.append({})
        self.set_items(items)

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("its description is damaged")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("its description is damaged")
        target.update((_key(key), value) for key, value in zip(*[iter(items)] * 2, strict=True))

    def call(self, called: Any, given: Any) -> None:
        if not isinstance(called, _Call) or not isinstance(given, tuple):
            raise ValueError("it calls something that torch does not")
        self.stack.append(called.function(*given))

    def drop_state(self, _: Any) -> None:
        """Ignore the state of torch's dictionaries and of numpy's arrays."""
        if not isinstance(self.stack[-1], (dict, Numpy)):
            raise ValueError("it sets the state of something that has none")

    def refer(self, to: Any) -> None:
        word, kind, key, *_ = to if isinstance(to, tuple) and len(to) > 2 else (None,) * 3
        if word != "storage" or not isinstance(kind, Name) or not isinstance(key, str):
            raise ValueError("it refers to something other than the storage of a tensor")
        self.stack.append(Storage(key, kind.name))
