"""Signals of HyperSpy as nested dictionaries, and their metadata in .hspy files."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from stem_dask.core.errors import ConfigError
from stem_dask.core.metadata import NAMES, dig, hdf5_name, signal_tree, tree_at
from stem_dask.core.model import Axis
from stem_dask.stages.arrays import patterns_of
from stem_dask.stages.patterns import axes_of, blocks_of
from stem_dask.storage.publish import named
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
        _axis(axis, names.get(axis.name, axis.name), i, i < n_lead) for i, axis in enumerate(axes)
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


def to_hyperspy(patterns: Any) -> Any:
    """Patterns as a lazy, calibrated HyperSpy signal over the same graph; nothing is computed.

    Parameters
    ----------
    patterns : (scan_y, scan_x, ky, kx) or (pattern, ky, kx), what any function of this package takes

    Returns
    -------
    hyperspy LazySignal2D; its navigation axes are the scan, its metadata what the file states about the microscope

    Raises
    ------
    ConfigError
        When HyperSpy is not installed.

    Examples
    --------
    >>> import numpy as np, stem_dask as sd
    >>> signal = sd.to_hyperspy(np.ones((2, 3, 8, 9), "u2"))
    >>> signal.axes_manager.navigation_shape, signal.axes_manager.signal_shape
    ((3, 2), (9, 8))
    """
    try:
        import hyperspy.api as hs
    except ImportError as error:
        raise ConfigError(
            f"HyperSpy cannot be imported ({error}); install the extra: pip install 'stem_dask[hyperspy]'"
        ) from error

    patterns = patterns_of(patterns)
    axes = axes_of(patterns)
    described = [
        {**_axis(axis, axis.name, i, i < len(axes) - 2), "is_binned": False}
        for i, axis in enumerate(axes)
    ]
    metadata = signal_metadata(patterns.attrs)
    title = str(patterns.attrs.get("title", ""))
    metadata = tree_at({"General.title": title}, metadata)
    signal_type = dig(metadata, "Signal.signal_type") or ""
    signal = hs.signals.Signal2D(blocks_of(patterns), axes=described, metadata=metadata).as_lazy()
    signal.set_signal_type(signal_type)
    return signal


def write_signal(path: str, signal: Mapping[str, Any]) -> None:
    """Add everything but the data of a signal to its .hspy file."""
    from rsciio.hspy import file_writer

    arrays = signal["metadata"]["stem_dask"].values()
    refuse_full_disk(path, sum(getattr(array, "nbytes", 0) for array in arrays))
    with named(path):
        file_writer(path, signal, write_dataset=False, show_progressbar=False)


def _named(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace names that HDF5 does not allow."""
    return {hdf5_name(k): _named(v) if isinstance(v, dict) else v for k, v in tree.items()}


def _axis(axis: Axis, name: str, index: int, navigate: bool) -> dict[str, Any]:
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
