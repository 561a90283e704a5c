"""Where arrays lie into which files are read."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stem_dask.readers.flat import buffer_for


@given(st.integers(0, 2**40), st.lists(st.integers(0, 9), min_size=1, max_size=4))
@pytest.mark.parametrize("dtype", ["u1", ">u2", "f8", "?"])
def test_it_lies_aligned_and_not_a_few_bytes_farther_into_a_page_than_the_data(
    dtype: str, offset: int, shape: list[int]
) -> None:
    array = buffer_for(offset, shape, np.dtype(dtype))
    address = array.ctypes.data
    assert (array.shape, array.dtype) == (tuple(shape), np.dtype(dtype))
    assert (array.flags.c_contiguous, array.flags.writeable) == (True, True)
    array[...] = 1  # is all its own
    assert array.sum() == math.prod(shape)
    if array.size:
        assert address % 16 == 0
        assert (address - offset) % 64 >= 32
