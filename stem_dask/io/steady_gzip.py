"""zarr's gzip codec without the time of day, which it writes into every chunk: the same data give the same bytes."""

import asyncio
import gzip
from typing import Any

import zarr
from zarr.codecs import GzipCodec
from zarr.core.buffer.cpu import as_numpy_array_wrapper
from zarr.registry import register_codec


class SteadyGzip(GzipCodec):
    """Encodes as gzip says, with the time left at 0; decodes as zarr does."""

    def _encode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return as_numpy_array_wrapper(self._packed, chunk_bytes, chunk_spec.prototype)

    async def _encode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._encode_sync, chunk_bytes, chunk_spec)

    def _packed(self, content: Any) -> bytes:
        return gzip.compress(content, self.level, mtime=0)


def use() -> None:
    """From now on arrays of this process that are opened to be written with gzip are written by this one.

    Not only for a while: other tasks of the process open arrays meanwhile.
    """
    register_codec("gzip", SteadyGzip)
    zarr.config.set({"codecs.gzip": f"{SteadyGzip.__module__}.{SteadyGzip.__qualname__}"})
