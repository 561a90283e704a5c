"""Open a 4D-STEM file: find the patterns, their axes and their place; nothing of the data is read.

`find` looks at headers only and needs neither dask nor numba, so that a bad file is refused before a cluster exists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stem_dask.errors import SourceError
from stem_dask.io.sources import FlatFile, ScanOfList, Source, Transposed, identity, select
from stem_dask.model import DETECTOR_DIMS, LIST_DIMS, SCAN_DIMS, Axis, SourceInfo

ScanOrder = Literal["auto", "scan_first", "detector_first"]


@dataclass(frozen=True)
class Candidate:
    """A 3D or 4D array found in a file; ``name`` is what selects it as ``input.dataset``."""

    name: str
    source: Source
    axes: tuple[Axis, ...]
    chunks: tuple[int, ...] | None = None
    swapped: bool | None = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class Found:
    """The patterns of a file, and what was found out about them."""

    source: Source
    info: SourceInfo
    identity: tuple[str, int, int]


def find(
    path: str | Path,
    *,
    dataset: str | int | None = None,
    scan_shape: Sequence[int] | None = None,
    scan_order: ScanOrder = "auto",
    scan_roi: Sequence[int] | None = None,
    scan_step: int = 1,
) -> Found:
    """Look into a file and settle where the patterns are and how they lie.

    Parameters
    ----------
    path : .dm3, .dm4, .hspy, .hdf5, .h5, .zarr, .zspy, .npy or .pt
    dataset : name or number of the array, when the file holds several
    scan_shape : (scan_y, scan_x), for a stack of patterns
    scan_order : which axes are the scan: ``scan_first``, ``detector_first``, or ``auto`` (as the file says)
    scan_roi : [y0, y1, x0, x1] of the scan, end exclusive
    scan_step : take every n-th position of it

    Raises
    ------
    SourceError
        When the file is missing, damaged, of an unknown kind, or does not hold patterns.
    """
    name = str(path)
    kind, list_candidates = _reader(name)
    candidates = list_candidates(name)
    chosen, notes = _choose(name, candidates, dataset)
    if chosen.source.dtype.kind not in "buif" or chosen.source.dtype.itemsize > 8:
        raise SourceError(
            f"{name}: {chosen.name} is of type {chosen.source.dtype}; patterns are bool, integer or real numbers. "
            "Save the intensity (for example the squared modulus) and open that"
        )
    if 0 in chosen.source.shape:
        raise SourceError(
            f"{name}: {chosen.name} has shape {_by(chosen.source.shape)}: it holds nothing"
        )
    source, axes, order_note = _arrange(name, chosen, scan_shape, scan_order)
    notes += order_note
    chunks = chosen.chunks if source is chosen.source else None
    picked = select(source, scan_roi, scan_step)
    if picked is not source:
        y0, _, x0, _ = scan_roi if scan_roi is not None else (0, 0, 0, 0)
        starts = (y0, x0)
        axes = (
            *(axes[i].part(starts[i], picked.shape[i], scan_step) for i in range(2)),
            *axes[2:],
        )
        chunks = None
    info = SourceInfo(
        path=name,
        kind=kind,
        axes=axes,
        dtype=str(picked.dtype),
        stored_shape=chosen.source.shape,
        chunks=chunks,
        notes=tuple(notes),
        metadata=chosen.metadata or {},
    )
    return Found(picked, info, identity(name))


def _reader(name: str) -> tuple[str, Callable[[str], list[Candidate]]]:
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise SourceError(
            f"{name}: files ending in {suffix or 'nothing'} are not known; "
            f"known are {', '.join(sorted(READERS))}"
        )
    if not path.exists():
        raise SourceError(
            f"{name}: there is no such file; check input.path (relative to {Path.cwd()})"
        )
    kind, reader, is_folder = READERS[suffix]
    if path.is_dir() != is_folder:
        expected = "a folder" if is_folder else "a file"
        raise SourceError(
            f"{name}: {kind} is {expected}, this is {'a file' if is_folder else 'a folder'}"
        )
    if not is_folder and path.stat().st_size == 0:
        raise SourceError(f"{name}: the file is empty (0 bytes)")
    return kind, reader


def _choose(
    name: str, candidates: list[Candidate], dataset: str | int | None
) -> tuple[Candidate, list[str]]:
    listing = "; ".join(f"{c.name}: {_by(c.source.shape)} {c.source.dtype}" for c in candidates)
    if not candidates:
        raise SourceError(f"{name}: the file holds no array of numbers")
    if dataset is not None:
        for number, candidate in enumerate(candidates):
            if dataset in (candidate.name, number):
                return candidate, []
        raise SourceError(f"{name}: there is no dataset {dataset!r}; the file holds {listing}")
    for n_axes in (4, 3):
        fitting = [c for c in candidates if len(c.source.shape) == n_axes]
        if len(fitting) > 1:
            raise SourceError(
                f"{name}: the file holds {len(fitting)} arrays of {n_axes} axes; choose one with input.dataset: "
                + "; ".join(f"{c.name}: {_by(c.source.shape)}" for c in fitting)
            )
        if fitting:
            others = len(candidates) - 1
            notes = (
                [f"took {fitting[0].name} ({_by(fitting[0].source.shape)}) of: {listing}"]
                if others
                else []
            )
            return fitting[0], notes
    raise SourceError(
        f"{name}: no 4D array (scan_y, scan_x, ky, kx) and no stack of patterns; the file holds {listing}"
    )


def _arrange(
    name: str, chosen: Candidate, scan_shape: Sequence[int] | None, scan_order: str
) -> tuple[Source, tuple[Axis, ...], list[str]]:
    """Bring the axes into the order (scan_y, scan_x, ky, kx), or (pattern, ky, kx)."""
    source, axes = chosen.source, chosen.axes
    if (
        isinstance(source, FlatFile)
        and len(source.shape) == 4
        and source.shape[1] == 1
        and axes[1].name != SCAN_DIMS[1]
        and _kind(name) == ".pt"
    ):
        # (N, 1, H, W): a list of patterns with one channel, as the tensor scripts write it
        source = replace(source, shape=(source.shape[0], *source.shape[2:]))
        axes = (axes[0], *axes[2:])
    if len(source.shape) == 3:
        if scan_shape is None:
            if _kind(name) in (".pt", ".npy", ".zarr"):
                return source, _named(axes, (*LIST_DIMS, *DETECTOR_DIMS)), ["a list of patterns"]
            raise SourceError(
                f"{name}: {chosen.name} is a stack of {source.shape[0]:,} patterns of {_by(source.shape[1:])} pixels; "
                "give its scan as input.scan_shape: [scan_y, scan_x]"
            )
        n_y, n_x = scan_shape
        if n_y < 1 or n_x < 1:
            raise SourceError(f"{name}: scan_shape is {n_y} x {n_x}; both sizes must be 1 or more")
        if n_y * n_x != source.shape[0]:
            raise SourceError(
                f"{name}: {source.shape[0]:,} patterns; scan_shape {n_y} x {n_x} needs {n_y * n_x:,}"
                + _fitting(source.shape[0], n_x)
            )
        scan = (Axis("scan_y", n_y), Axis("scan_x", n_x))
        return ScanOfList(source, (n_y, n_x)), (*scan, *_named(axes[1:], DETECTOR_DIMS)), []
    if len(source.shape) != 4:
        raise SourceError(
            f"{name}: {chosen.name} has {len(source.shape)} axes; expected 4 or a stack of patterns"
        )
    if scan_shape is not None and tuple(scan_shape) != source.shape[:2]:
        raise SourceError(
            f"{name}: input.scan_shape is {_by(scan_shape)}, but the data are a scan of {_by(source.shape[:2])}; "
            "leave scan_shape out"
        )
    names = (*SCAN_DIMS, *DETECTOR_DIMS)
    if _detector_first(name, chosen, scan_order):
        note = ["the detector's axes come first in the file; reading takes longer"]
        return Transposed(source, (2, 3, 0, 1)), _named((*axes[2:], *axes[:2]), names), note
    return source, _named(axes, names), []


def _detector_first(name: str, chosen: Candidate, scan_order: str) -> bool:
    """By the user's word, else by the file's tag, else by the units of the axes, else refuse (DM files only)."""
    if scan_order != "auto":
        return scan_order == "detector_first"
    if _kind(name) not in (".dm3", ".dm4"):
        return False
    if chosen.swapped is not None:
        return not chosen.swapped
    reciprocal = [_is_reciprocal(axis.units) for axis in chosen.axes]
    if reciprocal[:2] == [False, False] and reciprocal[2:] == [True, True]:
        return False
    if reciprocal[:2] == [True, True] and reciprocal[2:] == [False, False]:
        return True
    units = ", ".join(axis.units or "none" for axis in chosen.axes)
    raise SourceError(
        f"{name}: cannot tell scan from detector: no Data Order Swapped tag, and the units are ({units}); "
        f"the axes are {_by(chosen.source.shape)}: set input.scan_order to scan_first or detector_first"
    )


def _is_reciprocal(units: str) -> bool | None:
    """Whether a unit is one of diffraction space; None when it does not tell."""
    plain = units.replace(" ", "").lower()
    if plain.startswith("1/") or plain.endswith("^-1") or plain in ("mrad", "rad"):
        return True
    return False if plain in ("nm", "um", "µm", "å", "a", "pm", "mm", "m") else None


def _kind(name: str) -> str:
    return Path(name).suffix.lower()


def _named(axes: Sequence[Axis], names: Sequence[str]) -> tuple[Axis, ...]:
    return tuple(replace(axis, name=name) for axis, name in zip(axes, names, strict=True))


def _by(shape: Sequence[int]) -> str:
    return " x ".join(f"{n:,}" for n in shape)


def _fitting(n: int, width: int) -> str:
    return f"; {n // width} x {width} would fit" if n % width == 0 else ""


def _plain_axes(shape: Sequence[int]) -> tuple[Axis, ...]:
    return tuple(Axis(f"axis{i}", int(n)) for i, n in enumerate(shape))


def _dm(name: str) -> list[Candidate]:
    from stem_dask.io.dm import list_images

    return [
        Candidate(
            f"image {image.index}" + (f" ({image.name})" if image.name else ""),
            FlatFile(name, image.offset, image.dtype, image.shape),
            image.axes,
            swapped=image.swapped,
            metadata=image.tags,
        )
        for image in list_images(name)
    ]


def _npy(name: str) -> list[Candidate]:
    try:
        with open(name, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(file)
            offset = file.tell()
    except (ValueError, OSError) as error:
        raise SourceError(f"{name}: not a readable .npy file: {error}") from error
    if dtype.hasobject:
        raise SourceError(
            f"{name}: holds Python objects, which are never unpickled; save plain numbers"
        )
    n_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    size = Path(name).stat().st_size
    if offset + n_bytes > size:
        raise SourceError(
            f"{name}: the header says {_by(shape)} {dtype}, {n_bytes:,} bytes, but {size - offset:,} follow; "
            "the file was cut"
        )
    source: Source = FlatFile(name, offset, dtype, shape[::-1] if fortran else shape)
    if fortran:
        source = Transposed(source, tuple(range(len(shape)))[::-1])
    return [Candidate("array", source, _plain_axes(shape))]


def _hdf5(name: str) -> list[Candidate]:
    from stem_dask.io.trees import list_hdf5

    return [Candidate(**found) for found in list_hdf5(name)]


def _zarr(name: str) -> list[Candidate]:
    from stem_dask.io.trees import list_zarr

    return [Candidate(**found) for found in list_zarr(name)]


def _pt(name: str) -> list[Candidate]:
    from stem_dask.io.trees import list_tensors

    return [Candidate(**found) for found in list_tensors(name)]


#: suffix -> (what it is, lists what is in it, whether it is a folder)
READERS: dict[str, tuple[str, Callable[[str], list[Candidate]], bool]] = {
    ".dm3": ("a Gatan file", _dm, False),
    ".dm4": ("a Gatan file", _dm, False),
    ".hspy": ("a HyperSpy file", _hdf5, False),
    ".hdf5": ("an HDF5 file", _hdf5, False),
    ".h5": ("an HDF5 file", _hdf5, False),
    ".zarr": ("a zarr store", _zarr, True),
    ".zspy": ("a HyperSpy zarr store", _zarr, True),
    ".npy": ("a numpy file", _npy, False),
    ".pt": ("a PyTorch file", _pt, False),
}
