"""The table of input formats, and how a file is recognized.

The file extension selects the reader. A file whose first bytes contradict its extension is refused, with the name that
it should have.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers import own
from stem_dask.readers.blo import list_blo
from stem_dask.readers.containers import in_folder, in_zip
from stem_dask.readers.dm import list_dm
from stem_dask.readers.empad import list_empad, xml_of_raw
from stem_dask.readers.flat import FlatFile
from stem_dask.readers.mib import list_mib
from stem_dask.readers.mrc import list_mrc
from stem_dask.readers.raw import RawLayout, list_raw
from stem_dask.readers.source import Candidate, Source, bytes_behind
from stem_dask.readers.tiff import list_tiff
from stem_dask.readers.tvips import list_tvips
from stem_dask.readers.views import View
from stem_dask.storage.errors import COPY, one_line, translate
from stem_dask.storage.location import at, check_path, is_url, opened_file


def open_file(name: str, layout: RawLayout) -> tuple[str, list[Candidate]]:
    """The kind of a file, and the arrays in it.

    Raises
    ------
    SourceError
        When the file is missing, empty, damaged, of an unknown kind, not what its name says, or the system refuses it.
    """
    try:
        return _opened(name, layout)
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{name}: cannot be read ({one_line(error.strerror or error)}); check its permissions and its disk"
        ) from error


def _opened(name: str, layout: RawLayout) -> tuple[str, list[Candidate]]:
    check_path("the input", name)
    suffix = Path(name).suffix.lower()
    _check_name(name, suffix)
    kind, reader, _ = READERS[suffix]
    if suffix == ".raw":
        xml = None if layout.given or is_url(name) else xml_of_raw(name)
        return (READERS[".xml"].kind, list_empad(xml)) if xml else (kind, list_raw(name, layout))
    if layout.given:
        raise SourceError(
            f"{name}: input.shape, input.dtype, input.offset, input.frame_header and input.frame_footer are for .raw files; "
            f"{kind} says its own: leave them out"
        )
    return kind, reader(name)


def _check_name(name: str, suffix: str) -> None:
    if is_url(name):
        _check_url(name, suffix)
        return
    path = Path(name)
    if suffix in _NEIGHBOURS:
        raise SourceError(f"{name}: {_NEIGHBOURS[suffix]}")
    if not path.exists():
        unknown = "" if suffix in ("", *READERS) else f"; {_not_known(suffix)}"
        raise SourceError(
            f"{name}: there is no such file; check input.path (relative to {Path.cwd()}){unknown}"
        )
    is_folder = suffix in READERS and READERS[suffix].is_folder
    if path.is_dir():
        if not is_folder:
            raise SourceError(f"{name}: {in_folder(path, READERS)}")
        return
    if path.stat().st_size == 0:
        raise SourceError(f"{name}: the file is empty (0 bytes)")
    _check_content(name, suffix)
    if is_folder:
        raise SourceError(f"{name}: {READERS[suffix].kind} is a folder, this is a file")


def _extension(suffix: str) -> str:
    return f"the file extension {suffix} is not known" if suffix else "a file without extension"


def _not_known(suffix: str) -> str:
    return f"{_extension(suffix)}; known are {', '.join(sorted(READERS))}"


def _check_content(name: str, suffix: str) -> None:
    with opened_file(name) as file:
        start = file.read(64).lstrip().lower()
    for words, what in _IN_PLACE:
        if start.startswith(words):
            raise SourceError(f"{name}: {what}")
    content = None if suffix == ".raw" else recognise(name)  # a .raw may begin with any bytes
    if content is not None and content[1] == (".pt",) and not is_url(name):
        what, way = in_zip(name) or ("a zip archive", COPY)
        if what and (suffix != ".pt" or way != COPY):  # the reader of .pt reports a damaged one
            raise SourceError(f"{name}: {what}; {way}")
    if suffix not in READERS:
        if content is None:
            raise SourceError(f"{name}: {_not_known(suffix)}")
        rename = f"rename it to {Path(name).stem}{content[1][0]}"
        raise SourceError(
            f"{name}: {_extension(suffix)}; by its content it is {content[0]}: {rename}"
        )
    if content is not None and suffix not in content[1]:
        raise SourceError(
            f"{name}: the name ends in {suffix}, but by its content it is {content[0]}; "
            f"rename it to {Path(name).stem}{content[1][0]}"
        )


def _check_url(name: str, suffix: str) -> None:
    if suffix not in (".zarr", *BY_RANGES):
        raise SourceError(
            f"{name}: from an object store only .zarr, {', '.join(BY_RANGES)} are read; copy the file here first, for example "
            "with aws s3 cp, and convert it into the store: stem-dask convert --input FILE --output s3://BUCKET/NAME.zarr"
        )
    is_folder, place = READERS[suffix].is_folder, at(name)
    if not (place.is_dir() if is_folder else place.is_file()):
        raise SourceError(
            f"{name}: there is nothing of this name in the object store; check input.path and AWS_ENDPOINT_URL"
        )
    if not is_folder:
        _check_content(name, suffix)


#: formats that are read from an object store by ranges of bytes: each pattern is contiguous
BY_RANGES = (".dm3", ".dm4", ".npy", ".raw", ".mib", ".blo", ".mrc")

#: files that belong to data, or have to be unpacked first
_NEIGHBOURS = {
    ".hdr": "the settings of a Merlin file; open the .mib of the same name",
    ".nhdf": "an export of Nion Swift, which is an HDF5 file; rename a copy to end in .h5 and open that",
    ".ndata1": "an export of Nion Swift, which is a zip archive; unpack it (python -m zipfile -e FILE FOLDER) and open "
    "data.npy in it; its calibration is in metadata.json: give it as input.calibration and input.beam_energy_kv",
    ".gz": "a compressed file is not read; unpack it (gunzip -k) and open what was in it",
}

#: how small texts begin that were downloaded in place of the file
_IN_PLACE = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; get it with: git lfs pull"),
    (b"/annex/objects/", "a pointer of git-annex, not the file itself; get it with: git annex get"),
    (b"<!doctype html", "a web page, not the file, as a download without its login gives; download it again"),
    (b"matlab 5.0 mat-file", "a MATLAB file of the format before 7.3 is not read; in MATLAB, save(name, '-v7.3'), then rename it to .h5"),
    (b"<html", "a web page, not the file, as a download without its login gives; download it again"),
)  # fmt: skip

#: (byte, what stands there, what the file is, endings such files have; the first is proposed)
_MAGIC: tuple[tuple[int, bytes, str, tuple[str, ...]], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", (".h5", ".hdf5", ".hspy", ".emd", ".app5", ".nxs")),
    (0, b"MATLAB 7.3 MAT-file", "an HDF5 file of MATLAB 7.3", (".h5", ".hdf5")),
    (0, b"\x00\x00\x00\x03", "a Gatan DM3 file", (".dm3", ".dm4")),
    (0, b"\x00\x00\x00\x04", "a Gatan DM4 file", (".dm4", ".dm3")),
    (0, b"\x93NUMPY", "a numpy file", (".npy",)),
    (0, b"PK\x03\x04", "a PyTorch file", (".pt",)),
    (0, b"IMGBLO\x02\x01", "a NanoMEGAS block file", (".blo",)),
    (0, b"MQ1,", "a Merlin file", (".mib",)),
    (0, b"II*\x00", "a TIFF file", (".tif", ".tiff")),
    (0, b"MM\x00*", "a TIFF file", (".tif", ".tiff")),
    (0, b"II+\x00", "a TIFF file", (".tif", ".tiff")),
    (0, b"MM\x00+", "a TIFF file", (".tif", ".tiff")),
    (0, b"<?xml", "an XML file", (".xml",)),
    (52, b"TVIPS", "a TVIPS file", (".tvips",)),
    (208, b"MAP ", "an MRC file", (".mrc",)),
)


def recognise(path: str) -> tuple[str, tuple[str, ...]] | None:
    """The kind of a file by its first bytes, and its usual suffixes; None when they are not known.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     np.save(file, np.zeros(3)); file.flush()
    ...     recognise(file.name)
    ('a numpy file', ('.npy',))
    """
    with opened_file(path) as file:
        start = file.read(256)
    for place, magic, kind, suffixes in _MAGIC:
        if start[place : place + len(magic)] != magic:
            continue
        if "Gatan" in kind:  # few bytes, so the byte order, 0 or 1, is asked too
            order = 8 if magic[-1] == 3 else 12
            if start[order : order + 4] not in (b"\0\0\0\0", b"\0\0\0\1"):
                continue
        return kind, suffixes
    return None


def _plain_axes(shape: tuple[int, ...]) -> tuple[Axis, ...]:
    return tuple(Axis(f"axis{i}", int(n)) for i, n in enumerate(shape))


def _npy(name: str) -> list[Candidate]:
    with translate(SourceError, name, "not a readable .npy file"), opened_file(name) as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Python 2 wrote 6L for 6, which is understood
            shape, fortran, dtype = read(file)
        offset = file.tell()
    if dtype.hasobject:
        raise SourceError(
            f"{name}: holds Python objects, which are never unpickled; save plain numbers"
        )
    if min(shape, default=0) < 0:
        raise SourceError(f"{name}: the header says the shape {shape}; the file is damaged")
    n_bytes = math.prod(shape) * dtype.itemsize
    size = at(name).stat().st_size
    if offset + n_bytes > size:
        raise SourceError(
            f"{name}: the header says {by(shape)} {dtype}, {n_bytes:,} bytes, but {size - offset:,} follow; "
            "the file was cut"
        )
    stored = FlatFile(name, offset, dtype, shape[::-1] if fortran else shape)
    source = View.of(stored).transpose(range(len(shape))[::-1]) if fortran else stored
    notes = _behind_npy(name, offset, stored)
    about = own.of_results(name, source.shape)
    return [Candidate("array", source, _plain_axes(shape), notes=notes, about=about)]


def _behind_npy(name: str, offset: int, stored: Source) -> tuple[str, ...]:
    """A note on bytes after the array; another array is fine, `numpy.save` appends to an open file."""
    end = offset + math.prod(stored.shape) * stored.dtype.itemsize
    rest = at(name).stat().st_size - end
    if rest >= 6:
        with opened_file(name) as file:
            file.seek(end)
            if file.read(6) == b"\x93NUMPY":
                return (f"{rest:,} bytes after the array, another one, are not read",)
    remedy = "if they are right, save it again: numpy.save(path, numpy.load(path))"
    return bytes_behind(name, "array", stored.shape, stored.dtype, rest, remedy, offset)


def _hdf5(name: str) -> list[Candidate]:
    from stem_dask.readers.hdf5 import list_hdf5

    return [Candidate(**found) for found in list_hdf5(name)]


def _zarr(name: str) -> list[Candidate]:
    from stem_dask.readers.zarr import list_zarr

    return [Candidate(**found) for found in list_zarr(name)]


def _app5(name: str) -> list[Candidate]:
    from stem_dask.readers.topspin import list_app5

    return list_app5(name)


def _pt(name: str) -> list[Candidate]:
    from stem_dask.readers.torch import list_tensors

    return list_tensors(name)


class Reader(NamedTuple):
    """What a file is, what lists the arrays in it, and whether it is a folder."""

    kind: str
    candidates: Callable[[str], list[Candidate]]
    is_folder: bool = False


#: by suffix; a format is added here, and its first bytes in `_MAGIC`
READERS = {
    ".dm3": Reader("a Gatan file", list_dm),
    ".dm4": Reader("a Gatan file", list_dm),
    ".hspy": Reader("a HyperSpy file", _hdf5),
    ".hdf5": Reader("an HDF5 file", _hdf5),
    ".h5": Reader("an HDF5 file", _hdf5),
    ".zarr": Reader("a zarr store", _zarr, is_folder=True),
    ".zspy": Reader("a HyperSpy zarr store", _zarr, is_folder=True),
    ".npy": Reader("a numpy file", _npy),
    ".pt": Reader("a PyTorch file", _pt),
    ".mib": Reader("a Merlin file", list_mib),
    ".blo": Reader("a NanoMEGAS block file", list_blo),
    ".mrc": Reader("an MRC file", list_mrc),
    ".xml": Reader("an EMPAD's file", list_empad),
    ".tvips": Reader("a TVIPS file", list_tvips),
    ".app5": Reader("a Topspin file", _app5),
    ".tif": Reader("a TIFF file", list_tiff),
    ".tiff": Reader("a TIFF file", list_tiff),
    ".emd": Reader("an EMD file", _hdf5),
    ".nxs": Reader("a NeXus file", _hdf5),
    ".raw": Reader("a file of plain numbers", lambda name: list_raw(name, RawLayout())),
}
