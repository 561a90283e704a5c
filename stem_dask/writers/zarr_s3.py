"""A zarr store in an object store: tasks upload the shards, everything else follows after the last block.

Object stores cannot rename. Shards get their final names; the small rest is built in a local folder and uploaded at the end, the
zarr.json of the root last: without it readers of zarr find no store. Removing it also invalidates an older output.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import Block, of_type
from stem_dask.core.errors import StoreError
from stem_dask.core.model import Record, Region
from stem_dask.storage.location import Status, at, of_output
from stem_dask.storage.publish import DOCUMENT, remove
from stem_dask.writers.zarr import StoreSink, shard_pieces

#: small objects uploaded at once
AT_ONCE = 8


@dataclass(frozen=True)
class ObjectStoreSink(StoreSink):
    """Uploads the block ``patterns`` as a shard; ``path`` is the local folder of the rest.

    An encoded shard is in memory as a whole until it is uploaded.
    """

    url: str = ""

    def create(self, *, resume: bool) -> None:
        """Invalidate the older output; remove its shards, or keep those of the run that is resumed."""
        at(self.url, DOCUMENT).unlink()
        if resume and self._is_begun():
            return
        super().create(resume=False)
        at(self.url).remove_below()

    def write(
        self, index: int, region: Region, blocks: Mapping[str, NDArray | Block]
    ) -> dict[str, Any]:
        """Upload one shard; its ETag is recorded."""
        name = self._shard(region)
        block = of_type(blocks["patterns"], np.dtype(self.dtype))
        pieces = shard_pieces(block, region, self.inner, self.shards, self.codec)
        content = b"".join(pieces)
        etag = at(self.url, name).write_bytes(content)
        return {"shard": name, "etag": etag, "bytes": len(content)}

    def verify(self, record: Record) -> str | None:
        """Compare size and ETag of the shard without reading it: that finds missing, truncated and replaced shards."""
        url = f"{self.url}/{record.extra.get('shard')}"
        with of_output():
            try:
                return _differs(url, record, at(url).stat())
            except FileNotFoundError:
                return _differs(url, record, None)

    def finish(self, records: Sequence[Record]) -> None:
        """Compare all shards with their records in one listing."""
        with of_output():
            there = dict(at(self.url, "patterns").below())
        for record in records:
            name = str(record.extra["shard"])
            status = there.get(name.removeprefix("patterns/"))
            if (what := _differs(f"{self.url}/{name}", record, status)) is not None:
                raise StoreError(f"{what}; the same command writes it again")


def _differs(url: str, record: Record, found: Status | None) -> str | None:
    """Describe how a shard differs from its record; None if it does not."""
    if found is None:
        return f"{url} is missing"
    if found.st_size != record.extra.get("bytes"):
        return f"{url} has {found.st_size:,} bytes, not the {record.extra.get('bytes', 0):,} that were written"
    if found.etag != record.extra.get("etag"):
        return f"{url} was replaced by another object (ETag)"
    return None


def publish_objects(built: str, url: str) -> None:
    """Upload a local folder after the shards, the zarr.json of the root last, and remove the folder."""
    names = [str(path.relative_to(built)) for path in sorted(Path(built).rglob("*"))]
    files = [name for name in names if name != DOCUMENT and Path(built, name).is_file()]

    def send(name: str) -> None:
        at(url, name).write_bytes(Path(built, name).read_bytes())

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(send, files):
            pass
    send(DOCUMENT)
    remove(built)
