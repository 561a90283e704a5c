"""Which arrays of a zarr store are opened: numbers and text, through codecs that only decode.

zarr asks numcodecs for every codec that a store names, and one of these unpickles, which runs code. So each document of a
store is compared with lists of names before zarr sees it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from stem_dask.core.errors import SourceError
from stem_dask.storage.errors import one_line

#: what tells of a store in either format; every other file of it is a chunk, or plain attributes
DOCUMENTS = ("zarr.json", ".zarray", ".zmetadata")

#: folders of a store that are looked at before anything is opened
_MOST_NODES = 10_000

_NUMBERS = (
    "adler32", "astype", "base64", "bitround", "blosc", "bz2", "crc32", "crc32c", "delta", "fixedscaleoffset",
    "fletcher32", "gzip", "jenkins_lookup3", "lz4", "lzma", "packbits", "pcodec", "quantize", "shuffle", "zfpy", "zlib",
    "zstd",
)  # fmt: skip

_TEXTS = ("vlen-utf8", "vlen-bytes")

#: identifiers of numcodecs, in format 2
CODECS_2 = frozenset((*_NUMBERS, *_TEXTS))

#: names in format 3, where those of numcodecs have its name before them
CODECS_3 = frozenset((
    *("blosc", "bytes", "crc32c", "endian", "gzip", "sharding_indexed", "transpose", "zstd"),
    *(f"numcodecs.{name}" for name in _NUMBERS), *_TEXTS,
))  # fmt: skip

_RUN_CODE = ("pickle", "numcodecs.pickle")

#: numbers, times, and bytes and text of a fixed length
_DTYPE_2 = re.compile(r"[<>|=]?(b1|\?|[iu][1248]|f[248]|c(8|16)|[SU]\d+|V\d+|[mM]8(\[\w+\])?)")

_DTYPES_3 = frozenset((
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"),
    *("complex64", "complex128", "numpy.datetime64", "numpy.timedelta64", "string", "fixed_length_utf32"),
    *("null_terminated_bytes", "raw_bytes", "structured", "struct", "variable_length_bytes"),
))  # fmt: skip


class HostileStoreError(SourceError):
    """A store with an array that runs code from the file when it is read."""


class GuardedFolder(LocalStore):
    """A folder that zarr reads."""

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """A file, or a part of it; None when it is not there."""
        found = await super().get(key, prototype, byte_range)
        check_document(str(self.root), key, found)
        return found


def check_document(store: str, key: str, content: Buffer | None) -> None:
    """Refuse a document that describes an array which is not to be opened; other files pass.

    Parameters
    ----------
    store, key : folder or URL of the store, and name of the file in it
    content : of the file

    Raises
    ------
    SourceError
        With the name of the array, and the codec or the type that is not on the lists.
    """
    folder, _, name = key.rpartition("/")
    if content is None or name not in DOCUMENTS:
        return
    try:
        document = json.loads(content.to_bytes())
    except ValueError:  # zarr reads it in the same way, and says so in its own words
        return
    _check(store, folder, document)


def refuse_hostile(store: str) -> None:
    """Refuse a folder that holds an array which runs code, also where nothing of this package would open that array.

    Raises
    ------
    HostileStoreError
        With the name of the array.
    """
    waiting = [""]
    for n_seen in range(_MOST_NODES):
        if n_seen == len(waiting):
            return
        name = waiting[n_seen]
        folder, is_array = Path(store, name), False
        for file in DOCUMENTS:
            try:
                document = json.loads((folder / file).read_bytes())
                is_array |= isinstance(document, dict) and "shape" in document
                _check(store, name, document)
            except HostileStoreError:
                raise
            except (OSError, ValueError):  # not there, or not to be opened
                continue
        if not is_array:
            children = (
                entry for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)
            )
            waiting += [f"{name}/{child.name}".lstrip("/") for child in children]


def _check(store: str, name: str, document: Any) -> None:
    if not isinstance(document, dict):
        return
    where = f"{store}: array {one_line(name) or '/'}"
    if "dtype" in document or "compressor" in document or "filters" in document:
        _check_format_2(where, document)
    if "data_type" in document or "codecs" in document:
        _check_codecs_3(where, document.get("codecs"))
        data_type = document.get("data_type")
        kind = data_type.get("name") if isinstance(data_type, dict) else data_type
        if not (isinstance(kind, str) and kind in _DTYPES_3):
            raise _unknown(where, f"holds numbers of the type {one_line(kind)}")
    for holder in (document, document.get("consolidated_metadata")):
        nodes = holder.get("metadata") if isinstance(holder, dict) else None
        if isinstance(nodes, dict):
            for path, node in nodes.items():
                _check(store, f"{name}/{path}".strip("/").removesuffix("/.zarray"), node)


def _check_format_2(where: str, document: dict[str, Any]) -> None:
    filters = document.get("filters") or []
    codecs = [*(filters if isinstance(filters, list) else [filters]), document.get("compressor")]
    names = {_checked(where, codec, "id", CODECS_2) for codec in codecs if codec is not None}
    kind: Any = document.get("dtype")
    kinds = [field[1] for field in kind] if _is_structure(kind) else [kind]
    if not (all(map(_is_plain, kinds)) or (kind == "|O" and names.intersection(_TEXTS))):
        raise _unknown(where, f"holds numbers of the type {one_line(kind)}")


def _check_codecs_3(where: str, codecs: Any) -> None:
    for codec in codecs if isinstance(codecs, list) else ():
        if isinstance(codec, str):
            codec = {"name": codec}
        _checked(where, codec, "name", CODECS_3)
        configuration = codec.get("configuration")
        if isinstance(configuration, dict):  # of shards
            _check_codecs_3(where, configuration.get("codecs"))
            _check_codecs_3(where, configuration.get("index_codecs"))


def _checked(where: str, codec: Any, key: str, known: frozenset[str]) -> str:
    """The name of a codec that may be used, with types of numbers only."""
    name = codec.get(key) if isinstance(codec, dict) else codec
    if name in _RUN_CODE:
        raise HostileStoreError(
            f"{where} uses the codec {name}, which runs code from the file and is refused; remove the array, or save "
            "it as numbers"
        )
    if not (isinstance(codec, dict) and isinstance(name, str) and name in known):
        raise _unknown(where, f"is coded as {one_line(name)}")
    options = codec.get("configuration") if key == "name" else codec
    for option, value in options.items() if isinstance(options, dict) else ():
        if option.endswith("dtype") and not _is_plain(value):
            raise _unknown(where, f"is coded as {name} of the type {one_line(value)}")
    return name


def _is_structure(kind: Any) -> bool:
    return isinstance(kind, list) and all(isinstance(f, list) and len(f) > 1 for f in kind)


def _is_plain(kind: Any) -> bool:
    return isinstance(kind, str) and (kind in _DTYPES_3 or _DTYPE_2.fullmatch(kind) is not None)


def _unknown(where: str, how: str) -> SourceError:
    return SourceError(
        f"{where} {how}, which is not known here; save it again as numbers, with blosc, zstd or gzip, where it can be read"
    )
