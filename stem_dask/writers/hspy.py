"""Signals of HyperSpy as nested dictionaries, and their metadata in .hspy files."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from stem_dask.core.errors import StoreError
from stem_dask.core.metadata import NAMES, dig, hdf5_name, signal_tree, tree_at
from stem_dask.core.model import Axis
from stem_dask.storage.errors import translate
from stem_dask.writers.hdf5 import refuse_full_disk

#: version of HyperSpy whose file layout is written
PACKAGE = {"package": "hyperspy", "package_version": "2.5.0"}


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
    axes: Sequence[Axis],
    title: str,
    total: NDArray,
    metadata: Mapping[str, Any],
    original_metadata: Mapping[str, Any],
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """A signal without its data, as the nested dictionary that the writers of RosettaSciIO take.

    Parameters
    ----------
    axes : of the patterns
    title : of the signal
    total : (scan_y, scan_x) or (pattern,), the navigator
    metadata : plain values and arrays for the node ``stem_dask`` of the metadata
    original_metadata : of the input file, see `stem_dask.core.metadata.hdf5_tree`
    known : metadata in the structure of HyperSpy, see `signal_metadata`
    """
    n_lead = len(axes) - 2
    signal_type = dig(known, "Signal.signal_type") or ""
    title = title if title.strip(".") else ""  # as in `experiment`
    names = {"scan_y": "y", "scan_x": "x"}
    described = [
        signal_axis(axis, names.get(axis.name, axis.name), i, i < n_lead)
        for i, axis in enumerate(axes)
    ]
    nothing: dict[str, Any] = {
        "original_metadata": {},
        "learning_results": {},
        "tmp_parameters": {},
        "models": {},
    }
    navigator = {
        "data": total,
        "axes": [{**axis, "navigate": False} for axis in described[:n_lead]],
        "metadata": {"General": {"title": "total"}, "Signal": {"signal_type": ""}},
        "attributes": {"_lazy": False, "ragged": False},
        **nothing,
    }
    return {
        "axes": described,
        "metadata": {
            **tree_at({"General.title": title, "Signal.signal_type": signal_type}, dict(known)),
            "_HyperSpy": {"_sig_navigator": navigator},
            "stem_dask": dict(metadata),
        },
        "attributes": {"_lazy": True, "ragged": False},
        "package_info": PACKAGE,
        **nothing,
        "original_metadata": dict(original_metadata),
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


def write_signal(path: str, signal: Mapping[str, Any]) -> None:
    """Add everything but the data of a signal to its .hspy file."""
    from rsciio.hspy import file_writer

    arrays = signal["metadata"]["stem_dask"].values()
    refuse_full_disk(path, sum(getattr(array, "nbytes", 0) for array in arrays))
    with translate(StoreError, path):
        file_writer(path, signal, write_dataset=False, show_progressbar=False)


def _named(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace names that HDF5 does not allow."""
    return {hdf5_name(k): _named(v) if isinstance(v, dict) else v for k, v in tree.items()}


def signal_axis(axis: Axis, name: str, index: int, navigate: bool) -> dict[str, Any]:
    """An axis as HyperSpy describes it."""
    return {
        "_type": "UniformDataAxis",
        "name": name,
        "units": axis.units or "px",
        "scale": float(axis.scale),
        "offset": float(axis.offset),
        "size": int(axis.size),
        "navigate": navigate,
        "is_binned": False,
        "index_in_array": index,
    }
