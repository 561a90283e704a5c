"""The examples of CONTRIBUTING.md run as they stand: a reader, a format and a cluster from outside the package."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from stem_dask.core.formats import FORMATS
from stem_dask.readers.formats import READERS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The module that the examples make, run once in a folder of its own; the tables are restored afterwards."""
    from stem_dask.writers.synthetic import Synthetic, write_dataset

    module = ModuleType("toy")
    with pytest.MonkeyPatch.context() as patch:
        for table in (READERS, FORMATS):
            patch.setitem(table, ".toy", None)
        patch.setitem(sys.modules, "toy", module)
        patch.chdir(tmp_path_factory.mktemp("toy"))
        write_dataset("scan.dm4", Synthetic(scan_shape=(8, 6)))
        Path("crop.yaml").write_text("input: {path: scan.dm4}\noutput: {path: cropped.zarr}\n")
        for code in BLOCKS:
            exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
        yield module


def test_examples_run(toy: ModuleType) -> None:
    assert len(BLOCKS) == 4
    assert toy.result.exit_code == 0
    assert Path("scan.toy").stat().st_size == 1024 + toy.patterns.nbytes
    assert not list(Path().glob("*.incomplete"))


def test_the_toy_reader_refuses_damaged_files(toy: ModuleType) -> None:
    whole = Path("scan.toy").read_bytes()
    Path("cut.toy").write_bytes(whole[:-1])
    with pytest.raises(toy.SourceError, match=r"cut\.toy: .* bytes, expected"):
        toy.sd.open("cut.toy")
    Path("odd.toy").write_bytes(b"?" * 300)
    with pytest.raises(toy.SourceError, match="no JSON header"):
        toy.sd.open("odd.toy")


def test_a_config_may_name_the_toy(toy: ModuleType) -> None:
    output = "output: {path: again.zarr, export: [toy], figure: false}\n"
    Path("again.yaml").write_text(f"input: {{path: scan.dm4}}\n{output}")
    assert toy.sd.run_config(toy.sd.load_config("again.yaml")).exit_code == 0
    assert toy.sd.open("again.toy").sum() == toy.sd.open("again.zarr").sum()


def test_the_toy_sink_verifies_what_it_wrote(toy: ModuleType) -> None:
    import numpy as np

    from stem_dask.core.formats import Output
    from stem_dask.core.model import Record

    sink = toy.ToySink(Output("direct.toy", (2, 3, 1, 2), np.dtype("<u2")))
    sink.create(resume=False)
    region = (slice(1, 2), slice(0, 3))
    block = np.arange(6, dtype="<u2").reshape(1, 3, 1, 2)
    extra = sink.write(0, region, {"patterns": block})
    record = Record(0, 0.0, block.nbytes, 0, extra=extra)
    assert sink.verify(record) is None
    with open("direct.toy", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert "damaged" in (sink.verify(record) or "")
