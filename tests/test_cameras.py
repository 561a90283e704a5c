"""Block files, MRC, EMPAD and TVIPS: every value as numpy has it, every lie of a header refused."""

import warnings

import numpy as np
import pytest
from frames_made import (
    PIX,
    SHAPE,
    agrees,
    blo,
    empad,
    frames_of,
    info,
    knows,
    mrc,
    numbers,
    real,
    refuses,
    seq,
    tvips,
)

from stem_dask.readers.open import find

# --- .blo -------------------------------------------------------------------------------------------------------

SQUARE = (3, 4, 6, 6)


def test_blo(tmp_path):
    array = numbers(SQUARE, "u1")
    found = find(blo(tmp_path / "a.blo", array))
    agrees(found, array)
    y, x, ky, kx = found.info.axes
    assert (y.scale, y.units, x.scale, x.units) == (5.0, "nm", 2.5, "nm")
    assert ky.scale == kx.scale == 100 / 6226
    assert ky.units == "cm"
    assert found.info.metadata["beam energy (V)"] == 200000
    agrees(find(tmp_path / "a.blo", scan_shape=(2, 6)), array.reshape(2, 6, 6, 6))


@pytest.mark.parametrize("step", [0.0, float("nan")])
def test_blo_without_calibration(tmp_path, step):
    found = find(blo(tmp_path / "a.blo", numbers(SQUARE, "u1"), sx=step, sdp=0))
    assert [axis.units for axis in found.info.axes] == ["nm", "", "", ""]
    assert [axis.scale for axis in found.info.axes] == [5.0, 1.0, 1.0, 1.0]


def test_blo_cut_and_longer(tmp_path):
    array = numbers(SQUARE, "u1")
    path = blo(tmp_path / "a.blo", array)
    whole = path.read_bytes()
    path.write_bytes(whole[: 0x1010 + 42 * 8 + 10])
    refuses(r"8 patterns; .* 3 x 4 needs 12; set input.scan_shape: \[2, 4\] .* \(10 b", path)
    agrees(find(path, scan_shape=(2, 4)), array[:2])
    path.write_bytes(whole + bytes(100))
    found = find(path)
    agrees(found, array)
    assert "bytes after the 12 patterns of the scan are not read" in found.info.notes
    refuses(
        r"12 patterns; .* states, 3 x 3 needs 9; set .*drop_columns: 1 .*; or input.scan_shape: \[4, 3\]",
        blo(path, array, nx=3),
    )


def test_blo_sheared_where_the_patterns_are_dark(tmp_path):
    """Zeros where a mark should be are a pattern that was never written only when all of it is zeros."""
    array = numbers(SQUARE, "u1")
    array[..., :2, :] = array[..., 4:, :] = 0
    refuses(
        r"pattern 1 begins at byte 4,143, but b'\\x00\\x00' is",
        blo(tmp_path / "a.blo", array, size=5),
    )
    path = blo(tmp_path / "a.blo", array)
    content = path.read_bytes()
    path.write_bytes(content[: -42 * 4] + bytes(42 * 4))  # the last four were never written
    array.reshape(12, 6, 6)[8:] = 0
    agrees(find(path), array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": 0x0201}, r"not a NanoMEGAS block file: it begins with b'IMGBLO' and the mark 0x0201"),
        ({"id": b"XXXBLO"}, r"it begins with b'XXXBLO'"),
        ({"size": 0}, r"patterns of 0 x 0 uint8"),
        ({"size": 60000}, r"patterns of 3,600,000,000 bytes, but 498 bytes follow"),
        ({"patterns": 0x1011}, r"no pattern begins at byte 4,113, .* \(bytes 55 00, expected aa 55\)"),
        ({"patterns": 2**31}, r"0 bytes follow"),
        ({"size": 5}, r"pattern 1 begins at byte 4,143, but b'.*' is there instead of b'\\xaaU'; a size is wrong"),
        ({"nx": 400}, r"12 patterns; the scan that the file states, 3 x 400 needs 1,200"),
        ({"nx": 0}, r"a stack of 12 patterns of 6 x 6 pixels; give its scan"),
    ],
)  # fmt: skip
def test_blo_refused(tmp_path, changes, message):
    path = blo(tmp_path / "a.blo", numbers(SQUARE, "u1"), **changes)
    refuses(message, path)


def test_blo_of_rosettasciio(tmp_path):
    blockfile = pytest.importorskip("rsciio.blockfile")
    axes = [
        {"size": n, "name": name, "scale": 1.0, "offset": 0.0, "units": unit, "navigate": i < 2}
        for i, (n, name, unit) in enumerate(
            zip(SQUARE, ("y", "x", "ky", "kx"), ("nm", "nm", "cm", "cm"), strict=True)
        )
    ]
    array = numbers(SQUARE, "u1")
    signal = {"data": array, "axes": axes, "metadata": {}, "original_metadata": {}, "attributes": {"_lazy": False}}  # fmt: skip
    blockfile.file_writer(str(tmp_path / "a.blo"), signal, navigator=None, show_progressbar=False)
    agrees(find(tmp_path / "a.blo"), array)


def test_real_blo():
    path, fact = real("test1.blo")
    found = find(path)
    knows(found, fact)
    scales = [(axis.scale, axis.units) for axis in found.info.axes]
    assert scales == [(a["scale"], a["units"]) for a in fact["axes"]]


# --- .mrc -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "dtype"), [(0, "u1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")]
)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("extended", [0, 1440])
def test_mrc(tmp_path, mode, dtype, order, extended):
    array = numbers((12, 6, 5), np.dtype(dtype).newbyteorder(order))
    path = mrc(tmp_path / "a.mrc", array, mode, order, extended)
    agrees(find(path, scan_shape=(3, 4)), array.reshape(SHAPE))
    refuses("a stack of 12 patterns of 6 x 5 pixels; give its scan", path)


def test_mrc_of_imod_with_signed_bytes(tmp_path):
    array = numbers((12, 6, 5), "i1") - 64
    path = mrc(tmp_path / "a.mrc", array, 0, x152=("I", 1146047817), x156=("I", 1))
    agrees(find(path, scan_shape=(3, 4)), array.reshape(SHAPE))


@pytest.mark.parametrize(
    ("movie", "beside"),
    [
        ("a.mrc", "a_info.txt"),
        ("a_movie.mrc", "a_info.txt"),
        ("20241021_00405_movie.mrc", "20241021_00405_info.txt"),
        ("20241021_00405_part_2_movie.mrc", "20241021_00405_info.txt"),
    ],
)
def test_direct_electron(tmp_path, movie, beside):
    array = numbers((12, 6, 5))
    found = find(info(mrc(tmp_path / movie, array), beside))
    agrees(found, array.reshape(SHAPE))
    axes = [(axis.scale, axis.units) for axis in found.info.axes]
    assert axes == [(0.2, "nm"), (0.1, "nm"), (1.0, ""), (0.5, "1/nm")]
    assert found.info.metadata["info"]["Scan - Type"] == "Raster"
    assert found.identity[1] > (tmp_path / movie).stat().st_size


def test_direct_electron_region(tmp_path):
    path = mrc(tmp_path / "a.mrc", numbers((12, 6, 5)))
    region = {"Scan - ROI Enable": "Enable", "Scan - ROI Size X": 6, "Scan - ROI Size Y": 2}
    agrees(find(info(path, "a_info.txt", **region)), numbers((2, 6, 6, 5)))


@pytest.mark.parametrize(
    "changes",
    [{"Scan - Enable": "Disable"}, {"Scan - Type": "XY"}, {"Scan - Repeats": 2}, {"Scan - Size X": "?"}],
)  # fmt: skip
def test_direct_electron_without_a_raster(tmp_path, changes):
    path = info(mrc(tmp_path / "a.mrc", numbers((12, 6, 5))), "a_info.txt", **changes)
    refuses("give its scan", path)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ({"x12": ("I", 77)}, r"not an MRC file: the mode is 77; expected one of the modes 0, 1, 2, 6 and 12"),
        ({"x12": ("I", 4)}, r"MRC mode 4 \(complex or packed"),
        ({"x8": ("I", 13)}, r"says 13 x 6 x 5 uint16 from byte 1,024 on, 1,804 bytes in all, but the file has 1,744: 12 p"),
        ({"x8": ("I", 0)}, r"says 0 x 6 x 5"),
        ({"x8": ("I", 11)}, r"11 x 6 x 5 uint16 are 660 bytes, but 720 are there: a size or the type is wrong; if the number .* input.shape=\[12,6,5\]"),
        ({"x0": ("I", 4)}, r"12 x 6 x 4 uint16 are 576 bytes, .* input.offset=1024 input.frame_header=12, or .*_footer=12; if"),
        ({"x8": ("I", 2**32 - 1)}, r"says 4,294,967,295 x 6"),
        ({"x92": ("I", 2**32 - 1)}, r"from byte 4,294,968,319 on.* 0 patterns"),
    ],
)  # fmt: skip
def test_mrc_refused(tmp_path, at, message):
    refuses(message, mrc(tmp_path / "a.mrc", numbers((12, 6, 5)), **at))


def test_mrc_cut_in_its_header(tmp_path):
    (tmp_path / "a.mrc").write_bytes(bytes(1000))
    refuses(r"1,000 bytes are fewer than the header of an MRC file", tmp_path / "a.mrc")


def test_real_mrc():
    path, fact = real("de_movie.mrc")
    knows(find(path), fact)


# --- EMPAD ------------------------------------------------------------------------------------------------------

SCANNED = "<scan_parameters mode='acquire'><scan_resolution_x>4</scan_resolution_x><scan_resolution_y>3</scan_resolution_y></scan_parameters>"
OLD = (
    "<iom_measurements><optics.get_full_scan_field_of_view>[3e-8, 8e-8]</optics.get_full_scan_field_of_view>"
    "<calibrated_pixelsize>2e-11</calibrated_pixelsize></iom_measurements>"
)
NEW = "<iom_measurements><full_scan_field_of_view><x>2.88e-8</x><scale_factor>0.72</scale_factor></full_scan_field_of_view></iom_measurements>"


@pytest.mark.parametrize("body", [PIX, SCANNED, "<timestamp isoformat='2021'/>"])
@pytest.mark.parametrize("filename", [None, r"D:\data\scan_x4_y3.raw", "/data/scan_x4_y3.raw"])
def test_empad(tmp_path, body, filename):
    xml, frames = empad(tmp_path, body, filename=filename)
    agrees(find(xml), frames.reshape(3, 4, 128, 128))
    found = find(tmp_path / "scan_x4_y3.raw")  # finds the .xml that names it
    agrees(found, frames.reshape(3, 4, 128, 128))
    assert found.info.kind == "an EMPAD's file"


def test_empad_calibration(tmp_path):
    axes = find(empad(tmp_path, PIX + OLD)[0]).info.axes
    assert [axis.units for axis in axes] == ["nm", "nm", "1/nm", "1/nm"]
    assert [axis.scale for axis in axes] == pytest.approx([10, 20, 0.02, 0.02])
    assert [axis.offset for axis in axes] == pytest.approx([0, 0, -1.28, -1.28])
    axes = find(empad(tmp_path, PIX + NEW)[0]).info.axes
    assert [axis.units for axis in axes] == ["nm", "nm", "", ""]
    assert [axis.scale for axis in axes] == pytest.approx([10, 10, 1, 1])
    for odd in (OLD.replace("2e-11", "nan"), OLD.replace("[3e-8, 8e-8]", "None")):
        assert not all(axis.calibrated for axis in find(empad(tmp_path, PIX + odd)[0]).info.axes)


def test_empad_series(tmp_path):
    series = "<scan_parameters><series_count>12</series_count></scan_parameters>"
    xml, frames = empad(tmp_path, series, name="series.raw")
    refuses("a stack of 12 patterns of 128 x 128 pixels", xml)
    agrees(find(xml, scan_shape=(3, 4)), frames.reshape(3, 4, 128, 128))


def modes(search, acquire, pix=None):
    """The sizes of both modes, (scan_y, scan_x), as an .xml has them."""
    body = "".join(
        f"<scan_parameters mode='{mode}'><scan_resolution_y>{y}</scan_resolution_y>"
        f"<scan_resolution_x>{x}</scan_resolution_x></scan_parameters>"
        for mode, (y, x) in (("search", search), ("acquire", acquire))
    )
    return body + (f"<pix_y>{pix[0]}</pix_y><pix_x>{pix[1]}</pix_x>" if pix else "")


@pytest.mark.parametrize(
    ("name", "body", "scan"),
    [
        ("scan_x12_y1.raw", modes((1, 12), (12, 1)), (1, 12)),  # both fit, the name decides
        ("scan_x1_y12.raw", modes((1, 12), (12, 1)), (12, 1)),
        ("scan.raw", modes((3, 4), (64, 64)), (3, 4)),  # only one fits
        ("scan.raw", modes((64, 64), (3, 4)), (3, 4)),
        ("scan_x4_y3.raw", modes((64, 64), (32, 32)), (3, 4)),
        ("scan_x9_y9.raw", modes((64, 64), (4, 3)), (4, 3)),
        ("scan_x6_y2.raw", modes((1, 12), (12, 1), (2, 6)), (2, 6)),
    ],
)
def test_the_size_of_an_empads_scan(tmp_path, name, body, scan):
    """The .xml has the sizes of two modes, and not which was used."""
    xml, frames = empad(tmp_path, body, name=name)
    found = find(xml)
    agrees(found, frames.reshape(*scan, 128, 128))
    assert any(f"the scan is {scan[0]} x {scan[1]} by" in note for note in found.info.notes)


@pytest.mark.parametrize(
    ("name", "body", "both"),
    [
        ("scan.raw", modes((1, 12), (12, 1)), r"\[1, 12\] by the mode search or \[12, 1\] by the mode acquire"),
        ("scan_x4_y3.raw", modes((1, 12), (12, 1)), r"\[1, 12\] by .* or \[3, 4\] by the name of the .raw or \[12, 1\] by"),
        ("scan.raw", modes((5, 5), (6, 6)), r"\[5, 5\] by the mode search or \[6, 6\]"),
    ],
)  # fmt: skip
def test_a_scan_of_an_empad_in_doubt_is_refused(tmp_path, name, body, both):
    xml, frames = empad(tmp_path, body, name=name)
    refuses(rf"input.scan_shape: \[scan_y, scan_x\] \({both}", xml)
    agrees(find(xml, scan_shape=(1, 12)), frames.reshape(1, 12, 128, 128))


def test_a_raw_with_a_layout_is_not_asked_of_the_xml(tmp_path):
    _, frames = empad(tmp_path)
    found = find(tmp_path / "scan_x4_y3.raw", shape=(3, 4, 130, 128), dtype="<f4")
    np.testing.assert_array_equal(found.source[(slice(None),) * 4][:, :, :128].ravel(), frames.ravel())  # fmt: skip


def test_empad_refused(tmp_path):
    xml, _ = empad(tmp_path, n=11)
    refuses(r"11 patterns; the scan that the file states, 3 x 4 needs 12", xml)
    xml, _ = empad(tmp_path, filename="scan_x4_y9.raw")
    refuses(r"the patterns are in .*scan_x4_y9\.raw, which is not", xml)
    xml, _ = empad(tmp_path)
    (tmp_path / "scan_x4_y3.raw").write_bytes(bytes(1000))
    refuses(r"y3\.raw: .* of 65,536 bytes, but 1,000 bytes follow", xml)
    for text, message in (
        ("<?xml version='1.0'?><root>", r"a\.xml: not readable XML"),
        ("<?xml version='1.0'?><root/>", r"a\.xml: not an EMPAD \.xml: it names no raw_file"),
        ("<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a 'b'>]><root>&a;</root>", "DOCTYPE"),
        ("<?xml version='1.0'?>" + " " * 5_000_000, "too many for a text of settings"),
    ):
        xml.write_text(text)
        refuses(message, xml)


# --- .seq -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_seq(tmp_path, version, dtype):
    array = numbers((12, 6, 5), dtype)
    found = find(seq(tmp_path / "a.seq", array, version), scan_shape=(3, 4))
    agrees(found, array.reshape(3, 4, 6, 5))
    assert found.info.kind == "a sequence of StreamPix"
    allocated = find(seq(tmp_path / "b.seq", array, version, frames=10), scan_shape=(2, 5))
    agrees(allocated, array[:10].reshape(2, 5, 6, 5))
    assert "the header states 10 patterns; 2 more would fit into the file" in allocated.info.notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression": 1}, r"compressed \(method 1\); expected gray images"),
        ({"format": 200}, "images of 16 bits in format 200; expected gray images"),
        ({"bits": 12}, "images of 12 bits"),
        ({"stride": 10}, "every 10 bytes, which cannot be"),
    ],
)
def test_seq_refused(tmp_path, changes, message):
    refuses(message, seq(tmp_path / "a.seq", numbers((12, 6, 5)), **changes), scan_shape=(3, 4))


# --- .tvips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "lead"), [(1, 12), (2, 60), (2, 77)])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_tvips(tmp_path, version, lead, dtype):
    array = numbers((14, 6, 5), dtype)
    path = tvips(tmp_path / "a.tvips", array, version, lead)
    found = find(path, scan_shape=(3, 4), skip_frames=2)
    agrees(found, array[2:].reshape(SHAPE))
    assert found.info.metadata["pixelsize"] == 15500
    assert not found.info.axes[2].calibrated
    refuses(r"14 patterns; .*skip_frames: 2 .without the first 2", path, scan_shape=(3, 4))


def test_tvips_series(tmp_path):
    array = numbers((12, 6, 5))
    path = tvips(tmp_path / "a_000.tvips", array[:5])
    (tmp_path / "a_001.tvips").write_bytes(frames_of(array[5:6], 60))
    (tmp_path / "a_002.tvips").write_bytes(frames_of(array[6:], 60))
    tvips(tmp_path / "b_003.tvips", array)
    found = find(path, scan_shape=(3, 4))
    agrees(found, array.reshape(SHAPE))
    assert "a series of 3 files" in found.info.notes
    refuses(r"this is part 2 of a series; open .*a_000\.tvips", tmp_path / "a_002.tvips")
    before = found.identity
    (tmp_path / "a_002.tvips").write_bytes(frames_of(array[6:] + 1, 60))
    assert find(path, scan_shape=(3, 4)).identity != before
    (tmp_path / "a_001.tvips").unlink()
    refuses(r"part 1 of the series is missing; the last is .*a_002", path)


def test_tvips_of_rosettasciio(tmp_path):
    writer = pytest.importorskip("rsciio.tvips")
    array = numbers((12, 6, 5))
    axes = [
        {"size": n, "name": name, "scale": 1, "offset": 0, "units": unit, "navigate": unit == "s"}
        for n, name, unit in zip(array.shape, "tyx", ("s", "1/nm", "1/nm"), strict=True)
    ]
    signal = {"data": array, "axes": axes, "metadata": {}, "original_metadata": {}, "attributes": {"_lazy": False}}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer.file_writer(
            str(tmp_path / "a.tvips"), signal, max_file_size=700, show_progressbar=False
        )
    assert len(list(tmp_path.iterdir())) > 2
    agrees(find(tmp_path / "a_000.tvips", scan_shape=(3, 4)), array.reshape(SHAPE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, r"not a TVIPS file: version 3 and a header of 256 bytes"),
        ({"size": 0}, r"version 2 and a header of 0 bytes"),
        ({"bits": 12}, r"12 bits a pixel, where 8 or 16 were expected"),
        ({"dimx": 0}, r"patterns of 6 x 0 uint16"),
        ({"dimx": 2**20}, r"but 1,380 bytes follow; the file was cut"),
        ({"between": 2**31}, r"patterns of 60 bytes, but 0 bytes follow"),
    ],
)
def test_tvips_refused(tmp_path, changes, message):
    path = tvips(tmp_path / "a.tvips", numbers((12, 6, 5)), **changes)
    refuses(message, path)
