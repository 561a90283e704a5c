"""Files of plain numbers, and what is done to any stack: leading frames, flyback, turning."""

import numpy as np
import pytest
from frames_made import SHAPE, agrees, numbers

from stem_dask.core.errors import SourceError
from stem_dask.readers.flat import FramedFile, Run, framed
from stem_dask.readers.open import find
from stem_dask.readers.views import View


@pytest.fixture
def raw(tmp_path):
    """Writes an array behind some bytes and gives the file's path."""

    def write(array, before=0, after=0):
        path = tmp_path / "a.raw"
        path.write_bytes(b"\xaa" * before + array.tobytes() + b"\xbb" * after)
        return path

    return write


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", ">u4", "<f4", ">f8", "i8"])
@pytest.mark.parametrize("before", [0, 13])
def test_raw(raw, dtype, before):
    array = numbers(dtype=dtype)
    path = raw(array, before)
    agrees(find(path, shape=SHAPE, dtype=dtype, offset=before), array)
    stack = {"shape": [12, 6, 5], "dtype": dtype, "offset": before}
    agrees(find(path, scan_shape=(3, 4), **stack), array)
    with pytest.raises(SourceError, match=r"a stack of 12 patterns of 6 x 5 pixels; give its scan"):
        find(path, **stack)


def test_raw_with_bytes_behind_is_noted(raw):
    found = find(raw(numbers(), 0, 7), shape=SHAPE, dtype="uint16")
    assert found.info.notes == (
        "7 bytes after the patterns are not read; for a header at the beginning of the file set input.offset: 7",
    )
    assert found.info.metadata == {"shape": list(SHAPE), "dtype": "uint16", "offset": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"set input\.shape: .* and input\.dtype"),
        ({"shape": SHAPE}, r"set input\.shape: .* and input\.dtype"),
        ({"shape": (3, 4), "dtype": "u2"}, r"input\.shape is \[3, 4\]; give \[scan_y"),
        ({"shape": (3, 0, 6, 5), "dtype": "u2"}, r"sizes of 1 or more"),
        ({"shape": SHAPE, "dtype": "counts"}, r"input\.dtype is 'counts'; give numpy's name"),
        ({"shape": SHAPE, "dtype": "c8"}, "patterns are real numbers"),
        ({"shape": SHAPE, "dtype": "object"}, "patterns are real numbers"),
        ({"shape": SHAPE, "dtype": "u2", "offset": 2}, r"3 x 4 x 6 x 5 uint16 from byte 2 on need 720 bytes, the "
         r"file has 718, 11 patterns of 6 x 5; set input.shape: \[11, 6, 5\], input.scan_shape: \[2, 4\], input.skip_frames: \[0, 3\]; check"),
        ({"shape": SHAPE, "dtype": "f4"}, "need 1,440 bytes, the file has 720, 6 patterns"),
        ({"shape": (2**30, 2**30, 2**30, 2**30), "dtype": "f4"}, "the file has 720, 0 patterns"),
        ({"shape": (3, 4, 6, 4), "dtype": "u2"}, r"12 bytes more at each pattern, .*: input.frame_header: 12 or input.frame_footer: 12; or 15 patterns, .*columns: 1; or check"),
        ({"shape": (3, 4, 6, 7), "dtype": "u1"}, "need 504 bytes, the file has 720: 18 bytes more at each pattern, a header or a footer: input.frame_header: 18 or"),
        ({"shape": (10, 6, 5), "dtype": "u2"}, r"frame_header: 12 or .*: 12; or 12 patterns are there: input\.shape: \[12, 6, 5\]; or check"),
        ({"shape": (3, 3, 6, 5), "dtype": "u2"}, r"frame_footer: 20; or 12 patterns, .*: input\.shape: \[12, 6, 5\], "
         r"input\.scan_shape: \[3, 4\], input\.drop_columns: 1; or 12 patterns, 4 complete lines of 3: .* input.scan_shape: \[4, 3\]; or check"),
        ({"shape": SHAPE, "dtype": "f4", "offset": 5000}, "the file has 0, 0 patterns"),
    ],
)  # fmt: skip
def test_raw_refused(raw, options, message):
    with pytest.raises(SourceError, match=message) as caught:
        find(raw(numbers()), **options)
    assert "a.raw: " in str(caught.value)


def test_a_layout_is_for_raw_files_only(tmp_path):
    np.save(tmp_path / "a.npy", numbers())
    with pytest.raises(SourceError, match=r"are for \.raw files; a numpy file says its own"):
        find(tmp_path / "a.npy", dtype="u2")


# --- what is done to a stack ------------------------------------------------------------------------------------


def test_skip_frames(raw):
    path = raw(numbers((14, 6, 5)))
    options = {"shape": (14, 6, 5), "dtype": "u2"}
    found = find(path, **options, scan_shape=(3, 4), skip_frames=2)
    agrees(found, numbers((14, 6, 5))[2:].reshape(SHAPE))
    assert "left out the first 2 patterns" in found.info.notes
    found = find(path, **options, scan_shape=(3, 3), skip_frames=(2, 3))
    agrees(found, numbers((14, 6, 5))[2:11].reshape(3, 3, 6, 5))
    assert "left out the first 2 and the last 3 patterns" in found.info.notes
    with pytest.raises(
        SourceError,
        match=r"skip_frames: \[4, 1\] \(without the first 2\); or .*: \[2, 3\] \(without the last 2\)$",
    ):
        find(path, **options, scan_shape=(3, 3), skip_frames=(2, 1))
    with pytest.raises(SourceError, match=r"skip_frames is \(7, 7\), but there are 14 patterns"):
        find(path, **options, skip_frames=(7, 7))
    with pytest.raises(
        SourceError,
        match=r"14 patterns; input.scan_shape 3 x 4 needs 12; set .*input.skip_frames: 2 \(without the first 2\)",
    ):
        find(path, **options, scan_shape=(3, 4))
    with pytest.raises(
        SourceError, match=r"13 patterns; .* input.skip_frames: 2 .without the first"
    ):
        find(path, **options, scan_shape=(3, 4), skip_frames=1)
    with pytest.raises(SourceError, match=r"skip_frames is 14, but there are 14 patterns"):
        find(path, **options, skip_frames=14)
    path = raw(numbers())
    with pytest.raises(SourceError, match=r"are a scan of 3 x 4 already; leave it out"):
        find(path, shape=SHAPE, dtype="u2", skip_frames=1)


def test_the_error_does_the_arithmetic(raw):
    path = raw(np.zeros(65280, "u1"))
    with pytest.raises(
        SourceError,
        match=r"65,280 patterns; input.scan_shape 256 x 256 needs 65,536; set input.scan_shape: \[255, 256\] \(",
    ):
        find(path, shape=(65280, 1, 1), dtype="u1", scan_shape=(256, 256))


def test_drop_columns(raw):
    path = raw(numbers())
    for options in ({"shape": SHAPE}, {"shape": (12, 6, 5), "scan_shape": (3, 4)}):
        found = find(path, dtype="u2", drop_columns=1, **options)
        agrees(found, numbers()[:, :3])
        assert found.info.axes[1].size == 3
        assert found.info.notes[-1] == "left out the last 1 columns of the scan"
        agrees(
            find(path, dtype="u2", drop_columns=1, scan_roi=[1, 3, 0, 3], scan_step=2, **options),
            numbers()[1:3:2, 0:3:2],
        )
        with pytest.raises(SourceError, match=r"drop_columns is 4, but .* rows of 4 positions"):
            find(path, dtype="u2", drop_columns=4, **options)
        with pytest.raises(SourceError, match=r"does not fit the scan of 3 x 3 positions"):
            find(path, dtype="u2", drop_columns=1, scan_roi=[0, 3, 0, 4], **options)


def test_parts_of_a_list(tmp_path):
    np.save(tmp_path / "a.npy", numbers((14, 6, 5)))
    agrees(find(tmp_path / "a.npy", skip_frames=3), numbers((14, 6, 5))[3:])
    with pytest.raises(SourceError, match=r"drop_columns is 1, but the input has a list"):
        find(tmp_path / "a.npy", drop_columns=1)


def test_flip(raw, tmp_path):
    path = raw(numbers())
    found = find(path, shape=SHAPE, dtype="u2", flip=True)
    agrees(found, numbers()[:, :, ::-1])
    assert "every pattern is flipped" in found.info.notes[-1]
    np.save(tmp_path / "a.npy", numbers((14, 6, 5)))
    agrees(find(tmp_path / "a.npy", flip=True), numbers((14, 6, 5))[:, ::-1])


def test_flip_turns_the_calibration_about_its_origin(tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.hspy", "w") as file:
        data = file.create_dataset("Experiments/s/data", data=numbers())
        attrs = {"name": "ky", "scale": 0.5, "offset": -1.0, "units": "1/nm"}
        data.parent.create_group("axis-2").attrs.update(attrs)
    before = find(tmp_path / "a.hspy").info.axes[2]
    after = find(tmp_path / "a.hspy", flip=True).info.axes[2]
    values = [-before.value(i) for i in range(6)][::-1]
    assert [after.value(i) for i in range(6)] == values


def test_all_at_once(raw):
    array = numbers((14, 6, 5))
    found = find(
        raw(array), shape=(14, 6, 5), dtype="u2", scan_shape=(3, 4), skip_frames=2, drop_columns=1,
        flip=True, scan_roi=[0, 3, 1, 3], scan_step=2,
    )  # fmt: skip
    agrees(found, array[2:].reshape(SHAPE)[0:3:2, 1:3:2, ::-1])


def test_axes_of_length_one_beyond_four(tmp_path):
    np.save(tmp_path / "a.npy", numbers((1, *SHAPE)))
    found = find(tmp_path / "a.npy")
    agrees(found, numbers())
    assert found.info.notes == ("left out the axes of length 1 of 1 x 3 x 4 x 6 x 5",)
    np.save(tmp_path / "a.npy", numbers((1, 1, 4, 1, 6, 5)))
    agrees(find(tmp_path / "a.npy"), numbers((4, 1, 6, 5)))
    np.save(tmp_path / "a.npy", numbers((2, *SHAPE)))
    with pytest.raises(SourceError, match="no 4D array"):
        find(tmp_path / "a.npy")


# --- frames -----------------------------------------------------------------------------------------------------


def test_frames_in_several_files(tmp_path):
    array = numbers((7, 6, 5))
    runs = []
    for name, first, last in (("a", 0, 3), ("b", 3, 4), ("c", 4, 7)):
        frames = [b"head" + frame.tobytes() + b"end" for frame in array[first:last]]
        (tmp_path / name).write_bytes(b"".join(frames))
        runs.append(Run(str(tmp_path / name), 4, 67, last - first))
    source = FramedFile(tuple(runs), np.dtype("u2"), (6, 5))
    for part in (
        slice(None),
        slice(2, 5),
        slice(1, 7, 2),
        slice(3, 4),
        slice(5, 5),
        slice(0, 7, 4),
    ):
        for rows in (slice(None), slice(1, 4), slice(0, 6, 3)):
            for columns in (slice(None), slice(2, 3), slice(1, 5, 2)):
                key = (part, rows, columns)
                np.testing.assert_array_equal(source[key], array[key])
                np.testing.assert_array_equal(View.of(source).flip(-2)[key], array[:, ::-1][key])
    (tmp_path / "b").write_bytes(b"head")
    assert source[0:3, :, :].shape == (3, 6, 5)
    with pytest.raises(SourceError, match=r"/b: the file ends at byte 4, in pattern 0"):
        _ = source[:, :, :]
    (tmp_path / "b").unlink()
    with pytest.raises(SourceError, match=r"/b does not exist on"):
        _ = source[:, :, :]


def test_framed_refuses_what_cannot_be(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    u1 = np.dtype("u1")
    assert framed(str(path), 10, 30, u1, (4, 5))[0].shape == (3, 4, 5)
    assert framed(str(path), 10, 30, u1, (6, 5))[0].shape == (3, 6, 5)
    source, notes = framed(str(path), 20, 30, u1, (6, 5))
    assert source.shape == (2, 6, 5)
    assert notes == ("20 bytes after pattern 2 are less than a pattern; not read",)
    for offset, stride, shape in (
        (10, 29, (6, 5)),
        (10, 30, (0, 5)),
        (71, 30, (6, 5)),
        (200, 30, (6, 5)),
    ):
        with pytest.raises(SourceError, match="the header says patterns"):
            framed(str(path), offset, stride, u1, shape)
