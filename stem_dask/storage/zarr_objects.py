"""A read-only zarr store of the objects below a URL."""

import asyncio
from collections.abc import AsyncGenerator, Iterable

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from stem_dask.core.errors import SourceError
from stem_dask.storage.location import answered, opened
from stem_dask.storage.zarr_guard import DOCUMENTS, check_document


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
