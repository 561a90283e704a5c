"""Merlin's .mib: headers of text before big-endian counts; the scan from the .hdr, never guessed."""

import numpy as np
import pytest
from frames_made import (
    MIB_DTYPES,
    SHAPE,
    agrees,
    by_turns,
    hdr,
    knows,
    mib,
    mib_header,
    numbers,
    quad_frame,
    raw_frame,
    raw_header,
    real,
    refuses,
)

from stem_dask.readers.open import find
from stem_dask.readers.views import Part


@pytest.mark.parametrize("kind", ["U08", "U16", "U32"])
@pytest.mark.parametrize("length", [384, 768])
def test_mib(tmp_path, kind, length):
    array = numbers(dtype=MIB_DTYPES[kind])
    path = mib(tmp_path / "a.mib", array, kind, length)
    found = find(path, scan_shape=SHAPE[:2])
    agrees(found, array)
    assert any("RosettaSciIO and HyperSpy flip" in note for note in found.info.notes)
    assert found.info.metadata["pattern"]["type"] == kind
    agrees(find(path, scan_shape=SHAPE[:2], flip=True), array[:, :, ::-1])
    refuses(r"a stack of 12 patterns of 6 x 5 pixels; give its scan", path)


@pytest.mark.parametrize(
    "settings",
    [
        {"ScanX": "4", "ScanY": "3"},
        {"Frames in Acquisition (Number)": "12", "Frames per Trigger (Number)": "4"},
    ],
)
def test_scan_of_the_hdr(tmp_path, settings):
    path = hdr(mib(tmp_path / "a.mib", numbers()), **settings)
    found = find(path)
    agrees(found, numbers())
    assert "the file states a scan of 3 x 4" in found.info.notes
    assert found.info.metadata["hdr"] == settings
    agrees(find(path, scan_shape=(2, 6)), numbers((2, 6, 6, 5)))
    before = found.identity
    hdr(path, ScanX="6", ScanY="2", Comment="rewritten")
    assert find(path).identity != before
    path.write_bytes(path.read_bytes()[: -3 * 444 - 5])
    refuses(
        r"8 patterns; the scan that the file states, 2 x 6 needs 12; set .* and 2 patterns\) \(439 bytes after pattern 8 are less",
        path,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"Frames in Acquisition (Number)": "12", "Frames per Trigger (Number)": "1"},
        {"Frames in Acquisition (Number)": "12", "Frames per Trigger (Number)": "5"},
        {"Frames in Acquisition (Number)": "all"},
        {"ScanX": "-4", "ScanY": "3"},
    ],
)
def test_an_hdr_that_says_no_scan(tmp_path, settings):
    path = hdr(mib(tmp_path / "a.mib", numbers()), **settings)
    refuses("give its scan as input", path)


def test_mib_interrupted(tmp_path):
    path = mib(tmp_path / "a.mib", numbers((65280, 1, 1)), "U08")
    refuses(
        r"65,280 patterns; .* 65,536; set input.scan_shape: \[255, 256\]",
        path,
        scan_shape=(256, 256),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the file is empty"),
        (b"MQ1,0000", r"8 bytes are fewer than the header of a Merlin pattern has \(384\)"),
        (mib_header(first="XQ9") + bytes(60), r"begins with 'XQ9', where MQ1 was expected"),
        (
            mib_header("R64") + bytes(60),
            r"raw counts \(R64\) of unknown bits from 01 chips.*Raw Mode off",
        ),
        (mib_header("???") + bytes(60), r"stored as '\?\?\?'"),
        (mib_header(width=0) + bytes(60), r"a width of '0000' .* it is damaged"),
        (mib_header(length=384).replace(b"00384", b"00003") + bytes(60), "states '00003' bytes"),
        (mib_header().replace(b"0006", b"99999") + bytes(60), "a height of '99999'"),
        (mib_header() + bytes(59), r"patterns of 60 bytes, but 59 bytes follow; the file was cut"),
    ],
)
def test_mib_refused(tmp_path, content, message):
    path = tmp_path / "a.mib"
    path.write_bytes(content)
    refuses(message, path)


def test_real_mib():
    path, fact = real("merlin_4x2_6bit.mib")
    refuses("a stack of 8 patterns of 256 x 256 pixels; give its", path)
    found = find(path, scan_shape=(2, 4))
    knows(found, fact)
    turned = knows(find(path, scan_shape=(2, 4), flip=True), fact)[0, 0]
    rows, columns = np.indices(turned.shape)
    centroid = [(turned * i).sum() / turned.sum() for i in (rows, columns)]
    np.testing.assert_allclose(centroid, fact["com_first_pattern"])
    quantumdetector = pytest.importorskip("rsciio.quantumdetector")
    theirs = quantumdetector.file_reader(str(path))[0]["data"]
    np.testing.assert_array_equal(found.source[(slice(None),) * 4][:, :, ::-1], theirs)


def test_mib_whose_sizes_would_shear_it(tmp_path):
    """A width that is too small gives more patterns than there are, each beginning elsewhere in its neighbour."""
    path = mib(tmp_path / "a.mib", numbers() + 1)
    content = path.read_bytes()
    assert find(path, scan_shape=(3, 4)).source.shape == SHAPE
    path.write_bytes(content.replace(b",0005,0006,", b",0004,0006,", 1))
    refuses(r"a\.mib: by the sizes in the header pattern 1 begins", path, scan_shape=(3, 4))


# --- raw mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 6, 12, 24])
def test_mib_in_raw_mode(tmp_path, bits):
    array = np.random.default_rng(bits).integers(0, 2**bits, (3, 2, 5, 128))
    width = 256 if bits == 24 else 128  # both halves are counted
    frames = [raw_header(bits, width, 5) + raw_frame(p, bits) for p in array.reshape(-1, 5, 128)]
    (tmp_path / "a.mib").write_bytes(b"".join(frames))
    found = find(tmp_path / "a.mib", scan_shape=(3, 2))
    agrees(found, array.astype({1: "u1", 6: "u1", 12: ">u2", 24: "u4"}[bits]))
    part = Part(found.source, (slice(1, 3), slice(2), slice(5), slice(128)))
    np.testing.assert_array_equal(np.concatenate(list(part.pieces())), array[1:].reshape(4, 5, 128))


@pytest.mark.parametrize("first", ["0", "1"])
def test_two_thresholds_by_turns(tmp_path, first):
    """Each pattern's header says which counter it is of; the two are stacks of their own."""
    counters = [first, "1" if first == "0" else "0"]
    path = by_turns(tmp_path / "a.mib", numbers((13, 6, 5)), counters)
    refuses(r"2 arrays of 3 axes; .* input\.dataset: counter \d: ", path)
    found = find(path, dataset=f"counter {counters[1]}", scan_shape=(2, 3))
    agrees(found, numbers((13, 6, 5))[1::2].reshape(2, 3, 6, 5).astype(">u2"))
    assert find(path, dataset=f"counter {first}", scan_shape=(7, 1)).info.shape == (7, 1, 6, 5)


@pytest.mark.parametrize("layout", ["2x2", "2x2G"])
@pytest.mark.parametrize("bits", [1, 6, 12])
def test_raw_mode_of_four_chips(tmp_path, bits, layout):
    array = np.random.default_rng(bits).integers(0, 2**bits, (3, 2, 128, 128))
    frames = [
        raw_header(bits, 256, 64, 4, layout) + quad_frame(p, bits)
        for p in array.reshape(-1, 128, 128)
    ]
    (tmp_path / "a.mib").write_bytes(b"".join(frames))
    found = find(tmp_path / "a.mib", scan_shape=(3, 2))
    agrees(found, array.astype({1: "u1", 6: "u1", 12: ">u2"}[bits]))
    assert any("rotated by 180°" in note for note in found.info.notes)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            raw_header(24, 129, 5),
            r"of 24 bits from 01 chips \(1x1\), 5 x 129: of the raw mode, 1, 6, 12 and 24 bits",
        ),
        (raw_header(12, 128, 5, 4, "2x2"), r"of 12 bits from 04 chips \(2x2\), 5 x 128: "),
        (raw_header(12, 1024, 256, 3, "2x2"), r"of 12 bits from 03 chips \(2x2\)"),
        (raw_header(24, 1024, 256, 4, "2x2"), r"of 24 bits from 04 chips \(2x2\)"),
        (raw_header(1, 128, 32, 4, "2x2"), r"32 x 128: .* in rows of a multiple of 64 pixels"),
        (raw_header(6, 12, 5), "in rows of a multiple of 8 pixels"),
    ],
)
def test_raw_mode_refused(tmp_path, header, message):
    (tmp_path / "a.mib").write_bytes(header + bytes(10_000))
    refuses(message, tmp_path / "a.mib")
