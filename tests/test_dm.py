"""The DM reader: against RosettaSciIO on real files, against known trees, and against damaged files."""

import pickle
import struct
import tracemalloc
from math import inf
from pathlib import Path

import numpy as np
import pytest

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.readers.dm import list_dm, read_tags
from stem_dask.readers.source import Candidate
from stem_dask.writers.synthetic import Stream, encode_tags

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL_FILES = [
    "sim/au_np_gms_stemx_u16.dm4",
    "real/dm4_3d_int16_64_65_66.dm4",
    "real/dm3_2d_diffraction.dm3",
]


@pytest.fixture(params=REAL_FILES)
def real_file(request):
    path = SHARED / request.param
    if not path.exists():
        pytest.skip(f"the shared file {request.param} is not on this machine")
    return path


def one_image(data, dimensions, code=10, **more):
    """A tree with one image; ``more`` replaces or adds to its ``ImageData``."""
    image = {"Data": data, "DataType": code, "Dimensions": dimensions, **more}
    return {"ImageList": [{"ImageData": image, "Name": "it"}]}


def write(folder, tree, **options) -> Path:
    path = folder / "file.dm4"
    path.write_bytes(encode_tags(tree, **options))
    return path


def pixels(image: Candidate) -> np.ndarray:
    return image.source[(slice(None),) * len(image.source.shape)]


# --- real files, against RosettaSciIO ---------------------------------------------------------------------------


def test_real_images_equal_rosettasciio(real_file):
    digitalmicrograph = pytest.importorskip("rsciio.digitalmicrograph")
    theirs = digitalmicrograph.file_reader(str(real_file))
    ours = list_dm(real_file)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.source.shape == other["data"].shape
        assert mine.source.dtype == other["data"].dtype
        assert mine.about["title"] == other["metadata"]["General"]["title"]
        np.testing.assert_array_equal(pixels(mine), other["data"])
        for i, (axis, dictionary) in enumerate(zip(mine.axes, other["axes"], strict=True)):
            expected = [dictionary[key] for key in ("size", "scale", "offset", "units")]
            assert [axis.size, axis.scale, axis.offset, axis.units] == expected
            assert axis.name == f"axis{i}"


def test_the_4d_image_of_the_real_layout():
    path = SHARED / REAL_FILES[0]
    if not path.exists():
        pytest.skip("the shared data are not on this machine")
    survey, image = list_dm(path)
    assert survey.source.shape == (36, 28)
    assert survey.swapped is None
    assert (image.number, image.name, image.source.shape) == (
        2,
        "image 2 (Diffraction SI)",
        (9, 7, 76, 60),
    )
    assert (image.source.dtype, image.source.offset) == (np.dtype("<u2"), 161_814)
    assert image.swapped is True
    assert image.metadata["Meta Data"]["Format"] == "Diffraction image"
    assert image.metadata["Microscope Info"]["Voltage"] == 200_000
    assert [axis.units for axis in image.axes] == ["nm", "nm", "1/nm", "1/nm"]
    np.testing.assert_allclose(image.axes[2].value(38), 0, atol=1e-6)
    np.testing.assert_allclose(image.axes[3].value(30), 0, atol=1e-6)


# --- trees we wrote ourselves -----------------------------------------------------------------------------------

TREE = {
    "Short": np.int16(-3),
    "Long": np.int32(-70_000),
    "Word": np.uint16(65_000),
    "Unsigned": 4_000_000_000,
    "Float": np.float32(0.5),
    "Double": 0.1,
    "Yes": True,
    "Char": np.int8(-1),
    "Octet": np.uint8(255),
    "Big": -(2**60),
    "Huge": np.uint64(2**63),
    "Units": "µm Å⁻¹ 🔬",
    "Nothing": "",
    "Struct": (np.int16(1), 2.5, True),
    "Numbers": np.array([1.5, -2.5], np.float32),
    "Records": np.array([(1, 2.0), (3, 4.0)], [("a", "u4"), ("b", "f8")]),
    "Empty group": {},
    "List": [7, [8, {"deep": "er"}], "text"],
    "Long array": np.zeros(4097, np.int32),
    "At the limit": np.arange(4096, dtype=np.int32),
}


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_kind_of_tag_comes_back(tmp_path, version, order):
    tags, _ = read_tags(write(tmp_path, TREE, version=version, order=order))
    long_array = tags.pop("Long array")
    assert (long_array.length, long_array.codes, long_array.n_bytes) == (4097, (3,), 4 * 4097)
    assert tags.pop("At the limit") == list(range(4096))
    same = ("Short", "Long", "Word", "Unsigned", "Float", "Double", "Yes", "Char", "Octet", "Big")
    same += ("Huge", "Units", "Nothing", "Struct", "Empty group")
    expected = {name: TREE[name] for name in same}
    expected |= {"Numbers": [1.5, -2.5], "Records": [(1, 2.0), (3, 4.0)]}
    expected |= {"List": {"0": 7, "1": {"0": 8, "1": {"deep": "er"}}, "2": "text"}}
    assert tags == expected


def test_old_names_and_strings_in_latin_1(tmp_path):
    data = encode_tags({"Emission (xA)": "", "Tail": 3}, version=3)
    entry = struct.pack(">BH", 21, 13) + b"Emission (\xb5A)%%%%"
    entry += struct.pack(">3i", 2, 18, 5) + b"\xb5 old"
    start = data.index(b"\x15\x00\x0dEmission")
    path = tmp_path / "old.dm3"
    path.write_bytes(data[:start] + entry + data[data.index(b"\x15\x00\x04Tail") :])
    assert read_tags(path)[0] == {"Emission (µA)": "µ old", "Tail": 3}


@pytest.mark.parametrize("order", ["<", ">"])
def test_pixels_are_where_the_image_says(tmp_path, order):
    """Complex images are listed for the caller to refuse."""
    codes = {
        1: "i2",
        2: "f4",
        6: "u1",
        7: "i4",
        9: "i1",
        10: "u2",
        11: "u4",
        12: "f8",
        14: "u1",
        39: "i8",
        40: "u8",
    }
    for code, dtype in (codes | {3: "c8", 5: "c8", 13: "c16", 27: "c8", 28: "c16"}).items():
        values = np.arange(120).astype(dtype if code in codes else "f4")
        path = write(tmp_path, one_image(values, [5, 4, 3, 2], code), order=order)
        (image,) = list_dm(path)
        assert image.source.shape == (2, 3, 4, 5)
        assert image.source.dtype == np.dtype(order + dtype)
        if code in codes:
            np.testing.assert_array_equal(pixels(image).ravel(), values)


def test_thumbnails_and_colour_pictures_are_left_out(tmp_path):
    grey, colour = np.zeros(6, np.uint16), np.zeros(6, np.uint32)
    trees = [one_image(grey, [3, 2]), one_image(colour, [3, 2], 23), one_image(colour, [3, 2], 8)]
    trees += [one_image(np.ones(6, np.uint16), [2, 3])]
    images = [tree["ImageList"][0] for tree in trees]
    no_pixels = {"ImageData": {"Calibrations": {}}, "Name": "a reference"}
    tree = {"ImageList": [*images, no_pixels, 5], "Thumbnails": [{"ImageIndex": 0}, {"x": [1]}]}
    assert [(i.number, i.source.shape) for i in list_dm(write(tmp_path, tree))] == [(3, (3, 2))]


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        ({"Origin": 2.0, "Scale": 0.5, "Units": "nm"}, (0.5, -1.0, "nm")),
        ({"Origin": -3, "Scale": 2, "Units": "µm"}, (2.0, 6.0, "µm")),
        ({"Scale": 0.5}, (0.5, 0.0, "")),
        ({"Origin": 1e300, "Scale": 1e300, "Units": "nm"}, (1e300, 0.0, "nm")),
        ({"Origin": 2.0, "Scale": 0.5, "Units": 7}, (0.5, -1.0, "")),
        ({"Origin": 2.0, "Scale": 0.0, "Units": "nm"}, (1.0, 0.0, "")),
        ({"Origin": 2.0, "Scale": inf, "Units": "nm"}, (1.0, 0.0, "")),
        ({"Origin": 2.0, "Scale": "1", "Units": "nm"}, (1.0, 0.0, "")),
        ("none", (1.0, 0.0, "")),
    ],
)
def test_calibration_of_the_fastest_axis(tmp_path, calibration, expected):
    slow = {"Origin": 0.0, "Scale": 4.0, "Units": "s"}
    tree = one_image(
        np.zeros(6, np.uint16), [3, 2], Calibrations={"Dimension": [calibration, slow]}
    )
    (image,) = list_dm(write(tmp_path, tree))
    assert image.axes == (Axis("axis0", 2, 4.0, 0.0, "s"), Axis("axis1", 3, *expected))


@pytest.mark.parametrize(
    ("tag", "expected"),
    [(np.uint8(1), True), (0, False), (True, True), ("1", None), (None, None)],
)
def test_swapped_says_only_what_the_file_says(tmp_path, tag, expected):
    tree = one_image(np.zeros(6, np.uint16), [3, 2])
    meta = {"Format": "Diffraction image"} | ({} if tag is None else {"Data Order Swapped": tag})
    tree["ImageList"][0]["ImageTags"] = {"Meta Data": meta}
    (image,) = list_dm(write(tmp_path, tree))
    assert image.swapped is expected
    assert image.metadata["Meta Data"]["Format"] == "Diffraction image"


# --- files that are wrong ---------------------------------------------------------------------------------------

U16 = np.zeros(24, np.uint16)


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        (
            one_image(np.zeros(23, np.uint16), [4, 3, 2, 1]),
            r"image 0 \('it'\): Dimensions say 1 x 2 x 3 x 4 of uint16, but the data array has 46 bytes; "
            "the file is cut or its header is wrong",
        ),
        (one_image(U16, [4, 3, 2, 0]), "Dimensions say 0 x 2 x 3 x 4 of uint16"),
        (one_image(U16, [4, 3, -2, -1]), "Dimensions say -1 x -2"),
        (one_image(U16, ["4", 3, 2, 1]), "Dimensions say"),
        (one_image(U16, [np.uint64(2**64 - 1)] * 4), "18446744073709551615 x .* bytes"),
        (one_image(U16, [1] * 9), "Dimensions say 1 x 1 x"),
        (one_image(U16, 5), "Dimensions say nothing"),
        (one_image(U16, [4, 3, 2, 1], 99), "of the unknown data type 99"),
        ({"Document": {}}, "no list of images; in DigitalMicrograph, save the image itself"),
        ({"ImageList": 5}, "no list of images"),
    ],
)
def test_images_that_contradict_themselves(tmp_path, tree, match):
    path = write(tmp_path, tree)
    with pytest.raises(SourceError, match=match) as caught:
        list_dm(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("tree", [one_image(U16, [5, 5]), one_image(U16, [4, 6], 99)])
def test_a_survey_that_contradicts_itself_is_left_out(tmp_path, tree):
    assert list_dm(write(tmp_path, tree)) == []


def nested(depth):
    tree = {}
    for _ in range(depth):
        tree = {"g": tree}
    return tree


def patched(old: bytes, new: bytes, tree=None) -> bytes:
    data = encode_tags(tree or {"Name": "gold", "Size": 7})
    assert data.count(old) == 1
    return data.replace(old, new)


SIZE_TAG = b"%%%%" + struct.pack(">qq", 1, 5)
NAME_TAG = b"%%%%" + struct.pack(">qqqq", 3, 20, 4, 4)
BROKEN = {
    "cut in the header": (bytes.fromhex("00000004 0000"), "the file ends inside its tags"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "not a Gatan DM3 or DM4 file.*3 or 4 was expected"),
    "version 5": (b"\0\0\0\5" + bytes(100), "the version number 5 "),
    "byte order": (b"\0\0\0\4" + bytes(8) + b"\0\0\0\7" + bytes(99), "the byte order 7"),
    "no delimiter": (patched(SIZE_TAG, b"%%&%" + SIZE_TAG[4:]), "'Size' does not begin with %%%%"),
    "kind": (patched(b"\x15\x00\x04Size", b"\x00\x00\x04Size"), "'Size' has the kind 0"),
    "type code": (patched(SIZE_TAG, SIZE_TAG[:-1] + b"\x63"), r"'Size' is of an unknown type \(99,\)"),
    "struct alone": (patched(SIZE_TAG, SIZE_TAG[:-1] + b"\x0f"), r"an unknown type \(15,\)"),
    "array code": (patched(NAME_TAG, NAME_TAG[:-9] + b"\x14" + NAME_TAG[-8:]), "'Name' is of an unknown"),
    "long description": (patched(SIZE_TAG, b"%%%%" + struct.pack(">qq", 2**62, 5)), "a short description"),
    "two numbers": (patched(SIZE_TAG, b"%%%%" + struct.pack(">qqq", 2, 5, 5)), r"unknown type \(5, 5\)"),
    "fields": (patched(SIZE_TAG, b"%%%%" + struct.pack(">6q", 5, 15, 0, 2**60, 0, 5)), "an unknown type"),
    "negative array": (patched(NAME_TAG, NAME_TAG[:-8] + b"\xff" * 8), "claims -2 bytes"),
    "long array": (patched(NAME_TAG, NAME_TAG[:-8] + struct.pack(">q", 2**62)), "'Name' claims 9,223,372,036,854,775,808 b"),
    "many entries": (encode_tags({})[:18] + struct.pack(">q", 2**60) + bytes(8), "claims 1,152,921,504,606,846,976 entries"),
    "negative entries": (encode_tags({})[:18] + b"\xff" * 16, "claims -1 entries"),
    "deep": (encode_tags(nested(65)), "65 levels deep"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_say_what_is_wrong(tmp_path, what):
    data, match = BROKEN[what]
    path = tmp_path / "file.dm4"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=match) as caught:
            read_tags(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20  # claims are not allocated
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")


def test_the_message_of_a_file_cut_in_its_pixels(tmp_path):
    path = write(tmp_path, one_image(np.zeros(1000, np.uint16), [10, 10, 10]))
    (image,) = list_dm(path)
    path.write_bytes(path.read_bytes()[: image.source.offset + 500])
    with pytest.raises(SourceError, match="need 2,000 bytes, but the file has only 500 more"):
        list_dm(path)


def test_long_pixels_are_seeked_over(tmp_path):
    """A sparse file of 8 GB is listed from its header."""
    tree = {**one_image(np.zeros(1, np.uint16), [256] * 4), "Thumbnails": {}}
    n = 256**4
    data = encode_tags(tree)
    head, tail = data.split(b"%%%%" + struct.pack(">4q", 3, 20, 4, 1) + b"\0\0")
    path = tmp_path / "sparse.dm4"
    with open(path, "wb") as file:
        file.write(head + b"%%%%" + struct.pack(">4q", 3, 20, 4, n))
        file.seek(2 * n, 1)
        file.write(tail)
    (image,) = list_dm(path)
    assert image.source.shape == (256,) * 4


# --- the writer -------------------------------------------------------------------------------------------------


def test_a_stream_is_written_like_an_array():
    values = np.arange(24, dtype=np.uint16)
    for order in ("<", ">"):
        stream = Stream("uint16", 24, [values[:5], values[5:].astype(">u2")])
        assert encode_tags({"D": stream}, order=order) == encode_tags({"D": values}, order=order)
