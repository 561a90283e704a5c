"""One window for several inputs: the largest; what does not fit, what comes later, and going on after a stop."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from batches import BEAMS, batch, content, rows, size_of, stopped, write_beam

from stem_dask import run
from stem_dask.plan import axis_window, common_size


@pytest.fixture
def here(batch_folder: Path) -> Path:
    return batch_folder


def test_the_common_window_is_the_largest(here: Path, connects: list[int], capsys: Any) -> None:
    assert batch("crop.size=common") == 0
    said = capsys.readouterr()
    assert connects == [34560]
    assert said.err == ""
    assert {size_of(name) for name in BEAMS} == {(16, 16)}
    assert "common      16 x 16 px, which holds the windows of 3" in said.out
    assert [line for line in said.out.splitlines() if line.startswith("window ")] == [
        "window      10 x 10 px of 40 x 36",
        "window      16 x 16 px of 40 x 36",
        "window      12 x 12 px of 40 x 36",
    ]
    assert said.out.count("analyze ") == 3
    shutil.move("out", "common")
    assert batch("--quiet", "crop.size=[16, 16]") == 0
    for name in BEAMS:
        assert content(f"out/{name}.zarr") == content(f"common/{name}.zarr") != {}
    assert (
        batch("--quiet", "crop.size=common", "output.path=auto/{stem}.zarr", "input.path=raw/a.npy")
        == 0
    )
    assert xr.open_zarr("auto/a.zarr").patterns.shape[-2:] == (10, 10)  # one alone: its own


@pytest.mark.parametrize(
    "where", ["stem_dask.plan.common_size", "stem_dask.passes.writing.complete_analysis"]
)
def test_a_stop_between_and_in_the_sweeps(
    here: Path, where: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = stopped(monkeypatch, where, 1)
    assert batch("crop.size=common") == 75
    back()
    capsys.readouterr()
    assert batch("crop.size=common") == 0
    said = capsys.readouterr().out
    assert said.count("resuming    ") == 3  # no analysis is done again
    assert {size_of(name) for name in BEAMS} == {(16, 16)}


def test_an_unfinished_crop_is_not_mixed_with_another_size(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = stopped(monkeypatch, "stem_dask.passes.writing.complete_analysis", 1)
    assert batch("crop.size=common") == 75
    back()
    write_beam("d", 8)
    assert batch("crop.size=common") == 2
    said = capsys.readouterr()
    assert "unfinished run that crops to 16 x 16 px" in said.err
    assert "makes it 20 x 20 px now" in said.err
    assert {size_of(name) for name in "bcd"} == {(20, 20)}
    assert run.main(["batch.yaml", "crop.size=common", "input.path=raw/a.npy"]) == 2  # nor alone
    assert "makes it its own now" in capsys.readouterr().err
    assert batch("crop.size=common", "--restart", "--quiet") == 0
    assert size_of("a") == (20, 20)


def test_a_dataset_that_comes_later(here: Path, connects: list[int], capsys: Any) -> None:
    """One that fits in changes nothing; a larger one is told, and --overwrite makes all alike."""
    assert batch("crop.size=common", "--quiet") == 0
    write_beam("d", 5)
    assert batch("crop.size=common", "--quiet") == 0
    assert size_of("d") == (16, 16)
    write_beam("e", 8)
    capsys.readouterr()
    assert batch("crop.size=common") == 2
    said = capsys.readouterr()
    assert said.err.count("was cropped to 16 x 16 px with other inputs") == 4
    assert "the common size is 20 x 20 px now; add --overwrite" in said.err
    assert [row[-1] for row in rows(said.out).values()][-1] == "0"
    assert size_of("e") == (20, 20)
    assert batch("crop.size=common", "--overwrite", "--quiet") == 0
    assert {size_of(name) for name in "abcde"} == {(20, 20)}


def test_overwriting_is_not_kept_from_it_by_an_unfinished_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of the former size are replaced also when the command goes on."""
    assert batch("crop.size=common", "--quiet", "input.path=[raw/a.npy, raw/c.npy]") == 0
    assert (size_of("a"), size_of("c")) == ((12, 12), (12, 12))
    back = stopped(monkeypatch, "stem_dask.passes.writing.complete_analysis", 1)
    assert batch("crop.size=common", "--quiet") == 75
    back()
    assert batch("crop.size=common", "--quiet", "--overwrite") == 0
    assert {size_of(name) for name in BEAMS} == {(16, 16)}


def test_what_cannot_have_the_common_size_says_so(here: Path, capsys: Any) -> None:
    """A detector that is too small; the others go on."""
    data = np.zeros((2, 2, 14, 36), np.uint16)
    data[:, :, 5:9, 16:20] = 3
    np.save("raw/small.npy", data)
    assert batch("crop.size=common") == 2
    said = capsys.readouterr()
    assert "the common size is 16 x 16 px, and this dataset can only have 14 x 16 px" in said.err
    assert "its detector has 14 x 36 px" in said.err
    assert {size_of(name) for name in BEAMS} == {(16, 16)}
    assert not Path("out/small.zarr").exists()


def test_a_broken_file_is_left_out_of_the_common_size(here: Path, capsys: Any) -> None:
    Path("raw/b.npy").write_bytes(b"no numbers")
    assert batch("crop.size=common") == 3
    assert {size_of("a"), size_of("c")} == {(12, 12)}
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1
    assert "which holds the windows of 2" in said.out


@pytest.mark.parametrize(
    ("wanted", "detectors", "multiple", "size", "who"),
    [
        ([40, 44], [128, 128], 2, 44, [True, True]),
        ([9, 9], [9, 9], 2, 9, [True, True]),  # whole on both
        ([127, 90], [127, 256], 2, 128, [False, True]),  # the odd one is left out, not the others
        ([14, 16], [14, 40], 2, 16, [False, True]),
        ([14, 13], [40, 13], 2, 14, [True, False]),
        ([12, 28], [30, 40], 4, 28, [True, True]),
        ([40, 38], [40, 40], 2, 40, [True, True]),  # reached by one, and whole on both
    ],
)  # fmt: skip
def test_common_size_of_an_axis(
    wanted: list[int], detectors: list[int], multiple: int, size: int, who: list[bool]
) -> None:
    assert common_size(wanted, detectors, multiple) == size
    assert [axis_window(size, n, multiple)[0] == size for n in detectors] == who
