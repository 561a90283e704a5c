"""Blosc for zarr arrays of either format that does not read behind the end of a chunk, whatever the chunk's header says.

numcodecs hands a chunk to c-blosc without its length, and c-blosc believes the length in the header: of a damaged chunk
it reads memory that is not there, which ends the process.
"""

import asyncio
import functools
from typing import Any

import numcodecs
import numpy as np
import zarr
from zarr.codecs import BloscCodec
from zarr.registry import register_codec

#: bytes of the header; the last four are the length of the whole, its header included
_HEADER = 16


def check_length(chunk: Any) -> None:
    """Compare the length that the header states with that of the chunk.

    Raises
    ------
    ValueError
        When they differ.

    Examples
    --------
    >>> chunk = numcodecs.Blosc().encode(bytes(100))
    >>> check_length(chunk)
    >>> check_length(chunk[:-1])
    Traceback (most recent call last):
    ValueError: blosc: the header states 116 bytes, the chunk has 115
    """
    content = np.frombuffer(chunk, np.uint8)
    stated = (
        int(content[_HEADER - 4 : _HEADER].view("<u4")[0]) if len(content) >= _HEADER else _HEADER
    )
    if stated != len(content):
        raise ValueError(
            f"blosc: the header states {stated:,} bytes, the chunk has {len(content):,}"
        )


class CarefulBlosc(numcodecs.Blosc):  # type: ignore[misc]
    """The codec of format 2."""

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Decode what is as long as it says."""
        check_length(buf)
        return super().decode(buf, out)


class CarefulBloscCodec(BloscCodec):
    """The codec of format 3."""

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        check_length(chunk_bytes.as_numpy_array())
        return super()._decode_sync(chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)


@functools.cache
def use() -> None:
    """From now on arrays that are opened in this process are read by these codecs."""
    numcodecs.register_codec(CarefulBlosc, "blosc")
    register_codec("blosc", CarefulBloscCodec)
    name = f"{CarefulBloscCodec.__module__}.{CarefulBloscCodec.__qualname__}"
    zarr.config.set({"codecs.blosc": name})
