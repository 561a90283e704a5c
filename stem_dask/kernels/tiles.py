"""The loop that turns planes into patterns, a tile at a time."""

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

#: positions and planes of a tile, which fits the first cache: those of a line of it, and a long run of the result
_TILE, _RUN = 32, 256
#: elements between rows of a tile: without them rows of a power of two lie in the same few lines of the cache
_GAP = 32
#: bytes of a line of the cache
_LINE = 64


def turn_tiles(rows: NDArray, out: NDArray, first: int, *, past_cache: bool) -> None:
    """``out[:, first : first + n] = rows.T``.

    Parameters
    ----------
    rows : (n, positions), C-contiguous and aligned, unsigned integers
    out : (positions, pixels) of the same type, C-contiguous and aligned
    first : pixel of the first row
    past_cache : write to memory without reading it into the cache first, which is faster where ``out`` does not fit it

    Examples
    --------
    >>> out = np.zeros((2, 4), "u1")
    >>> turn_tiles(np.array([[1, 2], [3, 4]], "u1"), out, 1, past_cache=True)
    >>> out.tolist()
    [[0, 1, 3, 0], [0, 2, 4, 0]]
    """
    rows = rows.view()
    rows.setflags(write=False)  # numba compiles one version for each kind of array that it meets
    _turn(rows, np.empty((_TILE, _RUN + _GAP), rows.dtype), out, first, past_cache)


@numba.njit(nogil=True, cache=True)
def _turn(rows, tile, out, first, past_cache):  # type: ignore[no-untyped-def]
    n, positions = rows.shape
    for p0 in range(0, positions, _TILE):
        for k0 in range(0, n, _RUN):
            some = rows[k0 : k0 + _RUN, p0 : p0 + _TILE]
            for k in range(some.shape[0]):
                row = some[k]
                for p in range(row.size):
                    tile[p, k] = row[p]
            for p in range(some.shape[1]):
                run = tile[p, : some.shape[0]]
                to = out[p0 + p, first + k0 : first + k0 + run.size]
                begin = end = 0
                if past_cache:  # the whole lines of it
                    begin = min(run.size, -to.ctypes.data % _LINE // to.itemsize)
                    lines = (run.size - begin) * to.itemsize // _LINE
                    _stream(to[begin:], run[begin:], lines)
                    end = begin + lines * _LINE // to.itemsize
                for k in range(begin):
                    to[k] = run[k]
                for k in range(end, run.size):
                    to[k] = run[k]


@intrinsic
def _stream(typing, to, run, lines):  # type: ignore[no-untyped-def]
    """Copy whole lines with stores that the processor does not keep in its cache."""

    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        line = ir.VectorType(ir.IntType(64), _LINE // 8).as_pointer()
        target, source = (
            builder.bitcast(context.make_array(kind)(context, builder, array).data, line)
            for kind, array in zip(signature.args[:2], arguments[:2], strict=True)
        )
        with cgutils.for_range(builder, arguments[2]) as loop:
            values = builder.load(builder.gep(source, [loop.index]), align=1)
            store = builder.store(values, builder.gep(target, [loop.index]), align=_LINE)
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(to, run, types.intp), code
