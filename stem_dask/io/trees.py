"""Files that hold several arrays by name: HDF5 and HyperSpy, zarr stores.

Each function lists the arrays as keyword arguments of `stem_dask.io.candidate.Candidate`.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stem_dask.errors import SourceError
from stem_dask.io import ours
from stem_dask.io.calibrations import of_abtem, with_stated
from stem_dask.io.candidate import MOST_HEADER_BYTES, by, number, text_of
from stem_dask.io.chunks import expect_codecs_of_numcodecs
from stem_dask.io.claims import packed, refuse_outside
from stem_dask.io.containers import ZARR_ROOTS
from stem_dask.io.damage import one_line, told
from stem_dask.io.hdf5_heaps import opened_hdf5
from stem_dask.io.hdf5_links import (
    MAX_DEPTH,
    Outside,
    as_bytes,
    datasets_below,
    escaped,
    fault_of,
    in_other_files,
    part_of,
    unwritten,
)
from stem_dask.io.hdf5_metadata import attributes_of, is_safe
from stem_dask.io.hdf5_scales import first_scale, labels, names_of
from stem_dask.io.objects import at, zarr_store
from stem_dask.io.sources import Hdf5Dataset, Source, Transposed, ZarrArray
from stem_dask.model import Axis
from stem_dask.urls import is_url

#: where HyperSpy puts its signals; below each are groups and arrays of metadata
_SIGNALS = "Experiments/"
_MOST_OTHERS = 6  # things that are no patterns, and are named all the same
#: positions of pixels are read when there are no more than these: their number is only claimed
_MOST_POSITIONS = 1 << 20


def axis_from(name: Any, size: int, attrs: dict[str, Any]) -> Axis:
    """An axis from attributes that may be missing, zero or odd: then it is in pixels."""
    scale, units = number(attrs.get("scale")), text_of(attrs.get("units", ""))
    if not scale:
        return Axis(text_of(name), size)
    if in_brackets := re.findall(r"\[(.+?)\]", units):  # as NCEM writes them: [n_m], [n_m^-1]
        units = " ".join(in_brackets).replace("_", "")
    known = units not in ("", "_None_", "None", "<undefined>")
    offset = number(attrs.get("offset")) or 0.0
    return Axis(text_of(name), size, scale, offset, units if known else "")


def _detector_last(axes: list[dict[str, Any]]) -> bool | None:
    """Whether the detector comes last, as `Candidate.swapped` has it, by HyperSpy's attributes of four axes; or None."""
    flags = [bool(attrs.get("navigate")) for attrs in axes]
    if flags not in ([True, True, False, False], [False, False, True, True]):
        return None
    return flags[0]


def _spectra(axes: list[dict[str, Any]]) -> str:
    """A hint where HyperSpy's attributes make a map of spectra of three axes."""
    if [attrs.get("navigate") for attrs in axes] != [True, True, False]:
        return ""
    return (
        "HyperSpy calls 2 of the 3 axes navigation, as of a map of spectra, which are no patterns"
    )


def _odd_flags(axes: list[dict[str, Any]]) -> tuple[str, ...]:
    """A note where HyperSpy's attributes make other signals of four axes than patterns."""
    n = sum(bool(attrs.get("navigate")) for attrs in axes)
    if len(axes) != 4 or n not in (1, 3):
        return ()
    return (
        f"HyperSpy calls {n} of the 4 axes navigation; they are taken as scan_y, scan_x, ky, kx",
    )


def axis_along(name: Any, size: int, values: Any, attrs: dict[str, Any]) -> Axis:
    """An axis from the positions of its pixels, or of the first two of them; in pixels when they are not even."""
    if {"scale", "offset"} & set(attrs):
        return axis_from(name, size, attrs)
    if values.ndim != 1 or values.dtype.kind not in "iuf" or values.shape[0] not in (2, size):
        return Axis(str(name), size)
    if values.shape[0] > _MOST_POSITIONS:
        return Axis(str(name), size)
    positions = np.asarray(values[...], np.float64)
    scale = float(positions[-1] - positions[0]) / max(1, len(positions) - 1) if size > 1 else 1.0
    steps = np.diff(positions)
    if not scale or not np.allclose(steps, scale, rtol=1e-3, atol=0):
        return Axis(str(name), size)
    return axis_from(name, size, {**attrs, "scale": scale, "offset": positions[0]})


def list_hdf5(path: str) -> list[dict[str, Any]]:
    """Datasets of an HDF5 file with two or more axes; HyperSpy's and EMD's axes are read where they are."""
    unlocked: list[str] = []
    with opened_hdf5(path, unlocked) as file:
        found = _listed(path, file)
    return [{**one, "notes": (*one.get("notes", ()), *unlocked)} for one in found]


def _listed(path: str, file: Any) -> list[dict[str, Any]]:
    """The same of a file that is open."""
    import h5py

    _refuse_velox(path, file)
    experiments = file.get("Experiments")
    if isinstance(experiments, h5py.Group):
        names = [f"Experiments/{escaped(name)}/data" for name in experiments]
        signals = [(name, file.get(as_bytes(name))) for name in names]
        return [
            _hdf5_dataset(path, file, name, data)
            for name, data in signals
            if isinstance(data, h5py.Dataset)
        ]
    others: list[str] = []
    links: list[Outside] = []
    if not ours.is_h5(file):
        listed = datasets_below(file, others, links)
        found = [_hdf5_dataset(path, file, name, data) for name, data in listed]
        found = with_stated(path, file, found)
    else:
        found = [_hdf5_dataset(path, file, "patterns", file["patterns"])]
    without = not any(len(one["source"].shape) > 2 for one in found)
    if without and (others or links):
        has = "; the file has " + "; ".join(others[:_MOST_OTHERS]) if others else ""
        what = (
            in_other_files(path, links)
            if links
            else "no 4D array of numbers and no stack of patterns"
        )
        raise SourceError(f"{path}: {what}{has}")
    return found


def _refuse_velox(path: str, file: Any) -> None:
    """Velox puts the patterns of a series last of three axes, and no scan beside them."""
    import h5py

    version = file.get("Version")
    if not isinstance(version, h5py.Dataset) or version.size != 1 or version.dtype.kind not in "OS":
        return
    if version.dtype.itemsize > MOST_HEADER_BYTES or not is_safe(version.dtype):
        return
    if "Velox" in str(np.asarray(version[...]).reshape(-1)[0]):
        raise SourceError(
            f"{path}: an EMD file of Velox holds images and spectra, no scan of patterns; export the patterns "
            "from the camera's own program"
        )


def _scale_of(data: Any, i: int) -> tuple[str, Any] | None:
    """Name and positions of an axis by its first dimension scale; netCDF names the scale alone."""
    scale = first_scale(data, i)
    if scale is None:
        return None
    label = labels(data)[i] or text_of(scale.name or "").rpartition("/")[2]
    return (label, scale) if label else None


def _title(name: str) -> str:
    return name.split("/")[1] if name.startswith("Experiments/") else name


def _reversed(attrs: dict[str, Any], shape: tuple[int, ...]) -> tuple[str, ...]:
    """A note on MATLAB's order of axes, which is that of the file turned round."""
    if "MATLAB_class" not in attrs:
        return ()
    return (f"MATLAB stores axes in reverse: there it is {by(shape[::-1])}",)


def _hdf5_dataset(path: str, file: Any, name: str, data: Any) -> dict[str, Any]:
    if data.ndim < 3:  # listed, never taken; a file may have one for each pattern
        shape = tuple(int(n) for n in data.shape)
        plain = tuple(Axis(f"axis{i}", n) for i, n in enumerate(shape))
        return {
            "name": _title(name),
            "source": Hdf5Dataset(path, name, data.dtype, shape),
            "axes": plain,
            "fault": fault_of(path, name, data),
        }
    parent = data.parent
    said = {
        "file": attributes_of(file),
        "group": attributes_of(parent),
        "dataset": attributes_of(data),
    }
    axes, told_axes = [], []
    names = names_of(data, said["dataset"], said["group"])
    for i, size in enumerate(data.shape):
        found = parent.get(f"axis-{i}")
        along = parent.get(f"dim{i if 'dim0' in parent else i + 1}")  # EMD counts from 0, or from 1
        scale = _scale_of(data, i)
        if found is None and scale is not None:
            axes.append(axis_along(scale[0], int(size), scale[1], attributes_of(scale[1])))
        elif found is None and isinstance(along, type(data)):
            attrs = attributes_of(along)
            axes.append(axis_along(attrs.get("name", f"axis{i}"), int(size), along, attrs))
        else:
            attrs = attributes_of(found) if found is not None else {}
            told_axes.append(attrs)
            axes.append(axis_from(attrs.get("name", names[i] or f"axis{i}"), int(size), attrs))
    shape, chunks = tuple(int(n) for n in data.shape), data.chunks
    chunk_bytes = math.prod(chunks or (0,)) * data.dtype.itemsize
    source: Source = Hdf5Dataset(path, name, data.dtype, shape, chunk_bytes)
    notes = (*_odd_flags(told_axes), *unwritten(data), *_reversed(said["dataset"], shape))
    if name.startswith("signals/") and "emd_group_type" in file["signals"].attrs:
        source, axes = Transposed(source, tuple(range(len(shape)))[::-1]), axes[::-1]
        chunks = chunks and chunks[::-1]
        notes += ("HyperSpy writes the axes of .emd in reverse; they are put in order",)
    fault = fault_of(path, name, data) or packed(path, name, said["dataset"])
    part, doubt = part_of(path, name, said["dataset"]) if len(shape) == 3 else ("", "")
    said = {where: attributes for where, attributes in said.items() if attributes}
    known: dict[str, Any] = {"metadata": said}
    if name.startswith("Experiments/"):
        known = ours.of_hspy(path, parent, said)
    elif ours.is_h5(file):
        known = ours.of_h5(path, file)
    return {
        "name": _title(name),
        "source": source,
        "axes": tuple(axes),
        "chunks": chunks,
        "swapped": _detector_last(told_axes),
        "hint": _spectra(told_axes) or doubt,
        "part": part,
        "fault": fault,
        **known,
        "notes": (*notes, *known.get("notes", ())),
    }


def list_zarr(path: str) -> list[dict[str, Any]]:
    """Arrays of a zarr store with two or more axes: it is an array itself, or a group with patterns or groups of them.

    Raises
    ------
    SourceError
        When an array or a group in it is damaged, or a link leads out of it.
    """
    import zarr

    from stem_dask.io.zarr_guard import refuse_hostile

    expect_codecs_of_numcodecs()
    with told(f"{path}: not a readable zarr store"), _codecs_known(path):
        if not is_url(path) and not any(Path(path, name).exists() for name in ZARR_ROOTS):
            raise SourceError(
                f"{path}: not a readable zarr store: it holds none of {', '.join(ZARR_ROOTS)}; copy it again from where it was written"
            )
        for name in ZARR_ROOTS:
            refuse_outside(path, at(path, name))
        if not is_url(path):
            refuse_hostile(path)
        root = zarr.open(zarr_store(path), mode="r")
        if isinstance(root, zarr.Array):
            return [_zarr_array(path, "", root, None)]
        if is_url(path):
            return _arrays_below(path, root)
        broken: dict[str, Exception] = {}
        found = list(_arrays(path, "", 0, broken))
        known = ours.of_zarr(path, dict(root.attrs), dict(found))
        least = 2 if known is None else 3  # beside our patterns lie their positions
        if Path(path, _SIGNALS).is_dir():
            found = [one for one in _arrays(path, _SIGNALS, 1, broken) if one[0].endswith("/data")]
        elif known is None:
            found = list(_arrays(path, "", MAX_DEPTH, broken))
        if broken and not any(array.ndim == 4 for _, array in found):
            raise next(iter(broken.values()))
        listed = [
            of_abtem(
                root.attrs,
                {**_zarr_array(path, name, array, root), **_told_of(path, name, array, known)},
            )
            for name, array in found
            if array.ndim >= least
        ]
        lost = tuple(
            f"{one_line(name)} cannot be read ({one_line(error)})" for name, error in broken.items()
        )
        return [{**one, "notes": (*one.get("notes", ()), *lost)} for one in listed]


def _arrays_below(path: str, root: Any) -> list[dict[str, Any]]:
    """Of a store whose documents are one (consolidated): each of them would be a request, or more."""
    from zarr import Array

    members = root.members(max_depth=None if root.metadata.consolidated_metadata else 0)
    arrays = {name: array for name, array in members if isinstance(array, Array)}
    known = ours.of_zarr(path, dict(root.attrs), arrays)
    least = 2 if known is None else 3
    first = {name: array for name, array in arrays.items() if "/" not in name}
    chosen = arrays if known is None else first
    return [
        of_abtem(
            root.attrs,
            {**_zarr_array(path, name, array, root), **(known or {} if name == "patterns" else {})},
        )
        for name, array in sorted(chosen.items())
        if array.ndim >= least
    ]


@contextlib.contextmanager
def _codecs_known(path: str) -> Iterator[None]:
    """A codec that is not installed is no damage."""
    try:
        yield
    except (KeyError, ValueError) as error:
        if not re.search("unknown codec|codec not available", str(error), re.IGNORECASE):
            raise
        raise SourceError(
            f"{path}: chunks are coded in a way that is not known here ({one_line(error)}); save it again with blosc, "
            "zstd or gzip where it can be read"
        ) from error


def _told_of(path: str, name: str, array: Any, ours_say: dict[str, Any] | None) -> dict[str, Any]:
    """What is said of an array elsewhere in the store: in our own, and in the signals of HyperSpy."""
    if name.startswith("Experiments/") and name.endswith("/data"):
        return ours.of_zspy(path, name.removesuffix("/data"), array)
    return ours_say or {} if name == "patterns" else {}


def _arrays(
    path: str, prefix: str, depth: int, broken: dict[str, Exception]
) -> Iterator[tuple[str, Any]]:
    """Name and array of every member, one after another; what cannot be opened is put into ``broken``."""
    import zarr

    from stem_dask.io.zarr_guard import HostileStoreError

    for folder in sorted(Path(path, prefix).iterdir()):
        roots = [root for name in ZARR_ROOTS if (root := folder / name).is_file()]
        for root in roots:
            refuse_outside(path, root)
        if not roots:
            continue
        name = f"{prefix}{folder.name}"
        try:
            node = None if _is_group(roots) else zarr.open(zarr_store(path), path=name, mode="r")
        except HostileStoreError:
            raise
        except Exception as error:  # each part of zarr has its own
            broken[name] = error
            continue
        if isinstance(node, zarr.Array):
            yield name, node
        elif depth:
            yield from _arrays(path, f"{name}/", depth - 1, broken)


def _is_group(roots: list[Path]) -> bool:
    """By the name alone, in format 2; opening takes some ms."""
    return [root.name for root in roots] == [".zgroup"]


def _zarr_array(path: str, name: str, array: Any, root: Any) -> dict[str, Any]:
    named = getattr(array.metadata, "dimension_names", None)
    named = named or array.attrs.get("_ARRAY_DIMENSIONS")  # as xarray names them in format 2
    dims: list[str | None] = [None] * array.ndim
    if isinstance(named, (list, tuple)) and len(named) == array.ndim:
        dims = [name if isinstance(name, str) else None for name in named]
    parent = root[str(Path(name).parent)] if root is not None and "/" in name else root
    axes, told_axes = [], []
    for i, size in enumerate(array.shape):
        if parent is not None and dims[i] and dims[i] in parent:
            along = parent[dims[i]]
            axes.append(axis_along(dims[i], int(size), along, dict(along.attrs)))
        elif parent is not None and f"axis-{i}" in parent:  # as HyperSpy writes .zspy
            attrs = dict(parent[f"axis-{i}"].attrs)
            told_axes.append(attrs)
            axes.append(axis_from(attrs.get("name", f"axis{i}"), int(size), attrs))
        else:
            axes.append(Axis(dims[i] or f"axis{i}", int(size)))
    chunks = getattr(array, "shards", None) or array.chunks
    if 0 in chunks and 0 not in array.shape:
        raise SourceError(
            f"{path}: {name or 'the array'} states chunks of {by(chunks)}; its metadata are damaged"
        )
    shape = tuple(int(n) for n in array.shape)
    chunk_bytes = int(math.prod(chunks) * array.dtype.itemsize)
    source = ZarrArray(path, name, np.dtype(array.dtype), shape, chunk_bytes=chunk_bytes)
    return {
        "name": name or "array",
        "source": source,
        "axes": tuple(axes),
        "chunks": tuple(chunks),
        "swapped": _detector_last(told_axes),
        "hint": _spectra(told_axes),
        "fault": packed(path, name or "the array", array.attrs),
        "notes": _odd_flags(told_axes),
    }
