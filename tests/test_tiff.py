"""TIFF stacks as tifffile and Pillow write them, plain, compressed and in tiles; damaged ones are refused."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from frames_made import numbers, refuses
from PIL import Image

import stem_dask as sd
from stem_dask.core.errors import SourceError
from stem_dask.job.run import run
from stem_dask.readers.flat import FramedFile
from stem_dask.readers.open import find
from stem_dask.readers.tiff import TiffPages

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
        assert found.source.dtype.newbyteorder("=") == np.dtype(dtype)
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
    refuses(r"4 values per pixel", path)


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


def test_plain_pages_in_tiles_are_decoded(tmp_path: Path) -> None:
    array = counts("u2")
    tifffile.imwrite(tmp_path / "a.tif", array, tile=(16, 16), photometric="minisblack")
    source: Any = find(tmp_path / "a.tif").source
    assert isinstance(source.source, TiffPages)
    np.testing.assert_array_equal(whole(source), array)
    tifffile.imwrite(tmp_path / "b.tif", array, rowsperstrip=5, photometric="minisblack")
    straight: Any = find(tmp_path / "b.tif").source
    assert isinstance(straight.source, FramedFile)


def test_a_job_of_it(tmp_path: Path, make_config: Any) -> None:
    array = np.zeros((3, 4, 24, 20), "u2")
    array[..., 8:14, 7:13] = numbers((3, 4, 6, 6)) % 50 + 1
    tifffile.imwrite(tmp_path / "a.tif", array, compression="zlib", predictor=2, rowsperstrip=5,
                     photometric="minisblack")  # fmt: skip
    run(make_config(tmp_path / "a.tif", crop={"window": [7, 15, 6, 14]}))
    patterns = sd.open(tmp_path / "out.zarr")
    np.testing.assert_array_equal(patterns.values, array[..., 7:15, 6:14])
    found = find(tmp_path / "a.tif")
    assert found.info.metadata["compression"] == "ADOBE_DEFLATE"


def test_pages_of_a_long_stack(tmp_path: Path) -> None:
    pages = (np.full((4, 4), i, "u2") for i in range(5000))
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in pages:
            file.write(page, compression="packbits", contiguous=False, metadata=None)
    source: Any = find(tmp_path / "a.tif", scan_shape=(50, 100)).source
    part = (slice(1, 50, 16), slice(3, 100, 7), slice(0, 1), slice(0, 1))
    numbered = np.arange(5000).reshape(50, 100, 1, 1)
    np.testing.assert_array_equal(source[part], numbered[1:50:16, 3:100:7])


@pytest.mark.parametrize("codec", ["deflate", "lzw", "zstd"])
def test_damaged_pixels(tmp_path: Path, codec: str) -> None:
    path, array = tmp_path / "a.tif", counts("u2")
    tifffile.imwrite(path, array, compression=codec, photometric="minisblack")
    with tifffile.TiffFile(path) as file:
        offset, n = file.pages[1].dataoffsets[0], file.pages[1].databytecounts[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + n] = bytes([255]) * n
    path.write_bytes(content)
    source: Any = find(path).source
    np.testing.assert_array_equal(source[:1, :1, :, :], array[:1, :1])
    with pytest.raises(SourceError, match=r"a\.tif: page 2 cannot be decoded .*copy it again"):
        whole(source)


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros((4, 6, 5, 3), "u1"), {"photometric": "rgb"}, "3 values per pixel; expected one gray value"),
        (np.zeros((2, 6, 5), "c8"), {}, "expected one gray value per pixel, a real number"),
        (np.zeros((2, 16, 16, 16), "u1"), {"volumetric": True, "tile": (16, 16, 16)}, "volumes of 16 slices"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, array: np.ndarray, options: dict[str, Any], message: str) -> None:
    options = {"photometric": "minisblack", **options}
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    with pytest.raises(SourceError, match=message) as caught:
        find(tmp_path / "a.tif", scan_shape=(1, 2))
    assert str(caught.value).startswith(f"{tmp_path / 'a.tif'}: ")


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, counts("u2"), compression="zlib", photometric="minisblack")
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(4242)
    refuses("compression 4242", path)


def test_a_file_that_changed_since(tmp_path: Path) -> None:
    array = counts("u2").reshape(-1, *SHAPE[2:])
    path = tmp_path / "a.tif"
    options: dict[str, Any] = {"compression": "zlib", "photometric": "minisblack"}
    tifffile.imwrite(path, array, **options)
    source: Any = find(path, scan_shape=(3, 4)).source
    tifffile.imwrite(path, array[:5], **options)
    with pytest.raises(SourceError, match=r"a\.tif: page 6 cannot be decoded"):
        whole(source)
    tifffile.imwrite(path, array[:, :9], **options)
    with pytest.raises(
        SourceError, match=r"a\.tif: page 1 is \(9, 37\) uint16; expected \(21, 37\)"
    ):
        whole(source)
