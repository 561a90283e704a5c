"""Plain numbers: .npy, also in zip archives; .raw, whose layout the user gives; and which options read a file of another size than expected.

Each proposal gives exactly the right number of bytes and patterns.
"""

import contextlib
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers import own
from stem_dask.readers.calibration import with_nion
from stem_dask.readers.containers import in_zip
from stem_dask.readers.flat import FlatFile, FramedFile, Run
from stem_dask.readers.source import (
    MOST_HEADER_BYTES,
    Candidate,
    Source,
    as_raw,
    bytes_behind,
    stored,
)
from stem_dask.readers.views import ScanOfList, View
from stem_dask.storage.errors import COPY, one_line, translate
from stem_dask.storage.location import at, opened_file

_CHECK = "check input.shape, input.dtype and input.offset"


@dataclass(frozen=True)
class RawLayout:
    """The layout of a .raw file, from the config: ``input.shape, dtype, offset, frame_header, frame_footer``."""

    shape: Sequence[int] | None = None
    dtype: str | None = None
    offset: int = 0
    frame_header: int = 0
    frame_footer: int = 0


def list_npy(path: str) -> list[Candidate]:
    """The array of a .npy file."""
    one = _npy(path, 0, at(path).stat().st_size)
    return [replace(one, about=own.of_results(path, one.source.shape))]


def _npy(path: str, start: int, size: int, name: str = "array") -> Candidate:
    """The array of a file in the format .npy, which is ``size`` bytes of a file from byte ``start`` on."""
    with translate(SourceError, path, "not a readable .npy file"), opened_file(path) as file:
        file.seek(start)
        version = np.lib.format.read_magic(file)
        form = np.lib.format
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Python 2 wrote 6L for 6, which is understood
            shape, fortran, dtype = read(file)
        offset = file.tell()
        if dtype.hasobject:
            raise SourceError(
                f"{path}: holds Python objects, which are never unpickled; save plain numbers"
            )
        n_bytes = prod(shape) * dtype.itemsize
        after = size - (offset - start)
        if min(shape, default=0) < 0 or n_bytes > after:
            raise SourceError(
                f"{path}: the header says {by(shape)} {dtype}, {n_bytes:,} bytes, but {after:,} follow; the file was cut"
            )
        file.seek(offset + n_bytes)
        # `numpy.save` appends to an open file
        another = after > n_bytes and file.read(6) == b"\x93NUMPY"
    array: Source = FlatFile(path, offset, dtype, shape[::-1] if fortran else shape)
    rest = after - n_bytes
    notes: tuple[str, ...] = (f"{rest:,} bytes after the array, another one, are not read",)
    if not another:
        remedy = "if they are right, save it again: numpy.save(path, numpy.load(path))"
        notes = bytes_behind(path, "array", array.shape, dtype, rest, remedy, offset)
    if fortran:
        array = View.of(array).transpose(range(len(shape))[::-1])
    return Candidate(name, array, _axes(shape), notes=notes)


#: bytes of a member's header in a zip archive, without its name and its extra field
_ZIP_HEADER = 30


def list_archive(path: str) -> list[Candidate]:
    """The arrays of a zip archive of .npy files, such as numpy.savez and Nion Swift write; they are read where they lie.

    Raises
    ------
    SourceError
        When it holds something else; the message says how to unpack it.
    """
    kind, way = in_zip(path) or ("a zip archive", COPY)
    if not kind:
        kind, way = "by its content it is a PyTorch file", f"rename it to {Path(path).stem}.pt"
    with translate(SourceError, path, f"{kind}; {way}"), zipfile.ZipFile(path) as archive:
        members = [one for one in archive.infolist() if one.filename.endswith(".npy")]
        text = next((one for one in archive.infolist() if one.filename == "metadata.json"), None)
        stated = "{}" if text is None or text.file_size > MOST_HEADER_BYTES else archive.read(text)
    found = []
    for member in members:
        name = member.filename.removesuffix(".npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise SourceError(
                f"{path}: {one_line(member.filename)} in it is compressed, and is not read; {way}"
            )
        with opened_file(path) as file:
            file.seek(member.header_offset)
            header = file.read(_ZIP_HEADER)
        sizes = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        start = member.header_offset + _ZIP_HEADER + sum(sizes)
        found.append(_npy(path, start, member.file_size, one_line(name)))
    if not found:
        raise SourceError(f"{path}: {kind}; {way}")
    return [with_nion(path, stated, one) for one in found]


def list_raw(path: str, layout: RawLayout = RawLayout()) -> list[Candidate]:
    """The array of a .raw file."""
    if layout.shape is None or layout.dtype is None:
        empad = _as_empad(path, at(path).stat().st_size - layout.offset)
        keys = "set input.shape: [scan_y, scan_x, ky, kx] or [n, ky, kx], and input.dtype, such as uint16"
        raise SourceError(
            f"{path}: a .raw file does not say what is in it; {empad or keys} (or copy the EMPAD's .xml into its folder)"
        )
    shape, fault = tuple(int(n) for n in layout.shape), ""
    header, footer = layout.frame_header, layout.frame_footer
    try:
        dtype = np.dtype(layout.dtype)
    except TypeError as error:
        raise SourceError(
            f"{path}: input.dtype is {layout.dtype!r}; give numpy's name of a type, such as uint16, >u2 or float32"
        ) from error
    if len(shape) not in (3, 4) or min(shape) < 1:
        fault = f"input.shape is {list(shape)}; give [scan_y, scan_x, ky, kx] or [n, ky, kx], sizes of 1 or more"
    elif dtype.kind not in "buif" or dtype.itemsize > 8:
        fault = f"input.dtype is {layout.dtype!r}; patterns are real numbers"
    elif min(layout.offset, header, footer) < 0:
        fault = (
            f"input.offset, input.frame_header and input.frame_footer are {layout.offset}, {header} and {footer}; give numbers "
            "of bytes, 0 or more"
        )
    if fault:
        raise SourceError(f"{path}: {fault}")
    notes = _checked(path, layout, shape, dtype)
    *lead, height, width = shape
    source: Source = FlatFile(path, layout.offset, dtype, shape)
    if header or footer:
        stride = header + height * width * dtype.itemsize + footer
        run = Run(path, layout.offset + header, stride, prod(lead), header)
        source = FramedFile((run,), dtype, (height, width))
        if len(lead) == 2:
            source = ScanOfList(source, (lead[0], lead[1]))
    around = {"frame_header": header, "frame_footer": footer}
    metadata = {"shape": list(shape), "dtype": str(dtype), "offset": layout.offset}
    metadata |= {key: n_bytes for key, n_bytes in around.items() if n_bytes}
    return [Candidate("array", source, _axes(shape), metadata=metadata, notes=notes)]


def _axes(shape: Sequence[int]) -> tuple[Axis, ...]:
    return tuple(Axis(f"axis{i}", int(n)) for i, n in enumerate(shape))


def _checked(
    path: str, layout: RawLayout, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[str, ...]:
    """Notes; raises when the size of the file does not fit the layout, with the options that fit."""
    *lead, height, width = shape
    ways: list[str] = []
    pixels = height * width * dtype.itemsize
    per_pattern = layout.frame_header + pixels + layout.frame_footer
    n, has = prod(lead), max(0, at(path).stat().st_size - layout.offset)
    more = has - n * per_pattern
    empad = ""
    if (height, width, dtype.itemsize, per_pattern) == (128, 128, 4, pixels):
        empad = _as_empad(path, has, lead)
    if more in (0, -layout.frame_footer):  # the last footer may be missing
        return (f"128 x 128 may be wrong: {empad}",) if empad else ()
    behind = f" behind the header of {layout.frame_header:,}" if layout.frame_header else ""
    needs = (
        f"{path}: {by(shape)} {dtype} from byte {layout.offset:,} on{behind} need {n * per_pattern:,} bytes, the file has "
        f"{has:,}"
    )
    if empad:
        raise SourceError(f"{needs}; {empad}")
    there, odd = divmod(has, per_pattern)
    offset = f"input.offset: {layout.offset + more}"
    if more < 0:
        with contextlib.suppress(SourceError):  # raised when the rest is part of a pattern
            stack = (there, height, width)
            if there and _checked(path, layout, stack, dtype) is not None:
                more_keys = scan_ways(there, (lead[0], lead[1])) if lead[1:] else []
                ways = [f"set input.shape: {list(stack)}, {key}" for key, _ in more_keys]
                ways = ways or [f"set input.shape: {list(stack)}"]
        raise SourceError(
            "; ".join([f"{needs}, {there} patterns of {by(shape[-2:])}", *ways, _CHECK])
        )
    # more bytes at each pattern, per line, or whole patterns
    each, odd_each = divmod(more, n)
    gap, odd_gap = divmod(more, n - 1) if n > 2 else (0, 1)
    if n > 1 and not odd_each and each < per_pattern:
        ways = [
            f"{each:,} bytes more at each pattern, a header or a footer: input.frame_header: {layout.frame_header + each} or "
            f"input.frame_footer: {layout.frame_footer + each}"
        ]
    elif not odd_gap and gap < per_pattern and not layout.frame_footer:
        ways = [f"a gap of {gap:,} bytes between patterns: input.frame_footer: {gap}"]
    keys = f"input.shape: {[there, height, width]}"
    if odd and ways:
        ways.append(f"one header of {more:,} bytes before all patterns: {offset}")
    elif not odd and len(lead) == 1:
        rest = there - n
        skip = "" if ways else f", input.skip_frames: [0, {rest}] to leave out the last {rest:,}"
        ways.append(f"{there:,} patterns are there: {keys}{skip}")
    elif not odd:
        for key, words in scan_ways(there, (lead[0], lead[1])):
            if not (ways and "skip_frames" in key):
                ways.append(f"{there:,} patterns, {words}: {keys}, {key}")
    if ways:
        raise SourceError(f"{needs}: {'; or '.join(ways)}; or {_CHECK}")
    offset = f"for a header at the beginning of the file set {offset}"
    notes = bytes_behind(path, "patterns", shape, dtype, more, f"{_CHECK}; {offset}")
    return tuple(f"{note}; {offset}" for note in notes)


def _as_empad(path: str, has: int, lead: Sequence[int] = ()) -> str:
    """The options that read an EMPAD's .raw without its .xml; empty when its size is not that of one."""
    n, odd = divmod(has, 130 * 128 * 4)  # 130 rows, of which 128 are image
    if odd or not n:
        return ""
    named = re.search(r"(?i)_x(\d+)_y(\d+)$", Path(path).stem)
    scans = [list(lead), [int(named[2]), int(named[1])] if named else []]
    fitting = next((scan for scan in scans if scan and prod(scan) == n), [n])
    scan = ", input.scan_shape: [scan_y, scan_x]" if len(fitting) == 1 else ""
    return (
        f"its size is that of {n:,} patterns of an EMPAD, 130 x 128 float32 each with 128 rows of image: set input.shape: "
        f"{[*fitting, 128, 128]}, input.dtype: float32, input.frame_footer: {2 * 128 * 4}{scan}"
    )


def scan_ways(
    n: int, scan: tuple[int, int], ends: tuple[int, int] = (0, 0)
) -> list[tuple[str, str]]:
    """The options that fold ``n`` patterns when ``scan`` (lines, positions per line) needs another number, and what they mean.

    ``ends`` are patterns left out already at the beginning and at the end; ``n`` does not include them.

    Examples
    --------
    >>> scan_ways(66, (6, 10))
    [('input.scan_shape: [6, 11], input.drop_columns: 1', 'lines that end with 1 flyback pattern')]
    >>> scan_ways(34, (6, 10))
    [('input.scan_shape: [3, 10], input.skip_frames: [0, 4]', '3 complete lines of 10 and 4 patterns')]
    """
    (height, width), (first, last) = scan, ends
    lines, rest = divmod(n, width)
    more = n - height * width
    if not lines:
        return [(f"input.scan_shape: [1, {n}]", "part of one line")]
    complete = f"{lines:,} complete line{'s' * (lines > 1)} of {width:,}"
    whole = (f"input.scan_shape: [{lines}, {width}]", complete)
    if more < 0:
        if not rest:
            return [whole]
        keys = f"{whole[0]}, input.skip_frames: [{first}, {last + rest}]"
        return [(keys, f"{complete} and {rest:,} pattern{'s' * (rest > 1)}")]
    columns, odd = divmod(more, height)
    ways = [] if rest else [whole]
    if not odd:
        keys = f"input.scan_shape: [{height}, {width + columns}], input.drop_columns: {columns}"
        words = f"lines that end with {columns:,} flyback pattern{'s' * (columns > 1)}"
        # a flyback longer than the line is less likely than more lines
        ways.insert(0 if columns < width else len(ways), (keys, words))
    if odd or height == 1:
        begin = first + more if not last else [first + more, last]
        ways.append((f"input.skip_frames: {begin}", f"without the first {more:,}"))
        ways.append((f"input.skip_frames: [{first}, {last + more}]", f"without the last {more:,}"))
    return ways


def frame_way(name: str, source: Source, n: int) -> str:
    """The options that read ``n`` patterns with a longer header or footer each; empty when the size does not allow it."""
    if not name.lower().endswith((".raw", ".tvips")):
        return ""
    source = stored(source)
    height, width = source.shape[-2:]
    pixels = height * width * source.dtype.itemsize
    if isinstance(source, FlatFile):
        source = FramedFile((Run(source.path, source.offset, pixels, n),), source.dtype, (height, width))  # fmt: skip
    if not isinstance(source, FramedFile) or len(source.runs) > 1:
        return ""
    [run] = source.runs
    start, stack = run.offset - run.lead, (n, *source.frame_shape)
    n_bytes = at(run.path).stat().st_size - start
    more, odd = divmod(n_bytes - n * run.stride, n)
    if odd or not 0 < more < run.stride:
        return ""
    words = f"{more:,} bytes more at each of {n:,} patterns, a header or a footer"
    if not name.lower().endswith(".raw"):
        if n_bytes % run.stride == 0:  # as its own header says
            return ""
        return f"{as_raw(run.path, stack, source.dtype, start, run.lead, more)} ({words})"
    footer = run.stride - run.lead - pixels + more
    return f"input.shape: {list(stack)}, input.frame_header: {run.lead + more} or input.frame_footer: {footer} ({words})"
