"""Archives and folders that cannot be read directly: what they contain, and what to type."""

import os
import re
import shlex
import zipfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from stem_dask.core.errors import SourceError
from stem_dask.readers.source import Candidate
from stem_dask.storage.errors import one_line
from stem_dask.storage.location import is_url

#: documents of a zarr store or of a node in it
ZARR_ROOTS = ("zarr.json", ".zgroup", ".zarray")

#: by suffix, an expression that reads the image in file ``p``, and its import
_IMAGE_READERS = {
    ".tif": ("tifffile.imread(p)", "tifffile"),
    ".tiff": ("tifffile.imread(p)", "tifffile"),
    ".npy": ("numpy.load(p)", "numpy"),
    ".dm3": ("digitalmicrograph.file_reader(p)[0]['data']", "rsciio.digitalmicrograph as digitalmicrograph"),
    ".dm4": ("digitalmicrograph.file_reader(p)[0]['data']", "rsciio.digitalmicrograph as digitalmicrograph"),
}  # fmt: skip


def can_be_quoted(*texts: str) -> bool:
    """Whether texts are safe within quotes in a line of Python that a user pastes into a shell."""
    return all(re.fullmatch(r"[\w/.,:+=@~ -]*", text) for text in texts)


def in_zip(path: str) -> tuple[str, str] | None:
    """Kind of a zip archive and how to open its content; ("", "") for files of ``torch.save``, None if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    names = [PurePosixPath(member.filename) for member in members]
    if any(name.name == "data.pkl" and len(name.parts) <= 2 for name in names):
        return "", ""
    stem = Path(path).stem
    unpack = f"python -m zipfile -e {shlex.quote(path)} "
    roots = [name.parent for name in names if name.name in ZARR_ROOTS]
    if roots:
        return "a zarr store in a zip archive is not read", _unpacked_store(unpack, stem, roots)
    folder = shlex.quote(f"{stem}_unpacked")
    arrays = [member for member in members if member.filename.endswith(".npy")]
    if not arrays:
        what = f"a zip archive of {len(names):,} files is not read"
        return what, f"unpack it: {unpack}{folder}, and open what was in it"
    plain = {str(name) for name in names}
    kind = "a Nion Swift file" if "metadata.json" in plain else "an archive of numpy arrays"
    if "file_format_version.npy" in plain:
        kind = "a PantaRhei file"
    largest = max(arrays, key=lambda member: member.file_size).filename
    return (
        f"{kind} (a zip archive) is not read",
        f"unpack it: {unpack}{folder}, and open {shlex.quote(f'{stem}_unpacked/{one_line(largest)}')}",
    )


def _unpacked_store(unpack: str, stem: str, roots: Sequence[PurePosixPath]) -> str:
    root = min(roots, key=lambda one: len(one.parts))
    suffix = ".zspy" if root / "Experiments" in roots else ".zarr"
    if not root.parts:
        return f"unpack it: {unpack}{shlex.quote(f'{stem}_unpacked{suffix}')}"
    if root.suffix in (".zarr", ".zspy"):
        return f"unpack it: {unpack}., and open {shlex.quote(str(root))}"
    new = shlex.quote(f"{root.name}{suffix}")
    return f"unpack it: {unpack}. && mv {shlex.quote(str(root))} {new}, and open {new}"


def in_folder(path: Path, readers: Mapping[str, Any]) -> str:
    """An error message for a folder without the name of a store: what to open instead.

    ``readers`` is `stem_dask.readers.formats.READERS`.
    """
    if _is_zarr(path):
        store = path
        while _is_zarr(store.parent):
            store = store.parent
        if store != path:
            return _inside(store, path)
        suffix = ".zspy" if (path / "Experiments").is_dir() else ".zarr"
        name = path.stem if path.suffix in readers else path.name
        return f"by its content it is a zarr store; rename it to {name}{suffix}"
    files = sorted(one.name for one in path.iterdir() if one.is_file() and one.name[0] != ".")
    suffixes = [Path(name).suffix.lower() for name in files]
    masters = [name for name in files if re.fullmatch(r".*_master\.h5", name)]
    if len(masters) == 1:
        return f"a folder; open the master file {masters[0]} in it"
    known = sorted({s for s in suffixes if s in readers}, key=suffixes.count)
    if not known and path.suffix in readers:
        return f"{readers[path.suffix][0]} is a file, this is a folder"
    if not known:
        return "a folder without a file that can be read; name a file"
    same = [name for name, suffix in zip(files, suffixes, strict=True) if suffix == known[-1]]
    if len(same) > 1 and (image := _single_image(path / same[0], readers[known[-1]][1])):
        shape, dtype = image
        return f"a folder of {len(same):,} {known[-1]} files, an image each; {_stacking(path, same, shape, dtype)}"
    return f"a folder with {len(same):,} {known[-1]} file{'s' * (len(same) > 1)}; name one of them, or the glob {path.name}/*{known[-1]}"


def _is_zarr(path: Path) -> bool:
    return any((path / name).exists() for name in ZARR_ROOTS)


def _inside(store: Path, path: Path) -> str:
    """How to open a node of a zarr store."""
    name = path.relative_to(store).as_posix()
    whole = str(store) if store.suffix in (".zarr", ".zspy") else f"{store}.zarr (renamed to it)"
    if (path / ".zarray").exists() or _is_array(path / "zarr.json"):
        return f"an array in the zarr store {store.name}; set input.path: {whole} and input.dataset: {name}"
    return f"a group in the zarr store {store.name}; set input.path: {whole}, and input.dataset to an array such as {name}/NAME"


def _is_array(document: Path) -> bool:
    return document.is_file() and '"array"' in re.sub(r"\s", "", document.read_text("utf-8", "replace")).partition('"node_type":')[2][:7]  # fmt: skip


def _single_image(path: Path, reader: Callable[[str], list[Candidate]]) -> tuple[tuple[int, ...], str] | None:  # fmt: skip
    """Shape and type of the single image in a file; None if there are more, or it cannot be read."""
    try:
        found = reader(str(path))
    except SourceError:
        return None
    sources = [one.source for one in found if len(one.source.shape) > 1]
    if not sources or any(prod(source.shape[:-2]) != 1 for source in sources):
        return None
    return tuple(sources[0].shape[-2:]), sources[0].dtype.newbyteorder("=").name


def _stacking(folder: Path, names: Sequence[str], shape: Sequence[int], dtype: str) -> str:
    """A line of Python that concatenates the images of a folder in scan order, and how to open the result."""
    suffix = Path(names[0]).suffix
    if suffix.lower() not in _IMAGE_READERS or not can_be_quoted(str(folder)):
        return "save them as one array (scan_y, scan_x, ky, kx) with numpy.save"
    image, needs = _IMAGE_READERS[suffix.lower()]
    key, scan = _order(names)
    out = f"{folder.name}.raw"
    sizes = ",".join(map(str, (*(scan or (len(names),)), *shape)))
    line = (
        f"import glob, os, re, {needs}; f = sorted(glob.glob('{folder}/*{suffix}'), key={key}); "
        f"open('{out}', 'wb').writelines({image}.astype('{dtype}').tobytes() for p in f)"
    )
    keys = f"input.shape=[{sizes}] input.dtype={dtype}" + (
        "" if scan else " input.scan_shape=[scan_y,scan_x]"
    )
    return f'stack them: python -c "{line}", then open {out} with {keys}'


def _order(names: Sequence[str]) -> tuple[str, tuple[int, int] | None]:
    """The sort key for scan order, and the shape of the scan if the names contain x and y."""
    for first, second in ("yx", "xy"):
        pattern = rf"{first}[_=-]?(\d+)([^\d]*?{second}[_=-]?)(\d+)"
        found = [re.search(pattern, name, re.IGNORECASE) for name in names]
        if all(found):
            break
    else:
        return r"lambda p: [int(n) for n in re.findall(r'\d+', os.path.basename(p))]", None
    places = [(int(one[1]), int(one[3])) for one in found if one]
    sizes = [len({place[i] for place in places}) for i in (0, 1)]
    order = "[::-1]" if first == "x" else ""
    start = rf"{first}[_=-]?(\d+)[^\d]*?{second}[_=-]?(\d+)"
    key = rf"lambda p: [int(n) for n in re.search(r'(?i){start}', os.path.basename(p)).groups()]{order}"
    scan = (sizes[1], sizes[0]) if first == "x" else (sizes[0], sizes[1])
    return key, scan if prod(scan) == len(names) == len({*places}) else None


def of_many(path: str) -> str:
    """A hint if a single image is one of many in its folder, such as one file per scan position."""
    folder, suffix = Path(path).parent, Path(path).suffix.lower()
    if is_url(path):
        return ""
    with os.scandir(folder) as entries:
        same = (entry for entry in entries if Path(entry.name).suffix.lower() == suffix)
        if len(list(islice(same, 2))) < 2:
            return ""
    return f"is one image of many: stem-dask info {shlex.quote(os.path.relpath(folder))} prints how to stack them"
