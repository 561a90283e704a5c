"""Zarr stores read safely: only numbers and text, through codecs on a fixed list, and blosc chunks of the stated length.

zarr asks numcodecs for every codec that a store names, and one of these unpickles, which runs code. Each document of a store
is therefore checked before zarr sees it. numcodecs hands c-blosc a chunk without its length, and c-blosc trusts the length in
the header: a damaged chunk would crash the process.
"""

import asyncio
import functools
import json
import os
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.codecs import BloscCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.registry import register_codec
from zarr.storage import LocalStore, ObjectStore

from stem_dask.core.errors import SourceError
from stem_dask.storage.errors import one_line
from stem_dask.storage.location import answered, opened

#: documents that describe arrays; all other files of a store are chunks or plain attributes
DOCUMENTS = ("zarr.json", ".zarray", ".zmetadata")

_TEXTS = {"vlen-utf8", "vlen-bytes"}

#: codecs of both formats, without the prefix ``numcodecs.``
_CODECS = _TEXTS | {
    "adler32", "astype", "base64", "bitround", "blosc", "bytes", "bz2", "crc32", "crc32c", "delta", "endian",
    "fixedscaleoffset", "fletcher32", "gzip", "jenkins_lookup3", "lz4", "lzma", "packbits", "pcodec", "quantize",
    "sharding_indexed", "shuffle", "transpose", "zfpy", "zlib", "zstd",
}  # fmt: skip

#: types of format 2: numbers, times, and bytes and text of a fixed length
_DTYPE_2 = re.compile(r"[<>|=]?(b1|\?|[iu][1248]|f[248]|c(8|16)|[SU]\d+|V\d+|[mM]8(\[\w+\])?)")

#: types of format 3
_DTYPES_3 = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "complex64", "complex128", "numpy.datetime64", "numpy.timedelta64", "string", "fixed_length_utf32",
    "null_terminated_bytes", "raw_bytes", "structured", "struct", "variable_length_bytes",
}  # fmt: skip


class HostileStoreError(SourceError):
    """A store with an array that runs code from the file when it is read."""


class GuardedFolder(LocalStore):
    """A local store whose documents are checked."""

    async def get(self, key: str, *args: Any, **options: Any) -> Buffer | None:
        """A file, or a part of it; None when it is missing."""
        found = await super().get(key, *args, **options)
        check_document(str(self.root), key, found)
        return found


class GuardedObjects(ObjectStore):
    """zarr's own store, whose documents are checked, and whose errors are translated.

    Parameters
    ----------
    url : of the store
    whole : a missing chunk raises an error, where zarr would read its fill value
    """

    def __init__(self, url: str, *, whole: bool = False) -> None:
        super().__init__(opened(url, below=True)[0], read_only=True)
        self.url, self.whole = url, whole

    def __str__(self) -> str:
        return self.url

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """An object, or a part of it; None when it is missing and may be."""
        with answered(f"{self.url}/{key}", SourceError):
            found = await super().get(key, prototype, byte_range)
        is_chunk = key.rpartition("/")[2] not in (*DOCUMENTS, ".zattrs", ".zgroup")
        if found is None and self.whole and is_chunk:
            raise SourceError(
                f"{self.url}/{key} is missing; copy it again, or set input.missing_chunks=zero to read these patterns as zeros"
            )
        check_document(self.url, key, found)
        return found

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several parts at once."""
        return await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))

    async def exists(self, key: str) -> bool:
        """Whether there is an object of this name."""
        with answered(f"{self.url}/{key}", SourceError):
            return await super().exists(key)

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Names directly below one."""
        with answered(f"{self.url}/{prefix}", SourceError):
            names = [name async for name in super().list_dir(prefix)]
        for name in names:
            yield name


def check_document(store: str, key: str, content: Buffer | None) -> None:
    """Refuse the file ``key`` of a store if it describes an array that is not to be opened; other files pass."""
    folder, _, name = key.rpartition("/")
    if content is not None and name in DOCUMENTS:
        try:
            document = json.loads(content.to_bytes())
        except ValueError:  # zarr reports it
            return
        _check(store, folder, document)


def refuse_hostile(store: str) -> None:
    """Refuse a folder that holds an array which runs code, even if that array would not be opened."""
    folders = [Path(store)]
    for folder in folders:
        name, is_array = "" if folder == folders[0] else str(folder.relative_to(store)), False
        for file in DOCUMENTS:
            try:
                document = json.loads((folder / file).read_bytes())
                is_array |= isinstance(document, dict) and "shape" in document
                _check(store, name, document)
            except HostileStoreError:
                raise
            except (OSError, ValueError):  # missing, or refused when it is opened
                continue
        if not is_array:
            entries = os.scandir(folder)
            folders += [Path(one.path) for one in entries if one.is_dir(follow_symlinks=False)]


def _check(store: str, name: str, document: Any) -> None:
    """Check what describes an array, in format 2 or 3, and the arrays of consolidated metadata."""
    if not isinstance(document, dict):
        return
    where, names, fault = f"{store}: array {one_line(name) or '/'}", set[str](), ""
    for codec in _codecs(document):
        stated = {codec[key] for key in ("id", "name") if isinstance(codec.get(key), str)}
        names |= stated
        if hostile := stated & {"pickle", "numcodecs.pickle"}:
            raise HostileStoreError(
                f"{where} uses the codec {hostile.pop()}, which runs code from the file and is refused; remove the array, or "
                "save it as numbers"
            )
        configuration = codec.get("configuration")
        options = {**codec, **(configuration if isinstance(configuration, dict) else {})}
        kinds = [value for option, value in options.items() if option.endswith("dtype")]
        if not {one.removeprefix("numcodecs.") for one in stated} <= _CODECS or not stated:
            fault = f"is coded as {one_line(stated.pop() if stated else codec)}"
        elif not all(map(_is_plain, kinds)):
            fault = f"is coded as {stated.pop()} of the type {one_line(kinds[0])}"
    for key in {"dtype", "data_type"} & document.keys():
        kind = document[key]
        is_structure = isinstance(kind, list) and all(
            isinstance(f, list) and len(f) > 1 for f in kind
        )
        fields = [field[1] for field in kind] if is_structure else [kind]
        fields = [field.get("name") if isinstance(field, dict) else field for field in fields]
        if not all(map(_is_plain, fields)) and not (kind == "|O" and names & _TEXTS):
            fault = fault or f"holds numbers of the type {one_line(kind)}"
    if fault:
        raise SourceError(
            f"{where} {fault}, which is not known here; save it again as numbers, with blosc, zstd or gzip, where it can be read"
        )
    for holder in (document, document.get("consolidated_metadata")):
        nodes = holder.get("metadata") if isinstance(holder, dict) else None
        for path, node in nodes.items() if isinstance(nodes, dict) else ():
            _check(store, f"{name}/{path}".strip("/").removesuffix("/.zarray"), node)


def _codecs(holder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All codecs of an array, also those within shards."""
    for key in ("filters", "compressor", "codecs", "index_codecs"):
        listed = holder.get(key) or []
        for codec in listed if isinstance(listed, list) else [listed]:
            codec = codec if isinstance(codec, dict) else {"name": codec}
            yield codec
            if isinstance(codec.get("configuration"), dict):
                yield from _codecs(codec["configuration"])


def _is_plain(kind: Any) -> bool:
    return isinstance(kind, str) and (kind in _DTYPES_3 or _DTYPE_2.fullmatch(kind) is not None)


def check_length(chunk: Any) -> None:
    """Compare the length that the 16 bytes of a blosc header state with that of the chunk.

    Examples
    --------
    >>> check_length(numcodecs.Blosc().encode(bytes(100))[:-1])
    Traceback (most recent call last):
    ValueError: blosc: the header states 116 bytes, the chunk has 115
    """
    content = np.frombuffer(chunk, np.uint8)
    stated = int(content[12:16].view("<u4")[0]) if len(content) >= 16 else 16
    if stated != len(content):
        raise ValueError(
            f"blosc: the header states {stated:,} bytes, the chunk has {len(content):,}"
        )


class CheckedBlosc(numcodecs.Blosc):  # type: ignore[misc]
    """The codec of format 2."""

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Decode a chunk of the length that it states."""
        check_length(buf)
        return super().decode(buf, out)


class CheckedBloscCodec(BloscCodec):
    """The codec of format 3; zarr's codecs are extended by overriding ``_decode_single``."""

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        check_length(chunk_bytes.as_numpy_array())
        return await super()._decode_single(chunk_bytes, chunk_spec)


@functools.cache
def use_checked_blosc() -> None:
    """Arrays that are opened in this process from now on are decoded by these codecs."""
    numcodecs.register_codec(CheckedBlosc, "blosc")
    register_codec("blosc", CheckedBloscCodec)
    name = f"{CheckedBloscCodec.__module__}.{CheckedBloscCodec.__qualname__}"
    zarr.config.set({"codecs.blosc": name})
