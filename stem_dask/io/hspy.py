"""What HyperSpy wants to know of a signal, and how RosettaSciIO writes it into a .hspy file."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from stem_dask.io.hdf5 import refuse_full_disk
from stem_dask.io.publish import naming
from stem_dask.model import Axis

#: the version whose files these are like
PACKAGE = {"package": "hyperspy", "package_version": "2.5.0"}


def experiment(title: str) -> str:
    """The group of a signal, as HyperSpy names it.

    Examples
    --------
    >>> experiment("gold/on carbon"), experiment("")
    ('Experiments/gold-on carbon', 'Experiments/__unnamed__')
    """
    # dots alone are no name of a folder
    return f"Experiments/{title.replace('/', '-') if title.strip('.') else '__unnamed__'}"


def signal_of(
    axes: Sequence[Axis],
    title: str,
    total: NDArray,
    metadata: Mapping[str, Any],
    original_metadata: Mapping[str, Any],
    beam_energy_kv: float | None,
) -> dict[str, Any]:
    """A signal without its data, as the nested dictionary that HyperSpy's writers take.

    Parameters
    ----------
    axes : of the patterns; they are named as HyperSpy's users expect
    title : title of the signal
    total : (scan_y, scan_x) or (pattern,), the navigator
    metadata : plain values and arrays for the node ``stem_dask`` of the metadata
    original_metadata : of the file that was read, see `stem_dask.io.metadata.hdf5_tree`
    beam_energy_kv : in keV, where HyperSpy looks for it
    """
    n_lead = len(axes) - 2
    names = {"scan_y": "y", "scan_x": "x"}
    described = [
        _axis(axis, names.get(axis.name, axis.name), i, i < n_lead) for i, axis in enumerate(axes)
    ]
    microscope = {}
    if beam_energy_kv is not None:
        microscope = {"Acquisition_instrument": {"TEM": {"beam_energy": float(beam_energy_kv)}}}
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
            "General": {"title": title},
            "Signal": {"signal_type": ""},
            "_HyperSpy": {"_sig_navigator": navigator},
            "stem_dask": dict(metadata),
            **microscope,
        },
        "attributes": {"_lazy": True, "ragged": False},
        "package_info": PACKAGE,
        **nothing,
        "original_metadata": dict(original_metadata),
    }


@naming
def write_signal(path: str, signal: Mapping[str, Any]) -> None:
    """Write all but the data of a signal into a .hspy file, which holds them already."""
    from rsciio.hspy import file_writer

    arrays = signal["metadata"]["stem_dask"].values()
    refuse_full_disk(path, sum(getattr(array, "nbytes", 0) for array in arrays))
    file_writer(path, signal, write_dataset=False, show_progressbar=False)


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
