"""A first look at an input: values and mean of a few patterns, drawn with characters."""

import math

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import SourceError
from stem_dask.core.text import by
from stem_dask.readers.detector_first import detector_first
from stem_dask.readers.open import Found

#: patterns that are read
MOST = 16

#: rows and columns of the picture; a character is about twice as high as wide
ROWS, COLUMNS = 16, 32

_SHADES = " .:-=+*#%@"


def preview(found: Found) -> list[str]:
    """Lowest and highest value, dose, and mean of patterns spread evenly over the scan.

    Empty for a detector-first input, in which every pattern is spread over the whole file, and where a pattern cannot be read.
    """
    source = found.source
    lead = source.shape[:-2]
    n = math.prod(lead)
    if detector_first(source) is not None or not n:
        return []
    picked = np.unique(np.linspace(0, n - 1, min(n, MOST)).astype(int))
    whole = (slice(0, source.shape[-2]), slice(0, source.shape[-1]))
    patterns = []
    try:
        for place in zip(*np.unravel_index(picked, lead), strict=True):
            region = (*(slice(int(i), int(i) + 1) for i in place), *whole)
            patterns.append(np.asarray(source[region]).reshape(source.shape[-2:]))
    except SourceError as error:
        return [f"preview     {error}"]
    values = np.stack(patterns)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return ["values      no pixel of the preview is a number"]
    mean = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0).mean(axis=0)
    doses = values.sum(axis=(1, 2), dtype=np.float64)
    return [
        f"values      {finite.min():,.6g} to {finite.max():,.6g}, {np.median(doses):,.6g} a pattern (median of {len(values)})",
        f"mean        of {len(values)} patterns, {by(mean.shape)} px, logarithmic",
        *(f"            {line}".rstrip() for line in picture(mean)),
    ]


def picture(mean: NDArray[np.float64]) -> list[str]:
    """The logarithm of a pattern as at most `ROWS` lines of at most `COLUMNS` characters.

    Examples
    --------
    >>> beam = np.zeros((4, 4)); beam[1, 2] = 100; beam[2, 2] = 9
    >>> picture(beam)
    ['    ', '  @ ', '  # ', '    ']
    """
    rows, columns = min(ROWS, mean.shape[0]), min(COLUMNS, mean.shape[1])
    # the mean of each cell, by sums up to its edges
    for axis, n in enumerate((rows, columns)):
        edges = np.linspace(0, mean.shape[axis], n + 1).astype(int)
        sizes = np.diff(edges).reshape((-1, 1) if axis == 0 else (1, -1))
        mean = np.add.reduceat(mean, edges[:-1], axis=axis) / sizes
    shown = np.log1p(np.maximum(mean - mean.min(), 0) / max(float(np.median(mean)), 1e-2))
    top = shown.max()
    level = np.zeros(shown.shape, int) if top <= 0 else (shown / top * 9).round().astype(int)
    return ["".join(_SHADES[i] for i in row) for row in level]
