"""What Hypothesis draws: small sets of patterns with beams anywhere, empty ones among them, and ways to chunk them."""

import dask.array as da
import numpy as np
import xarray as xr
from hypothesis import strategies as st

SCAN = ("scan_y", "scan_x", "ky", "kx")
LIST = ("pattern", "ky", "kx")
#: numba compiles one version of each kernel for each of them
DTYPES = ("u2", "i4", "f4", "f8")
KINDS = ("empty", "beam", "beam", "noise", "pixel", "flat")


def as_array(data, chunks=None):
    """A DataArray over dask with the package's dimensions; `chunks` are those of the leading axes."""
    dims = SCAN if data.ndim == 4 else LIST
    lead = data.shape[:-2] if chunks is None else chunks
    return xr.DataArray(da.from_array(data, chunks=(*lead, -1, -1)), dims=dims)


def pattern(rng, kind, height, width, dtype, finite=False):
    """One pattern; beams may lie over the edge, signed types get negative noise, floats NaN and infinities."""
    out = np.zeros((height, width))
    y, x = rng.uniform(-1, height), rng.uniform(-1, width)
    if kind == "beam":
        rows, cols = np.indices(out.shape)
        out = np.rint(200 * np.exp(-((rows - y) ** 2 + (cols - x) ** 2) / rng.uniform(0.5, 4)))
        out += rng.poisson(0.3, out.shape)
    elif kind == "noise":
        out = rng.integers(0, 50, out.shape).astype(float)
    elif kind == "pixel":
        out[int(rng.integers(height)), int(rng.integers(width))] = rng.integers(1, 500)
    elif kind == "flat":
        out += rng.integers(1, 9)
    if np.dtype(dtype).kind != "u" and kind != "pixel":
        out -= rng.integers(0, 3, out.shape) * rng.integers(0, 2)
    if np.dtype(dtype).kind == "f":
        out = out * rng.uniform(0.1, 3)
        for odd in () if finite else (np.nan, np.inf, -np.inf):
            out[rng.random(out.shape) < 0.02] = odd
    return out.astype(dtype)


@st.composite
def datasets(draw, dtypes=DTYPES, smallest=1, finite=False):
    """Patterns (…, ky, kx) with height != width, at least one of them not empty."""
    if draw(st.booleans()):
        lead = (draw(st.integers(1, 7)),)
    else:
        lead = (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    height = draw(st.integers(smallest, 13))
    width = draw(st.integers(smallest, 13).filter(lambda n: n != height))
    dtype = draw(st.sampled_from(dtypes))
    n = int(np.prod(lead))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=n, max_size=n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    data = np.stack([pattern(rng, kind, height, width, dtype, finite) for kind in kinds])
    data[draw(st.integers(0, n - 1)), height // 2, -1] = 7
    return data.reshape(*lead, height, width)


@st.composite
def forward_slices(draw, shape):
    """One slice with a positive step an axis: whole, open, empty, stepped, past the end."""
    part = []
    for n in shape:
        start = draw(st.none() | st.integers(0, n))
        stop = draw(st.none() | st.integers(0, n + 2))
        part.append(slice(start, stop, draw(st.none() | st.integers(1, 3))))
    return tuple(part)


def splits(size):
    """Any way to cut an axis into chunks."""
    return st.lists(st.booleans(), min_size=size - 1, max_size=size - 1).map(
        lambda cuts: tuple(
            int(n) for n in np.diff([0, *(i + 1 for i, cut in enumerate(cuts) if cut), size])
        )
    )


def chunkings(data):
    """Any way to chunk the leading axes of patterns."""
    return st.tuples(*(splits(size) for size in data.shape[:-2]))


def shares(least=0.01):
    """Targets and coverages in (0, 1], often the ones people use."""
    return st.one_of(
        st.sampled_from([0.5, 0.9, 0.95, 0.98, 0.999, 1.0]), st.floats(least, 1.0, allow_nan=False)
    )
