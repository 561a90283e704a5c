"""The reader of .pt files: quick, without torch, and deaf to what a pickle asks for."""

import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from frames_made import SHAPE, agrees, numbers, refuses

from stem_dask.core.errors import SourceError
from stem_dask.readers.open import find

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


def test_views_of_a_larger_storage(tmp_path):
    """`torch.save` keeps all of the storage: a view of it is read where nothing lies between its elements."""
    whole = torch.from_numpy(numbers().astype("i4"))
    for view in (whole[1:], whole.permute(2, 3, 0, 1)):
        torch.save({"a": view}, tmp_path / "a.pt")
        agrees(find(tmp_path / "a.pt"), view.numpy())
    for view in (whole[:, :, 1:5, 2:4], whole[::2, 1::2], whole[:, :, 1]):
        torch.save({"a": view}, tmp_path / "a.pt")
        refuses(r"a\.pt: a is not contiguous; save tensor\.contiguous\(\)", tmp_path / "a.pt")
        torch.save({"a": view.contiguous()}, tmp_path / "a.pt")
        agrees(find(tmp_path / "a.pt"), view.numpy())


def test_numbers_of_numpy_beside_a_tensor_do_no_harm(tmp_path):
    beside = {"mean": np.float32(3), "axis": np.arange(5), "name": b"x\xff"}
    torch.save({"patterns": torch.from_numpy(numbers()), **beside}, tmp_path / "a.pt")
    agrees(find(tmp_path / "a.pt"), numbers())
    torch.save(numbers(), tmp_path / "a.pt")
    refuses(r"holds a numpy array, not a tensor; save torch\.from_num", tmp_path / "a.pt")


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
        f"import sys; from stem_dask.readers.open import find; found = find({str(sound)!r})\n"
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
        ({"data.pkl": b"\x80\x02Nr" + struct.pack("<I", 2**31) + b"."}, "holds a NoneType; expected a tensor"),
        ({"data.pkl": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."}, "not a readable PyTorch file"),
        ({"data.pkl": b"\x80\x02" + b"(" * 100_000 + b"."}, "not a readable PyTorch file"),
        ({"data.pkl": b"\x80\x02U\x07storageQ."}, "not a readable PyTorch file"),
        ({"data.pkl": pickle.dumps(7)}, "holds a int; expected a tensor"),
        ({"data/0": bytes(719)}, r"patterns needs 720 bytes, but 719 are stored; the file is cut or damaged"),
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
    refuses(r"compressed, or too long\); .*torch\.save", sound)


def test_a_lazy_view_is_refused(tmp_path):
    tensor = torch.complex(torch.ones(3, 4, 5), torch.ones(3, 4, 5)).conj().imag
    torch.save(tensor, tmp_path / "a.pt")
    refuses(r"tensor is (a lazy view|not contiguous)", tmp_path / "a.pt")
    np.testing.assert_array_equal(tensor.numpy(force=True), -1)


# --- hostile descriptions ---------------------------------------------------------------------------------------


def bomb(ways: int, levels: int, opening: bytes, closing: bytes) -> bytes:
    """A value that holds the one before it many times, level by level: small in the file, endless when it is gone through."""
    parts = [b"K\x07q\x00"]
    for level in range(levels):
        again = b"h" + bytes([level])
        parts.append(b"0" + opening + again * ways + closing + b"q" + bytes([level + 1]))
    return b"".join(parts)


SOUND = b"ctorch._utils\n_rebuild_tensor_v2\n"
TUPLES, LISTS = bomb(10, 22, b"(", b"t"), bomb(10, 22, b"](", b"e")
HOSTILE = {
    "a key of nested tuples": b"}" + TUPLES + b"K\x01s",
    "a key that is a list": b"}]K\x01s",
    "a value of nested lists": b"}X\x08\x00\x00\x00patterns" + LISTS + b"s",
    "a long text many times": b"}X\x01\x00\x00\x00aX" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x00](" + b"h\x00" * 1000 + b"es",
    "a list that holds itself": b"]q\x00h\x00a",
    "lists without end": b"(" + b"]" * 100_000 + b"l",
    "state of a function": SOUND + b"N}X\x04\x00\x00\x00nameK\x01s\x86b",
    "slots of a layout": b"ctorch.serialization\n_get_layout\nX\x01\x00\x00\x00a\x85RN}X\x04\x00\x00\x00nameK\x01s\x86b",
    "a new object": b"ctorch\nSize\n)\x81",
    "an instance": b"(icollections\nOrderedDict\n",
    "an extension": b"\x82\x01",
    "a call of a number": b"K\x07)R",
    "a tensor of nothing": SOUND + b"(NK\x00)))Nt" + b"R",
    "a size for a size": b"ctorch\nSize\nX\x01\x00\x00\x00a\x85R",
    "a number of a million digits": b"\x8b" + struct.pack("<i", 1_000_000) + b"\xff" * 1_000_000,
    "whole numbers of one hash": b"}(" + b"".join(
        b"\x8a\x0f" + (i * (2**61 - 1)).to_bytes(15, "little") + b"N" for i in range(1, 100_000)) + b"u",
    "a mark that is taken away": b"(0.",
    "a memory that is not there": b"h\x07",
    "an item of a list": b"]K\x01K\x01s",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_descriptions_end_soon_and_change_nothing(sound, tmp_path, what):
    bad = tmp_path / "bad.pt"
    bad.write_bytes(sound.read_bytes())
    rewritten(bad, {"data.pkl": b"\x80\x04" + HOSTILE[what] + b"."})
    began = time.process_time()
    refuses(r"bad\.pt: ", bad)
    assert time.process_time() - began < 2
    agrees(find(sound), numbers(dtype="i2"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_writes_is_read(tmp_path, protocol):
    """Models, optimizers and every kind of plain value beside the patterns."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 1, 5, 5)).sum().backward()
    optimizer.step()
    shared = (1, 2)
    beside = {
        "model": model.state_dict(),  # an OrderedDict with a state
        "optimizer": optimizer.state_dict(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "size": torch.Size([3, 4]),
        "device": torch.device("cpu"),
        "type": torch.float32,
        "layout": torch.strided,
        "large": 2**70,
        "values": [None, True, -1, 1.5, "a", b"b", shared, shared, [], {}],
        "array": np.arange(3),
        3: "number",
        None: "nothing",
        2.5: "float",
        (1, "a"): "tuple",
    }
    whole = {**beside, "patterns": torch.from_numpy(numbers(dtype="i2"))}
    torch.save(whole, tmp_path / "a.pt", pickle_protocol=protocol)
    agrees(find(tmp_path / "a.pt", dataset="patterns"), numbers(dtype="i2"))
