"""The table of input formats, and how a file is recognized.

The file extension selects the reader. A file whose first bytes contradict its extension is refused, with the name that
it should have.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stem_dask.core.errors import SourceError
from stem_dask.readers.containers import in_folder, in_zip
from stem_dask.readers.dm import list_dm
from stem_dask.readers.empad import list_empad, xml_of_raw
from stem_dask.readers.hdf5 import list_hdf5
from stem_dask.readers.mib import list_mib
from stem_dask.readers.mrc import list_mrc
from stem_dask.readers.nanomegas import list_app5, list_blo
from stem_dask.readers.raw import RawLayout, list_archive, list_npy, list_raw
from stem_dask.readers.rsciio import SUFFIXES, list_rsciio
from stem_dask.readers.seq import list_seq
from stem_dask.readers.source import Candidate
from stem_dask.readers.tiff import list_tiff
from stem_dask.readers.torch import list_tensors
from stem_dask.readers.tvips import list_tvips
from stem_dask.readers.zarr import list_zarr
from stem_dask.storage.errors import COPY, one_line
from stem_dask.storage.location import at, check_path, is_url, opened_file


class Reader(NamedTuple):
    """What a format is, what lists the arrays in a file, and how it is stored.

    Parameters
    ----------
    kind : in words, such as "a numpy file"
    candidates : function of a path; reads headers only
    is_folder : whether it is a folder of files
    in_store : whether it is read from object stores: a .zarr, or by ranges of bytes where each pattern is contiguous
    """

    kind: str
    candidates: Callable[[str], list[Candidate]]
    is_folder: bool = False
    in_store: bool = False


#: by suffix; a format is added here, and its first bytes in `_MAGIC`
READERS = {
    ".dm3": Reader("a Gatan file", list_dm, in_store=True),
    ".dm4": Reader("a Gatan file", list_dm, in_store=True),
    ".hspy": Reader("a HyperSpy file", list_hdf5),
    ".hdf5": Reader("an HDF5 file", list_hdf5),
    ".h5": Reader("an HDF5 file", list_hdf5),
    ".zarr": Reader("a zarr store", list_zarr, is_folder=True, in_store=True),
    ".zspy": Reader("a HyperSpy zarr store", list_zarr, is_folder=True),
    ".npy": Reader("a numpy file", list_npy, in_store=True),
    ".raw": Reader("a file of plain numbers", list_raw, in_store=True),
    ".pt": Reader("a PyTorch file", list_tensors),
    ".mib": Reader("a Merlin file", list_mib, in_store=True),
    ".blo": Reader("a NanoMEGAS block file", list_blo, in_store=True),
    ".mrc": Reader("an MRC file", list_mrc, in_store=True),
    ".xml": Reader("an EMPAD's file", list_empad),
    ".tvips": Reader("a TVIPS file", list_tvips),
    ".app5": Reader("a Topspin file", list_app5),
    ".seq": Reader("a sequence of StreamPix", list_seq),
    ".tif": Reader("a TIFF file", list_tiff),
    ".tiff": Reader("a TIFF file", list_tiff),
    ".emd": Reader("an EMD file", list_hdf5),
    ".nxs": Reader("a NeXus file", list_hdf5),
    ".nhdf": Reader("a Nion Swift file", list_hdf5),
    ".ndata": Reader("a Nion Swift archive", list_archive),
    ".ndata1": Reader("a Nion Swift archive", list_archive),
    ".npz": Reader("an archive of numpy arrays", list_archive),
    ".zip": Reader("an archive", list_archive),
    **dict.fromkeys(SUFFIXES, Reader("a file of RosettaSciIO", list_rsciio)),
}

#: endings of zip archives
_ARCHIVES = (".npz", ".ndata", ".ndata1", ".zip")

#: files that belong to data, or have to be unpacked first
_NEIGHBOURS = {
    ".hdr": "the settings of a Merlin file; open the .mib of the same name",
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

#: (how a file begins, what it is, endings such files have; the first is proposed)
_MAGIC: tuple[tuple[bytes, str, tuple[str, ...]], ...] = (
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", (".h5", ".hdf5", ".hspy", ".emd", ".app5", ".nxs", ".nhdf")),
    (rb"MATLAB 7\.3 MAT-file", "an HDF5 file of MATLAB 7.3", (".h5", ".hdf5")),
    (rb"\0\0\0\x03.{4}\0\0\0[\0\1]", "a Gatan DM3 file", (".dm3", ".dm4")),  # the last is the byte order
    (rb"\0\0\0\x04.{8}\0\0\0[\0\1]", "a Gatan DM4 file", (".dm4", ".dm3")),
    (rb"\x93NUMPY", "a numpy file", (".npy",)),
    (rb"PK\x03\x04", "a PyTorch file", (".pt", *_ARCHIVES)),
    (rb"IMGBLO\x02\x01", "a NanoMEGAS block file", (".blo",)),
    (rb"MQ1,", "a Merlin file", (".mib",)),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF file", (".tif", ".tiff")),
    (rb"<\?xml", "an XML file", (".xml",)),
    (rb"\xed\xfe\0\0N\0o\0r\0p\0i\0x", "a sequence of StreamPix", (".seq",)),
    (rb".{52}TVIPS", "a TVIPS file", (".tvips",)),
    (rb".{208}MAP ", "an MRC file", (".mrc",)),
)  # fmt: skip


def open_file(name: str, layout: RawLayout) -> tuple[str, list[Candidate]]:
    """The kind of a file, and the arrays in it."""
    check_path("the input", name)
    suffix = Path(name).suffix.lower()
    is_given = layout != RawLayout()
    try:
        _check(name, suffix)
        kind, reader = READERS[suffix][:2]
        if suffix == ".raw":
            xml = None if is_given or is_url(name) else xml_of_raw(name)
            return (
                (READERS[".xml"].kind, list_empad(xml)) if xml else (kind, list_raw(name, layout))
            )
        if is_given:
            raise SourceError(
                f"{name}: input.shape, input.dtype, input.offset, input.frame_header and input.frame_footer are for .raw files; "
                f"{kind} says its own: leave them out"
            )
        return kind, reader(name)
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{name}: cannot be read ({one_line(error.strerror or error)}); check its permissions and its disk"
        ) from error


def is_one_input(name: str) -> bool:
    """Whether a name is that of a file or store, and not of a folder of files or a glob."""
    reader = READERS.get(Path(name).suffix.lower())
    return at(name).is_file() or (reader is not None and reader.is_folder) or is_url(name)


def _check(name: str, suffix: str) -> None:
    """Refuse what cannot be read, by the name and the first bytes of a file, with what to open instead."""
    reader, path = READERS.get(suffix), at(name)
    what = f"the file extension {suffix} is not known" if suffix else "a file without extension"
    own = sorted({*READERS} - {*SUFFIXES})
    unknown = f"{what}; known are {', '.join(own)}, and {len(SUFFIXES)} of RosettaSciIO"
    fault = _NEIGHBOURS.get(suffix, "")
    if is_url(name):
        if reader is None or not reader.in_store:
            known = ", ".join(end for end in READERS if READERS[end].in_store and end != ".zarr")
            fault = (
                f"from an object store only .zarr, {known} are read; copy the file here first, for example with aws s3 cp, and "
                "convert it into the store: stem-dask convert --input FILE --output s3://BUCKET/NAME.zarr"
            )
        elif not (path.is_dir() if reader.is_folder else path.is_file()):
            fault = "there is nothing of this name in the object store; check input.path and AWS_ENDPOINT_URL"
    elif not fault and not path.exists():
        more = "" if suffix in ("", *READERS) else f"; {unknown}"
        fault = f"there is no such file; check input.path (relative to {Path.cwd()}){more}"
    elif not fault and path.is_dir() and not (reader and reader.is_folder):
        fault = in_folder(path, READERS)
    elif not fault and path.is_file() and path.stat().st_size == 0:
        fault = "the file is empty (0 bytes)"
    if fault:
        raise SourceError(f"{name}: {fault}")
    if reader and reader.is_folder and (is_url(name) or path.is_dir()):
        return
    with opened_file(name) as file:
        start = file.read(256)
    text = start[:64].lstrip().lower()
    fault = next((words for begin, words in _IN_PLACE if text.startswith(begin)), "")
    content = None
    if suffix not in (".raw", *SUFFIXES):  # which may begin with any bytes
        known_as = (row[1:] for row in _MAGIC if re.match(row[0], start, re.DOTALL))
        content = next(known_as, None)
    rename = f"rename it to {Path(name).stem}{content[1][0]}" if content else ""
    if (
        not fault
        and content
        and ".pt" in content[1]
        and suffix not in _ARCHIVES
        and not is_url(name)
    ):
        archive, way = in_zip(name) or ("a zip archive", COPY)
        if archive and (suffix != ".pt" or way != COPY):  # the reader of .pt reports a damaged one
            fault = f"{archive}; {way}"
    if not fault and reader is None:
        fault = f"{what}; by its content it is {content[0]}: {rename}" if content else unknown
    elif not fault and content and suffix not in content[1]:
        fault = f"the name ends in {suffix}, but by its content it is {content[0]}; {rename}"
    elif not fault and reader and reader.is_folder:
        fault = f"{reader.kind} is a folder, this is a file"
    if fault:
        raise SourceError(f"{name}: {fault}")
