"""Pages of a TIFF file that do not lie in it as they are: compressed, in tiles, or in strips here and there.

Each strip or tile is decoded by itself when it is read, into no more bytes than it must have. Of the directories, which
are a chain through the file, only every n-th is kept, so that a stack of any length opens in little memory.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import SourceError
from stem_dask.io.damage import COPY, told
from stem_dask.io.publish import named
from stem_dask.io.sources import Slices
from stem_dask.io.tiff_directory import READ, Directories, Page

#: names that imagecodecs has for compressions
_DECODERS = {5: "lzw", 32773: "packbits", 34925: "lzma", 50000: "zstd"}


@dataclass(frozen=True)
class PackedPages:
    """A stack (n, ky, kx) of pages.

    Parameters
    ----------
    path : name of the file
    dtype : of the pixels, in the byte order of the file
    frame_shape : (ky, kx)
    count : number of pages
    known : where the directories of pages 0, step, 2 * step … are
    step : see ``known``
    chunk_bytes : those of a strip or tile when it is decoded
    planes : pages that each directory describes
    """

    path: str
    dtype: np.dtype
    frame_shape: tuple[int, int]
    count: int
    known: tuple[int, ...]
    step: int
    chunk_bytes: int
    planes: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, ky, kx)."""
        return (self.count, *self.frame_shape)

    def __getitem__(self, part: Slices) -> NDArray:
        frames, rows, columns = (
            range(*s.indices(n)) for s, n in zip(part, self.shape, strict=True)
        )
        out = np.empty((len(frames), len(rows), len(columns)), self.dtype)
        if out.size == 0:
            return out
        whole = np.empty(self.frame_shape, self.dtype)
        wanted = (slice(rows.start, rows.stop, rows.step), slice(columns.start, columns.stop, columns.step))  # fmt: skip
        with named(self.path), open(self.path, "rb") as stream:
            directories = Directories(self.path, stream, self.planes)
            pages = zip(frames, self._pages(directories, frames), strict=True)
            for target, (number, page) in zip(out, pages, strict=True):
                for i in _overlapping(page, rows, columns):
                    _decode(directories, page, number, i, whole)
                target[...] = whole[wanted]
        return out

    def _pages(self, directories: Directories, frames: range) -> Iterator[Page]:
        """What is said of some pages, in rising order."""
        number, at = 0, self.known[0]  # of the directory that is read next
        entries: dict[int, Any] = {}
        for frame in frames:
            wanted = frame // self.planes
            nearest = wanted // self.step
            if nearest * self.step > number:
                number, at = nearest * self.step, self.known[nearest]
            while number <= wanted:
                entries, at = directories.read(at)
                number += 1
                if not at and number < self.count // self.planes:
                    directories.fail(
                        f"there are {number:,} pages, where {self.count // self.planes:,} were"
                    )
            page = directories.page(entries).plane(frame % self.planes)
            if (page.shape, page.dtype) != (self.frame_shape, self.dtype):
                directories.fail(f"page {frame + 1:,} is {page.shape} {page.dtype} now")
            yield page


def _overlapping(page: Page, rows: range, columns: range) -> Iterator[int]:
    """Numbers of the parts that hold some of these rows and columns."""
    height, width = page.part
    for y in range(rows[0] // height, rows[-1] // height + 1):
        for x in range(columns[0] // width, columns[-1] // width + 1):
            yield y * page.grid[1] + x


def _decode(directories: Directories, page: Page, number: int, part: int, whole: NDArray) -> None:
    """Put the pixels of a strip or tile to their place in the page."""
    shape = page.stored(part)
    n_bytes = page.n_bytes(part)
    kind = f"{'tile' if page.tiled else 'strip'} {part + 1:,} of page {number + 1:,}"
    length = n_bytes if page.compression == 1 else int(page.counts[part])
    content = directories.take(int(page.offsets[part]), length)
    with told(f"{directories.path}: {kind} cannot be decoded from {READ[page.compression]}"):
        content = unpacked(content, page.compression, n_bytes)
    if len(content) != n_bytes:
        more = "more" if len(content) > n_bytes else f"{len(content):,}"
        raise SourceError(
            f"{directories.path}: {kind} decodes to {more} bytes, where {n_bytes:,} were expected; {COPY}"
        )
    if page.dtype.kind == "b":
        bits = np.frombuffer(content, np.uint8).reshape(shape[0], -1)
        values = np.unpackbits(bits, axis=1, count=shape[1]).view(np.bool_)
    else:
        values = undone(np.frombuffer(content, page.dtype).reshape(shape), page.predictor)
    y, x = (i * n for i, n in zip(divmod(part, page.grid[1]), page.part, strict=True))
    place = whole[y : y + shape[0], x : x + shape[1]]
    place[...] = values[: place.shape[0], : place.shape[1]]


def unpacked(content: bytes, compression: int, n_bytes: int) -> bytes:
    """The bytes of a strip or tile, and at most one more than it must have: no bomb goes off.

    Raises
    ------
    Exception
        Of the codec, when the content is damaged.

    Examples
    --------
    >>> unpacked(bytes([0xFB, 55, 1, 97, 98]), 32773, 8)
    b'777777ab'
    >>> len(unpacked(zlib.compress(bytes(10**6)), 8, 60))
    61
    """
    if compression == 1:
        return content
    if READ[compression] == "deflate":
        stream = zlib.decompressobj()
        found = stream.decompress(content, n_bytes + 1)
        if len(found) <= n_bytes and not stream.eof:
            raise ValueError("it ends too early")
        return found
    import imagecodecs

    decode = getattr(imagecodecs, f"{_DECODERS[compression]}_decode")
    return bytes(decode(content, out=n_bytes + 1))


def undone(values: NDArray, predictor: int) -> NDArray:
    """Pixels from what the predictor made of them: 1 nothing, 2 differences along a row, 3 those of real numbers.

    Parameters
    ----------
    values : (rows, columns) as decoded, in the byte order of the file
    predictor : see https://www.loc.gov/preservation/digital/formats/content/tiff_tags.shtml, tag 317

    Examples
    --------
    >>> undone(np.array([[250, 10, 0]], "u1"), 2).tolist()
    [[250, 4, 4]]
    """
    if predictor == 1:
        return values
    rows, columns = values.shape
    size, native = values.dtype.itemsize, values.dtype.newbyteorder("=")
    if predictor == 2:  # of the bits as whole numbers, which wrap
        unsigned = np.dtype(f"u{size}")
        stored = values.view(unsigned.newbyteorder(values.dtype.byteorder))
        return np.cumsum(stored, axis=1, dtype=unsigned).view(native)
    # the highest bytes of a row come first, then the next ones …, whatever the byte order of the file
    sums = np.cumsum(values.view(np.uint8), axis=1, dtype=np.uint8)
    planes = sums.reshape(rows, size, columns).transpose(0, 2, 1)
    return np.ascontiguousarray(planes).view(native.newbyteorder(">")).reshape(rows, columns)
