"""Small files of cameras, made by hand, and what every reader of them must do."""

import json
import pickle
import struct
import tracemalloc
from math import prod
from pathlib import Path

import h5py
import numpy as np
import pytest

from stem_dask.core.errors import SourceError
from stem_dask.readers.open import find

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "real"
SHAPE = (3, 4, 6, 5)


def numbers(shape=SHAPE, dtype="u2"):
    """Every element another value, as far as the type allows."""
    return (np.arange(prod(shape)) % 60001).reshape(shape).astype(dtype)


def real(name):
    """A file of the shared folder, and what is known about it."""
    if not (SHARED / name).exists():
        pytest.skip(f"the shared file {name} is not on this machine")
    return SHARED / name, json.loads((SHARED / "facts.json").read_text())[name]["signals"][-1]


def refuses(message, path, **options):
    """Opening a file raises an error that names it."""
    with pytest.raises(SourceError, match=message) as caught:
        find(path, **options)
    assert str(path.parent) in str(caught.value)


def agrees(found, array):
    """The source holds the array: as a whole, in parts, and after pickling; opening again gives the same."""
    source = pickle.loads(pickle.dumps(found.source))
    # every task has it
    assert len(pickle.dumps(found.source)) < 4000 + 300 * len(found.files)
    assert source == found.source
    assert source.shape == found.info.shape == array.shape
    assert source.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    whole = (slice(None),) * array.ndim
    np.testing.assert_array_equal(source[whole], array)
    rng = np.random.default_rng(1)
    for _ in range(40):
        part = tuple(
            slice(*sorted(rng.integers(0, n + 1, 2).tolist()), int(rng.integers(1, 4)))
            for n in array.shape
        )
        block = source[part]
        assert block.flags.c_contiguous
        np.testing.assert_array_equal(block, array[part])
    json.dumps(found.info.metadata, allow_nan=False)


def knows(found, fact):
    """A real file has the totals and centroids that others computed."""
    array = found.source[(slice(None),) * 4].astype("f8")
    assert list(array.shape) == fact["shape"]
    assert array.sum() == pytest.approx(fact["sum"], rel=1e-12)
    totals = np.array(fact["per_pattern"]["total"], "f8")
    np.testing.assert_allclose(array.sum((2, 3)), totals, rtol=1e-12)
    return array


def opens_in_little(path, n_bytes, **options):
    """A file grown to ``n_bytes`` of holes is opened in under 20 MB."""
    with open(path, "r+b") as file:
        file.truncate(n_bytes)
    tracemalloc.start()
    try:
        found = find(path, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6
    assert len(pickle.dumps(found.source)) < 1e5
    return found


# --- what cameras write ---


def dm_image(array, tags, **more):
    """An entry of the image list of a Gatan file."""
    sizes = [np.uint32(n) for n in array.shape[::-1]]
    data = {"Data": array.ravel(), "DataType": np.uint32(10), "Dimensions": sizes, **more}
    return {"ImageData": data, "ImageTags": tags, "Name": "it"}


def blo(path, array, **changes):
    said = {"id": b"IMGBLO", "magic": 0x0102, "image": 0x1000, "patterns": 0x1010, "flags": 131141,
            "size": array.shape[-1], "turn": 0, "nx": array.shape[1], "ny": array.shape[0], "scan": 0,
            "sx": 2.5, "sy": 5.0, "volt": 200000, "sdp": 6226, "length": 0, "time": 0.0} | changes  # fmt: skip
    frames = array.astype("u1").reshape(-1, array[0, 0].size)
    data = b"".join(
        b"\xaa\x55" + struct.pack("<I", i) + frame.tobytes() for i, frame in enumerate(frames)
    )
    header = struct.pack("<6sH3I5H2dI2Hd", *said.values())
    path.write_bytes(header.ljust(0x1010, b"\0") + data)
    return path


def mrc(path, array, mode=6, order="<", extended=0, **at):
    header = bytearray(1024)
    struct.pack_into(order + "4I", header, 0, *array.shape[::-1], mode)
    struct.pack_into(order + "I", header, 92, extended)
    header[208:212] = b"MAP "
    for place, (form, value) in at.items():
        struct.pack_into(order + form, header, int(place[1:]), value)
    path.write_bytes(bytes(header) + bytes(extended) + array.tobytes())
    return path


INFO = {"Scan - Enable": "Enable", "Scan - Type": "Raster", "Scan - Size X": 4, "Scan - Size Y": 3,
        "Scan - ROI Size X": 9, "Scan - ROI Size Y": 9, "Scan - ROI Enable": "Disable",
        "Specimen Pixel Size X (nanometers)": 0.1, "Specimen Pixel Size Y (nanometers)": 0.2,
        "Diffraction Pixel Size X": 0.5, "Diffraction Pixel Size Y": -1}  # fmt: skip


def info(path, name, **changes):
    lines = [f"{key:60} = {value}" for key, value in (INFO | changes).items()]
    path.with_name(name).write_text("\n".join(lines))
    return path


PIX = "<pix_x>4</pix_x><pix_y>3</pix_y>"


def empad(folder, body=PIX, n=12, name="scan_x4_y3.raw", filename=None):
    frames = np.full((n, 130, 128), np.nan, "<f4")
    frames[:, :128] = numbers((n, 128, 128), "f4")
    frames.tofile(folder / name)
    told = filename or name
    xml = folder / "a.xml"
    xml.write_text(
        f"<?xml version='1.0'?><root><raw_file filename='{told}' kind='EMPAD'/>{body}</root>"
    )
    return xml, frames[:, :128]


def seq(path, array, version=5, gap=32, **changes):
    """A sequence of StreamPix: patterns at byte 8192 (1024 before version 5), each with ``gap`` bytes behind it."""
    n_bytes = array[0].nbytes
    fields = {"width": array.shape[2], "height": array.shape[1], "bits": 8 * array.itemsize, "used": 8 * array.itemsize,
              "bytes": n_bytes, "format": 100, "frames": len(array), "origin": 0, "stride": n_bytes + gap} | changes  # fmt: skip
    compression = fields.pop("compression", 0)
    head = struct.pack("<I24sii512s9Id24sI", 0xFEED, "Norpix seq".encode("utf-16-le"), version, 1024, b"", *fields.values(),
                       100.0, b"", compression)  # fmt: skip
    frames = b"".join(
        one.tobytes() + bytes(gap) for one in array.astype(array.dtype.newbyteorder("<"))
    )
    path.write_bytes(head.ljust(8192 if version >= 5 else 1024, b"\0") + frames)
    return path


def tvips(path, array, version=2, lead=60, **changes):
    said = {"size": 256, "version": version, "dimx": array.shape[-1], "dimy": array.shape[-2],
            "bits": array.dtype.itemsize * 8, "ox": 0, "oy": 0, "bx": 1, "by": 1, "pixel": 15500, "ht": 200,
            "mag": 1, "between": lead} | changes  # fmt: skip
    header = struct.pack("<13I", *said.values()) + b"TVIPS " * 34
    path.write_bytes(header + frames_of(array, lead))
    return path


def frames_of(array, lead):
    return b"".join(bytes(lead) + frame.tobytes() for frame in array)


MIB_DTYPES = {"U08": "u1", "U16": ">u2", "U32": ">u4"}


def mib_header(kind="U16", width=5, height=6, length=384, first="MQ1"):
    text = f"{first},000001,{length:05},01,{width:04},{height:04},{kind},   1x1,01,2021-05-07 18:51:10,0.1,0,0,0,"
    return text.encode().ljust(length)


def mib(path, array, kind="U16", length=384):
    frames = array.reshape(-1, *array.shape[-2:]).astype(MIB_DTYPES[kind])
    head = mib_header(kind, *array.shape[:-3:-1], length)
    path.write_bytes(b"".join(head + frame.tobytes() for frame in frames))
    return path


def by_turns(path, array, counters):
    """Patterns of two counters, one after the other."""
    frames = np.frombuffer(mib(path, array).read_bytes(), "u1").reshape(len(array), -1).copy()
    for i, frame in enumerate(frames):
        frame[np.flatnonzero(frame == ord(","))[10] + 1] = ord(counters[i % 2])
    path.write_bytes(frames.tobytes())
    return path


def raw_header(bits, width, height, chips=1, layout="1x1"):
    text = f"MQ1,000001,00384,{chips:02},{width:04},{height:04},R64,   {layout},01,2021-05-07,0.1,0,0,0,{bits},"
    return text.encode().ljust(384, b"\0")


def raw_frame(pattern, bits):
    """Slow twin: each row pixel by pixel into words of 64 bits, the first pixel in the lowest bits, big-endian."""
    if bits == 24:
        return raw_frame(pattern >> 12, 12) + raw_frame(pattern & 4095, 12)
    slot = {1: 1, 6: 8, 12: 16}[bits]
    words = []
    for row in pattern:
        for start in range(0, len(row), 64 // slot):
            part = row[start : start + 64 // slot]
            word = sum(int(value) << (slot * i) for i, value in enumerate(part))
            words.append(word.to_bytes(8, "big"))
    return b"".join(words)


def quad_frame(pattern, bits):
    """Slow twin: row by row the four chips from the lower right to the upper left, the lower ones upside down."""
    height, width = (n // 2 for n in pattern.shape)
    rows = []
    for y in range(height):
        upper, lower = pattern[y], pattern[2 * height - 1 - y][::-1]
        # upside down the right half of a lower row comes first
        rows.append([*lower[:width], *lower[width:], *upper[width:], *upper[:width]])
    return raw_frame(np.array(rows), bits)


def raw_mib(path, array, bits, chips=1):
    """Patterns in the raw mode of one chip, or of 2x2."""
    quad = chips == 4
    height, width = (n // 2 for n in array.shape[-2:]) if quad else array.shape[-2:]
    head = raw_header(
        bits, width * (chips if bits < 24 else 2), height, chips, "2x2" if quad else "1x1"
    )
    frames = [
        head + (quad_frame if quad else raw_frame)(p, bits)
        for p in array.reshape(-1, *array.shape[-2:])
    ]
    path.write_bytes(b"".join(frames))
    return path


def hdr(path, **settings):
    lines = [f"{name}:\t{value}" for name, value in settings.items()]
    path.with_suffix(".hdr").write_text("\r\n".join(["HDR,\t", *lines, "End\t"]))
    return path


def emd(path, array, group, dims, kind, first=0):
    with h5py.File(path, "w") as file:
        file.attrs["version_major"] = 1
        parent = file.create_group(group)
        parent.attrs["emd_group_type"] = kind
        parent.create_dataset("data", data=array)
        for i, (name, units, positions) in enumerate(dims):
            along = parent.create_dataset(f"dim{i + first}", data=np.asarray(positions))
            along.attrs.update({"name": name, "units": units})
    return path


GUID = "a0dba950-15bf-4a74-a81c-9cea8560c2c8"


PLACE = """<?xml version="1.0" encoding="utf-16"?><Metadata><Calibration>
<X><Offset>-0.5</Offset><Scale>{scale}</Scale><Type><Text>Angle</Text></Type></X>
<Y><Offset>-0.25</Offset><Scale>0.01</Scale><Type><Text>Angle</Text></Type></Y></Calibration>
<Metadata><Item><Name>RequestedBeamPosition</Name><Value><X>{x}</X><Y>{y}</Y></Value></Item></Metadata></Metadata>"""


def app5(path, array, session="", scale=0.02, place=None):
    def where(i):
        y, x = np.unravel_index(i, array.shape[:2])
        return (5e-9 + 2e-9 * y, 7e-9 + 1e-9 * x)

    with h5py.File(path, "w") as file:
        top = file.create_group(session) if session else file
        top["Metadata"] = b"<Metadata/>"
        top["39a4bbcd-2551-4912-9093-0eaed678dcff"] = np.zeros((8, 56))
        for i, pattern in enumerate(array.reshape(-1, *array.shape[-2:])):
            y, x = (place or where)(i)
            top[f"{GUID}/{i}/Data"] = pattern
            top[f"{GUID}/{i}/Metadata"] = PLACE.format(scale=scale, x=x, y=y).encode()
    return path


def tiff(path, array, order="<", big=False, rows=None, description=None):
    """A stack as tifffile writes it, page by page; the first page has the description."""
    import tifffile

    with tifffile.TiffWriter(path, byteorder=order, bigtiff=big) as file:
        for page in array:
            file.write(
                page,
                photometric="minisblack",
                contiguous=False,
                metadata=None,
                rowsperstrip=rows,
                description=description,
            )
            description = None
    return path
