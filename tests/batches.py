"""What the tests of several inputs share: made-up scans, the command, and what it left and said."""

import os
import signal
from pathlib import Path

import numpy as np
import xarray as xr

from stem_dask.cli import run

#: half the width of the beam in each of three files, which sets the window
BEAMS = {"a": 3, "b": 6, "c": 4}


def write_beam(name, half, detector=(40, 36), middle=(19, 17)):
    cy, cx = middle
    data = np.zeros((4, 3, *detector), np.uint16)
    for y in range(4):
        data[y, :, cy - half : cy + half, cx - half : cx + half] = 5 + y
    np.save(f"raw/{name}.npy", data)


def batch(*overrides):
    return run.main(["batch.yaml", *overrides])


def size_of(name):
    return xr.open_zarr(f"out/{name}.zarr").patterns.shape[-2:]


def rows(text):
    """The lines of the table, by input."""
    lines = text[text.index("input ") :].splitlines()[1:-1]
    return {line.split()[0]: line.split() for line in lines}


def content(folder):
    """What every file of the patterns holds."""
    files = Path(folder, "patterns").rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


def stopped(monkeypatch, name, call):
    """SIGTERM at the n-th call of a function; returns what takes it back."""
    module, _, attribute = name.rpartition(".")
    plain, calls = getattr(__import__(module, fromlist=["_"]), attribute), []

    def function(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **options)

    monkeypatch.setattr(name, function)
    return lambda: monkeypatch.setattr(name, plain)
