"""What goes in comes out: values and calibration of every export, read back by the readers that people use."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from rsciio.hspy import file_reader

import stem_dask as sd
from stem_dask.config.load import parse_config
from stem_dask.job.run import run

NAMES = ("scan_y", "scan_x", "ky", "kx")
SHAPE = (3, 2, 12, 10)
BOX = (2, 10, 1, 7)

numbers = st.floats(1e-6, 1e6).flatmap(lambda n: st.sampled_from([n, -n]))
axes = st.fixed_dictionaries(
    {
        "scale": numbers,
        "offset": st.one_of(st.just(0.0), numbers),
        "units": st.sampled_from(["nm", "1/nm", "Å", "µm", "mrad", "1 / Å", "px"]),
    }
)
calibrations = st.fixed_dictionaries(dict.fromkeys(NAMES, axes))


def expected(given: dict[str, Any], factor: int) -> dict[str, tuple[float, float, str]]:
    """By the definitions: value = offset + scale * index, of the window's first pixel, of the middle of a bin."""
    found = {}
    for name, axis in given.items():
        start = {"ky": BOX[0], "kx": BOX[2]}.get(name, 0)
        k = factor if name in ("ky", "kx") else 1
        offset = axis["offset"] + axis["scale"] * (start + (k - 1) / 2)
        found[name] = (axis["scale"] * k, offset, axis["units"])
    return found


def same_axes(found: dict[str, tuple[float, float, str]], known: Any) -> None:
    assert list(found) == list(NAMES)
    for name, (scale, offset, units) in known.items():
        assert found[name][0] == pytest.approx(scale, rel=1e-12)
        size = abs(offset) + abs(scale) * 12
        assert found[name][1] == pytest.approx(offset, abs=1e-12 * size)
        assert found[name][2] == units


@settings(max_examples=5, deadline=None)
@given(calibrations, st.sampled_from([1, 2]), st.sampled_from(["u2", "i4", "f4", "f8"]))
def test_every_export_keeps_values_and_axes(
    calibration: dict[str, Any], factor: int, dtype: str
) -> None:
    data = np.random.default_rng(0).integers(1, 99, SHAPE).astype(dtype)
    known = expected(calibration, factor)
    cut = data[:, :, BOX[0] : BOX[1], BOX[2] : BOX[3]]
    if factor == 2:
        blocks = cut.reshape(3, 2, 4, 2, 3, 2).mean((3, 5))
        cut = blocks.astype("f8" if dtype == "f8" else "f4")
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/in.npy", data)
        config = {
            "input": {"path": f"{folder}/in.npy", "calibration": calibration},
            "crop": {"window": list(BOX), "size_multiple": 1},
            "validate": {"min_retention": 0.0},
            "downsample": {"factor": factor},
            "output": {"path": f"{folder}/out.zarr", "figure": False},
            "cluster": {"kind": "threads", "threads_per_worker": 1},
        }
        run(parse_config(config))
        exports = Path(folder, "out").with_suffix
        root = xr.open_zarr(exports(".zarr"))
        np.testing.assert_array_equal(root.patterns.values, cut)
        told = {n: tuple(root[n].attrs[key] for key in ("scale", "offset", "units")) for n in NAMES}
        same_axes(told, known)
        for name in NAMES:
            values = known[name][1] + known[name][0] * np.arange(root.sizes[name])
            np.testing.assert_allclose(root[name].values, values, atol=1e-9 * abs(values).max())
        content = torch.load(exports(".pt"), weights_only=True)
        np.testing.assert_array_equal(content["patterns"].numpy(), cut)
        same_axes(
            {a["name"]: (a["scale"], a["offset"], a["units"]) for a in content["axes"]}, known
        )
        (signal,) = file_reader(exports(".hspy"))
        np.testing.assert_array_equal(signal["data"], cut)
        short = {"y": "scan_y", "x": "scan_x"}
        told = {
            short.get(a["name"], a["name"]): (a["scale"], a["offset"], a["units"])
            for a in signal["axes"]
        }
        same_axes(told, known)
        for suffix in (".zarr", ".pt", ".hspy"):  # and by our own readers
            again = sd.open(exports(suffix))
            np.testing.assert_array_equal(again.values, cut)
            told = {
                n: tuple(again[n].attrs[key] for key in ("scale", "offset", "units")) for n in NAMES
            }
            same_axes(told, known)
