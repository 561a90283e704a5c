"""A read-only zarr store of the objects below a URL."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

from stem_dask.core.errors import SourceError
from stem_dask.storage.s3 import asked_later, below, located
from stem_dask.storage.zarr_guard import check_document

#: documents that may be missing; every other object is a chunk
_DOCUMENTS = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


class ObjectsBelow(Store):
    """A read-only zarr store.

    Parameters
    ----------
    url : of the store
    whole : a missing chunk raises an error, where zarr would read its fill value
    """

    def __init__(self, url: str, *, whole: bool = False) -> None:
        super().__init__(read_only=True)
        self.url, self.whole = url, whole

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectsBelow) and (self.url, self.whole) == (
            other.url,
            other.whole,
        )

    def __hash__(self) -> int:
        return hash((self.url, self.whole))

    def __str__(self) -> str:
        return self.url

    __repr__ = __str__

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """An object, or a part of it; None when it is missing and may be."""
        url = f"{self.url}/{key}"
        try:
            content = await asked_later(url, _get(url, byte_range))
        except FileNotFoundError:
            if self.whole and key.rpartition("/")[2] not in _DOCUMENTS:
                raise SourceError(
                    f"{url} is missing; copy it again, or set input.missing_chunks=zero to read these patterns "
                    "as zeros"
                ) from None
            return None
        found = prototype.buffer.from_bytes(content)
        check_document(self.url, key, found)
        return found

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several parts at once."""
        return await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))

    async def exists(self, key: str) -> bool:
        """Whether there is an object of this name."""
        store, place = located(f"{self.url}/{key}")
        import obstore

        try:
            await asked_later(f"{self.url}/{key}", obstore.head_async(store, place))
        except FileNotFoundError:
            return False
        return True

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse to write."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Refuse to delete."""
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """Names of all objects."""
        for name, _ in below(self.url):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Names of all objects that begin so."""
        for name, _ in below(self.url):
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names directly below one."""
        url = f"{self.url}/{prefix}".rstrip("/")
        store, key = located(url)
        import obstore

        found: Any = await asked_later(url, obstore.list_with_delimiter_async(store, key))
        for path in (*found["common_prefixes"], *(one["path"] for one in found["objects"])):
            yield str(path).rstrip("/").rpartition("/")[2]


async def _get(url: str, part: ByteRequest | None) -> Any:
    store, key = located(url)
    import obstore

    if isinstance(part, RangeByteRequest):
        return await obstore.get_range_async(store, key, start=part.start, end=part.end)
    options: Any = {}
    if isinstance(part, OffsetByteRequest):
        options = {"range": {"offset": part.offset}}
    elif isinstance(part, SuffixByteRequest):
        options = {"range": {"suffix": part.suffix}}
    found = await obstore.get_async(store, key, options=options)
    return await found.bytes_async()
