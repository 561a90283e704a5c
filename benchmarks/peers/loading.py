"""Loaders as users write them: a dataset that reads one pattern, a DataLoader, and the logarithm of each batch in torch."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

#: of an epoch; returns the number of its patterns
Load = Callable[[], int]


def loaders(store: Path, batch: int, sample: int) -> dict[str, Load]:
    """Epochs that return the number of their patterns, by name.

    ``store`` is a .zarr beside a .hspy and a .pt of the same patterns; ``sample`` patterns are read of the compressed ones.
    """
    import h5py
    import torch
    import xarray
    import zarr
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    array: Any = zarr.open_array(store / "patterns", mode="r")
    opened = xarray.open_zarr(store)["patterns"]
    (signal,) = h5py.File(store.with_suffix(".hspy"), "r")["Experiments"].values()
    data, width = signal["data"], array.shape[1]
    saved: Any = torch.load(store.with_suffix(".pt"), weights_only=True, mmap=True)
    mapped = saved["patterns"].flatten(0, 1)
    order = np.random.default_rng(0).permutation(len(mapped)).tolist()

    class Items:
        def __init__(self, read: Callable[[Any], Any]) -> None:
            self.read = read

        def __getitem__(self, i: Any) -> Any:
            return self.read(i)

    def load(read: Callable[[Any], Any], wanted: Any = order, size: int | None = batch) -> Load:
        items: Any = Items(read)

        def epoch() -> int:
            n = 0
            for patterns in DataLoader(items, size, sampler=wanted):
                n += len((torch.log1p(patterns.to(torch.float32)) - 0.5) / 1.2)
            return n

        return epoch

    def one(get: Callable[[int, int], Any]) -> Load:
        def read(i: int) -> Any:
            return torch.from_numpy(np.asarray(get(*divmod(i, width)), np.float32))

        return load(read, order[:sample])

    batches = [order[i : i + batch] for i in range(0, len(order), batch)]

    found = {
        "xarray, one at a time": one(lambda y, x: opened[y, x].values),
        "zarr, one at a time": one(lambda y, x: array[y, x]),
        "h5py, one at a time": one(lambda y, x: data[y, x]),
        "torch.load(mmap), one at a time": load(mapped.__getitem__),
        "torch.load(mmap), a batch at a time": load(mapped.__getitem__, batches, None),
    }
    if importlib.util.find_spec("hyperspy"):
        import hyperspy.api as hs

        lazy = hs.load(store.with_suffix(".hspy"), lazy=True).data
        found["HyperSpy lazy, one at a time"] = one(lambda y, x: lazy[y, x].compute())
    return found
