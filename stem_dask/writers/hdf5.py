"""HDF5 files (.h5, .hdf5, .emd, .hspy): tasks compress chunks, and the client appends them in order.

Only one process can write an HDF5 file, but it accepts compressed chunks. Tasks spool the chunks of their block to the folder of
the run, and `finish` copies them into the file.

All suffixes have one layout. The patterns are a single dataset with several names (hard links), so that each program finds them,
with a calibration of its own, where it looks:

- ``Experiments/TITLE/data``: a signal of HyperSpy, in the layout of RosettaSciIO
- ``datacube_root/datacube/data``: EMD 1.0, which py4DSTEM reads
- ``stem/data/patterns``: NeXus (NXentry and NXdata); the attributes ``default`` lead there
- ``patterns``: netCDF, for xarray; the coordinates beside it are dimension scales
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.batches import of_type
from stem_dask.core.errors import StoreError
from stem_dask.core.formats import Output
from stem_dask.core.metadata import NAMES, as_text
from stem_dask.core.model import DETECTOR_DIMS, PER_NM, Axis, Record, Region
from stem_dask.core.patterns import axes_of
from stem_dask.storage.errors import translate
from stem_dask.writers.codecs import LEVELS, blosc_bytes, bytes_apart, deflated, whole_chunks
from stem_dask.writers.hyperspy import experiment, signal_of
from stem_dask.writers.spool import SpoolSink

if TYPE_CHECKING:
    import xarray as xr

#: longer attributes become datasets, because HDF5 limits attributes to 64 kB
_LONGEST_ATTRIBUTE = 2**15

#: bytes of the smallest array that is compressed
_LEAST_PACKED = 2**13

#: attributes that are in the signal of HyperSpy or of the file, or say where the patterns were read
_NOT_OF_PATTERNS = ("given", "metadata", "original_metadata", "title", "source", "notes")


@dataclass(frozen=True)
class Hdf5Sink:
    """Writes ``patterns`` into a dataset of a new HDF5 file; other blocks are spooled."""

    output: Output
    stage: list[str] = field(default_factory=list, compare=False)

    @property
    def dataset(self) -> str:
        """Path of the dataset in the file."""
        return f"{experiment(self.output.title)}/data"

    @property
    def _name(self) -> str:
        """Name of the finished file."""
        return Path(self.output.path).name.removesuffix(".incomplete")

    @property
    def spool(self) -> SpoolSink:
        """For compressed chunks and other blocks."""
        return SpoolSink(self.output.spool, self.stage)

    @property
    def _codec(self) -> str:
        # gzip is known to all readers of HDF5
        return "gzip" if self.output.codec == "auto" else self.output.codec

    def create(self, *, resume: bool) -> None:
        """Make the spool; the file itself is written at the end."""
        with translate(StoreError, self.output.path), open(self.output.path, "wb"):
            pass  # the temporary name marks the output as incomplete
        self.spool.create(resume=resume)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Compress the chunks of one block and spool them."""
        output, spooled = self.output, dict(blocks)
        block = of_type(spooled.pop("patterns"), output.dtype)  # and byte order
        origins, packed = [], []
        for origin, chunk in whole_chunks(block, region, output.chunks, output.shape):
            origins.append(origin)
            packed.append(pack_chunk(chunk, self._codec))
        spooled["bytes"] = np.frombuffer(b"".join(packed), np.uint8)
        spooled["sizes"] = np.array([len(content) for content in packed], np.int64)
        spooled["origins"] = np.array(origins, np.int64)
        return self.spool.write(index, region, spooled)

    def verify(self, record: Record) -> str | None:
        """Compare the file of a block with its checksum."""
        return self.spool.verify(record)

    def finish(self, records: Sequence[Record]) -> None:
        """Append all chunks in the order of their block."""
        import h5py

        options: dict[str, Any] = {}
        if self._codec == "gzip":
            options = {"compression": "gzip", "compression_opts": LEVELS["gzip"], "shuffle": True}
        elif self._codec != "none":
            import hdf5plugin

            shuffle = hdf5plugin.Blosc.BITSHUFFLE
            level = LEVELS[self._codec]
            options = dict(hdf5plugin.Blosc(cname=self._codec, clevel=level, shuffle=shuffle))
        output, spool, n = self.output, self.spool, len(records)
        spool.finish(records)
        sizes = (blocks["sizes"].sum() for _, blocks in spool.blocks(n, ("sizes",)))
        refuse_full_disk(output.path, int(sum(sizes)))
        with h5py.File(output.path, "w", locking=False) as file:
            data = file.create_dataset(
                self.dataset, output.shape, output.dtype, chunks=output.chunks, **options
            )
            for _, spooled in spool.blocks(n, ("bytes", "sizes", "origins")):
                start = 0
                origins, sizes = spooled["origins"].tolist(), spooled["sizes"].tolist()
                for origin, size in zip(origins, sizes, strict=True):
                    content = spooled["bytes"][start : start + size]
                    data.id.write_direct_chunk(tuple(origin), content)
                    start += size

    def complete(
        self, patterns: xr.DataArray, analysis: xr.Dataset | None, about: Mapping[str, Any]
    ) -> list[str]:
        """Add the signal of HyperSpy, the other names of the patterns, axes, ``valid``, the analysis and the attributes."""
        import h5py
        from rsciio.hspy import file_writer

        signal, path = signal_of(self.output, patterns, analysis), self.output.path
        suffix = Path(self._name).suffix.lower()
        known = {} if analysis is None else analysis.variables
        images = signal["metadata"].get("Maps", {}).values()
        arrays = [*signal["metadata"]["stem_dask"].values(), *(one["data"] for one in images)]
        refuse_full_disk(path, sum(getattr(a, "nbytes", 0) for a in (*arrays, *known.values())))
        if suffix == ".hspy":  # whose bytes do not depend on paths and versions
            about = {"title": self.output.title}
        with translate(StoreError, path):
            file_writer(path, signal, write_dataset=False, show_progressbar=False)
            with h5py.File(path, "r+", locking=False) as file:
                file["patterns"] = file[self.dataset]
                _describe(file, patterns, about)
                if analysis is not None:
                    _write_analysis(file, f"{experiment(self.output.title)}/metadata/stem_dask", analysis)  # fmt: skip
                _link_nexus(file, list(map(str, patterns.dims)))
                notes = _link_emd(file, axes_of(patterns), patterns.attrs)
        # EMD is py4DSTEM's format; most files of other suffixes are for other programs
        return [*self.plugin_note(), *(notes if suffix == ".emd" else ())]

    def plugin_note(self) -> list[str]:
        """What readers need."""
        if self._codec not in ("lz4", "zstd"):
            return []
        return [
            f"{self._name} is compressed with blosc {self._codec}: reading it requires hdf5plugin"
        ]


def refuse_full_disk(path: str, n_bytes: int) -> None:
    """Raise OSError if so many bytes do not fit: a failing HDF5 write may crash the process when it exits."""
    n_bytes += n_bytes // 50 + 2**17  # indexes of HDF5, and small arrays
    if n_bytes > (free := shutil.disk_usage(os.path.dirname(path)).free):
        raise OSError(errno.ENOSPC, f"{n_bytes:,} bytes are needed and {free:,} are free", path)
    most = math.inf  # of ``ulimit -f``
    if os.name == "posix":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        most = math.inf if limit == resource.RLIM_INFINITY else limit
    if n_bytes + os.path.getsize(path) > most:
        raise OSError(
            errno.EFBIG, f"{n_bytes:,} bytes are needed; the file size limit is {most:,}", path
        )


def pack_chunk(chunk: NDArray, codec: str) -> bytes:
    """Compress one chunk like the filters of HDF5: shuffle and deflate, or blosc.

    Examples
    --------
    >>> import zlib
    >>> zlib.decompress(pack_chunk(np.array([[1, 258]], "<u2"), "gzip"))
    b'\\x01\\x02\\x00\\x01'
    """
    if codec == "none":
        return chunk.tobytes()
    if codec != "gzip":
        return blosc_bytes(chunk, codec, "bitshuffle")
    return deflated(bytes_apart(chunk), LEVELS[codec])


def _describe(file: Any, patterns: xr.DataArray, about: Mapping[str, Any]) -> None:
    """Write attributes, the axes as dimension scales, and ``valid``."""
    flat = {name: value for name, value in patterns.attrs.items() if name not in _NOT_OF_PATTERNS}
    instrument = {name: value for name, value in flat.items() if name in NAMES}
    _write_attrs(file, {**about, **instrument})
    data, valid = file["patterns"], patterns.coords.get("valid")
    _write_attrs(data, {"units": patterns.attrs.get("intensity", "counts"), **flat})
    for dim in map(str, patterns.dims):
        _write_array(file, dim, patterns.coords[dim].variable).make_scale(dim)
    _name_axes(file, data, patterns.dims)
    if valid is not None:
        _name_axes(file, _write_array(file, "valid", valid.variable), valid.dims)


def _write_analysis(file: Any, signal: str, analysis: xr.Dataset) -> None:
    """Write the group ``analysis``, with links to the arrays that group ``signal`` has."""
    group, there = file.create_group("analysis"), file[signal]
    for name, variable in analysis.variables.items():
        if name in file:  # an axis of the patterns
            continue
        if name in there:
            group[str(name)] = there[str(name)]
        if variable.dtype.kind in "biuf":
            _name_axes(file, _write_array(group, str(name), variable), variable.dims)
        else:
            _write_attrs(group, {str(name): variable.values})
    _write_attrs(group, analysis.attrs)


def _write_array(group: Any, name: str, variable: xr.Variable) -> Any:
    """Write a small array, unless it is there, with its attributes."""
    if name not in group:
        # compressed ones have an index of 2 kB
        is_packed = variable.nbytes > _LEAST_PACKED
        packed: dict[str, Any] = {"compression": "gzip", "shuffle": True} if is_packed else {}
        group.create_dataset(name, data=np.asarray(variable.values), **packed)
    _write_attrs(group[name], variable.attrs)
    return group[name]


def _name_axes(file: Any, dataset: Any, dims: Any) -> None:
    """Label the axes of a dataset and attach dimension scales."""
    for i, dim in enumerate(map(str, dims)):
        dataset.dims[i].label = dim
        if dim in file and dataset.shape[i] == file[dim].shape[0]:
            dataset.dims[i].attach_scale(file[dim])


def _write_attrs(item: Any, attrs: Mapping[str, Any]) -> None:
    """Write attributes as netCDF has them; long ones become datasets."""
    import h5py

    place = item if isinstance(item, h5py.Group) else item.file
    for key, value in as_text(attrs).items():
        value = value.replace("\0", "") if isinstance(value, str) else value
        n_bytes = len(value.encode()) if isinstance(value, str) else np.asarray(value).nbytes
        if n_bytes > _LONGEST_ATTRIBUTE and key not in place:
            place.create_dataset(key, data=value)
        else:
            item.attrs[key] = value


def _link_nexus(file: Any, dims: Sequence[str]) -> None:
    """Link the patterns and their axes into an NXdata, which the attributes ``default`` lead to."""
    # py4DSTEM takes a file with a group called entry for one of an Arina detector
    entry = file.create_group("stem")
    data = entry.create_group("data")
    file.attrs.update({"NX_class": "NXroot", "default": "stem"})
    entry.attrs.update({"NX_class": "NXentry", "default": "data"})
    data.attrs.update({"NX_class": "NXdata", "signal": "patterns", "axes": dims})
    for name in ("patterns", *dims):
        data[name] = file[name]


def _link_emd(file: Any, axes: Sequence[Axis], attrs: Mapping[str, Any]) -> list[str]:
    """Link the patterns into a data cube of EMD 1.0 with py4DSTEM's calibration; returns what that cannot say.

    A list of patterns is an array of three axes, because a data cube has four.
    """
    is_scan = len(axes) == 4
    root, notes = file.create_group("datacube_root"), []
    cube = root.create_group("datacube")
    file.attrs.update({"emd_group_type": "file", "version_major": 1, "version_minor": 0})
    file.attrs["authoring_program"] = "stem_dask"
    root.attrs.update({"emd_group_type": "root", "python_class": "Root"})
    kind = "DataCube" if is_scan else "Array"
    cube.attrs.update({"emd_group_type": "array", "python_class": kind})
    cube["data"] = file["patterns"]
    axes = [emd_axis(replace(axis, scale=axis.scale or 1.0)) for axis in axes]
    for i, axis in enumerate(axes):
        dim = cube.create_dataset(f"dim{i}", data=[axis.value(0), axis.value(1)])
        dim.attrs.update({"name": axis.name, "units": axis.units})
    values: dict[str, Any] = {"QR_flip": False, "_root_treepath": ""}
    for space, what, (slow, fast) in (("R", "scan", axes[:2]), ("Q", "detector", axes[-2:])):
        if space == "R" and not is_scan:
            continue
        values |= {f"{space}_pixel_size": abs(fast.scale), f"{space}_pixel_units": fast.units}
        if not math.isclose(abs(slow.scale), abs(fast.scale), rel_tol=1e-6) or slow.units != fast.units:  # fmt: skip
            notes.append(
                f"py4DSTEM has one pixel size for the {what}; the steps differ, so it shows that of the fast axis for both: "
                f"{abs(fast.scale):.4g} {fast.units}"
            )
    if any(axis.offset for axis in axes[-2:]):
        zeros = [-axis.offset / axis.scale for axis in axes[-2:]]  # in pixels
        values |= {"qx0": zeros[0], "qx0_mean": zeros[0], "qy0": zeros[1], "qy0_mean": zeros[1]}
    if "convergence_angle_mrad" in attrs:
        values["convergence_semiangle_mrad"] = float(attrs["convergence_angle_mrad"])
    bundle = root.create_group("metadatabundle")
    bundle.attrs["emd_group_type"] = "metadatabundle"
    group = bundle.create_group("calibration")
    group.attrs.update({"emd_group_type": "metadata", "python_class": "Calibration"})
    kinds = {bool: "bool", float: "number", str: "string"}
    for name, value in values.items():
        group.create_dataset(name, data=value).attrs["type"] = kinds[type(value)]
    targets = group.create_group("_target_paths")
    targets.attrs.update({"type": "list_of_strings", "length": int(is_scan)})
    if is_scan:
        targets["0"] = "/datacube"
    return notes


def emd_axis(axis: Axis) -> Axis:
    """An axis with the name and the units that py4DSTEM accepts.

    Examples
    --------
    >>> emd_axis(Axis("ky", 8, 0.5, -2.0, "1/nm"))
    Axis(name='Qx', size=8, scale=0.05, offset=-0.2, units='A^-1')
    >>> emd_axis(Axis("kx", 8, 2.0, -4.0, "furlong")), emd_axis(Axis("scan_x", 8)).units
    (Axis(name='Qy', size=8, scale=1.0, offset=-2.0, units='pixels'), 'pixels')
    """
    names = {"scan_y": "Rx", "scan_x": "Ry", "ky": "Qx", "kx": "Qy"}
    factor, units = 1.0, axis.units if axis.calibrated else "pixels"
    if axis.name in DETECTOR_DIMS and units != "mrad":
        if units in PER_NM:
            factor, units = PER_NM[units] / 10, "A^-1"
        elif units == "rad":
            factor, units = 1000.0, "mrad"
        else:
            factor, units = 1 / axis.scale, "pixels"
    name = names.get(axis.name, axis.name)
    return Axis(name, axis.size, axis.scale * factor, axis.offset * factor, units)
