"""Writer of Gatan DM3 and DM4 tag trees, for tests and examples.

A tree is made of plain objects: a dictionary is a group of named tags, a list a group of unnamed ones, a ``str`` an
array of uint16, a numpy array an array of its dtype (structured: an array of structs), a tuple a struct, a number one
value (``int``: uint32, or int64 if needed; numpy scalars keep their type), a `Stream` pixels that are produced lazily.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stem_dask.core.errors import ConfigError

ByteOrder = Literal["<", ">"]

_CODES = {
    "i2": 2, "i4": 3, "u2": 4, "u4": 5, "f4": 6, "f8": 7, "b1": 8, "i1": 9, "u1": 10, "i8": 11, "u8": 12,
}  # fmt: skip

_GROUP, _DATA, _STRUCT, _ARRAY = 20, 21, 15, 20


@dataclass(frozen=True)
class Stream:
    """An array of ``length`` elements whose ``pieces`` are produced while the file is written.

    The pieces follow each other in C order; they are converted to ``dtype`` only where that loses nothing.
    """

    dtype: Any
    length: int
    pieces: Iterable[np.ndarray]

    def __len__(self) -> int:
        return self.length * np.dtype(self.dtype).itemsize

    def encoded(self, order: ByteOrder) -> Iterator[bytes]:
        """Bytes of the pieces; refuses a length that differs from its tag."""
        dtype, left = np.dtype(self.dtype).newbyteorder(order), self.length
        for piece in self.pieces:
            left -= piece.size
            if not np.can_cast(piece.dtype, dtype, "safe"):
                raise ConfigError(
                    f"a piece has dtype {piece.dtype}, which {self.dtype} cannot hold"
                )
            if left < 0:
                break
            yield np.ascontiguousarray(piece, dtype).tobytes()
        if left:
            what = f"{-left:,} more" if left < 0 else f"{left:,} fewer"
            raise ConfigError(f"the pieces have {what} elements than the {self.length:,} announced")


def encode_tags(tree: dict[str, Any], *, version: int = 4, order: ByteOrder = "<") -> bytes:
    """The bytes of a DM file.

    Examples
    --------
    >>> data = encode_tags({"Name": "Au", "Sizes": [3, 4], "Scale": 0.5})
    >>> data[:4], len(data)
    (b'\\x00\\x00\\x00\\x04', 229)
    """
    return b"".join(stream_tags(tree, version=version, order=order))


def stream_tags(
    tree: dict[str, Any], *, version: int = 4, order: ByteOrder = "<"
) -> Iterator[bytes]:
    """Yield the bytes of a DM file piece by piece, so that a `Stream` is never in memory as a whole.

    ``version`` is 3 (32-bit counts) or 4 (64-bit counts), ``order`` the byte order of the values.
    """
    if version not in (3, 4):
        raise ConfigError(f"version is {version}; a DM file has version 3 or 4")
    count = "q" if version == 4 else "i"
    parts = _content(tree, count, order)
    # The size counts from behind the byte order up to the eight zeros at the end.
    yield struct.pack(f">i{count}i", version, sum(map(len, parts)), order == "<")
    for part in parts:
        yield from part.encoded(order) if isinstance(part, Stream) else (part,)
    yield bytes(8)


def _content(value: Any, count: str, order: ByteOrder) -> list[bytes | Stream]:
    """A group from its flags on, or a data tag from its delimiter on."""
    if isinstance(value, dict | list):
        items = list(value.items()) if isinstance(value, dict) else [("", one) for one in value]
        parts: list[bytes | Stream] = [struct.pack(f">BB{count}", 1, 0, len(items))]
        for name, inner in items:
            kind = _GROUP if isinstance(inner, dict | list) else _DATA
            content, encoded = _content(inner, count, order), name.encode("utf-8")
            parts.append(struct.pack(">BH", kind, len(encoded)) + encoded)
            if count == "q":  # only DM4 has the size of a tag
                parts.append(struct.pack(">q", sum(map(len, content))))
            parts += content
        return parts
    is_array = isinstance(value, str | np.ndarray | Stream)
    if isinstance(value, str):
        value = np.frombuffer(value.encode("utf-16-le"), "<u2")
    elif isinstance(value, tuple):  # one record of fields f0, f1, ...
        fields = [_number(field) for field in value]
        value = np.array(value, [(f"f{i}", field.dtype) for i, field in enumerate(fields)])
    elif not is_array:
        value = _number(value)
    info = _element(np.dtype(value.dtype))
    if is_array:
        info = (_ARRAY, *info, value.length if isinstance(value, Stream) else value.size)
    head = b"%%%%" + struct.pack(f">{1 + len(info)}{count}", len(info), *info)
    if isinstance(value, Stream):
        return [head, value]
    return [head + value.astype(value.dtype.newbyteorder(order)).tobytes()]


def _number(value: Any) -> np.ndarray:
    """A number with a DM type."""
    if type(value) is int:
        return np.array(value, np.uint32 if 0 <= value < 2**32 else np.int64)
    return np.array(value)


def _element(dtype: np.dtype) -> tuple[int, ...]:
    """The description of one element: a type code, or a struct of them."""
    if dtype.names is not None:
        codes = [_element(dtype[name])[0] for name in dtype.names]
        return (_STRUCT, 0, len(codes), *(n for code in codes for n in (0, code)))
    if dtype.str[1:] not in _CODES:
        raise ConfigError(
            f"a DM file cannot hold {dtype}; convert it to one of {', '.join(_CODES)}"
        )
    return (_CODES[dtype.str[1:]],)
