"""HyperSpy files: workers compress, one writer appends the chunks in order, RosettaSciIO writes the rest.

HDF5 lets only one process write a file, but takes chunks that were compressed elsewhere. So a task leaves the finished
chunks of its block in the run's folder, and `finish` copies them into the file without touching a pixel.
"""

import errno
import itertools
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.errors import StoreError
from stem_dask.io.publish import named
from stem_dask.io.spool import SpoolSink
from stem_dask.model import Axis, Record, Region

GZIP_LEVEL = 4


@dataclass(frozen=True)
class HspySink:
    """Writes ``patterns`` and, as its navigator, ``navigator`` (one value a pattern) into a .hspy file.

    Parameters
    ----------
    path : the file under its temporary name
    spool : folder for compressed chunks until they are joined
    shape, dtype, axes : of the patterns; axes are named as HyperSpy's users expect
    chunks : HDF5 chunk, whole patterns; its leading extents divide the blocks or cover the axis
    title : title of the signal
    metadata : plain values and arrays for the node ``stem_dask`` of the metadata
    original_metadata : of the file that was read, see `stem_dask.io.metadata.hdf5_tree`
    beam_energy_kv : in keV, where HyperSpy looks for it
    """

    path: str
    spool: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[Axis, ...]
    chunks: tuple[int, ...]
    title: str
    metadata: Mapping[str, Any]
    original_metadata: Mapping[str, Any] = field(default_factory=dict)
    beam_energy_kv: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What goes with every task; metadata are for `finish` only, and may take megabytes."""
        return {**self.__dict__, "metadata": {}, "original_metadata": {}}

    def create(self, *, resume: bool) -> None:
        """Make the folder for the chunks; the file itself is made at the end."""
        with named(self.path), open(self.path, "wb"):
            pass  # as long as the temporary name is there, the output is not complete
        SpoolSink(self.spool).create(resume=resume)

    def write(self, index: int, region: Region, blocks: Mapping[str, NDArray]) -> dict[str, Any]:
        """Compress the chunks of one block and leave them in the run's folder."""
        block = blocks["patterns"].astype(np.dtype(self.dtype), copy=False)  # and byte order
        n_lead = len(region)
        lead = self.chunks[:n_lead]
        for place, chunk, size in zip(region, lead, self.shape, strict=False):
            if place.start % chunk or (place.stop % chunk and place.stop != size):
                raise StoreError(f"block {index} does not lie on the chunks of {self.path}")
        packed, sizes, origins = [], [], []
        steps = [range(0, n, chunk) for n, chunk in zip(block.shape, lead, strict=False)]
        for start in itertools.product(*steps):
            part = block[tuple(slice(a, a + n) for a, n in zip(start, lead, strict=True))]
            packed.append(compress_chunk(part, self.chunks))
            sizes.append(len(packed[-1]))
            origins.append([r.start + a for r, a in zip(region, start, strict=True)])
        spooled: dict[str, NDArray] = {
            "bytes": np.frombuffer(b"".join(packed), np.uint8),
            "sizes": np.array(sizes, np.int64),
            "origins": np.array(origins, np.int64),
            "navigator": blocks["navigator"],
        }
        return SpoolSink(self.spool).write(index, region, spooled)

    def verify(self, record: Record) -> str | None:
        """Compare the file of a block with its checksum."""
        return SpoolSink(self.spool).verify(record)

    def finish(self, records: Sequence[Record]) -> None:
        """Write axes and metadata, then append all chunks in the order of their block."""
        import h5py

        spool = SpoolSink(self.spool)
        total, n_bytes = np.zeros(self.shape[:-2]), 0
        for region, spooled in spool.blocks(len(records), ("navigator", "sizes")):
            total[region] = spooled["navigator"]
            n_bytes += int(spooled["sizes"].sum())
        # HDF5 that meets a full disk when it closes can only complain to the terminal
        n_bytes += n_bytes // 50 + 2**17  # HDF5's own lists, and the metadata
        if n_bytes > (free := shutil.disk_usage(os.path.dirname(self.path)).free):
            raise OSError(
                errno.ENOSPC, f"{n_bytes:,} bytes are needed and {free:,} are free", self.path
            )
        self._write_skeleton(total)
        with h5py.File(self.path, "r+") as file:
            (group,) = file["Experiments"].values()
            del group["data"]
            data = group.create_dataset(
                "data",
                self.shape,
                np.dtype(self.dtype),
                chunks=self.chunks,
                compression="gzip",
                compression_opts=GZIP_LEVEL,
                shuffle=True,
            )
            for _, spooled in spool.blocks(len(records), ("bytes", "sizes", "origins")):
                start = 0
                packed = spooled["bytes"].tobytes()
                for origin, size in zip(spooled["origins"], spooled["sizes"], strict=True):
                    place = (*(int(i) for i in origin), 0, 0)
                    data.id.write_direct_chunk(place, packed[start : start + size])
                    start += int(size)

    def _write_skeleton(self, total: NDArray) -> None:
        """The whole file but for its data: one value stands in, and is taken out after."""
        from rsciio.hspy import file_writer

        n_lead = len(self.axes) - 2
        names = {"scan_y": "y", "scan_x": "x"}
        axes = [
            _axis(axis, names.get(axis.name, axis.name), i, i < n_lead)
            for i, axis in enumerate(self.axes)
        ]
        scan = [{**axis, "navigate": False} for axis in axes[:n_lead]]
        general = {"title": self.title}
        microscope = {}
        if self.beam_energy_kv is not None:
            microscope = {"Acquisition_instrument": {"TEM": {"beam_energy": self.beam_energy_kv}}}
        nothing: dict[str, Any] = {
            "original_metadata": {},
            "learning_results": {},
            "tmp_parameters": {},
            "models": {},
        }
        navigator = {
            "data": total,
            "axes": scan,
            "metadata": {"General": {"title": "total"}, "Signal": {"signal_type": ""}},
            "attributes": {"_lazy": False, "ragged": False},
            **nothing,
        }
        signal = {
            "data": np.zeros((1,) * len(self.shape), np.uint8),
            "axes": axes,
            "metadata": {
                "General": general,
                "Signal": {"signal_type": ""},
                "_HyperSpy": {"_sig_navigator": navigator},
                "stem_dask": dict(self.metadata),
                **microscope,
            },
            "attributes": {"_lazy": True, "ragged": False},
            "package_info": {"package": "hyperspy", "package_version": "2.5.0"},
            **nothing,
            "original_metadata": dict(self.original_metadata),
        }
        file_writer(self.path, signal, show_progressbar=False)


def compress_chunk(part: NDArray, chunk: Sequence[int]) -> bytes:
    """One HDF5 chunk: padded to its full extent, bytes shuffled, deflated; as HDF5's own filters would.

    Examples
    --------
    >>> zlib.decompress(compress_chunk(np.array([[1, 258]], "<u2"), (1, 2)))
    b'\\x01\\x02\\x00\\x01'
    """
    if part.shape != tuple(chunk):
        full = np.zeros(tuple(chunk), part.dtype)
        full[tuple(slice(0, n) for n in part.shape)] = part
        part = full
    part = np.ascontiguousarray(part)
    shuffled = part.view(np.uint8).reshape(-1, part.dtype.itemsize).T
    return zlib.compress(np.ascontiguousarray(shuffled).data, GZIP_LEVEL)


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
