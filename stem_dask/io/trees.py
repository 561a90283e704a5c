"""Files that hold several arrays by name: HDF5 and HyperSpy, zarr stores, dictionaries of tensors.

Each function lists the arrays as keyword arguments of `stem_dask.io.candidate.Candidate`.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.errors import SourceError
from stem_dask.io import ours
from stem_dask.io.sources import FlatFile, Hdf5Dataset, ZarrArray
from stem_dask.model import Axis

#: groups deeper than this are not searched: link loops end here
_MAX_DEPTH = 12


def axis_from(name: Any, size: int, attrs: dict[str, Any]) -> Axis:
    """An axis from attributes that may be missing, zero or odd: then it is in pixels."""

    def number(key: str, default: float) -> float:
        try:
            value = float(attrs.get(key, default))
        except (TypeError, ValueError):
            return default
        return value if math.isfinite(value) else default

    scale = number("scale", 1.0)
    units = attrs.get("units", "")
    units = units.decode("utf-8", "replace") if isinstance(units, bytes) else str(units)
    if in_brackets := re.findall(r"\[(.+?)\]", units):  # as NCEM writes them: [n_m], [n_m^-1]
        units = " ".join(in_brackets).replace("_", "")
    known = scale != 0 and units not in ("", "_None_", "None", "<undefined>")
    return Axis(str(name), size, scale or 1.0, number("offset", 0.0), units if known else "")


def axis_along(name: Any, size: int, values: Any, attrs: dict[str, Any]) -> Axis:
    """An axis from the positions of its pixels, or of the first two of them; in pixels when they are not even."""
    if {"scale", "offset"} & set(attrs):
        return axis_from(name, size, attrs)
    if values.ndim != 1 or values.dtype.kind not in "iuf" or values.shape[0] not in (2, size):
        return Axis(str(name), size)
    positions = np.asarray(values[...], np.float64)
    scale = float(positions[-1] - positions[0]) / max(1, len(positions) - 1) if size > 1 else 1.0
    steps = np.diff(positions)
    if not scale or not np.allclose(steps, scale, rtol=1e-3, atol=0):
        return Axis(str(name), size)
    return axis_from(name, size, {**attrs, "scale": scale, "offset": positions[0]})


def list_hdf5(path: str) -> list[dict[str, Any]]:
    """Datasets of an HDF5 file with two or more axes; HyperSpy's and EMD's axes are read where they are."""
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise SourceError(f"{path}: not a readable HDF5 file: {error}") from error
    with file:
        _refuse_velox(path, file)
        experiments = file.get("Experiments")
        if isinstance(experiments, h5py.Group):
            names = [f"Experiments/{name}/data" for name in experiments]
            names = [name for name in names if isinstance(file.get(name), h5py.Dataset)]
        else:
            names = list(_walk(file, "", 0, set()))
        return [_hdf5_dataset(path, file, name) for name in names]


def _refuse_velox(path: str, file: Any) -> None:
    """Velox puts the patterns of a series last of three axes, and no scan beside them."""
    import h5py

    version = file.get("Version")
    if not isinstance(version, h5py.Dataset) or version.size != 1 or version.dtype.kind not in "OS":
        return
    if "Velox" in str(np.asarray(version[...]).reshape(-1)[0]):
        raise SourceError(
            f"{path}: an EMD file of Velox holds images and spectra, no scan of patterns; export the patterns "
            "from the camera's own program"
        )


def _attributes(item: Any) -> dict[str, Any]:
    """Attributes as far as they can be read."""
    found = {}
    for name in item.attrs:
        try:
            found[name] = item.attrs[name]
        except (OSError, TypeError, ValueError):
            found[name] = "not readable"
    return found


def _walk(group: Any, prefix: str, depth: int, seen: set[Any]) -> Iterator[str]:
    """Names of numeric datasets below a group; soft and external links are not followed, loops are cut."""
    import h5py

    if depth > _MAX_DEPTH:
        return
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        item = group[name]
        where = h5py.h5o.get_info(item.id)
        if (where.fileno, where.addr) in seen:
            continue
        seen.add((where.fileno, where.addr))
        if isinstance(item, h5py.Dataset):
            if item.ndim >= 2 and item.dtype.kind in "buifc":
                yield f"{prefix}{name}"
        elif isinstance(item, h5py.Group):
            yield from _walk(item, f"{prefix}{name}/", depth + 1, seen)


def _hdf5_dataset(path: str, file: Any, name: str) -> dict[str, Any]:
    data = file[name]
    parent = data.parent
    axes = []
    for i, size in enumerate(data.shape):
        found = parent.get(f"axis-{i}")
        along = parent.get(f"dim{i if 'dim0' in parent else i + 1}")  # EMD counts from 0, or from 1
        if found is None and isinstance(along, type(data)):
            attrs = dict(along.attrs)
            axes.append(axis_along(attrs.get("name", f"axis{i}"), int(size), along, attrs))
        else:
            attrs = dict(found.attrs) if found is not None else {}
            axes.append(axis_from(attrs.get("name", f"axis{i}"), int(size), attrs))
    shape = tuple(int(n) for n in data.shape)
    chunk_bytes = math.prod(data.chunks or (0,)) * data.dtype.itemsize
    source = Hdf5Dataset(path, name, data.dtype, shape, chunk_bytes)
    title = name.split("/")[1] if name.startswith("Experiments/") else name
    said = {"file": _attributes(file), "group": _attributes(parent), "dataset": _attributes(data)}
    known: dict[str, Any] = {"metadata": {}}
    if name.startswith("Experiments/"):
        known = ours.of_hspy(path, parent)
    if not known.pop("ours", False):
        known["metadata"] |= {where: attributes for where, attributes in said.items() if attributes}
    return {
        "name": title,
        "source": source,
        "axes": tuple(axes),
        "chunks": data.chunks,
        **known,
    }


def list_zarr(path: str) -> list[dict[str, Any]]:
    """Arrays of a zarr store (an array itself, or a group) with three or four axes."""
    import zarr

    try:
        node = zarr.open(path, mode="r")
    except Exception as error:  # zarr raises many kinds for a damaged store
        raise SourceError(f"{path}: not a readable zarr store: {error}") from error
    if isinstance(node, zarr.Array):
        return [_zarr_array(path, "", node, None)]
    found: list[tuple[str, Any]] = [(name, node[name]) for name in sorted(node.array_keys())]
    if not any(array.ndim in (3, 4) for _, array in found):
        for name, group in node.groups():
            found += [(f"{name}/{key}", group[key]) for key in sorted(group.array_keys())]
            for key, deeper in group.groups():
                found += [(f"{name}/{key}/{k}", deeper[k]) for k in sorted(deeper.array_keys())]
    known = ours.of_zarr(path, node)
    least = 2 if known is None else 3  # beside our patterns lie their positions
    return [
        {**_zarr_array(path, name, array, node), **(known or {} if name == "patterns" else {})}
        for name, array in found
        if array.ndim >= least
    ]


def _zarr_array(path: str, name: str, array: Any, root: Any) -> dict[str, Any]:
    named = getattr(array.metadata, "dimension_names", None)
    named = named or array.attrs.get("_ARRAY_DIMENSIONS")  # as xarray names them in format 2
    dims = named if named and len(named) == array.ndim else [None] * array.ndim
    parent = root[str(Path(name).parent)] if root is not None and "/" in name else root
    axes = []
    for i, size in enumerate(array.shape):
        if parent is not None and dims[i] and dims[i] in parent:
            along = parent[dims[i]]
            axes.append(axis_along(dims[i], int(size), along, dict(along.attrs)))
        elif parent is not None and f"axis-{i}" in parent:  # as HyperSpy writes .zspy
            attrs = dict(parent[f"axis-{i}"].attrs)
            axes.append(axis_from(attrs.get("name", f"axis{i}"), int(size), attrs))
        else:
            axes.append(Axis(dims[i] or f"axis{i}", int(size)))
    chunks = getattr(array, "shards", None) or array.chunks
    shape, chunk_bytes = (
        tuple(int(n) for n in array.shape),
        math.prod(chunks) * array.dtype.itemsize,
    )
    source = ZarrArray(path, name, np.dtype(array.dtype), shape, chunk_bytes=int(chunk_bytes))
    return {"name": name or "array", "source": source, "axes": tuple(axes), "chunks": tuple(chunks)}


def list_tensors(path: str) -> list[dict[str, Any]]:
    """Tensors of a ``torch.save`` file, a bare one or a dictionary; only their place in the file is loaded.

    Loading under fake tensors gives every storage's offset, so workers read bytes and never import torch.
    """
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise SourceError(
            f"{path}: reading .pt needs torch: pip install stem_dask[torch]"
        ) from error
    try:
        with FakeTensorMode():
            loaded = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        raise SourceError(
            f"{path}: not a readable PyTorch file of plain tensors: {str(error).splitlines()[0]}; "
            "save it again with torch.save(tensor, path)"
        ) from error
    tensors = {"tensor": loaded} if isinstance(loaded, torch.Tensor) else loaded
    if not isinstance(tensors, dict):
        raise SourceError(
            f"{path}: holds a {type(loaded).__name__}; expected a tensor or a dictionary"
        )
    names = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor) and t.ndim >= 3}
    axes = tensors.get("axes")
    found = [
        _tensor(path, str(name), tensor, axes if isinstance(axes, (list, tuple)) else ())
        for name, tensor in names.items()
    ]
    known = ours.of_tensors(tensors)
    if known is None or "patterns" not in names:
        return found
    return [_our_tensor(path, one, known, tensors) for one in found if one["name"] == "patterns"]


def _our_tensor(
    path: str, patterns: dict[str, Any], known: dict[str, Any], tensors: dict[str, Any]
) -> dict[str, Any]:
    """Patterns of a dictionary of ours with what it says of them: the scan too, when they are a list (N, 1, H, W)."""
    analysis = tensors.get("analysis")
    valid = analysis.get("valid") if isinstance(analysis, dict) else None
    notes: tuple[str, ...] = ()
    if getattr(valid, "untyped_storage", None) is not None:
        notes = ours.lost_note(_tensor(path, "analysis.valid", valid, ())["source"])
    axes = [axis_from(a.get("name"), a["size"], a) for a in tensors["axes"] if _describes_axis(a)]
    shape = patterns["source"].shape
    scan = None
    if len(axes) == 4 and shape[1] == 1 and axes[0].size * axes[1].size == shape[0]:
        scan = (axes[0], axes[1])
    return {**patterns, **known, "notes": notes, "scan": scan}


def _tensor(path: str, name: str, tensor: Any, axes: Any) -> dict[str, Any]:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout.__repr__() != "torch.strided" or not tensor.is_contiguous():
        raise SourceError(f"{path}: {name} is sparse or not contiguous; save tensor.contiguous()")
    try:
        dtype = np.dtype(kind)
    except TypeError as error:
        raise SourceError(
            f"{path}: {name} is {kind}, which numpy lacks; save tensor.float()"
        ) from error
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None:
        raise SourceError(
            f"{path}: saved in the format of torch before 1.6; load it and torch.save it again"
        )
    shape = tuple(int(n) for n in tensor.shape)
    offset = int(start) + int(tensor.storage_offset()) * dtype.itemsize
    need = offset + math.prod(shape) * dtype.itemsize
    if need > Path(path).stat().st_size:
        raise SourceError(f"{path}: {name} needs {need:,} bytes; the file is shorter: it was cut")
    plain = [Axis(f"axis{i}", n) for i, n in enumerate(shape)]
    known = [axis_from(a.get("name"), a["size"], a) for a in axes if _describes_axis(a)]
    if tuple(axis.size for axis in known) == shape:
        plain = known
    elif tuple(axis.size for axis in known[-2:]) == shape[-2:]:  # (N, 1, H, W) of a scan or a list
        plain[-2:] = known[-2:]
    return {"name": name, "source": FlatFile(path, offset, dtype, shape), "axes": tuple(plain)}


def _describes_axis(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("size"), int)
