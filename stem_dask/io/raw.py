"""Files without a header: shape, type and place come from the config."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stem_dask.errors import SourceError
from stem_dask.io.candidate import Candidate, by, bytes_behind
from stem_dask.io.objects import at
from stem_dask.io.sources import FlatFile
from stem_dask.model import Axis

_CHECK = "check input.shape, input.dtype and input.offset"


@dataclass(frozen=True)
class RawLayout:
    """How numbers lie in a file without a header, as the user says: see ``input.shape, dtype, offset``."""

    shape: Sequence[int] | None = None
    dtype: str | None = None
    offset: int = 0

    @property
    def given(self) -> bool:
        """Whether anything was said."""
        return self != RawLayout()


def list_raw(path: str, layout: RawLayout) -> list[Candidate]:
    """The one array of a file of plain numbers.

    Raises
    ------
    SourceError
        When shape or type are missing or impossible, or the file is too short for them.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".raw") as file:
    ...     np.arange(48, dtype=">u2").tofile(file.name)
    ...     [found] = list_raw(file.name, RawLayout((2, 2, 3, 4), ">u2"))
    >>> found.source.shape
    (2, 2, 3, 4)
    """
    if layout.shape is None or layout.dtype is None:
        raise SourceError(
            f"{path}: a .raw file does not say what is in it; set input.shape: [scan_y, scan_x, ky, kx] or "
            "[n, ky, kx], and input.dtype, such as uint16 (or put the EMPAD's .xml beside it)"
        )
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
    source = FlatFile(path, layout.offset, dtype, shape)
    n_bytes = math.prod(shape) * dtype.itemsize
    per_pattern = math.prod(shape[-2:]) * dtype.itemsize
    has = at(path).stat().st_size - layout.offset
    if n_bytes > has:
        raise SourceError(
            f"{path}: {by(shape)} {dtype} from byte {layout.offset:,} on need {n_bytes:,} bytes, the file has "
            f"{max(0, has):,}, {max(0, has) // per_pattern:,} patterns of {by(shape[-2:])}; {_CHECK}"
        )
    n_more, odd = divmod(has - n_bytes, per_pattern)
    if n_more and not odd:
        n = math.prod(shape[:-2])
        fold = f", input.scan_shape: {list(shape[:2])}" if len(shape) == 4 else ""
        raise SourceError(
            f"{path}: {n + n_more:,} patterns; input.shape {by(shape)} needs {n:,}; {_CHECK}, or leave some out with input.shape: "
            f"{[n + n_more, *shape[-2:]]}{fold} and input.skip_frames: [0, {n_more}]"
        )
    notes = bytes_behind(path, "patterns", shape, dtype, has - n_bytes, _CHECK)
    axes = tuple(Axis(f"axis{i}", n) for i, n in enumerate(shape))
    said = {"shape": list(shape), "dtype": str(dtype), "offset": layout.offset}
    return [Candidate("array", source, axes, metadata=said, notes=notes)]
