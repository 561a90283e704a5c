"""A zarr store that is written into an object store: shards by the workers, everything else once the blocks are there.

Object stores have no rename. Shards are put under the final name, and the small rest is built in a folder here, as that
of a local store is; at the end it is sent after them, and last of all the document of the root, without which nothing
that reads zarr finds a store. Removing that document is also how an older output ends.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import InPieces, of_type
from stem_dask.core.errors import StoreError
from stem_dask.core.model import Record, Region
from stem_dask.storage import s3 as objects
from stem_dask.storage.publish import DOCUMENT, remove
from stem_dask.writers.shards import shard_pieces
from stem_dask.writers.zarr import StoreSink

#: small objects that are on their way at once
AT_ONCE = 8


@dataclass(frozen=True)
class ObjectStoreSink(StoreSink):
    """Puts the block ``patterns`` under its name; ``path`` is the folder here in which the rest is built.

    A shard is held whole, encoded, and then joined, until it is sent.
    """

    url: str = ""

    def create(self, *, resume: bool) -> None:
        """End the older output; then begin anew, or keep the shards that are there when resuming."""
        objects.remove(f"{self.url}/{DOCUMENT}")
        if resume and self._is_begun():
            return
        super().create(resume=False)
        objects.remove_below(self.url)

    def write(
        self, index: int, region: Region, blocks: Mapping[str, NDArray | InPieces]
    ) -> dict[str, Any]:
        """Put one shard; its mark (ETag) tells later whether it is still the same."""
        name = self._shard(region)
        block = of_type(blocks["patterns"], np.dtype(self.dtype))
        pieces = shard_pieces(block, region, self.inner, self.shards, self.codec)
        content = b"".join(pieces)
        etag = objects.put(f"{self.url}/{name}", content)
        return {"shard": name, "etag": etag, "bytes": len(content)}

    def verify(self, record: Record) -> str | None:
        """Ask the store for length and mark of the shard: nothing is read.

        That finds what is missing, cut or replaced. Against bits that flip the store has checksums of its own, and every
        chunk has one for whoever reads it.
        """
        url = f"{self.url}/{record.extra.get('shard')}"
        with objects.of_output():
            try:
                return _differs(url, record, objects.look(url))
            except FileNotFoundError:
                return _differs(url, record, None)

    def finish(self, records: Sequence[Record]) -> None:
        """See that every shard is there, in one listing."""
        with objects.of_output():
            there = dict(objects.below(f"{self.url}/patterns"))
        for record in records:
            name = str(record.extra["shard"])
            status = there.get(name.removeprefix("patterns/"))
            if (what := _differs(f"{self.url}/{name}", record, status)) is not None:
                raise StoreError(f"{what}; the same command makes it again")


def _differs(url: str, record: Record, found: objects.Status | None) -> str | None:
    """In what a shard is not as its record says; None when it is."""
    if found is None:
        return f"{url} is missing"
    if found.st_size != record.extra.get("bytes"):
        return f"{url} has {found.st_size:,} bytes, not the {record.extra.get('bytes', 0):,} that were written"
    if found.etag != record.extra.get("etag"):
        return f"{url} is not what was written: another object has its name (ETag)"
    return None


def publish_objects(built: str, url: str) -> None:
    """Send what was built in a folder after the shards, the document of the root last, and remove the folder.

    Raises
    ------
    StoreError
        When something cannot be written: the same command goes on.
    """
    names = [str(path.relative_to(built)) for path in sorted(Path(built).rglob("*"))]
    files = [name for name in names if name != DOCUMENT and Path(built, name).is_file()]

    def send(name: str) -> None:
        objects.put(f"{url}/{name}", Path(built, name).read_bytes())

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(send, files):
            pass
    send(DOCUMENT)
    remove(built)
