"""Raw binary files (.raw): shape, type and offset are given by the user."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from stem_dask.core.errors import SourceError
from stem_dask.core.model import Axis
from stem_dask.core.text import by
from stem_dask.readers.flat import FlatFile, FramedFile, Run
from stem_dask.readers.sizes import scan_ways
from stem_dask.readers.source import Candidate, Source, bytes_behind
from stem_dask.readers.views import ScanOfList
from stem_dask.storage.location import at

_CHECK = "check input.shape, input.dtype and input.offset"

#: bytes of a pattern of an EMPAD, 130 rows of which 128 are image
_EMPAD = 130 * 128 * 4

_EMPAD_FOOTER = 2 * 128 * 4

_SCAN_IN_NAME = re.compile(r"_x(\d+)_y(\d+)$", re.IGNORECASE)


@dataclass(frozen=True)
class RawLayout:
    """The layout of a .raw file, from the config: ``input.shape, dtype, offset, frame_header, frame_footer``."""

    shape: Sequence[int] | None = None
    dtype: str | None = None
    offset: int = 0
    frame_header: int = 0
    frame_footer: int = 0

    @property
    def given(self) -> bool:
        """Whether any of them was given."""
        return self != RawLayout()


def list_raw(path: str, layout: RawLayout) -> list[Candidate]:
    """The array of a .raw file.

    Raises
    ------
    SourceError
        When shape or type are missing or impossible, or do not fit the size of the file.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".raw") as file:
    ...     np.arange(48, dtype=">u2").tofile(file.name)
    ...     [found] = list_raw(file.name, RawLayout((2, 2, 3, 4), ">u2"))
    >>> found.source.shape
    (2, 2, 3, 4)
    """
    shape, dtype = _sizes(path, layout)
    source = _source(path, layout, shape, dtype)
    notes = _checked(path, layout, shape, dtype)
    axes = tuple(Axis(f"axis{i}", n) for i, n in enumerate(shape))
    metadata = {"shape": list(shape), "dtype": str(dtype), "offset": layout.offset}
    for key in ("frame_header", "frame_footer"):
        if n_bytes := getattr(layout, key):
            metadata[key] = n_bytes
    return [Candidate("array", source, axes, metadata=metadata, notes=notes)]


def _sizes(path: str, layout: RawLayout) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type as given, when they are possible."""
    if layout.shape is None or layout.dtype is None:
        empad = _as_empad(path, at(path).stat().st_size - layout.offset)
        raise SourceError(
            f"{path}: a .raw file does not say what is in it; "
            + (empad or "set input.shape: [scan_y, scan_x, ky, kx] or [n, ky, kx], and input.dtype, such as uint16")
            + " (or copy the EMPAD's .xml into its folder)"
        )  # fmt: skip
    shape = tuple(int(n) for n in layout.shape)
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise SourceError(
            f"{path}: input.shape is {list(shape)}; give [scan_y, scan_x, ky, kx] or [n, ky, kx], sizes of 1 or more"
        )
    try:
        dtype = np.dtype(layout.dtype)
    except TypeError as error:
        raise SourceError(
            f"{path}: input.dtype is {layout.dtype!r}; give numpy's name of a type, such as uint16, >u2 or float32"
        ) from error
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise SourceError(f"{path}: input.dtype is {layout.dtype!r}; patterns are real numbers")
    if min(layout.offset, layout.frame_header, layout.frame_footer) < 0:
        raise SourceError(
            f"{path}: input.offset, input.frame_header and input.frame_footer are {layout.offset}, {layout.frame_header} and "
            f"{layout.frame_footer}; give numbers of bytes, 0 or more"
        )
    return shape, dtype


def _source(path: str, layout: RawLayout, shape: tuple[int, ...], dtype: np.dtype) -> Source:
    if not layout.frame_header and not layout.frame_footer:
        return FlatFile(path, layout.offset, dtype, shape)
    *lead, height, width = shape
    stride = layout.frame_header + height * width * dtype.itemsize + layout.frame_footer
    run = Run(path, layout.offset + layout.frame_header, stride, prod(lead), layout.frame_header)
    frames = FramedFile((run,), dtype, (height, width))
    return frames if len(lead) == 1 else ScanOfList(frames, (lead[0], lead[1]))


def _checked(
    path: str, layout: RawLayout, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[str, ...]:
    """Notes; raises when the size of the file does not fit the layout."""
    pixels = prod(shape[-2:]) * dtype.itemsize
    per_pattern = layout.frame_header + pixels + layout.frame_footer
    n, has = prod(shape[:-2]), max(0, at(path).stat().st_size - layout.offset)
    more = has - n * per_pattern
    empad = ""
    if (*shape[-2:], dtype.itemsize, per_pattern) == (128, 128, 4, pixels):
        empad = _as_empad(path, has, shape[:-2])
    if more in (0, -layout.frame_footer):  # the last footer may be missing
        return (f"128 x 128 may be wrong: {empad}",) if empad else ()
    behind = f" behind the header of {layout.frame_header:,}" if layout.frame_header else ""
    needs = (
        f"{path}: {by(shape)} {dtype} from byte {layout.offset:,} on{behind} need {n * per_pattern:,} bytes, the file has "
        f"{has:,}"
    )
    if empad:
        raise SourceError(f"{needs}; {empad}")
    if more < 0:
        ways = [] if has < per_pattern else _fewer(path, layout, shape, dtype, has // per_pattern)
        there = f"{has // per_pattern:,} patterns of {by(shape[-2:])}"
        raise SourceError("; ".join([f"{needs}, {there}", *ways, _CHECK]))
    ways = _more(layout, shape, more, per_pattern)
    if ways:
        raise SourceError(f"{needs}: {'; or '.join(ways)}; or {_CHECK}")
    offset = f"for a header at the beginning of the file set input.offset: {layout.offset + more}"
    notes = bytes_behind(path, "patterns", shape, dtype, more, f"{_CHECK}; {offset}")
    return tuple(f"{note}; {offset}" for note in notes)


def _fewer(
    path: str, layout: RawLayout, shape: tuple[int, ...], dtype: np.dtype, n: int
) -> list[str]:
    """The options that read the ``n`` complete patterns of a file that has fewer than expected."""
    ways = [""] if len(shape) == 3 else [keys for keys, _ in scan_ways(n, (shape[0], shape[1]))]
    stack = (n, *shape[-2:])
    try:
        _checked(path, replace(layout, shape=stack), stack, dtype)
    except SourceError:  # the rest is not part of a pattern
        return []
    return [
        "set " + ", ".join(filter(None, (f"input.shape: {list(stack)}", keys))) for keys in ways
    ]


def _more(layout: RawLayout, shape: tuple[int, ...], more: int, per_pattern: int) -> list[str]:
    """The options that read a file with ``more`` bytes than expected: per pattern, per line, or whole patterns."""
    *lead, height, width = shape
    n = prod(lead)
    ways = []
    each, odd = divmod(more, n)
    if n > 1 and not odd and each < per_pattern:
        ways.append(
            f"{each:,} bytes more at each pattern, a header or a footer: input.frame_header: {layout.frame_header + each} or "
            f"input.frame_footer: {layout.frame_footer + each}"
        )
    elif n > 2 and more % (n - 1) == 0 and more // (n - 1) < per_pattern and not layout.frame_footer:  # fmt: skip
        gap = more // (n - 1)
        ways.append(f"a gap of {gap:,} bytes between patterns: input.frame_footer: {gap}")
    whole, odd = divmod(more, per_pattern)
    if odd and ways:
        at_first = f"one header of {more:,} bytes before all patterns: input.offset: {layout.offset + more}"
        return [*ways, at_first]
    if odd:
        return []
    stack = f"input.shape: {[n + whole, height, width]}"
    if len(lead) == 1:
        skip = "" if ways else f", input.skip_frames: [0, {whole}] to leave out the last {whole:,}"
        return [*ways, f"{n + whole:,} patterns are there: {stack}{skip}"]
    for keys, words in scan_ways(n + whole, (lead[0], lead[1])):
        if "skip_frames" in keys and ways:
            continue
        ways.append(f"{n + whole:,} patterns, {words}: {stack}, {keys}")
    return ways


def _as_empad(path: str, has: int, lead: Sequence[int] = ()) -> str:
    """The options that read an EMPAD's .raw without its .xml; empty when its size is not that of one."""
    n, odd = divmod(has, _EMPAD)
    if odd or not n:
        return ""
    named = _SCAN_IN_NAME.search(Path(path).stem)
    scans = [list(lead), [int(named[2]), int(named[1])] if named else []]
    fitting = next((scan for scan in scans if scan and prod(scan) == n), [n])
    scan = ", input.scan_shape: [scan_y, scan_x]" if len(fitting) == 1 else ""
    return (
        f"its size is that of {n:,} patterns of an EMPAD, 130 x 128 float32 each with 128 rows of image: set input.shape: "
        f"{[*fitting, 128, 128]}, input.dtype: float32, input.frame_footer: {_EMPAD_FOOTER}{scan}"
    )
