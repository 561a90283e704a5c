"""Small files of cameras, made by hand, and what every reader of them must do."""

import json
import pickle
import tracemalloc
from math import prod
from pathlib import Path

import numpy as np
import pytest

from stem_dask.io.read import find

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


def agrees(found, array):
    """The source holds the array: as a whole, in parts, and after pickling; opening again gives the same."""
    source = pickle.loads(pickle.dumps(found.source))
    assert len(pickle.dumps(found.source)) < 4000
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
