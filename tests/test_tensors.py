"""The reader of .pt files: quick, without torch, and deaf to what a pickle asks for."""

import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from frames_made import SHAPE, agrees, numbers

from stem_dask.errors import SourceError
from stem_dask.io.read import find

torch = pytest.importorskip("torch")


def rewritten(path, changes, compress=zipfile.ZIP_STORED):
    """The archive with some of its records replaced."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    stem = next(iter(records)).partition("/")[0]
    records |= {f"{stem}/{name}": content for name, content in changes.items()}
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def sound(tmp_path):
    torch.save({"patterns": torch.from_numpy(numbers(dtype="i2"))}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "?"]
)
def test_every_type_of_numbers(tmp_path, dtype):
    array = numbers(dtype=dtype)
    torch.save(torch.from_numpy(array), tmp_path / "a.pt")
    agrees(find(tmp_path / "a.pt"), array)
    torch.save({"a": torch.nn.Parameter(torch.from_numpy(array), requires_grad=False)}, tmp_path / "a.pt")  # fmt: skip
    agrees(find(tmp_path / "a.pt"), array)


def test_views_that_were_saved_with_the_whole(tmp_path):
    """`torch.save` keeps all of the storage and the distances of the view in it."""
    array = numbers()
    whole = torch.from_numpy(array.astype("i4"))
    for view in (
        whole[:, :, 1:5, 2:4],  # a crop
        whole[::2, 1::2],  # every second position
        whole[1:, :, :, ::3].permute(2, 3, 0, 1),
        whole[:, :, 1],
        whole[:1, 2:3, ::5, 1:2],
    ):
        torch.save({"a": view}, tmp_path / "a.pt")
        found = find(tmp_path / "a.pt")
        agrees(found, view.numpy())
        part = (slice(0, 1), *(slice(1, None, 2) for _ in view.shape[1:]))
        np.testing.assert_array_equal(found.source[part], view.numpy()[part])
    content = (tmp_path / "a.pt").read_bytes()
    torch.save(whole[::2], tmp_path / "a.pt")
    source = find(tmp_path / "a.pt").source
    (tmp_path / "a.pt").write_bytes(content[:900])
    with pytest.raises(SourceError, match=r"a\.pt: the file ends at byte 900, in the middle of"):
        source[(slice(0, 1),) * 4]


def test_numbers_of_numpy_beside_a_tensor_do_no_harm(tmp_path):
    beside = {"mean": np.float32(3), "axis": np.arange(5), "name": b"x\xff"}
    torch.save({"patterns": torch.from_numpy(numbers()), **beside}, tmp_path / "a.pt")
    agrees(find(tmp_path / "a.pt"), numbers())
    torch.save(numbers(), tmp_path / "a.pt")
    with pytest.raises(
        SourceError, match=r"holds a numpy array, not a tensor; save torch\.from_num"
    ):
        find(tmp_path / "a.pt")


def test_written_on_a_big_endian_machine(sound):
    array = numbers(dtype=">i2")
    rewritten(sound, {"byteorder": b"big", "data/0": array.tobytes()})
    agrees(find(sound), array)


def test_axes_of_one_and_views_of_a_storage(tmp_path):
    array = torch.from_numpy(numbers((1, 3, 1, 6, 5), "i4"))
    torch.save({"a": array[:, 1:].permute(2, 1, 0, 3, 4)}, tmp_path / "a.pt")
    agrees(find(tmp_path / "a.pt"), array[:, 1:].numpy().reshape(2, 1, 6, 5))


def test_torch_is_not_loaded(sound):
    code = (
        f"import sys; from stem_dask.io.read import find; found = find({str(sound)!r})\n"
        "print(found.source.shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{SHAPE} False\n"


class Named:
    """Pickled as the call of a function by its name."""

    def __init__(self, function, *given):
        self.call = (function, given)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.pkl": pickle.dumps(Named(eval, "1/0"))}, r"\(it holds builtins\.eval\)"),
        ({"data.pkl": pickle.dumps(Named(exec, "1/0"), 0)}, r"\(it holds (__builtin__|builtins)\.exec\)"),
        ({"data.pkl": b"cos\nsystem\n(S'false'\ntR."}, r"\(it holds os\.system\)"),
        ({"data.pkl": b"ctorch\nload\n."}, r"\(it holds torch\.load\)"),
        ({"data.pkl": b"\x80\x02Nr" + struct.pack("<I", 2**31) + b"."}, r"its description is damaged"),
        ({"data.pkl": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."}, "not a readable PyTorch file"),
        ({"data.pkl": b"\x80\x02" + b"(" * 100_000 + b"."}, "not a readable PyTorch file"),
        ({"data.pkl": b"\x80\x02U\x07storageQ."}, "not a readable PyTorch file"),
        ({"data.pkl": pickle.dumps(7)}, "holds a int; expected a tensor"),
        ({"data/0": bytes(719)}, r"patterns needs 720 bytes, but 719 are stored; the file is damaged"),
    ],
)  # fmt: skip
def test_refused(sound, changes, message):
    rewritten(sound, changes)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=message) as caught:
            find(sound)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert "a.pt: " in str(caught.value)


def test_a_compressed_archive_is_refused(sound):
    rewritten(sound, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(SourceError, match=r"compressed, or too long\); .*torch\.save"):
        find(sound)


def test_a_lazy_view_is_refused(tmp_path):
    tensor = torch.complex(torch.ones(3, 4, 5), torch.ones(3, 4, 5)).conj().imag
    torch.save(tensor, tmp_path / "a.pt")
    with pytest.raises(
        SourceError, match=r"tensor is (a view that is not worked out|not contiguous)"
    ):
        find(tmp_path / "a.pt")
    np.testing.assert_array_equal(tensor.numpy(force=True), -1)
