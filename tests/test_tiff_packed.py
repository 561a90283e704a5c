"""Compressed and tiled TIFF stacks, as tifffile and Pillow write them, and what a bomb or a damaged one is told."""

import itertools
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from frames_made import numbers, tiff
from PIL import Image

import stem_dask as sd
from stem_dask.errors import SourceError
from stem_dask.io.frames import FramedFile
from stem_dask.io.read import find
from stem_dask.io.tiff_packed import PackedPages, undone
from stem_dask.pipeline import run

SHAPE = (3, 4, 21, 37)
TYPES = ("u1", "u2", "u4", "i2", "f4", "f8")
CODECS = ("adobe_deflate", "deflate", "lzw", "packbits", None)
#: byte order, and whether it is BigTIFF
KINDS = (("<", False), (">", False), (">", True))
PARTS: tuple[dict[str, Any], ...] = ({}, {"rowsperstrip": 5}, {"tile": (16, 32)})


def counts(dtype: str) -> np.ndarray:
    """Sparse counts, as a camera has them, of all signs and magnitudes of the type."""
    rng = np.random.default_rng(5)
    array = rng.poisson(0.7, SHAPE).astype(dtype)
    kind = np.dtype(dtype).kind
    array[0, 0, :, 3] = 1.37 if kind == "f" else np.iinfo(dtype).max
    array[1, 1, 4] = -2.5 if kind == "f" else np.iinfo(dtype).min
    return array


def whole(source: Any) -> np.ndarray:
    return source[tuple(slice(0, n) for n in source.shape)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_what_tifffile_writes(tmp_path: Path, dtype: str, codec: str | None) -> None:
    array, path = counts(dtype), tmp_path / "a.tif"
    predictors = [None, *([2] if dtype[0] != "f" else [3])][: 1 + (codec not in ("packbits", None))]
    for (order, big), predictor, part in itertools.product(KINDS, predictors, PARTS):
        tifffile.imwrite(
            path, array, byteorder=order, bigtiff=big, compression=codec, predictor=predictor,
            photometric="minisblack", **part,
        )  # fmt: skip
        found = find(path)  # the scan is in tifffile's description
        assert found.source.dtype == np.dtype(dtype).newbyteorder(order)
        np.testing.assert_array_equal(whole(found.source), array)
        part = (slice(1, 3), slice(1, 4, 2), slice(3, 20, 4), slice(33, 36))
        np.testing.assert_array_equal(found.source[part], array[part])


@pytest.mark.parametrize("codec", ["zstd", "lzma"])
def test_newer_codecs(tmp_path: Path, codec: str) -> None:
    for dtype, predictor, part in (("u2", 2, PARTS[1]), (">f4", 3, PARTS[2]), ("u1", False, {})):
        array = counts(dtype)
        tifffile.imwrite(tmp_path / "a.tif", array, compression=codec, predictor=predictor,
                         photometric="minisblack", **part)  # fmt: skip
        np.testing.assert_array_equal(whole(find(tmp_path / "a.tif").source), array)


@pytest.mark.parametrize("options", [{}, {"compression": "packbits"}, {"tile": (16, 16)}])
def test_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    array = counts("u1") > 0
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **options)
    source: Any = find(tmp_path / "a.tif").source
    assert source.dtype == bool
    np.testing.assert_array_equal(whole(source), array)
    np.testing.assert_array_equal(source[1:2, :, 3:9, 30:], array[1:2, :, 3:9, 30:])


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}])
def test_scan_lines_that_tifffile_takes_for_colours(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Of 3 or 4 patterns in a line it makes one page of so many planes; its description has the shape that was meant."""
    array, path = counts("u2"), tmp_path / "a.tif"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tifffile.imwrite(path, array, photometric=None, **options)
    with tifffile.TiffFile(path) as file:
        assert [page.samplesperpixel for page in file.pages] == [4, 4, 4]
    source: Any = find(path).source
    np.testing.assert_array_equal(whole(source), array)
    np.testing.assert_array_equal(source[1:3, 1:4:2, 5:9, :], array[1:3, 1:4:2, 5:9])
    tifffile.imwrite(path, array, photometric="rgb", planarconfig="separate", metadata=None)
    with pytest.raises(SourceError, match=r"4 values a pixel \(expected 1\)"):
        find(path)


@pytest.mark.parametrize("codec", ["tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("predictor", [1, 2, 3])
def test_what_libtiff_writes(tmp_path: Path, codec: str, predictor: int) -> None:
    """Through Pillow; differences of real numbers are those of their bits, which tifffile cannot write."""
    if codec == "packbits" and predictor != 1:
        return
    for dtype in ("f4",) if predictor == 3 else ("u1", "u2", "i4", "f4"):
        array = counts(dtype).reshape(-1, *SHAPE[2:])
        first, *others = [Image.fromarray(page) for page in array]
        tags = {317: predictor, 278: 5} if predictor > 1 else {}
        first.save(
            tmp_path / "a.tif",
            save_all=True,
            append_images=others,
            compression=codec,
            tiffinfo=tags,
        )
        found = find(tmp_path / "a.tif", scan_shape=(3, 4))
        np.testing.assert_array_equal(whole(found.source), array.reshape(SHAPE))


def test_differences_wrap_and_bytes_are_apart() -> None:
    """Against the definition, a value at a time."""
    values = np.array([[65535, 3, 0], [1, 65534, 2]], ">u2")
    sums = [[65535, 2, 2], [1, 65535, 1]]
    assert undone(values, 2).tolist() == sums
    real = np.array([[1.5, -2.25, 3e30]], "f4")
    planes = real.astype(">f4").view("u1").reshape(3, 4).T.ravel()
    apart = np.diff(planes, prepend=np.uint8(0))
    for order in "<>":
        assert undone(apart.view(f"{order}f4").reshape(1, 3), 3).tolist() == real.tolist()


def test_plain_pages_here_and_there(tmp_path: Path) -> None:
    """In tiles, and with strips in another order than that of the rows; pages in a row need none of this."""
    array = counts("u2")
    tifffile.imwrite(tmp_path / "a.tif", array, tile=(16, 16), photometric="minisblack")
    source: Any = find(tmp_path / "a.tif").source
    assert isinstance(source.source, PackedPages)
    np.testing.assert_array_equal(whole(source), array)
    path = tiff(tmp_path / "b.tif", numbers((2, 6, 5)), strips=2)
    content = path.read_bytes()
    straight: Any = find(path, scan_shape=(1, 2)).source
    assert isinstance(straight.source, FramedFile)
    at = content.index(struct.pack("<2I", 8, 8 + 30))
    path.write_bytes(content[:at] + struct.pack("<2I", 8 + 30, 8) + content[at + 8 :])
    turned: Any = find(path, scan_shape=(1, 2)).source
    assert isinstance(turned.source, PackedPages)
    expected = numbers((1, 2, 6, 5))
    expected[0, 0] = np.roll(expected[0, 0], 3, axis=0)
    np.testing.assert_array_equal(whole(turned), expected)


def test_a_job_of_it(tmp_path: Path, make_config: Any) -> None:
    array = np.zeros((3, 4, 24, 20), "u2")
    array[..., 8:14, 7:13] = numbers((3, 4, 6, 6)) % 50 + 1
    tifffile.imwrite(tmp_path / "a.tif", array, compression="zlib", predictor=2, rowsperstrip=5,
                     photometric="minisblack")  # fmt: skip
    run(make_config(tmp_path / "a.tif", crop={"window": [7, 15, 6, 14]}))
    patterns = sd.open(tmp_path / "out.zarr")
    np.testing.assert_array_equal(patterns.values, array[..., 7:15, 6:14])
    found = find(tmp_path / "a.tif")
    assert found.info.metadata["compression"] == "deflate"
    source: Any = found.source
    assert source.source.chunk_bytes == 2 * (5 * 20 + 24 * 20)  # a strip, and a page


def test_long_stacks_open_in_little(tmp_path: Path) -> None:
    """Of 5,000 directories every eighth is kept; each page is found from the one before it."""
    pages = (np.full((4, 4), i, "u2") for i in range(5000))
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in pages:
            file.write(page, compression="packbits", contiguous=False, metadata=None)
    source: Any = find(tmp_path / "a.tif", scan_shape=(50, 100)).source
    assert (source.source.step, len(source.source.known)) == (8, 625)
    part = (slice(1, 50, 16), slice(3, 100, 7), slice(0, 1), slice(0, 1))
    numbered = np.arange(5000).reshape(50, 100, 1, 1)
    np.testing.assert_array_equal(source[part], numbered[1:50:16, 3:100:7])


@pytest.fixture
def strip(tmp_path: Path) -> Any:
    """Writes one page of 6 x 5 uint16 whose strip holds what is given."""

    def write(content: bytes, compression: int, **tags: int) -> Path:
        path = tmp_path / "a.tif"
        said = {256: 5, 257: 6, 258: 16, 259: compression, 273: 8, 277: 1, 278: 6, 279: len(content)}  # fmt: skip
        said |= {int(tag[1:]): value for tag, value in tags.items()}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, said[tag]) for tag in sorted(said))
        at = 8 + len(content)
        head = b"II*\0" + struct.pack("<I", at)
        path.write_bytes(head + content + struct.pack("<H", len(said)) + entries + bytes(4))
        return path

    return write


PIXELS = numbers((6, 5)).tobytes()


@pytest.mark.parametrize(
    ("content", "compression", "message"),
    [
        (zlib.compress(PIXELS)[:-6], 8, r"strip 1 of page 1 cannot be decoded from deflate \(it ends too early\)"),
        (zlib.compress(PIXELS)[:-1] + b"x", 8, r"cannot be decoded from deflate \(.*incorrect data check\)"),
        (b"junk" * 9, 32946, r"cannot be decoded from deflate \(.*incorrect header check\)"),
        (zlib.compress(PIXELS[:-1]), 8, r"strip 1 of page 1 decodes to 59 bytes, where 60 were expected"),
        (zlib.compress(PIXELS + b"x"), 8, r"decodes to more bytes, where 60 were expected"),
        (zlib.compress(bytes(10**7)), 8, r"decodes to more bytes, where 60 were expected"),
        (b"\x3b" + PIXELS[:-1], 32773, r"cannot be decoded from PackBits"),
        (b"\xc4\x01", 32773, r"decodes to more bytes, where 60 were expected"),
        (b"\xc6\x01", 32773, r"decodes to 59 bytes, where 60 were expected"),
        (b"\xff" * 40, 5, r"cannot be decoded from LZW"),
    ],
)  # fmt: skip
def test_damaged(strip: Any, content: bytes, compression: int, message: str) -> None:
    source: Any = find(strip(content, compression), scan_shape=(1, 1)).source
    with pytest.raises(SourceError, match=message) as caught:
        whole(source)
    assert str(caught.value).startswith(source.source.path)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"x259": 7}, r"compressed by JPEG \(compression 7\), which is not read; save it again as plain gray"),
        ({"x259": 50001}, r"compressed by WebP \(compression 50001\)"),
        ({"x258": 1, "x317": 2}, r"pixels of 1 bits are not read"),
        ({"x259": 4242}, r"compressed by unknown \(compression 4242\)"),
        ({"x317": 4}, r"the predictor 4 with the compression deflate"),
        ({"x317": 3}, r"predictor 3 is for real numbers"),
        ({"x259": 32773, "x317": 2}, r"the predictor 2 with the compression PackBits, which programs understand in different ways"),
        ({"x32997": 12}, r"a page is a volume of 12 slices, which is not read; save it again"),
        ({"x266": 2}, r"order of the bits in a byte 2 \(expected 1\)"),
        ({"x256": 50_000, "x257": 50_000, "x278": 50_000}, r"claims 5,000,000,000 bytes of \d+ compressed ones"),
        ({"x278": 5}, r"a page of 6 x 5 has 1 strips only"),
        ({"x279": 9999}, r"a part of a page ends behind the file's end"),
        ({"x322": 16, "x323": 0, "x324": 8, "x325": 60}, r"a page is 6 x 5 pixels, in parts of 0 x 16"),
        ({"x322": 2**31, "x323": 16, "x324": 8, "x325": 60}, r"claims 68,719,476,736 bytes of 60 compressed"),
    ],
)  # fmt: skip
def test_refused(strip: Any, tags: dict[str, int], message: str) -> None:
    path = strip(zlib.compress(PIXELS), 8, **tags)
    with pytest.raises(SourceError, match=message) as caught:
        find(path, scan_shape=(1, 1))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_changed_since(tmp_path: Path) -> None:
    array = counts("u2").reshape(-1, *SHAPE[2:])
    path = tmp_path / "a.tif"
    options: dict[str, Any] = {"compression": "zlib", "photometric": "minisblack"}
    tifffile.imwrite(path, array, **options)
    source: Any = find(path, scan_shape=(3, 4)).source
    tifffile.imwrite(path, array[:5], **options)
    with pytest.raises(SourceError, match=r"a\.tif: there are 5 pages, where 12 were"):
        whole(source)
    tifffile.imwrite(path, array[:, :9], **options)
    with pytest.raises(SourceError, match=r"a\.tif: page 1 is \(9, 37\) uint16 now"):
        whole(source)
