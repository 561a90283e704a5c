"""Synthetic datasets: the known answers hold, and both readers see in the file what was put in."""

import struct
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from stem_dask.core.errors import ConfigError
from stem_dask.readers.dm import list_dm, read_tags
from stem_dask.writers.synthetic import (
    Synthetic,
    beam_centers,
    pattern_row,
    thickness,
    write_dataset,
    write_dm4,
)

SMALL = Synthetic(scan_shape=(5, 4), detector_shape=(40, 36), electrons=2000, disc_radius=3)


def all_rows(spec):
    return np.stack([pattern_row(spec, y) for y in range(spec.scan_shape[0])])


def centroids(patterns):
    total = patterns.sum(axis=(2, 3), dtype=np.float64)
    y, x = (np.arange(n) for n in patterns.shape[2:])
    return (patterns.sum(3) * y).sum(2) / total, (patterns.sum(2) * x).sum(2) / total


def read(image):
    return image.source[(slice(None),) * len(image.source.shape)]


# --- the known answer -------------------------------------------------------------------------------------------


def test_centroids_are_the_known_beam_centers():
    spec = Synthetic(electrons=4e6, dtype="uint32")
    for found, known in zip(centroids(all_rows(spec)), beam_centers(spec), strict=True):
        # Standard error of a centroid: spread of the electrons over sqrt(electrons), about 20 / 2000.
        assert np.abs(found - known).max() < 0.06
        assert np.abs(found - known).mean() < 0.012
        assert abs((found - known).mean()) < 0.002


def test_single_discs_without_scattering_are_exact_to_a_hundredth():
    spec = Synthetic(scan_shape=(1, 30), electrons=1e7, spots=0, dtype="uint32")
    row = all_rows(spec)
    found, known = centroids(np.where(row > 1000, row, 0)), beam_centers(spec)
    assert np.abs(np.subtract(found, known)).max() < 0.03


def test_the_beam_wanders_as_far_as_it_was_asked_to():
    for descan in (0.0, 1.0, 4.0):
        cy, cx = beam_centers(Synthetic(descan=descan))
        assert cy.shape == cx.shape == (24, 20)
        assert np.abs(cy - 63.5).max() <= descan / 2
        assert np.abs(cx - 59.5).max() <= descan / 2
        assert 0.9 * descan <= np.ptp(cy) <= descan
        assert 0.9 * descan <= np.ptp(cx) <= descan


def test_the_dose_is_what_was_asked_for():
    totals = all_rows(Synthetic(electrons=5000)).sum(axis=(2, 3))
    # 480 patterns of 5000 electrons: the mean is known to sqrt(5000 / 480) = 3.2.
    assert abs(totals.mean() - 5000) < 16
    assert 0.8 < totals.var() / 5000 < 1.25


def test_the_particle_scatters_and_the_vacuum_does_not():
    spec = Synthetic()
    rows, (cy, cx) = all_rows(spec), beam_centers(spec)
    y, x = np.ogrid[:128, :120]
    distance = np.hypot(y - cy[..., None, None], x - cx[..., None, None])
    outside = (rows * (distance > 20)).sum(axis=(2, 3)) / spec.electrons
    particle = thickness(spec)
    assert particle[0, 0] == particle[-1, -1] == 0
    assert particle[12, 10] > 0.98
    assert outside[particle == 0].max() < 0.015
    assert outside[particle > 0.9].min() > 0.1
    bragg = outside[particle > 0.9]
    assert bragg.max() / bragg.min() > 1.3  # the intensities vary over the particle


def test_eight_separate_spots_on_two_rings_around_the_beam():
    spec = Synthetic(electrons=4e6, dtype="uint32")
    middle = pattern_row(spec, 12)[10]
    labels, n_discs = ndimage.label(middle > 150)
    assert n_discs == 9
    discs = np.array(ndimage.center_of_mass(labels > 0, labels, range(1, 10)))
    beam = np.array([center[12, 10] for center in beam_centers(spec)])
    radii = np.sort(np.hypot(*(discs - beam).T))
    ring = 0.26 * 120
    np.testing.assert_allclose(radii, [0, *[ring] * 4, *[ring * 2**0.5] * 4], atol=0.3)


# --- rows -------------------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_order_they_are_made_in():
    forward = all_rows(SMALL)
    backward = np.stack([pattern_row(SMALL, y) for y in reversed(range(5))])[::-1]
    np.testing.assert_array_equal(forward, backward)
    assert not np.array_equal(forward[0], pattern_row(Synthetic(**{**vars(SMALL), "seed": 1}), 0))
    alike = [pattern_row(Synthetic((5, 4), descan=0, spots=0), y)[0] for y in (0, 1)]
    assert not np.array_equal(*alike)  # each row has its own noise
    assert forward.dtype == np.uint16
    assert forward.shape == (5, 4, 40, 36)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "float32", "float64"])
def test_every_dtype_has_the_same_counts(dtype):
    spec = Synthetic(**{**vars(SMALL), "dtype": dtype})
    row = pattern_row(spec, 2)
    assert row.dtype == dtype
    np.testing.assert_array_equal(row, pattern_row(SMALL, 2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scan_shape": (0, 4)}, "two sizes each"),
        ({"detector_shape": (4,)}, "two sizes each"),
        ({"spots": 7}, "spots is 7; it must be even and 0 to 20"),
        ({"spots": 22}, "spots is 22"),
        ({"electrons": -1}, "electrons must be 0 or more"),
        ({"disc_radius": 0}, "disc_radius more than 0"),
        ({"dtype": "float16"}, "dtype float16 has no place in a DM file; use one of"),
    ],
)
def test_options_that_cannot_be(options, match):
    with pytest.raises(ConfigError, match=match):
        Synthetic(**options)


def test_rows_that_cannot_be():
    for y in (-1, 5):
        with pytest.raises(ConfigError, match=f"no scan row {y}: the scan has rows 0 to 4"):
            pattern_row(SMALL, y)
    with pytest.raises(ConfigError, match="more than uint8 holds; choose a larger dtype"):
        pattern_row(Synthetic(electrons=1e6, dtype="uint8"), 0)


# --- the file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_rosettasciio_and_our_reader_agree_with_what_was_written(tmp_path, lazy):
    digitalmicrograph = pytest.importorskip("rsciio.digitalmicrograph")
    path = write_dataset(tmp_path / "a.dm4", SMALL)
    assert path == tmp_path / "a.dm4"
    known = all_rows(SMALL)
    survey = (SMALL.electrons * thickness(SMALL)).astype(np.float32)
    theirs = digitalmicrograph.file_reader(str(path), lazy=lazy)
    ours = list_dm(path)
    assert [image.about["title"] for image in ours] == ["Survey", "Diffraction SI"]
    for mine, other, expected in zip(ours, theirs, (survey, known), strict=True):
        assert mine.source.dtype == other["data"].dtype == expected.dtype
        np.testing.assert_array_equal(read(mine), expected)
        np.testing.assert_array_equal(np.asarray(other["data"]), expected)
        for axis, dictionary in zip(mine.axes, other["axes"], strict=True):
            keys = ("size", "scale", "offset", "units")
            assert [getattr(axis, key) for key in keys] == [dictionary[key] for key in keys]


def test_calibration_and_tags_of_the_file(tmp_path):
    rows = np.ones((2, 3, 8, 7), np.uint16)
    path = write_dm4(
        tmp_path / "a.dm4", rows, (2, 3), (8, 7), "uint16", scan_scale_nm=0.25, k_scale_inv_nm=0.5
    )
    survey, image = list_dm(path)
    assert [(a.scale, a.offset, a.units) for a in image.axes] == [
        (0.25, 0, "nm"),
        (0.25, 0, "nm"),
        (0.5, -2.0, "1/nm"),
        (0.5, -1.5, "1/nm"),
    ]
    assert (read(survey) == 0).all()
    assert image.swapped is True
    assert image.metadata["Meta Data"]["Format"] == "Diffraction image"
    assert image.metadata["Microscope Info"]["Voltage"] == 200_000
    tags = read_tags(path)[0]
    images = tags["ImageList"]
    assert tags["Thumbnails"]["0"]["ImageIndex"] == 0
    assert [images[i]["ImageData"]["DataType"] for i in "012"] == [23, 2, 10]
    assert [images[i]["ImageData"]["PixelDepth"] for i in "012"] == [4, 4, 2]
    assert list(images["2"]["ImageData"]["Dimensions"].values()) == [7, 8, 3, 2]
    brightness = images["2"]["ImageData"]["Calibrations"]["Brightness"]
    assert brightness == {"Origin": 0, "Scale": 1, "Units": ""}


@pytest.mark.parametrize(("swapped", "expected"), [(1, True), (0, False), (None, None)])
def test_the_order_tag(tmp_path, swapped, expected):
    rows = np.zeros((2, 3, 4, 5), np.float32)
    path = write_dm4(tmp_path / "a.dm4", rows, (2, 3), (4, 5), "float32", swapped=swapped)
    assert list_dm(path)[-1].swapped is expected


def test_padding_moves_the_pixels(tmp_path):
    rows = np.arange(120, dtype=np.uint16).reshape(2, 3, 4, 5)
    offsets = {}
    for pad in (0, 1, 2, 5000):
        path = write_dm4(tmp_path / "a.dm4", rows, (2, 3), (4, 5), "uint16", pad=pad)
        image = list_dm(path)[-1]
        np.testing.assert_array_equal(read(image), rows)
        offsets[pad] = image.source.offset
    assert offsets[2] == offsets[1] + 1
    assert offsets[5000] == offsets[1] + 4999
    assert offsets[1] > offsets[0]


def end_of_group(data, position):
    """Walk the tags by their size fields alone, as a reader that skips does; returns where the group ends."""
    (n_entries,) = struct.unpack_from(">q", data, position + 2)
    position += 10
    for _ in range(n_entries):
        kind, n_name = struct.unpack_from(">BH", data, position)
        position += 3 + n_name
        (n_bytes,) = struct.unpack_from(">q", data, position)
        position += 8
        if kind == 20:
            assert end_of_group(data, position) == position + n_bytes
        else:
            assert data[position : position + 4] == b"%%%%"
        position += n_bytes
    return position


def test_size_fields_add_up_to_the_end_of_the_file(tmp_path):
    data = write_dataset(tmp_path / "a.dm4", SMALL).read_bytes()
    assert struct.unpack_from(">iqi", data) == (4, len(data) - 24, 1)
    assert end_of_group(data, 16) == len(data) - 8
    assert data[-8:] == bytes(8)


def test_equal_options_give_equal_bytes(tmp_path):
    first, second = (write_dataset(tmp_path / f"{name}.dm4", SMALL) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_rows_are_streamed(tmp_path):
    row = np.ones((20, 64, 64), np.uint16)

    def rows():
        for _ in range(30):
            yield row.copy()

    tracemalloc.start()
    try:
        path = write_dm4(tmp_path / "a.dm4", rows(), (30, 20), (64, 64), "uint16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * row.nbytes
    assert path.stat().st_size > 30 * row.nbytes


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (np.zeros((1, 3, 4, 5), "u2"), "the pieces have 60 fewer elements than the 120 announced"),
        (np.zeros((3, 3, 4, 5), "u2"), "the pieces have 60 more elements than the 120 announced"),
        (np.zeros((2, 3, 5, 4), "u2"), r"row 0 has shape \(3, 5, 4\), where \(3, 4, 5\) was"),
        (np.zeros((2, 3, 4, 5), "i4"), "dtype int32, which uint16 cannot hold"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, rows, match):
    path = tmp_path / "a.dm4"
    path.write_bytes(b"old")
    with pytest.raises(ConfigError, match=match):
        write_dm4(path, rows, (2, 3), (4, 5), "uint16")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
