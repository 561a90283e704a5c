"""Laws of the integer decisions: chunks cover, shards align, windows round up, nothing exceeds the memory."""

import math

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
from stem_dask.core.window import axis_window, covering_radius
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
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20))
def test_a_window_is_a_multiple_or_the_whole_axis(wanted, detector, multiple):
    size, cropped = axis_window(wanted, detector, multiple)
    if cropped:
        assert wanted <= size < detector
        assert size % multiple == 0
        assert size - wanted < multiple
    else:
        assert size == detector
        assert math.ceil(wanted / multiple) * multiple >= detector


@pytest.mark.parametrize("wanted", [0, -4])
def test_a_window_of_nothing_is_refused(wanted):
    with pytest.raises(ConfigError, match=f"window of {wanted} pixels .* at least 1"):
        axis_window(wanted, 10, 2)
