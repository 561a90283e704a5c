"""Signals of HyperSpy in the layout of RosettaSciIO: in .zspy stores, and for the HDF5 files of `stem_dask.writers.hdf5`.

``Experiments/TITLE`` holds ``data``, the axes and the metadata as groups; plain values are attributes. A .zspy is zarr 2.
Images of the scan are signals in the metadata, as HyperSpy's navigator is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import of_type
from stem_dask.core.formats import Output
from stem_dask.core.metadata import NAMES, dig, hdf5_name, hdf5_tree, signal_tree, to_json, tree_at
from stem_dask.core.model import Axis, Record, Region
from stem_dask.core.patterns import LABELS, axes_of, blocks_of, content_of, lead_shape
from stem_dask.storage.publish import remove
from stem_dask.storage.staging import damage, refuse_other_files, remove_unfinished
from stem_dask.writers.codecs import compressed, whole_chunks
from stem_dask.writers.spool import SpoolSink, write_file
from stem_dask.writers.zarr import create_array

if TYPE_CHECKING:
    import xarray as xr

#: arrays of an analysis that a signal holds as images of its scan, such as ``signal.metadata.Maps.bright_field``
MAPS = (
    "total", "bright_field", "dark_field", "com_y", "com_x", "deflection_y", "deflection_x",
)  # fmt: skip

_LONGEST_NAME = 200  # bytes; most file systems allow 255


@dataclass(frozen=True)
class ZspySink:
    """Writes ``patterns`` into a .zspy store, one file per chunk; other blocks are spooled.

    Zarr 2 has no checksums, so only the records have them.
    """

    output: Output
    stage: list[str] = field(default_factory=list, compare=False)

    @property
    def _spool(self) -> SpoolSink:
        return SpoolSink(self.output.spool, self.stage)

    @property
    def _group(self) -> Path:
        """Group of the signal, whose name is shortened to a valid folder name."""
        title = self.output.title.encode()[:_LONGEST_NAME].decode("utf-8", "ignore")
        return Path(self.output.path, experiment(title))

    def create(self, *, resume: bool) -> None:
        """Create the groups and the empty array, unless an interrupted run left the same."""
        import zarr

        path, begun = Path(self.output.path), False
        with contextlib.suppress(OSError, ValueError):
            found: Any = zarr.open_array(self._group / "data", mode="r", zarr_format=2)
            begun = resume and found.metadata == self._array({}).metadata
        if begun:
            remove_unfinished(path)
        else:
            remove(path)
            write_tree(path, {"file_format": "ZSpy", "file_format_version": "3.3"})
            write_tree(self._group.parent, {})
            write_tree(self._group, {})
            # last, because a resumed run keeps the chunks below an existing array
            self._array(self._group / "data")
        self._spool.create(resume=resume)

    def _array(self, store: Any) -> Any:
        """The empty array."""
        one = self.output
        parts = (one.shape, one.dtype, (), one.chunks, None, one.codec)
        return create_array(store, None, *parts, zarr_format=2)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Write the chunks of one block."""
        output, rest, written = self.output, dict(blocks), []
        block = of_type(rest.pop("patterns"), output.dtype)  # and byte order
        for origin, chunk in whole_chunks(block, region, output.chunks, output.shape):
            place = [start // size for start, size in zip(origin, output.chunks, strict=True)]
            file = self._group.joinpath("data", *map(str, place))
            folders = list(file.parents)[len(place) - 2 :: -1]  # below that of the array
            contents = [compressed(chunk, output.codec)]
            crc, n_bytes = write_file(file, self.stage[0], contents, folders=folders)
            written.append(["/".join(map(str, place)), crc, n_bytes])
        return {"chunks": written, **self._spool.write(index, region, rest)}

    def verify(self, record: Record) -> str | None:
        """Compare the files of a block with their checksums."""
        for name, crc, n_bytes in record.extra.get("chunks", ()):
            what = damage(self._group / "data" / name, (crc, n_bytes))
            if what is not None:
                return what
        return self._spool.verify(record)

    def finish(self, records: Sequence[Record]) -> None:
        """Compare every chunk with its record."""
        refuse_other_files(
            (self._group / "data" / name, crc, n_bytes)
            for record in records
            for name, crc, n_bytes in record.extra["chunks"]
        )
        self._spool.finish(records)

    def complete(
        self, patterns: xr.DataArray, analysis: xr.Dataset | None, about: Mapping[str, Any]
    ) -> list[str]:
        """Add everything but the data of the signal."""
        signal = signal_of(self.output, patterns, analysis)
        tree = {f"axis-{i}": axis for i, axis in enumerate(signal["axes"])}
        names = ("metadata", "original_metadata", "learning_results", "attributes")
        tree |= {name: signal[name] for name in names} | signal["package_info"]
        write_tree(self._group, tree)
        return []


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

    def image(values: NDArray, title: str, quantity: str = "") -> dict[str, Any]:
        """One value per position, as a signal without its own metadata."""
        return {
            "data": values,
            "axes": [{**axis, "navigate": False} for axis in axes[: total.ndim]],
            "metadata": {
                "General": {"title": title},
                "Signal": {"signal_type": ""} | ({"quantity": quantity} if quantity else {}),
            },
            "attributes": {"_lazy": False, "ragged": False},
            "original_metadata": {},
        }

    found, maps = {} if analysis is None else analysis.variables, {}
    for name in MAPS:
        if name in found:  # float32 shows all digits that matter in an image
            values = np.ascontiguousarray(found[name].values, np.float32)
            text, units = LABELS[name]
            maps[f"_sig_{name}"] = image(values, name, f"{text} ({units})")
    return {
        "axes": axes,
        "metadata": {
            **tree_at(general, dict(known)),
            "_HyperSpy": {"_sig_navigator": image(total, "total")},
            **({"Maps": maps} if maps else {}),
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


def write_tree(folder: Path, tree: Mapping[str, Any]) -> None:
    """Make a folder a group: dictionaries become groups, arrays arrays, and plain values attributes."""
    import zarr

    attrs = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            write_tree(folder / key, value)
        elif isinstance(value, np.ndarray):
            parts = (value.shape, value.dtype, (), value.shape)
            create_array(folder / key, None, *parts, zarr_format=2)[...] = value
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            numbered = {str(i): item for i, item in enumerate(value)}
            write_tree(folder / f"_list_{len(value)}_{key}", numbered)
        else:
            attrs[key] = "_None_" if value is None else value
    group = zarr.open_group(folder, mode="a", zarr_format=2)
    if attrs:
        group.attrs.put(to_json(attrs))
