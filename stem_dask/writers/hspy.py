"""Signals of HyperSpy as nested dictionaries, and .hspy files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stem_dask.core.errors import StoreError
from stem_dask.core.formats import Output
from stem_dask.core.metadata import NAMES, dig, hdf5_name, hdf5_tree, signal_tree, tree_at
from stem_dask.core.model import Axis
from stem_dask.core.patterns import axes_of, blocks_of, content_of, lead_shape
from stem_dask.storage.errors import translate
from stem_dask.writers.hdf5 import Hdf5Sink, refuse_full_disk
from stem_dask.writers.spool import SpoolSink

if TYPE_CHECKING:
    import xarray as xr


class HspySink(Hdf5Sink):
    """Writes ``patterns`` into the signal of a .hspy file."""

    @property
    def dataset(self) -> str:
        """Path of the data of the signal."""
        return f"{experiment(self.output.title)}/data"

    def complete(
        self, patterns: xr.DataArray, analysis: xr.Dataset | None, about: Mapping[str, Any]
    ) -> list[str]:
        """Add everything but the data of the signal."""
        from rsciio.hspy import file_writer

        signal, path = signal_of(self.output, patterns, analysis), self.output.path
        arrays = signal["metadata"]["stem_dask"].values()
        refuse_full_disk(path, sum(getattr(array, "nbytes", 0) for array in arrays))
        with translate(StoreError, path):
            file_writer(path, signal, write_dataset=False, show_progressbar=False)
        return self.plugin_note()


def experiment(title: str) -> str:
    """Group of a signal in the file.

    Examples
    --------
    >>> experiment("gold/on carbon"), experiment("")
    ('Experiments/gold-on carbon', 'Experiments/__unnamed__')
    """
    # dots alone are not a valid folder name
    return f"Experiments/{title.replace('/', '-') if title.strip('.') else '__unnamed__'}"


def signal_of(
    output: Output, patterns: xr.DataArray, analysis: xr.Dataset | None
) -> dict[str, Any]:
    """A signal without its data, as the nested dictionary that the writers of RosettaSciIO take."""
    total = np.zeros(lead_shape(patterns))
    n_blocks = math.prod(blocks_of(patterns).numblocks)
    for region, block in SpoolSink(output.spool).blocks(n_blocks, ("navigator",)):
        total[region] = block["navigator"]
    content = content_of(patterns, analysis)
    own = {**content["window"], "intensity": content["intensity"], **content["analysis"]}
    own |= {name: content[name] for name in ("downsample_factor", "given") if name in content}
    known = signal_metadata(content)
    general = {
        "General.title": output.title if output.title.strip(".") else "",  # as in `experiment`
        "Signal.signal_type": dig(known, "Signal.signal_type") or "",
    }
    axes = [
        signal_axis(axis, axis.name.removeprefix("scan_"), output.dims)
        for axis in axes_of(patterns)
    ]
    empty = ("original_metadata", "learning_results", "tmp_parameters", "models")
    nothing: dict[str, Any] = {name: {} for name in empty}
    navigator = {
        "data": total,
        "axes": [{**axis, "navigate": False} for axis in axes[: total.ndim]],
        "metadata": {"General": {"title": "total"}, "Signal": {"signal_type": ""}},
        "attributes": {"_lazy": False, "ragged": False},
        **nothing,
    }
    return {
        "axes": axes,
        "metadata": {
            **tree_at(general, dict(known)),
            "_HyperSpy": {"_sig_navigator": navigator},
            "stem_dask": own,
        },
        "attributes": {"_lazy": True, "ragged": False},
        # whose file layout is written
        "package_info": {"package": "hyperspy", "package_version": "2.5.0"},
        **nothing,
        "original_metadata": hdf5_tree(content.get("original_metadata", {})),
    }


def signal_metadata(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata in the structure of HyperSpy from attributes of patterns: the inverse of `of_signal`, without title.

    Examples
    --------
    >>> signal_metadata({"beam_energy_kv": 60.0, "metadata": {"Sample": {"description": "Au"}}, "k_origin": "detector"})
    {'Sample': {'description': 'Au'}, 'Acquisition_instrument': {'TEM': {'beam_energy': 60.0}}}
    """
    tree: dict[str, Any] = _named(signal_tree(attrs.get("metadata") or {}))
    return tree_at({NAMES[name]: attrs[name] for name in NAMES if name in attrs}, tree)


def _named(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace names that HDF5 does not allow."""
    return {hdf5_name(k): _named(v) if isinstance(v, dict) else v for k, v in tree.items()}


def signal_axis(axis: Axis, name: str, dims: Sequence[str]) -> dict[str, Any]:
    """An axis of patterns as HyperSpy describes it."""
    index = dims.index(axis.name)
    return {
        "_type": "UniformDataAxis",
        "name": name,
        "units": axis.units or "px",
        "scale": float(axis.scale),
        "offset": float(axis.offset),
        "size": int(axis.size),
        "navigate": index < len(dims) - 2,
        "is_binned": False,
        "index_in_array": index,
    }
