"""Files of another size, or with another number of patterns, than expected: what the refusal proposes is followed."""

import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
import tifffile
import yaml
import zarr
from frames_made import SHAPE, agrees, mib, mrc, numbers, tvips

from stem_dask.core.errors import SourceError
from stem_dask.readers.open import find

WAY = r"input\.\w+: (?:\[[^\]]*\]|[\w.]+)"


def refused(path, **options):
    """The message, and the keys of each way that it proposes."""
    with pytest.raises(SourceError) as caught:
        find(path, **options)
    message = str(caught.value)
    ways = []
    for text in re.split(r"; or |; ", message):
        common = {}
        alternatives = re.split(r" or (?=input\.frame_footer)", text)
        for alternative in alternatives:
            keys = {}
            for key in re.findall(WAY, alternative):
                name, value = key.removeprefix("input.").split(": ", 1)
                keys[name] = yaml.safe_load(value)
            if keys:
                ways.append({**common, **keys})
            common = {name: value for name, value in keys.items() if name != "frame_header"}
    return message, ways


def opened(path, options, way):
    """The patterns as they are read with the keys of a way."""
    found = find(path, **{**options, **way})
    return found.source[(slice(None),) * len(found.source.shape)]


def framed(array, before, after):
    """The bytes of patterns, each between bytes of its own."""
    return b"".join(
        b"\xaa" * before + pattern.tobytes() + b"\xbb" * after
        for pattern in array.reshape(-1, *array.shape[-2:])
    )


@pytest.mark.parametrize(("before", "after"), [(7, 0), (0, 7), (60, 0), (3, 4)])
def test_bytes_at_each_pattern_of_a_raw_file(tmp_path, before, after):
    array = numbers((4, 5, 8, 8))
    path = tmp_path / "a.raw"
    path.write_bytes(b"head" + framed(array, before, after))
    options = {"shape": [4, 5, 8, 8], "dtype": "uint16", "offset": 4}
    message, ways = refused(path, **options)
    each = before + after
    assert f"{each} bytes more at each pattern, a header or a footer" in message
    assert ways[:2] == [{"frame_header": each}, {"frame_footer": each}]
    assert "skip_frames" not in message
    found = find(path, **options, frame_header=before, frame_footer=after)
    agrees(found, array)
    agrees(find(path, **{**options, "shape": [20, 8, 8]}, scan_shape=(4, 5), frame_header=before, frame_footer=after), array)  # fmt: skip
    if not before or not after:
        np.testing.assert_array_equal(opened(path, options, ways[0 if before else 1]), array)
    assert found.info.metadata.get("frame_header", 0) == before
    if not before:  # a gap
        path.write_bytes(framed(array, 0, after)[:-after])
        options = {"shape": [4, 5, 8, 8], "dtype": "uint16"}
        message, ways = refused(path, **options)
        assert f"a gap of {after} bytes between patterns: input.frame_footer: {after}" in message
        agrees(find(path, **options, **ways[0]), array)


@pytest.mark.parametrize("shape", [(4, 4, 16, 16), (2, 32, 16, 16)])
def test_headers_that_are_whole_patterns_together(tmp_path, shape):
    """As many bytes as patterns more: leaving these out would shift every pattern against the one before."""
    array = numbers(shape)
    path = tmp_path / "a.raw"
    path.write_bytes(framed(array, 32, 0))
    message, ways = refused(path, shape=shape, dtype="u2")
    assert ways[0] == {"frame_header": 32}
    assert "skip_frames" not in message
    agrees(find(path, shape=shape, dtype="u2", **ways[0]), array)
    n = path.stat().st_size // 512
    options = {"shape": [n, 16, 16], "dtype": "u2", "scan_shape": shape[:2]}
    message, ways = refused(path, **options)
    n_true = shape[0] * shape[1]
    assert ways[0] == {"shape": [n_true, 16, 16], "frame_header": 32}
    np.testing.assert_array_equal(opened(path, options, ways[0]), array)
    found = find(path, **options, skip_frames=[0, n - n_true])
    assert any("check that patterns do not shift" in note for note in found.info.notes)


def test_a_header_of_a_raw_file(tmp_path):
    """The bytes at the beginning are named where they are too few for each pattern, too."""
    array = numbers((4, 5, 8, 8))
    path = tmp_path / "a.raw"
    for n in (7, 301):
        path.write_bytes(b"h" * n + array.tobytes())
        found = find(path, shape=array.shape, dtype="u2")
        assert f"set input.offset: {n}" in found.info.notes[0]
        agrees(find(path, shape=array.shape, dtype="u2", offset=n), array)
    path.write_bytes(b"h" * 1000 + array.tobytes())  # as many as 20 headers of 50 bytes
    message, ways = refused(path, shape=array.shape, dtype="u2")
    assert "one header of 1,000 bytes before all patterns" in message
    agrees(find(path, shape=array.shape, dtype="u2", **ways[-1]), array)
    path.write_bytes(b"h" * 1023 + array.tobytes())
    _, ways = refused(path, shape=array.shape, dtype="u2")
    assert ways[-1] == {"offset": 1023}


def test_a_raw_file_that_was_cut(tmp_path):
    array = numbers((6, 10, 8, 8))
    path = tmp_path / "a.raw"
    options = {"shape": [6, 10, 8, 8], "dtype": "u2"}
    for n, lines in ((34, 3), (30, 3), (10, 1)):
        path.write_bytes(array.tobytes()[: n * 128])
        _, ways = refused(path, **options)
        np.testing.assert_array_equal(opened(path, options, ways[0]), array[:lines])
    path.write_bytes(array.tobytes()[: 4 * 128])
    _, ways = refused(path, **options)
    np.testing.assert_array_equal(opened(path, options, ways[0]), array[:1, :4])


# --- an EMPAD's .raw without its .xml ---------------------------------------------------------------------------


def empad_raw(path, scan):
    array = np.zeros((scan[0] * scan[1], 130, 128), "<f4")
    array[:, :128] = np.arange(len(array), dtype="f4")[:, None, None] + np.arange(128)
    array[:, 128:] = 7.0
    array.tofile(path)
    return array[:, :128].reshape(*scan, 128, 128)


@pytest.mark.parametrize("scan", [(8, 8), (6, 12), (5, 13)])
def test_a_raw_file_of_an_empad(tmp_path, scan):
    array = empad_raw(tmp_path / "sim.raw", scan)
    message, ways = refused(tmp_path / "sim.raw", shape=[*scan, 128, 128], dtype="float32")
    assert f"{scan[0] * scan[1]} patterns of an EMPAD, 130 x 128 float32" in message
    agrees(find(tmp_path / "sim.raw", **ways[0]), array)
    # another scan than the file has, and nothing at all
    for options in ({"shape": [3, 17, 128, 128], "dtype": "float32"}, {}):
        message, ways = refused(tmp_path / "sim.raw", **options)
        assert "skip_frames" not in message
        way = {key: value for key, value in ways[0].items() if key != "scan_shape"}
        agrees(find(tmp_path / "sim.raw", **way, scan_shape=scan), array)


def test_a_raw_file_of_an_empad_whose_scan_is_named_or_mistaken(tmp_path):
    """64 of 130 x 128 are 65 of 128 x 128: py4DSTEM read such a file so."""
    array = empad_raw(tmp_path / "scan_x3_y2.raw", (2, 3))
    _, ways = refused(tmp_path / "scan_x3_y2.raw")
    agrees(find(tmp_path / "scan_x3_y2.raw", **ways[0]), array)
    empad_raw(tmp_path / "sim.raw", (8, 8))
    (note, *_) = find(tmp_path / "sim.raw", shape=[5, 13, 128, 128], dtype="float32").info.notes
    assert "128 x 128 may be wrong: its size is that of 64 patterns of an EMPAD" in note


# --- stacks of every kind ---------------------------------------------------------------------------------------


def hdf5(path, array):
    with h5py.File(path, "w") as file:
        file["data"] = array


MAKERS = {
    "a.npy": np.save,
    "a.h5": hdf5,
    "a.raw": lambda path, array: array.tofile(path),
    "a.zarr": lambda path, array: zarr.save_array(str(path), array),
    "a.tif": lambda path, array: tifffile.imwrite(path, array, photometric="minisblack"),
    "a.mib": mib,
    "a.mrc": mrc,
    "a.tvips": tvips,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["flyback", "two columns", "stopped", "lines", "square", "frames"])
def test_another_number_of_patterns_than_the_scan_has(tmp_path, name, kind):
    scan, there = (6, 10), (6, 10)
    if kind in ("flyback", "two columns"):
        there = (6, 11 if kind == "flyback" else 12)
    if kind == "square":
        scan, there = (6, 6), (6, 7)
    lines = numbers((*there, 8, 6))
    truth = lines[: scan[0], : scan[1]]
    stack = lines.reshape(-1, 8, 6)
    if kind == "stopped":
        stack, truth = stack[:34], truth[:3]
    if kind == "lines":
        scan, truth = (4, 10), lines
    if kind == "frames":
        scan, truth, stack = (6, 10), lines, numbers((62, 8, 6))
        truth = stack[2:].reshape(6, 10, 8, 6)
    MAKERS[name](tmp_path / name, stack)
    options = {"scan_shape": scan}
    if name == "a.raw":
        options |= {"shape": list(stack.shape), "dtype": "u2"}
    message, ways = refused(tmp_path / name, **options)
    read = [opened(tmp_path / name, options, way) for way in ways]
    assert any(np.array_equal(one, truth) for one in read)
    if kind not in ("lines", "square"):  # where several ways fit
        np.testing.assert_array_equal(read[0], truth)
    if kind != "frames" and kind != "stopped":
        assert "skip_frames" not in message


# --- headers that state too little ------------------------------------------------------------------------------


def followed(message, folder):
    """What is read after the link that a message proposes was made."""
    link, options = re.search(r"(ln -s \S+ \S+), then open (\S+ .*)$", message).groups()
    subprocess.run(link, shell=True, check=True, cwd=folder)
    name, *keys = options.replace("'", "").split()
    given = {}
    for key in keys:
        if key.startswith("input."):
            key, value = key.removeprefix("input.").split("=")
            given[key] = yaml.safe_load(value)
    found = find(folder / name, **given, scan_shape=(3, 4))
    return found.source[(slice(None),) * 4]


def test_an_mrc_with_fewer_or_more_patterns_than_it_states(tmp_path):
    array = numbers((12, 6, 5))
    for n in (13, 11):
        path = mrc(tmp_path / f"a{n}.mrc", array, x8=("I", n))
        with pytest.raises(SourceError) as caught:
            find(path)
        np.testing.assert_array_equal(followed(str(caught.value), tmp_path), array.reshape(SHAPE))


@pytest.mark.parametrize("kind", ["a.mrc", "a.tvips", "a.npy"])
def test_bytes_at_each_pattern_that_a_header_does_not_state(tmp_path, kind):
    array = numbers((12, 6, 5))
    path = tmp_path / kind
    MAKERS[kind](path, array)
    head = path.read_bytes()
    lead = 60 if kind == "a.tvips" else 0
    stride = lead + 60
    head, body = head[: len(head) - 12 * stride], head[len(head) - 12 * stride :]
    frames = [body[i * stride : (i + 1) * stride] + b"\0" * 3 for i in range(12)]
    path.write_bytes(head + b"".join(frames))
    with pytest.raises(SourceError, match=r"header or") as caught:
        find(path)
    message = str(caught.value)
    before, after = message.split("input.frame_header=")[0], message.rsplit(", or ", 1)[1]
    after = after.split(";")[0].removeprefix("input.frame_header=")
    link = before + (f"input.frame_header={lead} " if lead else "") + after[after.index("input.frame_footer") :]  # fmt: skip
    np.testing.assert_array_equal(followed(link, tmp_path), array.reshape(SHAPE))


# --- the cases of the issue -------------------------------------------------------------------------------------


@pytest.fixture
def cases(shared_data):
    """The folder of small files with known answers."""
    if not (shared_data / "cases").is_dir():
        pytest.skip("the shared cases are not on this machine")
    return shared_data / "cases"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("a1_raw_header_per_frame/frames.raw", {"shape": [4, 4, 16, 16], "dtype": "uint16"}, ""),
        ("b1_mib_line_flyback/a.mib", {}, "set input.scan_shape: [6, 11], input.drop_columns: 1"),
        ("b2_mib_stopped/a.mib", {}, "set input.scan_shape: [3, 10], input.skip_frames: [0, 4]"),
    ],
)
def test_cases(cases, name, options, said):
    message, ways = refused(cases / name, **options)
    assert said in message
    if options:
        assert "skip_frames" not in message
        assert ways[0] == {"frame_header": 32}
    truth = np.load((cases / name).with_name("truth.npy"))
    agrees(find(cases / name, **options, **ways[0]), truth)


def test_case_a2(cases, tmp_path):
    make = (cases / "a2_empad_raw_alone" / "make.py").read_text()
    (tmp_path / "make.py").write_text(make)
    subprocess.run([sys.executable, "make.py"], cwd=tmp_path, check=True)
    message, ways = refused(tmp_path / "sim.raw", shape=[8, 8, 128, 128], dtype="float32")
    assert "EMPAD" in message
    assert "130 x 128" in message
    read = opened(tmp_path / "sim.raw", {}, ways[0])
    np.testing.assert_array_equal(read[:2, :2], np.load(tmp_path / "truth.npy"))
