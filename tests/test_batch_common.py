"""One window for several inputs: the largest; what does not fit, what comes later, and going on after a stop."""

import itertools
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from batches import BEAMS, batch, content, rows, size_of, stopped, write_beam
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_dask.cli import run
from stem_dask.core.window import common_size, fits, next_multiple


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
    "where", ["stem_dask.core.window.common_size", "stem_dask.job.passes.complete_analysis"]
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
    back = stopped(monkeypatch, "stem_dask.job.passes.complete_analysis", 1)
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
    back = stopped(monkeypatch, "stem_dask.job.passes.complete_analysis", 1)
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
    refused = (
        "its detector of 14 x 36 px cannot have the common size of 16 x 16 px; crop it alone: "
    )
    assert refused in said.err
    assert "16 x 16 px, which holds the windows of 3 of 4" in said.out
    assert {size_of(name) for name in BEAMS} == {(16, 16)}
    assert not Path("out/small.zarr").exists()


@pytest.mark.parametrize("name", ["0", "z"])
def test_one_large_window_does_not_refuse_the_others(here: Path, capsys: Any, name: str) -> None:
    """Three fit together; the fourth, on another detector, fails alone, whatever its place, and can be cropped alone."""
    write_beam(name, 17, (64, 64), (31, 31))
    assert batch("crop.size=common") == 2
    said = capsys.readouterr()
    assert {size_of(each) for each in BEAMS} == {(16, 16)}
    assert "common      16 x 16 px, which holds the windows of 3 of 4" in said.out
    assert [row[-1] == "0" for row in rows(said.out).values()].count(True) == 3
    assert said.err.count("error: ") == 1
    assert (
        "its own window of 38 x 38 px does not fit into the common size of 16 x 16 px" in said.err
    )
    words = shlex.split(said.err.rpartition("crop it alone: ")[2])
    assert words == [f"input.path={here}/raw/{name}.npy"]
    assert batch("crop.size=common", *words) == 0
    assert "resuming" in capsys.readouterr().out
    assert size_of(name) == (38, 38)


def test_different_detectors_that_fit_together_beside_a_broken_file(here: Path) -> None:
    write_beam("d", 7, (64, 50))
    Path("raw/b.npy").write_bytes(b"no numbers")
    assert batch("crop.size=common", "--quiet") == 3
    assert {size_of(name) for name in "acd"} == {(18, 18)}


@pytest.mark.parametrize(
    ("wanted", "detectors", "multiple", "size", "who"),
    [
        ([40, 44], [128, 128], 2, 44, [True, True]),
        ([9, 9], [9, 9], 2, 9, [True, True]),  # whole on both
        ([127, 90], [127, 256], 2, 127, [True, False]),  # one of the two, and the larger
        ([14, 16], [14, 40], 2, 16, [False, True]),
        ([14, 13], [40, 13], 2, 14, [True, False]),
        ([12, 28], [30, 40], 4, 28, [True, True]),
        ([40, 38], [40, 40], 2, 40, [True, True]),  # reached by one, and whole on both
    ],
)  # fmt: skip
def test_common_size_of_an_axis(
    wanted: list[int], detectors: list[int], multiple: int, size: int, who: list[bool]
) -> None:
    own, full = ([(n, 10) for n in given] for given in (wanted, detectors))
    assert common_size(own, full, multiple) == (size, 10)
    assert fits(np.array(own), np.array(full), (size, 10), multiple).tolist() == who


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_common_size_is_of_the_most_that_fit_together(data: st.DataObject) -> None:
    """By trying every subset: none that is larger has a size, and the order changes nothing."""
    multiple = data.draw(st.sampled_from([1, 2, 4]))
    pair = st.tuples(st.integers(1, 9), st.integers(1, 9))
    full = data.draw(st.lists(pair, min_size=1, max_size=5))
    own = []
    for detector in full:
        sizes = [min(next_multiple(data.draw(st.integers(1, n)), multiple), n) for n in detector]
        own.append((sizes[0], sizes[1]))
    size = common_size(own, full, multiple)
    who = fits(np.array(own), np.array(full), size, multiple)

    def together(some: tuple[int, ...]) -> bool:
        sizes = itertools.product(range(1, 13), repeat=2)
        one, two = (np.array([of[i] for i in some]) for of in (own, full))
        return any(fits(one, two, each, multiple).all() for each in sizes)

    assert who.sum() >= 1
    larger = itertools.combinations(range(len(full)), int(who.sum()) + 1)
    assert not any(together(some) for some in larger)
    order = data.draw(st.permutations(range(len(full))))
    assert common_size([own[i] for i in order], [full[i] for i in order], multiple) == size
