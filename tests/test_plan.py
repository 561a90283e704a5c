"""Laws of the integer decisions: chunks cover, shards align, windows round up, nothing exceeds the memory."""

import math
from functools import partial

import numpy as np
import pytest
import twins
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_dask.core.chunks import (
    INNER_CHUNK_BYTES,
    MAX_TASKS,
    MIB,
    inner_chunk,
    lead_chunks,
    shard_shape,
)
from stem_dask.core.errors import ConfigError
from stem_dask.core.model import USABLE_SHARE, Worker
from stem_dask.core.window import (
    covering_radius,
    fft_size,
    needed_size,
    next_multiple,
    window_start,
)
from stem_dask.job.budget import (
    Footprint,
    most_positions,
    projected_bytes,
)

many = settings(max_examples=300, deadline=None)
PRIMES = [2, 3, 7, 13, 101, 251, 997, 4999, 10007]
sizes = st.one_of(st.integers(1, 6000), st.sampled_from(PRIMES), st.just(1))
leads = st.one_of(st.tuples(sizes), st.tuples(sizes, sizes))
bytes_of_a_pattern = st.integers(1, 40 * MIB)


def is_power_of_two(n):
    return n & (n - 1) == 0


def n_blocks(chunks, shape):
    return math.prod(math.ceil(n / c) for n, c in zip(shape, chunks, strict=True))


# --- chunks -------------------------------------------------------------------------------------


@many
@given(leads, bytes_of_a_pattern, st.one_of(st.just("auto"), st.floats(0.1, 2000)))
def test_chunks_cover_an_axis_or_are_powers_of_two(shape, pattern_bytes, chunk_mb):
    chunks = lead_chunks(shape, pattern_bytes, chunk_mb)
    assert len(chunks) == len(shape)
    for chunk, size in zip(chunks, shape, strict=True):
        assert 1 <= chunk <= size
        assert chunk == size or is_power_of_two(chunk)
    if len(shape) == 2 and chunks[0] > 1:
        assert chunks[1] == shape[1]  # whole rows before a second row
    if chunk_mb != "auto":
        assert math.prod(chunks) == 1 or math.prod(chunks) * pattern_bytes <= chunk_mb * MIB


@many
@given(leads, bytes_of_a_pattern)
def test_auto_takes_64_mib_doubled_while_there_are_too_many_tasks(shape, pattern_bytes):
    chunks = lead_chunks(shape, pattern_bytes)
    whole = math.prod(shape) * pattern_bytes
    if whole <= MAX_TASKS * 64 * MIB:
        assert math.prod(chunks) == 1 or math.prod(chunks) * pattern_bytes <= 64 * MIB
    # blocks are at least half of the target, and a rest may stay over at the end of each row
    if pattern_bytes < 16 * MIB:
        assert n_blocks(chunks, shape) <= max(4 * MAX_TASKS, shape[0])


@many
@given(leads, bytes_of_a_pattern, st.integers(1, 10**6), st.tuples(sizes, sizes))
def test_no_block_has_more_positions_than_allowed(shape, pattern_bytes, most, source):
    for part in (None, source[: len(shape)]):
        chunks = lead_chunks(shape, pattern_bytes, most=most, source_chunk=part)
        assert math.prod(chunks) <= most


footprint = st.builds(Footprint, st.integers(0, 10**8), st.integers(1, 10**8))


@many
@given(
    st.dictionaries(st.sampled_from("abc"), footprint, min_size=1),
    st.integers(1, 10**12),
    st.integers(1, 64),
)
def test_the_largest_block_that_fits(stages, limit, threads):
    worker = Worker(limit, threads)
    most = most_positions(stages, worker.room)
    usable = int(limit * USABLE_SHARE)
    assert most == 0 or projected_bytes(stages, most, worker) <= usable
    assert projected_bytes(stages, most + 1, worker) > usable


@many
@given(leads, bytes_of_a_pattern, st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_blocks_hold_whole_chunks_of_the_source(shape, pattern_bytes, source):
    source = source[: len(shape)]
    chunks = lead_chunks(shape, pattern_bytes, source_chunk=source)
    for chunk, part, size in zip(chunks, source, shape, strict=True):
        assert chunk == size or chunk % part == 0 or chunk == 1 or part == 1


@pytest.mark.parametrize(
    ("shape", "chunk_mb", "expected"),
    [
        ((1, 1), "auto", (1, 1)),
        ((1, 7), "auto", (1, 7)),
        ((1, 10007), "auto", (1, 512)),
        ((251, 241), "auto", (2, 241)),
        ((10007,), "auto", (512,)),
        ((256, 256), 1, (1, 8)),
        ((256, 256), 0.01, (1, 1)),
        ((4096, 4096), "auto", (2, 4096)),
    ],
)
def test_chunks_of_prime_and_thin_scans(shape, chunk_mb, expected):
    assert lead_chunks(shape, 131072, chunk_mb) == expected


def test_a_chunk_of_the_source_that_does_not_fit_the_memory_is_split():
    options = {"most": 10, "source_chunk": (3, 50)}
    assert lead_chunks((100, 100), MIB, **options) == (1, 8)
    assert lead_chunks((100, 100), MIB // 10, **{**options, "most": 100}) == (1, 100)
    assert lead_chunks((100, 100), MIB, source_chunk=(3, 50)) == (1, 50)


# --- shards -------------------------------------------------------------------------------------


@many
@given(leads, bytes_of_a_pattern, st.one_of(st.just("auto"), st.floats(0.1, 500)), st.data())
def test_a_shard_is_a_block(shape, pattern_bytes, chunk_mb, data):
    lead = lead_chunks(shape, pattern_bytes, chunk_mb)
    if data.draw(st.booleans()):
        lead = tuple(data.draw(st.integers(1, size)) for size in shape)
    out_bytes = data.draw(st.integers(1, pattern_bytes))
    inner = inner_chunk(lead, shape, out_bytes)
    shard = shard_shape(lead, inner)
    for part, whole, chunk, size in zip(inner, shard, lead, shape, strict=True):
        assert 1 <= part <= chunk
        assert whole % part == 0
        assert chunk <= whole < chunk + part
        if chunk < size:  # several blocks lie along the axis
            assert chunk % part == 0
            assert whole == chunk
    assert math.prod(inner) == 1 or math.prod(inner) * out_bytes <= INNER_CHUNK_BYTES


def test_prime_sizes_do_not_end_in_chunks_of_one_pattern():
    assert inner_chunk((997,), (997,), 10_000) == (64,)
    assert shard_shape((997,), (64,)) == (1024,)
    assert inner_chunk((1, 997), (1, 997), 10_000) == (1, 64)
    assert inner_chunk((7, 11), (7, 11), INNER_CHUNK_BYTES // 50) == (4, 11)
    assert inner_chunk((1, 1), (1, 1), 10 * INNER_CHUNK_BYTES) == (1, 1)


# --- window -------------------------------------------------------------------------------------


@many
@given(st.lists(st.integers(0, 40), min_size=1, max_size=50), st.floats(0.001, 1.0))
def test_covering_radius_equals_its_twin(radii, coverage):
    assert covering_radius(np.array(radii), coverage) == twins.covering_radius(radii, coverage)


def test_covering_radius_leaves_out_no_more_than_allowed():
    radii = np.arange(1, 1001)
    assert covering_radius(radii, 0.999) == 999
    assert covering_radius(radii, 1.0) == 1000
    assert covering_radius(radii, 0.9981) == 999
    assert covering_radius(radii, 1e-9) == 1
    assert covering_radius(np.array([4.0], "f4"), 0.5) == 4


@many
@given(st.integers(1, 3000), st.integers(1, 5))
def test_fft_size_is_the_next_even_product_of_small_primes(wanted, factor):
    size = fft_size(wanted, factor)
    assert twins.is_fast(size, factor)
    assert not any(twins.is_fast(n, factor) for n in range(wanted, size))


@many
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 70), st.data())
def test_a_fixed_window_of_the_needed_size_or_larger_holds_the_radius(center, after, radius, data):
    """Also a given one, such as the common size of several datasets."""
    full = center + after + 1
    needed = needed_size((center, 0), radius, (full, 1), int, align="fixed", square=False)[0]
    size = data.draw(st.integers(needed, full))
    first = window_start(center, size, full, "fixed")
    assert 0 <= first <= max(center - radius, 0)
    assert min(center + radius, full) <= first + size <= full


@many
@given(st.data())
def test_a_square_window_has_the_larger_side(data):
    height, width = (data.draw(st.integers(1, 40)) for _ in range(2))
    center = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    radius, multiple = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    align = data.draw(st.sampled_from(["fixed", "pattern"]))

    def size(radius, square):
        larger = partial(next_multiple, multiple=multiple)
        detector = (height, width)
        return needed_size(center, radius, detector, larger, align=align, square=square)

    plain = size(radius, square=False)
    try:
        side, other = size(radius, square=True)
    except ConfigError:
        # no multiple holds the larger side, or one axis is too short
        assert height != width
        assert next_multiple(max(plain), multiple) > min(height, width)
        return
    assert side == other
    assert side in (max(plain), next_multiple(max(plain), multiple))
    assert side % multiple == 0 or side == height == width or plain == (side, side)
    for smaller in range(1, radius):  # what fits is not refused for less
        assert size(smaller, square=True)[0] <= side
