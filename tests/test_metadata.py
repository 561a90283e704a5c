"""The file's own metadata go into the store and into .hspy: bounded, plain, the same bytes each time."""

import json
import pickle
from pathlib import Path
from typing import Any

import dask.array as da
import h5py
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from rsciio.hspy import file_reader

from stem_dask.core.formats import FORMATS, Output
from stem_dask.core.metadata import LIMIT, ArrayTag, hdf5_tree, original
from stem_dask.core.model import Axis
from stem_dask.core.patterns import as_patterns
from stem_dask.job.run import run
from stem_dask.stages.export import Target
from stem_dask.writers.synthetic import Synthetic, write_dataset
from stem_dask.writers.torch import PtSink


def test_the_tags_of_a_dm4_are_kept(tmp_path: Path, make_config: Any) -> None:
    path = write_dataset(str(tmp_path / "a.dm4"), Synthetic(scan_shape=(3, 2)))
    output = {"export": ["hspy"]}
    runs = [make_config(path, f"{name}.zarr", output=output) for name in ("one", "two")]
    for config in runs:
        run(config)
    kept = [xr.open_zarr(config.output.path).attrs["original_metadata"] for config in runs]
    assert kept[0] == kept[1]
    assert kept[0]["Meta Data"]["Data Order Swapped"] in (True, 1)
    (signal,) = file_reader(tmp_path / "one.hspy")
    assert "Meta Data" in signal["original_metadata"]
    assert str(tmp_path) not in json.dumps(kept[0])


def test_what_is_long_is_cut() -> None:
    tags = {
        "left": ArrayTag(10, 70000, (4,), 140000),
        "array": np.arange(5000),
        "image": np.zeros((3, 2)),
        "text": "x" * 5000,
        "short": np.arange(3, dtype="u1"),
        "rows": [(1, 2), (3, 4)],
        "odd": float("nan"),
        "half": "\ud800",
    }
    assert original(tags) == {
        "left": "70,000 values, left in the input file",
        "array": list(range(64)),
        "image": "(3, 2)",
        "text": "x" * 1000,
        "short": [0, 1, 2],
        "rows": [[1, 2], [3, 4]],
        "odd": "nan",
        "half": "?",
    }


def test_the_whole_is_bounded() -> None:
    kept = original({f"text {i}": "x" * 1000 for i in range(3000)})
    assert kept["text 3"] == "x" * 100
    assert len(json.dumps(kept)) <= LIMIT
    assert "left out" in original({str(i): i for i in range(200_000)})
    deep: dict[str, Any] = {}
    for _ in range(1000):
        deep = {"a": deep}
    assert len(str(original(deep))) < 2000


names = st.one_of(st.text(max_size=5), st.sampled_from(["a/b", ".", "_list_a", "_sig_x", "_bs_"]))
trees = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, trees, max_size=4))
def test_any_tree_can_be_written(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    from rsciio.hspy._api import HyperspyReader, HyperspyWriter

    kept = original(tree)
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
    safe = hdf5_tree(kept)
    path = tmp_path_factory.mktemp("tree") / "a.h5"
    with h5py.File(path, "w") as file:
        writer = HyperspyWriter.__new__(HyperspyWriter)
        writer.Dataset = h5py.Dataset
        writer.dict2group(safe, file.create_group("tree"))
        reader = HyperspyReader.__new__(HyperspyReader)
        reader.Dataset = h5py.Dataset
        back = reader._group2dict(file["tree"])
    assert set(back) == set(safe)


@pytest.mark.parametrize("suffix", FORMATS)
def test_metadata_do_not_travel_with_every_task(tmp_path: Path, suffix: str) -> None:
    axes = tuple(Axis(name, 2) for name in ("scan_y", "scan_x", "ky", "kx"))
    large = {"tags": "x" * 10**6}
    patterns = as_patterns(da.zeros((2,) * 4, dtype="u1"), axes, {"original_metadata": large})
    centers = xr.Dataset({"center_y": (("scan_y", "scan_x"), np.zeros((2, 2)))})
    sink = Target(str(tmp_path / f"a{suffix}"), patterns, centers).sink()
    sink.create(resume=False)
    assert len(pickle.dumps(sink)) < 1000


def test_the_arrays_of_a_pt_do_not_travel_with_every_task(tmp_path: Path) -> None:
    known = {"analysis": {"center_y": np.zeros((300, 300))}}
    output = Output(str(tmp_path / "a.pt"), (1, 1, 2, 2), np.dtype("i2"), content=known)
    sink = PtSink(output)
    sink.create(resume=False)
    again = pickle.loads(packed := pickle.dumps(sink))
    assert len(packed) < 1000
    assert again.offset == sink.offset
    assert sink.output.content is known
